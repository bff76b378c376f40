"""Clients of the DNS relay: hostile ones, slow ones, `dig`, and glibc inside a namespace of its own."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from mitmproxy import dns as oracle

from proxy.relays.dns import DnsLimits
from tests.proxy.dns_gate import (
    API,
    NXDOMAIN,
    PUBLIC,
    PUBLIC6,
    Gate,
    addresses,
    ask,
    gate,
    is_silent,
    over_tcp,
    question,
    read_tcp,
    run,
    told,
)
from tests.proxy.nameserver import zone

# --- hostile clients

MALFORMED = {
    "empty": b"",
    "a response": question("api.example")[:2] + b"\x81\x80" + question("api.example")[4:],
    "two questions": question("api.example")[:5] + b"\x02" + question("api.example")[6:],
    "pointer loop": question("api.example")[:12] + b"\xc0\x0c\0\1\0\1",
    "garbage": bytes(range(256)),
    "trailing": question("api.example") + b"data for you",
    "longer than a question": question("api.example", opt=struct.pack("!HH600s", 12, 600, b"")),
    "a question of 512 bytes and one more": question("api.example", opt=struct.pack("!HH468s", 12, 468, b"")) + b"x",
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_question_gets_no_answer(message: bytes) -> None:
    async def test() -> None:
        async with gate(API) as g:
            assert await is_silent(g, message)
            assert g.relay.malformed == 1
            assert g.upstream.received == []

    run(test)


@pytest.mark.parametrize("message", [m for m in MALFORMED.values() if m], ids=[i for i, m in MALFORMED.items() if m])
def test_what_is_no_question_ends_a_connection(message: bytes) -> None:
    async def test() -> None:
        async with gate(API) as g, over_tcp(g) as (reader, writer):
            writer.write(len(message).to_bytes(2) + message)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await read_tcp(reader)
            assert g.relay.malformed == 1

    run(test)


def test_a_long_answer_goes_over_tcp() -> None:
    many = [f"93.184.{i}.1" for i in range(100)]

    async def test() -> None:
        async with gate(zone({"api.example": many})) as g:
            short = oracle.DNSMessage.unpack(await ask(g, question("api.example")))
            assert (short.truncation, short.answers) == (True, [])
            async with over_tcp(g) as (reader, writer):
                message = question("api.example")
                writer.write(len(message).to_bytes(2) + message)
                assert told(await read_tcp(reader)).addresses == addresses(*many)

    run(test)


def test_a_connection_carries_many_questions_in_any_fragments() -> None:
    async def test() -> None:
        async with gate(API) as g, over_tcp(g) as (reader, writer):
            stream = b"".join(len(m).to_bytes(2) + m for m in (question("api.example"), question("evil.example")))
            for byte in stream:
                writer.write(bytes((byte,)))
                await writer.drain()
                await asyncio.sleep(0)
            assert told(await read_tcp(reader)).addresses == addresses(PUBLIC)
            assert told(await read_tcp(reader)).rcode == NXDOMAIN

    run(test)


@pytest.mark.parametrize("sent", [b"", b"\x00", b"\x00\x20", b"\x00\x20half a quest"], ids=str)
def test_a_slow_client_is_dropped(sent: bytes) -> None:
    async def test() -> None:
        async with gate(API, limits=DnsLimits(idle_timeout_s=0.2)) as g, over_tcp(g) as (reader, writer):
            writer.write(sent)
            assert await reader.read() == b""
            assert told(await ask(g, question("api.example"))).addresses == addresses(PUBLIC)

    run(test)


def test_a_client_that_keeps_dripping_is_dropped() -> None:
    async def test() -> None:
        limits = DnsLimits(idle_timeout_s=0.3)
        async with gate(API, limits=limits) as g, over_tcp(g) as (reader, writer):
            writer.write(b"\x00\x40")
            while not reader.at_eof():
                try:
                    writer.write(b"\x01")
                    await writer.drain()
                    await asyncio.wait_for(reader.read(), 0.05)
                except TimeoutError:
                    continue
                except ConnectionResetError:
                    break

    run(test)


def test_a_busy_connection_ends_too() -> None:
    async def test() -> None:
        async with gate(API, limits=DnsLimits(connection_timeout_s=0.3)) as g, over_tcp(g) as (reader, writer):
            message = question("evil.example")
            answered = 0
            try:
                while True:
                    writer.write(len(message).to_bytes(2) + message)
                    await read_tcp(reader)
                    answered += 1
                    await asyncio.sleep(0.01)
            except (asyncio.IncompleteReadError, ConnectionError):
                assert answered > 0

    run(test)


def test_a_quick_client_leaves_time_for_others() -> None:
    async def test() -> None:
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        message = question("evil.example")
        async with gate(API) as g, over_tcp(g) as (reader, writer):
            writer.write((len(message).to_bytes(2) + message) * 500)
            others = asyncio.create_task(take_turns())
            for _ in range(500):
                await read_tcp(reader)
            others.cancel()
            assert turns >= 500

    run(test)


def test_connections_are_bounded_and_freed() -> None:
    async def test() -> None:
        message = question("evil.example")
        async with gate(API, limits=DnsLimits(connections=2, idle_timeout_s=25)) as g:
            async with over_tcp(g) as (reader, writer), over_tcp(g) as (second, second_writer):
                for w, r in ((writer, reader), (second_writer, second)):
                    w.write(len(message).to_bytes(2) + message)
                    await read_tcp(r)
                async with over_tcp(g) as (third, _):
                    assert await asyncio.wait_for(third.read(), 10) == b""
            while True:  # the two are gone as soon as the relay has seen it
                async with over_tcp(g) as (reader, writer):
                    writer.write(len(message).to_bytes(2) + message)
                    try:
                        assert told(await read_tcp(reader)).rcode == NXDOMAIN
                        return
                    except (asyncio.IncompleteReadError, ConnectionResetError):
                        await asyncio.sleep(0.01)

    run(test)


# --- dig


async def dig(gate: Gate, *arguments: str) -> str:
    program = await asyncio.create_subprocess_exec(
        "dig", "@127.0.0.1", "-p", str(gate.port), "+tries=1", "+time=10", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await program.communicate()
    assert program.returncode == 0
    return output.decode()


@pytest.mark.client
@pytest.mark.skipif(shutil.which("dig") is None, reason="dig (bind9-dnsutils) is not installed")
def test_dig_understands_every_answer() -> None:
    async def test() -> None:
        async with gate(API) as g:
            assert (await dig(g, "+short", "api.example", "A", "api.example", "AAAA")).split() == [PUBLIC, PUBLIC6]
            assert (await dig(g, "+short", "+tcp", "api.example", "A")).split() == [PUBLIC]
            denied = await dig(g, "evil.example")
            assert "status: NXDOMAIN" in denied
            assert re.search(r"EDE: 15 \(Blocked\): \(no_rule, decision [0-9a-f]{16}\)", denied)
            assert "SOA\toutgate.invalid. ." in denied
            empty = await dig(g, "api.example", "TXT")
            assert "status: NOERROR" in empty
            assert "ANSWER: 0, AUTHORITY: 1" in empty
            for output in (denied, empty):
                assert not re.search("warning|malformed|extra bytes", output, re.IGNORECASE)

    run(test)


# --- glibc


IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--"]
SEARCH = "search default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5"


def namespace_refused() -> str | None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "unshare (util-linux) or ip (iproute2) is not installed"
    probe = subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return probe.stderr.strip() or "no namespaces here" if probe.returncode else None


@pytest.mark.kernel
@pytest.mark.parametrize(
    "resolv_conf",
    [
        "nameserver 192.0.2.53",
        "nameserver 2001:db8::53",
        f"nameserver 192.0.2.53\n{SEARCH}",
        f"nameserver 2001:db8::53\noptions use-vc\n{SEARCH}",
    ],
    ids=["v4", "v6", "v4 with search domains", "v6 over tcp with search domains"],
)
def test_glibc_resolves_allowed_names_at_once_and_gives_up_denied_ones_at_once(
    resolv_conf: str, tmp_path: Path
) -> None:
    if refused := namespace_refused():
        pytest.skip(refused)
    (tmp_path / "resolv.conf").write_text(resolv_conf + "\n")
    program = subprocess.run(
        [*IN_NAMESPACE, sys.executable, "-m", "tests.proxy.dns_namespace", str(tmp_path / "resolv.conf")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert program.stderr == ""
    seen = json.loads(program.stdout)
    assert seen["found"] == {
        "api.example": sorted([PUBLIC, PUBLIC6]),  # test_dns_musl.py has the same for musl
        "four.cdn.example": ["93.184.216.35"],
        "evil.example": "EAI_NONAME",
        "parent.example": "EAI_NODATA",
        "rebinding.cdn.example": "EAI_NODATA",
        "failing.cdn.example": "EAI_AGAIN",
    }
    # Four names that a rule admits, three domains appended, two types: counted, recorded by nobody, asked of nobody.
    assert seen["search_noise"] == (24 if "search" in resolv_conf else 0)
    assert set(seen["reasons"]) == {"rule", "no_rule", "ancestor", "private_address", "resolver_failed"}
    assert not any("evil" in name or "local" in name for name in seen["asked_upstream"])
    assert seen["slowest_s"] < 4  # a stub's own timeout is 5 s: nobody waited for one
