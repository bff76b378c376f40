"""What servers can make the relay believe, and when it asks them: scripted servers on loopback, real sockets."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from dataclasses import replace

import pytest

from policies.hostnames import Hostname
from proxy.relays.ntp.clock import SO_TIMESTAMPNS, Jumps, KernelRate, Reading, arrived_ns, read
from proxy.relays.ntp.sample import MAX_RATE
from proxy.relays.ntp.source import PATIENCE, Failure, SourceState
from proxy.wire.ntp import build_query, timestamp
from tests.proxy.dns_gate import run
from tests.proxy.nameserver import unused_port
from tests.proxy.ntp_servers import (
    IMPATIENT,
    NS,
    PACE,
    RESTING,
    Script,
    ahead,
    answer,
    error_s,
    kiss,
    polling,
    right,
    silent,
    source_of,
    states,
    synchronised,
    time_server,
    until,
)

NEAR_S = 0.05  # the machine is loaded: a scripted server answers when it gets its turn

# --- asking servers


def test_three_answers_are_the_time() -> None:
    async def test() -> None:
        async with time_server() as server, polling({"one.example": [server.address]}, RESTING) as poller:
            estimate = await synchronised(poller)
            assert abs(error_s(estimate)) < NEAR_S
            assert estimate.stratum == 3
            assert len(server.received) == 3
            assert states(poller) == {"one.example": SourceState.SELECTED}

    run(test)


def test_a_server_that_is_ahead_is_believed_when_it_is_the_only_one() -> None:
    async def test() -> None:
        async with time_server(ahead(86_400)) as server, polling({"one.example": [server.address]}) as poller:
            assert error_s(await synchronised(poller)) == pytest.approx(86_400, abs=NEAR_S)

    run(test)


def test_every_query_is_the_same_but_for_its_cookie_and_its_port() -> None:
    async def test() -> None:
        async with time_server() as server, polling({"one.example": [server.address]}):
            await server.wait_for(8)
            cookies = {message[40:] for message in server.received}
            assert len(cookies) == len(server.received)
            assert {message[:40] for message in server.received} == {build_query(0)[:40]}
            assert len({port for _, port in server.sources}) > 1

    run(test)


LATER = timestamp(1_800_000_000 * NS)
NO_TIME: dict[str, tuple[Script, Failure]] = {
    "stratum 16": (lambda q: [answer(q, stratum=16)], Failure.UNUSABLE),
    "leap unknown": (lambda q: [answer(q, head=0xE4)], Failure.UNUSABLE),
    "root distance": (lambda q: [answer(q, dispersion=17 << 16)], Failure.UNUSABLE),
    "no times": (lambda q: [answer(q, times=(0, 0))], Failure.UNUSABLE),
    "sent before it came": (lambda q: [answer(q, times=(LATER, LATER - (1 << 32)))], Failure.UNUSABLE),
    "took an hour": (lambda q: [answer(q, times=(LATER, LATER + (3600 << 32)))], Failure.UNUSABLE),
    "unknown kiss": (kiss(b"ABCD"), Failure.KISS_OF_DEATH),
    "silence": (silent, Failure.TIMEOUT),
    "another cookie": (lambda q: [answer(q, origin=os.urandom(8))], Failure.TIMEOUT),
    "many other cookies": (lambda q: [answer(q, origin=os.urandom(8)) for _ in range(16)], Failure.FORGED),
    "our own query": (lambda q: [q], Failure.TIMEOUT),
    "an extension field": (lambda q: [answer(q) + bytes(16)], Failure.TIMEOUT),
    "a byte less": (lambda q: [answer(q)[:47]], Failure.TIMEOUT),
}  # fmt: skip


@pytest.mark.parametrize(("script", "failure"), NO_TIME.values(), ids=NO_TIME)
def test_an_answer_that_gives_no_time_is_counted_and_not_believed(script: Script, failure: Failure) -> None:
    async def test() -> None:
        async with time_server(script) as server, polling({"one.example": [server.address]}, IMPATIENT) as poller:
            source = source_of(poller, "one.example")
            await until(lambda: sum(source.tally.failures.values()) >= 2)
            assert set(source.tally.failures) == {failure}
            assert poller.estimate(read()) is None

    run(test)


def test_an_answer_from_somebody_else_is_none() -> None:
    """A connected socket: the kernel takes packets from the server's address and port alone."""

    async def test() -> None:
        async with time_server(silent) as server, polling({"one.example": [server.address]}, IMPATIENT) as poller:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:

                def answer_for_it(message: bytes) -> list[bytes]:
                    if server.sources:
                        stranger.sendto(answer(message), server.sources[-1])
                    return []

                server.script = answer_for_it
                source = source_of(poller, "one.example")
                await until(lambda: source.tally.failures[Failure.TIMEOUT] >= 2)
                assert poller.estimate(read()) is None

    run(test)


