"""`outgate serve` over its life: reloads, lost workers, a lost supervisor, the end. Connections that are open stay."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
import trustme

from tests.end_to_end.service import WAIT_S, Address, Service, answered, eventually, is_gone, signal_to
from tests.end_to_end.world import OUTGATE
from tests.proxy import gates, inspecting

HEAD = "version: 1\nworkloads:\n  app:\n    rules:\n"
ECHO = '      - tcp: "echo.test:7"\n'
MORE = '      - tcp: "more.test:7"\n'
INSPECTED = '      - {host: api.test, tls: inspect, allow: ["GET /old/**", "GET /both/**"]}\n'
NEWLY = '      - {host: api.test, tls: inspect, allow: ["GET /new/**", "GET /both/**"]}\n'
BROKEN = "version: 1\nworkloads: [\n"
TOKEN = "a-token-of-some-length"


@pytest.fixture
def echo() -> Iterator[Address]:
    with gates.origin() as upstream:
        yield upstream.address


def hosts(echo: Address) -> list[str]:
    """The names that lead to the echo."""
    return [word for name in ("echo", "more") for word in ("--host", f"{name}.test=127.0.0.1:{echo[1]}")]


def says(sock: socket.socket, text: bytes) -> bool:
    """Whether it comes back."""
    sock.sendall(text)
    return gates.read_exactly(sock, len(text)) == text


# --- reload ------------------------------------------------------------------------------------------------------


class Inspected:
    """A keep-alive connection through the gate to https://api.test."""

    def __init__(self, service: Service, trust: Path) -> None:
        context = ssl.create_default_context(cafile=str(trust))
        self._http = HTTPConnection("api.test")
        self._http.sock = context.wrap_socket(service.tunnel("api.test:443"), server_hostname="api.test")

    def get(self, path: str) -> int:
        self._http.request("GET", path)
        reply: HTTPResponse = self._http.getresponse()
        reply.read()
        assert not reply.will_close or reply.status != 200
        return reply.status

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[inspecting.Origin]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "origin.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("api.test").configure_cert(context)
    upstream = inspecting.Origin(context, lambda _head, _sock: inspecting.response())
    yield upstream
    upstream.close()


@pytest.fixture
def trust(tmp_path: Path) -> Path:
    """Of the authority in `pki`."""
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", "pki"], cwd=tmp_path, check=True, capture_output=True)
    path = tmp_path / "trust.pem"
    path.write_bytes(b"".join(found.read_bytes() for found in (tmp_path / "pki").rglob("*.crt")))
    return path


def as_config_map(directory: Path, text: str, number: int) -> Path:
    """policy.yaml as the kubelet shows a ConfigMap: a link into a directory that a link leads to, which is swapped."""
    (directory / f"..{number}").mkdir()
    (directory / f"..{number}" / "policy.yaml").write_text(text)
    (directory / "..data_tmp").symlink_to(f"..{number}")
    (directory / "..data_tmp").replace(directory / "..data")
    if not (directory / "policy.yaml").is_symlink():
        (directory / "policy.yaml").symlink_to("..data/policy.yaml")
    return directory / "policy.yaml"


def test_open_connections_outlive_a_reload_and_new_requests_are_judged_by_the_new_policy(
    tmp_path: Path, echo: Address, origin: inspecting.Origin, trust: Path
) -> None:
    first = as_config_map(tmp_path, HEAD + ECHO + INSPECTED, 1)
    options = ["--pki", "pki", "--upstream-ca", "origin.pem", "--host", f"api.test=127.0.0.1:{origin.port}"]
    with Service(tmp_path, first, "--workers", "2", *options, *hosts(echo)) as it, ExitStack() as stack:
        carried = stack.enter_context(it.tunnel("echo.test:7"))
        inspected = Inspected(it, trust)
        stack.callback(inspected.close)
        assert says(carried, b"before")
        assert [inspected.get(path) for path in ("/old/1", "/both/1")] == [200, 200]
        before = judged_by(it, "/both/1")

        as_config_map(tmp_path, HEAD + MORE + NEWLY, 2)
        after = it.hears(r"policy ([0-9a-f]{12}) is in force")[1]

        assert says(carried, b"after")
        assert [inspected.get(path) for path in ("/both/2", "/new/2")] == [200, 200]
        assert inspected.get("/old/2") == 403
        assert it.status("echo.test:7") == 403
        with it.tunnel("more.test:7") as other:
            assert says(other, b"new")
        assert it.ready() == (200, [], [])
        assert it.metric('outgate_reloads_total{result="loaded"}') == 1
        carried.close()
        carried_is = {"server.names": ["echo.test"], "verdict": "allow"}
        [ended] = eventually(lambda: it.records(**carried_is), "the record of the flow")
        assert after != before
        assert judged_by(it, "/both/2") == judged_by(it, "/old/2") == after
        assert ended["policy.generation"] == before


