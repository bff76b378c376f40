"""A stand-in for the gate, as a program: runs one command in a sandbox and answers all that it sends.

    python sandbox_driver.py [--tcp PORT]... [--udp PORT]... [--hide PATH]... [--report FILE] -- COMMAND...

Every TCP connection gets one line, `tcp DESTINATION PORT`, every datagram `udp DESTINATION PORT`. The report (JSON)
says what was attempted elsewhere, and what set-up took.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from proxy.sandbox import Ports, Sandbox, SandboxUnavailable, launch

IPV6_PKTINFO = 50
IP_PKTINFO = 8


def answer_tcp(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        address, port = connection.getsockname()[:2]
        connection.sendall(f"tcp {address} {port}\n".encode())


def answer_udp(listener: socket.socket) -> None:
    _, ancillary, _, peer = listener.recvmsg(2048, 256)
    port = listener.getsockname()[1]
    for level, kind, value in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            destination, source = value[8:12], struct.pack("=i4s4s", 0, value[8:12], bytes(4))
            text = f"udp {socket.inet_ntop(socket.AF_INET, destination)} {port}\n"
        else:
            destination, source = value[:16], value[:16] + struct.pack("=i", 0)
            text = f"udp {socket.inet_ntop(socket.AF_INET6, destination)} {port}\n"
        listener.sendmsg([text.encode()], [(level, kind, source)], 0, peer)


async def serve(sandbox: Sandbox, attempts: list[tuple[str, str, int]]) -> int:
    import asyncio

    from proxy.sandbox import ClosedPorts

    loop = asyncio.get_running_loop()
    for bound in sandbox.sockets:
        loop.add_reader(bound.socket, answer_tcp if bound.kind == "tcp" else answer_udp, bound.socket)
    closed = ClosedPorts(
        sandbox.packets, lambda *attempt: attempts.append((attempt[0], str(attempt[1]), attempt[2])), loop
    )
    try:
        sandbox.release({"FROM_RELEASE": "yes"})
        return await sandbox.wait()
    finally:
        closed.close()
        for bound in sandbox.sockets:
            loop.remove_reader(bound.socket)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tcp", type=int, action="append", default=[])
    parser.add_argument("--udp", type=int, action="append", default=[])
    parser.add_argument("--hide", action="append", default=[])
    parser.add_argument("--report")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        sandbox = launch(
            options.command,
            ports=Ports(frozenset(options.tcp), frozenset(options.udp)),
            environment=os.environ,
            hide=options.hide,
        )
    except SandboxUnavailable as error:
        print(error, file=sys.stderr)
        return 125
    attempts: list[tuple[str, str, int]] = []
    took_ms = (time.perf_counter() - started) * 1e3
    import asyncio

    with sandbox:
        status = asyncio.run(serve(sandbox, attempts))
    if options.report:
        with open(options.report, "w") as file:
            json.dump({"attempts": attempts, "took_ms": took_ms, "own_proc": sandbox.has_own_proc}, file)
    return status


if __name__ == "__main__":
    sys.exit(main())
