"""CPU of inspected HTTP/1.1 in the lane, beside mitmproxy's host in turns in the same run: a request, a connection.

Both judge and record each request on a loop in this process; what is counted is the CPU time of that loop's thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.proxy.inspecting import WAIT_S, Rig, get, read_reply

IN_FLIGHT = 4
ROUNDS = 3
REQUEST = get("/search?q=Oslo", fields="User-Agent: bench\r\nAccept: */*\r\n")


def cpu_s(rig: Rig) -> float:
    async def of_this_thread() -> float:
        return time.thread_time()

    return asyncio.run_coroutine_threadsafe(of_this_thread(), rig.loop).result(WAIT_S)


def at_once(act: Callable[[], None]) -> None:
    threads = [threading.Thread(target=act) for _ in range(IN_FLIGHT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def ask(rig: Rig, connections: int, requests: int) -> None:
    """So many requests, one after another, on each of so many connections, one after another."""
    for _ in range(connections):
        with rig.connect() as sock:
            for _ in range(requests):
                sock.sendall(REQUEST)
                assert read_reply(sock)[0].body == b"sunny"


def cost_us(rig: Rig, connections: int, requests: int) -> float:
    """Of one request."""
    before, recorded = cpu_s(rig), len(rig.records)
    at_once(lambda: ask(rig, connections, requests))
    spent = cpu_s(rig) - before
    count = IN_FLIGHT * connections * requests
    assert len(rig.records) - recorded == count
    return spent / count * 1e6


@pytest.mark.parametrize(
    ("what", "connections", "requests", "at_least"),
    [
        pytest.param("keep-alive request", 1, 250, 3.0, id="request"),
        pytest.param("new connection with one request", 25, 1, 1.0, id="connection"),
    ],
)
def test_the_lane_costs_less_than_mitmproxys_host(
    benchmark: BenchmarkFixture,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    connections: int,
    requests: int,
    at_least: float,
) -> None:
    lane: list[float] = []
    peer: list[float] = []
    directories = tmp_path / "lane", tmp_path / "mitmproxy"
    for directory in directories:
        directory.mkdir()
    with Rig(directories[0], in_lane=True) as ours, Rig(directories[1], in_lane=False) as theirs:
        for rig in (ours, theirs):
            ask(rig, 1, 20)

        def measure() -> None:
            lane.append(cost_us(ours, connections, requests))
            peer.append(cost_us(theirs, connections, requests))

        benchmark.pedantic(measure, rounds=ROUNDS)  # type: ignore[no-untyped-call]  # theirs
    ratio = min(peer) / min(lane)
    benchmark.extra_info["ratio"] = round(ratio, 2)
    with capsys.disabled():
        print(f"\n{what}: the lane {min(lane):.0f} us, mitmproxy's host {min(peer):.0f} us: {ratio:.1f}x less")
    assert ratio >= at_least
