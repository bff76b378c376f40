"""`outgate relay`: the parts of an NTP relay put together, from its command line to its exit code."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from policies.hostnames import Hostname
from policies.index import Policy
from policies.keys import Scope, Shape, Wrong
from policies.spelling import did_you_mean
from policies.tree import Scalar
from proxy.child import leave_no_core
from proxy.compiled import read_policy
from proxy.config import SocketAddress
from proxy.config.values import ADMIN, SOCKET_ADDRESS, seconds
from proxy.hosts import HostsEntry, MalformedHostOption, parse_host_options, read_hosts_file, system_nameservers
from proxy.log.decision_log import DecisionLog
from proxy.options import Misused, Unready, checked_upstream_ca, decision_log, say
from proxy.own_doors import OwnDoors
from proxy.policy_in_force import PolicyInForce
from proxy.record import Peer, Record, show_peer
from proxy.relays.ntp.clock import read
from proxy.relays.ntp.named import MalformedNtsOption, NamedServers, NtsNames, names_of, parse_nts_options
from proxy.relays.ntp.poller import Poller
from proxy.relays.ntp.records import PacketRecords
from proxy.relays.ntp.server import NtpRelay
from proxy.relays.ntp.source import Pace, SourceState
from proxy.resolver import Resolver
from proxy.service.compiler import NICENESS, Request, compile_policy
from proxy.service.doors import has_ipv6
from proxy.service.notify import Notifier
from proxy.service.status import ReloadOutcome, ReloadResult, refused_note
from proxy.service.watch import Watch
from proxy.wire.ntp import PORT

if TYPE_CHECKING:
    from proxy.relays.ntp.keys import Keys
    from proxy.service.admin import Admin

USAGE, NOT_STARTED = 2, 3
ADMIN_ADDRESS = ("127.0.0.1", 9902)
LOOK_S = 1.0
HOLDS_S = 64.0  # how long an answer of relay mode may rest on what servers said before
RELAYED = Pace(min_samples=1, window=1, stale_s=HOLDS_S)


class RelayMode(StrEnum):
    """Who decides when servers are asked."""

    SERVE = "serve"  # we do: nothing of a client reaches a server, not even when it asked
    RELAY = "relay"  # clients do: each answer rests on one that was asked for because of it


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayOptions:
    """What was said on the command line."""

    paths: tuple[str, ...]
    tags: tuple[str, ...] = ()
    workload: str | None = None
    listen: tuple[SocketAddress, ...] = ()
    mode: RelayMode = RelayMode.SERVE
    hosts: tuple[str, ...] = ()
    nts: tuple[str, ...] = ()
    upstream_ca: str | None = None
    log: str | None = None
    admin: SocketAddress | None = ADMIN_ADDRESS
    drain_s: float = 0.0  # at the end: how long it answers on, not ready


def read_address(flag: str, text: str) -> SocketAddress:
    """`ADDR:PORT`. Raises Misused."""
    return _read(SOCKET_ADDRESS, flag, text)


def read_admin(flag: str, text: str) -> SocketAddress | None:
    """`ADDR:PORT`, or `none`. Raises Misused."""
    return _read(ADMIN, flag, text)


def read_seconds(flag: str, text: str) -> float:
    """At most an hour. Raises Misused."""
    return _read(seconds(3600), flag, text)


def _read[T](shape: Shape[T], flag: str, text: str) -> T:
    try:
        return shape.read(Scalar(text, True, 1, 1), Scope(flag, None, lambda _: False))
    except Wrong as error:
        [problem] = error.problems
        raise Misused("; ".join(filter(None, (f"{flag}: {problem.message}", problem.hint)))) from error


def relay(options: RelayOptions) -> int:
    """Give time until SIGINT or SIGTERM. Returns 0; after one clear line 2 (misused) or 3 (not started)."""
    leave_no_core()
    try:
        asyncio.run(_relay(options))
    except Unready as error:
        say(str(error))
        return USAGE if isinstance(error, Misused) else NOT_STARTED
    return 0


async def _relay(options: RelayOptions) -> None:
    """Raises Unready."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    policy = await _read_policy(options)
    assert policy is not None
    it = Relay(options, policy)
    loop.add_signal_handler(signal.SIGHUP, it.hang_up)
    try:
        await it.run(stop, hurry)
    finally:
        await it.close()


