"""The PROXY header, versions 1 and 2: vectors whole, byte by byte and with trailing bytes; and garbage."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.proxy_protocol import MAX_HEADER, MalformedProxyHeader, ProxyHeader, parse_proxy_header

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V4 = bytes([192, 0, 2, 7, 198, 51, 100, 1]) + struct.pack("!HH", 56324, 3128)
V6 = ip_address("2001:db8::7").packed + ip_address("2001:db8::1").packed + struct.pack("!HH", 4, 443)
MAPPED = ip_address("::ffff:192.0.2.7").packed + ip_address("::ffff:198.51.100.1").packed + struct.pack("!HH", 9, 80)
TLVS = (
    b"\x04\x00\x05hello" + b"\x03\x00\x04\xde\xad\xbe\xef" + b"\xee\x00\x03abc"
)  # NOOP, CRC32C, one of somebody's own


def v2(command: int, kind: int, body: bytes, *, version: int = 2) -> bytes:
    return SIGNATURE + bytes([version << 4 | command, kind]) + struct.pack("!H", len(body)) + body


GOOD = {
    "v1 tcp4": (b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 3128\r\n", ("192.0.2.7", 56324)),
    "v1 tcp6": (b"PROXY TCP6 2001:db8::7 2001:db8::1 4 443\r\n", ("2001:db8::7", 4)),
    "v1 tcp6 mapped": (b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 9 80\r\n", ("192.0.2.7", 9)),
    "v1 port 0": (b"PROXY TCP4 192.0.2.7 198.51.100.1 0 0\r\n", ("192.0.2.7", 0)),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", None),
    "v1 unknown, longest": (b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", None),
    "v2 tcp4": (v2(1, 0x11, V4), ("192.0.2.7", 56324)),
    "v2 tcp4 and tlvs": (v2(1, 0x11, V4 + TLVS), ("192.0.2.7", 56324)),
    "v2 tcp6": (v2(1, 0x21, V6), ("2001:db8::7", 4)),
    "v2 tcp6 mapped": (v2(1, 0x21, MAPPED), ("192.0.2.7", 9)),
    "v2 local": (v2(0, 0x00, b""), None),
    "v2 local with addresses": (v2(0, 0x11, V4), None),
    "v2 unspecified": (v2(1, 0x00, b"anything"), None),
    "v2 udp": (v2(1, 0x12, V4), None),
    "v2 unix": (v2(1, 0x31, bytes(216)), None),
    "v2 as long as allowed": (v2(1, 0x11, V4 + bytes(MAX_HEADER - 16 - len(V4))), ("192.0.2.7", 56324)),
}
BAD = {
    "no header": b"GET / HTTP/1.1\r\n",
    "lower case": b"proxy TCP4 192.0.2.7 198.51.100.1 1 2\r\n",
    "v1 two spaces": b"PROXY TCP4  192.0.2.7 198.51.100.1 1 2\r\n",
    "v1 space at the end": b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2 \r\n",
    "v1 bare line feed": b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2\n" + b" " * 107,
    "v1 leading zero": b"PROXY TCP4 192.0.2.7 198.51.100.1 01 2\r\n",
    "v1 port too large": b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 2\r\n",
    "v1 negative port": b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 2\r\n",
    "v1 family mixed up": b"PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n",
    "v1 one address of the other family": b"PROXY TCP6 2001:db8::7 198.51.100.1 1 2\r\n",
    "v1 a name": b"PROXY TCP4 localhost 198.51.100.1 1 2\r\n",
    "v1 short form": b"PROXY TCP4 127.1 198.51.100.1 1 2\r\n",
    "v1 octal": b"PROXY TCP4 0177.0.0.1 198.51.100.1 1 2\r\n",
    "v1 not ascii": b"PROXY TCP4 \xb9.0.2.7 198.51.100.1 1 2\r\n",
    "v1 no addresses": b"PROXY TCP4\r\n",
    "v1 udp": b"PROXY UDP4 192.0.2.7 198.51.100.1 1 2\r\n",
    "v1 unknownish": b"PROXY UNKNOWNS\r\n",
    "v1 too long": b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n",
    "v1 endless": b"PROXY UNKNOWN " + b"f" * 93,
    "v2 broken signature": b"\r\n\r\n\x00\r\nQUIX\n",
    "v2 version 3": v2(1, 0x11, V4, version=3),
    "v2 command 2": v2(2, 0x11, V4),
    "v2 family 4": v2(1, 0x41, V4),
    "v2 transport 3": v2(1, 0x13, V4),
    "v2 local of a family there is not": v2(0, 0xF0, b""),
    "v2 addresses cut short": v2(1, 0x11, V4[:-1]),
    "v2 v4 addresses said to be v6": v2(1, 0x21, V4),
    "v2 too long": v2(1, 0x11, V4 + bytes(MAX_HEADER)),
    "v2 length alone too long": v2(1, 0x11, bytes(MAX_HEADER))[:16],
}


def of(source: tuple[str, int] | None, length: int) -> ProxyHeader:
    return ProxyHeader(source and (ip_address(source[0]), source[1]), length)


@pytest.mark.parametrize(("data", "source"), GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("rest", [b"", b"CONNECT a.example:443 HTTP/1.1\r\n\r\n", SIGNATURE, b"\r\n"])
def test_header_says_who_the_client_is_whatever_follows(
    data: bytes, source: tuple[str, int] | None, rest: bytes
) -> None:
    assert parse_proxy_header(data + rest) == of(source, len(data))


@pytest.mark.parametrize(("data", "source"), GOOD.values(), ids=GOOD)
def test_every_beginning_of_a_header_needs_more(data: bytes, source: tuple[str, int] | None) -> None:
    del source
    assert {parse_proxy_header(data[:size]) for size in range(len(data))} == {None}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_the_specification_does_not_allow_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedProxyHeader):
        parse_proxy_header(data)


@given(st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(lambda rest: SIGNATURE + rest)))
def test_garbage_is_a_header_or_needs_more_or_is_malformed(data: bytes) -> None:
    try:
        found = parse_proxy_header(data)
    except MalformedProxyHeader:
        return
    assert found is None or 0 < found.length <= len(data)


@given(st.ip_addresses(), st.integers(0, 65535), st.binary(max_size=40))
def test_both_versions_tell_the_same_client(address: object, port: int, tlvs: bytes) -> None:
    client = ip_address(str(address))
    number, kind = (4, 0x11) if client.version == 4 else (6, 0x21)
    line = f"PROXY TCP{number} {client} {client} {port} 1\r\n".encode()
    packed = v2(1, kind, client.packed * 2 + struct.pack("!HH", port, 1) + tlvs)
    first, second = parse_proxy_header(line), parse_proxy_header(packed)
    assert first is not None
    assert second is not None
    assert first.source == second.source
    assert (first.length, second.length) == (len(line), len(packed))
