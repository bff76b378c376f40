"""Rows about how a request is read: its line, its fields, the length of its body, and what is one connection's own."""

from __future__ import annotations

from collections.abc import Iterator

from tests.proxy.conformance.rows import HOST, SOCKETS, Kind, Row, instead, passes, refused, refuses

LINE = f"GET /x HTTP/1.1\r\nHost: {HOST}\r\n"
POST = f"POST /x HTTP/1.1\r\nHost: {HOST}\r\n"
END = "\r\n\r\n"
CHUNKED = POST + "Transfer-Encoding: chunked\r\n\r\n"
_HOP = "mitmproxy's host sends on what was said of the client's connection; it says it of its own"


def framing_rows() -> Iterator[Row]:
    yield from _lines()
    yield from _versions()
    yield from _lengths()
    yield from _codings()
    yield from _chunks()
    yield from _trailers()
    yield from _fields()
    yield from _sizes()
    yield from _connection()
    yield from _expectations()


def _lines() -> Iterator[Row]:
    """RFC 9112 2.2 and 3: one line, two single spaces, CR LF."""
    lines = {
        "two-spaces": f"GET  /x HTTP/1.1\r\nHost: {HOST}",
        "two-spaces-before-the-version": f"GET /x  HTTP/1.1\r\nHost: {HOST}",
        "space-first": f" GET /x HTTP/1.1\r\nHost: {HOST}",
        "space-behind-the-version": f"GET /x HTTP/1.1 \r\nHost: {HOST}",
        "tab-for-a-space": f"GET\t/x HTTP/1.1\r\nHost: {HOST}",
        "tab-before-the-version": f"GET /x\tHTTP/1.1\r\nHost: {HOST}",
        "vertical-tab-for-a-space": f"GET\x0b/x HTTP/1.1\r\nHost: {HOST}",
        "form-feed-for-a-space": f"GET /x\x0cHTTP/1.1\r\nHost: {HOST}",
        "carriage-return-for-a-space": f"GET\r/x HTTP/1.1\r\nHost: {HOST}",
        "no-break-space-for-a-space": f"GET\xa0/x HTTP/1.1\r\nHost: {HOST}",
        "space-in-the-target": f"GET /a b HTTP/1.1\r\nHost: {HOST}",
        "no-target": f"GET HTTP/1.1\r\nHost: {HOST}",
        "empty-target": f"GET  HTTP/1.1\r\nHost: {HOST}",
        "no-method": f"/x HTTP/1.1\r\nHost: {HOST}",
        "empty-method": f" /x HTTP/1.1\r\nHost: {HOST}",
        "method-alone": f"GET\r\nHost: {HOST}",
        "method-with-a-colon": f"G:T /x HTTP/1.1\r\nHost: {HOST}",
        "method-with-a-parenthesis": f"GET( /x HTTP/1.1\r\nHost: {HOST}",
        "method-with-a-nul": f"GET\0 /x HTTP/1.1\r\nHost: {HOST}",
        "method-beyond-ascii": f"G\xc9T /x HTTP/1.1\r\nHost: {HOST}",
        "byte-order-mark-first": f"\xef\xbb\xbfGET /x HTTP/1.1\r\nHost: {HOST}",
        "quoted-method": f'"GET" /x HTTP/1.1\r\nHost: {HOST}',
        "nul-behind-the-line": f"GET /x HTTP/1.1\0\r\nHost: {HOST}",
        "nul-in-the-target": f"GET /x\0y HTTP/1.1\r\nHost: {HOST}",
        "delete-in-the-target": f"GET /x\x7fy HTTP/1.1\r\nHost: {HOST}",
        "empty-line-first": f"\r\nGET /x HTTP/1.1\r\nHost: {HOST}",
        "two-empty-lines-first": f"\r\n\r\nGET /x HTTP/1.1\r\nHost: {HOST}",
        "line-feed-first": f"\nGET /x HTTP/1.1\r\nHost: {HOST}",
        "carriage-return-first": f"\rGET /x HTTP/1.1\r\nHost: {HOST}",
        "line-ends-in-a-line-feed": f"GET /x HTTP/1.1\nHost: {HOST}",
        "line-ends-in-carriage-returns": f"GET /x HTTP/1.1\r\r\nHost: {HOST}",
        "line-ends-in-a-carriage-return": f"GET /x HTTP/1.1\rHost: {HOST}",
        "ssh": "SSH-2.0-OpenSSH_9.2",
        "smtp": "EHLO weather.test",
        "tls-in-tls": "\x16\x03\x01\x02\x00\x01",
        "redis": "*1\r\n$4\r\nPING",
        "status-line": "HTTP/1.1 200 OK\r\nContent-Length: 0",
        "header-without-a-line": f"Host: {HOST}",
    }
    for id, head in lines.items():
        yield refused(id, head + END)
    yield refused("nothing-but-empty-lines", "\r\n\r\n\r\n")
    yield refused("bare-line-feeds", f"GET /x HTTP/1.1\nHost: {HOST}\n\n")
    yield refused("line-feed-before-carriage-return", f"GET /x HTTP/1.1\n\rHost: {HOST}\n\r\n\r")
    yield refused("a-last-line-feed-alone", f"GET /x HTTP/1.1\r\nHost: {HOST}\r\n\n")