def test_a_late_answer_is_no_answer_to_the_next_question() -> None:
    async def test() -> None:
        waiting: list[bytes] = []

        def late(message: bytes) -> list[bytes]:
            sent, waiting[:] = list(waiting), [answer(message, ahead_s=1000)]
            return sent

        async with time_server(late) as server, polling({"one.example": [server.address]}, IMPATIENT) as poller:
            source = source_of(poller, "one.example")
            await until(lambda: source.tally.failures[Failure.TIMEOUT] >= 3)
            assert poller.estimate(read()) is None

    run(test)


def test_strays_before_the_answer_are_passed_over() -> None:
    async def test() -> None:
        def with_strays(message: bytes) -> list[bytes]:
            return [b"", os.urandom(48), answer(message, origin=os.urandom(8), ahead_s=99), answer(message)]

        async with time_server(with_strays) as server, polling({"one.example": [server.address]}) as poller:
            assert abs(error_s(await synchronised(poller))) < NEAR_S

    run(test)


def test_a_server_that_is_not_there_is_said_to_be_unreachable() -> None:
    async def test() -> None:
        async with polling({"one.example": [("127.0.0.1", unused_port())]}) as poller:
            source = source_of(poller, "one.example")
            await until(lambda: source.tally.failures[Failure.UNREACHABLE])
            assert states(poller)["one.example"] is SourceState.UNREACHABLE
            assert "connection refused" in source.fault

    run(test)


@pytest.mark.parametrize("code", [b"DENY", b"RSTR"])
def test_who_says_not_to_be_asked_is_never_asked_again(code: bytes) -> None:
    async def test() -> None:
        async with time_server(kiss(code)) as unwilling, time_server() as willing:
            names = {"one.example": [unwilling.address], "two.example": [willing.address]}
            async with polling(names) as poller:
                await willing.wait_for(10)
                assert len(unwilling.received) == 1
                assert states(poller)["one.example"] is SourceState.REFUSED

    run(test)


def test_another_address_is_asked_where_one_does_not_want_it() -> None:
    async def test() -> None:
        async with time_server(kiss(b"DENY")) as unwilling, time_server() as willing, time_server() as second:
            names = {"one.example": [unwilling.address, willing.address], "two.example": [second.address]}
            async with polling(names) as poller:
                await until(lambda: states(poller)["one.example"] is SourceState.SELECTED)
                assert source_of(poller, "one.example").address == willing.address

    run(test)


def test_who_says_rate_is_asked_less_often_for_good() -> None:
    async def test() -> None:
        async with time_server(kiss(b"RATE")) as server:
            pace = replace(PACE, max_exponent=-3)
            async with polling({"one.example": [server.address]}, pace) as poller:
                source = source_of(poller, "one.example")
                await server.wait_for(1)
                await until(lambda: source.exponent == -4)
                server.script = right
                await until(lambda: len(source.history) >= 2)
                server.script = silent
                assert source.exponent >= -4

    run(test)


def test_an_address_that_stays_silent_gives_way_to_another_of_its_name() -> None:
    async def test() -> None:
        async with time_server(silent) as dead, time_server() as alive, time_server() as other:
            names = {"one.example": [dead.address, alive.address], "two.example": [other.address]}
            async with polling(names, IMPATIENT) as poller:
                await until(lambda: states(poller)["one.example"] is SourceState.SELECTED)
                assert source_of(poller, "one.example").address == alive.address
                assert len(dead.received) == PATIENCE

    run(test)


def test_an_address_that_works_is_kept_whatever_the_name_says_by_now() -> None:
    async def test() -> None:
        async with time_server() as first, time_server() as second, time_server() as other:
            names = {"one.example": [first.address], "two.example": [other.address]}
            async with polling(names) as poller:
                await synchronised(poller)
                names["one.example"] = [second.address]
                await first.wait_for(10)
                assert second.received == []
                first.script = lambda message: [answer(message, stratum=16)]
                await second.wait_for(1)
                assert source_of(poller, "one.example").address == second.address

    run(test)


def test_a_name_alone_is_asked_at_several_addresses_and_names_together_at_one_each() -> None:
    async def test() -> None:
        async with time_server() as first, time_server() as second, time_server() as third:
            both = [first.address, second.address]
            async with polling({"one.example": both}, RESTING) as poller:
                await first.wait_for(3)
                await second.wait_for(3)
                assert {one.source.address for one in poller.standings()} == {*both, None}
            async with polling({"one.example": both, "two.example": [third.address]}, RESTING) as poller:
                await third.wait_for(3)
                assert len(poller.standings()) == 2

    run(test)


