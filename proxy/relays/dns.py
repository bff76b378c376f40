"""Serves DNS on sockets that others bound: datagrams and connections, with what one client may take of each.

What is answered, and to whom, is said by `dns_answers`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from policies.addresses import Address
from policies.hostnames import Hostname
from policies.model import Attempt, Verdict
from proxy.lookups import Lookups
from proxy.record import Peer, Sink
from proxy.relays.buckets import release
from proxy.relays.datagrams import ANCILLARY_SIZE, Ancillary, ask_for_destination, read_destination
from proxy.relays.dns_answers import Answers
from proxy.relays.dns_budget import Budget, NewNames
from proxy.relays.dns_pace import Pace
from proxy.relays.dns_sockets import accept, plain_peer, send
from proxy.resolver import Resolver
from proxy.wire.dns import Query, build_truncated

if TYPE_CHECKING:
    from proxy.openings import Openings  # here: most gates open nothing

MAX_QUERY = 512  # RFC 1035 4.2.1; a name is at most 255 bytes, so more is no question
BATCH = 32  # datagrams read before other work has its turn
_CUT = int(socket.MSG_TRUNC)  # as a number: `&` of an enumeration takes as long as reading the datagram


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsLimits:
    lookups: int = 128  # under way at once for one workload
    lookups_per_source: int = 64  # so that one pod does not take those of its whole workload
    connections: int = 256  # over TCP, of all workloads
    connections_per_source: int = 32
    questions_per_source_s: int | None = None  # twice as many at once; so that one pod does not take a whole worker
    idle_timeout_s: float = 5.0  # for a whole message to arrive, or an answer to be taken
    connection_timeout_s: float = 60.0


class DnsRelay:
    """Serves any number of sockets, with one set of limits. `Answers` says what the other arguments are."""

    def __init__(
        self,
        decide: Callable[[Attempt], Verdict],
        resolver: Resolver,
        lookups: Lookups,
        record: Sink,
        *,
        workload: Callable[[Address], str],
        standing: Callable[[], tuple[object, object]],
        generation: Callable[[], str] = lambda: "",
        search: Sequence[Hostname] = (),
        budget: Budget | None = None,
        limits: DnsLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        openings: Openings | None = None,
    ) -> None:
        self._limits = limits or DnsLimits()
        self._answers = Answers(
            decide,
            resolver,
            lookups,
            record,
            workload=workload,
            generation=generation,
            standing=standing,
            search=search,
            budget=budget or Budget(NewNames(), clock, is_ours=resolver.is_ours),
            most=(self._limits.lookups, self._limits.lookups_per_source),
            clock=clock,
            openings=openings,
        )
        self._pace = Pace(self._limits.questions_per_source_s, workload, record, clock)
        self._connections: Counter[str] = Counter()  # by source address

    @property
    def malformed(self) -> int:
        """Messages that were no question."""
        return self._answers.malformed

    @property
    def search_noise(self) -> int:
        """Allowed names asked for with a search domain behind them."""
        return self._answers.search_noise

    @property
    def dropped(self) -> int:
        """Questions of sources that asked too often."""
        return self._pace.dropped

    async def close(self) -> None:
        """End the questions under way."""
        await self._answers.close()
        self._pace.tell()

    async def serve_udp(self, sock: socket.socket) -> None:
        """Answer what arrives on a bound UDP socket until cancelled. Raises OSError if the socket breaks."""
        sock.setblocking(False)
        ask_for_destination(sock)
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
                message, ancillary, flags, source = sock.recvmsg(MAX_QUERY, ANCILLARY_SIZE)
            except (BlockingIOError, InterruptedError):
                return
            asked_at, origin = read_destination(ancillary)
            if flags & _CUT or asked_at is None:
                self._answers.malformed += 1
                continue
            peer, destination = plain_peer(source), (asked_at, port)
            if not self._pace.admits(peer, destination):
                continue
            if reply := self._answers.again(message, peer, destination):
                send(sock, source, origin, reply)
                continue
            question = self._answers.judge(message, peer, destination)
            if question is None:
                continue
            answer = partial(_send, sock, source, origin, question.query)
            if reply := self._answers.answer_now(question):
                answer(reply)
            else:
                group.create_task(self._answers.answer_later(question)).add_done_callback(partial(_send_result, answer))

    async def serve_tcp(self, listener: socket.socket) -> None:
        """Answer connections to a listening socket until cancelled. Raises OSError if the socket breaks."""
        listener.setblocking(False)
        async with asyncio.TaskGroup() as group:
            while True:
                sock = await accept(listener)
                source = _source_of(sock)
                if source is None or not self._has_room(source[0]):
                    sock.close()
                    continue
                self._connections[source[0]] += 1
                conversation = group.create_task(self._converse(sock, source))
                conversation.add_done_callback(partial(self._end, sock, source[0]))

    def _has_room(self, host: str) -> bool:
        limits = self._limits
        return (
            self._connections[host] < limits.connections_per_source and self._connections.total() < limits.connections
        )

    def _end(self, sock: socket.socket, host: str, _: asyncio.Task[None]) -> None:
        sock.close()
        release(self._connections, host)

    async def _converse(self, sock: socket.socket, source: Peer) -> None:
        """One connection, question by question (RFC 7766); what is slow, too long or malformed ends it."""
        try:
            destination = plain_peer(sock.getsockname())
            async with asyncio.timeout(self._limits.connection_timeout_s):
                while message := await self._receive(sock):
                    if not self._pace.admits(source, destination):
                        return
                    question = self._answers.judge(message, source, destination)
                    if question is None:
                        return
                    reply = self._answers.answer_now(question) or await self._answers.answer_later(question)
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
                        self._answers.malformed += 1
                        return None
        return received[2:]


def _source_of(sock: socket.socket) -> Peer | None:
    try:
        return plain_peer(sock.getpeername())
    except OSError:  # gone before it was accepted
        return None


def _send(sock: socket.socket, source: Peer, origin: list[Ancillary], query: Query, reply: bytes) -> None:
    send(sock, source, origin, reply if len(reply) <= query.udp_limit else build_truncated(query))


def _send_result(answer: Callable[[bytes], None], task: asyncio.Task[bytes]) -> None:
    if not task.cancelled() and task.exception() is None:
        answer(task.result())
