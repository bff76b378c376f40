"""A QUIC Initial that two keys open, to different frames: AES-GCM promises nothing about who else can open a packet.

The tag is linear in every block of the ciphertext (NIST SP 800-38D 6.4), so one free block makes two tags equal.
"""

from __future__ import annotations

import random

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.proxy.hellos import counted
from tests.proxy.quic_client import V1, keys

_REDUCTION = 0xE1 << 120


def packet_of_two_keys(one: bytes, other: bytes, *, destination: bytes, seed: int = 0) -> bytes:
    """A datagram to `destination`, opened by the keys of both connection IDs. What the frames are is left to chance."""
    rng = random.Random(seed)
    head = V1.to_bytes(4) + counted(1, destination) + b"\0\0" + (0x4000 | 4 + 1168 + 16).to_bytes(2)
    while True:
        sample_and_rest = rng.randbytes(4 + 1168)
        first = 0xC0 | rng.randrange(16)
        opened = [_open_header(key, first, head, sample_and_rest) for key in (one, other)]
        if opened[0][0] == opened[1][0] == 4:  # numbers of equal width: the ciphertext begins at the same place
            break
    sealed = bytearray(sample_and_rest[4:])
    free = len(sealed) // 16 - 2  # any block behind the sample
    sealed[16 * free : 16 * free + 16] = bytes(16)
    sums, factors = [], []
    for _, key, nonce, header in opened:
        hash_key = int.from_bytes(_encrypt(key, bytes(16)))
        tag, factor = _ghash(hash_key, header, bytes(sealed), free)
        sums.append(tag ^ int.from_bytes(_encrypt(key, nonce + b"\0\0\0\1")))
        factors.append(factor)
    block = _multiply(sums[0] ^ sums[1], _invert(factors[0] ^ factors[1]))
    sealed[16 * free : 16 * free + 16] = block.to_bytes(16)
    tag = sums[0] ^ _multiply(block, factors[0])
    return bytes((first,)) + head + sample_and_rest[:4] + bytes(sealed) + tag.to_bytes(16)


def _open_header(key: bytes, first: int, head: bytes, rest: bytes) -> tuple[int, bytes, bytes, bytes]:
    """The width of the number, the key, the nonce and the header without protection."""
    secret, iv, header_key = keys(V1, key)
    mask = _encrypt(header_key, rest[4:20])
    shown = first ^ mask[0] & 0x0F
    number = bytes(a ^ b for a, b in zip(rest[:4], mask[1:], strict=False))
    nonce = (int.from_bytes(iv) ^ int.from_bytes(number)).to_bytes(12)
    return (shown & 3) + 1, secret, nonce, bytes((shown,)) + head + number


def _encrypt(key: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)


def _ghash(hash_key: int, header: bytes, sealed: bytes, free: int) -> tuple[int, int]:
    """The hash, and what a difference in block `free` of the ciphertext is multiplied with."""
    padded = header + bytes(-len(header) % 16)
    joined = padded + sealed + (8 * len(header)).to_bytes(8) + (8 * len(sealed)).to_bytes(8)
    total = 0
    for at in range(0, len(joined), 16):
        total = _multiply(total ^ int.from_bytes(joined[at : at + 16]), hash_key)
    factor = hash_key
    for _ in range(len(joined) // 16 - len(padded) // 16 - free - 1):
        factor = _multiply(factor, hash_key)
    return total, factor


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(127, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_REDUCTION if b & 1 else 0)
    return product


def _invert(a: int) -> int:
    """a^(2^128 - 2)."""
    result, power = 1 << 127, a
    for _ in range(127):
        power = _multiply(power, power)
        result = _multiply(result, power)
    return result
