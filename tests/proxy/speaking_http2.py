"""Both ends of HTTP/2 for tests: an origin that answers as told, and a client that may break every rule."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import Frame, GoAwayFrame

from tests.proxy.inspecting import HOST, KEPT, WAIT_S, Origin, Reply, Respond, Rig

type Pairs = list[tuple[str, str]]

CONFIGURATION: dict[str, Any] = {
    "header_encoding": "latin-1",
    "validate_inbound_headers": False,
    "validate_outbound_headers": False,
    "normalize_outbound_headers": False,
    "normalize_inbound_headers": False,
}


@dataclass
class Heard:
    """A request as an origin heard it; of its body 64 KiB are kept."""

    talk: Talk
    stream_id: int
    fields: Pairs
    body: bytes = b""
    received: int = 0
    trailers: Pairs | None = None
    reset: int | None = None
    has_ended: bool = False

    def __getitem__(self, name: str) -> str:
        return dict(self.fields)[name]

    def respond(
        self, body: bytes = b"sunny", *, status: int = 200, fields: Pairs | None = None, trailers: Pairs | None = None
    ) -> None:
        self.talk.respond(self.stream_id, status, fields or [], body, trailers)


class Talk:
    """An origin's side of one connection."""

    def __init__(self, origin: Http2Origin, sock: socket.socket) -> None:
        self.origin = origin
        self.sock = sock
        self.h2 = H2Connection(H2Configuration(client_side=False, **CONFIGURATION))
        self.heard: dict[int, Heard] = {}
        self._queued: dict[int, tuple[memoryview, Pairs | None]] = {}

    def run(self) -> None:
        for code, value in self.origin.settings.items():
            self.h2.local_settings[code] = value
        self.h2.local_settings.acknowledge()
        self.h2.initiate_connection()
        self.flush()
        while data := self.sock.recv(1 << 16):
            for event in self.h2.receive_data(data):
                self._take(event)
            self._pump()
            self.flush()

    def flush(self) -> None:
        self.sock.sendall(self.h2.data_to_send())

    def raw(self, *frames: Frame | bytes) -> None:
        self.flush()
        self.sock.sendall(b"".join(frame if isinstance(frame, bytes) else frame.serialize() for frame in frames))

    def respond(self, stream_id: int, status: int, fields: Pairs, body: bytes, trailers: Pairs | None) -> None:
        self.h2.send_headers(stream_id, [(":status", str(status)), *fields], end_stream=not body and trailers is None)
        if body or trailers is not None:
            self._queued[stream_id] = memoryview(body), trailers
            self._pump()

    def _pump(self) -> None:
        for stream_id, (body, trailers) in tuple(self._queued.items()):
            while body:
                room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size, len(body))
                if room <= 0:
                    break
                self.h2.send_data(stream_id, body[:room], end_stream=room == len(body) and trailers is None)
                body = body[room:]
            self._queued[stream_id] = body, trailers
            if not body:
                del self._queued[stream_id]
                if trailers is not None:
                    self.h2.send_headers(stream_id, trailers, end_stream=True)

    def _take(self, event: Event) -> None:
        match event:
            case RequestReceived():
                heard = Heard(self, event.stream_id, pairs(event.headers))
                self.heard[event.stream_id] = heard
                self.origin.heard.append(heard)
                self.origin.begin(heard)
            case DataReceived():
                heard = self.heard[event.stream_id]
                heard.received += len(event.data or b"")
                heard.body = (heard.body + (event.data or b""))[:KEPT]
                if self.origin.acknowledges:
                    self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            case TrailersReceived():
                self.heard[event.stream_id].trailers = pairs(event.headers)
            case StreamEnded():
                self.heard[event.stream_id].has_ended = True
                self.origin.answer(self.heard[event.stream_id])
            case StreamReset():
                if found := self.heard.get(event.stream_id):
                    found.reset = int(event.error_code)
                self._queued.pop(event.stream_id, None)


