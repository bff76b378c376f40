"""YAML text to nodes: our scalar rules, what is refused and where, and that no text at all gives another exception."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import PolicyError, Problem
from policies.tree import MAX_BYTES, ListNode, MapNode, Node, Scalar, Source, decode, parse
from tests.policies.trees import as_python


def read(text: str) -> Node:
    return parse(Source("p.yaml", text))


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        read(text)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("no", "text"),
        ("yes", "text"),
        ("on", "text"),
        ("10:22", "text"),
        ("0o17", "text"),
        ("0x1F", "text"),
        ("1_000", "text"),
        ("2027-01-31", "text"),
        ("10.20.0.0/16:6379", "text"),
        ("=", "text"),
        ("true", "true"),
        ("False", "False"),
        ("null", "nothing"),
        ("~", "nothing"),
        ("", "nothing"),
        ("443", "a number"),
        ("-1", "a number"),
        ("4.5", "a number"),
        ("1e3", "a number"),
        (".inf", "a number"),
        (".nan", "a number"),
        ("'443'", "text"),
        ('"true"', "text"),
        ('""', "text"),
        ("|\n  true", "text"),
    ],
)
def test_a_scalar_has_the_kind_of_yaml_1_2_core(text: str, kind: str) -> None:
    node = read(f"key: {text}")

    assert isinstance(node, MapNode)
    assert node.entries[0][1].kind == kind


def test_a_number_of_a_million_digits_is_not_computed() -> None:
    node = read("9" * 1_000_000)

    assert isinstance(node, Scalar)
    assert node.whole is None


def test_nodes_know_their_place() -> None:
    node = read("a:\n  - x\n  - {b: y}\n")

    assert isinstance(node, MapNode)
    items = node.entries[0][1]
    assert isinstance(items, ListNode)
    assert [(item.line, item.column) for item in items.items] == [(2, 5), (3, 5)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a: 1\na: 2", 'p.yaml:2:1: duplicate key "a"; line 1 has it already', id="duplicate"),
        pytest.param("a: {b: 1, 'b': 2}", 'p.yaml:1:11: duplicate key "b"; line 1 has it already', id="quoted"),
        pytest.param("a: &x 1", "p.yaml:1:4: anchor &x; remove it; what repeats belongs in a set", id="anchor"),
        pytest.param("a: &x {}", "p.yaml:1:4: anchor &x; remove it; what repeats belongs in a set", id="anchored map"),
        pytest.param("a: *x", "p.yaml:1:4: alias *x; write the value out, or make a set and use it", id="alias"),
        pytest.param(
            "<<: {a: 1}", "p.yaml:1:1: merge key <<; write the keys out, or make a set and use it", id="merge"
        ),
        pytest.param(
            "a: !!str 1",
            'p.yaml:1:4: tag "tag:yaml.org,2002:str"; remove it; quote the value if it is to be text',
            id="tag",
        ),
        pytest.param(
            "a: ! 1", 'p.yaml:1:4: tag "!"; remove it; quote the value if it is to be text', id="non-specific tag"
        ),
        pytest.param(
            "--- {}\n--- {}",
            "p.yaml:2:1: second document in one file; put it into a file of its own",
            id="second document",
        ),
        pytest.param("%YAML 1.1\n---\na: 1", "p.yaml:1:1: a policy is YAML 1.2; remove the %YAML line", id="directive"),
        pytest.param("? [a]\n: b", "p.yaml:1:3: a list cannot be a key; write text before the colon", id="list as key"),
        pytest.param(
            "a: [1\nb: 2",
            "p.yaml:2:2: not YAML: did not find expected ',' or ']'; "
            "while parsing a flow sequence that begins at line 1",
            id="unclosed list",
        ),
        pytest.param(
            "a: b: c", "p.yaml:1:5: not YAML: mapping values are not allowed in this context", id="two colons"
        ),
        pytest.param("a: x\n\x00", "p.yaml:2:1: character U+0000 cannot stand in a policy file; remove it", id="nul"),
        pytest.param("é: \x07", "p.yaml:1:4: character U+0007 cannot stand in a policy file; remove it", id="bell"),
        pytest.param("a: \ud800", "p.yaml:1:4: half a surrogate pair; save the file as UTF-8", id="surrogate"),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(text: str, expected: str) -> None:
    assert problems(text) == [expected]


def test_all_problems_before_a_syntax_error_are_reported_with_it() -> None:
    found = problems("a: &x 1\nb: *x\nb: 2\nc: [")

    assert [problem.split(": ")[0] for problem in found] == ["p.yaml:1:4", "p.yaml:2:4", "p.yaml:3:1", "p.yaml:5:1"]


def test_reports_end_at_a_hundred_problems() -> None:
    assert len(problems("a: 1\n" * 1000)) == 100


def test_a_key_with_control_characters_cannot_forge_a_line_of_the_report() -> None:
    assert problems('"x\\np.yaml:9:9: fine": 1\n"x\\np.yaml:9:9: fine": 2') == [
        'p.yaml:2:1: duplicate key "x\\np.yaml:9:9: fine"; line 1 has it already'
    ]


def test_twenty_levels_are_read_and_twenty_one_are_not() -> None:
    read("[" * 20 + "]" * 20)

    assert problems("[" * 21 + "]" * 21) == ["p.yaml:1:21: nested deeper than 20 levels"]


def test_a_million_brackets_end_at_the_limit_of_depth() -> None:
    assert problems("[" * 1_000_000) == ["p.yaml:1:21: nested deeper than 20 levels"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeff", "\n\n"])
def test_a_file_without_a_document_is_an_empty_mapping(text: str) -> None:
    assert read(text) == MapNode((), 1, 1)


def test_a_byte_order_mark_is_accepted_and_moves_no_column() -> None:
    assert decode("p.yaml", b"\xef\xbb\xbfa: 1").text == "a: 1"
    assert problems("\ufeffa: *x") == problems("a: *x")


def test_a_byte_that_is_not_utf8_is_named_with_its_place() -> None:
    with pytest.raises(PolicyError) as caught:
        decode("p.yaml", "a: é\nb: ".encode() + b"\xff")

    assert str(caught.value) == "p.yaml:2:4: byte 0xff is not UTF-8; save the file as UTF-8"


def test_a_file_over_32_mib_is_refused_before_it_is_parsed() -> None:
    larger = "p.yaml:1:1: larger than 32 MiB; split it into several files"
    with pytest.raises(PolicyError) as caught:
        decode("p.yaml", b"#" * (MAX_BYTES + 1))

    assert str(caught.value) == larger
    assert problems("#" * (MAX_BYTES + 1)) == [larger]
    assert problems("é" * (MAX_BYTES // 2 + 1)) == [larger]


def test_exactly_32_mib_are_read() -> None:
    assert read("#" * MAX_BYTES) == MapNode((), 1, 1)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_json_is_read_as_json_reads_it(written: object) -> None:
    assert as_python(read(json.dumps(written, indent=1, ensure_ascii=False))) == written


@given(st.text() | st.text("ab:- {}[],&*!|>'\"#%?<\n\t\\é\x00\ufeff"))
@settings(max_examples=500)
def test_any_text_gives_nodes_or_a_policy_error_with_places(text: str) -> None:
    found: tuple[Problem, ...] | None = None
    try:
        read(text)
    except PolicyError as error:
        found = error.problems

    assert found is None or (found and all(each.place.line >= 1 and each.place.column >= 1 for each in found))


@given(st.binary())
def test_any_bytes_give_text_or_a_policy_error(content: bytes) -> None:
    try:
        text = decode("p.yaml", content).text
    except PolicyError:
        with pytest.raises(UnicodeDecodeError):
            content.decode("utf-8")
    else:
        assert text == content.decode("utf-8-sig")
