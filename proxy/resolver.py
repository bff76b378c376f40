"""The gate's own stub resolver: names to addresses, by the operator's hosts, the cache, or a query to a nameserver.

It judges nothing: whoever asks has decided before (a lookup of a denied name would itself be the leak) and checks the
addresses afterwards (`policies.engine.admit`).
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf

from policies.addresses import Address
from policies.hostnames import Hostname, parents
from proxy.hosts import HostsEntry, Nameserver
from proxy.metrics.table import Lookup
from proxy.record import show_peer
from proxy.wire.dns import (
    AAAA,
    MAX_MESSAGE,
    MAX_UDP,
    A,
    Answer,
    MalformedResponse,
    Rcode,
    build_query,
    parse_response,
)

MAX_STRAYS = 8  # datagrams that are not our answer; more is somebody guessing ids, and TCP ends that (RFC 5452 9.3)
MAX_ADDRESSES = 256  # of one name and type; nobody dials more, and an answer must not grow our memory
RESOLUTION_DELAY_S = 0.3  # how long an answer of one family waits for the other (RFC 8305 3 has 50 ms, for A alone)
STALE_TTL_S = 30  # RFC 8767 4 and 5: how long a stale answer counts, and nobody is asked again
PARTIAL_TTL_S = 30  # an answer with one family missing is asked anew soon


@dataclass(frozen=True, slots=True)
class Resolution:
    """The addresses of a name until `expires` (the resolver's clock).

    from_hosts  the operator's `--host` named them, which exempts them from the private and loopback checks
    port        the port to dial instead of the asked one (`--host NAME=ADDR:PORT`)
    is_stale    no server answered when it expired, so it serves on, until `useful_until` at the latest
    """

    addresses: tuple[Address, ...]
    expires: float
    from_hosts: bool = False
    port: int | None = None
    is_stale: bool = False
    useful_until: float = field(default=0.0, compare=False)


class NameNotFound(Exception):
    """A server said so. `exists`: the name is there and has no address, otherwise it is not there at all (NXDOMAIN)."""

    def __init__(self, name: Hostname, *, exists: bool, expires: float) -> None:
        self.name = name
        self.exists = exists
        self.expires = expires
        super().__init__(f"{name} has no address" if exists else f"{name} does not exist")


class ResolverFailed(Exception):
    """No server gave an answer. `str()` names each and what happened."""

    def __init__(self, name: Hostname, faults: Sequence[str]) -> None:
        self.name = name
        super().__init__(f"cannot resolve {name}: " + ("; ".join(dict.fromkeys(faults)) or "no nameserver"))


@dataclass(frozen=True, slots=True)
class _Absent:
    exists: bool
    expires: float


class Resolver:
    """Asks for a name's A and AAAA together, once for all who wait for that name, and remembers the answer.

    hosts         the operator's entries; they come first and have no TTL
    system_hosts  the machine's own hosts file, as `read_hosts_file` gives it; next, and exempt from nothing
    nameservers   asked in order, `attempts` times round, `timeout_s` each
    forward       zones whose names are asked of other servers, the nearest zone's; never of `nameservers`
    max_stale_s   how long after its end an answer serves where no server gives a new one
    told          how each lookup ended, and how long nameservers took for it, in seconds
    """

    def __init__(
        self,
        hosts: Mapping[Hostname, HostsEntry],
        nameservers: Sequence[Nameserver],
        *,
        forward: Mapping[Hostname, Sequence[Nameserver]] | None = None,
        system_hosts: Mapping[Hostname, tuple[Address, ...]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = 1.5,
        attempts: int = 2,
        min_ttl_s: int = 5,
        max_ttl_s: int = 300,
        max_stale_s: int = 3600,
        max_entries: int = 10_000,
        told: Callable[[Lookup, float], None] = lambda how, seconds: None,
    ) -> None:
        self._fixed = {name: Resolution(addresses, inf) for name, addresses in (system_hosts or {}).items()}
        for name, entry in hosts.items():
            self._fixed[name] = Resolution(entry.addresses, inf, from_hosts=True, port=entry.port)
        self._nameservers = tuple(nameservers)
        self._forward = {zone: tuple(servers) for zone, servers in (forward or {}).items()}
        self._clock = clock
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._min_ttl_s = min_ttl_s
        self._max_ttl_s = max_ttl_s
        self._max_stale_s = max_stale_s
        self._max_entries = max_entries
        self._told = told
        self._known: OrderedDict[Hostname, Resolution | _Absent] = OrderedDict()
        self._pending: dict[Hostname, asyncio.Task[Resolution]] = {}

    @property
    def remembered(self) -> int:
        """How many names it remembers, absent ones too."""
        return len(self._known)

    def cached(self, name: Hostname) -> Resolution | None:
        """What is known of `name` without asking anybody; None also for a name known to be absent."""
        entry = self._fixed.get(name) or self._remembered(name)
        if not isinstance(entry, Resolution):
            return None
        self.count_known()
        return entry

    def count_known(self) -> None:
        """One more was served from memory; also by who remembers what `cached` gave."""
        self._told(Lookup.KNOWN, 0.0)

    async def resolve(self, name: Hostname) -> Resolution:
        """The addresses of `name`. Raises NameNotFound if there are none, ResolverFailed if no server would say."""
        if (found := self.cached(name)) is not None:
            return found
        absent = self._remembered(name)
        if isinstance(absent, _Absent):
            self.count_known()
            raise NameNotFound(name, exists=absent.exists, expires=absent.expires)
        task = self._pending.get(name)
        if task is None:
            task = self._pending[name] = asyncio.create_task(self._look_up(name))
            task.add_done_callback(partial(self._finish, name, self._clock()))
        await asyncio.wait((task,))  # not the task itself: one who stops waiting does not stop it for the others
        if task.cancelled():
            raise ResolverFailed(name, ["the resolver was closed"])
        return task.result()

    def is_fixed(self, name: Hostname) -> bool:
        """Whether the operator or the machine says where `name` is, so that no server is asked."""
        return name in self._fixed

    def is_forwarded(self, name: Hostname) -> bool:
        """Whether `name` is in a zone that has name servers of its own."""
        return bool(self._forward) and any(zone in self._forward for zone in (name, *parents(name)))

    def is_ours(self, name: Hostname) -> bool:
        """Whether no stranger hears of it when `name` is looked up."""
        return self.is_fixed(name) or self.is_forwarded(name)

    def _servers_of(self, name: Hostname) -> Sequence[Nameserver]:
        if self._forward:
            for zone in (name, *parents(name)):
                if zone in self._forward:
                    return self._forward[zone]
        return self._nameservers

    async def close(self) -> None:
        """End the queries under way; those who wait for them get ResolverFailed."""
        tasks = tuple(self._pending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finish(self, name: Hostname, begun: float, task: asyncio.Task[Resolution]) -> None:
        del self._pending[name]
        if not task.cancelled():
            # Those who wait see the exception; when all have left, asyncio would complain that nobody looked at it.
            error = task.exception()
            is_stale = error is None and task.result().is_stale
            self._told(Lookup.STALE if is_stale else _outcome(error), self._clock() - begun)

    def _remembered(self, name: Hostname) -> Resolution | _Absent | None:
        entry = self._known.get(name)
        if entry is None:
            return None
        if entry.expires <= (now := self._clock()):
            if not isinstance(entry, Resolution) or entry.useful_until <= now:
                del self._known[name]
            return None
        self._known.move_to_end(name)
        return entry

    def _remember(self, name: Hostname, entry: Resolution | _Absent) -> None:
        self._known[name] = entry
        self._known.move_to_end(name)
        while len(self._known) > self._max_entries:
            self._known.popitem(last=False)

    async def _look_up(self, name: Hostname) -> Resolution:
        answers, faults = await self._ask_both(name)
        found = [answer for answer in answers if answer.addresses]
        if found:
            ttl_s = min(answer.ttl_s for answer in found)
            if len(answers) < 2:
                ttl_s = min(ttl_s, PARTIAL_TTL_S)
            addresses = tuple(address for answer in found for address in answer.addresses[:MAX_ADDRESSES])
            expires = self._expires(ttl_s)
            resolution = Resolution(addresses, expires, useful_until=expires + self._max_stale_s)
            self._remember(name, resolution)
            return resolution
        exists = all(answer.rcode != Rcode.NXDOMAIN for answer in answers)
        if exists and len(answers) < 2:  # a family nobody told us about may have addresses
            if stale := self._stale(name):
                return stale
            raise ResolverFailed(name, faults)
        absent = _Absent(exists, self._expires(min(answer.negative_ttl_s or 0 for answer in answers)))
        self._remember(name, absent)
        raise NameNotFound(name, exists=exists, expires=absent.expires)

    def _stale(self, name: Hostname) -> Resolution | None:
        """What was known before, for a while more (RFC 8767): a name server that is dead must not end what works.

        Bounded, since an address that its name has left may be anybody's.
        """
        former, now = self._known.get(name), self._clock()
        if not isinstance(former, Resolution) or former.useful_until <= now:
            return None
        stale = replace(former, expires=min(now + STALE_TTL_S, former.useful_until), is_stale=True)
        self._remember(name, stale)
        return stale

    def _expires(self, ttl_s: int) -> float:
        return self._clock() + min(max(ttl_s, self._min_ttl_s), self._max_ttl_s)

    async def _ask_both(self, name: Hostname) -> tuple[list[Answer], list[str]]:
        """The answers for A and AAAA, in this order, and what went wrong on the way to a missing one."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask_any(name, qtype)) for qtype in (A, AAAA)]
            done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if others and any(_is_conclusive(task.result()) for task in done):
                await asyncio.wait(others, timeout=RESOLUTION_DELAY_S)
                for task in others:
                    task.cancel()
        outcomes = [task.result() for task in tasks if not task.cancelled()]
        answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
        return answers, [fault for outcome in outcomes if isinstance(outcome, list) for fault in outcome]

    async def ask(self, name: Hostname, qtype: int) -> Answer:
        """A server's answer to one question, not remembered. Raises ResolverFailed."""
        outcome = await self._ask_any(name, qtype)
        if isinstance(outcome, Answer):
            return outcome
        raise ResolverFailed(name, outcome)

    async def _ask_any(self, name: Hostname, qtype: int) -> Answer | list[str]:
        """The first server's answer, or what each of them did instead."""
        faults = []
        for nameserver in (*self._servers_of(name),) * self._attempts:
            try:
                answer = await self._ask(nameserver, name, qtype)
            except TimeoutError:
                faults.append(f"{show_peer(nameserver)} did not answer within {self._timeout_s:g} s")
            except OSError as error:
                faults.append(f"{show_peer(nameserver)}: {(error.strerror or str(error)).lower()}")
            except MalformedResponse as error:
                faults.append(f"{show_peer(nameserver)} sent no valid answer ({error})")
            else:
                if answer.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
                    return answer
                faults.append(f"{show_peer(nameserver)} answered {_rcode_text(answer.rcode)}")
        return faults

    async def _ask(self, nameserver: Nameserver, name: Hostname, qtype: int) -> Answer:
        async with asyncio.timeout(self._timeout_s):
            answer = await _ask_udp(nameserver, name, qtype)
            if answer is None or answer.truncated:
                answer = await _ask_tcp(nameserver, name, qtype)
        if answer.truncated:  # else its emptiness would read as an absence
            raise MalformedResponse("truncated over TCP")
        return answer


def _outcome(error: BaseException | None) -> Lookup:
    if error is None:
        return Lookup.ANSWERED
    return Lookup.NOT_FOUND if isinstance(error, NameNotFound) else Lookup.FAILED


def _is_conclusive(outcome: Answer | list[str]) -> bool:
    """Enough to answer with, should the other family stay silent."""
    return isinstance(outcome, Answer) and (bool(outcome.addresses) or outcome.rcode == Rcode.NXDOMAIN)


def _rcode_text(rcode: int) -> str:
    return Rcode(rcode).name if rcode in Rcode else f"rcode {rcode}"


# --- One question to one server


def _open(
    nameserver: Nameserver, kind: socket.SocketKind
) -> tuple[socket.socket, tuple[str, int] | tuple[str, int, int, int]]:
    host, port = nameserver
    family, _, _, _, address = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST)[0]
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    return sock, address  # type: ignore[return-value]  # bytes-only forms belong to families that AI_NUMERICHOST never gives


