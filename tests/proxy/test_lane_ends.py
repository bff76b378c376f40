"""What the lane leaves of a connection: an answer that its client can read, and no socket, whoever ends it."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from policies.hostnames import parse_hostname
from proxy.inspector.handover import Handover
from proxy.inspector.minting import Minting
from proxy.lane import side
from tests.proxy.inspecting import HOST, WAIT_S, WORKLOAD, Rig, get, read_reply

MIB = 1 << 20


def test_a_client_that_sends_far_more_than_is_read_is_not_reset_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side, "LINGER_S", WAIT_S)
    with Rig(tmp_path, in_lane=True) as rig:
        with rig.connect() as sock:
            sock.sendall(get("/denied", method="PUT", fields=f"Content-Length: {256 * MIB}\r\n"))
            sock.setblocking(False)
            sent = send_until_full(sock)
            assert side.MAX_LINGER < sent < 128 * MIB
            sock.settimeout(WAIT_S)
            assert read_reply(sock)[0].status == 403
            assert rig.lane.open_connections == 1
            rig.loop.call_soon_threadsafe(rig.lane.close)
            rig.wait_for(lambda: not rig.lane.open_connections)
        assert rig.lane.open_connections == 0


def test_a_client_that_never_reads_is_held_for_no_longer_than_the_deadline(tmp_path: Path) -> None:
    with Rig(tmp_path, in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/denied", method="PUT", fields=f"Content-Length: {256 * MIB}\r\n"))
        sock.setblocking(False)
        send_until_full(sock)
        rig.wait_for(lambda: not rig.lane.open_connections)
        assert rig.lane.open_connections == 0


def send_until_full(sock: socket.socket) -> int:
    """How much it takes until half a second passes without room. Raises OSError when it is reset."""
    sent = 0
    while select.select([], [sock], [], 0.5)[1]:
        try:
            sent += sock.send(bytes(64 * 1024))
        except ssl.SSLWantWriteError:
            time.sleep(0.001)
    return sent


@pytest.mark.parametrize("state", ["handshake", "idle"])
def test_a_lane_that_is_closed_closes_what_its_clients_have_open(tmp_path: Path, state: str) -> None:
    with Rig(tmp_path, in_lane=True) as rig, rig.connect() as first:
        first.sendall(get())
        assert read_reply(first)[0].status == 200
        sockets = [client.side.sock for client in tuple(rig.lane._clients)]
        if state == "handshake":
            with socket.create_connection(("127.0.0.1", rig.port)) as sock:
                hello = ssl.MemoryBIO()
                with pytest.raises(ssl.SSLWantReadError):
                    rig.context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname=HOST).do_handshake()
                sock.sendall(hello.read())
                rig.wait_for(lambda: rig.lane.open_connections == 2)
                sockets = [client.side.sock for client in tuple(rig.lane._clients)]
                close(rig)
        else:
            close(rig)
        assert [sock.fileno() for sock in sockets] == [-1] * len(sockets)


def close(rig: Rig) -> None:
    closed = threading.Event()

    def end() -> None:
        rig.lane.close()
        closed.set()

    rig.loop.call_soon_threadsafe(end)
    assert closed.wait(WAIT_S)


@pytest.mark.parametrize("order", ["at once behind it", "before it"])
def test_who_comes_as_the_lane_closes_is_closed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Minting, "context", never)
    handover = Handover("1", WORKLOAD, parse_hostname(HOST), 443, False, ("127.0.0.1", 1), None, 0.0)
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()), Rig(tmp_path, in_lane=True) as rig:
        accepted, _ = listener.accept()
        done = threading.Event()

        def meet() -> None:
            if order == "before it":
                rig.lane.close()
            rig.lane.inspect(accepted, handover)
            rig.lane.close()
            done.set()

        rig.loop.call_soon_threadsafe(meet)
        assert done.wait(WAIT_S)
        assert accepted.fileno() == -1
        assert rig.lane.open_connections == 0
    assert [record["reason"] for record in rig.records] == ["client_gone"]
