"""An explicit proxy: reads CONNECT and absolute-form heads, then the connection goes the way of every other one.

It answers only what the policy refuses at once; SNI, Host and path are judged where every connection's are.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, ip_address
from typing import Protocol

from addons.answers import answer
from addons.judge import BAD_REQUEST, FORBIDDEN, Judgement
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Address, Attempt, Reason, Stage, Verdict
from proxy.connection import Tunnel
from proxy.inspector import Handover
from proxy.original_dst import parse_address
from proxy.record import Peer, Sink, new_id, record_of

MAX_HEAD = 16 * 1024  # a head that never ends must not grow our memory
HEAD_S = 10.0  # slowloris
LINGER_S = 2.0
REST_S = 0.1
MAX_LINGER = 64 * 1024
_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_REQUEST_LINE = re.compile(rb"([A-Z]+) ([\x21-\x7e]{1,8000}) HTTP/1\.[01]\r\n")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:/?#@\[\]]+):([1-9][0-9]{0,4})")
_ABSOLUTE = re.compile(r"http://([^/?#]*)(?:[/?].*)?", re.IGNORECASE)


class Welcome(Protocol):
    def __call__(self, sock: socket.socket, peer: Peer, *, tunnel: Tunnel | None = ...) -> None: ...


class ExplicitProxy:
    """Serves any number of listening sockets. Its arguments are `Listener`'s, which carries what is tunnelled."""

    def __init__(
        self,
        *,
        decide: Callable[[Attempt], Verdict],
        workload: Callable[[Address], str],
        welcome: Welcome,
        inspect: Callable[[socket.socket, Handover], None] | None,
        record: Sink,
    ) -> None:
        self._decide = decide
        self._workload = workload
        self._welcome = welcome
        self._inspect = inspect
        self._record = record

    async def serve(self, listener: socket.socket) -> None:
        """Accept until cancelled."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    sock, peer = await loop.sock_accept(listener)
                except OSError:  # out of descriptors, or gone while it waited: neither is the end for the others
                    await asyncio.sleep(REST_S)
                    continue
                group.create_task(self._open(sock, peer[:2]))

    async def _open(self, sock: socket.socket, peer: Peer) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(HEAD_S):
                head = await _peek_head(sock)
        except (OSError, _NoHead):
            sock.close()
            return
        line = _REQUEST_LINE.match(head)
        method, target = (text.decode("ascii") for text in line.groups()) if line else ("", "")
        if method == "CONNECT" and (tunnel := _read_authority(target)):
            await self._connect(sock, peer, tunnel, len(head))
        elif (found := _ABSOLUTE.fullmatch(target)) and (tunnel := _read_authority(found[1], 80)) and self._inspect:
            self._inspect(sock, self._handover(peer, tunnel.port))
        else:
            attempt = self._attempt(Stage.HTTP, peer, None, 0, fault=Reason.MALFORMED_REQUEST)
            await self._refuse(sock, peer, attempt, self._decide(attempt), BAD_REQUEST)

    async def _connect(self, sock: socket.socket, peer: Peer, tunnel: Tunnel, head_size: int) -> None:
        if tunnel.authority is not None:  # a name can be refused at once, in words; an address waits for its SNI
            attempt = self._attempt(Stage.TLS, peer, tunnel.authority, tunnel.port)
            verdict = self._decide(attempt)
            if not verdict.is_allow and verdict.reason is not Reason.WRONG_PROTOCOL:  # plain HTTP may be tunnelled too
                await self._refuse(sock, peer, attempt, verdict, FORBIDDEN)
                return
        try:
            sock.recv(head_size)  # what follows it stays in the queue, to be peeked
            sock.send(_ESTABLISHED)
        except OSError:
            sock.close()
            return
        self._welcome(sock, peer, tunnel=tunnel)

    async def _refuse(self, sock: socket.socket, peer: Peer, attempt: Attempt, verdict: Verdict, status: int) -> None:
        judgement = Judgement(new_id(), attempt, verdict, status)
        self._record(record_of(attempt, verdict, id=judgement.id, source=peer, status=status))
        loop = asyncio.get_running_loop()
        with sock, suppress(OSError):
            async with asyncio.timeout(LINGER_S):
                sock.recv(MAX_HEAD)  # bytes left in the queue would turn the close into a reset
                await loop.sock_sendall(sock, answer(judgement, closes=True).to_bytes())
                sock.shutdown(socket.SHUT_WR)
                left = MAX_LINGER
                while left > 0 and (data := await loop.sock_recv(sock, left)):
                    left -= len(data)

    def _attempt(
        self, stage: Stage, peer: Peer, host: Hostname | None, port: int, fault: Reason | None = None
    ) -> Attempt:
        workload = self._workload(parse_address(peer[0]))
        return Attempt(stage, workload, host, port, time=time.time(), fault=fault)

    def _handover(self, peer: Peer, port: int) -> Handover:
        return Handover(
            id=new_id(),
            workload=self._workload(parse_address(peer[0])),
            host=None,
            port=port,
            plain=True,
            source=peer,
            destination=None,
            opened=time.time(),
        )


class _NoHead(Exception):
    """The client went away, or sent more than a head."""


async def _peek_head(sock: socket.socket) -> bytes:
    """The request head with its empty line, left in the kernel's queue. Raises _NoHead, OSError."""
    loop = asyncio.get_running_loop()
    seen = 0
    while True:
        readable = asyncio.Event()
        loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(sock)
        data = sock.recv(MAX_HEAD, socket.MSG_PEEK)
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            return data[: end + 4]
        if len(data) in (seen, MAX_HEAD):  # nothing more came: it is gone; or it never ends
            raise _NoHead
        seen = len(data)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, seen + 1)  # sleep until there is more than was seen


def _read_authority(text: str, port: int | None = None) -> Tunnel | None:
    """`NAME:PORT`, `ADDR:PORT` or `[ADDR6]:PORT`; the port may be left out where `port` is given."""
    if port is not None and not re.search(r":[0-9]+\Z", text):
        text = f"{text}:{port}"
    found = _AUTHORITY.fullmatch(text)
    if found is None or int(found[2]) > 65535:
        return None
    name = found[1].removeprefix("[").removesuffix("]")
    try:
        return Tunnel(parse_hostname(name), None, int(found[2]))
    except MalformedName as error:
        if not error.is_address:
            return None
    try:
        address = ip_address(name)
    except ValueError:  # 127.1, 0x7f.1: an address to some resolvers, and to nobody a name
        return None
    return Tunnel(None, address if isinstance(address, IPv4Address) else parse_address(name), int(found[2]))
