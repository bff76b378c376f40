"""Attacks on what carries datagrams, opens ways, shares lookups and says who a pod is: by workloads and by servers."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address
from types import SimpleNamespace
from typing import cast

import pytest

from policies.hostnames import Hostname
from proxy import child, openings
from proxy.child import Child
from proxy.config import Kubernetes, OnStale
from proxy.elements import Element
from proxy.identity import Change, Pod, Pods, spell_user, unclear, write_row
from proxy.kubernetes import watching
from proxy.kubernetes.watching import Cluster
from proxy.limits import Limits
from proxy.lookups_shared import SharedLookups
from proxy.metrics.meter import Counts
from proxy.nft import read_openings
from proxy.opener.claims import MAX_OF_SOURCE, MAX_OF_WORKLOAD, Claim
from proxy.opener.link import Link
from proxy.opener.messages import MAX_ELEMENTS, Open
from proxy.openings import Openings
from proxy.policy_in_force import PolicyInForce
from proxy.relays import dnstap
from proxy.relays.udp_sessions import Session, Sessions
from proxy.rings import SIZE, Rings, share_rings
from proxy.wire.quic import InitialReader
from tests.proxy.dns_gate import Clock
from tests.proxy.kernel_rules import NEEDS_ROOT
from tests.proxy.quic_client import crypto, datagram, quic_hello
from tests.proxy.test_openings import NOW, POLICY, PUBLIC, SOURCE, WAIT_S, Asked, Case, an_opener, policy, run
from tests.proxy.test_udp_quic import initial, no_names
from tests.proxy.udp_gate import ECHO, Client, Lab, happens
from tests.proxy.udp_gate import run as run_lab

GIT = Hostname("git.example")
ANOTHER = bytes(range(20, 28))  # connection ID of a second connection
OTHERS = "other.example"


# --- QUIC: a hello in pieces, by ways that nobody sees together


def halves(name: str = OTHERS, *, cut: int = 30) -> list[bytes]:
    """A second connection's hello in two datagrams, neither of which says the whole name."""
    said = quic_hello(name)
    return [
        datagram(crypto(0, said[:cut]), destination=ANOTHER),
        datagram(crypto(cut, said[cut:]), destination=ANOTHER, packet_number=1),
    ]


def test_a_hello_cannot_be_put_together_from_two_sessions() -> None:
    """A server knows a connection by its ID, from whatever port it comes: half of another name by each session."""
    first, second = halves()

    async def test() -> None:
        async with no_names() as it:
            door = it.door()
            with Client(door) as one, Client(door) as two:
                for client, half in ((one, first), (two, second)):
                    await client.ask(initial())
                    client.send(half)
                    assert await client.ask(initial()) == initial()  # behind it, so that it has been judged
            left = [message for message, _ in it.server.received]
            assert set(left) == {initial()}

    run_lab(test)


def test_a_later_hello_of_the_same_name_in_pieces_goes_on_once_it_is_whole() -> None:
    first, second = halves(ECHO)

    async def test() -> None:
        async with no_names() as it:
            with Client(it.door()) as client:
                await client.ask(initial())
                client.send(second)
                client.send(first)
                assert [await client.receive(), await client.receive()] == [second, first]

    run_lab(test)


def test_a_hello_that_is_never_whole_takes_little_memory_and_disturbs_no_other_connection() -> None:
    reader = InitialReader()
    reader.feed(initial())
    first, second = halves()
    assert reader.follow(first) == []
    again = [reader.follow(datagram(crypto(0, b"\x01"), size=4000, destination=ANOTHER)) for _ in range(50)]
    assert again == [[]] * 50
    assert reader.held < 10_000
    assert reader.follow(initial()) == [initial()]
    assert reader.follow(b"\x40short") == [b"\x40short"]
    with pytest.raises(ValueError, match="another name"):
        reader.follow(second)


