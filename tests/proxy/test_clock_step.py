"""The clock of the machine is set while the gate runs: a date goes by the new time, whatever lasts does not notice."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest

from pki.authority import create_authority
from pki.leaves import Leaves
from policies.hostnames import Hostname
from proxy.limits import Limits
from proxy.lookups import Lookups
from proxy.resolver import Resolver
from proxy.wire.dns import A
from tests.builders import rules
from tests.proxy.gates import at, eventually, gate, origin, read_exactly
from tests.proxy.hellos import hello
from tests.proxy.nameserver import Received, address, reply, serving, soa

NAME = Hostname("a.example")
HELLO = hello(NAME)
LAST_DAY = datetime(2027, 1, 31, 12, tzinfo=UTC)
UNTIL = rules("- {host: a.example, until: 2027-01-31}")
HOUR = timedelta(hours=1)
YEAR = timedelta(days=365)


class Clock:
    """What `time.time` says."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now.timestamp()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(LAST_DAY)
    monkeypatch.setattr(time, "time", clock)
    return clock


def test_a_rule_ends_by_the_clock_as_it_is_now(clock: Clock) -> None:
    with origin() as upstream, gate(UNTIL, {NAME: at(upstream.address)}) as it:

        def reason() -> object:
            it.records.clear()
            with it.connect() as client:
                client.sendall(HELLO)
                client.recv(1)
            eventually(lambda: it.records, "a record")
            return it.records[0]["reason"]

        assert reason() == "rule"
        clock.now += YEAR
        assert reason() == "expired"
        clock.now -= YEAR
        assert reason() == "rule"


@pytest.mark.parametrize("step", [YEAR, -YEAR], ids=["forward", "back"])
def test_a_flow_that_is_open_stays_and_lasted_no_less_than_nothing(clock: Clock, step: timedelta) -> None:
    limits = Limits(hello_s=15, idle_s=15)
    with origin() as upstream, gate(UNTIL, {NAME: at(upstream.address)}, limits=limits) as it:
        with it.connect() as begun, it.connect() as client:
            client.sendall(HELLO)
            read_exactly(client, len(HELLO))
            begun.sendall(HELLO[:20])
            clock.now += step
            begun.sendall(HELLO[20:])
            client.sendall(b"still there?")
            assert read_exactly(client, 12) == b"still there?"
            begun.recv(1)
        eventually(lambda: len(it.records) == 2, "both are recorded")
        assert sorted(str(reason) for reason in it.reasons()) == ["expired" if step > HOUR else "rule", "rule"]
        assert all(float(str(record.get("duration_ms", 0))) >= 0 for record in it.records)


@pytest.mark.parametrize("step", [YEAR, -YEAR], ids=["forward", "back"])
def test_what_was_looked_up_is_known_as_long_as_before(clock: Clock, step: timedelta) -> None:
    def answer(received: Received) -> list[bytes]:
        if received.query.type != A:
            return [reply(received.message, authority=[soa("example", 60, 60)])]
        return [reply(received.message, [address(NAME, "93.184.216.34")])]

    async def ask_twice() -> int:
        async with serving(answer) as server:
            resolver = Resolver({}, [server.address], system_hosts={})
            await resolver.resolve(NAME)
            asked = len(server.received)
            clock.now += step
            await resolver.resolve(NAME)
            await resolver.close()
            return len(server.received) - asked

    assert asyncio.run(ask_twice()) == 0


@pytest.mark.parametrize("step", [YEAR, -YEAR], ids=["forward", "back"])
def test_an_address_keeps_the_name_that_a_workload_was_told(clock: Clock, step: timedelta) -> None:
    lookups = Lookups()
    found = ip_address("93.184.216.34")
    lookups.note("app", NAME, [found], time.monotonic() + 60)
    clock.now += step
    assert lookups.names_of("app", found) == (NAME,)


@pytest.mark.parametrize(
    ("step", "is_another"),
    [(HOUR, False), (-HOUR, False), (-2 * HOUR, True), (-YEAR / 4, True), (timedelta(days=30), True)],
    ids=str,
)
def test_a_leaf_that_is_not_valid_by_the_new_clock_is_minted_again(step: timedelta, is_another: bool) -> None:
    """Clients refuse a leaf of the future; one of an hour ago is backdated enough."""
    clock = Clock(LAST_DAY)
    authority = create_authority(LAST_DAY - YEAR / 2)
    leaves = Leaves([authority.issuer], lambda: clock.now)
    before = leaves.context(NAME)
    clock.now += step
    assert (leaves.cached(NAME) is None) is is_another
    assert (leaves.context(NAME) is not before) is is_another
