"""Classic BPF as text of bytes: the seven instructions that our two programs need. Loading them is `libc`'s work."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

LOAD_WORD = 0x20  # A = 32 bits at k (network order in packets, native in seccomp)
LOAD_BYTE = 0x30  # A = 8 bits at k
LOAD_WORD_AFTER_HEADER = 0x40  # A = 32 bits at X + k
LOAD_BYTE_AFTER_HEADER = 0x50  # A = 8 bits at X + k
HEADER_LENGTH = 0xB1  # X = 4 * (low half of the byte at k): the length of an IPv4 header
AND = 0x54
EQUAL = 0x15
AT_LEAST = 0x35
ANSWER = 0x06


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction; `yes` and `no` name the label a comparison goes to ('' is the next instruction)."""

    code: int
    k: int
    yes: str = ""
    no: str = ""
    label: str = ""


def assemble(steps: Iterable[Step]) -> bytes:
    """Resolve labels to forward jumps. A label that is missing or over 255 instructions away is a KeyError or
    struct.error here, never a wrong program."""
    program = list(steps)
    places = {step.label: index for index, step in enumerate(program) if step.label}

    def jump(label: str, index: int) -> int:
        return places[label] - index - 1 if label else 0

    return b"".join(
        struct.pack("=HBBI", step.code, jump(step.yes, index), jump(step.no, index), step.k)
        for index, step in enumerate(program)
    )
