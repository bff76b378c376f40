"""The keys of QUIC's Initial packets, which every observer can derive, and one packet opened with them. Knows no frame.

RFC 9001 5 (QUIC version 1), RFC 9369 3 (version 2). Initials are sealed against accidents, not against readers.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

VERSION_1, VERSION_2 = 0x00000001, 0x6B3343CF

_SALTS_AND_LABELS = {
    VERSION_1: (bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"), b"quic"),  # RFC 9001 5.2
    VERSION_2: (bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"), b"quicv2"),  # RFC 9369 3.3
}
_SAMPLE_AT, _SAMPLE = 4, 16  # RFC 9001 5.4.2: as if the packet number had four bytes


class NotSealedWithIt(ValueError):
    """A packet that this key does not open."""


@dataclass(frozen=True, slots=True)
class InitialKey:
    """What a client seals its Initials with."""

    key: bytes
    iv: bytes
    header: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """A packet without its protection. `first` is its first byte, `number` its full packet number."""

    first: int
    number: int
    payload: bytes


def derive_key(version: int, destination: bytes) -> InitialKey:
    """The client's key of a connection whose first Initial went to the connection ID `destination` (RFC 9001 5.2)."""
    salt, label = _SALTS_AND_LABELS[version]
    secret = _expand(hmac.digest(salt, destination, "sha256"), b"client in", 32)
    return InitialKey(
        _expand(secret, label + b" key", 16), _expand(secret, label + b" iv", 12), _expand(secret, label + b" hp", 16)
    )


def open_packet(key: InitialKey, packet: bytes, number_at: int, largest: int = -1) -> Opened:
    """The payload of `packet`, whose header ends before the packet number at `number_at`.

    `largest` is the largest packet number so far. Raises NotSealedWithIt, also where it is too short to be sealed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sample = packet[number_at + _SAMPLE_AT : number_at + _SAMPLE_AT + _SAMPLE]
    if len(sample) < _SAMPLE:
        raise NotSealedWithIt("too short")
    cipher = Cipher(algorithms.AES(key.header), modes.ECB())  # noqa: S305 - RFC 9001 5.4.3
    mask = cipher.encryptor().update(sample)
    first = packet[0] ^ mask[0] & 0x0F
    width = (first & 3) + 1
    truncated = bytes(a ^ b for a, b in zip(packet[number_at : number_at + width], mask[1:], strict=False))
    number = _decode_number(int.from_bytes(truncated), width * 8, largest)
    header = bytes((first,)) + packet[1:number_at] + truncated
    nonce = (int.from_bytes(key.iv) ^ number).to_bytes(12)
    try:
        payload = AESGCM(key.key).decrypt(nonce, packet[number_at + width :], header)
    except InvalidTag:
        raise NotSealedWithIt("wrong tag") from None
    return Opened(first, number, payload)


def _decode_number(truncated: int, bits: int, largest: int) -> int:
    """RFC 9000 A.3: the number nearest to the next one expected that ends in these bits."""
    expected, window = largest + 1, 1 << bits
    candidate = expected & ~(window - 1) | truncated
    if candidate <= expected - window // 2 and candidate < (1 << 62) - window:
        return candidate + window
    if candidate > expected + window // 2 and candidate >= window:
        return candidate - window
    return candidate


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    """RFC 8446 7.1, of at most one digest's length."""
    label = b"tls13 " + label
    info = struct.pack("!HB", length, len(label)) + label + b"\x00\x01"
    return hmac.digest(secret, info, "sha256")[:length]
