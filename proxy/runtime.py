"""One gate, wired: the only file that knows every part. The parts know each other by what they are handed here."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from policies.engine import admit, carries_plain, expect
from policies.hostnames import Hostname
from policies.index import Policy
from policies.model import UNKNOWN, Action, Address, Attempt, Network, Reason, Stage, Verdict
from proxy.compiled import NotCompiled, duplicate, read_policy, write_policy
from proxy.epoll import Epoll
from proxy.explicit.entrance import Entrance
from proxy.hosts import DNS_PORT, HostsEntry, Nameserver, read_hosts_file, system_nameservers, system_search
from proxy.identity import Change, Pods
from proxy.inspecting import HttpHost, Inspecting
from proxy.inspector import Bounds, Configuration, Inspector
from proxy.kept_open import KeptOpen
from proxy.lane import Lane
from proxy.limits import Limits
from proxy.listener import Listener
from proxy.lookups import Lookups
from proxy.metrics.meter import Counts, Totals
from proxy.openings import Openings
from proxy.original_dst import OriginalDst
from proxy.own_doors import OwnDoors
from proxy.policy_in_force import PolicyInForce
from proxy.record import Peer, Record, Sink, new_id, record_of
from proxy.relays.dns import DnsLimits, DnsRelay
from proxy.relays.dns_budget import Budget, NewNames
from proxy.relays.dnstap import Observer
from proxy.resolver import Resolver
from proxy.sandbox import ClosedPorts, Sandbox
from proxy.upstream_proxy import SiteProxy

if TYPE_CHECKING:
    from proxy.config import UpstreamProxy
    from proxy.explicit.verifier import Verifier
    from proxy.opener.link import Link
    from proxy.relays.ntp.on_demand import TimeOnDemand
    from proxy.relays.udp import UdpRelay

NTP_PORT = 123
SETTLE_S, LOOK_S = 0.25, 0.005
SETTLE_TURNS = 4  # of the loop: epoll reports, a door accepts, a hello is peeked


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator says besides the policy.

    issuing      gives what signs leaves, as `pki.issuers` writes it; asked when the first connection is inspected
    compiled     the memory that the policy was read from, the gate's from now on; None: the inspector's start writes it
    workload     every connection is this workload's; None: as its source address or its user says
    upstream_ca  path of the roots that upstreams are verified against; None: the system's
    nameservers  None: the system's
    forward      zones with name servers of their own
    search       domains that workloads append to names; None: the system's
    new_names    what each workload may look up below each wildcard
    dns_limits   what one source may ask
    lookups      what workloads were told, where other processes tell them too; None: the gate's own
    pods         of the cluster that is watched; None: none is
    opener       who lets past the gate what a lookup opens; None: nothing is
    own_doors    addresses and ports that the gate and its supervisor listen on, which nothing may be sent to

    With `upstream_proxy` nothing is dialled past the site's proxy, but what the operator names.
    """

    issuing: Callable[[], str]
    compiled: BinaryIO | None = None
    workload: str | None = None
    hosts: Mapping[Hostname, HostsEntry] = field(default_factory=dict)
    upstream_ca: str | None = None
    nameservers: Sequence[Nameserver] | None = None
    forward: Mapping[Hostname, Sequence[Nameserver]] = field(default_factory=dict)
    search: Sequence[Hostname] | None = None
    new_names: NewNames = field(default_factory=NewNames)
    dns_limits: DnsLimits = field(default_factory=DnsLimits)
    lookups: Lookups | None = None
    upstream_proxy: UpstreamProxy | None = None
    pods: Pods | None = None
    opener: Link | None = None
    own_doors: Sequence[Peer] = ()
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)
    http_host: HttpHost = HttpHost.AUTO
    addons: tuple[str, ...] = ()


