"""Which names a workload's lookups gave an address for, and until when: opaque bytes carry no name of their own."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable

from policies.addresses import Address
from policies.hostnames import Hostname

MAX_NAMES = 16  # per address; thousands of names share a CDN's, and the newest are the ones meant


class Lookups:
    """The addresses each workload was told, the oldest forgotten first; one workload never pushes out another's."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, max_addresses: int = 10_000) -> None:
        self._clock = clock
        self._max_addresses = max_addresses
        self._told: dict[str, OrderedDict[Address, dict[Hostname, float]]] = {}

    def note(self, workload: str, name: Hostname, addresses: Iterable[Address], until: float) -> None:
        """`workload` was told that `name` has these addresses; it counts until then, or longer if that was known."""
        told = self._told.setdefault(workload, OrderedDict())
        for address in addresses:
            names = told.setdefault(address, {})
            told.move_to_end(address)
            names[name] = max(until, names.pop(name, until))  # popped first: the newest stands last
            if len(names) > MAX_NAMES:
                del names[next(iter(names))]
        while len(told) > self._max_addresses:
            told.popitem(last=False)

    def keep(self, workloads: Container[str]) -> None:
        """Forget what other workloads were told: there are none of theirs any more."""
        for workload in [one for one in self._told if one not in workloads]:
            del self._told[workload]

    def names_of(self, workload: str, address: Address) -> tuple[Hostname, ...]:
        """The names that gave `address` to `workload` and still do, the newest first."""
        told = self._told.get(workload)
        names = told.get(address) if told else None
        if not names:
            return ()
        now = self._clock()
        return tuple(name for name, until in reversed(names.items()) if until > now)
