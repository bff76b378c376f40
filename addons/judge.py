"""The HTTP verdict: reads a request head into an attempt, has it decided, gives a denial its status. No sockets here.

It imports no mitmproxy, so that every HTTP host (the mitmproxy addons beside it, or another) asks this one judge about
Host, framing and path, and none of them can read a request in a way of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Action, Attempt, HostRule, Reason, Stage, Verdict
from policies.paths import MalformedPath, parse_path

type Fields = Iterable[tuple[bytes, bytes]]

BAD_REQUEST, FORBIDDEN, METHOD_NOT_ALLOWED, TIMEOUT, MISDIRECTED, TOO_LARGE = 400, 403, 405, 408, 421, 431
BAD_GATEWAY = 502

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # a folded line (RFC 9112 5.2) shows up as CR LF in a value
_LENGTH = re.compile(rb"[0-9]{1,18}")
_AUTHORITY = re.compile(r"([^:/?#@\\\x00-\x20\x7f]+)(?::([1-9][0-9]{0,4}))?")
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
_METHOD_OVERRIDES = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})
_TARGET_OVERRIDES = frozenset({b"x-original-url", b"x-rewrite-url"})  # IIS, and frameworks that were made to follow it
_UNSERVED = frozenset({"CONNECT", "TRACE"})  # a tunnel that nobody judges; an echo of headers that scripts may not see
_VERSIONS = frozenset({"HTTP/1.0", "HTTP/1.1"})

_STATUS = {
    Reason.MALFORMED_NAME: BAD_REQUEST,
    Reason.MALFORMED_PATH: BAD_REQUEST,
    Reason.MALFORMED_REQUEST: BAD_REQUEST,
    Reason.HELLO_TIMEOUT: TIMEOUT,
    Reason.HOST_MISMATCH: MISDIRECTED,
    Reason.NAME_NOT_FOUND: BAD_GATEWAY,
    Reason.RESOLVER_FAILED: BAD_GATEWAY,
    Reason.UPSTREAM_REFUSED: BAD_GATEWAY,
    Reason.UPSTREAM_TIMEOUT: BAD_GATEWAY,
    Reason.UPSTREAM_CERTIFICATE: BAD_GATEWAY,
    Reason.UPSTREAM_FAILED: BAD_GATEWAY,
    Reason.GATE_FAILED: BAD_GATEWAY,
}


@dataclass(slots=True)
class Conversation:
    """One client connection: who opened it, and for which name.

    opened_for   the SNI; on a plain port the first Host that was asked for
    destination  address and port that the client asked for, where that is known
    allowed      the latest allow: the verdict under which an upstream connection is opened
    failure      why the upstream connection of the request under way failed; whoever answers the client takes it away
    """

    workload: str
    port: int
    plain: bool
    source: tuple[str, int]
    opened_for: Hostname | None = None
    destination: tuple[str, int] | None = None
    allowed: Verdict | None = None
    failure: Unreachable | None = None


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
    """

    id: str
    attempt: Attempt
    verdict: Verdict
    status: int | None = None
    note: str = ""
    has_body: bool = False
    page: bool = False

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
    target: str
    has_body: bool = False
    upgrade: str | None = None
    page: bool = False
    methods: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)


class Judge:
    """Judges request heads. `decide` may be replaced at any time; the next request is judged by the new one.

    now     POSIX seconds
    new_id  makes the id that the client and the decision record share
    """

    def __init__(
        self, decide: Callable[[Attempt], Verdict], *, now: Callable[[], float], new_id: Callable[[], str]
    ) -> None:
        self.decide = decide
        self._now = now
        self._new_id = new_id

    def request(self, conversation: Conversation, method: str, target: str, version: str, fields: Fields) -> Judgement:
        """The judgement of one request; `target` (in origin or absolute form) and `fields` are as received."""
        head = _Head(conversation.opened_for, target)
        fault: _Fault | None = None
        try:
            _read_head(head, conversation, method, version, fields)
        except _Fault as found:
            fault = found
        attempt = Attempt(
            stage=Stage.HTTP,
            workload=conversation.workload,
            host=head.host,
            port=conversation.port,
            time=self._now(),
            method=method,
            target=head.target,
            plain=conversation.plain,
            upgrade=head.upgrade,
            opened_for=conversation.opened_for,
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
        if conversation.opened_for is None and fault is None:
            conversation.opened_for = head.host
        if verdict.is_allow:
            conversation.allowed = verdict
            return Judgement(self._new_id(), attempt, verdict, has_body=head.has_body)
        status = (fault and fault.status) or _STATUS.get(verdict.reason, FORBIDDEN)
        note = fault.note if fault else _explain(attempt, verdict)
        return Judgement(self._new_id(), attempt, verdict, status, note, head.has_body, head.page)

    def unreadable(
        self, conversation: Conversation, note: str, *, status: int = BAD_REQUEST, fault: Reason | None = None
    ) -> Judgement:
        """The judgement of bytes that are no request head (too long, too slow, not HTTP). Always a denial."""
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
        return Judgement(self._new_id(), attempt, self.decide(attempt), status, note)

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


def _read_head(head: _Head, conversation: Conversation, method: str, version: str, fields: Fields) -> None:
    """Fills `head`. Raises _Fault where two readers of these bytes could disagree (RFC 9112 11.2)."""
    hosts: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    upgrades: list[bytes] = []
    for name, value in fields:
        if not _TOKEN.fullmatch(name):
            raise _Fault(Reason.MALFORMED_REQUEST, "a header name is not a token")
        if _CONTROL.search(value):
            raise _Fault(Reason.MALFORMED_REQUEST, "a header value is folded or holds a control character")
        match name.lower():
            case b"host":
                hosts.append(value)
            case b"content-length":
                lengths.append(value)
            case b"transfer-encoding":
                codings.append(value)
            case b"upgrade":
                upgrades.append(value)
            case b"accept":
                head.page = b"text/html" in value and b"json" not in value
            case key if key.startswith((b"x-", b"x_")):
                _read_override(head, key.replace(b"_", b"-"), value)
    if version not in _VERSIONS:
        raise _Fault(Reason.MALFORMED_REQUEST, f"{version!a} is not HTTP/1.0 or HTTP/1.1")
    if lengths or codings:
        head.has_body = _has_body(lengths, codings, version)
    if method in _UNSERVED:
        raise _Fault(Reason.MALFORMED_REQUEST, f"{method} is not served", METHOD_NOT_ALLOWED)
    if len(hosts) != 1:
        raise _Fault(Reason.MALFORMED_REQUEST, f"exactly one Host header is needed, not {len(hosts)}")
    head.host = _read_authority(hosts[0].decode("latin-1"), conversation.port)
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


def _read_authority(text: str, port: int) -> Hostname:
    found = _AUTHORITY.fullmatch(text)
    if found is None and not text.startswith("["):
        raise _Fault(Reason.MALFORMED_REQUEST, "the host is not NAME or NAME:PORT")
    name, given = found.groups() if found else (text, None)
    if not name.isascii():
        raise _Fault(Reason.MALFORMED_NAME, "the host holds bytes outside ASCII")
    if given is not None and int(given) != port:
        raise _Fault(Reason.MALFORMED_REQUEST, f"the host names port {given} on a connection to port {port}")
    try:
        return parse_hostname(name)
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
