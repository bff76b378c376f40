"""One server that is asked for the time: which of its name's addresses, when, and what it answered so far.

When it is asked follows from its own answers and from chance alone. What clients do is not known here.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from policies.hostnames import Hostname
from proxy.record import Peer, show_peer
from proxy.relays.ntp.clock import own_ns
from proxy.relays.ntp.exchange import NoKeys, ask
from proxy.relays.ntp.sample import NS, WINDOW, History, Rate
from proxy.resolver import NameNotFound, ResolverFailed
from proxy.wire.ntp import KissOfDeath, MalformedPacket, UnusableReply

if TYPE_CHECKING:  # as in `exchange`
    from proxy.relays.ntp.keys import Keys

PATIENCE = 4  # failures in a row until another address of the name is tried; answers in doubt until it is left at that
REVIEW_S = 86_400.0  # by then an address must still be one of its name's: who gives up a server wants to be rid of us
WANDER_S = 250e-6  # our clock may run away by that from one poll to the next, or by half of a longer delay
STEADY = 4  # good polls in a row before they come at half the rate

_random = random.SystemRandom()


class SourceState(StrEnum):
    """What a server is good for now."""

    SELECTED = "selected"  # the estimate is made of its samples
    OUTLIER = "outlier"  # agrees with those, and is too far off to help
    FALSETICKER = "falseticker"  # does not agree with the majority
    UNDECIDED = "undecided"  # no majority agrees, so nobody knows who is right
    STARTING = "starting"  # too few samples yet
    UNFIT = "unfit"  # its samples are too old or too uncertain
    UNREACHABLE = "unreachable"  # no answer that gives a time
    SPARE = "spare"  # its name has no further address
    UNRESOLVED = "unresolved"  # no address of its name is there, or may be asked
    REFUSED = "refused"  # told us not to ask again (DENY, RSTR)


class Failure(StrEnum):
    """Why a poll gave no sample."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"  # the network said so
    FORGED = "forged"  # nothing but answers to somebody else's question, or without the proof they must have
    UNUSABLE = "unusable"  # not synchronised, or times that cannot be
    KISS_OF_DEATH = "kiss_of_death"
    KEY_EXCHANGE = "key_exchange"  # it gave no keys, so it was not asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often servers are asked, and what their answers count.

    min_exponent  polls are 2**exponent seconds apart
    burst         polls in quick succession at first
    min_samples   fewer are no opinion
    stale_s       older ones are none any more
    gap_s         between two queries to one server, where clients cause them
    """

    min_exponent: int = 6
    max_exponent: int = 10
    burst: int = 4
    burst_gap_s: float = 2.0  # the least that public servers take without RATE
    timeout_s: float = 3.0
    min_samples: int = 3
    window: int = WINDOW
    stale_s: float = 4096.0  # four polls of the longest interval
    gap_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Seats:
    """What the sources of one name know of its addresses together."""

    taken: set[Peer] = field(default_factory=set)  # each by one of them
    refused: set[Peer] = field(default_factory=set)  # that told us not to ask again
    lost: list[Peer] = field(default_factory=list)  # that did not answer, the latest last


@dataclass(slots=True)
class Tally:
    """What was counted of one source, whatever address it had."""

    polls: int = 0
    failures: Counter[Failure] = field(default_factory=Counter)


class Source:
    """One seat of a name among those who say what time it is.

    find     the addresses of the name that may be asked now. Raises NameNotFound, ResolverFailed
    is_open  whether the policy still names it
    seats    what is shared with the name's other sources
    rate     our clock's
    changed  called after each poll
    keys     by which it proves its answers, of which `address` is then the key exchange; None: it proves nothing
    """

    def __init__(
        self,
        name: Hostname,
        pace: Pace,
        *,
        find: Callable[[Hostname], Awaitable[Sequence[Peer]]],
        is_open: Callable[[Hostname], bool],
        seats: Seats,
        rate: Callable[[], Rate],
        changed: Callable[[], None],
        keys: Keys | None = None,
    ) -> None:
        self.name = name
        self.address: Peer | None = None
        self.history = History(pace.window)
        self.tally = Tally()
        self.fault = ""  # of the last poll, or of the last lookup
        self.reach = 0  # RFC 5905 9.2: a bit for each of the last eight polls
        self.exponent = self._floor = pace.min_exponent
        self._pace = pace
        self._find = find
        self._is_open = is_open
        self._seats = seats
        self._rate = rate
        self._changed = changed
        self.keys = keys
        self._failures = self._steady = self._burst = self._lookups = self._first_polls = self._doubts = 0
        self._found_ns = self._asked_ns = 0
        self._hurry = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None

    @property
    def asked(self) -> Peer | None:
        """The address that is asked for the time, or that is to say which."""
        return (self.keys.server if self.keys else None) or self.address

    @property
    def interval_s(self) -> float:
        return 2.0**self.exponent

    @property
    def is_starting(self) -> bool:
        """It may still say something within its first burst: who is heard first is not to decide alone."""
        is_heard = len(self.history) >= self._pace.min_samples
        return not self.fault and not is_heard and self._first_polls <= self._pace.burst

    @property
    def is_spare(self) -> bool:
        return self.address is None and bool(self._seats.taken)

    @property
    def is_refused(self) -> bool:
        return self.address is None and bool(self._seats.refused)

    # --- in serve mode: on our own schedule

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await self._poll()
            self._hurry.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), self._wait_s())

    def restart(self, *, burst: bool) -> None:
        """Forget what it said: our clock is not what it was."""
        self.history = History(self._pace.window)
        self.exponent = self._floor
        self._first_polls = 0
        if burst:
            self._burst = self._pace.burst
            self._hurry.set()

    def _wait_s(self) -> float:
        if self.is_spare:
            return 2.0**self._pace.max_exponent * _jitter()
        if self.address is None:
            self._lookups += 1
            return min(2.0**self._lookups, 2.0**self._floor) * _jitter()
        if self.keys and (wait_s := self.keys.wait_s()):
            return wait_s * _random.uniform(1.0, 1.2)
        if self._burst > 0 or 0 < self._doubts < PATIENCE:
            return self._pace.burst_gap_s * _jitter()
        return self.interval_s * _jitter()

    # --- in relay mode: when a client asks

    async def refresh(self) -> None:
        """A poll that is not older than `gap_s`: the last one, the one under way, or one that begins now."""
        if self._polling is None:
            if self._asked_ns and own_ns() - self._asked_ns < self._pace.gap_s * NS:
                return
            self._asked_ns = own_ns()  # also where it comes to nothing: it is not tried for each client
            self._polling = asyncio.create_task(self._poll())
            self._polling.add_done_callback(self._polled)
        await asyncio.wait((self._polling,))

    def _polled(self, _: asyncio.Task[None]) -> None:
        self._polling = None

    def leave(self) -> None:
        """Nobody asks this server any more."""
        if self._polling:
            self._polling.cancel()
        self._drop()

    # --- one poll

    async def _poll(self) -> None:
        try:
            await self._poll_once()
        except Exception as error:  # a fault of ours in one poll must not end all that follow
            self.fault = f"the relay failed: {error!r}"
        self._changed()

    async def _poll_once(self) -> None:
        if not self._is_open(self.name):
            self._drop()
            self.fault = "no rule in force names it"
        elif self.address is None or own_ns() - self._found_ns > REVIEW_S * NS:
            await self._settle()
        if self.address is not None and not (self.keys and self.keys.wait_s()):
            await self._ask(self.address)

    async def _settle(self) -> None:
        """Find an address, or see whether the one we have is still one of the name's."""
        try:
            found = [one for one in await self._find(self.name) if one not in self._seats.refused]
        except (NameNotFound, ResolverFailed) as error:
            self.fault = str(error)
            return  # an address that works is kept
        if self.address not in found:
            self._drop()
            free = [one for one in found if one not in self._seats.taken]
            # Those that were lost come last, the one lost longest ago first.
            self.address = min(free, key=self._lost_since, default=None)
        if self.address is None:
            self.fault = "it has no address that may be asked"
            return
        self._seats.taken.add(self.address)
        self._found_ns = own_ns()
        self._lookups = 0
        if not len(self.history):
            self._burst = 0 if self.address in self._seats.lost else self._pace.burst

    def _lost_since(self, address: Peer) -> int:
        return self._seats.lost.index(address) if address in self._seats.lost else -1

    async def _ask(self, address: Peer) -> None:
        self.tally.polls += 1
        self._first_polls += 1
        self._burst -= 1
        self._asked_ns = own_ns()
        try:
            sample = await (self.keys.ask if self.keys else ask)(address, self._pace.timeout_s)
        except NoKeys as error:
            self._fail(address, Failure.KEY_EXCHANGE, str(error))
        except KissOfDeath as kiss:
            self._heed(address, kiss)
        except TimeoutError:
            self._fail(address, Failure.TIMEOUT, f"no answer within {self._pace.timeout_s:g} s")
        except OSError as error:
            self._fail(address, Failure.UNREACHABLE, (error.strerror or str(error)).lower())
        except MalformedPacket:
            what = "without the proof they must have" if self.keys else "to other questions"
            self._fail(address, Failure.FORGED, f"sent nothing but answers {what}")
        except UnusableReply as error:
            self._fail(address, Failure.UNUSABLE, str(error))
        else:
            self.history.add(sample, self._rate())
            self._doubts = self._doubts + 1 if self.history.is_in_doubt else 0
            self.reach = (self.reach << 1 | 1) & 0xFF
            self.fault = ""
            self._failures = 0
            self._steady += 1
            if address in self._seats.lost:  # it is back
                self._seats.lost.remove(address)
                self._burst = self._pace.burst
            self._adapt(sample.delay_s)

    def _adapt(self, delay_s: float) -> None:
        """Ask less often, as long as our clock keeps well enough from one answer to the next."""
        longer_s = 2 * self.interval_s
        may_wander_s = max(WANDER_S, delay_s / 2)
        if self._burst > 0 or self._steady < STEADY or self.exponent >= self._pace.max_exponent:
            return
        if self._rate().error * longer_s <= may_wander_s:
            self.exponent += 1
            self._steady = 0

    def _fail(self, address: Peer, failure: Failure, what: str) -> None:
        self.tally.failures[failure] += 1
        self.fault = f"{show_peer(address)}: {what}"
        self.reach = self.reach << 1 & 0xFF
        self.exponent = self._floor
        self._steady = 0
        self._failures += 1
        if self._failures >= PATIENCE:
            if address in self._seats.lost:
                self._seats.lost.remove(address)
            self._seats.lost.append(address)
            self._drop()

    def _heed(self, address: Peer, kiss: KissOfDeath) -> None:
        """RFC 5905 7.4: DENY and RSTR end it for as long as this process lives, RATE means less often from now on."""
        self._fail(address, Failure.KISS_OF_DEATH, str(kiss))
        self._burst = 0
        if kiss.code in ("DENY", "RSTR"):
            self._seats.refused.add(address)
            self._drop()
        elif kiss.code == "RATE":
            self._floor = min(self._floor + 1, self._pace.max_exponent)
            self.exponent = self._floor
        elif kiss.code == "NTSN" and self.keys:
            self.keys.doubt()
            self._burst = 1  # it may have lost what it knew of us: find out soon

    def _drop(self) -> None:
        if self.address is not None:
            self._seats.taken.discard(self.address)
        self.address = None
        if self.keys:
            self.keys.forget()
        self.history = History(self._pace.window)
        self._failures = 0
        self.reach = 0


def _jitter() -> float:
    return _random.uniform(0.9, 1.1)
