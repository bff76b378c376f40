"""The observer of the site's own name servers opens what the policy admits of their answers, whoever writes to it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from ipaddress import ip_address
from pathlib import Path

import pytest

from policies.addresses import Address
from policies.hostnames import Hostname
from policies.model import Attempt, Verdict
from proxy.lookups import Lookups
from proxy.metrics.meter import Counts
from proxy.metrics.table import METRICS
from proxy.openings import Openings
from proxy.policy_in_force import PolicyInForce
from proxy.record import Record
from proxy.relays.dnstap import MAX_ADDRESSES, MAX_TTL_S, Observed, Observer, TapEnd, TapLimits
from proxy.service.doors import open_tap
from proxy.wire.dns import AAAA
from tests.builders import policy
from tests.proxy.dns_gate import HTTPS, POLICY, PUBLIC, PUBLIC6, TXT, Clock
from tests.proxy.nameserver import address
from tests.proxy.tapping import (
    ACCEPT,
    FINISH,
    READY,
    SERVER,
    START,
    STOP,
    cname,
    counted,
    dns_response,
    framed,
    message,
    number,
    tap,
    told,
)

WAIT_S = 20.0
SSH = "git.example"  # the policy has a tcp rule for it


@dataclass
class FakeOpenings:
    """Stands for `Openings`, whose own tests have the kernel."""

    opened: list[tuple[str, str, str, list[str], float]] = field(default_factory=list)

    def needs(
        self, workload: str, source: Address, name: Hostname, addresses: Sequence[Address], ttl_s: float = 0.0
    ) -> bool:
        return name == SSH

    async def open(
        self, workload: str, source: Address, name: Hostname, addresses: Sequence[Address], ttl_s: float
    ) -> None:
        self.opened.append((workload, str(source), name, [str(one) for one in addresses], ttl_s))


@dataclass
class Heard:
    """An observer, where it listens, and what came of what it heard."""

    path: Path
    observer: Observer
    lookups: Lookups
    clock: Clock
    counts: Counts
    openings: FakeOpenings
    records: list[Record]

    def count(self, name: str, label: str) -> int:
        found = self.counts.snapshot().get(METRICS[name].series(label), 0)
        assert isinstance(found, int)
        return found

    def answers(self, outcome: Observed) -> int:
        return self.count("outgate_dnstap_answers_total", outcome)

    def ended(self, end: TapEnd) -> int:
        return self.count("outgate_dnstap_streams_total", end)

    def names(self, text: str = PUBLIC, workload: str = "app") -> list[str]:
        return list(self.lookups.names_of(workload, ip_address(text)))

    async def tell(self, *frames: bytes) -> None:
        """One sender's whole stream, as CoreDNS sends it; returns when all of it was judged."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(READY)
        assert await asyncio.wait_for(reader.readexactly(len(ACCEPT)), WAIT_S) == ACCEPT
        writer.write(START + b"".join(frames) + STOP)
        assert await asyncio.wait_for(reader.read(), WAIT_S) == FINISH
        writer.close()
        await writer.wait_closed()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110 - counters have no event
                await asyncio.sleep(0.01)

    @property
    def is_untouched(self) -> bool:
        """Nothing is known and nothing is open."""
        return not self.openings.opened and not any(
            self.lookups.names_of(workload, ip_address(text))
            for workload in ("app", "other")
            for text in (PUBLIC, PUBLIC6, "10.0.0.7", "169.254.169.254", "127.0.0.1", "::1")
        )


@asynccontextmanager
async def hearing(
    directory: Path,
    *,
    text: str = POLICY,
    search: Sequence[str] = (),
    limits: TapLimits | None = None,
    judge: Callable[[Attempt], Verdict] | None = None,
) -> AsyncIterator[Heard]:
    clock, records, openings, counts = Clock(), list[Record](), FakeOpenings(), Counts()
    lookups = Lookups(clock=clock)
    in_force = PolicyInForce(policy(text), None)
    if judge:
        in_force.decide = judge  # type: ignore[assignment,method-assign]  # the one part of it that is to fail
    observer = Observer(
        in_force,
        lookups,
        records.append,
        counts,
        openings=as_openings(openings),
        search=[Hostname(domain) for domain in search],
        limits=limits,
        clock=clock,
    )
    path = directory / "tap.sock"
    [listener] = open_tap(str(path))
    with listener:
        task = asyncio.create_task(observer.serve(listener))
        try:
            yield Heard(path, observer, lookups, clock, counts, openings, records)
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def on_a_loop[**P](test: Callable[P, Coroutine[None, None, None]]) -> Callable[P, None]:
    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def as_openings(fake: FakeOpenings) -> Openings:
    return fake  # type: ignore[return-value]  # it has the two methods that are called


