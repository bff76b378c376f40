"""The entry of the inspector process: takes connections from the gate, gives back records, and ends when the gate does.

The gate starts it with one socket; configuration and policies come over that, so the issuing CA's key stands in no
argument, environment or file. What a connection is for, and what happens on it, is `core`'s.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import traceback
from asyncio.selector_events import _SelectorSocketTransport  # type: ignore[attr-defined]  # typeshed leaves it out
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import orjson

from policies.model import Reason
from proxy.channel import MAX_MESSAGE, Channel
from proxy.child import die_with, leave_no_core, raise_descriptor_limit
from proxy.compiled import read_policy
from proxy.identity import Change, Pods
from proxy.inspector.handover import Configuration, Handover
from proxy.metrics.meter import Counts

if TYPE_CHECKING:
    from policies.index import Policy
    from proxy.inspector.core import Core
    from proxy.inspector.wiring import Wired
    from proxy.record import Record

MAX_BACKLOG = 64  # messages of records that the gate has not taken: no more requests are read until it has
GRACE_S = 0.5  # at the end, for requests under way
FLUSH_S = 0.2  # and for their records
TURN_S = 0.005
READ_BUFFER = 64 * 1024  # one turn's work at most: asyncio reads 256 KiB, which may be 40,000 chunks of a byte
TLS_BUFFER = 64 * 1024  # asyncio takes 256 KiB for each connection at once: 2 GiB for 4,096 idle clients


def main() -> None:
    """`python -m proxy.inspector.main FD PARENT`: serve on the socket FD until the process PARENT is gone."""
    descriptor, parent = map(int, sys.argv[1:])
    gc.disable()  # until all is loaded: looking for cycles among what stays is an eighth of the start
    die_with(parent)
    raise_descriptor_limit()
    leave_no_core()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the gate, which tells us what follows
        signal.signal(number, signal.SIG_IGN)
    SSLProtocol.max_size = TLS_BUFFER
    _SelectorSocketTransport.max_size = READ_BUFFER
    with socket.socket(fileno=descriptor) as sock:
        asyncio.run(_serve(sock))


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
        self._configuration: Configuration | None = None
        self._wired: Wired | None = None
        self._pods = Pods()
        self._closed_for: Reason | None = None
        self._is_leaving = False
        self._end = 0.0  # of the grace, by the loop's clock
        self._counts = Counts(self._gauges)
        self._tasks: set[asyncio.Task[None]] = set()
        self._records: list[Record] = []

    async def drain(self) -> None:
        """Serve to its end what clients have left behind, cut what lasts longer, and send every record."""
        loop = asyncio.get_running_loop()
        if self._wired:
            self._wired.core.leave()
        self._end = max(self._end, loop.time() + GRACE_S)
        while not self._is_idle() and loop.time() < self._end:  # noqa: ASYNC110 - several things may make it true
            await asyncio.sleep(TURN_S)
        for task in self._tasks:
            task.cancel()
        if self._wired:
            self._wired.core.close()
        await self._until(self._is_idle, FLUSH_S)
        self._flush()
        await self._until(lambda: self._channel.unsent == 0, FLUSH_S)
        self._channel.close()

    def _is_idle(self) -> bool:
        return not self._tasks and (self._wired is None or self._wired.core.is_idle)

    async def _until(self, true: Callable[[], bool], patience_s: float) -> None:
        end = asyncio.get_running_loop().time() + patience_s
        while not true() and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 - several things may make it true
            await asyncio.sleep(TURN_S)

    def _receive(self, message: bytes, descriptor: int | None) -> None:
        word, _, rest = message.partition(b" ")
        match word:
            case b"configuration" if descriptor is not None:
                with open(descriptor, "rb") as file:
                    self._configuration = Configuration.from_bytes(file.read())
            case b"policy" if descriptor is None:  # connections have taken all there are: the gate sends it again
                self._say({"missed": int(rest)})
            case b"policy" if descriptor is not None:
                self._judge_by(descriptor, int(rest))
            case b"issuers":
                self._sign_by(rest.decode())
            case b"pods":
                self._know(rest)
            case b"closed":
                self._close_for(Reason(rest.decode()) if rest else None)
            case b"leave":
                self._leave()
            case b"finish":
                self._end = asyncio.get_running_loop().time() + GRACE_S + float(rest)
                self._over()
            case b"stats":
                self._say({"stats": self._counts.snapshot()})
            case _ if self._wired:
                self._serve(self._wired.core, Handover.from_bytes(message), descriptor)

    def _serve(self, core: Core, handover: Handover, descriptor: int | None) -> None:
        if descriptor is None:
            core.turn_away(handover)
            return
        task = asyncio.create_task(core.serve(socket.socket(fileno=descriptor), handover))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _judge_by(self, descriptor: int, number: int) -> None:
        """The first policy makes a core, every other one replaces it. One that cannot be read ends this process: it
        must not go on judging by another than the gate."""
        try:
            with open(descriptor, "rb") as file:
                policy = read_policy(file)
            if self._wired:
                self._wired.bench.swap(policy)
            else:
                self._wire(policy)
        except Exception as error:
            self._say({"failed": f"{type(error).__name__}: {error}"})
            self._over()
            return
        self._say({"applied": number})

    def _sign_by(self, issuing: str) -> None:
        """Connections that come from now on are shown leaves of these. Those that cannot be read end this process: it
        must not go on with ones that were replaced."""
        if self._configuration is None:
            return  # it was lost on its way: the policy that follows ends this process
        try:
            self._configuration = replace(self._configuration, issuing=issuing)
            if self._wired:
                self._wired.sign_by(issuing)
        except Exception as error:
            self._say({"failed": f"its issuing CAs cannot be read: {type(error).__name__}"})  # its text may hold a key
            self._over()

    def _know(self, text: bytes) -> None:
        """Changes that cannot be read end this process: it would take one pod for another."""
        try:
            self._pods.take(Change.from_bytes(text))
        except (ValueError, TypeError, KeyError) as error:
            self._say({"failed": f"what is new of pods cannot be read: {type(error).__name__}"})
            self._over()

    def _wire(self, policy: Policy) -> None:
        from proxy.inspector.wiring import wire  # here: a failure to import can be told as well

        if self._configuration is None:
            raise ValueError("a policy came before the configuration")
        pods = self._pods if self._configuration.watches_pods else None
        self._wired = wire(self._configuration, policy, self._record, self._tell, self._counts, pods=pods)
        self._wired.bench.close_for(self._closed_for)
        if self._is_leaving:
            self._wired.core.leave()
        gc.freeze()
        gc.set_threshold(20_000, 50, 100)
        gc.enable()

    def _close_for(self, reason: Reason | None) -> None:
        self._closed_for = reason
        if self._wired:
            self._wired.bench.close_for(reason)

    def _leave(self) -> None:
        self._is_leaving = True
        if self._wired:
            self._wired.core.leave()

    def _gauges(self) -> dict[str, int]:
        if self._wired is None:
            return {}
        return {
            "outgate_connections_inspected": self._wired.core.open_connections,
            "outgate_leaves_remembered": len(self._wired.leaves),
            "outgate_names_remembered": self._wired.resolver.remembered,
        }

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
        if self._channel.unsent > MAX_BACKLOG and self._wired:
            self._wired.core.hold(True)

    def _resume(self) -> None:
        if self._wired:
            self._wired.core.hold(False)

    def _tell(self, error: Exception) -> None:
        """One line to the gate: what failed, and where. The traceback is nobody's business but a developer's."""
        from proxy.inspector.user_addons import AddonFailed  # here as below

        if isinstance(error, AddonFailed):
            self._say({"log": str(error)})
            return
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" at {os.path.basename(last[0].filename)}:{last[0].lineno}" if last else ""
        from proxy.inspector.minting import NoLeaf  # here as above

        self._say({"log": f"no leaf: {error}" if isinstance(error, NoLeaf) else f"{type(error).__name__}{where}"})

    def _say(self, message: dict[str, object]) -> None:
        self._channel.send(orjson.dumps(message))


if __name__ == "__main__":
    main()
