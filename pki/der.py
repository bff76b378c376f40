"""DER values that stand in a row (X.690 10.1): a tag and what it holds. It knows no structure that is made of them."""

from __future__ import annotations

from collections.abc import Iterator

OCTETS, SEQUENCE = 0x04, 0x30


class MalformedDer(ValueError):
    """A value is cut off, or its length is left open, as BER allows."""


def elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Each value: its tag and its content. Raises MalformedDer."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], _octet(der, at + 1), at + 2
        if length & 0x80:
            octets = length & 0x7F
            if not octets:
                raise MalformedDer("a length that is left open")
            length, at = int.from_bytes(der[at : at + octets]), at + octets
        if at + length > len(der):
            raise MalformedDer("a value that is cut off")
        yield tag, der[at : at + length]
        at += length


def element(tag: int, *content: bytes) -> bytes:
    """One value."""
    held = b"".join(content)
    size = len(held)
    if size < 0x80:
        return bytes([tag, size]) + held
    octets = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(octets)]) + octets + held


def _octet(der: bytes, at: int) -> int:
    if at >= len(der):
        raise MalformedDer("a tag without a length")
    return der[at]
