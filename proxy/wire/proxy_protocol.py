"""The PROXY protocol header, versions 1 and 2: whose connection a balancer passes on. Knows bytes, never a socket.

The proxy protocol specification of haproxy (doc/proxy-protocol.txt). Section numbers are its own.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

MAX_HEADER = 4096  # bytes; addresses take 36, the rest is TLVs nobody reads: a mistake must not grow our memory

_MAX_V1 = 107  # 2.1: the longest line, CR LF included
_V1 = b"PROXY "
_V1_ADDRESS = rb"([0-9A-Fa-f:.]+)"  # and no zone: it would make other sources of one client
_V1_LINE = re.compile(
    rb"PROXY (?:(UNKNOWN)(?: [^\r\n]*)?|TCP([46]) %b %b (\d{1,5}) (\d{1,5}))" % (_V1_ADDRESS, _V1_ADDRESS)
)
_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"  # 2.2
_V2_HEAD = struct.Struct("!12sBBH")
_LOCAL, _PROXY = 0, 1
_FAMILIES, _TRANSPORTS = frozenset(range(4)), frozenset(range(3))
_INET_STREAM, _INET6_STREAM = 0x11, 0x21
_INET, _INET6 = struct.Struct("!4s4sHH"), struct.Struct("!16s16sHH")


class MalformedProxyHeader(ValueError):
    """Not a header that the specification allows. `str()` says what is wrong."""


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """One header, which takes `length` bytes of the input.

    source  the client's address and port; None: the header names none (LOCAL, UNKNOWN, and what is not TCP over IP), so
            the connection is what it is by itself
    """

    source: tuple[IPv4Address | IPv6Address, int] | None
    length: int


def parse_proxy_header(data: bytes) -> ProxyHeader | None:
    """The header at the start of `data`, whatever follows it. None: more bytes are needed.

    Raises MalformedProxyHeader at the first byte that no header has, so that nobody waits for what cannot come.
    """
    if data[:1] == _SIGNATURE[:1]:
        return _parse_v2(data)
    return _parse_v1(data)


def _parse_v1(data: bytes) -> ProxyHeader | None:
    if not _V1.startswith(data[: len(_V1)]):
        raise MalformedProxyHeader("no PROXY protocol header")
    end = data.find(b"\r\n", 0, _MAX_V1)
    if end < 0:
        if len(data) >= _MAX_V1:
            raise MalformedProxyHeader(f"no end of the line within {_MAX_V1} bytes")
        return None
    found = _V1_LINE.fullmatch(data, 0, end)
    if found is None:
        raise MalformedProxyHeader("not a PROXY line of version 1")
    unknown, version, source, destination, *ports = found.groups()
    if unknown:
        return ProxyHeader(None, end + 2)
    kind = IPv4Address if version == b"4" else IPv6Address
    try:
        address, _ = (kind(text.decode("ascii")) for text in (source, destination))
    except (AddressValueError, UnicodeDecodeError) as error:
        raise MalformedProxyHeader(f"no IPv{version.decode()} address") from error
    numbers = [_read_port(port) for port in ports]
    return ProxyHeader((_unwrap(address), numbers[0]), end + 2)


def _read_port(text: bytes) -> int:
    if text != b"%d" % int(text) or int(text) > 0xFFFF:  # 2.1: no leading zeroes
        raise MalformedProxyHeader("no port number")
    return int(text)


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if not _SIGNATURE.startswith(data[: len(_SIGNATURE)]):
        raise MalformedProxyHeader("not the signature of version 2")
    if len(data) < _V2_HEAD.size:
        return None
    _, command, kind, size = _V2_HEAD.unpack_from(data)
    if command >> 4 != 2 or command & 0x0F not in (_LOCAL, _PROXY):
        raise MalformedProxyHeader(f"version and command are {command:#04x}")
    if kind >> 4 not in _FAMILIES or kind & 0x0F not in _TRANSPORTS:
        raise MalformedProxyHeader(f"address family and transport are {kind:#04x}")
    length = _V2_HEAD.size + size
    if length > MAX_HEADER:
        raise MalformedProxyHeader(f"takes {length} bytes, the limit is {MAX_HEADER}")
    shape = {_INET_STREAM: _INET, _INET6_STREAM: _INET6}.get(kind)
    if command & 0x0F == _LOCAL or shape is None:
        return ProxyHeader(None, length) if len(data) >= length else None
    if size < shape.size:
        raise MalformedProxyHeader(f"{size} bytes cannot hold the addresses")
    if len(data) < length:
        return None
    packed, _, port, _ = shape.unpack_from(data, _V2_HEAD.size)
    return ProxyHeader((_unwrap(IPv4Address(packed) if shape is _INET else IPv6Address(packed)), port), length)


def _unwrap(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """A client of IPv4 in the IPv6 form of a dual-stack balancer is the same client."""
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
