"""The longest wait of a request while a policy of 100,000 rules is swapped, beside the longest without a swap.

The clients are a process of their own; the policy is compiled by another, as in service. Beside it the naive way: the
policy as objects, unpickled by the loop that serves.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from proxy.service.compiler import Request, compile_policy
from tests.proxy.inspecting import get, read_reply
from tests.proxy.rotating import new_store
from tests.proxy.swapping import CARRIED, INSPECTED, Serving, of_app

RULES = 100_000
AROUND_S = 2.0  # before and after what is measured
PATIENCE_S = 60.0
PAUSE_S = 0.02  # between two requests of one kind: some 80 a second together
RULE = "{{host: h{0}.d{1}.example, tls: inspect, allow: ['GET /a/{0}/**'], deny: ['* /x/**']}}"
SERVED = (f"{{host: {INSPECTED}, tls: inspect}}", f"host: {CARRIED}")
PICKLE = """
import pickle, sys
from proxy.policy_files import read_policy
with open(sys.argv[2], "wb") as file:
    pickle.dump(read_policy([sys.argv[1]]), file, 5)
"""

type Waits = list[float]  # seconds; a request that failed waited for ever
type Load = Callable[[Serving, Callable[[], object]], Waits]


def _ask_until(is_over: Callable[[], bool], ask: Callable[[], None], waits: Waits) -> None:
    while not is_over():
        started = time.perf_counter()
        try:
            ask()
            waits.append(time.perf_counter() - started)
        except (OSError, AssertionError):
            waits.append(float("inf"))
        time.sleep(PAUSE_S)


def _talk(is_over: Callable[[], bool], address: tuple[str, int], roots: str, origin_ca: str) -> Waits:
    """New connections that are passed through, and requests on one that is inspected."""
    carried, inspected = ssl.create_default_context(cafile=origin_ca), ssl.create_default_context(cafile=roots)

    def connect(context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
        sock = socket.create_connection(address, timeout=PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return context.wrap_socket(sock, server_hostname=host)

    def ask(sock: ssl.SSLSocket, host: str) -> None:
        sock.sendall(get("/search", host=host))
        assert read_reply(sock)[0].status == 200

    def ask_anew() -> None:
        with connect(carried, CARRIED) as sock:
            ask(sock, CARRIED)

    waits: Waits = []
    with connect(inspected, INSPECTED) as kept:
        ask(kept, INSPECTED)
        beside = threading.Thread(target=_ask_until, args=(is_over, ask_anew, waits))
        beside.start()
        _ask_until(is_over, lambda: ask(kept, INSPECTED), waits)
        beside.join()
    return waits


def _serve_loads(pipe: Connection) -> None:
    while (task := pipe.recv()) is not None:
        waits = _talk(pipe.poll, *task)
        pipe.recv()
        pipe.send(waits)


@contextmanager
def clients() -> Iterator[Load]:
    """A process that asks; forked before there is any thread."""
    fork = get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_serve_loads, args=(theirs,), daemon=True)
    process.start()

    def load(serving: Serving, do: Callable[[], object]) -> Waits:
        ours.send((serving.address, str(serving._roots), str(serving._origin_ca)))
        time.sleep(AROUND_S)
        do()
        time.sleep(AROUND_S)
        ours.send("over")
        waits: Waits = ours.recv()
        return waits

    try:
        yield load
    finally:
        ours.send(None)
        process.join(5)


def compiled(path: Path) -> BinaryIO:
    request = Request(paths=(str(path),), pki=str(path.parent / "pki"))
    _, policy = asyncio.run(compile_policy(request))
    assert policy is not None
    return policy


def shown(name: str, waits: Waits) -> str:
    return f"{name}: {max(waits) * 1000:.1f} ms longest of {len(waits)}, {waits.count(float('inf'))} failed"


def test_the_longest_wait_during_a_swap(
    benchmark: BenchmarkFixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(of_app(*SERVED, *(RULE.format(number, number % 997) for number in range(RULES))))
    new_store(tmp_path)
    pickled = tmp_path / "policy.pickle"
    subprocess.run([sys.executable, "-c", PICKLE, str(path), str(pickled)], check=True)
    found: dict[str, Waits] = {}

    with clients() as load, Serving(tmp_path, of_app(*SERVED)) as it:

        def unpickle() -> None:
            it.gate._in_force.policy = pickle.loads(pickled.read_bytes())

        def measure() -> None:
            ready = compiled(path)
            load(it, lambda: None)  # the first of everything takes longer
            found["without a swap"] = load(it, lambda: time.sleep(AROUND_S))
            found["swap"] = load(it, lambda: it.run(it.gate.swap(ready)))
            found["swap, compiled meanwhile"] = load(it, lambda: it.run(it.gate.swap(compiled(path))))
            found["unpickled on the loop"] = load(it, lambda: it.loop.call(unpickle))

        benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]  # theirs
    ratio = max(found["swap"]) / max(found["without a swap"])
    benchmark.extra_info["ratio of the longest wait"] = round(ratio, 2)
    with capsys.disabled():
        print("\n" + "\n".join(shown(name, waits) for name, waits in found.items()) + f"\nratio {ratio:.2f}")
    assert float("inf") not in found["swap"] + found["swap, compiled meanwhile"]
