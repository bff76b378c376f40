"""Opens the connection to the origin of an allowed request: looks the name up, checks each address, dials, verifies TLS.

Nothing here runs before an allow. The very address that passed `admit` is dialled; the certificate is verified against
the name that was judged. Every failure is an `Unreachable` with a reason of its own.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from addons.judge import Conversation, Unreachable
from policies.engine import admit
from policies.hostnames import Hostname
from policies.model import Address, Reason

MAX_ADDRESSES = 6  # an answer with 200 addresses must not open 200 connections
STAGGER_S = 0.25  # RFC 8305 5: the next address is tried beside one that has not answered yet


class Resolution(Protocol):
    """What a lookup found. `port` replaces the one asked for; `from_hosts`: the operator named these addresses."""

    @property
    def addresses(self) -> tuple[Address, ...]: ...
    @property
    def port(self) -> int | None: ...
    @property
    def from_hosts(self) -> bool: ...


type Resolve = Callable[[Hostname], Awaitable[Resolution]]


@dataclass(frozen=True, slots=True)
class Upstream:
    """Opens upstream connections, and names the address to stock mitmproxy, which opens its own.

    resolve  raises Unreachable when a name has no address or cannot be looked up
    trust    verifies origins (`trust_origins`)
    """

    resolve: Resolve
    trust: ssl.SSLContext
    dial_s: float = 10.0

    async def server_connect(self, data: ServerConnectionHookData) -> None:
        ...

    async def open(
        self, conversation: Conversation, protocol: Callable[[], asyncio.Protocol]
    ) -> asyncio.Transport:
        """A connection to the origin of the conversation's latest allow, verified. Raises Unreachable."""
