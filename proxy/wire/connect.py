"""The CONNECT request to a proxy, and the head of its answer (RFC 9110 9.3.6). Bytes and values only, no I/O."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass
from ipaddress import IPv6Address

from policies.addresses import Address
from policies.hostnames import Hostname

MAX_HEAD = 16 * 1024  # an answer whose head never ends must not grow our memory

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?\r\n")
_FIELD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n")
_VERSION = b"HTTP/1."
_END = b"\r\n\r\n"
_CONTINUES = range(100, 200)  # heads before the answer itself
_SWITCHING = 101  # to another protocol, which nobody asked for


class MalformedAnswer(ValueError):
    """Bytes that are no answer to CONNECT. `str()` says what is wrong."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the proxy said. `size`: how many bytes that took; the next one is the origin's, where it is established."""

    status: int
    size: int

    @property
    def is_established(self) -> bool:
        return 200 <= self.status < 300


def render_connect(target: Hostname | Address, port: int, authorization: str | None = None) -> bytes:
    """A CONNECT request. `authorization` is the value of `Proxy-Authorization`."""
    authority = f"[{target}]:{port}" if isinstance(target, IPv6Address) else f"{target}:{port}"
    fields = f"Proxy-Authorization: {authorization}\r\n" if authorization else ""
    return f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{fields}\r\n".encode("ascii")


def basic(credentials: bytes) -> str:
    """`NAME:PASSWORD` as the value of an `Authorization` field (RFC 7617)."""
    return "Basic " + b64encode(credentials).decode("ascii")


def parse_answer(data: bytes) -> Answer | None:
    """The answer that `data` begins with, past informational ones; None when more bytes are needed.

    Raises MalformedAnswer. Content-Length and Transfer-Encoding of a 2xx are not read: what follows it is the tunnel.
    """
    start = 0
    while True:
        end = data.find(_END, start, MAX_HEAD)
        if end < 0:
            _check_beginning(data, start)
            return None
        end += len(_END)
        status = _read_head(data[start:end])
        if status not in _CONTINUES or status == _SWITCHING:
            return Answer(status, end)
        start = end


def _check_beginning(data: bytes, start: int) -> None:
    """Refuse early what can become no answer any more: silence until the deadline would hide what is wrong."""
    is_other = not data[start:].startswith(_VERSION[: len(data) - start])
    if is_other or (b"\n" in data[start:MAX_HEAD] and not _STATUS_LINE.match(data, start)):
        raise MalformedAnswer("did not answer in HTTP/1")
    if len(data) >= MAX_HEAD:
        raise MalformedAnswer(f"sent a head of more than {MAX_HEAD} bytes")


def _read_head(head: bytes) -> int:
    """The status of one whole head. Every line is looked at: two readers must not disagree about where it ends."""
    line = _STATUS_LINE.match(head)
    if line is None:
        raise MalformedAnswer("did not answer in HTTP/1")
    position = line.end()
    while position < len(head) - 2:
        field = _FIELD.match(head, position)
        if field is None:
            raise MalformedAnswer("sent a malformed header field")
        position = field.end()
    return int(line[1])
