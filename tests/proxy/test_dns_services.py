"""HTTPS and SVCB records (RFC 9460): nothing of them leads past the gate."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.hostnames import Hostname
from proxy.wire.dns import MalformedResponse, build_query, parse_response
from proxy.wire.svcb import Service, read_service, write_service
from tests.proxy.dns_gate import HTTPS, NXDOMAIN, PUBLIC, SERVFAIL, SVCB, addresses, ask, gate, question, run, told
from tests.proxy.nameserver import Received, address, alias, record, reply, soa, wire

OWNER = b"\3api\7example"
MANDATORY, ALPN, NO_DEFAULT, PORT, HINT4, ECH, HINT6, DOH = 0, 1, 2, 3, 4, 5, 6, 7


def content(priority: int = 1, target: bytes = b"\0", **params: bytes) -> bytes:
    """A record's content; `params` are named k and the key."""
    written = b"".join(struct.pack("!HH", int(name[1:]), len(value)) + value for name, value in params.items())
    return priority.to_bytes(2) + target + written


def alpn(*names: bytes) -> bytes:
    return b"".join(bytes((len(name),)) + name for name in names)


EVERYTHING = content(
    k1=alpn(b"h3", b"h2", b"h3-29", b"http/1.1"),
    k3=struct.pack("!H", 8443),
    k4=bytes((10, 0, 0, 1)),
    k5=b"the keys of ECH",
    k6=bytes(15) + b"\1",
    k7=b"/dns-query{?dns}",
)

READ: dict[str, tuple[bytes, Service | None]] = {
    "everything": (EVERYTHING, Service(1, (b"h2", b"http/1.1"), port=8443)),
    "nothing": (content(), Service(1)),
    "its own name as target": (content(target=b"\3API\7example\0"), Service(1)),
    "h3 beside the default": (content(k1=alpn(b"h3")), Service(1)),
    "h3 and nothing else": (content(k1=alpn(b"h3"), k2=b""), None),
    "no default": (content(k1=alpn(b"h2"), k2=b""), Service(1, (b"h2",), no_default_alpn=True)),
    "ech is mandatory": (content(k0=b"\0\1\0\5", k1=alpn(b"h2"), k5=b"x"), Service(1, (b"h2",), mandatory=(1,))),
    "only ech is mandatory": (content(k0=b"\0\5", k5=b"x"), Service(1)),
    "h3 is mandatory": (content(k0=b"\0\1", k1=alpn(b"h3")), Service(1)),
    "an unknown key is mandatory": (content(k0=b"\0\7", k7=b"x"), None),
    "mandatory and not there": (content(k0=b"\0\3"), None),
    "mandatory out of order": (content(k0=b"\0\3\0\1", k1=alpn(b"h2"), k3=b"\0\1"), None),
    "mandatory names itself": (content(k0=b"\0\0"), None),
    "mandatory cut short": (content(k0=b"\0"), None),
    "an alias": (content(0, b"\3cdn\7example\0"), None),
    "another target": (content(target=b"\3cdn\7example\0"), None),
    "a pointer as target": (content(target=b"\xc0\x0c"), None),
    "keys out of order": (content(k3=b"\0\1", k1=alpn(b"h2")), None),
    "a key twice": (content(k3=b"\0\1") + struct.pack("!HHH", 3, 2, 2), None),
    "a port of three bytes": (content(k3=b"\0\1\2"), None),
    "a protocol cut short": (content(k1=b"\5h2"), None),
    "a protocol without a name": (content(k1=b"\0"), None),
    "a value cut short": (content() + struct.pack("!HH", 3, 9), None),
    "a target cut short": (b"\0\1\3ap", None),
    "empty": (b"", None),
}


@pytest.mark.parametrize(("given_", "read"), READ.values(), ids=READ)
def test_what_of_a_record_may_be_seen(given_: bytes, read: Service | None) -> None:
    assert read_service(given_, (OWNER,)) == read


@given(st.binary(max_size=80))
def test_garbage_is_a_service_or_nothing(garbage: bytes) -> None:
    service = read_service(garbage, (OWNER,))
    if service:
        assert read_service(write_service(service), ()) == service


