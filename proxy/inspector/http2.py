"""HTTP/2 between the workload and the inspector, and on to the origin: mitmproxy's layers over `frames`. No I/O.

One judge for every stream. A stream that is denied, malformed or stalled is answered or reset alone; what harms the
connection (a broken frame, a flood) ends the connection alone. An origin that speaks HTTP/1.1 is asked over several
connections, one request at a time on each. Push, CONNECT (also RFC 8441's) and h2c are not served.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from h2.errors import ErrorCodes
from mitmproxy.connection import Connection, Server
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layer import CommandGenerator, Layer
from mitmproxy.proxy.layers.http import (
    GetHttpConnection,
    GetHttpConnectionCompleted,
    HttpLayer,
    HTTPMode,
    HttpStream,
    RegisterHttpConnection,
)
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestProtocolError,
    ResponseProtocolError,
)

from addons.answers import Answer
from addons.gate import CANCELLED, FAILURE
from addons.judge import TIMEOUT, Unreachable
from policies.model import Reason
from proxy.inspector.http2_client import ClientSide
from proxy.inspector.http2_end import Exchange
from proxy.inspector.http2_upstream import Http1Side, UpstreamSide
from proxy.inspector.reading import MalformedHead
from proxy.inspector.streams import HTTP_2, Frame, Hooks, Opening, Stream

MAX_UPSTREAMS = 8  # connections to an origin that speaks HTTP/1.1, for one client; further requests wait
MAX_WAITING = 64 * 1024  # bytes for one slow stream before its HTTP/1.1 origin is no longer read

type _Upstream = UpstreamSide | Http1Side


class Http(HttpLayer):
    """All streams of one client connection, and the upstream connections they share.

    congested  connections whose peer takes nothing more for now; what was received for it is not acknowledged
    may_carry  whether the latest allow admits the address of an origin's connection: the policy may be another by now
    """

    def __init__(
        self,
        context: Frame,
        hooks: Hooks,
        refuse: Callable[[MalformedHead], Answer],
        cut_off: Callable[[str, Reason], None],
        may_carry: Callable[[Server], bool],
    ) -> None:
        super().__init__(context, HTTPMode.transparent)
        self._hooks = hooks
        self._may_carry = may_carry
        self.congested: set[Connection] = set()
        self.client_side = ClientSide(context.fork(), self.streams, refuse, cut_off)
        self.connections[context.client] = self.client_side
        self._waiting: deque[GetHttpConnection] = deque()  # for a place on an upstream connection
        self._speaks_http1 = False
        self._quiet_since: float | None = None

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, events.Start):
            yield from self.event_to_child(self.client_side, event)
        else:
            yield from super()._handle_event(event)
        yield from self.settle()

    def event_to_child(self, child: Layer | HttpStream, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, RequestProtocolError) and isinstance(child, Stream) and child._paused:
            yield from self._give_up(child, Unreachable(Reason.CLIENT_GONE, ""))
        else:
            yield from super().event_to_child(child, event)

    def make_stream(self, stream_id: int) -> CommandGenerator[None]:
        stream = self.streams[stream_id] = Stream(self.context.fork(), stream_id, self._hooks)
        yield from self.event_to_child(stream, events.Start())

    # --- connections to the origin ---

    def adopt(self, connection: Server) -> CommandGenerator[None]:
        """Take a connection that is open already for the first request."""
        context = self.context.fork()
        context.server = connection
        side = self.connections[connection] = self._speak(context)
        yield from self.event_to_child(side, events.Start())
        yield from self.settle()

    def _speak(self, context: Context) -> _Upstream:
        if context.server.alpn == HTTP_2:
            return UpstreamSide(context, self.streams)
        self._speaks_http1 = True
        return Http1Side(context)

    def _upstreams(self) -> Iterator[tuple[Server, _Upstream]]:
        """Those that are open."""
        for connection in tuple(self.connections):
            if isinstance(connection, Server) and connection.connected:
                yield connection, self._speaking(connection)

    def _speaking(self, connection: Connection) -> _Upstream:
        layer = self.connections[connection]
        side = layer.child_layer if isinstance(layer, Opening) else layer
        assert isinstance(side, UpstreamSide | Http1Side)
        return side

    def get_connection(self, event: GetHttpConnection, *, reuse: bool = True) -> CommandGenerator[None]:
        """A place on a connection that is open, on one that is being opened, on a new one; or a place in the queue."""
        self._forget_closed()
        count, is_multiplexed = len(self.waiting_for_establishment), False
        for connection, side in self._upstreams():
            if not self._may_carry(connection):
                if isinstance(side, UpstreamSide):
                    side.frames.is_leaving = True  # it is closed with its last stream
                elif side.is_free:
                    yield commands.CloseConnection(connection)
                continue
            if side.is_free:
                waiting = self.command_sources.pop(event)
                yield from self.event_to_child(waiting, GetHttpConnectionCompleted(event, (connection, None)))
                return
            if isinstance(side, Http1Side):
                count += 1
            elif not side.is_leaving:
                is_multiplexed = True
        if self.waiting_for_establishment and not self._speaks_http1:  # one dial tells what the origin speaks
            next(iter(self.waiting_for_establishment.values())).append(event)
        elif is_multiplexed or count >= MAX_UPSTREAMS:
            self._waiting.append(event)
        else:
            context = self.context.fork()
            context.server = Server(address=event.address)
            opening = self.connections[context.server] = Opening(context, self._speak)
            self.waiting_for_establishment[context.server].append(event)
            yield from self.event_to_child(opening, events.Start())

    def register_connection(self, command: RegisterHttpConnection) -> CommandGenerator[None]:
        for event in self.waiting_for_establishment.pop(command.connection):
            if command.err:
                waiting = self.command_sources.pop(event)
                yield from self.event_to_child(waiting, GetHttpConnectionCompleted(event, (None, command.err)))
            else:
                yield from self.get_connection(event)

    def _forget_closed(self) -> None:
        used = {id(stream.context.server) for stream in self.streams.values()}
        for connection in [one for one in self.connections if isinstance(one, Server) and not one.connected]:
            if connection not in self.waiting_for_establishment and id(connection) not in used:
                del self.connections[connection]

    def _give_up(self, stream: Stream, failure: Unreachable) -> CommandGenerator[None]:
        """End a stream that waits for its connection."""
        assert stream._paused
        event = stream._paused.command
        assert isinstance(event, GetHttpConnection)
        for queue in (self._waiting, *self.waiting_for_establishment.values()):
            for place, one in enumerate(queue):
                if one is event:  # others for the same origin are equal to it
                    del queue[place]
                    break
        del self.command_sources[event]
        gone = GetHttpConnectionCompleted(event, (None, failure))  # type: ignore[arg-type]  # theirs is a text
        yield from super().event_to_child(stream, gone)

    # --- after each event ---

    def settle(self) -> CommandGenerator[None]:
        """What follows from the state that streams and sides are in now."""
        upstreams: dict[Connection, _Upstream] = dict(self._upstreams())
        self._pump(upstreams)
        for connection, side in upstreams.items():
            if isinstance(side, Http1Side) and side.stream_id is not None and side.stream_id not in self.streams:
                yield commands.CloseConnection(connection)  # in the middle of an exchange that nobody wants any more
        if self._waiting:
            yield from self._serve_waiting()
            upstreams = dict(self._upstreams())
            self._pump(upstreams)
        self._take(upstreams)
        yield from self.client_side.flush()
        for side in upstreams.values():
            if isinstance(side, UpstreamSide):
                yield from side.flush()

    def _serve_waiting(self) -> CommandGenerator[None]:
        while self._waiting:
            event = self._waiting.popleft()
            waiting = len(self._waiting)
            yield from self.get_connection(event)
            if len(self._waiting) > waiting:
                self._waiting.rotate()
                return

    def _pump(self, upstreams: Mapping[Connection, _Upstream]) -> None:
        """Send what windows allow, and forget streams that are over on both sides."""
        for side in (self.client_side, *upstreams.values()):
            if isinstance(side, Http1Side):
                continue
            if side.conn not in self.congested:  # what waits here counts against windows, not so what a socket holds
                side.frames.pump()
            side.forget()

    def _take(self, upstreams: Mapping[Connection, _Upstream]) -> None:
        """Acknowledge what was received and has gone on: so much may come again, and no more is ever held."""
        frames = self.client_side.frames
        for stream_id in frames.untaken:
            stream = self.streams.get(stream_id)
            if stream is None:
                frames.take(stream_id)
            elif not stream._paused and stream.context.server not in self.congested:
                side = upstreams.get(stream.context.server)
                frames.take(stream_id, side.backlog(stream_id) if isinstance(side, UpstreamSide) else 0)
        if self.context.client in self.congested:
            return
        for side in upstreams.values():
            if isinstance(side, UpstreamSide):
                side.take(frames)

    def is_stalled(self, connection: Connection) -> bool:
        """Nothing more is to be read of it: what it sent last still waits for the other side."""
        client = self.context.client
        if connection is client:
            return client in self.congested
        side = self._speaking(connection)
        if not isinstance(side, Http1Side):
            return False  # it keeps to its windows
        backlog = self.client_side.backlog(side.stream_id) if side.stream_id is not None else 0
        return client in self.congested or backlog > MAX_WAITING

    def is_ahead(self, connection: Connection) -> bool:
        """More frames of it are here than were read in one turn."""
        if connection is self.context.client:
            return self.client_side.is_ahead
        side = self._speaking(connection)
        return isinstance(side, UpstreamSide) and side.is_ahead

    # --- time ---

    def check(self, now: float, idle_s: float) -> CommandGenerator[None]:
        """Called every second: nothing may stay for ever on which nothing moves."""
        client = self.client_side
        for side in (client, *(side for _, side in self._upstreams() if isinstance(side, UpstreamSide))):
            side.frames.ease()
            for stream_id in side.take_moved():
                if moved := client.exchanges.get(stream_id):
                    moved.has_moved = True
            if isinstance(side, UpstreamSide):
                side.check(now, idle_s)
        for stream_id, exchange in tuple(client.exchanges.items()):
            if exchange.is_quiet(now, idle_s):
                yield from self._expire(stream_id, exchange, f"nothing moved for {idle_s:g} s")
        if client.exchanges:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        elif now - self._quiet_since > idle_s:
            yield from client.hang_up(ErrorCodes.NO_ERROR)
        yield from self.settle()

    def _expire(self, stream_id: int, exchange: Exchange, note: str) -> CommandGenerator[None]:
        client, stream = self.client_side, self.streams.get(stream_id)
        if isinstance(stream, Stream) and exchange.has_ended and not client.backlog(stream_id):
            failure = Unreachable(Reason.UPSTREAM_TIMEOUT, note)
            if stream._paused:
                yield from self._give_up(stream, failure)
                return
            stream.flow.metadata[FAILURE] = failure
            yield from self.event_to_child(
                stream, ResponseProtocolError(stream_id, note, ErrorCode.GENERIC_SERVER_ERROR)
            )
            return
        del client.exchanges[stream_id]
        client.frames.reset(stream_id, ErrorCodes.CANCEL)
        if stream:
            yield from self.event_to_child(stream, RequestProtocolError(stream_id, CANCELLED, ErrorCode.CANCEL))

    def refuse(self, fault: MalformedHead) -> CommandGenerator[None]:
        reason = Reason.HELLO_TIMEOUT if fault.status == TIMEOUT else Reason.MALFORMED_REQUEST
        yield from self.client_side.cut(str(fault), reason, ErrorCodes.NO_ERROR)

    def leave(self) -> CommandGenerator[None]:
        """Ask the client to go elsewhere with its next request; what it still sends here is served."""
        self.client_side.frames.say_goodbye()
        yield from self.client_side.flush()

    def abandon(self, _reply: Answer | None) -> Iterator[commands.Command]:
        """After a fault of ours: the end, and that it is our fault."""
        yield from self.client_side.hang_up(ErrorCodes.INTERNAL_ERROR)
