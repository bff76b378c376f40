"""The entry of the inspector process: takes connections from the gate, gives back records, and ends when the gate does.

The gate starts it with one socket; the configuration comes over that, so the issuing CA's key stands in no argument,
environment or file. What a connection is for, and what happens on it, is `core`'s.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import traceback
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import TYPE_CHECKING

import orjson

from proxy.inspector.channel import MAX_MESSAGE, Channel
from proxy.inspector.handover import Configuration, Handover

if TYPE_CHECKING:
    from proxy.inspector.core import Core
    from proxy.record import Record

MAX_BACKLOG = 64  # messages of records that the gate has not taken: no more requests are read until it has
GRACE_S = 0.5  # at the end, for requests under way
FLUSH_S = 0.2  # and for their records
TURN_S = 0.005
TLS_BUFFER = 64 * 1024  # asyncio takes 256 KiB for each connection at once: 2 GiB for 4,096 idle clients
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """`python -m proxy.inspector.main FD PARENT`: serve on the socket FD until the process PARENT is gone."""
    descriptor, parent = map(int, sys.argv[1:])
    gc.disable()  # until all is loaded: looking for cycles among what stays is an eighth of the start
    _die_with(parent)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))  # a connection takes two descriptors
    SSLProtocol.max_size = TLS_BUFFER
    with socket.socket(fileno=descriptor) as sock:
        asyncio.run(_serve(sock))


def _die_with(parent: int) -> None:
    """The end of the socket says it too; this is for a gate whose end somebody else still holds."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


async def _serve(sock: socket.socket) -> None:
    over = asyncio.Event()
    inspector = _Inspector(sock, over.set)
    await over.wait()
    await inspector.drain()


class _Inspector:
    """This process, seen from the channel."""

    def __init__(self, sock: socket.socket, over: Callable[[], None]) -> None:
        self._channel = Channel(sock, received=self._receive, closed=over, drained=self._resume)
        self._over = over
        self._core: Core | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._records: list[Record] = []

    async def drain(self) -> None:
        """Serve to its end what clients have left behind, cut what lasts longer, and send every record."""
        await self._until(self._is_idle, GRACE_S)
        for task in self._tasks:
            task.cancel()
        if self._core:
            self._core.close()
        await self._until(self._is_idle, FLUSH_S)
        self._flush()
        await self._until(lambda: self._channel.unsent == 0, FLUSH_S)
        self._channel.close()

    def _is_idle(self) -> bool:
        return not self._tasks and (self._core is None or self._core.is_idle)

    async def _until(self, true: Callable[[], bool], patience_s: float) -> None:
        end = asyncio.get_running_loop().time() + patience_s
        while not true() and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 - several things may make it true
            await asyncio.sleep(TURN_S)

    def _receive(self, message: bytes, descriptor: int | None) -> None:
        if descriptor is None:
            if self._core:
                self._core.turn_away(Handover.from_bytes(message))
            return
        if self._core:
            task = asyncio.create_task(self._core.serve(socket.socket(fileno=descriptor), Handover.from_bytes(message)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        with open(descriptor, "rb") as file:
            text = file.read()
        try:
            from proxy.inspector.wiring import wire  # here: a failure to import can be told as well

            self._core = wire(Configuration.from_bytes(text), self._record, self._tell)
        except Exception as error:
            self._channel.send(orjson.dumps({"failed": f"{type(error).__name__}: {error}"}))
            self._over()
            return
        gc.freeze()
        gc.set_threshold(20_000, 50, 100)
        gc.enable()
        self._channel.send(orjson.dumps({"ready": True}))

    def _record(self, record: Record) -> None:
        self._records.append(record)
        if len(self._records) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        records, self._records = self._records, []
        lines = [orjson.dumps(record) for record in records]
        while lines:
            batch = [lines.pop(0)]
            size = len(batch[0])
            while lines and size + len(lines[0]) < MAX_MESSAGE - 1024:
                size += len(lines[0]) + 1
                batch.append(lines.pop(0))
            self._channel.send(b'{"records":[' + b",".join(batch) + b"]}")
        if self._channel.unsent > MAX_BACKLOG and self._core:
            self._core.hold(True)

    def _resume(self) -> None:
        if self._core:
            self._core.hold(False)

    def _tell(self, error: Exception) -> None:
        """One line to the gate: what failed, and where. The traceback is nobody's business but a developer's."""
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" at {os.path.basename(last[0].filename)}:{last[0].lineno}" if last else ""
        self._channel.send(orjson.dumps({"log": f"{type(error).__name__}{where}"}))


if __name__ == "__main__":
    main()
