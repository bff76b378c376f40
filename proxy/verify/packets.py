"""The bytes that probes send, and how a gate's refusal reads in what comes back. No sockets, no clock.

RFC 8446 (TLS), 9000 and 9001 (QUIC), 5905 (NTP), 8489 (STUN), 9260 (SCTP). Nothing here is meant to be a whole client:
each message is just what a server answers.
"""

from __future__ import annotations

import hmac
import re
import struct

from policies.hostnames import Hostname
from proxy.wire.dns import Rcode, build_query

TXT, NULL, ANY, PTR = 16, 10, 255, 12

_HELLO_EXTENSIONS = (
    (10, b"\x00\x04\x00\x1d\x00\x17"),  # groups: X25519, P-256
    (13, b"\x00\x08\x04\x03\x08\x04\x04\x01\x08\x07"),  # signatures: ECDSA, RSA-PSS, RSA, Ed25519
    (45, b"\x01\x01"),
)
_VERSIONS = (43, b"\x04\x03\x04\x03\x03")
_ECH = 0xFE0D
_QUIC_PARAMETERS = 57
_QUIC_SALT = bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a")  # RFC 9001 5.2
_QUIC_LEAST = 1200  # RFC 9000 14.1: a smaller datagram is not answered
_GREASED_VERSION = 0x1A2A3A4A  # RFC 9000 15: reserved, so that every server answers with the versions it has
_CRC32C = 0x82F63B78

_DECISION = re.compile(rb"\r\nOutgate-Decision: deny; reason=([a-z_]+); id=([0-9a-f]{16})\r\n", re.IGNORECASE)
_DNS_DECISION = re.compile(rb"([a-z_]+), decision ([0-9a-f]{16})")
_ALERTS = (b"\x15\x03\x03\x00\x02\x02\x31", b"\x15\x03\x03\x00\x02\x02\x50")  # access_denied, internal_error


