"""HTTP/1.1 out of a bounded buffer, in mitmproxy's values. What is admitted, the lane's grammar says. No I/O."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import h11
from h11._receivebuffer import ReceiveBuffer
from mitmproxy import http
from mitmproxy.net.http.validate import validate_headers

from addons.judge import BAD_REQUEST, TOO_LARGE
from proxy.lane.body import Chunked
from proxy.lane.http1 import MAX_HEAD, Refused, parse_request, parse_response, read_fields

MAX_AHEAD = 16 * 1024  # of a later request, or of a body before its origin is there; then the client is not read
UNASKED = "it switched protocols unasked"

_BLANK_LINE = re.compile(rb"\n\r?\n")


class MalformedHead(ValueError):
    """Bytes that are no head, or too many of them. `status` is what a client is told about its own."""

    def __init__(self, note: str, status: int = BAD_REQUEST) -> None:
        self.status = status
        super().__init__(note)


class HeadBuffer(ReceiveBuffer):
    """h11's buffer, which also gives up a whole head, and all it holds without copying it."""

    def take_head(self) -> bytes | None:
        """The bytes up to the first empty line, or None: more is needed. Raises MalformedHead."""
        if self._data.startswith((b"\r", b"\n")):
            raise MalformedHead("an empty line stands where a head begins")
        end = _BLANK_LINE.search(self._data, self._multiple_lines_search)
        if (end.end() if end else len(self._data)) > MAX_HEAD:
            raise MalformedHead(f"the head is larger than {MAX_HEAD // 1024} KiB", TOO_LARGE)
        if end is None:
            self._multiple_lines_search = max(0, len(self._data) - 2)
            return None
        return bytes(self._extract(end.end()))

    def maybe_extract_at_most(self, count: int) -> bytearray | None:
        if not self._data:
            return None
        if count < len(self._data):
            return self._extract(count)
        whole, self._data = self._data, bytearray()
        self._next_line_search = self._multiple_lines_search = 0
        return whole


class Fields(http.Headers):
    """Headers that find a field without turning every name to text first: the layers look up twenty for a request."""

    def get_all(self, name: str | bytes) -> list[str]:
        wanted = (name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")).lower()
        return [value.decode("utf-8", "surrogateescape") for key, value in self.fields if key.lower() == wanted]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str | bytes) and bool(self.get_all(name))

    def get[T](self, name: str | bytes, default: T | None = None) -> str | T | None:
        return ", ".join(found) if (found := self.get_all(name)) else default


class Chunks:
    """A chunked body; its trailers are read and dropped, which RFC 9110 6.5.1 allows and mitmproxy cannot carry.

    in_request  it may have no extensions
    """

    def __init__(self, *, in_request: bool) -> None:
        self._body = Chunked(in_request=in_request)
        self._is_whole = False

    def __call__(self, buf: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        """What there is of it; None: more is needed. Raises Refused."""
        if self._is_whole:
            return h11.EndOfMessage()
        parts, self._is_whole, rest = self._body.feed(bytes(buf.maybe_extract_at_most(len(buf)) or b""))
        buf += rest
        if parts:
            return h11.Data(data=b"".join(parts))
        return h11.EndOfMessage() if self._is_whole else None

    def read_eof(self) -> h11.Data | h11.EndOfMessage:
        raise h11.RemoteProtocolError("the connection ended within a chunked body")


def read_request(head: bytes) -> http.Request:
    """A request whose `path` is its target as received, in whichever form. Raises MalformedHead."""
    try:
        parse_request(head)
    except Refused as refused:
        raise MalformedHead(refused.why, refused.status) from None
    line, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    method, target, version = line.split(b" ")
    return http.Request(
        host="",
        port=0,
        method=method,
        scheme=b"",
        authority=b"",
        path=target,
        http_version=version,
        headers=_fields(lines),
        content=None,
        trailers=None,
        timestamp_start=time.time(),
        timestamp_end=None,
    )


def read_response(head: bytes, request: http.Request) -> http.Response:
    """Raises ValueError for what is no response head, or none to this request."""
    try:
        parsed = parse_response(head, request.method)
    except Refused as refused:
        raise MalformedHead(refused.why) from None
    if parsed.status == 101 and not _asked_for(request, parsed.fields.upgrade):
        raise MalformedHead(UNASKED)
    line, *lines = [one.removesuffix(b"\r") for one in head.rstrip(b"\r\n").split(b"\n")]
    response = http.Response(
        http_version=line.partition(b" ")[0],
        status_code=parsed.status,
        reason=parsed.phrase,
        headers=_fields(lines),
        content=None,
        trailers=None,
        timestamp_start=time.time(),
        timestamp_end=None,
    )
    validate_headers(response)
    return response


def find_fault(request: http.Request, response: http.Response) -> str | None:
    """What is wrong with the fields of a response that mitmproxy has read itself."""
    try:
        fields = read_fields(bytes(response.headers), in_request=False)
    except Refused as refused:
        return refused.why
    return UNASKED if response.status_code == 101 and not _asked_for(request, fields.upgrade) else None


def _fields(lines: Iterable[bytes]) -> Fields:
    pairs = (line.partition(b":") for line in lines)
    return Fields((name, value.strip(b"\t ")) for name, _, value in pairs)


def _asked_for(request: http.Request, upgrade: str | None) -> bool:
    """Whether the request wanted to switch to this very protocol (RFC 9110 7.8)."""
    wanted, options = request.headers.get("upgrade", ""), request.headers.get("connection", "")
    return upgrade in wanted.lower().split(", ") and "upgrade" in map(str.strip, options.lower().split(","))
