"""What a lookup opens: the flows behind `tcp` and `udp` rules by name that the kernel lets past the gate.

It says no more than the gate would, and asks the same engine. How it is done is the opener's work.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence

from policies.addresses import Address
from policies.engine import Expect, admit, expect
from policies.hostnames import Hostname
from policies.model import ELSEWHERE, Attempt, Mode, Stage, TransportRule
from proxy.elements import Element, Transport
from proxy.metrics.meter import Counts
from proxy.opener.claims import Claim
from proxy.opener.link import Link, NotOpened
from proxy.opener.messages import MAX_TIME_S
from proxy.policy_in_force import PolicyInForce
from proxy.upstream_proxy import SiteProxy

MIN_TIME_S = 60.0  # programs connect later than the TTL of their lookup allows
LEAST_LEFT_S = 30.0  # of an opening that is not refreshed yet
MAX_PORTS = 64  # of a rule; the gate carries a wider one
DEADLINE_S = 1.0  # an answer waits no longer: what is not open is the gate's, or closed
REVIEW_S = 10.0
RETRY_S = 1.0
LOOK_S = 10.0  # for a new day, which ends rules
MAX_KNOWN = 10_000  # names of sources; of a forgotten one the next lookup asks again

_QUIC_PORT = 443
_DAY_S = 86_400
_PROTOCOLS: dict[Stage, Transport] = {Stage.TCP: "tcp", Stage.UDP: "udp"}
_STAGES = {protocol: stage for stage, protocol in _PROTOCOLS.items()}


class Openings:
    """The openings of one worker. Made on a running loop.

    site   what it carries is not let past it
    clock  of times that pass; `wall` is the clock that ends a rule's `until`
    """

    def __init__(
        self,
        in_force: PolicyInForce,
        link: Link,
        counts: Counts,
        *,
        site: SiteProxy | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._in_force = in_force
        self._link = link
        self._counts = counts
        self._site = site
        self._took = counts.histogram("outgate_opening_duration_seconds")
        self._clock = clock
        self._wall = wall
        self._known: OrderedDict[tuple[str, Address, Hostname], dict[Address, float]] = OrderedDict()
        self._era = 0  # in which what is known was asked for
        self._reviewing: asyncio.Task[None] | None = None
        self._day = self._today()
        self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        link.forget = self._forget

    def needs(
        self, workload: str, source: Address, name: Hostname, addresses: Sequence[Address], ttl_s: float = 0.0
    ) -> bool:
        """Whether `open` has something to open that is not open for long enough yet."""
        if not any(self._rules(workload, name)) or not self._is_its(source, workload):
            return False
        known = self._known.get((workload, source, name), {})
        until = self._clock() + max(ttl_s, LEAST_LEFT_S)
        return any(known.get(address, 0.0) < until for address in addresses if address.version == source.version)

    async def open(
        self, workload: str, source: Address, name: Hostname, addresses: Sequence[Address], ttl_s: float
    ) -> None:
        """Let `source` past the gate to what rules of its workload say of `name`, while its lookup holds.

        Returns when the kernel has acknowledged it, or after a deadline.
        """
        started, time_s, era = self._clock(), min(max(2 * ttl_s, MIN_TIME_S), MAX_TIME_S), self._era
        mine = [address for address in addresses if address.version == source.version]
        elements = list(self._wanted(workload, source, name, mine))
        if elements:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await self._link.open(workload, name, elements, time_s)
            except (NotOpened, TimeoutError) as error:
                self._counts.count("outgate_openings_total", "late" if isinstance(error, TimeoutError) else "failed")
                return
            self._counts.count("outgate_openings_total", "opened")
            self._took.add(self._clock() - started)
        if era == self._era:
            self._know((workload, source, name), mine, started + time_s)

    async def review(self) -> None:
        """Under a policy that is another by now: close what it does not admit, and cut its connections.

        Returns when that is done, or after a while; then it is tried until it is.
        """
        reviewing = self._begin_review()
        if self._link.is_up:
            await asyncio.wait({reviewing}, timeout=REVIEW_S)

    @property
    def is_stale(self) -> bool:
        """Not everything may be closed that should be."""
        return self._reviewing is not None and not self._reviewing.done()

    def close(self) -> None:
        """Review no further."""
        self._looking.cancel()
        if self._reviewing:
            self._reviewing.cancel()

    def _look(self) -> None:
        """A rule ends with its last day, and no other policy comes then: what it opened is closed all the same."""
        self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        if self._day != (today := self._today()):
            self._day = today
            self._begin_review()

    def _today(self) -> int:
        return int(self._wall() // _DAY_S)  # UTC, as `until` is

    def _begin_review(self) -> asyncio.Task[None]:
        self._forget()
        if self._reviewing:
            self._reviewing.cancel()
        self._reviewing = asyncio.create_task(self._review())
        return self._reviewing

    async def _review(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REVIEW_S):
                    await self._link.review(self._admits)
                return
            except NotOpened:
                await asyncio.sleep(RETRY_S)
            except TimeoutError:
                continue

    def _is_its(self, source: Address, workload: str) -> bool:
        """Whether who asked still has that address: an answer may come when the address is another's, and after what
        was open for it was reviewed."""
        return self._in_force.identify(source) == workload

    def _admits(self, claim: Claim) -> bool:
        element = claim.element
        return (
            self._is_its(element.source, claim.workload)
            and (_STAGES[element.protocol], element.port) in self._targets(claim.workload, claim.name)
            and self._carries(claim.workload, claim.name, _STAGES[element.protocol], element.address, element.port)
        )

    def _forget(self) -> None:
        self._known.clear()
        self._era += 1

    def _know(self, key: tuple[str, Address, Hostname], addresses: Sequence[Address], until: float) -> None:
        self._known.setdefault(key, {}).update(dict.fromkeys(addresses, until))
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    # --- what is opened ---

    def _wanted(
        self, workload: str, source: Address, name: Hostname, addresses: Sequence[Address]
    ) -> Iterator[Element]:
        if not self._is_its(source, workload):
            return
        for stage, port in self._targets(workload, name):
            for address in addresses:
                if self._carries(workload, name, stage, address, port):
                    yield Element(source, address, _PROTOCOLS[stage], port)

    def _targets(self, workload: str, name: Hostname) -> Collection[tuple[Stage, int]]:
        """Where a rule by this name stands, and bytes say nothing that has to be judged."""
        found = dict.fromkeys((rule.stage, port) for rule in self._rules(workload, name) for port in _ports(rule))
        return [(stage, port) for stage, port in found if self._is_opaque(workload, stage, port)]

    def _rules(self, workload: str, name: Hostname) -> Iterator[TransportRule]:
        index = self._in_force.policy.index.get(workload)
        if index is None or index.workload.mode is Mode.AUDIT:  # there the gate records what would be denied
            return
        if self._site and self._site.carries(name):
            return
        yield from index.tcp.names.get(name, ())
        yield from index.udp.names.get(name, ())

    def _is_opaque(self, workload: str, stage: Stage, port: int) -> bool:
        if stage is Stage.UDP:
            return port != _QUIC_PORT and port not in ELSEWHERE
        return expect(self._in_force.policy, workload, port) is Expect.OPAQUE

    def _carries(self, workload: str, name: Hostname, stage: Stage, address: Address, port: int) -> bool:
        """Whether the gate would, to this very address, without counting bytes."""
        attempt = Attempt(stage, workload, port=port, time=self._wall(), address=address, names=(name,))
        verdict = admit(self._in_force.decide(attempt), address)
        return verdict.is_allow and isinstance(verdict.rule, TransportRule) and not _is_relayed(verdict.rule)


def _ports(rule: TransportRule) -> Sequence[int]:
    """Those of a rule that can be opened."""
    if _is_relayed(rule) or sum(ports.last - ports.first + 1 for ports in rule.ports) > MAX_PORTS:
        return ()
    return [port for ports in rule.ports for port in range(ports.first, ports.last + 1)]


def _is_relayed(rule: TransportRule) -> bool:
    """Whether the gate has to see each datagram."""
    return rule.budget is not None or rule.quic is not None
