"""The HTTP verdict: reads a request head into an attempt, has it decided, gives a denial its status. No sockets here.

It imports no mitmproxy, so that every HTTP host (the mitmproxy addons beside it, or another) asks this one judge about
Host, framing and path, and none of them can read a request in a way of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from addons.credential import is_sealed
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Action, Attempt, HostRule, Reason, Stage, Verdict
from policies.paths import MalformedPath, parse_path

type Fields = Iterable[tuple[bytes, bytes]]

BAD_REQUEST, FORBIDDEN, METHOD_NOT_ALLOWED, TIMEOUT, MISDIRECTED, TOO_LARGE = 400, 403, 405, 408, 421, 431
PROXY_AUTHENTICATION, TOO_MANY_REQUESTS, BAD_GATEWAY, UNAVAILABLE = 407, 429, 502, 503

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # a folded line (RFC 9112 5.2) shows up as CR LF in a value
_LENGTH = re.compile(rb"[0-9]{1,18}")
_AUTHORITY = re.compile(r"([^:/?#@\\\x00-\x20\x7f]+)(?::([1-9][0-9]{0,4}))?")
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
_METHOD_OVERRIDES = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})
_TARGET_OVERRIDES = frozenset({b"x-original-url", b"x-rewrite-url"})  # IIS, and frameworks that were made to follow it
_UNSERVED = frozenset({"CONNECT", "TRACE"})  # a tunnel that nobody judges; an echo of headers that scripts may not see
_VERSIONS = frozenset({"HTTP/1.0", "HTTP/1.1", "HTTP/2.0"})
CONNECTION_SPECIFIC = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})
# RFC 9110 7.6.1: the next proxy removes what Connection names; without one of these it would read another request.
_END_TO_END = frozenset({b"host", b"content-length", b"transfer-encoding", b"authorization", b"cookie"})
_GRPC = re.compile(rb"application/grpc(?:[+;].*)?", re.DOTALL)  # not application/grpc-web, which has a body of its own

_STATUS = {
    Reason.MALFORMED_NAME: BAD_REQUEST,
    Reason.MALFORMED_PATH: BAD_REQUEST,
    Reason.MALFORMED_REQUEST: BAD_REQUEST,
    Reason.CREDENTIALS: PROXY_AUTHENTICATION,
    Reason.HELLO_TIMEOUT: TIMEOUT,
    Reason.HOST_MISMATCH: MISDIRECTED,
    Reason.NAME_NOT_FOUND: BAD_GATEWAY,
    Reason.RESOLVER_FAILED: BAD_GATEWAY,
    Reason.UPSTREAM_REFUSED: BAD_GATEWAY,
    Reason.UPSTREAM_TIMEOUT: BAD_GATEWAY,
    Reason.UPSTREAM_CERTIFICATE: BAD_GATEWAY,
    Reason.UPSTREAM_FAILED: BAD_GATEWAY,
    Reason.HTTP2_FLOOD: TOO_MANY_REQUESTS,
    Reason.LOG_FAILED: UNAVAILABLE,
    Reason.GATE_FAILED: BAD_GATEWAY,
}


@dataclass(slots=True)
class Conversation:
    """One client connection: who opened it, and for which name.

    opened_for   the SNI; on a plain port the first Host that was asked for
    destination  address and port that the client asked for, where that is known
    allowed      the latest allow: the verdict under which an upstream connection is opened
    from_hosts   the addresses that were dialled last are the operator's own
    user         the name of the proxy credential that was verified, if one was
    failure      why the upstream connection of the request under way failed; whoever answers the client takes it away
    proxied      requests are in absolute form, and each is for the host and port it names: `opened_for` and `port` are
                 those of the latest allowed one
    credential   what each request on a proxied connection must prove to know (`addons.credential`); None: nothing
    """

    workload: str
    port: int
    plain: bool
    source: tuple[str, int]
    opened_for: Hostname | None = None
    destination: tuple[str, int] | None = None
    allowed: Verdict | None = None
    from_hosts: bool = False
    failure: Unreachable | None = None
    user: str | None = None
    proxied: bool = False
    credential: str | None = None


class Unreachable(Exception):
    """An allowed request whose upstream cannot be had. `note` says what happened, in words for the client."""

    def __init__(self, reason: Reason, note: str) -> None:
        self.reason = reason
        self.note = note
        super().__init__(f"{reason}: {note}")


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one request, and what is done with it.

    status    what the client is answered with; None: forward
    note      what exactly is wrong, where the reason alone does not say it
    has_body  a body follows the head; a denial does not read it and closes the connection instead
    page      the client prefers a page to read over problem+json
    grpc      the client speaks gRPC, which has a status of its own
    generation of the policy that judged; empty where nobody asked for it
    """

    id: str
    attempt: Attempt
    verdict: Verdict
    status: int | None = None
    note: str = ""
    has_body: bool = False
    page: bool = False
    grpc: bool = False
    generation: str = ""

    @property
    def is_forward(self) -> bool:
        return self.status is None

    @property
    def closes(self) -> bool:
        """The connection ends with this answer: bytes still under way could be taken for another request."""
        return self.status is not None and (self.has_body or self.attempt.fault is not None)


