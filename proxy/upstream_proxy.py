"""The site's own proxy as the way out: what it carries, where it is, how it is asked. `dialer` opens connections."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Collection, Sequence
from ipaddress import ip_address, ip_network
from math import inf
from typing import TYPE_CHECKING

from addons.judge import Unreachable
from pki.files import UnusableSecret, read_secret
from policies.addresses import PrefixMap
from policies.engine import admit
from policies.hostnames import Hostname, Pattern, parents, parse_hostname
from policies.model import Action, Address, Network, Reason, Stage, Verdict
from proxy.dialer import AnswerReader, interleave
from proxy.resolver import NameNotFound, Resolution, ResolverFailed
from proxy.wire.connect import basic, render_connect

if TYPE_CHECKING:
    from proxy.config import UpstreamProxy
    from proxy.flow import Resolver

type Way = tuple[Sequence[Address], int]  # addresses in the order to dial them, and the port

MAX_ADDRESSES = 6
MAX_CREDENTIALS = 4096  # bytes; more is another file
_CREDENTIALS = re.compile(rb"[^\x00-\x1f\x7f:]+:[^\x00-\x1f\x7f]*")  # RFC 7617 2
_OPERATORS = Verdict(Action.ALLOW, Reason.RULE, Stage.TCP)  # the site's proxy is the operator's word, no rule's


class CredentialsUnusable(Exception):
    """The file of credentials cannot be used. `str()` has the path and the repair, and nothing of what it holds."""


class SiteProxy:
    """Carries every name and address that is neither the operator's (`hosts`) nor `direct`. What it cannot carry fails:
    nothing is ever dialled past it.

    hosts     the names that the operator's `hosts:` gives addresses
    resolver  looks up the site's proxy itself
    is_own    whether an address and port are the gate's own
    """

    def __init__(
        self,
        config: UpstreamProxy,
        hosts: Collection[Hostname],
        resolver: Resolver,
        *,
        is_own: Callable[[Address, int], bool] | None = None,
    ) -> None:
        self._host = _parse_host(config.host)
        self._port = config.port
        self._credentials = config.credentials
        self._hosts = hosts
        self._resolver = resolver
        self._is_own = is_own
        patterns = [one for one in config.direct if isinstance(one, Pattern)]
        self._direct = frozenset(one.host for one in patterns if not one.wildcard)
        self._direct_below = frozenset(one.host for one in patterns if one.wildcard)
        self._direct_prefixes = PrefixMap((one, True) for one in config.direct if not isinstance(one, Pattern))

    def carries(self, target: Hostname | Address) -> bool:
        """Whether `target` goes through it. A name that it carries is not looked up by the gate."""
        if not isinstance(target, str):
            return not self._direct_prefixes.covering(target)
        if target in self._hosts or target in self._direct:
            return False
        return not any(above in self._direct_below for above in parents(target))

    def known(self) -> Way | None:
        """The way to it, where nobody has to be asked. Raises Unreachable."""
        if not isinstance(self._host, str):
            return self._admit(Resolution((self._host,), inf))
        found = self._resolver.cached(self._host)
        return self._admit(found) if found else None

    async def find(self) -> Way:
        """The way to it. Raises Unreachable."""
        if not isinstance(self._host, str):
            return self._admit(Resolution((self._host,), inf))
        try:
            return self._admit(await self._resolver.resolve(self._host))
        except NameNotFound as error:
            raise Unreachable(Reason.UPSTREAM_FAILED, f"the site's proxy: {error}") from error
        except ResolverFailed as error:
            raise Unreachable(Reason.RESOLVER_FAILED, f"the site's proxy: {error}") from error

    def authorization(self) -> str | None:
        """The value of `Proxy-Authorization`, from the file as it is now. Raises Unreachable."""
        if self._credentials is None:
            return None
        try:
            return basic(read_credentials(self._credentials))
        except CredentialsUnusable as error:  # it names a path, and a workload sees what Unreachable says
            raise Unreachable(Reason.GATE_FAILED, "the credentials for the site's proxy cannot be used") from error

    def request(self, target: Hostname | Address, port: int) -> bytes:
        """The CONNECT that asks for `target`. Raises Unreachable."""
        return render_connect(target, port, self.authorization())

    async def tunnel(self, sock: socket.socket, target: Hostname | Address, port: int) -> None:
        """Have it connect `sock`, which was dialled to it, to `target`. Raises Unreachable, OSError."""
        loop = asyncio.get_running_loop()
        reader, readable = AnswerReader(sock), asyncio.Event()
        await loop.sock_sendall(sock, self.request(target, port))
        loop.add_reader(sock, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
                if reader.read():
                    return
        finally:
            loop.remove_reader(sock)

    def _admit(self, found: Resolution) -> Way:
        """As the operator's `hosts:`: as private as it likes, loopback too, but never metadata or link-local."""
        port = found.port or self._port
        admitted = [one for one in interleave(found.addresses) if admit(_OPERATORS, one, from_hosts=True).is_allow]
        if self._is_own:
            admitted = [one for one in admitted if not self._is_own(one, port)]
        if not admitted:
            raise Unreachable(Reason.NEVER_REACHED, "no address of the site's proxy may be dialled")
        return admitted[:MAX_ADDRESSES], port


def read_credentials(path: str) -> bytes:
    """`NAME:PASSWORD`, the one line of the file. Raises CredentialsUnusable."""
    try:
        text = read_secret(path, MAX_CREDENTIALS, shows="the password", holds="NAME:PASSWORD")
    except UnusableSecret as error:
        raise CredentialsUnusable(str(error)) from error
    line = text.removesuffix(b"\n").removesuffix(b"\r")
    if len(text) > MAX_CREDENTIALS or not _CREDENTIALS.fullmatch(line):
        raise CredentialsUnusable(f"{path}: not NAME:PASSWORD in one line; write just that")
    return line


def parse_direct(text: str) -> Pattern | Network:
    """The entry of `UpstreamProxy.direct` that `str()` gave `text` of; it was checked when it was first read."""
    if "/" in text:  # a prefix is always written with its length
        return ip_network(text)
    return Pattern(Hostname(text.removeprefix("*.")), wildcard=text.startswith("*."))


def _parse_host(text: str) -> Hostname | Address:
    """Raises MalformedName."""
    try:
        return ip_address(text)
    except ValueError:
        return parse_hostname(text)
