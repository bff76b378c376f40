"""The framing of HTTP/1.1 bodies: payload out of a length, chunks or a connection's end, and chunks anew. No I/O.

Every decoder has `feed(data) -> (parts, done, rest)`: the payload there is, whether the body is over, and what followed
it. It keeps a bounded few bytes between calls, and raises Refused.
"""

from __future__ import annotations

import re
from typing import Protocol

from addons.judge import BAD_REQUEST
from policies.model import Reason
from proxy.lane.http1 import Refused, parse_trailers

MAX_SIZE_LINE = 256  # with the extensions of a response's chunk, which nobody uses
MAX_TRAILERS = 16 * 1024
END = b"0\r\n\r\n"

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})(?:[\t ]*+(;[\t\x20-\x7e\x80-\xff]*+))?\r\n")
_SIZE_BEGUN = re.compile(rb"[0-9A-Fa-f]{0,12}\r?|[0-9A-Fa-f]{1,12}[\t ]*+(?:;[\t\x20-\x7e\x80-\xff]*+)?\r?")

_SIZE_LINE, _DATA, _DATA_END, _TRAILERS = range(4)

type Fed = tuple[list[bytes], bool, bytes]


class Body(Protocol):
    """One body under way. `trailers`: the lines that came behind it, rebuilt."""

    trailers: bytes

    def feed(self, data: bytes) -> Fed: ...


class Sized:
    """A body of so many bytes."""

    __slots__ = ("left", "trailers")

    def __init__(self, length: int) -> None:
        self.left = length
        self.trailers = b""

    def feed(self, data: bytes) -> Fed:
        size = len(data)
        if size < self.left:
            self.left -= size
            return [data], False, b""
        taken, self.left = self.left, 0
        return ([data] if taken == size else [data[:taken]]), True, data[taken:]


class UntilClose:
    """A body that the end of its connection delimits; whoever reads that tells a clean end from a broken one."""

    __slots__ = ("trailers",)

    def __init__(self) -> None:
        self.trailers = b""

    def feed(self, data: bytes) -> Fed:
        return [data], False, b""


class Chunked:
    """A chunked body (RFC 9112 7.1). `in_request`: extensions are refused, since readers differ on where they end."""

    __slots__ = ("_held", "_in_request", "_left", "_searched", "_step", "trailers")

    def __init__(self, *, in_request: bool) -> None:
        self._in_request = in_request
        self._step = _SIZE_LINE
        self._held = b""  # less than a size line, or than the trailers may have
        self._left = 0  # of the chunk under way
        self._searched = 0  # of the trailers held
        self.trailers = b""

    def feed(self, data: bytes) -> Fed:
        if self._held:
            data, self._held = self._held + data, b""
        parts: list[bytes] = []
        at, size = 0, len(data)
        while True:
            if self._step == _DATA:
                end = at + self._left
                if end > size:
                    if at < size:
                        parts.append(data[at:])
                        self._left = end - size
                    return parts, False, b""
                parts.append(data[at:end])
                at = end
                self._step = _DATA_END
            if self._step == _DATA_END:
                if not data.startswith(b"\r\n", at):
                    if (held := data[at:]) not in (b"", b"\r"):
                        raise _bad("a chunk is longer than its size")
                    self._held = held
                    return parts, False, b""
                at += 2
                self._step = _SIZE_LINE
            if self._step == _SIZE_LINE:
                found = _SIZE.match(data, at)
                if found is None:
                    self._hold_size(data, at)
                    return parts, False, b""
                at = self._take_size(found, at)
            if self._step == _TRAILERS:
                end = self._take_trailers(data, at)
                return parts, end >= 0, data[end:] if end >= 0 else b""

    def _hold_size(self, data: bytes, at: int) -> None:
        if len(data) - at > MAX_SIZE_LINE or not _SIZE_BEGUN.fullmatch(data, at):
            raise _bad("a chunk's size is malformed")
        self._held = data[at:]

    def _take_size(self, found: re.Match[bytes], at: int) -> int:
        end = found.end()
        if end - at > MAX_SIZE_LINE:
            raise _bad("a chunk's size line is too long")
        if self._in_request and end - found.end(1) > 2:
            raise _bad("a chunk has an extension")
        self._left = int(found[1], 16)
        self._step = _DATA if self._left else _TRAILERS
        return end

    def _take_trailers(self, data: bytes, at: int) -> int:
        """Where the body ends; negative: more is needed."""
        if data.startswith(b"\r\n", at):
            return at + 2
        end = data.find(b"\r\n\r\n", at + self._searched)
        if max(end, len(data) if end < 0 else 0) - at > MAX_TRAILERS:
            raise _bad("the trailers are too long")
        if end < 0:
            self._held = data[at:]
            self._searched = max(0, len(self._held) - 3)
            return -1
        self.trailers = parse_trailers(data[at : end + 2])
        return end + 4


def chunk(parts: list[bytes]) -> list[bytes]:
    """`parts` as one chunk; nothing for nothing."""
    size = sum(map(len, parts))
    return [b"%x\r\n" % size, *parts, b"\r\n"] if size else []


def last_chunk(trailers: bytes) -> bytes:
    return b"0\r\n%b\r\n" % trailers if trailers else END


def _bad(why: str) -> Refused:
    return Refused(BAD_REQUEST, Reason.MALFORMED_REQUEST, why)
