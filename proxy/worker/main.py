"""The entry of a worker: takes doors and policies from the supervisor, carries connections, ends when it is told to.

What carries them is put together in `wiring`; this is the life of the process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from proxy.channel import Channel
from proxy.child import raise_descriptor_limit
from proxy.config import DoorKind
from proxy.identity import Change
from proxy.rings import Rings
from proxy.worker.messages import (
    Configuration,
    Door,
    Failed,
    Finish,
    Judge,
    Judging,
    Leave,
    LogTurns,
    LookupRings,
    Question,
    Refused,
    Reopen,
    Reviewed,
    Said,
    Sign,
    Signing,
    Told,
    ToOpener,
    from_bytes,
    to_bytes,
)

if TYPE_CHECKING:
    from proxy.worker.wiring import Serving


def main() -> None:
    """`python -m proxy.worker.main FD PARENT`: serve by what is said on the socket FD, until nothing more is said."""
    gc.disable()  # until all is loaded: looking for cycles among what stays is an eighth of the start
    raise_descriptor_limit()
    for number in (signal.SIGINT, signal.SIGHUP):  # meant for the supervisor, which tells us what follows
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # records go to a terminal whose foreground the supervisor is
    sock = socket.socket(fileno=int(sys.argv[1]))  # closed by the end of the process alone: that is how it is heard of
    asyncio.run(_Worker(sock).run())


class _Worker:
    """This process, seen from the channel."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._turns: int | None = None
        self._rings: Rings | None = None
        self._serving: Serving | None = None
        self._orders: asyncio.Queue[tuple[Judge | Sign, int | None]] = asyncio.Queue()
        self._ending = asyncio.Event()
        self._hurry = asyncio.Event()
        self._grace_s: float | None = None

    async def run(self) -> None:
        # Nothing new is let in without a supervisor: nobody would say what another policy forbids by then.
        self._channel = Channel(self._sock, received=self._receive, closed=self._finish)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._finish)
        obeying = asyncio.create_task(self._carry_out())
        await self._ending.wait()
        obeying.cancel()
        if self._serving:
            await self._serving.finish(self._grace_s, self._hurry)

    def _receive(self, text: bytes, descriptor: int | None) -> None:
        try:
            self._obey(from_bytes(text), descriptor)
        except Exception as error:
            self._fail(error)

    def _obey(self, message: Told | Said, descriptor: int | None) -> None:
        match message:
            case LogTurns():
                self._turns = descriptor
            case LookupRings(own, count) if descriptor is not None:
                self._rings = Rings(descriptor, own, count)
            case Configuration() if descriptor is not None:
                from proxy.config.document import from_document  # here: what fails to load can be told as well
                from proxy.worker.wiring import Serving

                with open(descriptor, "rb") as file:
                    self._serving = Serving(from_document(json.load(file)), self._turns, self._say, self._rings)
            case Door(kind, target) if descriptor is not None and self._serving:
                self._serving.add_door(socket.socket(fileno=descriptor), DoorKind(kind), target)
            case ToOpener() if self._serving:
                if descriptor is not None:  # else connections have taken all there are: it is sent again
                    self._serving.link(socket.socket(fileno=descriptor))
            case Reviewed() if self._serving:
                self._serving.heed_review(message)
            case Change() if self._serving:
                self._serving.know(message)
            case Judge() | Sign() if self._serving:
                self._orders.put_nowait((message, descriptor))
            case Question() if self._serving:
                self._say(self._serving.answer())
            case Reopen() if self._serving:
                self._serving.reopen_log()
            case Leave() if self._serving:
                self._serving.leave()
            case Finish(grace_s):
                self._finish(grace_s)
            case Question() | Reopen() | Leave():
                pass  # nothing serves yet
            case _:
                raise ValueError(f"{type(message).__name__} came without what belongs to it")

    async def _carry_out(self) -> None:
        """Take over one policy after another, and issuing CAs between them, in the order in which they were sent. The
        first policy opens the doors; without one, there is nothing to do here."""
        while True:
            order, descriptor = await self._orders.get()
            assert self._serving
            if isinstance(order, Sign):
                self._serving.sign_by(order.issuing)
                self._say(Signing(order.digest))
                continue
            is_first = not self._serving.is_open
            try:
                if descriptor is None:  # connections have taken all there are
                    raise OSError("no descriptor is free")
                await self._serving.judge_by(order, os.fdopen(descriptor, "rb"))
            except Exception as error:
                if is_first:
                    self._fail(error)
                    return
                self._say(Refused(order.generation, str(error) or type(error).__name__))
                continue
            if is_first:
                gc.freeze()
                gc.enable()
            self._say(Judging(order.generation))

    def _fail(self, error: Exception) -> None:
        """What is open may end in peace; another process takes its place. What follows from a failure is no news."""
        if self._ending.is_set():
            return
        self._say(Failed(f"failed: {error if isinstance(error, OSError) else repr(error)}"))
        self._finish()

    def _finish(self, grace_s: float | None = None) -> None:
        """None: with the grace as configured. Said again with none at all, it hurries."""
        if not self._ending.is_set():
            self._grace_s = grace_s
            self._ending.set()
        elif grace_s == 0.0:
            self._hurry.set()

    def _say(self, message: Said) -> None:
        self._channel.send(to_bytes(message))


if __name__ == "__main__":
    main()
