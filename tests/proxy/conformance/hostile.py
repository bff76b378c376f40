"""Rows about what origins say: how they frame it, when they say it, and how they end."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from tests.proxy.conformance.origins import Reading
from tests.proxy.conformance.rows import HOST, SOCKETS
from tests.proxy.inspecting import get, response

OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"Content-Length: 5\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
_PUT = f"PUT /x HTTP/1.1\r\nHost: {HOST}\r\n".encode()
_SOCKET = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"


class End(StrEnum):
    """How an origin ends its connection once it has spoken."""

    CLOSES = "closes"  # as TLS says
    CUTS = "cuts"  # without a word
    RESETS = "resets"
    WAITS = "waits"  # for the gate to close


@dataclass(frozen=True, slots=True)
class Read:
    """What the client reads of one response. `is_whole`: it ended as its head said. None: there was no response."""

    status: int | None
    body: bytes = b""
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Told:
    """What comes of a row: what the client reads for each request, and the reasons of the records.

    breaks  the one response may end anywhere before its end: how much of it came depends on what came together
    """

    reads: tuple[Read, ...]
    reasons: tuple[str, ...]
    interim: tuple[int, ...] = ()
    breaks: bool = False

    @property
    def is_refusal(self) -> bool:
        return any(reason != "rule" for reason in self.reasons)


@dataclass(frozen=True, slots=True)
class OriginRow:
    """An origin's trick. `asks`: the requests, each sent when the response to the one before is read."""

    id: str
    script: Callable[[Reading], None]
    told: Told
    asks: tuple[bytes, ...] = (get("/x"),)
    sni: str = HOST
    mitmproxy: tuple[Told, str] | None = None  # what its host makes of it, and why

    def told_on(self, host: str) -> Told:
        return self.mitmproxy[0] if self.mitmproxy and host == "mitmproxy" else self.told


SUNNY = Told((Read(200, b"sunny"),), ("rule",))
FAILED = Told((Read(502, b"", True),), ("upstream_failed",))

_FAILED_ONCE = Told((Read(502), Read(None, b"", False)), ("upstream_failed",))


def broken(body: bytes = b"", status: int = 200) -> Told:
    """The head was passed on, the rest cannot be: the client must see that it is not all."""
    return Told((Read(status, body, False),), ("upstream_failed",), breaks=True)


def says(*parts: bytes, end: End = End.WAITS, pause_s: float = 0.0) -> Callable[[Reading], None]:
    """A script: every request is answered with these bytes, then it ends."""

    def script(reading: Reading) -> None:
        while reading.request():
            for part in parts:
                reading.sock.sendall(part)
                time.sleep(pause_s)
            if end is not End.WAITS:
                finish(reading.sock, end)
                return

    return script


def finish(sock: socket.socket, end: End) -> None:
    with suppress(OSError):
        match end:
            case End.CLOSES:
                sock.settimeout(1.0)
                if isinstance(sock, ssl.SSLSocket):
                    sock.unwrap()
            case End.CUTS:
                sock.shutdown(socket.SHUT_RDWR)
            case End.RESETS:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            case End.WAITS:
                pass
    sock.close()


def origin_rows() -> Iterator[OriginRow]:
    yield from _heads()
    yield from _bodies()
    yield from _interim()
    yield from _ends()
    yield from _times()


def _row(id: str, said: bytes, told: Told = FAILED, end: End = End.WAITS, **more: object) -> OriginRow:
    return OriginRow(id, says(said, end=end), told, **more)  # type: ignore[arg-type]  # fields by name


