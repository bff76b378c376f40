"""What one worker notes, every other knows: rings in shared memory, whatever stands in them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.addresses import Address
from policies.hostnames import Hostname
from proxy.lookups_shared import MAX_ADDRESSES, REPEAT_S, SharedLookups
from proxy.rings import MAX_RECORD, SIZE, Rings, share_rings

FOUR, SIX = ip_address("192.0.2.1"), ip_address("2001:db8::1")
GIT, API = Hostname("git.example"), Hostname("api.example")
SPAN = SIZE + mmap.PAGESIZE


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Workers:
    """Workers of one gate, as many as are asked for; `number` may come again, in the place of a former one."""

    def __init__(self, count: int = 3) -> None:
        self.count = count
        self.clock = Clock()
        self._shared = share_rings(count)
        self.memory = mmap.mmap(self._shared, count * SPAN)

    def rings(self, number: int) -> Rings:
        return Rings(os.dup(self._shared), number, self.count)

    def worker(self, number: int) -> SharedLookups:
        return SharedLookups(self.rings(number), clock=self.clock)

    def close(self) -> None:
        self.memory.close()
        os.close(self._shared)


@pytest.fixture
def workers() -> Workers:
    return Workers()


def test_what_one_notes_all_know(workers: Workers) -> None:
    one, two, three = map(workers.worker, range(3))
    one.note("app", GIT, [FOUR], 1060)
    two.note("app", API, [FOUR, SIX], 1060)
    for each in (one, two, three):
        assert set(each.names_of("app", FOUR)) == {GIT, API}
        assert each.names_of("app", SIX) == (API,)
        assert each.names_of("other", FOUR) == ()


def test_a_name_is_known_everywhere_also_where_another_of_the_address_is_known(workers: Workers) -> None:
    """Of two names of a shared address the rule may be about the one that was asked for elsewhere."""
    one, two = workers.worker(0), workers.worker(1)
    two.note("app", API, [FOUR], 1060)
    assert two.names_of("app", FOUR) == (API,)
    one.note("app", GIT, [FOUR], 1060)
    assert two.names_of("app", FOUR) == (GIT, API)


def test_who_takes_the_place_of_another_knows_what_all_have_noted(workers: Workers) -> None:
    workers.worker(0).note("app", GIT, [FOUR], 1060)
    workers.worker(1).note("app", API, [SIX], 1060)
    again = workers.worker(0)
    assert (again.names_of("app", FOUR), again.names_of("app", SIX)) == ((GIT,), (API,))
    again.note("app", API, [FOUR], 1060)  # goes on where the former ended
    assert workers.worker(2).names_of("app", FOUR) == (API, GIT)


def test_names_count_until_their_time_everywhere(workers: Workers) -> None:
    one, two = workers.worker(0), workers.worker(1)
    one.note("app", GIT, [FOUR], 1060)
    workers.clock.now = 1059.9
    assert two.names_of("app", FOUR) == (GIT,)
    workers.clock.now = 1060
    assert two.names_of("app", FOUR) == ()


def test_a_longer_time_and_other_addresses_are_told_at_once_and_the_same_now_and_then(workers: Workers) -> None:
    one, ring = workers.worker(0), workers.rings(2)

    def told(addresses: list[Address], until: float) -> int:
        one.note("app", GIT, addresses, until)
        return len(list(ring.news()))

    assert [told([FOUR], 1060), told([FOUR], 1060), told([FOUR], 1050), told([SIX], 1060)] == [1, 0, 0, 1]
    assert [told([FOUR], 1060), told([FOUR], 1061), told([ip_address("192.0.2.2")], 1061)] == [0, 1, 1]
    workers.clock.now += REPEAT_S
    assert [told([SIX], 1060), told([SIX], 1060)] == [1, 0]


def test_workloads_that_are_gone_stay_forgotten_whoever_still_speaks_of_them(workers: Workers) -> None:
    one, two = workers.worker(0), workers.worker(1)
    one.note("gone", GIT, [FOUR], 1060)
    two.keep({"app"})
    one.note("gone", API, [FOUR], 1060)  # by a worker that judges by the former policy still
    one.note("app", API, [FOUR], 1060)
    assert (two.names_of("gone", FOUR), two.names_of("app", FOUR)) == ((), (API,))
    two.keep({"app", "gone"})
    assert two.names_of("gone", FOUR) == ()


def test_an_answer_with_very_many_addresses_is_told_whole(workers: Workers) -> None:
    many = [ip_address(f"2001:db8::{i:x}") for i in range(1, 2 * MAX_ADDRESSES)]
    workers.worker(0).note("w" * 128, Hostname("n" * 63 + ".example"), many, 1060)
    other = workers.worker(1)
    assert all(other.names_of("w" * 128, address) for address in many)


def test_who_falls_behind_loses_names_and_finds_no_others(workers: Workers) -> None:
    one, two = workers.worker(0), workers.worker(1)
    names = [Hostname(f"n{i}.example") for i in range(3 * SIZE // 60)]
    for number, name in enumerate(names):
        one.note("app", name, [ip_address(number + 1)], 1060)
    known = [number for number in range(len(names)) if two.names_of("app", ip_address(number + 1))]
    assert 0 < len(known) < len(names)
    assert known == list(range(known[0], len(names)))  # the newest, without a gap
    assert all(two.names_of("app", ip_address(number + 1)) == (names[number],) for number in known)


WRITER = """
import os, sys, time
from ipaddress import ip_address
from policies.hostnames import Hostname
from proxy.lookups_shared import SharedLookups
from proxy.rings import Rings
lookups = SharedLookups(Rings(int(sys.argv[1]), 0, 2))
end = time.monotonic() + 600
for number in range(1, 40_000):
    lookups.note("app", Hostname(f"n{number}.example"), [ip_address(number)], end)
