"""Which time servers the rules name, and at which addresses they may be asked. It asks none of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from policies.addresses import Address
from policies.engine import admit, decide
from policies.errors import Problem
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.index import Policy
from policies.model import Attempt, Stage, Verdict
from proxy.record import Peer
from proxy.resolver import NameNotFound, Resolver, ResolverFailed
from proxy.wire.ntp import PORT

KE_PORT = 4460  # of NTS key exchange, RFC 8915 7.1
ALL = "all"

# Time servers that clouds have on link-local addresses. The operator may name them (--host), a policy alone may not:
# what a name resolves to is for its owner to say, and beside them are the clouds' metadata services.
LINK_LOCAL = frozenset(
    map(
        ip_address,
        (
            "169.254.169.123",  # Amazon Time Sync Service
            "fd00:ec2::123",
            "169.254.169.254",  # Google's metadata server gives time too: by UDP/123, and there alone it may be asked
        ),
    )
)


def names_of(policy: Policy, workload: str | None) -> frozenset[Hostname]:
    """The servers that rules name, of one workload or (None) of all."""
    indices = policy.index.values() if workload is None else [policy.index[workload]]
    return frozenset(name for index in indices for name in index.ntp)


def unservable(policy: Policy, workload: str | None) -> list[str]:
    """Why a relay cannot serve this policy, each in a line; empty: it can."""
    if not names_of(policy, workload):
        whose = f'workload "{workload}"' if workload else "the policy"
        return [f"{whose} names no time server; add a rule such as `- ntp: time.example`"]
    if workload is not None:
        return []
    hint = "use match: address, or a relay for that workload alone with -w"
    what = "has an ntp rule, and a relay knows sources by their address alone"
    return [
        str(Problem(one.match.place, f'"{name}" {what}', hint))
        for name, one in policy.workloads.items()
        if one.match and (one.match.kubernetes or one.match.user) and policy.index[name].ntp
    ]


class MalformedNtsOption(ValueError):
    """A `--nts` that cannot be meant. `str()` says what to write."""


@dataclass(frozen=True, slots=True)
class NtsNames:
    """The names whose servers must prove their answers, each with the port of its key exchange."""

    ports: Mapping[Hostname, int]
    is_all: bool = False

    def port_of(self, name: Hostname) -> int | None:
        """None: this server proves nothing."""
        return self.ports.get(name, KE_PORT if self.is_all else None)


def parse_nts_options(texts: Iterable[str]) -> NtsNames:
    """`NAME`, `NAME:PORT` or `all`, each as often as one likes. Raises MalformedNtsOption."""
    texts = list(texts)
    ports: dict[Hostname, int] = {}
    for text in texts:
        name, colon, port = text.partition(":")
        if text == ALL:
            continue
        try:
            host = parse_hostname(name)
        except MalformedName as error:
            raise MalformedNtsOption(f'--nts "{text}": {error}; write NAME, NAME:PORT or {ALL}') from error
        if colon and not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
            raise MalformedNtsOption(f'--nts "{text}": "{port}" is not a port from 1 to 65535')
        ports[host] = int(port) if colon else KE_PORT
    return NtsNames(ports, ALL in texts)


class NamedServers:
    """The servers of the policy in force.

    policy    the one in force; asked each time
    workload  whose rules count; None: everybody's
    is_own    whether this relay listens at an address and port
    clock     POSIX seconds
    """

    def __init__(
        self,
        policy: Callable[[], Policy],
        workload: str | None,
        resolver: Resolver,
        *,
        is_own: Callable[[Address, int], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self._workload = workload
        self._resolver = resolver
        self._is_own = is_own
        self._clock = clock

    @property
    def names(self) -> frozenset[Hostname]:
        """All of them, also those whose rule has expired: it may be renewed."""
        return names_of(self._policy(), self._workload)

    def is_open(self, name: Hostname) -> bool:
        """Whether a rule in force names this server."""
        return self._verdict(name) is not None

    async def find(self, name: Hostname, port: int | None = None) -> Sequence[Peer]:
        """The addresses at which it may be asked now, with `port` at that one. Raises NameNotFound, ResolverFailed."""
        verdict = self._verdict(name)
        if verdict is None:  # the lookup itself would be one more thing that is said outside
            return ()
        resolution = await self._resolver.resolve(name)
        port = port or resolution.port or PORT
        return [
            (str(address), port)
            for address in resolution.addresses
            if not self._is_own(address, port)  # our own estimate, once more
            and (
                admit(verdict, address, from_hosts=resolution.from_hosts).is_allow
                or (resolution.from_hosts and port == PORT and address in LINK_LOCAL)
            )
        ]

    async def locate(self, name: Hostname, at: Peer, server: str | None, port: int | None) -> Peer | None:
        """Where a key exchange of `name`, at the address `at`, sends its queries; None: nowhere that may be asked.

        It may name another server (RFC 8915 4.1.7). That is asked if it is one of the addresses of `name`, or a name of
        the policy's: whoever runs a time server does not decide to whom else packets go.
        """
        asked, wanted = name, at[0]
        if server is not None:
            try:
                wanted = str(ip_address(server))
            except ValueError:
                try:
                    asked = parse_hostname(server)
                except MalformedName:
                    return None
        try:
            found = await self.find(asked, port)  # nothing of a name that no rule has, which is not looked up either
        except (NameNotFound, ResolverFailed):
            return None
        return next((peer for peer in found if peer[0] == wanted), found[0] if asked != name and found else None)

    def _verdict(self, name: Hostname) -> Verdict | None:
        """That of a rule which admits this server, whosever it is."""
        policy = self._policy()
        for workload, index in policy.index.items():
            if name not in index.ntp or self._workload not in (None, workload):
                continue
            verdict = decide(policy, Attempt(Stage.NTP, workload, name, PORT, self._clock()))
            if verdict.is_allow:
                return verdict
        return None
