"""HTTPS and SVCB records as bytes: what of a server's a client behind the gate may see. No sockets, no clock.

RFC 9460. Most of such a record leads past a gate: the keys of Encrypted Client Hello hide the name, address hints take
the place of the addresses that were judged, HTTP/3 runs over UDP, and other targets are names nobody has judged. What
is left is written anew; where nothing of use is left the client goes by A and AAAA, as the RFC has it (3, 8).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

SVCB, HTTPS = 64, 65
TYPES = frozenset({SVCB, HTTPS})
PROTOCOLS = (b"h2", b"http/1.1")  # those that a gate carries; h3 would be QUIC

_MANDATORY, _ALPN, _NO_DEFAULT_ALPN, _PORT = 0, 1, 2, 3
_IPV4_HINT, _ECH, _IPV6_HINT = 4, 5, 6
_KEPT = frozenset({_ALPN, _NO_DEFAULT_ALPN, _PORT})
_LEFT_OUT = frozenset({_IPV4_HINT, _ECH, _IPV6_HINT})  # a client does without them
_PARAM = struct.Struct("!HH")


@dataclass(frozen=True, slots=True)
class Service:
    """One way to reach a name itself, at the addresses that it has.

    alpn       protocols beside the default; empty: that alone
    mandatory  keys that a client must know to use it; each of them is here
    """

    priority: int
    alpn: tuple[bytes, ...] = ()
    no_default_alpn: bool = False
    port: int | None = None
    mandatory: tuple[int, ...] = ()


def read_service(content: bytes, owners: Iterable[bytes]) -> Service | None:
    """What of a record's content may be seen. None: nothing; it is malformed, an alias, is about a target other than
    `owners` (names in wire form without the root's zero byte), or needs what is left out here."""
    try:
        priority, target, params = _split(content)
        if priority == 0 or (target and target not in owners):
            return None
        return _reduce(priority, params)
    except (struct.error, IndexError, ValueError):
        return None


def write_service(service: Service) -> bytes:
    """The content of a record with its owner as target."""
    params = {}
    if service.mandatory:
        params[_MANDATORY] = b"".join(key.to_bytes(2) for key in service.mandatory)
    if service.alpn:
        params[_ALPN] = b"".join(bytes((len(name),)) + name for name in service.alpn)
    if service.no_default_alpn:
        params[_NO_DEFAULT_ALPN] = b""
    if service.port is not None:
        params[_PORT] = service.port.to_bytes(2)
    written = [_PARAM.pack(key, len(value)) + value for key, value in params.items()]
    return service.priority.to_bytes(2) + b"\0" + b"".join(written)


def _reduce(priority: int, params: Mapping[int, bytes]) -> Service | None:
    mandatory = list(_keys(params.get(_MANDATORY, b"")))
    if not set(mandatory) <= _KEPT | _LEFT_OUT or not params.keys() >= set(mandatory):
        return None
    alpn = tuple(_names(params.get(_ALPN, b"")))
    kept = tuple(name for name in alpn if name in PROTOCOLS)
    no_default = _NO_DEFAULT_ALPN in params
    if no_default and not kept:  # h3 and nothing else
        return None
    port = struct.unpack("!H", params[_PORT])[0] if _PORT in params else None
    left = {key for key in params if key in _KEPT and (key != _ALPN or kept)}
    return Service(priority, kept, no_default, port, tuple(key for key in mandatory if key in left))


def _split(content: bytes) -> tuple[int, bytes, dict[int, bytes]]:
    """Priority, target and parameters. Raises ValueError and what slicing and struct raise."""
    offset = 2
    while length := content[offset]:
        if length > 63:  # RFC 9460 2.2: never compressed
            raise ValueError("a pointer in the target")
        offset += 1 + length
    target = content[2:offset].lower()
    offset += 1
    params: dict[int, bytes] = {}
    last = -1
    while offset < len(content):
        key, length = _PARAM.unpack_from(content, offset)
        offset += _PARAM.size
        if key <= last or offset + length > len(content):
            raise ValueError("parameters out of order, or cut short")
        params[key] = content[offset : offset + length]
        last = key
        offset += length
    return int.from_bytes(content[:2]), target, params


def _keys(value: bytes) -> Iterator[int]:
    """Keys that are mandatory, in order. Raises ValueError, struct.error."""
    last = _MANDATORY  # it may not name itself
    for (key,) in struct.iter_unpack("!H", value):
        if key <= last:
            raise ValueError("mandatory keys out of order")
        yield key
        last = key


def _names(value: bytes) -> Iterator[bytes]:
    offset = 0
    while offset < len(value):
        length = value[offset]
        name = value[offset + 1 : offset + 1 + length]
        if not length or len(name) != length:
            raise ValueError("a protocol cut short, or without a name")
        yield name
        offset += 1 + length
