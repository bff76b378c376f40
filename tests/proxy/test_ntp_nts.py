"""A source that has to prove what it says: what it takes to get keys, and what no forger on the way can do."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import trustme

from policies.hostnames import Hostname
from policies.load import load
from policies.tree import Source as PolicySource
from proxy.hosts import parse_host_options
from proxy.record import Peer
from proxy.relays.ntp import key_exchange, keys
from proxy.relays.ntp.clock import read
from proxy.relays.ntp.keys import Keys
from proxy.relays.ntp.named import KE_PORT, MalformedNtsOption, NamedServers, parse_nts_options
from proxy.relays.ntp.poller import Poller
from proxy.relays.ntp.source import Failure, Pace, Source
from proxy.resolver import Resolver
from tests.proxy.dns_gate import run
from tests.proxy.ntp_servers import PACE, RESTING, answer, error_s, source_of, synchronised, until
from tests.proxy.nts_servers import (
    COOKIE,
    UNIQUE,
    Asked,
    NtsServer,
    Script,
    extension,
    fields,
    record,
    response,
    roots,
    sealed,
    serving,
)

NAME = Hostname("one.example")
NEAR_S = 0.05  # as in test_ntp_polling
WAITING = replace(PACE, timeout_s=0.3)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusted(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    return roots(authority, tmp_path_factory.mktemp("nts"))


@pytest.fixture
def server(authority: trustme.CA) -> NtsServer:
    return NtsServer(authority.issue_cert(NAME))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys may be asked for again at once."""
    monkeypatch.setattr(keys, "FIRST_WAIT_S", 0.0)


async def locate_there(name: Hostname, at: Peer, server: str | None, port: int | None) -> Peer | None:
    return at[0], port or 123


@asynccontextmanager
async def proving(
    server: NtsServer,
    trusted: str | None,
    pace: Pace = RESTING,
    *,
    locate: keys.Locate = locate_there,
) -> AsyncIterator[tuple[Poller, Source]]:
    async def find(name: Hostname) -> Sequence[Peer]:
        return [server.exchange]

    poller = Poller(
        pace, find=find, is_open=lambda name: True, keys=lambda name: Keys(name, locate, roots=trusted)
    )  # fmt: skip
    with serving(server):
        poller.follow({NAME})
        try:
            yield poller, source_of(poller, NAME)
        finally:
            await poller.close()


# --- a server that proves what it says


def test_its_time_is_believed(server: NtsServer, trusted: str) -> None:
    async def test() -> None:
        async with proving(server, trusted) as (poller, source):
            assert abs(error_s(await synchronised(poller))) < NEAR_S
            assert source.asked == server.time
            assert (server.exchanges, server.unproved) == (1, 0)
            assert source.keys is not None
            assert source.keys.cookies == 8

    run(test)


def test_no_cookie_and_no_identifier_is_ever_shown_twice(server: NtsServer, trusted: str) -> None:
    """Or two queries could be known to be of one client, wherever it asks them from (RFC 8915 9.1)."""

    async def test() -> None:
        lost: list[int] = []

        def lossy(server: NtsServer, asked: Asked) -> Sequence[bytes]:
            lost.append(len(lost))
            return [] if len(lost) % 4 == 2 else [server.sealed(asked)]

        server.script = lossy
        async with proving(server, trusted, WAITING):
            await until(lambda: len(server.asked) >= 12)
        cookies = [asked.cookie for asked in server.asked]
        assert len(set(cookies)) == len(cookies)
        assert len({asked.unique for asked in server.asked}) == len(cookies)
        assert any(asked.placeholders for asked in server.asked)
        assert server.exchanges == 1
        plain = {asked.message[:40] for asked in server.asked}
        assert len(plain) == 1
        assert len({asked.message[40:48] for asked in server.asked}) == len(cookies)
        assert len({asked.peer for asked in server.asked}) > 1

    run(test)


