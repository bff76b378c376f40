"""What a lookup opens, by the policy alone; then a worker's end, a real opener and a real kernel between them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest

from policies.addresses import Address
from policies.hostnames import Hostname
from policies.index import Policy
from policies.load import load
from policies.model import Reason
from policies.tree import Source
from proxy import openings as module
from proxy.elements import Element
from proxy.layout import read_layout
from proxy.metrics.meter import Counts
from proxy.nft import Library, read_openings
from proxy.opener.claims import Claim
from proxy.opener.host import OpenerProcess
from proxy.opener.link import Link, NotOpened
from proxy.openings import Openings
from proxy.policy_in_force import PolicyInForce
from proxy.ruleset import render
from tests.proxy.dns_gate import Clock
from tests.proxy.kernel_rules import NEEDS_ROOT, in_namespace

WAIT_S = 20.0
POLICY = """
version: 1
guard:
  - {host: closed.example, deny: all}
workloads:
  app:
    match: {address: [10.1.0.0/24, "fd01::/64"]}
    rules:
      - tcp: git.example:22
      - {tcp: {host: many.example, ports: [8000-8063]}}
      - {tcp: {host: wide.example, ports: [8000-8064]}}
      - udp: wire.example:51820
      - {udp: {host: wire.example, ports: [53, 123]}}
      - {udp: {host: wire.example, ports: [443]}}
      - {udp: {host: paid.example, ports: [9000]}, budget: 10MiB/h}
      - {udp: {host: quick.example, ports: [9000]}, quic: sni}
      - {host: web.example, ports: [443, 8443]}
      - tcp: web.example:8443
      - tcp: other.example:443
      - {tcp: old.example:22, until: 2020-01-31}
      - tcp: closed.example:22
      - {tcp: inside.example:5432, private: true}
      - tcp: outside.example:5432
      - tcp: 93.184.216.0/24:7000
  watched:
    match: {address: [10.2.0.0/24]}
    mode: audit
    rules: [{tcp: git.example:22}]
"""
SOURCE, SOURCE6 = ip_address("10.1.0.7"), ip_address("fd01::7")
PUBLIC, OTHER, PUBLIC6 = map(ip_address, ("93.184.216.34", "93.184.216.35", "2606:2800:220:1::34"))
PRIVATE, METADATA = ip_address("10.9.0.5"), ip_address("169.254.169.254")
NOW = 1_800_000_000.0


def policy(text: str = POLICY) -> Policy:
    return load([Source("test.yaml", text)], catalogue={}, tags={}, is_public_suffix=lambda name: "." not in name)


class Asked(Link):
    """A link to nobody, which keeps what is asked. `refuses` has it say no."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[tuple[str, tuple[Element, ...], float]] = []
        self.refuses = False
        self.hangs = False
        self.claims: list[Claim] = []
        self.closed: list[Claim] = []

    @property
    def is_up(self) -> bool:
        return True

    async def open(self, workload: str, name: Hostname, elements: Sequence[Element], time_s: float) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.refuses:
            raise NotOpened("it does not want to")
        self.opened.append((workload, tuple(elements), time_s))

    async def review(self, admits: Callable[[Claim], bool]) -> None:
        if self.refuses:
            raise NotOpened("it does not want to")
        self.closed += [claim for claim in self.claims if not admits(claim)]


class Case:
    """One worker's openings with that policy."""

    def __init__(self) -> None:
        self.link = Asked()
        self.clock = Clock()
        self.in_force = PolicyInForce(policy(), None)
        self.counts = Counts()
        self.openings = Openings(self.in_force, self.link, self.counts, clock=self.clock, wall=lambda: NOW)

    async def open(self, name: str, *addresses: Address, source: Address = SOURCE, ttl_s: float = 300) -> None:
        workload = self.in_force.identify(source)
        await self.openings.open(workload, source, Hostname(name), addresses, ttl_s)

    def needs(self, name: str, *addresses: Address, ttl_s: float = 0.0, source: Address = SOURCE) -> bool:
        return self.openings.needs(self.in_force.identify(source), source, Hostname(name), addresses, ttl_s)

    def opened(self) -> list[tuple[Address, str, int]]:
        return [(one.address, one.protocol, one.port) for _, found, _ in self.link.opened for one in found]


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * WAIT_S):
            await test()

    asyncio.run(bounded())


