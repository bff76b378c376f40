"""A gateway and a client in network namespaces of their own; prints what the client met and what the gate recorded.

Run by test_redirect.py inside a fresh network namespace, where it may do as it likes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from ipaddress import ip_address
from multiprocessing import get_context
from multiprocessing.connection import Connection

from proxy.original_dst import redirected_dst
from proxy.resolver import Resolution
from tests.builders import rules
from tests.proxy.gates import eventually, gate, read_all
from tests.proxy.hellos import hello

RULESET = """
table inet gateway {
  chain prerouting {
    type nat hook prerouting priority dstnat;
    iifname "gw0" meta nfproto ipv4 tcp dport { 443, 5432 } redirect to :8443
    iifname "gw0" meta nfproto ipv4 tcp dport 8000 redirect to :8446
    iifname "gw0" meta nfproto ipv6 tcp dport { 443, 5432 } redirect to :8446
  }
}
"""
RULES = """
- host: a.example
  ports: [443, 8000]
  private: true
- tcp: 10.88.0.0/16:5432
- tcp: "[fd88::/16]:5432"
"""
VISITS = {
    "name over IPv4": ("203.0.113.5", 443, hello()),
    "name over IPv6": ("2001:db8::5", 443, hello()),
    "name over IPv4, dual-stack listener": ("203.0.113.5", 8000, hello()),
    "denied name": ("203.0.113.5", 443, hello("b.example")),
    "address over IPv4": ("10.88.0.1", 5432, b"opaque"),
    "address over IPv6": ("fd88::1", 5432, b"opaque"),
    "address without rule": ("10.99.0.1", 5432, b"opaque"),
    "straight to the gate over IPv4": ("10.77.0.1", 8443, hello()),
    "straight to the gate over IPv6": ("fd77::1", 8446, hello()),
    "straight to the dual-stack gate over IPv4": ("10.77.0.1", 8446, hello()),
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def visit(address: str, port: int, says: bytes) -> str:
    """What the client gets: the upstream's bytes, an alert in hex, or `reset`."""
    try:
        with socket.create_connection((address, port), timeout=20) as sock:
            sock.sendall(says)
            sock.shutdown(socket.SHUT_WR)
            said = read_all(sock)
    except ConnectionResetError:
        return "reset"
    return said.hex() if said[:1] == b"\x15" else said.decode()


def be_client(pipe: Connection) -> None:
    os.unshare(os.CLONE_NEWNET)
    pipe.send(None)
    pipe.recv()
    ip("link", "set", "lo", "up")
    ip("address", "add", "10.77.0.2/24", "dev", "cl0")
    ip("address", "add", "fd77::2/64", "dev", "cl0", "nodad")
    ip("link", "set", "cl0", "up")
    ip("route", "add", "default", "via", "10.77.0.1")
    ip("-6", "route", "add", "default", "via", "fd77::1")
    while (words := pipe.recv()) is not None:
        pipe.send(visit(*words))


def build_gateway(client: int) -> None:
    ip("link", "set", "lo", "up")
    ip("link", "add", "gw0", "type", "veth", "peer", "name", "cl0", "netns", str(client))
    ip("address", "add", "10.77.0.1/24", "dev", "gw0")
    ip("address", "add", "fd77::1/64", "dev", "gw0", "nodad")
    ip("link", "set", "gw0", "up")
    ip("address", "add", "10.88.0.1/32", "dev", "lo")
    ip("address", "add", "fd88::1/128", "dev", "lo", "nodad")
    subprocess.run(["nft", "-f", "-"], input=RULESET.encode(), check=True)


def serve_origin(listener: socket.socket) -> None:
    """Tell everyone by which address they came, and how much they said."""
    while True:
        sock, _ = listener.accept()
        with sock:
            said = read_all(sock)
            sock.sendall(f"{sock.getsockname()[0]} heard {len(said)}".encode())


def main() -> None:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    client = context.Process(target=be_client, args=(theirs,), daemon=True)
    client.start()
    ours.recv()
    assert client.pid is not None
    build_gateway(client.pid)
    ours.send(None)
    origins = [
        socket.create_server(("10.88.0.1", 5432)),
        socket.create_server(("fd88::1", 5432), family=socket.AF_INET6),
    ]
    for origin in origins:
        context.Process(target=serve_origin, args=(origin,), daemon=True).start()
    met: dict[str, tuple[str, dict[str, object]]] = {}
    names = {"a.example": Resolution((ip_address("10.88.0.1"),), float("inf"), port=5432)}
    with gate(rules(RULES), names, original_dst=redirected_dst) as it:
        listeners = [
            socket.create_server(("0.0.0.0", 8443)),
            socket.create_server(("::", 8446), family=socket.AF_INET6, dualstack_ipv6=True),
        ]
        for listener in listeners:
            it.loop.call(lambda listener=listener: it.listener.serve(listener))  # type: ignore[misc]  # bound per turn
        for name, words in VISITS.items():
            ours.send(words)
            said = ours.recv()
            eventually(lambda: it.records, name)
            met[name] = said, it.records.pop()
        ours.send(None)
    client.join(10)
    json.dump(met, sys.stdout)


if __name__ == "__main__":
    main()
