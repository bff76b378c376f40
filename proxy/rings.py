"""Rings in memory that processes share: each writes its own, all read the others'. It does not know what records say.

Nobody locks. A record is written, then published by the head; the tail moves past what is about to be overwritten
before it is. Every record has a checksum over itself and its place: one that is overwritten while it is read, that a
writer did not finish, or that is garbage, is no record.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from zlib import crc32

SIZE = 512 * 1024  # bytes of one ring
MAX_RECORD = 8192

_FRAME = struct.Struct("=II")  # length of what follows, checksum
_HEAD, _TAIL = (
    0,
    1,
)  # of the ring's first page, in words: all bytes that were ever written, and how many of them are gone
_WORD = 8
_MOST = 2**62  # bytes that nobody has ever written
_SPAN = SIZE + mmap.PAGESIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # a file that was cut is SIGBUS to who reads it


def share_rings(count: int) -> int:
    """A descriptor of memory for so many rings, made once and handed to every process. Linux."""
    fd = os.memfd_create("outgate-rings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, count * _SPAN)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


class Rings:
    """All rings, as the process that writes ring `own` has them. `shared` is closed here."""

    def __init__(self, shared: int, own: int, count: int) -> None:
        with open(shared, "rb") as file:  # only to close it: the memory stays
            memory = memoryview(mmap.mmap(file.fileno(), count * _SPAN))
        rings = [_Ring(memory[number * _SPAN : (number + 1) * _SPAN]) for number in range(count)]
        self._own = rings[own]
        self._own.repair()
        self._readers = [_Reader(ring) for ring in rings if ring is not self._own]
        self._former = _Reader(self._own)

    def append(self, record: bytes) -> None:
        """Leave `record` for the others. Raises ValueError if it is longer than MAX_RECORD."""
        self._own.append(record)

    def former(self) -> Iterator[bytes]:
        """What this process's own ring held when it came: of the one whose place it took."""
        return self._former.read()

    def news(self) -> Iterator[bytes]:
        """Records of the others since the last call; the first gives all that there are."""
        for reader in self._readers:
            if reader.is_behind:
                yield from reader.read()


class _Ring:
    """One ring. A word is written in one store (aligned, eight bytes), so nobody sees half of it."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory[: 2 * _WORD].cast("Q")
        self._bytes = memory[mmap.PAGESIZE :]

    @property
    def head(self) -> int:
        return self._words[_HEAD]

    @property
    def tail(self) -> int:
        return self._words[_TAIL]

    def repair(self) -> None:
        """Whoever wrote here before, or beside us, may have gone mad."""
        if not (self.head < _MOST and 0 <= self.head - self.tail <= SIZE):
            self._words[_TAIL] = self._words[_HEAD] = 0

    def append(self, record: bytes) -> None:
        if len(record) > MAX_RECORD:
            raise ValueError(f"a record of {len(record)} bytes, where {MAX_RECORD} may be")
        self.repair()
        head = self.head
        framed = _FRAME.pack(len(record), _checksum(record, head)) + record
        self._make_room(head + len(framed))
        self._put(head, framed)
        self._words[_HEAD] = head + len(framed)

    def record_at(self, place: int) -> bytes | None:
        """The record there, and nothing else."""
        length, checksum = _FRAME.unpack(self._get(place, _FRAME.size))
        if length > MAX_RECORD:
            return None
        record = self._get(place + _FRAME.size, length)
        return record if _checksum(record, place) == checksum else None

    def _make_room(self, end: int) -> None:
        tail = self.tail
        while end - tail > SIZE:
            oldest = self.record_at(tail)
            tail = self.head if oldest is None else tail + _FRAME.size + len(oldest)
        self._words[_TAIL] = tail

    def _put(self, place: int, content: bytes) -> None:
        start = place % SIZE
        first = min(len(content), SIZE - start)
        self._bytes[start : start + first] = content[:first]
        self._bytes[: len(content) - first] = content[first:]

    def _get(self, place: int, length: int) -> bytes:
        start = place % SIZE
        first = bytes(self._bytes[start : start + length])
        return first + bytes(self._bytes[: length - len(first)])


class _Reader:
    """How far one process has read one ring. What it was too slow for is lost to it."""

    def __init__(self, ring: _Ring) -> None:
        self._ring = ring
        self._place = ring.tail
        self._waits = False  # for what stood at `_place`

    @property
    def is_behind(self) -> bool:
        return self._ring.head != self._place

    def read(self) -> Iterator[bytes]:
        head, tail = self._ring.head, self._ring.tail
        if not tail <= self._place <= head:
            self._place = tail
        while self._place < head:
            record = self._ring.record_at(self._place)
            if record is None:
                self._pass_over(head)
                return
            self._waits = False
            self._place += _FRAME.size + len(record)
            yield record

    def _pass_over(self, head: int) -> None:
        """No record: its bytes may still be on their way from another core, so it has one more chance. Then all up to
        the head is lost: nothing says where the next one begins."""
        if self._waits:
            self._place = head
        self._waits = not self._waits


def _checksum(record: bytes, place: int) -> int:
    return crc32(record, place & 0xFFFFFFFF)
