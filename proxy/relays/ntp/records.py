"""Decision records of packets, so that a flood does not fill the log: one for each source, verdict and minute.

The first packet of a kind is recorded at once; those like it that follow are counted, and told once a minute. It judges
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from policies.model import Action, Attempt, Reason, Verdict
from proxy.record import Peer, Record, Sink, new_id, record_of

PERIOD_S = 60.0
MAX_KINDS = 1024  # a minute; whoever forges sources must not fill the log, nor our memory

type _Kind = tuple[str, str, Action, Reason, str]  # source address, workload, verdict, fault


@dataclass(slots=True)
class _Told:
    """The last packet of one kind, and how many came since they were told of."""

    attempt: Attempt
    verdict: Verdict
    source: Peer | None
    destination: Peer
    fault: str
    packets: int = 0


class PacketRecords:
    """Takes a verdict for each packet. `flush` is called once in PERIOD_S, and at the end.

    fields  what a record has besides, of how many packets it stands for and what was wrong with them
    """

    def __init__(self, record: Sink, fields: Callable[[int, str], Record] | None = None) -> None:
        self._record = record
        self._fields = fields or _ntp_fields
        self._kinds: dict[_Kind, _Told] = {}

    def note(self, attempt: Attempt, verdict: Verdict, source: Peer, destination: Peer, fault: str = "") -> None:
        """One packet. `fault` says what was wrong with it, in words of which there are few."""
        kind = (source[0], attempt.workload, verdict.action, verdict.reason, fault)
        told = self._kinds.get(kind)
        if told is None and len(self._kinds) >= MAX_KINDS:
            # All that comes beyond is one kind for each verdict: workloads, reasons and faults are few.
            kind = ("", *kind[1:])
            told = self._kinds.get(kind)
        packets = 0 if told is None else told.packets
        newest = _Told(attempt, verdict, source if kind[0] else None, destination, fault, packets + 1)
        self._kinds[kind] = newest
        if told is None:
            self._tell(newest)

    def flush(self) -> None:
        """Tell what was counted, and forget who has gone."""
        for kind, told in list(self._kinds.items()):
            if told.packets:
                self._tell(told)
            else:
                del self._kinds[kind]

    def _tell(self, told: _Told) -> None:
        extra = self._fields(told.packets, told.fault)
        told.packets = 0
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


def _ntp_fields(packets: int, fault: str) -> Record:
    fields: Record = {"ntp.packets": packets}
    if fault:
        fields["ntp.fault"] = fault
    return fields
