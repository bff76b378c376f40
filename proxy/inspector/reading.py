"""HTTP/1.1 read strictly out of a bounded buffer: heads by one grammar, chunks without their trailers. No I/O."""

from __future__ import annotations

import re

import h11
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from mitmproxy import http
from mitmproxy.net.http.http1 import read_request_head, read_response_head
from mitmproxy.net.http.validate import validate_headers

from addons.judge import BAD_REQUEST, METHOD_NOT_ALLOWED, TOO_LARGE

MAX_HEAD = 64 * 1024  # mitmproxy has no cap: a head without an end would grow our memory
MAX_LINE = 16 * 1024  # a chunk's size line with its extensions, or all trailers

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # RFC 9110 5.6.2
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*+"
_BLANK_LINE = re.compile(rb"\n\r?\n")


def _grammar(first_line: bytes, line_end: bytes) -> re.Pattern[bytes]:
    return re.compile(first_line + line_end + rb"(?:" + _TOKEN + rb":" + _TEXT + line_end + rb")*+" + line_end)


# RFC 9112 3 and 5 to the letter: one space, CR LF, no folding, no space before a colon, no bare CR or LF. What a target
# may hold is the judge's matter. An origin may end its lines with LF alone: they are written anew for the client.
_REQUEST = _grammar(_TOKEN + rb" [^\x00-\x20\x7f]++ HTTP/1\.[01]", rb"\r\n")
_RESPONSE = _grammar(rb"HTTP/1\.[01] [1-9][0-9]{2}(?: " + _TEXT + rb")?", rb"\r?\n")


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


class Chunks(ChunkedReader):
    """Reads chunked bodies and drops their trailers, which RFC 9110 6.5.1 allows and mitmproxy cannot carry."""

    def __call__(self, buf: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        found = super().__call__(buf)
        return h11.EndOfMessage() if isinstance(found, h11.EndOfMessage) else found


def read_request(head: bytes) -> http.Request:
    """Raises ValueError for what is no request head, or for CONNECT and TRACE, which mitmproxy would act upon."""
    if not _REQUEST.fullmatch(head):
        raise MalformedHead("this is not an HTTP/1.1 request head")
    method = head[: head.index(b" ")]
    if method in (b"CONNECT", b"TRACE"):
        raise MalformedHead(f"{method.decode()} is not served", METHOD_NOT_ALLOWED)
    request = read_request_head(head[:-4].split(b"\r\n"))
    request.headers = Fields(request.headers.fields)
    return request


def read_response(head: bytes, request: http.Request) -> http.Response:
    """Raises ValueError for what is no response head, or none to this request."""
    if not _RESPONSE.fullmatch(head):
        raise MalformedHead("this is not an HTTP/1.1 response head")
    response = read_response_head([line.removesuffix(b"\r") for line in head.rstrip(b"\r\n").split(b"\n")])
    if response.status_code == 101 and "upgrade" not in request.headers:
        raise MalformedHead("it switched protocols unasked")
    response.headers = Fields(response.headers.fields)
    validate_headers(response)
    return response
