"""One accepted connection from its first byte to its end: peek, ask for the verdict, then deny, carry or hand over.

It takes no byte of what it lets pass: the hello is peeked and stays in the kernel's queue for the next reader.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address

from addons.answers import answer
from addons.judge import BAD_GATEWAY, FORBIDDEN, UNAVAILABLE, Judgement
from policies.engine import Expect
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import UNKNOWN, Action, Address, AnyRule, Attempt, Reason, Stage, Tls, Verdict
from policies.model import Dial as DialTo
from proxy.flow import Flow
from proxy.guest import Gate
from proxy.inspector.handover import Handover, gives_http2
from proxy.original_dst import Destination, local_dst, parse_address
from proxy.peeking import Peeking
from proxy.record import Peer, Record, new_id, record_of
from proxy.relays.stream import End
from proxy.wire.client_hello import (
    Alert,
    First,
    HelloTooLarge,
    MalformedHello,
    classify_first,
    needs,
    parse_hello,
    render_alert,
)

_NOWHERE = IPv4Address(0)  # an address that no rule reaches
_NOT_KNOWN: Destination = (_NOWHERE, 0)

_ALERTS = {
    Reason.MALFORMED_HELLO: Alert.DECODE_ERROR,
    Reason.HELLO_TOO_LARGE: Alert.DECODE_ERROR,
    Reason.NAME_NOT_FOUND: Alert.UNRECOGNIZED_NAME,
    Reason.RESOLVER_FAILED: Alert.INTERNAL_ERROR,
    Reason.UPSTREAM_REFUSED: Alert.INTERNAL_ERROR,
    Reason.UPSTREAM_TIMEOUT: Alert.INTERNAL_ERROR,
    Reason.UPSTREAM_FAILED: Alert.INTERNAL_ERROR,
    Reason.LOG_FAILED: Alert.INTERNAL_ERROR,
    Reason.GATE_FAILED: Alert.INTERNAL_ERROR,
}
_STATUS = {Reason.LOG_FAILED: UNAVAILABLE, Reason.GATE_FAILED: BAD_GATEWAY}
_UNANSWERED = frozenset({Reason.CLIENT_GONE, Reason.HELLO_TIMEOUT, Reason.TOO_MANY_CONNECTIONS})


@dataclass(frozen=True, slots=True)
class Tunnel:
    """Where a CONNECT asked for: a name (`authority`), which must then be the SNI, or an address; and who asked.

    user  the name of the proxy credential that was verified, if one was
    """

    authority: Hostname | None
    address: Address | None
    port: int
    user: str | None = None


class Connection(Peeking):
    """Owns its socket until it is over: closed or given away. Writes one decision record, unless the inspector does."""

    __slots__ = ("_attempt", "_expect", "_first", "_flow", "_generation", "_offers", "_opened", "_tunnel", "_why",
                 "_yields", "destination", "source", "workload")  # fmt: skip

    def __init__(self, gate: Gate, sock: socket.socket, peer: Peer, tunnel: Tunnel | None = None) -> None:
        super().__init__(gate, sock, peer, gate.limits.max_hello)
        self._tunnel = tunnel
        self.source = peer
        self.destination: Destination = _NOT_KNOWN
        self.workload = UNKNOWN
        self._generation = ""  # of the policy that found the workload, and that judges
        self._opened = gate.clock()
        self._attempt: Attempt | None = None
        self._expect = Expect.PEEK
        self._first: First | None = None
        self._offers: tuple[bytes, ...] = ()  # ALPN
        self._yields = False  # it was silent, so its server may speak first
        self._flow: Flow | None = None
        self._why = ""  # it is denied although a rule admits it

    # --- the first bytes ---

    def open(self) -> None:
        """Begin: wait for the first bytes, or judge at once where the server may speak first."""
        gate, limits = self._gate, self._gate.limits
        if not self._identify():
            self._judge(Stage.TCP, fault=Reason.NEVER_REACHED)
            return
        self._expect = gate.expect(self.workload, self.destination[1])
        if self._expect is Expect.OPAQUE:
            self._judge_opaque()
            return
        self._listen(limits.hello_s)
        if self._expect is Expect.EITHER:
            self.deadline = gate.epoll.now + limits.silence_s
            gate.epoll.watch(self)

    def refuse(self, reason: Reason) -> None:
        """Deny it for a reason that does not lie in what it attempts."""
        self._identify()
        self._judge(Stage.TCP, fault=reason)

    def _identify(self) -> bool:
        """Find out who it is and where it was going. False: it was made to the gate itself."""
        self.sock.setblocking(False)
        address = parse_address(self.peer[0])
        if self.sock.family == socket.AF_INET6:
            self.source = str(address), self.peer[1]
        self._find_workload()
        if self._tunnel:
            self.destination = self._tunnel.address or _NOWHERE, self._tunnel.port
            return True
        found = self._gate.original_dst(self.sock)
        self.destination = found or local_dst(self.sock)
        return found is not None

    def _find_workload(self) -> None:
        """By the policy that judges now."""
        self._generation = self._gate.generation()
        self.workload = self._who()

    def _who(self) -> str:
        return self._gate.identify(parse_address(self.peer[0]), self._tunnel.user if self._tunnel else None)

    def _read(self, data: bytes, events: int) -> None:
        if self._first is None:
            self._first = classify_first(data)
        if self._first is First.TLS:
            self._judge_tls(data, events)
        elif self._first is First.HTTP:
            self._judge_plain()
        elif self._first is First.OTHER:
            self._judge_opaque()
        else:
            self._await_rest(data, events)

    def _await_rest(self, data: bytes, events: int, wanted: int = 0) -> None:
        self.deadline = self._give_up  # not silent, so what it is must show
        self._await_more(len(data), events, wanted)

    def _leave(self) -> None:
        self._judge(Stage.TLS if self._first is First.TLS else Stage.TCP, fault=Reason.CLIENT_GONE)

    def _late(self) -> None:
        if self._gate.epoll.now >= self._give_up:
            self._judge(Stage.TLS if self._first is First.TLS else Stage.TCP, fault=Reason.HELLO_TIMEOUT)
        else:  # silent: it waits for the server to speak
            self._gate.epoll.remove(self.fd)
            self._yields = True
            self._judge_opaque()

    def _spoke(self) -> None:
        """It speaks before its server does, as in TLS and HTTP: no pause takes a hello past the host rules."""
        self._flow = None
        self._yields = False
        self._listen(self._gate.limits.hello_s)

    # --- the verdict ---

    def _judge_tls(self, data: bytes, events: int) -> None:
        limit = self._gate.limits.max_hello
        try:
            hello = parse_hello(data, limit)
        except MalformedHello as error:
            too_large = isinstance(error, HelloTooLarge)
            self._judge(Stage.TLS, fault=Reason.HELLO_TOO_LARGE if too_large else Reason.MALFORMED_HELLO)
            return
        if hello is None:
            self._await_rest(data, events, needs(data, limit))
            return
        host, fault = None, None
        if hello.sni is not None:
            try:
                host = parse_hostname(hello.sni)
            except MalformedName:
                fault = Reason.MALFORMED_NAME
        self._offers = hello.alpn
        self._judge(Stage.TLS, host=host, ech=hello.ech, fault=fault)

    def _judge_plain(self) -> None:
        """A request without TLS: the inspector judges it by Host and path; on a port for TLS it is refused here."""
        if self._gate.carries_plain(self.workload, self.destination[1]):
            self._hand_over(self._tunnel.authority if self._tunnel else None, plain=True)
        elif self._expect is Expect.EITHER:
            self._judge_opaque()
        else:
            self._judge(Stage.HTTP, plain=True, fault=Reason.WRONG_PROTOCOL)

    def _judge_opaque(self) -> None:
        self._judge(Stage.TCP)

    def _judge(
        self,
        stage: Stage,
        *,
        host: Hostname | None = None,
        ech: bool = False,
        plain: bool = False,
        fault: Reason | None = None,
    ) -> None:
        """Ask for the verdict and carry it out. Nothing has been looked up or dialled before."""
        gate = self._gate
        address, port = self.destination
        # Who it was under the former policy, or before the cluster told more, gives no rights now.
        if self._generation != gate.generation() or self._who() != self.workload:
            self._find_workload()
            self._expect = gate.expect(self.workload, port)
        names: tuple[Hostname, ...] = ()
        authority = self._tunnel.authority if self._tunnel else None
        if authority is not None:
            names = (authority,)
            if host not in (None, authority) and fault is None:
                fault = Reason.HOST_MISMATCH
        elif fault is None and (host is None or self._expect is not Expect.PEEK):
            names = gate.names_of(self.workload, address)
        self._attempt = attempt = Attempt(
            stage,
            self.workload,
            host,
            port,
            time=gate.clock(),
            address=None if authority else address,
            names=names,
            ech=ech,
            plain=plain,
            fault=fault,
        )
        self._want(1)
        verdict = self._within_budget(attempt, gate.decide(attempt))
        if not verdict.is_allow:
            self._deny(verdict)
        elif verdict.tls is Tls.INSPECT:
            self._hand_over(host, plain=False, rule=verdict.rule)
        else:
            self._pass(attempt, verdict)

    def _within_budget(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        """The verdict, or a denial: the name of an allowed connection is looked up, and each of many new ones could
        carry something to whoever serves the names below a wildcard."""
        name = verdict.host or attempt.host
        if not verdict.is_allow or name is None or verdict.dial is DialTo.ORIGINAL:
            return verdict
        self._why = self._gate.exceeded(attempt.workload, verdict, name) or ""
        return replace(verdict, action=Action.DENY, reason=Reason.LOOKUP_BUDGET, tls=None) if self._why else verdict

    def _deny(self, verdict: Verdict) -> None:
        """Record it, tell the client in its own protocol, close."""
        id = new_id()
        self._record(verdict, id)
        reply = b"" if verdict.reason in _UNANSWERED else self._render_denial(verdict, id)
        if reply:
            self._part_with(reply)
        else:
            self._close(resetting=True)

    def _render_denial(self, verdict: Verdict, id: str) -> bytes:
        if self._first is First.TLS:
            return render_alert(_ALERTS.get(verdict.reason, Alert.ACCESS_DENIED))
        if self._first is First.HTTP and self._attempt is not None:
            status = _STATUS.get(verdict.reason, FORBIDDEN)
            return answer(Judgement(id, self._attempt, verdict, status), closes=True).to_bytes()
        return b""

    # --- what is allowed ---

    def _hand_over(self, host: Hostname | None, *, plain: bool, rule: AnyRule | None = None) -> None:
        """Give the socket to the inspector, which judges every request and writes the records."""
        gate = self._gate
        address, port = self.destination
        if gate.inspect is None:
            self._judge(Stage.HTTP if plain else Stage.TLS, host=host, plain=plain, fault=Reason.GATE_FAILED)
            return
        handover = Handover(
            id=new_id(),
            workload=self.workload,
            host=host,
            port=port,
            plain=plain,
            source=self.source,
            destination=None if self._tunnel and self._tunnel.authority else (str(address), port),
            opened=self._opened,
            user=self._tunnel.user if self._tunnel else None,
            http2=gives_http2(getattr(rule, "http2", None), self._offers),
        )
        gate.epoll.unwatch(self)
        gate.epoll.remove(self.fd)
        gate.inspect(self.sock, handover)
        self.is_over = True
        gate.over(self)

    def _pass(self, attempt: Attempt, verdict: Verdict) -> None:
        gate = self._gate
        gate.epoll.unwatch(self)
        self._flow = Flow(
            gate.exit,
            self.sock,
            self.destination,
            verdict,
            denied=self._deny,
            ended=partial(self._ended, verdict),
            failed=self.failed,
            spoke=self._spoke if self._yields else None,
        )
        self._flow.start(verdict.host or attempt.host)

    def _ended(self, verdict: Verdict, how: End) -> None:
        """The flow is over and both sockets are closed."""
        self.is_over = True
        self._gate.over(self)
        self._record(verdict, new_id(), self._flow, how)

    # --- the end ---

    def abort(self) -> None:
        if self._flow is not None and not self._is_told:
            self._flow.cancel()
        super().abort()

    def _fail(self) -> None:
        self._close(resetting=True)
        self._record(Verdict(Action.DENY, Reason.GATE_FAILED, Stage.TCP), new_id())

    def _close(self, *, resetting: bool) -> None:
        if self._flow is not None:
            self._flow.cancel()
        super()._close(resetting=resetting)

    def _record(self, verdict: Verdict, id: str, flow: Flow | None = None, how: End = End.CLOSED) -> None:
        address, port = self.destination
        extra: Record = {}
        if self._generation:
            extra["policy.generation"] = self._generation
        if self._tunnel and self._tunnel.user is not None:
            extra["user.name"] = self._tunnel.user
        if flow is not None:
            extra["upstream.address"], extra["upstream.port"] = str(flow.upstream[0]), flow.upstream[1]
        if how is not End.CLOSED:
            extra["flow.end"] = how.value
        if note := self._why or (self._flow.note if self._flow else ""):
            extra["error.message"] = note
        self._gate.record(
            record_of(
                self._attempt or Attempt(verdict.stage, self.workload, port=port, address=address),
                verdict,
                id=id,
                source=self.source,
                destination=None if address is _NOWHERE else (str(address), port),
                started=self._opened if flow else None,
                bytes_sent=flow.sent if flow else None,
                bytes_received=flow.received if flow else None,
                extra=extra,
            )
        )
