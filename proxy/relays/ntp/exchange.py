"""One question to one server, over a socket of its own. It judges no address and keeps nothing."""

from __future__ import annotations

import asyncio
import secrets
import socket

from proxy.record import Peer
from proxy.relays.ntp.clock import STAMP_SIZE, arrived_ns, ask_for_stamps, own_ns, read
from proxy.relays.ntp.sample import Sample, measure
from proxy.wire.ntp import SIZE, MalformedPacket, build_query, parse_reply

MAX_STRAYS = 16  # packets that are not our answer; more is somebody guessing

_ANCILLARY_SIZE = socket.CMSG_SPACE(STAMP_SIZE)


async def ask(server: Peer, timeout_s: float) -> Sample:
    """What `server` answers to one query of ours.

    Raises TimeoutError, other OSErrors for a server that is not there, MalformedPacket when only strays arrived,
    UnusableReply and KissOfDeath. A fresh socket has a fresh random port, takes packets from this server alone, and the
    query's cookie is random: whoever forges an answer has to guess both (RFC 5905 14, RFC 9109).
    """
    cookie = secrets.randbits(64)
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        ask_for_stamps(sock)
        sock.connect(server)
        query = build_query(cookie)
        sent_ns = own_ns()
        sock.send(query)
        async with asyncio.timeout(timeout_s):
            for _ in range(MAX_STRAYS):
                message, received_ns = await _receive(sock)
                try:
                    reply = parse_reply(message, cookie)
                except MalformedPacket:
                    continue
                return measure(reply, sent_ns, received_ns)
    raise MalformedPacket("origin")


async def _receive(sock: socket.socket) -> tuple[bytes, int]:
    """One packet, and when it came by our own clock."""
    while True:
        try:
            message, ancillary, _, _ = sock.recvmsg(SIZE + 1, _ANCILLARY_SIZE)
        except BlockingIOError:
            await _readable(sock)
        else:
            return message, arrived_ns(ancillary, read())


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    waiting: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not waiting.done():
            waiting.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await waiting
    finally:
        loop.remove_reader(sock)
