"""The end of the inspector: what clients have left behind is judged and recorded, and nobody waits for long."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from policies.tree import Source
from proxy.compiled import write_policy
from proxy.inspector import Configuration, Handover, Inspector, host
from proxy.policy_files import load_sources
from proxy.record import Record, new_id
from tests.proxy.inspecting import HOST, POLICY, WAIT_S, WORKLOAD, Rig, get, response

OPENED = 1_800_000_000.0


def handed_over(inspector: Inspector, say: bytes) -> socket.socket:
    """The client of a plain connection that was given to the inspector after it said that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, source = listener.accept()
    client.sendall(say)
    inspector.inspect(accepted, Handover(new_id(), WORKLOAD, None, 80, True, (source[0], source[1]), None, OPENED))
    return client


def compiled() -> BinaryIO:
    return write_policy(load_sources([Source("p.yaml", POLICY)]))


def drained(
    configuration: Callable[[], Configuration], talk: Callable[[Inspector], None], *, log: list[str] | None = None
) -> list[Record]:
    """The records of an inspector that is drained right after `talk`; its process has ended then."""
    records: list[Record] = []

    async def run() -> None:
        inspector = Inspector(configuration, compiled, records.append, (log if log is not None else []).append)
        talk(inspector)
        await inspector.drain()
        assert inspector.pid is None

    asyncio.run(run())
    return records


def test_requests_whose_clients_are_gone_are_judged_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "DRAIN_S", WAIT_S)  # the process has yet to start

    def talk(inspector: Inspector) -> None:
        for path in ("/forecasts/1", "/forecasts/2", "/forecasts/3"):
            handed_over(inspector, get(path)).close()

    with Rig(tmp_path) as rig:
        records = drained(rig.configuration, talk)
        assert rig.origin.connections == 0

    assert sorted((record["url.full"], record["reason"]) for record in records) == [
        (f"http://{HOST}/forecasts/{number}", "no_allow_entry") for number in (1, 2, 3)
    ]


def test_a_client_that_stays_is_cut_and_the_drain_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DRAIN_S", WAIT_S)
    clients: list[socket.socket] = []

    def talk(inspector: Inspector) -> None:
        clients.append(handed_over(inspector, b"GET /search HTTP/1.1\r\n"))

    with Rig(tmp_path) as rig:
        began = time.monotonic()
        drained(rig.configuration, talk)
    with clients[0] as client:
        client.settimeout(WAIT_S)
        assert client.recv(1) == b""

    assert time.monotonic() - began < WAIT_S


def test_within_the_grace_an_answer_is_waited_for_and_a_client_that_asks_nothing_is_left(tmp_path: Path) -> None:
    is_draining = threading.Event()

    def respond(request: bytes, _origin: socket.socket) -> bytes:
        if b"/search/slow" in request:
            assert is_draining.wait(WAIT_S)
            time.sleep(0.7)  # longer than there is without a grace
        return response()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        inspector = Inspector(rig.configuration, compiled, records.append)
        idle, busy = (handed_over(inspector, get(path)) for path in ("/search/quick", "/search/slow"))
        with idle, busy:
            idle.setblocking(False)
            busy.setblocking(False)
            assert (await loop.sock_recv(idle, 100)).startswith(b"HTTP/1.1 200 ")
            draining = asyncio.create_task(inspector.drain(60.0))
            await asyncio.sleep(0)
            is_draining.set()
            assert (await loop.sock_recv(busy, 100)).startswith(b"HTTP/1.1 200 ")
            assert await loop.sock_recv(idle, 100) == b""
            await draining

    records: list[Record] = []
    with Rig(tmp_path, plain=True, respond=respond) as rig:
        asyncio.run(asyncio.wait_for(run(), 2 * WAIT_S))

    assert sorted(str(record["url.full"]) for record in records) == [
        f"http://{HOST}/search/quick",
        f"http://{HOST}/search/slow",
    ]


def test_who_still_waits_at_the_bound_is_recorded_as_gone_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "DRAIN_S", 0.0)
    clients: list[socket.socket] = []

    def talk(inspector: Inspector) -> None:
        handed_over(inspector, get()).close()
        clients.append(handed_over(inspector, get()))

    with Rig(tmp_path) as rig:
        records = drained(rig.configuration, talk)
        assert rig.origin.connections == 0
    with clients[0] as client:
        client.settimeout(WAIT_S)
        assert client.recv(100).startswith(b"HTTP/1.1 502 ")

    assert [record["reason"] for record in records] == ["client_gone", "gate_failed"]


def test_an_inspector_without_a_configuration_refuses_at_once() -> None:
    log: list[str] = []

    def configuration() -> Configuration:
        raise ValueError("secret")

    def talk(inspector: Inspector) -> None:
        with handed_over(inspector, get()) as client:
            client.settimeout(WAIT_S)
            assert client.recv(100).startswith(b"HTTP/1.1 502 ")

    records = drained(configuration, talk, log=log)

    assert [record["reason"] for record in records] == ["gate_failed"]
    assert log == ["the inspector has no configuration: ValueError"]


def test_draining_one_that_never_started_is_nothing() -> None:
    assert drained(lambda: Configuration(""), lambda _inspector: None) == []
