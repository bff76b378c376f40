"""The explicit proxy tunnels to what the policy names, under the name that was asked for, and to nothing else."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest
import trustme

from policies.hostnames import parse_hostname
from proxy.hosts import HostsEntry
from proxy.original_dst import redirected_dst
from proxy.record import Record
from proxy.runtime import Gate, Settings
from tests.builders import rules

RULES = '- {host: a.example, ports: [80, 443]}\n- host: b.example\n- tcp: "127.0.0.1/32:443"'


def no_key() -> str:
    raise AssertionError("nothing here is inspected")


class World:
    """A gate as explicit proxy, and an origin on loopback that counts who connects."""

    def __init__(self, port: int, authority: trustme.CA) -> None:
        self.port = port
        self.authority = authority
        self.records: list[Record] = []
        self.connections = 0

    async def ask(self, head: bytes) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head)
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n\r\n")
        return answer, reader, writer

    async def hello(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sni: str) -> bytes:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        async with asyncio.timeout(10):
            await writer.start_tls(context, server_hostname=sni)
            return await reader.read(2)


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("a.example", "b.example").configure_cert(context)

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        here.connections += 1
        writer.write(b"ok")
        await writer.drain()
        writer.close()

    origin = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    with socket.create_server(("127.0.0.1", 0)) as door:
        here = World(door.getsockname()[1], authority)
        port = origin.sockets[0].getsockname()[1]
        hosts = {
            parse_hostname(name): HostsEntry((ip_address("127.0.0.1"),), port) for name in ("a.example", "b.example")
        }
        settings = Settings(issuing=no_key, workload="app", hosts=hosts, nameservers=[])
        gate = Gate(rules(RULES), settings, original_dst=redirected_dst, record=here.records.append)
        gate.proxy(door)
        try:
            yield here
        finally:
            await gate.close()
            origin.close()
            await origin.wait_closed()


def test_named_host_is_tunnelled_to_where_the_gate_says_it_is() -> None:
    async def tunnel() -> None:
        async with world() as here:
            answer, reader, writer = await here.ask(b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert await here.hello(reader, writer, "a.example") == b"ok"
            writer.close()

    asyncio.run(tunnel())


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("paste.example:443", "no_rule"),
        ("a.example:22", "port"),
        ("A.EXAMPLE.:8443", "port"),
        ("x.a.example:443", "no_rule"),
    ],
)
def test_other_name_is_refused_in_words_and_nobody_is_dialled(target: str, reason: str) -> None:
    async def tunnel() -> None:
        async with world() as here:
            answer, reader, writer = await here.ask(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert json.loads(await reader.read())["reason"] == reason
            assert here.connections == 0
            assert [record["reason"] for record in here.records] == [reason]
            writer.close()

    asyncio.run(tunnel())


def test_authority_must_be_the_sni_even_where_both_are_allowed() -> None:
    async def tunnel() -> None:
        async with world() as here:
            _, reader, writer = await here.ask(b"CONNECT a.example:443 HTTP/1.1\r\n\r\n")
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await here.hello(reader, writer, "b.example")
            assert here.connections == 0
            assert [record["reason"] for record in here.records] == ["host_mismatch"]
            writer.close()

    asyncio.run(tunnel())


def test_address_is_judged_by_its_sni_as_a_redirected_connection_is() -> None:
    async def tunnel() -> None:
        async with world() as here:
            answer, reader, writer = await here.ask(b"CONNECT 203.0.113.9:443 HTTP/1.1\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert await here.hello(reader, writer, "b.example") == b"ok"  # dialled by name, not to 203.0.113.9
            writer.close()
            _, reader, writer = await here.ask(b"CONNECT 203.0.113.9:443 HTTP/1.1\r\n\r\n")
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await here.hello(reader, writer, "paste.example")
            assert here.connections == 1
            writer.close()

    asyncio.run(tunnel())


def test_gate_is_no_way_to_loopback_even_where_a_rule_names_it() -> None:
    async def tunnel() -> None:
        async with world() as here:
            _, reader, writer = await here.ask(b"CONNECT 127.0.0.1:443 HTTP/1.1\r\n\r\n")
            writer.write(b"SSH-2.0-attack\r\n")
            assert await reader.read() == b""
            assert [record["reason"] for record in here.records] == ["never_reached"]
            writer.close()

    with pytest.raises(ConnectionResetError):  # opaque bytes are refused by reset
        asyncio.run(tunnel())


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
        b"GET https://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
        b"CONNECT a.example HTTP/1.1\r\n\r\n",
        b"CONNECT a.example:0 HTTP/1.1\r\n\r\n",
        b"CONNECT a.example:99999 HTTP/1.1\r\n\r\n",
        b"CONNECT user@a.example:443 HTTP/1.1\r\n\r\n",
        b"CONNECT 127.1:443 HTTP/1.1\r\n\r\n",
        b"CONNECT [::1:443 HTTP/1.1\r\n\r\n",
        b"connect a.example:443 HTTP/1.1\r\n\r\n",
        b"\r\nCONNECT a.example:443 HTTP/1.1\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
        b"\x05\x01\x00",
        b"PROXY TCP4 127.0.0.2 127.0.0.1 1 2\r\nCONNECT a.example:443 HTTP/1.1\r\n\r\n",
    ],
)
def test_head_that_is_no_proxy_request_is_answered_400(head: bytes) -> None:
    async def tunnel() -> None:
        async with world() as here:
            answer, reader, writer = await here.ask(head)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert here.connections == 0
            await reader.read()
            writer.close()

    asyncio.run(tunnel())


def test_head_that_comes_byte_by_byte_is_read() -> None:
    async def tunnel() -> None:
        async with world() as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            for byte in b"CONNECT a.example:443 HTTP/1.1\r\n\r\n":
                writer.write(bytes([byte]))
                await writer.drain()
            async with asyncio.timeout(10):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert await here.hello(reader, writer, "a.example") == b"ok"
            writer.close()

    asyncio.run(tunnel())
