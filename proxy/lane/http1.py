"""The grammar of HTTP/1.1 heads: bytes become a Request or a Response, or are refused. It knows no socket, no policy.

RFC 9112 to the letter, and stricter where two readers were ever seen to differ. One possessive expression validates a
whole head in one pass; what it does not match is refused, and only then looked at again, to say why.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from typing import NamedTuple

from addons.heads import END_TO_END, MAX_FIELDS, MAX_TARGET, NOT_CHUNKED, NOT_CONTINUE, coding_status
from addons.judge import (
    BAD_GATEWAY,
    BAD_REQUEST,
    EXPECTATION_FAILED,
    METHOD_NOT_ALLOWED,
    TARGET_TOO_LONG,
    TOO_LARGE,
    VERSION_NOT_SUPPORTED,
)
from policies.model import Reason

MAX_HEAD = 64 * 1024  # a head without an end must not grow our memory
MAX_LENGTH_DIGITS = 18
MAX_REPEATED = 4096  # bytes of the last head that a connection remembers

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # RFC 9110 5.6.2
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*+"


def _lines(end: bytes) -> bytes:
    return rb"((?:" + _TOKEN + rb":" + _TEXT + end + rb")*+)"


_LINE = rb"(" + _TOKEN + rb") ([^\x00-\x20\x7f]++) HTTP/1\.([01])\r\n"
_REQUEST_LINE = re.compile(_LINE)
_REQUEST = re.compile(_LINE + _lines(rb"\r\n") + rb"\r\n")
# RFC 9112 2.2: an origin may end its lines with LF alone. They are written anew for the client.
_RESPONSE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: (" + _TEXT + rb"))?\r?\n" + _lines(rb"\r?\n") + rb"\r?\n")
_TRAILERS = re.compile(_lines(rb"\r\n"))
_FIELD = re.compile(rb"([^:]++):[\t ]*+([^\r\n]*+)\r?\n")
_LENGTH = re.compile(rb"[0-9]{1,%d}" % MAX_LENGTH_DIGITS)

_OTHER_VERSION = re.compile(rb"[^\r\n ]+ [^\r\n ]+ HTTP/(?!1\.[01]\r?\n)[0-9]+(?:\.[0-9]+)?\r?\n")
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n|\x00")
_FOLDED = re.compile(rb"\n[\t ]")
_SPACED = re.compile(rb"\n[^:\r\n]*[\t ]:")

_UNSERVED = frozenset({b"CONNECT", b"TRACE"})
_BINDING = (b"ntlm", b"negotiate")  # they authenticate the connection, not the request


class Refused(Exception):
    """Bytes that are not carried. `status` is the client's answer, `why` one clause for a person."""

    def __init__(self, status: int, reason: Reason, why: str) -> None:
        self.status = status
        self.reason = reason
        self.why = why
        super().__init__(f"{status} {reason}: {why}")


class Fields(NamedTuple):
    """The fields of one head.

    lines        those that go on, each rebuilt as `Name: value` CR LF; none of this connection, of framing, and no Host
    host         the value of Host, in latin-1; None: there was none
    length       Content-Length
    is_chunked   Transfer-Encoding: chunked
    closes, keeps_alive  what Connection says
    upgrade      the protocols of Upgrade in lower case; `switches`: Connection names it too
    expects      Expect: 100-continue
    page         Accept prefers a page to read
    methods, targets  what overrides those of the request line
    credentials  values of Proxy-Authorization
    binds        its credentials or challenge are the connection's own (NTLM, Negotiate): nobody else may use it
    """

    lines: bytes
    host: str | None = None
    length: int | None = None
    is_chunked: bool = False
    closes: bool = False
    keeps_alive: bool = False
    upgrade: str | None = None
    switches: bool = False
    expects: bool = False
    page: bool = False
    methods: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    credentials: tuple[bytes, ...] = ()
    binds: bool = False

    @property
    def has_body(self) -> bool:
        return self.is_chunked or bool(self.length)


class Request(NamedTuple):
    """One request head. `minor` is 1, or 0 for HTTP/1.0; `target` as received, in any form."""

    method: str
    target: str
    minor: int
    fields: Fields

    @property
    def closes(self) -> bool:
        """The client wants no other request on this connection."""
        return self.fields.closes or not (self.minor or self.fields.keeps_alive)


