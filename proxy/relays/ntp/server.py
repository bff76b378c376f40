"""Answers a workload's NTP queries from our own estimate of the time. Nothing that a client sends leaves the gate.

It serves sockets that others bound. Every answer is 48 bytes to a query of 48, so nobody is sent more than he sent.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address

from policies.addresses import Address, Reach, classify
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.original_dst import parse_address
from proxy.record import Peer
from proxy.relays.buckets import Buckets
from proxy.relays.datagrams import ask_for_destination, plain, read_destination
from proxy.relays.ntp.clock import STAMP_SIZE, Ancillary, Reading, arrived_ns, ask_for_stamps, own_ns, read
from proxy.relays.ntp.estimate import Estimate
from proxy.relays.ntp.records import PERIOD_S, PacketRecords
from proxy.wire.ntp import PORT, SIZE, UNSYNCHRONISED, Answer, Leap, MalformedPacket, Query, build_answer, parse_query

BATCH = 32  # datagrams read before other work has its turn
MAX_WAITING = 256  # queries that wait for a server, in relay mode

_PKTINFO6 = struct.Struct("=16sI")  # address, interface
_ANCILLARY_SIZE = socket.CMSG_SPACE(_PKTINFO6.size) + socket.CMSG_SPACE(STAMP_SIZE)
_UNKNOWN = Answer(Leap.UNKNOWN, UNSYNCHRONISED)


class Drop(StrEnum):
    """Why a packet got no answer."""

    LENGTH = "length"  # not 48 bytes: extension fields, MACs, anything
    MODE = "mode"  # no client's query: control and private messages, symmetric, broadcast
    VERSION = "version"
    DENIED = "denied"
    RATE = "rate"
    BUSY = "busy"  # too many wait already
    UNSENT = "unsent"  # there is no way back
    FAILED = "failed"  # a fault of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """How often one source is answered. IPv6 sources count by /64: that is one machine's to use."""

    burst: int = 32  # several clients behind one address, each with an iburst of eight
    per_s: float = 2.0
    sources: int = 4096  # remembered; beyond that the one heard of longest ago is forgotten


