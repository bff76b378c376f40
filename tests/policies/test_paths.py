import re
import time
from pathlib import Path as File
from typing import TypedDict

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pytest_benchmark.fixture import BenchmarkFixture

from policies.paths import MalformedPath, MalformedPattern, Path, parse_entry, parse_path, parse_path_pattern


class Vector(TypedDict, total=False):
    id: str
    target: str
    encoded_slash: bool
    verdict: str
    segments: list[str]
    why: str


VECTORS: list[Vector] = yaml.safe_load((File(__file__).parents[1] / "vectors" / "paths.yaml").read_text("utf-8"))
READ = [vector for vector in VECTORS if vector["verdict"] == "ok"]
REFUSED = [vector for vector in VECTORS if vector["verdict"] == "malformed"]


def test_vectors_are_of_two_kinds_and_have_names_of_their_own() -> None:
    assert len(READ) + len(REFUSED) == len(VECTORS)
    assert len(REFUSED) >= 60
    assert len({vector["id"] for vector in VECTORS}) == len(VECTORS)


@pytest.mark.parametrize("vector", READ, ids=lambda vector: vector["id"])
def test_path_is_decoded_once_and_kept_as_received(vector: Vector) -> None:
    path = parse_path(vector["target"], encoded_slash=vector.get("encoded_slash", False))
    assert path.segments == tuple(vector["segments"])
    assert path.original == vector["target"].split("?")[0]


@pytest.mark.parametrize("vector", REFUSED, ids=lambda vector: vector["id"])
def test_ambiguous_spelling_is_refused_with_its_reason(vector: Vector) -> None:
    with pytest.raises(MalformedPath) as raised:
        parse_path(vector["target"], encoded_slash=vector.get("encoded_slash", False))
    assert vector["why"] in str(raised.value)
    assert str(raised.value).isascii()
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("target", ["/a%2Fb", "/a%2fb"])
def test_encoded_slash_is_a_plain_character_only_where_the_rule_says_so(target: str) -> None:
    assert parse_path(target, encoded_slash=True).segments == ("a/b",)
    with pytest.raises(MalformedPath, match="encodedSlash"):
        parse_path(target)


def test_message_stays_short() -> None:
    with pytest.raises(MalformedPath) as raised:
        parse_path("/" + "a\x01" * 50_000)
    assert len(str(raised.value)) < 500


ADMITS = [
    # pattern, target, admitted
    ("/", "/", True),
    ("/", "/a", False),
    ("/search", "/search", True),
    ("/search", "/search?q=Oslo", True),
    ("/search", "/search/", False),
    ("/search", "/Search", False),
    ("/search", "/%73earch", True),
    ("/search", "/search;x", False),
    ("/search;x", "/search;x", True),
    ("/search;x", "/search%3Bx", True),
    ("/search;x", "/search", False),
    ("/search/", "/search/", True),
    ("/search/", "/search", False),
    ("/a/*/b", "/a/x/b", True),
    ("/a/*/b", "/a/x;y/b", True),
    ("/a/*/b", "/a/x/y/b", False),
    ("/a/*/b", "/a/b", False),
    ("/a/*", "/a/x", True),
    ("/a/*", "/a/", False),
    ("/a/*", "/a", False),
    ("/a/*", "/a/x/", False),
    ("/*", "/", False),
    ("/search/**", "/search", True),
    ("/search/**", "/search/", True),
    ("/search/**", "/search/a", True),
    ("/search/**", "/search/a/b/c/", True),
    ("/search/**", "/searching", False),
    ("/search/**", "/SEARCH/a", False),
    ("/search/**", "/", False),
    ("/**", "/", True),
    ("/**", "/a/b/", True),
    ("/a/*/**", "/a/x", True),
    ("/a/*/**", "/a/x/y", True),
    ("/a/*/**", "/a/", False),
    ("/a/*/**", "/a", False),
    ("/café", "/caf%C3%A9", True),
    ("/café", "/CAF%C3%A9", False),
    ("/a+b", "/a%2Bb", True),
]


@pytest.mark.parametrize(("pattern", "target", "admitted"), ADMITS)
def test_allow_compares_exactly(pattern: str, target: str, admitted: bool) -> None:
    assert parse_path_pattern(pattern).admits(parse_path(target)) is admitted


