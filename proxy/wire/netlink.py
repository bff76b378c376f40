"""Netlink messages and their attributes, to and from bytes (RFC 3549, linux/netlink.h, linux/netfilter/nfnetlink.h).

Lengths and headers are in the machine's byte order; what is inside netfilter's attributes is in network order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ERROR, DONE = 2, 3
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_NETFILTER = struct.Struct("!BBH")  # family, version, resource
_ERROR = struct.Struct("=i")
_NESTED, _TYPE = 0x8000, 0x3FFF
_ALIGNED = 4


class MalformedNetlink(Exception):
    """Bytes that the kernel does not send."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: of netfilter, or (`ERROR`, `DONE`) of netlink itself."""

    type: int
    sequence: int
    body: bytes

    @property
    def errno(self) -> int:
        """Of an ERROR or DONE; 0 is success. Raises MalformedNetlink."""
        if len(self.body) < _ERROR.size:
            raise MalformedNetlink("an acknowledgement without its number")
        (negative,) = _ERROR.unpack_from(self.body)
        return -negative if negative < 0 else 0


def netfilter_message(
    subsystem: int, command: int, flags: int, sequence: int, family: int, attributes: bytes = b""
) -> bytes:
    """One request to a part of netfilter."""
    body = _NETFILTER.pack(family, 0, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(body), subsystem << 8 | command, flags, sequence, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % _ALIGNED)


def nested(kind: int, value: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NESTED, value)


def messages(datagram: bytes) -> Iterator[Message]:
    """What came at once. Raises MalformedNetlink."""
    at = 0
    while at < len(datagram):
        if len(datagram) - at < _HEADER.size:
            raise MalformedNetlink("half a header")
        length, kind, _, sequence, _ = _HEADER.unpack_from(datagram, at)
        if not _HEADER.size <= length <= len(datagram) - at:
            raise MalformedNetlink(f"a message of {length} bytes where {len(datagram) - at} are left")
        yield Message(kind, sequence, datagram[at + _HEADER.size : at + length])
        at += length + -length % _ALIGNED


def netfilter_body(body: bytes) -> tuple[int, bytes]:
    """The family of a message of netfilter, and its attributes. Raises MalformedNetlink."""
    if len(body) < _NETFILTER.size:
        raise MalformedNetlink("no header of netfilter")
    return body[0], body[_NETFILTER.size :]


def attributes(text: bytes) -> Mapping[int, bytes]:
    """Values by type; of two of one type the last, as the kernel has it. Raises MalformedNetlink."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(text):
        if len(text) - at < _ATTRIBUTE.size:
            raise MalformedNetlink("half an attribute")
        length, kind = _ATTRIBUTE.unpack_from(text, at)
        if not _ATTRIBUTE.size <= length <= len(text) - at:
            raise MalformedNetlink(f"an attribute of {length} bytes where {len(text) - at} are left")
        found[kind & _TYPE] = text[at + _ATTRIBUTE.size : at + length]
        at += length + -length % _ALIGNED
    return found
