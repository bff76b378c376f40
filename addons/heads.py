"""Reads what of a request head bears on its verdict, and refuses what two readers could read differently. No sockets.

`read_head` takes fields as any host has them; a host with a strict grammar of its own gives a `Heard`, and `place`
relates it to its connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from addons.credential import is_sealed
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Reason

if TYPE_CHECKING:
    from addons.judge import Conversation

type Fields = Iterable[tuple[bytes, bytes]]

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # a folded line (RFC 9112 5.2) shows up as CR LF in a value
_LENGTH = re.compile(rb"[0-9]{1,18}")
_AUTHORITY = re.compile(r"([^:/?#@\\\x00-\x20\x7f]+)(?::([1-9][0-9]{0,4}))?")
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
_METHOD_OVERRIDES = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})
_TARGET_OVERRIDES = frozenset({b"x-original-url", b"x-rewrite-url"})  # IIS, and frameworks that were made to follow it
_OF_THE_JUDGE = frozenset({
    b"host", b"expect", b"te", b"trailer", b"proxy-authorization", b"content_length", b"transfer_encoding",
})  # fmt: skip
_UNSERVED = frozenset({"CONNECT", "TRACE"})  # a tunnel that nobody judges; an echo of headers that scripts may not see
_VERSIONS = frozenset({"HTTP/1.0", "HTTP/1.1", "HTTP/2.0"})
CONNECTION_SPECIFIC = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})
# RFC 9110 7.6.1: the next proxy removes what Connection names; without one of these it would read another request.
END_TO_END = frozenset({b"host", b"content-length", b"transfer-encoding", b"authorization", b"cookie"})
NOT_CHUNKED = "the only Transfer-Encoding served is one chunked"
NOT_CONTINUE = "the only expectation served is 100-continue"
MAX_TARGET = 16 * 1024
MAX_FIELDS = 100
_GRPC = re.compile(rb"application/grpc(?:[+;].*)?", re.DOTALL)  # not application/grpc-web, which has a body of its own


class Fault(Exception):
    """What is wrong with a head. `note` says it in words; `status` is what it is answered with, None: as its reason."""

    def __init__(self, reason: Reason, note: str, status: int | None = None) -> None:
        self.reason = reason
        self.note = note
        self.status = status


@dataclass(slots=True)
class Head:
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


class Heard(Protocol):
    """What of the fields of a request bears on the verdict, as a strict grammar has read them (`proxy.lane.http1`)."""

    @property
    def host(self) -> str | None: ...
    @property
    def has_body(self) -> bool: ...
    @property
    def upgrade(self) -> str | None: ...
    @property
    def page(self) -> bool: ...
    @property
    def methods(self) -> tuple[str, ...]: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def credentials(self) -> tuple[bytes, ...]: ...


def read_head(
    head: Head, conversation: Conversation, method: str, version: str, fields: Fields, authority: str | None
) -> None:
    """Fills `head`. Raises Fault where two readers of these bytes could disagree (RFC 9112 11.2)."""
    is_http2 = version == "HTTP/2.0"
    hosts: list[bytes] = []
    credentials: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    upgrades: list[bytes] = []
    count = 0
    for name, value in fields:
        count += 1
        if not _TOKEN.fullmatch(name):
            raise Fault(Reason.MALFORMED_REQUEST, "a header name is not a token")
        if _CONTROL.search(value):
            raise Fault(Reason.MALFORMED_REQUEST, "a header value is folded or holds a control character")
        match name.lower():
            case key if is_http2 and key in CONNECTION_SPECIFIC:
                raise Fault(Reason.MALFORMED_REQUEST, f"{key.decode()} has no meaning in HTTP/2")
            case b"host":
                hosts.append(value)
            case b"cookie" if is_http2:
                count -= 1  # RFC 9113 8.2.3: crumbs of one field
            case b"content-length":
                lengths.append(value)
            case b"transfer-encoding":
                codings.append(value)
            case b"content_length" | b"transfer_encoding":  # CGI and its heirs make one variable of `-` and `_`
                raise Fault(Reason.MALFORMED_REQUEST, f"{name.decode()} is taken for a header of framing by some")
            case b"expect" if value.lower() != b"100-continue":
                raise Fault(Reason.MALFORMED_REQUEST, NOT_CONTINUE, HTTPStatus.EXPECTATION_FAILED)
            case b"upgrade":
                upgrades.append(value)
            case b"connection" if not END_TO_END.isdisjoint(map(bytes.strip, value.lower().split(b","))):
                raise Fault(Reason.MALFORMED_REQUEST, "Connection names a header that is not the connection's")
            case b"accept":
                head.page = b"text/html" in value and b"json" not in value
            case b"content-type":
                head.grpc = is_http2 and bool(_GRPC.fullmatch(value))
            case b"proxy-authorization":
                credentials.append(value)
            case key if key.startswith((b"x-", b"x_")):
                _read_override(head, key.replace(b"_", b"-"), value)
    if count > MAX_FIELDS:
        note = f"the head has more than {MAX_FIELDS} fields"
        raise Fault(Reason.MALFORMED_REQUEST, note, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    if len(head.target) > MAX_TARGET:
        note = f"the target is longer than {MAX_TARGET // 1024} KiB"
        raise Fault(Reason.MALFORMED_REQUEST, note, HTTPStatus.REQUEST_URI_TOO_LONG)
    if version not in _VERSIONS:
        note = f"{version!a} is not HTTP/1.0, HTTP/1.1 or HTTP/2"
        raise Fault(Reason.MALFORMED_REQUEST, note, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    if lengths or codings:
        head.has_body = _has_body(lengths, codings, version)
    if method in _UNSERVED:
        raise Fault(Reason.MALFORMED_REQUEST, f"{method} is not served", HTTPStatus.METHOD_NOT_ALLOWED)
    if len(hosts) > 1 or not (hosts or authority):
        raise Fault(Reason.MALFORMED_REQUEST, f"exactly one Host header is needed, not {len(hosts)}")
    names = [text.decode("latin-1") for text in hosts]
    if is_http2 and not conversation.proxied:
        _read_authorities(head, [authority, *names] if authority else names)
    else:
        place(head, conversation, names[0], credentials)
    if upgrades:
        head.upgrade = b", ".join(upgrades).decode("latin-1").lower()


def bears_on_verdict(name: bytes) -> bool:
    """Whether a field of this name (in lower case) bears on the verdict or on where a message ends. Content-Length,
    which follows from a body, is not asked about."""
    alike = name.replace(b"_", b"-")
    overrides = alike in _METHOD_OVERRIDES or alike in _TARGET_OVERRIDES
    return overrides or name in CONNECTION_SPECIFIC or name in _OF_THE_JUDGE


def is_well_formed(name: bytes, value: bytes) -> bool:
    """Whether this is one field and no more: a line break in it would begin another."""
    return bool(_TOKEN.fullmatch(name)) and not _CONTROL.search(value)


def place(head: Head, conversation: Conversation, host: str, credentials: Sequence[bytes]) -> None:
    """Relate an HTTP/1 request to the connection that it came on. Raises Fault."""
    if conversation.proxied:
        _read_proxied(head, host, conversation, credentials)
    else:
        head.host = _read_authority(host, conversation.port)
        head.target = _read_target(head.target, head.host, conversation)


def _read_override(head: Head, name: bytes, value: bytes) -> None:
    """An origin may serve what such a header says instead of what the request line says: both are judged."""
    text = value.decode("latin-1").strip(" \t")
    if name in _METHOD_OVERRIDES:
        head.methods.append(text.upper())
    elif name in _TARGET_OVERRIDES:
        head.targets.append(text)
    if len(head.methods) > 1 or len(head.targets) > 1:
        raise Fault(Reason.MALFORMED_REQUEST, "more than one header names another method, or another path")


def _has_body(lengths: list[bytes], codings: list[bytes], version: str) -> bool:
    """Whether a body follows. Every doubt about its end is a fault: CL.TE, TE.CL and TE.TE smuggling begin with one."""
    if lengths and codings:
        raise Fault(Reason.MALFORMED_REQUEST, "both Content-Length and Transfer-Encoding")
    if codings:
        if len(codings) > 1:
            raise Fault(Reason.MALFORMED_REQUEST, NOT_CHUNKED)
        if codings[0].lower() != b"chunked":
            raise Fault(Reason.MALFORMED_REQUEST, NOT_CHUNKED, coding_status(codings[0]))
        if version != "HTTP/1.1":
            raise Fault(Reason.MALFORMED_REQUEST, "Transfer-Encoding needs HTTP/1.1")
        return True
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise Fault(Reason.MALFORMED_REQUEST, "Content-Length is not one number")
    return int(lengths[0]) > 0


def coding_status(value: bytes) -> int:
    """What a Transfer-Encoding other than one chunked is answered with: 501 where it may be one that we do not know
    (RFC 9112 6.1), 400 where it hides the end of the body."""
    codings = [coding.strip(b"\t ") for coding in value.lower().split(b",")]
    is_known_form = all(_TOKEN.fullmatch(coding) for coding in codings) and b"chunked" not in codings[:-1]
    return HTTPStatus.NOT_IMPLEMENTED if is_known_form else HTTPStatus.BAD_REQUEST


def _read_target(target: str, host: Hostname, conversation: Conversation) -> str:
    """The target in origin form. In absolute form it must say what Host and the connection say (RFC 9112 3.2.2)."""
    if target.startswith("/"):
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        return target
    scheme, authority, path = absolute.groups()
    if scheme.lower() != ("http" if conversation.plain else "https"):
        raise Fault(Reason.MALFORMED_REQUEST, "the scheme of the target is not the one of this connection")
    if ":" not in authority and conversation.port != (80 if conversation.plain else 443):
        raise Fault(Reason.MALFORMED_REQUEST, "the target names another port than this connection's")
    name, given = _split_authority(authority)
    if name != host or given not in (None, conversation.port):
        raise Fault(Reason.MALFORMED_REQUEST, "the target and Host name two hosts")
    return path if path.startswith("/") else "/" + path


def _read_authorities(head: Head, texts: list[str]) -> None:
    """`:authority`, and Host if it was sent as well, must both be what the connection was opened for."""
    read = [_split_authority(text) for text in texts]
    if any(one != read[0] for one in read):
        raise Fault(Reason.MALFORMED_REQUEST, ":authority and Host name two hosts")
    head.host, port = read[0]
    if port not in (None, head.port):
        raise Fault(Reason.HOST_MISMATCH, f"the host names port {port} on a connection to port {head.port}")


def _read_proxied(head: Head, host: str, conversation: Conversation, credentials: Sequence[bytes]) -> None:
    """A request to an explicit proxy says itself where it goes and who sends it."""
    sealed = conversation.credential
    if sealed is not None and not (len(credentials) == 1 and is_sealed(credentials[0], sealed)):
        raise Fault(Reason.CREDENTIALS, "the connection was opened with other credentials")
    absolute = _ABSOLUTE.fullmatch(head.target)
    if absolute is None or absolute[1].lower() != "http":
        raise Fault(Reason.MALFORMED_REQUEST, "a request to a proxy names http:// and a host")
    head.host, port = _split_authority(absolute[2])
    head.port = port or 80
    other, port = _split_authority(host)
    if (other, port or 80) != (head.host, head.port):
        raise Fault(Reason.MALFORMED_REQUEST, "the target and Host name two hosts")
    head.target = absolute[3] if absolute[3].startswith("/") else "/" + absolute[3]


def _read_authority(text: str, port: int) -> Hostname:
    host, given = _split_authority(text)
    if given not in (None, port):
        raise Fault(Reason.HOST_MISMATCH, f"the host names port {given} on a connection to port {port}")
    return host


@lru_cache(512)  # of a pure function; names are asked for again and again
def _split_authority(text: str) -> tuple[Hostname, int | None]:
    """The name, and the port if there is one."""
    found = _AUTHORITY.fullmatch(text)
    if found is None and not text.startswith("["):
        raise Fault(Reason.MALFORMED_REQUEST, "the host is not NAME or NAME:PORT")
    name, given = found.groups() if found else (text, None)
    if not name.isascii():
        raise Fault(Reason.MALFORMED_NAME, "the host holds bytes outside ASCII")
    try:
        return parse_hostname(name), int(given) if given else None
    except MalformedName as error:
        raise Fault(Reason.MALFORMED_NAME, str(error)) from error
