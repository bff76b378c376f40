"""Carries datagrams that rules admit, on sockets that others bound: each is judged before anything is made for it.

A rule by name is dialled where the gate resolved that name, a rule about addresses where the datagram was going. A
session has a connected socket of its own, so that nobody but that peer answers its client.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

from policies.engine import admit, expects_quic
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Address, Attempt, Reason, Stage, Verdict
from proxy.epoll import IN, Epoll
from proxy.limits import Limits
from proxy.metrics.table import METRICS
from proxy.original_dst import parse_address
from proxy.policy_in_force import PolicyInForce
from proxy.record import Sink
from proxy.relays.datagrams import Ancillary
from proxy.relays.stream import End
from proxy.relays.udp_budget import Budgets
from proxy.relays.udp_records import PERIOD_S, Carried, DatagramRecords
from proxy.relays.udp_sessions import BATCH, BUFFER, DatagramCounts, Lost, Session, Sessions, Waiting
from proxy.relays.udp_sockets import (
    ANCILLARY_SIZE,
    BoundDoor,
    Door,
    SocketAddress,
    Target,
    TransparentDoor,
    try_transparent,
)
from proxy.relays.udp_ways import Ways, denial
from proxy.upstream_proxy import SiteProxy
from proxy.way_out import Resolver
from proxy.wire.client_hello import ClientHello
from proxy.wire.quic import MAX_WAIT_S, InitialReader, MalformedInitial, is_long_header

QUEUE = 4 << 20  # bytes asked for, of what comes while others have their turn; net.core.rmem_max may give less
PAUSE_S = 1.0  # before a socket that failed is read again
_TRUNCATED = 0x20  # MSG_TRUNC


class UdpRelay:
    """Serves any number of doors, with one table of sessions. Made on a running loop.

    names_of  of the names that a workload was told for an address
    is_own    whether an address and port are a door of the gate's own
    site      the site's proxy, past which nothing goes
    crashed   told of a fault that lost a datagram
    clock     POSIX seconds; `ticks` is the clock of budgets
    """

    def __init__(
        self,
        epoll: Epoll,
        in_force: PolicyInForce,
        resolver: Resolver,
        record: Sink,
        *,
        names_of: Callable[[str, Address], tuple[Hostname, ...]],
        limits: Limits,
        is_own: Callable[[Address, int], bool],
        crashed: Callable[[Exception], None],
        site: SiteProxy | None = None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epoll = epoll
        self.limits = limits
        self.counts = DatagramCounts()
        self.waiting = Waiting()
        self.turn = 0
        self.buffer = memoryview(bytearray(BUFFER))
        self._incoming = memoryview(bytearray(BUFFER))  # beside it: an answer may be read while a datagram is judged
        self._in_force = in_force
        self._names_of = names_of
        self._is_own = is_own
        self._crashed = crashed
        self._clock = clock
        self._records = DatagramRecords(record)
        self._budgets = Budgets(ticks)
        self._sessions = Sessions(limits)
        self._ways = Ways(self, resolver, limits, is_own=is_own, crashed=crashed, site=site)
        self._doors: list[Door] = []
        self._broken: set[Door] = set()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    # --- its life ---

    def carry(self, sock: socket.socket, target: Target | None = None) -> None:
        """Carry the datagrams that come to a bound socket: they are for `target`, or (None) for whatever address they
        were sent to, at that port. The socket is the relay's from now on, as with all that it serves."""
        self.serve(BoundDoor(sock, target))

    def carry_redirected(self, sock: socket.socket) -> None:
        """The same of a socket to which TPROXY leads them. Raises OSError where this process may not do it."""
        try_transparent()
        self.serve(TransparentDoor(sock))

    def serve(self, door: Door) -> None:
        """Carry what comes in at `door`, whose socket is the relay's from now on."""
        door.sock.setblocking(False)
        door.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE)
        self._doors.append(door)
        self._listen(door)
        if self._timer is None:
            self._timer = self._loop.call_later(PERIOD_S, self._tidy)

    def judge_anew(self) -> None:
        """Judge each session again at its next datagram, in either direction: another policy is in force."""
        self.turn += 1

    def close(self) -> None:
        """End every session, and tell all that is to be told."""
        for door in self._doors:
            self._unwatch(door)
            door.close()
        self._doors.clear()
        for session in self._sessions:
            session.close(End.CLOSED)
        self._records.flush()
        if self._timer is not None:
            self._timer.cancel()

    @property
    def is_failing(self) -> bool:
        """A door of its cannot be read."""
        return bool(self._broken)

    @property
    def is_waiting(self) -> bool:
        """Datagrams are held until it is known where they go."""
        return any(not session.is_carried for session in self._sessions)

    def stats(self) -> dict[str, float]:
        """Gauges and counters by series."""
        datagrams, lost = METRICS["outgate_udp_datagrams_total"], METRICS["outgate_udp_lost_total"]
        return {
            "outgate_udp_sessions": len(self._sessions),
            datagrams.series("sent"): self.counts.sent,
            datagrams.series("received"): self.counts.received,
            **{lost.series(why): self.counts.lost[why] for why in Lost},
        }

    def _tidy(self) -> None:
        self.judge_anew()  # a rule may have ended with the day, an address may be another workload's by now
        self._records.flush()
        self._budgets.sweep()
        self._timer = self._loop.call_later(PERIOD_S, self._tidy)

    # --- what comes in ---

    def _listen(self, door: Door) -> None:
        if door not in self._doors:
            return
        try:
            self.epoll.put(door.sock.fileno(), IN, partial(self._drain, door), partial(self._fail, door))
        except (OSError, ValueError) as error:
            self._fail(door, error)
        else:
            self._broken.discard(door)
            self._drain(door)

    def _fail(self, door: Door, error: Exception) -> None:
        """Its socket cannot be read: it is tried again, and nothing passes meanwhile."""
        self._broken.add(door)
        self._unwatch(door)
        self._loop.call_later(PAUSE_S, self._listen, door)
        if isinstance(error, OSError):
            self._crashed(error)

    def _unwatch(self, door: Door) -> None:
        try:
            self.epoll.remove(door.sock.fileno())
        except OSError:  # it is no descriptor any more
            pass

    def _drain(self, door: Door, _events: int = 0) -> None:
        receive, buffer, find = door.sock.recvmsg_into, [self._incoming], self._sessions.get
        for _ in range(BATCH):
            try:
                size, ancillary, flags, source = receive(buffer, ANCILLARY_SIZE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._fail(door, error)
                return
            if flags & _TRUNCATED:
                self.counts.lost[Lost.TRUNCATED] += 1
                continue
            key = door, source, ancillary[0][2] if ancillary else b""
            datagram = self._incoming[:size]
            try:
                session = find(key)
                if session is not None and (session.turn == self.turn or self.holds(session)):
                    if session.is_unnamed:
                        self._read_hello(session, bytes(datagram))
                    else:
                        session.take(datagram)
                    continue
                if session is not None:
                    session.close(End.RESET)
                self._meet(door, key, source, ancillary, datagram)
            except Exception as error:  # this datagram is lost, the door goes on
                self._crashed(error)

    def _meet(
        self, door: Door, key: Hashable, source: SocketAddress, ancillary: Sequence[Ancillary], datagram: memoryview
    ) -> None:
        """The first datagram of a session that may become one."""
        address = parse_address(source[0])
        peer = str(address), source[1]
        workload = self._in_force.identify(address)
        target = door.target(ancillary)
        attempt = self._attempt(workload, target)
        destination = None if target is None or isinstance(target[0], str) else (str(target[0]), target[1])
        verdict = self._in_force.decide(attempt)
        is_quic = (
            verdict.reason is not Reason.RULE
            and is_long_header(bytes(datagram[:1]))
            and expects_quic(self._in_force.policy, workload, attempt.port)
        )
        if not verdict.is_allow and not is_quic:
            self._records.denied(attempt, verdict, peer, destination, "")
            return
        if not self._sessions.has_room(peer[0]):
            self._records.denied(attempt, denial(verdict, Reason.TOO_MANY_CONNECTIONS), peer, destination, "")
            return
        carried = Carried(
            started=self._clock(),
            source=peer,
            destination=destination,
            upstream=destination or ("", attempt.port),
            generation=self._in_force.policy.generation,
        )
        session = Session(self, key, attempt, verdict, carried, door.reply(ancillary, source))
        self._sessions.add(session)
        try:
            self._begin(session, bytes(datagram), is_quic=is_quic)
        except Exception:
            session.close(End.CRASHED)
            raise

    def _begin(self, session: Session, datagram: bytes, *, is_quic: bool) -> None:
        if is_quic:
            session.hello = InitialReader()
            session.is_unnamed = True
            session.wait(MAX_WAIT_S)
            self._read_hello(session, datagram)
        elif session.hold(datagram):
            self._ways.find(session)
        else:
            session.close(End.RESET)

    def _attempt(self, workload: str, target: tuple[Hostname | Address, int] | None) -> Attempt:
        """What a datagram tries. Nothing, where the kernel does not say whom it is for, or it is for a door of ours."""
        now = self._clock()
        if target is None:
            return Attempt(Stage.UDP, workload, port=0, time=now, fault=Reason.NEVER_REACHED)
        to, port = target
        if isinstance(to, str):
            return Attempt(Stage.UDP, workload, port=port, time=now, names=(to,))
        if self._is_own(to, port):  # it was not led here but sent, or would come back
            return Attempt(Stage.UDP, workload, port=port, time=now, address=to, fault=Reason.NEVER_REACHED)
        return Attempt(Stage.UDP, workload, port=port, time=now, address=to, names=self._names_of(workload, to))

    # --- QUIC ---

    def _read_hello(self, session: Session, datagram: bytes) -> None:
        """Nothing leaves before the name is known, and admitted."""
        assert session.hello
        if not session.hold(datagram):
            return
        try:
            hello = session.hello.feed(datagram)
        except MalformedInitial as error:
            self.refuse(session, denial(session.verdict, Reason.MALFORMED_HELLO), str(error))
            return
        if hello is not None:
            self._judge_hello(session, hello)

    def _judge_hello(self, session: Session, hello: ClientHello) -> None:
        host, fault = None, None
        if hello.sni is not None:
            try:
                host = parse_hostname(hello.sni)
            except MalformedName:
                fault = Reason.MALFORMED_NAME
        attempt = replace(session.attempt, workload=self._in_force.identify(parse_address(session.source)))
        names = attempt.names if host is None else (host, *(name for name in attempt.names if name != host))
        session.attempt = attempt = replace(
            attempt, time=self._clock(), host=host, names=names, ech=hello.ech, fault=attempt.fault or fault
        )
        session.verdict = verdict = self._in_force.decide(attempt)
        session.is_unnamed = False
        session.turn = self.turn
        if verdict.is_allow:
            self._ways.find(session)
        else:
            self.refuse(session, verdict)

    def late(self, session: Session) -> None:
        """A hello that does not get whole, or a lookup that does not end."""
        reason = Reason.HELLO_TIMEOUT if session.is_unnamed else Reason.RESOLVER_FAILED
        self.refuse(session, denial(session.verdict, reason))

    def misled(self, session: Session, error: MalformedInitial) -> None:
        """A later packet of its would begin something that was not judged."""
        self.refuse(session, denial(session.verdict, Reason.MALFORMED_HELLO), str(error))

    # --- where it goes ---

    def found(self, session: Session, upstream: socket.socket, address: Address, *, from_hosts: bool) -> None:
        """Carry it there, if it still may."""
        session.address, session.is_from_hosts = address, from_hosts
        if session.turn != self.turn and not self.holds(session):
            upstream.close()
            session.address = None  # nothing was carried
            session.close(End.RESET)
            return
        session.carry(upstream, self._budgets.account(session.attempt.workload, session.verdict.rule))

    # --- judged again ---

    def holds(self, session: Session) -> bool:
        """Whether what admitted it admits it under the policy in force, too, the address that was dialled included."""
        if session.is_unnamed:
            return True  # it is judged when its hello is whole
        attempt = session.attempt
        workload = self._in_force.identify(parse_address(session.source))
        verdict = self._in_force.decide(replace(attempt, workload=workload, time=self._clock()))
        was = session.verdict
        if not verdict.is_allow or workload != attempt.workload or (verdict.dial, verdict.host) != (was.dial, was.host):
            return False
        to = session.address
        if to is not None and not admit(verdict, to, from_hosts=session.is_from_hosts).is_allow:
            return False
        session.admitted_by(verdict, self._budgets.account(workload, verdict.rule), self._in_force.policy.generation)
        return True

    # --- the end ---

    def over_budget(self, session: Session) -> None:
        """One datagram that its rule does not pay for any more."""
        self.counts.lost[Lost.BUDGET] += 1
        carried = session.carried
        verdict = denial(session.verdict, Reason.BUDGET)
        self._records.denied(session.attempt, verdict, carried.source, carried.destination, "")

    def refuse(self, session: Session, verdict: Verdict, note: str = "") -> None:
        """It does not go on; one that was carried until now is recorded as such, too."""
        carried = session.carried
        session.close(End.RESET)
        self._records.denied(session.attempt, verdict, carried.source, carried.destination, note)

    def ended(self, session: Session, how: End) -> None:
        """Recorded if it was carried, by whoever it was that ended it."""
        if self._sessions.remove(session) and session.address is not None:
            self._records.ended(session.attempt, session.verdict, session.carried, how)
