"""QUIC client Initials made by hand: any frames, any header, sealed by `cryptography`'s own key derivation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tests.proxy.hellos import Extension, alpn, counted, message, server_name, supported_versions

V1, V2 = 0x00000001, 0x6B3343CF
SALTS = {
    V1: bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"),
    V2: bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"),
}
INITIAL, ZERO_RTT, HANDSHAKE, RETRY = range(4)  # as version 1 numbers them
PING = b"\x01"
ACK = b"\x02\x05\x10\x01\x02\x00\x01"  # up to 5: one range of 3, a gap, one of 2
ACK_ECN = b"\x03\x00\x00\x00\x00\x01\x02\x03"
CLOSE = b"\x1c\x41\x2a\x06\x04gone"
DESTINATION, SOURCE = bytes(range(8)), bytes(range(8, 16))


def number(value: int) -> bytes:
    """A variable-length integer."""
    width = next(width for width in range(4) if value < 1 << (8 << width) - 2)
    return (value | width << (8 << width) - 2).to_bytes(1 << width)


def crypto(offset: int, piece: bytes) -> bytes:
    return b"\x06" + number(offset) + number(len(piece)) + piece


def sliced(handshake: bytes, *cuts: int) -> list[bytes]:
    """CRYPTO frames of the message, cut at these places."""
    ends = [*sorted(cut for cut in cuts if 0 < cut < len(handshake)), len(handshake)]
    return [crypto(start, handshake[start:end]) for start, end in zip([0, *ends], ends, strict=False) if start < end]


def quic_hello(name: str | None = "a.example", *more: Extension) -> bytes:
    named = [server_name(name.encode())] if name is not None else []
    return message([*named, alpn(b"h3"), supported_versions(0x304), *more], session_id=b"")


def keys(version: int, destination: bytes) -> tuple[bytes, bytes, bytes]:
    """Key, IV and header protection key of a client."""
    extract = hmac.HMAC(SALTS[version], hashes.SHA256())
    extract.update(destination)
    secret = _expand(extract.finalize(), "client in", 32)
    label = "quicv2" if version == V2 else "quic"
    return _expand(secret, f"{label} key", 16), _expand(secret, f"{label} iv", 12), _expand(secret, f"{label} hp", 16)


def _expand(secret: bytes, label: str, length: int) -> bytes:
    info = length.to_bytes(2) + counted(1, f"tls13 {label}".encode()) + b"\0"
    return HKDFExpand(hashes.SHA256(), length, info).derive(secret)


def packet(
    frames: bytes,
    *,
    version: int = V1,
    kind: int = INITIAL,
    destination: bytes = DESTINATION,
    key: bytes | None = None,
    source: bytes = SOURCE,
    token: bytes = b"",
    packet_number: int = 0,
    width: int = 2,
    first: int = 0xC0,
) -> bytes:
    """One sealed packet. `key` is the connection ID that keys come from, where that is not `destination`."""
    bits = (kind + (version == V2)) % 4 << 4
    head = bytes((first | bits | width - 1,)) + version.to_bytes(4) + counted(1, destination) + counted(1, source)
    if kind == INITIAL:
        head += number(len(token)) + token
    length = width + len(frames) + 16
    head += number(length) if length >= 0x4000 else (0x4000 | length).to_bytes(2)
    shown = (packet_number & (1 << 8 * width) - 1).to_bytes(width)
    secret, iv, header_key = keys(version, destination if key is None else key)
    nonce = (int.from_bytes(iv) ^ packet_number).to_bytes(12)
    sealed = AESGCM(secret).encrypt(nonce, frames, head + shown)
    encryptor = Cipher(algorithms.AES(header_key), modes.ECB()).encryptor()
    mask = encryptor.update((shown + sealed)[4:20].ljust(16, b"\0"))
    hidden = bytes(a ^ b for a, b in zip(shown, mask[1:], strict=False))
    return bytes((head[0] ^ mask[0] & 0x0F,)) + head[1:] + hidden + sealed


def datagram(
    *frames: bytes,
    size: int = 1200,
    version: int = V1,
    kind: int = INITIAL,
    destination: bytes = DESTINATION,
    key: bytes | None = None,
    token: bytes = b"",
    packet_number: int = 0,
    width: int = 2,
    first: int = 0xC0,
) -> bytes:
    """One Initial, filled up with PADDING."""

    def sealed(joined: bytes) -> bytes:
        return packet(
            joined, version=version, kind=kind, destination=destination, key=key, token=token,
            packet_number=packet_number, width=width, first=first,
        )  # fmt: skip

    joined = b"".join(frames)
    return sealed(joined + bytes(max(size - len(sealed(joined)), 0)))


def datagrams(frames: Iterable[bytes], sizes: Sequence[int], *, destination: bytes = DESTINATION) -> list[bytes]:
    """These frames, so many in each datagram, numbered in this order."""
    rest = list(frames)
    made = []
    for packet_number, size in enumerate(sizes):
        made.append(datagram(*rest[:size], destination=destination, packet_number=packet_number))
        rest = rest[size:]
    return made
