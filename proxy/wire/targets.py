"""SRV and PTR records as bytes: the names that they lead to. No sockets, no clock, and no judgement of the names."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

PTR, SRV = 12, 33
TYPES = frozenset({PTR, SRV})

_SRV = struct.Struct("!HHH")  # priority, weight, port (RFC 2782); the target stands behind them
NUMBERS = {PTR: 0, SRV: _SRV.size}  # bytes before the name
_PLAIN = re.compile(rb"[a-z0-9_-]{1,63}")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a record leads to. `name` is lower case, of letters, digits, hyphens and underscores; of a PTR record there
    is nothing else."""

    name: str
    priority: int = 0
    weight: int = 0
    port: int = 0


def read_target(content: bytes, qtype: int) -> Target | None:
    """What a record's content leads to; its name is whole and without the root's zero byte. None: nowhere (the root,
    RFC 2782), or to a name that no host has."""
    name = content[NUMBERS[qtype] :]
    labels = []
    while name:
        label, name = name[1 : 1 + name[0]], name[1 + name[0] :]
        if not _PLAIN.fullmatch(label):
            return None
        labels.append(label.decode("ascii"))
    if not labels:
        return None
    return Target(".".join(labels), *(_SRV.unpack_from(content) if qtype == SRV else ()))


def write_target(target: Target, qtype: int) -> bytes:
    """The content of a record, its name not compressed."""
    numbers = _SRV.pack(target.priority, target.weight, target.port) if qtype == SRV else b""
    labels = target.name.encode("ascii").split(b".")
    return numbers + b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
