"""Several files as one policy: what unites, what contradicts, and that their order never matters."""

from __future__ import annotations

from dataclasses import replace
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.engine import decide
from policies.errors import PolicyError
from policies.index import Policy
from policies.load import Source, load
from policies.model import Mode, Verdict
from policies.words import parse_words


def read(*texts: str) -> Policy:
    sources = [Source(f"{name}.yaml", dedent(text)) for name, text in zip("abcdef", texts, strict=False)]
    return merge(sources)


def merge(sources: list[Source]) -> Policy:
    return load(sources, catalogue={}, tags={}, is_public_suffix=lambda name: name == "com")


def problems(*texts: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        read(*texts)
    return [str(problem) for problem in caught.value.problems]


def test_one_workload_of_several_files_has_the_rules_of_all() -> None:
    policy = read(
        "version: 1\nworkloads: {app: {rules: [{host: a.example}], match: {user: x}}}",
        "version: 1\nworkloads: {app: {rules: [{host: b.example}], use: [s]}}",
        "version: 1\nsets: {s: [{dns: c.example}]}",
    )

    assert [str(rule) for rule in policy.workloads["app"].rules] == [
        "a.yaml:2 (app/rules[0])",
        "b.yaml:2 (app/rules[0])",
        "c.yaml:2 (app/use[0]/s[0])",
    ]
    assert policy.workloads["app"].match is not None


def test_guards_and_tests_of_all_files_unite() -> None:
    policy = read(
        "version: 1\nguard: [{host: a.example, deny: all}]\nworkloads: {app: {}}",
        "version: 1\nguard: [{host: b.example, deny: all}]\ntests: {app: {deny: [tls://b.example]}}",
    )

    assert [str(rule) for rule in policy.guard] == ["a.yaml:2 (guard[0])", "b.yaml:2 (guard[0])"]
    assert [test.words for test in policy.tests] == ["tls://b.example"]


def test_a_match_may_be_repeated_identically_in_any_order() -> None:
    policy = read(
        "version: 1\nworkloads: {app: {match: {address: [10.0.0.0/8, 10.1.0.0/16]}}}",
        "version: 1\nworkloads: {app: {match: {address: [10.1.0.0/16, 10.0.0.0/8]}}}",
    )

    assert policy.workloads["app"].match is not None


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ("match: {user: x}", "match: {user: y}", "match"),
        ("mode: audit", "mode: enforce", "mode"),
        ("logQuery: true", "logQuery: false", "logQuery"),
        ("ech: allow", "ech: deny", "ech"),
    ],
)
def test_two_files_that_contradict_each_other_are_both_named(first: str, second: str, key: str) -> None:
    found = problems(f"version: 1\nworkloads: {{app: {{{first}}}}}", f"version: 1\nworkloads: {{app: {{{second}}}}}")

    assert found == [
        f'b.yaml:2:13: workload "app" has another {key} at a.yaml:2; write it in one file, or alike in both'
    ]


def test_a_set_defined_in_two_files_is_an_error() -> None:
    assert problems("version: 1\nsets: {s: []}", "version: 1\nsets: {s: []}") == [
        'b.yaml:2:8: set "s" is defined twice, first at a.yaml:2; give one of them another name'
    ]


def test_tests_of_a_workload_that_no_file_defines_are_an_error() -> None:
    assert problems(
        "version: 1\nworkloads: {weather: {}}", "version: 1\ntests: {wether: {deny: [tls://x.example]}}"
    ) == ['b.yaml:2:25: tests of workload "wether", which no file defines; did you mean "weather"?']


def test_unknown_is_reserved_and_may_be_tested_without_rules() -> None:
    assert len(read("version: 1\ntests: {unknown: {deny: [tls://x.example]}}").tests) == 1


def test_problems_of_all_files_are_reported_together_in_file_order() -> None:
    found = problems("version: 2", "version: 1\nworkloads: {app: {rules: [{hots: x}]}}", "- [", "version: 3")

    assert [problem.split(": ")[0] for problem in found] == ["a.yaml:1:10", "b.yaml:2:28", "c.yaml:2:1", "d.yaml:1:10"]


def test_contradictions_between_files_are_found_by_the_index() -> None:
    found = problems(
        "version: 1\nworkloads: {app: {rules: [{host: a.example}]}}",
        "version: 1\nworkloads: {app: {rules: [{host: a.example, tls: inspect}]}}",
    )

    assert len(found) == 1
    assert "a.yaml:2" in found[0]
    assert "b.yaml:2" in found[0]


def test_no_file_at_all_is_a_policy_that_denies_everything() -> None:
    assert read().workloads == {}


# --- mode ----------------------------------------------------------------------------------------------------------

AUDIT = "version: 1\nmode: audit\n"
ENFORCE = "version: 1\n"


def modes(*texts: str) -> dict[str, Mode]:
    return {name: workload.mode for name, workload in read(*texts).workloads.items()}


