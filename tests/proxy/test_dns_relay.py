"""What a workload is told over DNS, and what leaves the gate for it: real sockets, a real policy, a scripted server."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from ipaddress import ip_address
from typing import cast

import pytest

from policies.engine import decide
from policies.load import load
from policies.model import Attempt, Verdict
from policies.tree import Source
from proxy.relays.dns import DnsLimits
from proxy.wire.dns import AAAA, A
from tests.proxy.dns_gate import (
    ANY,
    API,
    BLOCKED,
    NO_AUTHORITY,
    NXDOMAIN,
    OTHER,
    POLICY,
    PROHIBITED,
    PUBLIC,
    PUBLIC6,
    SERVFAIL,
    SRV,
    TXT,
    Told,
    addresses,
    ask,
    gate,
    question,
    run,
    silence,
    told,
)
from tests.proxy.nameserver import Received, Script, address, alias, reply, soa, wire, zone

# --- allowed


def test_an_allowed_name_is_answered_recorded_and_remembered() -> None:
    async def test() -> None:
        async with gate(API) as g:
            assert told(await ask(g, question("api.example"))) == Told(0, addresses(PUBLIC), 60)
            assert told(await ask(g, question("api.example", AAAA))) == Told(0, addresses(PUBLIC6), 60)
            assert g.lookups.names_of("app", ip_address(PUBLIC)) == ("api.example",)
            assert g.lookups.names_of("app", ip_address(PUBLIC6)) == ("api.example",)
            first, second = g.records
            assert first["rule"] == "test.yaml:10 (api)"
            assert [first[key] for key in ("stage", "verdict", "reason", "workload")] == ["dns", "allow", "rule", "app"]
            assert (first["destination.address"], first["destination.port"]) == ("127.0.0.1", g.port)
            assert (first["server.name"], first["dns.question.type"]) == ("api.example", "A")
            assert (second["server.name"], second["dns.question.type"]) == ("api.example", "AAAA")
            assert len(g.upstream.received) == 2  # one lookup: A and AAAA

    run(test)


@pytest.mark.parametrize("name", ["deep.a.cdn.example", "time.example", "git.example"], ids=["host", "ntp", "tcp"])
def test_every_kind_of_rule_admits_its_lookup(name: str) -> None:
    async def test() -> None:
        async with gate(zone({name: [PUBLIC]})) as g:
            assert told(await ask(g, question(name))).addresses == addresses(PUBLIC)

    run(test)


def test_nothing_of_the_client_goes_upstream() -> None:
    cookie = struct.pack("!HH8s", 10, 8, b"SECRETCK")
    subnet = struct.pack("!HHHBB3s", 8, 7, 1, 24, 0, b"\xc0\x00\x02")

    async def test() -> None:
        async with gate(API) as g:
            message = (
                question("api.example", opt=cookie + subnet).replace(b"api", b"aPi").replace(b"example", b"EXamPLe")
            )
            assert b"\x03aPi\x07EXamPLe" in await ask(g, message)
            for received in g.upstream.received:
                assert received.message[12:] == wire("api.example") + struct.pack("!HH", received.query.type, 1) + (
                    struct.pack("!BHHIH", 0, 41, 1232, 0, 0)
                )

    run(test)


def test_the_ttl_counts_down_with_the_cache() -> None:
    async def test() -> None:
        async with gate(zone({"api.example": [PUBLIC]}, ttl_s=86400)) as g:
            assert told(await ask(g, question("api.example"))).ttl_s == 300
            g.clock.now += 299.5
            assert told(await ask(g, question("api.example"))).ttl_s == 1
            assert g.lookups.names_of("app", ip_address(PUBLIC))

    run(test)


def test_a_name_without_addresses_of_a_family_exists() -> None:
    async def test() -> None:
        async with gate(zone({"api.example": [PUBLIC]})) as g:
            assert told(await ask(g, question("api.example", AAAA))) == Told(0, (), 60)
            assert g.only_record()["verdict"] == "allow"

    run(test)


def test_a_workload_is_known_by_its_address() -> None:
    async def test() -> None:
        async with gate(zone({"other.example": [PUBLIC]}), host="0.0.0.0") as g:
            assert told(await ask(g, question("other.example"))).rcode == NXDOMAIN
            assert told(await ask(g, question("other.example"), client="127.0.0.2")).addresses == addresses(PUBLIC)
            assert g.lookups.names_of("other", ip_address(PUBLIC)) == ("other.example",)
            assert g.lookups.names_of("app", ip_address(PUBLIC)) == ()

    run(test)


@pytest.mark.parametrize(
    ("host", "at"),
    [("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "127.53.53.53"), ("::1", "::1"), ("::", "::1")],
    ids=["any, asked at 127.0.0.1", "any, asked at 127.53.53.53", "v6", "any v6"],
)
def test_a_reply_comes_from_the_address_that_was_asked(host: str, at: str) -> None:
    async def test() -> None:
        async with gate(API, host=host) as g:
            client = "::1" if ":" in at else "127.0.0.1"
            assert told(await ask(g, question("api.example"), client=client, at=at)).addresses == addresses(PUBLIC)
            assert g.only_record()["destination.address"] == at

    run(test)


# --- denied

DENIED: dict[str, tuple[bytes, str, Told]] = {
    "unnamed": (question("evil.example"), "no_rule", Told(NXDOMAIN, ttl_s=5, error=BLOCKED)),
    "unnamed, data in labels": (question("c2VjcmV0.x.evil.example"), "no_rule", Told(NXDOMAIN, ttl_s=5, error=BLOCKED)),
    "unnamed, no opt": (question("evil.example", opt=None), "no_rule", Told(NXDOMAIN, ttl_s=5)),
    "unnamed, txt": (question("evil.example", TXT), "no_rule", Told(NXDOMAIN, ttl_s=5, error=BLOCKED)),
    "apex of a wildcard": (question("cdn.example"), "ancestor", Told(0, ttl_s=5, error=BLOCKED)),
    "ancestor": (question("parent.example"), "ancestor", Told(0, ttl_s=5, error=BLOCKED)),
    "top level": (question("example"), "ancestor", Told(0, ttl_s=5, error=BLOCKED)),
    "root": (question("", 2), "malformed_name", Told(0, ttl_s=5, error=BLOCKED)),
    "guard": (question("x.paste.example"), "guard", Told(NXDOMAIN, ttl_s=5, error=BLOCKED)),
    "deny all": (question("closed.cdn.example"), "deny_rule", Told(NXDOMAIN, ttl_s=5, error=BLOCKED)),
    "expired": (question("old.example"), "expired", Told(NXDOMAIN, ttl_s=5, error=BLOCKED)),
    "txt of an allowed name": (question("api.example", TXT), "query_type", Told(0, ttl_s=5, error=BLOCKED)),
    "srv of an allowed name": (question("api.example", SRV), "query_type", Told(0, ttl_s=5, error=BLOCKED)),
    "any of an allowed name": (question("api.example", ANY), "query_type", Told(0, ttl_s=5, error=BLOCKED)),
    "null of an allowed name": (question("api.example", 10), "query_type", Told(0, ttl_s=5, error=BLOCKED)),
    "chaos class": (question("api.example", A, qclass=3), "query_type", Told(0, ttl_s=5, error=BLOCKED)),
    "an address as name": (question("127.0.0.1"), "malformed_name", Told(NXDOMAIN, ttl_s=5, error=BLOCKED)),
    "not a hostname": (question("api.example").replace(b"\3api", b"\3a i"), "malformed_name", Told(3, (), 5, BLOCKED)),
    "a dot inside a label": (
        question("aaa.example").replace(b"\3aaa\7example", b"\x0bapi.example"),
        "malformed_name",
        Told(NXDOMAIN, ttl_s=5, error=BLOCKED),
    ),
}


@pytest.mark.parametrize(("message", "reason", "answer"), DENIED.values(), ids=DENIED)
def test_a_denied_name_is_answered_here_recorded_once_and_never_asked_for(
    message: bytes, reason: str, answer: Told
) -> None:
    async def test() -> None:
        async with gate(API) as g:
            reply_ = await ask(g, message)
            assert told(reply_) == answer
            record = g.only_record()
            assert (record["verdict"], record["reason"]) == ("deny", reason)
            if answer.error is not None:
                assert f"{reason}, decision {record['id']}".encode() in reply_
            assert g.upstream.received == []

    run(test)


def test_a_name_cached_for_one_workload_is_not_there_for_another() -> None:
    async def test() -> None:
        async with gate(API, host="0.0.0.0") as g:
            await ask(g, question("api.example"))
            assert told(await ask(g, question("api.example"), client="127.0.0.2")).rcode == NXDOMAIN

    run(test)


def test_an_unknown_workload_is_told_nothing() -> None:
    async def test() -> None:
        async with gate(API, host="0.0.0.0") as g:
            answer = told(await ask(g, question("api.example"), client="127.0.0.9"))
            assert answer == Told(NXDOMAIN, ttl_s=5, error=PROHIBITED)
            assert g.only_record()["reason"] == "unknown_workload"

    run(test)


def test_audit_lets_an_unnamed_lookup_pass_and_says_so() -> None:
    async def test() -> None:
        async with gate(zone({"evil.example": [PUBLIC, "10.0.0.1"]}), host="0.0.0.0") as g:
            answer = told(await ask(g, question("evil.example"), client="127.0.0.3"))
            assert answer.addresses == addresses(PUBLIC)  # a private answer for an unnamed name stays denied
            assert (g.only_record()["verdict"], g.only_record()["would_be"]) == ("allow", "deny")

    run(test)


def test_a_judge_that_fails_denies_and_the_next_question_is_answered() -> None:
    faults = [RuntimeError("a fault")]

    def judge(attempt: Attempt) -> Verdict:
        if faults:
            raise faults.pop()
        policy = load([Source("test.yaml", POLICY)], catalogue={}, tags={}, is_public_suffix=lambda name: False)
        return decide(policy, attempt)

    async def test() -> None:
        async with gate(API, judge=judge) as g:
            assert told(await ask(g, question("api.example"))) == Told(SERVFAIL, error=OTHER)
            assert g.only_record()["reason"] == "gate_failed"
            assert g.only_record()["error.message"] == "RuntimeError('a fault')"
            assert g.upstream.received == []
            assert told(await ask(g, question("api.example"))).addresses == addresses(PUBLIC)

    run(test)


# --- addresses

REBINDING: dict[str, tuple[list[str], int, str | None, list[str]]] = {
    "private": (["10.0.0.1", "192.168.1.1"], A, "private_address", []),
    "shared": (["100.64.0.1"], A, "private_address", []),
    "loopback": (["127.0.0.1"], A, "never_reached", []),
    "metadata": (["169.254.169.254"], A, "never_reached", []),
    "unspecified": (["0.0.0.0"], A, "never_reached", []),
    "v6 loopback": (["::1"], AAAA, "never_reached", []),
    "v6 link-local": (["fe80::1"], AAAA, "never_reached", []),
    "v6 unique local": (["fd12::1"], AAAA, "private_address", []),
    "mapped metadata": (["::ffff:169.254.169.254"], AAAA, "never_reached", []),
    "nat64 of loopback": (["64:ff9b::7f00:1"], AAAA, "never_reached", []),
    "one public among private": (["10.0.0.1", PUBLIC, "127.0.0.1"], A, None, [PUBLIC]),
}


@pytest.mark.parametrize(("given", "qtype", "reason", "kept"), REBINDING.values(), ids=REBINDING)
def test_a_public_name_never_has_an_inside_address(
    given: list[str], qtype: int, reason: str | None, kept: list[str]
) -> None:
    async def test() -> None:
        async with gate(zone({"api.example": given})) as g:
            answer = told(await ask(g, question("api.example", qtype)))
            assert (answer.rcode, answer.addresses) == (0, addresses(*kept))
            record = g.only_record()
            assert (record["verdict"], record["reason"]) == (("deny", reason) if reason else ("allow", "rule"))
            # as values: Python before 3.13 writes a mapped address in hex
            refused = [ip_address(text) for text in cast(list[str], record["dns.answers.refused"])]
            assert refused == [ip_address(text) for text in given if text not in kept]
            for text in set(given) - set(kept):
                assert g.lookups.names_of("app", ip_address(text)) == ()

    run(test)


def test_an_alias_to_a_denied_name_is_no_matter_but_its_address_is() -> None:
    def script(received: Received) -> Iterable[bytes]:
        if received.query.type == AAAA:
            return [reply(received.message, [alias("api.example", "evil.example"), address("evil.example", "::1")])]
        return [reply(received.message, [alias("api.example", "evil.example"), address("evil.example", PUBLIC)])]

    async def test() -> None:
        async with gate(script) as g:
            assert told(await ask(g, question("api.example"))).addresses == addresses(PUBLIC)
            assert told(await ask(g, question("api.example", AAAA))) == Told(0, (), 5, BLOCKED)

    run(test)


def test_a_rule_may_mean_a_private_address_and_never_metadata() -> None:
    async def test() -> None:
        async with gate(zone({"inside.example": ["10.0.0.1", "169.254.169.254"]})) as g:
            assert told(await ask(g, question("inside.example"))).addresses == addresses("10.0.0.1")

    run(test)


def test_the_operators_hosts_are_given_as_they_are() -> None:
    async def test() -> None:
        hosts = {"api.example": "127.0.0.1", "x.cdn.example": "10.0.0.1", "evil.example": "127.0.0.1"}
        async with gate(API, hosts=hosts) as g:
            assert told(await ask(g, question("api.example"))) == Told(0, addresses("127.0.0.1"), 300)
            assert told(await ask(g, question("x.cdn.example"))).addresses == addresses("10.0.0.1")
            assert told(await ask(g, question("evil.example"))).rcode == NXDOMAIN  # an address is not a permission
            assert g.upstream.received == []

    run(test)


# --- upstream

UPSTREAM: dict[str, tuple[Script, str, Told]] = {
    "name error": (
        lambda r: [reply(r.message, rcode=3, authority=[soa("example", 900, 30)])],
        "name_not_found",
        Told(NXDOMAIN, ttl_s=30),
    ),
    "nodata": (
        lambda r: [reply(r.message, authority=[soa("example", 900, 30)])],
        "name_not_found",
        Told(0, ttl_s=30),
    ),
    "servfail": (lambda r: [reply(r.message, rcode=2)], "resolver_failed", Told(SERVFAIL, error=NO_AUTHORITY)),
    "silence": (silence, "resolver_failed", Told(SERVFAIL, error=NO_AUTHORITY)),
}


@pytest.mark.parametrize(("script", "reason", "answer"), UPSTREAM.values(), ids=UPSTREAM)
def test_what_the_upstream_cannot_say_is_told_truly(script: Script, reason: str, answer: Told) -> None:
    async def test() -> None:
        async with gate(script, timeout_s=0.3) as g:
            assert told(await ask(g, question("api.example"))) == answer
            assert (g.only_record()["verdict"], g.only_record()["reason"]) == ("deny", reason)

    run(test)


def test_lookups_under_way_are_bounded_for_each_workload() -> None:
    async def test() -> None:
        names = {"other.example": [PUBLIC]}
        quick = zone(names)
        script: Script = lambda r: quick(r) if r.query.name in names else []  # noqa: E731
        async with gate(script, host="0.0.0.0", limits=DnsLimits(lookups=1)) as g:
            waiting = asyncio.create_task(ask(g, question("api.example")))
            await g.upstream.wait_for(2)
            assert told(await ask(g, question("a.cdn.example"))) == Told(SERVFAIL, error=OTHER)
            assert g.only_record()["reason"] == "too_many_connections"
            assert told(await ask(g, question("other.example"), client="127.0.0.2")).addresses == addresses(PUBLIC)
            waiting.cancel()

    run(test)


# --- search domains


def test_search_noise_is_answered_here_counted_and_not_recorded() -> None:
    # What glibc and musl ask for `api.example` with these search domains and ndots:5.
    suffixes = ["default.svc.cluster.local", "svc.cluster.local", "cluster.local"]

    async def test() -> None:
        async with gate(API, search=suffixes) as g:
            for suffix in suffixes:
                for qtype in (A, AAAA):
                    assert told(await ask(g, question(f"api.example.{suffix}", qtype))) == Told(NXDOMAIN, ttl_s=5)
            assert (g.records, g.upstream.received) == ([], [])
            assert g.relay.search_noise == 6
            assert told(await ask(g, question("api.example"))).addresses == addresses(PUBLIC)

    run(test)


@pytest.mark.parametrize(
    "name",
    ["evil.example.cluster.local", "cluster.local", "closed.cdn.example.cluster.local", "api.example.cluster.local.x"],
)
def test_a_denied_name_below_a_search_domain_is_a_denial(name: str) -> None:
    async def test() -> None:
        async with gate(API, search=["cluster.local"]) as g:
            assert told(await ask(g, question(name))).rcode == NXDOMAIN
            assert g.only_record()["reason"] == "no_rule"
            assert g.relay.search_noise == 0

    run(test)


def test_a_search_domain_excuses_nothing_that_a_rule_denies() -> None:
    async def test() -> None:
        async with gate(API, search=["paste.example"]) as g:
            assert told(await ask(g, question("api.example.paste.example"))).rcode == NXDOMAIN
            assert g.only_record()["reason"] == "guard"

    run(test)