@pytest.mark.parametrize(
    ("name", "addresses", "expected"),
    [
        pytest.param("git.example", [PUBLIC], [(PUBLIC, "tcp", 22)], id="tcp"),
        pytest.param("git.example", [PUBLIC, OTHER], [(PUBLIC, "tcp", 22), (OTHER, "tcp", 22)], id="every address"),
        pytest.param("git.example", [PUBLIC6], [], id="an address of the other family"),
        pytest.param("wire.example", [PUBLIC], [(PUBLIC, "udp", 51820)], id="udp, and never its 443, 53 and 123"),
        pytest.param("many.example", [PUBLIC], [(PUBLIC, "tcp", port) for port in range(8000, 8064)], id="64 ports"),
        pytest.param("wide.example", [PUBLIC], [], id="65 ports"),
        pytest.param("paid.example", [PUBLIC], [], id="with a budget"),
        pytest.param("quick.example", [PUBLIC], [], id="quic judged by name"),
        pytest.param("web.example", [PUBLIC], [], id="beside a host rule of that port"),
        pytest.param("other.example", [PUBLIC], [], id="on a port of somebody's host rule"),
        pytest.param("old.example", [PUBLIC], [], id="expired"),
        pytest.param("closed.example", [PUBLIC], [], id="closed by the guard"),
        pytest.param("inside.example", [PRIVATE], [(PRIVATE, "tcp", 5432)], id="private where the rule says so"),
        pytest.param("outside.example", [PRIVATE], [], id="private"),
        pytest.param("inside.example", [METADATA], [], id="metadata"),
        pytest.param("unknown.example", [PUBLIC], [], id="no rule"),
    ],
)
def test_what_a_lookup_opens_is_what_the_gate_would_carry_unseen(
    name: str, addresses: list[Address], expected: list[tuple[Address, str, int]]
) -> None:
    async def test() -> None:
        case = Case()
        await case.open(name, *addresses)
        assert case.opened() == expected

    run(test)


def test_audit_opens_nothing_so_that_the_gate_sees_everything() -> None:
    async def test() -> None:
        case = Case()
        source = ip_address("10.2.0.7")
        assert not case.needs("git.example", PUBLIC, source=source)
        await case.open("git.example", PUBLIC, source=source)
        assert case.opened() == []

    run(test)


def test_a_gate_that_denies_everything_opens_nothing() -> None:
    async def test() -> None:
        case = Case()
        case.in_force.close_for(Reason.LOG_FAILED)
        await case.open("git.example", PUBLIC)
        assert case.opened() == []

    run(test)


def test_a_lookup_that_holds_is_not_asked_again_until_half_its_time_is_over() -> None:
    async def test() -> None:
        case = Case()
        assert not case.needs("unknown.example", PUBLIC)
        assert case.needs("git.example", PUBLIC)
        await case.open("git.example", PUBLIC, ttl_s=5)
        assert [time_s for *_, time_s in case.link.opened] == [60]
        assert not case.needs("git.example", PUBLIC, ttl_s=5)
        assert case.needs("git.example", PUBLIC, OTHER)  # an address that is new
        assert case.needs("git.example", PUBLIC, ttl_s=300)  # an answer that holds for longer
        assert case.needs("git.example", PUBLIC, source=ip_address("10.1.0.8"))  # somebody else
        case.clock.now += 31
        assert case.needs("git.example", PUBLIC)
        await case.open("git.example", PUBLIC, ttl_s=300)
        assert case.link.opened[-1][2] == 600

    run(test)


def test_what_failed_or_was_forgotten_is_asked_again() -> None:
    async def test() -> None:
        case = Case()
        case.link.refuses = True
        await case.open("git.example", PUBLIC)
        assert case.needs("git.example", PUBLIC)
        case.link.refuses = False
        await case.open("git.example", PUBLIC)
        assert not case.needs("git.example", PUBLIC)
        case.link.forget()
        assert case.needs("git.example", PUBLIC)
        assert case.counts.snapshot()["outgate_openings_total|failed"] == 1
        assert case.counts.snapshot()["outgate_openings_total|opened"] == 1

    run(test)


def test_what_was_asked_before_it_was_forgotten_does_not_count_as_open() -> None:
    async def test() -> None:
        case = Case()
        case.link.hangs = True
        opening = asyncio.create_task(case.open("git.example", PUBLIC))
        await asyncio.sleep(0)
        case.link.forget()
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        assert case.needs("git.example", PUBLIC)

    run(test)


def test_an_answer_waits_no_longer_than_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 0.05)

    async def test() -> None:
        case = Case()
        case.link.hangs = True
        await case.open("git.example", PUBLIC)
        assert case.counts.snapshot()["outgate_openings_total|late"] == 1
        assert case.needs("git.example", PUBLIC)

    run(test)


def test_a_review_closes_what_the_new_policy_would_not_open() -> None:
    async def test() -> None:
        case = Case()

        def claim(name: str, port: int, workload: str = "app", source: Address = SOURCE) -> Claim:
            return Claim(workload, Hostname(name), Element(source, PUBLIC, "tcp", port))

        case.link.claims = [
            claim("git.example", 22), claim("git.example", 23), claim("outside.example", 5432),
            claim("git.example", 22, "former"), claim("git.example", 22, source=ip_address("10.9.9.9")),
        ]  # fmt: skip
        await case.openings.review()
        assert case.link.closed == [case.link.claims[1], case.link.claims[3], case.link.claims[4]]
        case.link.closed.clear()
        case.in_force.policy = policy(POLICY.replace("tcp: outside.example:5432", "dns: outside.example"))
        await case.openings.review()
        assert claim("outside.example", 5432) in case.link.closed
        assert not case.openings.is_stale

    run(test)


