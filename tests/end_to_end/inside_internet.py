"""Run in a network namespace of its own: whoever is asked, at any address and port, answers; and what comes in is kept.

Arguments: the wire, and how it answers: `honest` as servers do, `hostile` as a gate would that refuses. Each line on
standard input is answered with what was seen since the last, up to the marker that whoever asks has sent before.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import trustme

from proxy.wire.dns import ExtendedError, MalformedQuery, Note, build_name_error, parse_query
from tests.end_to_end.inside_origin import Wire
from tests.proxy.nameserver import address, reply

PORT = 7777
LINK_GROUPS = (("224.0.0.251", 5353), ("224.0.0.252", 5355), ("ff02::fb", 5353))
RULES = f"""
table inet internet {{
    chain in {{
        type nat hook prerouting priority dstnat;
        ip daddr 224.0.0.0/4 return
        ip6 daddr ff00::/8 return
        meta l4proto {{ tcp, udp }} redirect to :{PORT}
    }}
}}
"""
DECISION = "0123456789abcdef"
DENIAL = (
    "HTTP/1.1 403 Forbidden\r\nContent-Type: application/problem+json\r\nContent-Length: 2\r\n"
    f"Outgate-Decision: deny; reason=never_reached; id={DECISION}\r\nConnection: close\r\n\r\n{{}}"
).encode()
ALERT = b"\x15\x03\x03\x00\x02\x02\x31"
NTP_EPOCH_S = 2208988800


class Internet:
    def __init__(self, *, is_hostile: bool) -> None:
        self._is_hostile = is_hostile
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("any.example").configure_cert(self._context)
        listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256)
        datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        datagrams.bind(("::", PORT))
        _start(self._accept, listener)
        _start(self._reply, datagrams)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            _start(self._meet, sock)

    def _meet(self, sock: socket.socket) -> None:
        with sock:
            try:
                self._converse(sock)
            except OSError:  # the other side's choice
                pass

    def _converse(self, sock: socket.socket) -> None:
        first = sock.recv(4096, socket.MSG_PEEK)
        if first.startswith(b"CONNECT "):
            sock.recv(len(first))
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            self._converse(sock)
        elif self._is_hostile:
            sock.recv(4096)
            mail = b"220 mail\r\n" if first.startswith(b"EHLO") else b""  # which the policy allows
            sock.sendall(ALERT if first[:1] == b"\x16" else DENIAL if b"HTTP/1.1\r\n" in first else mail)
        elif first[:1] == b"\x16":
            with self._context.wrap_socket(sock, server_side=True) as tls:
                tls.recv(4096)
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        elif b"HTTP/1.1\r\n" in first:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        elif first[2:4] and int.from_bytes(first[:2]) == len(first) - 2:  # DNS over TCP
            answer = self._resolve(first[2:])
            sock.sendall(len(answer).to_bytes(2) + answer)
        else:
            sock.sendall(b"220 anything\r\n")

    def _reply(self, sock: socket.socket) -> None:
        while True:
            message, peer = sock.recvfrom(4096)
            sock.sendto(self._answer(message), peer)

    def _answer(self, message: bytes) -> bytes:
        try:
            return self._resolve(message)
        except MalformedQuery:
            pass
        if len(message) >= 48 and message[0] & 7 == 3:
            return b"\x24\x01\x00\xe9" + bytes(36) + struct.pack("!II", int(time.time()) + NTP_EPOCH_S, 0)
        return b"answer to " + message[:8]

    def _resolve(self, message: bytes) -> bytes:
        query = parse_query(message)
        if self._is_hostile:
            return build_name_error(query, 5, Note(ExtendedError.BLOCKED, f"no_rule, decision {DECISION}"))
        return reply(message, [address(query.name, "93.184.216.34")] if query.type == 1 else [])


def _answer_link(group: str, port: int, device: str) -> None:
    """As a neighbour with a printer."""
    index = socket.if_nametoindex(device)
    is_v6 = ":" in group
    sock = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((group, port, 0, index) if is_v6 else (group, port))
    if is_v6:
        joined = socket.inet_pton(socket.AF_INET6, group) + struct.pack("=I", index)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, joined)
    else:
        joined = struct.pack("=4s4si", socket.inet_aton(group), bytes(4), index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, joined)

    def serve() -> None:
        with socket.socket(sock.family, socket.SOCK_DGRAM) as speaking:
            while True:
                message, peer = sock.recvfrom(4096)
                speaking.sendto(message[:2] + b"\x84\x00" + message[4:], peer)

    _start(serve)


def _start(target: object, *arguments: object) -> None:
    assert callable(target)
    threading.Thread(target=target, args=arguments, daemon=True).start()


def main(device: str, manner: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        rules = Path(name) / "rules.nft"
        rules.write_text(RULES)
        subprocess.run(["nft", "-f", str(rules)], check=True)
    Internet(is_hostile=manner == "hostile")
    for group, port in LINK_GROUPS:
        _answer_link(group, port, device)
    wire = Wire(device)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(wire.take()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