class Response(NamedTuple):
    """One response head. `has_body`: bytes follow it; of no length and not chunked, they end with the connection."""

    status: int
    phrase: bytes
    minor: int
    fields: Fields
    has_body: bool

    @property
    def closes(self) -> bool:
        """The origin takes no other request on this connection."""
        return self.fields.closes or not (self.minor or self.fields.keeps_alive)

    @property
    def is_interim(self) -> bool:
        return self.status < 200


def find_end(data: bytes, begin: int = 0) -> int:
    """Where the head that `data` begins with ends, behind its empty line; 0: more is needed.

    begin  where to look on, of what was searched already: the value that `len(data)` had then, less 3
    """
    crlf = data.find(b"\n\r\n", begin)
    lf = data.find(b"\n\n", begin, crlf + 1 if crlf >= 0 else len(data))
    if lf >= 0:
        return lf + 2
    return crlf + 3 if crlf >= 0 else 0


def parse_request(head: bytes) -> Request:
    """The request of a whole head, its empty line included. Raises Refused."""
    found = _REQUEST.fullmatch(head)
    if found is None:
        raise _explain(head)
    method, target, minor, block = found.groups()
    _check_line(method, target)
    return _request_of(method, target, minor, read_fields(block))


def _check_line(method: bytes, target: bytes) -> None:
    if method in _UNSERVED:
        raise Refused(METHOD_NOT_ALLOWED, Reason.MALFORMED_REQUEST, f"{method.decode()} is not served")
    if len(target) > MAX_TARGET:
        raise _malformed(f"the target is longer than {MAX_TARGET // 1024} KiB", TARGET_TOO_LONG)


def _request_of(method: bytes, target: bytes, minor: bytes, fields: Fields) -> Request:
    if fields.host is None:
        raise _malformed("exactly one Host header is needed, not 0")
    if minor == b"0":
        if fields.is_chunked:
            raise _malformed("Transfer-Encoding needs HTTP/1.1")
        if fields.expects:
            fields = fields._replace(expects=False)  # RFC 9110 10.1.1
    return Request(method.decode("ascii"), target.decode("latin-1"), int(minor), fields)


class RequestReader:
    """Reads one client's requests as `parse_request` does. From one to the next, most clients repeat every field."""

    __slots__ = ("_block", "_fields")

    def __init__(self) -> None:
        self._block = b""  # with the empty line
        self._fields: Fields | None = None

    def read(self, head: bytes) -> Request:
        """The request of a whole head, its empty line included. Raises Refused."""
        begin = head.find(b"\n") + 1
        if self._fields is not None and head.endswith(self._block) and len(head) == begin + len(self._block):
            found = _REQUEST_LINE.fullmatch(head, 0, begin)
            if found is not None:
                method, target, minor = found.groups()
                _check_line(method, target)
                return _request_of(method, target, minor, self._fields)
        request = parse_request(head)
        if len(head) - begin <= MAX_REPEATED and request.minor:  # with HTTP/1.0 some mean something else
            self._block, self._fields = head[begin:], request.fields
        return request


class ResponseReader:
    """Reads one origin's responses as `parse_response` does. One that is polled says the same again."""

    __slots__ = ("_head", "_method", "_response")

    def __init__(self) -> None:
        self._head = b""
        self._method = ""
        self._response: Response | None = None

    def read(self, head: bytes, method: str) -> Response:
        """The response to a `method` request, of a whole head with its empty line. Raises Refused with 502."""
        if self._response is not None and head == self._head and method == self._method:
            return self._response
        response = parse_response(head, method)
        if len(head) <= MAX_REPEATED:
            self._head, self._method, self._response = head, method, response
        return response


def parse_response(head: bytes, method: str) -> Response:
    """The response to a `method` request, of a whole head with its empty line. Raises Refused with 502."""
    found = _RESPONSE.fullmatch(head)
    if found is None:
        raise _unanswerable("its head is not one of HTTP/1.1")
    minor, status, phrase, block = found.groups()
    try:
        fields = read_fields(block, in_request=False)
    except Refused as refused:
        raise _unanswerable(refused.why) from None
    if fields.is_chunked and minor == b"0":
        raise _unanswerable("Transfer-Encoding needs HTTP/1.1")
    number = int(status)
    bodiless = method == "HEAD" or number < 200 or number in (204, 304)
    has_body = not bodiless and (fields.is_chunked or fields.length != 0)
    return Response(number, phrase or b"", int(minor), fields, has_body)


