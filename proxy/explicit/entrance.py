"""A client of the explicit proxy until its head is read: who it is, where it wants to go. Then it goes everybody's way.

It answers only what is refused at once; SNI, Host and path are judged where every connection's are. Behind a balancer
the PROXY header is read first. No byte that follows a head is taken: it belongs to the tunnel, or to the next request.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from addons.answers import answer
from addons.credential import seal
from addons.judge import (
    BAD_GATEWAY,
    BAD_REQUEST,
    FORBIDDEN,
    PROXY_AUTHENTICATION,
    TIMEOUT,
    TOO_LARGE,
    TOO_MANY_REQUESTS,
    UNAVAILABLE,
    Judgement,
)
from policies.model import AMBIGUOUS, STALE, UNKNOWN, Action, Attempt, Network, Reason, Stage, Verdict
from proxy.connection import Connection, Tunnel
from proxy.guest import Gate
from proxy.inspector.handover import Handover
from proxy.original_dst import parse_address
from proxy.peeking import Peeking
from proxy.record import Peer, new_id, record_of
from proxy.wire.client_hello import Alert, First, classify_first, render_alert
from proxy.wire.proxy_head import MAX_HEAD, MalformedHead, ProxyHead, parse_head
from proxy.wire.proxy_protocol import MalformedProxyHeader, parse_proxy_header

if TYPE_CHECKING:  # 5 ms that a proxy without credentials, as in `outgate run`, does not spend
    from proxy.explicit.verifier import Verifier

MAX_TRIES = 8  # heads of one connection that are answered 407

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
# What no tunnel can change: refused before it is made.
_AT_ONCE = frozenset(
    {
        Reason.UNKNOWN_WORKLOAD,
        Reason.AMBIGUOUS_WORKLOAD,
        Reason.STALE_WORKLOAD,
        Reason.CREDENTIALS,
        Reason.LOG_FAILED,
    }
)
_MAY_PROVE = frozenset({UNKNOWN, AMBIGUOUS, STALE})  # who they are is asked of those whose address does not tell


@dataclass(frozen=True, slots=True)
class Entrance:
    """What the clients of a proxy share.

    verifier   knows credentials; None: none are asked for, and what a client shows has no bearing
    balancers  whose connections begin with a PROXY header, which says who the client is; nobody else's may
    """

    verifier: Verifier | None = None
    balancers: Sequence[Network] = ()

    def meet(self, gate: Gate, sock: socket.socket, peer: Peer) -> Caller:
        """A client that was just accepted."""
        address = parse_address(peer[0])
        return Caller(gate, sock, peer, self, is_balanced=any(address in network for network in self.balancers))


class Caller(Peeking):
    """One client of the proxy. Writes a decision record for each refusal."""

    __slots__ = ("_entrance", "_head", "_is_balanced", "_opened", "_tries", "_verification", "source")

    def __init__(
        self, gate: Gate, sock: socket.socket, peer: Peer, entrance: Entrance, *, is_balanced: bool = False
    ) -> None:
        super().__init__(gate, sock, peer, MAX_HEAD)
        self._entrance = entrance
        self._is_balanced = is_balanced  # its PROXY header is still to come
        self.source = parse_address(peer[0])
        self._opened = gate.clock()
        self._head: ProxyHead | None = None
        self._tries = 0
        self._verification: asyncio.Task[None] | None = None

    # --- the head ---

    def open(self) -> None:
        """Begin: wait for the head."""
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listen(self._gate.limits.hello_s)

    def refuse(self, reason: Reason) -> None:
        """Reset it for a reason that does not lie in what it asks for."""
        self.sock.setblocking(False)
        self._note(self._fault(reason))
        self._close(resetting=True)

    def _read(self, data: bytes, events: int) -> None:
        if self._is_balanced:
            self._read_balancer(data, events)
        elif classify_first(data) is First.TLS:
            self._note(self._fault(Reason.WRONG_PROTOCOL, Stage.TLS))
            self._part_with(render_alert(Alert.ACCESS_DENIED))
        else:
            self._read_head(data, events)

    def _read_balancer(self, data: bytes, events: int) -> None:
        try:
            header = parse_proxy_header(data)
        except MalformedProxyHeader as error:
            self._refuse(self._fault(Reason.MALFORMED_REQUEST), BAD_REQUEST, f"{error}, which this balancer must send")
            return
        if header is None:
            self._await_more(len(data), events)
            return
        self.sock.recv(header.length)
        peer = (str(header.source[0]), header.source[1]) if header.source else self.peer
        self._give_on()  # and come back as who it is: the caps count the client, not the balancer
        self._gate.welcome(self.sock, peer, partial(Caller, entrance=self._entrance))

    def _read_head(self, data: bytes, events: int) -> None:
        try:
            head = parse_head(data)
        except MalformedHead as error:
            self._refuse(self._fault(Reason.MALFORMED_REQUEST), BAD_REQUEST, str(error))
            return
        if head is not None:
            self._head = head
            self._ask_who(head)
        elif len(data) == MAX_HEAD:
            note = f"its head takes more than {MAX_HEAD} bytes"
            self._refuse(self._fault(Reason.MALFORMED_REQUEST), TOO_LARGE, note)
        else:
            self._await_more(len(data), events)

    # --- who it is ---

    def _ask_who(self, head: ProxyHead) -> None:
        verifier = self._entrance.verifier
        if verifier is None or head.authorization is None:
            self._admit(head, None)
        elif name := verifier.recall(head.authorization):
            self._admit(head, name)
        else:
            self._be_patient(self._gate.limits.hello_s)
            verifying = self._verify(verifier, head, head.authorization)
            self._verification = asyncio.get_running_loop().create_task(verifying)

    async def _verify(self, verifier: Verifier, head: ProxyHead, authorization: bytes) -> None:
        from proxy.explicit.verifier import TooManyGuesses, Unverified

        try:
            try:
                name = await verifier.verify(authorization, self.source)
            except TooManyGuesses:
                self._refuse_guesses()
                return
            except Unverified as error:
                self._refuse(self._fault(Reason.GATE_FAILED), UNAVAILABLE, f"whose token it is nobody says: {error}")
                return
            self._verification = None
            if name is None:
                self._challenge(head)
            else:
                self._admit(head, name)
        except Exception as error:
            self._gate.epoll.contain(self.failed, error)

    def _admit(self, head: ProxyHead, user: str | None) -> None:
        """Let it in as a workload, if it is one."""
        workload = self._gate.identify(self.source, user)
        if workload in _MAY_PROVE and user is None and self._entrance.verifier is not None:
            self._challenge(head)
            return
        attempt = self._attempt(head, workload)
        verdict = self._gate.decide(attempt)
        # A name can be refused at once, in words; an address waits for its SNI, a request for its path.
        # Plain HTTP may be tunnelled too, and is judged by its protocol then.
        waits = not (head.is_connect and attempt.host) or verdict.reason is Reason.WRONG_PROTOCOL
        if not verdict.is_allow and (verdict.reason in _AT_ONCE or not waits):
            status = UNAVAILABLE if verdict.reason is Reason.LOG_FAILED else FORBIDDEN
            self._refuse(attempt, status, verdict=verdict, user=user)
        elif head.is_connect:
            self._tunnel(head, user)
        else:
            self._hand_over(head, attempt, user)

    def _challenge(self, head: ProxyHead) -> None:
        """Ask for credentials; where nothing of a body is under way, on this connection."""
        self._tries += 1
        keeps = head.persists and not head.has_body and self._tries < MAX_TRIES
        self._refuse(self._fault(Reason.CREDENTIALS), PROXY_AUTHENTICATION, keeps=keeps)

    # --- where it goes ---

    def _tunnel(self, head: ProxyHead, user: str | None) -> None:
        authority = head.authority
        try:
            self.sock.recv(head.length)  # what follows it stays in the queue, to be peeked
            sent = self.sock.send(_ESTABLISHED)
        except OSError:
            sent = 0
        if sent < len(_ESTABLISHED):  # it does not read the answers it was given
            self._leave()
            return
        self._give_on()
        tunnel = Tunnel(authority.host, authority.address, authority.port, user)
        self._gate.welcome(self.sock, self.peer, partial(Connection, tunnel=tunnel))

    def _hand_over(self, head: ProxyHead, attempt: Attempt, user: str | None) -> None:
        inspect = self._gate.inspect
        if inspect is None:
            self._refuse(replace(attempt, fault=Reason.GATE_FAILED), BAD_GATEWAY, "it has no inspector", user=user)
            return
        handover = Handover(
            id=new_id(),
            workload=attempt.workload,
            host=None,
            port=attempt.port,
            plain=True,
            source=self._shown,
            destination=None,
            opened=self._opened,
            user=user,
            proxied=True,
            credential=seal(head.authorization) if user is not None and head.authorization else None,
        )
        self._give_on()
        inspect(self.sock, handover)

    # --- what is refused ---

    @property
    def _shown(self) -> Peer:
        return str(self.source), self.peer[1]

    def _attempt(self, head: ProxyHead, workload: str) -> Attempt:
        authority = head.authority
        stage = Stage.HTTP if not head.is_connect else Stage.TLS if authority.host else Stage.TCP
        return Attempt(
            stage,
            workload,
            authority.host,
            authority.port,
            time=self._gate.clock(),
            address=authority.address,
            method="" if head.is_connect else head.method,
            target="/",  # the door judges no path
            plain=not head.is_connect,
        )

    def _fault(self, reason: Reason, stage: Stage = Stage.HTTP) -> Attempt:
        """An attempt that is not judged by what it asks for, as far as that is known."""
        workload = self._gate.identify(self.source, None)
        if self._head is not None:
            return replace(self._attempt(self._head, workload), fault=reason)
        return Attempt(stage, workload, port=0, time=self._gate.clock(), fault=reason)

    def _note(
        self, attempt: Attempt, verdict: Verdict | None = None, status: int | None = None, user: str | None = None
    ) -> tuple[str, Verdict]:
        """Write the record. Gives its id, and the verdict that it holds."""
        id, verdict = new_id(), verdict or self._gate.decide(attempt)
        extra: dict[str, object] = {"user.name": user} if user is not None else {}
        self._gate.record(record_of(attempt, verdict, id=id, source=self._shown, status=status, extra=extra))
        return id, verdict

    def _refuse(
        self,
        attempt: Attempt,
        status: int,
        note: str = "",
        *,
        verdict: Verdict | None = None,
        user: str | None = None,
        keeps: bool = False,
    ) -> None:
        """Record it and tell the client in words; then close, unless it is to try again on this connection."""
        id, verdict = self._note(attempt, verdict, status, user)
        reply = answer(Judgement(id, replace(attempt, fault=None), verdict, status, note), closes=not keeps).to_bytes()
        if not keeps or self._head is None:
            self._part_with(reply)
            return
        try:
            self.sock.recv(self._head.length)
            sent = self.sock.send(reply)
        except OSError:
            sent = 0
        if sent < len(reply):
            self._close(resetting=True)
            return
        self._head = None
        self._listen(self._gate.limits.hello_s)

    def _refuse_guesses(self) -> None:
        note = "too many credentials of your address are being verified; try again in a few seconds"
        self._refuse(self._fault(Reason.TOO_MANY_CONNECTIONS), TOO_MANY_REQUESTS, note)

    # --- the end ---

    def _leave(self, reason: Reason = Reason.CLIENT_GONE) -> None:
        """It is gone, or says nothing. After an answer that is how a connection ends, else it is recorded."""
        if not self._tries or not self._asks_nothing:
            self._note(self._fault(reason))
        self._close(resetting=False)

    def _late(self) -> None:
        if self._verification is not None:
            self._refuse_guesses()
        elif self._asks_nothing:  # a connection in reserve, which an answer would only confuse
            self._leave(Reason.HELLO_TIMEOUT)
        else:
            note = f"no whole head within {self._gate.limits.hello_s:g} s"
            self._refuse(self._fault(Reason.HELLO_TIMEOUT), TIMEOUT, note)

    @property
    def _asks_nothing(self) -> bool:
        return self._head is None and self._is_silent

    def abort(self) -> None:
        if self._asks_nothing:
            self._close(resetting=True)
        else:
            super().abort()

    def _fail(self) -> None:
        self._close(resetting=True)
        attempt = Attempt(Stage.HTTP, UNKNOWN, port=0)
        self._note(attempt, Verdict(Action.DENY, Reason.GATE_FAILED, Stage.HTTP))

    def _part_with(self, reply: bytes) -> None:
        self._end_verification()
        super()._part_with(reply)

    def _close(self, *, resetting: bool) -> None:
        self._end_verification()
        super()._close(resetting=resetting)

    def _end_verification(self) -> None:
        verification, self._verification = self._verification, None
        if verification is not None and verification is not asyncio.current_task():
            verification.cancel()
