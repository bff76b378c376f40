"""How much one source takes: a token bucket for each, and counts. It knows no sockets and reads no clock."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from ipaddress import IPv6Address

from policies.addresses import Address


class Buckets:
    """A token bucket for each source, the least recently used forgotten first. IPv6 sources count by /64: that is one
    machine's to use.

    burst    tokens of a full one; `per_s` come each second
    sources  that are remembered
    """

    def __init__(self, *, burst: int, per_s: float, sources: int) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._sources = sources
        self._known: OrderedDict[int, tuple[float, float]] = OrderedDict()  # tokens, and when that was

    def __len__(self) -> int:
        return len(self._known)

    def take(self, address: Address, now_s: float) -> bool:
        """Whether there is a token for one more packet."""
        key = int(address) >> 64 << 64 if isinstance(address, IPv6Address) else int(address)
        tokens, since_s = self._known.get(key, (self._burst, now_s))
        tokens = min(self._burst, tokens + (now_s - since_s) * self._per_s)
        is_left = tokens >= 1
        self._known[key] = (tokens - 1 if is_left else tokens, now_s)
        self._known.move_to_end(key)
        if len(self._known) > self._sources:
            self._known.popitem(last=False)
        return is_left


def release[T: Hashable](counts: Counter[T], whose: T) -> None:
    """One less; who has none is forgotten, or every source that ever came would stay in memory."""
    counts[whose] -= 1
    if counts[whose] <= 0:
        del counts[whose]
