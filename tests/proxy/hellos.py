"""ClientHellos made by hand: any extension, any fragmentation, any lie in a length."""

from __future__ import annotations

import struct
from collections.abc import Iterable

type Extension = tuple[int, bytes]

X25519_MLKEM768 = 0x11EC


def counted(width: int, data: bytes) -> bytes:
    """`data` behind its length in `width` bytes."""
    return len(data).to_bytes(width) + data


def server_name(*names: bytes, kind: int = 0) -> Extension:
    return 0, counted(2, b"".join(bytes([kind]) + counted(2, name) for name in names))


def alpn(*protocols: bytes) -> Extension:
    return 16, counted(2, b"".join(counted(1, protocol) for protocol in protocols))


def supported_versions(*versions: int) -> Extension:
    return 43, counted(1, b"".join(struct.pack("!H", version) for version in versions))


def key_share(*shares: tuple[int, int]) -> Extension:
    """Shares as (group, size of the key)."""
    return 51, counted(2, b"".join(struct.pack("!H", group) + counted(2, bytes(size)) for group, size in shares))


def ech(payload: int = 239) -> Extension:
    """An outer ECH extension (RFC 9849 5): type, cipher suite, config id, encapsulated key, payload."""
    return 0xFE0D, b"\x00\x00\x01\x00\x01\x2a" + counted(2, bytes(32)) + counted(2, bytes(payload))


def message(
    extensions: Iterable[Extension] | None = (),
    *,
    version: bytes = b"\x03\x03",
    session_id: bytes = bytes(32),
    suites: bytes = b"\x13\x01\x13\x02\xc0\x2b",
    compression: bytes = b"\x00",
) -> bytes:
    """A ClientHello handshake message. `extensions=None` leaves the whole block out, as TLS 1.2 may."""
    body = version + bytes(32) + counted(1, session_id) + counted(2, suites) + counted(1, compression)
    if extensions is not None:
        body += counted(2, b"".join(struct.pack("!H", kind) + counted(2, data) for kind, data in extensions))
    return b"\x01" + counted(3, body)


def records(handshake: bytes, *sizes: int) -> bytes:
    """`handshake` in records of these sizes; the last one takes the rest."""
    parts = []
    for size in sizes:
        parts.append(handshake[:size])
        handshake = handshake[size:]
    if handshake or not parts:
        parts.append(handshake)
    return b"".join(b"\x16\x03\x01" + counted(2, part) for part in parts)


def hello(name: str | None = "a.example", *more: Extension) -> bytes:
    """An ordinary TLS 1.3 hello in one record."""
    named = [server_name(name.encode())] if name is not None else []
    return records(message([*named, alpn(b"h2", b"http/1.1"), supported_versions(0x304, 0x303), *more]))


def browser_hello(name: str = "a.example") -> bytes:
    """What a browser sends today: GREASE first and last, a post-quantum key share, Encrypted Client Hello."""
    return records(
        message(
            [
                (0x0A0A, b""),
                ech(),
                server_name(name.encode()),
                alpn(b"\x0a\x0a", b"h2", b"http/1.1"),
                supported_versions(0x0A0A, 0x304, 0x303),
                key_share((0x0A0A, 1), (X25519_MLKEM768, 1216), (0x001D, 32)),
                (0x1A1A, b"\x00"),
            ],
            suites=b"\x0a\x0a\x13\x01\x13\x02\x13\x03",
        )
    )
