"""Which servers a policy has the relay ask, and which addresses no policy can."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import pytest

from policies.hostnames import Hostname
from policies.index import Policy
from policies.load import load
from policies.tree import Source
from proxy.hosts import parse_host_options
from proxy.own_doors import OwnDoors
from proxy.record import Peer
from proxy.relays.ntp.named import NamedServers
from proxy.resolver import Resolver
from tests.proxy.dns_gate import run
from tests.proxy.nameserver import serving, zone

POLICY = """
version: 1
guard:
  - {host: closed.example, deny: all}
workloads:
  app:
    match: {address: [10.0.0.0/8]}
    rules:
      - ntp: time.example
      - ntp: closed.example
      - {ntp: brief.example, until: 2026-11-22}
  other:
    match: {address: [10.0.0.1/32]}
    rules:
      - ntp: other.example
  watched:
    match: {address: [10.0.0.2/32]}
    mode: audit
    rules:
      - host: "*.example"
"""
TODAY = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
DAY = 86_400.0
ZONE = {
    "time.example": ["192.0.2.1", "93.184.216.34", "127.0.0.1", "169.254.169.123", "169.254.169.254", "10.1.1.1"],
    "other.example": ["2606:2800:220:1::1", "fd00:ec2::123", "fe80::1", "::1", "::ffff:127.0.0.1", "fd00::1"],
}


def policy() -> Policy:
    return load([Source("test.yaml", POLICY)], catalogue={}, tags={}, is_public_suffix=lambda name: False)


def servers(
    nameserver: Peer,
    workload: str | None = None,
    *,
    hosts: Iterable[str] = (),
    own: Iterable[Peer] = (),
    now: float = TODAY,
) -> NamedServers:
    resolver = Resolver(parse_host_options(hosts), [nameserver])
    return NamedServers(policy, workload, resolver, is_own=OwnDoors(own).holds, clock=lambda: now)


NOBODY = ("127.0.0.1", 9)


def test_the_servers_of_all_workloads_are_asked_or_of_the_one_that_is_named() -> None:
    assert servers(NOBODY).names == {"time.example", "closed.example", "brief.example", "other.example"}
    assert servers(NOBODY, "other").names == {"other.example"}
    assert servers(NOBODY, "watched").names == set()


OPEN = {
    "named": ("time.example", None, TODAY, True),
    "another workload's": ("other.example", "app", TODAY, False),
    "on its last day": ("brief.example", None, TODAY, True),
    "the day after": ("brief.example", None, TODAY + DAY, False),
    "closed by the guard": ("closed.example", None, TODAY, False),
    "named by a host rule alone": ("www.example", None, TODAY, False),
    "in audit mode, without a rule": ("www.example", "watched", TODAY, False),
}


@pytest.mark.parametrize(("name", "workload", "now", "is_open"), OPEN.values(), ids=OPEN)
def test_a_server_is_asked_while_a_rule_in_force_names_it(
    name: str, workload: str | None, now: float, is_open: bool
) -> None:
    assert servers(NOBODY, workload, now=now).is_open(Hostname(name)) is is_open


def test_of_what_a_name_resolves_to_only_public_addresses_are_asked() -> None:
    """A name's owner may not have us ask loopback, metadata, link-local or private addresses (DNS rebinding)."""

    async def test() -> None:
        async with serving(zone(ZONE)) as nameserver:
            named = servers(nameserver.address)
            assert await named.find(Hostname("time.example")) == [("93.184.216.34", 123)]
            assert await named.find(Hostname("other.example")) == [("2606:2800:220:1::1", 123)]

    run(test)


def test_a_server_without_a_rule_in_force_is_not_even_looked_up() -> None:
    async def test() -> None:
        async with serving(zone(ZONE)) as nameserver:
            named = servers(nameserver.address, now=TODAY + DAY)
            for name in ("closed.example", "brief.example", "www.example"):
                assert await named.find(Hostname(name)) == ()
            assert nameserver.received == []

    run(test)


HOSTS = {
    "private": ("10.1.1.1", [("10.1.1.1", 123)]),
    "loopback, another port": ("127.0.0.1:10123", [("127.0.0.1", 10123)]),
    "Amazon's": ("169.254.169.123", [("169.254.169.123", 123)]),
    "Amazon's by IPv6": ("fd00:ec2::123", [("fd00:ec2::123", 123)]),
    "Google's": ("169.254.169.254", [("169.254.169.254", 123)]),
    "metadata by another port": ("169.254.169.254:80", []),
    "another link-local address": ("169.254.1.1", []),
    "other metadata": ("168.63.129.16", []),
    "multicast": ("224.0.1.1", []),
    "ourselves": ("127.0.0.1:123", []),
}


@pytest.mark.parametrize(("target", "found"), HOSTS.values(), ids=HOSTS)
def test_what_the_operator_may_have_asked(target: str, found: list[Peer]) -> None:
    async def test() -> None:
        named = servers(NOBODY, hosts=[f"time.example={target}"], own=[("0.0.0.0", 123)])
        assert await named.find(Hostname("time.example")) == found

    run(test)