class _Fault(Exception):
    def __init__(self, reason: Reason, note: str, status: int | None = None) -> None:
        self.reason = reason
        self.note = note
        self.status = status


@dataclass(slots=True)
class _Head:
    """What of a head bears on the verdict, as far as it could be read. `methods` and `targets` override the line's."""

    host: Hostname | None
    port: int
    target: str
    has_body: bool = False
    upgrade: str | None = None
    page: bool = False
    grpc: bool = False
    methods: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)


class Judge:
    """Judges request heads. `decide` and `generation` may be replaced at any time, for the next request.

    now       POSIX seconds
    new_id    makes the id that the client and the decision record share
    identify  finds the workload of a connection anew, before each request; None: it never changes
    """

    def __init__(
        self,
        decide: Callable[[Attempt], Verdict],
        *,
        now: Callable[[], float],
        new_id: Callable[[], str],
        identify: Callable[[Conversation], str] | None = None,
    ) -> None:
        self.decide = decide
        self.generation = ""
        self._identify = identify
        self._now = now
        self._new_id = new_id

    def opening(self, conversation: Conversation) -> Verdict:
        """The verdict on the TLS of a conversation: whether its origin may be dialled before the first request."""
        self._find_workload(conversation)
        host, port = conversation.opened_for, conversation.port
        return self.decide(Attempt(Stage.TLS, conversation.workload, host, port, time=self._now()))

    def request(
        self,
        conversation: Conversation,
        method: str,
        target: str,
        version: str,
        fields: Fields,
        *,
        authority: str | None = None,
    ) -> Judgement:
        """The judgement of one request; `target` (in origin or absolute form) and `fields` are as received.

        `authority` is HTTP/2's `:authority`; None where there was none.
        """
        self._find_workload(conversation)
        head = _Head(None if conversation.proxied else conversation.opened_for, conversation.port, target)
        fault: _Fault | None = None
        try:
            _read_head(head, conversation, method, version, fields, authority)
        except _Fault as found:
            fault = found
        attempt = Attempt(
            stage=Stage.HTTP,
            workload=conversation.workload,
            host=head.host,
            port=head.port,
            time=self._now(),
            method=method,
            target=head.target,
            plain=conversation.plain,
            upgrade=head.upgrade,
            opened_for=head.host if conversation.proxied else conversation.opened_for,
            fault=fault.reason if fault else None,
        )
        verdict = self.decide(attempt)
        for other in _other_readings(attempt, head):
            if not verdict.is_allow:
                break
            if not (second := self.decide(other)).is_allow:
                attempt, verdict = other, second  # the record and the answer say what was refused
            elif second.would_be:
                verdict = second
        if conversation.opened_for is None and fault is None and not conversation.proxied:
            conversation.opened_for = head.host
        if verdict.is_allow:
            conversation.allowed = verdict
            if conversation.proxied:
                conversation.opened_for, conversation.port = head.host, head.port
            return self._judgement(attempt, verdict, has_body=head.has_body, grpc=head.grpc)
        status = (fault and fault.status) or _STATUS.get(verdict.reason, FORBIDDEN)
        note = fault.note if fault else _explain(attempt, verdict)
        return self._judgement(attempt, verdict, status, note, has_body=head.has_body, page=head.page, grpc=head.grpc)

    def unreadable(
        self, conversation: Conversation, note: str, *, status: int = BAD_REQUEST, fault: Reason | None = None
    ) -> Judgement:
        """The judgement of bytes that are no request head (too long, too slow, not HTTP). Always a denial."""
        self._find_workload(conversation)
        attempt = Attempt(
            stage=Stage.HTTP,
            workload=conversation.workload,
            host=conversation.opened_for,
            port=conversation.port,
            time=self._now(),
            plain=conversation.plain,
            opened_for=conversation.opened_for,
            fault=fault or Reason.MALFORMED_REQUEST,
        )
        return self._judgement(attempt, self.decide(attempt), status, note)

    def _find_workload(self, conversation: Conversation) -> None:
        """Rights that its source had under a former policy do not stay with a connection that is kept alive."""
        if self._identify is not None:
            conversation.workload = self._identify(conversation)

    def _judgement(
        self,
        attempt: Attempt,
        verdict: Verdict,
        status: int | None = None,
        note: str = "",
        *,
        has_body: bool = False,
        page: bool = False,
        grpc: bool = False,
    ) -> Judgement:
        return Judgement(self._new_id(), attempt, verdict, status, note, has_body, page, grpc, self.generation)

    def fail(self, judgement: Judgement, reason: Reason, note: str) -> Judgement:
        """The judgement of an allowed request that is answered with a failure: upstream, its own body, or the gate."""
        verdict = replace(judgement.verdict, action=Action.DENY, reason=reason, would_be=None)
        return replace(judgement, verdict=verdict, status=_STATUS.get(reason, FORBIDDEN), note=note)

    def break_off(self, judgement: Judgement, reason: Reason) -> Judgement:
        """The judgement of an allowed request that ended early without an answer of ours."""
        return replace(judgement, verdict=replace(judgement.verdict, reason=reason))