DENIES = [
    # pattern, target, denied
    ("/", "/", True),
    ("/", "/a", False),
    ("/forecasts", "/forecasts", True),
    ("/forecasts", "/FORECASTS", True),
    ("/Forecasts", "/forecasts", True),
    ("/forecasts", "/%46orecast%53", True),
    ("/forecasts", "/forecasts/", True),
    ("/forecasts/", "/forecasts", True),
    ("/forecasts", "/forecasts;v=1", True),
    ("/forecasts", "/forecasts%3Bv=1", True),
    ("/forecasts", "/Forecasts;V=1/", True),
    ("/forecasts;v=1", "/forecasts;V=1", True),
    ("/forecasts;v=1", "/forecasts", False),
    ("/forecasts;v=1", "/forecasts;v=2", False),
    ("/forecasts", "/forecasts/v1", False),
    ("/forecasts", "/forecast", False),
    ("/forecasts/**", "/forecasts", True),
    ("/forecasts/**", "/forecasts/", True),
    ("/forecasts/**", "/forecasts;x/v1/daily", True),
    ("/forecasts/**", "/FORECASTS/v1", True),
    ("/forecasts/**", "/search", False),
    ("/a/b/c", "/A;1/B;2/C;3/", True),
    ("/a/*/c", "/a/x;y/c", True),
    ("/a/*/c", "/a/c", False),
    ("/a/*", "/a/x/", True),
    ("/a/*", "/a/", False),
    ("/**", "/", True),
    ("/**", "/a/b", True),
    ("/café", "/CAF%C3%A9", True),
    ("/café", "/caf%C3%89", False),  # folded in ASCII alone
    ("/k", "/%E2%84%AA", False),  # a Kelvin sign is no k
]


@pytest.mark.parametrize(("pattern", "target", "denied"), DENIES)
def test_deny_compares_generously(pattern: str, target: str, denied: bool) -> None:
    assert parse_path_pattern(pattern).denies(parse_path(target)) is denied


ENCODED_SLASH_DENIES = [
    # pattern, target, denied
    ("/a/b", "/a%2Fb", True),
    ("/a/b", "/A%2fB/", True),
    ("/a/b", "/a/b%2F", True),
    ("/a/b", "/%2Fa/b", True),
    ("/a/b", "/a%2F%2Fb", True),
    ("/a/b", "/a;x%2Fy/b", True),  # an origin that cuts parameters, then decodes
    ("/a/b", "/a;x%2Fb", True),  # an origin that decodes, then cuts parameters
    ("/a/b", "/a%2Fb;x", True),
    ("/a/b", "/a%2Fc", False),
    ("/a/b/**", "/a%2Fb%2Fc/d", True),
    ("/a/*/c", "/a%2Fb%2Fc", True),
    ("/a/*/c", "/a/b%2Fx/c", True),  # as one segment
    ("/", "/%2F", True),
]


@pytest.mark.parametrize(("pattern", "target", "denied"), ENCODED_SLASH_DENIES)
def test_deny_is_not_escaped_by_an_encoded_slash(pattern: str, target: str, denied: bool) -> None:
    assert parse_path_pattern(pattern).denies(parse_path(target, encoded_slash=True)) is denied


@pytest.mark.parametrize(
    ("pattern", "target", "admitted"),
    [("/a/*", "/a/b%2Fc", True), ("/a/b/c", "/a/b%2Fc", False), ("/a/**", "/a%2Fb", False), ("/*", "/a%2Fb", True)],
)
def test_allow_takes_an_encoded_slash_for_a_plain_character(pattern: str, target: str, admitted: bool) -> None:
    assert parse_path_pattern(pattern).admits(parse_path(target, encoded_slash=True)) is admitted


@pytest.mark.parametrize(
    "text", ["/", "/a", "/a/", "/a/*/b", "/**", "/search/**", "/*/**", "/a;x=1", "/søk", "/...", "/@x"]
)
def test_pattern_is_shown_as_written(text: str) -> None:
    assert str(parse_path_pattern(text)) == text


BAD_PATTERNS = {
    "empty": ("", 'path "" does not begin with /; did you mean "/"?'),
    "relative": ("search/**", 'path "search/**" does not begin with /; did you mean "/search/**"?'),
    "star": ("*", 'path "*" does not begin with /; every path is "/**"'),
    "two-stars": ("**", 'path "**" does not begin with /; every path is "/**"'),
    "all": ("all", 'path "all" does not begin with /; every path is "/**"'),
    "url": ("https://a.example/b", 'the rule names the host; did you mean "/b"?'),
    "partial-star": ("/v*", 'path "/v*" has a * that is part of a segment; a * is a whole segment'),
    "extension-star": ("/a/*.json", "a * is a whole segment"),
    "three-stars": ("/a/***", "a * is a whole segment"),
    "star-with-parameters": ("/*;x", "a * is a whole segment"),
    "rest-inside": ("/a/**/b", 'path "/a/**/b" has a ** before its end; one segment is *'),
    "rest-then-slash": ("/a/**/", "has a ** before its end"),
    "percent": ("/caf%C3%A9", "has a %; write the decoded character"),
    "query": ("/search?q=*", "has a ?; leave the query out"),
    "fragment": ("/a#b", "has a #; leave the fragment out"),
    "backslash": ("/a\\b", "a request with one is always refused"),
    "space": ("/a b", "a segment with a space is a *"),
    "newline": ("/a\n", "a segment with a space is a *"),
    "nul": ("/a\x00", "space or control character"),
    "two-slashes": ("//", "has an empty segment; a request with one is always refused"),
    "inner-empty": ("/a//b", "has an empty segment"),
    "empty-before-rest": ("/a//**", "has an empty segment"),
    "dot": ("/./a", 'has the segment "."; a request with one is always refused'),
    "dot-dot": ("/a/..", 'has the segment ".."'),
    "dot-dot-parameters": ("/a/..;x", 'has the segment "..;x"'),
    "bare-parameters": ("/a/;x/b", 'has the segment ";x"'),
}


