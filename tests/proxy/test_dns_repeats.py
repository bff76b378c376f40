"""Questions that come again within a second, and sources that ask without end."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from ipaddress import ip_address

import pytest

from policies.addresses import Address
from policies.hostnames import Hostname
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.lookups import Lookups
from proxy.record import Record
from proxy.relays import dns_answers
from proxy.relays.buckets import Buckets
from proxy.relays.dns import DnsLimits
from proxy.relays.dns_answers import Answers
from proxy.relays.dns_budget import Budget, NewNames
from proxy.relays.dns_pace import Pace
from proxy.resolver import Resolution, Resolver
from tests.proxy.dns_gate import API, PUBLIC, PUBLIC6, TXT, Clock, addresses, ask, gate, over_tcp, question, run, told
from tests.proxy.nameserver import zone

SOURCE, DESTINATION = ("192.0.2.1", 40000), ("192.0.2.53", 53)
NAME = Hostname("api.example")


@dataclass
class WallClock:
    """In place of the module `time`."""

    now: float = 1_700_000_000.25

    def time(self) -> float:
        return self.now


class Desk:
    """Answers with a name in memory, a clock, a policy and a workload that tests change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...] = (PUBLIC, PUBLIC6)) -> None:
        self.wall, self.clock = WallClock(), Clock()
        monkeypatch.setattr(dns_answers, "time", self.wall)
        self.policy, self.closed, self.who = object(), None, "app"
        self.verdict = Verdict(Action.ALLOW, Reason.RULE, Stage.DNS)
        self.judged: list[Attempt] = []
        self.records: list[Record] = []
        self.resolver = Resolver({}, [], clock=self.clock)
        found = Resolution(tuple(map(ip_address, addresses)), self.clock.now + 60)
        self.resolver.cached = lambda name: found if self.clock() < found.expires else None  # type: ignore[method-assign]  # known without a server
        self.answers = Answers(
            self._decide,
            self.resolver,
            Lookups(clock=self.clock),
            self.records.append,
            workload=self._workload,
            generation=lambda: "g",
            standing=lambda: (self.policy, self.closed),
            search=[],
            budget=Budget(NewNames(), self.clock),
            most=(1, 1),
            clock=self.clock,
        )

    def _decide(self, attempt: Attempt) -> Verdict:
        self.judged.append(attempt)
        return self.verdict

    def _workload(self, _: Address) -> str:
        return self.who

    def ask(self, message: bytes, source: tuple[str, int] = SOURCE) -> bytes | None:
        """As the relay does."""
        if answer := self.answers.again(message, source, DESTINATION):
            return answer
        asked = self.answers.judge(message, source, DESTINATION)
        assert asked
        return self.answers.answer_now(asked)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


@pytest.mark.parametrize("qtype", [1, 28])
def test_what_is_asked_again_is_judged_once_and_answered_and_recorded_each_time(desk: Desk, qtype: int) -> None:
    first = desk.ask(question("Api.EXAMPLE", qtype, query_id=1))
    second = desk.ask(question("Api.EXAMPLE", qtype, query_id=2), (SOURCE[0], 50000))
    assert first
    assert second
    assert (first[:2], second[:2], first[2:]) == (b"\0\1", b"\0\2", second[2:])
    assert told(second).addresses == addresses(PUBLIC if qtype == 1 else PUBLIC6)
    assert len(desk.judged) == 1
    one, other = desk.records
    differing = {key for key in one if one[key] != other[key]}
    assert {"id", "source.port"} <= differing <= {"id", "source.port", "time", "duration_ms"}
    assert list(one) == list(other)
    assert other["source.port"] == 50000


OTHERS = {
    "another name": question("other.example"),
    "another spelling": question("API.example"),
    "another type": question("api.example", 28),
    "other options": question("api.example", opt=b"\0\x0a\0\x01x"),
    "no options": question("api.example", opt=None),
}


@pytest.mark.parametrize("message", OTHERS.values(), ids=OTHERS)
def test_every_other_question_is_judged(desk: Desk, message: bytes) -> None:
    desk.ask(question("api.example"))
    desk.ask(message)
    assert len(desk.judged) == 2


def test_another_source_is_judged(desk: Desk) -> None:
    desk.ask(question("api.example"))
    desk.ask(question("api.example"), ("192.0.2.2", SOURCE[1]))
    assert len(desk.judged) == 2


def test_a_policy_that_comes_into_force_judges_at_once(desk: Desk) -> None:
    desk.ask(question("api.example"))
    desk.policy, desk.verdict = object(), Verdict(Action.DENY, Reason.NO_RULE, Stage.DNS)
    assert told(desk.ask(question("api.example")) or b"").rcode == 3
    assert [record["reason"] for record in desk.records] == ["rule", "no_rule"]


