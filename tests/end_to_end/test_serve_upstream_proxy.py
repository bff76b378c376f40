"""`outgate serve --upstream-proxy`: all that a workload speaks leaves through the site's proxy; its secret stays."""

from __future__ import annotations

import ssl
import subprocess
from base64 import b64encode
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
import trustme

from tests.end_to_end.service import Service, eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy import gates, inspecting
from tests.proxy.site_proxies import site_proxy
from tests.proxy.squid import credentials_file, free_port

POLICY = """
version: 1
workloads:
  app:
    rules:
      - tcp: "echo.test:7"
      - {host: api.test, ports: [443], tls: inspect, allow: ["GET /search"]}
      - {host: files.test, ports: [80]}
"""
OWN = "version: 1\nworkloads: {app: {rules: [{tcp: {host: own.test, ports: [1024-65535]}}]}}"
AUTHORIZATION = f"Proxy-Authorization: Basic {b64encode(b'gate:s3cret').decode()}\r\n".encode()


def test_everything_leaves_through_the_site_proxy(tmp_path: Path) -> None:
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", "pki"], cwd=tmp_path, check=True, capture_output=True)
    trust = "".join(found.read_text() for found in (tmp_path / "pki").rglob("*.crt"))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "origin.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("api.test").configure_cert(context)
    secret = credentials_file(tmp_path, "gate:s3cret\n")
    api = inspecting.Origin(context, lambda _head, _sock: inspecting.response())
    files = inspecting.Origin(None, lambda _head, _sock: inspecting.response(b"file"))
    leads = {"api.test": ("127.0.0.1", api.port), "files.test": ("127.0.0.1", files.port)}
    with gates.origin() as echo, site_proxy({"echo.test": echo.address, **leads}) as site:
        options = ["--upstream-proxy", f"http://127.0.0.1:{site.address[1]}", "--upstream-proxy-credentials", secret]
        options += ["--pki", "pki", "--upstream-ca", "origin.pem", "--nameserver", "127.0.0.1:1"]
        with Service(tmp_path, POLICY, *options) as service:
            with service.tunnel("echo.test:7") as client:
                client.sendall(b"hello")
                assert gates.read_exactly(client, 5) == b"hello"
            inspected = HTTPConnection("api.test")
            trusting = ssl.create_default_context(cadata=trust)
            inspected.sock = trusting.wrap_socket(service.tunnel("api.test:443"), server_hostname="api.test")
            assert get(inspected, "/search") == b"sunny"
            plain = HTTPConnection(*service.address)
            assert get(plain, "http://files.test/a") == b"file"
            commands = [
                Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (service.process.pid, *service.processes())
            ]
            kept = b"".join([service.log.read_bytes(), "".join(service.said).encode(), *commands])
    api.close()
    files.close()
    starts = [head.split(b"\r\n")[0] for head in site.heads]
    assert starts == [
        b"CONNECT echo.test:7 HTTP/1.1",
        b"CONNECT api.test:443 HTTP/1.1",
        b"GET http://files.test/a HTTP/1.1",
    ]
    assert all(AUTHORIZATION in head for head in site.heads)
    assert b"s3cret" not in kept
    assert AUTHORIZATION.split()[2] not in kept


def get(connection: HTTPConnection, target: str) -> bytes:
    connection.request("GET", target)
    reply: HTTPResponse = connection.getresponse()
    body = reply.read()
    connection.close()
    return body


@pytest.mark.parametrize("door", ["admin", "address"])
def test_a_name_that_leads_to_the_service_itself_is_never_reached(tmp_path: Path, door: str) -> None:
    """The operator's word opens loopback, and still not the admin port: whoever reaches that could reload."""
    admin = f"127.0.0.1:{free_port()}"
    with Service(tmp_path, OWN, "--host", "own.test=127.0.0.1", "--admin", admin) as service:
        _, port = getattr(service, door)
        with service.tunnel(f"own.test:{port}") as client, suppress(ConnectionResetError):
            assert gates.read_all(client) == b""
        assert eventually(service.records, "a record")[0]["reason"] == "never_reached"


def test_credentials_that_others_may_read_start_nothing(tmp_path: Path) -> None:
    secret = Path(credentials_file(tmp_path, "gate:s3cret\n"))
    secret.chmod(0o644)
    options = ["--upstream-proxy", "http://127.0.0.1:1", "--upstream-proxy-credentials", str(secret)]
    (tmp_path / "policy.yaml").write_text(POLICY)
    command = [str(OUTGATE), "serve", "--mode", "proxy", "-p", "policy.yaml", "-w", "app", *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "mode 0644 shows the password to others; run: chmod 600" in ended.stderr
    assert "s3cret" not in ended.stderr
