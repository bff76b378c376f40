"""One client connection under inspection and the upstream connections beside it: bytes between sockets and layers.

Which HTTP it speaks is agreed before its TLS begins, as far as possible by what the origin speaks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from mitmproxy.connection import Client, Connection, ConnectionState, Server
from mitmproxy.options import Options
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.mode_specs import ProxyMode

from addons.answers import Answer
from addons.judge import BAD_GATEWAY, TIMEOUT, Conversation, Unreachable
from policies.model import Reason, Verdict
from proxy.inspector import http1
from proxy.inspector.handover import Handover, gives_http2
from proxy.inspector.reading import MalformedHead
from proxy.inspector.side import Hold, Side
from proxy.inspector.streams import HTTP_1, HTTP_2, AbortConnection, ConnectionBroken, Frame, Stream

if TYPE_CHECKING:
    from proxy.inspector import http2
    from proxy.inspector.core import Core

LEAVE_S = 0.5  # at the end: who has asked nothing for so long is left; a request may be on its way until then
_MODE = ProxyMode.parse("transparent")
# What the layers read of mitmproxy's options. Its own Options copies a value deeply whenever one is read.
_OPTIONS = cast(
    Options,
    SimpleNamespace(
        body_size_limit=None,
        connection_strategy="lazy",
        keep_host_header=True,
        normalize_outbound_headers=False,
        proxy_debug=False,
        rawtcp=True,
        store_streamed_bodies=False,
        stream_large_bodies=None,
        validate_inbound_headers=True,
        websocket=False,
    ),
)


class Inspection:
    """Owns the sockets of both ends until the client's is closed."""

    _http: http1.Http | http2.Http

    def __init__(self, core: Core, handover: Handover) -> None:
        self.core = core
        self._conversation = Conversation(
            handover.workload,
            handover.port,
            handover.plain,
            handover.source,
            handover.host,
            handover.destination,
            user=handover.user,
            proxied=handover.proxied,
            credential=handover.credential,
        )
        client = Client(
            peername=handover.source,
            sockname=handover.destination or ("", handover.port),
            timestamp_start=handover.opened,
            proxy_mode=_MODE,
            state=ConnectionState.OPEN,
            sni=handover.host,
            tls=not handover.plain,
        )
        self.client = Side(self, client)
        self._multiplexed: http2.Http | None = None
        self._is_http2_wanted = False
        self._early: Side | Unreachable | None = None  # what became of dialling the origin before the first request
        self._sides: dict[Connection, Side] = {}
        self._resuming: set[Connection] = set()
        self._dials: dict[commands.OpenConnection, asyncio.Task[None]] = {}
        self._active = 0.0
        self._head: tuple[int, float] | None = None  # which head has begun and not ended, and since when
        self._is_half_closed = False
        self._is_congested = False  # over HTTP/1: the client takes nothing more for now
        self._is_broken = False
        if handover.plain:
            self._speak(HTTP_1)

    @property
    def source(self) -> str:
        return self._conversation.source[0]

    # --- which HTTP ---

    async def agree(self, offers: tuple[bytes, ...]) -> bytes:
        """The protocol that the client is given, of those it offers."""
        verdict = self.core.opening(self._conversation)
        is_given = gives_http2(getattr(verdict.rule, "http2", None), offers)
        alpn = await self._mirror(verdict, offers) if is_given else HTTP_1
        self._speak(alpn)
        return alpn

    async def _mirror(self, verdict: Verdict, offers: tuple[bytes, ...]) -> bytes:
        """What the origin speaks, if the client speaks it too; what the client prefers while nobody can say."""
        conversation = self._conversation
        preferred = next(offer for offer in offers if offer in (HTTP_1, HTTP_2))
        if not verdict.is_allow:
            return preferred
        spoken = self.core.origins.spoken(conversation)
        if spoken is None:
            conversation.allowed = verdict
            self._is_http2_wanted = True
            try:
                self._early = await self._dial(self._origin())
            except Unreachable as failure:
                self._early = failure
                return preferred
            spoken = self._early.connection.alpn or HTTP_1
        return HTTP_1 if spoken == HTTP_1 and HTTP_1 in offers else HTTP_2

    def _origin(self) -> Server:
        return Server(address=(self._conversation.opened_for or "", self._conversation.port))

    def _speak(self, alpn: bytes) -> None:
        client = self.client.connection
        assert isinstance(client, Client)
        client.alpn = alpn if client.tls else None
        context = Frame(client, _OPTIONS)
        context.server.address = self._origin().address
        context.server.tls = not self._conversation.plain
        self._is_http2_wanted = alpn == HTTP_2
        if alpn == HTTP_2:
            from proxy.inspector import http2  # here: most gates never need it

            self._http = self._multiplexed = http2.Http(
                context, self.core.hooks, self._refuse, self._cut_off, self._may_carry
            )
        else:
            self._http = http1.Http(context, self.core.hooks, self._refuse, self._may_carry)

    def discard(self) -> None:
        """The client did not come through its TLS handshake."""
        if isinstance(self._early, Side):
            self._early.transport.abort()

    # --- what the sockets say ---

    def made(self, side: Side) -> None:
        if side is not self.client:
            if _alpn(side.transport) == HTTP_2:
                side.hold(Hold.NOT_ADOPTED)  # its settings come at once
            return  # the dial that waits for it goes on
        client = side.connection
        client.timestamp_tls_setup = time.time() if client.tls else None
        self._sides[client] = side
        self.core.conversations[client.id] = self._conversation
        self.core.begin(self)
        self._feed(events.Start())
        if self.core.is_leaving:
            self.leave()
        if isinstance(early := self._early, Side):
            self._early = None
            if not early.transport.is_closing():
                self._adopt(early)

    def _adopt(self, side: Side) -> None:
        connection = side.connection
        assert isinstance(connection, Server)
        self._take_up(side)
        self._carry_out(self._http.adopt(connection))

    def received(self, side: Side, data: bytes) -> None:
        if side.connection in self._sides:
            self._feed(events.DataReceived(side.connection, data))
        else:
            side.close(abort=True)  # an origin that speaks before it was asked would answer the next request

    def half_closed(self, side: Side) -> bool:
        """Whether to keep the connection: a client on a plain port may end its side and still wait for the response."""
        self._is_half_closed = side is self.client and self._conversation.plain and self._owes_response()
        return self._is_half_closed

    def _owes_response(self) -> bool:
        return self._http.client_side.awaits_response or self._http.client_side.has_next

    def lost(self, side: Side, error: Exception | None) -> None:
        connection = side.connection
        if self._multiplexed:
            self._multiplexed.congested.discard(connection)
        if self._sides.pop(connection, None):
            connection.state = ConnectionState.CLOSED
            self._feed(ConnectionBroken(connection) if error else events.ConnectionClosed(connection))
        if side is self.client:
            self._end()

    def hold_others(self, slow: Side) -> None:
        """HTTP/2 has windows for what others may send to a slow reader; what it makes us say itself has none."""
        if self._multiplexed:
            self._multiplexed.congested.add(slow.connection)
            if slow is self.client:
                slow.hold(Hold.SLOW_READER)
            return
        self._is_congested = slow is self.client
        for side in self._sides.values():
            if side is not slow or self._is_congested:  # the client too: a denial is an answer without an origin
                side.hold(Hold.SLOW_READER)

    def release_others(self, slow: Side) -> None:
        self._active = asyncio.get_running_loop().time()
        if self._multiplexed:
            self._multiplexed.congested.discard(slow.connection)
            slow.release(Hold.SLOW_READER)
            self._carry_out(self._multiplexed.settle())
            return
        for side in self._sides.values():
            if side is not slow or slow is self.client:
                side.release(Hold.SLOW_READER)
        if slow is self.client:
            self._is_congested = False
            self._carry_out([])  # and go on with what it has sent already

    def check_deadlines(self, now: float) -> None:
        bounds = self.core.bounds
        if self.client.connection not in self._sides:
            return
        if self._head and now - self._head[1] > bounds.head_s:
            self._carry_out(self._http.refuse(MalformedHead(f"no whole head within {bounds.head_s:g} s", TIMEOUT)))
        elif self._multiplexed:
            self._carry_out(self._multiplexed.check(now, bounds.idle_s))
        elif self.core.is_leaving and now - self._active > LEAVE_S and self._is_between_requests():
            self._carry_out([commands.CloseConnection(self.client.connection)])
        elif now - self._active > bounds.idle_s and not self._dials:
            client_side = self._http.client_side
            if client_side.awaits_response:
                note = f"nothing moved for {bounds.idle_s:g} s"
                self._conversation.failure = Unreachable(Reason.UPSTREAM_TIMEOUT, note)
                self._drop_upstream()
            else:
                close = commands.CloseConnection if client_side.is_drained else AbortConnection
                self._carry_out([close(self.client.connection)])

    def _is_between_requests(self) -> bool:
        client_side = self._http.client_side
        return client_side.is_drained and not client_side.awaits_response

    def leave(self) -> None:
        """Ask the client to go elsewhere with what it has not sent yet: in HTTP/2 now, in HTTP/1 with the next answer.
        One of HTTP/1 that asks nothing is left."""
        if self.client.connection in self._sides:
            self._carry_out(self._http.leave())

    def cut(self) -> None:
        for side in {self.client, *self._sides.values()}:
            side.transport.abort()

    # --- what the layers say ---

    def _feed(self, event: events.Event) -> None:
        self._active = asyncio.get_running_loop().time()
        self._carry_out(self._http.handle_event(event))

    def _carry_out(self, made: Iterable[commands.Command]) -> None:
        """Do what the layers command, and what follows from it, until they have nothing more to say."""
        if self._is_broken:
            return
        following: deque[events.Event] = deque()
        try:
            while True:
                for command in made:
                    if (event := self._obey(command)) is not None:
                        following.append(event)
                if not following:
                    break
                made = self._http.handle_event(following.popleft())
            self._settle()
        except Exception as error:
            self._crash(error)

    def _obey(self, command: commands.Command) -> events.Event | None:
        match command:
            case commands.SendData():
                if side := self._sides.get(command.connection):
                    side.write(command.data)
            case commands.Log():
                pass  # the decision record says what happened
            case commands.OpenConnection():
                self._dials[command] = asyncio.create_task(self._open(command))
            case commands.CloseConnection():
                return self._close(command.connection, abort=isinstance(command, AbortConnection))
            case _:
                raise NotImplementedError(type(command).__name__)
        return None

    def _close(self, connection: Connection, *, abort: bool) -> events.Event | None:
        side = self._sides.pop(connection, None)
        if side is None:
            return None
        connection.state = ConnectionState.CLOSED
        side.close(abort=abort, unread=side is self.client and not self._http.client_side.is_drained)
        return events.ConnectionClosed(connection)

    def _settle(self) -> None:
        """What follows from the state that the layers are in now."""
        for side in tuple(self._sides.values()):
            side.flush()
        if self.client.connection not in self._sides:
            self._drop_upstream()
            return
        client_side = self._http.client_side
        (self.client.hold if client_side.is_ahead else self.client.release)(Hold.SENDS_AHEAD)
        if (begun := client_side.head_begun) is None:
            self._head = None
        elif self._head is None or self._head[0] != begun:
            self._head = begun, self._active
        if self._multiplexed:
            self._settle_streams(self._multiplexed)
        elif client_side.has_next and not self._is_congested:
            self._resume_soon(self.client.connection)
        elif self._is_half_closed and not self._owes_response():
            self._carry_out([commands.CloseConnection(self.client.connection)])

    def _settle_streams(self, multiplexed: http2.Http) -> None:
        for connection, side in tuple(self._sides.items()):
            (side.hold if multiplexed.is_stalled(connection) else side.release)(Hold.SLOW_READER)
            if not multiplexed.is_ahead(connection):
                side.release(Hold.SENDS_AHEAD)
                continue
            side.hold(Hold.SENDS_AHEAD)
            self._resume_soon(connection)

    def _resume_soon(self, connection: Connection) -> None:
        if connection not in self._resuming:
            self._resuming.add(connection)
            asyncio.get_running_loop().call_soon(self._resume, connection)

    def _resume(self, connection: Connection) -> None:
        """Read on in what was too much for one turn."""
        self._resuming.discard(connection)
        if connection in self._sides:
            self._feed(events.DataReceived(connection, b""))

    async def _open(self, command: commands.OpenConnection) -> None:
        fault = None
        try:
            self._take_up(await self._dial(command.connection))
        except Unreachable as failure:
            fault = failure
        except Exception as error:
            self._crash(error)
            return
        del self._dials[command]
        self._feed(events.OpenConnectionCompleted(command, fault))  # type: ignore[arg-type]  # theirs is a text
        self._feed(events.DataReceived(self.client.connection, b""))  # what came meanwhile is read now

    async def _dial(self, connection: Server) -> Side:
        """A connection to the origin of the latest allow. Raises Unreachable."""
        if isinstance(failure := self._early, Unreachable):
            self._early = None
            raise failure
        side = Side(self, connection)
        is_offered = self._is_http2_wanted
        transport = await self.core.upstream.open(self._conversation, lambda: side, http2=is_offered)
        if transport.is_closing():
            raise Unreachable(Reason.UPSTREAM_FAILED, "it spoke before it was asked, or closed at once")
        connection.alpn = _alpn(transport)
        if is_offered:
            self.core.origins.note(self._conversation, connection.alpn or HTTP_1)
        return side

    def _may_carry(self, connection: Server) -> bool:
        assert connection.peername
        return self.core.upstream.admits(self._conversation, connection.peername[0])

    def _take_up(self, side: Side) -> None:
        connection = side.connection
        connection.state = ConnectionState.OPEN
        connection.timestamp_start = time.time()
        connection.peername = side.transport.get_extra_info("peername")[:2]
        connection.sockname = side.transport.get_extra_info("sockname")[:2]
        self._sides[connection] = side
        side.release(Hold.NOT_ADOPTED)

    def _refuse(self, fault: MalformedHead) -> Answer:
        reason = Reason.HELLO_TIMEOUT if fault.status == TIMEOUT else Reason.MALFORMED_REQUEST
        return self.core.refuse(self._conversation, str(fault), fault.status, reason)

    def _cut_off(self, note: str, reason: Reason) -> None:
        self.core.refuse(self._conversation, note, None, reason)

    def _drop_upstream(self) -> None:
        dials, self._dials = self._dials, {}
        for command, task in dials.items():
            task.cancel()
            # The request that waits for it hears of its end only now.
            gone = Unreachable(Reason.CLIENT_GONE, "")
            self._feed(events.OpenConnectionCompleted(command, gone))  # type: ignore[arg-type]  # theirs is a text
        for connection in [one for one in self._sides if one is not self.client.connection]:
            if side := self._sides.pop(connection, None):
                side.close(abort=True)
            connection.state = ConnectionState.CLOSED
            self._feed(ConnectionBroken(connection))

    def _crash(self, error: Exception) -> None:
        """An exception of ours ends this connection alone; its requests are recorded, and answered if possible."""
        self._is_broken = True
        self.core.failed(error)
        try:
            self._account_for(type(error).__name__)
        except Exception as another:
            self.core.failed(another)
            self.cut()

    def _account_for(self, note: str) -> None:
        streams = [one for one in self._http.streams.values() if isinstance(one, Stream) and one.is_judged]
        for stream in streams:
            self._conversation.failure = Unreachable(Reason.GATE_FAILED, note)
            stream.call("error")
        reply = None
        if not streams:
            status = None if self._multiplexed else BAD_GATEWAY
            reply = self.core.refuse(self._conversation, note, status, Reason.GATE_FAILED)
        for command in self._http.abandon(reply):
            self._obey(command)
        self._drop_upstream()

    def _end(self) -> None:
        self._drop_upstream()
        for stream in self._http.streams.values():
            if isinstance(stream, Stream):
                stream.release()
        self.core.end(self)
        self.core.conversations.pop(self.client.connection.id, None)


def _alpn(transport: asyncio.BaseTransport) -> bytes | None:
    """What was agreed; None without TLS or where nothing was."""
    tls = transport.get_extra_info("ssl_object")
    spoken = tls.selected_alpn_protocol() if tls else None
    return spoken.encode("ascii") if spoken else None