"""


def test_a_reader_beside_a_writer_of_another_process_reads_whole_records() -> None:
    shared = share_rings(2)
    reader = SharedLookups(Rings(os.dup(shared), 1, 2), max_addresses=50_000)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(shared)], pass_fds=[shared]) as writing:
        while writing.poll() is None:
            reader.catch_up()
    reader.catch_up()
    assert writing.returncode == 0
    told = {number: reader.names_of("app", ip_address(number)) for number in range(1, 40_000)}
    assert {names for number, names in told.items() if names not in ((), (f"n{number}.example",))} == set()
    assert told[39_999] == ("n39999.example",)
    os.close(shared)


# --- whatever stands in a ring


@given(garbage=st.binary(min_size=1, max_size=600), place=st.integers(0, 600), head=st.integers(0, 2**64 - 1))
def test_garbage_gives_no_names_and_is_passed_over(garbage: bytes, place: int, head: int) -> None:
    workers = Workers(2)
    one, two = workers.worker(0), workers.worker(1)
    one.note("app", GIT, [FOUR], 1060)
    start = mmap.PAGESIZE + place
    workers.memory[start : start + len(garbage)] = garbage
    workers.memory[:8] = head.to_bytes(8, sys.byteorder)
    assert two.names_of("app", FOUR) in ((), (GIT,))
    assert {two.names_of("app", ip_address(number)) for number in range(1, 9)} == {()}
    third = workers.worker(0)  # its successor goes on
    third.note("app", API, [SIX], 1060)
    for _ in range(2):
        two.catch_up()
    third.note("app", API, [ip_address("2001:db8::2")], 1060)
    assert two.names_of("app", ip_address("2001:db8::2")) == (API,)
    workers.close()


@given(st.binary(max_size=300))
def test_a_record_that_no_worker_wrote_gives_nothing(record: bytes) -> None:
    workers = Workers(2)
    two = workers.worker(1)
    workers.rings(0).append(record)
    two.catch_up()
    assert two.names_of("app", FOUR) == ()
    workers.close()


def cut(memory: mmap.mmap) -> None:
    memory[mmap.PAGESIZE + 20] ^= 0xFF


def too_long(memory: mmap.mmap) -> None:
    memory[mmap.PAGESIZE : mmap.PAGESIZE + 4] = (MAX_RECORD + 1).to_bytes(4, sys.byteorder)


@pytest.mark.parametrize("spoil", [cut, too_long])
def test_a_spoilt_record_has_another_chance_and_ends_what_is_read_then(
    workers: Workers, spoil: Callable[[mmap.mmap], None]
) -> None:
    """On some machines the head is seen before what it stands for."""
    one, two = workers.worker(0), workers.worker(1)
    one.note("app", GIT, [FOUR], 1060)
    whole = workers.memory[:SPAN]
    spoil(workers.memory)
    assert two.names_of("app", FOUR) == ()
    workers.memory[:SPAN] = whole
    assert two.names_of("app", FOUR) == (GIT,)
    one.note("app", API, [FOUR], 1060)
    workers.memory[mmap.PAGESIZE : SPAN] = bytes(SIZE)
    assert two.names_of("app", FOUR) == (GIT,)
    one.note("app", API, [SIX], 1060)
    two.catch_up()  # passed over, with what came behind it
    one.note("app", GIT, [SIX], 1060)
    assert two.names_of("app", SIX) == (GIT,)


def test_a_record_is_bounded(workers: Workers) -> None:
    with pytest.raises(ValueError, match=f"{MAX_RECORD + 1} bytes"):
        workers.rings(0).append(bytes(MAX_RECORD + 1))
