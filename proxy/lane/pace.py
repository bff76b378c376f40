"""How fast one request goes on: whether what is under way is still a transfer, and whether it lasts for ever. No clock.

A limit on silence alone is no limit: a byte just before it, again and again, holds two connections as long as it likes.
"""

from __future__ import annotations


class Pace:
    """Looked at now and then; a look costs the bytes nothing.

    least_rate  bytes a second, over every `window_s` in which a body was under way the whole time
    total_s     how long one request may last
    """

    __slots__ = ("_begun", "_least", "_moved", "_seen", "_since", "_total_s", "_window_s")

    def __init__(self, *, least_rate: int, window_s: float, total_s: float) -> None:
        self._least = max(1, least_rate * window_s)  # nothing at all is silence
        self._window_s = window_s
        self._total_s = total_s
        self._seen: object = None  # the request that was under way at the look before
        self._begun = 0.0  # when it was seen first
        self._since: float | None = None  # the window's begin
        self._moved = 0  # by then

    def look(self, now: float, request: object, moved: int | None) -> str:
        """What is wrong with `request`, in words; empty: nothing.

        moved  how many bytes of its body have gone on; None: nothing says that one is under way
        """
        if request is not self._seen:
            self._seen, self._begun, self._since = request, now, None
        if now - self._begun > self._total_s:
            return f"it is not over after {self._total_s:g} s"
        if moved is None:
            self._since = None
        elif self._since is None:
            self._since, self._moved = now, moved
        elif now - self._since >= self._window_s:
            if moved - self._moved < self._least:
                return f"{moved - self._moved} bytes of a body in {now - self._since:.0f} s are no transfer"
            self._since, self._moved = now, moved
        return ""