class NtpRelay:
    """Serves any number of sockets.

    workload  names the workload of a source address
    estimate  the time, if it is known
    is_own    whether an address and port are where this gate listens: asked there, a client asks nobody else
    refresh   asks servers before each answer (relay mode); None: answers say what is known (serve mode)
    """

    def __init__(
        self,
        decide: Callable[[Attempt], Verdict],
        records: PacketRecords,
        *,
        workload: Callable[[Address], str],
        estimate: Callable[[Reading], Estimate | None],
        is_own: Callable[[Address, int], bool],
        refresh: Callable[[], Awaitable[None]] | None = None,
        limits: ClientLimits | None = None,
    ) -> None:
        self._decide = decide
        self._records = records
        self._workload = workload
        self._estimate = estimate
        self._is_own = is_own
        self._refresh = refresh
        limits = limits or ClientLimits()
        self._buckets = Buckets(burst=limits.burst, per_s=limits.per_s, sources=limits.sources)
        self._waiting: set[asyncio.Task[None]] = set()
        self.answered = self.unsynchronised = 0
        self.drops: Counter[Drop] = Counter()

    @property
    def clients(self) -> int:
        """Sources that were answered, as far as they are remembered."""
        return len(self._buckets)

    async def serve(self, sock: socket.socket) -> None:
        """Answer what arrives on a bound UDP socket until cancelled. Raises OSError if the socket breaks."""
        sock.setblocking(False)
        ask_for_stamps(sock)
        ask_for_destination(sock)
        port = sock.getsockname()[1]
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(sock, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
                self._drain(sock, port)
        finally:
            loop.remove_reader(sock)
            for task in tuple(self._waiting):
                task.cancel()

    async def tell(self) -> None:
        """Write the records that were put together, once a minute and at the end."""
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                self._records.flush()
        finally:
            self._records.flush()

    def _drain(self, sock: socket.socket, port: int) -> None:
        for _ in range(BATCH):
            try:
                message, ancillary, _, source = sock.recvmsg(SIZE + 1, _ANCILLARY_SIZE)
            except (BlockingIOError, InterruptedError):
                return
            now = read()
            asked_at, origin = read_destination(ancillary)
            if asked_at is None:
                self.drops[Drop.UNSENT] += 1
                continue
            query = self._judge(message, (plain(source[0]), source[1]), (asked_at, port))
            if query is None:
                continue
            packet = _Packet(sock, source, _by_routes(origin), query, arrived_ns(ancillary, now))
            if self._refresh is None:
                self._answer(packet, now)
            elif len(self._waiting) >= MAX_WAITING:
                self.drops[Drop.BUSY] += 1
            else:
                task = asyncio.create_task(self._answer_afresh(packet, self._refresh))
                self._waiting.add(task)
                task.add_done_callback(self._waiting.discard)

    # --- the verdict

    def _judge(self, message: bytes, source: Peer, destination: Peer) -> Query | None:
        """The query, if it is to be answered; recorded either way."""
        fault = ""
        query = None
        try:
            query = parse_query(message)
        except MalformedPacket as error:
            fault = str(error)
        address = parse_address(source[0])
        attempt = Attempt(
            Stage.NTP,
            self._workload(address),
            port=PORT,
            time=time.time(),
            address=self._foreign(destination),
            fault=Reason.MALFORMED_QUERY if fault else None,
        )
        try:
            verdict = self._decide(attempt)
        except Exception as error:  # a fault of ours over one packet must not end the answers to all others
            verdict, fault = Verdict(Action.DENY, Reason.GATE_FAILED, Stage.NTP), type(error).__name__
        drop = _drop_of(verdict, fault)
        if drop is None and not self._buckets.take(address, time.monotonic()):
            drop, verdict = Drop.RATE, Verdict(Action.DENY, Reason.TOO_MANY_CONNECTIONS, Stage.NTP, verdict.rule)
        self._records.note(attempt, verdict, source, destination, fault)
        if drop is None:
            return query
        self.drops[drop] += 1
        return None

    def _foreign(self, destination: Peer) -> Address | None:
        """The address that the client meant to ask, where it is not ours to answer at whatever it is."""
        address = parse_address(destination[0])
        if classify(address) is Reach.NEVER and self._is_own(address, destination[1]):
            return None
        return address

    # --- the answer

    async def _answer_afresh(self, packet: _Packet, refresh: Callable[[], Awaitable[None]]) -> None:
        await refresh()
        self._answer(packet, read())

    def _answer(self, packet: _Packet, now: Reading) -> None:
        estimate = self._estimate(now)
        if estimate is None:
            answer = _UNKNOWN
        else:
            is_stale = estimate.is_stale(now.own_ns)
            answer = Answer(
                Leap.UNKNOWN if is_stale else estimate.leap,
                UNSYNCHRONISED if is_stale else estimate.stratum,
                estimate.root_delay_s,
                estimate.dispersion_s(now.own_ns),
                estimate.posix_ns(estimate.at_ns),
                estimate.posix_ns(packet.arrived_ns),
                estimate.posix_ns(own_ns()),  # last of all: what comes after it makes us late
            )
        self.answered += 1
        self.unsynchronised += answer.leap is Leap.UNKNOWN
        try:
            packet.sock.sendmsg([build_answer(packet.query, answer)], packet.origin, 0, packet.source)
        except OSError:  # full buffer, no way back: like any lost datagram, and the client asks again
            self.answered -= 1
            self.drops[Drop.UNSENT] += 1


@dataclass(frozen=True, slots=True)
class _Packet:
    """A query that is answered: where to, from which address, and when it came by our clock."""

    sock: socket.socket
    source: Peer
    origin: list[Ancillary]
    query: Query
    arrived_ns: int


def _drop_of(verdict: Verdict, fault: str) -> Drop | None:
    if verdict.reason is Reason.MALFORMED_QUERY:
        return Drop(fault.partition(" ")[0])
    if verdict.is_allow:
        return None
    return Drop.FAILED if verdict.reason is Reason.GATE_FAILED else Drop.DENIED


# --- datagrams


def _by_routes(origin: Sequence[Ancillary]) -> list[Ancillary]:
    """Only a link-local address means nothing without the interface it came by; others go by the routes."""
    return [
        (level, kind, _without_interface(content) if level == socket.IPPROTO_IPV6 else content)
        for level, kind, content in origin
    ]


def _without_interface(content: bytes) -> bytes:
    packed, interface = _PKTINFO6.unpack(content)
    return _PKTINFO6.pack(packed, interface if IPv6Address(packed).is_link_local else 0)
