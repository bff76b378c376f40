"""Run in a network namespace of its own: an internet that answers whatever comes, at any address and port.

Arguments: a directory for the origin's root, and a zone as JSON, name to addresses; every other name is there too. Each
line on standard input is answered with the requests that were read since the last, also those inside TLS.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from proxy.wire.dns import AAAA, A, MalformedQuery, parse_query
from tests.end_to_end.inside_origin import MARKER
from tests.end_to_end.origin import OPAQUE_PORTS, PLAIN_PORTS, TLS_PORTS, Origin, as_json
from tests.proxy.nameserver import address, reply, soa
from tests.proxy.ntp_servers import answer

ANY4, ANY6 = "93.184.216.200", "2606:2800:220:1::200"  # of every name that is not in the zone
NAMES, TIME, ELSE = 7753, 7723, 7777
_OWN = ", ".join(map(str, (*TLS_PORTS, *PLAIN_PORTS, *OPAQUE_PORTS)))
RULES = f"""
table inet internet {{
    chain in {{
        type nat hook prerouting priority dstnat;
        ip daddr {MARKER[0]} return
        tcp dport {{ {_OWN} }} redirect
        meta l4proto {{ tcp, udp }} th dport 53 redirect to :{NAMES}
        udp dport 123 redirect to :{TIME}
        meta l4proto {{ tcp, udp }} redirect to :{ELSE}
    }}
}}
"""


class Zone:
    def __init__(self, names: dict[str, list[str]]) -> None:
        self._names = names

    def resolve(self, message: bytes) -> bytes | None:
        try:
            query = parse_query(message)
        except MalformedQuery:
            return None
        version = {A: 4, AAAA: 6}.get(query.type)
        above = f"*.{query.name.partition('.')[2]}"
        known = self._names.get(query.name) or self._names.get(above, [ANY4, ANY6])
        found = [address(query.name, text) for text in known if (6 if ":" in text else 4) == version]
        return reply(message, found, authority=[] if found else [soa(query.name, 60, 60)])


def answer_time(message: bytes) -> bytes | None:
    return answer(message) if len(message) == 48 else message


def serve_datagrams(port: int, say: Callable[[bytes], bytes | None]) -> None:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))

    def serve() -> None:
        while True:
            message, peer = sock.recvfrom(1 << 16)
            with suppress(OSError):  # whoever forged that source hears nothing
                if (said := say(message)) is not None:
                    sock.sendto(said, peer)

    threading.Thread(target=serve, daemon=True).start()


def serve_streams(port: int, say: Callable[[bytes], bytes | None]) -> None:
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256)

    def converse(sock: socket.socket) -> None:
        with sock:
            try:
                while message := sock.recv(1 << 16):
                    sock.sendall(say(message) or b"220 anything\r\n")
            except OSError:  # the other side's choice
                pass

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=converse, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def main(directory: Path, zone: Zone) -> None:
    subprocess.run(["nft", "-f", "-"], input=RULES, text=True, check=True)
    origin = Origin(directory)

    def resolve_stream(message: bytes) -> bytes | None:
        said = zone.resolve(message[2:])
        return said and len(said).to_bytes(2) + said

    serve_datagrams(NAMES, zone.resolve)
    serve_streams(NAMES, resolve_stream)
    serve_datagrams(TIME, answer_time)
    serve_datagrams(ELSE, lambda message: b"echo of " + message)
    serve_streams(ELSE, lambda message: None)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(as_json(origin.requests)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Zone(json.loads(sys.argv[2])))
