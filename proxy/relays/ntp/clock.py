"""Our own clock, which nobody sets or slews, and the kernel's stamps on packets in its terms. It knows no servers.

It is CLOCK_MONOTONIC_RAW. The machine's own clock may be what a client of ours corrects by our answers: if these went
by it, each correction would be answered with itself. That clock is looked at for two things alone: the kernel stamps
packets by it, and a jump between the two says that it was set, or that this machine was stopped for a while.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proxy.relays.ntp.sample import MAX_RATE, NS, STEP_S, Rate

SO_TIMESTAMPNS = 35  # asm-generic/socket.h; `socket` has no name for it
STAMP_SIZE = 16
_STAMP = struct.Struct("@ll")
_MAX_AGE_NS = NS  # of a packet in the queue; an older stamp is of a clock that was set meanwhile
_PRIOR_ERROR = 30e-6  # the rate that the kernel goes by may be off by that
_LEAST_NS = NS // 10

type Ancillary = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class Reading:
    """Both clocks at one moment, in nanoseconds."""

    own_ns: int
    machine_ns: int


def read() -> Reading:
    machine_ns = time.time_ns()
    return Reading(time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW), machine_ns)


def own_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def ask_for_stamps(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


def arrived_ns(ancillary: Sequence[Ancillary], now: Reading) -> int:
    """When a packet came, by our own clock; as the kernel stamped it, or now where it did not."""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, ns = _STAMP.unpack(content[: _STAMP.size])
            age_ns = now.machine_ns - (seconds * NS + ns)
            return now.own_ns - age_ns if 0 <= age_ns <= _MAX_AGE_NS else now.own_ns
    return now.own_ns


class Jumps:
    """Whether the machine's clock and ours still go together. Slewing is no jump, however long it lasts."""

    def __init__(self, now: Reading) -> None:
        self._apart_ns = now.machine_ns - now.own_ns

    def look(self, now: Reading) -> float:
        """Seconds by which the machine's clock has jumped since the last look; 0.0: it has not."""
        before, self._apart_ns = self._apart_ns, now.machine_ns - now.own_ns
        jumped_s = (self._apart_ns - before) / NS
        return jumped_s if abs(jumped_s) >= STEP_S else 0.0


class KernelRate:
    """How fast our clock runs beside the one that the kernel may be disciplining: what there is to go by at first."""

    def __init__(self, read_ns: Callable[[int], int] = time.clock_gettime_ns) -> None:
        self._read_ns = read_ns
        self._began = self._look()

    def rate(self) -> Rate:
        own_ns, disciplined_ns = (now - began for now, began in zip(self._look(), self._began, strict=True))
        value = (disciplined_ns - own_ns) / own_ns if own_ns >= _LEAST_NS else 0.0
        return Rate(min(max(value, -MAX_RATE), MAX_RATE), _PRIOR_ERROR)

    def _look(self) -> tuple[int, int]:
        return self._read_ns(time.CLOCK_MONOTONIC_RAW), self._read_ns(time.CLOCK_MONOTONIC)
