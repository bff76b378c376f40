"""What a tunnel in names gets through below a wildcard, and what a program does not notice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.hostnames import Hostname, Pattern
from proxy.options import new_names
from proxy.relays.dns_budget import MAX_KNOWN, Budget, NewNames
from proxy.wire.dns import AAAA
from tests.proxy.dns_gate import BLOCKED, NXDOMAIN, PUBLIC, Clock, Told, addresses, ask, gate, question, run, told
from tests.proxy.nameserver import Received, address, reply, serving, zone

BELOW = Pattern(Hostname("cdn.example"), wildcard=True)
TERMS = NewNames(per_hour=60, burst=3)


def refuses(budget: Budget, name: str, workload: str = "app", pattern: Pattern = BELOW) -> str | None:
    return budget.refuses(workload, pattern, Hostname(name))


def test_new_names_are_paid_for_and_come_back_with_time() -> None:
    clock = Clock()
    budget = Budget(TERMS, clock)

    assert [refuses(budget, f"n{i}.cdn.example") for i in range(3)] == [None] * 3
    assert refuses(budget, "n3.cdn.example") == "too many new names below *.cdn.example: 3 at once, 60 an hour"
    clock.now += 61  # sixty an hour is one a minute
    assert refuses(budget, "n3.cdn.example") is None
    assert refuses(budget, "n4.cdn.example")
    clock.now += 10 * 3600
    assert [bool(refuses(budget, f"m{i}.cdn.example")) for i in range(4)] == [False, False, False, True]


def test_a_name_is_paid_for_once() -> None:
    budget = Budget(TERMS, Clock())

    assert {refuses(budget, "one.cdn.example") for _ in range(100)} == {None}


def test_each_workload_and_each_wildcard_has_its_own_account() -> None:
    budget = Budget(TERMS, Clock())
    other = Pattern(Hostname("other.example"), wildcard=True)
    for number in range(4):
        refuses(budget, f"n{number}.cdn.example")

    assert refuses(budget, "a.cdn.example")
    assert refuses(budget, "a.cdn.example", workload="second") is None
    assert refuses(budget, "a.other.example", pattern=other) is None


def test_a_name_that_the_policy_writes_out_costs_nothing() -> None:
    budget = Budget(NewNames(per_hour=0, burst=1), Clock())
    exact = Pattern(Hostname("api.example"), wildcard=False)

    assert {refuses(budget, "api.example", pattern=exact) for _ in range(10)} == {None}


TOO_MUCH = {
    "five labels": ("a.b.c.d.e.cdn.example", "5 labels below *.cdn.example, where 4 may be"),
    "two long labels": (f"{'a' * 32}.{'b' * 32}.cdn.example", "65 characters below *.cdn.example, where 64 may be"),
}


@pytest.mark.parametrize(("name", "why"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_name_as_a_tunnel_has_it_is_refused_before_it_costs(name: str, why: str) -> None:
    budget = Budget(NewNames(burst=1), Clock())

    assert refuses(budget, name) == why
    assert refuses(budget, "a.b.cdn.example") is None


def test_memory_is_bounded_and_what_was_longest_unused_costs_again() -> None:
    budget = Budget(NewNames(burst=MAX_KNOWN + 2, per_hour=0), Clock())
    for number in range(MAX_KNOWN):
        refuses(budget, f"n{number}.cdn.example")
    assert refuses(budget, "n0.cdn.example") is None  # used again, so n1 is the oldest
    assert refuses(budget, "new.cdn.example") is None
    assert refuses(budget, "n1.cdn.example") is None  # costs the last one there is
    assert refuses(budget, "another.cdn.example")


def test_accounts_of_workloads_that_are_gone_are_forgotten() -> None:
    budget = Budget(NewNames(burst=1), Clock())
    refuses(budget, "a.cdn.example")
    refuses(budget, "a.cdn.example", workload="gone")
    budget.keep({"app"})

    assert refuses(budget, "b.cdn.example")
    assert refuses(budget, "b.cdn.example", workload="gone") is None


@given(st.lists(st.floats(0, 7200), max_size=80))
def test_in_no_time_is_more_granted_than_said(pauses: list[float]) -> None:
    clock = Clock()
    budget = Budget(TERMS, clock)
    granted = 0
    for number, pause_s in enumerate(pauses):
        clock.now += pause_s
        granted += refuses(budget, f"n{number}.cdn.example") is None

    assert granted <= TERMS.burst + sum(pauses) / 60 + 1e-6


def test_a_clock_that_is_set_back_grants_nothing() -> None:
    clock = Clock()
    budget = Budget(NewNames(burst=1), clock)
    refuses(budget, "a.cdn.example")
    clock.now -= 3600
    assert refuses(budget, "b.cdn.example")


# --- in the relay


def echo(received: Received) -> Iterable[bytes]:
    """The far end of a tunnel: every name exists."""
    return [reply(received.message, [address(received.query.name, PUBLIC)] if received.query.type == 1 else [])]


def test_nothing_of_a_tunnel_gets_out_beyond_the_budget() -> None:
    async def test() -> None:
        async with gate(echo, new_names=NewNames(burst=5)) as g:
            payload = bytes(range(256)) * 8
            chunks = (payload[i : i + 20].hex() for i in count(0, 20))  # as iodine sends: data, then a counter
            for number in range(60):
                await ask(g, question(f"{next(chunks)}.{number}.cdn.example"))
            assert len({name for name, _ in g.upstream.asked}) == 5
            reasons = [record["reason"] for record in g.records]
            assert (reasons.count("rule"), reasons.count("lookup_budget")) == (5, 55)

    run(test)


def test_a_refused_name_does_not_exist_and_the_record_says_why() -> None:
    async def test() -> None:
        async with gate(echo, new_names=NewNames(burst=1)) as g:
            assert told(await ask(g, question("a.cdn.example"))).addresses == addresses(PUBLIC)
            assert told(await ask(g, question("b.cdn.example"))) == Told(NXDOMAIN, ttl_s=5, error=BLOCKED)
            record = g.records[-1]
            assert (record["verdict"], record["reason"]) == ("deny", "lookup_budget")
            assert str(record["error.message"]).startswith("too many new names below *.cdn.example")
            assert str(record["rule"]).startswith("test.yaml:")
            for name, qtype in (("a.cdn.example", AAAA), ("api.example", 1)):  # known, and written out
                assert told(await ask(g, question(name, qtype))).rcode == 0

    run(test)


def test_record_types_of_one_name_are_paid_for_once() -> None:
    async def test() -> None:
        async with gate(echo, new_names=NewNames(burst=1)) as g:
            for qtype in (65, 1, AAAA, 64):
                assert told(await ask(g, question("a.cdn.example", qtype))).rcode == 0

    run(test)


def test_names_in_a_zone_of_the_operators_own_cost_nothing() -> None:
    policy = (
        'version: 1\nworkloads:\n  app:\n    match: {address: [127.0.0.1/32]}\n    rules: [{dns: "*.cluster.local"}]'
    )
    names = {f"pod-{i}.web.default.svc.cluster.local": ["10.96.0.1"] for i in range(4)}

    async def test() -> None:
        async with (
            serving(zone(names)) as inside,
            gate(echo, policy=policy, new_names=NewNames(burst=1), forward={"cluster.local": inside}) as g,
        ):
            answers = await asyncio.gather(*(ask(g, question(name)) for name in names))
            assert {told(answer).addresses for answer in answers} == {addresses("10.96.0.1")}
            assert g.upstream.received == []

    run(test)


def test_what_audit_mode_lets_pass_is_not_counted() -> None:
    policy = (
        "version: 1\nworkloads:\n  app:\n    mode: audit\n    match: {address: [127.0.0.1/32]}\n"
        "    rules: [{host: '*.cdn.example', deny: all}]"
    )

    async def test() -> None:
        async with gate(echo, policy=policy, new_names=NewNames(burst=1)) as g:
            for number in range(3):
                assert told(await ask(g, question(f"n{number}.cdn.example"))).addresses == addresses(PUBLIC)
            assert {record["would_be"] for record in g.records} == {"deny"}

    run(test)


def test_what_a_search_domain_makes_of_an_allowed_name_is_noise_also_below_a_wildcard() -> None:
    policy = (
        "version: 1\nworkloads:\n  app:\n    match: {address: [127.0.0.1/32]}\n"
        "    rules: [{host: api.example}, {dns: '*.svc.cluster.local'}]"
    )

    async def test() -> None:
        async with gate(echo, policy=policy, search=["default.svc.cluster.local"]) as g:
            assert told(await ask(g, question("api.example.default.svc.cluster.local"))) == Told(NXDOMAIN, ttl_s=5)
            assert (g.records, g.upstream.received, g.relay.search_noise) == ([], [], 1)
            assert told(await ask(g, question("a.b.c.d.default.svc.cluster.local"))).error == BLOCKED
            assert g.only_record()["reason"] == "lookup_budget"

    run(test)


def test_a_command_line_says_one_number_and_half_of_it_may_be_asked_for_at_once() -> None:
    assert new_names(None) == NewNames()
    assert [(new_names(n).per_hour, new_names(n).burst) for n in (600, 1, 0)] == [(600, 300), (1, 1), (0, 1)]
