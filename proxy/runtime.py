"""One gate, wired: the only file that knows every part. The parts know each other by what they are handed here."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from policies.engine import admit, carries_plain, decide, expect, identify
from policies.hostnames import Hostname
from policies.index import Policy
from policies.model import UNKNOWN, Action, Address, Attempt, Reason, Stage, Verdict
from proxy.epoll import Epoll
from proxy.explicit import ExplicitProxy
from proxy.hosts import DNS_PORT, HostsEntry, Nameserver, read_hosts_file, system_nameservers, system_search
from proxy.inspector import Configuration, Inspector
from proxy.limits import Limits
from proxy.listener import Listener
from proxy.lookups import Lookups
from proxy.original_dst import OriginalDst
from proxy.record import Sink, new_id, record_of
from proxy.relays.dns import DnsRelay
from proxy.resolver import Resolver
from proxy.sandbox import ClosedPorts, Sandbox

if TYPE_CHECKING:
    from policies.tree import Source

NTP_PORT = 123
SETTLE_S = 0.25
SETTLE_TURNS = 4  # of the loop: epoll reports, a door accepts, a hello is peeked


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator says besides the policy.

    workload     every connection is this workload's; None: as its source address says
    issuing      gives what signs leaves as PEM (certificate, chain, key); asked when the first connection is inspected
    sources      the policy's own text, from which the inspector reads the same policy
    tags         paths of service-tag files
    upstream_ca  path of the roots that upstreams are verified against; None: the system's
    nameservers  None: the system's
    """

    issuing: Callable[[], str]
    workload: str | None = None
    sources: Sequence[Source] = ()
    tags: Sequence[str] = ()
    hosts: Mapping[Hostname, HostsEntry] = field(default_factory=dict)
    upstream_ca: str | None = None
    nameservers: Sequence[Nameserver] | None = None
    limits: Limits = field(default_factory=Limits)


class Gate:
    """The parts of one gate. Made on a running asyncio loop; `close` ends every flow."""

    def __init__(self, policy: Policy, settings: Settings, *, original_dst: OriginalDst, record: Sink) -> None:
        self._settings = settings
        self._policy = policy
        self._record = record
        self._lookups = Lookups()
        self._decide = partial(decide, policy)
        nameservers = system_nameservers() if settings.nameservers is None else settings.nameservers
        system_hosts = read_hosts_file()
        self._resolver = Resolver(settings.hosts, nameservers, system_hosts=system_hosts)
        self._inspector = Inspector(partial(_configuration, settings, nameservers, system_hosts), record)
        self._epoll = Epoll(_report_crash)
        self._listener = Listener(
            self._epoll,
            original_dst=original_dst,
            identify=self._identify,
            expect=partial(expect, policy),
            carries_plain=partial(carries_plain, policy),
            decide=self._decide,
            admit=admit,
            names_of=self._lookups.names_of,
            resolver=self._resolver,
            inspect=self._inspector.inspect,
            record=record,
            clock=time.time,
            limits=settings.limits,
        )
        self._dns = DnsRelay(
            self._decide,
            self._resolver,
            self._lookups,
            record,
            workload=self._identify,
            search=system_search(),
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._closed_ports: ClosedPorts | None = None

    def listen(self, sock: socket.socket) -> None:
        """Serve a listening TCP socket, which is the gate's from now on."""
        self._listener.serve(sock)

    def proxy(self, sock: socket.socket) -> None:
        """Serve a listening TCP socket as an explicit proxy: CONNECT, and plain HTTP in absolute form."""
        explicit = ExplicitProxy(
            decide=self._decide,
            workload=self._identify,
            welcome=self._listener.welcome,
            inspect=self._inspector.inspect,
            record=self._record,
        )
        self._tasks.append(asyncio.create_task(explicit.serve(sock)))

    def start_inspector(self) -> None:
        """Start its process before it is needed, so that the first inspected connection does not wait for it."""
        self._inspector.start()

    def enter(self, sandbox: Sandbox) -> None:
        """Serve what a sandbox bound inside: DNS on port 53, else TCP; and hear of the ports nobody serves."""
        for bound in sandbox.sockets:
            if bound.port != DNS_PORT:
                self.listen(bound.socket)
                continue
            serve = self._dns.serve_udp if bound.kind == "udp" else self._dns.serve_tcp
            self._tasks.append(asyncio.create_task(serve(bound.socket)))
        self._closed_ports = ClosedPorts(sandbox.packets, self._note_closed_port, asyncio.get_running_loop())

    async def close(self) -> None:
        """Judge what has arrived, then end every flow. All records are written by then."""
        await self._settle()
        if self._closed_ports:
            self._closed_ports.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        self._epoll.close()
        await self._inspector.drain()
        await self._resolver.close()

    async def _settle(self) -> None:
        """A command may say its last words and end at once: they are in the kernel's queues, and are attempts too."""
        loop = asyncio.get_running_loop()
        end = loop.time() + SETTLE_S
        for _ in range(SETTLE_TURNS):
            await asyncio.sleep(0)
        while self._listener.open_connections and loop.time() < end:  # noqa: ASYNC110 - a bounded look, once, at the end
            await asyncio.sleep(SETTLE_S / 50)

    def _identify(self, address: Address) -> str:
        return self._settings.workload or identify(self._policy, address)

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
        verdict = self._decide(attempt)
        if verdict.is_allow:
            verdict = Verdict(Action.DENY, Reason.NOT_SERVED, attempt.stage, verdict.rule)
        self._record(record_of(attempt, verdict, id=new_id(), destination=(str(address), port)))


def _configuration(
    settings: Settings, nameservers: Sequence[Nameserver], system_hosts: Mapping[Hostname, tuple[Address, ...]]
) -> Configuration:
    hosts = [(name, tuple(map(str, entry.addresses)), entry.port) for name, entry in settings.hosts.items()]
    return Configuration(
        sources=tuple(settings.sources),
        issuing=settings.issuing(),
        tags=tuple(settings.tags),
        upstream_ca=settings.upstream_ca,
        hosts=tuple(hosts),
        system_hosts=tuple((name, tuple(map(str, found))) for name, found in system_hosts.items()),
        nameservers=tuple(nameservers),
    )


def _report_crash(error: Exception) -> None:
    """One connection was lost to a fault of ours: said, without its content."""
    where = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    place = f" at {where.filename.rpartition('/')[2]}:{where.lineno}" if where else ""
    print(f"outgate: a connection failed inside the gate: {type(error).__name__}{place}", file=sys.stderr)
