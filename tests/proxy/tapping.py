"""What a name server tells by dnstap, made by hand: any message, any frame, any lie in a length."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import ip_address

from proxy.wire.dns import A
from proxy.wire.dnstap import CLIENT_RESPONSE, CONTENT_TYPE, Control, render_control
from tests.proxy.nameserver import address, record, wire

SERVER = "192.0.2.53"


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def counted(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def fixed32(field: int, value: int) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<I", value)


def dns_response(
    name: str,
    answers: Sequence[bytes] | str = (),
    *,
    qtype: int = A,
    rcode: int = 0,
    ttl_s: int = 60,
    flags: int = 0x8180,
    query_id: int = 7,
) -> bytes:
    """A server's message; `answers` are records, or one address."""
    records = [address(b"\xc0\x0c", answers, ttl_s)] if isinstance(answers, str) else list(answers)
    head = struct.pack("!6H", query_id, flags | rcode, 1, len(records), 0, 0)
    return head + wire(name) + struct.pack("!HH", qtype, 1) + b"".join(records)


def cname(owner: str, target: str, ttl_s: int = 60) -> bytes:
    return record(owner, 5, ttl_s, wire(target))


def message(response: bytes, client: str = "127.0.0.1", *, type: int = CLIENT_RESPONSE, more: bytes = b"") -> bytes:
    """The Message as unbound and CoreDNS fill it: families, ports, times and the query too."""
    packed, server = ip_address(client).packed, ip_address(SERVER).packed
    return (
        number(1, type)
        + number(2, 1 if len(packed) == 4 else 2)
        + number(3, 1)
        + counted(4, packed)
        + counted(5, server if len(packed) == 4 else bytes(10) + b"\xff\xff" + server)
        + number(6, 4711)
        + number(7, 53)
        + number(12, 1795397968)
        + fixed32(13, 999)
        + counted(14, response)
        + more
    )


def tap(inner: bytes) -> bytes:
    return counted(1, b"ns1") + counted(2, b"unbound 1.17") + counted(14, inner) + number(15, 1)


def framed(frame: bytes) -> bytes:
    return struct.pack("!I", len(frame)) + frame


READY = render_control(Control.READY, CONTENT_TYPE)
ACCEPT = render_control(Control.ACCEPT, CONTENT_TYPE)
START = render_control(Control.START, CONTENT_TYPE)
STOP, FINISH = render_control(Control.STOP), render_control(Control.FINISH)


def told(name: str, answers: Sequence[bytes] | str = (), client: str = "127.0.0.1", **how: int) -> bytes:
    """A frame that tells of an answer."""
    return framed(tap(message(dns_response(name, answers, **how), client)))
