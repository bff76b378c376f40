"""Opens the connection to the origin of an allowed request: looks up its name, checks each address, dials, verifies.

Nothing here runs before an allow. The very address that passed `admit` is dialled, and the certificate is verified for
the name that was judged. Every failure is an `Unreachable` with a reason of its own.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from mitmproxy import connection
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from addons.judge import Conversation, Unreachable
from policies.engine import admit
from policies.hostnames import Hostname
from policies.model import Address, Reason

MAX_ADDRESSES = 6  # an answer with 200 addresses must not open 200 connections
STAGGER_S = 0.25  # RFC 8305 5: the next address is tried beside one that has not answered yet

_REASONS = {errno.ECONNREFUSED: Reason.UPSTREAM_REFUSED, errno.ETIMEDOUT: Reason.UPSTREAM_TIMEOUT}


class Resolution(Protocol):
    """What a lookup found. `port` replaces the one asked for; `from_hosts`: the operator named these addresses."""

    @property
    def addresses(self) -> Sequence[Address]: ...
    @property
    def port(self) -> int | None: ...
    @property
    def from_hosts(self) -> bool: ...


class Upstream:
    """Opens upstream connections; to stock mitmproxy, which opens its own, it names the address.

    resolve  looks a name up; raises Unreachable when it has no address or nobody would say
    trust    verifies origins (`trust_origins`)
    """

    def __init__(
        self,
        resolve: Callable[[Hostname], Awaitable[Resolution]],
        trust: ssl.SSLContext,
        conversation_of: Callable[[connection.Client], Conversation],
        *,
        dial_s: float = 10.0,
    ) -> None:
        self._resolve = resolve
        self._trust = trust
        self._conversation_of = conversation_of
        self._dial_s = dial_s

    async def server_connect(self, data: ServerConnectionHookData) -> None:
        conversation = self._conversation_of(data.client)
        try:
            addresses, port = await self._look_up(conversation)
        except Unreachable as failure:
            conversation.failure = failure
            data.server.error = str(failure)
        else:
            data.server.address = (str(addresses[0]), port)

    async def open(self, conversation: Conversation, protocol: Callable[[], asyncio.BaseProtocol]) -> asyncio.Transport:
        """A connection to the origin of the conversation's latest allow. Raises Unreachable."""
        try:
            async with asyncio.timeout(self._dial_s):
                addresses, port = await self._look_up(conversation)
                sock = await _connect(addresses, port)
                return await self._wrap(sock, conversation, protocol)
        except TimeoutError as error:
            raise Unreachable(Reason.UPSTREAM_TIMEOUT, f"no connection within {self._dial_s:g} s") from error
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(Reason.UPSTREAM_CERTIFICATE, error.verify_message.rstrip(".").lower()) from error
        except ssl.SSLError as error:
            raise Unreachable(Reason.UPSTREAM_FAILED, f"no TLS ({(error.reason or str(error)).lower()})") from error
        except OSError as error:
            reason = _REASONS.get(error.errno or 0, Reason.UPSTREAM_FAILED)
            note = os.strerror(error.errno) if error.errno else str(error)  # asyncio's own text repeats the address
            raise Unreachable(reason, note.lower()) from error

    async def _look_up(self, conversation: Conversation) -> tuple[Sequence[Address], int]:
        """The addresses that may be dialled, and the port."""
        host, verdict = conversation.opened_for, conversation.allowed
        if host is None or verdict is None:
            raise Unreachable(Reason.GATE_FAILED, "a connection was wanted before any request was allowed")
        resolution = await self._resolve(host)
        admitted, refused = [], None
        for address in resolution.addresses:
            checked = admit(verdict, address, from_hosts=resolution.from_hosts)
            if checked.is_allow:
                admitted.append(address)
            else:
                refused = refused or Unreachable(checked.reason, str(address))
        if not admitted:
            raise refused or Unreachable(Reason.NAME_NOT_FOUND, "it has no address")
        return admitted[:MAX_ADDRESSES], resolution.port or conversation.port

    async def _wrap(
        self, sock: socket.socket, conversation: Conversation, protocol: Callable[[], asyncio.BaseProtocol]
    ) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        if conversation.plain:
            transport, _ = await loop.create_connection(protocol, sock=sock)
        else:
            transport, _ = await loop.create_connection(
                protocol, sock=sock, ssl=self._trust, server_hostname=conversation.opened_for
            )
        return transport


def trust_origins(authorities: str | None = None) -> ssl.SSLContext:
    """Verifies origins by the system's store, or by the PEM file `authorities` alone. Raises OSError."""
    context = ssl.create_default_context(cafile=authorities)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False  # RFC 9525 6.3: the subject alternative names alone
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # 3.13's default; passthrough clients do not ask for it either
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _connect(addresses: Sequence[Address], port: int) -> socket.socket:
    """The socket that connects first, of attempts begun one after another. Raises OSError, the last one's."""
    waiting = list(addresses)
    tasks: set[asyncio.Task[socket.socket]] = set()
    failure: OSError = OSError("no address")
    try:
        while waiting or tasks:
            if waiting:
                tasks.add(asyncio.create_task(_dial(waiting.pop(0), port)))
            done, _ = await asyncio.wait(
                tasks, timeout=STAGGER_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                tasks.discard(task)
                try:
                    return task.result()
                except OSError as error:
                    failure = error
        raise failure
    finally:
        for task in tasks:
            task.cancel()
            task.add_done_callback(_drop)


async def _dial(address: Address, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock


def _drop(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of an attempt that lost the race by a hair."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()
