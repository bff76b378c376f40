"""The supervisor's side of one worker: starts the process, feeds it, asks how it is, replaces it when it is lost.

What a worker is told is the supervisor's business, what it does with it the worker's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from signal import Signals
from time import monotonic

from proxy import child
from proxy.channel import Carried, Channel
from proxy.child import BackOff, Child
from proxy.kubernetes.watching import ReviewFailed
from proxy.metrics.meter import Totals
from proxy.options import say
from proxy.service.status import WorkerState
from proxy.worker.messages import (
    Answer,
    Failed,
    Finish,
    Judging,
    Question,
    Refused,
    Review,
    Reviewed,
    Said,
    Signing,
    Told,
    from_bytes,
    to_bytes,
)

START_S = 60.0  # a process that does not serve by then never will
HUSH_S = 5.0  # without an answer: no longer called ready
SILENCE_S = 15.0  # one that says nothing for so long carries nothing either
END_S = 10.0  # beyond the grace: for records to be written
RETRY_S = 1.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
SETTLED_S = 60.0

type Sent = tuple[Told, Carried | None]


class Worker:
    """One place among the workers: the process that fills it now, or the next one.

    state       None: there is no process
    generation  that the process judges by
    issuers     the digest of the issuing CAs that it signs by
    answer      its last
    failure     why none serves, since one ended or could not start
    restarts    how often one took the place of another

    introduction  what a new process is told: configuration, doors, issuing CAs, policy
    retry         asked to send the policy in force, unless the process judges by it
    changed       told that the state, the answer, or what is in force here is another
    totals        what every process counted, also those that are gone
    review        gives whose a token is; raises ReviewFailed
    """

    def __init__(
        self,
        number: int,
        introduction: Callable[[], Iterable[Sent]],
        retry: Callable[[Worker], None],
        changed: Callable[[], None],
        totals: Totals,
        review: Callable[[str], Awaitable[str | None]] | None = None,
    ) -> None:
        self.number = number
        self.state: WorkerState | None = None
        self.generation: str | None = None
        self.issuers: str | None = None
        self.answer: Answer | None = None
        self.failure: str | None = None
        self.restarts = 0
        self._has_served = False
        self._introduction = introduction
        self._retry = retry
        self._changed = changed
        self._totals = totals
        self._review = review
        self._reviews: set[asyncio.Task[None]] = set()
        self._back_off = BackOff(FIRST_PAUSE_S, LONGEST_PAUSE_S, SETTLED_S)
        self._child: Child | None = None
        self._channel: Channel | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._asked: float | None = None  # since when an answer is awaited
        self._is_finishing = False

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._child.process.pid if self._child else None

    @property
    def is_silent(self) -> bool:
        """It has not answered for a while: what waits at its doors is not served."""
        return self._asked is not None and monotonic() - self._asked > HUSH_S

    # --- its life ---

    def start(self) -> None:
        self._back_off.started()
        try:
            self._child = child.start("proxy.worker.main", speaks=True)
        except OSError as error:
            self._lose(f"did not start: {error.strerror or error}")
            return
        self._channel = Channel(self._child.sock, received=self._receive, closed=self._ended)
        self._after(START_S, lambda: self._lose(f"did not serve within {START_S:g} s"))
        self.state = WorkerState.STARTING
        for message, carried in self._introduction():
            self.tell(message, carried)

    def tell(self, message: Told, carried: Carried | None = None) -> None:
        """Say it, if there is somebody to hear it; `carried` is given away."""
        if self._channel is not None:
            self._channel.send(to_bytes(message), carried)
        elif carried is not None:
            carried.close()

    def ask(self) -> None:
        """Once a second. Who is silent for long is lost."""
        if self.state is None or self.state is WorkerState.STARTING:
            return
        if self._asked is None:
            self._asked = monotonic()
            self.tell(Question())
        elif self.state is WorkerState.READY and monotonic() - self._asked > SILENCE_S:
            self._lose(f"was silent for {SILENCE_S:g} s")

    def finish(self, grace_s: float) -> None:
        """Let it end; it is not replaced. Once more, with less grace, hastens it."""
        self._is_finishing = True
        if self._channel is None:
            self._cancel()
            return
        self.state = WorkerState.ENDING
        self.tell(Finish(grace_s))
        self._after(grace_s + END_S, lambda: self._lose("did not end"))

    def _receive(self, text: bytes, _descriptor: int | None) -> None:
        try:
            self._heed(from_bytes(text))
        except (ValueError, TypeError, KeyError) as error:
            self._lose(f"speaks nonsense: {type(error).__name__}")
        self._changed()

    def _heed(self, said: Told | Said) -> None:
        match said:
            case Judging(generation):
                self.generation = generation
                self.failure = None
                self._has_served = True
                if self.state is WorkerState.STARTING:
                    self.state = WorkerState.READY
                    self._cancel()
                self._retry(self)  # where another is in force by now
            case Signing(digest):
                self.issuers = digest
            case Refused(generation, why):
                say(f"worker {self.number} goes on with policy {self.generation}: {generation}: {why}")
                asyncio.get_running_loop().call_later(RETRY_S, self._retry, self)
            case Answer() as answer:
                self._asked = None
                self.answer = answer
                self._totals.see(self.pid, answer.counted)
            case Review(number, token):
                review = asyncio.get_running_loop().create_task(self._answer_review(number, token))
                self._reviews.add(review)
                review.add_done_callback(self._reviews.discard)
            case Failed(why):
                self.failure = why

    async def _answer_review(self, number: int, token: str) -> None:
        try:
            if self._review is None:
                raise ReviewFailed("no cluster is watched")
            answer = Reviewed(number, await self._review(token))
        except ReviewFailed as error:
            answer = Reviewed(number, failure=str(error))
        self.tell(answer)

    def _ended(self) -> None:
        self._lose(None)

    def _lose(self, why: str | None) -> None:
        """There is no process any more; None: it ended by itself. What it carried is lost, and nothing else."""
        self._cancel()
        if self._channel is not None:
            for _, carried in self._channel.close():
                if carried is not None:
                    carried.close()
        if self._child:
            self._child.kill()
            self._totals.retire(self._child.process.pid)
        self.failure = why or self.failure or _how_it_ended(self._child)
        self.state = self.generation = self.issuers = self.answer = None
        self._asked = self._child = self._channel = None
        if not self._is_finishing:
            pause_s = self._back_off.failed()
            if self._has_served:  # else whoever starts the service says it
                say(f"worker {self.number} {self.failure}; it is started again in {pause_s:g} s")
            self._after(pause_s, self._start_again)
        self._changed()

    def _start_again(self) -> None:
        self.restarts += 1
        self.start()

    def _after(self, delay_s: float, what: Callable[[], None]) -> None:
        self._cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, what)

    def _cancel(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def _how_it_ended(ended: Child | None) -> str:
    status = ended.process.returncode if ended else 0
    return f"ended with status {status}" if status >= 0 else f"was ended by {Signals(-status).name}"