def test_what_a_former_policy_judged_is_not_said_again_under_the_next(desk: Desk) -> None:
    """The answer came from a server meanwhile."""
    message = question("api.example")
    asked = desk.answers.judge(message, SOURCE, DESTINATION)
    assert asked
    desk.policy, desk.verdict = object(), Verdict(Action.DENY, Reason.NO_RULE, Stage.DNS)
    desk.ask(question("other.example"))
    assert told(desk.answers.answer_now(asked) or b"").addresses == addresses(PUBLIC)
    assert told(desk.ask(message) or b"").rcode == 3


def test_a_gate_that_closes_denies_at_once(desk: Desk) -> None:
    desk.ask(question("api.example"))
    desk.closed, desk.verdict = Reason.LOG_FAILED, Verdict(Action.DENY, Reason.LOG_FAILED, Stage.DNS)  # type: ignore[assignment]  # None at first
    assert told(desk.ask(question("api.example")) or b"").rcode == 2


def test_who_became_another_workload_is_judged_as_that(desk: Desk) -> None:
    desk.ask(question("api.example"))
    desk.who = "other"
    desk.ask(question("api.example"))
    assert [attempt.workload for attempt in desk.judged] == ["app", "other"]
    assert [record["workload"] for record in desk.records] == ["app", "other"]


def test_the_next_second_is_judged_anew(desk: Desk) -> None:
    desk.ask(question("api.example"))
    desk.wall.now += 0.74  # the same second still
    desk.ask(question("api.example"))
    assert len(desk.judged) == 1
    desk.wall.now += 0.02
    desk.ask(question("api.example"))
    assert len(desk.judged) == 2


def test_no_answer_outlives_its_time_or_says_a_longer_one(desk: Desk) -> None:
    desk.ask(question("api.example"))
    desk.clock.now += 1  # the wall clock was set back meanwhile
    assert told(desk.ask(question("api.example")) or b"").ttl_s == 59
    desk.clock.now += 59
    assert desk.ask(question("api.example")) is None  # asks a server


def test_denials_are_judged_each_time(desk: Desk) -> None:
    """Each says the id of its own decision."""
    desk.verdict = Verdict(Action.DENY, Reason.NO_RULE, Stage.DNS)
    assert desk.ask(question("api.example")) != desk.ask(question("api.example"))
    assert len(desk.judged) == 2


def test_a_refused_address_is_recorded_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, (PUBLIC, "10.0.0.1"))
    for _ in range(2):
        assert told(desk.ask(question("api.example")) or b"").addresses == addresses(PUBLIC)
    assert [record["dns.answers.refused"] for record in desk.records] == [["10.0.0.1"]] * 2


def test_an_answer_too_long_for_some_clients_is_not_sent_to_them_unasked() -> None:
    many = zone({"api.example": [f"93.184.1.{i}" for i in range(1, 60)]})

    async def test() -> None:
        async with gate(many) as g:
            for _ in range(3):
                assert (await ask(g, question("api.example", opt=None)))[2] & 2  # truncated
                assert len(told(await ask(g, question("api.example"))).addresses) == 59

    run(test)


# --- without end


def test_a_source_is_answered_so_often_and_no_other_waits_for_it() -> None:
    async def test() -> None:
        async with gate(API, limits=DnsLimits(questions_per_source_s=5)) as g:
            await ask(g, question("api.example"))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(("127.0.0.1", g.port))
                for _ in range(20):
                    sock.send(question("api.example"))
                assert told(await ask(g, question("other.example"), client="127.0.0.2")).rcode in (0, 3)
            assert g.relay.dropped == 11
            [dropped] = [record for record in g.records if record["reason"] == "too_many_connections"]
            assert (dropped["verdict"], dropped["workload"], dropped["dns.packets"]) == ("deny", "app", 1)
            assert len([record for record in g.records if record["verdict"] == "allow"]) >= 10
            g.clock.now += 1  # five more
            assert told(await ask(g, question("api.example"))).addresses == addresses(PUBLIC)
            await g.relay.close()
            assert [record["dns.packets"] for record in g.records if "dns.packets" in record] == [1, 10]

    run(test)


def test_questions_over_tcp_count_too() -> None:
    async def test() -> None:
        async with gate(API, limits=DnsLimits(questions_per_source_s=1)) as g, over_tcp(g) as (reader, writer):
            message = question("api.example", TXT)
            for _ in range(3):
                writer.write(len(message).to_bytes(2) + message)
            for _ in range(2):
                await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            with pytest.raises(asyncio.IncompleteReadError):
                await reader.readexactly(1)
            assert g.relay.dropped == 1

    run(test)


def test_a_machine_with_many_ipv6_addresses_is_one_source() -> None:
    buckets = Buckets(burst=2, per_s=1, sources=16)
    taken = [buckets.take(ip_address(f"2001:db8::{i}"), 0.0) for i in range(4)]
    assert taken == [True, True, False, False]
    assert buckets.take(ip_address("2001:db8:0:1::1"), 0.0)


def test_without_a_number_nobody_is_held_up() -> None:
    pace = Pace(None, lambda _: "app", list[Record]().append, Clock())
    assert all(pace.admits(SOURCE, DESTINATION) for _ in range(10_000))
