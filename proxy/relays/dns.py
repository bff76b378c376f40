"""Answers a workload's DNS questions: the policy says which names exist for it, the gate's resolver where they are.

It serves sockets that others bound, in the workload's own network. A denied name reaches no server; of an allowed one
only the judged name does, in a query of our own. Every answer is written here from values.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from policies.addresses import Address
from policies.engine import admit
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.lookups import Lookups
from proxy.original_dst import parse_address
from proxy.record import Peer, Record, Sink, new_id, record_of
from proxy.resolver import NameNotFound, Resolution, Resolver, ResolverFailed
from proxy.wire.dns import (
    AAAA,
    IN,
    A,
    ExtendedError,
    MalformedQuery,
    Note,
    Query,
    build_addresses,
    build_failure,
    build_name_error,
    build_nodata,
    build_truncated,
    parse_query,
)

MAX_QUERY = 512  # RFC 1035 4.2.1; a name is at most 255 bytes, so more is no question
MAX_TTL_S = 300  # a client must come back before a policy that changed is old news
DENIED_TTL_S = 5  # and soon after a name was added to it
MIN_LOOKUP_S = 60  # programs dial later than the TTL of their lookup allows
BATCH = 32  # datagrams read before other work has its turn

_IP_PKTINFO = 8  # ip(7); in `socket` only since Python 3.14
_PKTINFO = struct.Struct("=I4s4s")  # interface, local address, address in the header
_ANCILLARY_SIZE = socket.CMSG_SPACE(20)  # struct in6_pktinfo
_VERSIONS = {A: 4, AAAA: 6}
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# NXDOMAIN is for names that do not exist for this workload. These do, and musl gives up a name whose AAAA is NXDOMAIN.
_EXISTS = frozenset({Reason.ANCESTOR, Reason.QUERY_TYPE, Reason.PRIVATE_ADDRESS, Reason.NEVER_REACHED})
# Asked again later, the answer may be another.
_FAILED = frozenset({Reason.RESOLVER_FAILED, Reason.TOO_MANY_CONNECTIONS, Reason.LOG_FAILED, Reason.GATE_FAILED})
_CODES = {
    Reason.UNKNOWN_WORKLOAD: ExtendedError.PROHIBITED,
    Reason.AMBIGUOUS_WORKLOAD: ExtendedError.PROHIBITED,
    Reason.RESOLVER_FAILED: ExtendedError.NO_REACHABLE_AUTHORITY,
    Reason.TOO_MANY_CONNECTIONS: ExtendedError.OTHER,
    Reason.LOG_FAILED: ExtendedError.OTHER,
    Reason.GATE_FAILED: ExtendedError.OTHER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsLimits:
    lookups: int = 128  # under way at once for one workload
    connections: int = 64  # over TCP, of all workloads
    idle_timeout_s: float = 5.0  # for a whole message to arrive, or an answer to be taken
    connection_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class _Question:
    query: Query
    attempt: Attempt
    verdict: Verdict
    id: str
    source: Peer
    destination: Peer
    generation: str  # of the policy that judged
    error: str | None = None  # what went wrong on our side


class DnsRelay:
    """Serves any number of sockets, with one set of limits. `malformed` and `search_noise` count what is not recorded.

    workload    names the workload of a source address
    generation  names the policy that `decide` judges by
    search      domains that programs append to names (resolv.conf): `api.example.corp.internal` for an allowed
                `api.example` is answered here, and is nobody's attempt to reach anything
    clock       the resolver's
    """

    def __init__(
        self,
        decide: Callable[[Attempt], Verdict],
        resolver: Resolver,
        lookups: Lookups,
        record: Sink,
        *,
        workload: Callable[[Address], str],
        generation: Callable[[], str] = lambda: "",
        search: Sequence[Hostname] = (),
        limits: DnsLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._decide = decide
        self._resolver = resolver
        self._lookups = lookups
        self._record = record
        self._workload = workload
        self._generation = generation
        self._suffixes = tuple("." + domain for domain in search)
        self._limits = limits or DnsLimits()
        self._clock = clock
        self._under_way: Counter[str] = Counter()
        self._connections = 0
        self.malformed = 0
        self.search_noise = 0

    # --- sockets

    async def serve_udp(self, sock: socket.socket) -> None:
        """Answer what arrives on a bound UDP socket until cancelled. Raises OSError if the socket breaks."""
        sock.setblocking(False)
        _ask_for_destination(sock)
        port = sock.getsockname()[1]
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(sock, readable.set)
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await readable.wait()
                    readable.clear()
                    self._drain(sock, port, group)
        finally:
            loop.remove_reader(sock)

    def _drain(self, sock: socket.socket, port: int, group: asyncio.TaskGroup) -> None:
        for _ in range(BATCH):
            try:
                message, ancillary, flags, source = sock.recvmsg(MAX_QUERY, _ANCILLARY_SIZE)
            except (BlockingIOError, InterruptedError):
                return
            asked_at, origin = _read_destination(ancillary)
            if flags & socket.MSG_TRUNC or asked_at is None:
                self.malformed += 1
                continue
            question = self._judge(message, source[:2], (asked_at, port))
            if question is None:
                continue
            send = partial(_send, sock, source, origin, question.query)
            if reply := self._answer_now(question):
                send(reply)
            else:
                group.create_task(self._answer_later(question)).add_done_callback(partial(_send_result, send))

    async def serve_tcp(self, listener: socket.socket) -> None:
        """Answer connections to a listening socket until cancelled. Raises OSError if the socket breaks."""
        listener.setblocking(False)
        async with asyncio.TaskGroup() as group:
            while True:
                sock = await _accept(listener)
                if self._connections >= self._limits.connections:
                    sock.close()
                    continue
                self._connections += 1
                group.create_task(self._converse(sock)).add_done_callback(partial(self._end, sock))

    def _end(self, sock: socket.socket, _: asyncio.Task[None]) -> None:
        sock.close()
        self._connections -= 1

    async def _converse(self, sock: socket.socket) -> None:
        """One connection, question by question (RFC 7766); what is slow, too long or malformed ends it."""
        try:
            source, destination = sock.getpeername()[:2], sock.getsockname()[:2]
            async with asyncio.timeout(self._limits.connection_timeout_s):
                while message := await self._receive(sock):
                    question = self._judge(message, source, destination)
                    if question is None:
                        return
                    reply = self._answer_now(question) or await self._answer_later(question)
                    async with asyncio.timeout(self._limits.idle_timeout_s):
                        await asyncio.get_running_loop().sock_sendall(sock, len(reply).to_bytes(2) + reply)
                    await asyncio.sleep(0)  # none of these awaits pauses for a client that is quick enough
        except OSError:  # a timeout is one too; the client is gone or slow, and what was decided is recorded
            return

    async def _receive(self, sock: socket.socket) -> bytes | None:
        """The next message; None when the client closed, or sent what is too long for a question."""
        loop = asyncio.get_running_loop()
        received = b""
        wanted = 2
        async with asyncio.timeout(self._limits.idle_timeout_s):
            while len(received) < wanted:
                chunk = await loop.sock_recv(sock, wanted - len(received))
                if not chunk:
                    return None
                received += chunk
                if len(received) == 2:
                    wanted = 2 + int.from_bytes(received)
                    if wanted > 2 + MAX_QUERY:
                        self.malformed += 1
                        return None
        return received[2:]

    # --- the verdict

    def _judge(self, message: bytes, source: Peer, destination: Peer) -> _Question | None:
        try:
            query = parse_query(message)
        except MalformedQuery:
            self.malformed += 1
            return None
        host, fault = _parse_host(query.name)
        attempt = Attempt(
            Stage.DNS,
            self._workload(parse_address(source[0])),
            host,
            port=destination[1],
            time=time.time(),
            query_type=query.type_text,
            fault=fault,
        )
        generation = self._generation()
        try:
            return _Question(query, attempt, self._decide(attempt), new_id(), source, destination, generation)
        except Exception as error:  # a fault of ours in one question must not end the answers to all others
            denial = Verdict(Action.DENY, Reason.GATE_FAILED, Stage.DNS)
            return _Question(query, attempt, denial, new_id(), source, destination, generation, repr(error))

    def _answer_now(self, question: _Question) -> bytes | None:
        """The answer, recorded; or None when the resolver has to be asked."""
        host, query = question.attempt.host, question.query
        if not question.verdict.is_allow:
            return self._refuse(question, question.verdict)
        if host is None or query.qclass != IN or query.type not in _VERSIONS:
            self._note(question, question.verdict)
            return build_nodata(query, DENIED_TTL_S)
        resolution = self._resolver.cached(host)
        return self._give(question, host, resolution) if resolution else None

    async def _answer_later(self, question: _Question) -> bytes:
        workload, host = question.attempt.workload, question.attempt.host
        assert host is not None  # `_answer_now` answers all others
        if self._under_way[workload] >= self._limits.lookups:
            return self._fail(question, Reason.TOO_MANY_CONNECTIONS, f"{self._limits.lookups} lookups under way")
        self._under_way[workload] += 1
        try:
            resolution = await self._resolver.resolve(host)
        except NameNotFound as absent:
            self._note(question, _turn(question.verdict, Reason.NAME_NOT_FOUND))
            build = build_nodata if absent.exists else build_name_error
            return build(question.query, self._remaining_s(absent.expires))
        except ResolverFailed as error:
            return self._fail(question, Reason.RESOLVER_FAILED, str(error))
        except asyncio.CancelledError:  # the gate ends, or the client closed; what was asked is told all the same
            self._note(question, _turn(question.verdict, Reason.CLIENT_GONE))
            raise
        except Exception as error:
            return self._fail(question, Reason.GATE_FAILED, repr(error))
        finally:
            self._under_way[workload] -= 1
        return self._give(question, host, resolution)

    # --- the answer

    def _give(self, question: _Question, host: Hostname, resolution: Resolution) -> bytes:
        query, verdict = question.query, question.verdict
        admitted: list[Address] = []
        refused: list[Address] = []
        denial = verdict
        for address in resolution.addresses:
            if address.version != _VERSIONS[query.type]:
                continue
            outcome = admit(verdict, address, from_hosts=resolution.from_hosts)
            if outcome.is_allow:
                admitted.append(address)
            else:
                refused.append(address)
                denial = outcome
        # A public name with a private address is how a stranger's server reaches inside (DNS rebinding).
        extra: Record = {"dns.answers.refused": [str(address) for address in refused]} if refused else {}
        if refused and not admitted:
            return self._refuse(question, denial, extra)
        self._note(question, verdict, extra)
        ttl_s = self._remaining_s(resolution.expires)
        if not admitted:
            return build_nodata(query, ttl_s)
        until = self._clock() + max(2 * ttl_s, MIN_LOOKUP_S)
        self._lookups.note(question.attempt.workload, host, admitted, until)
        return build_addresses(query, admitted, ttl_s)

    def _refuse(self, question: _Question, denial: Verdict, extra: Record | None = None) -> bytes:
        query, reason = question.query, denial.reason
        if reason is Reason.NO_RULE and self._is_search_noise(question.attempt):
            self.search_noise += 1
            return build_name_error(query, DENIED_TTL_S)
        self._note(question, denial, extra)
        note = Note(_CODES.get(reason, ExtendedError.BLOCKED), f"{reason}, decision {question.id}")
        if reason in _FAILED:
            return build_failure(query, note)
        if reason in _EXISTS or not query.name:  # the root is above every name
            return build_nodata(query, DENIED_TTL_S, note)
        return build_name_error(query, DENIED_TTL_S, note)

    def _fail(self, question: _Question, reason: Reason, what: str) -> bytes:
        return self._refuse(replace(question, error=what), _turn(question.verdict, reason))

    def _is_search_noise(self, attempt: Attempt) -> bool:
        for suffix in self._suffixes:
            if attempt.host is None or not attempt.host.endswith(suffix):
                continue
            host, fault = _parse_host(attempt.host.removesuffix(suffix))
            if fault is None and self._decide(replace(attempt, host=host, query_type="A")).is_allow:
                return True
        return False

    def _note(self, question: _Question, verdict: Verdict, extra: Record | None = None) -> None:
        attempt = question.attempt
        asked: Record = {"dns.question.type": attempt.query_type}
        if attempt.host is None:
            asked["dns.question.name"] = question.query.name
        if question.generation:
            asked["policy.generation"] = question.generation
        if question.error is not None:
            asked["error.message"] = question.error
        self._record(
            record_of(
                attempt,
                verdict,
                id=question.id,
                source=question.source,
                destination=question.destination,
                started=attempt.time,
                extra=asked | (extra or {}),
            )
        )

    def _remaining_s(self, expires: float) -> int:
        return int(min(max(expires - self._clock(), 1), MAX_TTL_S))


def _turn(verdict: Verdict, reason: Reason) -> Verdict:
    """An allow that came to nothing."""
    return replace(verdict, action=Action.DENY, reason=reason, would_be=None)


def _parse_host(text: str) -> tuple[Hostname | None, Reason | None]:
    try:
        return parse_hostname(text), None
    except MalformedName:
        return None, Reason.MALFORMED_NAME


# --- datagrams


type _Ancillary = tuple[int, int, bytes]


def _ask_for_destination(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def _read_destination(ancillary: Sequence[_Ancillary]) -> tuple[str | None, list[_Ancillary]]:
    """The address that was asked, and what sends a reply from it: a stub drops an answer from any other."""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return socket.inet_ntop(socket.AF_INET6, content[:16]), [(level, kind, content)]
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            # The header's address: the kernel leaves its own idea empty for what arrived before IP_PKTINFO was set.
            _, _, asked_at = _PKTINFO.unpack(content)
            return socket.inet_ntoa(asked_at), [(level, kind, _PKTINFO.pack(0, asked_at, bytes(4)))]
    return None, []


def _send(sock: socket.socket, to: Peer, origin: list[_Ancillary], query: Query, reply: bytes) -> None:
    if len(reply) > query.udp_limit:
        reply = build_truncated(query)
    try:
        sock.sendmsg([reply], origin, 0, to)
    except OSError:  # full buffer, no way back: like any lost datagram, and the client asks again
        return


def _send_result(send: Callable[[bytes], None], task: asyncio.Task[bytes]) -> None:
    if not task.cancelled() and task.exception() is None:
        send(task.result())


async def _accept(listener: socket.socket) -> socket.socket:
    while True:
        await asyncio.sleep(0)  # while connections wait, accepting never pauses by itself
        try:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        except ConnectionAbortedError:
            continue
        except OSError as error:
            if error.errno not in _FULL:
                raise
            await asyncio.sleep(0.1)  # no descriptor or memory now; waiting connections keep
        else:
            return sock
