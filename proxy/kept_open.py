"""Serves sockets in spite of faults of ours or of the kernel, and says which cannot be served. It reads none."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from time import monotonic

PAUSE_S = 1.0
SETTLED_S = 5.0  # without another fault: it is served again


class KeptOpen:
    """Any number of sockets.

    report  told of each fault, and what was served
    """

    def __init__(self, report: Callable[[Exception, str], None]) -> None:
        self._report = report
        self._faults: dict[int, tuple[float, str]] = {}  # the last by descriptor: when, and in words

    @property
    def failing(self) -> str:
        """What cannot be answered now and why: `DNS (OSError)`; empty: all can."""
        now = monotonic()
        return ", ".join(sorted({what for when, what in self._faults.values() if now - when < SETTLED_S}))

    async def keep(self, sock: socket.socket, serve: Callable[[socket.socket], Awaitable[None]], what: str) -> None:
        """Serve `sock`, which is closed at the end, until cancelled. A fault leaves questions unanswered for a moment,
        and none let through."""
        with sock:
            while True:
                try:
                    await serve(sock)
                except Exception as error:
                    self._faults[sock.fileno()] = monotonic(), f"{what} ({_kind(error)})"
                    self._report(error, what)
                    await asyncio.sleep(PAUSE_S)


def _kind(error: Exception) -> str:
    """Without its text, which may hold what a workload sent. Of several that tasks raised together, the first."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__