@given(
    st.builds(
        Service,
        st.integers(1, 65535),
        st.sampled_from([(), (b"h2",), (b"http/1.1",), (b"http/1.1", b"h2")]),
        port=st.none() | st.integers(0, 65535),
    )
)
def test_what_is_written_reads_the_same(service: Service) -> None:
    assert read_service(write_service(service), ()) == service


@given(st.binary(max_size=120), st.integers(0, 3))
def test_a_server_that_sends_garbage_gives_an_answer_or_our_error(garbage: bytes, count: int) -> None:
    name = Hostname("api.example")
    query = build_query(name, HTTPS, 7)
    header = struct.pack("!6H", 7, 0x8180, 1, count, 0, 0)
    try:
        answer = parse_response(header + query[12 : 12 + len(wire(name)) + 4] + garbage, 7, name, HTTPS)
    except MalformedResponse:
        return
    assert all(isinstance(service, Service) for service in answer.services)


# --- in the relay


def services(received: Received) -> Iterable[bytes]:
    query = received.query
    if query.name != "api.example":
        return [reply(received.message, rcode=3, authority=[soa("", 900, 900)])]
    if query.type in (HTTPS, SVCB):
        rows = [alias("api.example", "edge.example"), record("edge.example", query.type, 60, EVERYTHING)]
        rows.append(record("beside.example", query.type, 60, content(7)))
        rows.append(record("edge.example", query.type, 60, content(0, b"\3cdn\7example\0")))
        return [reply(received.message, rows)]
    return [reply(received.message, [address("api.example", PUBLIC)] if query.type == 1 else [])]


@pytest.mark.parametrize("qtype", [HTTPS, SVCB], ids=["HTTPS", "SVCB"])
def test_a_service_is_told_without_ech_hints_and_foreign_targets(qtype: int) -> None:
    async def test() -> None:
        async with gate(services) as g:
            message = await ask(g, question("api.example", qtype, opt=None))
            kept = write_service(Service(1, (b"h2", b"http/1.1"), port=8443))
            expected = question("api.example", qtype, opt=None)[12:] + b"\xc0\x0c"
            expected += struct.pack("!HHIH", qtype, 1, 60, len(kept)) + kept
            assert message[12:] == expected
            assert b"the keys of ECH" not in message
            assert await ask(g, question("api.example", qtype, opt=None)) == message
            assert [query for query in g.upstream.asked if query[1] in ("HTTPS", "SVCB")] == [
                ("api.example", "HTTPS" if qtype == HTTPS else "SVCB")
            ]
            assert [(r["verdict"], r["reason"]) for r in g.records] == [("allow", "rule")] * 2

    run(test)


def test_a_name_without_services_exists() -> None:
    async def test() -> None:
        async with gate(services) as g:
            # NXDOMAIN for one type is what makes a client give up the name.
            assert told(await ask(g, question("x.cdn.example", HTTPS))).rcode == 0
            assert told(await ask(g, question("x.cdn.example"))).rcode == NXDOMAIN

    run(test)


def test_services_of_a_denied_name_are_asked_of_nobody() -> None:
    async def test() -> None:
        async with gate(services) as g:
            assert told(await ask(g, question("evil.example", HTTPS))).rcode == NXDOMAIN
            assert g.upstream.received == []

    run(test)


def test_services_of_the_operators_hosts_are_asked_of_nobody() -> None:
    async def test() -> None:
        async with gate(services, hosts={"api.example": "10.0.0.7"}) as g:
            assert told(await ask(g, question("api.example", HTTPS))).rcode == 0
            assert told(await ask(g, question("api.example"))).addresses == addresses("10.0.0.7")
            assert g.upstream.received == []

    run(test)


def test_a_server_that_cannot_say_fails_that_question_alone() -> None:
    def script(received: Received) -> Iterable[bytes]:
        return [reply(received.message, rcode=2)] if received.query.type == HTTPS else services(received)

    async def test() -> None:
        async with gate(script) as g:
            assert told(await ask(g, question("api.example", HTTPS))).rcode == SERVFAIL
            assert told(await ask(g, question("api.example"))).addresses == addresses(PUBLIC)

    run(test)