def judged_by(service: Service, path: str) -> str:
    """The policy that the record of a request names."""
    found = eventually(lambda: service.records(**{"url.full": f"https://api.test{path}"}), f"the record of {path}")
    return str(found[0]["policy.generation"])


def test_files_that_cannot_be_loaded_leave_the_last_good_policy_in_force(tmp_path: Path, echo: Address) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    with Service(tmp_path, HEAD + ECHO, "--admin-token", "token", *hosts(echo)) as it:
        good = it.metric("outgate_policy_loaded_timestamp_seconds")
        it.policy.write_text(BROKEN)
        it.hears(r"the policy is not reloaded, [0-9a-f]{12} stays in force:")
        status, page = it.reload(TOKEN)
        again, _ = it.reload(TOKEN)
        assert (status, again, page["result"]) == (422, 422, "refused")
        assert "policy.yaml:3:1: not YAML" in page["problems"][0]
        assert sum("is not reloaded" in line for line in it.said) == 1

        ready, because, notes = it.ready()
        assert (ready, because) == (200, [])
        assert "policy.yaml cannot be loaded" in notes[0]
        assert "not YAML" not in notes[0]  # anybody who reaches the port may read it
        [worker] = it.workers()
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: it.workers() not in ([], [worker]), "another worker")
        with it.tunnel("echo.test:7") as sock:  # its first policy is the good one: the files hold none
            assert says(sock, b"still")
        assert it.metric("outgate_policy_loaded_timestamp_seconds") == good

        it.policy.write_text(HEAD + ECHO)
        assert it.reload(TOKEN)[1]["result"] == "unchanged"
        it.hears("the files say again what is in force")
        assert it.ready() == (200, [], [])
        it.policy.write_text(HEAD + MORE)
        status, page = it.reload(TOKEN)
        assert (status, page["problems"]) == (200, [])
        assert it.status("echo.test:7") == 403


def test_a_policy_that_inspects_is_refused_where_no_authority_was_named(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, *hosts(echo)) as it:
        it.policy.write_text(HEAD + ECHO + INSPECTED)
        it.send(signal.SIGHUP)
        it.hears(r"policy\.yaml:6 .* is inspected: give the authority .* --pki DIR")
        assert it.status("api.test:443") == 403
        with it.tunnel("echo.test:7") as sock:
            assert says(sock, b"still")


