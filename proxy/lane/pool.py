"""Connections to origins that wait for another client of the same workload, where its rule says `upstreamPool: true`.

What one workload has opened no other is given: a connection is an observation (it is warm, so somebody asked), and what
an origin remembers of one belongs to whoever used it. `Upstream.is_clean` says which are fit to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from addons.judge import Judgement
from policies.model import HostRule
from proxy.epoll import Epoll

if TYPE_CHECKING:
    from proxy.lane.upstream import Upstream

REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS"})  # RFC 9110 9.2.2, of those that a browser repeats unasked
IDLE_S = 15.0  # many origins close after 60 s, some after 5: the longer it waits, the likelier it is gone when asked
MOST = 256  # descriptors
MOST_PER_ORIGIN = 32

# Whose it is, and for what: workload, name, port, and whether the name was verified, by the roots of this process.
type Key = tuple[str, str, int, bool]


class Pool:
    """Idle connections. `generation` says which policy judges now: rights from an earlier one open nothing here."""

    def __init__(self, epoll: Epoll, generation: Callable[[], str]) -> None:
        self._epoll = epoll
        self._generation = generation
        self._waiting: dict[Key, list[Parked]] = {}
        self._is_over = False
        self.size = 0

    def park(self, upstream: Upstream) -> None:
        """Keep it for another client, or close it."""
        waiting = self._waiting.setdefault(upstream.key, [])
        is_right = upstream.pooled_by == self._generation() and not self._is_over
        if is_right and upstream.is_clean and self.size < MOST and len(waiting) < MOST_PER_ORIGIN:
            waiting.append(Parked(self._epoll, upstream, self._forget))
            self.size += 1
            return
        if not waiting:
            del self._waiting[upstream.key]
        upstream.close()

    def find(self, judgement: Judgement) -> Upstream | None:
        """One that may carry a judged request without a body: that which waits for the shortest time. It may close at
        any moment, so only for what may be repeated (RFC 9110 9.2.2)."""
        attempt = judgement.attempt
        if attempt.method not in REPEATABLE or pooling_policy(judgement) is None:
            return None
        key = attempt.workload, attempt.host or "", attempt.port, not attempt.plain
        while waiting := self._waiting.get(key):
            upstream = waiting[-1].leave()
            if upstream.is_quiet and upstream.admits(judgement.verdict):
                return upstream
            upstream.close()
        return None

    def clear(self) -> None:
        """Close all: the rights that they were kept by may be gone."""
        for waiting in tuple(self._waiting.values()):
            for parked in tuple(waiting):
                parked.leave().close()

    def close(self) -> None:
        """Keep nothing any more."""
        self._is_over = True
        self.clear()

    def _forget(self, parked: Parked) -> None:
        key = parked.upstream.key
        waiting = self._waiting.get(key, [])
        if parked not in waiting:  # a fault kept it from coming here, and its deadline has passed
            return
        waiting.remove(parked)
        self.size -= 1
        if not waiting:
            del self._waiting[key]


def pooling_policy(judgement: Judgement) -> str | None:
    """The policy whose rule lets another client use the connection of this request; None: no rule does."""
    rule = judgement.verdict.rule
    return judgement.generation if isinstance(rule, HostRule) and rule.upstream_pool else None


class Parked:
    """One of them, until it is taken, its origin closes it or speaks unasked, or nobody has wanted it for long."""

    __slots__ = ("_epoll", "_left", "deadline", "upstream")

    def __init__(self, epoll: Epoll, upstream: Upstream, left: Callable[[Parked], None]) -> None:
        self._epoll = epoll
        self._left = left
        self.upstream = upstream
        self.deadline = epoll.now + IDLE_S
        epoll.watch(self)
        upstream.park(self.gone)

    def leave(self) -> Upstream:
        self._epoll.unwatch(self)
        self._left(self)
        self.upstream.park(None)
        return self.upstream

    def gone(self) -> None:
        """It was closed."""
        self.leave()

    def expired(self) -> None:
        self.leave().close()

    def failed(self, _error: Exception) -> None:
        self.upstream.close()
