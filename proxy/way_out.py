"""From an allow to a connected socket: find the addresses, have each admitted, dial one. It judges nothing.

Whoever sends for a workload goes this way: what is relayed undecrypted, and what is inspected.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Protocol

from addons.judge import Unreachable
from policies.hostnames import Hostname
from policies.model import Action, Address, Reason, Verdict
from policies.model import Dial as DialTo
from proxy.dialer import Dial, TunnelDial, interleave
from proxy.epoll import Epoll
from proxy.limits import Limits
from proxy.original_dst import Destination
from proxy.relays.stream import Pipes
from proxy.resolver import NameNotFound, Resolution, ResolverFailed
from proxy.upstream_proxy import SiteProxy, Way


class Resolver(Protocol):
    """What of `proxy.resolver.Resolver` is used here."""

    def cached(self, name: Hostname) -> Resolution | None: ...

    async def resolve(self, name: Hostname) -> Resolution: ...


class Admit(Protocol):
    def __call__(self, verdict: Verdict, address: Address, *, from_hosts: bool = ...) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class Exit:
    """What flows share on their way out. `Listener` says what each is."""

    epoll: Epoll
    pipes: Pipes
    limits: Limits
    admit: Admit
    resolver: Resolver
    site: SiteProxy | None = None
    is_own: Callable[[Address, int], bool] | None = None
    dialled: Callable[[float, Reason | None], None] | None = None


class WayOut:
    """One upstream connection for one verdict. It ends in exactly one of these, unless cancelled before.

    connected  the socket and its address; epoll still watches it, and whoever is told puts a callback of its own there
    denied     nothing may be dialled, or nothing answers; the note may say more, in words for the client
    failed     a callback crashed

    upstream    the address and port that are dialled
    from_hosts  the operator's `hosts:` named the address
    """

    __slots__ = ("_begun", "_connected", "_denied", "_destination", "_dial", "_exit", "_failed", "_lookup", "_tunnels",
                 "_verdict", "from_hosts", "upstream")  # fmt: skip

    def __init__(
        self,
        exit: Exit,
        destination: Destination,
        verdict: Verdict,
        *,
        connected: Callable[[socket.socket, Address], None],
        denied: Callable[[Verdict, str], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._exit = exit
        self._destination = destination
        self._verdict = verdict
        self._connected = connected
        self._denied = denied
        self._failed = failed
        self._begun = 0.0  # when it was dialled
        self._lookup: asyncio.Task[None] | None = None
        self._dial: Dial | TunnelDial | None = None
        self._tunnels = True
        self.upstream: Destination = destination
        self.from_hosts = False

    def start(self, name: Hostname | None, *, tunnels: bool = True) -> None:
        """Dial the original address where the rule is about addresses, else one of `name`'s, or have the site's proxy
        dial either. Without `tunnels` the site's proxy itself is what is connected: it will be sent the request."""
        exit = self._exit
        self._tunnels = tunnels
        if self._verdict.dial is DialTo.ORIGINAL:
            self._connect(Resolution((self._destination[0],), inf))
        elif name is None:  # no verdict says so; if one ever does, stay closed
            self._deny(Reason.GATE_FAILED)
        elif exit.site is not None and exit.site.carries(name):
            self._go_through(exit.site, name)
        elif resolution := exit.resolver.cached(name):
            self._connect(resolution)
        else:
            self._look_up(exit.resolver.resolve(name), self._connect)

    def cancel(self) -> None:
        """Give it up without a word."""
        if self._dial is not None:
            self._dial.cancel()
        if self._lookup is not None:
            self._lookup.cancel()

    def _look_up[Found](self, found: Coroutine[None, None, Found], then: Callable[[Found], None]) -> None:
        self._lookup = asyncio.get_running_loop().create_task(self._wait_for(found, then))

    async def _wait_for[Found](self, found: Coroutine[None, None, Found], then: Callable[[Found], None]) -> None:
        try:
            try:
                async with asyncio.timeout(self._exit.limits.resolve_s):
                    what = await found
            except NameNotFound as error:
                self._deny(Reason.NAME_NOT_FOUND, str(error))
            except ResolverFailed as error:
                self._deny(Reason.RESOLVER_FAILED, str(error))
            except TimeoutError:
                self._deny(Reason.RESOLVER_FAILED, f"no answer within {self._exit.limits.resolve_s:g} s")
            except Unreachable as failure:
                self._deny(failure.reason, failure.note)
            else:
                self._lookup = None
                then(what)
        except Exception as error:
            self._exit.epoll.contain(self._failed, error)

    def _connect(self, resolution: Resolution) -> None:
        exit, limits = self._exit, self._exit.limits
        port = resolution.port or self._destination[1]
        admitted: list[Address] = []
        denied: tuple[Verdict, str] | None = None
        for address in interleave(resolution.addresses):
            judged = exit.admit(self._verdict, address, from_hosts=resolution.from_hosts)
            if not judged.is_allow:
                denied = denied or (judged, str(address))
                continue
            if exit.is_own is not None and exit.is_own(address, port):
                denied = denied or (self._denial(Reason.NEVER_REACHED), "it is this gate")
                continue
            admitted.append(address)
            if len(admitted) == limits.max_addresses:
                break
        self.from_hosts = resolution.from_hosts
        if not admitted:
            refused, note = denied or (self._denial(Reason.NAME_NOT_FOUND), "it has no address")
            self._denied(refused, note)
        elif exit.site is not None and self._verdict.dial is DialTo.ORIGINAL and exit.site.carries(admitted[0]):
            self._go_through(exit.site, admitted[0])
        else:
            self._dial_one_of(admitted, port)

    def _dial_one_of(self, addresses: Sequence[Address], port: int) -> None:
        exit = self._exit
        self.upstream = addresses[0], port
        self._begun = exit.epoll.now if exit.dialled else 0.0
        self._dial = Dial(
            exit.epoll,
            addresses,
            port,
            exit.limits,
            connected=self._succeeded,
            unreachable=self._unreachable,
            crashed=self._failed,
        )

    # --- through the site's proxy ---

    def _go_through(self, site: SiteProxy, target: Hostname | Address) -> None:
        """Have the site's proxy dial `target`. Nothing is dialled past it when it fails."""
        try:
            way = site.known()
        except Unreachable as failure:
            self._deny(failure.reason, failure.note)
            return
        if way is not None:
            self._ask_for(target, site, way)
        else:
            self._look_up(site.find(), partial(self._ask_for, target, site))

    def _ask_for(self, target: Hostname | Address, site: SiteProxy, way: Way) -> None:
        exit, (addresses, port) = self._exit, way
        if not self._tunnels:
            self._dial_one_of(addresses, port)
            return
        try:
            request = site.request(target, self._destination[1])
        except Unreachable as failure:
            self._deny(failure.reason, failure.note)
            return
        self.upstream = addresses[0], port
        self._begun = exit.epoll.now if exit.dialled else 0.0
        self._dial = TunnelDial(
            exit.epoll,
            addresses,
            port,
            exit.limits,
            request,
            connected=self._succeeded,
            unreachable=self._unreachable,
            crashed=self._failed,
        )

    # --- the outcome ---

    def _unreachable(self, reason: Reason, note: str = "") -> None:
        if self._exit.dialled:
            self._exit.dialled(self._exit.epoll.now - self._begun, reason)
        self._deny(reason, note)

    def _deny(self, reason: Reason, note: str = "") -> None:
        """A rule admits it, and it cannot be carried."""
        self._denied(self._denial(reason), note)

    def _denial(self, reason: Reason) -> Verdict:
        verdict = self._verdict
        return Verdict(Action.DENY, reason, verdict.stage, verdict.rule, host=verdict.host)

    def _succeeded(self, sock: socket.socket, address: Address) -> None:
        self._dial = None
        self.upstream = address, self.upstream[1]
        if self._exit.dialled:
            self._exit.dialled(self._exit.epoll.now - self._begun, None)
        self._connected(sock, address)
