"""For whom each element is open: the memory of the opener. It knows no kernel and no policy.

A claim outlives its time while a connection under it lives, so that a policy that forbids it later can cut that one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

from policies.hostnames import Hostname
from proxy.elements import Element

MAX_OF_SOURCE = 2_048  # elements; a workload has as many sources as its prefix has addresses
MAX_OF_WORKLOAD = 8_192  # so that it does not take the sets (ruleset.MAX_ELEMENTS) from the others


@dataclass(frozen=True, slots=True)
class Claim:
    """`element` is open because this workload's lookup of `name` gave its address."""

    workload: str
    name: Hostname
    element: Element


class Claims:
    """Claims by element, each until a time of `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[Element, dict[tuple[str, Hostname], float]] = {}
        self._of_source: Counter[object] = Counter()
        self._of_workload: Counter[str] = Counter()

    def __contains__(self, element: object) -> bool:
        return element in self._until

    def __iter__(self) -> Iterator[Claim]:
        return (Claim(*whose, element) for element, claims in self._until.items() for whose in claims)

    def times(self, *requests: Iterable[tuple[Claim, float]]) -> dict[Element, float] | None:
        """For how long each element has to be open once the claims of these requests are added, in seconds.

        None: a workload, or a source, would have more than it may. Counted before each request, so that by one somebody
        gets a little more.
        """
        now = self._clock()
        times_s: dict[Element, float] = {}
        of_source, of_workload = Counter[object](), Counter[str]()  # of the requests before
        for wanted in requests:
            fresh = set[Claim]()
            for claim, time_s in wanted:
                known = self._until.get(claim.element, {})
                if (claim.workload, claim.name) not in known:
                    if not self._has_room(claim, of_source, of_workload):
                        return None
                    fresh.add(claim)
                left = max(known.values(), default=now) - now
                times_s[claim.element] = max(time_s, left, times_s.get(claim.element, 0.0))
            of_source.update(claim.element.source for claim in fresh)
            of_workload.update(claim.workload for claim in fresh)
        return times_s

    def _has_room(self, claim: Claim, of_source: Counter[object], of_workload: Counter[str]) -> bool:
        source, workload = claim.element.source, claim.workload
        return (
            self._of_source[source] + of_source[source] < MAX_OF_SOURCE
            and self._of_workload[workload] + of_workload[workload] < MAX_OF_WORKLOAD
        )

    def add(self, claim: Claim, time_s: float) -> None:
        """It holds for so long from now, or longer if it did."""
        claims = self._until.setdefault(claim.element, {})
        whose, until = (claim.workload, claim.name), self._clock() + time_s
        if whose not in claims:
            self._of_source[claim.element.source] += 1
            self._of_workload[claim.workload] += 1
        claims[whose] = max(until, claims.get(whose, until))

    def drop(self, claim: Claim) -> bool:
        """Whether nobody claims its element any more."""
        claims = self._until.get(claim.element)
        if claims is None or claims.pop((claim.workload, claim.name), None) is None:
            return False
        _less(self._of_source, claim.element.source)
        _less(self._of_workload, claim.workload)
        if not claims:
            del self._until[claim.element]
        return not claims

    def open(self) -> dict[Element, float]:
        """The elements whose time is not over, with the seconds that are left."""
        now = self._clock()
        left = ((element, max(claims.values()) - now) for element, claims in self._until.items())
        return {element: time_s for element, time_s in left if time_s > 0}

    def forget_ended(self, living: Container[Element]) -> None:
        """Drop claims whose time is over, but for elements under which a connection lives."""
        now = self._clock()
        ended = [
            Claim(*whose, element)
            for element, claims in self._until.items()
            if element not in living
            for whose, until in claims.items()
            if until <= now
        ]
        for claim in ended:
            self.drop(claim)


def _less[T](counts: Counter[T], of: T) -> None:
    counts[of] -= 1
    if counts[of] <= 0:
        del counts[of]
