"""Both ends of a soak: origins that answer everything, a nameserver that knows every name, and clients that check."""

from __future__ import annotations

import asyncio
import random
import select
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from threading import Thread
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, ResponseReceived, StreamEnded

from proxy.wire.client_hello import Alert, render_alert
from proxy.wire.dns import A, parse_query
from tests.proxy.hellos import hello
from tests.proxy.nameserver import address, reply, soa

PROXY = ("127.0.0.1", 3128)
ASKED, ORIGINS, SOURCES = "203.0.113", "93.184.216", "10.77.0"  # /24 each: what clients ask for, who answers, clients
CARRIED_PORT, INSPECTED_PORT = 443, 8443
ANSWER = bytes(1000)
IN_FLIGHT = 32
NEW_NAME_EVERY = 5  # carried connections: the others share fifty names
BROWSERS, PAGES_PER_S = 8, 10.0  # so many at a time, each so often: more new names than leaves are kept
PATIENCE_S = 60.0
MAX_ERRORS = 5  # that are told in words
IP_BIND_ADDRESS_NO_PORT = 24  # the kernel chooses the port when it knows both ends: one port serves many hosts


# --- the far end ---


def answer_all(ready: Connection) -> None:
    """The origin of what is carried, whatever is said to it; and the nameserver."""
    listener = socket.create_server(("", CARRIED_PORT), backlog=4096)
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", 53))
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    epoll.register(names.fileno(), select.EPOLLIN)
    clients: dict[int, socket.socket] = {}
    ready.send(None)
    while True:
        for fd, _ in epoll.poll():
            if fd == listener.fileno():
                sock, _ = listener.accept()
                clients[sock.fileno()] = sock
                epoll.register(sock.fileno(), select.EPOLLIN)
            elif fd == names.fileno():
                message, peer = names.recvfrom(4096)
                names.sendto(_resolved(message), peer)
            elif not _answered(clients[fd]):
                clients.pop(fd).close()


def _answered(sock: socket.socket) -> bool:
    try:
        if sock.recv(65536):
            sock.sendall(ANSWER)
            return True
    except OSError:  # the clients look at how it ends
        pass
    return False


def _resolved(question: bytes) -> bytes:
    """Every name has one of many addresses."""
    query = parse_query(question)
    if query.type != A:
        return reply(question, authority=[soa("example", 60, 60)])
    return reply(question, [address(query.name, f"{ORIGINS}.{sum(query.name.encode()) % 254 + 1}")])


class _Http(asyncio.Protocol):
    """HTTP/1.1 or HTTP/2 as agreed upon, kept alive."""

    def connection_made(self, transport: Any) -> None:  # Any: a transport of TLS
        self._transport = transport
        self._heard = b""
        self._h2: H2Connection | None = None
        if transport.get_extra_info("ssl_object").selected_alpn_protocol() == "h2":
            self._h2 = H2Connection(H2Configuration(client_side=False))
            self._h2.initiate_connection()

    def data_received(self, data: bytes) -> None:
        if self._h2:
            for event in self._h2.receive_data(data):
                if isinstance(event, RequestReceived) and event.stream_id:
                    fields = [(":status", "200"), ("content-length", str(len(ANSWER)))]
                    self._h2.send_headers(event.stream_id, fields)
                    self._h2.send_data(event.stream_id, ANSWER, end_stream=True)
            self._transport.write(self._h2.data_to_send())
            return
        self._heard += data
        while b"\r\n\r\n" in self._heard:
            self._heard = self._heard.partition(b"\r\n\r\n")[2]
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER))


def answer_tls(ready: Connection, certificate: str) -> None:
    """The origin of what is inspected."""

    async def serve() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.num_tickets = 0
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Http, "", INSPECTED_PORT, ssl=context, backlog=1024)
        ready.send(None)
        await server.serve_forever()

    asyncio.run(serve())


# --- the clients ---


