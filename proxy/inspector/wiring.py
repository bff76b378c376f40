"""The parts of the inspector put together from its configuration: policy, leaves, resolver, addons, core."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates
from mitmproxy.connection import Client

from addons.answers import answer
from addons.gate import Gate
from addons.judge import Conversation, Judge, Unreachable
from addons.record import Outcome, Recorder
from addons.upstream import Upstream, trust_origins
from pki.authority import Issuing
from pki.leaves import tls_leaves
from policies.engine import decide
from policies.hostnames import Hostname
from policies.model import Reason
from proxy.dialer import interleave
from proxy.hosts import HostsEntry
from proxy.inspector.core import Core
from proxy.inspector.handover import Configuration, Handover
from proxy.inspector.outcome import record_of_lost, record_of_outcome
from proxy.policy_files import load_sources
from proxy.record import Sink, new_id
from proxy.resolver import NameNotFound, Resolution, Resolver, ResolverFailed


def wire(configuration: Configuration, record: Sink, failed: Callable[[Exception], None]) -> Core:
    """A core that serves by `configuration`. Raises what is wrong with it: PolicyError, ValueError, OSError."""
    policy = load_sources(configuration.sources, tags=configuration.tags)
    judge = Judge(partial(decide, policy), now=time.time, new_id=new_id)
    conversations: dict[str, Conversation] = {}

    def conversation_of(client: Client) -> Conversation:
        return conversations[client.id]

    def report(outcome: Outcome) -> None:
        record(record_of_outcome(policy, outcome))

    def refuse(conversation: Conversation, note: str, status: int, fault: Reason) -> bytes:
        judgement = judge.unreadable(conversation, note, status=status, fault=fault)
        report(Outcome(judgement, conversation, time.time(), status=status))
        return answer(judgement, closes=True).to_bytes()

    def lost(handover: Handover, reason: Reason, what: str) -> None:
        record(record_of_lost(handover, reason, what))

    upstream = Upstream(
        partial(resolve_for_dial, _resolver(configuration)),
        trust_origins(configuration.upstream_ca),
        conversation_of,
        dial_s=configuration.bounds.dial_s,
    )
    leaves = tls_leaves(_read_issuing(configuration.issuing.encode()), lambda: datetime.now(UTC))
    return Core(
        (Gate(judge, conversation_of), Recorder(report, conversation_of)),
        upstream,
        conversations,
        configuration.bounds,
        context_of=leaves.context,
        refuse=refuse,
        lost=lost,
        failed=failed,
    )


def _read_issuing(pem: bytes) -> Issuing:
    key = load_pem_private_key(pem, None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("the issuing CA's key is not an EC key")
    chain = load_pem_x509_certificates(pem)
    return Issuing(chain[0], key, tuple(chain))


def _resolver(configuration: Configuration) -> Resolver:
    hosts = {name: HostsEntry(tuple(map(ip_address, texts)), port) for name, texts, port in configuration.hosts}
    system = {name: tuple(map(ip_address, texts)) for name, texts in configuration.system_hosts}
    return Resolver(hosts, configuration.nameservers, system_hosts=system)


async def resolve_for_dial(resolver: Resolver, name: Hostname) -> Resolution:
    """The addresses of `name` in the order to dial them. Raises Unreachable."""
    try:
        found = await resolver.resolve(name)
    except NameNotFound as error:
        raise Unreachable(Reason.NAME_NOT_FOUND, str(error)) from error
    except ResolverFailed as error:
        raise Unreachable(Reason.RESOLVER_FAILED, str(error)) from error
    return replace(found, addresses=tuple(interleave(found.addresses)))