def parse_trailers(block: bytes) -> bytes:
    """The trailer lines, rebuilt; `block` ends before the empty line. Raises Refused.

    What frames, routes or authenticates cannot come late (RFC 9110 6.5.1).
    """
    found = _TRAILERS.fullmatch(block)
    if found is None:
        raise _malformed("the trailers are malformed")
    lines = []
    for name, value in _FIELD.findall(block):
        if name.lower().replace(b"_", b"-") in _NOT_TRAILERS:
            raise _malformed(f"{name.decode()} stands in the trailers")
        lines.append(b"%b: %b\r\n" % (name, value.rstrip(b"\t ")))
    if len(lines) > MAX_FIELDS:
        raise _malformed(f"there are more than {MAX_FIELDS} trailers", TOO_LARGE)
    return b"".join(lines)


# --- fields ---

_HOST, _LENGTH_, _CODING, _CONNECTION, _UPGRADE, _EXPECT, _DROP, _LOOK_ALIKE = range(1, 9)
_ACCEPT, _METHOD_OVERRIDE, _TARGET_OVERRIDE, _CREDENTIALS, _AUTHENTICATION = range(9, 14)

_KEPT = frozenset({_ACCEPT, _METHOD_OVERRIDE, _TARGET_OVERRIDE, _AUTHENTICATION})  # they go on as they are
_REQUESTS_OWN = frozenset({_HOST, _LOOK_ALIKE, _EXPECT})  # they mean nothing in a response


def _spellings(name: bytes) -> list[bytes]:
    """CGI and its heirs make one variable of `-` and `_`: an origin may heed any of these."""
    first, *rest = name.split(b"-")
    return [b"".join((first, *pairs)) for pairs in ([s + w for s, w in zip(signs, rest, strict=True)]
            for signs in product((b"-", b"_"), repeat=len(rest)))]  # fmt: skip


@cache
def _kinds() -> dict[bytes, int]:
    kinds: dict[bytes, int] = {}
    for name in (b"content-length", b"transfer-encoding"):
        kinds.update(dict.fromkeys(_spellings(name), _LOOK_ALIKE))
    for name in (b"x-http-method-override", b"x-http-method", b"x-method-override"):
        kinds.update(dict.fromkeys(_spellings(name), _METHOD_OVERRIDE))
    for name in (b"x-original-url", b"x-rewrite-url"):
        kinds.update(dict.fromkeys(_spellings(name), _TARGET_OVERRIDE))
    kinds |= {
        b"host": _HOST,
        b"content-length": _LENGTH_,
        b"transfer-encoding": _CODING,
        b"connection": _CONNECTION,
        b"upgrade": _UPGRADE,
        b"expect": _EXPECT,
        b"accept": _ACCEPT,
        b"authorization": _AUTHENTICATION,
        b"www-authenticate": _AUTHENTICATION,
        b"proxy-authenticate": _AUTHENTICATION,
        b"proxy-authorization": _CREDENTIALS,
    }
    kinds.update(dict.fromkeys((b"keep-alive", b"proxy-connection", b"te", b"http2-settings"), _DROP))
    return kinds


_KINDS = _kinds()
_NOT_TRAILERS = END_TO_END | {
    b"connection", b"keep-alive", b"proxy-connection", b"upgrade", b"te", b"trailer", b"expect", b"set-cookie",
    b"proxy-authorization", b"www-authenticate", b"content-encoding", b"content-type", b"content-range", b"location",
}  # fmt: skip


def read_fields(block: bytes, *, in_request: bool = True) -> Fields:
    """The fields of lines that the grammar has admitted. Raises Refused."""
    pairs = _FIELD.findall(block)
    if len(pairs) > MAX_FIELDS:
        raise _malformed(f"the head has more than {MAX_FIELDS} fields", TOO_LARGE)
    lines: list[bytes] = []
    special: list[tuple[int, bytes, bytes]] = []
    kind_of = _KINDS.get
    for name, value in pairs:
        kind = kind_of(name.lower())
        if kind is None:
            lines.append(b"%b: %b\r\n" % (name, value.rstrip(b"\t ")))
            continue
        value = value.rstrip(b"\t ")
        special.append((kind, name, value))
        if kind in _KEPT or (kind in _REQUESTS_OWN and not in_request):
            lines.append(b"%b: %b\r\n" % (name, value))
    return _read_special(special, lines, in_request)


