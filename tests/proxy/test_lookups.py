"""The names a workload was told for an address: per workload, for their time, bounded."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from policies.hostnames import Hostname
from proxy.lookups import MAX_NAMES, Lookups

NAME = Hostname("api.example")
FIRST, SECOND, THIRD = (ip_address(f"192.0.2.{i}") for i in (1, 2, 3))


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_address_has_the_names_this_workload_was_told_it_for() -> None:
    lookups = Lookups(clock=Clock())
    lookups.note("a", Hostname("one.example"), [FIRST], 1060)
    lookups.note("a", Hostname("two.example"), [FIRST], 1060)
    lookups.note("b", Hostname("three.example"), [FIRST], 1060)
    assert lookups.names_of("a", FIRST) == ("two.example", "one.example")
    assert lookups.names_of("b", FIRST) == ("three.example",)
    assert lookups.names_of("c", FIRST) == ()
    assert lookups.names_of("a", SECOND) == ()


def test_a_name_counts_until_its_time_and_a_later_lookup_never_shortens_it() -> None:
    clock = Clock()
    lookups = Lookups(clock=clock)
    lookups.note("a", NAME, [FIRST], 1060)
    lookups.note("a", NAME, [FIRST], 1010)
    clock.now = 1059.9
    assert lookups.names_of("a", FIRST) == (NAME,)
    clock.now = 1060
    assert lookups.names_of("a", FIRST) == ()


def test_lookups_are_bounded_for_each_workload() -> None:
    lookups = Lookups(clock=Clock(), max_addresses=2)
    lookups.note("other", NAME, [FIRST], 1060)
    lookups.note("a", NAME, [FIRST, SECOND, THIRD], 1060)
    assert [lookups.names_of("a", each) for each in (FIRST, SECOND, THIRD)] == [(), (NAME,), (NAME,)]
    assert lookups.names_of("other", FIRST) == (NAME,)
    for i in range(MAX_NAMES + 5):
        lookups.note("a", Hostname(f"n{i}.example"), [THIRD], 1060)
    told = lookups.names_of("a", THIRD)
    assert (len(told), told[0], told[-1]) == (MAX_NAMES, f"n{MAX_NAMES + 4}.example", "n5.example")
