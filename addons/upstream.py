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
from functools import cached_property
from ipaddress import ip_address
from math import inf
from typing import Protocol

from mitmproxy import connection
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from addons.judge import Conversation, Unreachable
from addons.trust import trust_origins as trust_origins  # who opens connections needs both
from policies.engine import admit
from policies.hostnames import Hostname
from policies.model import Address, Reason

MAX_ADDRESSES = 6  # an answer with 200 addresses must not open 200 connections
STAGGER_S = 0.25  # RFC 8305 5: the next address is tried beside one that has not answered yet

_REASONS = {
    errno.ECONNREFUSED: Reason.UPSTREAM_REFUSED,
    errno.ETIMEDOUT: Reason.UPSTREAM_TIMEOUT,
    errno.EMFILE: Reason.GATE_FAILED,  # ours are used up: the far end has no part in it
    errno.ENFILE: Reason.GATE_FAILED,
}


class Resolution(Protocol):
    """What a lookup found. `port` replaces the one asked for; `from_hosts`: the operator named these addresses."""

    @property
    def addresses(self) -> Sequence[Address]: ...
    @property
    def port(self) -> int | None: ...
    @property
    def from_hosts(self) -> bool: ...


class SiteProxy(Protocol):
    """The site's own proxy, where that is the way out. Nothing of what it `carries` is looked up here.

    find           its addresses and port; raises Unreachable
    tunnel         has it connect a socket to an origin; raises Unreachable, OSError
    authorization  the value of `Proxy-Authorization`; raises Unreachable
    """

    def carries(self, target: Hostname) -> bool: ...
    async def find(self) -> tuple[Sequence[Address], int]: ...
    async def tunnel(self, sock: socket.socket, target: Hostname, port: int) -> None: ...
    def authorization(self) -> str | None: ...