class Http2Origin(Origin):
    """A server on loopback that speaks HTTP/2 when asked to.

    heard         requests in the order of their heads
    begin         told of each head
    answer        told of each whole request
    acknowledges  opens its windows again
    settings      what its SETTINGS say beside the usual
    """

    def __init__(self, context: ssl.SSLContext | None, respond: Respond) -> None:
        self.heard: list[Heard] = []
        self.begin: Callable[[Heard], None] = lambda _heard: None
        self.answer: Callable[[Heard], None] = Heard.respond
        self.acknowledges = True
        self.alpn: list[str | None] = []
        self.settings: dict[SettingCodes, int] = {}
        if context:
            context.set_alpn_protocols(["h2", "http/1.1"])
        super().__init__(context, respond)

    def converse(self, sock: socket.socket) -> None:
        spoken = sock.selected_alpn_protocol() if isinstance(sock, ssl.SSLSocket) else None
        self.alpn.append(spoken)
        if spoken != "h2":
            super().converse(sock)
            return
        try:
            Talk(self, sock).run()
        except ProtocolError:
            pass  # a test that breaks the protocol sees it at the other end


def rig(directory: Path, **options: Any) -> Rig:  # Any: fields of a Rig
    """A gate in front of an origin that speaks HTTP/2."""
    return Rig(directory, **({"make_origin": Http2Origin} | options))


def origin_of(gate: Rig) -> Http2Origin:
    assert isinstance(gate.origin, Http2Origin)
    return gate.origin


def pairs(fields: Iterable[Any] | None) -> Pairs:
    return [
        (
            name if isinstance(name, str) else name.decode("latin-1"),
            value if isinstance(value, str) else value.decode("latin-1"),
        )
        for name, value in fields or ()
    ]


@dataclass
class Response:
    """What a client got on one stream."""

    status: int = 0
    fields: Pairs = field(default_factory=list)
    body: bytes = b""
    received: int = 0
    trailers: Pairs | None = None
    informational: list[Pairs] = field(default_factory=list)
    has_ended: bool = False
    reset: int | None = None

    @property
    def is_over(self) -> bool:
        return self.has_ended or self.reset is not None

    def __getitem__(self, name: str) -> str | None:
        return dict(self.fields).get(name)

    @property
    def reason(self) -> str | None:
        return Reply(self.status, {"outgate-decision": self["outgate-decision"] or ""}, self.body).reason


