"""One level-triggered epoll nested in asyncio, with coarse deadlines. It knows descriptors, not what they carry.

asyncio sees a single descriptor, readable while any of ours is ready: the data path costs no task, future or handle.
A crash in a callback closes the one connection it belongs to, is reported, and never ends the loop.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Callable
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLONESHOT, EPOLLOUT, EPOLLRDHUP
from typing import Protocol

IN, OUT, HUP, ERR, RDHUP, ONESHOT = EPOLLIN, EPOLLOUT, EPOLLHUP, EPOLLERR, EPOLLRDHUP, EPOLLONESHOT

BATCH = 256  # events taken at once
ROUNDS = 4  # polls before asyncio has its turn; each spares one turn of its loop
TICK_S = 0.1

type Ready = Callable[[int], None]
type Failed = Callable[[Exception], None]


class Timed(Protocol):
    """What has a deadline (monotonic seconds). To move it later, set it; to move it earlier, set it and watch again."""

    deadline: float

    def expired(self) -> None: ...

    def failed(self, error: Exception) -> None: ...


class Epoll:
    """Callbacks by descriptor and by deadline. Made and used on one asyncio loop.

    crashed  is told every exception a callback let out, after the callback's owner was (`failed`)
    """

    def __init__(self, crashed: Failed) -> None:
        self._crashed = crashed
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[Ready, Failed]] = {}
        self._removed: set[int] = set()  # in this batch; a descriptor number may be reused before its old event is seen
        self._bucket_of: dict[Timed, int] = {}
        self._buckets: dict[int, set[Timed]] = {}
        self._next_bucket = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._epoll.fileno(), self._dispatch)

    def close(self) -> None:
        """Watch nothing any more. The descriptors themselves belong to whoever added them."""
        if self._epoll.closed:
            return
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._watched.clear()
        self._bucket_of.clear()
        self._buckets.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def now(self) -> float:
        """The clock of deadlines, in seconds."""
        return time.monotonic()

    # --- descriptors ---

    def put(self, fd: int, events: int, ready: Ready, failed: Failed) -> None:
        """Call `ready` with the events of `fd`: those asked for, ERR and HUP. `failed` is told when that crashes.

        A descriptor that is watched already gets the new callback.
        """
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = ready, failed

    def change(self, fd: int, events: int) -> None:
        """Wait for other events on `fd`, or again for one-shot ones."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`, which must still be open. Nothing happens if it is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._removed.add(fd)
            self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """Forget `fd`, which is about to be closed for good: the kernel drops it by itself."""
        if self._watched.pop(fd, None) is not None:
            self._removed.add(fd)

    def _dispatch(self) -> None:
        for _ in range(ROUNDS):
            batch = self._epoll.poll(0, BATCH)
            if not batch:
                return
            self._removed.clear()
            for fd, events in batch:
                entry = self._watched.get(fd)
                if entry is None or fd in self._removed:
                    continue
                try:
                    entry[0](events)
                except Exception as error:
                    self.contain(entry[1], error)
                    self._drop(fd, entry)
            if self._epoll.closed:
                return

    def _drop(self, fd: int, entry: tuple[Ready, Failed]) -> None:
        """Forget what crashed, in case its owner did not: a level-triggered event would call it for ever."""
        if self._watched.get(fd) is entry:
            try:
                self.remove(fd)
            except OSError:  # closed already
                pass

    def contain(self, failed: Failed, error: Exception) -> None:
        """Tell the owner of a callback that it crashed, and whoever reports crashes."""
        try:
            failed(error)
        except Exception as second:
            self._crashed(second)
        self._crashed(error)

    # --- deadlines ---

    def watch(self, who: Timed) -> None:
        """Call `who.expired()` once, within a tick after `who.deadline`."""
        if not self._bucket_of:
            self._next_bucket = int(self.now / TICK_S)
            if self._timer is None:
                self._timer = self._loop.call_later(TICK_S, self._tick)
        else:
            self.unwatch(who)
        self._file(who)

    def unwatch(self, who: Timed) -> None:
        """`who` has no deadline any more. Nothing happens if it had none."""
        number = self._bucket_of.pop(who, None)
        if number is not None and (bucket := self._buckets.get(number)) is not None:
            bucket.discard(who)
            if not bucket:
                del self._buckets[number]

    def _file(self, who: Timed) -> None:
        number = max(int(who.deadline / TICK_S) + 1, self._next_bucket)
        self._bucket_of[who] = number
        self._buckets.setdefault(number, set()).add(who)

    def _tick(self) -> None:
        now = self.now
        last = int(now / TICK_S)
        for number in range(self._next_bucket, last + 1):
            self._next_bucket = number + 1
            for who in self._buckets.pop(number, ()):
                if self._bucket_of.get(who) != number:
                    continue  # unwatched by one that expired before it
                if who.deadline > now:
                    self._file(who)
                    continue
                del self._bucket_of[who]
                try:
                    who.expired()
                except Exception as error:
                    self.contain(who.failed, error)
        self._timer = self._loop.call_later(TICK_S, self._tick) if self._bucket_of else None