class Upstream:
    """Opens upstream connections; to stock mitmproxy, which opens its own, it names the address.

    resolve  looks a name up; raises Unreachable when it has no address or nobody would say
    trust    verifies origins (`trust_origins`)
    site     carries what it says it carries: TLS in a tunnel, plain requests as they are (`Gate` gives them its form)
    is_own   whether an address and port are the gate's own, which it never dials
    dialled  told of each connection that was tried: how long that took in seconds, and why it failed
    trust_http2  makes what verifies origins that are offered HTTP/2; None: none is
    """

    def __init__(
        self,
        resolve: Callable[[Hostname], Awaitable[Resolution]],
        trust: ssl.SSLContext,
        conversation_of: Callable[[connection.Client], Conversation],
        *,
        dial_s: float = 10.0,
        site: SiteProxy | None = None,
        is_own: Callable[[Address, int], bool] | None = None,
        dialled: Callable[[float, Reason | None], None] | None = None,
        trust_http2: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._resolve = resolve
        self._trust = trust
        self._conversation_of = conversation_of
        self._dial_s = dial_s
        self._site = site
        self._is_own = is_own
        self._dialled = dialled
        self._make_trust_http2 = trust_http2

    @cached_property
    def _trust_http2(self) -> ssl.SSLContext:
        return self._make_trust_http2() if self._make_trust_http2 else self._trust

    async def server_connect(self, data: ServerConnectionHookData) -> None:
        conversation = self._conversation_of(data.client)
        try:
            addresses, port = await self._look_up(conversation)
        except Unreachable as failure:
            conversation.failure = failure
            data.server.error = str(failure)
        else:
            data.server.address = (str(addresses[0]), port)

    async def open(
        self, conversation: Conversation, protocol: Callable[[], asyncio.BaseProtocol], *, http2: bool = False
    ) -> asyncio.Transport:
        """A connection to the origin of the conversation's latest allow, which may be offered `http2` too.

        Raises Unreachable.
        """
        begun, site = inf, self._site_for(conversation)
        try:
            async with asyncio.timeout(self._dial_s):
                addresses, port = await (site.find() if site else self._look_up(conversation))
                begun = asyncio.get_running_loop().time()
                sock = await _connect(addresses, port)
                if site and not conversation.plain:
                    await self._tunnel(site, sock, conversation)
                trust = self._trust_http2 if http2 else self._trust
                transport = await _wrap(sock, conversation, protocol, trust)
        except Unreachable as unreachable:
            self._observe(begun, unreachable.reason)
            raise
        except OSError as error:
            failure = self._explain(error, "through the site's proxy: " if site else "")
            self._observe(begun, failure.reason)
            raise failure from error
        self._observe(begun, None)
        return transport

    def admits(self, conversation: Conversation, address: str) -> bool:
        """Whether a connection that was opened for the conversation may carry its latest allowed request as well: the
        policy may be another by now, and no longer admit a private address."""
        if self._site_for(conversation):
            return True
        verdict = conversation.allowed
        return verdict is not None and admit(verdict, ip_address(address), from_hosts=conversation.from_hosts).is_allow

    def _site_for(self, conversation: Conversation) -> SiteProxy | None:
        """The site's proxy, where it carries the host; None: the host is dialled, or refused by `_look_up`."""
        host, site = conversation.opened_for, self._site
        return site if site and host and conversation.allowed and site.carries(host) else None

    async def _tunnel(self, site: SiteProxy, sock: socket.socket, conversation: Conversation) -> None:
        try:
            await site.tunnel(sock, conversation.opened_for or Hostname(""), conversation.port)
        except BaseException:
            sock.close()
            raise

    def _explain(self, error: OSError, way: str) -> Unreachable:
        """What of a connection failed. asyncio's deadline and every error of TLS are OSErrors too."""
        if isinstance(error, TimeoutError):
            return Unreachable(Reason.UPSTREAM_TIMEOUT, f"{way}no connection within {self._dial_s:g} s")
        if isinstance(error, ssl.SSLCertVerificationError):
            return Unreachable(Reason.UPSTREAM_CERTIFICATE, error.verify_message.rstrip(".").lower())
        if isinstance(error, ssl.SSLError):
            return Unreachable(Reason.UPSTREAM_FAILED, f"no TLS ({(error.reason or str(error)).lower()})")
        reason = _REASONS.get(error.errno or 0, Reason.UPSTREAM_FAILED)
        note = os.strerror(error.errno) if error.errno else str(error)  # asyncio's own text repeats the address
        return Unreachable(reason, way + note.lower())

    def _observe(self, begun: float, reason: Reason | None) -> None:
        if self._dialled and begun < inf:  # what failed before it was dialled is the lookup's, or a denial
            self._dialled(asyncio.get_running_loop().time() - begun, reason)

    async def _look_up(self, conversation: Conversation) -> tuple[Sequence[Address], int]:
        """The addresses that may be dialled, and the port."""
        host, verdict = conversation.opened_for, conversation.allowed
        if host is None or verdict is None:
            raise Unreachable(Reason.GATE_FAILED, "a connection was wanted before any request was allowed")
        resolution = await self._resolve(host)
        conversation.from_hosts = resolution.from_hosts
        port = resolution.port or conversation.port
        admitted, refused = [], None
        for address in resolution.addresses:
            checked = admit(verdict, address, from_hosts=resolution.from_hosts)
            if not checked.is_allow:
                refused = refused or Unreachable(checked.reason, str(address))
            elif self._is_own and self._is_own(address, port):
                refused = refused or Unreachable(Reason.NEVER_REACHED, "it is this gate")
            else:
                admitted.append(address)
        if not admitted:
            raise refused or Unreachable(Reason.NAME_NOT_FOUND, "it has no address")
        return admitted[:MAX_ADDRESSES], port


async def _wrap(
    sock: socket.socket,
    conversation: Conversation,
    protocol: Callable[[], asyncio.BaseProtocol],
    trust: ssl.SSLContext,
) -> asyncio.Transport:
    loop = asyncio.get_running_loop()
    if conversation.plain:
        transport, _ = await loop.create_connection(protocol, sock=sock)
    else:
        transport, _ = await loop.create_connection(
            protocol, sock=sock, ssl=trust, server_hostname=conversation.opened_for
        )
    return transport


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
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: else asyncio leaves Nagle's delay on
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
