"""The life of a reload: somebody asks, the compiler reads, every worker goes by what is new or nothing changes.

What is in force, a policy and the issuing CAs that sign leaves under it, is held as memory; a worker that is started
later gets the same, whatever the files say by then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from proxy.compiled import duplicate
from proxy.issuing import Issuers
from proxy.metrics.meter import Counts
from proxy.options import Unready, say
from proxy.service.compiler import NICENESS, Report, Request, compile_policy
from proxy.service.status import ReloadOutcome, ReloadResult, refused_note
from proxy.worker.host import RETRY_S, Sent, Worker
from proxy.worker.messages import Judge, Sign

SWAP_S = 30.0  # for every worker to judge by a new policy; a replaced one has to start first


@dataclass(frozen=True, slots=True)
class InForce:
    """A policy, and when it was loaded (POSIX seconds)."""

    report: Report
    policy: BinaryIO
    loaded: float

    def told(self) -> Sent:
        """How a worker is told to judge by it."""
        return Judge(self.report.generation, self.report.inspects, self.report.http2), duplicate(self.policy)


class Reloads:
    """The policy and the issuing CAs of a service, and the reloads of them, one at a time.

    request  what to compile
    workers  who go by it
    moved    set whenever one of them is in another state
    """

    def __init__(self, request: Request, workers: Sequence[Worker], moved: asyncio.Event, counts: Counts) -> None:
        self.in_force: InForce | None = None
        self.issuers: Issuers | None = None  # in force
        self.refused = ""  # why the newest policy files are not in force
        self.fault = ""  # why the store's issuing CAs may not be
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

    @property
    def refused_note(self) -> str:
        """`refused`, for whoever asks: which files, and not what they say."""
        return refused_note((*self._request.paths, *self._request.tags), self.refused, self.generation)

    def ask(self) -> asyncio.Future[ReloadResult]:
        """A reload that begins after this call. Asked for several times while another is under way, it is one."""
        answer: asyncio.Future[ReloadResult] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self._wanted.set()
        return answer

    def told(self) -> Iterator[Sent]:
        """How a worker is told to go by what is in force. Raises OSError."""
        if self.issuers:
            yield Sign(self.issuers.digest, self.issuers.text), None
        if self.in_force:
            yield self.in_force.told()

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

    def is_late(self, worker: Worker) -> bool:
        """Whether it does not go by what is in force yet."""
        return worker.generation != self.generation or (
            self.issuers is not None and worker.issuers != self.issuers.digest
        )

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
        """Load what the service starts with. Raises Unready."""
        await self._take_over(self._request)

    def close(self) -> None:
        """There is nobody left to judge."""
        if self.in_force:
            self.in_force.policy.close()

    async def _reload(self) -> ReloadResult:
        before, issuers, was_refused = self.generation, self.issuers, self.refused
        known = issuers.public if issuers else None
        try:
            report = await self._take_over(replace(self._request, known=before, issuers=known, niceness=NICENESS))
        except Unready as error:
            self._note_refusal(str(error))
            return ReloadResult(ReloadOutcome.REFUSED, before, tuple(self.refused.splitlines()))
        self._note_refusal(report.problems)
        self._note_fault(report.fault)
        problems = tuple((report.problems or report.fault).splitlines())
        if was_refused and not self.refused and self.generation == before:
            say(f"the files say again what is in force: policy {before}")
        if self.generation == before and self.issuers is issuers:
            return ReloadResult(ReloadOutcome.REFUSED if problems else ReloadOutcome.UNCHANGED, before, problems)
        if late := await self._late():
            say(f"what was loaded is not in force everywhere: {'; '.join(late)}")
            return ReloadResult(ReloadOutcome.FAILED, self.generation, late)
        if self.generation != before:
            say(f"policy {self.generation} is in force")
        if self.issuers is not issuers:
            say(_news(issuers, self.issuers))
        outcome = ReloadOutcome.REFUSED if report.problems else ReloadOutcome.LOADED
        return ReloadResult(outcome, self.generation, problems)

    def _note_refusal(self, why: str) -> None:
        """Say it once."""
        if why and why != self.refused:
            say(f"the policy is not reloaded, {self.generation} stays in force:\n{why}")
        self.refused = why

    def _note_fault(self, why: str) -> None:
        """Say it once, and once that it is over."""
        if why and why != self.fault:
            say(f"the issuing CAs are not replaced, {self.issuers} stays in force:\n{why}")
        if self.fault and not why:
            say(f"the issuing CAs can be read again: {self.issuers}")
        self.fault = why

    async def _take_over(self, request: Request) -> Report:
        """Compile, and tell every worker what is another than before. Raises Unready; all stays as it was."""
        report, policy = await compile_policy(request)
        if report.issuers:
            self.issuers = report.issuers
            for worker in self._workers:
                worker.tell(Sign(report.issuers.digest, report.issuers.text))
        if policy is None:
            return report
        say(report.closed)
        old, self.in_force = self.in_force, InForce(report, policy, time.time())
        for worker in self._workers:  # whatever it answered last: it may not have taken what it was told after that
            self.tell(worker)
        if old:
            old.policy.close()
        return report

    async def _late(self) -> tuple[str, ...]:
        """Wait for the workers. Returns a line for each that does not go by what is in force yet."""
        self.is_swapping = True
        try:
            async with asyncio.timeout(SWAP_S):
                while any(map(self.is_late, self._workers)):
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            late = filter(self.is_late, self._workers)
            return tuple(f"worker {worker.number} does not go by it yet" for worker in late)
        finally:
            self.is_swapping = False
        return ()


def _news(before: Issuers | None, after: Issuers | None) -> str:
    """What to say of issuing CAs that came into force."""
    if before and after and before.ids == after.ids:  # a step of a root: other cross certificates go with the leaves
        return f"{after} has another chain: new connections are sent it"
    return f"{after} is in force: new connections are shown leaves of it"
