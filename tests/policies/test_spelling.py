"""The nearest right word, and foreign text in a report."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.spelling import did_you_mean, nearest, quote

KEYS = ["host", "ports", "plain", "tls", "allow", "deny", "private", "encodedSlash", "upstreamPool", "serviceAccount"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("prots", "ports"),
        ("port", "ports"),
        ("Host", "host"),
        ("hsot", "host"),
        ("alow", "allow"),
        ("service_account", "serviceAccount"),
        ("service-acount", "serviceAccount"),
        ("encodeSlash", "encodedSlash"),
        ("xyz", None),
        ("h", None),
        ("", None),
        ("ports" * 20, None),
    ],
)
def test_the_nearest_key_is_the_one_that_was_meant(word: str, expected: str | None) -> None:
    assert nearest(word, KEYS) == expected


def test_without_a_near_word_all_are_named_unless_they_are_many() -> None:
    assert did_you_mean("xyz", ["host", "tcp"]) == "there is host, tcp"
    assert did_you_mean("xyz", []) == "there is none"
    assert did_you_mean("xyz", [f"word-{i}" for i in range(100)]) == "none of the 100 known is near"


def test_among_thousands_of_words_the_near_one_is_found_quickly() -> None:
    tags = [f"{service}.Region{i}" for service in ("Storage", "Sql", "AzureCloud") for i in range(1000)]

    assert nearest("Storage.Regoin7", tags) == "Storage.Region7"


def test_quoted_text_stays_on_one_short_line() -> None:
    assert quote("a\nb\x1b[31m\u202e") == '"a\\nb\\x1b[31m\\u202e"'
    assert len(quote("x" * 1000)) == 62


@cache
def plain_distance(a: str, b: str) -> int:
    """Optimal string alignment, as its definition says it."""
    if not a or not b:
        return len(a) + len(b)
    costs = [
        plain_distance(a[1:], b) + 1,
        plain_distance(a, b[1:]) + 1,
        plain_distance(a[1:], b[1:]) + (a[0] != b[0]),
    ]
    if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
        costs.append(plain_distance(a[2:], b[2:]) + 1)
    return min(costs)


WORDS = st.text("abc", max_size=7)


@given(WORDS, st.lists(WORDS, max_size=5, unique=True))
def test_no_other_word_is_nearer_than_the_nearest(word: str, known: list[str]) -> None:
    found = nearest(word, known)

    limit = max(len(word) // 3, min(2, len(word) // 2))
    distances = {candidate: plain_distance(word, candidate) for candidate in known}
    least = min(distances.values(), default=limit + 1)
    assert (found is None) == (least > limit)
    assert found is None or distances[found] == least
