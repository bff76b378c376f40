"""The first bytes of a connection: is it TLS or HTTP, and what does a ClientHello show. Knows bytes, never a socket.

RFC 8446 (TLS 1.3), RFC 6066 (server name), RFC 7301 (ALPN), RFC 9849 (Encrypted Client Hello).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import Enum, IntEnum, auto

MAX_HELLO = 16 * 1024  # bytes on the wire; post-quantum keys and ECH make 3 KB. A slow client must not grow our memory

_HANDSHAKE = 0x16
_CLIENT_HELLO = 0x01
_MAX_RECORD = 1 << 14  # RFC 8446 5.1: a plaintext record carries at most 2^14 bytes
_SERVER_NAME, _ALPN, _SUPPORTED_VERSIONS, _ENCRYPTED_CLIENT_HELLO = 0, 16, 43, 0xFE0D

_EXTENSION = struct.Struct("!HH").unpack_from  # kind and length

# Method, space, and the start of a target: `/path`, `*`, `http://`. Not `SSH-2.0`, not `EHLO name`.
_REQUEST_LINE = re.compile(rb"[A-Z][A-Z_-]{0,31} (?:[/*]|(?i:https?:))|CONNECT [^ ]")
_REQUEST_LINE_BEGUN = re.compile(rb"[A-Z][A-Z_-]{0,31}(?: (?i:h(?:t(?:t(?:ps?)?)?)?)?)?")


class MalformedHello(ValueError):
    """Not a ClientHello that every server reads the same way. `str()` says what is wrong."""


class HelloTooLarge(MalformedHello):
    """A ClientHello that announces more than the limit."""


class First(Enum):
    """What the first bytes of a connection are."""

    TLS = auto()
    HTTP = auto()
    OTHER = auto()


class Alert(IntEnum):
    """TLS alert descriptions that the gate sends (RFC 8446 6)."""

    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    INTERNAL_ERROR = 80
    UNRECOGNIZED_NAME = 112


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a ClientHello shows. `sni` is text as sent; it becomes a Hostname at the caller's edge.

    ech     an Encrypted Client Hello extension is there, real or GREASE: nobody can tell which, that is its purpose
    length  bytes of the input that carry it, record headers included
    """

    sni: str | None
    alpn: tuple[bytes, ...]
    ech: bool
    supported_versions: tuple[int, ...]
    length: int


def classify_first(data: bytes) -> First | None:
    """What the first bytes of a connection begin. None: more bytes are needed to tell. An SSLv2 hello is OTHER."""
    if not data:
        return None
    if data[0] == _HANDSHAKE:
        return First.TLS
    if _REQUEST_LINE.match(data):
        return First.HTTP
    return None if _REQUEST_LINE_BEGUN.fullmatch(data) else First.OTHER


def parse_hello(data: bytes, max_hello: int = MAX_HELLO) -> ClientHello | None:
    """The ClientHello at the start of `data`, whatever follows it. None: more bytes are needed, see `needs`.

    Raises MalformedHello, or HelloTooLarge when it takes more than `max_hello` bytes on the wire.
    """
    found = _join(data, max_hello)
    return None if isinstance(found, int) else _parse(*found)


def needs(data: bytes, max_hello: int = MAX_HELLO) -> int:
    """How many bytes of input the ClientHello in `data` takes at least: more than `len(data)` while it is incomplete.

    Waiting for exactly so many (SO_RCVLOWAT) keeps a hello dribbled in one-byte records from being read again for each.
    Raises as `parse_hello`.
    """
    found = _join(data, max_hello)
    return found if isinstance(found, int) else found[1]


def parse_message(message: bytes) -> ClientHello:
    """The ClientHello that is all of `message`, without records: as QUIC's CRYPTO frames carry it (RFC 9001 4.1.3).

    Raises MalformedHello.
    """
    if message[:1] != _CLIENT_HELLO.to_bytes():
        raise MalformedHello("not a ClientHello")
    if len(message) < 4 or _missing(message):
        raise MalformedHello("ends early")
    return _parse(message[4:], len(message))


def render_alert(description: Alert) -> bytes:
    """A fatal alert as a plaintext record, as sent before any key is agreed."""
    return b"\x15\x03\x03\x00\x02\x02" + description.to_bytes()


