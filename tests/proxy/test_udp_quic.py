"""`quic: sni`: a QUIC connection is carried to the name that it shows and to no other; real clients, hostile ones."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import trustme
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived
from aioquic.quic.packet import QuicProtocolVersion

from policies.hostnames import Hostname
from proxy.limits import Limits
from proxy.resolver import Resolution
from tests.proxy.quic_client import DESTINATION, datagrams, quic_hello, sliced
from tests.proxy.udp_gate import ECHO, Client, Lab, lab, run

RULES = '[{udp: {host: echo.example, ports: "1-65535"}, quic: sni}]'
OTHER = Hostname("other.example")


def initial(name: str | None = ECHO, *, destination: bytes = DESTINATION) -> bytes:
    """The Initial of a client, with its whole hello."""
    [one] = datagrams(sliced(quic_hello(name)), [1], destination=destination)
    return one


@asynccontextmanager
async def no_names(rules: str = RULES, **more: object) -> AsyncIterator[Lab]:
    """Nothing was looked up through the gate: the hello alone says whom the client means."""
    async with lab(rules, **more) as it:  # type: ignore[arg-type]  # as `lab` has them
        it.address_names.clear()
        it.address_names["127.0.0.1"] = (OTHER,)  # else loopback itself is never reached
        yield it


def test_an_initial_that_shows_the_name_goes_to_what_the_gate_resolves() -> None:
    async def test() -> None:
        async with no_names() as it:
            with Client(it.door()) as client:
                assert await client.ask(initial()) == initial()
                assert it.names.asked == [ECHO]
                it.relay.close()
            [ended] = it.records
            assert (ended["verdict"], ended["server.name"], ended["udp.datagrams.sent"]) == ("allow", ECHO, 1)

    run(test)


REFUSED: dict[str, tuple[list[bytes], str]] = {
    "another name": ([initial("other.example")], "no_rule"),
    "no name": ([initial(None)], "no_sni"),
    "an address as the name": ([initial("127.0.0.1")], "malformed_name"),
    "no QUIC at all": ([b"opaque bytes"], "no_sni"),
    "a packet without a long header": ([b"\x40" + bytes(1200)], "no_sni"),
    "an unknown version": ([b"\xc0\x1a\x2a\x3a\x4a" + initial()[5:]], "malformed_hello"),
    "version negotiation": ([b"\xc0\x00\x00\x00\x00" + initial()[5:]], "malformed_hello"),
    "an Initial that was changed": ([initial()[:-1] + b"\x00"], "malformed_hello"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_show_the_name_is_denied_and_nothing_leaves(case: str) -> None:
    sent, reason = REFUSED[case]
    rules = RULES[:-1] + ", {dns: other.example}]"

    async def test() -> None:
        async with no_names(rules) as it:
            it.address_names["127.0.0.1"] = (ECHO,)  # the address alone proves nothing
            with Client(it.door()) as client:
                for one in sent:
                    client.send(one)
                denied = await it.record(verdict="deny")
                assert denied["reason"] in (reason, "host_mismatch") if case == "another name" else (reason,)
                assert (it.server.received, it.names.asked, len(it.relay._sessions)) == ([], [], 0)

    run(test)


def test_a_hello_that_does_not_come_is_given_up() -> None:
    async def test() -> None:
        async with no_names() as it:
            [first, _] = datagrams(sliced(quic_hello(ECHO), 60), [1, 1])
            with Client(it.door()) as client:
                client.send(first)
                denied = await it.record(verdict="deny")
                assert denied["reason"] == "hello_timeout"
                assert (it.server.received, it.relay.waiting._total) == ([], 0)

    run(test)


def test_a_hello_in_two_datagrams_is_held_until_it_is_whole() -> None:
    async def test() -> None:
        async with no_names() as it:
            first, second = datagrams(sliced(quic_hello(ECHO), 60), [1, 1])
            with Client(it.door()) as client:
                client.send(first)
                await asyncio.sleep(0.05)
                assert it.server.received == []
                client.send(second)
                assert [await client.receive(), await client.receive()] == [first, second]

    run(test)


def test_a_second_connection_on_the_same_ports_says_no_other_name() -> None:
    """The address that was dialled may be many names': fronting."""

    async def test() -> None:
        async with no_names() as it:
            with Client(it.door()) as client:
                await client.ask(initial())
                client.send(initial("other.example", destination=b"another1"))
                denied = await it.record(verdict="deny")
                assert denied["reason"] == "malformed_hello"
                assert denied["error.message"] == "a later ClientHello with another name"
                assert len(it.server.received) == 1
                assert (await it.record(verdict="allow"))["flow.end"] == "reset"

    run(test)