def _versions() -> Iterator[Row]:
    yield refused("http-0.9", "GET /x\r\n\r\n")
    yield refused("no-version", f"GET /x\r\nHost: {HOST}\r\n\r\n")
    for version in ("0.9", "1.2", "1.9", "2.0", "3.0"):
        line = LINE.replace("HTTP/1.1", f"HTTP/{version}")
        yield refused(f"http-{version}-said", line + "\r\n", 505)
    yield refused("http-2-preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
    for id, version in {
        "without-a-minor": "HTTP/1",
        "of-two-digits": "HTTP/1.10",
        "with-a-leading-zero": "HTTP/01.1",
    }.items():
        yield refused(f"version-{id}", LINE.replace("HTTP/1.1", version) + "\r\n", 505)
    malformed = {
        "lower-case": "http/1.1",
        "mixed-case": "Http/1.1",
        "with-a-dot-alone": "HTTP/1.",
        "with-a-comma": "HTTP/1,1",
        "with-a-sign": "HTTP/+1.1",
        "with-a-letter-behind": "HTTP/1.1x",
        "with-a-space-inside": "HTTP/ 1.1",
        "of-another-protocol": "HTTPS/1.1",
        "of-rtsp": "RTSP/1.0",
        "of-icap": "ICAP/1.0",
        "without-a-slash": "HTTP1.1",
        "with-a-backslash": "HTTP\\1.1",
    }
    for id, version in malformed.items():
        yield refused(f"version-{id}", LINE.replace("HTTP/1.1", version) + "\r\n")
    as_sent = "mitmproxy's host repeats the client's version"
    old = f"GET /x HTTP/1.0\r\nHost: {HOST}\r\n\r\n"
    yield passes("http-1.0", old, LINE + "\r\n", closes=True, mitmproxy=instead(old, why=as_sent))
    kept = f"GET /x HTTP/1.0\r\nHost: {HOST}\r\nConnection: keep-alive\r\n\r\n"
    yield passes("http-1.0-kept-alive", kept, LINE + "\r\n", mitmproxy=instead(kept, why=as_sent))
    yield refused("no-host-in-1.0", "GET /x HTTP/1.0\r\n\r\n", kind=Kind.JUDGE)


def _lengths() -> Iterator[Row]:
    """RFC 9112 6.2 and 6.3: one Content-Length, digits alone; whatever else is said of it begins CL.CL smuggling."""
    malformed = {
        "signed": "+2", "negative": "-1", "hexadecimal": "0x2", "hexadecimal-digit": "a", "empty": "", "decimal": "2.0",
        "exponent": "2e0", "list": "2,2", "list-of-two": "0,44", "list-with-a-space": "2, 2", "space-inside": "2 2",
        "underscore": "1_0", "semicolon": "2;", "quoted": '"2"', "vertical-tab": "\x0b2", "form-feed": "2\x0c",
        "no-break-space": "\xa02", "superscript": "\xb2", "fullwidth": "\xef\xbc\x92", "word": "two", "octal": "0o2",
        "brace": "{2}", "percent": "%32", "infinity": "inf", "null": "null", "minus-zero": "-0", "comma": "2,",
        "beyond-64-bits": "18446744073709551618", "of-four-hundred-digits": "1" * 400,
    }  # fmt: skip
    for id, value in malformed.items():
        yield refused(f"length-{id}", POST + f"Content-Length: {value}\r\n\r\nab")
    twice = {
        "two-lengths": "Content-Length: 0\r\nContent-Length: 44",
        "two-equal-lengths": "Content-Length: 2\r\nContent-Length: 2",
        "two-lengths-in-two-cases": "Content-Length: 2\r\ncontent-length: 3",
        "two-lengths-apart": "Content-Length: 2\r\nX: y\r\nCONTENT-LENGTH: 2",
        "length-and-an-empty-one": "Content-Length: 2\r\nContent-Length:",
        "length-and-chunks": "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "chunks-and-length": "Transfer-Encoding: chunked\r\nContent-Length: 4",
        "chunks-and-a-length-of-nothing": "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "length-and-an-empty-coding": "Content-Length: 2\r\nTransfer-Encoding:",
        "length-behind-a-space": " Content-Length: 2",
        "length-with-a-space-before-the-colon": "Content-Length : 2",
        "length-with-a-tab-before-the-colon": "Content-Length\t: 2",
        "length-with-a-vertical-tab-before-the-colon": "Content-Length\x0b: 2",
        "length-with-a-nul-before-the-colon": "Content-Length\0: 2",
        "length-with-a-no-break-space-before-the-colon": "Content-Length\xa0: 2",
        "length-quoted-name": '"Content-Length": 2',
        "length-with-another-dash": "Content\xadLength: 2",
        "length-folded": "Content-Length:\r\n 2",
        "length-behind-a-line-feed": "X: y\nContent-Length: 2",
        "length-behind-a-carriage-return": "X: y\rContent-Length: 2",
        "underscore-length": "Content_Length: 2",
        "underscore-length-beside-one": "Content-Length: 2\r\nContent_Length: 44",
        "underscore-coding": "Transfer_Encoding: chunked",
        "underscore-coding-beside-a-length": "Content-Length: 2\r\nTransfer_Encoding: chunked",
    }
    for id, field in twice.items():
        yield refused(id, POST + field + "\r\n\r\nab")
    yield passes("length-of-nothing", POST + "Content-Length: 0\r\n\r\n")
    yield passes("length", POST + "Content-Length: 2\r\n\r\nab", body="ab")
    yield passes(
        "length-in-lower-case",
        POST + "content-length: 2\r\n\r\nab",
        POST + "Content-Length: 2\r\n\r\n",
        "ab",
        mitmproxy=instead(POST + "content-length: 2\r\n\r\n", "ab", "it keeps the spelling of a field's name"),
    )
    yield passes(
        "length-without-a-space", POST + "Content-Length:2\r\n\r\nab", POST + "Content-Length: 2\r\n\r\n", "ab"
    )
    yield passes("length-with-spaces-around", POST + "Content-Length: \t 2 \t\r\n\r\nab",
                 POST + "Content-Length: 2\r\n\r\n", "ab")  # fmt: skip
    yield passes(
        "length-with-leading-zeros",
        POST + "Content-Length: 002\r\n\r\nab",
        POST + "Content-Length: 2\r\n\r\n",
        "ab",
        mitmproxy=refuses(400, "the lane writes the number anew; mitmproxy's host would send on the zeros"),
    )
    yield passes("get-with-a-body", LINE + "Content-Length: 2\r\n\r\nab", body="ab")
    yield passes("post-without-a-length", POST + "\r\n", POST + "\r\n")
    yield passes("transferencoding-is-another-name", POST + "TransferEncoding: chunked\r\n\r\n")


def _codings() -> Iterator[Row]:
    """RFC 9112 6.1: what is not exactly `chunked` is not served; TE.TE smuggling hides it from one reader of two."""
    real = {"identity": "identity", "gzip": "gzip", "deflate": "deflate", "gzip-then-chunked": "gzip, chunked"}
    for id, value in real.items():
        yield refused(f"coding-{id}", POST + f"Transfer-Encoding: {value}\r\n\r\n0\r\n\r\n", 501)
    for value in ("xchunked", "chunkedx", "chunk", "trailers", "cow"):
        sent = POST + f"Transfer-Encoding: {value}\r\n\r\n0\r\n\r\n"
        yield refused(f"coding-{value}", sent, 501)
    for id, field in {
        "length-and-another-coding": "Content-Length: 2\r\nTransfer-Encoding: identity",
        "identity-and-coding": "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    }.items():
        yield refused(id, POST + field + "\r\n\r\n0\r\n\r\n", 501)
    no_coding = {
        "chunked-then-gzip": "chunked, gzip", "chunked-then-identity": "chunked, identity", "quoted": '"chunked"',
        "chunked-twice": "chunked, chunked", "with-parameters": "chunked;q=1", "with-an-empty-one-before": ", chunked",
        "with-an-empty-one-behind": "chunked,", "with-a-space-inside": "chun ked", "with-a-tab-inside": "chunked\tx",
        "empty": "", "beyond-ascii": "\xffchunked", "in-braces": "{chunked}",
    }  # fmt: skip
    for id, value in no_coding.items():
        yield refused(f"coding-{id}", POST + f"Transfer-Encoding: {value}\r\n\r\n0\r\n\r\n")
    malformed = {
        "coding-with-a-vertical-tab": "Transfer-Encoding: \x0bchunked",
        "coding-with-a-form-feed": "Transfer-Encoding: chunked\x0c",
        "coding-with-a-nul": "Transfer-Encoding: chunked\0",
        "coding-behind-a-space": " Transfer-Encoding: chunked",
        "coding-with-a-space-before-the-colon": "Transfer-Encoding : chunked",
        "coding-with-a-tab-before-the-colon": "Transfer-Encoding\t: chunked",
        "coding-with-an-equals-sign": "Transfer-Encoding= chunked",
        "coding-folded": "Transfer-Encoding:\r\n chunked",
        "coding-folded-by-a-tab": "Transfer-Encoding:\r\n\tchunked",
        "coding-in-a-folded-field": "X: y\r\n Transfer-Encoding: chunked",
        "coding-behind-a-line-feed": "X: y\nTransfer-Encoding: chunked",
        "coding-behind-a-carriage-return": "X: y\rTransfer-Encoding: chunked",
        "coding-across-a-line": "Transfer-\r\nEncoding: chunked",
        "coding-twice": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "coding-and-identity": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "coding-and-an-unknown-one-in-lower-case": "Transfer-Encoding: chunked\r\ntransfer-encoding: x",
    }
    for id, field in malformed.items():
        yield refused(id, POST + field + "\r\n\r\n0\r\n\r\n")
    old = CHUNKED.replace("HTTP/1.1", "HTTP/1.0")
    yield refused("coding-in-1.0", old + "0\r\n\r\n")
    spelled = "it keeps the spelling of a field"
    for id, field in (
        ("coding-in-capitals", "Transfer-Encoding: CHUNKED"),
        ("coding-in-mixed-case", "transfer-encoding: Chunked"),
    ):
        sent = POST + field + "\r\n\r\n"
        yield passes(id, sent + "2\r\nab\r\n0\r\n\r\n", CHUNKED, "ab", mitmproxy=instead(sent, "ab", spelled))
    yield passes(
        "coding-without-a-space", POST + "Transfer-Encoding:chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", CHUNKED, "ab"
    )
    yield passes("coding-with-tabs-around", POST + "Transfer-Encoding:\tchunked \t\r\n\r\n2\r\nab\r\n0\r\n\r\n",
                 CHUNKED, "ab")  # fmt: skip


def _chunks() -> Iterator[Row]:
    """RFC 9112 7.1: hexadecimal digits alone, CR LF, and no extension."""
    malformed = {
        "size-with-a-sign": "+2\r\nab\r\n0\r\n\r\n",
        "size-negative": "-2\r\nab\r\n0\r\n\r\n",
        "size-in-0x": "0x2\r\nab\r\n0\r\n\r\n",
        "size-with-a-space-before": " 2\r\nab\r\n0\r\n\r\n",
        "size-with-an-underscore": "0_2\r\nab\r\n0\r\n\r\n",
        "size-no-digit": "g\r\nab\r\n0\r\n\r\n",
        "size-empty": "\r\nab\r\n0\r\n\r\n",
        "size-fullwidth": "\xef\xbc\x92\r\nab\r\n0\r\n\r\n",
        "size-beyond-64-bits": "10000000000000002\r\nab\r\n0\r\n\r\n",
        "size-of-twenty-five-digits": "1" * 25 + "\r\nab\r\n0\r\n\r\n",
        "size-with-a-nul": "2\0\r\nab\r\n0\r\n\r\n",
        "size-with-a-carriage-return": "2\r\r\nab\r\n0\r\n\r\n",
        "size-and-a-bare-line-feed": "2\nab\r\n0\r\n\r\n",
        "size-and-a-bare-carriage-return": "2\rab\r\n0\r\n\r\n",
        "size-is-text": "two\r\nab\r\n0\r\n\r\n",
        "too-much-data": "2\r\nabcd\r\n0\r\n\r\n",
        "too-little-data": "4\r\nab\r\n0\r\n\r\n\r\n",
        "data-ends-in-a-line-feed": "2\r\nab\n0\r\n\r\n",
        "data-ends-in-a-carriage-return": "2\r\nab\r0\r\n\r\n",
        "last-one-with-a-line-feed": "2\r\nab\r\n0\n\n",
        "line-without-an-end": "2" + "0" * 40_000,
        "extension-without-an-end": "2;" + "a" * 40_000,
        "request-for-a-chunk": LINE + "\r\n",
        "extension": "2;x\r\nab\r\n0\r\n\r\n",
        "extension-with-a-value": "2;x=y\r\nab\r\n0\r\n\r\n",
        "extension-quoted": '2;x="y\r\nab\r\n0\r\n\r\n',
        "extension-with-a-line-feed": "2;x\nab\r\n0\r\n\r\n",
        "extension-of-the-last-one": "2\r\nab\r\n0;x\r\n\r\n",
        "extension-that-is-empty": "2;\r\nab\r\n0\r\n\r\n",
        "size-with-a-space-behind": "2 \r\nab\r\n0\r\n\r\n",
        "size-with-a-tab-behind": "2\t\r\nab\r\n0\r\n\r\n",
    }
    for id, body in malformed.items():
        yield refused(f"chunk-{id}", CHUNKED + body)
    yield passes("chunks", CHUNKED + "2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n", CHUNKED, "abcde")
    yield passes("chunk-size-with-leading-zeros", CHUNKED + "0002\r\nab\r\n000\r\n\r\n", CHUNKED, "ab")
    yield passes("chunk-size-in-capitals", CHUNKED + "A\r\n0123456789\r\n0\r\n\r\n", CHUNKED, "0123456789")
    yield passes("chunk-of-chunks", CHUNKED + "5\r\n0\r\n\r\n\r\n0\r\n\r\n", CHUNKED, "0\r\n\r\n")
    yield passes("no-chunk-but-the-last", CHUNKED + "0\r\n\r\n", CHUNKED)


def _trailers() -> Iterator[Row]:
    """RFC 9110 6.5: they may not frame, route or authenticate."""
    begins = CHUNKED + "2\r\nab\r\n0\r\n"
    sent = instead(CHUNKED, "ab", "mitmproxy cannot carry trailers, so its host drops them (RFC 9110 6.5.1 allows it)")
    yield passes("trailer", begins + "X-Sum: 1\r\n\r\n", CHUNKED, "ab", trailers="X-Sum: 1\r\n", mitmproxy=sent)
    for name in ("Content-Length", "Host", "Authorization", "Cookie", "Content_Length"):
        yield refused(f"trailer-{name.lower()}", begins + f"{name}: 1\r\n\r\n")
    yield refused("trailer-transfer-encoding", begins + "Transfer-Encoding: 1\r\n\r\n")
    for id, line in {"folded": "X: 1\r\n 2", "with-a-line-feed": "X: 1\nY: 2"}.items():
        yield refused(f"trailer-{id}", begins + line + "\r\n\r\n")
    malformed = {
        "with-a-space-before-the-colon": "X : 1", "without-a-colon": "X", "with-a-nul": "X: \0",
        "with-a-carriage-return": "X: 1\rY: 2", "without-a-name": ": 1",
        "that-is-a-request": "GET /denied/x HTTP/1.1",
    }  # fmt: skip
    for id, line in malformed.items():
        yield refused(f"trailer-{id}", begins + line + "\r\n\r\n")
    yield refused("trailers-without-an-end", begins + "X: " + "a" * 70_000)


def _fields() -> Iterator[Row]:
    """RFC 9112 5: NAME:VALUE, no space before the colon, no folding, no control characters."""
    malformed = {
        "without-a-colon": "X", "without-a-name": ": a", "space-before-the-colon": "X : a", "folded": "X: a\r\n b",
        "folded-by-a-tab": "X: a\r\n\tb", "folded-to-nothing": "X: a\r\n ", "nul-in-the-value": "X: a\0b",
        "nul-in-the-name": "X\0: a", "line-feed-in-the-value": "X: a\nY: b",
        "carriage-return-in-the-value": "X: a\rY: b",
        "carriage-return-at-the-end": "X: a\r", "escape-in-the-value": "X: \x1b[2J", "delete-in-the-value": "X: \x7f",
        "bell-in-the-value": "X: \x07", "backspace-in-the-value": "X: a\x08", "vertical-tab-in-the-value": "X: a\x0bb",
        "form-feed-in-the-value": "X: a\x0cb", "space-in-the-name": "X Y: a", "slash-in-the-name": "X/Y: a",
        "at-in-the-name": "X@Y: a", "bracket-in-the-name": "X[0]: a", "8-bit-in-the-name": "X\xe9: a",
        "tab-in-the-name": "X\tY: a", "quote-in-the-name": '"X": a', "brace-in-the-name": "{X}: a",
        "equals-in-the-name": "X=Y: a",
    }  # fmt: skip
    for id, field in malformed.items():
        yield refused(f"field-{id}", LINE + field + "\r\n\r\n")
    yield refused("field-space-before-the-first", f"GET /x HTTP/1.1\r\n Host: evil.test\r\nHost: {HOST}\r\n\r\n")
    yield refused("field-tab-before-the-first", f"GET /x HTTP/1.1\r\n\tX: a\r\nHost: {HOST}\r\n\r\n")
    as_they_are = {
        "8-bit-in-the-value": "X: caf\xe9", "next-line-in-the-value": "X: a\x85Content-Length: 5", "of-its-own": "X: a",
        "tab-in-the-value": "X: a\tb", "colons-in-the-value": "X: a: b:c", "all-of-a-token": "!#$%&'*+-.^_`|~09: a",
        "twice": "X: a\r\nX: b", "cookies": "Cookie: a=b\r\nCookie: c=d", "authorization": "Authorization: Bearer x",
        "of-bytes-that-look-like-percents": "X: %0d%0aY: z", "in-two-cases": "x: a\r\nX: b",
        "of-a-range": "Range: bytes=0-5",
        "with-a-comma": "X: a,b", "of-many-bytes": "X: " + "a" * 8000, "with-a-long-name": "X" * 200 + ": a",
    }  # fmt: skip
    for id, field in as_they_are.items():
        yield passes(f"field-{id}", LINE + field + "\r\n\r\n")
    yield passes("field-without-a-value", LINE + "X:\r\n\r\n", LINE + "X: \r\n\r\n")
    yield passes("field-without-a-space", LINE + "X:a\r\n\r\n", LINE + "X: a\r\n\r\n")
    yield passes("field-with-spaces-around", LINE + "X: \t a \t\r\n\r\n", LINE + "X: a\r\n\r\n")


def _sizes() -> Iterator[Row]:
    yield refused("head-over-the-limit", LINE + "X: " + "a" * 70_000 + "\r\n\r\n", 431)
    yield refused("head-without-an-end", LINE + "X: " + "a" * 70_000, 431)
    yield refused("line-without-an-end", "GET /" + "a" * 70_000, 431)
    yield refused("name-without-an-end", LINE + "X" * 70_000, 431)
    yield refused("a-million-bytes", LINE + "X: " + "a" * 1_000_000, 431)
    yield refused("many-fields-over-the-limit", LINE + "X: aaaaaaaaaaaa\r\n" * 5_000 + "\r\n", 431)
    yield refused("target-too-long", f"GET /{'a' * 20_000} HTTP/1.1\r\nHost: {HOST}\r\n\r\n", 414)
    yield refused("query-too-long", f"GET /x?{'a' * 20_000} HTTP/1.1\r\nHost: {HOST}\r\n\r\n", 414)
    yield refused("a-hundred-and-one-fields", LINE + "".join(f"X{n}: a\r\n" for n in range(100)) + "\r\n", 431)
    yield passes("a-hundred-fields", LINE + "".join(f"X{n}: a\r\n" for n in range(99)) + "\r\n")
    yield passes("a-long-target", f"GET /{'a' * 7_000} HTTP/1.1\r\nHost: {HOST}\r\n\r\n")


def _connection() -> Iterator[Row]:
    """RFC 9110 7.6.1: what is the connection's own ends here."""
    named = {
        "host": "Host", "length": "Content-Length", "coding": "Transfer-Encoding", "authorization": "Authorization",
        "cookie": "Cookie", "authorization-in-capitals": "AUTHORIZATION", "cookie-in-a-list": "close, Cookie",
        "host-without-spaces": "keep-alive,host,close", "cookie-between-spaces": "close , cookie ,x",
        "authorization-behind-tabs": "close,\tauthorization\t",
    }  # fmt: skip
    for id, value in named.items():
        yield refused(f"connection-names-{id}", LINE + f"Connection: {value}\r\n\r\n", kind=Kind.JUDGE)
    yield refused(
        "a-second-connection-names-host", LINE + "Connection: close\r\nConnection: host\r\n\r\n", kind=Kind.JUDGE
    )
    dropped = {
        "keep-alive": "Connection: keep-alive", "keep-alive-in-capitals": "Connection: Keep-Alive",
        "names-a-field": "X: a\r\nConnection: X", "names-two-fields": "X: a\r\nY: b\r\nConnection: x, y",
        "says-how-long": "Connection: keep-alive\r\nKeep-Alive: timeout=5", "of-a-list-of-nothing": "Connection: ,",
        "accepts-trailers": "TE: trailers", "names-te": "Connection: TE\r\nTE: trailers",
        "keep-alive-alone": "Keep-Alive: timeout=5, max=1000",
    }  # fmt: skip
    for id, fields in dropped.items():
        sent = LINE + fields + "\r\n\r\n"
        yield passes(f"connection-{id}", sent, LINE + "\r\n", mitmproxy=instead(sent, why=_HOP))
    close = LINE + "Connection: close\r\n\r\n"
    yield passes("connection-close", close, LINE + "\r\n", closes=True, mitmproxy=instead(close, why=_HOP))
    yield passes("proxy-connection", LINE + "Proxy-Connection: keep-alive\r\n\r\n", LINE + "\r\n")
    yield passes("proxy-authorization", LINE + "Proxy-Authorization: Basic YTpi\r\n\r\n", LINE + "\r\n")


def _expectations() -> Iterator[Row]:
    """RFC 9110 10.1.1."""
    upload = POST + "Content-Length: 2\r\n"
    for id, value in {
        "unknown": "200-ok", "and-an-unknown-one": "100-continue, x", "with-parameters": "100-continue; x=1",
        "empty": "",
    }.items():  # fmt: skip
        yield refused(f"expects-{id}", upload + f"Expect: {value}\r\n\r\nab", 417)
    yield refused("expects-twice", upload + "Expect: 100-continue\r\nExpect: x\r\n\r\nab", 417)
    asked = "mitmproxy's host says 100 itself and drops Expect"
    yield passes("expects-100", upload + "Expect: 100-continue\r\n\r\nab", body="ab",
                 mitmproxy=instead(upload + "\r\n", "ab", asked))  # fmt: skip
    yield passes(
        "expects-100-in-capitals",
        upload + "Expect: 100-Continue\r\n\r\nab",
        upload + "Expect: 100-continue\r\n\r\n",
        "ab",
        mitmproxy=instead(upload + "\r\n", "ab", asked),
    )
    yield refused("expects-in-an-unserved-upgrade", f"GET /x HTTP/1.1\r\nHost: {SOCKETS}\r\nUpgrade: h2c\r\n"
                  "Connection: upgrade\r\nExpect: 100-continue\r\n\r\n", 403,
                  "upgrade", kind=Kind.JUDGE, sni=SOCKETS)  # fmt: skip
