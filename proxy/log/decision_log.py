"""Writes decision records. It never holds a caller up, and says when it cannot write; it does not know what they mean.

Records are queued and written by one thread, in batches. The queue is bounded: while the disk or the reader of a pipe
stalls, further records are counted, and the count is the first line once there is room: a gap in the log is in the log.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Any

from proxy.log.lines import Render, renderer
from proxy.log.target import Target, Turns
from proxy.record import Record

QUEUE_LIMIT = 65536  # records: a log that stalls must not grow our memory
LONG = 512  # characters of a URL that take as much memory as the rest of its record
BATCH = 512
GATHER_S = 0.02
RETRY_S = 0.5
STALL_S = 1.0
HANG_S = 3.0  # of one write: a pipe nobody reads, a file system that is gone; what is queued is recorded nowhere yet
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Records cannot be written: where and why, and since when (POSIX seconds)."""

    text: str
    since: float


class DecisionLog:
    """A sink for records, called from one thread and backed by another. `close()` writes what is queued and joins it.

    generation  what `policy.generation` says in a record that does not say it itself; may be set at any time
    failure     None while records can be written. What fails is tried again twice a second, and only a full queue loses
    written, lost_total  records
    failures    how often `failure` began
    changed     called with whether the log fails from now on, on whichever thread found it out: it may only hand that
                on, as `loop.call_soon_threadsafe` does
    """

    def __init__(
        self, target: Target, render: Render, *, generation: str = "", changed: Callable[[bool], object] | None = None
    ) -> None:
        self.generation = generation
        self.failure: Failure | None = None
        self.written = self.lost_total = self.failures = 0
        self._target = target
        self._render = render
        self._changed = changed
        self._queue: deque[Record] = deque()
        self._entered = self._left = 0  # sizes that went into the queue and out of it: each has one thread that counts
        self._batch = bytearray()
        self._trouble = threading.RLock()  # over the fields below; a log that works takes it never
        self._lost, self._lost_since = 0, 0.0
        self._full_since: float | None = None
        self._is_stalled = False
        self._began = inf  # the write under way, by the monotonic clock
        self._error = ""
        self._is_closing = self._is_reopening = False
        self._wake, self._asked = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    @property
    def is_failing(self) -> bool:
        return self.failure is not None

    def __call__(self, record: Record) -> None:
        if self.generation and "policy.generation" not in record:
            record["policy.generation"] = self.generation
        size = _size(record)
        if self._entered - self._left + size > QUEUE_LIMIT:
            self._lose()
            return
        self._entered += size
        self._queue.append(record)
        if not self._wake.is_set():
            self._wake.set()
        elif time.monotonic() - self._began > HANG_S and not self._is_stalled:
            self._stall()

    def reopen(self) -> None:
        """Follow the path of the log after its file was moved away. While that fails, the old file is written to."""
        self._is_reopening = True
        self._ask()

    def close(self) -> None:
        """Write what is queued, then stop. Waits at most CLOSE_S for a log that stalls; what is left counts as lost."""
        self._is_closing = True
        self._ask()
        self._thread.join(timeout=CLOSE_S)
        self.lost_total += len(self._queue) + self._batch.count(b"\n") + self._target.is_torn
        if not self._thread.is_alive():
            with suppress(OSError):  # nobody is left to be told
                self._target.close()

    def _ask(self) -> None:
        self._asked.set()
        self._wake.set()

    def _lose(self) -> None:
        now = time.monotonic()
        with self._trouble:
            if not self._lost:
                self._lost_since = time.time()
            self._lost += 1
            self.lost_total += 1
            if self._full_since is None:
                self._full_since = now
            elif not self._is_stalled and now - self._full_since > STALL_S:
                self._stall()

    def _stall(self) -> None:
        with self._trouble:
            self._is_stalled = True
            self._settle()

    # The writing thread

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # a fault of ours ends the writing: nobody may go on as if records were written
            self._note(error)
            raise

    def _write(self) -> None:
        while True:
            is_last = self._is_closing  # read before the queue: what was queued before `close` is written
            unopened = _error_of(self._follow) if self._is_reopening else None
            unwritten = _error_of(self._append)
            self._note(unwritten or unopened)
            if (self._queue or self._lost) and not unwritten:
                continue
            if is_last:
                return
            self._rest(is_failing=bool(unwritten or unopened))

    def _rest(self, *, is_failing: bool) -> None:
        """Until there is something to do. `close` and `reopen` cut it short."""
        if is_failing:
            self._asked.wait(RETRY_S)
        else:
            self._wake.wait()
            self._asked.wait(GATHER_S)  # a thread woken for each record would cost more than the record
        self._asked.clear()  # before the flags and the queue are read: what this wipes out is seen there
        self._wake.clear()

    def _follow(self) -> None:
        self._is_reopening = False  # before it is done: another call of `reopen` meanwhile is another move
        try:
            self._target.reopen()
        except OSError:
            self._is_reopening = True
            raise

    def _append(self) -> None:
        """Write one batch, after the count of what was lost before it. What is left of it is kept for the next time."""
        batch, lost, now = self._batch, self._lost, time.time()
        if not batch:
            self._fill(batch)
        count = batch.count(b"\n")
        gap = self._render_gap(lost, now) if lost else b""
        batch[:0] = gap
        self._began = time.monotonic()
        try:
            self._target.append(batch)
        finally:
            self._began = inf
            if gap and batch.startswith(gap):
                del batch[: len(gap)]
            elif gap:
                with self._trouble:
                    self._lost -= lost
                    self._lost_since = now
            self.written += count - batch.count(b"\n")

    def _fill(self, batch: bytearray) -> None:
        """One growing array: a list of what orjson returns takes three times as long."""
        for _ in range(min(len(self._queue), BATCH)):
            record = self._queue.popleft()
            self._left += _size(record)
            batch += self._render(record)

    def _render_gap(self, lost: int, now: float) -> bytes:
        since = _rfc3339(self._lost_since)
        return self._render({"time": _rfc3339(now), "event": "records_lost", "count": lost, "since": since})

    def _note(self, error: Exception | None) -> None:
        """Whether the log works, as far as the writing thread can see."""
        if error is None and self.failure is None and self._full_since is None:
            return
        with self._trouble:
            if self._entered - self._left <= QUEUE_LIMIT // 2:
                self._full_since, self._is_stalled = None, False
            self._error = _say(error) if error else ""
            self._settle()

    def _settle(self) -> None:
        stalled = "nothing is taken: whatever reads or keeps it has stalled" if self._is_stalled else ""
        was, text = self.failure, self._error or stalled
        self.failure = Failure(f"{self._target}: {text}", was.since if was else time.time()) if text else None
        if (was is None) is (self.failure is None):
            return
        self.failures += was is None
        if self._changed:
            with suppress(RuntimeError):  # the loop that would be told is closed by now
                self._changed(self.is_failing)


def _error_of(act: Callable[[], None]) -> OSError | None:
    try:
        act()
    except OSError as error:
        return error
    return None


def _size(record: Mapping[str, Any]) -> int:  # Any: fields of several types
    """In records of ordinary length: a client chooses how long a URL is."""
    return 1 + len(record.get("url.full", "")) // LONG


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _say(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or repr(error)


def open_log(
    target: str | None,
    *,
    generation: str = "",
    turns: int | None = None,
    changed: Callable[[bool], object] | None = None,
) -> DecisionLog:
    """The log at `target`: a path (appended to), `-` for standard error, None for standard output.

    `turns` is what `share_turns` made, where several processes write to it; `changed` is DecisionLog's. Raises OSError
    when the file cannot be opened. Readable lines where it is a terminal, JSON lines elsewhere.
    """
    opened = Target(target, Turns(turns))
    terminal = opened.is_terminal
    render = renderer(pretty=terminal, colour=terminal and not os.environ.get("NO_COLOR"))
    return DecisionLog(opened, render, generation=generation, changed=changed)
