"""Which time servers the rules name, and at which addresses they may be asked. It asks none of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from policies.addresses import Address
from policies.engine import admit, decide
from policies.hostnames import Hostname
from policies.index import Policy
from policies.model import Attempt, Stage, Verdict
from proxy.record import Peer
from proxy.resolver import Resolver
from proxy.wire.ntp import PORT

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

    async def find(self, name: Hostname) -> Sequence[Peer]:
        """The addresses at which it may be asked now. Raises NameNotFound, ResolverFailed."""
        verdict = self._verdict(name)
        if verdict is None:  # the lookup itself would be one more thing that is said outside
            return ()
        resolution = await self._resolver.resolve(name)
        port = resolution.port or PORT
        return [
            (str(address), port)
            for address in resolution.addresses
            if not self._is_own(address, port)  # our own estimate, once more
            and (
                admit(verdict, address, from_hosts=resolution.from_hosts).is_allow
                or (resolution.from_hosts and port == PORT and address in LINK_LOCAL)
            )
        ]

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
