"""How often one source is answered: who asks without end takes the time of all others. It reads no question."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from policies.addresses import Address
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.original_dst import parse_address
from proxy.record import Peer, Sink
from proxy.relays.buckets import Buckets
from proxy.relays.ntp.records import PERIOD_S, PacketRecords

MAX_SOURCES = 4096  # remembered; beyond that the one heard of longest ago begins anew

_TOO_MANY = Verdict(Action.DENY, Reason.TOO_MANY_CONNECTIONS, Stage.DNS)


class Pace:
    """Lets a source ask `per_s` questions a second, twice as many at once; None: as many as it likes.

    Those beyond are counted in `dropped` and get no answer. Each source has one record of them a minute, the first at
    once: a record for each would be the next way to keep the gate from its work.
    """

    def __init__(
        self, per_s: int | None, workload: Callable[[Address], str], record: Sink, clock: Callable[[], float]
    ) -> None:
        self._buckets = Buckets(burst=2 * per_s, per_s=per_s, sources=MAX_SOURCES) if per_s is not None else None
        self._workload = workload
        self._records = PacketRecords(record, lambda packets, fault: {"dns.packets": packets})
        self._clock = clock
        self._telling: asyncio.TimerHandle | None = None
        self.dropped = 0

    def admits(self, source: Peer, destination: Peer) -> bool:
        """Whether a question that `source` sent to `destination` is to be read."""
        if self._buckets is None:
            return True
        address = parse_address(source[0])
        if self._buckets.take(address, self._clock()):
            return True
        self.dropped += 1
        attempt = Attempt(Stage.DNS, self._workload(address), port=destination[1], time=time.time())
        self._records.note(attempt, _TOO_MANY, source, destination)
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(PERIOD_S, self.tell)
        return False

    def tell(self) -> None:
        """Record what was counted."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._records.flush()
