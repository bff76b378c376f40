"""The packets of a QUIC datagram and the frames of an Initial, versions 1 and 2. Opening a packet is `quic_keys`' work.

RFC 9000 (version 1), RFC 9369 (version 2). What no client sends to begin a connection is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from proxy.wire.quic_keys import VERSION_1, VERSION_2

MAX_PACKETS = 8  # in one datagram: each costs a key and a decryption

INITIAL, ZERO_RTT, HANDSHAKE = "Initial", "0-RTT", "Handshake"
_TYPES = {  # RFC 9000 17.2, RFC 9369 3.2; a client sends no Retry
    VERSION_1: {0: INITIAL, 1: ZERO_RTT, 2: HANDSHAKE},
    VERSION_2: {1: INITIAL, 2: ZERO_RTT, 3: HANDSHAKE},
}
_PADDING, _PING, _ACK, _ACK_ECN, _CRYPTO, _CLOSE = 0x00, 0x01, 0x02, 0x03, 0x06, 0x1C
FIRST_FRAMES = frozenset((_PADDING, _PING, _ACK, _ACK_ECN, _CRYPTO))
LATER_FRAMES = FIRST_FRAMES | {_CLOSE}  # RFC 9000 17.2.2
_NOT_PADDING = re.compile(rb"[^\0]").search


class MalformedInitial(ValueError):
    """Not what the client of a QUIC server sends first. `str()` says what is wrong."""


class UnknownVersion(MalformedInitial):
    """A version of QUIC whose packets cannot be read here; Version Negotiation (0) too."""

    def __init__(self, version: int) -> None:
        super().__init__(f"QUIC version 0x{version:08x}")
        self.version = version


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet of a datagram, still sealed. `bytes` begin at its first byte, the packet number at `number_at`."""

    kind: str
    version: int
    destination: bytes
    bytes: bytes
    number_at: int


def is_long_header(datagram: bytes) -> bool:
    """Whether `datagram` begins with a packet that can open a connection (RFC 8999 5.1), in any version."""
    return bool(datagram) and datagram[0] >= 0x80


def split(datagram: bytes, *, only_first_flight: bool = True) -> Iterator[Packet]:
    """The packets that a datagram coalesces (RFC 9000 12.2). What follows without a long header is its last packet."""
    at = packets = 0
    while is_long_header(datagram[at : at + 1]):
        packets += 1
        if packets > MAX_PACKETS:
            raise MalformedInitial(f"more than {MAX_PACKETS} packets in a datagram")
        packet = _parse_header(datagram, at)
        yield packet
        at += len(packet.bytes)
    if only_first_flight and (not packets or datagram[at:].strip(b"\0")):  # zero bytes are padding
        raise MalformedInitial("short header")


def _parse_header(datagram: bytes, start: int) -> Packet:
    """RFC 9000 17.2. The version comes first: in others all that follows may mean something else."""
    try:
        version = int.from_bytes(_cut(datagram, start + 1, 4))
        if version not in _TYPES:
            raise UnknownVersion(version)
        kind = _TYPES[version].get(datagram[start] >> 4 & 3)
        if kind is None:
            raise MalformedInitial("Retry from a client")
        at = start + 5
        destination = _cut(datagram, at + 1, datagram[at])
        at += 1 + len(destination)
        source = _cut(datagram, at + 1, datagram[at])
        at += 1 + len(source)
        if max(len(destination), len(source)) > 20:
            raise MalformedInitial("connection ID of more than 20 bytes")
        if kind is INITIAL:
            size, at = _read_number(datagram, at)
            at += len(_cut(datagram, at, size))  # the token, which is between the client and the server
        size, at = _read_number(datagram, at)
        end = at + len(_cut(datagram, at, size))
    except IndexError:
        raise MalformedInitial("header ends early") from None
    return Packet(kind, version, destination, datagram[start:end], at - start)


def read_frames(payload: bytes, allowed: frozenset[int]) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each CRYPTO frame. Raises MalformedInitial for a frame that is not `allowed`."""
    at, end = 0, len(payload)
    if not end:
        raise MalformedInitial("packet without frames")  # RFC 9000 12.4
    try:
        while at < end:
            kind = payload[at]
            if kind not in allowed:
                raise MalformedInitial(f"frame of type 0x{kind:02x}")
            at += 1
            if kind == _PADDING:
                found = _NOT_PADDING(payload, at)
                at = found.start() if found else end
            elif kind == _CRYPTO:
                offset, at = _read_number(payload, at)
                size, at = _read_number(payload, at)
                piece = _cut(payload, at, size)
                at += size
                yield offset, piece
            elif kind in (_ACK, _ACK_ECN):
                at = _skip_ack(payload, at, kind)
            elif kind == _CLOSE:
                at = _skip_close(payload, at)
    except IndexError:
        raise MalformedInitial("frame ends early") from None


def _skip_close(payload: bytes, at: int) -> int:
    """RFC 9000 19.19: error code, type of the frame that caused it, length and text of the reason."""
    for _ in range(2):
        _, at = _read_number(payload, at)
    size, at = _read_number(payload, at)
    return at + len(_cut(payload, at, size))


def _skip_ack(payload: bytes, at: int, kind: int) -> int:
    """RFC 9000 19.3: largest, delay, count of ranges, first range; two numbers a range; three counts of ECN."""
    for _ in range(2):
        _, at = _read_number(payload, at)
    ranges, at = _read_number(payload, at)
    for _ in range(1 + 2 * ranges + (3 if kind == _ACK_ECN else 0)):
        _, at = _read_number(payload, at)
    return at


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer (RFC 9000 16) and where it ends. Raises IndexError."""
    size = 1 << (data[at] >> 6)
    number = int.from_bytes(_cut(data, at, size)) & (1 << 8 * size - 2) - 1
    return number, at + size


def _cut(data: bytes, at: int, size: int) -> bytes:
    """Raises IndexError where `data` ends before."""
    if at + size > len(data):
        raise IndexError
    return data[at : at + size]
