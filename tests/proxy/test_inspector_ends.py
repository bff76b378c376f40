"""How mitmproxy's host ends a connection: its last word whole, TLS's goodbye, FIN; and how it reads its peers' ends."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from mitmproxy.connection import Client as ClientConnection

from proxy.inspector import side
from proxy.inspector.side import Side
from tests.proxy.conformance.hosts import TableRig, rig_of
from tests.proxy.conformance.rows import HOST
from tests.proxy.inspecting import WAIT_S, get

KIB, MIB = 1 << 10, 1 << 20
DENIED = f"PUT /denied/x HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {64 * MIB}\r\n\r\n".encode()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[TableRig]:
    with rig_of("mitmproxy", tmp_path) as rig:
        yield rig
        assert rig.failures == []


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends because the gate has waited long enough."""
    monkeypatch.setattr(side, "LINGER_S", 10 * WAIT_S)


class Raw:
    """TLS whose records are sent and read by hand, so that what comes below it is seen too."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, first: bytes = b"") -> None:
        """`first` leaves in one segment with the end of the handshake."""
        sock.settimeout(WAIT_S)
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=HOST)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
                self._incoming.write(self.sock.recv(64 * KIB))
        self.send(first)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self._tls.write(data)
        self.sock.sendall(self._outgoing.read())

    def read(self) -> bytes:
        """Some bytes; none at close_notify. Raises SSLEOFError where there is none."""
        while True:
            try:
                return self._tls.read(64 * KIB)
            except ssl.SSLWantReadError:
                if data := self.sock.recv(64 * KIB):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()

    def to_its_goodbye(self) -> bytes:
        return b"".join(iter(self.read, b""))


def dial(rig: TableRig, first: bytes = b"") -> Raw:
    context = ssl.create_default_context(cafile=str(rig.roots))
    return Raw(socket.create_connection(("127.0.0.1", rig.port), timeout=WAIT_S), context, first)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("still_sent", [0, 600 * KIB], ids=["at-its-head", "while-it-sends"])
def test_a_denied_upload_gets_its_answer_then_goodbye_then_fin(rig: TableRig, still_sent: int) -> None:
    with dial(rig, DENIED) as client:
        for _ in range(still_sent // (16 * KIB)):
            client.send(bytes(16 * KIB))
        assert client.to_its_goodbye().startswith(b"HTTP/1.1 403 ")
        assert client.sock.recv(1) == b""
        client.send(b"more")  # no reset comes back yet
        assert client.sock.recv(1) == b""
        client.sock.shutdown(socket.SHUT_WR)
        rig.wait_for(lambda: rig.core.open_connections == 0)
        assert rig.core.open_connections == 0


def test_a_client_that_never_stops_is_cut(rig: TableRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side, "LINGER_S", 0.2)
    with dial(rig, DENIED) as client:
        with pytest.raises(OSError, match=r"."):  # noqa: PT012 - which of them depends on the kernel's buffers
            for _ in range(64 * MIB // (16 * KIB)):
                client.send(bytes(16 * KIB))
        rig.wait_for(lambda: rig.core.open_connections == 0)
        assert rig.core.open_connections == 0


def test_a_client_that_is_silent_behind_its_answer_is_let_go(rig: TableRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side, "LINGER_S", 0.2)
    with dial(rig, b"no request\r\n\r\n") as client:
        assert client.to_its_goodbye().startswith(b"HTTP/1.1 400 ")
        rig.wait_for(lambda: rig.core.open_connections == 0)
        assert rig.core.open_connections == 0


class Listening:
    """The owner of a side to which nothing matters."""

    def made(self, side: Side) -> None:
        pass

    def received(self, side: Side, data: bytes) -> None:
        pass

    def half_closed(self, side: Side) -> bool:
        return False

    def lost(self, side: Side, error: Exception | None) -> None:
        pass

    def hold_others(self, slow: Side) -> None:
        pass

    def release_others(self, slow: Side) -> None:
        pass


@pytest.mark.usefixtures("patient")
def test_a_slow_reader_gets_all_that_was_said_before_the_goodbye() -> None:
    """More than the kernel, the transport and TLS have room for waits when the connection is ended."""
    said = bytes(8 * MIB)
    authority = trustme.CA()
    serving, asking = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(HOST).configure_cert(serving)
    authority.configure_trust(asking)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ended = threading.Event()

    def read() -> tuple[bytes, bytes]:
        with Raw(theirs, asking) as client:
            assert ended.wait(WAIT_S)
            return client.to_its_goodbye(), client.sock.recv(1)

    async def run() -> tuple[bytes, bytes]:
        one = Side(Listening(), ClientConnection(peername=("", 0), sockname=("", 0), timestamp_start=0))
        reading = asyncio.create_task(asyncio.to_thread(read))
        await one.accept_tls(ours, serving, WAIT_S)
        one.write(said)
        one.close(unread=True)
        assert one.transport.get_write_buffer_size()  # even the goodbye waits
        ended.set()
        return await reading

    assert asyncio.run(run()) == (said, b"")


def test_what_comes_with_the_end_of_the_handshake_waits_while_records_are_held(rig: TableRig) -> None:
    rig.loop.call_soon_threadsafe(rig.core.hold, True)
    with dial(rig, get("/x")) as client:
        rig.wait_for(lambda: any(one.client._waiting for one in rig.core._inspections))
        assert rig.strict.connections == 0
        rig.loop.call_soon_threadsafe(rig.core.hold, False)
        assert client.read().startswith(b"HTTP/1.1 200 ")
    assert len(rig.strict.forwarded) == 1


def test_a_head_without_an_end_is_refused_before_mitmproxy_parses_it(rig: TableRig) -> None:
    with dial(rig, f"GET /x HTTP/1.1\r\nHost: {HOST}\r\nX: ".encode()) as client:
        sent = 0
        try:
            for _ in range(50 * MIB // (16 * KIB)):
                client.send(b"a" * (16 * KIB))
                sent += 16 * KIB
        except OSError:
            pass  # nobody reads any more
    assert sent < 40 * MIB  # what the kernel holds on both sides, and what is thrown away
    assert rig.wait_for_records(1)[0]["http.response.status_code"] == 431
