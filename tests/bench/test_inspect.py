"""CPU of an inspected keep-alive request: the inspector against stock mitmdump, measured in turns in the same run.

The inspector judges, meters and records each request; mitmdump runs quietly with nothing of that to do.
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.proxy.inspecting import HOST, WAIT_S, Rig, get, read_reply

CONNECTIONS = 4
REQUESTS = 1000
ROUNDS = 3
REQUEST = get("/search?q=Oslo", fields="User-Agent: bench\r\nAccept: */*\r\n")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(connect: Callable[[], socket.socket]) -> None:
    """REQUESTS requests, one after another on each of CONNECTIONS connections."""

    def one() -> None:
        with connect() as sock:
            for _ in range(REQUESTS // CONNECTIONS):
                sock.sendall(REQUEST)
                assert read_reply(sock)[0].body == b"sunny"

    threads = [threading.Thread(target=one) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def request_us(pid: int, connect: Callable[[], socket.socket]) -> float:
    before = cpu_s(pid)
    load(connect)
    return (cpu_s(pid) - before) / REQUESTS * 1e6


@contextmanager
def mitmdump(directory: Path, origin_port: int) -> Iterator[tuple[int, Callable[[], socket.socket]]]:
    """A quiet mitmdump that ends TLS on both sides, as the inspector does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["-q", "--set", f"confdir={directory}", "--set", "ssl_insecure=true", "--set", "keep_host_header=true"]
    where = ["--mode", f"reverse:https://127.0.0.1:{origin_port}", "--listen-host", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen([str(Path(sys.executable).with_name("mitmdump")), *options, *where])
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    def connect() -> socket.socket:
        return context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname=HOST)

    try:
        end = time.monotonic() + WAIT_S
        while True:
            try:
                connect().close()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield process.pid, connect
    finally:
        process.terminate()
        process.wait()


def test_an_inspected_request_costs_less_than_half_of_mitmdumps(
    benchmark: Any,  # pytest-benchmark ships no types
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours: list[float] = []
    stock: list[float] = []
    with Rig(tmp_path, in_process=True) as rig, mitmdump(tmp_path / "mitmdump", rig.origin.port) as (pid, connect):
        load(rig.connect)
        load(connect)
        inspector = rig.inspector.pid
        assert inspector is not None

        def measure() -> None:
            ours.append(request_us(inspector, rig.connect))
            stock.append(request_us(pid, connect))

        benchmark.pedantic(measure, rounds=ROUNDS)
    ratio = min(stock) / min(ours)
    benchmark.extra_info["ratio"] = round(ratio, 2)
    with capsys.disabled():
        print(
            f"\ninspected keep-alive request: {min(ours):.0f} us, stock mitmdump {min(stock):.0f} us: {ratio:.1f}x less"
        )
    assert ratio >= 2