@on_a_loop
async def test_an_answer_is_remembered_and_opened(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        both = [address(b"\xc0\x0c", PUBLIC, 77), address(b"\xc0\x0c", "93.184.216.35", 90)]
        await heard.tell(told(SSH, both))
        assert heard.openings.opened == [("app", "127.0.0.1", SSH, [PUBLIC, "93.184.216.35"], 77)]
        assert heard.names() == heard.names("93.184.216.35") == [SSH]
        assert heard.names(workload="other") == []
        assert (heard.answers(Observed.ADMITTED), heard.records) == (1, [])  # no verdict of ours
        heard.clock.now += 2 * 77 - 1
        assert heard.names() == [SSH]
        heard.clock.now += 1
        assert heard.names() == []


@on_a_loop
async def test_a_lookup_counts_for_a_minute_at_least(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        await heard.tell(told(SSH, PUBLIC, ttl_s=0))
        heard.clock.now += 59
        assert heard.names() == [SSH]


@on_a_loop
async def test_what_needs_no_opening_is_remembered_alone(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        await heard.tell(told("api.example", PUBLIC), told("api.example", PUBLIC6, qtype=AAAA, client="::1"))
        assert (heard.openings.opened, heard.names(), heard.names(PUBLIC6)) == ([], ["api.example"], ["api.example"])


@on_a_loop
async def test_each_client_is_its_own_workload(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        await heard.tell(
            told("other.example", PUBLIC, "127.0.0.2"),
            told("api.example", PUBLIC, "127.0.0.2"),
            told("api.example", PUBLIC, "203.0.113.9"),
        )
        assert (heard.names(workload="other"), heard.names()) == (["other.example"], [])
        assert [record["workload"] for record in heard.records] == ["other"]
        assert heard.answers(Observed.UNKNOWN_WORKLOAD) == 1  # a site's server has clients that are none of ours


@on_a_loop
async def test_what_the_policy_denies_is_recorded_as_observed(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        await heard.tell(told("evil.example", PUBLIC))
        [record] = heard.records
        assert heard.answers(Observed.DENIED) == 1
        assert heard.is_untouched
    expected = {
        "stage": "dns",
        "verdict": "deny",
        "reason": "no_rule",
        "workload": "app",
        "server.name": "evil.example",
        "source.address": "127.0.0.1",
        "source.port": 4711,
        "destination.address": SERVER,
        "destination.port": 53,
        "dns.question.type": "A",
        "dns.observed": True,
    }
    assert {name: record.get(name) for name in expected} == expected


@on_a_loop
async def test_audit_mode_admits_and_says_what_it_would_be(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        await heard.tell(told("evil.example", PUBLIC, "127.0.0.3"))
        [record] = heard.records
        assert (record["verdict"], record["would_be"], record["dns.observed"]) == ("allow", "deny", True)
        assert heard.names(workload="watched") == ["evil.example"]


@on_a_loop
async def test_search_noise_is_not_recorded(tmp_path: Path) -> None:
    async with hearing(tmp_path, search=["corp.internal"]) as heard:
        await heard.tell(told("api.example.corp.internal", rcode=3), told("evil.example.corp.internal", rcode=3))
        assert [record["server.name"] for record in heard.records] == ["evil.example.corp.internal"]


# --- attacks of who may write to the socket


FORGED = {
    "metadata": (told(SSH, "169.254.169.254"), "never_reached"),
    "metadata, mapped": (told(SSH, "::ffff:169.254.169.254", qtype=AAAA), "never_reached"),
    "loopback": (told(SSH, "127.0.0.1"), "never_reached"),
    "private": (told(SSH, "10.0.0.7"), "private_address"),
    "another name": (told("evil.example", PUBLIC), "no_rule"),
    "closed name": (told("closed.cdn.example", PUBLIC), "deny_rule"),
    "guarded name": (told("x.paste.example", PUBLIC), "guard"),
    "expired rule": (told("old.example", PUBLIC), "expired"),
    "ancestor": (told("parent.example", PUBLIC), "ancestor"),
    "no hostname": (told("no host.example", PUBLIC), "malformed_name"),
    "text of an allowed name": (told(SSH, [address(b"\xc0\x0c", PUBLIC)], qtype=TXT), "query_type"),
    "alias of an unnamed name": (
        told("evil.example", [cname("evil.example", SSH), address(SSH, PUBLIC)]),
        "no_rule",
    ),
}


@pytest.mark.parametrize(("frame", "reason"), FORGED.values(), ids=FORGED.keys())
@on_a_loop
async def test_forged_answers_open_nothing(frame: bytes, reason: str, tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        await heard.tell(frame)
        assert heard.is_untouched
        assert [record["reason"] for record in heard.records] == [reason]


EMPTY = {
    "NXDOMAIN": told(SSH, PUBLIC, rcode=3),
    "SERVFAIL": told(SSH, PUBLIC, rcode=2),
    "truncated": told(SSH, PUBLIC, flags=0x8380),
    "no answer": told(SSH),
    "beside the chain": told(SSH, [cname(SSH, "x.example"), address("y.example", PUBLIC)]),
    "of another owner": told(SSH, [address("evil.example", PUBLIC)]),
    "HTTPS": told(SSH, [address(b"\xc0\x0c", PUBLIC)], qtype=HTTPS),
    "a question": framed(tap(message(dns_response(SSH, PUBLIC, flags=0x100)))),
    "garbage": framed(tap(message(b"\xff" * 40))),
    "chain without end": told(SSH, [cname(SSH, "x.example"), cname("x.example", SSH)]),
    "2000 records": framed(tap(message(dns_response(SSH, [address(b"\xc0\x0c", PUBLIC)] * 2000)))),
}


@pytest.mark.parametrize("frame", EMPTY.values(), ids=EMPTY.keys())
@on_a_loop
async def test_what_tells_no_address_opens_nothing(frame: bytes, tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        await heard.tell(frame)
        assert heard.is_untouched
        assert (heard.answers(Observed.EMPTY), heard.ended(TapEnd.FINISHED)) == (1, 1)


OTHERS = [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]


@on_a_loop
async def test_only_answers_to_clients_count(tmp_path: Path) -> None:
    """What a server asks and hears itself is no workload's lookup."""
    async with hearing(tmp_path) as heard:
        response = dns_response(SSH, PUBLIC)
        await heard.tell(*(framed(tap(message(response, type=kind))) for kind in OTHERS), framed(tap(number(1, 6))))
        assert heard.is_untouched
        assert heard.records == []


@on_a_loop
async def test_some_admitted_addresses_pass_without_the_others(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        texts = ["10.0.0.7", PUBLIC, "169.254.169.254"]
        await heard.tell(told(SSH, [address(b"\xc0\x0c", text) for text in texts]))
        assert heard.openings.opened == [("app", "127.0.0.1", SSH, [PUBLIC], 60)]
        assert heard.names("10.0.0.7") == heard.names("169.254.169.254") == []


@on_a_loop
async def test_a_huge_ttl_and_many_addresses_are_bounded(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        many = [address(b"\xc0\x0c", f"93.184.{n // 250}.{n % 250}", 0x7FFFFFFF) for n in range(1000)]
        await heard.tell(told(SSH, many))
        [(_, _, _, addresses, ttl_s)] = heard.openings.opened
        assert (len(addresses), ttl_s) == (MAX_ADDRESSES, MAX_TTL_S)
        heard.clock.now += 2 * MAX_TTL_S
        assert heard.names("93.184.0.1") == []


@on_a_loop
async def test_a_fault_of_ours_denies_that_answer_alone(tmp_path: Path) -> None:
    in_force = PolicyInForce(policy(POLICY), None)

    def judge(attempt: Attempt) -> Verdict:
        if attempt.host == "api.example":
            raise RuntimeError("ours")
        return in_force.decide(attempt)

    async with hearing(tmp_path, judge=judge) as heard:
        await heard.tell(told("api.example", PUBLIC), told(SSH, PUBLIC))
        [record] = heard.records
        assert (record["reason"], record["error.message"]) == ("gate_failed", "RuntimeError('ours')")
        assert heard.names() == [SSH]


# --- streams


async def connected(heard: Heard) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(heard.path))
    return sock


BROKEN = {
    "data without START": told(SSH, PUBLIC),
    "another content type": START.replace(b"Dnstap", b"Dnstop"),
    "4 GiB announced": START + b"\xff\xff\xff\xff",
    "no protobuf": START + framed(b"\xff" * 30),
    "half a protobuf": START + framed(tap(message(dns_response(SSH, PUBLIC)))[:-9]),
    "two clients": START + framed(tap(message(dns_response(SSH, PUBLIC), more=counted(4, bytes(4))))),
    "HTTP": b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
@on_a_loop
async def test_a_malformed_stream_ends_alone(data: bytes, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with hearing(tmp_path) as heard:
        with await connected(heard) as good, await connected(heard) as bad:
            await loop.sock_sendall(good, START + told("api.example", PUBLIC))
            await loop.sock_sendall(bad, data + told(SSH, PUBLIC))
            with suppress(ConnectionResetError):  # what it did not read is lost
                assert await asyncio.wait_for(loop.sock_recv(bad, 1), WAIT_S) == b""
            assert heard.ended(TapEnd.MALFORMED) == 1
            assert heard.openings.opened == []
            await loop.sock_sendall(good, told("api.example", "93.184.216.35"))
            await heard.until(lambda: heard.names("93.184.216.35") == ["api.example"])
            assert heard.observer.senders == 1


@on_a_loop
async def test_a_frame_that_comes_byte_by_byte_is_read(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with hearing(tmp_path) as heard:
        with await connected(heard) as sock:
            for byte in START + told(SSH, PUBLIC):
                await loop.sock_sendall(sock, bytes((byte,)))
            await heard.until(lambda: heard.names() == [SSH])


@pytest.mark.parametrize(
    "begun", [b"", READY, READY + START[:9], START + told(SSH, PUBLIC)[:-1], START + struct.pack("!I", 9)]
)
@on_a_loop
async def test_a_sender_that_never_ends_a_frame_is_left(begun: bytes, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with hearing(tmp_path, limits=TapLimits(frame_timeout_s=0.2)) as heard:
        with await connected(heard) as sock:
            await loop.sock_sendall(sock, begun)
            answered = await asyncio.wait_for(loop.sock_recv(sock, 200), WAIT_S)
            assert answered == (ACCEPT if begun[:12] == READY[:12] else b"")
            await heard.until(lambda: heard.ended(TapEnd.SLOW) == 1)
        assert heard.is_untouched


@on_a_loop
async def test_a_dribble_does_not_hold_a_frame_open(tmp_path: Path) -> None:
    """Each byte is in time, the frame is not."""
    loop = asyncio.get_running_loop()
    async with hearing(tmp_path, limits=TapLimits(frame_timeout_s=0.3)) as heard:
        with await connected(heard) as sock, suppress(OSError):
            await loop.sock_sendall(sock, START + struct.pack("!I", 100_000))
            async with asyncio.timeout(WAIT_S):
                while not heard.ended(TapEnd.SLOW):
                    await loop.sock_sendall(sock, b"x")
                    await asyncio.sleep(0.02)
        assert heard.ended(TapEnd.SLOW) == 1


@on_a_loop
async def test_a_silent_sender_may_stay(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with hearing(tmp_path, limits=TapLimits(frame_timeout_s=0.1)) as heard:
        with await connected(heard) as quiet, await connected(heard) as slow:
            await loop.sock_sendall(quiet, START)
            await heard.until(lambda: heard.ended(TapEnd.SLOW) == 1)  # the other one's time is over, begun later
            await loop.sock_sendall(quiet, told(SSH, PUBLIC))
            await heard.until(lambda: heard.names() == [SSH])
            assert slow.fileno() > 0


@on_a_loop
async def test_a_sender_that_resets_at_the_end_is_no_fault(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with hearing(tmp_path) as heard:
        for stream in (
            READY + START + told(SSH, PUBLIC) + STOP,
            START + told(SSH, PUBLIC),
            START + told(SSH, PUBLIC)[:50],
        ):
            with await connected(heard) as sock:
                await loop.sock_sendall(sock, stream)
        await heard.until(lambda: heard.ended(TapEnd.CLOSED) + heard.ended(TapEnd.FINISHED) == 3)
        assert (heard.names(), heard.observer.senders) == ([SSH], 0)


@on_a_loop
async def test_more_senders_than_the_limit_are_refused(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with hearing(tmp_path, limits=TapLimits(senders=2)) as heard:
        with await connected(heard) as first, await connected(heard) as second:
            await heard.until(lambda: heard.observer.senders == 2)
            with await connected(heard) as third:
                assert await asyncio.wait_for(loop.sock_recv(third, 1), WAIT_S) == b""
            assert heard.ended(TapEnd.REFUSED) == 1
            second.close()
            await heard.until(lambda: heard.observer.senders == 1)
            await heard.tell(told(SSH, PUBLIC))
            assert heard.names() == [SSH]
            assert first.fileno() > 0


@on_a_loop
async def test_a_flood_leaves_others_their_turn(tmp_path: Path) -> None:
    async with hearing(tmp_path) as heard:
        await asyncio.gather(*(heard.tell(*[told("api.example", PUBLIC)] * 2000) for _ in range(3)))
        assert heard.answers(Observed.ADMITTED) == 6000
        assert heard.ended(TapEnd.FINISHED) == 3


def test_the_labels_of_the_metrics_are_those_of_the_observer() -> None:
    assert METRICS["outgate_dnstap_answers_total"].labels["outcome"] == tuple(one.value for one in Observed)
    assert METRICS["outgate_dnstap_streams_total"].labels["end"] == tuple(one.value for one in TapEnd)