async def _ask_udp(nameserver: Nameserver, name: Hostname, qtype: int) -> Answer | None:
    """The answer, or None when so much arrived that was none that only TCP can be believed.

    RFC 5452 9.1 and 9.2: a fresh socket has a fresh random port, the id is random, and a connected socket takes
    datagrams from this server alone; so an off-path forger has to guess both. What does not fit is passed over.
    """
    loop = asyncio.get_running_loop()
    query_id = secrets.randbelow(1 << 16)
    sock, address = _open(nameserver, socket.SOCK_DGRAM)
    with sock:
        sock.connect(address)
        sock.send(build_query(name, qtype, query_id))
        for _ in range(MAX_STRAYS):
            message = await loop.sock_recv(sock, 4 * MAX_UDP)
            try:
                return parse_response(message, query_id, name, qtype)
            except MalformedResponse:
                continue
    return None


async def _ask_tcp(nameserver: Nameserver, name: Hostname, qtype: int) -> Answer:
    loop = asyncio.get_running_loop()
    query_id = secrets.randbelow(1 << 16)
    query = build_query(name, qtype, query_id)
    sock, address = _open(nameserver, socket.SOCK_STREAM)
    with sock:
        await loop.sock_connect(sock, address)
        await loop.sock_sendall(sock, len(query).to_bytes(2) + query)
        length = int.from_bytes(await _receive_exactly(sock, 2))
        return parse_response(await _receive_exactly(sock, length), query_id, name, qtype)


async def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        chunk = await asyncio.get_running_loop().sock_recv(sock, min(count - len(received), MAX_MESSAGE))
        if not chunk:
            raise MalformedResponse("connection closed before the answer was whole")
        received += chunk
    return bytes(received)