def test_a_name_without_addresses_is_looked_up_again() -> None:
    async def test() -> None:
        names: dict[str, list[tuple[str, int]]] = {"one.example": []}
        async with time_server() as server, polling(names) as poller:
            source = source_of(poller, "one.example")
            await until(lambda: source.fault)
            assert states(poller)["one.example"] is SourceState.UNRESOLVED
            names["one.example"] = [server.address]
            await synchronised(poller)

    run(test)


def test_a_name_that_the_policy_does_not_name_any_more_is_not_asked() -> None:
    async def test() -> None:
        named = {"one.example", "two.example"}
        async with time_server() as first, time_server() as second:
            names = {"one.example": [first.address], "two.example": [second.address]}
            async with polling(names, is_open=lambda name: name in named) as poller:
                await first.wait_for(3)
                named.discard("one.example")  # its rule has expired
                await until(lambda: source_of(poller, "one.example").address is None)
                asked = len(first.received)
                poller.follow([Hostname("two.example")])
                await second.wait_for(len(second.received) + 5)
                assert len(first.received) == asked
                assert set(states(poller)) == {"two.example"}

    run(test)


def test_a_name_that_is_added_leaves_the_time_as_it_is_and_one_that_is_gone_has_no_say() -> None:
    async def test() -> None:
        async with time_server() as first, time_server(ahead(300)) as second:
            names = {"one.example": [first.address]}
            async with polling(names) as poller:
                await synchronised(poller)
                names["two.example"] = [second.address]
                poller.follow([Hostname("one.example"), Hostname("two.example")])
                assert poller.estimate(read()) is not None
                await until(lambda: set(states(poller).values()) == {SourceState.UNDECIDED})
                assert abs(error_s(await synchronised(poller))) < NEAR_S  # as it was when nobody contradicted
                poller.follow([Hostname("two.example")])
                assert error_s(await synchronised(poller)) > 299

    run(test)


def test_a_fault_of_ours_in_one_poll_ends_nothing() -> None:
    async def test() -> None:
        faults = [RuntimeError("of ours")]

        def is_open(name: Hostname) -> bool:
            if faults:
                raise faults.pop()
            return True

        async with time_server() as server, polling({"one.example": [server.address]}, is_open=is_open) as poller:
            await synchronised(poller)
            assert not faults

    run(test)


# --- believing them


def test_a_false_one_of_three_is_named_and_not_believed() -> None:
    async def test() -> None:
        async with time_server() as a, time_server(ahead(300)) as liar, time_server() as b:
            names = {"one.example": [a.address], "two.example": [liar.address], "three.example": [b.address]}
            async with polling(names) as poller:
                await until(lambda: SourceState.FALSETICKER in states(poller).values())
                estimate = await synchronised(poller)
                assert states(poller)["two.example"] is SourceState.FALSETICKER
                assert abs(error_s(estimate)) < NEAR_S

    run(test)


def test_two_that_disagree_give_no_time_whoever_was_heard_first() -> None:
    async def test() -> None:
        async with (
            time_server() as a,
            time_server(ahead(300)) as b,
            polling({"one.example": [a.address], "two.example": [b.address]}) as poller,
        ):
            await until(lambda: set(states(poller).values()) == {SourceState.UNDECIDED})
            assert poller.estimate(read()) is None

    run(test)


def test_who_can_keep_the_others_silent_does_not_decide_alone() -> None:
    """One of three answers, and there is no time; one of two is what redundancy is for."""

    async def test() -> None:
        async with time_server(silent) as a, time_server(ahead(300)) as liar, time_server(silent) as c:
            names = {"one.example": [a.address], "two.example": [liar.address], "three.example": [c.address]}
            async with polling(names, IMPATIENT) as poller:
                await until(lambda: states(poller)["two.example"] is SourceState.SELECTED)
                await liar.wait_for(20)
                assert poller.estimate(read()) is None
                a.script = right
                await until(lambda: SourceState.UNDECIDED in states(poller).values())
                assert poller.estimate(read()) is None
                c.script = right
                assert abs(error_s(await synchronised(poller))) < NEAR_S
            async with polling({"one.example": [liar.address], "two.example": []}) as poller:
                assert error_s(await synchronised(poller)) > 299

    run(test)


def test_a_server_whose_clock_is_set_is_followed_after_three_answers_and_not_after_one() -> None:
    async def test() -> None:
        async with time_server() as server, polling({"one.example": [server.address]}) as poller:
            await synchronised(poller)
            server.script = ahead(10)
            asked = len(server.received)
            await server.wait_for(asked + 1)
            estimate = poller.estimate(read())
            assert estimate is not None
            assert abs(error_s(estimate)) < NEAR_S
            await until(lambda: error_s(poller.estimate(read()) or estimate) > 9)
            assert len(server.received) >= asked + 3

    run(test)