class Client:
    """A workload that speaks HTTP/2 with the gate.

    acknowledges  opens its windows again
    goaway        the error code of the gate's GOAWAY
    is_closed     the gate closed the connection
    """

    def __init__(
        self, gate: Rig, host: str = HOST, *, alpn: tuple[str, ...] = ("h2",), acknowledges: bool = True
    ) -> None:
        self.open(gate, host, alpn=alpn, acknowledges=acknowledges)
        if self.sock.selected_alpn_protocol() == "h2":
            self.begin()

    def open(self, gate: Rig, host: str = HOST, *, alpn: tuple[str, ...] = ("h2",), acknowledges: bool = True) -> None:
        """TLS, and nothing said yet."""
        context = ssl.create_default_context(cafile=str(gate.roots))
        context.set_alpn_protocols(list(alpn))
        sock = socket.create_connection(("127.0.0.1", gate.port), timeout=WAIT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = context.wrap_socket(sock, server_hostname=host)
        self.host = host
        self.h2 = H2Connection(H2Configuration(client_side=True, **CONFIGURATION))
        self.acknowledges = acknowledges
        self.responses: dict[int, Response] = {}
        self.goaway: int | None = None
        self.is_closed = False

    def begin(self) -> None:
        """The preface."""
        self.h2.initiate_connection()
        self.flush()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def flush(self) -> None:
        try:
            self.sock.sendall(self.h2.data_to_send())
        except OSError:
            self.is_closed = True

    def raw(self, *frames: Frame | bytes) -> None:
        """Send frames as they are, behind what was said before."""
        self.flush()
        try:
            self.sock.sendall(b"".join(frame if isinstance(frame, bytes) else frame.serialize() for frame in frames))
        except OSError:
            self.is_closed = True

    def head(self, path: str = "/search", *, method: str = "GET", authority: str | None = None) -> Pairs:
        return [
            (":method", method),
            (":scheme", "https"),
            (":authority", authority or self.host),
            (":path", path),
        ]

    def send(
        self,
        path: str = "/search",
        *,
        method: str = "GET",
        fields: Pairs | None = None,
        body: bytes = b"",
        ends: bool = True,
    ) -> int:
        """Begin a request; its stream id."""
        return self.send_head(self.head(path, method=method) + (fields or []), body=body, ends=ends)

    def send_head(self, head: Iterable[tuple[Any, Any]], *, body: bytes = b"", ends: bool = True) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.responses[stream_id] = Response()
        self.h2.send_headers(stream_id, list(head), end_stream=ends and not body)
        if body:
            self.h2.send_data(stream_id, body, end_stream=ends)
        self.flush()
        return stream_id

    def open_connection(self, size: int) -> None:
        """Open the connection's window, and no stream's."""
        self.h2.increment_flow_control_window(size)
        self.flush()

    def upload(self, stream_id: int, size: int, *, ends: bool = True) -> int:
        """Send `size` bytes as windows allow, reading what comes meanwhile; how much that was when a reset cut it off.

        A response may be over long before (RFC 9113 8.1): that ends no upload.
        """
        sent = 0
        while sent < size:
            room = min(self.h2.local_flow_control_window(stream_id), 16384, size - sent)
            if room > 0:
                sent += room
                self.h2.send_data(stream_id, bytes(room), end_stream=ends and sent == size)
                self.flush()
            elif not self.read() or self.responses[stream_id].reset is not None:
                break
        return sent

    def get(self, path: str = "/search", **options: Any) -> Response:  # Any: as `send` has them
        """A whole request and its response."""
        return self.wait(self.send(path, **options))

    def wait(self, stream_id: int) -> Response:
        """The response on a stream, when it is over; or what there is of it when the gate closes."""
        self.read_until(lambda: self.responses[stream_id].is_over)
        return self.responses[stream_id]

    def read_until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition() and not self.is_closed:
            assert time.monotonic() < end, "nothing more came"
            self.read()

    def read_to_the_end(self) -> None:
        self.read_until(lambda: False)

    def read_to_goaway(self) -> None:
        """Look for GOAWAY alone: the state of this client may be none that HTTP/2 knows."""
        received = b""
        try:
            while self.goaway is None and (chunk := self.sock.recv(1 << 16)):
                received = self._look_for_goaway(received + chunk)
        except OSError:
            pass  # a reset may overtake it; the test sees that there was none

    def _look_for_goaway(self, received: bytes) -> bytes:
        """What is left of these bytes behind the last whole frame."""
        while len(received) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(received[:9]))
            if len(received) < 9 + length:
                break
            if isinstance(frame, GoAwayFrame):
                frame.parse_body(memoryview(received[9 : 9 + length]))
                self.goaway = frame.error_code
            received = received[9 + length :]
        return received

    def read(self, timeout_s: float = WAIT_S) -> bool:
        """Take what has come; whether anything has."""
        self.sock.settimeout(timeout_s)
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return False
        except OSError:
            data = b""
        finally:
            self.sock.settimeout(WAIT_S)
        if not data:
            self.is_closed = True
            return False
        for event in self.h2.receive_data(data):
            self._take(event)
        self.flush()
        return True

    def _take(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            self.goaway = int(event.error_code or 0)
            return
        found = self.responses.setdefault(getattr(event, "stream_id", None) or 0, Response())
        match event:
            case InformationalResponseReceived():
                found.informational.append(pairs(event.headers))
            case ResponseReceived():
                found.fields = pairs(event.headers)
                found.status = int(dict(found.fields)[":status"])
            case DataReceived():
                found.received += len(event.data or b"")
                found.body = (found.body + (event.data or b""))[:KEPT]
                if self.acknowledges:
                    self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            case TrailersReceived():
                found.trailers = pairs(event.headers)
            case StreamEnded():
                found.has_ended = True
            case StreamReset():
                found.reset = int(event.error_code)


CALM = int(ErrorCodes.ENHANCE_YOUR_CALM)
