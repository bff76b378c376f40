"""One question to one server, over a socket of its own. It judges no address and keeps nothing."""

from __future__ import annotations

import asyncio
import secrets
import socket
from typing import TYPE_CHECKING

from proxy.record import Peer
from proxy.relays.ntp.clock import STAMP_SIZE, arrived_ns, ask_for_stamps, own_ns, read
from proxy.relays.ntp.sample import Sample, measure
from proxy.wire.ntp import SIZE, MalformedPacket, build_query, parse_reply

if TYPE_CHECKING:  # it brings cryptography, which few relays need
    from proxy.relays.ntp.keys import Session

MAX_PROVED = 4096  # bytes that are read of an answer that carries a proof
MAX_STRAYS = 16  # packets that are not our answer; more is somebody guessing

_ANCILLARY_SIZE = socket.CMSG_SPACE(STAMP_SIZE)


class NoKeys(Exception):
    """A server that must prove its answers gives no keys for it. `str()` says why, in words of ours."""


async def ask(server: Peer, timeout_s: float, session: Session | None = None) -> Sample:
    """What `server` answers to one query of ours; with `session`, which has a cookie left, what it proves that it does.

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
        if session:
            query = session.seal(query)
        sent_ns = own_ns()
        sock.send(query)
        strays = 0
        try:
            async with asyncio.timeout(timeout_s):
                while strays < MAX_STRAYS:
                    message, received_ns = await _receive(sock, MAX_PROVED if session else SIZE + 1)
                    try:
                        reply = parse_reply(session.open(message) if session else message, cookie)
                    except MalformedPacket:
                        strays += 1
                        continue
                    return measure(reply, sent_ns, received_ns)
        except TimeoutError:
            if not (session and strays):  # else somebody answers, and cannot prove who
                raise
    raise MalformedPacket("proof" if session else "origin")


async def _receive(sock: socket.socket, size: int) -> tuple[bytes, int]:
    """One packet, and when it came by our own clock."""
    while True:
        try:
            message, ancillary, _, _ = sock.recvmsg(size, _ANCILLARY_SIZE)
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
