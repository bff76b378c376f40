"""dnstap as bytes: what a name server tells about its answers, in Frame Streams. Knows no DNS, no socket, no clock.

dnstap.proto and the Frame Streams format are those of dnstap.info; the fields are read as Protocol Buffers have them.
A sender is trusted to tell the truth about lookups, and with nothing else: every length is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

from policies.addresses import Address

CONTENT_TYPE = b"protobuf:dnstap.Dnstap"
CLIENT_RESPONSE = 6  # what a server answered to a client of its own
MAX_FRAME = 144 * 1024  # a question and an answer of 64 KiB each, and a little more
MAX_CONTROL = 512  # FSTRM_CONTROL_FRAME_LENGTH_MAX
MAX_FIELDS = 64  # of one message; dnstap has fewer than twenty

_LENGTH = struct.Struct("!I")
_CONTENT_TYPE = 1
_MESSAGE = 1  # the one type of Dnstap there is
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class MalformedFrame(ValueError):
    """Not what a dnstap sender says. `str()` says what is wrong."""


class Control(IntEnum):
    ACCEPT = 1
    START = 2
    STOP = 3
    READY = 4
    FINISH = 5


@dataclass(frozen=True, slots=True)
class Tap:
    """One message. Of a type other than CLIENT_RESPONSE only `type` is there.

    client, server  whose question was answered, and where it was asked; the server may not have said
    """

    type: int
    client: tuple[Address, int] | None = None
    server: tuple[Address, int] | None = None
    response: bytes = b""


class FrameStream:
    """One sender's stream, with a handshake or without one."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._is_ready = False
        self._reply = b""
        self.is_started = False
        self.is_over = False  # the sender said so; nothing after it counts

    @property
    def is_amid_frame(self) -> bool:
        """The rest of a frame is still to come."""
        return bool(self._received)

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The frames that are whole by now, each as it stands. Raises MalformedFrame; then the stream is of no use."""
        self._received += received
        at = 0
        while not self.is_over and (found := _cut_frame(self._received, at)):
            frame, at, is_control = found
            if is_control:
                self._heed(frame)
            elif not self.is_started:
                raise MalformedFrame("a frame before START")
            else:
                yield frame
        del self._received[:at]
        if self.is_over:
            self._received.clear()

    def reply(self) -> bytes:
        """What is to be sent back now."""
        reply, self._reply = self._reply, b""
        return reply

    def _heed(self, frame: bytes) -> None:
        kind, content_types = _parse_control(frame)
        match kind:
            case Control.READY if not self._is_ready and not self.is_started:
                if CONTENT_TYPE not in content_types:
                    raise MalformedFrame("READY for another content type")
                self._is_ready = True
                self._reply += render_control(Control.ACCEPT, CONTENT_TYPE)
            case Control.START if not self.is_started:
                if content_types != [CONTENT_TYPE]:
                    raise MalformedFrame("START of another content type")
                self.is_started = True
            case Control.STOP if self.is_started:
                self.is_over = True
                if self._is_ready:  # only who waits for an answer gets one
                    self._reply += render_control(Control.FINISH)
            case _:
                raise MalformedFrame(f"{kind.name} out of turn")


def render_control(kind: Control, *content_types: bytes) -> bytes:
    """A control frame, with its escape and its length."""
    body = _LENGTH.pack(kind)
    for content_type in content_types:
        body += struct.pack("!II", _CONTENT_TYPE, len(content_type)) + content_type
    return struct.pack("!II", 0, len(body)) + body


def parse_tap(frame: bytes) -> Tap:
    """The message in a frame. Raises MalformedFrame."""
    try:
        return _parse_tap(frame)
    except (IndexError, struct.error):
        raise MalformedFrame("ends early") from None


def _cut_frame(data: bytearray, at: int) -> tuple[bytes, int, bool] | None:
    """The frame at `at`, where it ends, and whether it is a control frame. None: it is not whole yet."""
    if len(data) < at + 4:
        return None
    (length,) = _LENGTH.unpack_from(data, at)
    at += 4
    is_control = length == 0
    if is_control:
        if len(data) < at + 4:
            return None
        (length,) = _LENGTH.unpack_from(data, at)
        at += 4
    most = MAX_CONTROL if is_control else MAX_FRAME
    if length > most:
        raise MalformedFrame(f"a frame of {length} bytes, the limit is {most}")
    end = at + length
    return (bytes(data[at:end]), end, is_control) if end <= len(data) else None


def _parse_control(frame: bytes) -> tuple[Control, list[bytes]]:
    try:
        kind = Control(_LENGTH.unpack_from(frame)[0])
        content_types = []
        at = 4
        while at < len(frame):
            field, length = struct.unpack_from("!II", frame, at)
            at += 8 + length
            if field != _CONTENT_TYPE or at > len(frame):
                raise ValueError
            content_types.append(frame[at - length : at])
    except (ValueError, struct.error):
        raise MalformedFrame("a control frame that is none") from None
    return kind, content_types


def _parse_tap(frame: bytes) -> Tap:
    outer = _read_fields(frame, {14: _BYTES, 15: _VARINT})
    if outer.get(15) != _MESSAGE:
        raise MalformedFrame("no message")
    message = outer.get(14, b"")
    assert isinstance(message, bytes)
    found = _read_fields(message, {1: _VARINT, 4: _BYTES, 5: _BYTES, 6: _VARINT, 7: _VARINT, 14: _BYTES})
    kind, response = found.get(1), found.get(14, b"")
    if not isinstance(kind, int):
        raise MalformedFrame("a message without its type")
    if kind != CLIENT_RESPONSE:
        return Tap(kind)
    assert isinstance(response, bytes)
    return Tap(kind, _peer(found.get(4), found.get(6)), _peer(found.get(5), found.get(7)), response)


def _peer(packed: int | bytes | None, port: int | bytes | None) -> tuple[Address, int] | None:
    """By the length of the address alone: CoreDNS says family INET of one that it has in the form of IPv6."""
    if not isinstance(packed, bytes):
        return None
    if len(packed) not in (4, 16):
        raise MalformedFrame(f"an address of {len(packed)} bytes")
    address: Address = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
    if isinstance(address, IPv6Address) and address.ipv4_mapped:  # of a server that listens on [::]
        address = address.ipv4_mapped
    port = port or 0
    if not isinstance(port, int) or port > 65535:
        raise MalformedFrame("a port above 65535")
    return address, port


def _read_fields(message: bytes, wanted: dict[int, int]) -> dict[int, int | bytes]:
    """The wanted fields, each of its wire type; others are stepped over. Raises MalformedFrame, IndexError.

    Protocol Buffers let the last of several win, or join them: no sender repeats one, and readers would differ.
    """
    found: dict[int, int | bytes] = {}
    at = count = 0
    while at < len(message):
        count += 1
        if count > MAX_FIELDS:
            raise MalformedFrame(f"more than {MAX_FIELDS} fields")
        tag, at = _read_varint(message, at)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == _VARINT:
            value, at = _read_varint(message, at)
        else:
            if wire == _BYTES:
                size, at = _read_varint(message, at)
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
            else:  # groups, which proto2 gave up
                raise MalformedFrame(f"wire type {wire}")
            value = message[at : at + size]
            at += size
            if at > len(message):
                raise IndexError
        if number not in wanted:
            continue
        if wire != wanted[number] or number in found:
            raise MalformedFrame(f"field {number} twice, or of another type")
        found[number] = value
    return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Raises MalformedFrame beyond 64 bits, IndexError where `data` ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at
    raise MalformedFrame("a number of more than 64 bits")
