"""One client's datagrams to one destination and the answers to them, and how many such sessions there may be.

What is admitted, and where it is dialled, `udp` says; here bytes are carried, counted, and held while that is open.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from policies.model import Address, Attempt, Verdict
from proxy.epoll import IN, Epoll
from proxy.limits import Limits
from proxy.original_dst import parse_address
from proxy.relays.buckets import release
from proxy.relays.stream import End
from proxy.relays.udp_budget import Account
from proxy.relays.udp_records import Carried
from proxy.relays.udp_sockets import Reply
from proxy.wire.quic import InitialReader, MalformedInitial, is_long_header

BATCH = 64  # datagrams read from one socket before others have their turn
BUFFER = 1 << 16  # more than a datagram has: 65,507 bytes over IPv4, 65,527 over IPv6
MAX_WAITING = 4  # datagrams of one session whose destination is not known yet; a client sends lost ones again
MAX_WAITING_BYTES = 8 << 20  # of all sessions
_SHARE = 4  # of it, for one source


class Lost(StrEnum):
    """Why a datagram of an admitted session went no further."""

    BUDGET = "budget"
    WAITING = "waiting"  # more than are held while a name is resolved, or a QUIC hello is not whole
    FULL = "full"  # no room in the kernel, or no way at all
    TRUNCATED = "truncated"  # longer than any datagram may be


class Relay(Protocol):
    """What a session asks of whoever made it."""

    epoll: Epoll
    limits: Limits
    counts: DatagramCounts
    turn: int  # another one: judge again
    buffer: memoryview
    waiting: Waiting

    def holds(self, session: Session) -> bool:
        """Whether what admitted the session still does."""

    def over_budget(self, session: Session) -> None: ...

    def misled(self, session: Session, error: MalformedInitial) -> None: ...

    def late(self, session: Session) -> None: ...

    def ended(self, session: Session, how: End) -> None: ...


@dataclass(slots=True)
class DatagramCounts:
    """Since the relay was made."""

    sent: int = 0
    received: int = 0
    lost: Counter[Lost] = field(default_factory=Counter)


class Waiting:
    """How many bytes are held, in all and of each source."""

    def __init__(self) -> None:
        self._total = 0
        self._of: Counter[str] = Counter()

    def take(self, source: str, size: int) -> bool:
        """Whether so many more may be held; if so they count until `give`."""
        if self._total + size > MAX_WAITING_BYTES or self._of[source] + size > MAX_WAITING_BYTES // _SHARE:
            return False
        self._total += size
        self._of[source] += size
        return True

    def give(self, source: str, size: int) -> None:
        self._total -= size
        self._of[source] -= size
        if not self._of[source]:
            del self._of[source]


class Session:
    """Held until `carry` says where it goes; over with `close`.

    attempt, verdict  what was judged, and what came of it
    hello             reads the names that a QUIC client shows; None: what passes is opaque
    is_unnamed        the first of them is not whole yet
    lookup            finds out where it goes
    address           where that is; `is_from_hosts` if the operator says so
    turn              in which it was judged last
    """

    __slots__ = ("_account", "_relay", "_upstream", "_waiting", "address", "attempt", "carried", "deadline", "hello",
                 "is_from_hosts", "is_unnamed", "key", "lookup", "reply", "source", "turn", "verdict")  # fmt: skip

    def __init__(
        self, relay: Relay, key: Hashable, attempt: Attempt, verdict: Verdict, carried: Carried, reply: Reply
    ) -> None:
        self._relay = relay
        self.key = key
        self.source = carried.source[0]
        self.attempt = attempt
        self.verdict = verdict
        self.carried = carried
        self.reply = reply
        self.hello: InitialReader | None = None
        self.lookup: asyncio.Task[None] | None = None
        self.turn = relay.turn
        self.deadline = relay.epoll.now
        self.is_unnamed = False
        self.address: Address | None = None
        self.is_from_hosts = False
        self._waiting: list[bytes] = []
        self._upstream: socket.socket | None = None
        self._account: Account | None = None

    @property
    def is_carried(self) -> bool:
        return self._upstream is not None

    # --- before it is known where it goes ---

    def hold(self, datagram: bytes) -> bool:
        """Keep it for `carry`. False: there are too many, and it is lost."""
        if len(self._waiting) >= MAX_WAITING or not self._relay.waiting.take(self.source, len(datagram)):
            self._relay.counts.lost[Lost.WAITING] += 1
            return False
        self._waiting.append(datagram)
        return True

    def _let_go(self) -> list[bytes]:
        """What was held."""
        waiting, self._waiting = self._waiting, []
        if size := sum(map(len, waiting)):
            self._relay.waiting.give(self.source, size)
        return waiting

    def wait(self, seconds: float) -> None:
        """`Relay.late` is told when that is over, unless it is carried or closed by then."""
        self.deadline = self._relay.epoll.now + seconds
        self._relay.epoll.watch(self)

    # --- carried ---

    def carry(self, upstream: socket.socket, account: Account | None) -> None:
        """Send what was held, then all that comes, as long as `account` gives."""
        relay = self._relay
        self._upstream, self._account = upstream, account
        relay.epoll.put(upstream.fileno(), IN, self._readable, self.failed)
        self.wait(relay.limits.udp_idle_s)
        for datagram in self._let_go():
            self._send(memoryview(datagram))

    def admitted_by(self, verdict: Verdict, account: Account | None, generation: str) -> None:
        """It was judged again."""
        self.verdict, self._account, self.turn = verdict, account, self._relay.turn
        self.carried.generation = generation

    def take(self, datagram: memoryview) -> None:
        """One more of the client's."""
        relay = self._relay
        if self.hello is not None and is_long_header(bytes(datagram[:1])):
            try:
                whole = self.hello.follow(bytes(datagram))
            except MalformedInitial as error:
                relay.misled(self, error)
                return
            for one in whole:
                self._pass(memoryview(one))
        else:
            self._pass(datagram)

    def _pass(self, datagram: memoryview) -> None:
        if self._upstream is None:
            self.hold(bytes(datagram))
        else:
            self.deadline = self._relay.epoll.now + self._relay.limits.udp_idle_s
            self._send(datagram)

    def _send(self, datagram: memoryview) -> None:
        relay, upstream, size = self._relay, self._upstream, len(datagram)
        if upstream is None:
            return
        if self._account is not None and not self._account.take(size):
            relay.over_budget(self)
            return
        try:
            try:
                upstream.send(datagram)
            except ConnectionError as error:  # of an earlier datagram (ICMP); this one was not sent
                self.carried.note = _text(error)
                upstream.send(datagram)
        except OSError as error:
            self._lose(error)
            return
        self.carried.sent += size
        self.carried.datagrams_sent += 1
        relay.counts.sent += 1

    def _readable(self, _events: int) -> None:
        relay, upstream, carried = self._relay, self._upstream, self.carried
        for _ in range(BATCH):
            if upstream is None or self._upstream is not upstream:
                return  # closed meanwhile
            try:
                size = upstream.recv_into(relay.buffer)
            except BlockingIOError:
                return
            except OSError as error:  # ICMP
                carried.note = _text(error)
                continue
            if self.turn != relay.turn and not relay.holds(self):
                self.close(End.RESET)
                return
            self.deadline = relay.epoll.now + relay.limits.udp_idle_s
            if self._account is not None and not self._account.take(size):
                relay.over_budget(self)
                continue
            try:
                self.reply.send(relay.buffer[:size])
            except OSError as error:
                self._lose(error)
                continue
            carried.received += size
            carried.datagrams_received += 1
            relay.counts.received += 1

    def _lose(self, error: OSError) -> None:
        self._relay.counts.lost[Lost.FULL] += 1
        if not isinstance(error, BlockingIOError):
            self.carried.note = _text(error)

    # --- its end ---

    def expired(self) -> None:
        if self.is_carried:
            self.close(End.IDLE)
        else:
            self._relay.late(self)

    def failed(self, _error: Exception) -> None:
        """A callback crashed."""
        self.close(End.CRASHED)

    def close(self, how: End) -> None:
        """Nothing passes any more. `Relay.ended` is told."""
        relay = self._relay
        relay.epoll.unwatch(self)
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            relay.epoll.forget(upstream.fileno())
            upstream.close()
        if self.lookup is not None:
            self.lookup.cancel()
        self._let_go()
        relay.ended(self, how)