def test_who_sends_is_asked_again_when_the_hello_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first half came from a pod that is gone by the second."""
    said = quic_hello(ECHO)
    parts = [datagram(crypto(0, said[:30])), datagram(crypto(30, said[30:]), packet_number=1)]

    async def test() -> None:
        async with no_names() as it:
            with Client(it.door()) as client:
                client.send(parts[0])
                await happens(lambda: it.relay.is_waiting, "the first half is held")
                monkeypatch.setattr(it.in_force, "identify", lambda address, user=None: "unknown")
                it.relay.judge_anew()
                client.send(parts[1])
                await denied_or_carried(it)
            assert it.server.received == []

    run_lab(test)


async def denied_or_carried(it: Lab) -> None:
    await happens(lambda: it.records or it.server.received, "a verdict")


# --- sessions of datagrams


def test_one_ipv6_machine_does_not_take_the_sessions_of_all_others() -> None:
    """It may send from any address of its /64."""
    sessions = Sessions(Limits(udp_sessions=8, udp_per_source=2))
    for number in range(1, 9):
        source = f"2001:db8::{number}"
        if sessions.has_room(source):
            sessions.add(cast(Session, SimpleNamespace(key=number, source=source)))
    assert sessions.has_room("2001:db8:1::1")


# --- openings


def test_the_longest_time_that_a_name_server_tells_is_one_that_the_opener_takes() -> None:
    """Else whoever has a name with a long TTL unlinks the worker, and nothing opens or closes for anybody."""

    async def test() -> None:
        case = Case()
        await case.open("git.example", PUBLIC, ttl_s=dnstap.MAX_TTL_S)
        [(_, elements, time_s)] = case.link.opened
        one = elements[0]
        asked = Open(1, "app", "git.example", str(one.source), time_s, [(str(one.address), one.protocol, one.port)])
        assert asked.claims() == [Claim("app", GIT, one)]
        assert not case.needs("git.example", PUBLIC, ttl_s=dnstap.MAX_TTL_S)

    run(test)


class TestOpener:
    pytestmark = NEEDS_ROOT

    def test_a_name_with_a_long_ttl_does_not_unlink_the_worker(self) -> None:
        async def test() -> None:
            async with an_opener() as (link, nft, _):
                ways = Openings(PolicyInForce(policy(), None), link, Counts(), wall=lambda: NOW)
                await ways.open("app", SOURCE, GIT, [PUBLIC], dnstap.MAX_TTL_S)
                assert link.is_up
                assert [one.element for one in read_openings(nft)] == [Element(SOURCE, PUBLIC, "tcp", 22)]

        run(test)

    def test_a_hostile_name_server_does_not_fill_the_sets_with_one_answer(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """All the ports of a wide rule at as many addresses as an answer may have, for several sources at once."""
        many = [ip_address(f"93.184.{one}.{two}") for one in range(16) for two in range(16)]

        async def test() -> None:
            async with an_opener() as (link, nft, _):
                ways = Openings(PolicyInForce(policy(), None), link, Counts(), wall=lambda: NOW)
                sources = [ip_address(f"10.1.0.{number}") for number in range(1, 5)]
                name = Hostname("many.example")
                await asyncio.gather(*(ways.open("app", source, name, many, 300) for source in sources))
                await eventually(lambda: not asking(link))
                found = Counter(one.element.source for one in read_openings(nft))
                assert max(found.values()) <= MAX_OF_SOURCE + MAX_ELEMENTS
                assert found.total() <= MAX_OF_WORKLOAD + MAX_ELEMENTS
                assert link.is_up

        run(test)
        assert caplog.messages == []  # nor does it fill what the gate says


def test_an_answer_that_comes_when_its_source_is_somebody_elses_opens_nothing() -> None:
    """It was asked by a pod that is gone: nothing reviews what is opened for its address after the review."""

    async def test() -> None:
        case = Case()
        await case.openings.open("watched", SOURCE, GIT, [PUBLIC], 60)  # whoever asked, SOURCE is app's
        moved = policy(POLICY.replace("10.1.0.0/24", "10.3.0.0/24"))
        case.in_force.policy = moved
        assert not case.openings.needs("app", SOURCE, GIT, [PUBLIC], 60)
        await case.openings.open("app", SOURCE, GIT, [PUBLIC], 60)
        assert case.link.opened == []

    run(test)


def test_what_a_rule_opened_is_reviewed_when_its_last_day_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow that never pauses would go on for ever: no policy changes at midnight."""
    monkeypatch.setattr(openings, "LOOK_S", 0.01)
    last_day = datetime(2026, 11, 23, 23, 59, 50, tzinfo=UTC).timestamp()
    text = POLICY.replace("tcp: git.example:22", "{tcp: git.example:22, until: 2026-11-23}", 1)

    async def test() -> None:
        wall = Clock(last_day)
        link = Asked()
        link.claims = [Claim("app", GIT, Element(SOURCE, PUBLIC, "tcp", 22))]
        ways = Openings(PolicyInForce(policy(text), None), link, Counts(), wall=wall)
        await ways.open("app", SOURCE, GIT, [PUBLIC], 60)
        await asyncio.sleep(0.05)
        assert (len(link.opened), link.closed) == (1, [])
        wall.now += 20
        async with asyncio.timeout(WAIT_S):
            while not link.closed:  # noqa: ASYNC110 - a timer's doing
                await asyncio.sleep(0.005)
        assert link.closed == link.claims
        ways.close()

    run(test)


def asking(link: Link) -> bool:
    return bool(link._waiting)


