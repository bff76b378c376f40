"""Run inside the sandbox: does what an attacker there could, a few probes at once, and tells what came of each.

Probes come as JSON on standard input, results leave as JSON on standard output; bytes are Latin-1 text in both.
"""

from __future__ import annotations

import itertools
import json
import socket
import ssl
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PATIENCE_S = 8.0
UDP_PATIENCE_S = 0.3
AT_ONCE = 8

SOURCE_PORTS = itertools.count(20000)

type Probe = dict[str, Any]  # JSON
type Result = dict[str, Any]


def tcp(probe: Probe) -> Result:
    """Connect, say `say`, read to the end."""
    port = next(SOURCE_PORTS)
    try:
        sock = _connect(probe, port)
    except ConnectionResetError as error:  # accepted, and reset before connect(2) came back
        return {"port": port, "error": type(error).__name__}
    with sock:
        return _converse(sock, probe)


def tls(probe: Probe) -> Result:
    """The same after a verified handshake for `sni`."""
    context = ssl.create_default_context()
    with (
        _connect(probe, next(SOURCE_PORTS)) as sock,
        context.wrap_socket(sock, server_hostname=probe["sni"]) as wrapped,
    ):
        return _converse(wrapped, probe)


def udp(probe: Probe) -> Result:
    """A datagram; on a connected socket a refusal shows as an error."""
    family = socket.AF_INET6 if ":" in probe["address"] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(probe.get("patience_s", UDP_PATIENCE_S))
        sock.connect((probe["address"], probe["port"]))
        sock.send(probe["say"].encode("latin-1"))
        return {"port": sock.getsockname()[1], "reply": sock.recv(4096).decode("latin-1")}


def raw(probe: Probe) -> Result:
    """A socket that would go round TCP and UDP."""
    with socket.socket(*probe["socket"]) as sock:
        sock.sendto(probe["say"].encode("latin-1"), (probe["address"], 0))
    return {"reply": "sent"}


def _connect(probe: Probe, port: int) -> socket.socket:
    """From a port of its own, by which its record is found."""
    return socket.create_connection((probe["address"], probe["port"]), PATIENCE_S, source_address=("", port))


def _converse(sock: socket.socket, probe: Probe) -> Result:
    port = sock.getsockname()[1]
    reply = b""
    try:
        sock.sendall(probe["say"].encode("latin-1"))
        while chunk := sock.recv(65536):
            reply += chunk
    except OSError as error:
        return {"port": port, "reply": reply.decode("latin-1"), "error": type(error).__name__}
    return {"port": port, "reply": reply.decode("latin-1")}


KINDS: dict[str, Callable[[Probe], Result]] = {"tcp": tcp, "tls": tls, "udp": udp, "raw": raw}


def attempt(probe: Probe) -> Result:
    try:
        return KINDS[probe["kind"]](probe)
    except OSError as error:
        return {"error": type(error).__name__}


def main() -> None:
    probes = json.load(sys.stdin)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = dict(zip(probes, pool.map(attempt, probes.values()), strict=True))
    time.sleep(0.1)  # the last refusals are still on their way through the device
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
