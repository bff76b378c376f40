"""NTP packets as bytes: a client's query, our answer, our own query, a server's answer. No sockets, no clock.

RFC 5905. Nothing here copies bytes of a client's packet into one for a server: our query is the same 48 bytes each
time, but for a random number. A timestamp is 64 bits: seconds since 1900 above, their fraction below; it wraps in 2036.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from math import ceil

PORT = 123
SIZE = 48  # RFC 5905 7.3, without extension fields and MAC: what they could carry has no place here
CLIENT, SERVER = 3, 4  # modes
VERSION = 4
VERSIONS = (3, 4)
UNSYNCHRONISED = 16  # the stratum that says so
MAX_ROOT_DISTANCE_S = 16.0  # RFC 5905 7.2 MAXDISP: beyond it a server knows nothing of the time
REFERENCE_ID = b"GATE"  # the same for whatever servers are behind us

_PACKET = struct.Struct("!BBbbII4sQQQQ")
_PRECISION = -20  # 2**-20 s: about a microsecond, what our clock reads take
# draft-ietf-ntp-data-minimization: all else zero, precision as every client of this kind sends it
_MINIMAL_PRECISION = 0x20
_POLL = 6  # the shortest interval that we ask of our clients, 64 s

_EPOCH_1900_S = 2_208_988_800  # from 1900 to 1970
_EARLIEST_S = 1_735_689_600  # 2025-01-01: a timestamp before that belongs to the era after 2036
_ERA_S = 1 << 32
_LONGEST_S = 0xFFFF  # that a short has room for
_NS = 1_000_000_000


class Leap(IntEnum):
    """The leap indicator. UNKNOWN is a clock that is not synchronised."""

    NONE = 0
    INSERT = 1
    DELETE = 2
    UNKNOWN = 3


class MalformedPacket(ValueError):
    """Not what was expected. `str()` is one of a few: `length`, `mode 7`, `version 1`, `origin`."""


class UnusableReply(ValueError):
    """A server's answer to our query that gives no time. `str()` says why."""


class KissOfDeath(Exception):
    """A server answers that it does not want to be asked (RFC 5905 7.4). `code` is four letters: DENY, RSTR, RATE."""

    def __init__(self, code: str) -> None:
        self.code = code
        super().__init__(f"kiss of death {code}")


@dataclass(frozen=True, slots=True)
class Query:
    """What of a client's query comes back to it: nothing else of it is kept."""

    version: int
    cookie: int  # its transmit timestamp, which may be any number


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server says. Timestamps as received."""

    leap: Leap
    stratum: int
    root_delay_s: float
    root_dispersion_s: float
    receive: int
    transmit: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What we say. Timestamps are POSIX nanoseconds, and None where there is no time to give."""

    leap: Leap
    stratum: int
    root_delay_s: float = 0.0
    root_dispersion_s: float = 0.0
    reference_ns: int | None = None
    receive_ns: int | None = None
    transmit_ns: int | None = None


# --- a client's query, and our answer


def parse_query(message: bytes) -> Query:
    """A client's query; MalformedPacket for every other packet there is, extension fields and old versions included."""
    if len(message) != SIZE:
        raise MalformedPacket("length")
    version, mode = message[0] >> 3 & 7, message[0] & 7
    if mode != CLIENT:
        raise MalformedPacket(f"mode {mode}")
    if version not in VERSIONS:
        raise MalformedPacket(f"version {version}")
    return Query(version, int.from_bytes(message[40:SIZE]))


def build_answer(query: Query, answer: Answer) -> bytes:
    """The 48 bytes that go back to the client."""
    is_synchronised = answer.leap is not Leap.UNKNOWN
    return _PACKET.pack(
        answer.leap << 6 | query.version << 3 | SERVER,
        answer.stratum,
        _POLL,
        _PRECISION,
        _short(answer.root_delay_s),
        _short(answer.root_dispersion_s),
        REFERENCE_ID if is_synchronised else bytes(4),
        _timestamp_or_zero(answer.reference_ns),
        query.cookie,
        _timestamp_or_zero(answer.receive_ns),
        _timestamp_or_zero(answer.transmit_ns),
    )


# --- our own query, and a server's answer


def build_query(cookie: int) -> bytes:
    """A query that says nothing of us: neither our time nor what we know. `cookie` is a random number of 64 bits."""
    return _PACKET.pack(VERSION << 3 | CLIENT, 0, 0, _MINIMAL_PRECISION, 0, 0, bytes(4), 0, 0, 0, cookie)


def parse_reply(message: bytes, cookie: int) -> Reply:
    """A server's answer to `build_query(cookie)`.

    Raises MalformedPacket where it is no answer to that (somebody guesses, or an older answer comes late),
    UnusableReply where it is one and gives no time, and KissOfDeath.
    """
    if len(message) != SIZE:
        raise MalformedPacket("length")
    head, stratum, _, _, delay, dispersion, reference_id, _, origin, receive, transmit = _PACKET.unpack(message)
    if head & 7 != SERVER:
        raise MalformedPacket(f"mode {head & 7}")
    if head >> 3 & 7 not in VERSIONS:
        raise MalformedPacket(f"version {head >> 3 & 7}")
    if origin != cookie:
        raise MalformedPacket("origin")
    if stratum == 0:
        raise _kiss(reference_id)
    leap = Leap(head >> 6)
    if stratum >= UNSYNCHRONISED or leap is Leap.UNKNOWN:
        raise UnusableReply("not synchronised")
    reply = Reply(leap, stratum, delay / 65536, dispersion / 65536, receive, transmit)
    if reply.root_delay_s / 2 + reply.root_dispersion_s >= MAX_ROOT_DISTANCE_S:
        raise UnusableReply("root distance")
    if not receive or not transmit or posix_ns(transmit) < posix_ns(receive):
        raise UnusableReply("timestamps")
    return reply


def _kiss(reference_id: bytes) -> Exception:
    if reference_id.isalpha() and reference_id.isascii():  # four letters of a stranger, and no other bytes
        return KissOfDeath(reference_id.decode("ascii"))
    return UnusableReply("stratum 0")


# --- numbers


def timestamp(ns: int) -> int:
    """POSIX nanoseconds as an NTP timestamp."""
    seconds, fraction = divmod(ns, _NS)
    return (seconds + _EPOCH_1900_S) % _ERA_S << 32 | (fraction << 32) // _NS


def posix_ns(timestamp: int) -> int:
    """An NTP timestamp as POSIX nanoseconds, from 2025 on: which era it is of, it does not say."""
    seconds = (timestamp >> 32) - _EPOCH_1900_S
    while seconds < _EARLIEST_S:
        seconds += _ERA_S
    return seconds * _NS + ((timestamp & 0xFFFF_FFFF) * _NS + (1 << 31) >> 32)


def _timestamp_or_zero(ns: int | None) -> int:
    return 0 if ns is None else timestamp(ns)


def _short(seconds: float) -> int:
    """RFC 5905 6: 16 bits of seconds, 16 of fraction. Rounded up: an error must not shrink on its way."""
    return ceil(min(seconds, _LONGEST_S) * 65536)
