"""Decision records of what the inspector saw: a request that ended, a connection that ended before its first one."""

from __future__ import annotations

import re

from addons.judge import BAD_GATEWAY
from addons.outcome import Outcome
from policies.index import Policy
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.inspector.handover import Handover
from proxy.record import Record, hide_query_values, record_of, repeat_record

MAX_URL = 8192  # characters of a URL in a record; a request head may have 64 KiB
_RAW = re.compile(r"[^\x21-\x7e]")  # refused, and recorded: 0x9B begins an escape sequence on the reader's terminal

_UNTRUSTED = "the client does not trust this gate's CA: give it the trust bundle, or start it with outgate run"


def record_of_outcome(policy: Policy, outcome: Outcome) -> Record:
    """The record of one request that was judged."""
    judgement, conversation = outcome.judgement, outcome.conversation
    precedent = judgement.precedent
    if precedent is None or precedent.verdict is not judgement.verdict:  # it broke off, or failed
        return _write_record(policy, outcome)
    circumstances = (id(policy), judgement.generation, conversation.destination, conversation.user, outcome.upstream,
                     outcome.status)  # fmt: skip
    if precedent.circumstances == circumstances:
        return repeat_record(
            precedent.recorded,
            id=judgement.id,
            source=conversation.source,
            started=outcome.started,
            bytes_sent=outcome.bytes_sent,
            bytes_received=outcome.bytes_received,
        )
    record = _write_record(policy, outcome)
    precedent.circumstances, precedent.recorded = circumstances, record.copy()
    return record


def _write_record(policy: Policy, outcome: Outcome) -> Record:
    attempt = outcome.judgement.attempt
    workload = policy.workloads.get(attempt.workload)
    extra: Record = {}
    if outcome.judgement.generation:
        extra["policy.generation"] = outcome.judgement.generation
    if outcome.conversation.user is not None:
        extra["user.name"] = outcome.conversation.user
    if outcome.upstream:
        extra["upstream.address"], extra["upstream.port"] = outcome.upstream
    if outcome.judgement.status == BAD_GATEWAY and outcome.judgement.note:
        extra["error.message"] = outcome.judgement.note
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


def record_of_lost(handover: Handover, reason: Reason, what: str) -> Record:
    """The record of a connection that ended before its first request."""
    stage = Stage.HTTP if handover.plain else Stage.TLS
    attempt = Attempt(stage, handover.workload, handover.host, handover.port, plain=handover.plain, fault=reason)
    extra: Record = {"error.message": what} if what else {}
    if handover.user is not None:
        extra["user.name"] = handover.user
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
