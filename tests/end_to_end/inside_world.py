"""Run in network and mount namespaces of its own: an internet on one loopback device, and what enters it.

Every address is local here, every name resolves, every port of `origin` answers; so whatever is refused, the gate
refused. Commands come as lines on standard input: `look` answers with what has been seen since the last time.
The arguments are a directory for the origin's root and for resolv.conf.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from proxy.sandbox import libc
from proxy.wire.dns import AAAA, A, MalformedQuery, parse_query
from tests.end_to_end.origin import SILENT, Origin, as_json
from tests.proxy.nameserver import address, reply, soa

DEFAULT4, DEFAULT6 = "93.184.216.34", "2606:2800:220:1::34"
ADDRESSES = {
    "git.example": ["140.82.112.4"],
    "private.example": ["10.1.2.3"],
    "metadata.example": ["169.254.169.254"],
    "loopback.example": ["127.0.0.1", "::1"],
    "silent.example": [SILENT],
    "four.example": [DEFAULT4],
    "six.example": [DEFAULT6],
    "expired.example": [DEFAULT4],
    "wrong.example": [DEFAULT4],
    "stranger.example": [DEFAULT4],
}
MARKER = ("192.0.2.99", 9)
_TCP, _UDP = 6, 17
_PACKET_IGNORE_OUTGOING, _SOL_PACKET, _ETH_P_ALL = 23, 263, 3
_PACKET_STATISTICS = 6
_SO_RCVBUFFORCE = 33


class Capture:
    """What enters the only device: TCP connections, datagrams, and anything else that is no answer."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        except PermissionError:  # root of a user namespace alone: as much as every user gets, and `take` counts losses
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self._sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._sock.bind(("lo", 0))
        self._seen: list[str] = []
        self._marked = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def take(self) -> list[str]:
        """Everything sent before this call. A packet of our own shows how far the reading has come."""
        self._marked.clear()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", MARKER)
        assert self._marked.wait(20)
        _, lost = struct.unpack("II", self._sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert not lost, f"{lost} packets were not seen"
        seen, self._seen = self._seen, []
        return seen

    def _read(self) -> None:
        while True:
            packet = self._sock.recv(256)
            what = describe(packet)
            if what == f"udp {MARKER[0]}:{MARKER[1]}":
                self._marked.set()
            elif what:
                self._seen.append(what)


def describe(packet: bytes) -> str | None:
    """`tcp ADDRESS:PORT` for a SYN, `udp ADDRESS:PORT`, `icmp ADDRESS`; None for what answers something."""
    if packet[0] >> 4 == 4:
        protocol, where, body = (
            packet[9],
            socket.inet_ntop(socket.AF_INET, packet[16:20]),
            packet[4 * (packet[0] & 15) :],
        )
    else:
        protocol, where, body = packet[6], f"[{socket.inet_ntop(socket.AF_INET6, packet[24:40])}]", packet[40:]
    if protocol == _TCP:
        is_syn = body[13] & 0x12 == 0x02
        return f"tcp {where}:{struct.unpack_from('!H', body, 2)[0]}" if is_syn else None
    if protocol == _UDP:
        source, target = struct.unpack_from("!HH", body)
        return None if source == 53 else f"udp {where}:{target}"
    if protocol in (1, 58):
        is_error_or_housekeeping = body[0] in ((0, 3) if protocol == 1 else (1, 129, 131, 132, 133, 135, 136, 143))
        return None if is_error_or_housekeeping else f"icmp {where}"
    return None if protocol == 0 else f"protocol {protocol} {where}"  # 0: hop-by-hop options of multicast listening


class Nameserver:
    """Knows every name, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            message, peer = self._udp.recvfrom(4096)
            for answer in self._answers(message):
                self._udp.sendto(answer, peer)

    def _answers(self, message: bytes) -> list[bytes]:
        try:
            query = parse_query(message)
        except MalformedQuery:
            self.asked.append("malformed")
            return []
        self.asked.append(f"{query.name} {query.type_text}")
        match query.name.partition(".")[0]:
            case "mute":
                return []
            case "servfail":
                return [reply(message, rcode=2)]
            case "absent":
                return [reply(message, rcode=3, authority=[soa("example", 60, 60)])]
        version = {A: 4, AAAA: 6}.get(query.type)
        known = ADDRESSES.get(query.name, [DEFAULT4, DEFAULT6])
        found = [address(query.name, text) for text in known if (6 if ":" in text else 4) == version]
        return [reply(message, found, authority=[] if found else [soa(query.name, 60, 60)])]


def build(directory: Path) -> None:
    """The loopback device on which everything is, and a resolv.conf that names our nameserver."""
    resolv = directory / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
    libc.mount(str(resolv), "/etc/resolv.conf", None, libc.MS_BIND)
    for command in ("ip link set lo up", "ip route add local default dev lo", "ip -6 route add local default dev lo"):
        subprocess.run(command.split(), check=True)


def main(directory: Path) -> None:
    build(directory)
    origin, nameserver = Origin(directory), Nameserver()
    time.sleep(0.1)  # IPv6 announces itself once
    capture = Capture()
    print(os.getpid(), flush=True)
    for _ in sys.stdin:
        packets = capture.take()
        requests, origin.requests = origin.requests, []
        asked, nameserver.asked = nameserver.asked, []
        print(json.dumps({"packets": packets, "requests": as_json(requests), "asked": asked}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