async def eventually(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not look():  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.01)


def test_a_worker_that_has_gone_mad_writes_no_text_of_nft() -> None:
    """`True` is a number to Python, and a word to nft: a transaction that fails closes the opener to all others."""
    with pytest.raises(ValueError, match="no element"):
        Open(1, "app", "git.example", "10.1.0.1", 60.0, [("93.184.216.34", "tcp", True)]).claims()


# --- lookups in memory that all workers share


def test_a_worker_that_has_gone_mad_does_not_keep_another_from_noting_what_it_told() -> None:
    """It can write everywhere in the memory: a head at the end of numbers must not fail every answer."""
    shared = share_rings(2)
    memory = mmap.mmap(shared, 2 * (SIZE + mmap.PAGESIZE))
    one = SharedLookups(Rings(os.dup(shared), 0, 2), clock=lambda: 1000.0)
    two = SharedLookups(Rings(os.dup(shared), 1, 2), clock=lambda: 1000.0)
    for head, tail in ((2**64 - 1, 2**64 - 1), (2**64 - 1, 0), (0, 2**64 - 1), (5, 2**63)):
        memory[:16] = struct.pack("=QQ", head, tail)
        for number in range(3):
            one.note("app", Hostname(f"n{head % 7}-{tail % 7}-{number}.example"), [ip_address("192.0.2.1")], 1060)
    assert Hostname("n5-1-2.example") in two.names_of("app", ip_address("192.0.2.1"))
    os.close(shared)


def test_nobody_takes_the_shared_memory_from_under_the_others() -> None:
    """A read behind the end of a file that was cut is SIGBUS, for every worker."""
    shared = share_rings(2)
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(shared, size)
    assert fcntl.fcntl(shared, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    os.close(shared)


# --- pods


VICTIM = Pod("uid-1", "bank", "ledger", (), (ip_address("10.4.0.7"),))


def test_an_ipv6_source_is_never_the_pod_of_the_same_number_in_ipv4() -> None:
    """::10.4.0.7 is an address that routers carry like any other."""
    pods = Pods()
    pods.take(Change(pods=[write_row(VICTIM)]))
    forged = ip_address("::10.4.0.7")
    assert pods.who(ip_address("10.4.0.7")) == VICTIM
    assert pods.who(forged) is None
    six = replace(VICTIM, uid="uid-2", namespace="other", addresses=(forged,))
    pods.take(Change(pods=[write_row(six)]))
    assert (pods.who(ip_address("10.4.0.7")), pods.who(forged)) == (VICTIM, six)


def test_the_token_of_a_pod_that_has_ended_is_no_use_to_the_next_one_at_its_address() -> None:
    """It counts at the API until the pod is gone, and whoever had the volume may have kept it."""
    pods = Pods()
    pods.take(Change(pods=[write_row(unclear(VICTIM))]))
    [address] = VICTIM.addresses
    user = spell_user(VICTIM.namespace, VICTIM.service_account, VICTIM.uid)
    assert pods.vouched(user, address) == unclear(VICTIM)
    pods.take(Change(pods=[write_row(Pod("uid-2", "other", "thief", (), (address,)))]))
    assert pods.vouched(user, address) is None


class Silent:
    """A process that says nothing."""

    def __init__(self) -> None:
        self.sock, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.killed = False
        self.process = None

    def kill(self) -> None:
        self.killed = True
        self.theirs.close()


@pytest.mark.parametrize("on_stale", OnStale)
def test_a_watch_that_hangs_is_said_and_replaced(on_stale: OnStale, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `keep` the pods are believed as they last were: that must not be so in silence, and not for ever."""
    started: list[Silent] = []

    def start(*_: object, **__: object) -> Child:
        started.append(Silent())
        return cast(Child, started[-1])

    now = 1000.0
    monkeypatch.setattr(child, "start", start)
    monkeypatch.setattr(watching, "monotonic", lambda: now)
    monkeypatch.setattr(watching, "TICK_S", 0.01)

    async def test() -> None:
        nonlocal now
        said: list[str] = []
        cluster = Cluster(Kubernetes(on_stale=on_stale, stale_s=300), lambda _: None, said.append)
        cluster.start()
        for text in (b'{"begin":true}', b'{"listed":true}'):
            started[0].theirs.send(text)
        running = asyncio.create_task(cluster.run())
        await happens(lambda: cluster.unready is None, "it is listed")
        assert list(cluster.notes) == []
        now += 301
        await happens(lambda: cluster.unready if on_stale is OnStale.DENY else list(cluster.notes), "it is said")
        now += watching.SILENCE_S
        await happens(lambda: len(started) > 1, "another process")
        assert started[0].killed
        running.cancel()
        cluster.close()

    run(test)
