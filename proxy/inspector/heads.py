"""HTTP/2 heads read strictly, and written for either protocol: pseudo-header fields, names, values, lengths. No I/O.

RFC 9113 8.2 and 8.3 to the letter, for what is lenient here ends up in an HTTP/1.1 head there: a line feed in a value
would begin a header of its own, a length that is not the body's would begin another request.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Final

from hpack.struct import Header, NeverIndexedHeaderTuple
from mitmproxy import http

from addons.heads import MAX_FIELDS
from addons.judge import CONNECTION_SPECIFIC, METHOD_NOT_ALLOWED, TOO_LARGE
from proxy.inspector.reading import Fields, MalformedHead

MAX_LIST = 64 * 1024  # RFC 9113 6.5.2: names, values and 32 bytes for each field
VERSION: Final = b"HTTP/2.0"

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]++")  # RFC 9113 8.2.1: upper case is malformed
_VALUE = re.compile(rb"(?![\t ])[\t\x20-\x7e\x80-\xff]*+(?<![\t ])")
_TARGET = re.compile(rb"/[^\x00-\x20\x7f]*+|\*")
_STATUS = re.compile(rb"[1-5][0-9]{2}")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_NOT_TRAILERS = CONNECTION_SPECIFIC | {b"content-length", b"host", b"te", b"authorization", b"set-cookie", b"cookie"}
_REQUEST_PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path", b":protocol"})
_SECRET = frozenset({b"authorization", b"cookie", b"set-cookie"})  # RFC 7541 7.1.3: kept out of the compression's table
_EMPTY_BODY = frozenset({b"POST", b"PUT", b"PATCH"})  # RFC 9110 8.6: they say that there is none


def read_request(head: Iterable[Header], *, ends: bool) -> tuple[http.Request, int | None]:
    """A request and the length that it announces. Raises MalformedHead with the status of the answer."""
    pseudo, fields = _split(head, _REQUEST_PSEUDO)
    if pseudo.get(b":method") == b"CONNECT":  # extended CONNECT (RFC 8441) too, which we did not offer
        raise MalformedHead("CONNECT is not served", METHOD_NOT_ALLOWED)
    if b":protocol" in pseudo:
        raise MalformedHead("the pseudo-header field :protocol is for CONNECT alone")
    if missing := [name for name in (b":method", b":scheme", b":path") if not pseudo.get(name)]:
        raise MalformedHead(f"the pseudo-header field {missing[0].decode()} is missing or empty")
    if pseudo[b":scheme"] != b"https":
        raise MalformedHead("the scheme is not the one of this connection")
    if not _NAME.fullmatch(pseudo[b":method"].lower()):
        raise MalformedHead("the method is not a token")
    if not _TARGET.fullmatch(pseudo[b":path"]):
        raise MalformedHead("the path does not begin with /, or holds a space or a control character")
    for name, value in fields:
        if name == b"te" and value.lower() != b"trailers":
            raise MalformedHead("te says something other than trailers")
    fields = _join_cookies(fields)
    if len(fields) > MAX_FIELDS:
        raise MalformedHead(f"the head has more than {MAX_FIELDS} fields", TOO_LARGE)
    length = _length(fields)
    if ends and length:
        raise MalformedHead("it announces a body, and ends")
    request = http.Request(
        host="",
        port=0,
        method=pseudo[b":method"],
        scheme=pseudo[b":scheme"],
        authority=pseudo.get(b":authority", b""),
        path=pseudo[b":path"],
        http_version=VERSION,
        headers=Fields(fields),
        content=None,
        trailers=None,
        timestamp_start=time.time(),
        timestamp_end=None,
    )
    return request, 0 if ends else length


def read_response(head: Iterable[Header], method: bytes, *, ends: bool) -> tuple[http.Response, int | None]:
    """A response (also an informational one) and the length of its body, if it says it. Raises MalformedHead."""
    pseudo, fields = _split(head, frozenset({b":status"}))
    status = pseudo.get(b":status", b"")
    if not _STATUS.fullmatch(status) or status == b"101":
        raise MalformedHead("the status is missing, or none that HTTP/2 has")
    length = _length(fields)
    if method == b"HEAD" or status in (b"204", b"304"):
        length = 0
    if ends and length:
        raise MalformedHead("it announces a body, and ends")
    response = http.Response(
        http_version=VERSION,
        status_code=int(status),
        reason=b"",
        headers=Fields(fields),
        content=None,
        trailers=None,
        timestamp_start=time.time(),
        timestamp_end=None,
    )
    return response, 0 if ends else length


def read_trailers(head: Iterable[Header]) -> http.Headers:
    """Raises MalformedHead; what frames, routes or authenticates cannot come late (RFC 9110 6.5.1)."""
    _, fields = _split(head, frozenset())
    if wrong := [name for name, _ in fields if name in _NOT_TRAILERS]:
        raise MalformedHead(f"{wrong[0].decode()} stands in the trailers")
    return Fields(fields)


def write_request(request: http.Request) -> list[Header]:
    data = request.data
    pseudo = [
        (b":method", data.method),
        (b":scheme", data.scheme),
        (b":authority", data.authority),
        (b":path", data.path),
    ]
    return pseudo + write_fields(data.headers.fields)


def write_response(response: http.Response) -> list[Header]:
    """Whichever protocol it came in. What an HTTP/1.1 head said about its connection stays behind."""
    fields = response.headers.fields
    if response.data.http_version != VERSION:
        named = {name.strip().lower() for name in response.headers.get("connection", "").encode("latin-1").split(b",")}
        dropped = CONNECTION_SPECIFIC | named
        fields = tuple((lower, value) for name, value in fields if (lower := name.lower()) not in dropped)
    return [(b":status", b"%d" % response.status_code), *write_fields(fields)]


def write_fields(fields: Iterable[tuple[bytes, bytes]]) -> list[Header]:
    return [NeverIndexedHeaderTuple(*field) if field[0] in _SECRET else field for field in fields]


def as_http1(request: http.Request, *, has_body: bool) -> http.Request:
    """The same request for an origin that speaks HTTP/1.1."""
    data = request.data
    fields = [(b"Host", data.authority)]
    fields += [field for field in data.headers.fields if field[0] not in (b"te", b"host")]
    has_length = b"content-length" in data.headers
    if has_body and not has_length:
        fields.append((b"Transfer-Encoding", b"chunked"))
    elif not has_body and not has_length and data.method in _EMPTY_BODY:
        fields.append((b"Content-Length", b"0"))
    return http.Request(
        host=data.host,
        port=data.port,
        method=data.method,
        scheme=data.scheme,
        authority=b"",
        path=data.path,
        http_version=b"HTTP/1.1",
        headers=Fields(fields),
        content=None,
        trailers=None,
        timestamp_start=data.timestamp_start,
        timestamp_end=None,
    )


def _split(head: Iterable[Header], known: frozenset[bytes]) -> tuple[dict[bytes, bytes], Sequence[tuple[bytes, bytes]]]:
    """Pseudo-header fields, and the others. Raises MalformedHead."""
    pseudo: dict[bytes, bytes] = {}
    fields: list[tuple[bytes, bytes]] = []
    size = 0
    for name, value in head:
        assert isinstance(name, bytes)
        assert isinstance(value, bytes)
        size += len(name) + len(value) + 32
        if not _VALUE.fullmatch(value):
            raise MalformedHead("a field's value begins or ends with a space, or holds a control character")
        if name[:1] == b":":
            if name not in known or name in pseudo or fields:
                raise MalformedHead("a pseudo-header field is unknown, stands twice or behind other fields")
            pseudo[name] = value
        elif not _NAME.fullmatch(name):
            raise MalformedHead("a field's name is not a token in lower case")
        elif name in CONNECTION_SPECIFIC:
            raise MalformedHead(f"{name.decode()} has no meaning in HTTP/2")
        else:
            fields.append((name, value))
    if size > MAX_LIST:
        raise MalformedHead(f"the head is larger than {MAX_LIST // 1024} KiB", TOO_LARGE)
    return pseudo, fields


def _join_cookies(fields: Sequence[tuple[bytes, bytes]]) -> Sequence[tuple[bytes, bytes]]:
    """RFC 9113 8.2.3: crumbs of a cookie are one field everywhere but in HTTP/2."""
    crumbs = [value for name, value in fields if name == b"cookie"]
    if len(crumbs) < 2:
        return fields
    return [field for field in fields if field[0] != b"cookie"] + [(b"cookie", b"; ".join(crumbs))]


def _length(fields: Iterable[tuple[bytes, bytes]]) -> int | None:
    lengths = [value for name, value in fields if name == b"content-length"]
    if not lengths:
        return None
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise MalformedHead("content-length is not one number")
    return int(lengths[0])
