"""What all connections of one lane share. A record of parts; it does nothing by itself."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass

from addons.judge import Judge
from addons.outcome import Outcome
from policies.model import Reason
from proxy.epoll import Epoll
from proxy.inspector.handover import Bounds, Handover
from proxy.lane.pool import Pool
from proxy.lane.tls import Sessions
from proxy.way_out import Exit


@dataclass(frozen=True, slots=True)
class Commons:
    """What an exchange may ask.

    exit    the way out, as flows take it
    trust   verifies origins
    pool    connections to origins that nobody uses now
    report  told how each request ended
    lost    told of a connection that ended before its first request
    later   calls something at the loop's next turn
    """

    epoll: Epoll
    exit: Exit
    judge: Judge
    bounds: Bounds
    trust: ssl.SSLContext
    sessions: Sessions
    pool: Pool
    report: Callable[[Outcome], None]
    lost: Callable[[Handover, Reason, str], None]
    later: Callable[[Callable[[], None]], object]
    is_leaving: Callable[[], bool]