def _other_readings(attempt: Attempt, head: _Head) -> list[Attempt]:
    """The same request as an origin reads it that heeds overriding headers."""
    return [
        replace(attempt, method=method, target=target)
        for method in (attempt.method, *head.methods)
        for target in (attempt.target, *head.targets)
    ][1:]


def _read_head(
    head: _Head, conversation: Conversation, method: str, version: str, fields: Fields, authority: str | None
) -> None:
    """Fills `head`. Raises _Fault where two readers of these bytes could disagree (RFC 9112 11.2)."""
    is_http2 = version == "HTTP/2.0"
    hosts: list[bytes] = []
    credentials: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    upgrades: list[bytes] = []
    for name, value in fields:
        if not _TOKEN.fullmatch(name):
            raise _Fault(Reason.MALFORMED_REQUEST, "a header name is not a token")
        if _CONTROL.search(value):
            raise _Fault(Reason.MALFORMED_REQUEST, "a header value is folded or holds a control character")
        match name.lower():
            case key if is_http2 and key in CONNECTION_SPECIFIC:
                raise _Fault(Reason.MALFORMED_REQUEST, f"{key.decode()} has no meaning in HTTP/2")
            case b"host":
                hosts.append(value)
            case b"content-length":
                lengths.append(value)
            case b"transfer-encoding":
                codings.append(value)
            case b"upgrade":
                upgrades.append(value)
            case b"connection" if not _END_TO_END.isdisjoint(map(bytes.strip, value.lower().split(b","))):
                raise _Fault(Reason.MALFORMED_REQUEST, "Connection names a header that is not the connection's")
            case b"accept":
                head.page = b"text/html" in value and b"json" not in value
            case b"content-type":
                head.grpc = is_http2 and bool(_GRPC.fullmatch(value))
            case b"proxy-authorization":
                credentials.append(value)
            case key if key.startswith((b"x-", b"x_")):
                _read_override(head, key.replace(b"_", b"-"), value)
    if version not in _VERSIONS:
        raise _Fault(Reason.MALFORMED_REQUEST, f"{version!a} is not HTTP/1.0, HTTP/1.1 or HTTP/2")
    if lengths or codings:
        head.has_body = _has_body(lengths, codings, version)
    if method in _UNSERVED:
        raise _Fault(Reason.MALFORMED_REQUEST, f"{method} is not served", METHOD_NOT_ALLOWED)
    if len(hosts) > 1 or not (hosts or authority):
        raise _Fault(Reason.MALFORMED_REQUEST, f"exactly one Host header is needed, not {len(hosts)}")
    names = [text.decode("latin-1") for text in hosts]
    if conversation.proxied:
        _read_proxied(head, names[0], conversation, credentials)
    elif is_http2:
        _read_authorities(head, [authority, *names] if authority else names)
    else:
        head.host = _read_authority(names[0], conversation.port)
        head.target = _read_target(head.target, head.host, conversation)
    if upgrades:
        head.upgrade = b", ".join(upgrades).decode("latin-1").lower()


def _read_override(head: _Head, name: bytes, value: bytes) -> None:
    """An origin may serve what such a header says instead of what the request line says: both are judged."""
    text = value.decode("latin-1").strip(" \t")
    if name in _METHOD_OVERRIDES:
        head.methods.append(text.upper())
    elif name in _TARGET_OVERRIDES:
        head.targets.append(text)
    if len(head.methods) > 1 or len(head.targets) > 1:
        raise _Fault(Reason.MALFORMED_REQUEST, "more than one header names another method, or another path")