def _text(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


class Sessions:
    """All sessions by their key, within the limits. A machine may send from every address of its IPv6 /64, and the pods
    of a node may share one: a /64 has no more than half of all, whichever it is."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_key: dict[Hashable, Session] = {}
        self._per_source: Counter[str] = Counter()
        self._per_network: Counter[int] = Counter()
        self.get: Callable[[Hashable], Session | None] = self._by_key.get  # called for each datagram

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._by_key.values()))

    def has_room(self, source: str) -> bool:
        limits = self._limits
        return (
            len(self._by_key) < limits.udp_sessions
            and self._per_source[source] < limits.udp_per_source
            and self._per_network[_network_of(source)] < max(1, limits.udp_sessions // 2)
        )

    def add(self, session: Session) -> None:
        self._by_key[session.key] = session
        self._per_source[session.source] += 1
        if ":" in session.source:
            self._per_network[_network_of(session.source)] += 1

    def remove(self, session: Session) -> bool:
        """False: it is gone already."""
        if self._by_key.get(session.key) is not session:
            return False
        del self._by_key[session.key]
        release(self._per_source, session.source)
        release(self._per_network, _network_of(session.source))
        return True


def _network_of(source: str) -> int:
    """The /64 of an IPv6 source; 0 for every other, which nothing is counted for."""
    return int(parse_address(source)) >> 64 if ":" in source else 0
