"""HTTPS, SVCB, SRV and PTR records of names, asked for once and remembered. Who may see what is not known here."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from policies.hostnames import Hostname
from proxy.resolver import Resolver, ResolverFailed
from proxy.wire.svcb import Service
from proxy.wire.targets import Target

MIN_TTL_S, MAX_TTL_S = 5, 300
MAX_SERVICES = 16  # of one name; an answer must not grow our memory
MAX_TARGETS = 256  # a headless service has one for each of its pods

type _Key = tuple[Hostname, int]


@dataclass(frozen=True, slots=True)
class Found:
    """The services of a name until `expires`; none is the usual case, and is remembered too."""

    services: tuple[Service, ...]
    expires: float
    targets: tuple[Target, ...] = ()


class Services:
    """Asks by the gate's resolver, once for all who wait for the same."""

    def __init__(
        self, resolver: Resolver, *, clock: Callable[[], float] = time.monotonic, max_entries: int = 10_000
    ) -> None:
        self._resolver = resolver
        self._clock = clock
        self._max_entries = max_entries
        self._known: OrderedDict[_Key, Found] = OrderedDict()
        self._pending: dict[_Key, asyncio.Task[Found]] = {}

    def cached(self, name: Hostname, qtype: int) -> Found | None:
        """What is known without asking anybody."""
        if self._resolver.is_fixed(name):  # the operator says where it is: nobody else is asked
            return Found((), self._clock() + MAX_TTL_S)
        found = self._known.get((name, qtype))
        if found is None or found.expires <= self._clock():
            return None
        self._known.move_to_end((name, qtype))
        return found

    async def look_up(self, name: Hostname, qtype: int) -> Found:
        """Raises ResolverFailed."""
        if (found := self.cached(name, qtype)) is not None:
            return found
        key = (name, qtype)
        task = self._pending.get(key)
        if task is None:
            task = self._pending[key] = asyncio.create_task(self._ask(key))
            task.add_done_callback(partial(self._finish, key))
        await asyncio.wait((task,))  # not the task itself: one who stops waiting does not stop it for the others
        if task.cancelled():
            raise ResolverFailed(name, ["the resolver was closed"])
        return task.result()

    async def close(self) -> None:
        """End the questions under way; those who wait for them get ResolverFailed."""
        tasks = tuple(self._pending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, key: _Key) -> Found:
        answer = await self._resolver.ask(*key)
        ttl_s = answer.ttl_s if answer.services or answer.targets else answer.negative_ttl_s or 0
        expires = self._clock() + min(max(ttl_s, MIN_TTL_S), MAX_TTL_S)
        found = Found(answer.services[:MAX_SERVICES], expires, answer.targets[:MAX_TARGETS])
        self._known[key] = found
        self._known.move_to_end(key)
        while len(self._known) > self._max_entries:
            self._known.popitem(last=False)
        return found

    def _finish(self, key: _Key, task: asyncio.Task[Found]) -> None:
        del self._pending[key]
        if not task.cancelled():
            task.exception()  # those who wait see it; when all have left, asyncio would complain that nobody looked
