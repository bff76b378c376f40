"""What clients get from the relay, and that nothing of theirs goes further: real sockets, a real policy."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.record import Record
from proxy.relays.ntp.clock import read
from proxy.relays.ntp.records import MAX_KINDS, PacketRecords
from proxy.relays.ntp.server import ClientLimits, Drop
from proxy.relays.ntp.source import Pace
from proxy.wire.ntp import build_query, posix_ns
from tests.proxy.dns_gate import run
from tests.proxy.ntp_servers import (
    IMPATIENT,
    NS,
    RESTING,
    Serving,
    ahead,
    ask,
    client,
    polling,
    query,
    serving,
    silent,
    synchronised,
    time_server,
    told,
    until,
)

NEAR_S = 0.05  # the machine is loaded: a scripted server answers when it gets its turn

# --- clients


def test_a_client_is_given_the_time() -> None:
    async def test() -> None:
        async with time_server(ahead(1000)) as server, polling({"one.example": [server.address]}, RESTING) as poller:
            await synchronised(poller)
            async with serving(poller) as s:
                before = read().machine_ns
                got = told(await ask(s.port, query(0x1B, b"my nonce")))
                after = read().machine_ns
                assert (got.leap, got.version, got.mode, got.stratum) == (0, 3, 4, 3)
                assert (got.reference_id, got.cookie) == (b"GATE", b"my nonce")
                times = [posix_ns(one) - 1000 * NS for one in (got.receive, got.transmit)]
                assert before - NEAR_S * NS <= times[0] <= times[1] <= after + NEAR_S * NS
                record = s.only_record()
                assert (record["verdict"], record["reason"], record["rule"]) == ("allow", "rule", "test.yaml:7 (clock)")
                assert (record["stage"], record["workload"], record["ntp.packets"]) == ("ntp", "app", 1)
                assert (record["destination.address"], record["destination.port"]) == ("127.0.0.1", s.port)

    run(test)


def test_a_client_is_told_when_the_time_is_not_known() -> None:
    async def test() -> None:
        async with serving() as s:
            message = await ask(s.port, query(cookie=b"my nonce"))
            got = told(message)
            assert (got.leap, got.stratum, got.reference_id) == (3, 16, bytes(4))
            assert (got.receive, got.transmit, got.cookie) == (0, 0, b"my nonce")

    run(test)


def test_a_client_is_told_when_the_time_is_stale() -> None:
    async def test() -> None:
        async with time_server() as server:
            pace = replace(RESTING, stale_s=1.0)
            async with polling({"one.example": [server.address]}, pace) as poller:
                estimate = await synchronised(poller)
                await until(lambda: estimate.is_stale(read().own_ns))
                async with serving(poller) as s:
                    got = told(await ask(s.port))
                    assert (got.leap, got.stratum) == (3, 16)
                    assert got.transmit  # a client that looks at neither is not sent to 1900

    run(test)


@pytest.mark.parametrize(
    ("host", "at"),
    [("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "127.53.53.53"), ("::1", "::1"), ("::", "::1"), ("::", "127.0.0.1")],
    ids=["any, asked at 127.0.0.1", "any, asked at 127.53.53.53", "v6", "any v6", "IPv4 by the v6 socket"],
)
def test_an_answer_comes_from_the_address_that_was_asked(host: str, at: str) -> None:
    async def test() -> None:
        async with serving(host=host) as s:
            assert told(await ask(s.port, source="::1" if ":" in at else "127.0.0.1", at=at)).mode == 4
            assert s.only_record()["workload"] == "app"
            assert str(s.only_record()["destination.address"]).removeprefix("::ffff:") == at

    run(test)


DENIED = {
    "unknown workload": ("127.0.0.9", "unknown", "unknown_workload"),
    "no ntp rule": ("127.0.0.2", "other", "no_rule"),
    "expired rule": ("127.0.0.3", "late", "expired"),
}


async def is_silent(port: int, message: bytes, *, source: str = "127.0.0.1") -> bool:
    """Whether nothing comes back, although a query of another client after it is answered."""
    async with client(port, source=source) as sock:
        sock.send(message)
        await ask(port)
        try:
            sock.recv(1024)
        except BlockingIOError:
            return True
        return False


@pytest.mark.parametrize(("source", "workload", "reason"), DENIED.values(), ids=DENIED)
def test_who_has_no_rule_gets_no_answer_and_is_recorded(source: str, workload: str, reason: str) -> None:
    async def test() -> None:
        async with serving(host="0.0.0.0") as s:
            assert await is_silent(s.port, query(), source=source)
            denied = s.records[0]
            assert (denied["verdict"], denied["workload"], denied["reason"]) == ("deny", workload, reason)
            assert s.relay.drops == {Drop.DENIED: 1}

    run(test)


def test_audit_mode_answers_and_says_what_it_would_have_done() -> None:
    async def test() -> None:
        async with serving(host="0.0.0.0") as s:
            assert told(await ask(s.port, source="127.0.0.4")).mode == 4
            record = s.only_record()
            assert (record["verdict"], record["would_be"], record["reason"]) == ("allow", "deny", "no_rule")

    run(test)


def test_an_address_that_nobody_may_reach_is_not_answered_for() -> None:
    """The kernel led it here; a workload's destination it is not."""

    async def test() -> None:
        async with serving(is_own=lambda address, port: str(address) == "127.0.0.1", host="0.0.0.0") as s:
            async with client(s.port, at="127.7.7.7") as sock:
                sock.send(query())
                await ask(s.port)
                with pytest.raises(BlockingIOError):
                    sock.recv(1024)
            assert s.records[0]["reason"] == "never_reached"

    run(test)


