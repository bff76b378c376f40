"""The stub resolver against servers on loopback that answer, lie, stall or hang up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import pairwise
from math import inf
from time import monotonic

import pytest

from policies.addresses import Address
from policies.hostnames import Hostname
from proxy.hosts import HostsEntry, Nameserver
from proxy.resolver import MAX_ADDRESSES, NameNotFound, Resolution, Resolver, ResolverFailed
from proxy.wire.dns import AAAA, A, build_query
from tests.proxy.nameserver import Received, Script, address, alias, reply, serving, soa, unused_port, wire, zone

NAME = Hostname("api.example")
V4, V6, EVIL = "192.0.2.1", "2001:db8::1", "198.51.100.66"


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def resolver(
    *nameservers: Nameserver, clock: Clock | None = None, timeout_s: float = 10, attempts: int = 1
) -> Resolver:
    return Resolver({}, nameservers, clock=clock or Clock(), timeout_s=timeout_s, attempts=attempts)


def addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


async def failure(attempt: Awaitable[Resolution]) -> NameNotFound | ResolverFailed:
    try:
        found = await attempt
    except (NameNotFound, ResolverFailed) as error:
        return error
    raise AssertionError(f"resolved to {found}")


def nothing(received: Received) -> Iterable[bytes]:
    return []


def servfail(received: Received) -> Iterable[bytes]:
    return [reply(received.message, rcode=2)]


def nodata(received: Received) -> Iterable[bytes]:
    return [reply(received.message, authority=[soa("example", 900, 30)])]


def name_error(received: Received) -> Iterable[bytes]:
    return [reply(received.message, rcode=3, authority=[soa("example", 900, 30)])]


def families(v4: Script, v6: Script) -> Script:
    return lambda received: (v4 if received.query.type == A else v6)(received)


ONE = zone({NAME: [V4]})


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


def test_a_truncated_answer_is_asked_for_over_tcp_and_an_endless_one_is_cut() -> None:
    many = [f"192.0.{i // 256}.{i % 256}" for i in range(1000)]

    def script(received: Received) -> Iterable[bytes]:
        if received.transport == "udp" and received.query.type == A:
            return [reply(received.message, flags=0x8380)]
        return zone({NAME: many})(received)

    async def test() -> None:
        async with serving(script) as server:
            found = await resolver(server.address).resolve(NAME)
            assert found.addresses == addresses(*many[:MAX_ADDRESSES])
            assert [r.query.type_text for r in server.received if r.transport == "tcp"] == ["A"]

    run(test)


# --- the cache


def test_an_answer_is_asked_for_once_until_it_expires() -> None:
    async def test() -> None:
        clock = Clock()
        async with serving(ONE) as server:
            names = resolver(server.address, clock=clock)
            assert names.cached(NAME) is None
            found = await names.resolve(NAME)
            clock.now += 59.9
            assert names.cached(NAME) is found
            assert await names.resolve(NAME) is found
            assert len(server.received) == 2
            clock.now += 0.2
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
            assert names.cached(NAME) is None
            asked = len(server.received)
            clock.now += 0.2
            await failure(names.resolve(NAME))
            assert len(server.received) > asked

    run(test)


def test_those_who_ask_together_share_one_query() -> None:
    async def test() -> None:
        async with serving(ONE) as server:
            names = resolver(server.address)
            found = await asyncio.gather(*[names.resolve(NAME) for _ in range(50)])
            assert all(each is found[0] for each in found)
            assert len(server.received) == 2

    run(test)


def test_one_who_stops_waiting_does_not_stop_the_others() -> None:
    async def test() -> None:
        async with serving(nothing) as server:
            names = resolver(server.address, timeout_s=0.2, attempts=20)
            leaving, staying = (asyncio.create_task(names.resolve(NAME)) for _ in range(2))
            await server.wait_for(2)
            leaving.cancel()
            await asyncio.wait([leaving])
            server.script = ONE
            assert (await staying).addresses == addresses(V4)

    run(test)


def test_the_cache_forgets_what_was_longest_unused() -> None:
    async def test() -> None:
        a, b, c, d = (Hostname(f"{letter}.example") for letter in "abcd")
        async with serving(zone({name: [V4] for name in (a, b, c, d)})) as server:
            names = Resolver({}, [server.address], max_entries=3)
            for name in (a, b, c):
                await names.resolve(name)
            assert names.cached(a)
            await names.resolve(d)
            assert [name for name in (a, b, c, d) if names.cached(name)] == [a, c, d]

    run(test)


def test_the_operators_hosts_come_first_and_ask_nobody() -> None:
    async def test() -> None:
        async with serving(ONE) as server:
            hosts = {NAME: HostsEntry(addresses("127.0.0.1"), 8443)}
            names = Resolver(hosts, [server.address], system_hosts={NAME: addresses("127.0.0.2")})
            assert await names.resolve(NAME) == Resolution(addresses("127.0.0.1"), inf, from_hosts=True, port=8443)
            assert names.cached(NAME) == await names.resolve(NAME)
            assert server.received == []

    run(test)


def test_the_machines_hosts_file_is_exempt_from_nothing() -> None:
    names = Resolver({}, [], system_hosts={NAME: addresses("10.0.0.7")})
    assert names.cached(NAME) == Resolution(addresses("10.0.0.7"), inf, from_hosts=False)


# --- absence and failure


@pytest.mark.parametrize("other", [servfail, nothing], ids=["servfail", "silence"])
@pytest.mark.parametrize("family", [A, AAAA], ids=["A", "AAAA"])
def test_a_failed_family_does_not_fail_the_other(family: int, other: Script) -> None:
    async def test() -> None:
        both = zone({NAME: [V4, V6]}, ttl_s=300)
        script = families(both, other) if family == A else families(other, both)
        async with serving(script) as server:
            began = monotonic()
            found = await resolver(server.address, timeout_s=25).resolve(NAME)
            assert found == Resolution(addresses(V4 if family == A else V6), expires=1030)  # and it is asked for soon
            assert monotonic() - began < 10  # the delay is 0.3 s; the silent server had 25

    run(test)


def test_a_family_without_addresses_is_no_failure() -> None:
    async def test() -> None:
        async with serving(families(zone({NAME: [V4]}, ttl_s=300), nodata)) as server:
            assert await resolver(server.address).resolve(NAME) == Resolution(addresses(V4), expires=1300)

    run(test)


ABSENCES: dict[str, tuple[Script, bool]] = {
    "both nodata": (nodata, True),
    "both name error": (name_error, False),
    "name error and silence": (families(name_error, nothing), False),
    "name error and servfail": (families(servfail, name_error), False),
    "name error and nodata": (families(nodata, name_error), False),
}


@pytest.mark.parametrize(("script", "exists"), ABSENCES.values(), ids=ABSENCES)
def test_a_name_without_addresses_is_not_found(script: Script, exists: bool) -> None:
    async def test() -> None:
        async with serving(script) as server:
            error = await failure(resolver(server.address).resolve(NAME))
            assert isinstance(error, NameNotFound)
            assert error.exists is exists
            assert str(error) == ("api.example has no address" if exists else "api.example does not exist")

    run(test)


def test_a_server_that_denies_one_family_does_not_hide_the_other() -> None:
    async def test() -> None:
        async with serving(families(ONE, name_error)) as server:
            assert (await resolver(server.address).resolve(NAME)).addresses == addresses(V4)

    run(test)


def test_an_unknown_family_is_a_failure_and_not_remembered_as_an_absence() -> None:
    async def test() -> None:
        async with serving(families(nodata, servfail)) as server:
            names = resolver(server.address)
            assert isinstance(await failure(names.resolve(NAME)), ResolverFailed)
            server.script = families(nodata, zone({NAME: [V6]}))
            assert (await names.resolve(NAME)).addresses == addresses(V6)

    run(test)


def test_the_next_server_is_asked_when_one_fails() -> None:
    async def test() -> None:
        async with serving(servfail) as failing, serving(nothing) as silent, serving(ONE) as good:
            refusing = ("127.0.0.1", unused_port())
            names = resolver(refusing, failing.address, silent.address, good.address, timeout_s=0.3)
            assert (await names.resolve(NAME)).addresses == addresses(V4)
            assert len(failing.received) == len(silent.received) == len(good.received) == 2

    run(test)


def test_a_failure_names_each_server_and_what_it_did() -> None:
    async def test() -> None:
        async with serving(servfail) as failing, serving(nothing) as silent:
            refusing = ("127.0.0.1", unused_port())
            nowhere = ("fe80::1%nosuch", 53)
            names = resolver(refusing, failing.address, silent.address, nowhere, timeout_s=0.2, attempts=2)
            refused, failed, quiet, last = str(await failure(names.resolve(NAME))).split("; ")
            assert refused == f"cannot resolve api.example: 127.0.0.1:{refusing[1]}: connection refused"
            assert failed == f"127.0.0.1:{failing.address[1]} answered SERVFAIL"
            assert quiet == f"127.0.0.1:{silent.address[1]} did not answer within 0.2 s"
            assert last.startswith("[fe80::1%nosuch]:53: ")
            assert len(failing.received) == 4  # two families, two attempts

    run(test)


def test_without_a_nameserver_a_lookup_fails() -> None:
    async def test() -> None:
        assert str(await failure(resolver().resolve(NAME))) == "cannot resolve api.example: no nameserver"

    run(test)


def test_closing_ends_what_is_under_way() -> None:
    async def test() -> None:
        async with serving(nothing) as server:
            names = resolver(server.address)
            waiting = asyncio.create_task(names.resolve(NAME))
            await server.wait_for(1)
            await names.close()
            assert str(await failure(waiting)) == "cannot resolve api.example: the resolver was closed"

    run(test)


# --- liars


def forged(message: bytes, **wrong: object) -> bytes:
    return reply(message, [address(b"\xc0\x0c", EVIL)], **wrong)  # type: ignore[arg-type]  # as reply


LIES: dict[str, Callable[[bytes], bytes]] = {
    "another id": lambda m: forged(m, query_id=int.from_bytes(m[:2]) ^ 1),
    "another name": lambda m: forged(m, question=wire("other.example") + m[25:29]),
    "another type": lambda m: forged(m, question=wire(NAME) + b"\0\x10\0\1"),
    "our own query": lambda m: m,
    "garbage": lambda m: b"\xff" * 40,
    "empty": lambda m: b"",
    "compression loop": lambda m: reply(m, [b"\xc0\x29" + bytes(10)]),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_forged_answer_is_passed_over(lie: Callable[[bytes], bytes]) -> None:
    async def test() -> None:
        async with serving(lambda received: [lie(received.message), *ONE(received)]) as server:
            assert (await resolver(server.address).resolve(NAME)).addresses == addresses(V4)

    run(test)


def test_an_answer_from_another_address_is_never_read() -> None:
    def script(received: Received) -> Iterable[bytes]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forger:
            forger.sendto(forged(received.message), ("127.0.0.1", received.source_port))
        return ONE(received)

    async def test() -> None:
        async with serving(script) as server:
            assert (await resolver(server.address).resolve(NAME)).addresses == addresses(V4)

    run(test)


def test_a_flood_of_forgeries_leads_to_tcp() -> None:
    def script(received: Received) -> Iterable[bytes]:
        if received.transport == "tcp":
            return ONE(received)
        query_id = int.from_bytes(received.message[:2])
        return [forged(received.message, query_id=(query_id + i) & 0xFFFF) for i in range(1, 20)]

    async def test() -> None:
        async with serving(script) as server:
            assert (await resolver(server.address).resolve(NAME)).addresses == addresses(V4)
            assert [r.transport for r in server.received].count("tcp") == 2

    run(test)


def test_every_question_has_a_random_id_and_port_of_its_own() -> None:
    async def test() -> None:
        names = [Hostname(f"n{i}.example") for i in range(40)]
        async with serving(zone({name: [V4] for name in names})) as server:
            asking = resolver(server.address)
            for name in names:
                await asking.resolve(name)
            ports = [r.source_port for r in server.received]
            ids = [r.query.id for r in server.received]
            assert len(set(ids)) > 70
            assert len(set(ports)) > 60
            steps = {(after - before) & 0xFFFF for before, after in pairwise(ids)}
            assert len(steps) > 60  # nobody counts up

    run(test)


def test_a_server_sees_our_question_and_nothing_more() -> None:
    async def test() -> None:
        async with serving(ONE) as server:
            await resolver(server.address).resolve(NAME)
            for received in server.received:
                assert received.message == build_query(NAME, received.query.type, received.query.id)

    run(test)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "connection closed before the answer was whole"),
        (b"\x00", "connection closed before the answer was whole"),
        (b"\x00\x20half", "connection closed before the answer was whole"),
        (b"\x00\x00", "cut short"),
        (b"\x00\x0c" + b"\xff" * 12, "not a response to this query"),
    ],
    ids=["nothing", "half a length", "half an answer", "empty answer", "garbage"],
)
def test_a_broken_answer_over_tcp_is_a_failure(sent: bytes, why: str) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2)
        writer.write(sent)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def test() -> None:
        async with serving(lambda received: [reply(received.message, flags=0x8380)]) as server:
            server.converse = converse
            assert str(await failure(resolver(server.address).resolve(NAME))).endswith(f"sent no valid answer ({why})")

    run(test)


def test_an_answer_truncated_over_tcp_is_a_failure_and_no_absence() -> None:
    async def test() -> None:
        async with serving(lambda received: [reply(received.message, flags=0x8380)]) as server:
            error = await failure(resolver(server.address).resolve(NAME))
            assert str(error).endswith("sent no valid answer (truncated over TCP)")

    run(test)


def test_an_answer_over_tcp_may_come_byte_by_byte() -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        message = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        (answer,) = ONE(Received(message, "tcp", 0))
        for byte in len(answer).to_bytes(2) + answer:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()

    async def test() -> None:
        async with serving(lambda received: [reply(received.message, flags=0x8380)]) as server:
            server.converse = converse
            assert (await resolver(server.address).resolve(NAME)).addresses == addresses(V4)

    run(test)


def test_a_server_that_drips_over_tcp_runs_into_the_timeout() -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x01\x00")
        try:
            while await reader.read(100):
                writer.write(b"x")
        finally:
            writer.close()

    async def test() -> None:
        async with serving(lambda received: [reply(received.message, flags=0x8380)]) as server:
            server.converse = converse
            error = await failure(resolver(server.address, timeout_s=0.3).resolve(NAME))
            assert str(error).endswith("did not answer within 0.3 s")

    run(test)
