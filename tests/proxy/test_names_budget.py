"""A connection that names a host has it looked up as a question does: one budget for both, below wildcards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from policies.hostnames import Hostname, Pattern
from proxy.relays.dns_budget import Budget, NewNames
from proxy.wire.client_hello import Alert, render_alert
from tests.builders import rules
from tests.proxy.gates import Gate, at, eventually, gate, origin, read_all
from tests.proxy.hellos import hello

CDN = Pattern(Hostname("cdn.example"), wildcard=True)
SECRETS = [f"c2vjcmv0{number}.cdn.example" for number in range(8)]


def budget(burst: int, *ours: str) -> Budget:
    return Budget(NewNames(burst=burst, per_hour=0), time.monotonic, is_ours=lambda name: name in ours)


@contextmanager
def wildcard_gate(account: Budget, rule: str = "- host: '*.cdn.example'") -> Iterator[Gate]:
    with (
        origin() as upstream,
        gate(rules(rule), {name: at(upstream.address) for name in SECRETS}, budget=account) as it,
    ):
        yield it


def carried(it: Gate, name: str) -> bool:
    """Whether a hello for the name gets past the gate."""
    with it.connect() as client:
        client.sendall(hello(name))
        if (said := client.recv(65536)) == render_alert(Alert.ACCESS_DENIED):
            return False
        assert said[0] == 22  # the origin says it back
        return True


def test_names_of_hellos_below_a_wildcard_end_with_the_budget_and_none_beyond_is_looked_up() -> None:
    with wildcard_gate(budget(3)) as it:
        assert [carried(it, name) for name in SECRETS] == [True] * 3 + [False] * 5
        assert all(carried(it, name) for name in SECRETS[:3])  # those that were paid for
        assert set(it.names.asked) == set(SECRETS[:3])
        eventually(lambda: len(it.records) == 11, "all are recorded")
        [why, *_] = denials = [record for record in it.records if record["verdict"] == "deny"]
        assert {record["reason"] for record in denials} == {"lookup_budget"}
        assert why["error.message"] == "too many new names below *.cdn.example: 3 at once, 0 an hour"
        assert (why["rule"], "tls.mode" in why) == (it.records[-1]["rule"], False)


def test_a_name_that_was_asked_for_by_dns_is_paid_for() -> None:
    account = budget(1)
    assert account.refuses("app", CDN, Hostname(SECRETS[0])) is None  # as the DNS relay asks
    with wildcard_gate(account) as it:
        assert carried(it, SECRETS[0])
        assert not carried(it, SECRETS[1])


def test_what_is_to_be_inspected_is_counted_before_it_is_given_away() -> None:
    with wildcard_gate(budget(1), "- host: '*.cdn.example'\n  tls: inspect") as it:
        with it.connect() as client:
            client.sendall(hello(SECRETS[0]))
            eventually(lambda: it.handed, "the first goes to the inspector")
        with it.connect() as client:
            client.sendall(hello(SECRETS[1]))
            assert read_all(client) == render_alert(Alert.ACCESS_DENIED)
        assert len(it.handed) == 1


@pytest.mark.parametrize("rule", ["- host: c2vjcmv00.cdn.example", "- host: '*.cdn.example'"], ids=["exact", "ours"])
def test_names_that_tell_no_stranger_anything_cost_nothing(rule: str) -> None:
    account = budget(1, SECRETS[0])
    account.refuses("app", CDN, Hostname("other.cdn.example"))
    with wildcard_gate(account, rule) as it:
        assert all(carried(it, SECRETS[0]) for _ in range(2))


def test_names_that_are_too_long_or_deep_are_no_hosts_to_connect_to() -> None:
    with wildcard_gate(budget(9)) as it:
        assert not carried(it, "a.b.c.d.e.cdn.example")
        assert not carried(it, f"{'a' * 40}.{'b' * 40}.cdn.example")
        assert it.names.asked == []
