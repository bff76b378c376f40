"""What `outgate serve` shows of itself while workers come and go, and while somebody attacks the port that shows it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from proxy.metrics.table import METRICS, OTHER
from proxy.service.admin import MAX_CONNECTIONS
from tests.end_to_end.service import Address, Service, eventually
from tests.proxy import gates

POLICY = 'version: 1\nworkloads:\n  app:\n    rules:\n      - tcp: "echo.test:7"\n      - tcp: "own.test:7"\n'
CARRIED = 'outgate_decisions_total{reason="rule",stage="tcp",verdict="allow"}'


@pytest.fixture
def echo() -> Iterator[Address]:
    with gates.origin() as upstream:
        yield upstream.address


def carry(service: Service) -> None:
    """One flow of four bytes there and four back."""
    with service.tunnel("echo.test:7") as sock:
        sock.sendall(b"ping")
        assert gates.read_exactly(sock, 4) == b"ping"


def shows(service: Service, series: str, value: float) -> None:
    eventually(lambda: service.metric(series) == value, f"{series} {value}")


def test_what_a_worker_counted_outlives_it(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, POLICY, "--host", f"echo.test=127.0.0.1:{echo[1]}") as it:
        carry(it)
        assert it.status("other.test:7") == 403
        shows(it, CARRIED, 1)
        shows(it, 'outgate_decisions_total{reason="no_rule",stage="tls",verdict="deny"}', 1)
        [worker] = it.workers()
        os.kill(worker, signal.SIGKILL)
        shows(it, "outgate_worker_restarts_total", 1)
        eventually(lambda: it.ready()[0] == 200, "another worker")
        assert it.metric(CARRIED) == 1
        assert it.metric('outgate_workers{state="ready"}') == 1
        carry(it)
        shows(it, CARRIED, 2)
        assert it.metric('outgate_bytes_total{direction="received"}') == 8
        assert it.metric("outgate_connections_accepted_total") == 3
        assert it.metric('outgate_upstream_connect_duration_seconds_count{result="connected"}') == 2
        shows(it, "outgate_log_records_written_total", 3)

        page = it.ask("/metrics")[1]

    families = {family.name: family for family in parse(page)}
    assert families.keys() == {name.removesuffix("_total") for name in METRICS}
    assert OTHER not in {
        value for family in families.values() for one in family.samples for value in one.labels.values()
    }
    (policy,) = families["outgate_policy_generation_info"].samples
    assert {record["policy.generation"] for record in it.records()} == {policy.labels["generation"]}
    memory = {one.labels["part"]: one.value for one in families["process_resident_memory_bytes"].samples}
    assert memory["worker"] > 10_000_000 < memory["supervisor"]
    assert memory["inspector"] == 0


def test_slow_clients_of_the_admin_port_hold_up_neither_a_probe_nor_a_flow(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, POLICY, "--host", f"echo.test=127.0.0.1:{echo[1]}") as it, ExitStack() as stack:
        for _ in range(2 * MAX_CONNECTIONS):
            slow = stack.enter_context(socket.create_connection(it.admin, gates.PATIENCE_S))
            slow.sendall(b"POST /reload HTTP/1.1\r\nHost: localhost\r\nX: ")
        assert it.ask("/healthz") == (200, "alive\n")
        assert it.ready()[0] == 200
        carry(it)
        shows(it, CARRIED, 1)


def test_no_name_leads_a_workload_to_the_admin_port(tmp_path: Path) -> None:
    """The operator's hosts are exempt from the loopback check; the gate's own doors stay closed all the same."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--admin", f"127.0.0.1:{port}", "--host", f"own.test=127.0.0.1:{port}"]
    with Service(tmp_path, POLICY, *options) as it:
        with it.tunnel("own.test:7") as sock, suppress(ConnectionError):
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert gates.read_all(sock) == b""
        [record] = eventually(lambda: it.records(stage="tcp"), "the denial")
        assert (record["verdict"], record["reason"]) == ("deny", "never_reached")


def test_gate_without_an_admin_port_loads_no_web_server(tmp_path: Path) -> None:
    it = Service(tmp_path, POLICY, "--admin", "none")
    try:
        it.hears("serving proxy clients on")
        processes = [it.process.pid, *it.processes()]
        loaded = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in processes)
        assert "orjson" in loaded
        assert "aiohttp" not in loaded
    finally:
        it.__exit__()
