"""Network Time Security as bytes (RFC 8915): the records of a key exchange, and packets that carry their proof.

No sockets, no clock; random bytes are arguments. The AEAD is AES-SIV-CMAC-256, which every server must have (5.1).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from proxy.wire.ntp import SERVER, SIZE, KissOfDeath, MalformedPacket

ALPN = b"ntske/1"
EXPORTER = b"EXPORTER-network-time-security"  # RFC 8915 5.1, with these contexts
TO_SERVER, TO_CLIENT = b"\0\0\0\x0f\0", b"\0\0\0\x0f\1"  # NTPv4, the AEAD, the direction
KEY_SIZE, UNIQUE_SIZE, NONCE_SIZE = 32, 32, 16
COOKIES = 8  # RFC 8915 4.1.6: what a server gives, and we keep
MAX_RESPONSE = 16 * 1024  # of a key exchange: a server must not grow our memory
MAX_COOKIE = 512
MAX_PACKET = 4096  # what is read of an answer
_MAX_QUERY = 1280  # what every way to a server carries in one piece

_RECORD = struct.Struct("!HH")  # type with its critical bit, length
_FIELD = struct.Struct("!HH")  # type, length with these four
_SEALED = struct.Struct("!HH")  # lengths of nonce and ciphertext
_NUMBER = struct.Struct("!H")
_CRITICAL = 0x8000
_END, _PROTOCOL, _ERROR, _WARNING, _AEAD, _COOKIE, _SERVER, _PORT = range(8)  # RFC 8915 7.6
_NTPV4, _AES_SIV_CMAC_256 = 0, 15
_UNIQUE, _FIELD_COOKIE, _PLACEHOLDER, _AUTHENTICATOR = 0x0104, 0x0204, 0x0304, 0x0404  # RFC 8915 7.5
_MIN_FIELD = 16  # RFC 7822 7.5
_ERRORS = {0: "unrecognized critical record", 1: "bad request", 2: "internal error"}


class MalformedExchange(ValueError):
    """Not what a key exchange answers. `str()` is one of a few, and nothing of what was sent."""


class RefusedExchange(Exception):
    """The server says that it gives no keys, or none of a kind that we have. `str()` says why."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What a key exchange gives beside the keys. `server` and `port` are where to ask, if elsewhere."""

    cookies: tuple[bytes, ...]
    server: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Query:
    """What of a query its answer is known by."""

    message: bytes
    unique: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """An answer whose proof holds: 48 bytes, and cookies for later."""

    packet: bytes
    cookies: tuple[bytes, ...]


# --- the key exchange


def build_request() -> bytes:
    """What a client says: NTPv4, the one AEAD, and no more."""
    return (
        _record(_PROTOCOL | _CRITICAL, _NUMBER.pack(_NTPV4))
        + _record(_AEAD | _CRITICAL, _NUMBER.pack(_AES_SIV_CMAC_256))
        + _record(_END | _CRITICAL, b"")
    )


def parse_response(stream: bytes) -> Agreed | None:
    """What the server answers to `build_request()`; None: more bytes are needed.

    Raises MalformedExchange and RefusedExchange.
    """
    found: dict[int, bytes] = {}
    cookies: list[bytes] = []
    for kind, is_critical, body in _records(stream):
        match kind:
            case 0:  # _END
                return _agreed(found, cookies)
            case 2 | 3:  # _ERROR, _WARNING: none of the latter is defined, and those are errors then
                raise RefusedExchange(_word_of(kind, body))
            case 5:  # _COOKIE
                if not 0 < len(body) <= MAX_COOKIE:
                    raise MalformedExchange("a cookie's length")
                cookies.append(body)
            case 1 | 4 | 6 | 7:
                if kind in found:
                    raise MalformedExchange("a record twice")
                found[kind] = body
            case _ if is_critical:
                raise MalformedExchange("an unknown critical record")
    return None


def _records(stream: bytes) -> Iterator[tuple[int, bool, bytes]]:
    """The complete ones. Raises MalformedExchange for what follows the end, and what has none."""
    at = 0
    while at + _RECORD.size <= len(stream):
        kind, size = _RECORD.unpack_from(stream, at)
        at += _RECORD.size + size
        if at > len(stream):
            break
        if kind & ~_CRITICAL == _END and (size or at != len(stream)):
            raise MalformedExchange("an end that is none")
        yield kind & ~_CRITICAL, bool(kind & _CRITICAL), stream[at - size : at]
    if len(stream) >= MAX_RESPONSE:
        raise MalformedExchange("too long")


def _agreed(found: dict[int, bytes], cookies: Sequence[bytes]) -> Agreed:
    for kind, wanted, what in ((_PROTOCOL, _NTPV4, "NTPv4"), (_AEAD, _AES_SIV_CMAC_256, "AES-SIV-CMAC-256")):
        if kind not in found:
            raise MalformedExchange("a record is missing")
        if not found[kind]:
            raise RefusedExchange(f"it does not have {what}")
        if found[kind] != _NUMBER.pack(wanted):
            raise MalformedExchange("agrees to what was not offered")
    if not cookies:
        raise MalformedExchange("no cookie")
    return Agreed(tuple(cookies[:COOKIES]), _server(found.get(_SERVER)), _port(found.get(_PORT)))