def test_nothing_secret_is_said_or_shown(
    server: NtsServer, trusted: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        with caplog.at_level(logging.DEBUG):
            async with proving(server, trusted) as (poller, source):
                await synchronised(poller)
                assert source.keys is not None
                session = source.keys._session  # what a traceback or a debugger would print
                shown = repr(session) + repr(vars(source)) + source.fault
        said = shown + caplog.text + "".join(capfd.readouterr())
        for cookie, pair in server.keys.items():
            for secret in (cookie, *pair):
                assert secret.hex() not in said
                assert repr(secret)[2:-1] not in said

    run(test)


# --- forgers, and servers that are wrong


def first(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    """The same right answer each time."""
    return server.sent[:1] or [server.sealed(asked)]


def stripped(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    return [answer(asked.message[:48], ahead_s=99)]


def unsigned(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    return [answer(asked.message[:48], ahead_s=99) + extension(UNIQUE, asked.unique)]


def moved(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    right = server.sealed(asked)
    return [right[:32] + answer(asked.message[:48], ahead_s=99)[32:48] + right[48:]]


def by_another_key(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    return [server.sealed(asked, ahead_s=99, key=bytes(32))]


def by_the_clients_key(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    """A mirror: what the client sealed is no answer."""
    return [asked.message, server.sealed(asked, ahead_s=99, key=asked.keys[0])]


def kiss_of_a_stranger(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    kiss = answer(asked.message[:48], head=0xE4, stratum=0, reference_id=b"DENY")
    return [kiss, kiss + extension(UNIQUE, asked.unique)]


FORGERS: dict[str, Script] = {
    "no fields": stripped,
    "no proof": unsigned,
    "another time in a proved answer": moved,
    "another key": by_another_key,
    "the client's own key": by_the_clients_key,
    "a kiss of death that is not proved": kiss_of_a_stranger,
}


@pytest.mark.parametrize("script", FORGERS.values(), ids=FORGERS)
def test_an_answer_without_its_proof_is_not_believed(
    server: NtsServer, trusted: str, soon: None, script: Script
) -> None:
    async def test() -> None:
        server.script = script
        async with proving(server, trusted, WAITING) as (poller, source):
            await until(lambda: source.tally.failures[Failure.FORGED] >= 2)
            assert set(source.tally.failures) == {Failure.FORGED}
            assert poller.estimate(read()) is None
            assert not len(source.history)

    run(test)


@pytest.mark.parametrize("script", FORGERS.values(), ids=FORGERS)
def test_a_forger_beside_the_server_changes_nothing(server: NtsServer, trusted: str, script: Script) -> None:
    async def test() -> None:
        server.script = lambda it, asked: [*script(it, asked), it.sealed(asked)]
        async with proving(server, trusted) as (poller, source):
            assert abs(error_s(await synchronised(poller))) < NEAR_S
            assert not source.tally.failures

    run(test)


def test_an_answer_of_before_is_no_answer(server: NtsServer, trusted: str, soon: None) -> None:
    async def test() -> None:
        server.script = first
        async with proving(server, trusted, WAITING) as (_, source):
            await until(lambda: source.tally.failures[Failure.FORGED] >= 2)
            assert len(source.history) == 1

    run(test)


def test_a_kiss_of_death_that_is_proved_is_obeyed(server: NtsServer, trusted: str) -> None:
    async def test() -> None:
        def kiss(server: NtsServer, asked: Asked) -> Sequence[bytes]:
            packet = answer(asked.message[:48], head=0xE4, stratum=0, reference_id=b"DENY")
            return [sealed(packet + extension(UNIQUE, asked.unique), asked.keys[1])]

        server.script = kiss
        async with proving(server, trusted) as (_, source):
            await until(lambda: source.is_refused)
            assert source.tally.failures == {Failure.KISS_OF_DEATH: 1}

    run(test)


def test_cookies_outside_the_proof_are_not_taken(server: NtsServer, trusted: str) -> None:
    async def test() -> None:
        planted = b"\xee" * 100

        def plant(server: NtsServer, asked: Asked) -> Sequence[bytes]:
            packet = answer(asked.message[:48]) + extension(COOKIE, planted) + extension(UNIQUE, asked.unique)
            return [sealed(packet, asked.keys[1]) + extension(COOKIE, planted)]

        server.script = plant
        async with proving(server, trusted, replace(WAITING, burst=8)):
            await until(lambda: len(server.asked) >= 8)
            assert planted not in [asked.cookie for asked in server.asked]

    run(test)


# --- keys that are lost, used up, or not given


def nak(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    packet = answer(asked.message[:48], head=0xE4, stratum=0, reference_id=b"NTSN")
    return [packet + extension(UNIQUE, asked.unique)]


def test_a_server_that_lost_its_keys_gives_new_ones(server: NtsServer, trusted: str) -> None:
    """After a second cookie that it does not know: the first answer may be a stranger's (RFC 8915 5.7)."""

    async def test() -> None:
        async with proving(server, trusted, PACE) as (poller, source):
            await synchronised(poller)
            server.script = lambda it, asked: [it.sealed(asked)] if it.exchanges == 2 else nak(it, asked)
            polls = len(server.asked)
            await until(lambda: server.exchanges == 2)
            await until(lambda: source.reach & 1)
            assert len(server.asked) - polls >= 2
            assert source.tally.failures[Failure.KISS_OF_DEATH] == 2

    run(test)


def test_who_forges_refusals_causes_no_flood_of_exchanges(server: NtsServer, trusted: str) -> None:
    async def test() -> None:
        server.script = nak
        async with proving(server, trusted, PACE) as (_, source):
            await until(lambda: source.tally.failures[Failure.KISS_OF_DEATH] >= 2)
            assert source.keys is not None
            assert 5 < source.keys.wait_s() <= 10
            assert server.exchanges == 1

    run(test)


def test_when_all_cookies_are_lost_new_ones_are_got(server: NtsServer, trusted: str, soon: None) -> None:
    async def test() -> None:
        server.script = lambda it, asked: []
        async with proving(server, trusted, replace(WAITING, timeout_s=0.02)):
            await until(lambda: server.exchanges >= 2)
            assert len({asked.cookie for asked in server.asked}) == len(server.asked)

    run(test)


def test_keys_are_renewed_while_they_work_and_a_failure_keeps_them(
    server: NtsServer, trusted: str, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with proving(server, trusted, PACE) as (poller, source):
            await synchronised(poller)
            monkeypatch.setattr(keys, "RENEW_S", 0.0)
            await until(lambda: server.exchanges >= 3)
            server.records = lambda cookies: record(2, b"\0\2")
            done, polls = server.exchanges, len(server.asked)
            await until(lambda: server.exchanges >= done + 2 and len(server.asked) >= polls + 2)
            assert not source.tally.failures

    run(test)


async def refused(server: NtsServer, trusted: str | None, **more: keys.Locate) -> str:
    """Why it gave no keys. It was not asked for the time then, and nothing was believed."""
    async with proving(server, trusted, RESTING, **more) as (poller, source):
        await until(lambda: source.tally.failures)
        assert source.tally.failures == {Failure.KEY_EXCHANGE: 1}
        assert poller.estimate(read()) is None
        assert (server.asked, server.unproved) == ([], 0)
        assert source.keys is not None
        assert source.keys.wait_s() > 0
        return source.fault


def test_a_certificate_for_another_name_gives_no_keys(authority: trustme.CA, trusted: str) -> None:
    async def test() -> None:
        for name in ("two.example", "example", "*.one.example", "one.example.attacker.example"):
            assert "certificate is for another name" in await refused(NtsServer(authority.issue_cert(name)), trusted)

    run(test)


def test_a_name_in_the_subject_alone_counts_for_nothing(authority: trustme.CA, trusted: str) -> None:
    leaf = authority.issue_cert("two.example", common_name=NAME)
    run(lambda: _refused_with(NtsServer(leaf), trusted, "for another name"))


def test_a_certificate_that_has_expired_gives_no_keys(authority: trustme.CA, trusted: str) -> None:
    now = datetime.now(UTC)
    leaf = authority.issue_cert(NAME, not_before=now - timedelta(days=2), not_after=now - timedelta(days=1))
    run(lambda: _refused_with(NtsServer(leaf), trusted, "certificate has expired"))


def test_a_certificate_of_another_root_gives_no_keys(trusted: str) -> None:
    run(lambda: _refused_with(NtsServer(trustme.CA().issue_cert(NAME)), trusted, "of no root that is trusted"))


def test_roots_of_the_system_do_not_sign_a_test_server(server: NtsServer) -> None:
    run(lambda: _refused_with(server, None, "of no root that is trusted"))


async def _refused_with(server: NtsServer, trusted: str | None, says: str) -> None:
    assert says in await refused(server, trusted)


BAD_SERVERS: dict[str, tuple[Callable[[NtsServer], None], str]] = {
    "another protocol": (lambda it: setattr(it, "alpn", b"h2"), "TLS failed"),
    "no protocol": (lambda it: setattr(it, "alpn", b""), "another protocol"),
    "an old TLS": (lambda it: setattr(it, "is_old_tls", True), "TLS failed"),
    "an error": (lambda it: setattr(it, "records", lambda cookies: record(2, b"\0\2")), "internal error"),
    "half a response": (
        lambda it: setattr(it, "records", lambda cookies: response(cookies=cookies, end=False)),
        "it ended the key exchange",
    ),
    "no cookies": (lambda it: setattr(it, "records", lambda cookies: response()), "no cookie"),
    "an endless response": (lambda it: setattr(it, "records", lambda cookies: bytes(20_000)), "no key exchange"),
}


@pytest.mark.parametrize(("spoil", "says"), BAD_SERVERS.values(), ids=BAD_SERVERS)
def test_a_key_exchange_that_goes_wrong_gives_no_keys(
    server: NtsServer, trusted: str, spoil: Callable[[NtsServer], None], says: str
) -> None:
    spoil(server)
    run(lambda: _refused_with(server, trusted, says))


def test_a_key_exchange_that_says_nothing_ends(
    server: NtsServer, trusted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_exchange, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(server, "_exchange", lambda sock: sock.recv(1 << 16) and sock.recv(1 << 16))
    run(lambda: _refused_with(server, trusted, "no key exchange within 0.3 s"))


# --- where a key exchange may send queries

POLICY = """
version: 1
workloads:
  app:
    rules:
      - ntp: one.example
      - ntp: two.example
      - {ntp: late.example, until: 2020-01-01}
      - host: web.example
"""
HOSTS = (
    "one.example=93.184.216.1", "one.example=93.184.216.2", "two.example=93.184.216.3", "web.example=93.184.216.4",
    "late.example=93.184.216.5",
)  # fmt: skip
AT = ("93.184.216.2", 4460)
PLACES: dict[str, tuple[str | None, int | None, Peer | None]] = {
    "nowhere else": (None, None, ("93.184.216.2", 123)),
    "another port": (None, 10123, ("93.184.216.2", 10123)),
    "its own name": ("one.example", None, ("93.184.216.2", 123)),
    "its own name in capitals": ("ONE.example.", None, ("93.184.216.2", 123)),
    "another of its addresses": ("93.184.216.1", 124, ("93.184.216.1", 124)),
    "another name of the policy": ("two.example", None, ("93.184.216.3", 123)),
    "a name that no rule names": ("attacker.example", None, None),
    "a name of another rule": ("web.example", None, None),
    "a name whose rule has expired": ("late.example", None, None),
    "an address of nobody": ("203.0.113.9", None, None),
    "an address of another name": ("93.184.216.3", None, None),
    "this machine": ("127.0.0.1", None, None),
    "cloud metadata": ("169.254.169.254", None, None),
    "no name": ("no name at all", None, None),
}


@pytest.mark.parametrize(("server", "port", "expected"), PLACES.values(), ids=PLACES)
def test_a_key_exchange_sends_queries_only_where_the_policy_does(
    server: str | None, port: int | None, expected: Peer | None
) -> None:
    policy = load([PolicySource("test.yaml", POLICY)], catalogue={}, tags={}, is_public_suffix=lambda name: False)

    async def test() -> None:
        resolver = Resolver(parse_host_options(HOSTS), [])
        servers = NamedServers(lambda: policy, "app", resolver, is_own=lambda *_: False)
        assert await servers.locate(NAME, AT, server, port) == expected

    run(test)


def test_a_server_to_which_no_rule_leads_is_not_asked(server: NtsServer, trusted: str) -> None:
    async def nowhere(name: Hostname, at: Peer, server: str | None, port: int | None) -> Peer | None:
        assert server == "attacker.example"
        return None

    async def test() -> None:
        server.records = lambda cookies: response(record(6, b"attacker.example"), cookies=cookies)
        assert "may not be asked" in await refused(server, trusted, locate=nowhere)

    run(test)


# --- which servers have to


def test_the_operator_says_which_servers_have_to_prove_what_they_say() -> None:
    some = parse_nts_options(["one.example", "Two.Example:14460"])
    assert [some.port_of(Hostname(f"{name}.example")) for name in ("one", "two", "three")] == [KE_PORT, 14460, None]
    every = parse_nts_options(["all", "two.example:14460"])
    assert [every.port_of(Hostname(f"{name}.example")) for name in ("two", "three")] == [14460, KE_PORT]


@pytest.mark.parametrize(
    "text", ["", ":4460", "one.example:", "one.example:0", "one.example:65536", "192.0.2.1", "a b"]
)
def test_what_names_no_server_is_said(text: str) -> None:
    with pytest.raises(MalformedNtsOption, match="--nts"):
        parse_nts_options([text])


def test_a_query_carries_fields_in_the_order_that_servers_expect(server: NtsServer, trusted: str) -> None:
    async def test() -> None:
        async with proving(server, trusted) as (poller, _):
            await synchronised(poller)
        kinds = [[kind for kind, _ in fields(asked.message)] for asked in server.asked]
        assert {tuple(kind) for kind in kinds} == {(0x0104, 0x0204, 0x0404)}

    run(test)
