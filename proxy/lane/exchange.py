"""One request: judged, answered or carried, recorded. How its bytes are framed and moved is its parts' work.

    JUDGING ──▶ denied ───────────────────────────────▶ OVER
        └▶ allowed ──▶ OPENING ──▶ SENDING ──▶ WAITING ──▶ OVER
                                       └──────────┴──▶ TUNNEL ──▶ OVER

JUDGING  its head is here
OPENING  allowed; its connection to the origin is looked up, dialled and verified
SENDING  asked; the body of the request is under way (the answer may be as well)
WAITING  the whole request has been sent; its answer is under way
TUNNEL   the origin switched protocols, which the verdict admitted: bytes are carried as they are
OVER     recorded; its connection goes on to the next request, or ends
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING

from addons.answers import answer
from addons.judge import BAD_GATEWAY, BAD_REQUEST, PROXY_AUTHENTICATION, Judgement, Unreachable
from addons.outcome import Outcome
from policies.hostnames import Hostname
from policies.model import Reason
from proxy.lane.body import Body, Chunked, Sized, chunk, last_chunk
from proxy.lane.http1 import Refused, Request, Response
from proxy.lane.pool import REPEATABLE, pooling_policy
from proxy.lane.rendering import render_interim, render_request, render_response
from proxy.lane.upstream import Upstream

if TYPE_CHECKING:
    from proxy.lane.client import Client

LAST_S = 30.0  # for one end of a tunnel to finish when the other has


class State(Enum):
    JUDGING = auto()
    OPENING = auto()
    SENDING = auto()
    WAITING = auto()
    TUNNEL = auto()
    OVER = auto()


_CARRIED = frozenset({State.OPENING, State.SENDING, State.WAITING})


class Exchange:
    """Owns its connection to the origin from OPENING on, until the answer is whole: the client keeps it then."""

    __slots__ = ("_address", "_body", "_chunks", "_client", "_closes", "_commons", "_has_retried", "_head",
                 "_is_answered", "_is_recorded", "_judgement", "_received", "_request", "_sent", "_started", "_state",
                 "_status", "_upstream")  # fmt: skip

    def __init__(self, client: Client) -> None:
        self._client = client
        self._commons = client.commons
        self._state = State.JUDGING
        self._started = time.time()
        self._request: Request | None = None
        self._judgement: Judgement | None = None
        self._upstream: Upstream | None = None
        self._body: Body | None = None
        self._head = b""  # of the answer, as the client gets it with the first of the body
        self._status: int | None = None
        self._sent = self._received = 0
        self._address: tuple[str, int] | None = None
        self._is_answered = False  # the head of the answer is on its way
        self._chunks = self._closes = self._has_retried = self._is_recorded = False

    # --- JUDGING ---

    def begin(self, head: bytes) -> None:
        try:
            request = self._request = self._client.requests.read(head)
        except Refused as refused:
            self.refuse(refused.status, refused.why, refused.reason)
            return
        conversation = self._client.conversation
        judgement = self._commons.judge.heard(conversation, request.method, request.target, request.fields)
        self._judgement = judgement
        if not judgement.is_forward:
            self._answer(judgement)
        elif self._client.share.is_exceeded:
            self._fail(Reason.OVERLOADED, "")
        else:
            self._forward(request, judgement)

    # --- denied: an answer of ours ---

    def refuse(self, status: int, why: str, reason: Reason = Reason.MALFORMED_REQUEST) -> None:
        """What is no request is answered, and ends the connection."""
        self._judgement = self._commons.judge.unreadable(self._client.conversation, why, status=status, fault=reason)
        self._answer(self._judgement, closes=True)

    def _fail(self, reason: Reason, note: str, status: int | None = None) -> None:
        """An allowed request comes to nothing."""
        assert self._judgement is not None
        self.drop_upstream()
        judge = self._commons.judge
        if self._is_answered:
            self._judgement = judge.break_off(self._judgement, reason)
            self._record()
            self._client.end(cut=True)
            return
        self._judgement = judge.fail(self._judgement, reason, note, status)
        self._answer(self._judgement, closes=True)

    def _answer(self, judgement: Judgement, *, closes: bool = False) -> None:
        request = self._request
        closes = closes or judgement.closes or (request is not None and request.closes)
        made = answer(judgement, closes=closes)
        self._is_answered = True
        self._status = made.status
        self._received = len(made.body)
        self._client.side.write(made.to_bytes())
        self._record()
        if closes:
            self._client.say_last()
        else:
            self._client.read_next()

    # --- OPENING: an origin is found for it ---

    def _forward(self, request: Request, judgement: Judgement) -> None:
        fields = request.fields
        if fields.is_chunked:
            self._body = Chunked(in_request=True)
        elif fields.length:
            self._body = Sized(fields.length)
        kept, self._client.kept = self._client.kept, None
        if kept is None:
            self._open(judgement)
        elif kept.carries(judgement):
            self._upstream = kept
            kept.take(self)
            self._ask(kept)
        else:
            kept.close()
            self._open(judgement)

    def _open(self, judgement: Judgement) -> None:
        commons, attempt = self._commons, judgement.attempt
        may_repeat = self._body is None and not self._has_retried
        if may_repeat and (pooled := commons.pool.find(judgement)) is not None:
            self._upstream = pooled
            pooled.adopt(self, self._client.share)
            self._ask(pooled)
            return
        self._state = State.OPENING
        host, site = attempt.host or Hostname(""), commons.exit.site
        tunnels = not (attempt.plain and site is not None and site.carries(host))
        upstream = Upstream(commons, (attempt.workload, host, attempt.port), self, self._client.share)
        self._upstream = upstream
        self._client.patience.limit(commons.bounds.dial_s)
        upstream.open(judgement.verdict, plain=attempt.plain, tunnels=tunnels)

    def connected(self) -> None:
        self._client.patience.watch()
        if self._upstream is not None:
            self._ask(self._upstream)

    def unreachable(self, failure: Unreachable) -> None:
        self._client.patience.watch()
        self._fail(failure.reason, failure.note)

    # --- SENDING: the request goes out ---

    def _ask(self, upstream: Upstream) -> None:
        request, judgement, client = self._request, self._judgement, self._client
        assert request is not None
        assert judgement is not None
        to_proxy, site, attempt = upstream.is_shown_to_site, self._commons.exit.site, judgement.attempt
        try:
            authorization = site.authorization() if to_proxy and site is not None else None
        except Unreachable as failure:
            self._fail(failure.reason, failure.note)
            return
        head = render_request(
            request, attempt.host or "", attempt.target, to_proxy=to_proxy, authorization=authorization
        )
        self._address = upstream.address
        self._state = State.WAITING if self._body is None else State.SENDING
        upstream.ask(request, head)
        if self._body is not None and (data := client.take_ahead()):
            self._send_body(data)
        if self._state in _CARRIED:
            client.side.release()

    def take(self, data: bytes) -> bool:
        """More of what the client sends; False: it belongs to a later request, or has its turn later."""
        if self._state is State.SENDING:
            self._send_body(data)
        elif self._state is State.TUNNEL:
            self._sent += len(data)
            self._send(data)
        else:
            return False
        return True

    def _send_body(self, data: bytes) -> None:
        body, upstream = self._body, self._upstream
        assert body is not None
        if upstream is None:  # its answer came before its end, and closed; the rest is read by nobody
            return
        try:
            parts, done, rest = body.feed(data)
        except Refused as refused:
            self._fail(refused.reason, f"malformed request body: {refused.why}", BAD_REQUEST)
            return
        self._sent += sum(map(len, parts))
        if isinstance(body, Chunked):
            parts = chunk(parts)
            if done:
                parts.append(last_chunk(body.trailers))
        if done:
            self._state = State.WAITING
            self._client.put_back(rest)
        if parts:
            self._send(parts[0] if len(parts) == 1 else b"".join(parts))

    def _send(self, data: bytes) -> None:
        upstream = self._upstream
        if upstream is not None:
            upstream.write(data)
            if upstream.is_full:
                self._client.side.hold()

    def relieved(self) -> None:
        """The origin takes bytes again."""
        self._move()
        if self._state in (State.SENDING, State.TUNNEL):
            self._client.side.release()

    def _move(self) -> None:
        self._client.patience.active = self._commons.epoll.now

    # --- WAITING: the answer comes ---

    def interim(self, response: Response) -> None:
        request = self._request
        assert request is not None
        if response.status == 101:
            self._switch(response)
        elif request.minor and (response.status != 100 or request.fields.expects):  # RFC 9110 15.2
            self._client.side.write(render_interim(response))

    def answered(self, response: Response) -> None:
        request, upstream = self._request, self._upstream
        assert request is not None
        if response.status == PROXY_AUTHENTICATION and upstream is not None and upstream.is_shown_to_site:
            # Not the workload's to answer: it would give its own credentials away.
            self._fail(Reason.UPSTREAM_REFUSED, "the site's proxy answered 407: it wants credentials, or other ones")
            return
        self._move()
        fields, is_whole = response.fields, self._state is State.WAITING
        self._status = response.status
        self._closes = request.closes or not is_whole or self._client.is_half_closed or self._commons.is_leaving()
        self._chunks = response.has_body and fields.length is None and bool(request.minor)
        if response.has_body and fields.length is None and not request.minor:
            self._closes = True
        self._is_answered = True
        self._head = render_response(response, minor=request.minor, chunks=self._chunks, closes=self._closes)
        if not response.has_body:
            self._write_out([])

    def carry(self, parts: list[bytes]) -> None:
        self._move()
        self._received += sum(map(len, parts))
        self._write_out(chunk(parts) if self._chunks else parts)

    def _write_out(self, parts: list[bytes]) -> None:
        """To the client, with the head of the answer in front if it waits still."""
        side = self._client.side
        if self._head:
            parts = [self._head, *parts]
            self._head = b""
        if parts:
            side.write(parts[0] if len(parts) == 1 else b"".join(parts))
            if side.is_full and self._upstream is not None:
                self._upstream.hold()

    def drained(self) -> None:
        """The client takes bytes again."""
        if self._upstream is not None:
            self._upstream.release()

    def finished(self, trailers: bytes) -> None:
        self._write_out([last_chunk(trailers)] if self._chunks else [])
        self._record()
        if self._state is not State.WAITING:
            self.drop_upstream()
            self._client.say_last()
            return
        client, upstream, self._upstream = self._client, self._upstream, None
        self._state = State.OVER
        if upstream is not None and self._judgement is not None:
            upstream.pooled_by = pooling_policy(self._judgement)
            client.kept = upstream
        if self._closes:
            client.say_last()
            return
        client.read_next()
        client.read_on_later()

    def broke(self, note: str, *, stale: bool = False) -> None:
        """The origin gave no answer, or not the whole of it."""
        request, judgement = self._request, self._judgement
        assert request is not None
        assert judgement is not None
        self._upstream = None
        if stale and not self._has_retried:
            if request.method in REPEATABLE and self._body is None:
                self._has_retried = True
                self._open(judgement)
                return
            # Without us the client would see the same close, and try again if that is safe.
            self._break_off(Reason.UPSTREAM_FAILED)
            return
        self._fail(Reason.UPSTREAM_FAILED, note)

    # --- TUNNEL ---

    def _switch(self, response: Response) -> None:
        assert self._upstream is not None
        client = self._client
        self._state = State.TUNNEL
        self._is_answered = True
        self._status = response.status
        rest = self._upstream.switch()
        self._received += len(rest)
        client.side.write(render_interim(response) + rest)
        client.side.release()
        if data := client.take_ahead():
            self._sent += len(data)
            self._send(data)

    def tunnel_ended(self, error: Exception | None) -> None:
        """The origin's end."""
        self._end_half(error, self._client.side.end_writing)

    def _end_half(self, error: Exception | None, tell_other: Callable[[], None]) -> None:
        """One end. The other may go on for a while, as it may when no tunnel is in between."""
        if error is not None or self._client.is_half_closed:
            self._finish_tunnel()
            return
        self._client.is_half_closed = True
        tell_other()
        self._client.patience.limit(LAST_S)

    def _finish_tunnel(self) -> None:
        self._record()
        self._client.end()

    # --- OVER ---

    def client_ended(self, error: Exception | None) -> None:
        """The client sends nothing more: it has said all it had to, or is gone."""
        if self._state is State.TUNNEL and self._upstream is not None:
            self._end_half(error, self._upstream.end_writing)
            return
        has_sent_all = self._body is None or self._state is State.WAITING
        if error is None and has_sent_all and not self._client.is_half_closed:
            self._client.is_half_closed = True
        else:
            self._break_off(Reason.CLIENT_GONE)

    def _break_off(self, reason: Reason) -> None:
        assert self._judgement is not None
        self._judgement = self._commons.judge.break_off(self._judgement, reason)
        self._record()
        self._client.end()

    def drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    def _record(self) -> None:
        assert self._judgement is not None
        self._is_recorded = True
        self._commons.report(
            Outcome(
                self._judgement,
                self._client.conversation,
                self._started,
                self._address,
                self._status,
                self._sent,
                self._received,
            )
        )

    def run_late(self) -> None:
        """The step under way has reached its limit."""
        if self._state is State.TUNNEL:
            self._finish_tunnel()
        else:
            self._fail(Reason.UPSTREAM_TIMEOUT, f"no connection within {self._commons.bounds.dial_s:g} s")

    def run_idle(self) -> None:
        """Nothing has moved for long."""
        if self._state is State.TUNNEL:
            self._finish_tunnel()
        elif self._state is State.SENDING:
            self._break_off(Reason.CLIENT_GONE)
        else:
            self._fail(Reason.UPSTREAM_TIMEOUT, f"nothing moved for {self._commons.bounds.idle_s:g} s")

    @property
    def moved(self) -> int | None:
        """How many bytes have gone on. None: nobody owes any (chunks, a tunnel, a long poll), and none wait."""
        side, upstream = self._client.side, self._upstream
        owes = self._state is State.SENDING and isinstance(self._body, Sized)
        if not (side.pending or owes or (upstream and upstream.owes_rest)):
            return None
        return self._sent + self._received + side.sent + (upstream.taken if upstream else 0)

    def run_slow(self, why: str) -> None:
        """It takes longer than it may."""
        is_the_client = self._state is State.SENDING and self._upstream is not None and not self._upstream.is_full
        self._fail(Reason.TOO_SLOW, why, None if is_the_client else BAD_GATEWAY)

    def abort(self) -> None:
        """The gate has ended."""
        if self._state is State.TUNNEL:
            self._finish_tunnel()
        else:
            self._break_off(Reason.CLIENT_GONE)

    def failed(self, error: Exception) -> None:
        self._client.failed(error)

    def fail_by_fault(self, note: str) -> None:
        """A fault of ours."""
        if self._is_recorded:
            self._client.end(cut=True)
        elif self._judgement is None:
            self.refuse(BAD_GATEWAY, note, Reason.GATE_FAILED)
        else:
            self._fail(Reason.GATE_FAILED, note)