def http_get(host: str, path: str = "/", *fields: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", *fields, "", "")).encode("ascii")


def http_connect(target: str) -> bytes:
    return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("ascii")


def client_hello(name: str | None, random: bytes, *, ech: bool = False) -> bytes:
    """A hello that servers answer with their own. `random` is 64 bytes: the hello's, and a key nobody has."""
    extensions = [_VERSIONS]
    if ech:  # RFC 9849 5, outer: as a browser's GREASE, which no one can tell from a real one
        extensions.append((_ECH, b"\x00\x00\x01\x00\x01\x2a" + _counted(2, random[:32]) + _counted(2, random * 3)))
    return b"\x16\x03\x01" + _counted(2, _hello(name, random, extensions))


def _hello(name: str | None, random: bytes, more: list[tuple[int, bytes]]) -> bytes:
    extensions = [*_HELLO_EXTENSIONS, (51, _counted(2, b"\x00\x1d" + _counted(2, random[32:64]))), *more]
    if name is not None:
        extensions.insert(0, (0, _counted(2, b"\0" + _counted(2, name.encode("ascii")))))
    listed = b"".join(struct.pack("!H", kind) + _counted(2, body) for kind, body in extensions)
    suites = b"\x13\x01\x13\x02\x13\x03\xc0\x2b\xc0\x2f\xc0\x2c\xc0\x30"
    body = (
        b"\x03\x03" + random[:32] + _counted(1, random[:32]) + _counted(2, suites) + b"\x01\x00" + _counted(2, listed)
    )
    return b"\x01" + _counted(3, body)


def _counted(width: int, body: bytes) -> bytes:
    return len(body).to_bytes(width) + body


# --- DNS


def dns_query(name: str, qtype: int, query_id: int) -> bytes:
    """With an OPT record, so that a gate says why it refuses."""
    return build_query(Hostname(name), qtype, query_id)


def multicast_query(name: str, qtype: int) -> bytes:
    """As mDNS and LLMNR have it: no id, no flags (RFC 6762 18, RFC 4795 2.1.1)."""
    return bytes(4) + build_query(Hostname(name), qtype, 0)[4:]


def is_answer_to(query: bytes, message: bytes) -> bool:
    """Whether `message` is a DNS answer with the id of `query`."""
    return len(message) >= 12 and message[:2] == query[:2] and bool(message[2] & 0x80)


def is_failure(message: bytes) -> bool:
    """Whether a resolver says that it could not or would not ask, and no more. A refusal of a gate's says more."""
    return message[3] & 0x0F in (Rcode.SERVFAIL, Rcode.REFUSED) and read_denial(message) is None


# --- UDP


def ntp(first: int, rest: bytes) -> bytes:
    """48 bytes or more; `first` has leap, version and mode."""
    return bytes((first,)) + rest


def stun(transaction: bytes) -> bytes:
    """A Binding request (RFC 8489 5): `transaction` is 12 bytes."""
    return struct.pack("!HHI", 1, 0, 0x2112A442) + transaction


def quic_unknown_version(random: bytes) -> bytes:
    """Any QUIC server answers with the versions that it has (RFC 9000 6.1)."""
    head = b"\xc0" + struct.pack("!I", _GREASED_VERSION) + _counted(1, random[:8]) + _counted(1, random[8:16])
    return head + bytes(_QUIC_LEAST - len(head))


def quic_initial(name: str, random: bytes) -> bytes:
    """An Initial of version 1 with a whole hello, protected as RFC 9001 5 says."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    destination, source = random[:8], random[8:16]
    parameters = b"\x0f" + _counted(1, source) + b"\x04\x04\x80\x01\x00\x00\x08\x01\x08"
    hello = _hello(name, random, [(43, b"\x02\x03\x04"), (16, b"\x00\x03\x02h3"), (_QUIC_PARAMETERS, parameters)])
    frames = b"\x06\x00" + (0x4000 | len(hello)).to_bytes(2) + hello
    number = b"\x00\x00"
    head = b"\xc1\x00\x00\x00\x01" + _counted(1, destination) + _counted(1, source) + b"\x00"
    frames += bytes(_QUIC_LEAST - len(head) - 2 - len(number) - len(frames) - 16)
    head += (0x4000 | (len(number) + len(frames) + 16)).to_bytes(2) + number

    secret = _expand(hmac.digest(_QUIC_SALT, destination, "sha256"), b"client in", 32)
    sealed = AESGCM(_expand(secret, b"quic key", 16)).encrypt(_expand(secret, b"quic iv", 12), frames, head)
    cipher = Cipher(algorithms.AES(_expand(secret, b"quic hp", 16)), modes.ECB())  # noqa: S305 - RFC 9001 5.4.3
    mask = cipher.encryptor().update(sealed[2:18])
    hidden = bytes(a ^ b for a, b in zip(number, mask[1:], strict=False))
    return bytes((head[0] ^ mask[0] & 0x0F,)) + head[1 : -len(number)] + hidden + sealed


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    """RFC 8446 7.1, of at most one digest's length."""
    info = struct.pack("!H", length) + _counted(1, b"tls13 " + label) + b"\x00"
    return hmac.digest(secret, info + b"\x01", "sha256")[:length]


# --- below TCP and UDP


def echo(nonce: bytes, *, version: int) -> bytes:
    """An echo request; the kernel fills in checksum and, on a ping socket, the identifier."""
    return bytes((8 if version == 4 else 128, 0, 0, 0, 0, 0, 0, 1)) + nonce


def sctp_init(random: bytes) -> bytes:
    """An INIT to port 443 (RFC 9260 3.3.2): a server, or any host without SCTP, answers it."""
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20, int.from_bytes(random[:4]) | 1, 65536, 1, 1, 1)
    packet = struct.pack("!HHII", 40443, 443, 0, 0) + chunk
    return packet[:8] + struct.pack("<I", _crc32c(packet)) + packet[12:]


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CRC32C if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


GRE = b"\x00\x00\x08\x00"  # RFC 2784: nothing optional, IPv4 inside


# --- what a gate says


def read_denial(data: bytes) -> tuple[str, str | None] | None:
    """Reason and decision id of what reads like a gate's refusal. Anybody can write that: it proves nothing."""
    if data in _ALERTS:
        return "TLS alert", None
    if data.startswith(b"HTTP/1."):
        found = _DECISION.search(data[: data.find(b"\r\n\r\n") + 4])
        return (found[1].decode(), found[2].decode()) if found else None
    if len(data) >= 12 and data[2] & 0x80 and data[6:8] == b"\0\0":  # a DNS answer without answers
        found = _DNS_DECISION.search(data)
        return (found[1].decode(), found[2].decode()) if found else None
    return None
