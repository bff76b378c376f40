"""A policy, an origin that keeps what it gets, and a gate in front of it that inspects: what these tests share."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, BinaryIO, Self

import trustme

from pki.authority import Authority, certificates_pem, create_authority
from pki.issuers import issuers_text
from policies.engine import admit
from policies.hostnames import parse_hostname
from policies.load import Source
from proxy.compiled import write_policy
from proxy.epoll import Epoll
from proxy.hosts import HostsEntry
from proxy.inspector import Bounds, Configuration, Handover, Inspector
from proxy.inspector.wiring import wire
from proxy.lane import Lane
from proxy.limits import Limits
from proxy.policy_files import load_sources
from proxy.policy_in_force import PolicyInForce
from proxy.record import Record, new_id
from proxy.relays.stream import Pipes
from proxy.resolver import Resolver
from proxy.way_out import Exit
from proxy.wire.client_hello import parse_hello

HOST = "weather.test"
WORKLOAD = "app"
KEPT = 64 * 1024
WAIT_S = 15.0  # generous: a test fails by what it sees, not by how long that took

POLICY = f"""
version: 1
workloads:
  {WORKLOAD}:
    rules:
      - host: {HOST}
        ports: [80, 443]
        tls: inspect
        http2: true
        name: weather
        allow: ["GET,HEAD,POST,PUT /search/**", "GET /slashes/**"]
        deny: ["* /search/secret/**"]
      - host: other.test
        ports: [80, 443]
        tls: inspect
        http2: true
      - host: unresolved.test
        tls: inspect
        http2: true
      - host: metadata.test
        tls: inspect
        http2: true