class Relay:
    """One relay process. Made on a running asyncio loop. Raises Unready."""

    def __init__(self, options: RelayOptions, policy: Policy) -> None:
        self._options = options
        self._watch = Watch((*options.paths, *options.tags))
        self._in_force = PolicyInForce(policy, options.workload)
        self._refused = ""
        self._upstream_ca = checked_upstream_ca(options.upstream_ca)
        self._nts = _nts(options, self._in_force.policy)
        self._resolver = Resolver(_hosts(options), system_nameservers(), system_hosts=read_hosts_file())
        self._sockets: list[socket.socket] = []
        self._log: DecisionLog | None = None
        self._admin: Admin | None = None
        self._reloading = asyncio.Lock()
        self._hung_up = asyncio.Event()
        self._is_ending = False
        self._notifier = Notifier()
        self._said_ready = False
        try:
            for address in options.listen or (_default_address(),):
                self._sockets.append(_bind(address))
            self._log = decision_log(options.log)
        except BaseException:
            self._close_files()
            raise
        is_own = OwnDoors(self.addresses).holds
        self._servers = NamedServers(lambda: self._in_force.policy, options.workload, self._resolver, is_own=is_own)
        is_relayed = options.mode is RelayMode.RELAY
        self._poller = Poller(
            RELAYED if is_relayed else Pace(),
            find=self._find,
            is_open=self._servers.is_open,
            on_demand=is_relayed,
            keys=self._keys,
            log=say,
        )
        self._ntp = NtpRelay(
            self._in_force.decide,
            PacketRecords(self._note),
            workload=self._in_force.identify,
            estimate=self._poller.estimate,
            is_own=is_own,
            refresh=self._poller.refresh if is_relayed else None,
        )

    def _find(self, name: Hostname) -> Awaitable[Sequence[Peer]]:
        """Of a server that must prove what it says its key exchange."""
        return self._servers.find(name, self._nts.port_of(name))

    def _keys(self, name: Hostname) -> Keys | None:
        if self._nts.port_of(name) is None:
            return None
        from proxy.relays.ntp.keys import Keys  # here: it brings cryptography

        return Keys(name, self._servers.locate, roots=self._upstream_ca)

    @property
    def addresses(self) -> list[Peer]:
        """Where it listens."""
        return [sock.getsockname()[:2] for sock in self._sockets]

    @property
    def admin_address(self) -> Peer | None:
        return self._admin.address if self._admin else None

    @property
    def generation(self) -> str:
        return self._in_force.policy.generation

    # --- its life

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event) -> None:
        """Serve until `stop` is set, and not ready for `drain_s` more, unless `hurry` is. Raises Unready."""
        await self._open_admin()
        for address in self.addresses:
            say(f"giving time on {show_peer(address)}")
        if self.admin_address:
            say(f"answering /readyz and /metrics on {show_peer(self.admin_address)}")
        self._poller.follow(self._servers.names)
        if self._options.mode is RelayMode.RELAY:
            await self._poller.refresh()  # whether servers can be reached at all is known before a client asks
        async with asyncio.TaskGroup() as group:
            works = [self._watch_files(), self._obey(), self._look(), self._say_alive(), self._poller.watch()]
            works += [self._ntp.tell(), *map(self._ntp.serve, self._sockets)]
            tasks = [group.create_task(work) for work in works]
            await stop.wait()
            self._is_ending = True
            self._notifier.stopping()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.drain_s):
                    await hurry.wait()
            for task in tasks:
                task.cancel()

    async def close(self) -> None:
        await self._poller.close()
        await self._resolver.close()
        if self._admin:
            await self._admin.close()
        self._close_files()

    def _close_files(self) -> None:
        for sock in self._sockets:
            sock.close()
        if self._log:
            self._log.close()

    async def _open_admin(self) -> None:
        if self._options.admin is None:
            return
        from proxy.service.admin import AdminFailed, open_admin  # here: it brings a web server

        try:
            self._admin = await open_admin(self._options.admin, self, log=say)
        except AdminFailed as error:
            raise Unready(str(error)) from error

    async def _look(self) -> None:
        """Tell the service manager, and whoever reads standard error, when this changes."""
        shown = ""
        while True:
            because = self.ready()
            if shown != (shown := "; ".join(because) or f"synchronised, policy {self.generation}"):
                say(shown)
                if because or self._said_ready:
                    self._notifier.status(shown)
                else:
                    self._said_ready = True
                    self._notifier.ready(shown)
            await asyncio.sleep(LOOK_S)

    async def _say_alive(self) -> None:
        while self._notifier.watchdog_s:
            self._notifier.alive()
            await asyncio.sleep(self._notifier.watchdog_s / 2)

    # --- the policy

    def hang_up(self) -> None:
        """SIGHUP: follow a log file that was moved away, and read the policy files again."""
        if self._log:
            self._log.reopen()
        self._hung_up.set()

    async def _obey(self) -> None:
        while True:
            await self._hung_up.wait()
            self._hung_up.clear()
            await self.reload()

    async def _watch_files(self) -> None:
        while True:
            await self._watch.changed()
            await self.reload()

    async def reload(self) -> ReloadResult:
        async with self._reloading:
            before = self.generation
            try:
                policy = await _read_policy(self._options, before)
            except Unready as error:
                if str(error) != self._refused:
                    say(f"the policy is not reloaded, {before} stays in force:\n{error}")
                self._refused = str(error)
                return ReloadResult(ReloadOutcome.REFUSED, before, tuple(self._refused.splitlines()))
            self._refused = ""
            if policy is None:
                return ReloadResult(ReloadOutcome.UNCHANGED, before)
            self._in_force.policy = policy
            names = self._servers.names
            self._poller.follow(names)
            say(f"policy {policy.generation} is in force")
            for name in sorted(self._nts.ports.keys() - names):
                say(f"--nts {name}: no ntp rule names it any more")
            return ReloadResult(ReloadOutcome.LOADED, policy.generation)

    # --- records, and Status as the admin port asks it

    def _note(self, record: Record) -> None:
        record["policy.generation"] = self.generation
        if self._log:
            self._log(record)

    def ready(self) -> list[str]:
        """Why it gives no time; empty: it does."""
        if self._is_ending:
            return ["the relay is ending"]
        now = read()
        estimate = self._poller.estimate(now)
        if estimate is not None and not estimate.is_stale(now.own_ns):
            return []
        states = [standing.state for standing in self._poller.standings()]
        if SourceState.UNDECIDED in states:
            return ["not synchronised: the servers disagree, and no majority of them is right"]
        if SourceState.SELECTED in states and SourceState.STARTING not in states:
            return ["not synchronised: fewer than half of the servers give the same time"]
        return ["not synchronised: no server gives the time" + (" any more" if estimate else " yet")]

    def notes(self) -> list[str]:
        """Of servers that do not help, and of what else an operator should know."""
        found = [
            f"{one.source.name} is {one.state}" + (f": {one.source.fault}" if one.source.fault else "")
            for one in self._poller.standings()
            if one.state not in (SourceState.SELECTED, SourceState.STARTING, SourceState.SPARE)
        ]
        if self._refused:
            paths = (*self._options.paths, *self._options.tags)
            found.append(refused_note(paths, self._refused, self.generation))
        if self._log and self._log.failure:
            found.append("the decision log cannot be written")
        return list(dict.fromkeys(found))

    async def metrics(self, openmetrics: bool) -> bytes:
        from proxy.relays.ntp.page import render

        return render(self._poller, self._ntp, self._log, self.generation, openmetrics=openmetrics)


