"""Answers that were given a moment ago, for the same question of the same source. It judges nothing and asks nobody.

Programs ask the same again and again. Within one second of the clock, under one policy, neither the verdict nor the
answer of a name changes: only the id, the port and the time do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.record import Peer, Record
from proxy.wire.dns import MIN_UDP

MAX_KNOWN = 4096  # questions; they are all forgotten with the second

type Standing = tuple[object, object]
type _Key = tuple[str, Peer, bytes]


@dataclass(frozen=True, slots=True)
class Repeat:
    """An answer, to be sent again behind the id of a question, and its record, of which time, id and port differ.

    ttl_s      of the answer, which holds until `expires`
    is_lookup  the resolver's memory gave it
    """

    workload: str
    answer: bytes
    record: Record
    ttl_s: int
    expires: float
    is_lookup: bool


class Repeats:
    """Those of this second.

    standing  two things that are the very same while the same attempt gets the same verdict
    """

    def __init__(self, standing: Callable[[], Standing]) -> None:
        self._standing = standing
        self._stood: Standing = (None, None)
        self._second = 0
        self._known: dict[_Key, Repeat] = {}

    def find(self, message: bytes, source: Peer, destination: Peer, second: int) -> Repeat | None:
        """What is to be said again to `message`, asked now."""
        return self._known.get((source[0], destination, message[2:])) if self._is_current(second) else None

    def keep(
        self, message: bytes, source: Peer, destination: Peer, second: int, standing: Standing, repeat: Repeat
    ) -> None:
        """Remember what was said to `message`, judged in `second` and by what stood then, if that is now still; and if
        every client could take it in a datagram."""
        if not (self._is_current(second) and _are_same(standing, self._stood)):
            return
        if len(self._known) < MAX_KNOWN and len(repeat.answer) <= MIN_UDP - 2:
            self._known[source[0], destination, message[2:]] = repeat

    def _is_current(self, second: int) -> bool:
        standing = self._standing()
        if second == self._second and _are_same(standing, self._stood):
            return True
        self._known.clear()
        self._stood, self._second = standing, second
        return False


def _are_same(one: Standing, other: Standing) -> bool:
    return one[0] is other[0] and one[1] is other[1]
