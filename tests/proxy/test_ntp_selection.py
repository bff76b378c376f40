"""What samples and servers say together: tables of opinions, liars among them, and what no liar can do."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.relays.ntp.estimate import MAX_DISTANCE_S, Estimate, Opinions, weigh
from proxy.relays.ntp.sample import (
    MAX_RATE,
    NS,
    PHI,
    STEP_S,
    History,
    Rate,
    Sample,
    fit,
    fuse,
    measure,
    offset_at,
)
from proxy.relays.ntp.selection import MIN_DISTANCE_S, Candidate, Selection, combine, intersect, select
from proxy.wire.ntp import Leap, Reply, UnusableReply, timestamp

MS = 0.001
STILL = Rate(0.0, 0.0)
TRUTH = 1_795_000_000 * NS  # POSIX time when our own clock says 0


def sample(
    at_s: float = 0.0,
    error_ms: float = 0.0,
    *,
    delay_ms: float = 1.0,
    stratum: int = 2,
    leap: Leap = Leap.NONE,
    root_s: float = 0.0,
    drift: float = 0.0,
) -> Sample:
    """One that is wrong by `error_ms`, beside a clock that falls behind by `drift`."""
    offset_ns = TRUTH + round(error_ms * 1e6) + round(drift * at_s * NS)
    return Sample(round(at_s * NS), offset_ns, delay_ms * MS, 2e-6, leap, stratum, root_s, 0.0)


def history(*samples: Sample, window: int = 8) -> History:
    it = History(window)
    for one in samples:
        it.add(one, STILL)
    return it


def steady(error_ms: float = 0.0, *, count: int = 4, drift: float = 0.0, **rest: float) -> History:
    return history(*(sample(2.0 * number, error_ms, drift=drift, **rest) for number in range(count)))  # type: ignore[arg-type]  # numbers alone


def opinions(*histories: History, now_s: float = 8.0, rate: Rate = STILL, stale_s: float = 4096.0) -> Opinions[int]:
    prior = Rate(rate.value, 30e-6)
    return weigh(dict(enumerate(histories)), round(now_s * NS), rate, prior, min_samples=3, stale_s=stale_s)


def error_s(estimate: Estimate | None, now_s: float = 8.0) -> float:
    """By how much it is wrong then."""
    assert estimate is not None
    now_ns = round(now_s * NS)
    return (estimate.posix_ns(now_ns) - TRUTH - now_ns) / NS


# --- one exchange


def reply(receive_ns: int, transmit_ns: int) -> Reply:
    return Reply(Leap.NONE, 2, 0.01, 0.02, timestamp(receive_ns), timestamp(transmit_ns))


def test_offset_and_delay_of_an_exchange() -> None:
    """Sent at 0 of our clock, 3 ms on the way, 1 ms with the server, 3 ms back."""
    found = measure(reply(TRUTH + 3_000_000, TRUTH + 4_000_000), 0, 7_000_000)
    assert found.offset_ns == pytest.approx(TRUTH, abs=2)
    assert found.delay_s == pytest.approx(0.006)
    assert found.at_ns == 7_000_000


def test_a_way_that_is_longer_there_than_back_costs_half_the_difference() -> None:
    found = measure(reply(TRUTH + 6_000_000, TRUTH + 6_000_000), 0, 8_000_000)
    assert (found.offset_ns - TRUTH) / NS == pytest.approx(0.002)
    assert abs(found.offset_ns - TRUTH) / NS <= found.delay_s / 2


def test_a_server_that_took_longer_than_we_waited_lies() -> None:
    with pytest.raises(UnusableReply):
        measure(reply(TRUTH, TRUTH + NS), 0, 7_000_000)


# --- one server


def test_the_shortest_delay_is_believed() -> None:
    """RFC 5905 10: queues make samples late, never early."""
    it = history(sample(0, 0.1, delay_ms=1), sample(2, 20, delay_ms=45), sample(4, 9, delay_ms=20))
    best = it.best(6 * NS, STILL)
    assert best is not None
    assert best.delay_s == MS


def test_age_outweighs_a_delay_in_the_end() -> None:
    it = history(sample(0, delay_ms=1), sample(3000, delay_ms=30))
    best = it.best(3001 * NS, STILL)
    assert best is not None
    assert best.at_ns == 3000 * NS  # 45 ms of drift are possible since the other


def test_only_the_window_is_looked_at() -> None:
    it = history(sample(0, delay_ms=0.1), *(sample(n, delay_ms=5) for n in range(1, 9)))
    best = it.best(9 * NS, STILL)
    assert best is not None
    assert best.delay_s == pytest.approx(0.005)


def test_one_sample_from_far_away_is_held_back_and_forgotten() -> None:
    it = steady()
    doubts = []
    for one in (sample(8, 700), sample(10, 0)):
        it.add(one, STILL)
        doubts.append(it.is_in_doubt)
    assert doubts == [True, False]
    assert len(it) == 5


def test_a_server_whose_clock_was_set_is_followed_once_it_says_so_three_times() -> None:
    it = steady()
    for number in range(2):
        it.add(sample(8 + number, 700), STILL)
        newest = it.newest
        assert newest is not None
        assert newest.offset_ns == TRUTH
    it.add(sample(10, 700), STILL)
    newest = it.newest
    assert newest is not None
    assert newest.offset_ns == TRUTH + 700_000_000
    assert len(it) == 3  # nothing of before is left to be mixed with it


def test_samples_that_contradict_each_other_confirm_no_step() -> None:
    it = steady()
    for number in range(9):
        it.add(sample(8 + number, 700 if number % 2 else -700), STILL)
    newest = it.newest
    assert newest is not None
    assert newest.offset_ns == TRUTH


@given(st.integers(-10_000, 10_000).filter(lambda ms: abs(ms) > STEP_S * 1000 + 10))
def test_no_single_sample_moves_anything(wrong_ms: int) -> None:
    it = steady()
    before = it.best(8 * NS, STILL)
    it.add(sample(8, wrong_ms, delay_ms=0.001), STILL)
    assert it.best(8 * NS, STILL) == before


# --- our clock's rate


@pytest.mark.parametrize("drift", [0.0, 50e-6, -200e-6])
def test_the_rate_of_our_clock_is_found(drift: float) -> None:
    found = fit([sample(64.0 * number, drift=drift) for number in range(8)])
    assert found is not None
    assert found.value == pytest.approx(drift, abs=1e-9)
    assert found.error < 1e-6


def test_few_samples_in_a_short_time_say_little_about_the_rate() -> None:
    noise = random.Random(1)
    found = fit([sample(2.0 * number, noise.uniform(-1, 1), delay_ms=20) for number in range(3)])
    assert found is not None
    assert found.error > 100e-6
    assert abs(fuse([Rate(0.0, 30e-6), found]).value) < 30e-6  # so what was known before prevails


def test_samples_of_one_moment_say_nothing_about_the_rate() -> None:
    assert fit([sample(), sample(), sample()]) is None
    assert fit([sample(), sample(1)]) is None


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(1e-9, 1)), min_size=1, max_size=8))
def test_no_rates_together_say_that_a_clock_is_broken(rates: list[tuple[float, float]]) -> None:
    fused = fuse([Rate(*rate) for rate in rates])
    assert abs(fused.value) <= MAX_RATE
    assert fused.error <= min(error for _, error in rates) * (1 + 1e-9)  # sums of floats


# --- several servers

A, B, C, D = (Candidate(offset, 0.010) for offset in (0.000, 0.002, -0.003, 0.001))
FAR, FARTHER = Candidate(1.0, 0.010), Candidate(-5.0, 0.010)

CHOICES: dict[str, tuple[Sequence[Candidate], Selection]] = {
    "nobody": ((), Selection()),
    "one": ((A,), Selection((0,))),
    "two that agree": ((A, B), Selection((0, 1))),
    "two that do not": ((A, FAR), Selection()),
    "three that agree": ((A, B, C), Selection((0, 1, 2))),
    "one of three is false": ((A, FAR, B), Selection((0, 2), false=(1,))),
    "two of four are false": ((A, FAR, B, FARTHER), Selection()),
    "two of four are false together": ((A, FAR, B, FAR), Selection()),
    "one of four is false": ((A, B, FAR, C), Selection((0, 1, 3), false=(2,))),
    "two of five are false": ((A, FAR, B, FARTHER, C), Selection((0, 2, 4), false=(1, 3))),
    "three that all differ": ((A, FAR, FARTHER), Selection()),
    "one that knows nothing": ((Candidate(2.9, 3.0), A, B), Selection((1, 2), false=(0,))),
    "the closest first": ((replace(A, distance_s=0.5), B, replace(C, distance_s=0.02)), Selection((1, 2, 0))),
    "microseconds apart": ((Candidate(0, 1e-5), Candidate(5e-4, 1e-5), Candidate(-4e-4, 1e-5)), Selection((0, 1, 2))),
}


@pytest.mark.parametrize(("candidates", "selection"), CHOICES.values(), ids=CHOICES)
def test_who_is_believed(candidates: Sequence[Candidate], selection: Selection) -> None:
    assert select(candidates) == selection


def test_an_outlier_agrees_and_is_left_out() -> None:
    """RFC 5905 11.2.2: it differs from the others by more than they do from themselves."""
    good = [Candidate(offset * MS, 0.05, jitter_s=0.1 * MS) for offset in (0.0, 0.1, -0.1)]
    found = select([*good, Candidate(30 * MS, 0.05, jitter_s=0.1 * MS)])
    assert sorted(found.survivors) == [0, 1, 2]
    assert found.outliers == (3,)


offsets = st.floats(-10, 10, allow_subnormal=False)
distances = st.floats(1e-6, 3, allow_subnormal=False)


@st.composite
def electorates(draw: st.DrawFn) -> tuple[list[Candidate], float]:
    """Servers of which a majority is right about a time of 0, in any order; and how wrong those may be."""
    right = draw(st.lists(st.tuples(distances, st.floats(-1, 1)), min_size=1, max_size=6))
    honest = [Candidate(share * distance, distance) for distance, share in right]
    liars = draw(st.lists(st.builds(Candidate, offsets, distances), max_size=len(honest) - 1))
    return draw(st.permutations([*honest, *liars])), max(one.reach_s for one in honest)


@given(electorates())
def test_a_minority_of_liars_never_moves_the_time_by_more_than_twice_what_an_honest_server_may_be_wrong(
    electorate: tuple[list[Candidate], float],
) -> None:
    candidates, honest_s = electorate
    survivors = [candidates[index] for index in select(candidates).survivors]
    assume(survivors)
    offset_s, _ = combine(survivors)
    assert abs(offset_s) <= 2 * honest_s + 1e-9
    assert all(abs(one.offset_s) <= 2 * honest_s + 1e-9 for one in survivors)


@given(st.lists(st.builds(Candidate, offsets, distances), max_size=7))
def test_an_interval_holds_the_opinions_of_a_majority(candidates: list[Candidate]) -> None:
    """RFC 5905 11.2.1, said plainly: more than half of the middles are in it."""
    interval = intersect(candidates)
    if interval is None:
        return
    low, high = interval
    assert low <= high
    assert 2 * sum(low <= one.offset_s <= high for one in candidates) > len(candidates)


@given(st.lists(st.builds(Candidate, offsets, distances), min_size=1, max_size=7), st.randoms())
def test_the_order_of_servers_means_nothing(candidates: list[Candidate], chance: random.Random) -> None:
    mixed = list(candidates)
    chance.shuffle(mixed)
    assert intersect(mixed) == intersect(candidates)


@given(st.lists(st.builds(Candidate, offsets, distances), max_size=7))
def test_every_server_is_one_of_three(candidates: list[Candidate]) -> None:
    found = select(candidates)
    named = sorted((*found.survivors, *found.outliers, *found.false))
    assert named == (list(range(len(candidates))) if found.survivors else [])


def test_the_closer_server_counts_more() -> None:
    offset_s, spread_s = combine([Candidate(0.0, 0.001), Candidate(0.010, 0.1)])
    assert offset_s < 0.0002
    assert 0 < spread_s < 0.010


def test_two_good_clocks_do_not_call_each_other_false_over_microseconds() -> None:
    assert Candidate(0.0, 1e-6).reach_s == MIN_DISTANCE_S


# --- the estimate


def test_three_servers_make_one_time() -> None:
    found = opinions(steady(0.2), steady(-0.1), steady(0.1))
    assert sorted(found.survivors) == [0, 1, 2]
    assert abs(error_s(found.estimate)) < 0.3 * MS
    assert found.estimate is not None
    assert found.estimate.stratum == 3


def test_a_false_one_of_three_is_named_and_has_no_say() -> None:
    found = opinions(steady(0.2), steady(90_000), steady(-0.1))
    assert (sorted(found.survivors), found.false) == ([0, 2], (1,))
    assert abs(error_s(found.estimate)) < 0.3 * MS


def test_two_that_disagree_make_no_time() -> None:
    found = opinions(steady(0), steady(5000))
    assert (found.estimate, sorted(found.undecided)) == (None, [0, 1])


UNFIT = {
    "too few samples": steady(count=2),
    "none": history(),
    "stratum 15": steady(stratum=15),
    "root distance": steady(root_s=2 * MAX_DISTANCE_S),
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT)
def test_a_server_that_is_not_fit_has_no_say(unfit: History) -> None:
    assert opinions(unfit) == Opinions()


def test_a_server_that_is_silent_for_long_has_no_say_any_more() -> None:
    assert opinions(steady(), now_s=4000).estimate
    assert opinions(steady(), now_s=4200) == Opinions()


def test_the_time_goes_on_by_the_rate_that_was_found() -> None:
    it = history(*(sample(64.0 * number, drift=80e-6) for number in range(8)))
    found = opinions(it, now_s=450, rate=Rate(80e-6, 1e-6)).estimate
    assert found is not None
    then_ns = 1474 * NS  # a thousand seconds later
    truth_ns = TRUTH + then_ns + round(80e-6 * 1474 * NS)
    assert abs(found.posix_ns(then_ns) - truth_ns) / NS < 2 * MS  # 80 ms without


def test_dispersion_grows_with_age_and_the_estimate_gets_stale() -> None:
    found = opinions(steady()).estimate
    assert found is not None
    soon, later = found.dispersion_s(8 * NS), found.dispersion_s(1008 * NS)
    assert later - soon >= 1000 * PHI
    assert not found.is_stale(4000 * NS)
    assert found.is_stale(4103 * NS)


def test_the_root_distance_of_the_nearest_server_is_passed_on() -> None:
    found = opinions(steady(root_s=0.5)).estimate
    assert found is not None
    assert found.root_delay_s == pytest.approx(0.501)
    assert found.root_dispersion_s > 0


def test_a_leap_is_announced_when_most_announce_it() -> None:
    announcing = history(*(sample(2.0 * number, leap=Leap.INSERT) for number in range(4)))
    found = opinions(announcing, announcing, steady()).estimate
    assert found is not None
    assert found.leap is Leap.INSERT
    found = opinions(announcing, steady(), steady()).estimate
    assert found is not None
    assert found.leap is Leap.NONE


@given(st.lists(st.floats(-100_000, 100_000), min_size=0, max_size=2), st.floats(-5, 5))
def test_two_liars_among_five_move_the_time_by_no_more_than_the_honest_differ(lies: list[float], noise: float) -> None:
    found = opinions(steady(noise), steady(-noise), steady(0), *(steady(ms, delay_ms=0.001) for ms in lies))
    assume(found.estimate)
    assert abs(error_s(found.estimate)) <= 2 * (0.0005 + MIN_DISTANCE_S + 0.010)


def test_an_offset_is_carried_to_another_moment_by_the_rate() -> None:
    assert offset_at(sample(), 1000 * NS, Rate(10e-6, 0.0)) == TRUTH + 10_000_000