"""

HOST_OF_HTTP: ContextVar[str] = ContextVar("host_of_http", default="mitmproxy")

type Respond = Callable[[bytes, socket.socket], bytes | None]


def response(body: bytes = b"sunny", *, status: str = "200 OK", fields: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{fields}\r\n".encode() + body


class Origin:
    """A server on loopback.

    requests     raw heads with their raw bodies, of which 64 KiB are kept
    connections  how many were accepted
    received     bytes of bodies
    """

    def __init__(self, context: ssl.SSLContext | None, respond: Respond) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.received = 0
        self.respond = respond
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(WAIT_S)
        for sock in tuple(self._open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(WAIT_S)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self._context:
                sock = self._context.wrap_socket(sock, server_side=True)
            self._open.add(sock)
            self.converse(sock)
        except OSError:
            pass  # the gate hung up, or the test is over
        finally:
            self._open.discard(sock)
            sock.close()

    def converse(self, sock: socket.socket) -> None:
        """Answer on one connection to its end."""
        buffered = b""
        while (found := self._read(sock, buffered)) is not None:
            request, buffered = found
            self.requests.append(request)
            reply = self.respond(request, sock)
            if reply is None:
                return
            sock.sendall(reply)

    def _read(self, sock: socket.socket, buffered: bytes) -> tuple[bytes, bytes] | None:
        """A request and what was read beyond it; None at the end."""

        def more() -> bytes:
            data = sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            return data

        while b"\r\n\r\n" not in buffered:
            data = sock.recv(1 << 16)
            if not data:
                return None
            buffered += data
        head, _, buffered = buffered.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        if fields.get(b"transfer-encoding") == b"chunked":
            while not buffered.endswith(b"0\r\n\r\n"):
                buffered += more()
            return head + b"\r\n\r\n" + buffered, b""
        length = int(fields.get(b"content-length", 0))
        body = buffered[:length]
        count = len(body)
        while count < length:
            data = more()
            count += len(data)
            if count <= KEPT:
                body += data
        self.received += count
        return head + b"\r\n\r\n" + body, buffered[length:]


@dataclass
class Rig:
    """A gate's inspecting half on a loop of its own, in front of one origin. Records come to `records`."""

    directory: Path
    policy: str = POLICY
    workload: str | None = WORKLOAD  # of every connection; None: as the source address says
    bounds: Bounds = field(default_factory=Bounds)
    respond: Respond = lambda _head, _sock: response()
    make_origin: Callable[[ssl.SSLContext | None, Respond], Origin] = Origin
    origin_names: tuple[str, ...] = (HOST,)
    plain: bool = False
    proxied: bool = False  # plain requests in absolute form
    credential: str | None = None
    trusted: bool = True  # the gate trusts the CA of the origin
    refuses: bool = False  # nobody listens where the origin should
    upstream_port: int | None = None  # where the name leads, if not to the origin
    in_process: bool = False  # the real inspector process, else its core on the loop of the test
    in_lane: bool = field(default_factory=lambda: HOST_OF_HTTP.get() == "lane")
    authority: Authority = field(default_factory=lambda: create_authority(datetime.now(UTC)))
    records: list[Record] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        authority = trustme.CA()
        trusted = authority if self.trusted else trustme.CA()
        trusted.cert_pem.write_to_path(str(self.directory / "origin-ca.pem"))
        context = None
        if not self.plain:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert(*self.origin_names).configure_cert(context)
        self.origin = self.make_origin(context, self.respond)
        if self.refuses:
            self.origin.close()
        self.roots = self.directory / "roots.pem"
        self.roots.write_bytes(certificates_pem(*(root.certificate for root in self.authority.roots)))
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        if not self._ready.wait(WAIT_S):
            raise TimeoutError("the gate did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(WAIT_S)
        if not self.refuses:
            self.origin.close()

    def configuration(self) -> Configuration:
        port = self.upstream_port or self.origin.port
        return Configuration(
            issuing=issuers_text(self.authority.issuers),
            workload=self.workload,
            upstream_ca=str(self.directory / "origin-ca.pem"),
            hosts=tuple(
                (parse_hostname(name), (address,), port)
                for name, address, port in (
                    (HOST, "127.0.0.1", port),
                    ("other.test", "127.0.0.1", port),
                    ("metadata.test", "169.254.169.254", port),
                )
            ),
            nameservers=(),
            bounds=self.bounds,
        )

    def compiled(self) -> BinaryIO:
        """The policy as the gate gives it to its inspector."""
        return write_policy(load_sources([Source("p.yaml", self.policy)]))

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        if self.in_lane:
            self.lane, self.in_force = self._wire_lane()
        elif self.in_process:
            self.inspector = Inspector(self.configuration, self.compiled, self.records.append, self.log.append)
        else:
            policy = load_sources([Source("p.yaml", self.policy)])
            wired = wire(self.configuration(), policy, self.records.append, self.failures.append)
            self.core, self.bench = wired.core, wired.bench
        tasks: set[asyncio.Task[None]] = set()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            self.port: int = listener.getsockname()[1]
            accepting = asyncio.create_task(self._accept(listener, tasks))
            self._ready.set()
            await self._over.wait()
            for task in (accepting, *tasks):
                task.cancel()
            for ended in await asyncio.gather(accepting, *tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    self.failures.append(ended)
            (self.lane if self.in_lane else self.inspector if self.in_process else self.core).close()
            await self._let_go()

    def _wire_lane(self) -> tuple[Lane, PolicyInForce]:
        configuration = self.configuration()
        self.epoll = Epoll(self.failures.append)
        in_force = PolicyInForce(load_sources([Source("p.yaml", self.policy)]), self.workload)
        hosts = {name: HostsEntry(tuple(map(ip_address, texts)), port) for name, texts, port in configuration.hosts}
        limits = Limits(dial_s=self.bounds.dial_s)
        lane = Lane(
            in_force,
            Exit(self.epoll, Pipes(), limits, admit, Resolver(hosts, ())),
            issuing=lambda: configuration.issuing,
            upstream_ca=configuration.upstream_ca,
            bounds=self.bounds,
            record=self.records.append,
            failed=self.failures.append,
        )
        return lane, in_force

    async def _let_go(self) -> None:
        """Wait for transports to tell their protocols of the end: a goodbye of TLS takes a turn of its peer."""
        end = self.loop.time() + WAIT_S
        sockets = self.loop._selector.get_map()  # type: ignore[attr-defined]  # asyncio's; one is the loop's own
        while len(sockets) > 1 + self.in_lane and self.loop.time() < end:  # noqa: ASYNC110 - peers are other threads and processes
            await asyncio.sleep(0.002)

    async def _accept(self, listener: socket.socket, tasks: set[asyncio.Task[None]]) -> None:
        while True:
            accepted, source = await self.loop.sock_accept(listener)
            sock = socket.socket(fileno=accepted.detach())  # as the inspector's process has it: of a known protocol
            task = asyncio.create_task(self._hand_over(sock, source))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _hand_over(self, sock: socket.socket, source: tuple[str, int]) -> None:
        sock.setblocking(False)
        host = None if self.plain else await self._peek(sock)
        handover = Handover(
            id=new_id(),
            workload=WORKLOAD,
            host=parse_hostname(host) if host else None,
            port=80 if self.plain else 443,
            plain=self.plain,
            source=source,
            destination=None,
            opened=time.time(),
            proxied=self.proxied,
            credential=self.credential,
        )
        if self.in_lane:
            self.lane.inspect(sock, handover)
        elif self.in_process:
            self.inspector.inspect(sock, handover)
        else:
            await self.core.serve(sock, handover)

    async def _peek(self, sock: socket.socket) -> str | None:
        while True:
            readable = asyncio.Event()
            self.loop.add_reader(sock.fileno(), readable.set)
            try:
                await readable.wait()
            finally:
                self.loop.remove_reader(sock.fileno())
            data = sock.recv(65536, socket.MSG_PEEK)
            if not data:
                return None
            if hello := parse_hello(data):
                return hello.sni
            await asyncio.sleep(0.01)

    # --- clients ---

    def connect(self, host: str = HOST) -> socket.socket:
        """A client's connection: TLS for `host`, verified by our roots, or plain."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.plain:
            return sock
        return self.context().wrap_socket(sock, server_hostname=host, suppress_ragged_eofs=False)

    def context(self) -> ssl.SSLContext:
        """A client's, which trusts our roots."""
        return ssl.create_default_context(cafile=str(self.roots))

    def send(self, request: bytes, *, host: str = HOST) -> Reply:
        """What comes back for these bytes until the gate closes, or has answered one request whole."""
        with self.connect(host) as sock:
            sock.sendall(request)
            return read_reply(sock)[0]

    def curl(self, url: str, *options: str) -> subprocess.CompletedProcess[bytes]:
        """curl, as a workload would run it: transparently led to the gate."""
        command = ["curl", "-sS", "-m", "30", "--noproxy", "*", "--cacert", str(self.roots)]
        command += ["--connect-to", f"::127.0.0.1:{self.port}", *options, url]
        return subprocess.run(command, capture_output=True, timeout=60)

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)

    def wait_for_records(self, count: int) -> list[Record]:
        self.wait_for(lambda: len(self.records) >= count)
        return self.records


@dataclass(frozen=True)
class Reply:
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def problem(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str | None:
        """The reason in a denial of ours."""
        decision = self.fields.get("outgate-decision", "")
        return decision.partition("reason=")[2].partition(";")[0] or None


NOTHING = Reply(0, {}, b"")


def read_reply(sock: socket.socket, buffered: bytes = b"") -> tuple[Reply, bytes]:
    """One response by its Content-Length, and what was read beyond it; NOTHING when there is no whole head."""
    try:
        while b"\r\n\r\n" not in buffered:
            data = sock.recv(65536)
            if not data:
                return NOTHING, b""
            buffered += data
        head, _, body = buffered.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(fields.get("content-length", 0))
        while len(body) < length:
            data = sock.recv(65536)
            if not data:
                break
            body += data
    except OSError:
        return NOTHING, b""
    return Reply(int(first.split()[1]), fields, body[:length]), body[length:]


def get(target: str = "/search", *, host: str = HOST, method: str = "GET", fields: str = "") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n".encode("latin-1")


HAS_CURL = shutil.which("curl") is not None
