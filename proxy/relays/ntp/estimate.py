"""The time as several servers together say it: made of their samples, and read at any later moment. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from proxy.relays.ntp.sample import NS, PRECISION_S, History, Rate, Sample, bound_s, drift_s, fuse, offset_at
from proxy.relays.ntp.selection import Candidate, combine, select
from proxy.wire.ntp import Leap

MAX_DISTANCE_S = 3.0  # a server further from the truth helps nobody; RFC 5905 7.2 has 1 s, some domains' own are worse
MAX_STRATUM = 14  # of a server: our own is one more, and 16 is none


@dataclass(frozen=True, slots=True)
class Estimate:
    """POSIX time by our own clock.

    at_ns        our clock, when it was made
    stale_at_ns  our clock, when the servers have been silent for too long
    """

    at_ns: int
    offset_ns: int
    rate: Rate
    leap: Leap
    stratum: int
    root_delay_s: float
    root_dispersion_s: float
    stale_at_ns: int

    def posix_ns(self, now_ns: int) -> int:
        """POSIX time when our clock says `now_ns`."""
        return now_ns + self.offset_ns + round(self.rate.value * (now_ns - self.at_ns))

    def dispersion_s(self, now_ns: int) -> float:
        """How wrong it may be by then, beside what the way to the servers adds (half of `root_delay_s`)."""
        return self.root_dispersion_s + drift_s(max(now_ns - self.at_ns, 0) / NS, self.rate)

    def is_stale(self, now_ns: int) -> bool:
        """Nobody should go by it any more."""
        is_vague = self.root_delay_s / 2 + self.dispersion_s(now_ns) >= MAX_DISTANCE_S
        return is_vague or now_ns >= self.stale_at_ns


@dataclass(frozen=True, slots=True)
class Opinions[K]:
    """What became of each server's samples. A server in none of the sets has too few, or none that is fit."""

    estimate: Estimate | None = None
    survivors: tuple[K, ...] = ()
    outliers: tuple[K, ...] = ()
    false: tuple[K, ...] = ()
    undecided: tuple[K, ...] = ()  # fit, and no majority of them agrees


def weigh[K](
    histories: Mapping[K, History], now_ns: int, rate: Rate, prior: Rate, *, min_samples: int, stale_s: float
) -> Opinions[K]:
    """What the servers say together at `now_ns`.

    rate     our clock's, as far as it is known
    prior    what was known of it without any server
    stale_s  a server that was silent for longer has no say
    """
    fit = {
        key: best
        for key, history in histories.items()
        if len(history) >= min_samples and (best := _fit(history, now_ns, rate, stale_s)) is not None
    }
    if not fit:
        return Opinions()
    keys = tuple(fit)
    base_ns = offset_at(fit[keys[0]], now_ns, rate)
    candidates = [_candidate(histories[key], fit[key], base_ns, now_ns, rate) for key in keys]
    chosen = select(candidates)
    if not chosen.survivors:
        return Opinions(undecided=keys)
    survivors = tuple(keys[index] for index in chosen.survivors)
    return Opinions(
        _combine(
            [candidates[index] for index in chosen.survivors],
            [histories[key] for key in survivors],
            [fit[key] for key in survivors],
            base_ns,
            now_ns,
            prior,
            stale_s,
        ),
        survivors,
        tuple(keys[index] for index in chosen.outliers),
        tuple(keys[index] for index in chosen.false),
    )


def _fit(history: History, now_ns: int, rate: Rate, stale_s: float) -> Sample | None:
    """The best sample of a server that may have a say."""
    newest, best = history.newest, history.best(now_ns, rate)
    if newest is None or best is None or now_ns - newest.at_ns >= stale_s * NS or newest.stratum > MAX_STRATUM:
        return None
    return best if _root_distance_s(best, now_ns, rate) < MAX_DISTANCE_S else None


def _root_distance_s(sample: Sample, now_ns: int, rate: Rate) -> float:
    """By how much that server's time, as it reached us, may be wrong (RFC 5905 11.1)."""
    return sample.root_delay_s / 2 + sample.root_dispersion_s + bound_s(sample, now_ns, rate)


def _candidate(history: History, best: Sample, base_ns: int, now_ns: int, rate: Rate) -> Candidate:
    jitter_s = history.jitter_s(best, rate)
    offset_s = (offset_at(best, now_ns, rate) - base_ns) / NS
    return Candidate(offset_s, _root_distance_s(best, now_ns, rate) + jitter_s, jitter_s)


def _combine(
    candidates: list[Candidate],
    histories: list[History],
    samples: list[Sample],
    base_ns: int,
    now_ns: int,
    prior: Rate,
    stale_s: float,
) -> Estimate:
    """One estimate of the survivors', the closest of them first: it is the one that we are a stratum below."""
    offset_s, spread_s = combine(candidates)
    nearest, jitter_s = samples[0], candidates[0].jitter_s
    rates = [rate for history in histories if (rate := history.rate()) is not None]
    rate = fuse([prior, *rates])
    own_s = nearest.error_s + drift_s(max(now_ns - nearest.at_ns, 0) / NS, rate)
    return Estimate(
        at_ns=now_ns,
        offset_ns=base_ns + round(offset_s * NS),
        rate=rate,
        leap=_leap(samples),
        stratum=nearest.stratum + 1,
        root_delay_s=nearest.root_delay_s + nearest.delay_s,
        root_dispersion_s=nearest.root_dispersion_s + own_s + sqrt(jitter_s**2 + spread_s**2) + PRECISION_S,
        stale_at_ns=max(history.newest.at_ns for history in histories if history.newest) + round(stale_s * NS),
    )


def _leap(samples: list[Sample]) -> Leap:
    """What most of them announce."""
    announced = [sample.leap for sample in samples]
    return max(Leap, key=lambda leap: 2 * announced.count(leap) > len(announced))