@pytest.mark.parametrize(("text", "message"), BAD_PATTERNS.values(), ids=BAD_PATTERNS)
def test_pattern_that_cannot_be_meant_is_an_error_with_a_repair(text: str, message: str) -> None:
    with pytest.raises(MalformedPattern) as raised:
        parse_path_pattern(text)
    assert message in str(raised.value)
    assert str(raised.value) == f"{raised.value.message}; {raised.value.repair}"


@pytest.mark.parametrize(
    ("text", "methods", "path"),
    [
        ("all", set(), None),
        ("* /forecasts/**", set(), "/forecasts/**"),
        ("GET /search/**", {"GET"}, "/search/**"),
        ("GET,POST /a", {"GET", "POST"}, "/a"),
        ("  GET   /a ", {"GET"}, "/a"),
        ("M-SEARCH /a", {"M-SEARCH"}, "/a"),
        ("RPC_IN_DATA /a", {"RPC_IN_DATA"}, "/a"),
    ],
)
def test_entry_is_methods_and_a_path(text: str, methods: set[str], path: str | None) -> None:
    found, pattern = parse_entry(text)
    assert found == methods
    assert (pattern and str(pattern)) == path


BAD_ENTRIES = {
    "empty": ("", 'entry "" is not METHOD[,METHOD] PATH; such as "GET /search/**"'),
    "path-alone": ("/a", 'entry "/a" is not METHOD[,METHOD] PATH; did you mean "GET /a" or "* /a"?'),
    "method-alone": ("GET", 'did you mean "GET /**"?'),
    "star-alone": ("*", 'did you mean "* /**"?'),
    "all-upper-case": ("ALL", 'did you mean "all"?'),
    "all-with-a-path": ("all /a", '"all" is not a list of methods; any method is "* /a"'),
    "lower-case": ("get /x", 'method "get" is not upper case; did you mean GET?'),
    "mixed-case": ("GET,Post /x", 'method "Post" is not upper case; did you mean POST?'),
    "space-after-comma": ("GET, POST /x", 'did you mean "GET,POST /x"?'),
    "space-between": ("GET POST /x", 'did you mean "GET,POST /x"?'),
    "two-paths": ("GET /a /b", "is not METHOD[,METHOD] PATH"),
    "empty-method": ("GET,,POST /x", "several are written GET,POST"),
    "trailing-comma": ("GET, /x", '"GET," is not a list of methods; several are written GET,POST'),
    "pipe": ("GET|POST /x", "several are written GET,POST"),
    "star-among-methods": ("GET,* /x", 'any method is "* /x"'),
    "no-method-characters": ("(GET) /x", "is not a list of methods"),
    "url": ("GET https://a.example/b", 'did you mean "/b"?'),
    "star-path": ("GET *", 'every path is "/**"'),
    "swapped": ("/x GET", 'path "GET" does not begin with /'),
}


