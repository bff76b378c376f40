"""The origin of the table: it reads strictly, keeps what it was sent, and says what a row has it say."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable

from tests.proxy import inspecting
from tests.proxy.conformance.rows import Forwarded
from tests.proxy.inspecting import WAIT_S, Respond, response

type Script = Callable[[Reading], None]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_HEAD = re.compile(_TOKEN + rb" /[\x21-\x7e]* HTTP/1\.[01]\r\n(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_SWITCHES = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


class Violation(Exception):
    """Bytes that no origin may be sent by a gate."""


class Reading:
    """The requests of one connection, read as strictly as can be. `unread` is what came and is no whole request yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unread = b""

    def request(self) -> Forwarded | None:
        """The next whole one; None at the end. Raises Violation."""
        while b"\r\n\r\n" not in self.unread:
            if not self._more():
                return None
        end = self.unread.index(b"\r\n\r\n") + 4
        head = self.unread[:end]
        if not _HEAD.fullmatch(head):
            raise Violation(f"no request head: {head[:300]!r}")
        fields = [line.partition(b":") for line in head.split(b"\r\n")[1:-2]]
        lengths = [value.strip() for name, _, value in fields if name.lower() == b"content-length"]
        codings = [value.strip() for name, _, value in fields if name.lower() == b"transfer-encoding"]
        if len(lengths) + len(codings) > 1 or sum(name.lower() == b"host" for name, _, _ in fields) != 1:
            raise Violation(f"two readings: {head[:300]!r}")
        if b"\r\nexpect: 100-continue\r\n" in head.lower():
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if codings:
            return self._chunked(head, end)
        length = int(lengths[0]) if lengths else 0
        if not self._await(end + length):
            return None
        body, self.unread = self.unread[end : end + length], self.unread[end + length :]
        return Forwarded(head, body)

    def _more(self) -> bool:
        data = self.sock.recv(1 << 16)
        self.unread += data
        return bool(data)

    def _await(self, size: int) -> bool:
        while len(self.unread) < size:
            if not self._more():
                return False
        return True

    def _line(self, begin: int) -> int:
        """Where the line that begins there ends, without its CR LF; -1: it never does."""
        while (end := self.unread.find(b"\r\n", begin)) < 0:
            if not self._more():
                return -1
        return end

    def _chunked(self, head: bytes, at: int) -> Forwarded | None:
        body = b""
        while (end := self._line(at)) >= 0:
            line, at = self.unread[at:end], end + 2
            if not _SIZE.fullmatch(line):
                raise Violation(f"no size of a chunk: {line[:100]!r}")
            size = int(line, 16)
            if size == 0:
                return self._trailers(head, body, at)
            if not self._await(at + size + 2):
                return None
            body += self.unread[at : at + size]
            at += size + 2
            if self.unread[at - 2 : at] != b"\r\n":
                raise Violation("a chunk is longer than its size")
        return None

    def _trailers(self, head: bytes, body: bytes, begin: int) -> Forwarded | None:
        at = begin
        while (end := self._line(at)) > at:
            at = end + 2
        if end < 0:
            return None
        trailers, self.unread = self.unread[begin:at], self.unread[end + 2 :]
        return Forwarded(head, body, trailers)


class StrictOrigin(inspecting.Origin):
    """Keeps whole requests in `forwarded`, in `violations` what is none, and in `readings` every connection.

    script  holds the conversation, for a row about what origins say; None: every request is answered
    """

    def __init__(self, context: ssl.SSLContext | None, respond: Respond) -> None:
        self.forwarded: list[Forwarded] = []
        self.readings: list[Reading] = []
        self.violations: list[str] = []
        self.script: Script | None = None
        super().__init__(context, respond)

    def converse(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        reading = Reading(sock)
        self.readings.append(reading)
        try:
            if self.script:
                self.script(reading)
            else:
                self._answer(reading)
        except Violation as violation:
            self.violations.append(str(violation))

    def _answer(self, reading: Reading) -> None:
        while request := reading.request():
            self.forwarded.append(request)
            if b"\r\nUpgrade: " in request.head:
                reading.sock.sendall(_SWITCHES)
                while data := reading.sock.recv(4096):
                    reading.sock.sendall(data.upper())
                return
            reading.sock.sendall(response(b"" if request.head.startswith(b"HEAD ") else b"sunny"))
