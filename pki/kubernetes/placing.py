"""What stands where and what is owed: each place is looked at, written or left alone. What moves is `job`'s to see.

It compares what should be with what was last seen, never with what it has done. Doing it twice changes nothing, so two
of these jobs beside each other need no leader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

from pki.kubernetes.api import Api, ApiFault, Pace
from pki.kubernetes.objects import (
    Document,
    cluster_trust_bundle,
    config_map,
    is_ours,
    mapping,
    text_of,
)

PARALLEL = 8  # requests at once: an API server shares its seats among all (priority and fairness)
QUARREL_S = 600.0  # who undoes a restoration within it is answered ever more slowly
CLUSTER = ""  # the place of what belongs to no namespace


class Outcome(StrEnum):
    """What became of one place."""

    WRITTEN = "written"
    RESTORED = "restored"  # it stood there, and somebody changed or deleted it
    UNCHANGED = "unchanged"
    REMOVED = "removed"
    REFUSED = "refused"  # what stands there is somebody else's
    FAILED = "failed"
    GONE = "gone"  # the namespace, meanwhile


STANDS = frozenset({Outcome.WRITTEN, Outcome.RESTORED, Outcome.UNCHANGED})


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a place (a namespace, or CLUSTER), and why."""

    place: str
    outcome: Outcome
    because: str = ""


