"""Every server that the policy names, and the estimate that is made of them. It knows no client and no rule."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from policies.hostnames import Hostname
from proxy.record import Peer
from proxy.relays.ntp.clock import Jumps, KernelRate, Reading, own_ns, read
from proxy.relays.ntp.estimate import Estimate, Opinions, weigh
from proxy.relays.ntp.sample import NS, Rate
from proxy.relays.ntp.source import Pace, Seats, Source, SourceState

if TYPE_CHECKING:  # as in `exchange`
    from proxy.relays.ntp.keys import Keys

SEATS = (
    4  # of a name that stands alone; several names have one each, or who has more addresses would outvote the others
)
LOOK_S = 1.0
RESTARTS_S = 64.0  # who can set this machine's clock must not have us send bursts at will


@dataclass(frozen=True, slots=True)
class Standing:
    """How one source stands, for people and metrics."""

    source: Source
    state: SourceState


class Poller:
    """Keeps asking, or asks when a client does, and says what time it is.

    find      the addresses of a name that may be asked now. Raises NameNotFound, ResolverFailed
    is_open   whether the policy names it now
    on_demand only `refresh` asks
    changed   called after each poll
    keys      for one source of a name whose servers must prove their answers; None: they need not
    log       told in one line that clocks have jumped
    """

    def __init__(
        self,
        pace: Pace,
        *,
        find: Callable[[Hostname], Awaitable[Sequence[Peer]]],
        is_open: Callable[[Hostname], bool],
        on_demand: bool = False,
        changed: Callable[[], None] = lambda: None,
        keys: Callable[[Hostname], Keys | None] = lambda name: None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._pace = pace
        self._find = find
        self._is_open = is_open
        self._on_demand = on_demand
        self._changed = changed
        self._keys = keys
        self._log = log
        self._sources: dict[Hostname, list[Source]] = {}
        self._shared: dict[Hostname, Seats] = {}
        self._tasks: dict[Source, asyncio.Task[None]] = {}
        self._opinions: Opinions[Source] = Opinions()
        self._estimate: Estimate | None = None
        self._kernel = KernelRate()
        self._jumps = Jumps(read())
        self._restarted_ns = 0
        self.jumps = 0

    # --- who is asked

    def follow(self, names: Collection[Hostname]) -> None:
        """Ask these names' servers from now on, and no others."""
        seats = SEATS if len(names) == 1 else 1
        for name in [name for name in self._sources if name not in names]:
            self._trim(name, 0)
            del self._sources[name], self._shared[name]
            self._estimate = None  # it may rest on what that server said
        for name in names:
            shared = self._shared.setdefault(name, Seats())
            sources = self._sources.setdefault(name, [])
            self._trim(name, seats)
            sources += [self._begin(name, shared) for _ in range(seats - len(sources))]
        self._weigh()

    def _trim(self, name: Hostname, seats: int) -> None:
        """Leave so many of a name's sources."""
        sources = self._sources[name]
        for source in sources[seats:]:
            self._end(source)
        del sources[seats:]

    def _begin(self, name: Hostname, seats: Seats) -> Source:
        source = Source(
            name,
            self._pace,
            find=self._find,
            is_open=self._is_open,
            seats=seats,
            rate=lambda: self.rate,
            changed=self._heard,
            keys=self._keys(name),
        )
        if not self._on_demand:
            self._tasks[source] = asyncio.create_task(source.run())
        return source

    def _end(self, source: Source) -> None:
        if task := self._tasks.pop(source, None):
            task.cancel()
        source.leave()

    async def close(self) -> None:
        tasks = tuple(self._tasks.values())
        for name in self._sources:
            self._trim(name, 0)
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what they say

    @property
    def rate(self) -> Rate:
        """Our clock's, as far as it is known."""
        return self._estimate.rate if self._estimate else self._kernel.rate()

    def estimate(self, now: Reading) -> Estimate | None:
        """The newest one, unless clocks have jumped since; it may be stale."""
        self.look(now)
        return self._estimate

    async def refresh(self) -> None:
        """Ask every server that was not asked within the pace's gap, and wait for the answers."""
        await asyncio.gather(*(source.refresh() for source in self._all()))

    async def watch(self) -> None:
        """Look for jumps until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(read())

    def look(self, now: Reading) -> None:
        """If the machine's clock has jumped, somebody set it, or the machine stood still and our own clock with it.
        Which of them, nobody says: what was known is not any more, and is measured anew."""
        jumped_s = self._jumps.look(now)
        if not jumped_s:
            return
        self.jumps += 1
        self._log(f"this machine's clock jumped by {jumped_s:+.3f} s, or the machine stood still: measuring anew")
        self._estimate = None
        self._kernel = KernelRate()
        bursts = now.own_ns - self._restarted_ns >= RESTARTS_S * NS or not self._restarted_ns
        if bursts:
            self._restarted_ns = now.own_ns
        for source in self._all():
            source.restart(burst=bursts)
        self._weigh()

    def standings(self) -> list[Standing]:
        return [Standing(source, self._state(source)) for source in self._all()]

    def _heard(self) -> None:
        self._weigh()
        self._changed()

    def _weigh(self) -> None:
        """Make a new estimate, if at least half of the servers that are named agree on it: whoever can keep the others
        from us must not decide alone. Else a former estimate goes on, and says itself how uncertain it has become."""
        histories = {source: source.history for source in self._all()}
        prior = self._kernel.rate()
        self._opinions = weigh(
            histories,
            own_ns(),
            self.rate,
            prior,
            min_samples=self._pace.min_samples,
            stale_s=self._pace.stale_s,
        )
        agreed = {source.name for source in (*self._opinions.survivors, *self._opinions.outliers)}
        if 2 * len(agreed) < len(self._sources):
            return
        if self._estimate is None and any(source.is_starting for source in histories):
            return
        self._estimate = self._opinions.estimate or self._estimate

    def _all(self) -> Iterator[Source]:
        for sources in self._sources.values():
            yield from sources

    def _state(self, source: Source) -> SourceState:
        for state, sources in (
            (SourceState.SELECTED, self._opinions.survivors),
            (SourceState.OUTLIER, self._opinions.outliers),
            (SourceState.FALSETICKER, self._opinions.false),
            (SourceState.UNDECIDED, self._opinions.undecided),
        ):
            if source in sources:
                return state
        if source.is_spare:
            return SourceState.SPARE
        if source.address is None:
            return SourceState.REFUSED if source.is_refused else SourceState.UNRESOLVED
        if not source.reach and source.fault:
            return SourceState.UNREACHABLE
        return SourceState.STARTING if len(source.history) < self._pace.min_samples else SourceState.UNFIT
