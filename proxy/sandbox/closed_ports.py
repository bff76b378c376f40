"""Attempts on ports that nobody listens on, told from the kernel's own refusals on the sandbox's loopback device.

A TCP SYN to a closed port is answered by RST with sequence number 0 (RFC 9293 section 3.10.7.1), a datagram by ICMP
"port unreachable". Reading the answers rather than the attempts leaves out whatever was accepted, by the gate or by a
server of the workload's own, and costs an accepted connection nothing. No socket is made here.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Container
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from proxy.sandbox.bpf import (
    AND,
    ANSWER,
    EQUAL,
    HEADER_LENGTH,
    LOAD_BYTE,
    LOAD_BYTE_AFTER_HEADER,
    LOAD_WORD,
    LOAD_WORD_AFTER_HEADER,
    Step,
    assemble,
)

if TYPE_CHECKING:  # `network` reads PROGRAM before the fork, and an event loop may exist only after it
    from asyncio import AbstractEventLoop

type Refused = tuple[str, IPv4Address | IPv6Address, int]  # protocol ("tcp" or "udp"), address, port

_LONGEST = 256  # headers and what ICMP quotes of the datagram
_RST_ACK = 0x14
_ICMP, _TCP, _UDP, _ICMP6 = 1, 6, 17, 58
_V6_HEADER = 40
_ANSWERED = (53, 123)  # DNS, NTP

PROGRAM = assemble(
    [
        Step(LOAD_BYTE, 0),
        Step(AND, 0xF0),
        Step(EQUAL, 0x40, yes="v4"),
        Step(EQUAL, 0x60, yes="v6", no="drop"),
        Step(HEADER_LENGTH, 0, label="v4"),
        Step(LOAD_BYTE, 9),
        Step(EQUAL, _TCP, yes="v4 tcp"),
        Step(EQUAL, _ICMP, no="drop"),
        Step(LOAD_BYTE_AFTER_HEADER, 0),
        Step(EQUAL, 3, no="drop"),  # RFC 792: destination unreachable, port
        Step(LOAD_BYTE_AFTER_HEADER, 1),
        Step(EQUAL, 3, yes="take", no="drop"),
        Step(LOAD_WORD_AFTER_HEADER, 4, label="v4 tcp"),
        Step(EQUAL, 0, no="drop"),
        Step(LOAD_BYTE_AFTER_HEADER, 13),
        Step(EQUAL, _RST_ACK, yes="take", no="drop"),
        Step(LOAD_BYTE, 6, label="v6"),
        Step(EQUAL, _TCP, yes="v6 tcp"),
        Step(EQUAL, _ICMP6, no="drop"),
        Step(LOAD_BYTE, _V6_HEADER),
        Step(EQUAL, 1, no="drop"),  # RFC 4443 section 3.1: destination unreachable, port
        Step(LOAD_BYTE, _V6_HEADER + 1),
        Step(EQUAL, 4, yes="take", no="drop"),
        Step(LOAD_WORD, _V6_HEADER + 4, label="v6 tcp"),
        Step(EQUAL, 0, no="drop"),
        Step(LOAD_BYTE, _V6_HEADER + 13),
        Step(EQUAL, _RST_ACK, yes="take", no="drop"),
        Step(ANSWER, _LONGEST, label="take"),
        Step(ANSWER, 0, label="drop"),
    ]
)


def read_refusal(packet: bytes, answering: Container[int] = ()) -> Refused | None:
    """What was attempted, or None for a packet that is no refusal (or cut short), or refuses an answer of the gate.

    answering  UDP ports from which the gate answers
    """
    try:
        return _read_v4(packet, answering) if packet[0] >> 4 == 4 else _read_v6(packet, answering)
    except (IndexError, struct.error, ValueError):
        return None


def _read_v4(packet: bytes, answering: Container[int]) -> Refused | None:
    body = packet[4 * (packet[0] & 0x0F) :]
    if packet[9] == _TCP:
        return "tcp", IPv4Address(packet[12:16]), struct.unpack_from("!H", body)[0]
    quoted = body[8:]
    if packet[9] != _ICMP or quoted[9] != _UDP:
        return None
    return _read_udp(IPv4Address(quoted[16:20]), quoted[4 * (quoted[0] & 0x0F) :], answering)


def _read_v6(packet: bytes, answering: Container[int]) -> Refused | None:
    body = packet[_V6_HEADER:]
    if packet[6] == _TCP:
        return "tcp", IPv6Address(packet[8:24]), struct.unpack_from("!H", body)[0]
    quoted = body[8:]
    if packet[6] != _ICMP6 or quoted[6] != _UDP:
        return None
    return _read_udp(IPv6Address(quoted[24:40]), quoted[_V6_HEADER:], answering)


def _read_udp(destination: IPv4Address | IPv6Address, header: bytes, answering: Container[int]) -> Refused | None:
    source_port, port = struct.unpack_from("!HH", header)
    # An answer of the gate to a client that did not wait. Nobody inside may send from the first two, bound or not, nor
    # from what the gate has bound.
    return None if source_port in _ANSWERED or source_port in answering else ("udp", destination, port)


class ClosedPorts:
    """Tells `on_attempt` of each refused (protocol, address, port), once in `quiet_s`. Owns the packet socket.

    A port scan must not fill our memory or the log: at most MAX_REMEMBERED different ones are told in `quiet_s`,
    the rest are counted in `untold`. Loopback addresses are left out: they reach nothing outside.
    """

    MAX_REMEMBERED = 1024
    _BATCH = 64  # packets read before other work gets its turn

    def __init__(
        self,
        packets: socket.socket,
        on_attempt: Callable[[str, IPv4Address | IPv6Address, int], None],
        loop: AbstractEventLoop,
        *,
        quiet_s: float = 1.0,
        answering: Container[int] = (),
    ) -> None:
        self._answering = answering
        self._packets = packets
        self._on_attempt = on_attempt
        self._loop = loop
        self._quiet_s = quiet_s
        self._told: set[Refused] = set()
        self._forget_at = 0.0
        self.untold = 0
        packets.setblocking(False)
        loop.add_reader(packets, self._read)

    def close(self) -> None:
        """Tell what is still queued, then stop."""
        while self._read():
            pass
        self._loop.remove_reader(self._packets)
        self._packets.close()

    def _read(self) -> bool:
        """Read one batch, and say whether there may be more."""
        for _ in range(self._BATCH):
            try:
                packet = self._packets.recv(_LONGEST)
            except BlockingIOError:
                return False
            if refused := read_refusal(packet, self._answering):
                self._tell(refused)
        return True

    def _tell(self, refused: Refused) -> None:
        protocol, address, port = refused
        if address.is_loopback:
            return
        now = self._loop.time()
        if now >= self._forget_at:
            self._told.clear()
            self._forget_at = now + self._quiet_s
        if refused in self._told:
            return
        if len(self._told) >= self.MAX_REMEMBERED:
            self.untold += 1
            return
        self._told.add(refused)
        self._on_attempt(protocol, address, port)
