"""The heads that the lane writes: what was judged, or what an origin said and the grammar admitted. Pure."""

from __future__ import annotations

from proxy.lane.http1 import Request, Response


def render_request(
    request: Request, host: str, target: str, *, to_proxy: bool = False, authorization: str | None = None
) -> bytes:
    """The head for the origin; `host` and `target` are those that were judged.

    to_proxy  it goes to the site's proxy, which is told the whole URL (RFC 9112 3.2.2), and `authorization`
    """
    fields = request.fields
    _, colon, port = (fields.host or "").partition(":")
    authority = f"{host}{colon}{port}"
    url = f"http://{authority}{target}" if to_proxy else target
    lines = fields.lines
    if authorization is not None:
        lines += b"Proxy-Authorization: %b\r\n" % authorization.encode("latin-1")
    if fields.is_chunked:
        lines += b"Transfer-Encoding: chunked\r\n"
    elif fields.length is not None:
        lines += b"Content-Length: %d\r\n" % fields.length
    if fields.expects:
        lines += b"Expect: 100-continue\r\n"
    if fields.upgrade and fields.switches:
        lines += b"Connection: Upgrade\r\nUpgrade: %b\r\n" % fields.upgrade.encode("latin-1")
    return b"%b%b\r\n" % (f"{request.method} {url} HTTP/1.1\r\nHost: {authority}\r\n".encode("latin-1"), lines)


def render_response(response: Response, *, minor: int, chunks: bool, closes: bool) -> bytes:
    """The head for a client of HTTP/1.`minor`.

    chunks  the body that follows is in chunks; else it is as long as the response says, or ends with the connection
    closes  no other request is read on this connection
    """
    fields, framing = response.fields, b""
    if response.status != 204:  # RFC 9110 8.6: it has neither
        if fields.length is not None:
            framing = b"Content-Length: %d\r\n" % fields.length
        elif chunks or (fields.is_chunked and minor):
            framing = b"Transfer-Encoding: chunked\r\n"
    if closes:
        framing += b"Connection: close\r\n"
    elif not minor:
        framing += b"Connection: keep-alive\r\n"
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (response.status, response.phrase, fields.lines, framing)


def render_interim(response: Response) -> bytes:
    """1xx, which has no framing. With 101 the protocol that is switched to is named again."""
    fields, connection = response.fields, b""
    if response.status == 101:
        connection = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % (fields.upgrade or "").encode("latin-1")
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (response.status, response.phrase, fields.lines, connection)
