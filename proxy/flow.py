"""An allowed connection on its way out: find the addresses, have each admitted, dial, relay. It judges nothing."""

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
from proxy.epoll import IN, RDHUP, Epoll
from proxy.limits import Limits
from proxy.original_dst import Destination
from proxy.relays.stream import End, Pipes, StreamRelay
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


class Flow:
    """One client connection that a rule admits. It ends in one of these, unless cancelled before it relays.

    denied  nothing may be dialled, or nothing answers (`note` may say more); the client's socket is as it was
    ended   it was relayed to `upstream` and is over; both sockets are closed
    failed  a callback crashed
    spoke   only where it is given: the client spoke before the upstream did, which is closed; the client's socket is as
            it was
    """

    __slots__ = ("_begun", "_client", "_denied", "_destination", "_dial", "_ended", "_exit", "_failed", "_lookup",
                 "_relay", "_spoke", "_verdict", "_waiting", "deadline", "note", "upstream")  # fmt: skip

    def __init__(
        self,
        exit: Exit,
        client: socket.socket,
        destination: Destination,
        verdict: Verdict,
        *,
        denied: Callable[[Verdict], None],
        ended: Callable[[End], None],
        failed: Callable[[Exception], None],
        spoke: Callable[[], None] | None = None,
    ) -> None:
        self._exit = exit
        self._client = client
        self._destination = destination
        self._verdict = verdict
        self._denied = denied
        self._ended = ended
        self._failed = failed
        self._spoke = spoke
        self._waiting: socket.socket | None = None  # connected, and nobody has spoken yet
        self.deadline = inf
        self._begun = 0.0  # when it was dialled
        self._lookup: asyncio.Task[None] | None = None
        self._dial: Dial | TunnelDial | None = None
        self._relay: StreamRelay | None = None
        self.upstream: Destination = destination
        self.note = ""

    @property
    def sent(self) -> int:
        """Bytes of the client that reached the upstream."""
        return self._relay.sent if self._relay else 0

    @property
    def received(self) -> int:
        """Bytes of the upstream that reached the client."""
        return self._relay.received if self._relay else 0

    def start(self, name: Hostname | None) -> None:
        """Dial the original address where the rule is about addresses, else one of `name`'s, or have the site's proxy
        dial either."""
        exit = self._exit
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
        """End it now: what is relayed is reset (`ended` follows), what is not there yet is given up without a word."""
        if self._relay is not None:
            self._relay.end(End.RESET)
        if self._dial is not None:
            self._dial.cancel()
        self._drop_waiting()
        if self._lookup is not None:
            self._lookup.cancel()

    def _look_up[Found](self, found: Coroutine[None, None, Found], then: Callable[[Found], None]) -> None:
        self._lookup = asyncio.get_running_loop().create_task(self._wait_for(found, then))

    async def _wait_for[Found](self, found: Coroutine[None, None, Found], then: Callable[[Found], None]) -> None:
        try:
            try:
                async with asyncio.timeout(self._exit.limits.resolve_s):
                    what = await found
            except NameNotFound:
                self._deny(Reason.NAME_NOT_FOUND)
            except (ResolverFailed, TimeoutError):
                self._deny(Reason.RESOLVER_FAILED)
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
        denied: Verdict | None = None
        for address in interleave(resolution.addresses):
            judged = exit.admit(self._verdict, address, from_hosts=resolution.from_hosts)
            if not judged.is_allow:
                denied = denied or judged
                continue
            if exit.is_own is not None and exit.is_own(address, port):
                denied = denied or self._denial(Reason.NEVER_REACHED)
                continue
            admitted.append(address)
            if len(admitted) == limits.max_addresses:
                break
        if not admitted:
            self._denied(denied or self._denial(Reason.NAME_NOT_FOUND))
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
            connected=self._connected,
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
            connected=self._connected,
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
        self.note = note
        self._denied(self._denial(reason))

    def _denial(self, reason: Reason) -> Verdict:
        verdict = self._verdict
        return Verdict(Action.DENY, reason, verdict.stage, verdict.rule, host=verdict.host)

    def _connected(self, upstream: socket.socket, address: Address) -> None:
        self._dial = None
        self.upstream = address, self.upstream[1]
        if self._exit.dialled:
            self._exit.dialled(self._exit.epoll.now - self._begun, None)
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._spoke is None:
            self._carry(upstream)
            return
        epoll = self._exit.epoll
        self._waiting = upstream
        self.deadline = epoll.now + self._exit.limits.idle_s
        epoll.watch(self)
        epoll.put(upstream.fileno(), IN, self._upstream_spoke, self.failed)
        epoll.put(self._client.fileno(), IN | RDHUP, self._client_spoke, self.failed)

    def _upstream_spoke(self, _events: int) -> None:
        upstream, self._waiting = self._waiting, None
        if upstream is not None:
            self._exit.epoll.unwatch(self)
            self._carry(upstream)

    def _client_spoke(self, _events: int) -> None:
        self._drop_waiting()
        if self._spoke is not None:
            self._spoke()

    def expired(self) -> None:
        self._drop_waiting()
        self._deny(Reason.HELLO_TIMEOUT)

    def failed(self, error: Exception) -> None:
        """A callback crashed."""
        self._drop_waiting()
        self._failed(error)

    def _drop_waiting(self) -> None:
        if self._waiting is None:
            return
        epoll = self._exit.epoll
        epoll.unwatch(self)
        epoll.remove(self._client.fileno())
        epoll.forget(self._waiting.fileno())
        self._waiting.close()
        self._waiting = None

    def _carry(self, upstream: socket.socket) -> None:
        exit = self._exit
        self._relay = StreamRelay(
            exit.epoll, exit.pipes, self._client, upstream, idle_s=exit.limits.idle_s, ended=self._ended
        )
        self._relay.start()
