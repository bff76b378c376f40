"""The connection to an origin, for one exchange at a time: dialled and verified, asked, and its answer read strictly.

It tells its asker what the origin said, piece by piece; what the client hears of a failure is the asker's matter.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from enum import Enum, auto
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Protocol

from addons.judge import Judgement, Unreachable
from policies.engine import admit
from policies.model import Address, Reason, Verdict
from proxy.lane.body import Body, Chunked, Sized, UntilClose
from proxy.lane.http1 import MAX_HEAD, Refused, Request, Response, ResponseReader, find_end
from proxy.lane.side import Side
from proxy.lane.tls import explain_origin
from proxy.way_out import WayOut

if TYPE_CHECKING:
    from proxy.lane.bounds import Share
    from proxy.lane.commons import Commons
    from proxy.lane.pool import Key
    from proxy.lane.tls import Origin

_NOWHERE = IPv4Address(0)  # a name is dialled; no rule reaches this address
MAX_INTERIM = 32  # an origin could send them for ever


class Asker(Protocol):
    """Who waits for an answer.

    connected     it may be asked
    unreachable   there will be no connection
    interim       a response before the response, 101 too
    answered      the head of the response; what of its body is there follows, then `finished`
    carry         bytes of the body; of a tunnel
    finished      the response is whole
    broke         there will be no response, or no more of it; `stale`: a kept connection that closed as it was asked
    tunnel_ended  the origin sends nothing more; the error as `Owner.ended` has it
    relieved      it takes bytes again
    """

    def connected(self) -> None: ...
    def unreachable(self, failure: Unreachable) -> None: ...
    def interim(self, response: Response) -> None: ...
    def answered(self, response: Response) -> None: ...
    def carry(self, parts: list[bytes]) -> None: ...
    def finished(self, trailers: bytes) -> None: ...
    def broke(self, note: str, *, stale: bool = False) -> None: ...
    def tunnel_ended(self, error: Exception | None) -> None: ...
    def relieved(self) -> None: ...
    def failed(self, error: Exception) -> None: ...


class Stage(Enum):
    """Where it stands. An answer that came whole, and left nothing behind, makes it IDLE again."""

    OPENING = auto()  # looked up, dialled, verified
    IDLE = auto()
    HEAD = auto()  # asked; no whole head yet
    BODY = auto()
    TUNNEL = auto()
    OVER = auto()


class Upstream:
    """One connection to `origin`. Nothing here runs before an allow; the address that was admitted is dialled."""

    __slots__ = ("_admitted", "_asker", "_body", "_buffer", "_commons", "_dialled", "_from_hosts", "_has_spoken",
                 "_interims", "_is_new", "_is_odd", "_left", "_offers_session", "_request", "_responses", "_searched",
                 "_share", "_side", "_stage", "_stays", "_trusts", "_way", "address", "is_shown_to_site", "origin",
                 "pooled_by")  # fmt: skip

    def __init__(self, commons: Commons, origin: Origin, asker: Asker, share: Share) -> None:
        self._commons = commons
        self._asker: Asker | None = asker
        self._share = share
        self._stage = Stage.OPENING
        self._way: WayOut | None = None
        self._side: Side | None = None
        self._trusts = True
        self._is_new = True  # no answer has come of it
        self._offers_session = False
        self._has_spoken = False  # since it was asked
        self._interims = 0
        self._request: Request | None = None
        self._buffer = b""
        self._searched = 0
        self._body: Body | None = None
        self._responses = ResponseReader()
        self._stays = False  # as the response under way says
        self.origin = origin
        self.address: tuple[str, int] | None = None
        self._dialled: Address | None = None
        self._from_hosts = False
        self._admitted: Verdict | None = None  # the latest one that its address is in
        self.is_shown_to_site = False
        self._is_odd = False  # something in it was about this connection: nobody else may use it
        self._left: Callable[[], None] | None = None  # told when it is closed
        self.pooled_by: str | None = None  # the policy whose rule lets another client of the workload use it

    # --- opening ---

    def open(self, verdict: Verdict, *, plain: bool, tunnels: bool) -> None:
        """Dial it, and verify it unless `plain`. `connected` or `unreachable` follows, maybe at once."""
        _, name, port = self.origin
        self._trusts = not plain
        self.is_shown_to_site = not tunnels
        self._way = WayOut(
            self._commons.exit,
            (_NOWHERE, port),
            verdict,
            connected=self._dialled_it,
            denied=self._denied,
            failed=self.failed,
        )
        self._way.start(name, tunnels=tunnels)

    def _denied(self, verdict: Verdict, note: str) -> None:
        self._fail(Unreachable(verdict.reason, note))

    def _dialled_it(self, sock: socket.socket, address: Address) -> None:
        way, self._way = self._way, None  # an idle connection is to take little memory
        assert way is not None
        self._dialled, self._from_hosts = address, way.from_hosts
        self.address = str(address), way.upstream[1]
        self._side = side = Side(self._commons.epoll, sock, self, self._share)
        if not self._trusts:
            side.begin()
            self.opened()
            return
        session = self._commons.sessions.take(self.origin)
        self._offers_session = session is not None
        try:
            side.begin_tls(self._commons.trust, self.origin[1], session)
        except (OSError, ValueError) as error:
            self._fail(Unreachable(Reason.UPSTREAM_FAILED, f"no TLS ({error})"))

    def opened(self) -> None:
        self._stage = Stage.IDLE
        if self._asker:
            self._asker.connected()

    def admits(self, verdict: Verdict) -> bool:
        """Whether it may carry what `verdict` allows: by now the policy may be another, which its address is not in."""
        if self._stage is not Stage.IDLE or self._dialled is None:
            return False
        if verdict is self._admitted:
            return True
        site = self._commons.exit.site
        goes_to_site = site is not None and site.carries(self.origin[1])
        if not goes_to_site and not admit(verdict, self._dialled, from_hosts=self._from_hosts).is_allow:
            return False
        self._admitted = verdict
        return True

    def carries(self, judgement: Judgement) -> bool:
        """Whether it may be sent another request of its client: what was opened for one workload stays that one's."""
        attempt = judgement.attempt
        return self.origin == (attempt.workload, attempt.host, attempt.port) and self.admits(judgement.verdict)

    # --- asking ---

    @property
    def is_open(self) -> bool:
        return self._side is not None and self._side.is_open and self._stage is not Stage.OPENING

    @property
    def is_full(self) -> bool:
        return self._side is not None and self._side.is_full

    @property
    def taken(self) -> int:
        """Bytes that had waited for the origin, and that it took."""
        return self._side.sent if self._side else 0

    @property
    def owes_rest(self) -> bool:
        """The origin has said how long its answer is, and has not sent it all."""
        return self._stage is Stage.BODY and isinstance(self._body, Sized)

    def take(self, asker: Asker) -> None:
        """The next request is of `asker`."""
        self._asker = asker

    # --- between two clients: `pool` ---

    @property
    def key(self) -> Key:
        return (*self.origin, self._trusts)

    @property
    def is_clean(self) -> bool:
        """Whether nothing on it was about its former client. One on which anything is left of an answer is closed."""
        return self._stage is Stage.IDLE and not self._is_odd and not self.is_shown_to_site

    @property
    def is_quiet(self) -> bool:
        """Whether the origin has neither spoken nor gone meanwhile."""
        return self._stage is Stage.IDLE and self._side is not None and self._side.is_quiet

    def park(self, left: Callable[[], None] | None) -> None:
        """It waits for whoever comes; `left` is called if it is closed before. None: it waits no more."""
        self._left = left

    def adopt(self, asker: Asker, share: Share) -> None:
        """The next request is of `asker`, who is another client than before."""
        self._asker, self._share = asker, share
        self.pooled_by = None
        if self._side is not None:
            self._side.count_for(share)

    def ask(self, request: Request, head: bytes) -> None:
        """Send the head of a request; `write` sends its body."""
        assert self._side is not None
        self._side.release()
        self._request = request
        self._is_odd = self._is_odd or request.fields.binds
        self._stage = Stage.HEAD
        self._has_spoken = False
        self._interims = 0
        self._side.write(head)

    def write(self, data: bytes) -> None:
        assert self._side is not None
        self._side.write(data)

    def hold(self) -> None:
        if self._side:
            self._side.hold()

    def release(self) -> None:
        if self._side:
            self._side.release()

    def end_writing(self) -> None:
        if self._side:
            self._side.end_writing()

    # --- what the origin says ---

    def received(self, data: bytes) -> None:
        match self._stage:
            case Stage.BODY:
                self._read_body(data)
            case Stage.HEAD:
                self._has_spoken = True
                self._buffer = self._buffer + data if self._buffer else data
                self._read_head()
            case Stage.TUNNEL:
                assert self._asker is not None
                self._asker.carry([data])
            case _:  # it speaks unasked: who asked next would take it for an answer
                self._lose("it spoke before it was asked")

    def _read_head(self) -> None:
        asker, request = self._asker, self._request
        assert asker is not None
        assert request is not None
        while self._stage is Stage.HEAD:
            end = find_end(self._buffer, self._searched)
            if max(end, len(self._buffer) if not end else 0) > MAX_HEAD:
                self._lose(f"its head is larger than {MAX_HEAD // 1024} KiB")
                return
            if not end:
                self._searched = max(0, len(self._buffer) - 3)
                return
            head, self._buffer, self._searched = self._buffer[:end], self._buffer[end:], 0
            try:
                response = self._responses.read(head, request.method)
                self._check(response, request)
            except Refused as refused:
                self._lose(refused.why)
                return
            if response.is_interim:
                asker.interim(response)
            else:
                self._begin_body(asker, response)

    def _check(self, response: Response, request: Request) -> None:
        """Raises Refused."""
        if not response.is_interim:
            return
        self._interims += 1
        self._is_odd = self._is_odd or response.status != 100 or not request.fields.expects
        if self._interims > MAX_INTERIM:
            raise Refused(502, Reason.UPSTREAM_FAILED, "it sends interim responses without end")
        if response.status == 101:
            asked, given = request.fields.upgrade, response.fields.upgrade
            if not (asked and request.fields.switches and given in asked.split(", ")):
                raise Refused(502, Reason.UPSTREAM_FAILED, "it switched protocols unasked")

    def _begin_body(self, asker: Asker, response: Response) -> None:
        fields = response.fields
        self._stays = not response.closes
        self._is_odd = self._is_odd or fields.binds
        self._stage = Stage.BODY
        rest, self._buffer = self._buffer, b""
        asker.answered(response)
        if not response.has_body:
            self._finish(b"", rest)
            return
        if fields.is_chunked:
            self._body = Chunked(in_request=False)
        elif fields.length is not None:
            self._body = Sized(fields.length)
        else:
            self._body = UntilClose()
            self._stays = False
        if rest:
            self._read_body(rest)

    def _read_body(self, data: bytes) -> None:
        asker, body = self._asker, self._body
        if asker is None or body is None:
            return
        try:
            parts, done, rest = body.feed(data)
        except Refused as refused:
            self._lose(refused.why)
            return
        if parts:
            asker.carry(parts)
        if done and self._stage is Stage.BODY:
            self._finish(body.trailers, rest)

    def _finish(self, trailers: bytes, rest: bytes) -> None:
        """The answer is whole. What follows it was not asked for: such a connection is used no more."""
        asker, side = self._asker, self._side
        assert asker is not None
        assert side is not None
        self._body = None
        if self._is_new and (tls := side.tls) is not None:
            self._commons.sessions.keep(self.origin, tls, was_offered=self._offers_session)
        self._is_new = False
        if rest or not self._stays:
            self.close()
        else:
            self._stage = Stage.IDLE
            self._asker = self._request = None
            side.release()
        asker.finished(trailers)

    def switch(self) -> bytes:
        """From now on bytes are carried as they are. Gives those that came already."""
        self._stage = Stage.TUNNEL
        rest, self._buffer = self._buffer, b""
        return rest

    # --- its end ---

    def ended(self, error: Exception | None) -> None:
        match self._stage:
            case Stage.OPENING:
                self._fail(explain_origin(error))
            case Stage.BODY if isinstance(self._body, UntilClose) and error is None:
                self._finish(b"", b"")
            case Stage.TUNNEL:
                assert self._asker is not None
                self._asker.tunnel_ended(error)
            case Stage.HEAD:
                self._lose("it closed before it answered", stale=not (self._is_new or self._has_spoken))
            case _:
                self._lose("its answer broke off")

    def drained(self) -> None:
        if self._asker and self._stage is not Stage.OPENING:
            self._asker.relieved()

    def failed(self, error: Exception) -> None:
        asker = self._asker
        self.close()
        if asker:
            asker.failed(error)

    def _fail(self, failure: Unreachable) -> None:
        asker = self._asker
        self.close()
        if asker:
            asker.unreachable(failure)

    def _lose(self, note: str, *, stale: bool = False) -> None:
        asker, was_asked = self._asker, self._stage in (Stage.HEAD, Stage.BODY)
        self.close()
        if asker and was_asked:
            asker.broke(note, stale=stale)

    def close(self) -> None:
        """Close it now; nothing more is told."""
        self._stage = Stage.OVER
        self._asker = None
        if self._way is not None:
            self._way.cancel()
        if self._side is not None:
            self._side.close()
        if self._left is not None:
            self._left()