def _join(data: bytes, max_hello: int) -> tuple[bytes, int] | int:
    """The message body joined over its records and the wire bytes it took; or the wire bytes it needs at least."""
    message = b""
    at = 0
    while True:
        record = data[at : at + 5]
        if record and record[0] != _HANDSHAKE:
            raise MalformedHello("not a handshake record")
        if len(record) > 1 and record[1] != 3:  # RFC 8446 5.1: the minor version is to be ignored
            raise MalformedHello("not a TLS record version")
        if len(record) < 5:
            return at + 5 + _missing(message)
        length = record[3] << 8 | record[4]
        if not 0 < length <= _MAX_RECORD:  # RFC 8446 5.1: zero-length handshake fragments are not allowed
            raise MalformedHello("record length")
        at += 5
        message += data[at : at + length]
        at += length
        if message and message[0] != _CLIENT_HELLO:
            raise MalformedHello("not a ClientHello")
        missing = _missing(message)
        unseen = max(at - len(data), 0)  # bytes of this record still to come
        # RFC 8446 4.1.2 and 5.1: 24 bits of length; what is still missing comes in this record or behind another header
        wire = at + (missing - unseen + 5 if missing > unseen else 0)
        if wire > max_hello:
            raise HelloTooLarge(f"takes at least {wire} bytes, the limit is {max_hello}")
        if len(message) >= 4 and missing < unseen:
            raise MalformedHello("record goes on behind the ClientHello")
        if unseen:
            return wire
        if not missing:
            return message[4:], at


def _missing(message: bytes) -> int:
    """Bytes of the handshake message still to come, at least; 4 bytes of type and length come first."""
    if len(message) < 4:
        return 4 - len(message)
    missing = 4 + int.from_bytes(message[1:4]) - len(message)
    if missing < 0:
        raise MalformedHello("record goes on behind the ClientHello")
    return missing


def _parse(body: bytes, length: int) -> ClientHello:
    """The fields of a ClientHello message without its four-byte header (RFC 8446 4.1.2)."""
    end = len(body)
    try:
        if body[0] != 3:
            raise MalformedHello("legacy version")
        at = 35 + body[34]  # version 2, random 32, session id
        if body[34] > 32:
            raise MalformedHello("session id length")
        suites = body[at] << 8 | body[at + 1]
        if not suites or suites & 1:
            raise MalformedHello("cipher suites length")
        at += 2 + suites
        if not body[at]:
            raise MalformedHello("compression methods length")
        at += 1 + body[at]
        if at == end:  # TLS 1.2 and older may have no extensions at all
            return ClientHello(None, (), False, (), length)
        if at + 2 + (body[at] << 8 | body[at + 1]) != end:
            raise MalformedHello("extensions length")
    except IndexError:
        raise MalformedHello("ends early") from None
    return _parse_extensions(body, at + 2, end, length)


def _parse_extensions(body: bytes, at: int, end: int, length: int) -> ClientHello:
    sni: str | None = None
    alpn: tuple[bytes, ...] = ()
    versions: tuple[int, ...] = ()
    seen = set()
    while at < end:
        start = at + 4
        if start > end:
            raise MalformedHello("extension header")
        kind, size = _EXTENSION(body, at)
        at = start + size
        if at > end:
            raise MalformedHello("extension length")
        if kind in seen:  # RFC 8446 4.2; two server names would be read differently by us and by the server
            raise MalformedHello("duplicate extension")
        seen.add(kind)
        if kind == _SERVER_NAME:
            sni = _parse_server_name(body[start:at])
        elif kind == _ALPN:
            alpn = _parse_alpn(body[start:at])
        elif kind == _SUPPORTED_VERSIONS:
            versions = _parse_versions(body[start:at])
    return ClientHello(sni, alpn, _ENCRYPTED_CLIENT_HELLO in seen, versions, length)


def _parse_server_name(extension: bytes) -> str:
    """RFC 6066 3: a list of names; only one kind is defined, and only one name of a kind may stand there."""
    size = len(extension)
    if size < 6 or extension[2] != 0:
        raise MalformedHello("server name")
    if extension[0] << 8 | extension[1] != size - 2 or extension[3] << 8 | extension[4] != size - 5:
        raise MalformedHello("server name list is not exactly one name")
    name = extension[5:]
    if not name.isascii():
        raise MalformedHello("server name is not ASCII")
    return name.decode()


def _parse_alpn(extension: bytes) -> tuple[bytes, ...]:
    size = len(extension)
    if size < 4 or extension[0] << 8 | extension[1] != size - 2:
        raise MalformedHello("ALPN list")
    protocols = []
    at = 2
    while at < size:
        following = at + 1 + extension[at]
        if following == at + 1 or following > size:
            raise MalformedHello("ALPN name length")
        protocols.append(extension[at + 1 : following])
        at = following
    return tuple(protocols)


def _parse_versions(extension: bytes) -> tuple[int, ...]:
    size = len(extension)
    if size < 3 or extension[0] != size - 1 or size % 2 == 0:
        raise MalformedHello("supported versions")
    return tuple(extension[at] << 8 | extension[at + 1] for at in range(1, size, 2))
