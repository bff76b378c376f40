"""Attempts in words: what each spelling means, what is no attempt at all, and the steps a gate would judge."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.engine import decide
from policies.index import Policy
from policies.model import Address, Attempt, Reason, Stage
from policies.words import MalformedWords, answer, enforced, ladder, parse_words
from tests.builders import attempt, policy, rules

# words -> stage, name, port, and for HTTP method and target
MEANINGS = [
    ("GET https://a.example/search?q=Oslo", Stage.HTTP, "a.example", 443, "GET", "/search?q=Oslo"),
    ("GET https://a.example", Stage.HTTP, "a.example", 443, "GET", "/"),
    ("GET https://a.example?q=1", Stage.HTTP, "a.example", 443, "GET", "/?q=1"),
    ("POST https://a.example:8443/x", Stage.HTTP, "a.example", 8443, "POST", "/x"),
    ("GET https://a.example:/x", Stage.HTTP, "a.example", 443, "GET", "/x"),
    ("GET http://a.example/x", Stage.HTTP, "a.example", 80, "GET", "/x"),
    ("  GET \t https://A.Example./x ", Stage.HTTP, "a.example", 443, "GET", "/x"),
    ("GET HTTPS://bücher.example/x", Stage.HTTP, "xn--bcher-kva.example", 443, "GET", "/x"),
    ("GET https://a.example/x@y:1", Stage.HTTP, "a.example", 443, "GET", "/x@y:1"),
    ("tls://a.example", Stage.TLS, "a.example", 443, "", ""),
    ("tls://a.example:8443/", Stage.TLS, "a.example", 8443, "", ""),
    ("ntp://a.example", Stage.NTP, "a.example", 123, "", ""),
    ("ntp://a.example:123", Stage.NTP, "a.example", 123, "", ""),
    ("dns://a.example", Stage.DNS, "a.example", 53, "", ""),
]


@pytest.mark.parametrize(
    ("words", "stage", "host", "port", "method", "target"), MEANINGS, ids=[row[0] for row in MEANINGS]
)
def test_words_mean(words: str, stage: Stage, host: str, port: int, method: str, target: str) -> None:
    meant = attempt(words)

    assert (meant.stage, meant.host, meant.port, meant.method, meant.target) == (stage, host, port, method, target)
    assert meant.fault is None
    assert meant.plain == words.strip().startswith("GET http:")


@pytest.mark.parametrize(
    ("words", "names", "address", "port"),
    [
        ("tcp://github.com:22", ("github.com",), None, 22),
        ("tcp://10.20.3.4:6379", (), ip_address("10.20.3.4"), 6379),
        ("tcp://[2001:db8::1]:443", (), ip_address("2001:db8::1"), 443),
        ("udp://a.example:443", ("a.example",), None, 443),
        ("udp://[::ffff:10.0.0.1]:53", (), ip_address("::ffff:10.0.0.1"), 53),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_opaque_bytes_go_to_a_name_or_to_an_address(
    words: str, names: tuple[str, ...], address: Address | None, port: int
) -> None:
    meant = attempt(words)

    assert (meant.host, meant.names, meant.address, meant.port) == (None, names, address, port)


FAULTS = [
    ("tls://10.20.3.4", Reason.MALFORMED_NAME, Stage.TLS),
    ("tls://[::1]:443", Reason.MALFORMED_NAME, Stage.TLS),
    ("tls://127.1", Reason.MALFORMED_NAME, Stage.TLS),
    ("tls://2130706433", Reason.MALFORMED_NAME, Stage.TLS),
    ("tls://a..example", Reason.MALFORMED_NAME, Stage.TLS),
    ("tls://a.example%00.evil.example", Reason.MALFORMED_NAME, Stage.TLS),
    ("dns://10.20.3.4", Reason.MALFORMED_NAME, Stage.DNS),
    ("ntp://-a.example", Reason.MALFORMED_NAME, Stage.NTP),
    ("tcp://a..example:22", Reason.MALFORMED_NAME, Stage.TCP),
    ("tcp://0x7f.1:22", Reason.MALFORMED_NAME, Stage.TCP),
    ("tcp://[fe80::1%eth0]:22", Reason.MALFORMED_NAME, Stage.TCP),
    ("GET https://10.20.3.4/", Reason.MALFORMED_NAME, Stage.TLS),
    ("GET http://10.20.3.4/", Reason.MALFORMED_NAME, Stage.HTTP),
    ("GET https://a.example\\@b.example/", Reason.MALFORMED_REQUEST, Stage.HTTP),
    ("GET https://a.example@b.example/", Reason.MALFORMED_REQUEST, Stage.HTTP),
    ("GET https://u:p@a.example/", Reason.MALFORMED_REQUEST, Stage.HTTP),
    ("GET https://a.example/x/../y", Reason.MALFORMED_PATH, Stage.HTTP),
    ("GET https://a.example//x", Reason.MALFORMED_PATH, Stage.HTTP),
    ("GET https://a.example/x#y", Reason.MALFORMED_PATH, Stage.HTTP),
    ("GET https://a.example#y", Reason.MALFORMED_PATH, Stage.HTTP),
    ("GET https://a.example/x y", Reason.MALFORMED_PATH, Stage.HTTP),
    ("GET https://a.example/straße", Reason.MALFORMED_PATH, Stage.HTTP),
    ("GET https://a.example/%zz", Reason.MALFORMED_PATH, Stage.HTTP),
    ("GET https://a.example/?q=a b", Reason.MALFORMED_PATH, Stage.HTTP),
]


@pytest.mark.parametrize(("words", "fault", "stage"), FAULTS, ids=[row[0] for row in FAULTS])
def test_what_a_gate_could_receive_is_an_attempt_and_a_denial(words: str, fault: Reason, stage: Stage) -> None:
    everything = rules(
        '- {host: a.example, ports: [80, 443], tls: inspect}\n- {host: b.example}\n- {tcp: "0.0.0.0/0:22"}'
    )
    meant = attempt(words)

    verdict = answer(ladder(everything, meant))

    assert (meant.fault, meant.stage) == (fault, stage)
    assert (verdict.reason, verdict.is_allow) == (fault, False)


def test_an_encoded_slash_is_for_the_rule_to_say() -> None:
    meant = attempt("GET https://a.example/x%2Fy")

    assert meant.fault is None
    assert answer(ladder(rules("- {host: a.example, tls: inspect}"), meant)).reason is Reason.MALFORMED_PATH
    assert answer(ladder(rules("- {host: a.example, tls: inspect, encodedSlash: literal}"), meant)).is_allow


NO_ATTEMPT = [
    ("", "such as 'GET https://host/path'"),
    ("   ", "such as 'GET https://host/path'"),
    ("https://a.example/x", "write 'GET https://a.example/x'"),
    ("http://a.example", "write 'GET http://a.example/'"),
    ("a.example", "write tls://a.example"),
    ("a.example/x", "write 'GET https://a.example/x'"),
    ("a.example:22", "write tcp://a.example:22"),
    ("a.example:443", "write tls://a.example"),
    ("GET a.example/x", "write GET https://a.example/x"),
    ("GET", "write tls://GET"),
    ("gopher://a.example", "use one of https, http, tls, tcp, udp, quic, ntp, dns"),
    ("htps://a.example", "did you mean https://?"),
    ("tpc://a.example:22", "did you mean tcp://?"),
    ("ssh://git@github.com/x", "write tcp://github.com:22"),
    ("redis://a.example:7000", "write tcp://a.example:7000"),
    ("wss://a.example/x", "write GET https://a.example/x"),
    ("h3://a.example", "write quic://a.example"),
    ("quic://a.example/x", "write quic://a.example"),
    ("tcp://a.example", "write tcp://a.example:PORT"),
    ("udp://[2001:db8::1]", "write udp://[2001:db8::1]:PORT"),
    ("tcp://2001:db8::1:443", "write tcp://[2001:db8::1]:443"),
    ("tcp://[2001:db8::1:443", "write IPv6 as tcp://[2001:db8::1]:443"),
    ("tcp://[2001:db8::1]443", "write IPv6 as tcp://[2001:db8::1]:443"),
    ("tcp://a.example:0", "a number from 1 to 65535"),
    ("tcp://a.example:65536", "a number from 1 to 65535"),
    ("tcp://a.example:٤٤٣", "a number from 1 to 65535"),
    ("tcp://a.example:1" + "0" * 5000, "a number from 1 to 65535"),
    ("tcp://git@github.com:22", 'leave out "git@"'),
    ("tls://a.example/x", "or GET https://a.example/x"),
    ("tcp://a.example:22/x", "write tcp://a.example"),
    ("GET tls://a.example", "GET https://a.example/path"),
    ("ntp://a.example:1123", "write ntp://a.example"),
    ("dns://a.example:5353", "write dns://a.example"),
    ("tls://", "no host"),
    ("GET https:///x", "no host"),
    ("tcp://:22", "no host"),
]


@pytest.mark.parametrize(("words", "repair"), NO_ATTEMPT, ids=[row[0][:30] or "nothing" for row in NO_ATTEMPT])
def test_what_is_no_attempt_says_how_to_write_one(words: str, repair: str) -> None:
    with pytest.raises(MalformedWords) as error:
        attempt(words)

    assert repair in str(error.value)


@given(st.text(max_size=60))
def test_any_text_is_an_attempt_with_a_verdict_or_no_attempt(text: str) -> None:
    everything = rules("- {host: a.example, ports: [80, 443], tls: inspect}")
    try:
        meant = attempt(text)
    except MalformedWords:
        return
    assert decide(everything, meant).reason


SCHEME = st.sampled_from(
    ["GET https://", "get http://", "tls://", "tcp://", "udp://", "quic://", "ntp://", "dns://", "X https://"]
)
PIECES = st.lists(st.sampled_from([*"a.:@/?#[]%\\ *0é", "a.example", ":443", "10.0.0.1", "::1"]), max_size=8)


@given(SCHEME, PIECES)
def test_any_authority_is_an_attempt_or_no_attempt(scheme: str, pieces: list[str]) -> None:
    everything = rules("- {host: a.example, ports: [80, 443], tls: inspect}")
    try:
        meant = attempt(scheme + "".join(pieces))
    except MalformedWords:
        return
    steps = ladder(everything, meant)
    assert not answer(steps).is_allow or (meant.host == "a.example" and meant.fault is None)


# --- the ladder ----------------------------------------------------------------------------------------------------

WEATHER = """
- {host: a.example, tls: inspect, ports: [80, 443], allow: ["GET /search/**"]}
- host: b.example
- tcp: c.example:22
- tcp: 10.20.0.0/16:6379
- {host: g.example, deny: all}
- ntp: n.example
- dns: d.example
"""


def judged(of: Policy, meant: Attempt) -> list[str]:
    return [f"{step.stage} {step.verdict.action} {step.verdict.reason}" for step in ladder(of, meant)]


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("GET https://a.example/search", ["dns allow rule", "tls allow rule", "http allow rule"]),
        ("GET https://a.example/x", ["dns allow rule", "tls allow rule", "http deny no_allow_entry"]),
        ("GET https://a.example/x/../y", ["dns allow rule", "tls allow rule", "http deny malformed_path"]),
        ("GET http://a.example/search", ["dns allow rule", "http allow rule"]),
        ("GET https://b.example/x", ["dns allow rule", "tls allow rule"]),
        ("GET https://b.example/x/../y", ["dns allow rule", "tls allow rule"]),
        ("GET https://b.example:8443/x", ["dns allow rule", "tls deny port"]),
        ("GET https://x.example/", ["dns deny no_rule", "tls deny no_rule"]),
        ("GET https://g.example/", ["dns deny deny_rule", "tls deny deny_rule"]),
        ("tls://a.example", ["dns allow rule", "tls allow rule"]),
        ("tls://10.20.3.4", ["tls deny malformed_name"]),
        ("tcp://c.example:22", ["dns allow rule", "tcp allow rule"]),
        ("tcp://10.20.3.4:6379", ["tcp allow rule"]),
        ("tcp://a.example:443", ["dns allow rule", "tcp deny wrong_protocol"]),
        ("udp://c.example:22", ["dns allow rule", "udp deny no_rule"]),
        ("ntp://n.example", ["dns allow rule", "ntp allow rule"]),
        ("dns://d.example", ["dns allow rule"]),
        ("dns://x.example", ["dns deny no_rule"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_ladder_has_the_steps_that_a_gate_judges(words: str, steps: list[str]) -> None:
    assert judged(rules(WEATHER), attempt(words)) == steps


def test_each_step_is_the_engines_own_verdict() -> None:
    of = rules(WEATHER)

    for step in ladder(of, attempt("GET https://a.example/search")):
        assert step.verdict == decide(of, step.attempt)


def test_a_denied_lookup_alone_is_the_answer() -> None:
    # A `dns:`-only name has no rule beyond the lookup; a name reached by address has no lookup. Only an expired rule
    # and the guard can split the two, so the order is asserted on the answer itself.
    of = rules("- host: a.example")
    lookup, tls = ladder(of, attempt("tls://a.example"))
    denied, _ = ladder(of, attempt("tls://b.example"))

    assert answer([denied, tls]) == denied.verdict
    assert answer([lookup, tls]) == tls.verdict


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("GET https://b.example/x", "carried undecrypted: method and path are not seen; address judged at dial time"),
        ("tls://b.example", "address judged at dial time"),
        ("GET https://a.example/search", "address judged at dial time"),
        ("tcp://c.example:22", "address judged at dial time"),
        ("tcp://10.20.3.4:6379", ""),
        ("ntp://n.example", ""),
        (
            "tcp://d.example:6379",
            "judged by name; an address rule may admit what it resolves to: address judged at dial time",
        ),
        ("tcp://d.example:6380", ""),
    ],
    ids=lambda value: value,
)
def test_what_words_cannot_tell_is_said(words: str, note: str) -> None:
    assert ladder(rules(WEATHER), attempt(words))[-1].note == note


def test_audit_lets_pass_what_enforcement_would_deny() -> None:
    of = policy("{version: 1, workloads: {app: {mode: audit, rules: [{host: a.example}]}}}")

    steps = ladder(of, attempt("tls://x.example"))

    assert answer(steps).is_allow
    assert (enforced(steps).is_allow, enforced(steps).reason) == (False, Reason.NO_RULE)


def test_a_connection_is_judged_by_the_name_it_was_opened_for() -> None:
    from dataclasses import replace

    of = rules("- {host: a.example, tls: inspect}\n- {host: b.example, tls: inspect}")
    meant = replace(attempt("GET https://a.example/"), opened_for=attempt("tls://b.example").host)

    _, tls, http = ladder(of, meant)

    assert tls.attempt.host == "b.example"
    assert http.verdict.reason is Reason.HOST_MISMATCH


def test_the_clock_and_the_workload_are_the_callers() -> None:
    meant = parse_words("app", "tls://a.example", 1234.5)

    assert (meant.workload, meant.time) == ("app", 1234.5)
    assert all(step.attempt.time == 1234.5 for step in ladder(rules("[]"), meant))
