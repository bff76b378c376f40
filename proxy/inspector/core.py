"""Every connection under inspection: takes them over, keeps bounds and deadlines, and lets go of them.

mitmproxy's HTTP layers work on them (`inspection`) without its Master. TLS is the standard library's and ends in the
transports, so the layers see HTTP alone. Hooks are called where they are met instead of in a task each; that, and
options that are plain attributes, is most of what an embedded request saves.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from addons.answers import Answer
from addons.judge import Conversation
from addons.upstream import Upstream
from policies.model import Reason, Verdict
from proxy.inspector.handover import Bounds, Handover
from proxy.inspector.inspection import Inspection
from proxy.inspector.minting import NoLeaf
from proxy.inspector.side import Hold
from proxy.inspector.streams import Hooks
from proxy.wire.client_hello import MAX_HELLO, Alert, MalformedHello, parse_hello, render_alert

SWEEP_S = 1.0
ORIGIN_S = 600.0  # an origin that changes its protocol is asked again after so long
MAX_ORIGINS = 4096
AGAIN_S = 60.0  # before a person is told again that there are no leaves


def hooks_of(addons: Sequence[object]) -> Hooks:
    """The hooks that the layers call, by name, in the order of `addons`; a whole response passes them from the last
    to the first, for the first ones write what the client got."""
    names = ("requestheaders", "request", "responseheaders", "response", "error")
    hooks = {name: [getattr(addon, name) for addon in addons if hasattr(addon, name)] for name in names}
    hooks["response"].reverse()
    return hooks


class Core:
    """Every connection that is being inspected.

    context_of  the TLS context that shows a host's leaf and speaks one protocol (ALPN); raises NoLeaf
    opening     the verdict on a connection's TLS
    refuse  judges and records what is no request; gives the answer. Without a status there will be none
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
        context_of: Callable[[str, bytes], Awaitable[ssl.SSLContext]],
        opening: Callable[[Conversation], Verdict],
        refuse: Callable[[Conversation, str, int | None, Reason], Answer],
        lost: Callable[[Handover, Reason, str], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.hooks = hooks_of(addons)
        self.upstream = upstream
        self.conversations = conversations
        self.bounds = bounds
        self.opening = opening
        self.refuse = refuse
        self.origins = Origins()
        self.failed = failed
        self._context_of = context_of
        self._lost = lost
        self._inspections: set[Inspection] = set()
        self._by_source: Counter[str] = Counter()  # those that begin, and those in `_inspections`
        self.is_leaving = False
        self._is_held = False
        self._is_told_until = 0.0
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
        except NoLeaf as error:
            _turn_down(sock)
            self._lost(handover, Reason.GATE_FAILED, str(error))
            self._tell_of(error)
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
            return
        protocol = await inspection.agree(_offers(sock))
        try:
            context = await self._context_of(handover.host or "", protocol)  # the newest: after whatever was awaited
            await inspection.client.accept_tls(sock, context, self.bounds.handshake_s)
        except BaseException:
            inspection.discard()
            raise

    def _tell_of(self, error: NoLeaf) -> None:
        """Now and then: while there are no leaves, every connection would say so."""
        now = asyncio.get_running_loop().time()
        if now >= self._is_told_until:
            self._is_told_until = now + AGAIN_S
            self.failed(error)

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
    def open_connections(self) -> int:
        """How many are inspected now, those that begin included."""
        return self._by_source.total()

    @property
    def is_idle(self) -> bool:
        """No connection is open."""
        return not self._inspections

    def hold(self, is_held: bool) -> None:
        """Read no more requests while the gate is behind with our records."""
        self._is_held = is_held
        for inspection in self._inspections:
            (inspection.client.hold if is_held else inspection.client.release)(Hold.RECORDS)

    def leave(self) -> None:
        """Ask every client to go elsewhere; what is under way goes on."""
        self.is_leaving = True
        for inspection in tuple(self._inspections):
            inspection.leave()

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


class Origins:
    """Which HTTP origins spoke lately, so that only the first connection has to find out before it answers."""

    def __init__(self) -> None:
        self._spoken: OrderedDict[object, tuple[bytes, float]] = OrderedDict()

    def spoken(self, conversation: Conversation) -> bytes | None:
        """`h2` or `http/1.1`; None: nobody knows."""
        protocol, until = self._spoken.get(_origin_of(conversation), (None, 0.0))
        return protocol if asyncio.get_running_loop().time() < until else None

    def note(self, conversation: Conversation, protocol: bytes) -> None:
        origin = _origin_of(conversation)
        self._spoken[origin] = protocol, asyncio.get_running_loop().time() + ORIGIN_S
        self._spoken.move_to_end(origin)
        if len(self._spoken) > MAX_ORIGINS:
            self._spoken.popitem(last=False)


def _origin_of(conversation: Conversation) -> object:
    """Each workload finds out for itself: what one has reached is no other's to know."""
    return conversation.workload, conversation.opened_for, conversation.port


def _offers(sock: socket.socket) -> tuple[bytes, ...]:
    """The protocols that the ClientHello offers, which is left in the kernel's queue for TLS to read."""
    try:
        hello = parse_hello(sock.recv(MAX_HELLO, socket.MSG_PEEK))
    except (MalformedHello, BlockingIOError):  # TLS itself will say what is wrong with it
        return ()
    return hello.alpn if hello else ()


def _turn_down(sock: socket.socket) -> None:
    """Say that it is our fault, and close."""
    with sock, suppress(OSError):  # the client is gone: that it came to nothing is recorded
        sock.recv(MAX_HELLO)  # bytes left in the queue would turn the close into a reset
        sock.send(render_alert(Alert.INTERNAL_ERROR))


def _tls_reason(error: ssl.SSLError) -> Reason:
    """A client that does not know our CA says so in an alert (RFC 8446 6.2); what else fails is no hello of ours."""
    alert = error.reason or ""
    is_refusal = "ALERT" in alert and ("CERTIFICATE" in alert or "UNKNOWN_CA" in alert)
    return Reason.CLIENT_CERTIFICATE_REFUSED if is_refusal else Reason.MALFORMED_HELLO
