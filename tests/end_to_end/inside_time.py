"""Run in a world: a time server for all addresses there, which writes each packet that it is sent to its output."""

from __future__ import annotations

import select
import socket
import sys

from tests.proxy.ntp_servers import answer


def main() -> None:
    socks = []
    for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        sock = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((anywhere, 123))
        socks.append(sock)
    print("ready", flush=True)
    while True:
        ready = select.select([*socks, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            return
        for sock in (each for each in socks if each in ready):
            message, peer = sock.recvfrom(4096)
            print(message.hex(), flush=True)
            if len(message) == 48:
                sock.sendto(answer(message), peer)


if __name__ == "__main__":
    main()
