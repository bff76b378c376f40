"""A worker's way to the opener: asks, and waits for the kernel's acknowledgement. It decides nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from itertools import batched, count

from policies.hostnames import Hostname
from proxy.channel import Channel
from proxy.elements import Element
from proxy.opener.claims import Claim
from proxy.opener.messages import (
    MAX_ELEMENTS,
    NONSENSE,
    Claimed,
    Close,
    Done,
    Forget,
    Message,
    Open,
    Review,
    from_bytes,
    read_claims,
    to_bytes,
    write_claims,
)


class NotOpened(Exception):
    """The opener, or the kernel, did not do it. `str()` says why."""


class Link:
    """Made on a running loop; up once it was given a socket, and again with each one that takes its place.

    forget  told that what was open may be closed
    """

    def __init__(self) -> None:
        self.forget: Callable[[], None] = lambda: None
        self._numbers = count()
        self._channel: Channel | None = None
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._judges: dict[int, Callable[[Claim], bool]] = {}  # of reviews under way

    @property
    def is_up(self) -> bool:
        return self._channel is not None

    def attach(self, sock: socket.socket) -> None:
        """Ask over `sock` from now on; it is the link's."""
        self._lose()
        channel = Channel(sock, received=lambda text, _: self._receive(text), closed=self._lose)
        self._channel = channel

    def close(self) -> None:
        self._lose()

    async def open(self, workload: str, name: Hostname, elements: Sequence[Element], time_s: float) -> None:
        """Have elements of one source opened. Returns when the kernel has them. Raises NotOpened."""
        asked = []
        for some in batched(elements, MAX_ELEMENTS):
            targets = [(str(one.address), one.protocol, one.port) for one in some]
            asked.append(Open(next(self._numbers), workload, name, str(some[0].source), time_s, targets))
        await self._ask(asked)

    async def review(self, admits: Callable[[Claim], bool]) -> None:
        """Have every opening closed, and its connections cut, that `admits` says no to. Raises NotOpened."""
        number = next(self._numbers)
        self._judges[number] = admits
        try:
            await self._ask([Review(number)])
        finally:
            del self._judges[number]

    async def _ask(self, messages: Sequence[Open | Review]) -> None:
        """Send all at once: nothing that is said later, under another policy, comes between them."""
        if self._channel is None:
            raise NotOpened("the opener is not running")
        for message in messages:
            self._waiting[message.number] = asyncio.get_running_loop().create_future()
            self._channel.send(to_bytes(message))
        waiting = [self._waiting[message.number] for message in messages]
        try:
            await asyncio.wait(waiting)
        finally:
            for message in messages:
                del self._waiting[message.number]
            failures = [one.exception() for one in waiting if one.done()]  # of each, or asyncio complains
        for failure in failures:
            if failure:
                raise failure

    def _receive(self, text: bytes) -> None:
        try:
            self._heed(from_bytes(text))
        except NONSENSE:  # it has gone mad: the supervisor gives us another
            self._lose()

    def _heed(self, message: Message) -> None:
        match message:
            case Done(number, why):
                self._settle(number, why)
            case Claimed(number, rows, is_last):
                if admits := self._judges.get(number):
                    refused = [claim for claim in read_claims(rows) if not admits(claim)]
                    if (refused or is_last) and self._channel:
                        self._channel.send(to_bytes(Close(number, write_claims(refused), is_last)))
            case Forget():
                self.forget()
            case _:
                raise ValueError(f"{type(message).__name__} is for no worker")

    def _settle(self, number: int, why: str) -> None:
        done = self._waiting.get(number)
        if done is None or done.done():  # who asked waits no more
            return
        if why:
            done.set_exception(NotOpened(why))
        else:
            done.set_result(None)

    def _lose(self) -> None:
        if self._channel:
            self._channel.close()
            self._channel = None
        self.forget()
        for number in tuple(self._waiting):
            self._settle(number, "the opener ended")
