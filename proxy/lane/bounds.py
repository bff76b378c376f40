"""What all connections of the lane may take together, and each source of that: places, and bytes that wait.

Nobody is refused while there is room. When it becomes scarce, those are refused who hold more than their part of it.
"""

from __future__ import annotations

LEAST_SHARE = 1 << 20  # a source that holds so little is never the reason for scarcity


class Share:
    """The bytes of one source, and its connections. Made by `Budget`."""

    __slots__ = ("_budget", "held", "places", "source")

    def __init__(self, budget: Budget, source: str) -> None:
        self._budget = budget
        self.source = source
        self.places = 0
        self.held = 0

    def add(self, size: int) -> None:
        """So many bytes more wait; negative: fewer."""
        self.held += size
        self._budget.held += size

    @property
    def is_exceeded(self) -> bool:
        """It should take nothing more now: memory is scarce, and it holds more than its part."""
        return self._budget.exceeds(self)


class Budget:
    """Places and memory of all.

    connections  places in all; `per_source` of one source
    memory       bytes that may wait. From half of it on no source may hold more than its equal part of all
    """

    def __init__(self, connections: int, per_source: int, memory: int) -> None:
        self._connections = connections
        self._per_source = per_source
        self._memory = memory
        self._shares: dict[str, Share] = {}
        self.places = 0
        self.held = 0

    def enter(self, source: str) -> Share | None:
        """A place for one connection of `source`; None: there is none."""
        share = self._shares.get(source)
        if self.places >= self._connections or (share is not None and share.places >= self._per_source):
            return None
        if share is None:
            share = self._shares[source] = Share(self, source)
        share.places += 1
        self.places += 1
        return share

    def leave(self, share: Share) -> None:
        share.places -= 1
        self.places -= 1
        if not share.places:
            del self._shares[share.source]

    def exceeds(self, share: Share) -> bool:
        if 2 * self.held < self._memory or share.held <= LEAST_SHARE:
            return self.held >= self._memory and share.held > 0
        return share.held * len(self._shares) >= self._memory // 2