HOSTILE = {
    "mode 6, control": (b"\x26\x02" + bytes(46), "mode 6", Drop.MODE),
    "mode 6, short": (b"\x16\x02\x00\x01" + bytes(8), "length", Drop.LENGTH),
    "mode 7, monlist": (b"\x17\x00\x03\x2a" + bytes(4), "length", Drop.LENGTH),
    "mode 7, monlist, long": (b"\x17\x00\x03\x2a" + bytes(44), "mode 7", Drop.MODE),
    "symmetric active": (query(0x21), "mode 1", Drop.MODE),
    "symmetric passive": (query(0x22), "mode 2", Drop.MODE),
    "server": (query(0x24), "mode 4", Drop.MODE),
    "broadcast": (query(0x25), "mode 5", Drop.MODE),
    "version 1": (query(0x0B), "version 1", Drop.VERSION),
    "version 2": (query(0x13), "version 2", Drop.VERSION),
    "extension field of 1 KB": (query() + b"\x01\x04\x04\x00" + b"LEAK" * 255, "length", Drop.LENGTH),
    "a MAC": (query() + bytes(20), "length", Drop.LENGTH),
    "empty": (b"", "length", Drop.LENGTH),
    "one byte": (b"\x23", "length", Drop.LENGTH),
}


@pytest.mark.parametrize(("message", "fault", "drop"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_query_gets_no_answer_and_is_recorded(message: bytes, fault: str, drop: Drop) -> None:
    async def test() -> None:
        async with serving() as s:
            assert await is_silent(s.port, message)
            denied = s.records[0]
            assert (denied["verdict"], denied["reason"], denied["ntp.fault"]) == ("deny", "malformed_query", fault)
            assert s.relay.drops == {drop: 1}

    run(test)


def test_garbage_is_answered_by_48_bytes_or_not_at_all() -> None:
    async def test() -> None:
        chance = random.Random(7)
        async with serving(limits=ClientLimits(burst=10**6)) as s, client(s.port) as sock:
            for _ in range(500):
                sock.send(chance.randbytes(chance.choice((48, 48, chance.randrange(100)))))
            await until(lambda: heard(s) == 500)
            sizes = {len(sock.recv(1024)) for _ in range(s.relay.answered)}
            assert sizes <= {48}
            assert s.relay.drops[Drop.MODE] > 50

    run(test)


def test_a_client_that_asks_too_often_is_not_answered_until_it_has_waited() -> None:
    async def test() -> None:
        async with serving(limits=ClientLimits(burst=4, per_s=0.001)) as s, client(s.port) as sock:
            for _ in range(10):
                sock.send(query())
            await until(lambda: s.relay.answered + s.relay.drops[Drop.RATE] == 10)
            assert (s.relay.answered, s.relay.drops) == (4, {Drop.RATE: 6})
            assert [record["reason"] for record in s.records] == ["rule", "too_many_connections"]

    run(test)


def test_one_client_takes_nothing_from_another() -> None:
    async def test() -> None:
        async with serving(host="::", limits=ClientLimits(burst=2, per_s=0.001)) as s, client(s.port) as sock:
            for _ in range(50):
                sock.send(query())
            await until(lambda: s.relay.drops[Drop.RATE] == 48)
            assert told(await ask(s.port, source="::1", at="::1")).mode == 4

    run(test)


def test_sources_are_remembered_up_to_a_bound() -> None:
    async def test() -> None:
        policy = "version: 1\nworkloads: {all: {match: {address: [127.0.0.0/8]}, rules: [{ntp: one.example}]}}"
        async with serving(host="0.0.0.0", policy=policy, limits=ClientLimits(sources=16)) as s:
            for number in range(40):
                await ask(s.port, source=f"127.1.0.{number + 1}")
            assert s.relay.clients == 16

    run(test)


def test_a_fault_of_ours_over_one_packet_ends_nothing() -> None:
    async def test() -> None:
        async with serving() as s:
            judge = s.relay._decide

            def crash(attempt: Attempt) -> Verdict:
                s.relay._decide = judge
                raise RuntimeError("of ours")

            s.relay._decide = crash
            assert await is_silent(s.port, query())
            assert (s.records[0]["reason"], s.records[0]["ntp.fault"]) == ("gate_failed", "RuntimeError")

    run(test)


# --- records

ATTEMPT = Attempt(Stage.NTP, "app", port=123)
ALLOW = Verdict(Action.ALLOW, Reason.RULE, Stage.NTP)
AT = ("127.0.0.1", 123)


def test_the_first_packet_is_recorded_at_once_and_the_others_once_a_minute() -> None:
    records: list[Record] = []
    packets = PacketRecords(records.append)
    for port in range(1000):
        packets.note(ATTEMPT, ALLOW, ("10.0.0.1", port), AT)
    assert [record["ntp.packets"] for record in records] == [1]
    packets.flush()
    assert [record["ntp.packets"] for record in records] == [1, 999]
    packets.flush()  # nothing came: its source is forgotten
    packets.note(ATTEMPT, ALLOW, ("10.0.0.1", 5), AT)
    assert [record["ntp.packets"] for record in records] == [1, 999, 1]
    assert len({record["id"] for record in records}) == 3


def test_forged_sources_do_not_fill_the_log() -> None:
    records: list[Record] = []
    packets = PacketRecords(records.append)
    for number in range(20 * MAX_KINDS):
        packets.note(ATTEMPT, ALLOW, (f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1), AT)
    packets.flush()
    assert len(records) <= MAX_KINDS + 2
    assert sum(int(str(record["ntp.packets"])) for record in records) == 20 * MAX_KINDS
    assert "source.address" not in records[-1]


# --- nothing of a client goes further


def heard(s: Serving) -> int:
    """Packets that it has dealt with."""
    return s.relay.answered + sum(s.relay.drops.values())


def test_ten_thousand_packets_of_clients_change_nothing_for_the_server() -> None:
    """In serve mode: not a byte, not a packet more, and so no moment either."""

    async def test() -> None:
        chance = random.Random(9)
        async with time_server() as server, polling({"one.example": [server.address]}, RESTING) as poller:
            await synchronised(poller)
            asked = list(server.received)
            async with serving(poller, limits=ClientLimits(burst=3000)) as s, client(s.port) as sock:
                for number in range(10_000):
                    message = query() if number % 2 else chance.randbytes(chance.randrange(64))
                    sock.send(message)
                    if number % 50 == 0:  # its queue has an end
                        await until(lambda: heard(s) >= number + 1)  # noqa: B023 - waited for here
                await until(lambda: heard(s) == 10_000)
                assert s.relay.answered >= 3000
                assert s.relay.drops[Drop.RATE] > 1000
            assert server.received == asked  # three, of the burst at the start
            assert {message[:40] for message in asked} == {build_query(0)[:40]}

    run(test)


def test_in_relay_mode_clients_that_ask_together_cause_one_query_and_none_of_it_is_theirs() -> None:
    async def test() -> None:
        pace = Pace(min_samples=1, window=1, timeout_s=10, gap_s=3600, stale_s=3600)
        async with (
            time_server(ahead(1000)) as server,
            polling({"one.example": [server.address], "two.example": []}, pace, on_demand=True) as poller,
            serving(poller, relayed=True) as s,
        ):
            answers = [told(one) for one in await asyncio.gather(*(ask(s.port) for _ in range(20)))]
            assert {got.stratum for got in answers} == {3}
            assert [message[:40] for message in server.received] == [build_query(0)[:40]]
            assert told(await ask(s.port)).stratum == 3  # within the gap
            assert len(server.received) == 1

    run(test)


def test_in_relay_mode_a_query_after_the_gap_asks_anew() -> None:
    async def test() -> None:
        pace = Pace(min_samples=1, window=1, timeout_s=10, gap_s=0.0, stale_s=3600)
        async with (
            time_server() as server,
            polling({"one.example": [server.address]}, pace, on_demand=True) as poller,
            serving(poller, relayed=True) as s,
        ):
            for _ in range(3):
                assert told(await ask(s.port)).leap == 0
            assert len(server.received) == 3

    run(test)


def test_in_relay_mode_a_client_is_told_when_no_server_answers() -> None:
    async def test() -> None:
        pace = replace(IMPATIENT, min_samples=1, window=1)
        async with (
            time_server(silent) as server,
            polling({"one.example": [server.address]}, pace, on_demand=True) as poller,
            serving(poller, relayed=True) as s,
        ):
            assert told(await ask(s.port)).leap == 3
            assert len(server.received) == 1

    run(test)
