"""Time for one command: no server is asked before the command asks, and from then on as our own schedule has it.

Outside it shows that the command asked for the time, once; not how often, not when again, and nothing of what it sent.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from policies.addresses import Address
from proxy.policy_in_force import PolicyInForce
from proxy.record import Sink
from proxy.relays.ntp.clock import read
from proxy.relays.ntp.named import NamedServers
from proxy.relays.ntp.poller import Poller
from proxy.relays.ntp.records import PacketRecords
from proxy.relays.ntp.server import NtpRelay
from proxy.relays.ntp.source import Pace
from proxy.resolver import Resolver

HOLD_S = 3.0  # a query waits so long for the first estimate; most clients wait for 5 s
PROMPT = Pace(min_samples=1, timeout_s=1.5)  # one answer of each server is the time, until there are more


class TimeOnDemand:
    """Answers the queries of one workload on any number of sockets. Made on a running asyncio loop.

    in_force  has its rules, which name servers and judge packets
    record    takes what was decided
    is_own    whether an address and port are the gate's own
    """

    def __init__(
        self,
        in_force: PolicyInForce,
        workload: str,
        resolver: Resolver,
        record: Sink,
        *,
        is_own: Callable[[Address, int], bool],
        pace: Pace = PROMPT,
        hold_s: float = HOLD_S,
    ) -> None:
        self._servers = NamedServers(lambda: in_force.policy, workload, resolver, is_own=is_own)
        self._hold_s = hold_s
        self._poller = Poller(pace, find=self._servers.find, is_open=self._servers.is_open, changed=self._heard)
        self._ntp = NtpRelay(
            in_force.decide,
            PacketRecords(record),
            workload=lambda _: workload,
            estimate=self._poller.estimate,
            is_own=lambda *_: False,  # nobody inside may ask for what listens outside
            refresh=self._await_estimate,
        )
        self._telling = asyncio.create_task(self._ntp.tell())
        self._is_asked = False
        self._known = asyncio.Event()
        self._held_until: float | None = None

    async def serve(self, sock: socket.socket) -> None:
        """Answer what arrives on a bound UDP socket until cancelled. Raises OSError if the socket breaks."""
        await self._ntp.serve(sock)

    async def close(self) -> None:
        """Ask nobody any more, and write the records that were put together."""
        self._telling.cancel()
        await asyncio.gather(self._telling, return_exceptions=True)
        await self._poller.close()

    async def _await_estimate(self) -> None:
        """Have the servers asked from the first query on, and hold queries while nobody knows the time, but not long:
        a client that is told so asks again, one that is told nothing gives up."""
        if not self._is_asked:
            self._is_asked = True
            self._poller.follow(self._servers.names)
        if self._poller.estimate(read()) is not None:
            return
        self._known.clear()
        if self._held_until is None:
            self._held_until = asyncio.get_running_loop().time() + self._hold_s
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._held_until):
                await self._known.wait()

    def _heard(self) -> None:
        if self._poller.estimate(read()) is not None:
            self._held_until = None
            self._known.set()
