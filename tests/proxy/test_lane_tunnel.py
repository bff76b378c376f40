"""What follows an Upgrade that the verdict admits: bytes both ways as they are, neither end faster than the other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.lane.side import HIGH, RECORD
from tests.proxy.inspecting import POLICY, WAIT_S, Rig, get

UPGRADES = POLICY.replace("        name: weather\n", "        name: weather\n        upgrade: [websocket]\n")
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
MIB = 1 << 20
MUCH = 32 * MIB  # more than the kernel holds


class Peer:
    """The origin's end of one tunnel, given to the test; it is closed when the test is over."""

    def __init__(self) -> None:
        self._has_come, self._is_over = threading.Event(), threading.Event()
        self.sock: socket.socket | None = None

    def __call__(self, _request: bytes, sock: socket.socket) -> None:
        sock.sendall(SWITCHED)
        self.sock = sock
        self._has_come.set()
        self._is_over.wait(2 * WAIT_S)

    def wait(self) -> socket.socket:
        assert self._has_come.wait(WAIT_S)
        assert self.sock is not None
        return self.sock

    def end(self) -> None:
        self._is_over.set()


@pytest.fixture
def peer() -> Iterator[Peer]:
    it = Peer()
    yield it
    it.end()


@pytest.fixture(params=[True, False], ids=["plain", "TLS"])
def rig(tmp_path: Path, peer: Peer, request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(tmp_path, policy=UPGRADES, plain=request.param, respond=peer, in_lane=True) as it:
        yield it
        peer.end()
    assert it.failures == []


def tunnel(rig: Rig, peer: Peer) -> tuple[socket.socket, socket.socket]:
    """Both ends of one."""
    sock = rig.connect()
    sock.sendall(get("/search", fields="Connection: Upgrade\r\nUpgrade: websocket\r\n"))
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 101 ")
    return sock, peer.wait()


def send_all(sock: socket.socket, data: bytes) -> threading.Thread:
    thread = threading.Thread(target=sock.sendall, args=(data,))
    thread.start()
    return thread


def receive(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size and (data := sock.recv(min(size, 65536))):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


@pytest.mark.parametrize("from_origin", [True, False], ids=["from the origin", "from the client"])
def test_who_reads_nothing_is_waited_for_and_gets_all(rig: Rig, peer: Peer, from_origin: bool) -> None:
    client, origin = tunnel(rig, peer)
    sender, reader = (origin, client) if from_origin else (client, origin)
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)  # the kernel does not widen it then
    data = bytes(range(256)) * (MUCH // 256)
    with client:
        sending = send_all(sender, data)
        rig.wait_for(lambda: rig.lane.held_bytes > HIGH)
        assert HIGH < rig.lane.held_bytes <= HIGH + 8 * RECORD
        assert receive(reader, MUCH) == data
        sending.join(WAIT_S)
    peer.end()
    [record] = rig.wait_for_records(1)
    assert record["reason"] == "rule"
    assert record["bytes.received" if from_origin else "bytes.sent"] == MUCH


def test_both_may_send_at_once(rig: Rig, peer: Peer) -> None:
    client, origin = tunnel(rig, peer)
    with client:
        asks, answers = bytes(2 * MIB), b"x" * 2 * MIB
        sending = [send_all(origin, answers)]
        assert receive(client, 2 * MIB) == answers
        sending.append(send_all(client, asks))
        assert receive(origin, 2 * MIB) == asks
        for thread in sending:
            thread.join(WAIT_S)


@pytest.mark.parametrize("rig", [True], indirect=True, ids=["plain"])  # Python's TLS has no half of an end
@pytest.mark.parametrize("first", ["client", "origin"])
def test_one_end_may_be_over_while_the_other_goes_on(rig: Rig, peer: Peer, first: str) -> None:
    client, origin = tunnel(rig, peer)
    ends, goes_on = (client, origin) if first == "client" else (origin, client)
    with client:
        ends.shutdown(socket.SHUT_WR)
        assert goes_on.recv(1) == b""
        goes_on.sendall(b"the rest")
        goes_on.shutdown(socket.SHUT_WR)
        assert receive(ends, 100) == b"the rest"
    [record] = rig.wait_for_records(1)
    assert (record["reason"], record["http.response.status_code"]) == ("rule", 101)