def _has_body(lengths: list[bytes], codings: list[bytes], version: str) -> bool:
    """Whether a body follows. Every doubt about its end is a fault: CL.TE, TE.CL and TE.TE smuggling begin with one."""
    if lengths and codings:
        raise _Fault(Reason.MALFORMED_REQUEST, "both Content-Length and Transfer-Encoding")
    if codings:
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise _Fault(Reason.MALFORMED_REQUEST, "the only Transfer-Encoding served is one chunked")
        if version != "HTTP/1.1":
            raise _Fault(Reason.MALFORMED_REQUEST, "Transfer-Encoding needs HTTP/1.1")
        return True
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise _Fault(Reason.MALFORMED_REQUEST, "Content-Length is not one number")
    return int(lengths[0]) > 0


def _read_target(target: str, host: Hostname, conversation: Conversation) -> str:
    """The target in origin form. In absolute form it must say what Host and the connection say (RFC 9112 3.2.2)."""
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        return target
    scheme, authority, path = absolute.groups()
    if scheme.lower() != ("http" if conversation.plain else "https"):
        raise _Fault(Reason.MALFORMED_REQUEST, "the scheme of the target is not the one of this connection")
    if ":" not in authority and conversation.port != (80 if conversation.plain else 443):
        raise _Fault(Reason.MALFORMED_REQUEST, "the target names another port than this connection's")
    if _read_authority(authority, conversation.port) != host:
        raise _Fault(Reason.MALFORMED_REQUEST, "the target and Host name two hosts")
    return path if path.startswith("/") else "/" + path


def _read_authorities(head: _Head, texts: list[str]) -> None:
    """`:authority`, and Host if it was sent as well, must both be what the connection was opened for."""
    read = [_split_authority(text) for text in texts]
    if any(one != read[0] for one in read):
        raise _Fault(Reason.MALFORMED_REQUEST, ":authority and Host name two hosts")
    head.host, port = read[0]
    if port not in (None, head.port):
        raise _Fault(Reason.HOST_MISMATCH, f"the host names port {port} on a connection to port {head.port}")


def _read_proxied(head: _Head, host: str, conversation: Conversation, credentials: list[bytes]) -> None:
    """A request to an explicit proxy says itself where it goes and who sends it."""
    sealed = conversation.credential
    if sealed is not None and not (len(credentials) == 1 and is_sealed(credentials[0], sealed)):
        raise _Fault(Reason.CREDENTIALS, "the connection was opened with other credentials")
    absolute = _ABSOLUTE.fullmatch(head.target)
    if absolute is None or absolute[1].lower() != "http":
        raise _Fault(Reason.MALFORMED_REQUEST, "a request to a proxy names http:// and a host")
    head.host, port = _split_authority(absolute[2])
    head.port = port or 80
    other, port = _split_authority(host)
    if (other, port or 80) != (head.host, head.port):
        raise _Fault(Reason.MALFORMED_REQUEST, "the target and Host name two hosts")
    head.target = absolute[3] if absolute[3].startswith("/") else "/" + absolute[3]


def _read_authority(text: str, port: int) -> Hostname:
    host, given = _split_authority(text)
    if given not in (None, port):
        raise _Fault(Reason.MALFORMED_REQUEST, f"the host names port {given} on a connection to port {port}")
    return host


def _split_authority(text: str) -> tuple[Hostname, int | None]:
    """The name, and the port if there is one."""
    found = _AUTHORITY.fullmatch(text)
    if found is None and not text.startswith("["):
        raise _Fault(Reason.MALFORMED_REQUEST, "the host is not NAME or NAME:PORT")
    name, given = found.groups() if found else (text, None)
    if not name.isascii():
        raise _Fault(Reason.MALFORMED_NAME, "the host holds bytes outside ASCII")
    try:
        return parse_hostname(name), int(given) if given else None
    except MalformedName as error:
        raise _Fault(Reason.MALFORMED_NAME, str(error)) from error


def _explain(attempt: Attempt, verdict: Verdict) -> str:
    """What exactly the engine refused in method or path."""
    if verdict.reason is Reason.MALFORMED_PATH:
        literal = isinstance(verdict.rule, HostRule) and verdict.rule.encoded_slash
        try:
            parse_path(attempt.target, encoded_slash=literal)
        except MalformedPath as error:
            return str(error)
    if verdict.reason is Reason.MALFORMED_REQUEST:
        return "the method is not a known token in upper case"
    return ""