def test_one_answer_on_a_detour_moves_nothing() -> None:
    async def test() -> None:
        async with time_server() as server, polling({"one.example": [server.address]}) as poller:
            await synchronised(poller)
            wrong = [True]

            def once_wrong(message: bytes) -> list[bytes]:
                return [answer(message, ahead_s=10 if wrong and wrong.pop() else 0)]

            server.script = once_wrong
            asked = len(server.received)
            errors = []
            while len(server.received) < asked + 5:
                estimate = poller.estimate(read())
                assert estimate is not None
                errors.append(abs(error_s(estimate)))
                await asyncio.sleep(0.005)
            assert max(errors) < NEAR_S

    run(test)


def test_a_server_that_contradicts_itself_is_not_asked_in_haste_for_ever() -> None:
    async def test() -> None:
        times = itertools.count(step=1000)
        async with (
            time_server(lambda message: [answer(message, ahead_s=next(times))]) as server,
            time_server() as other,
            polling({"one.example": [server.address]}, RESTING),
            polling({"two.example": [other.address]}),
        ):
            await server.wait_for(1 + PATIENCE)
            await other.wait_for(len(other.received) + 20)  # half a second, and so many bursts could have been
            assert len(server.received) <= RESTING.burst + PATIENCE

    run(test)


def test_servers_that_fall_silent_leave_the_estimate_until_it_is_stale() -> None:
    async def test() -> None:
        async with time_server() as server, polling({"one.example": [server.address]}, IMPATIENT) as poller:
            estimate = await synchronised(poller)
            server.script = silent
            await until(lambda: states(poller)["one.example"] is not SourceState.SELECTED)
            kept = poller.estimate(read())
            assert kept is not None
            assert not kept.is_stale(read().own_ns)
            assert kept.is_stale(estimate.at_ns + 5000 * NS)

    run(test)


# --- clocks


def test_a_clock_that_is_set_has_all_measured_anew() -> None:
    async def test() -> None:
        async with time_server() as server, polling({"one.example": [server.address]}, RESTING) as poller:
            await synchronised(poller)
            now = read()
            assert poller.estimate(Reading(now.own_ns, now.machine_ns + 10 * NS)) is None
            assert poller.jumps == 1
            poller.look(read())  # it jumps back, too soon for another burst: who sets it must not have servers asked
            assert poller.jumps == 2
            await synchronised(poller)
            assert len(server.received) == 6

    run(test)


@pytest.mark.parametrize(("apart_s", "jumped"), [(0.1, 0.0), (-0.1, 0.0), (0.2, 0.2), (-3600.0, -3600.0)])
def test_a_jump_is_more_than_any_slewing(apart_s: float, jumped: float) -> None:
    jumps = Jumps(Reading(0, 5 * NS))
    assert jumps.look(Reading(NS, 6 * NS + round(apart_s * NS))) == pytest.approx(jumped)
    assert jumps.look(Reading(2 * NS, 7 * NS + round(apart_s * NS))) == 0.0


@pytest.mark.parametrize(("drift", "found"), [(0, 0.0), (40_000, 40e-6), (10**9, MAX_RATE)])
def test_the_kernels_idea_of_our_clock_is_what_there_is_at_first(drift: int, found: float) -> None:
    looks = iter([(0, 0), (NS, NS + drift)])
    values: list[int] = []

    def read_ns(clock: int) -> int:
        if not values:
            values.extend(next(looks))
        return values.pop(0)

    assert KernelRate(read_ns).rate().value == pytest.approx(found)


STAMPS: dict[str, tuple[int | None, int]] = {
    "a millisecond ago": (-1_000_000, -1_000_000),
    "now": (0, 0),
    "without a stamp": (None, 0),
    "from the future": (5_000_000, 0),
    "of an hour ago": (-3600 * NS, 0),
}


@pytest.mark.parametrize(("stamp", "came"), STAMPS.values(), ids=STAMPS)
def test_when_a_packet_came_is_told_by_our_own_clock(stamp: int | None, came: int) -> None:
    now = Reading(own_ns=77 * NS, machine_ns=1_800_000_000 * NS)
    ancillary = []
    if stamp is not None:
        seconds, ns = divmod(now.machine_ns + stamp, NS)
        content = seconds.to_bytes(8, "little") + ns.to_bytes(8, "little")
        ancillary = [(socket.SOL_SOCKET, SO_TIMESTAMPNS, content)]
    assert arrived_ns(ancillary, now) == now.own_ns + came
