"""Another process of ours: how it is started with a channel to it, bound to our life, and when it is started again.

What the two say to each other is their own business.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from time import monotonic
from typing import IO

from proxy import own_code

_PR_SET_PDEATHSIG = 1
_NO_CORE = 1  # byte: no file is made for so little, nor is it piped to a program, as it is with a limit of 0 (core(5))
_DOUBLINGS = 32  # 2.0**1024 is an OverflowError, after three hours of failures: who starts it again would be lost


@dataclass(frozen=True, slots=True)
class Child:
    """A process, and our end of the SOCK_SEQPACKET pair whose other end it was born with."""

    process: subprocess.Popen[bytes]
    sock: socket.socket

    def kill(self) -> None:
        """End it now, if it has not ended."""
        self.process.kill()
        self.process.wait()


def start(module: str, *, speaks: bool = False) -> Child:
    """Start `python -m module FD PARENT`. `speaks`: it has our standard output and error. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stream = None if speaks else subprocess.DEVNULL
    try:
        # No -O: it would save a tenth of a request, but where nobody has compiled for it the start takes twice as long.
        # A group of its own: the terminal's interrupt is for us, who then let go of it.
        process = subprocess.Popen(
            own_code.command(module, str(theirs.fileno()), str(os.getpid())),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            process_group=0,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Child(process, ours)


def die_with(parent: int) -> None:
    """The end of the channel says it too; this is for a parent whose end somebody else still holds."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def raise_descriptor_limit() -> None:
    """As many descriptors as this process may have: a connection takes two, a flow up to six."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))


def leave_no_core(*, for_good: bool = True) -> None:
    """A crash of this process, or of one that it starts, leaves no image of its memory: keys would stand in it.

    for_good  none of them may raise the limit again
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = _NO_CORE if hard == resource.RLIM_INFINITY else min(hard, _NO_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit if for_good else hard))


def memory(content: bytes, name: str) -> IO[bytes]:
    """A file that is on no disk, for what is too long for one message or must not be seen."""
    file = open(os.memfd_create(name), "w+b")  # noqa: SIM115 - who sends it closes it
    file.write(content)
    file.seek(0)
    return file


class BackOff:
    """When a process that ended may be started again: soon at first, ever later while it keeps ending.

    settled_s  it ran so long: the next failure is a new one
    """

    def __init__(self, first_s: float, longest_s: float, settled_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._settled_s = settled_s
        self._started = self._not_before = 0.0
        self.failures = 0  # in a row

    @property
    def is_over(self) -> bool:
        """It may be started now."""
        return monotonic() >= self._not_before

    def started(self) -> None:
        self._started = monotonic()

    def failed(self) -> float:
        """It ended, or could not be started. Returns the pause until it may be started, in seconds."""
        if monotonic() - self._started > self._settled_s:
            self.failures = 0
        pause_s = min(self._first_s * 2.0 ** min(self.failures, _DOUBLINGS), self._longest_s)
        self.failures += 1
        self._not_before = monotonic() + pause_s
        return pause_s
