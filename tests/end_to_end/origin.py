"""A stand-in for the internet's servers: TLS under any name, plain HTTP and opaque TCP. It keeps what reached it."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from weakref import WeakKeyDictionary

import trustme

TLS_PORTS = (443, 8443)
PLAIN_PORTS = (80, 8080)
OPAQUE_PORTS = (22, 5432)
SILENT = "93.184.216.99"  # who dials this address is accepted and never told anything
BANNER = b"SSH-2.0-origin\r\n"
COMMIT = "1234567890abcdef1234567890abcdef12345678"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived, and under which SNI (None on a plain port)."""

    port: int
    sni: str | None
    method: str
    target: str
    headers: dict[str, str]
    body_length: int
    body_sha256: str


class Origin:
    """Serves every port of the lists above on every address. Its root is written to `DIRECTORY/origin.pem`."""

    def __init__(self, directory: Path) -> None:
        self.requests: list[Request] = []
        self.accepted: list[tuple[str, int]] = []  # address and port that were dialled
        self.names: WeakKeyDictionary[object, str | None] = WeakKeyDictionary()  # of each hello
        authority = trustme.CA(organization_name="The Origin's Own Authority")
        authority.cert_pem.write_to_path(str(directory / "origin.pem"))
        self._authority = authority
        self._first = _context(authority.issue_cert("nobody.example"))
        self._first.sni_callback = self._choose
        past = datetime.now(UTC) - timedelta(days=1)
        self._contexts = {  # of the names with a certificate that is not what it should be; all others get a good one
            "expired.example": _context(authority.issue_cert("expired.example", not_after=past)),
            "wrong.example": _context(authority.issue_cert("somebody-else.example")),
            "stranger.example": _context(trustme.CA(organization_name="A Stranger").issue_cert("stranger.example")),
        }
        for port in TLS_PORTS + PLAIN_PORTS:
            self._serve(port, self._http)
        for port in OPAQUE_PORTS:
            self._serve(port, _speak_first)

    def _choose(self, tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, _first: ssl.SSLContext) -> None:
        self.names[tls] = name
        if name:
            if name not in self._contexts:
                self._contexts[name] = _context(self._authority.issue_cert(name))
            tls.context = self._contexts[name]

    def _serve(self, port: int, converse: Callable[[socket.socket], None]) -> None:
        listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256)

        def accept() -> None:
            while True:
                sock, _ = listener.accept()
                host, port = sock.getsockname()[:2]
                self.accepted.append((host.removeprefix("::ffff:"), port))
                threading.Thread(target=_contained, args=(converse, sock), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def _http(self, sock: socket.socket) -> None:
        host, port = sock.getsockname()[:2]
        if host.removeprefix("::ffff:") == SILENT:
            time.sleep(120)
            return
        if port in TLS_PORTS:
            sock = self._first.wrap_socket(sock, server_side=True)
        _Conversation(sock, ("", 0), self)  # type: ignore[arg-type]  # what stands in for the server is our list alone


def _context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def _contained(converse: Callable[[socket.socket], None], sock: socket.socket) -> None:
    with sock:
        try:
            converse(sock)
        except OSError:  # the other side's choice
            pass


def _speak_first(sock: socket.socket) -> None:
    """As SSH and databases do: a greeting, then whatever comes is sent back."""
    sock.sendall(BANNER)
    while data := sock.recv(65536):
        sock.sendall(data)


class _Conversation(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Origin  # type: ignore[assignment]  # see Origin._http

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        self.server.requests.append(
            Request(
                self.connection.getsockname()[1],
                self.server.names.get(self.connection),
                self.command,
                self.path,
                dict(self.headers.items()),
                len(body),
                hashlib.sha256(body).hexdigest(),
            )
        )
        path = self.path.partition("?")[0]
        if path.startswith("/bytes/"):
            self._reply(blob(int(path.removeprefix("/bytes/"))), "application/octet-stream")
        elif path == "/repo.git/info/refs":
            self._reply(f"{COMMIT}\trefs/heads/main\n".encode(), "text/plain")
        elif path == "/repo.git/HEAD":
            self._reply(b"ref: refs/heads/main\n", "text/plain")
        elif path == "/cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
            self.close_connection = True
        elif path == "/garbage":
            self.wfile.write(b"\x00\x01\x02 this is no response\r\n\r\n")
            self.close_connection = True
        else:
            said = {
                "origin": self.headers.get("Host"),
                "method": self.command,
                "target": self.path,
                "length": len(body),
            }
            self._reply(json.dumps(said).encode(), "application/json")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_OPTIONS = answer

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _reply(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def blob(length: int) -> bytes:
    """Bytes of every value, the same each time."""
    return (bytes(range(256)) * (length // 256 + 1))[:length]


def main(directory: Path) -> None:
    """Serve, and for each line on standard input tell what was accepted and asked since the last."""
    origin = Origin(directory)
    print("ready", flush=True)
    for _ in sys.stdin:
        accepted, origin.accepted = origin.accepted, []
        requests, origin.requests = origin.requests, []
        print(json.dumps({"accepted": accepted, "requests": as_json(requests)}), flush=True)


def as_json(requests: list[Request]) -> list[dict[str, object]]:
    return [asdict(request) for request in requests]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
