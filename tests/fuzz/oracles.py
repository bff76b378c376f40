"""Other readers of HTTP/1.1: h11, and llhttp as aiohttp builds it. Each says what it reads, or that it does not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import h11
from aiohttp import http_exceptions
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy, HttpResponseParser

assert HttpRequestParser is not HttpRequestParserPy, "this aiohttp was built without llhttp"
_LOOP = asyncio.new_event_loop()
_PROTOCOL = BaseProtocol(_LOOP)
_LIMIT = 1 << 17
_REFUSALS = (http_exceptions.HttpProcessingError, ValueError)
METHODS_OF_LLHTTP = frozenset(
    [
        "DELETE",
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "CONNECT",
        "OPTIONS",
        "TRACE",
        "COPY",
        "LOCK",
        "MKCOL",
        "MOVE",
        "PROPFIND",
        "PROPPATCH",
        "SEARCH",
        "UNLOCK",
        "BIND",
        "REBIND",
        "UNBIND",
        "ACL",
        "REPORT",
        "MKACTIVITY",
        "CHECKOUT",
        "MERGE",
        "M-SEARCH",
        "NOTIFY",
        "SUBSCRIBE",
        "UNSUBSCRIBE",
        "PATCH",
        "PURGE",
        "MKCALENDAR",
        "LINK",
        "UNLINK",
        "SOURCE",
        "QUERY",
    ]
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A head as a reader reads it. `fields` in lower case, values without the spaces around them."""

    line: tuple[bytes, ...]
    fields: tuple[tuple[bytes, bytes], ...]


def close() -> None:
    """The parsers want a loop, which never runs."""
    _LOOP.close()


def h11_request(data: bytes) -> Seen | None:
    """None: it refuses these bytes, or wants more."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=_LIMIT)
    reader.receive_data(data)
    try:
        event = reader.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.Request):
        return None
    return Seen((event.method, event.target, event.http_version), _h11_fields(event.headers))


def h11_response(data: bytes) -> Seen | None:
    reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LIMIT)
    reader.send(
        h11.Request(method="GET", target="/", headers=[("Host", "a"), ("Connection", "upgrade"), ("Upgrade", "x")])
    )
    reader.send(h11.EndOfMessage())
    reader.receive_data(data)
    try:
        event = reader.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.Response | h11.InformationalResponse):
        return None
    return Seen((b"%d" % event.status_code, event.http_version), _h11_fields(event.headers))


def _h11_fields(headers: h11._headers.Headers) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name, value) for name, value in headers)


def llhttp_request(data: bytes) -> Seen | None:
    parser = HttpRequestParser(_PROTOCOL, _LOOP, 2**16, max_line_size=_LIMIT, max_field_size=_LIMIT, max_headers=_LIMIT)
    try:
        messages, _, _ = parser.feed_data(data)
    except _REFUSALS:
        return None
    if not messages:
        return None
    message = messages[0][0]
    version = b"%d.%d" % (message.version.major, message.version.minor)
    line = (message.method.encode(), message.path.encode("utf-8", "surrogateescape"), version)
    return Seen(line, _llhttp_fields(message.raw_headers))


def llhttp_response(data: bytes) -> Seen | None:
    parser = HttpResponseParser(
        _PROTOCOL,
        _LOOP,
        2**16,
        max_line_size=_LIMIT,
        max_field_size=_LIMIT,
        max_headers=_LIMIT,
        response_with_body=False,
    )
    try:
        messages, _, _ = parser.feed_data(data)
    except _REFUSALS:
        return None
    if not messages:
        return None
    message = messages[0][0]
    version = b"%d.%d" % (message.version.major, message.version.minor)
    return Seen((b"%d" % message.code, version), _llhttp_fields(message.raw_headers))


def _llhttp_fields(headers: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name.lower(), value.strip(b" \t")) for name, value in headers)


def h11_chunks(data: bytes) -> tuple[bytes, bytes] | None:
    """The payload and what stands behind it; None: it refuses these bytes, or wants more."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=_LIMIT)
    reader.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    payload = b""
    try:
        while True:
            event = reader.next_event()
            if isinstance(event, h11.Data):
                payload += event.data
            elif isinstance(event, h11.EndOfMessage):
                return payload, reader.trailing_data[0]
            elif not isinstance(event, h11.Request):
                return None
    except h11.RemoteProtocolError:
        return None


def llhttp_chunks(data: bytes) -> bytes | None:
    """The payload; None: it refuses these bytes, or wants more. What stands behind must not be there."""
    parser = HttpRequestParser(_PROTOCOL, _LOOP, 2**16, max_line_size=_LIMIT, max_field_size=_LIMIT, max_headers=_LIMIT)
    try:
        messages, _, _ = parser.feed_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    except _REFUSALS:
        return None
    if not messages:
        return None
    stream = messages[0][1]
    if stream.exception() is not None or not stream.is_eof():
        return None
    return b"".join(stream._buffer)  # whole already: read() would want a running loop