class Gate:
    """The parts of one gate. Made on a running asyncio loop; `close` ends every flow.

    counts  told of lookups and dials
    inner   told what the inspector counts, each time `stats` is asked
    """

    def __init__(
        self,
        policy: Policy,
        settings: Settings,
        *,
        original_dst: OriginalDst,
        record: Sink,
        counts: Counts | None = None,
        inner: Totals | None = None,
    ) -> None:
        self._settings = settings
        self._issuing: str | None = None  # in place of those that the settings give
        self._in_force = PolicyInForce(policy, settings.workload, settings.pods)
        self._compiled = settings.compiled
        self._record = record
        self._lookups = settings.lookups or Lookups()
        nameservers = system_nameservers() if settings.nameservers is None else settings.nameservers
        system_hosts = read_hosts_file()
        counts = counts or Counts()
        self._resolver = Resolver(
            settings.hosts, nameservers, forward=settings.forward, system_hosts=system_hosts, told=counts.looked_up
        )
        is_own = OwnDoors(settings.own_doors).holds
        proxy = settings.upstream_proxy
        site = SiteProxy(proxy, settings.hosts, self._resolver, is_own=is_own) if proxy else None
        self._inspector = Inspector(
            lambda: _configuration(settings, self._issuing or settings.issuing(), nameservers, system_hosts),
            self._duplicate,
            self._note,
            inner=inner,
            pods=settings.pods,
        )
        self._budget = Budget(settings.new_names, time.monotonic, is_ours=self._resolver.is_ours)
        self._epoll = Epoll(_report_crash)
        self._listener = Listener(
            self._epoll,
            original_dst=original_dst,
            identify=self._in_force.identify,
            expect=lambda workload, port: expect(self._in_force.policy, workload, port),
            carries_plain=lambda workload, port: carries_plain(self._in_force.policy, workload, port),
            decide=self._in_force.decide,
            admit=admit,
            names_of=self._lookups.names_of,
            exceeded=self._budget.exceeded,
            resolver=self._resolver,
            inspect=lambda sock, handover: self._inspecting.inspect(sock, handover),
            record=self._note,
            clock=time.time,
            generation=lambda: self.generation,
            limits=settings.limits,
            site=site,
            is_own=is_own,
            dialled=counts.dialled,
        )
        lane = Lane(
            self._in_force,
            self._listener.exit,
            issuing=lambda: self._issuing or settings.issuing(),
            upstream_ca=settings.upstream_ca,
            bounds=settings.bounds,
            record=self._note,
            failed=_report_crash,
        )
        self._inspecting = Inspecting(settings.http_host, lane, self._inspector)
        self.openings = Openings(self._in_force, settings.opener, counts, site=site) if settings.opener else None
        search = system_search() if settings.search is None else settings.search
        self._observer = Observer(
            self._in_force, self._lookups, self._note, counts, openings=self.openings, search=search
        )
        self._dns = DnsRelay(
            self._in_force.decide,
            self._resolver,
            self._lookups,
            self._note,
            workload=self._in_force.identify,
            generation=lambda: self.generation,
            standing=lambda: self._in_force.standing,
            budget=self._budget,
            limits=settings.dns_limits,
            search=search,
            openings=self.openings,
        )
        self._kept = KeptOpen(_report_crash)
        self._tasks: list[asyncio.Task[None]] = []
        self._closed_ports: ClosedPorts | None = None
        self._time: TimeOnDemand | None = None
        self._udp: UdpRelay | None = None
        self._site, self._is_own = site, is_own

    @property
    def generation(self) -> str:
        """Of the policy that judges what is attempted from now on."""
        return self._in_force.policy.generation

    async def swap(self, compiled: BinaryIO) -> None:
        """Judge by the policy in `compiled`, which is the gate's from now on.

        What listens here judges by it at once; flows that were let through stay. When this returns the inspector judges
        by it too, every request on connections that are open already included. Until then a request is judged by one
        policy or the other, never by parts of both. Raises NotCompiled: the former policy stays.
        """
        try:
            policy = read_policy(compiled)
        except NotCompiled:
            compiled.close()
            raise
        former, self._compiled = self._compiled, compiled
        self._in_force.policy = policy
        if former is not None:
            former.close()
        self._lookups.keep(policy.index)
        self._budget.keep(policy.index)
        if self._udp:
            self._udp.judge_anew()
        await self._inspecting.swap()

    def sign_by(self, issuing: str) -> None:
        """Show leaves of these issuing CAs, given as `Settings.issuing` gives them, on connections that come from now
        on; those that are inspected already go on."""
        self._issuing = issuing
        self._inspecting.sign_by(issuing)

    def know(self, change: Change) -> None:
        """The pods of the settings have changed so: the inspector is to know it, and UDP is judged anew."""
        self._inspecting.know(change)
        if self._udp:
            self._udp.judge_anew()

    async def review_sources(self) -> None:
        """Close what the kernel holds open for an address that is somebody else's by now."""
        if self.openings:
            await self.openings.review()

    def close_for(self, reason: Reason | None) -> None:
        """Deny every attempt for `reason`, until it is None. Flows that were let through stay."""
        self._in_force.close_for(reason)
        self._inspecting.close_for(reason)

    def stats(self) -> dict[str, float]:
        """Gauges by series, for a meter. The inspector is asked for its own, and tells them to `inner`."""
        return {
            "outgate_connections_accepted_total": self._listener.accepted,
            "outgate_connections_open": self._listener.open_connections,
            **self._inspecting.stats(),
            "outgate_names_remembered": self._resolver.remembered,
            "outgate_dns_malformed_total": self._dns.malformed,
            "outgate_dns_search_noise_total": self._dns.search_noise,
            "outgate_dns_dropped_total": self._dns.dropped,
            "outgate_dnstap_senders": self._observer.senders,
            **(self._udp.stats() if self._udp else {}),
        }

    def listen(self, sock: socket.socket) -> None:
        """Serve a listening TCP socket, which is the gate's from now on."""
        self._listener.serve(sock)

    def proxy(
        self, sock: socket.socket, *, verifier: Verifier | None = None, balancers: Sequence[Network] = ()
    ) -> None:
        """Serve a listening TCP socket as an explicit proxy: CONNECT, and plain HTTP in absolute form.

        `Entrance` says what the arguments are; one verifier serves any number of sockets.
        """
        self._listener.serve(sock, Entrance(verifier, balancers).meet)

    def answer_dns(self, sock: socket.socket) -> None:
        """Answer DNS questions to a bound UDP or a listening TCP socket, which is the gate's from now on."""
        serve = self._dns.serve_udp if sock.type == socket.SOCK_DGRAM else self._dns.serve_tcp
        self._tasks.append(asyncio.create_task(self._kept.keep(sock, serve, "DNS")))

    def observe_dns(self, sock: socket.socket) -> None:
        """Hear by dnstap what other name servers answer, on a listening unix socket, the gate's from now on."""
        self._tasks.append(asyncio.create_task(self._kept.keep(sock, self._observer.serve, "dnstap")))

    def give_time(self, sock: socket.socket) -> None:
        """Answer the NTP queries to a bound UDP socket, which is the gate's from now on. All are one workload's."""
        if self._time is None:
            from proxy.relays.ntp.on_demand import TimeOnDemand  # here: only where a rule names a server

            workload = self._settings.workload or UNKNOWN
            self._time = TimeOnDemand(self._in_force, workload, self._resolver, self._note, is_own=self._is_own)
        self._tasks.append(asyncio.create_task(self._kept.keep(sock, self._time.serve, "NTP")))

    @property
    def udp(self) -> UdpRelay:
        """Carries datagrams; made when it is asked for, for not every gate has doors for them."""
        if self._udp is None:
            from proxy.relays.udp import UdpRelay

            self._udp = UdpRelay(
                self._epoll,
                self._in_force,
                self._resolver,
                self._note,
                names_of=self._lookups.names_of,
                limits=self._settings.limits,
                is_own=self._is_own,
                crashed=lambda error: _report_crash(error, "UDP"),
                site=self._site,
            )
        return self._udp

    @property
    def udp_failing(self) -> bool:
        """A socket where datagrams come in cannot be read."""
        return self._udp is not None and self._udp.is_failing

    def start_inspector(self) -> None:
        """Start its process before it is needed, so that the first inspected connection does not wait for it."""
        self._inspecting.start()

    @property
    def unanswered(self) -> str:
        """What workloads ask and no socket of which can be served, with why; empty: all is."""
        return self._kept.failing

    @property
    def inspector_failing(self) -> bool:
        """Its process keeps ending: what is to be inspected is refused."""
        return self._inspecting.is_failing

    @property
    def inspector_silent(self) -> bool:
        """Its process does not answer: what is to be inspected waits."""
        return self._inspecting.is_silent

    def enter(self, sandbox: Sandbox) -> None:
        """Serve what a sandbox bound inside: DNS on port 53, time on UDP/123, else as TCP or UDP; and hear of the ports
        nobody serves."""
        for bound in sandbox.sockets:
            if bound.port == DNS_PORT:
                self.answer_dns(bound.socket)
            elif (bound.kind, bound.port) == ("udp", NTP_PORT):
                self.give_time(bound.socket)
            elif bound.kind == "udp":
                self.udp.carry(bound.socket)
            else:
                self.listen(bound.socket)
        answering = {bound.port for bound in sandbox.sockets if bound.kind == "udp"}
        loop = asyncio.get_running_loop()
        self._closed_ports = ClosedPorts(sandbox.packets, self._note_closed_port, loop, answering=answering)

    def leave(self) -> None:
        """Ask clients that are inspected to go elsewhere with their next request."""
        self._inspecting.leave()

    async def close(self, grace_s: float = SETTLE_S) -> None:
        """Accept nothing more, let connections end within `grace_s`, end the rest. All records are written by then.
        It may be called again while it waits, with less grace."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        for _ in range(SETTLE_TURNS):
            await asyncio.sleep(0)
        if self._closed_ports:
            self._closed_ports.close()
        self._listener.stop()
        # A command may say its last words and end at once: they are in the kernel's queues, and are attempts too.
        await self._idle(min(end, loop.time() + SETTLE_S))
        if self._udp:
            self._udp.close()
        for task in self._tasks:  # a successor may want their ports, too
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        draining = asyncio.create_task(self._inspecting.drain(max(0.0, end - loop.time())))
        try:
            await self._idle(end)
            self._listener.close()
            await draining
            self._epoll.close()
        finally:
            draining.cancel()
        await self._dns.close()
        if self.openings:
            self.openings.close()
        if self._time:
            await self._time.close()
        await self._resolver.close()
        if self._compiled is not None:
            self._compiled.close()

    async def _idle(self, end: float) -> None:
        """Until the listener has no connection and no datagram waits, or the loop's clock says `end`."""
        loop = asyncio.get_running_loop()
        while self._is_busy and loop.time() < end:  # noqa: ASYNC110 - a bounded look, once, at the end
            await asyncio.sleep(LOOK_S)

    @property
    def _is_busy(self) -> bool:
        return self._listener.open_connections > 0 or (self._udp is not None and self._udp.is_waiting)

    def _duplicate(self) -> BinaryIO:
        """One more descriptor of the compiled policy."""
        if self._compiled is None:
            self._compiled = write_policy(self._in_force.policy)
        return duplicate(self._compiled)

    def _note(self, record: Record) -> None:
        """Hand a record on. Those that take long, and the inspector's, say themselves which policy judged."""
        if self.generation:
            record.setdefault("policy.generation", self.generation)
        self._record(record)

    def _note_closed_port(self, protocol: str, address: Address, port: int) -> None:
        """The kernel has refused it already; the verdict says whether a rule names it that this gate does not carry."""
        workload = self._settings.workload or UNKNOWN
        attempt = Attempt(
            Stage.NTP if (protocol, port) == ("udp", NTP_PORT) else Stage(protocol),
            workload,
            port=port,
            time=time.time(),
            address=address,
            names=self._lookups.names_of(workload, address),
        )
        verdict = self._in_force.decide(attempt)
        if verdict.is_allow:
            verdict = Verdict(Action.DENY, Reason.NOT_SERVED, attempt.stage, verdict.rule)
        self._note(record_of(attempt, verdict, id=new_id(), destination=(str(address), port)))


