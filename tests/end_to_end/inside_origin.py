"""Run in a network namespace of its own: the servers of `origin` behind one wire, and what comes in on that wire.

Arguments: a directory for the origin's root, and the wire. Each line on standard input is answered with what was seen
since the last, up to the marker that whoever asks has sent before.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path

from tests.end_to_end.inside_world import describe
from tests.end_to_end.origin import Origin, as_json

MARKER = ("192.0.2.99", 9)
_TCP = 6
_IP, _IPV6, _EVERYTHING = 0x0800, 0x86DD, 0x0003  # linux/if_ether.h


class Wire:
    """Every IP packet that comes in: what opens something, and what belongs to nothing that was opened."""

    def __init__(self, device: str) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_EVERYTHING))
        self._sock.bind((device, _EVERYTHING))
        self._seen: list[str] = []
        self._opened: set[bytes] = set()
        self._marked = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def take(self) -> list[str]:
        """All that came before the marker."""
        assert self._marked.wait(20), "no marker came"
        self._marked.clear()
        seen, self._seen = self._seen, []
        return seen

    def _read(self) -> None:
        while True:
            packet, about = self._sock.recvfrom(256)
            if about[1] not in (_IP, _IPV6) or about[2] == socket.PACKET_OUTGOING:
                continue
            what = self._name(packet)
            if what == f"udp {MARKER[0]}:{MARKER[1]}":
                self._marked.set()
            elif what:
                self._seen.append(what)

    def _name(self, packet: bytes) -> str | None:
        """As `describe` has it, and a TCP segment of a connection whose SYN did not come."""
        if packet[0] >> 4 == 4:
            is_tcp, size, ends = packet[9] == _TCP, 4 * (packet[0] & 15), packet[12:20]
        else:
            is_tcp, size, ends = packet[6] == _TCP, 40, packet[8:40]
        what = describe(packet)
        if not is_tcp:
            return what
        connection = ends + packet[size : size + 4]
        if connection in self._opened:
            return None  # a SYN too: the kernel sent it again
        if what:
            self._opened.add(connection)
        return what or f"stray tcp {ends.hex()}"


def main(directory: Path, device: str) -> None:
    origin = Origin(directory)
    wire = Wire(device)
    print("ready", flush=True)
    for _ in sys.stdin:
        packets = wire.take()
        requests, origin.requests = origin.requests, []
        print(json.dumps({"packets": packets, "requests": as_json(requests)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
