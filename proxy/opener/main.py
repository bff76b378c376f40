"""The entry of the opener: takes sockets to workers from the supervisor, and openings from workers.

When the supervisor is gone nothing is judged any more: it closes what is open, and ends.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import suppress
from itertools import chain
from time import monotonic

from proxy.channel import Channel
from proxy.opener.claims import Claim, Claims
from proxy.opener.kernel import CannotOpen, Kernel
from proxy.opener.messages import (
    MAX_CLAIMS,
    NONSENSE,
    Claimed,
    Close,
    Done,
    Forget,
    Message,
    Open,
    Review,
    State,
    from_bytes,
    read_claims,
    to_bytes,
    write_claims,
)

LOOK_S = 1.0
FORGET_S = 60.0
SWEEPS = 2  # of connections that nobody claims: a first packet may be under way while its element is closed
MAX_UNSENT = 4_096  # messages; a worker that reads none of so many is lost

type _Asked = tuple[Channel, Open, list[Claim]]


def main() -> None:
    """`python -m proxy.opener.main FD PARENT`: open what is asked for, until nothing more is said on the socket FD."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # the supervisor says when; workers may need us yet
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_Opener().run(socket.socket(fileno=int(sys.argv[1]))))


class _Opener:
    """This process.

    why  it cannot open anything; empty: it can
    """

    def __init__(self) -> None:
        self.why = "is starting"
        self._kernel: Kernel | None = None
        self._claims = Claims(monotonic)
        self._asked: list[_Asked] = []
        self._channels: set[Channel] = set()
        self._is_doubtful = True  # what the kernel has open may be another than what is claimed
        self._sweeps_due = SWEEPS
        self._forgotten = monotonic()
        self._cut = 0

    async def run(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        ending = asyncio.Event()
        supervisor = Channel(sock, received=self._join, closed=ending.set)
        while not ending.is_set():
            self._look()
            supervisor.send(to_bytes(State(self.why, len(self._claims.open()), self._cut)))
            try:
                async with asyncio.timeout(LOOK_S):
                    await ending.wait()
            except TimeoutError:
                continue
        if self._kernel:
            with suppress(CannotOpen):  # the table is gone, or its elements end with their time
                self._kernel.empty()

    # --- the kernel, once a second and after a failure ---

    def _look(self) -> None:
        """Put right what somebody else did to our table, or what failed."""
        try:
            self._kernel = self._kernel or Kernel()
            if self._is_doubtful or self._kernel.has_changed():
                self._tell_all(Forget())
                self._is_doubtful, self._sweeps_due = True, SWEEPS
                self._kernel.settle(self._claims.open())
                self._is_doubtful = False
            if self._sweeps_due:
                self._sweep(self._kernel)
                self._sweeps_due -= 1
            if monotonic() - self._forgotten > FORGET_S:
                self._forgotten = monotonic()
                self._claims.forget_ended(self._kernel.connections())
            self.why = ""
        except CannotOpen as error:
            self.why, self._is_doubtful = str(error), True

    def _sweep(self, kernel: Kernel) -> None:
        """Cut every connection that nobody claims."""
        stray = (found for element, found in kernel.connections().items() if element not in self._claims)
        self._cut += kernel.cut([one for found in stray for one in found])

    def _doubt(self, error: CannotOpen) -> None:
        """Full sets are no fault: workloads can fill them, and must not turn the gate red for all."""
        if not error.is_full:
            self.why, self._is_doubtful = str(error), True

    # --- workers ---

    def _join(self, _: bytes, descriptor: int | None) -> None:
        """All that a supervisor says is that there is a worker."""
        if descriptor is None:
            return
        channel = Channel(
            socket.socket(fileno=descriptor),
            received=lambda text, _: self._receive(channel, text),
            closed=lambda: self._part(channel),
        )
        self._channels.add(channel)

    def _part(self, channel: Channel) -> None:
        channel.close()
        self._channels.discard(channel)

    def _receive(self, channel: Channel, text: bytes) -> None:
        try:
            self._obey(channel, from_bytes(text))
        except NONSENSE:  # it has gone mad, and gets another channel when it is replaced
            self._part(channel)

    def _obey(self, channel: Channel, message: Message) -> None:
        match message:
            case Open():
                if not self._asked:
                    self._loop.call_soon(self._open)  # with all that other workers have asked by then
                self._asked.append((channel, message, message.claims()))
            case Review(number):
                self._tell_claims(channel, number)
            case Close(number, rows, is_last):
                self._open()
                self._close(read_claims(rows))
                if is_last:
                    self._look()
                    self._say(channel, Done(number, self.why))
            case _:
                raise ValueError(f"{type(message).__name__} is for no opener")

    def _open(self) -> None:
        """All that was asked since the last time, in one transaction; each by itself where that fails."""
        asked, self._asked = self._asked, []
        if not asked:
            return
        if (why := self._make(asked)) and len(asked) > 1:
            for one in asked:
                self._say(one[0], Done(one[1].number, self._make([one])))
        else:
            for channel, message, _ in asked:
                self._say(channel, Done(message.number, why))

    def _make(self, asked: list[_Asked]) -> str:
        """Why it was not done; empty: it was."""
        if self._kernel is None or self._is_doubtful:
            return self.why
        requests = [[(claim, message.time_s) for claim in claims] for _, message, claims in asked]
        times_s = self._claims.times(*requests)
        if times_s is None:
            return "this source, or this workload, has all the openings it may have"
        try:
            self._kernel.open(times_s)
        except CannotOpen as error:
            self._doubt(error)
            return str(error)
        for claim, time_s in chain.from_iterable(requests):
            self._claims.add(claim, time_s)
        return ""

    def _tell_claims(self, channel: Channel, number: int) -> None:
        self._open()
        claims = list(self._claims)
        starts = range(0, max(1, len(claims)), MAX_CLAIMS)
        for start in starts:
            some = claims[start : start + MAX_CLAIMS]
            self._say(channel, Claimed(number, write_claims(some), start == starts[-1]))

    def _close(self, claims: list[Claim]) -> None:
        free = [claim.element for claim in claims if self._claims.drop(claim)]
        if not free:
            return
        self._sweeps_due = SWEEPS
        try:
            if self._kernel and not self._is_doubtful:
                self._kernel.close(free)
        except CannotOpen as error:
            self._doubt(error)

    def _say(self, channel: Channel, message: Message) -> None:
        if channel in self._channels:
            channel.send(to_bytes(message))
            if channel.unsent > MAX_UNSENT:
                self._part(channel)

    def _tell_all(self, message: Message) -> None:
        for channel in tuple(self._channels):
            self._say(channel, message)


if __name__ == "__main__":
    main()