def test_sighup_reads_the_policy_and_opens_the_log_again(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", *hosts(echo)) as it:
        assert it.status("more.test:7") == 403
        eventually(it.records, "a record")
        it.log.rename(tmp_path / "decisions.1")
        it.policy.write_text(HEAD + MORE)
        it.send(signal.SIGHUP)
        it.hears("is in force")
        assert it.status("echo.test:7") == 403
        [record] = eventually(it.records, "a record in the new file")
        assert record["server.name"] == "echo.test"


# --- workers ------------------------------------------------------------------------------------------------------


def test_a_killed_worker_takes_its_own_connections_and_nothing_else(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", *hosts(echo)) as it, ExitStack() as stack:
        tunnels = [stack.enter_context(it.tunnel("echo.test:7")) for _ in range(24)]
        assert all(says(sock, b"before") for sock in tunnels)
        one, other = it.workers()
        assert it.status("denied.test:7") == 403
        denials = 'outgate_decisions_total{reason="no_rule",stage="tls",verdict="deny"}'
        eventually(lambda: it.metric(denials) == 1, "the denial is counted")

        os.kill(one, signal.SIGKILL)
        it.hears(r"worker \d was ended by SIGKILL; it is started again in 0\.1 s")
        alive = [sock for sock in tunnels if survives(sock)]
        assert 0 < len(alive) < len(tunnels)
        eventually(lambda: it.ready()[0] == 200, "ready again")
        assert other in it.workers()
        assert len(it.workers()) == 2
        assert all(says(sock, b"after") for sock in alive)
        assert it.metric("outgate_worker_restarts_total") == 1
        assert it.metric(denials) == 1
        with it.tunnel("echo.test:7") as sock:
            assert says(sock, b"new")


def survives(sock: socket.socket) -> bool:
    try:
        return says(sock, b"alive?")
    except (OSError, AssertionError):
        return False


def test_what_waits_for_a_killed_worker_is_served_by_the_next(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", *hosts(echo)) as it, ExitStack() as stack:
        workers = it.workers()
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # so that they accept none of what comes
        waiting = [stack.enter_context(it.connect()) for _ in range(16)]
        for sock in waiting:
            sock.sendall(b"CONNECT echo.test:7 HTTP/1.1\r\nHost: echo.test:7\r\n\r\n")
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

        assert [answered(sock) for sock in waiting] == [200] * 16
        assert all(says(sock, b"served") for sock in waiting)


def test_both_workers_get_connections(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", *hosts(echo)) as it, ExitStack() as stack:
        before = [descriptors(worker) for worker in it.workers()]
        for _ in range(40):
            stack.enter_context(it.tunnel("echo.test:7"))
        assert all(more > less for less, more in zip(before, map(descriptors, it.workers()), strict=True))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# --- the end ------------------------------------------------------------------------------------------------------


def test_without_a_supervisor_workers_let_nobody_in_and_end_with_what_they_have(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", "--grace-s", "60", *hosts(echo)) as it:
        sock = it.tunnel("echo.test:7")
        pids = it.processes()
        it.send(signal.SIGKILL)
        it.ends()
        eventually(lambda: refuses(it.address), "no door is open")
        assert says(sock, b"still carried")
        sock.close()
        eventually(lambda: all(map(is_gone, pids)), "all are gone")
        assert len(it.records(verdict="allow")) == 1


def test_an_orphan_ends_when_the_grace_is_over(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--grace-s", "0.5", *hosts(echo)) as it, it.tunnel("echo.test:7"):
        pids = it.processes()
        it.send(signal.SIGKILL)
        eventually(lambda: all(map(is_gone, pids)), "all are gone")


def test_sigterm_lets_a_download_finish(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", "--grace-s", "60", *hosts(echo)) as it:
        sock = it.tunnel("echo.test:7")
        it.send(signal.SIGTERM)
        eventually(lambda: refuses(it.address), "no door is open")
        assert it.ready()[:2] == (503, ["the gate is ending"])
        for _ in range(50):
            assert says(sock, b"part of a download" * 1000)
        sock.close()
        assert it.ends() == 0
        [record] = it.records(verdict="allow")
        assert record["bytes.received"] == 50 * 18000


def test_an_inspected_download_finishes_too(tmp_path: Path, origin: inspecting.Origin, trust: Path) -> None:
    options = ["--pki", "pki", "--upstream-ca", "origin.pem", "--host", f"api.test=127.0.0.1:{origin.port}"]
    with Service(tmp_path, HEAD + INSPECTED, "--grace-s", "60", *options) as it:
        started = time.monotonic()

        def respond(_request: bytes, sock: socket.socket) -> bytes:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
            it.send(signal.SIGTERM)
            eventually(lambda: refuses(it.address), "no door is open")
            return b"half"

        origin.respond = respond
        inspected = Inspected(it, trust)
        assert inspected.get("/old/download") == 200
        assert it.ends() == 0
        inspected.close()
        assert time.monotonic() - started < 60  # it does not wait for a connection on which nothing is asked
        assert [one["url.full"] for one in it.records(verdict="allow")] == ["https://api.test/old/download"]


def test_a_second_signal_ends_at_once_and_records_what_was_open(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--grace-s", "60", *hosts(echo)) as it, it.tunnel("echo.test:7") as sock:
        assert says(sock, b"something")
        it.send(signal.SIGINT)
        eventually(lambda: refuses(it.address), "no door is open")
        it.send(signal.SIGINT)
        assert it.ends() == 0
        [record] = it.records(verdict="allow")
        assert record["bytes.sent"] == 9


def test_signals_to_everybody_at_once_are_one(tmp_path: Path, echo: Address) -> None:
    """As systemd sends them to all processes of a unit, unless it is told otherwise."""
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", "--grace-s", "60", *hosts(echo)) as it:
        sock = it.tunnel("echo.test:7")
        for pid in (*it.processes(), it.process.pid):
            signal_to(pid, signal.SIGTERM)
        eventually(lambda: refuses(it.address), "no door is open")
        assert says(sock, b"still carried")
        sock.close()
        assert it.ends() == 0


def refuses(address: Address) -> bool:
    try:
        socket.create_connection(address, 15).close()
    except ConnectionRefusedError:
        return True
    return False


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_two_services_do_not_share_a_port(tmp_path: Path, echo: Address, workers: str) -> None:
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", *hosts(echo)) as it:
        port = it.address[1]
        command = [
            str(OUTGATE), "serve", "--mode", "proxy", "--proxy-listen", f"127.0.0.1:{port}", "--admin", "none",
            "-p", str(it.policy), "-w", "app", "--workers", workers,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"outgate: --proxy-listen 127.0.0.1:{port}: Address already in use\n"


def test_plain_requests_are_served_where_no_authority_is_named(tmp_path: Path) -> None:
    """The inspector judges them, and it signs nothing."""
    origin = inspecting.Origin(None, lambda _request, _sock: inspecting.response())
    policy = 'version: 1\nworkloads: {app: {rules: [{host: plain.test, ports: [80], allow: ["GET /a"]}]}}\n'
    try:
        with (
            Service(tmp_path, policy, "--host", f"plain.test=127.0.0.1:{origin.port}") as service,
            socket.create_connection(service.address, timeout=WAIT_S) as sock,
        ):
            sock.sendall(b"GET http://plain.test/a HTTP/1.1\r\nHost: plain.test\r\nConnection: close\r\n\r\n")
            said = b"".join(iter(lambda: sock.recv(4096), b""))
    finally:
        origin.close()
    assert said.startswith(b"HTTP/1.1 200")
