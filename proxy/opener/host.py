"""The supervisor's side of the opener: starts the process, links workers to it, replaces it when it is lost.

What is opened is between workers and opener.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from time import monotonic

from proxy import child
from proxy.channel import Channel
from proxy.child import BackOff, Child
from proxy.metrics.meter import Number
from proxy.opener.messages import NONSENSE, Join, State, from_bytes, to_bytes

FIRST_PAUSE_S, LONGEST_PAUSE_S, SETTLED_S = 0.1, 10.0, 60.0
START_S = 30.0
HUSH_S = 5.0  # it says how it is once a second; silent for so long it is no longer called ready
SILENCE_S = 15.0  # and for so long it is replaced
END_S = 5.0  # to close what is open


class OpenerProcess:
    """The process that opens now, or the next one. Lives on one asyncio loop.

    started  called when there is a new one, which no worker is linked to yet
    say      is given a line about what went wrong
    """

    def __init__(self, started: Callable[[], None], say: Callable[[str], None]) -> None:
        self._started = started
        self._say = say
        self._child: Child | None = None
        self._channel: Channel | None = None
        self._state: State | None = None
        self._told = asyncio.Event()  # it has said how it is
        self._heard = 0.0
        self._said = ""
        self._cut_before = 0  # by those before it
        self._restarts = 0
        self._back_off = BackOff(FIRST_PAUSE_S, LONGEST_PAUSE_S, SETTLED_S)
        self._timer: asyncio.TimerHandle | None = None

    # --- its life ---

    def start(self) -> None:
        self._back_off.started()
        self._heard = monotonic()
        try:
            self._child = child.start("proxy.opener.main", speaks=True)
        except OSError as error:
            self._lose(f"did not start: {error.strerror or error}")
            return
        self._channel = Channel(self._child.sock, received=self._receive, closed=lambda: self._lose("ended"))
        self._started()

    async def first(self) -> str:
        """Why nothing can be opened, once it is known; empty: all is well."""
        try:
            async with asyncio.timeout(START_S):
                await self._told.wait()
        except TimeoutError:
            return f"the opener did not start within {START_S:g} s"
        return self.unready

    def link(self) -> socket.socket | None:
        """A socket to it, for a worker; None: there is no process, or no descriptor for it."""
        if self._channel is None:
            return None
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            return None
        self._channel.send(to_bytes(Join()), theirs)
        return ours

    def look(self) -> None:
        """Once a second. Who is silent for long is lost."""
        if self._channel is not None and self._silence_s > SILENCE_S + (0 if self._state else START_S):
            self._lose(f"was silent for {SILENCE_S:g} s")

    async def close(self) -> None:
        """Let it close what is open, and end."""
        if self._timer:
            self._timer.cancel()
        ending, self._child = self._child, None
        if self._channel:
            self._channel.close()
            self._channel = None
        if ending:
            end = monotonic() + END_S
            while ending.process.poll() is None and monotonic() < end:  # noqa: ASYNC110 - once, at the end
                await asyncio.sleep(0.01)
            ending.kill()

    # --- how it is ---

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child else None

    @property
    def unready(self) -> str:
        """Why nothing can be opened; empty: it can."""
        if self._channel is None:
            return "openings cannot be made: the opener is not running"
        if self._state is None:
            return "openings cannot be made: the opener is starting"
        if self._silence_s > HUSH_S:
            return "openings cannot be made: the opener does not answer"
        return f"openings cannot be made: {self._state.why}" if self._state.why else ""

    def gauges(self) -> dict[str, Number]:
        return {
            "outgate_openings_open": self._state.open if self._state else 0,
            "outgate_openings_cut_total": self._cut_before + (self._state.cut if self._state else 0),
            "outgate_opener_restarts_total": self._restarts,
        }

    @property
    def _silence_s(self) -> float:
        return monotonic() - self._heard

    def _receive(self, text: bytes, _descriptor: int | None) -> None:
        try:
            message = from_bytes(text)
        except NONSENSE as error:
            self._lose(f"speaks nonsense: {type(error).__name__}")
            return
        if isinstance(message, State):
            self._state, self._heard = message, monotonic()
            if self._told.is_set():  # the very first is for whoever waits for `first`
                self._note(message.why)
            self._told.set()

    def _note(self, why: str) -> None:
        """Say it once, and once that it is over."""
        if why and why != self._said:
            self._say(f"openings cannot be made: {why}")
        if self._said and not why:
            self._say("openings can be made again")
        self._said = why

    def _lose(self, why: str) -> None:
        """There is no process any more. What it had opened the next one closes."""
        if self._channel:
            for _, carried in self._channel.close():
                if carried is not None:
                    carried.close()
        if self._child:
            self._child.kill()
        self._cut_before += self._state.cut if self._state else 0
        self._child = self._channel = self._state = None
        pause_s = self._back_off.failed()
        self._say(f"the opener {why}; it is started again in {pause_s:g} s")
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._start_again)

    def _start_again(self) -> None:
        self._restarts += 1
        self.start()
