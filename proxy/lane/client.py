"""One connection of a client: its handshake, the heads of its requests, its end. `exchange` answers and carries them.

    TLS ──▶ HEAD ──▶ BUSY ──▶ HEAD … ──▶ LAST ──▶ OVER

TLS   its handshake is under way
HEAD  no whole request head yet; between requests, too
BUSY  one request is under way
LAST  the last answer is on its way out, and nothing more is read
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum, auto

from addons.judge import BAD_GATEWAY, TIMEOUT, TOO_LARGE, UNAVAILABLE, Conversation
from policies.model import Reason
from proxy.inspector.handover import Handover
from proxy.lane.bounds import Share
from proxy.lane.commons import Commons
from proxy.lane.exchange import Exchange
from proxy.lane.http1 import MAX_HEAD, RequestReader, find_end
from proxy.lane.pace import Pace
from proxy.lane.patience import Patience
from proxy.lane.side import Side
from proxy.lane.tls import explain_client
from proxy.lane.upstream import Upstream

AHEAD = 64 * 1024  # bytes of later requests that are held; more stay in the client's own buffers
DENIALS = 8  # of requests sent ahead, answered before others have their turn
LEAVE_S = 0.5  # when the gate ends: who has asked nothing for so long is left
LAST_S = 30.0  # for a client to take its last answer


class State(Enum):
    TLS = auto()
    HEAD = auto()
    BUSY = auto()
    LAST = auto()
    OVER = auto()


class Client:
    """Owns the client's socket until it is closed; `over` is called then.

    side            its end of the connection, as bytes
    kept            a connection to an origin, between the requests that are sent on it
    requests        reads their heads
    is_half_closed  it sends nothing more, and waits for its answer
    """

    __slots__ = ("_buffer", "_counted", "_exchange", "_handover", "_is_gone", "_over", "_pace", "_searched",
                 "_state", "commons", "conversation", "is_half_closed", "kept", "patience", "requests", "share",
                 "side")  # fmt: skip

    def __init__(
        self,
        commons: Commons,
        side_of: Callable[[Client], Side],
        handover: Handover,
        share: Share,
        over: Callable[[Client], None],
    ) -> None:
        self.commons = commons
        self.share = share
        self.side = side_of(self)
        self.kept: Upstream | None = None
        self.is_half_closed = False
        self.requests = RequestReader()
        self.conversation = Conversation(
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
        self.patience = Patience(
            commons.epoll,
            commons.bounds.idle_s,
            late=self._run_late,
            idle=self._run_idle,
            look=self._look,
            failed=self.failed,
        )
        bounds = commons.bounds
        self._pace = Pace(least_rate=bounds.least_rate, window_s=bounds.idle_s, total_s=bounds.total_s)
        self._handover = handover
        self._over = over
        self._state = State.HEAD if handover.plain else State.TLS
        self._exchange: Exchange | None = None  # the request under way
        self._buffer = b""  # of the client, not read yet
        self._searched = 0
        self._counted = 0  # of the buffer, in the share
        self._is_gone = False  # its socket is closed, or is being parted with

    # --- TLS ---

    def begin(self, context: ssl.SSLContext | None) -> None:
        """With TLS under `context`, or as it is. Raises OSError, ValueError."""
        if context is None:
            self.side.begin()
            self.read_next()
        else:
            self.patience.limit(self.commons.bounds.handshake_s)
            self.side.begin_tls(context)

    def opened(self) -> None:
        self.read_next()

    def _lose_handshake(self, reason: Reason, what: str) -> None:
        self.commons.lost(self._handover, reason, what)
        self.end()

    # --- HEAD: a request is read ---

    def read_next(self) -> None:
        """Wait for the next request; one that came already is read at the loop's next turn."""
        self._state = State.HEAD
        self._exchange = None
        self.patience.active = self.commons.epoll.now
        self.patience.watch()
        if self.is_half_closed and not self._buffer:
            self.say_last()
            return
        self.side.release()

    def received(self, data: bytes) -> None:
        self.patience.active = self.commons.epoll.now
        if self._state is State.HEAD:
            self._buffer = self._buffer + data if self._buffer else data
            self._read_heads()
        elif self._exchange is None or not self._exchange.take(data):  # ahead of its turn
            self._buffer += data
            if len(self._buffer) > AHEAD:
                self.side.hold()
        if len(self._buffer) != self._counted:
            self._count_buffer()

    def _count_buffer(self) -> None:
        self.share.add(len(self._buffer) - self._counted)
        self._counted = len(self._buffer)

    def _read_heads(self) -> None:
        """Read one head after the other, as long as each is answered at once."""
        for _ in range(DENIALS):
            if self._state is not State.HEAD or not self._buffer:
                return
            if self.side.is_full:
                self.side.hold()  # until `drained`: it asks, and does not read its answers
                return
            if not self._read_head():
                return
        if self._state is State.HEAD and self._buffer:
            self.side.hold()
            self.read_on_later()

    def read_on_later(self) -> None:
        if self._buffer:
            self.commons.later(self._read_on)

    def _read_on(self) -> None:
        """Go on with what came ahead of its turn."""
        try:
            if self._state is State.HEAD:
                self.side.release()
                self._read_heads()
                self._count_buffer()
        except Exception as error:
            self.commons.epoll.contain(self.failed, error)

    def _read_head(self) -> bool:
        """False: more of it is needed."""
        buffer = self._buffer
        end = find_end(buffer, self._searched)
        if max(end, 0 if end else len(buffer)) > MAX_HEAD:
            self._begin_exchange().refuse(TOO_LARGE, f"the head is larger than {MAX_HEAD // 1024} KiB")
            return True
        if not end:
            if self.share.is_exceeded:
                self._begin_exchange().refuse(UNAVAILABLE, "", Reason.OVERLOADED)
                return True
            if not self._searched:
                self.patience.limit(self.commons.bounds.head_s)
            self._searched = max(1, len(buffer) - 3)
            return False
        if self._searched:
            self._searched = 0
            self.patience.watch()
        self._buffer = buffer[end:]
        self._begin_exchange().begin(buffer[:end])
        return True

    def _begin_exchange(self) -> Exchange:
        self._state = State.BUSY
        self._exchange = exchange = Exchange(self)
        return exchange

    # --- BUSY: what the exchange asks for ---

    def take_ahead(self) -> bytes:
        """What came behind the head that was read last."""
        data, self._buffer = self._buffer, b""
        self._count_buffer()
        return data

    def put_back(self, data: bytes) -> None:
        """These bytes begin the next request."""
        self._buffer = data
        self._count_buffer()

    def say_last(self) -> None:
        """The answer that was written is the last one: say goodbye once it has been taken."""
        self._state = State.LAST
        self._drop_kept()
        self.patience.limit(LAST_S)
        self.side.hold()
        if not self.side.pending:
            self._part()

    def end(self, *, cut: bool = False) -> None:
        """Close both ends now. Whatever fails on the way, the rest is done."""
        if self._is_gone:
            return
        self._is_gone = True
        self._state = State.OVER
        exchange, self._exchange = self._exchange, None
        with ExitStack() as steps:  # from the last one on
            steps.callback(self._over, self)
            steps.callback(self.side.cut if cut else self.side.close)
            steps.callback(self.take_ahead)
            steps.callback(self._drop_kept)
            if exchange is not None:
                steps.callback(exchange.drop_upstream)
            steps.callback(self.patience.stop)

    # --- the end ---

    def _part(self) -> None:
        self._state = State.OVER
        self.patience.stop()
        self._exchange = None
        self.take_ahead()
        self.side.part(lambda: self._over(self))
        self._is_gone = True

    def _drop_kept(self) -> None:
        if self.kept is not None:
            self.commons.pool.park(self.kept)
            self.kept = None

    def drained(self) -> None:
        """The client has taken what waited for it, or nearly."""
        self.patience.active = self.commons.epoll.now
        if self._state is State.LAST:
            if not self.side.pending:
                self._part()
        elif self._state is State.HEAD:
            self._read_on()
        elif self._exchange is not None:
            self._exchange.drained()

    def ended(self, error: Exception | None) -> None:
        """The client sends nothing more."""
        if self._state is State.TLS:
            self._lose_handshake(*explain_client(error))
        elif self._state is State.BUSY and self._exchange is not None:
            self._exchange.client_ended(error)
        else:
            self.end()

    # --- deadlines ---

    def _run_late(self) -> None:
        bounds = self.commons.bounds
        if self._state is State.TLS:
            self._lose_handshake(Reason.HELLO_TIMEOUT, "")
        elif self._state is State.HEAD:
            why = f"no whole head within {bounds.head_s:g} s"
            self._begin_exchange().refuse(TIMEOUT, why, Reason.HELLO_TIMEOUT)
        elif self._state is State.BUSY and self._exchange is not None:
            self._exchange.run_late()
        else:
            self.end(cut=True)

    def _run_idle(self) -> None:
        if self._state is State.HEAD:
            self.say_last()
        elif self._state is State.BUSY and self.side.pending:
            self._look(self.commons.epoll.now)  # it takes what waits, if by bits that `drained` does not tell
        elif self._state is State.BUSY and self._exchange is not None:
            self._exchange.run_idle()
        elif self._state is State.TLS:
            self._lose_handshake(Reason.HELLO_TIMEOUT, "")
        else:
            self.end(cut=True)

    def _look(self, now: float) -> None:
        exchange = self._exchange
        if self._state is not State.BUSY or exchange is None:
            return
        if why := self._pace.look(now, exchange, exchange.moved):
            exchange.run_slow(why)

    # --- the gate ---

    def leave(self) -> None:
        """The gate ends: go, if the client has asked nothing for a moment."""
        if self._state is State.HEAD and not self._buffer and self.commons.epoll.now - self.patience.active > LEAVE_S:
            self.say_last()

    def abort(self) -> None:
        """The gate has ended."""
        self.side.abandon()
        if self._state is State.TLS:
            self._lose_handshake(Reason.CLIENT_GONE, "the gate stopped")
        elif self._state is State.BUSY and self._exchange is not None:
            self._exchange.abort()
        else:
            self.end()

    def failed(self, error: Exception) -> None:
        """A fault of ours ends this connection, recorded, and answered where that is possible."""
        try:
            self._account_for(type(error).__name__)
        except Exception:
            self.end(cut=True)
            raise

    def _account_for(self, note: str) -> None:
        if self._state is State.TLS:
            self._lose_handshake(Reason.GATE_FAILED, note)
        elif self._state is State.HEAD:
            self._begin_exchange().refuse(BAD_GATEWAY, note, Reason.GATE_FAILED)
        elif self._state is State.BUSY and self._exchange is not None:
            self._exchange.fail_by_fault(note)
        else:
            self.end(cut=True)