def test_a_workload_enforces_unless_something_says_audit() -> None:
    assert modes(ENFORCE + "workloads: {app: {}}") == {"app": Mode.ENFORCE}


def test_the_mode_of_a_workload_wins_over_the_top_of_its_file() -> None:
    assert modes(AUDIT + "workloads: {app: {mode: enforce}, other: {}}") == {"app": Mode.ENFORCE, "other": Mode.AUDIT}


def test_audit_at_the_top_of_one_file_leaves_the_workloads_of_others_enforced() -> None:
    assert modes(AUDIT + "workloads: {mine: {}}", ENFORCE + "workloads: {yours: {}}") == {
        "mine": Mode.AUDIT,
        "yours": Mode.ENFORCE,
    }


def test_audit_at_the_top_of_a_file_does_not_reach_a_workload_it_shares() -> None:
    assert problems(AUDIT + "workloads: {app: {}}", ENFORCE + "workloads: {app: {}}") == [
        'a.yaml:3:13: mode: audit of this file does not reach workload "app", which another file defines too; '
        "write mode: audit in the workload"
    ]


def test_a_shared_workload_may_say_audit_itself() -> None:
    assert modes(AUDIT + "workloads: {app: {mode: audit}}", ENFORCE + "workloads: {app: {}}") == {"app": Mode.AUDIT}


def test_audit_at_the_top_does_not_reach_sources_that_match_nothing() -> None:
    policy = read(AUDIT + "workloads: {app: {}}")

    assert not decide(policy, parse_words("unknown", "tls://x.example")).is_allow


# --- order ---------------------------------------------------------------------------------------------------------

RULES = [
    "{host: a.example, tls: inspect, allow: ['GET /x/**']}",
    "{host: a.example, tls: inspect, allow: ['POST /y'], deny: ['* /x/secret']}",
    "{host: a.example, ports: 8443, tls: inspect}",
    "{host: '*.example', ports: [80, 443]}",
    "{host: '*.b.example', ports: [443, 8443]}",
    "{host: b.example, deny: all}",
    "{host: c.b.example, until: 1969-12-31}",
    "{host: c.b.example, ports: 8443, private: true}",
    "{tcp: 'c.b.example:22'}",
    "{tcp: 10.0.0.0/8:22}",
    "{tcp: 10.1.0.0/16:22-23, until: 1969-12-31}",
    "{udp: 'time.example:4460', budget: 1KiB/h}",
    "{ntp: time.example}",
    "{dns: '*.c.example'}",
]
WORDS = [
    *(f"{method} https://a.example{path}" for method in ("GET", "POST") for path in ("/x", "/x/secret", "/y", "/../y")),
    *(
        f"tls://{host}:{port}"
        for host in ("a.example", "b.example", "x.b.example", "c.b.example")
        for port in (443, 8443)
    ),
    "tls://d.example",
    "GET http://x.b.example/",
    "GET http://d.example/",
    *(f"tcp://{where}" for where in ("c.b.example:22", "c.b.example:23", "10.1.2.3:22", "10.2.3.4:22", "10.1.2.3:23")),
    "udp://time.example:4460",
    "ntp://time.example",
    "ntp://d.example",
    *(
        f"dns://{host}"
        for host in ("a.example", "b.example", "x.c.example", "c.example", "time.example", "example", "com")
    ),
]


def spread(rules: list[str], files: int) -> list[Source]:
    """These rules, dealt out to so many files."""
    hands = [rules[index::files] for index in range(files)]
    return [
        Source(f"{name}.yaml", "version: 1\nworkloads:\n  app:\n    rules:\n" + "".join(f"      - {r}\n" for r in hand))
        for name, hand in zip("abc", hands, strict=False)
        if hand
    ]


def answers(policy: Policy) -> list[Verdict]:
    """The verdicts without the rule they cite: of equal rules one or another may be named."""
    verdicts = [decide(policy, parse_words("app", words)) for words in WORDS]
    return [replace(verdict, rule=None) for verdict in verdicts]


@given(st.permutations(RULES), st.integers(1, 3))
@settings(max_examples=60)
def test_permuted_rules_and_files_give_the_same_verdicts(rules: list[str], files: int) -> None:
    sources = spread(rules, files)
    expected = answers(merge(spread(RULES, 1)))

    assert answers(merge(sources)) == expected
    assert answers(merge(sources[::-1])) == expected


def test_the_sample_of_the_order_test_meets_allows_and_many_reasons() -> None:
    found = answers(merge(spread(RULES, 1)))

    assert sum(verdict.is_allow for verdict in found) >= 10
    assert len({verdict.reason for verdict in found}) >= 8


def test_permuted_files_even_cite_the_same_rules() -> None:
    sources = spread(RULES, 3)

    assert merge(sources) == merge(sources[::-1])