# --- options


def _hosts(options: RelayOptions) -> dict[Hostname, HostsEntry]:
    """Raises Misused."""
    try:
        return parse_host_options(options.hosts)
    except MalformedHostOption as error:
        raise Misused(str(error)) from error


def _nts(options: RelayOptions, policy: Policy) -> NtsNames:
    """Raises Misused: a name that is spelled wrong would be asked without proof."""
    try:
        nts = parse_nts_options(options.nts)
    except MalformedNtsOption as error:
        raise Misused(str(error)) from error
    named = names_of(policy, options.workload)
    for name in nts.ports:
        if name not in named:
            raise Misused(f"--nts {name}: no ntp rule names it; {did_you_mean(name, named)}")
    return nts


async def _read_policy(options: RelayOptions, known: str | None = None) -> Policy | None:
    """The policy, from a process of its own: many rules take seconds, and this one answers clients meanwhile. None: it
    is the `known` generation. Raises Unready with every problem, one a line."""
    request = Request(
        paths=options.paths, tags=options.tags, workload=options.workload, gives_time=True, known=known,
        niceness=NICENESS if known else 0,
    )  # fmt: skip
    _, compiled = await compile_policy(request)
    if compiled is None:
        return None
    with compiled:
        policy = read_policy(compiled)
    await asyncio.to_thread(names_of, policy, options.workload)  # what it reads of each workload is kept ready
    return policy


def _default_address() -> SocketAddress:
    return ("::" if has_ipv6() else "0.0.0.0", PORT)  # noqa: S104 - it is there for others


def _bind(address: SocketAddress) -> socket.socket:
    """Raises Unready."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        sock.bind(address)
    except OSError as error:
        sock.close()
        hint = "; port 123 needs CAP_NET_BIND_SERVICE" if isinstance(error, PermissionError) else ""
        raise Unready(f"--listen {show_peer(address)}: {(error.strerror or str(error)).lower()}{hint}") from error
    return sock
