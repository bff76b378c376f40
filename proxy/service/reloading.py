"""The life of a reload: somebody asks, the compiler reads, every worker judges by the new policy or nothing changes.

What is in force is held as memory that the compiler wrote; a worker that is started later gets the same, whatever the
files say by then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from proxy.compiled import duplicate
from proxy.metrics.meter import Counts
from proxy.options import Unready, say
from proxy.service.compiler import NICENESS, Report, Request, compile_policy
from proxy.service.status import ReloadOutcome, ReloadResult
from proxy.worker.host import RETRY_S, Sent, Worker
from proxy.worker.messages import Judge

SWAP_S = 30.0  # for every worker to judge by a new policy; a replaced one has to start first


@dataclass(frozen=True, slots=True)
class InForce:
    """A policy, when it was loaded (POSIX seconds), and what signs leaves under it."""

    report: Report
    policy: BinaryIO
    loaded: float
    issuing: str | None

    def told(self) -> Sent:
        """How a worker is told to judge by it."""
        return Judge(self.report.generation, self.report.inspects, self.issuing), duplicate(self.policy)


class Reloads:
    """The policy of a service, and the reloads of it, one at a time.

    request  what to compile
    workers  who judge by it
    moved    set whenever one of them is in another state
    """

    def __init__(self, request: Request, workers: Sequence[Worker], moved: asyncio.Event, counts: Counts) -> None:
        self.in_force: InForce | None = None
        self.refused: str | None = None  # why the newest files are not in force
        self.is_swapping = False
        self._request = request
        self._workers = workers
        self._moved = moved
        self._counts = counts
        self._asked: list[asyncio.Future[ReloadResult]] = []
        self._wanted = asyncio.Event()

    @property
    def generation(self) -> str:
        """Of the policy in force; empty: there is none yet."""
        return self.in_force.report.generation if self.in_force else ""

    def ask(self) -> asyncio.Future[ReloadResult]:
        """A reload that begins after this call. Asked for several times while another is under way, it is one."""
        answer: asyncio.Future[ReloadResult] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self._wanted.set()
        return answer

    def tell(self, worker: Worker) -> None:
        """Have a worker judge by the policy in force, now or when there is a descriptor for it."""
        if self.in_force is None:
            return
        try:
            worker.tell(*self.in_force.told())
        except OSError:
            asyncio.get_running_loop().call_later(RETRY_S, self.tell_again, worker)

    def tell_again(self, worker: Worker) -> None:
        """As `tell`, unless it judges by it already."""
        if worker.generation != self.generation:
            self.tell(worker)

    async def run(self) -> None:
        """Carry out what is asked for, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            asked, self._asked = self._asked, []
            result = await self._reload()
            self._counts.count("outgate_reloads_total", result.outcome)
            for answer in asked:
                if not answer.done():  # who asked may have gone
                    answer.set_result(result)

    async def first(self) -> None:
        """Load the policy that the service starts with. Raises Unready."""
        await self._take_over(self._request)

    def close(self) -> None:
        """There is nobody left to judge."""
        if self.in_force:
            self.in_force.policy.close()

    async def _reload(self) -> ReloadResult:
        before = self.generation
        has_issuing = bool(self.in_force and self.in_force.issuing)
        request = replace(self._request, known=before, has_issuing=has_issuing, niceness=NICENESS)
        try:
            await self._take_over(request)
        except Unready as error:
            if self.refused != str(error):
                say(f"the policy is not reloaded, {before} stays in force:\n{error}")
            self.refused = str(error)
            return ReloadResult(ReloadOutcome.REFUSED, before, tuple(self.refused.splitlines()))
        was_refused, self.refused = self.refused, None
        if self.generation == before:
            if was_refused:
                say(f"the files say again what is in force: policy {before}")
            return ReloadResult(ReloadOutcome.UNCHANGED, before)
        if late := await self._late():
            say(f"policy {self.generation} is not in force everywhere: {'; '.join(late)}")
            return ReloadResult(ReloadOutcome.FAILED, self.generation, late)
        say(f"policy {self.generation} is in force")
        return ReloadResult(ReloadOutcome.LOADED, self.generation)

    async def _take_over(self, request: Request) -> None:
        """Compile, and tell every worker if it is another policy than before. Raises Unready; all stays as it was."""
        report, policy = await compile_policy(request)
        if policy is None:
            return
        say(report.closed)
        old = self.in_force
        self.in_force = InForce(report, policy, time.time(), report.issuing or (old.issuing if old else None))
        for worker in self._workers:  # whatever it answered last: it may not have taken what it was told after that
            self.tell(worker)
        if old:
            old.policy.close()

    async def _late(self) -> tuple[str, ...]:
        """Wait for the workers. Returns a line for each that does not judge by the new policy yet."""

        def late() -> list[Worker]:
            return [worker for worker in self._workers if worker.generation != self.generation]

        self.is_swapping = True
        try:
            async with asyncio.timeout(SWAP_S):
                while late():
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            return tuple(f"worker {worker.number} does not judge by it yet" for worker in late())
        finally:
            self.is_swapping = False
        return ()
