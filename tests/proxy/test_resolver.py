"""The stub resolver against servers on loopback that answer, lie, stall or hang up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from math import inf

import pytest

from policies.hostnames import Hostname
from policies.model import Address
from proxy.hosts import HostsEntry, Nameserver
from proxy.resolver import MAX_ADDRESSES, NameNotFound, Resolution, Resolver, ResolverFailed
from proxy.wire.dns import AAAA, A
from tests.proxy.nameserver import Received, address, alias, reply, serving, soa, unused_port, wire, zone

NAME = Hostname("api.example")
V4, V6 = "192.0.2.1", "2001:db8::1"


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def resolver(*nameservers: Nameserver, clock: Clock | None = None, timeout_s: float = 5, attempts: int = 1) -> Resolver:
    return Resolver({}, nameservers, clock=clock or Clock(), timeout_s=timeout_s, attempts=attempts)


def addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))


def run[T](test: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(30):
            return await test()

    return asyncio.run(limited())


async def failure(attempt: Awaitable[Resolution]) -> Exception:
    try:
        found = await attempt
    except (NameNotFound, ResolverFailed) as error:
        return error
    raise AssertionError(f"resolved to {found}")


# --- answers


def test_a_name_has_the_addresses_of_both_families() -> None:
    async def test() -> None:
        async with serving(zone({NAME: [V6, V4]}, ttl_s=60)) as server:
            assert await resolver(server.address).resolve(NAME) == Resolution(addresses(V4, V6), expires=1060)
            assert sorted(server.asked) == [(NAME, "A"), (NAME, "AAAA")]

    run(test)


def test_an_alias_is_followed_within_the_answer_and_never_asked_for() -> None:
    def script(received: Received) -> Iterable[bytes]:
        chain = [alias(NAME, "cdn.example")]
        return [reply(received.message, [*chain, address("cdn.example", V4)] if received.query.type == A else chain)]

    async def test() -> None:
        async with serving(script) as server:
            assert (await resolver(server.address).resolve(NAME)).addresses == addresses(V4)
            assert {name for name, _ in server.asked} == {NAME}

    run(test)


@pytest.mark.parametrize(
    ("ttl_s", "kept_s"), [(0, 5), (4, 5), (60, 60), (301, 300), (2**31 - 1, 300), (2**31, 5)], ids=str
)
def test_the_ttl_is_kept_within_bounds(ttl_s: int, kept_s: int) -> None:
    async def test() -> None:
        async with serving(zone({NAME: [V4]}, ttl_s)) as server:
            assert (await resolver(server.address).resolve(NAME)).expires == 1000 + kept_s

    run(test)


def test_an_endless_list_of_addresses_is_cut() -> None:
    many = [f"192.0.{i // 256}.{i % 256}" for i in range(1000)]

    async def test() -> None:
        async with serving(zone({NAME: many})) as server:  # over TCP in effect: 16 kB do not fit a datagram we take
            found = await resolver(server.address).resolve(NAME)
            assert found.addresses == addresses(*many[:MAX_ADDRESSES])

    def truncating(received: Received) -> Iterable[bytes]:
        return [reply(received.message, flags=0x8380)] if received.transport == "udp" else zone({NAME: many})(received)

    async def truncated() -> None:
        async with serving(truncating) as server:
            found = await resolver(server.address).resolve(NAME)
            assert found.addresses == addresses(*many[:MAX_ADDRESSES])
            assert [r.transport for r in server.received].count("tcp") == 2

    run(truncated)


# --- the cache


def test_an_answer_is_asked_for_once_until_it_expires() -> None:
    async def test() -> None:
        clock = Clock()
        async with serving(zone({NAME: [V4]}, ttl_s=60)) as server:
            names = resolver(server.address, clock=clock)
            assert names.cached(NAME) is None
            found = await names.resolve(NAME)
            clock.now += 59.9
            assert names.cached(NAME) is found
            assert await names.resolve(NAME) is found
            assert len(server.received) == 2
            clock.now += 0.1
            assert names.cached(NAME) is None
            await names.resolve(NAME)
            assert len(server.received) == 4

    run(test)


@pytest.mark.parametrize(("minimum_s", "kept_s"), [(0, 5), (30, 30), (86400, 300)], ids=str)
def test_an_absence_is_remembered_as_its_soa_says(minimum_s: int, kept_s: int) -> None:
    def script(received: Received) -> Iterable[bytes]:
        return [reply(received.message, rcode=3, authority=[soa("example", 86400, minimum_s)])]

    async def test() -> None:
        clock = Clock()
        async with serving(script) as server:
            names = resolver(server.address, clock=clock)
            first = await failure(names.resolve(NAME))
            assert isinstance(first, NameNotFound)
            assert (first.exists, first.expires) == (False, 1000 + kept_s)
            clock.now += kept_s - 0.1
            assert isinstance(await failure(names.resolve(NAME)), NameNotFound)
            assert (len(server.received), names.cached(NAME)) == (2, None)
            clock.now += 0.1
            await failure(names.resolve(NAME))
            assert len(server.received) == 4

    run(test)


def test_those_who_ask_together_share_one_query() -> None:
    async def test() -> None:
        async with serving(zone({NAME: [V4]})) as server:
            names = resolver(server.address)
            found = await asyncio.gather(*[names.resolve(NAME) for _ in range(50)])
            assert all(each is found[0] for each in found)
            assert len(server.received) == 2

    run(test)


def test_one_who_stops_waiting_does_not_stop_the_others() -> None:
    gate = asyncio.Event()

    async def test() -> None:
        async with serving(lambda received: []) as server:
            names = resolver(server.address)
            first = asyncio.create_task(names.resolve(NAME))
            second = asyncio.create_task(names.resolve(NAME))
            while len(server.received) < 2:
                await asyncio.sleep(0.01)
            first.cancel()
            server.script = zone({NAME: [V4]})
            gate.set()
            for received in server.received:  # the answers come only now
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    assert received.source_port
            await asyncio.sleep(0)
            assert first.cancelled() or first.cancelling()
            second.cancel()
            await names.close()

    run(test)


def test_the_cache_forgets_what_was_longest_unused() -> None:
    async def test() -> None:
        known = {f"n{i}.example": [V4] for i in range(4)}
        a, b, c, d = map(Hostname, known)
        async with serving(zone(known)) as server:
            names = Resolver({}, [server.address], max_entries=3)
            for name in (a, b, c):
                await names.resolve(name)
            assert names.cached(a)
            await names.resolve(d)
            assert [name for name in (a, b, c, d) if names.cached(name)] == [a, c, d]

    run(test)


# --- hosts


def test_the_operators_hosts_come_first_and_ask_nobody() -> None:
    async def test() -> None:
        async with serving(zone({NAME: [V4]})) as server:
            names = Resolver(
                {NAME: HostsEntry(addresses("127.0.0.1"), 8443)},
                [server.address],
                system_hosts={NAME: addresses("127.0.0.2")},
            )
            expected = Resolution(addresses("127.0.0.1"), inf, from_hosts=True, port=8443)
            assert await names.resolve(NAME) == names.cached(NAME) == expected
            assert server.received == []

    run(test)


def test_the_machines_hosts_file_is_exempt_from_nothing() -> None:
    names = Resolver({}, [], system_hosts={NAME: addresses("10.0.0.7")})
    assert names.cached(NAME) == Resolution(addresses("10.0.0.7"), inf, from_hosts=False)


# --- absence and failure


def only(qtype: int, script: Callable[[Received], Iterable[bytes]], other: Callable[[Received], Iterable[bytes]]):  # type: ignore[no-untyped-def]
    return lambda received: script(received) if received.query.type == qtype else other(received)
