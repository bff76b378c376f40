"""What workloads were told, known to every worker: one answers the question, another accepts the connection after it.

It holds records and their form; the memory that carries them from worker to worker is `rings`.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from policies.addresses import Address
from policies.hostnames import Hostname
from proxy.lookups import Lookups
from proxy.rings import Rings

MAX_ADDRESSES = 256  # of one record; each takes up to 16 bytes
REPEAT_S = 8.0  # a name that is asked for again and again is among the newest for the others too

_RECORD = struct.Struct("=dBBHH")  # until, bytes of workload and of name, IPv4 and IPv6 addresses
_FOUR, _SIX = struct.Struct("4s"), struct.Struct("16s")


@dataclass(frozen=True, slots=True)
class _Left:
    """What the others were last told of a name, and when they are to be told again."""

    addresses: tuple[Address, ...]
    until: float
    again: float


class SharedLookups(Lookups):
    """`Lookups` of all workers of a gate. The clock is the same for every process of a machine.

    What one notes is in the memory of all before `note` returns, and `names_of` reads what is there before it answers.
    A worker that falls behind, or takes the place of another, may know less for a while: a connection is denied then
    that would have been let through, and never the other way round.
    """

    def __init__(
        self, rings: Rings, *, clock: Callable[[], float] = time.monotonic, max_addresses: int = 10_000
    ) -> None:
        super().__init__(clock=clock, max_addresses=max_addresses)
        self._rings = rings
        self._max_left = max_addresses
        self._left: dict[tuple[str, Hostname, int], _Left] = {}  # by IP version too: each has an answer of its own
        self._kept: Container[str] | None = None  # None: all
        for record in rings.former():
            self._take(record)
        self.catch_up()

    def note(self, workload: str, name: Hostname, addresses: Iterable[Address], until: float) -> None:
        addresses = tuple(addresses)
        super().note(workload, name, addresses, until)
        if not addresses:
            return
        key, now = (workload, name, addresses[0].version), self._clock()
        left = self._left.get(key)
        if left and left.addresses == addresses and left.until >= until and now < left.again:
            return
        if len(self._left) >= self._max_left:
            self._left.clear()
        self._left[key] = _Left(addresses, until, now + REPEAT_S)
        for start in range(0, len(addresses), MAX_ADDRESSES):
            self._rings.append(_write(workload, name, addresses[start : start + MAX_ADDRESSES], until))

    def names_of(self, workload: str, address: Address) -> tuple[Hostname, ...]:
        self.catch_up()  # also where there are names already: of several, one may be allowed
        return super().names_of(workload, address)

    def keep(self, workloads: Container[str]) -> None:
        self.catch_up()  # what is in the rings by now is of the former policy
        self._kept = workloads
        super().keep(workloads)

    def catch_up(self) -> None:
        """Read what the others have noted. Called now and then, so that none of it is overwritten unread."""
        for record in self._rings.news():
            self._take(record)

    def _take(self, record: bytes) -> None:
        found = _read(record)
        if found is None:
            return
        workload, name, addresses, until = found
        if until > self._clock() and (self._kept is None or workload in self._kept):
            super().note(workload, name, addresses, until)


def _write(workload: str, name: Hostname, addresses: Sequence[Address], until: float) -> bytes:
    four, six = ([address.packed for address in addresses if address.version == version] for version in (4, 6))
    whose, what = workload.encode(), name.encode()
    return b"".join((_RECORD.pack(until, len(whose), len(what), len(four), len(six)), whose, what, *four, *six))


def _read(record: bytes) -> tuple[str, Hostname, list[Address], float] | None:
    """Workload, name, addresses and until when. None: no worker of ours wrote this."""
    try:
        until, whose, what, four, six = _RECORD.unpack_from(record)
        name_at = _RECORD.size + whose
        four_at = name_at + what
        six_at = four_at + 4 * four
        if six_at + 16 * six != len(record):
            return None
        workload, name = record[_RECORD.size : name_at].decode(), record[name_at:four_at].decode("ascii")
    except (struct.error, UnicodeDecodeError):
        return None
    addresses: list[Address] = [IPv4Address(packed) for (packed,) in _FOUR.iter_unpack(record[four_at:six_at])]
    addresses += [IPv6Address(packed) for (packed,) in _SIX.iter_unpack(record[six_at:])]
    return workload, Hostname(name), addresses, until
