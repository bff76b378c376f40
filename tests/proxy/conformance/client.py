"""A TLS client that says exactly when its bytes leave: whole, in two records, or in one record that TCP cuts in two."""

from __future__ import annotations

import re
import socket
import ssl
from enum import StrEnum
from types import TracebackType
from typing import Self

from tests.proxy.conformance.rows import Answered
from tests.proxy.inspecting import WAIT_S

_HEAD = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2}) ([^\r\n]*)\r\n((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n]*\r\n)*)\r\n")


class Cut(StrEnum):
    """Where the client's bytes are cut in two, if at all."""

    WHOLE = "whole"
    RECORD = "record"
    TCP = "tcp"


class Malformed(AssertionError):
    """What came back is not what a client may be sent."""


class Response:
    """One response. `is_whole`: its body ended as its head said."""

    def __init__(self, status: int, fields: dict[str, str], body: bytes, *, is_whole: bool = True) -> None:
        self.status = status
        self.fields = fields
        self.body = body
        self.is_whole = is_whole

    @property
    def answered(self) -> Answered:
        """A denial says its reason; what an origin said has none of ours."""
        decision = self.fields.get("outgate-decision", "")
        return Answered(self.status, decision.partition("reason=")[2].partition(";")[0] or "rule")

    @property
    def closes(self) -> bool:
        return self.fields.get("connection", "").lower() == "close"


class Client:
    """One connection. Closed at once with its context, without a farewell that somebody would wait for."""

    def __init__(self, port: int, context: ssl.SSLContext, host: str) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._buffered = b""
        self.interim: list[int] = []  # statuses of 1xx responses
        self.ended_cleanly = False
        try:
            self._shake_hands()
        except BaseException:
            self._sock.close()
            raise

    def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._sock.close()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._sock.sendall(data)

    def _fill(self) -> None:
        data = self._sock.recv(1 << 16)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def be_patient(self, seconds: float) -> None:
        """How long to wait for the gate from now on, before TimeoutError."""
        self._sock.settimeout(seconds)

    def send(self, data: bytes, cut: Cut = Cut.WHOLE, at: int = 0) -> None:
        """All of it, in two where `cut` says so, `at` so many bytes. A gate that hung up is told by `receive`."""
        try:
            if cut is not Cut.WHOLE:
                first = data[:at] if cut is Cut.RECORD else data
                self._write(first)
                sealed = self._outgoing.read()
                if cut is Cut.RECORD:
                    self._sock.sendall(sealed)
                    self._write(data[at:])
                else:
                    self._sock.sendall(sealed[: at % len(sealed) + 1])
                    self._outgoing.write(sealed[at % len(sealed) + 1 :])
            else:
                self._write(data)
            self._flush()
        except OSError:
            pass  # refused before all of it had left

    def _write(self, data: bytes) -> None:
        for begin in range(0, len(data), 1 << 14):
            self._tls.write(data[begin : begin + (1 << 14)])

    def recv(self) -> bytes:
        """Some bytes; none at the end. `ended_cleanly` says whether TLS said so."""
        while True:
            try:
                data = self._tls.read(1 << 16)
            except ssl.SSLWantReadError:
                try:
                    self._fill()
                except ConnectionResetError:
                    return b""
                continue
            except ssl.SSLEOFError:
                return b""
            except ssl.SSLZeroReturnError:
                data = b""
            if not data:
                self.ended_cleanly = True
            return data

    def response(self, *, is_head: bool = False) -> Response | None:
        """The next final response; None at the end. Raises Malformed for what no gate may send."""
        while True:
            while b"\r\n\r\n" not in self._buffered:
                data = self.recv()
                if not data:
                    if self._buffered:
                        raise Malformed(f"half a head: {self._buffered[:200]!r}")
                    return None
                self._buffered += data
            end = self._buffered.index(b"\r\n\r\n") + 4
            head, self._buffered = self._buffered[:end], self._buffered[end:]
            found = _HEAD.fullmatch(head)
            if found is None:
                raise Malformed(f"no head: {head[:200]!r}")
            status = int(found[1])
            lines = [line.partition(":") for line in found[3].decode("latin-1").split("\r\n")[:-1]]
            fields = {name.lower(): value.strip() for name, _, value in lines}
            if len(fields) != len(lines) and "content-length" in fields:
                framing = [name for name, _, _ in lines if name.lower() in ("content-length", "transfer-encoding")]
                if len(framing) > 1:
                    raise Malformed(f"two lengths: {head[:200]!r}")
            if status >= 200 or status == 101:
                return self._with_body(status, fields, is_head=is_head)
            self.interim.append(status)

    def _with_body(self, status: int, fields: dict[str, str], *, is_head: bool) -> Response:
        if is_head or status in (101, 204, 304):
            return Response(status, fields, b"")
        if fields.get("transfer-encoding", "").endswith("chunked"):
            return self._chunks(status, fields)
        if "content-length" in fields:
            length = int(fields["content-length"])
            is_whole = self._await(length)
            body, self._buffered = self._buffered[:length], self._buffered[length:]
            return Response(status, fields, body, is_whole=is_whole)
        while data := self.recv():
            self._buffered += data
        body, self._buffered = self._buffered, b""
        return Response(status, fields, body, is_whole=self.ended_cleanly)

    def _await(self, length: int) -> bool:
        while len(self._buffered) < length:
            data = self.recv()
            if not data:
                return False
            self._buffered += data
        return True

    def _chunks(self, status: int, fields: dict[str, str]) -> Response:
        body = b""
        while True:
            while b"\r\n" not in self._buffered:
                if not self._await(len(self._buffered) + 1):
                    return Response(status, fields, body, is_whole=False)
            line, _, self._buffered = self._buffered.partition(b"\r\n")
            if not re.fullmatch(rb"[0-9A-Fa-f]+", line):
                raise Malformed(f"no size of a chunk: {line!r}")
            size = int(line, 16)
            if size == 0:
                return self._trailers(status, fields, body)
            if not self._await(size + 2):
                return Response(status, fields, body + self._buffered[:size], is_whole=False)
            body += self._buffered[:size]
            if self._buffered[size : size + 2] != b"\r\n":
                raise Malformed("a chunk is longer than its size")
            self._buffered = self._buffered[size + 2 :]

    def _trailers(self, status: int, fields: dict[str, str], body: bytes) -> Response:
        while True:
            while b"\r\n" not in self._buffered:
                if not self._await(len(self._buffered) + 1):
                    return Response(status, fields, body, is_whole=False)
            line, _, self._buffered = self._buffered.partition(b"\r\n")
            if not line:
                return Response(status, fields, body)

    def rest(self) -> bytes:
        """What comes until the end."""
        received, self._buffered = self._buffered, b""
        while data := self.recv():
            received += data
        return received
