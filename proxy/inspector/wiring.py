"""The parts of the inspector put together from its configuration: policy, leaves, resolver, addons, core."""

from __future__ import annotations

import re
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
from policies.index import Policy
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.dialer import interleave
from proxy.hosts import HostsEntry
from proxy.inspector.core import Core
from proxy.inspector.handover import Configuration, Handover
from proxy.policy_files import load_sources
from proxy.record import Record, Sink, hide_query_values, new_id, record_of
from proxy.resolver import NameNotFound, Resolution, Resolver, ResolverFailed

MAX_URL = 8192  # characters of a URL in a record; a request head may have 64 KiB
_RAW = re.compile(r"[^\x21-\x7e]")  # refused, and recorded: 0x9B begins an escape sequence on the reader's terminal

_UNTRUSTED = "the client does not trust this gate's CA: give it the trust bundle, or start it with outgate run"


def wire(configuration: Configuration, record: Sink, failed: Callable[[Exception], None]) -> Core:
    """A core that serves by `configuration`. Raises what is wrong with it: PolicyError, ValueError, OSError."""
    policy = load_sources(configuration.sources, tags=configuration.tags)
    judge = Judge(partial(decide, policy), now=time.time, new_id=new_id)
    conversations: dict[str, Conversation] = {}

    def conversation_of(client: Client) -> Conversation:
        return conversations[client.id]

    def report(outcome: Outcome) -> None:
        record(_record_of(policy, outcome))

    def refuse(conversation: Conversation, note: str, status: int, fault: Reason) -> bytes:
        judgement = judge.unreadable(conversation, note, status=status, fault=fault)
        report(Outcome(judgement, conversation, time.time(), status=status))
        return answer(judgement, closes=True).to_bytes()

    def lost(handover: Handover, reason: Reason, what: str) -> None:
        record(_record_of_lost(handover, reason, what))

    upstream = Upstream(
        partial(_resolve, _resolver(configuration)),
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


async def _resolve(resolver: Resolver, name: Hostname) -> Resolution:
    try:
        found = await resolver.resolve(name)
    except NameNotFound as error:
        raise Unreachable(Reason.NAME_NOT_FOUND, str(error)) from error
    except ResolverFailed as error:
        raise Unreachable(Reason.RESOLVER_FAILED, str(error)) from error
    return replace(found, addresses=tuple(interleave(found.addresses)))


def _record_of(policy: Policy, outcome: Outcome) -> Record:
    attempt = outcome.judgement.attempt
    workload = policy.workloads.get(attempt.workload)
    extra: Record = {}
    if outcome.upstream:
        extra["upstream.address"], extra["upstream.port"] = outcome.upstream
    return record_of(
        attempt,
        outcome.judgement.verdict,
        id=outcome.judgement.id,
        source=outcome.conversation.source,
        destination=outcome.conversation.destination,
        started=outcome.started,
        bytes_sent=outcome.bytes_sent,
        bytes_received=outcome.bytes_received,
        status=outcome.status,
        url=_url(attempt, log_query=workload is not None and workload.log_query),
        extra=extra,
    )


def _url(attempt: Attempt, *, log_query: bool) -> str | None:
    """None for a request that names no host, or a target that is no path."""
    if attempt.host is None or not attempt.target.startswith("/"):
        return None
    usual = 80 if attempt.plain else 443
    port = "" if attempt.port == usual else f":{attempt.port}"
    target = _RAW.sub(lambda found: f"\\x{ord(found.group()):02x}", attempt.target[:MAX_URL])
    url = f"{'http' if attempt.plain else 'https'}://{attempt.host}{port}{target}"
    return url if log_query else hide_query_values(url)


def _record_of_lost(handover: Handover, reason: Reason, what: str) -> Record:
    """The record of a connection that ended before its first request."""
    stage = Stage.HTTP if handover.plain else Stage.TLS
    attempt = Attempt(stage, handover.workload, handover.host, handover.port, plain=handover.plain, fault=reason)
    extra: Record = {"error.message": what} if what else {}
    if reason is Reason.CLIENT_CERTIFICATE_REFUSED:
        extra["hint"] = _UNTRUSTED
    return record_of(
        attempt,
        Verdict(Action.DENY, reason, stage),
        id=handover.id,
        source=handover.source,
        destination=handover.destination,
        started=handover.opened,
        extra=extra,
    )
