"""SRV and PTR in zones of the operator's own: told anew, with the names that the policy lets be looked up."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mitmproxy import dns as oracle

from policies.hostnames import Hostname
from proxy.wire.dns import MalformedResponse, build_query, parse_response
from proxy.wire.targets import PTR, SRV, Target, read_target, write_target
from tests.proxy.dns_gate import BLOCKED, NXDOMAIN, SERVFAIL, Gate, Told, ask, gate, question, run, silence, told
from tests.proxy.nameserver import Nameserver, Received, Script, record, reply, serving, soa, wire

POLICY = """
version: 1
workloads:
  app:
    match: {address: [127.0.0.1/32]}
    rules:
      - dns: "*.svc.cluster.local"
      - dns: "*.10.in-addr.arpa"
      - host: api.example
"""
ZONES = ("cluster.local", "10.in-addr.arpa")
ASKED, BACK = "_http._tcp.web.default.svc.cluster.local", "4.3.96.10.in-addr.arpa"
POD = "10-1-0-7.web.default.svc.cluster.local"


def srv(target: str, port: int = 8080, priority: int = 0, weight: int = 33) -> bytes:
    return struct.pack("!HHH", priority, weight, port) + wire(target)


def says(*contents: bytes, ttl_s: int = 30) -> Script:
    """Every question has these records; none: NXDOMAIN."""

    def script(received: Received) -> Iterable[bytes]:
        query = received.query
        records = [record(query.name, query.type, ttl_s, content) for content in contents]
        absent = {} if records else {"rcode": 3, "authority": [soa("cluster.local", 30, 30)]}
        return [reply(received.message, records, **absent)]  # type: ignore[arg-type]  # both by name

    return script


def led(message: bytes) -> list[tuple[str, int, int, int]]:
    """The SRV records of a reply, as another codec and this test read them."""
    answer = oracle.DNSMessage.unpack(message)
    assert all((rr.type, rr.name) == (SRV, answer.questions[0].name) for rr in answer.answers)
    return [(named(rr.data[6:]), *struct.unpack("!HHH", rr.data[:6])) for rr in answer.answers]


def named(labels: bytes) -> str:
    found = []
    while labels[0]:
        found.append(labels[1 : 1 + labels[0]].decode())
        labels = labels[1 + labels[0] :]
    assert labels == b"\0"
    return ".".join(found)


def in_zones(inside: Script, test: Callable[[Gate, Nameserver], Awaitable[None]]) -> None:
    async def within() -> None:
        async with (
            serving(inside) as server,
            gate(silence, policy=POLICY, forward=dict.fromkeys(ZONES, server), timeout_s=0.3) as g,
        ):
            await test(g, server)
            assert g.upstream.received == []  # those outside never hear of it

    run(within)


def test_a_service_is_told_anew_from_the_zones_own_server() -> None:
    async def test(g: Gate, server: Nameserver) -> None:
        for _ in range(2):
            assert led(await ask(g, question(ASKED.upper(), SRV))) == [(POD, 0, 33, 8080)]
        assert server.asked == [(ASKED, "SRV")]  # once, and in our own spelling
        assert server.received[0].message[12:] == build_query(Hostname(ASKED), SRV, 0)[12:]
        assert {r["dns.question.type"] for r in g.records} == {"SRV"}
        assert {(r["verdict"], r["reason"], r["server.name"]) for r in g.records} == {("allow", "rule", ASKED)}

    in_zones(says(srv(POD)), test)


def test_a_name_of_an_address_inside_is_told() -> None:
    async def test(g: Gate, _: Nameserver) -> None:
        [found] = oracle.DNSMessage.unpack(await ask(g, question(BACK, PTR))).answers
        assert (found.type, named(found.data), found.ttl) == (PTR, "web.default.svc.cluster.local", 30)

    in_zones(says(wire("web.default.svc.cluster.local")), test)


def test_names_that_may_not_be_looked_up_are_left_out_and_recorded() -> None:
    contents = [srv("evil.example"), srv(POD), srv("api.example"), srv("other.cluster.local"), srv("")]

    async def test(g: Gate, _: Nameserver) -> None:
        assert [name for name, *_ in led(await ask(g, question(ASKED, SRV)))] == [POD, "api.example"]
        assert g.only_record()["dns.answers.refused"] == ["evil.example", "other.cluster.local"]

    in_zones(says(*contents), test)


@pytest.mark.parametrize("inside", [says(), says(srv("evil.example")), says(b"\0"), says(wire(POD))])
def test_where_nothing_is_left_there_is_no_data_or_a_failure_and_never_silence(inside: Script) -> None:
    async def test(g: Gate, _: Nameserver) -> None:
        answer = told(await ask(g, question(ASKED, SRV)))
        assert answer.rcode in (0, SERVFAIL)
        assert answer.addresses == ()

    in_zones(inside, test)


# What has no answer of any server, and gets one at once.
FAST = {
    "srv outside": (question("_http._tcp.api.example", SRV), NXDOMAIN, "no_rule"),
    "srv of an allowed name outside": (question("api.example", SRV), 0, "query_type"),
    "the name of an address outside": (question("8.8.8.8.in-addr.arpa", PTR), NXDOMAIN, "no_rule"),
    "of an address inside without a rule": (question("1.0.0.192.in-addr.arpa", PTR), NXDOMAIN, "no_rule"),
    "of an ipv6 address": (question("1.0.0.8.b.d.0.1.0.0.2.ip6.arpa", PTR), NXDOMAIN, "no_rule"),
    "srv of a zone without a rule": (question("_http._tcp.web.cluster.local", SRV), NXDOMAIN, "no_rule"),
    "text in a zone": (question(ASKED, 16), 0, "query_type"),
    "srv of another class": (question(ASKED, SRV, qclass=3), 0, "query_type"),
}


@pytest.mark.parametrize(("message", "rcode", "reason"), FAST.values(), ids=FAST)
def test_every_other_question_ends_here_at_once(message: bytes, rcode: int, reason: str) -> None:
    async def test(g: Gate, server: Nameserver) -> None:
        assert told(await ask(g, message)) == Told(rcode, ttl_s=5, error=BLOCKED)
        assert (g.only_record()["reason"], server.received) == (reason, [])

    in_zones(says(srv(POD)), test)


def test_a_dead_server_of_the_zone_is_a_failure() -> None:
    async def test(g: Gate, _: Nameserver) -> None:
        assert told(await ask(g, question(ASKED, SRV))).rcode == SERVFAIL
        assert g.only_record()["reason"] == "resolver_failed"

    in_zones(silence, test)


# --- the codec


def answered(qtype: int, *contents: bytes) -> bytes:
    query = build_query(Hostname(ASKED), qtype, 7)
    return reply(query, [record(b"\xc0\x0c", qtype, 60, content) for content in contents])


def parsed(qtype: int, *contents: bytes) -> tuple[Target, ...]:
    return parse_response(answered(qtype, *contents), 7, Hostname(ASKED), qtype).targets


READ = {
    "srv": (SRV, srv("a.example", 1, 2, 3), (Target("a.example", 2, 3, 1),)),
    "srv, compressed": (SRV, struct.pack("!HHH", 1, 2, 3) + b"\1a\xc0\x0c", (Target(f"a.{ASKED}", 1, 2, 3),)),
    "srv to nowhere": (SRV, srv(""), ()),
    "a name": (PTR, wire("A.example"), (Target("a.example"),)),
    "a name with a space": (PTR, b"\3a b\0", ()),
    "a label with a dot": (PTR, b"\3a.b\0", ()),
    "bytes that are no text": (PTR, b"\2\xff\xfe\0", ()),
}


@pytest.mark.parametrize(("qtype", "content", "expected"), READ.values(), ids=READ)
def test_a_record_is_read(qtype: int, content: bytes, expected: tuple[Target, ...]) -> None:
    assert parsed(qtype, content) == expected


MALFORMED = {
    "srv without a name": (SRV, struct.pack("!HHH", 1, 2, 3)),
    "srv cut short": (SRV, b"\0"),
    "bytes behind the name": (PTR, wire("a.example") + b"x"),
    "a pointer forwards": (PTR, b"\xc0\xff"),
    "a pointer to itself": (PTR, b"\1a\xc0\x46"),
}


@pytest.mark.parametrize(("qtype", "content"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_record_is_no_answer(qtype: int, content: bytes) -> None:
    with pytest.raises(MalformedResponse):
        parsed(qtype, content)


@given(qtype=st.sampled_from([SRV, PTR]), content=st.binary(max_size=80))
def test_garbage_gives_names_that_hosts_have_or_our_error(qtype: int, content: bytes) -> None:
    try:
        found = parsed(qtype, content)
    except MalformedResponse:
        return
    for target in found:
        assert read_target(write_target(target, qtype)[:-1], qtype) == target
