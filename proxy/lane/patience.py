"""How long one connection may take: a limit on the step under way, and looks at whether it goes on. It ends nothing."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from proxy.epoll import Epoll

LOOK_S = 10.0  # between two looks at whether anything moves: a move itself costs one assignment


class Patience:
    """Watches from `limit` or `watch` on, until `stop`.

    late  the step under way has reached its limit
    idle  nothing has moved for `idle_s`
    look  asked now and then while something moves, with the time
    """

    __slots__ = ("_due", "_epoll", "_every", "_idle", "_idle_s", "_is_watched", "_late", "_look", "active",
                 "deadline", "failed")  # fmt: skip

    def __init__(
        self,
        epoll: Epoll,
        idle_s: float,
        *,
        late: Callable[[], None],
        idle: Callable[[], None],
        look: Callable[[float], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._epoll = epoll
        self._idle_s = idle_s
        self._every = min(LOOK_S, idle_s)
        self._late = late
        self._idle = idle
        self._look = look
        self._due = inf
        self._is_watched = False
        self.failed = failed
        self.active = epoll.now  # when something moved; whoever sees it says so
        self.deadline = inf

    def limit(self, seconds: float) -> None:
        """The step that begins now must have ended by then."""
        self._due = self.deadline = self._epoll.now + seconds
        self._is_watched = True
        self._epoll.watch(self)

    def watch(self) -> None:
        """The step that begins now may last, as long as anything moves."""
        self._due = inf
        if not self._is_watched or self.deadline - self.active > self._every:
            self._look_again()

    def _look_again(self) -> None:
        self.deadline = min(self._due, self._epoll.now + self._every)
        self._is_watched = True
        self._epoll.watch(self)

    def stop(self) -> None:
        self._is_watched = False
        self._due = inf
        self._epoll.unwatch(self)

    def expired(self) -> None:
        now = self._epoll.now
        self._look_again()  # unless what follows ends it
        if now >= self._due:
            self._due = inf
            self._late()
        elif now - self.active > self._idle_s:
            self._idle()
        else:
            self._look(now)
