"""Which servers to believe, and what they say together (RFC 5905 11.2). Pure: numbers in, numbers out.

A server says an offset and how wrong it may be at most, its root distance: the time lies in between, if it is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

MIN_SURVIVORS = 3  # RFC 5905 11.2.2 NMIN: clustering stops there
MIN_DISTANCE_S = 0.001  # two good clocks on one network must not call each other false over microseconds


@dataclass(frozen=True, slots=True)
class Candidate:
    """One server's opinion. Offsets are seconds from a point that all candidates share."""

    offset_s: float
    distance_s: float
    jitter_s: float = 0.0

    @property
    def reach_s(self) -> float:
        return max(self.distance_s, MIN_DISTANCE_S)


@dataclass(frozen=True, slots=True)
class Selection:
    """Candidates by index. `survivors`, the closest first, make the estimate; none: there is no majority.

    outliers  agree with the majority, and are too far off to help
    false     do not agree with it
    """

    survivors: tuple[int, ...] = ()
    outliers: tuple[int, ...] = ()
    false: tuple[int, ...] = ()


def select(candidates: Sequence[Candidate]) -> Selection:
    """Who is believed.

    As long as fewer than half of them are wrong, whatever these say, every survivor's offset is within twice the root
    distance of a server that is right.
    """
    interval = intersect(candidates)
    if interval is None:
        return Selection()
    low, high = interval
    agreeing = [index for index, one in enumerate(candidates) if low <= one.offset_s <= high]
    false = tuple(index for index in range(len(candidates)) if index not in agreeing)
    survivors = _cluster(candidates, sorted(agreeing, key=lambda index: candidates[index].reach_s))
    outliers = tuple(index for index in agreeing if index not in survivors)
    return Selection(tuple(survivors), outliers, false)


def intersect(candidates: Sequence[Candidate]) -> tuple[float, float] | None:
    """The smallest interval that holds the opinions of a majority (RFC 5905 11.2.1); None: there is no majority."""
    edges = [(one.offset_s - one.reach_s, 1) for one in candidates]
    edges += [(one.offset_s + one.reach_s, -1) for one in candidates]
    rising = sorted(edges, key=lambda edge: (edge[0], -edge[1]))
    falling = sorted(edges, key=lambda edge: (-edge[0], edge[1]))
    count = len(candidates)
    wrong = 0
    while 2 * wrong < count:
        low = _cross(rising, count - wrong)
        high = _cross([(at, -kind) for at, kind in falling], count - wrong)
        if low is not None and high is not None and low <= high:
            outside = sum(not low <= one.offset_s <= high for one in candidates)
            if outside <= wrong:
                return low, high
        wrong += 1
    return None


def _cross(edges: Sequence[tuple[float, int]], needed: int) -> float | None:
    """Where, walking over the edges, so many intervals are open for the first time."""
    opened = 0
    for at, kind in edges:
        opened += kind
        if opened >= needed:
            return at
    return None


def _cluster(candidates: Sequence[Candidate], survivors: list[int]) -> list[int]:
    """Drop who differs most from the others, while that is more than they differ from themselves (RFC 5905 11.2.2)."""
    left = list(survivors)
    while len(left) > MIN_SURVIVORS:
        spread = {index: _select_jitter_s(candidates, index, left) for index in left}
        worst = max(left, key=lambda index: spread[index] * candidates[index].reach_s)
        if spread[worst] <= min(candidates[index].jitter_s for index in left):
            break
        left.remove(worst)
    return left


def _select_jitter_s(candidates: Sequence[Candidate], index: int, among: Sequence[int]) -> float:
    own = candidates[index].offset_s
    return sqrt(sum((candidates[other].offset_s - own) ** 2 for other in among) / (len(among) - 1))


def combine(candidates: Sequence[Candidate]) -> tuple[float, float]:
    """The offset of several, each weighed by its distance, and how far they are from it (RFC 5905 11.2.3)."""
    weights = [1 / one.reach_s for one in candidates]
    total = sum(weights)
    offset_s = sum(weight * one.offset_s for weight, one in zip(weights, candidates, strict=True)) / total
    squares = sum(weight * (one.offset_s - offset_s) ** 2 for weight, one in zip(weights, candidates, strict=True))
    return offset_s, sqrt(squares / total)