def test_a_second_connection_with_the_same_name_goes_on() -> None:
    async def test() -> None:
        async with no_names() as it:
            with Client(it.door()) as client:
                await client.ask(initial())
                again = initial(destination=b"another1")
                assert await client.ask(again) == again

    run(test)


def test_a_session_stays_with_the_address_that_was_dialled_first() -> None:
    async def test() -> None:
        async with no_names() as it:
            with Client(it.door()) as client:
                await client.ask(initial())
                it.names.entries[ECHO] = replace(it.names.entries[ECHO], port=1)
                assert await client.ask(b"\x40 short header") == b"\x40 short header"
                assert len({peer for _, peer in it.server.received}) == 1

    run(test)


def test_a_rule_by_name_without_quic_carries_opaque_datagrams() -> None:
    async def test() -> None:
        async with lab('[{udp: {host: echo.example, ports: "1-65535"}}]') as it:
            with Client(it.door()) as client:
                assert await client.ask(b"\xc0 not QUIC at all") == b"\xc0 not QUIC at all"

    run(test)


def test_encrypted_client_hello_is_refused() -> None:
    hello = quic_hello(ECHO, (0xFE0D, bytes(40)))
    [sent] = datagrams(sliced(hello), [1])

    async def test() -> None:
        async with no_names() as it:
            with Client(it.door()) as client:
                client.send(sent)
                assert (await it.record(verdict="deny"))["reason"] == "ech"
                assert it.server.received == []

    run(test)


def test_the_private_address_of_a_name_is_not_dialled() -> None:
    from ipaddress import ip_address

    async def test() -> None:
        turned = {ECHO: Resolution((ip_address("10.0.0.1"),), inf)}
        async with no_names(resolved=turned) as it:
            with Client(it.door()) as client:
                client.send(initial())
                assert (await it.record(verdict="deny"))["reason"] == "private_address"

    run(test)


# --- a real client


class Answering(QuicConnectionProtocol):
    """A server that says how much it heard."""

    heard = 0

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self.heard += len(event.data)
            if event.end_stream:
                self._quic.send_stream_data(event.stream_id, b"heard %d" % self.heard, end_stream=True)
                self.transmit()


@pytest.mark.parametrize("size", [0, 3000], ids=["one datagram", "a hello of several"])
@pytest.mark.parametrize("version", [QuicProtocolVersion.VERSION_1, QuicProtocolVersion.VERSION_2])
def test_a_quic_client_speaks_through_it(tmp_path: Path, version: QuicProtocolVersion, size: int) -> None:
    ca = trustme.CA()
    issued = ca.issue_cert("echo.example")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    (tmp_path / "cert.pem").write_bytes(chain)
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")

    async def test() -> None:
        serving = QuicConfiguration(is_client=False, alpn_protocols=["x"])
        serving.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        server = await serve("127.0.0.1", 0, configuration=serving, create_protocol=Answering)
        address = server._transport.get_extra_info("sockname")  # type: ignore[union-attr]  # it is bound by now
        async with no_names(limits=Limits()) as it:
            it.names.entries[ECHO] = replace(it.names.entries[ECHO], port=address[1])
            asking = QuicConfiguration(
                is_client=True, alpn_protocols=["x"] + ["y" * 200] * (size // 200), server_name=ECHO,
                original_version=version, supported_versions=[version],
            )  # fmt: skip
            asking.load_verify_locations(str(tmp_path / "ca.pem"))
            host, port = it.door()
            async with connect(host, port, configuration=asking) as client:
                reader, writer = await client.create_stream()
                writer.write(bytes(50_000))
                writer.write_eof()
                async with asyncio.timeout(20):
                    assert await reader.read() == b"heard 50000"
        server.close()  # type: ignore[no-untyped-call]  # it has no types
        await asyncio.sleep(0.01)  # transports close in a turn of their own

    run(test)


def test_a_quic_client_is_told_nothing_of_another_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with no_names() as it:
            asking = QuicConfiguration(
                is_client=True, alpn_protocols=["x"], server_name="other.example", verify_mode=ssl.CERT_NONE,
                idle_timeout=0.5,
            )  # fmt: skip
            host, port = it.door()
            with pytest.raises(ConnectionError):
                async with connect(host, port, configuration=asking):
                    pass
            assert it.server.received == []
        await asyncio.sleep(0.01)  # as above

    run(test)
