"""What `outgate verify` sends reads as it should to somebody else's parser, and a refusal is told from an answer."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mitmproxy.proxy.layers.quic import quic_parse_client_hello_from_datagrams

from proxy.verify import packets
from proxy.wire.client_hello import parse_hello
from proxy.wire.dns import ExtendedError, Note, build_addresses, build_name_error, build_nodata, parse_query
from tests.proxy.nameserver import reply

RANDOM = bytes(range(64))
NAME = "x.outgate-verify.example.com"
DENIAL = b"HTTP/1.1 403 Forbidden\r\nOutgate-Decision: deny; reason=no_rule; id=0123456789abcdef\r\n\r\n"
QUERY = packets.dns_query(NAME, 1, 7)
NOTE = Note(ExtendedError.BLOCKED, "no_rule, decision 0123456789abcdef")


@pytest.mark.parametrize(("name", "ech"), [(NAME, False), (None, False), (NAME, True)])
def test_a_hello_shows_what_it_should(name: str | None, ech: bool) -> None:
    hello = parse_hello(packets.client_hello(name, RANDOM, ech=ech))

    assert hello is not None
    assert (hello.sni, hello.ech) == (name, ech)
    assert hello.supported_versions == (0x304, 0x303)


def test_a_quic_initial_is_one() -> None:
    datagram = packets.quic_initial(NAME, RANDOM)
    hello = quic_parse_client_hello_from_datagrams([datagram])

    assert len(datagram) == 1200
    assert hello is not None
    assert (hello.sni, hello.alpn_protocols) == (NAME, [b"h3"])


def test_the_unknown_version_of_quic_is_reserved_and_the_datagram_large_enough() -> None:
    datagram = packets.quic_unknown_version(RANDOM)

    assert len(datagram) == 1200
    assert datagram[0] & 0xC0 == 0xC0
    assert struct.unpack_from("!I", datagram, 1)[0] & 0x0F0F0F0F == 0x0A0A0A0A


def test_an_sctp_init_has_its_checksum() -> None:
    assert packets._crc32c(b"123456789") == 0xE3069283  # RFC 3720 B.4's polynomial, the usual check value
    packet = packets.sctp_init(RANDOM)
    checked = packet[:8] + bytes(4) + packet[12:]

    assert struct.unpack_from("<I", packet, 8)[0] == packets._crc32c(checked)


@pytest.mark.parametrize("qtype", [1, packets.TXT, packets.NULL, packets.ANY])
def test_a_lookup_asks_for_a_reason(qtype: int) -> None:
    query = parse_query(packets.dns_query(NAME, qtype, 7))

    assert (query.name, query.type, query.id) == (NAME, qtype, 7)
    assert query.udp_size


def test_a_multicast_question_has_no_id_and_no_flags() -> None:
    assert packets.multicast_query("_services._dns-sd._udp.local", packets.PTR)[:6] == bytes(4) + b"\0\1"


REFUSALS = {
    "HTTP": (DENIAL, ("no_rule", "0123456789abcdef")),
    "HTTP, as HTTP/1.0 writes it": (DENIAL.replace(b"1.1", b"1.0"), ("no_rule", "0123456789abcdef")),
    "HTTP without the header": (b"HTTP/1.1 403 Forbidden\r\n\r\n", None),
    "HTTP with the header in the body": (b"HTTP/1.1 200 OK\r\n\r\n" + DENIAL, None),
    "HTTP with another id": (DENIAL.replace(b"0123", b"zzzz"), None),
    "alert access_denied": (b"\x15\x03\x03\x00\x02\x02\x31", ("TLS alert", None)),
    "alert internal_error": (b"\x15\x03\x03\x00\x02\x02\x50", ("TLS alert", None)),
    "alert handshake_failure": (b"\x15\x03\x03\x00\x02\x02\x28", None),
    "an alert, and more": (b"\x15\x03\x03\x00\x02\x02\x31x", None),
    "NXDOMAIN with a decision": (build_name_error(parse_query(QUERY), 5, NOTE), ("no_rule", "0123456789abcdef")),
    "NODATA with a decision": (build_nodata(parse_query(QUERY), 5, NOTE), ("no_rule", "0123456789abcdef")),
    "NXDOMAIN of a resolver": (reply(QUERY, rcode=3), None),
    "an address": (build_addresses(parse_query(QUERY), [], 5), None),
    "nothing": (b"", None),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_a_refusal_is_told_from_an_answer(name: str) -> None:
    data, expected = REFUSALS[name]

    assert packets.read_denial(data) == expected


@given(st.binary(max_size=200))
def test_garbage_is_no_refusal(data: bytes) -> None:
    found = packets.read_denial(data)

    assert found is None or b"ecision" in data or data[:1] == b"\x15"
