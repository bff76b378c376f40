"""The unit of docs/examples: what systemd says of it, that the gate lives with what it takes away, and sd_notify."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
import trustme

from tests.end_to_end.confined import NUMBERS, confined
from tests.end_to_end.documented import section
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import Address, answered, eventually
from tests.end_to_end.world import CHECKOUT, OUTGATE
from tests.proxy import gates, inspecting
from tests.sandbox_user import ORDINARY_UID

UNIT = CHECKOUT / "docs" / "examples" / "outgate.service"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")

POLICY = """
version: 1
workloads:
  app:
    match: {user: app}
    rules:
      - tcp: "echo.test:7"
      - {host: api.test, tls: inspect, http2: true, allow: ["GET /search"]}
"""
CARRIES = "version: 1\nworkloads: {app: {match: {address: [10.0.0.0/8]}, rules: [{tcp: 'echo.test:7'}]}}\n"
SERVE = [str(OUTGATE), "serve", "--mode", "proxy", "-p", "policy.yaml", "--proxy-listen", "127.0.0.1:0"]
SERVE += ["--admin", "127.0.0.1:0", "--log", "decisions.jsonl"]


@needs_systemd
def test_systemd_understands_every_line_of_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/outgate/bin/outgate", "/bin/true")  # it looks whether that is there
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_the_page_says_how_exposed_the_unit_is() -> None:
    """Versions of systemd weigh a little differently."""
    line = ["systemd-analyze", "security", "--offline=yes", str(UNIT)]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    [rated] = re.findall(r"exposure level for outgate.service: ([\d.]+)", said)
    [documented] = re.findall(r"rates it ([\d.]+)", section("docs/service.md", "systemd"))
    assert abs(float(rated) - float(documented)) < 0.5


# --- under what it takes away -----------------------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[Path]:
    """Which another user may enter, as pytest's may not."""
    with tempfile.TemporaryDirectory(prefix="outgate-unit-") as name:
        os.chown(name, ORDINARY_UID, ORDINARY_UID)
        yield Path(name)


def under_the_unit(directory: Path, *command: str, said: str = "") -> str:
    done = subprocess.run(
        confined(UNIT, command), cwd=directory, input=said, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ROUTES = """
from ipaddress import ip_address
from proxy.own_doors import is_local_address
print(*(is_local_address(ip_address(text)) for text in ("127.0.0.1", "::1", "203.0.113.1", "2001:db8::1")))
"""


@pytest.mark.kernel
@pytest.mark.skipif("os.geteuid() != 0", reason="only root becomes another user, with a /proc of its own")
@pytest.mark.skipif(not NUMBERS.exists(), reason=f"{NUMBERS} is not installed")
@needs_systemd
def test_the_gate_does_its_work_under_the_unit(directory: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "origin.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("api.test").configure_cert(context)
    (directory / "policy.yaml").write_text(POLICY)
    under_the_unit(directory, str(OUTGATE), "pki", "init", "--pki", "pki")
    under_the_unit(directory, str(OUTGATE), "credentials", "add", "users", "app", said="secret\n")
    trust = "".join(path.read_text() for path in (directory / "pki").rglob("*.crt"))
    api = inspecting.Origin(context, lambda _head, _sock: inspecting.response())
    with gates.origin() as echo:
        options = ["--workers", "2", "--credentials", "users", "--pki", "pki", "--upstream-ca", "origin.pem"]
        options += ["--host", f"echo.test=127.0.0.1:{echo.address[1]}", "--host", f"api.test=127.0.0.1:{api.port}"]
        with Placed(directory, confined(UNIT, [*SERVE, *options])) as it:
            door, it.admin = doors_of(it)
            with tunnel(door, "echo.test:7") as sock:
                sock.sendall(b"carried")
                assert gates.read_exactly(sock, 7) == b"carried"
            inspected = HTTPConnection("api.test")
            trusting = ssl.create_default_context(cadata=trust)
            inspected.sock = trusting.wrap_socket(tunnel(door, "api.test:443"), server_hostname="api.test")
            for path, status in (("/search", 200), ("/other", 403)):
                inspected.request("GET", path)
                reply = inspected.getresponse()
                assert (reply.status, bool(reply.read())) == (status, True)
            inspected.close()
            records = eventually(lambda: it.records()[2:] and it.records(), "their records")
            assert sorted((record["verdict"], record["user.name"]) for record in records) == [
                ("allow", "app"), ("allow", "app"), ("deny", "app"),
            ]  # fmt: skip
            os.kill(it.workers()[0], signal.SIGKILL)
            eventually(lambda: it.metric("outgate_worker_restarts_total") == 1, "another worker")
            it.policy.write_text(POLICY + "      - tcp: echo.test:8\n")
            it.send(signal.SIGHUP)
            it.hears("is in force")
            eventually(lambda: it.ready() == (200, [], []), "ready")
            assert it.metric('process_resident_memory_bytes{part="inspector"}') > 0  # it sees its own in /proc
            it.send(signal.SIGTERM)
            assert it.ends() == 0
    api.close()
    log = it.log.stat()
    assert (log.st_uid, log.st_mode & 0o777) == (ORDINARY_UID, 0o600)
    assert under_the_unit(directory, sys.executable, "-c", ROUTES).split() == ["True", "True", "False", "False"]


def doors_of(it: Placed) -> tuple[Address, Address]:
    proxy, admin = it.hears(r"proxy clients on (.*):(\d+)"), it.hears(r"answering .* on (.*):(\d+)")
    return (proxy[1], int(proxy[2])), (admin[1], int(admin[2]))


def tunnel(door: Address, target: str) -> socket.socket:
    sock = socket.create_connection(door, gates.PATIENCE_S)
    secret = b64encode(b"app:secret").decode()
    sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Basic {secret}\r\n\r\n".encode())
    assert answered(sock) == 200
    return sock


# --- sd_notify --------------------------------------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """Hears what systemd would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        yield sock


def hears(manager: socket.socket, wanted: str) -> list[str]:
    """The first message with a line that starts so; none may come before it but signs of life."""
    while True:
        lines = manager.recv(4096).decode().split("\n")
        if any(line.startswith(wanted) for line in lines):
            return lines
        assert lines == ["WATCHDOG=1"]


def test_the_service_manager_hears_how_the_service_stands(tmp_path: Path, manager: socket.socket) -> None:
    (tmp_path / "policy.yaml").write_text(CARRIES)
    env = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "500000"}
    with Placed(tmp_path, [*SERVE, "--workers", "2"], env=env) as it:
        ready, status = hears(manager, "READY=1")
        assert ready == "READY=1"
        assert re.fullmatch("STATUS=serving by policy [0-9a-f]{12}", status)
        assert len(it.workers()) == 2
        assert hears(manager, "WATCHDOG=1") == ["WATCHDOG=1"]
        it.policy.write_text(CARRIES.replace("7", "8"))
        it.send(signal.SIGHUP)
        [other] = hears(manager, "STATUS=serving by policy ")
        assert other != status
        it.send(signal.SIGTERM)
        assert hears(manager, "STOPPING=1") == ["STOPPING=1", "STATUS=open connections finish"]