def connect(number: int, to: tuple[str, int] | None = None, port: int = CARRIED_PORT) -> socket.socket:
    """From one of many clients; where no address is given to one of many, whence the kernel leads it to the gate."""
    sock = socket.socket()
    sock.settimeout(PATIENCE_S)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((f"{SOURCES}.{number % 254 + 1}", 0))
    sock.connect(to or (f"{ASKED}.{number % 253 + 1}", port))
    return sock


@dataclass(slots=True)
class _Try:
    """One connection of the load, and what has to come of it."""

    kind: str
    sock: socket.socket
    expected: bytes
    heard: int = 0


class Load:
    """Short connections, so many at a time. `done` and `failed` count them by kind."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.errors: list[str] = []
        self._epoll = select.epoll()
        self._tries: dict[int, _Try] = {}
        self._shared = [hello(f"n{i}.cdn.example") for i in range(50)]
        self._denied = hello("a.denied.example")
        self._random = random.Random(1)  # noqa: S311 - the same load each time

    def run(self, total: int, tell: Callable[[], None]) -> None:
        """`tell` is called now and then."""
        for number in range(total):
            if len(self._tries) >= IN_FLIGHT:
                self._turn()
            self._begin(number)
            if number % 100 == 0:
                tell()
        while self._tries:
            self._turn()

    def _begin(self, number: int) -> None:
        of = number % 100
        if of < 80:
            data = hello(f"x{number}.cdn.example") if number % NEW_NAME_EVERY == 0 else self._shared[number % 50]
            self._open("redirected", data, ANSWER, number)
        elif of < 92:
            asked = f"n{number % 50}.cdn.example:443".encode()
            head = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (asked, asked)
            established = b"HTTP/1.1 200 Connection established\r\n\r\n"
            self._open("proxied", head + self._shared[number % 50], established + ANSWER, number, PROXY)
        elif of < 97:
            self._open("denied", self._denied, render_alert(Alert.ACCESS_DENIED), number)
        else:
            self._leave_early(number)

    def _open(self, kind: str, says: bytes, expected: bytes, number: int, to: tuple[str, int] | None = None) -> None:
        try:
            sock = connect(number, to)
            sock.sendall(says)
        except OSError as error:
            self._fail(kind, error)
            return
        self._tries[sock.fileno()] = _Try(kind, sock, expected)
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _leave_early(self, number: int) -> None:
        """Half a hello, and gone; every other one with a reset."""
        try:
            with connect(number) as sock:
                sock.sendall(self._denied[: self._random.randrange(1, 100)])
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.done["left early"] += 1
        except OSError as error:
            self._fail("left early", error)

    def _turn(self) -> None:
        events = self._epoll.poll(PATIENCE_S)
        if not events:
            raise SystemExit(f"nothing moves: {Counter(one.kind for one in self._tries.values())}")
        for fd, _ in events:
            one = self._tries[fd]
            try:
                data = one.sock.recv(65536)
                if data != one.expected[one.heard : one.heard + len(data)] or not data:
                    raise OSError(f"unexpected {data[:40]!r} after {one.heard} bytes")
                one.heard += len(data)
                if one.heard < len(one.expected):
                    continue
                self.done[one.kind] += 1
            except OSError as error:
                self._fail(one.kind, error)
            del self._tries[fd]
            one.sock.close()

    def _fail(self, kind: str, error: OSError) -> None:
        self.failed[kind] += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(f"{kind}: {error}")


class Browser:
    """Asks in TLS that the gate ends, in HTTP/2 where that is offered and agreed upon."""

    def __init__(self, trust: str) -> None:
        self._contexts = [ssl.create_default_context(cafile=trust) for _ in range(2)]
        self._contexts[1].set_alpn_protocols(["h2", "http/1.1"])

    def open(self, number: int, kind: str) -> ssl.SSLSocket:
        """A connection for a name of its own."""
        sock = connect(number, port=INSPECTED_PORT)
        return self._contexts[number % 2].wrap_socket(sock, server_hostname=f"{kind}{number}.api.example")

    def ask(self, sock: ssl.SSLSocket, asked: list[tuple[str, int]]) -> None:
        """Each path, one after another; raises OSError where the answer is another status."""
        authority = f"{sock.server_hostname}:{INSPECTED_PORT}"
        if sock.selected_alpn_protocol() == "h2":
            _ask_h2(sock, authority, asked)
            return
        for path, status in asked:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
            _read_answer(sock, status)


def _read_answer(sock: ssl.SSLSocket, status: int) -> None:
    head, length = b"", 0
    while not length or len(head) < length:
        data = sock.recv(65536)
        if not data:
            raise OSError(f"ended within an answer: {head[:200]!r}")
        head += data
        if not length and b"\r\n\r\n" in head:
            fields, _, _ = head.lower().partition(b"\r\n\r\n")
            length = len(fields) + 4 + int(fields.partition(b"content-length:")[2].split()[0])
    if not head.startswith(b"HTTP/1.1 %d " % status):
        raise OSError(f"answered {head[:200]!r} where {status} was expected")


def _ask_h2(sock: ssl.SSLSocket, authority: str, asked: list[tuple[str, int]]) -> None:
    connection = H2Connection()
    connection.initiate_connection()
    for path, status in asked:
        stream = connection.get_next_available_stream_id()
        fields = [(":method", "GET"), (":path", path), (":scheme", "https"), (":authority", authority)]
        connection.send_headers(stream, fields, end_stream=True)
        is_over = False
        while not is_over:
            sock.sendall(connection.data_to_send())
            data = sock.recv(65536)
            if not data:
                raise OSError("ended within an answer over HTTP/2")
            for event in connection.receive_data(data):
                if isinstance(event, ResponseReceived) and dict(event.headers or ())[b":status"] != b"%d" % status:
                    raise OSError(f"answered {event.headers!r} where {status} was expected")
                if isinstance(event, DataReceived):
                    connection.acknowledge_received_data(event.flow_controlled_length or 0, stream)
                is_over |= isinstance(event, StreamEnded)
    connection.close_connection()
    sock.sendall(connection.data_to_send())


type Number = Synchronized[int]


@dataclass(frozen=True, slots=True)
class Tally:
    """What the inspected stream has done so far, shared between processes. `goes_on` is 0 when it has to end."""

    connections: Number
    requests: Number
    failed: Number
    goes_on: Number


def browse(ready: Connection, trust: str, tally: Tally) -> None:
    """Connections that are inspected, at a rate. Every one has a name that was never seen before."""
    browser, numbers = Browser(trust), count()
    threads = [Thread(target=_browse, args=(browser, numbers, tally)) for _ in range(BROWSERS)]
    for thread in threads:
        thread.start()
    ready.send(None)
    for thread in threads:
        thread.join()
    ready.send(None)


def _browse(browser: Browser, numbers: Iterator[int], tally: Tally) -> None:
    next_at = time.monotonic()
    while tally.goes_on.value:
        number = next(numbers)
        asked = [(f"/search/{turn}", 200) for turn in range(1 + number % 3)]
        if number % 10 == 0:
            asked.append(("/other", 403))
        try:
            with browser.open(number, "y") as sock:
                browser.ask(sock, asked)
            _add(tally.requests, len(asked))
        except OSError as error:
            _add(tally.failed, 1)
            if tally.failed.value <= MAX_ERRORS:
                print(f"inspected: {error}", flush=True)
        _add(tally.connections, 1)
        next_at = max(next_at + 1 / PAGES_PER_S, time.monotonic() - 1)
        time.sleep(max(0.0, next_at - time.monotonic()))


def _add(to: Number, more: int) -> None:
    with to.get_lock():
        to.value += more
