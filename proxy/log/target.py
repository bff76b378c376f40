"""Where decision records go: a file, a pipe or a terminal that several workers append whole lines to.

It knows bytes and who may write now; what a line says, and what a failure means for the gate, is not its work.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import PAGESIZE, mmap

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
_FLAGS |= os.O_NONBLOCK  # a FIFO that nobody reads is an error, and not a gate that hangs
_MODE = 0o640  # records name what a workload talks to
_CELL = 4  # bytes of a process id


def share_turns() -> int:
    """A descriptor for `Turns`, made once and handed to every process that writes to the same target. Linux."""
    fd = os.memfd_create("outgate-log-turns")
    os.ftruncate(fd, PAGESIZE)
    return fd


class Turns:
    """Whose turn it is to write, and who was cut off in the middle of a line, among those that share a descriptor.

    A pipe takes more than PIPE_BUF in pieces, and a disk that fills up takes a part: lines are safe by agreement alone.
    The lock is the process's: the kernel passes the turn on when its holder is killed (and when it closes any other
    descriptor of the same memory). `shared` is closed here; without it nobody else writes.
    """

    def __init__(self, shared: int | None = None) -> None:
        self._shared = shared
        self._memory = mmap(-1 if shared is None else shared, PAGESIZE)

    @contextmanager
    def take(self) -> Iterator[None]:
        if self._shared is None:
            yield
            return
        fcntl.lockf(self._shared, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._shared, fcntl.LOCK_UN)

    @property
    def torn_by(self) -> int:
        """The process that has begun a line and not ended it; 0: the log ends in a whole line."""
        return int.from_bytes(self._memory[:_CELL], sys.byteorder)

    @torn_by.setter
    def torn_by(self, pid: int) -> None:
        self._memory[:_CELL] = pid.to_bytes(_CELL, sys.byteorder)

    def close(self) -> None:
        self._memory.close()
        if self._shared is not None:
            os.close(self._shared)


class Target:
    """The log that `name` stands for: a path, `-` for standard error, None for standard output. Raises OSError."""

    def __init__(self, name: str | None, turns: Turns) -> None:
        self._turns = turns
        self._path = None if name in (None, "-") else name
        self._fd = _standard(name) if self._path is None else os.open(self._path, _FLAGS, _MODE)
        self._name = self._path or ("standard error" if name == "-" else "standard output")
        self._torn, self._begun = b"", 0  # a line that was cut off, and how much of it the log has
        self._look_for_a_torn_line()

    def __str__(self) -> str:
        return self._name

    @property
    def is_terminal(self) -> bool:
        return os.isatty(self._fd)

    @property
    def is_torn(self) -> bool:
        """The last line that was taken is not all written."""
        return bool(self._torn)

    def append(self, lines: bytearray) -> None:
        """Write `lines` in one turn, and take from them what the log has. Raises OSError over the rest.

        A line that is cut off is taken too: the next call completes it first or, where another process has written
        meanwhile, writes it anew on a line of its own.
        """
        if not lines and not self._torn:
            return
        me = os.getpid()
        with self._turns.take():
            torn_by = self._turns.torn_by
            begun = self._begun if torn_by == me else 0
            parting = b"\n" if torn_by and not begun else b""
            head = parting + self._torn[begun:]
            self._turns.torn_by = me  # until it is written: we may be killed on the way
            sent, error = self._send(head + lines)
            if sent < len(head):
                self._begun = begun + max(sent - len(parting), 0)
            else:
                self._take(lines, sent - len(head))
            self._turns.torn_by = me if self._begun or sent < len(parting) else 0
        if error:
            raise error

    def reopen(self) -> None:
        """Follow the path to the file that stands there now, or to a new one. On OSError the old one is kept."""
        if self._path is None:
            return
        old, new = self._fd, os.open(self._path, _FLAGS, _MODE)
        if os.path.samestat(os.fstat(old), os.fstat(new)):
            os.close(new)
            return
        self._fd, self._begun = new, 0
        self._look_for_a_torn_line()
        os.close(old)

    def close(self) -> None:
        """Raises OSError where the file system says only now that it could not keep what it took."""
        self._turns.close()
        if self._path is not None:
            os.close(self._fd)

    def _take(self, lines: bytearray, written: int) -> None:
        whole = lines.rfind(b"\n", 0, written) + 1
        self._begun = written - whole
        end = lines.index(b"\n", whole) + 1 if self._begun else whole
        self._torn = bytes(lines[whole:end])
        del lines[:end]

    def _send(self, data: bytes) -> tuple[int, OSError | None]:
        """How much of it was written, and what stopped the rest."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # whoever shares our standard output may have made it so
                _wait_for_room(self._fd)
            except OSError as error:
                return len(data) - len(left), error
        return len(data), None

    def _look_for_a_torn_line(self) -> None:
        """A machine that went down may have left one: the first record begins on a line of its own."""
        if self._path is None or not stat.S_ISREG(os.fstat(self._fd).st_mode):
            return
        with self._turns.take():
            if not _ends_in_a_line(self._path):
                self._turns.torn_by = os.getpid()


def _standard(name: str | None) -> int:
    """Descriptor 1 or 2. Raises OSError where the process was started without it: something else has its number now."""
    fd, stream, called = (1, sys.__stdout__, "output") if name is None else (2, sys.__stderr__, "error")
    if stream is None:
        raise OSError(errno.EBADF, f"standard {called} is closed")
    return fd


def _wait_for_room(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def _ends_in_a_line(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            return file.read(1) in (b"", b"\n")
    except OSError:  # a log that we may write and not read, or that was moved away just now
        return True