@pytest.mark.parametrize(("text", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_entry_that_cannot_be_read_is_an_error_with_a_repair(text: str, message: str) -> None:
    with pytest.raises(MalformedPattern) as raised:
        parse_entry(text)
    assert message in str(raised.value)


TRICKY = st.text(st.sampled_from("/abAB.;*%2fF5cCeE0?#\\+ \u00e9\x00")).map(lambda text: "/" + text)
SEGMENT = st.text(st.sampled_from("aAbB;"), min_size=1, max_size=3).filter(lambda text: not text.startswith(";"))
TARGET = st.lists(SEGMENT, max_size=4).map(lambda segments: "/" + "/".join(segments)) | st.lists(
    SEGMENT, min_size=1
).map(lambda segments: "/" + "/".join(segments) + "/")
PATTERN = st.builds(
    lambda segments, tail: "/" + "/".join([*segments, *tail]),
    st.lists(SEGMENT | st.just("*"), max_size=4),
    st.sampled_from([[], ["**"]]),
)


@given(st.text() | TRICKY, st.booleans())
@example("/%", False)
def test_garbage_gives_a_path_or_malformed(target: str, encoded_slash: bool) -> None:
    try:
        path = parse_path(target, encoded_slash=encoded_slash)
    except MalformedPath:
        return
    assert isinstance(path, Path)
    assert target.startswith(path.original)
    assert "" not in path.segments[:-1]
    assert len(path.segments) == path.original.count("/")
    names = {part.partition(";")[0] for segment in path.segments for part in segment.split("/")}
    assert not names & {".", ".."}
    assert encoded_slash or not any("/" in segment for segment in path.segments)
    assert not any(re.search(r"[\x00-\x1f\x7f\\]|%[0-9A-Fa-f]{2}", segment) for segment in path.segments)


@given(st.text() | TRICKY)
def test_garbage_gives_a_pattern_or_malformed(text: str) -> None:
    try:
        pattern = parse_path_pattern(text)
    except MalformedPattern:
        return
    assert str(pattern) == text


@given(st.text())
@example("a b")
def test_garbage_gives_an_entry_or_malformed(text: str) -> None:
    try:
        methods, _ = parse_entry(text)
    except MalformedPattern:
        return
    assert all(method == method.upper() for method in methods)


def as_expression(pattern: str) -> str:
    """The plain twin of a pattern: a regular expression over decoded segments joined by `/`."""
    body, rest = (pattern[: -len("/**")], "(/.*)?") if pattern.endswith("/**") else (pattern, "")
    return "".join("[^/]+" if part == "*" else re.escape(part) for part in re.split(r"((?<=/)\*(?=/|$))", body)) + rest


@given(PATTERN, TARGET)
@example("/a/**", "/a")
@example("/*", "/")
def test_allow_agrees_with_its_regular_expression(pattern: str, target: str) -> None:
    admitted = parse_path_pattern(pattern).admits(parse_path(target))
    assert admitted is bool(re.fullmatch(as_expression(pattern), target, re.DOTALL))


@given(PATTERN, TARGET)
def test_deny_agrees_with_its_regular_expression(pattern: str, target: str) -> None:
    assume(";" not in pattern)
    bare = re.sub(";[^/]*", "", target).rstrip("/").lower() or "/"
    lowered = pattern.lower()
    denied = parse_path_pattern(pattern).denies(parse_path(target))
    assert denied is bool(re.fullmatch(as_expression(lowered), bare))


@given(PATTERN, TARGET | TRICKY, st.booleans())
def test_what_a_pattern_admits_it_also_denies(pattern: str, target: str, encoded_slash: bool) -> None:
    try:
        path = parse_path(target, encoded_slash=encoded_slash)
    except MalformedPath:
        return
    entry = parse_path_pattern(pattern)
    assert entry.denies(path) or not entry.admits(path)


@given(st.lists(SEGMENT, min_size=1, max_size=4), st.lists(st.sampled_from(["/", "%2F", "%2f", "%2F%2F"]), max_size=3))
def test_no_encoding_of_slashes_escapes_a_deny(segments: list[str], slashes: list[str]) -> None:
    entry = parse_path_pattern("/" + "/".join(segment.partition(";")[0] for segment in segments))
    joined = segments[0]
    for i, segment in enumerate(segments[1:]):
        joined += (slashes[i] if i < len(slashes) else "/") + segment
    assert entry.denies(parse_path("/" + joined, encoded_slash=True))


@pytest.mark.parametrize(
    "unit", ["/a", "/a;", "a", "%41", "/%41", "a;", "/a%2F", "%25", ";", "."], ids=lambda unit: unit.replace("/", "s")
)
def test_long_target_is_read_in_linear_time(unit: str) -> None:
    started = time.process_time()
    path = parse_path("/a" + unit * 200_000, encoded_slash=True)
    parse_path_pattern("/a/*/b/**").denies(path)
    assert time.process_time() - started < 20  # squared, it would be hours


def test_usual_target_is_read_in_five_microseconds(benchmark: BenchmarkFixture) -> None:
    target = "/locations/v1/cities/autocomplete?apikey=abcdefghij&q=Oslo"
    assert benchmark(parse_path, target).segments[0] == "locations"


def test_deny_costs_little(benchmark: BenchmarkFixture) -> None:
    path = parse_path("/locations/v1/cities/autocomplete")
    assert not benchmark(parse_path_pattern("/forecasts/**").denies, path)
