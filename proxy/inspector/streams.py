"""A request and its response, whichever HTTP carries them: mitmproxy's stream, with hooks called where they are met.

Here is also what the layers of HTTP/1.1 and HTTP/2 say to each other beyond mitmproxy's own events. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mitmproxy import http
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers import tcp
from mitmproxy.proxy.layers.http import (
    DropStream,
    GetHttpConnection,
    HttpClient,
    HttpStream,
    RegisterHttpConnection,
    SendHttp,
)
from mitmproxy.proxy.layers.http._base import HttpConnection
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    HttpEvent,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._hooks import HttpResponseHook

from addons.gate import FAILURE, JUDGEMENT
from addons.judge import Unreachable
from proxy.inspector.user_addons import HELD, Held, stop

HTTP_1, HTTP_2 = b"http/1.1", b"h2"  # RFC 7301's names

type Hooks = Mapping[str, Sequence[Callable[[http.HTTPFlow], None]]]


class Frame(Context):
    """A context whose copies share its server; mitmproxy makes a new one for each copy, and throws it away."""

    def fork(self) -> Frame:
        copy = Frame.__new__(Frame)
        copy.client, copy.options, copy.server, copy.layers = self.client, self.options, self.server, self.layers.copy()
        return copy


class ConnectionBroken(events.ConnectionClosed):
    """The peer is gone without having ended its side (a reset): a body that only the end delimits is not whole."""


class AbortConnection(commands.CloseConnection):
    """Close so that the peer notices that its response is not whole."""


@dataclass
class Informational(HttpEvent):
    """A 1xx response, before the response: 103 Early Hints, 102 Processing."""

    response: http.Response


def informational(response: http.Response) -> http.Response:
    """Without what would be taken for the framing of a body."""
    for name in ("content-length", "transfer-encoding", "connection"):
        response.headers.pop(name, None)
    return response


class Opening(HttpClient):
    """Waits for the upstream connection, then `speak` makes the layer that speaks on it."""

    def __init__(self, context: Context, speak: Callable[[Context], HttpConnection]) -> None:
        super().__init__(context)
        self._speak = speak

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        fault: Unreachable | None = yield commands.OpenConnection(self.context.server)
        if not fault:
            self.child_layer = self._speak(self.context)
            self._handle_event = self.child_layer.handle_event  # type: ignore[method-assign]  # as mitmproxy does
            yield from self.child_layer.handle_event(event)
        yield RegisterHttpConnection(self.context.server, fault)  # type: ignore[arg-type]  # theirs is a text


class Stream(HttpStream):
    """One request and its response. An answer that the gate set at the headers goes out at once."""

    def __init__(self, context: Context, stream_id: int, hooks: Hooks) -> None:
        super().__init__(context, stream_id)
        self._hooks = hooks
        self._is_multiplexed = context.client.alpn == HTTP_2

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        """Calls hooks where mitmproxy would suspend the stream for each and come back to it through every layer."""
        if isinstance(event, Informational):
            if self.server_state == self.state_wait_for_response_headers:
                yield SendHttp(event, self.context.client)
            return
        made = super()._handle_event(event)
        reply = None
        while True:
            try:
                command = made.send(reply)
            except StopIteration:
                return
            if isinstance(command, commands.StartHook):
                self.call(command.name)
                reply = None
            else:
                if isinstance(command, DropStream):
                    self.release()
                reply = yield command

    @property
    def is_judged(self) -> bool:
        return hasattr(self, "flow") and JUDGEMENT in self.flow.metadata

    def call(self, name: str) -> None:
        for hook in self._hooks.get(name, ()):
            hook(self.flow)

    def check_invalid(self, request: bool) -> CommandGenerator[bool]:
        """Both heads were read strictly before they came here; the rest is the judge's."""
        yield from ()
        return False

    def check_body_size(self, request: bool) -> CommandGenerator[bool]:
        """Bounds what is held for the operator's addons; nothing else is held."""
        held: Held | None = self.flow.metadata.get(HELD)
        if held is None or not (note := held.grow(max(len(self.request_body_buf), len(self.response_body_buf)))):
            return False
        stop(self.flow, note)
        return (yield from self.check_killed(True))

    def release(self) -> None:
        """Nothing of it is held any more."""
        if hasattr(self, "flow") and (held := self.flow.metadata.get(HELD)):
            held.release()

    def make_server_connection(self) -> CommandGenerator[bool]:
        """Keeps why there is no connection: of several requests on one client connection each has a reason."""
        asked = GetHttpConnection((self.flow.request.host, self.flow.request.port), bool(self.context.client.tls), None)
        connection, failure = yield asked
        if failure:
            self.flow.metadata[FAILURE] = failure
            yield from self.handle_protocol_error(
                ResponseProtocolError(self.stream_id, str(failure), ErrorCode.CONNECT_FAILED)
            )
            return False
        self.context.server = self.flow.server_conn = connection
        return True

    def check_killed(self, emit_error_hook: bool) -> CommandGenerator[bool]:
        flow = self.flow
        if flow.response is None or flow.error or self.client_state != self.state_wait_for_request_headers:
            return (yield from super().check_killed(emit_error_hook))
        content = flow.response.raw_content or b""
        client = self.context.client
        yield HttpResponseHook(flow)
        yield SendHttp(ResponseHeaders(self.stream_id, flow.response, not content), client)
        if content:
            yield SendHttp(ResponseData(self.stream_id, content), client)
        yield SendHttp(ResponseEndOfMessage(self.stream_id), client)
        if not self._is_multiplexed and flow.response.headers.get("connection") == "close":
            yield commands.CloseConnection(client)  # the body, if any, is not read
        self.client_state = self.server_state = self.state_errored
        flow.live = False
        yield DropStream(self.stream_id)
        return True

    def send_response(self, already_streamed: bool = False) -> CommandGenerator[None]:
        yield from super().send_response(already_streamed)
        if self._is_multiplexed and self.client_state != self.state_done:  # it may go on sending for long
            yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)

    def flow_done(self) -> CommandGenerator[None]:
        """After an Upgrade bytes are carried as they come: mitmproxy would collect whole websocket messages."""
        assert self.flow.response
        if self.flow.response.status_code != 101:
            yield from super().flow_done()
            return
        self.flow.live = False
        self.child_layer = tcp.TCPLayer(self.context, ignore=True)
        self._handle_event = self.passthrough  # type: ignore[method-assign]  # as mitmproxy does
        yield from self.child_layer.handle_event(events.Start())
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)