def _heads() -> Iterator[OriginRow]:
    for id, said in {
        "garbage": b"\x00\x01\x02\x03\r\n\r\n",
        "no-version": b"200 OK\r\n\r\n",
        "request-for-an-answer": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "status-of-two-digits": b"HTTP/1.1 99 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "status-of-four-digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "status-1000": b"HTTP/1.1 1000 OK\r\n\r\n",
        "status-zero": b"HTTP/1.1 000 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "status-of-letters": b"HTTP/1.1 2xx OK\r\n\r\n",
        "status-signed": b"HTTP/1.1 +20 OK\r\n\r\n",
        "version-2": b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "version-1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "version-in-lower-case": b"http/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "icy": b"ICY 200 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "no-space-behind-the-version": b"HTTP/1.1200 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "two-spaces-behind-the-version": b"HTTP/1.1  200 OK\r\nContent-Length: 5\r\n\r\nsunny",
        "empty-line-first": b"\r\n" + response(),
        "folded-field": OK + b"X: a\r\n b\r\nContent-Length: 5\r\n\r\nsunny",
        "space-before-a-colon": OK + b"X : a\r\nContent-Length: 5\r\n\r\nsunny",
        "field-without-a-colon": OK + b"X\r\nContent-Length: 5\r\n\r\nsunny",
        "field-without-a-name": OK + b": a\r\nContent-Length: 5\r\n\r\nsunny",
        "space-in-a-name": OK + b"X Y: a\r\nContent-Length: 5\r\n\r\nsunny",
        "8-bit-in-a-name": OK + b"X\xe9: a\r\nContent-Length: 5\r\n\r\nsunny",
        "carriage-return-in-a-value": SIZED + b"X: a\rSet-Cookie: b\r\n\r\nsunny",
        "carriage-return-in-the-phrase": b"HTTP/1.1 200 OK\rX: a\r\nContent-Length: 5\r\n\r\nsunny",
        "nul-in-a-value": SIZED + b"X: a\0b\r\n\r\nsunny",
        "escape-in-a-value": SIZED + b"X: \x1b[2J\r\n\r\nsunny",
        "nul-in-the-phrase": b"HTTP/1.1 200 O\0K\r\nContent-Length: 5\r\n\r\nsunny",
        "head-over-the-limit": SIZED + b"X: " + b"a" * 100_000 + b"\r\n\r\nsunny",
        "head-without-an-end": OK + b"X: " + b"a" * 100_000,
    }.items():
        yield _row(id, said)
    yield _row("bare-line-feeds", b"HTTP/1.1 200 OK\nContent-Length: 5\n\nsunny", SUNNY)
    yield _row("no-reason-phrase", b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nsunny", SUNNY)
    yield _row("empty-reason-phrase", b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nsunny", SUNNY)
    yield _row("8-bit-in-the-phrase", b"HTTP/1.1 200 \xe9\r\nContent-Length: 5\r\n\r\nsunny", SUNNY)
    yield _row("8-bit-in-a-value", SIZED + b"X: \xe9\x85\r\n\r\nsunny", SUNNY)
    yield _row(
        "status-999", b"HTTP/1.1 999 Odd\r\nContent-Length: 5\r\n\r\nsunny", Told((Read(999, b"sunny"),), ("rule",))
    )
    yield _row("many-cookies", SIZED + b"Set-Cookie: a=b\r\n" * 50 + b"\r\nsunny", SUNNY)
    yield _row("too-many-fields", SIZED + b"X: a\r\n" * 500 + b"\r\nsunny")


def _bodies() -> Iterator[OriginRow]:
    for id, fields in {
        "length-and-chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "chunks-and-length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "two-lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n",
        "two-equal-lengths": b"Content-Length: 5\r\nContent-Length: 5\r\n",
        "list-of-lengths": b"Content-Length: 5, 5\r\n",
        "signed-length": b"Content-Length: +5\r\n",
        "negative-length": b"Content-Length: -5\r\n",
        "hexadecimal-length": b"Content-Length: 0x5\r\n",
        "empty-length": b"Content-Length:\r\n",
        "endless-length": b"Content-Length: " + b"9" * 30 + b"\r\n",
        "unknown-coding": b"Transfer-Encoding: x\r\n",
        "gzip-as-a-coding": b"Transfer-Encoding: gzip, chunked\r\n",
        "coding-twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "coding-with-a-space-before-the-colon": b"Transfer-Encoding : chunked\r\n",
    }.items():
        yield _row(id, OK + fields + b"\r\n5\r\nsunny\r\n0\r\n\r\n", end=End.CLOSES)
    yield _row("coding-in-1.0", CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"5\r\nsunny\r\n0\r\n\r\n")
    yield _row("chunks", CHUNKED + b"3\r\nsun\r\n2\r\nny\r\n0\r\n\r\n", SUNNY)
    yield _row("chunk-extensions", CHUNKED + b'5;x="y"\r\nsunny\r\n0;z\r\n\r\n', SUNNY)
    yield _row("trailers", CHUNKED + b"5\r\nsunny\r\n0\r\nX-Sum: 1\r\n\r\n", SUNNY)
    for id, rest in {
        "chunk-size-no-digit": b"zz\r\n",
        "chunk-size-signed": b"+5\r\nsunny\r\n0\r\n\r\n",
        "chunk-size-in-0x": b"0x5\r\nsunny\r\n0\r\n\r\n",
        "chunk-size-of-thirty-digits": b"1" * 30 + b"\r\nsunny",
        "chunk-size-and-a-line-feed": b"5\nsunny\n0\n\n",
        "chunk-line-without-an-end": b"5;" + b"a" * 100_000,
        "chunk-longer-than-its-size": b"2\r\nsunny\r\n0\r\n\r\n",
    }.items():
        body = b"su" if id == "chunk-longer-than-its-size" else b""
        yield _row(id, CHUNKED + rest, broken(body), End.CLOSES)
    yield _row("trailers-without-an-end", CHUNKED + b"5\r\nsunny\r\n0\r\nX: " + b"a" * 100_000, broken(b"sunny"))
    yield _row("trailer-that-frames", CHUNKED + b"5\r\nsunny\r\n0\r\nContent-Length: 9\r\n\r\n", broken(b"sunny"))
    yield _row("trailer-without-a-colon", CHUNKED + b"5\r\nsunny\r\n0\r\nX\r\n\r\n", broken(b"sunny"))
    empty = Told((Read(204), Read(204)), ("rule", "rule"))
    twice = (get("/x"), get("/x"))
    yield _row("no-content", b"HTTP/1.1 204 No Content\r\n\r\n", empty, asks=twice)
    yield _row("no-content-but-a-body", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nsunny", empty, asks=twice)
    chunks = CHUNKED.replace(b"200 OK", b"204 No Content") + b"5\r\nsunny\r\n0\r\n\r\n"
    yield _row("no-content-but-chunks", chunks, empty, asks=twice,
               mitmproxy=(_FAILED_ONCE, "RFC 9112 6.1 forbids it, and mitmproxy's host refuses it"))  # fmt: skip
    yield _row(
        "not-modified",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
        Told((Read(304), Read(304)), ("rule", "rule")),
        asks=twice,
    )
    head = (get("/x", method="HEAD"), get("/x", method="HEAD"))
    yield _row("head", SIZED + b"\r\n", Told((Read(200), Read(200)), ("rule", "rule")), asks=head)
    yield _row("head-but-a-body", SIZED + b"\r\nsunny", Told((Read(200), Read(200)), ("rule", "rule")), asks=head)
    yield _row("connection-names-the-length", SIZED + b"Connection: Content-Length\r\n\r\nsunny", SUNNY)


def _interim() -> Iterator[OriginRow]:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    yield _row("hints", hints + response(), Told((Read(200, b"sunny"),), ("rule",), (103,)))
    yield _row("two-hints", hints * 2 + response(), Told((Read(200, b"sunny"),), ("rule",), (103, 103)))
    yield _row(
        "processing", b"HTTP/1.1 102 Processing\r\n\r\n" + response(), Told((Read(200, b"sunny"),), ("rule",), (102,))
    )
    yield _row("continues-unasked", b"HTTP/1.1 100 Continue\r\n\r\n" + response(), SUNNY)
    yield _row("hints-for-ever", hints * 5000, Told((Read(502),), ("upstream_failed",), (103,) * 32))
    yield _row("hints-with-a-length", hints[:-2] + b"Content-Length: 5\r\n\r\nsunny" + response(),
               Told((Read(502),), ("upstream_failed",), (103,)))  # fmt: skip
    yield _row("hints-alone", hints, Told((Read(502),), ("upstream_failed",), (103,)), End.CLOSES)
    yield _row("switches-unasked", b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
    ask = (get("/x", host=SOCKETS, fields=_SOCKET),)
    h2c = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    yield _row("switches-to-another-protocol", h2c, asks=ask, sni=SOCKETS)
    yield _row("switches-to-nothing", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", asks=ask, sni=SOCKETS)
    yield _row("does-not-switch", response(), SUNNY, asks=ask, sni=SOCKETS)


def _ends() -> Iterator[OriginRow]:
    until = OK + b"\r\nsunny"
    yield _row("until-close", until, SUNNY, End.CLOSES)
    yield _row("until-close-cut", until, broken(b"sunny"), End.CUTS)
    yield _row("until-close-reset", until, broken(b"sunny"), End.RESETS)
    yield _row("until-close-in-1.0", until.replace(b"HTTP/1.1", b"HTTP/1.0"), SUNNY, End.CLOSES)
    yield _row("connection-close", response(fields="Connection: close\r\n"), SUNNY, End.CLOSES)
    yield _row("whole-and-cut", response(), SUNNY, End.CUTS)
    yield _row("shorter-than-said", OK + b"Content-Length: 100\r\n\r\nsunny", broken(b"sunny"), End.CLOSES)
    yield _row("shorter-than-said-cut", OK + b"Content-Length: 100\r\n\r\nsunny", broken(b"sunny"), End.CUTS)
    yield _row("chunks-without-an-end", CHUNKED + b"5\r\nsunny\r\n", broken(b"sunny"), End.CLOSES)
    yield _row("chunks-without-an-end-cut", CHUNKED + b"5\r\nsunny\r\n", broken(b"sunny"), End.CUTS)
    yield _row("half-a-chunk", CHUNKED + b"5\r\nsun", broken(b"sun"), End.CLOSES)
    yield _row("closes-at-once", b"", FAILED, End.CLOSES)
    yield _row("cuts-at-once", b"", FAILED, End.CUTS)
    yield _row("resets-at-once", b"", FAILED, End.RESETS)
    yield _row("half-a-head", b"HTTP/1.1 200 OK\r\nContent-", FAILED, End.CLOSES)
    yield _row("half-a-head-cut", b"HTTP/1.1 200 OK\r\nContent-", FAILED, End.CUTS)


def _times() -> Iterator[OriginRow]:
    twice = (get("/x"), get("/x"))
    both = Told((Read(200, b"sunny"), Read(200, b"sunny")), ("rule", "rule"))
    poison = response(b"poisoned")
    yield _row("two-answers", response() + poison, both, asks=twice)
    yield _row("bytes-behind-an-answer", response() + b"more", both, asks=twice)
    yield _row("bytes-behind-chunks", CHUNKED + b"5\r\nsunny\r\n0\r\n\r\n" + poison, both, asks=twice)
    yield _row("bytes-behind-no-length", SIZED.replace(b"5", b"0") + b"\r\n" + poison,
               Told((Read(200), Read(200)), ("rule", "rule")), asks=twice)  # fmt: skip
    closing = response(fields="Connection: close\r\n")
    yield _row("closes-behind-each-answer", closing, both, End.CLOSES, asks=twice,
               mitmproxy=(Told((Read(200, b"sunny"), Read(None, b"", False)), ("rule",)),
                          "mitmproxy's host closes the client's connection with the origin's"))  # fmt: skip
    slow = tuple(bytes([octet]) for octet in response())
    yield OriginRow("byte-by-byte", says(*slow), SUNNY)
    yield OriginRow("dribbled-chunks", says(CHUNKED, *[b"1\r\nx\r\n"] * 5, b"0\r\n\r\n", pause_s=0.01),
                    Told((Read(200, b"xxxxx"),), ("rule",)))  # fmt: skip

    def answers_early(reading: Reading) -> None:
        reading.sock.recv(1)
        reading.sock.sendall(response(b"too large", status="413 Content Too Large", fields="Connection: close\r\n"))
        while reading.sock.recv(1 << 16):
            pass

    def not_tls(reading: Reading) -> None:
        reading.request()
        raw = socket.socket(fileno=reading.sock.detach())
        with raw:
            raw.sendall(response())

    early = Told((Read(413, b"too large"),), ("rule",))
    yield OriginRow(
        "answers-before-the-body", answers_early, early, (_PUT + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1000,)
    )
    yield OriginRow("answers-in-the-clear", not_tls, FAILED)