class Placing:
    """One bundle, and the places of one cluster. Lives on one event loop.

    tell      is given each outcome; what is as it was told before only once, and what is gone not at all
    ready     is told when everything meant stands, and when that ends
    is_fixed  the namespaces are given: one that is not there is a failure, and not gone
    prune     what is ours goes from places that are not meant
    """

    def __init__(
        self,
        api: Api,
        name: str,
        *,
        tell: Callable[[Told], None],
        ready: Callable[[bool], None] = lambda _: None,
        pace: Pace | None = None,
        is_fixed: bool = False,
        prune: bool = False,
    ) -> None:
        self._api = api
        self._name = name
        self._tell = tell
        self._ready = ready
        self._pace = pace or Pace()
        self._is_fixed = is_fixed
        self._prune = prune
        self._parallel = asyncio.Semaphore(PARALLEL)
        self._files: Mapping[str, bytes] = {}
        self._config_map: Document | None = None
        self._trust_bundle: Document | None = None
        self._trust_bundle_version = ""
        self._meant: set[str] = set()
        self._seen: dict[str, str] = {}  # resourceVersion of what stands at a place
        self._settled: dict[str, tuple[str | None, str | None]] = {}  # what was wanted and seen when all was well there
        self._last: dict[str, Told] = {}
        self._restored: dict[str, tuple[float, int]] = {}
        self._busy: set[str] = set()
        self._was_ready = False
        self._unlisted: set[str] = set()
        self._group: asyncio.TaskGroup | None = None
        self._gives_up = False

    def carry(self, files: Mapping[str, bytes]) -> None:
        """From now on `files` is to stand everywhere. Raises BundleTooLarge; then it is what it was before."""
        self._config_map = config_map(self._name, files)
        self._files = files
        self.carry_trust_bundle(self._trust_bundle_version)
        self._wake([CLUSTER, *self._meant])

    def carry_trust_bundle(self, version: str) -> None:
        """And a ClusterTrustBundle, in this version of the API."""
        self._trust_bundle_version = version
        if version:
            self._trust_bundle = cluster_trust_bundle(version, self._name, self._files)
            self._wake([CLUSTER])

    def mean(self, namespaces: Iterable[str]) -> None:
        """These and no others are meant."""
        before, self._meant = self._meant, set(namespaces)
        for left in before - self._meant:
            self._forget(left)
        self._wake({*before, *self._meant, *self._seen})

    def mean_also(self, namespace: str) -> None:
        self._meant.add(namespace)
        self._wake([namespace])

    def mean_no_more(self, namespace: str) -> None:
        self._meant.discard(namespace)
        self._forget(namespace)
        self._wake([namespace])

    def see(self, place: str, version: str | None) -> None:
        """What stands there now has this resourceVersion; None: nothing does."""
        if version is not None:
            self._seen[place] = version
        else:
            self._seen.pop(place, None)
        self._wake([place])

    def see_all(self, versions: Mapping[str, str], places: Iterable[str] | None = None) -> None:
        """Nothing else stands anywhere, or of `places` in none."""
        asked = [place for place in self._seen if place != CLUSTER] if places is None else places
        for place in {*asked, *versions}:
            self.see(place, versions.get(place))

    def await_lists(self, *lists: str) -> None:
        """Not all is well before these are `listed`."""
        self._unlisted.update(lists)

    def listed(self, what: str) -> None:
        self._unlisted.discard(what)
        self._report()

    @asynccontextmanager
    async def at_work(self, *, gives_up: bool = False) -> AsyncIterator[asyncio.TaskGroup]:
        """Attends to every place that something is owed to, until nothing is and nobody else works in the group.

        gives_up  on a fault that the same again would not mend
        """
        self._gives_up = gives_up
        async with asyncio.TaskGroup() as self._group:
            self._wake({*self._meant, *self._seen, CLUSTER})
            yield self._group

    @property
    def places(self) -> list[str]:
        """Where something was, or is still, to be done."""
        return sorted({*self._meant, *self._last, *self._busy} | ({CLUSTER} if self._trust_bundle else set()))

    def told(self, place: str) -> Told:
        return self._last.get(place) or Told(place, Outcome.FAILED, "no answer in time")

    def _report(self) -> None:
        """Says so if that everything stands has become true, or ceased to be."""
        ready = not self._unlisted and not any(map(self._is_owed, self._busy))
        if ready != self._was_ready:
            self._was_ready = ready
            self._ready(ready)

    def _forget(self, place: str) -> None:
        """Namespaces come and go, and this job stays."""
        for known in (self._settled, self._last, self._restored):
            known.pop(place, None)

    def _wake(self, places: Iterable[str]) -> None:
        if self._group is None:
            return
        for place in sorted(places):
            if place not in self._busy and self._is_owed(place):
                self._busy.add(place)
                self._group.create_task(self._attend(place))
        self._report()

    def _is_owed(self, place: str) -> bool:
        wanted = self._wanted(place)
        if wanted is None and not self._may_remove(place):
            return False
        return self._settled.get(place) != (wanted.digest if wanted else None, self._seen.get(place))

    def _wanted(self, place: str) -> Document | None:
        if place == CLUSTER:
            return self._trust_bundle
        return self._config_map if place in self._meant else None

    def _may_remove(self, place: str) -> bool:
        """A selector that suddenly means nothing is rather a mistake than a wish to end all trust."""
        return self._prune and bool(self._meant) and place in self._seen

    async def _attend(self, place: str) -> None:
        failures = 0
        try:
            while self._is_owed(place):
                try:
                    async with self._parallel:
                        told = await self._settle(place)
                except ApiFault as fault:
                    failures += 1
                    self._note(Told(place, Outcome.FAILED, str(fault)))
                    if self._gives_up and fault.is_final:
                        return
                    self._report()
                    await asyncio.sleep(max(self._pace.wait_s(failures), fault.retry_after_s))
                else:
                    failures = 0
                    self._note(told)
                    if told.outcome is Outcome.RESTORED:
                        await asyncio.sleep(self._pace.wait_s(self._quarrels(place)))
        finally:
            self._busy.discard(place)
            self._report()

    async def _settle(self, place: str) -> Told:
        """Looks, and writes what is owed. Raises ApiFault."""
        wanted, before = self._wanted(place), self._seen.get(place)
        if wanted is not None:
            outcome, because, version = await self._put(place, wanted)
        else:
            outcome, because, version = await self._take_away(place)
        if self._seen.get(place) == before:  # else a watch knows better than what we have just read
            if version is not None:
                self._seen[place] = version
            else:
                self._seen.pop(place, None)
        if version is None and wanted is None:
            self._settled.pop(place, None)
        else:
            self._settled[place] = (wanted.digest if wanted else None, version)
        return Told(place, outcome, because)

    async def _put(self, place: str, wanted: Document) -> tuple[Outcome, str, str | None]:
        path = wanted.place(place)
        found = await self._api.look(path)
        metadata = mapping(found.get("metadata")) if found is not None else {}
        version = text_of(metadata, "resourceVersion") if found is not None else None
        if found is not None and not is_ours(metadata):
            why = f"{path} is not ours; delete it, or choose another name with --name"
            return Outcome.REFUSED, why, version
        if found is not None and wanted.is_in(found):
            return Outcome.UNCHANGED, "", version
        stood = self._stood(place, wanted)
        try:
            # Fields of an object of ours are ours, also those that somebody edited: they are taken back, but only from
            # the very version that was looked at. Where there was nothing, what has come since is not overwritten.
            version = await self._api.apply(path, wanted.body(version), force=found is not None)
        except ApiFault as fault:
            if self._is_fixed or place == CLUSTER or not (fault.is_ending or fault.status == 404):
                raise
            return Outcome.GONE, "", version
        if stood:
            return Outcome.RESTORED, "it was changed" if found is not None else "it was deleted", version
        return Outcome.WRITTEN, "", version

    async def _take_away(self, place: str) -> tuple[Outcome, str, str | None]:
        assert self._config_map is not None, "a place is attended to once there is something to carry"
        path = self._config_map.place(place)
        found = await self._api.look(path)
        if found is None:
            return Outcome.GONE, "", None
        metadata = mapping(found.get("metadata"))
        if not is_ours(metadata):
            return Outcome.UNCHANGED, "", text_of(metadata, "resourceVersion")
        await self._api.delete(path, metadata)
        return Outcome.REMOVED, "", None

    def _stood(self, place: str, wanted: Document) -> bool:
        """Whether the very same was there already, as far as we know."""
        last, settled = self._last.get(place), self._settled.get(place)
        return last is not None and last.outcome in STANDS and settled is not None and settled[0] == wanted.digest

    def _quarrels(self, place: str) -> int:
        """How often it has been restored lately: a second job with another bundle would never give in either."""
        now = asyncio.get_running_loop().time()
        since, count = self._restored.get(place, (now, 0))
        count = count + 1 if now - since < QUARREL_S else 0
        self._restored[place] = (now, count)
        return count

    def _note(self, told: Told) -> None:
        last = self._last.get(told.place)
        if told.outcome is Outcome.UNCHANGED and last is not None and last.outcome in STANDS:
            return
        if told.outcome is not Outcome.GONE and (told != last or told.outcome in STANDS):
            self._tell(told)
        self._last[told.place] = told
