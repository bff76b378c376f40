"""The end of a lane: what is under way may finish within the grace, what waits is left, and the rest is told."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from policies.load import Source
from proxy.inspector.minting import Minting
from proxy.policy_files import load_sources
from tests.proxy.inspecting import HOST, WAIT_S, WORKLOAD, Rig, get, read_reply, response


def drain(rig: Rig, grace_s: float) -> Future[None]:
    return asyncio.run_coroutine_threadsafe(rig.lane.drain(grace_s), rig.loop)


class Slow:
    """An origin that thinks until it is told to go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def __call__(self, request: bytes, _sock: socket.socket) -> bytes:
        if b"/search/slow" in request:
            self.go_on.wait(WAIT_S)
        return response()


def test_within_the_grace_an_answer_is_waited_for_and_a_client_that_asks_nothing_is_left(tmp_path: Path) -> None:
    slow = Slow()
    with Rig(tmp_path, respond=slow, in_lane=True) as rig, rig.connect() as idle, rig.connect() as busy:
        idle.sendall(get("/search"))
        assert read_reply(idle)[0].status == 200
        busy.sendall(get("/search/slow"))
        rig.wait_for(lambda: len(rig.origin.requests) == 2)
        draining = drain(rig, 60.0)
        assert idle.recv(1) == b""
        slow.go_on.set()
        reply, _ = read_reply(busy)
        assert (reply.status, reply.fields["connection"]) == (200, "close")
        assert busy.recv(1) == b""
        draining.result(WAIT_S)
    assert [record["reason"] for record in rig.records] == ["rule", "rule"]


def test_beyond_the_grace_it_is_cut_and_recorded(tmp_path: Path) -> None:
    slow = Slow()
    with Rig(tmp_path, respond=slow, in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/search/slow"))
        rig.wait_for(lambda: rig.origin.requests)
        drain(rig, 0.2).result(WAIT_S)
        assert read_reply(sock)[0].status == 0
        slow.go_on.set()
    assert [record["reason"] for record in rig.records] == ["client_gone"]


def test_who_has_not_shaken_hands_yet_is_recorded(tmp_path: Path) -> None:
    with Rig(tmp_path, in_lane=True) as rig:
        rig.send(get("/search"))  # so that there is a leaf
        with socket.create_connection(("127.0.0.1", rig.port)) as sock:
            hello = ssl.MemoryBIO()
            with pytest.raises(ssl.SSLWantReadError):
                rig.context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname=HOST).do_handshake()
            rig.wait_for(lambda: not rig.lane.open_connections)  # the first one's is over
            sock.sendall(hello.read())
            rig.wait_for(lambda: rig.lane.open_connections == 1)
            drain(rig, 0.0).result(WAIT_S)
    assert [record["reason"] for record in rig.records] == ["rule", "client_gone"]


def test_who_waits_for_a_leaf_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Minting, "context", never)
    with Rig(tmp_path, in_lane=True) as rig:
        connecting = threading.Thread(target=_try_to_connect, args=(rig,))
        connecting.start()
        rig.wait_for(lambda: rig.lane.open_connections == 1)
        drain(rig, 0.0).result(WAIT_S)
        connecting.join(WAIT_S)
        rig.wait_for_records(1)
        assert rig.lane.open_connections == 0
    assert [record["reason"] for record in rig.records] == ["client_gone"]


def test_a_source_that_became_another_workloads_does_not_go_on_over_the_formers_connection(tmp_path: Path) -> None:
    """What the origin knows of that connection is the former workload's."""

    def policy(mine: str) -> str:
        both = {WORKLOAD: "127.0.0.9/32", "other": "127.0.0.8/32", mine: "127.0.0.1/32"}
        lines = (
            f"  {name}: {{match: {{address: [{prefix}]}}, rules: [{{host: {HOST}, tls: inspect}}]}}\n"
            for name, prefix in both.items()
        )
        return "version: 1\nworkloads:\n" + "".join(lines)

    with Rig(tmp_path, policy=policy(WORKLOAD), workload=None, in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/search"))
        assert read_reply(sock)[0].status == 200
        rig.in_force.policy = load_sources([Source("p.yaml", policy("other"))])
        rig.loop.call_soon_threadsafe(rig.lane.swap)
        sock.sendall(get("/search"))
        assert read_reply(sock)[0].status == 200
        assert rig.origin.connections == 2
    assert [record["workload"] for record in rig.records] == [WORKLOAD, "other"]


def _try_to_connect(rig: Rig) -> None:
    try:
        rig.connect().close()
    except OSError:
        pass
