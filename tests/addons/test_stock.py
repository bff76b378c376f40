"""The addons in mitmproxy as installed: mitmdump with `-s addons/outgate.py`, curl through it, an origin behind it."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from mitmproxy.test import tflow

from addons import stock as outgate_in_mitmproxy

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "addons" / "outgate.py"
PROGRAMS = Path(sys.executable).parent
START_S = 40.0
POLICY = """
version: 1
workloads:
  app:
    rules:
      - {host: weather.test, tls: inspect, private: true, allow: ["GET,POST /search/**"], deny: ["* /search/secret/**"]}
      - {host: pass.test, private: true}
      - {host: plain.test, ports: [80], private: true, allow: ["GET /a"]}
      - {host: public.test}
"""

pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
    pytest.mark.skipif(not (PROGRAMS / "mitmdump").exists(), reason="mitmdump is not beside this Python"),
]


class Origin(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    paths: list[str]

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.paths.append(self.path)
        body = b"from the origin"
        self.send_response(200)
        if self.path.endswith("/fields"):
            for _ in range(101):
                self.send_header("X", "a")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Stock:
    """One mitmdump with the policy, and what it wrote."""

    def __init__(self, directory: Path, port: int, origin_paths: list[str]) -> None:
        self.directory = directory
        self.port = port
        self.paths = origin_paths

    def curl(self, *words: str) -> tuple[int, str]:
        """The status (of the CONNECT where that was refused, 0 for none) and the body."""
        command = [
            "curl",
            "-sS",
            "-m",
            "20",
            "-x",
            f"http://127.0.0.1:{self.port}",
            "-w",
            "\n%{http_code} %{http_connect}",
        ]
        trust = ["--cacert", str(self.directory / "both.pem")]
        done = subprocess.run([*command, *trust, *words], capture_output=True, text=True, check=False)
        body, _, codes = done.stdout.rpartition("\n")
        status, connect = map(int, codes.split())
        return status or (connect if connect >= 400 else 0), body

    def records(self) -> list[dict[str, Any]]:
        text = (self.directory / "log").read_text() if (self.directory / "log").exists() else ""
        return [json.loads(line) for line in text.splitlines()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, "mitmdump ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("mitmdump did not listen")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    directory = tmp_path_factory.mktemp("stock")
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("weather.test", "pass.test", "public.test").configure_cert(context)
    authority.cert_pem.write_to_path(str(directory / "origin.pem"))
    paths: list[str] = []
    served = type("Served", (Origin,), {"paths": paths})
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), served) for _ in range(2)]
    servers[0].socket = context.wrap_socket(servers[0].socket, server_side=True)
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    tls, plain = (server.server_address[1] for server in servers)
    (directory / "policy.yaml").write_text(POLICY)
    port = free_port()
    options = [
        f"policy={directory}/policy.yaml",
        "policy_workload=app",
        *(f"policy_hosts={name}=127.0.0.1:{tls}" for name in ("weather.test", "pass.test")),
        f"policy_hosts=plain.test=127.0.0.1:{plain}",
        f"policy_log={directory}/log",
        f"confdir={directory}/conf",
        f"ssl_verify_upstream_trusted_ca={directory}/origin.pem",
    ]
    words = [word for option in options for word in ("--set", option)]
    command = [
        str(PROGRAMS / "mitmdump"),
        "-q",
        "-s",
        str(SCRIPT),
        "--listen-host",
        "127.0.0.1",
        "-p",
        str(port),
        *words,
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        own = (directory / "conf" / "mitmproxy-ca-cert.pem").read_text()
        (directory / "both.pem").write_text(own + (directory / "origin.pem").read_text())
        yield Stock(directory, port, paths)
    finally:
        process.terminate()
        process.wait(20)
        for server in servers:
            server.shutdown()
            server.server_close()


H1, MALFORMED = "--http1.1", "malformed_request"
ROWS = {
    "an allowed path": (["https://weather.test/search/x", H1], 200, "rule"),
    "the same over HTTP/2": (["https://weather.test/search/x", "--http2"], 200, "rule"),
    "an allowed upload": (["https://weather.test/search/x", H1, "-d", "body"], 200, "rule"),
    "a path that is not listed": (["https://weather.test/forecasts", H1], 403, "no_allow_entry"),
    "a denied path": (["https://weather.test/search/secret/x", H1], 403, "deny_rule"),
    "a denied path over HTTP/2": (["https://weather.test/search/secret/x", "--http2"], 403, "deny_rule"),
    "a path trick": (["https://weather.test/search/%2e%2e/x", "--path-as-is", H1], 400, "malformed_path"),
    "another Host than the SNI": (["https://weather.test/search", "-H", "Host: pass.test", H1], 421, "host_mismatch"),
    "an unknown expectation": (["https://weather.test/search/x", H1, "-d", "a", "-H", "Expect: x"], 417, MALFORMED),
    "a length as CGI reads it": (["https://weather.test/search/x", H1, "-H", "Content_Length: 5"], 400, MALFORMED),
    "a length as CGI reads it over HTTP/2": (
        ["https://weather.test/search/x", "--http2", "-H", "Content_Length: 5"],
        400,
        MALFORMED,
    ),
    "a target that is too long": (["https://weather.test/search/x?" + "a" * 20_000, H1], 414, MALFORMED),
    "a head of too many fields": (["https://weather.test/search/x", H1, *["-H", "X: a"] * 101], 431, MALFORMED),
    "a name carried undecrypted": (["https://pass.test/anything", H1], 200, "rule"),
    "a name that no rule names": (["https://nobody.test/"], 403, "no_rule"),
    "an address": (["https://127.0.0.1:1/"], 0, "never_reached"),
    "a plain request": (["http://plain.test/a"], 200, "rule"),
    "a plain request that is not listed": (["http://plain.test/b"], 403, "no_allow_entry"),
    "a plain request for another Host": (["http://plain.test/a", "-H", "Host: nobody.test"], 421, "host_mismatch"),
    "a plain request to metadata": (["http://169.254.169.254/latest"], 400, "malformed_name"),
}


@pytest.mark.parametrize(("words", "status", "reason"), ROWS.values(), ids=ROWS.keys())
def test_stock_mitmproxy_enforces_the_policy(stock: Stock, words: list[str], status: int, reason: str) -> None:
    before, asked = len(stock.records()), len(stock.paths)

    got, body = stock.curl(*words)

    assert got == status, body
    records = stock.records()[before:]
    assert [record["reason"] for record in records] == [reason]
    assert len(stock.paths) - asked == (1 if status == 200 else 0)
    if status >= 400:
        assert json.loads(body or "{}").get("reason", reason) == reason


def test_a_response_that_the_gate_would_not_believe_is_not_passed_on(stock: Stock) -> None:
    status, body = stock.curl("https://weather.test/search/fields", H1)

    assert "from the origin" not in body
    assert status != 200
    assert stock.records()[-1]["reason"] == "upstream_failed"


def test_two_hosts_over_one_proxy_connection_are_judged_each(stock: Stock) -> None:
    status, body = stock.curl("http://plain.test/a", "http://nobody.test/")

    assert status == 403
    assert "no_rule" in body


def test_the_name_in_the_hello_must_be_the_one_of_the_connect(stock: Stock) -> None:
    with socket.create_connection(("127.0.0.1", stock.port), timeout=20) as sock:
        sock.sendall(b"CONNECT weather.test:443 HTTP/1.1\r\nHost: weather.test:443\r\n\r\n")
        assert b" 200 " in sock.recv(4096)
        with pytest.raises((ssl.SSLError, OSError)):
            ssl._create_unverified_context().wrap_socket(sock, server_hostname="pass.test")

    assert stock.records()[-1]["reason"] == "host_mismatch"


def test_opaque_bytes_in_a_tunnel_reach_nothing(stock: Stock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as target, socket.create_connection(("127.0.0.1", stock.port)) as sock:
        target.settimeout(0.5)
        sock.settimeout(20)
        name = f"127.0.0.1:{target.getsockname()[1]}".encode()
        sock.sendall(b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (name, name))
        assert b" 200 " in sock.recv(4096)
        sock.sendall(b"\x00\x01opaque")
        assert sock.recv(4096) == b""
        with pytest.raises(TimeoutError):
            target.accept()

    assert stock.records()[-1]["reason"] == "never_reached"


def test_a_request_that_could_not_be_judged_is_not_forwarded() -> None:
    """mitmproxy logs what a hook raises, and goes on."""
    flow = tflow.tflow()
    it = outgate_in_mitmproxy.Stock()

    with pytest.raises(KeyError):
        it.requestheaders(flow)  # of a connection that was never announced

    assert flow.error is not None


def test_a_policy_that_does_not_load_stops_the_start(tmp_path: Path) -> None:
    policy = tmp_path / "bad.yaml"
    policy.write_text("version: 1\nworkloads: {app: {rulez: []}}\n")
    words = ["--set", f"policy={policy}", "--set", f"confdir={tmp_path}/conf", "-p", str(free_port())]

    done = subprocess.run(
        [str(PROGRAMS / "mitmdump"), "-s", str(SCRIPT), "--listen-host", "127.0.0.1", *words],
        capture_output=True, text=True, timeout=START_S, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip

    assert done.returncode != 0
    assert "bad.yaml:2" in done.stdout + done.stderr
    assert "rulez" in done.stdout + done.stderr