def test_a_review_that_fails_is_tried_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REVIEW_S", 0.05)
    monkeypatch.setattr(module, "RETRY_S", 0.01)

    async def test() -> None:
        case = Case()
        case.link.refuses = True
        await case.openings.review()
        assert case.openings.is_stale
        case.link.refuses = False
        while case.openings.is_stale:  # noqa: ASYNC110 - a task of its own
            await asyncio.sleep(0.01)

    run(test)


def test_a_link_to_nobody_opens_nothing() -> None:
    async def test() -> None:
        with pytest.raises(NotOpened, match="not running"):
            await Link().open("app", Hostname("git.example"), [Element(SOURCE, PUBLIC, "tcp", 22)], 60)

    run(test)


# --- with a real opener


class TestOpener:
    pytestmark = NEEDS_ROOT

    def test_what_is_acknowledged_is_in_the_kernel_and_closes_with_its_time(self) -> None:
        async def test() -> None:
            async with an_opener() as (link, nft, _):
                await link.open("app", Hostname("git.example"), [Element(SOURCE, PUBLIC, "tcp", 22)], 1)
                assert [one.element.port for one in read_openings(nft)] == [22]
                while read_openings(nft):  # noqa: ASYNC110 - the kernel's doing
                    await asyncio.sleep(0.05)

        run(test)

    def test_it_takes_less_than_a_millisecond_from_a_worker_to_the_kernel_and_back(self) -> None:
        """The median; it is printed."""

        async def test() -> None:
            async with an_opener() as (link, nft, _):
                took = []
                for port in range(1, 301):
                    started = time.perf_counter()
                    await link.open("app", Hostname("git.example"), [Element(SOURCE, PUBLIC, "tcp", port)], 600)
                    took.append(time.perf_counter() - started)
                assert len(read_openings(nft)) == 300
                print(f"opened in {sorted(took)[150] * 1e3:.3f} ms (median of 300)")
                assert sorted(took)[150] < 0.1  # generous: others load the machine; the bench has the goal

        run(test)

    def test_many_at_once_are_opened_each(self) -> None:
        async def test() -> None:
            async with an_opener() as (link, nft, process):
                second = Link()
                second.attach(process_link(process))
                targets = [
                    (one, Element(source, PUBLIC if source.version == 4 else PUBLIC6, "tcp", port))
                    for port in range(1, 201)
                    for one, source in ((link, SOURCE), (second, SOURCE6))
                ]
                await asyncio.gather(*(one.open("app", Hostname("a.example"), [what], 60) for one, what in targets))
                assert {one.element for one in read_openings(nft)} == {what for _, what in targets}
                many = [Element(SOURCE, OTHER, "udp", port) for port in range(1, 2001)]
                await link.open("app", Hostname("a.example"), many, 60)
                assert len(read_openings(nft)) == 400 + 2000
                with pytest.raises(NotOpened, match="has all the openings it may have"):
                    await link.open("app", Hostname("a.example"), [Element(SOURCE, OTHER, "tcp", 999)], 60)
                await second.open("app", Hostname("a.example"), [Element(SOURCE6, PUBLIC6, "udp", 1)], 60)
                second.close()

        run(test)

    def test_a_review_by_one_worker_closes_what_another_opened_and_no_name_admits(self) -> None:
        async def test() -> None:
            async with an_opener() as (link, nft, process):
                second = Link()
                second.attach(process_link(process))
                for name, port in (("a.example", 22), ("b.example", 22), ("b.example", 23)):
                    await second.open("app", Hostname(name), [Element(SOURCE, PUBLIC, "tcp", port)], 60)
                for number in range(500):  # more than fit one message
                    await second.open("app", Hostname("a.example"), [Element(SOURCE, OTHER, "tcp", number + 1)], 60)
                await link.review(lambda claim: claim.name == "a.example")
                assert {one.element.port for one in read_openings(nft) if one.element.address == PUBLIC} == {22}
                assert len(read_openings(nft)) == 501
                await link.review(lambda claim: False)
                assert read_openings(nft) == []
                second.close()

        run(test)

    def test_a_worker_that_speaks_nonsense_is_heard_no_more(self) -> None:
        async def test() -> None:
            async with an_opener() as (link, _, process):
                sock = process_link(process)
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_sendall(sock, b'{"Open": {}}')
                assert await asyncio.get_running_loop().sock_recv(sock, 100) == b""
                sock.close()
                await link.open("app", Hostname("a.example"), [Element(SOURCE, PUBLIC, "tcp", 22)], 60)

        run(test)


def process_link(process: OpenerProcess) -> socket.socket:
    found = process.link()
    assert found
    return found


@asynccontextmanager
async def an_opener() -> AsyncIterator[tuple[Link, Library, OpenerProcess]]:
    """Rules in a namespace of its own, an opener there, and a worker's link to it."""
    with in_namespace("br0"):
        nft = Library()
        nft.run(render(read_layout("gateway", {}, {})))
        said: list[str] = []
        process = OpenerProcess(lambda: None, said.append)
        process.start()
        link = Link()
        try:
            assert await process.first() == "", said
            link.attach(process_link(process))
            yield link, nft, process
        finally:
            link.close()
            await process.close()
            assert read_openings(nft) == []  # closed as it ended
            nft.close()