def _server(body: bytes | None) -> str | None:
    if body is None:
        return None
    if not body or not body.isascii() or len(body) > 255:
        raise MalformedExchange("a server's name")
    return body.decode("ascii")


def _port(body: bytes | None) -> int | None:
    if body is None:
        return None
    if len(body) != _NUMBER.size or body == bytes(_NUMBER.size):
        raise MalformedExchange("a port")
    return int.from_bytes(body)


def _word_of(kind: int, body: bytes) -> str:
    code = int.from_bytes(body[: _NUMBER.size])
    if kind == _ERROR:
        return f"it answers with an error: {_ERRORS.get(code, code)}"
    return f"it answers with a warning: {code}"


def _record(kind: int, body: bytes) -> bytes:
    return _RECORD.pack(kind, len(body)) + body


# --- packets


def build_query(plain: bytes, cookie: bytes, *, unique: bytes, nonce: bytes, key: bytes, held: int) -> Query:
    """A query of 48 bytes with its proof.

    cookie  is shown this once, and never again: it would tell that two queries are of one client (RFC 8915 9.1)
    held    cookies that are left; as many more are asked for as are missing
    """
    message = plain + _field(_UNIQUE, unique) + (shown := _field(_FIELD_COOKIE, cookie))
    room = (_MAX_QUERY - len(message) - _FIELD.size - _SEALED.size - 2 * NONCE_SIZE) // len(shown)
    spare = _field(_PLACEHOLDER, bytes(len(cookie)))
    message += spare * max(min(COOKIES - 1 - held, room), 0)
    sealed = AESSIV(key).encrypt(b"", [message, nonce])
    return Query(message + _field(_AUTHENTICATOR, _SEALED.pack(len(nonce), len(sealed)) + nonce + sealed), unique)


def open_answer(message: bytes, query: Query, key: bytes) -> Opened:
    """The answer to `query` (RFC 8915 5.7).

    Raises MalformedPacket for all that is no such answer or cannot be proved to be (`proof`), and KissOfDeath NTSN: the
    server cannot read our cookie. What comes after the proof, and cookies outside it, are as if they were not there.
    """
    if len(message) < SIZE or message[0] & 7 != SERVER:
        raise MalformedPacket("length" if len(message) < SIZE else f"mode {message[0] & 7}")
    is_ours = False
    for at, kind, body in _fields(message, SIZE):
        if kind == _UNIQUE:
            is_ours = body == query.unique
        elif kind == _AUTHENTICATOR:
            if not is_ours:
                break
            inside = _unseal(body, message[:at], key)
            fresh = (body for _, kind, body in _fields(inside, 0) if kind == _FIELD_COOKIE)
            return Opened(message[:SIZE], tuple(one for one in fresh if len(one) <= MAX_COOKIE)[:COOKIES])
    # What nobody has sealed may say this alone, and only whoever saw the query knows its unique identifier.
    is_reply = message[24:32] == query.message[40:SIZE]
    if is_ours and is_reply and message[1] == 0 and message[12:16] == b"NTSN":
        raise KissOfDeath("NTSN")
    raise MalformedPacket("proof")


def _fields(message: bytes, at: int) -> Iterator[tuple[int, int, bytes]]:
    """Where each extension field begins, its type and body (with padding). Raises MalformedPacket."""
    while at < len(message):
        if len(message) - at < _FIELD.size:
            raise MalformedPacket("field")
        kind, size = _FIELD.unpack_from(message, at)
        if size < _MIN_FIELD or size % 4 or at + size > len(message):
            raise MalformedPacket("field")
        yield at, kind, message[at + _FIELD.size : at + size]
        at += size


def _unseal(body: bytes, before: bytes, key: bytes) -> bytes:
    """Raises MalformedPacket."""
    nonce_size, size = _SEALED.unpack_from(body)
    start = _SEALED.size + _padded(nonce_size)
    nonce, sealed = body[_SEALED.size : _SEALED.size + nonce_size], body[start : start + size]
    if not nonce or len(nonce) != nonce_size or len(sealed) != size or size < 16:
        raise MalformedPacket("proof")
    try:
        return AESSIV(key).decrypt(sealed, [before, nonce])
    except InvalidTag as error:
        raise MalformedPacket("proof") from error


def _field(kind: int, body: bytes) -> bytes:
    size = max(_padded(len(body)) + _FIELD.size, _MIN_FIELD)
    return _FIELD.pack(kind, size) + body.ljust(size - _FIELD.size, b"\0")


def _padded(size: int) -> int:
    return size + -size % 4
