"""Writes decision records: JSON lines, or one readable line each on a terminal. It never blocks a caller.

Records are queued and written by one thread, in batches. The queue is bounded: when the disk or the reader of a pipe
stalls, further records are counted and the count is written as soon as there is room: a gap in the log is in the log.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import IO, Any

import orjson
import structlog

from proxy.record import Record, describe

QUEUE_LIMIT = 65536  # a log that stalls must not grow our memory
BATCH = 512
GATHER_S = 0.02
CLOSE_S = 5.0

_GREEN, _RED, _YELLOW, _DIM, _PLAIN = "\033[32m", "\033[31m", "\033[33m", "\033[2m", "\033[0m"


class DecisionLog:
    """A sink for records, backed by one writer thread. `close()` writes what is queued and joins it."""

    def __init__(
        self,
        stream: IO[str],
        *,
        pretty: bool = False,
        colour: bool = False,
        generation: str = "",
        closes_stream: bool = False,
    ) -> None:
        self._stream = stream
        self._closes_stream = closes_stream
        self._generation = generation
        self._queue: deque[Record] = deque()
        self._wake = threading.Event()
        self._is_closing = False
        self.lost = 0
        renderer = _Pretty(colour) if pretty else _json
        self._render: Callable[[Record], str] = structlog.wrap_logger(
            None, processors=[renderer], wrapper_class=_Rendered
        ).render
        self._thread = threading.Thread(target=self._write, name="decision-log", daemon=True)
        self._thread.start()

    def __call__(self, record: Record) -> None:
        if self._generation:
            record["policy.generation"] = self._generation
        if len(self._queue) >= QUEUE_LIMIT:
            self.lost += 1
            return
        self._queue.append(record)
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Write what is queued, then stop. Waits at most CLOSE_S for a stream that stalls."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout=CLOSE_S)
        if self._closes_stream and not self._thread.is_alive():
            with suppress(OSError):  # a full disk, counted already
                self._stream.close()

    def _write(self) -> None:
        is_last = False
        while not is_last:
            self._wake.wait()
            if not self._is_closing:
                time.sleep(GATHER_S)  # a thread woken for each record would cost more than the record
            self._wake.clear()
            is_last = self._is_closing  # after `clear`: a close that it wiped out is seen here
            self._write_queued()

    def _write_queued(self) -> None:
        while self._queue or self.lost:
            lines = []
            if self.lost:
                lost, self.lost = self.lost, 0
                lines.append(self._render({"event": "records_lost", "count": lost}))
            while self._queue and len(lines) < BATCH:
                lines.append(self._render(self._queue.popleft()))
            try:
                self._stream.write("".join(line + "\n" for line in lines))
                self._stream.flush()
            except (OSError, ValueError):  # the reader is gone, the disk is full or the stream is closed
                self.lost += len(lines)
                return


class _Rendered(structlog.BoundLoggerBase):
    """structlog's processor chain as a function from record to line; the writing is ours."""

    def render(self, record: Record) -> str:
        args, _ = self._process_event("info", None, dict(record))
        return str(args[0])


def _json(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:  # structlog's processor signature
    if event.get("event") is None:
        event.pop("event", None)
    return orjson.dumps(event, default=str).decode()


class _Pretty:
    """`12:30:01 deny  weather  GET https://host/path  no_allow_entry  weather.yaml:9 (…)`"""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, _logger: object, _method: str, event: Mapping[str, Any]) -> str:
        if "verdict" not in event:
            return " ".join(f"{key}={value}" for key, value in event.items() if value is not None)
        verdict = str(event["verdict"])
        shown = "would deny" if event.get("would_be") == "deny" else verdict
        colour = _YELLOW if shown == "would deny" else _GREEN if verdict == "allow" else _RED
        parts = [
            self._paint(str(event["time"])[11:19], _DIM),
            self._paint(f"{shown:<5}", colour),
            str(event["workload"]),
            describe(event),
            "" if verdict == "allow" and shown == verdict else str(event["reason"]),
            self._paint(str(event.get("rule", "")), _DIM),
            self._paint(str(event["id"]), _DIM),
        ]
        return "  ".join(part for part in parts if part)

    def _paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colour and text else text


def open_log(target: str | None, *, generation: str = "") -> DecisionLog:
    """The log at `target`: a path (appended to), `-` for standard error, None for standard output.

    Raises OSError when the file cannot be opened. Readable lines where the stream is a terminal, JSON lines elsewhere.
    """
    if target is None:
        stream: IO[str] = sys.stdout
    elif target == "-":
        stream = sys.stderr
    else:
        stream = open(target, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the gate
    terminal = stream.isatty()
    return DecisionLog(
        stream,
        pretty=terminal,
        colour=terminal and not os.environ.get("NO_COLOR"),
        generation=generation,
        closes_stream=target not in (None, "-"),
    )
