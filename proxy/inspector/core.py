"""mitmproxy's HTTP layers at work on sockets, without its Master: the addons decide, this moves bytes and keeps bounds.

TLS is the standard library's and ends in the transports, so the layers see HTTP alone. Hooks are called where they are
met instead of in a task each; that, and options that are plain attributes, is most of what an embedded request saves.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import cast

from mitmproxy.connection import Client, Connection, ConnectionState
from mitmproxy.options import Options
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.mode_specs import ProxyMode

from addons.judge import BAD_GATEWAY, TIMEOUT, Conversation, Unreachable
from addons.upstream import Upstream
from policies.model import Reason
from proxy.inspector.handover import Bounds, Handover
from proxy.inspector.http1 import AbortConnection, ConnectionBroken, Frame, Hooks, Http, Stream
from proxy.inspector.reading import MalformedHead
from proxy.inspector.side import Hold, Side

SWEEP_S = 1.0

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


def hooks_of(addons: Sequence[object]) -> Hooks:
    """The hooks that the layers call, by name, in the order of `addons`."""
    names = ("requestheaders", "responseheaders", "response", "error")
    return {name: [getattr(addon, name) for addon in addons if hasattr(addon, name)] for name in names}


class Core:
    """Every connection that is being inspected.

    refuse  judges and records what is no request; gives the bytes of the answer
    lost    told of a connection whose TLS handshake failed, with what went wrong
    failed  told of an exception of ours, so that a person hears of it
    """

    def __init__(
        self,
        addons: Sequence[object],
        upstream: Upstream,
        conversations: dict[str, Conversation],
        bounds: Bounds,
        *,
        context_of: Callable[[str], ssl.SSLContext],
        refuse: Callable[[Conversation, str, int, Reason], bytes],
        lost: Callable[[Handover, Reason, str], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.hooks = hooks_of(addons)
        self.upstream = upstream
        self.conversations = conversations
        self.bounds = bounds
        self.refuse = refuse
        self.failed = failed
        self._context_of = context_of
        self._lost = lost
        self._inspections: set[Inspection] = set()
        self._by_source: Counter[str] = Counter()  # those that begin, and those in `_inspections`
        self._is_held = False
        self._sweeper: asyncio.TimerHandle | None = None

    async def serve(self, sock: socket.socket, handover: Handover) -> None:
        """Take over one connection: TLS first, where it has TLS. Every end of it is recorded."""
        source = handover.source[0]
        if self._by_source.total() >= self.bounds.connections or self._by_source[source] >= self.bounds.per_source:
            sock.close()
            self.turn_away(handover)
            return
        self._by_source[source] += 1
        try:
            await self._start(sock, handover)
        except ssl.SSLError as error:
            self._lost(handover, _tls_reason(error), error.reason or "")
        except ConnectionAbortedError as error:  # asyncio's handshake deadline
            self._lost(handover, Reason.HELLO_TIMEOUT, str(error))
        except OSError as error:
            self._lost(handover, Reason.CLIENT_GONE, errno.errorcode.get(error.errno or 0, ""))
        except asyncio.CancelledError:
            self._lost(handover, Reason.CLIENT_GONE, "the gate stopped")
            raise
        except Exception as error:
            sock.close()
            self._lost(handover, Reason.GATE_FAILED, type(error).__name__)
            self.failed(error)
        finally:
            self._leave(source)

    async def _start(self, sock: socket.socket, handover: Handover) -> None:
        inspection = Inspection(self, handover)
        loop = asyncio.get_running_loop()
        if handover.plain:
            await loop.connect_accepted_socket(lambda: inspection.client, sock)
        else:
            await loop.connect_accepted_socket(
                lambda: inspection.client,
                sock,
                ssl=self._context_of(handover.host or ""),
                ssl_handshake_timeout=self.bounds.handshake_s,
            )

    def turn_away(self, handover: Handover) -> None:
        """Record a connection that is one too many, or that came when descriptors had run out."""
        self._lost(handover, Reason.TOO_MANY_CONNECTIONS, "")

    def begin(self, inspection: Inspection) -> None:
        self._inspections.add(inspection)
        self._by_source[inspection.source] += 1
        if self._is_held:
            inspection.client.hold(Hold.RECORDS)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def end(self, inspection: Inspection) -> None:
        if inspection in self._inspections:
            self._inspections.remove(inspection)
            self._leave(inspection.source)

    def _leave(self, source: str) -> None:
        self._by_source[source] -= 1
        if not self._by_source[source]:
            del self._by_source[source]

    @property
    def is_idle(self) -> bool:
        """No connection is open."""
        return not self._inspections

    def hold(self, is_held: bool) -> None:
        """Read no more requests while the gate is behind with our records."""
        self._is_held = is_held
        for inspection in self._inspections:
            (inspection.client.hold if is_held else inspection.client.release)(Hold.RECORDS)

    def close(self) -> None:
        """Cut every connection."""
        if self._sweeper:
            self._sweeper.cancel()
        for inspection in tuple(self._inspections):
            inspection.cut()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for inspection in tuple(self._inspections):
            inspection.check_deadlines(loop.time())
        self._sweeper = loop.call_later(SWEEP_S, self._sweep) if self._inspections else None


class Inspection:
    """One client connection and the upstream connection beside it."""

    def __init__(self, core: Core, handover: Handover) -> None:
        self.core = core
        self._conversation = Conversation(
            handover.workload, handover.port, handover.plain, handover.source, handover.host, handover.destination
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
        context = Frame(client, _OPTIONS)
        context.server.address = (handover.host or "", handover.port)
        context.server.tls = not handover.plain
        self.client = Side(self, client)
        self._http = Http(context, core.hooks, self._refuse)
        self._sides: dict[Connection, Side] = {}
        self._dial: asyncio.Task[None] | None = None
        self._dialled_for: commands.OpenConnection | None = None
        self._active = 0.0
        self._head_since: float | None = None
        self._is_half_closed = False
        self._is_broken = False

    @property
    def source(self) -> str:
        return self._conversation.source[0]

    # --- what the sockets say ---

    def made(self, side: Side) -> None:
        if side is not self.client:
            return  # the dial that waits for it goes on
        client = side.connection
        client.timestamp_tls_setup = time.time() if client.tls else None
        self._sides[client] = side
        self.core.conversations[client.id] = self._conversation
        self.core.begin(self)
        self._feed(events.Start())

    def received(self, side: Side, data: bytes) -> None:
        if side.connection in self._sides:
            self._feed(events.DataReceived(side.connection, data))
        else:
            side.close(abort=True)  # an origin that speaks before it was asked would answer the next request

    def half_closed(self, side: Side) -> bool:
        """Whether to keep the connection: a client on a plain port may end its side and still wait for the response."""
        self._is_half_closed = (
            side is self.client and self._conversation.plain and self._http.client_side.awaits_response
        )
        return self._is_half_closed

    def lost(self, side: Side, error: Exception | None) -> None:
        connection = side.connection
        if self._sides.pop(connection, None):
            connection.state = ConnectionState.CLOSED
            self._feed(ConnectionBroken(connection) if error else events.ConnectionClosed(connection))
        if side is self.client:
            self._end()

    def hold_others(self, slow: Side) -> None:
        for side in self._sides.values():
            if side is not slow:
                side.hold(Hold.SLOW_READER)

    def release_others(self, slow: Side) -> None:
        self._active = asyncio.get_running_loop().time()
        for side in self._sides.values():
            if side is not slow:
                side.release(Hold.SLOW_READER)

    def check_deadlines(self, now: float) -> None:
        bounds, client_side = self.core.bounds, self._http.client_side
        if self.client.connection not in self._sides:
            return
        if self._head_since is not None and now - self._head_since > bounds.head_s:
            self._carry_out(client_side.refuse(MalformedHead(f"no whole head within {bounds.head_s:g} s", TIMEOUT)))
        elif now - self._active > bounds.idle_s and not self._dial:
            if client_side.awaits_response:
                note = f"nothing moved for {bounds.idle_s:g} s"
                self._conversation.failure = Unreachable(Reason.UPSTREAM_TIMEOUT, note)
                self._drop_upstream()
            else:
                close = commands.CloseConnection if client_side.is_drained else AbortConnection
                self._carry_out([close(self.client.connection)])

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
                self._dialled_for = command
                self._dial = asyncio.create_task(self._open(command))
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
        if not client_side.buf or not client_side.awaits_head:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self._active
        if self._is_half_closed and not client_side.awaits_response:
            self._carry_out([commands.CloseConnection(self.client.connection)])

    async def _open(self, command: commands.OpenConnection) -> None:
        connection = command.connection
        side = Side(self, connection)
        fault = None
        try:
            transport = await self.core.upstream.open(self._conversation, lambda: side)
            if transport.is_closing():
                raise Unreachable(Reason.UPSTREAM_FAILED, "it spoke before it was asked, or closed at once")
        except Unreachable as failure:
            self._conversation.failure = failure
            fault = str(failure)
        except Exception as error:
            self._crash(error)
            return
        else:
            connection.state = ConnectionState.OPEN
            connection.timestamp_start = time.time()
            connection.peername = transport.get_extra_info("peername")[:2]
            connection.sockname = transport.get_extra_info("sockname")[:2]
            self._sides[connection] = side
        self._dial = None
        self._feed(events.OpenConnectionCompleted(command, fault))
        self._feed(events.DataReceived(self.client.connection, b""))  # what came meanwhile is read now

    def _refuse(self, fault: MalformedHead) -> bytes:
        reason = Reason.HELLO_TIMEOUT if fault.status == TIMEOUT else Reason.MALFORMED_REQUEST
        return self.core.refuse(self._conversation, str(fault), fault.status, reason)

    def _drop_upstream(self) -> None:
        if self._dial and self._dialled_for:
            self._dial.cancel()
            self._dial = None
            # The request that waits for it hears of its end only now.
            self._feed(events.OpenConnectionCompleted(self._dialled_for, "given up"))
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
        client_side = self._http.client_side
        streams = [one for one in self._http.streams.values() if isinstance(one, Stream) and one.is_judged]
        for stream in streams:
            self._conversation.failure = Unreachable(Reason.GATE_FAILED, note)
            stream.call("error")
        if not streams:
            reply = self.core.refuse(self._conversation, note, BAD_GATEWAY, Reason.GATE_FAILED)
            if client_side.response is None:
                self._obey(commands.SendData(self.client.connection, reply))
        for command in client_side.end(streams[0] if streams else None):
            self._obey(command)
        self._drop_upstream()

    def _end(self) -> None:
        self._drop_upstream()
        self.core.end(self)
        self.core.conversations.pop(self.client.connection.id, None)


def _tls_reason(error: ssl.SSLError) -> Reason:
    """A client that does not know our CA says so in an alert (RFC 8446 6.2); what else fails is no hello of ours."""
    alert = error.reason or ""
    is_refusal = "ALERT" in alert and ("CERTIFICATE" in alert or "UNKNOWN_CA" in alert)
    return Reason.CLIENT_CERTIFICATE_REFUSED if is_refusal else Reason.MALFORMED_HELLO