def _read_special(special: list[tuple[int, bytes, bytes]], lines: list[bytes], in_request: bool) -> Fields:
    host: str | None = None
    length: int | None = None
    is_chunked = closes = keeps_alive = switches = expects = page = binds = False
    upgrades: list[bytes] = []
    methods: list[str] = []
    targets: list[str] = []
    credentials: list[bytes] = []
    options: list[bytes] = []
    for kind, name, value in special:
        if kind == _HOST:
            if host is not None and in_request:
                raise _malformed("exactly one Host header is needed, not 2")
            host = value.decode("latin-1")
        elif kind == _ACCEPT:
            page = b"text/html" in value and b"json" not in value
        elif kind == _CONNECTION:
            options += value.lower().split(b",")
        elif kind == _LENGTH_:
            if length is not None or not _LENGTH.fullmatch(value):
                raise _malformed("Content-Length is not one number")
            length = int(value)
        elif kind == _CODING:
            if is_chunked:
                raise _malformed(NOT_CHUNKED)
            if value.lower() != b"chunked":
                raise _malformed(NOT_CHUNKED, coding_status(value))
            is_chunked = True
        elif kind == _AUTHENTICATION:
            binds = binds or value[:9].lower().startswith(_BINDING)
            if not in_request:  # challenges may stand in one list
                binds = binds or any(scheme in value.lower() for scheme in _BINDING)
        elif kind == _UPGRADE:
            upgrades.append(value)
        elif kind == _EXPECT:
            if value.lower() != b"100-continue" and in_request:
                raise _malformed(NOT_CONTINUE, EXPECTATION_FAILED)
            expects = True
        elif kind == _LOOK_ALIKE and in_request:
            raise _malformed(f"{name.decode()} is taken for a header of framing by some")
        elif kind == _CREDENTIALS:
            credentials.append(value)
        elif kind == _METHOD_OVERRIDE:
            methods.append(value.decode("latin-1").upper())
        elif kind == _TARGET_OVERRIDE:
            targets.append(value.decode("latin-1"))
    if is_chunked and length is not None:
        raise _malformed("both Content-Length and Transfer-Encoding")
    if len(methods) > 1 or len(targets) > 1:
        raise _malformed("more than one header names another method, or another path")
    if options:
        named = {option.strip(b"\t ") for option in options}
        if in_request and not END_TO_END.isdisjoint(named):
            raise _malformed("Connection names a header that is not the connection's")
        closes, keeps_alive, switches = b"close" in named, b"keep-alive" in named, b"upgrade" in named
        if not named <= _CONNECTIONS_OWN:  # RFC 9110 7.6.1: the next hop does not get what it names
            lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
    return Fields(
        b"".join(lines), host, length, is_chunked, closes, keeps_alive,
        b", ".join(upgrades).decode("latin-1").lower() if upgrades else None, switches, expects, page,
        tuple(methods), tuple(targets), tuple(credentials), binds,
    )  # fmt: skip


_CONNECTIONS_OWN = frozenset({b"close", b"keep-alive", b"upgrade", b""})


# --- refusals ---


def _malformed(why: str, status: int = BAD_REQUEST) -> Refused:
    return Refused(status, Reason.MALFORMED_REQUEST, why)


def _unanswerable(why: str) -> Refused:
    return Refused(BAD_GATEWAY, Reason.UPSTREAM_FAILED, why)


def _explain(head: bytes) -> Refused:
    """Why the grammar did not admit a request head."""
    if head.startswith((b"\r", b"\n")):
        return _malformed("an empty line stands where a head begins")
    if _OTHER_VERSION.match(head):
        return _malformed("the only versions served here are HTTP/1.1 and HTTP/1.0", VERSION_NOT_SUPPORTED)
    if _BARE.search(head):
        return _malformed("a line ends in a bare CR or LF, or holds a NUL")
    if _FOLDED.search(head):
        return _malformed("a header value is folded")
    if _SPACED.search(head):
        return _malformed("a space stands before a header's colon")
    return _malformed("this is not an HTTP/1.1 request head")
