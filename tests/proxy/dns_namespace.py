"""Run inside namespaces of its own: every address is ours (AnyIP), the relay answers on port 53, a C library asks it.

Prints as JSON what getaddrinfo found and what the relay and the server behind it saw. The arguments are a resolv.conf
and a program that looks one name up as `look_up` does; without one, the C library of this Python does.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from time import monotonic

from tests.proxy.dns_gate import PUBLIC, PUBLIC6, bind, gate
from tests.proxy.nameserver import Received, reply, zone

NAMES = {
    "api.example": [PUBLIC, PUBLIC6],
    "four.cdn.example": ["93.184.216.35"],
    "rebinding.cdn.example": ["10.0.0.1", "fd00::1"],
}
ASKED = [*NAMES, "evil.example", "parent.example", "failing.cdn.example"]
POLICY = """
version: 1
workloads:
  app:
    match: {address: [0.0.0.0/0, "::/0"]}
    rules:
      - host: api.example
      - host: "*.cdn.example"
      - host: deep.under.parent.example
"""


def make_network(resolv_conf: str) -> None:
    for command in (
        "ip link set lo up",
        "ip route add local default dev lo",
        "ip -6 route add local default dev lo",
        f"mount --bind {resolv_conf} /etc/resolv.conf",
    ):
        subprocess.run(command.split(), check=True)


def script(received: Received) -> Iterable[bytes]:
    if received.query.name.startswith("failing."):
        return [reply(received.message, rcode=2)]
    return zone(NAMES)(received)


def look_up(name: str) -> list[str] | str:
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)})
    except socket.gaierror as error:
        return {getattr(socket, word): word for word in dir(socket) if word.startswith("EAI_")}[error.errno]


def ask_program(program: str, name: str) -> list[str] | str:
    """What a program says: an address a line, or the name of an error."""
    said = subprocess.run([program, name], capture_output=True, text=True, timeout=30, check=True).stdout.split()
    return said[0] if said[0].startswith("EAI_") else sorted(set(said))


async def main(resolv_conf: str, program: str | None = None) -> None:
    make_network(resolv_conf)
    suffixes = ["default.svc.cluster.local", "svc.cluster.local", "cluster.local"]
    async with gate(script, policy=POLICY, host="0.0.0.0", port=53, search=suffixes) as g:
        udp, tcp = bind("::", 53)
        with udp, tcp:
            tasks = [asyncio.create_task(g.relay.serve_udp(udp)), asyncio.create_task(g.relay.serve_tcp(tcp))]
            found, slowest_s = {}, 0.0
            for name in ASKED[:-1] if program else ASKED:  # musl waits five seconds after a SERVFAIL, whoever sent it
                began = monotonic()
                found[name] = await asyncio.to_thread(partial(ask_program, program) if program else look_up, name)
                slowest_s = max(slowest_s, monotonic() - began)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        seen = {
            "found": found,
            "slowest_s": slowest_s,
            "search_noise": g.relay.search_noise,
            "reasons": [record["reason"] for record in g.records],
            "asked_upstream": sorted({name for name, _ in g.upstream.asked}),
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
