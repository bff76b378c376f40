"""The parts of the inspector put together from its configuration: policy, leaves, resolver, addons, core."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address

from mitmproxy.connection import Client

from addons.answers import Answer, answer
from addons.gate import Gate
from addons.judge import BAD_REQUEST, Conversation, Judge, Unreachable
from addons.outcome import Outcome
from addons.record import Recorder
from addons.upstream import Upstream, trust_origins
from pki.issuers import read_issuers
from pki.leaves import HTTP_2, Leaves
from policies.hostnames import Hostname
from policies.index import Policy
from policies.model import Address, Reason
from proxy.addon_files import load_addons
from proxy.config import UpstreamProxy
from proxy.dialer import interleave
from proxy.hosts import HostsEntry
from proxy.identity import Pods
from proxy.inspector.core import Core
from proxy.inspector.handover import Configuration, Handover
from proxy.inspector.minting import Minting
from proxy.inspector.outcome import record_of_lost, record_of_outcome
from proxy.inspector.user_addons import UserAddons
from proxy.metrics.meter import Counts
from proxy.original_dst import parse_address
from proxy.own_doors import OwnDoors
from proxy.policy_in_force import PolicyInForce
from proxy.record import Sink, new_id
from proxy.resolver import NameNotFound, Resolution, Resolver, ResolverFailed
from proxy.upstream_proxy import SiteProxy, parse_direct


class Bench(PolicyInForce):
    """Where every request of this process is judged."""

    def __init__(self, policy: Policy, workload: str | None, pods: Pods | None) -> None:
        super().__init__(policy, workload, pods)
        self.judge = Judge(self.decide, now=time.time, new_id=new_id, identify=self._identify)
        self.swap(policy)

    def swap(self, policy: Policy) -> None:
        """Judge the next request by `policy`, also on connections that are open."""
        self.policy = policy
        self.judge.generation = policy.generation

    def _identify(self, conversation: Conversation) -> str:
        return self.identify(parse_address(conversation.source[0]), conversation.user)


@dataclass(frozen=True, slots=True)
class Wired:
    core: Core
    bench: Bench
    leaves: Leaves
    resolver: Resolver

    def sign_by(self, issuing: str) -> None:
        """Show leaves of these issuing CAs from now on. Raises what is wrong with the text: ValueError and others."""
        self.leaves.replace(read_issuers(issuing))


def wire(
    configuration: Configuration,
    policy: Policy,
    record: Sink,
    failed: Callable[[Exception], None],
    counts: Counts | None = None,
    *,
    pods: Pods | None = None,
) -> Wired:
    """What serves by `configuration` and `policy`. Raises what is wrong with them: ValueError, OSError, AddonUnusable.

    counts  told of lookups and dials
    pods    of the cluster that the gate watches
    """
    counts = counts or Counts()
    bench = Bench(policy, configuration.workload, pods)
    judge = bench.judge
    conversations: dict[str, Conversation] = {}

    def conversation_of(client: Client) -> Conversation:
        return conversations[client.id]

    def report(outcome: Outcome) -> None:
        record(record_of_outcome(bench.policy, outcome))

    def refuse(conversation: Conversation, note: str, status: int | None, fault: Reason) -> Answer:
        judgement = judge.unreadable(conversation, note, status=status or BAD_REQUEST, fault=fault)
        report(Outcome(judgement, conversation, time.time(), status=status))
        return answer(judgement, closes=True)

    def lost(handover: Handover, reason: Reason, what: str) -> None:
        record(record_of_lost(handover, reason, what))

    resolver = _resolver(configuration, counts)
    is_own = OwnDoors(configuration.own_doors).holds
    site = _site_proxy(configuration, resolver, is_own)
    upstream = Upstream(
        partial(resolve_for_dial, resolver),
        trust_origins(configuration.upstream_ca),
        conversation_of,
        dial_s=configuration.bounds.dial_s,
        site=site,
        is_own=is_own,
        dialled=counts.dialled,
        trust_http2=partial(trust_origins, configuration.upstream_ca, HTTP_2),
    )
    leaves = Leaves(read_issuers(configuration.issuing), partial(datetime.now, UTC))
    gate = Gate(judge, conversation_of, site=site)
    own = load_addons(configuration.addons)
    theirs = [UserAddons(own, gate, configuration.bounds.waiting, failed)] if own else []
    core = Core(
        (gate, Recorder(report, conversation_of), *theirs),
        upstream,
        conversations,
        configuration.bounds,
        context_of=Minting(leaves, patience_s=configuration.bounds.handshake_s).context,
        opening=judge.opening,
        refuse=refuse,
        lost=lost,
        failed=failed,
    )
    return Wired(core, bench, leaves, resolver)


def _resolver(configuration: Configuration, counts: Counts) -> Resolver:
    hosts = {name: HostsEntry(tuple(map(ip_address, texts)), port) for name, texts, port in configuration.hosts}
    system = {name: tuple(map(ip_address, texts)) for name, texts in configuration.system_hosts}
    return Resolver(
        hosts,
        configuration.nameservers,
        forward=dict(configuration.forward),
        system_hosts=system,
        told=counts.looked_up,
    )


def _site_proxy(
    configuration: Configuration, resolver: Resolver, is_own: Callable[[Address, int], bool]
) -> SiteProxy | None:
    if configuration.upstream_proxy is None:
        return None
    host, port, credentials, direct = configuration.upstream_proxy
    config = UpstreamProxy(host, port, credentials, tuple(map(parse_direct, direct)))
    return SiteProxy(config, {name for name, _, _ in configuration.hosts}, resolver, is_own=is_own)


async def resolve_for_dial(resolver: Resolver, name: Hostname) -> Resolution:
    """The addresses of `name` in the order to dial them. Raises Unreachable."""
    try:
        found = await resolver.resolve(name)
    except NameNotFound as error:
        raise Unreachable(Reason.NAME_NOT_FOUND, str(error)) from error
    except ResolverFailed as error:
        raise Unreachable(Reason.RESOLVER_FAILED, str(error)) from error
    return replace(found, addresses=tuple(interleave(found.addresses)))