def _configuration(
    settings: Settings,
    issuing: str,
    nameservers: Sequence[Nameserver],
    system_hosts: Mapping[Hostname, tuple[Address, ...]],
) -> Configuration:
    proxy = settings.upstream_proxy
    return Configuration(
        issuing=issuing,
        workload=settings.workload,
        upstream_ca=settings.upstream_ca,
        hosts=tuple((name, tuple(map(str, entry.addresses)), entry.port) for name, entry in settings.hosts.items()),
        forward=tuple((zone, tuple(servers)) for zone, servers in settings.forward.items()),
        system_hosts=tuple((name, tuple(map(str, found))) for name, found in system_hosts.items()),
        nameservers=tuple(nameservers),
        upstream_proxy=(proxy.host, proxy.port, proxy.credentials, tuple(map(str, proxy.direct))) if proxy else None,
        watches_pods=settings.pods is not None,
        own_doors=tuple(settings.own_doors),
        addons=settings.addons,
        bounds=settings.bounds,
    )


def _report_crash(error: Exception, what: str = "a connection") -> None:
    """One connection was lost to a fault of ours: said, without its content."""
    where = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    place = f" at {where.filename.rpartition('/')[2]}:{where.lineno}" if where else ""
    print(f"outgate: {what} failed inside the gate: {type(error).__name__}{place}", file=sys.stderr)
