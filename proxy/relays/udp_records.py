"""Decision records of datagrams: one for a session when it is over, one in some seconds for those denied alike.

It judges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from policies.model import Attempt, Reason, Verdict
from proxy.record import Peer, Record, Sink, new_id, record_of
from proxy.relays.stream import End

PERIOD_S = 10.0
MAX_KINDS = 1024  # a period; whoever sends everywhere must not fill the log, nor our memory

type _Kind = tuple[str, str, Peer | None, Reason]  # source address, workload, destination, reason


@dataclass(slots=True)
class _Told:
    """The last datagram of one kind, and how many came since they were told of."""

    attempt: Attempt
    verdict: Verdict
    source: Peer | None
    destination: Peer | None
    note: str
    datagrams: int = 0


@dataclass(slots=True, kw_only=True)
class Carried:
    """What passed in one session, as the workload sees it."""

    started: float  # POSIX seconds
    source: Peer
    destination: Peer | None
    upstream: Peer
    sent: int = 0
    received: int = 0
    datagrams_sent: int = 0
    datagrams_received: int = 0
    generation: str = ""  # of the policy that judged it last
    note: str = ""


class DatagramRecords:
    """Takes a verdict for each datagram that is denied. `flush` is called once in PERIOD_S, and at the end."""

    def __init__(self, record: Sink) -> None:
        self._record = record
        self._kinds: dict[_Kind, _Told] = {}

    def denied(self, attempt: Attempt, verdict: Verdict, source: Peer, destination: Peer | None, note: str) -> None:
        """One datagram. The first of its kind is recorded at once, those like it are counted."""
        kind: _Kind = (source[0], attempt.workload, destination, verdict.reason)
        told = self._kinds.get(kind)
        if told is None and len(self._kinds) >= MAX_KINDS:
            # All that comes beyond is one kind for each reason: workloads and reasons are few.
            kind = ("", attempt.workload, None, verdict.reason)
            told = self._kinds.get(kind)
        if not kind[0]:
            attempt = replace(attempt, address=None, host=None, names=(), port=0)
        counted = 0 if told is None else told.datagrams
        newest = _Told(attempt, verdict, source if kind[0] else None, kind[2], note, counted + 1)
        self._kinds[kind] = newest
        if told is None:
            self._tell(newest)

    def flush(self) -> None:
        """Tell what was counted, and forget who has gone."""
        for kind, told in list(self._kinds.items()):
            if told.datagrams:
                self._tell(told)
            else:
                del self._kinds[kind]

    def _tell(self, told: _Told) -> None:
        extra: Record = {"udp.datagrams": told.datagrams}
        if told.note:
            extra["error.message"] = told.note
        told.datagrams = 0
        self._record(
            record_of(
                told.attempt,
                told.verdict,
                id=new_id(),
                source=told.source,
                destination=told.destination,
                extra=extra,
            )
        )

    def ended(self, attempt: Attempt, verdict: Verdict, carried: Carried, how: End) -> None:
        """A session that was allowed is over."""
        extra: Record = {}
        if carried.generation:
            extra["policy.generation"] = carried.generation
        extra["upstream.address"], extra["upstream.port"] = carried.upstream
        extra["udp.datagrams.sent"] = carried.datagrams_sent
        extra["udp.datagrams.received"] = carried.datagrams_received
        if how is not End.CLOSED:
            extra["flow.end"] = how.value
        if carried.note:
            extra["error.message"] = carried.note
        self._record(
            record_of(
                attempt,
                verdict,
                id=new_id(),
                source=carried.source,
                destination=carried.destination,
                started=carried.started,
                bytes_sent=carried.sent,
                bytes_received=carried.received,
                extra=extra,
            )
        )
