"""What one server has told so far: exchanges as samples, the best of them, and how fast our clock runs beside it. Pure.

Our clock counts nanoseconds from some moment on (the kernel's CLOCK_MONOTONIC_RAW); an offset is POSIX time less that
count. A rate is seconds by which it falls behind in a second. Points in time are arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from proxy.wire.ntp import Leap, Reply, UnusableReply, posix_ns

NS = 1_000_000_000
WINDOW = 8  # RFC 5905 10: samples among which the best is looked for
MEMORY = 16  # samples by which the rate is measured
PHI = 15e-6  # RFC 5905 7.2: by how much a clock is trusted to run wrong, in seconds a second
MAX_RATE = 500e-6  # a clock that is worse is broken
PRECISION_S = 1e-6  # of one reading of our clock
STEP_S = 0.128  # RFC 5905 11.3 STEPT: a difference that no network makes
CONFIRMATIONS = 3  # samples that agree on a step, before it is one
_FLOOR_S = 10e-6  # what a sample may be wrong by on the best of networks
_SHARE = 20  # and on others a twentieth of its delay


@dataclass(frozen=True, slots=True)
class Sample:
    """One exchange with a server.

    at_ns    our clock when the answer came
    error_s  what reading clocks adds to half the delay
    """

    at_ns: int
    offset_ns: int
    delay_s: float
    error_s: float
    leap: Leap
    stratum: int
    root_delay_s: float
    root_dispersion_s: float


@dataclass(frozen=True, slots=True)
class Rate:
    """By how much our clock falls behind, in seconds a second, and how wrong that may be (one standard deviation)."""

    value: float
    error: float


def measure(reply: Reply, sent_ns: int, received_ns: int) -> Sample:
    """The sample of one exchange, by our clock at both ends. Raises UnusableReply for times that cannot be."""
    receive_ns, transmit_ns = posix_ns(reply.receive), posix_ns(reply.transmit)
    delay_ns = (received_ns - sent_ns) - (transmit_ns - receive_ns)
    if delay_ns < -NS // 1000:  # the server claims to have taken longer than we waited
        raise UnusableReply("timestamps")
    delay_s = max(delay_ns, 0) / NS
    return Sample(
        at_ns=received_ns,
        offset_ns=((receive_ns - sent_ns) + (transmit_ns - received_ns)) // 2,
        delay_s=delay_s,
        error_s=2 * PRECISION_S + PHI * (received_ns - sent_ns) / NS,
        leap=reply.leap,
        stratum=reply.stratum,
        root_delay_s=reply.root_delay_s,
        root_dispersion_s=reply.root_dispersion_s,
    )


class History:
    """The newest samples of one server.

    A sample that is far from the last one is held back. If the next ones say the same, the server's clock was set and
    they replace what was known; if not, it is forgotten: one packet on a detour moves nobody's time.

    window  samples among which the best is looked for
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._samples: deque[Sample] = deque(maxlen=max(window, MEMORY))
        self._held: list[Sample] = []

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def is_in_doubt(self) -> bool:
        """Samples are held back: the next one says more."""
        return bool(self._held)

    @property
    def newest(self) -> Sample | None:
        return self._samples[-1] if self._samples else None

    def add(self, sample: Sample, rate: Rate) -> None:
        """Take in one more sample; `rate` is our clock's."""
        if not self._samples or _is_near(self._samples[-1], sample, rate):
            self._held.clear()
            self._samples.append(sample)
            return
        if self._held and not _is_near(self._held[-1], sample, rate):
            self._held.clear()
        self._held.append(sample)
        if len(self._held) >= CONFIRMATIONS:
            self._samples.clear()
            self._samples.extend(self._held)
            self._held.clear()

    def best(self, now_ns: int, rate: Rate) -> Sample | None:
        """The sample whose offset is known best at `now_ns`: a short delay counts for it, its age against it."""
        recent = list(self._samples)[-self._window :]
        return min(recent, key=lambda sample: bound_s(sample, now_ns, rate), default=None)

    def jitter_s(self, best: Sample, rate: Rate) -> float:
        """How much offsets differ from that of `best` (RFC 5905 10)."""
        others = [sample for sample in list(self._samples)[-self._window :] if sample is not best]
        if not others:
            return PRECISION_S
        squares = [((offset_at(other, best.at_ns, rate) - best.offset_ns) / NS) ** 2 for other in others]
        return max(PRECISION_S, sqrt(sum(squares) / len(squares)))

    def rate(self) -> Rate | None:
        """Our clock's rate by this server alone; None while there is too little to tell it from."""
        return fit(self._samples)


def bound_s(sample: Sample, now_ns: int, rate: Rate) -> float:
    """By how much the offset may be wrong now, as far as the way to the server and our own clock go."""
    age_s = max(now_ns - sample.at_ns, 0) / NS
    return sample.delay_s / 2 + sample.error_s + drift_s(age_s, rate)


def drift_s(age_s: float, rate: Rate) -> float:
    """By how much our clock may have gone wrong in that time."""
    return (PHI + rate.error) * age_s


def offset_at(sample: Sample, now_ns: int, rate: Rate) -> int:
    """The offset that the sample stands for by now, in nanoseconds."""
    return sample.offset_ns + round(rate.value * (now_ns - sample.at_ns))


def fit(samples: Sequence[Sample]) -> Rate | None:
    """The slope of the offsets over time, by weighted least squares.

    A sample with a long delay counts less. Residuals of three points say little, so no error is smaller than what the
    delays alone allow.
    """
    if len(samples) < 3:
        return None
    first = samples[0]
    shortest_s = min(sample.delay_s for sample in samples)
    points = [
        (
            (sample.at_ns - first.at_ns) / NS,
            (sample.offset_ns - first.offset_ns) / NS,
            1 / (_FLOOR_S + sample.delay_s / _SHARE + (sample.delay_s - shortest_s) / 2) ** 2,
        )
        for sample in samples
    ]
    weight = sum(w for _, _, w in points)
    x_mean = sum(w * x for x, _, w in points) / weight
    y_mean = sum(w * y for _, y, w in points) / weight
    spread = sum(w * (x - x_mean) ** 2 for x, _, w in points)
    if spread <= 0:
        return None
    slope = sum(w * (x - x_mean) * (y - y_mean) for x, y, w in points) / spread
    residual = sum(w * (y - y_mean - slope * (x - x_mean)) ** 2 for x, y, w in points)
    return Rate(slope, sqrt(max(1.0, residual / (len(points) - 2)) / spread))


def fuse(rates: Sequence[Rate]) -> Rate:
    """One rate of several, each weighed by how sure it is."""
    weight = sum(1 / rate.error**2 for rate in rates)
    value = sum(rate.value / rate.error**2 for rate in rates) / weight
    return Rate(min(max(value, -MAX_RATE), MAX_RATE), sqrt(1 / weight))


def _is_near(known: Sample, sample: Sample, rate: Rate) -> bool:
    difference_s = abs(offset_at(known, sample.at_ns, rate) - sample.offset_ns) / NS
    return difference_s <= STEP_S + bound_s(known, sample.at_ns, rate) + bound_s(sample, sample.at_ns, rate)
