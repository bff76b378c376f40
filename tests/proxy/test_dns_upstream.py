"""Servers behind the relay: zones with servers of their own, and what is answered while all are dead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from policies.hostnames import Hostname
from proxy.metrics.table import Lookup
from proxy.relays.dns import DnsLimits
from proxy.resolver import Resolver, ResolverFailed
from tests.proxy.dns_gate import PUBLIC, SERVFAIL, Clock, addresses, ask, gate, question, run, told
from tests.proxy.nameserver import Received, reply, serving, zone

API = Hostname("api.example")


class Dying:
    """A server that answers until `is_dead`."""

    def __init__(self) -> None:
        self.is_dead = False
        self._alive = zone({"api.example": [PUBLIC]}, ttl_s=60)

    def __call__(self, received: Received) -> Iterable[bytes]:
        return [reply(received.message, rcode=2)] if self.is_dead else self._alive(received)


def test_what_was_known_serves_on_while_no_server_answers() -> None:
    script = Dying()

    async def test() -> None:
        async with gate(script) as g:
            await ask(g, question("api.example"))
            script.is_dead = True
            g.clock.now += 61
            answer = told(await ask(g, question("api.example")))
            assert (answer.addresses, answer.ttl_s) == (addresses(PUBLIC), 30)
            asked = len(g.upstream.received)
            g.clock.now += 29
            assert told(await ask(g, question("api.example"))).ttl_s == 1
            assert len(g.upstream.received) == asked  # a dead server is not asked with every question
            script.is_dead = False
            g.clock.now += 2
            assert told(await ask(g, question("api.example"))).ttl_s == 60

    run(test)


def test_not_for_ever() -> None:
    script = Dying()

    async def test() -> None:
        async with gate(script) as g:
            await ask(g, question("api.example"))
            script.is_dead = True
            g.clock.now += 60 + 3599
            assert told(await ask(g, question("api.example"))).ttl_s == 1
            g.clock.now += 1
            assert told(await ask(g, question("api.example"))).rcode == SERVFAIL
            assert g.records[-1]["reason"] == "resolver_failed"

    run(test)


def test_a_name_that_is_gone_is_gone() -> None:
    """A server that says no is no dead server."""
    names = {"api.example": [PUBLIC]}

    async def test() -> None:
        async with gate(lambda received: zone(names)(received)) as g:
            await ask(g, question("api.example"))
            names.clear()
            g.clock.now += 61
            assert told(await ask(g, question("api.example"))).rcode == 3

    run(test)


def test_stale_answers_are_counted_as_such() -> None:
    script, clock, told_ = Dying(), Clock(), list[Lookup]()

    async def test() -> None:
        async with serving(script) as server:
            resolver = Resolver({}, [server.address], clock=clock, told=lambda how, _: told_.append(how))
            await resolver.resolve(API)
            script.is_dead = True
            clock.now += 61
            assert (await resolver.resolve(API)).is_stale
            await asyncio.sleep(0)
            assert told_ == [Lookup.ANSWERED, Lookup.STALE]
            await resolver.close()

    run(test)


# --- zones


ZONES = {
    "in the zone": ("web.corp.example", "near"),
    "the zone itself": ("corp.example", "near"),
    "in a zone below": ("db.lab.corp.example", "nearest"),
    "beside it": ("xcorp.example", "site"),
    "outside": ("api.example", "site"),
}


@pytest.mark.parametrize(("name", "asked"), ZONES.values(), ids=ZONES)
def test_the_server_of_the_nearest_zone_is_asked(name: str, asked: str) -> None:
    async def test() -> None:
        script = zone({name: [PUBLIC]})
        async with serving(script) as site, serving(script) as near, serving(script) as nearest:
            forward = {Hostname("corp.example"): [near.address], Hostname("lab.corp.example"): [nearest.address]}
            resolver = Resolver({}, [site.address], forward=forward)
            assert resolver.is_forwarded(Hostname(name)) is (asked != "site")
            assert (await resolver.resolve(Hostname(name))).addresses == addresses(PUBLIC)
            servers = {"site": site, "near": near, "nearest": nearest}
            assert [which for which, server in servers.items() if server.received] == [asked]

    run(test)


def test_a_name_of_a_zone_whose_server_is_dead_is_asked_of_no_other() -> None:
    """Names of the inside are not told to the outside."""

    async def test() -> None:
        async with (
            serving(zone({"web.corp.example": [PUBLIC]})) as site,
            serving(lambda r: [reply(r.message, rcode=5)]) as dead,
        ):
            resolver = Resolver({}, [site.address], forward={Hostname("corp.example"): [dead.address]})
            with pytest.raises(ResolverFailed, match="REFUSED"):
                await resolver.resolve(Hostname("web.corp.example"))
            assert site.received == []

    run(test)


# --- one source among many


def test_one_source_does_not_take_the_lookups_of_its_whole_workload() -> None:
    policy = "version: 1\nworkloads:\n  app:\n    match: {address: [127.0.0.0/8]}\n    rules: [{host: '*.cdn.example'}]"
    quick = zone({"b.cdn.example": [PUBLIC]})

    def script(received: Received) -> Iterable[bytes]:
        return [] if received.query.name.startswith("slow") else quick(received)

    async def test() -> None:
        async with gate(script, policy=policy, host="0.0.0.0", limits=DnsLimits(lookups_per_source=1)) as g:
            waiting = asyncio.create_task(ask(g, question("slow.cdn.example")))
            await g.upstream.wait_for(2)
            assert told(await ask(g, question("b.cdn.example"))).rcode == SERVFAIL
            assert g.only_record()["error.message"] == "1 lookups of 127.0.0.1 under way"
            answer = told(await ask(g, question("b.cdn.example"), client="127.0.0.2"))
            assert answer.addresses == addresses(PUBLIC)
            waiting.cancel()

    run(test)


def test_one_source_does_not_take_all_connections() -> None:
    async def connect(port: int, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))

    async def test() -> None:
        limits = DnsLimits(connections_per_source=1, idle_timeout_s=25)
        async with gate(zone({"api.example": [PUBLIC]}), host="0.0.0.0", limits=limits) as g:
            _, first = await connect(g.port, "127.0.0.1")
            message = question("other.example")
            first.write(len(message).to_bytes(2) + message)
            await first.drain()
            reader, second = await connect(g.port, "127.0.0.1")
            assert await reader.read() == b""
            other_reader, other = await connect(g.port, "127.0.0.2")
            other.write(len(message).to_bytes(2) + message)
            assert await other_reader.readexactly(2)
            for writer in (first, second, other):
                writer.close()

    run(test)
