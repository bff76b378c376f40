"""The process that starts and replaces workers, has policies compiled for them, and says how they are.

No connection passes it. It holds the doors, so that none closes with a worker that is lost, and what is in force as
memory to hand on.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING

from proxy.child import memory
from proxy.config import Config, OnLogFailure, SocketAddress
from proxy.config.document import to_document
from proxy.issuing import DAY_S, reminder
from proxy.log.target import share_turns
from proxy.metrics.meter import Counts, Number, Totals, merge
from proxy.metrics.table import METRICS
from proxy.options import Unready, say
from proxy.service.compiler import request_for
from proxy.service.doors import OpenDoor
from proxy.service.notify import Notifier
from proxy.service.processes import Processes
from proxy.service.reloading import Reloads
from proxy.service.status import ReloadResult, WorkerState
from proxy.service.watch import Watch
from proxy.worker.host import Sent, Worker
from proxy.worker.messages import Configuration, Door, LogTurns, Reopen

if TYPE_CHECKING:
    from proxy.service.admin import Admin

ASK_S = 1.0
REMIND_S = 60.0


class Supervisor:
    """One service. Made on a running asyncio loop; the doors are its own from now on."""

    def __init__(self, config: Config, doors: Sequence[OpenDoor]) -> None:
        self._config = config
        self._doors = doors
        self._turns = share_turns()
        self._totals = Totals()
        self._processes = Processes()
        self._counts = Counts(self._gauges)
        self._watch = Watch((*config.policy, *config.tags), config.pki)
        self._moved = asyncio.Event()  # some worker is in another state
        self._workers = [
            Worker(number, partial(self._introduce, number), self._judge_again, self._moved.set, self._totals)
            for number in range(1, config.workers + 1)
        ]
        self._reloads = Reloads(request_for(config), self._workers, self._moved, self._counts)
        self._admin: Admin | None = None
        self._is_ending = False
        self._notifier = Notifier()

    # --- its life ---

    async def start(self) -> None:
        """Returns when every worker serves. Raises Unready."""
        if self._config.admin and not self._config.admin[1]:  # a port of ours, which no worker may ever dial
            await self._open_admin()
        for worker in self._workers:
            worker.start()  # it loads its code while the compiler reads the policy
        loading = asyncio.create_task(self._reloads.first())
        try:
            await self._open_admin()
            await loading
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        while not all(worker.state is WorkerState.READY for worker in self._workers):
            for worker in self._workers:
                if worker.failure:
                    raise Unready(f"worker {worker.number} {worker.failure}")
            self._moved.clear()
            await self._moved.wait()

    async def run(self, stop: asyncio.Event) -> None:
        """Replace, reload and answer until `stop` is set."""
        self._notifier.ready(self._shown())
        async with asyncio.TaskGroup() as group:
            works = (self._reloads.run, self._ask_workers, self._watch_files, self._remind, self._say_alive)
            tasks = [group.create_task(work()) for work in works]
            await stop.wait()
            for task in tasks:
                task.cancel()

    async def finish(self, hurry: asyncio.Event) -> None:
        """Accept nothing more, let connections end within the grace, or at once after `hurry`. All is recorded then."""
        self._is_ending = True
        self._notifier.stopping()
        for door in self._doors:
            door.close()
        for worker in self._workers:
            worker.finish(self._config.grace_s)
        hurrying = asyncio.create_task(self._hurry(hurry))
        while any(worker.pid for worker in self._workers):
            self._moved.clear()
            await self._moved.wait()
        hurrying.cancel()
        if self._admin:
            await self._admin.close()
        self._reloads.close()
        os.close(self._turns)

    async def _hurry(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        for worker in self._workers:
            worker.finish(0.0)

    async def _open_admin(self) -> None:
        if self._config.admin is None or self._admin:
            return
        from proxy.service.admin import (  # here: it brings a web server, which not every gate has
            AdminFailed,
            open_admin,
        )

        try:
            self._admin = await open_admin(self._config.admin, self, token_file=self._config.admin_token, log=say)
        except AdminFailed as error:
            raise Unready(str(error)) from error

    async def _ask_workers(self) -> None:
        shown = self._shown()
        while True:
            await asyncio.sleep(ASK_S)
            for worker in self._workers:
                worker.ask()
            if shown != (shown := self._shown()):
                self._notifier.status(shown)

    async def _say_alive(self) -> None:
        while self._notifier.watchdog_s:
            self._notifier.alive()
            await asyncio.sleep(self._notifier.watchdog_s / 2)

    def _shown(self) -> str:
        """How it stands, in words, to the service manager."""
        return "; ".join(self.ready()) or f"serving by policy {self._reloads.generation}"

    async def _watch_files(self) -> None:
        while True:
            await self._watch.changed()
            self._reloads.ask()

    async def _remind(self) -> None:
        """Of issuing CAs that come to their end, and have a store read again that could not be: a token that was away
        changes no file as it comes back."""
        said, again = "", 0.0
        while True:
            told = self._reminder()
            if told and (told != said or time.time() >= again):
                say(told)
                again = time.time() + DAY_S
            said = told
            if self._reloads.fault:
                self._reloads.ask()
            await asyncio.sleep(REMIND_S)

    def _reminder(self) -> str:
        return reminder(self._reloads.issuers, time.time()) if self._reloads.issuers else ""

    @property
    def admin_address(self) -> SocketAddress | None:
        return self._admin.address if self._admin else None

    # --- what workers are told ---

    def hang_up(self) -> None:
        """SIGHUP: follow a log file that was moved away, and read the policy files and the issuing CAs again."""
        for worker in self._workers:
            worker.tell(Reopen())
        self._reloads.ask()

    def _introduce(self, number: int) -> Iterator[Sent]:
        yield LogTurns(), open(os.dup(self._turns), "rb")  # noqa: SIM115 - given away
        config = replace(self._config, admin=self.admin_address or self._config.admin)
        yield Configuration(), memory(json.dumps(to_document(config)).encode(), "configuration")
        for door in self._doors:
            yield Door(door.kind), door.sockets[number - 1].dup()
        yield from self._reloads.told()

    def _judge_again(self, worker: Worker) -> None:
        self._reloads.tell_again(worker)

    # --- Status, as the admin port asks it ---

    def ready(self) -> list[str]:
        """Why the service is not ready; empty: it is.

        Nameservers and upstreams have no part in it: a workload could turn the gate red for all by asking for names of
        a server that is dead. They are in the metrics.
        """
        if self._is_ending:
            return ["the gate is ending"]
        return [f"worker {worker.number} {why}" for worker in self._workers if (why := self._unready(worker))]

    def _unready(self, worker: Worker) -> str | None:
        if worker.state is None:
            return "is not running"
        if worker.state is not WorkerState.READY:
            return "is starting"
        if worker.is_silent:
            return "does not answer"
        if worker.generation != self._reloads.generation and not self._reloads.is_swapping:
            return "judges by an older policy"
        if self._reloads.is_late(worker) and not self._reloads.is_swapping:
            return "signs by issuing CAs that were replaced"
        if worker.answer and worker.answer.log_failing and self._config.on_log_failure is OnLogFailure.DENY:
            return "cannot write the decision log, and denies everything"
        if worker.answer and worker.answer.inspector_failing:
            return "has an inspector that keeps ending"
        if worker.answer and worker.answer.inspector_silent:
            return "has an inspector that does not answer"
        return None

    def notes(self) -> list[str]:
        found = [
            f"worker {worker.number} cannot write the decision log"
            for worker in self._workers
            if worker.answer and worker.answer.log_failing
        ]
        if self._reloads.refused:
            found.append(f"the policy files cannot be loaded; policy {self._reloads.generation} stays in force")
        if self._reloads.fault:
            found.append("the issuing CAs cannot be replaced by those of the store; the former stay in force")
        if told := self._reminder():
            found.append(told)
        return found

    async def metrics(self, openmetrics: bool) -> bytes:
        from proxy.metrics.page import render

        pids = [worker.pid for worker in self._workers if worker.pid]
        counted = merge((self._totals.sum(), self._counts.snapshot(), self._processes.look(pids)))
        info = {
            "outgate_policy_generation_info": {"generation": self._reloads.generation},
            "outgate_build_info": {
                "version": version_of("outgate"),
                "python": platform.python_version(),
                "openssl": ssl.OPENSSL_VERSION,
            },
        }
        return render(counted, info, openmetrics=openmetrics)

    async def reload(self) -> ReloadResult:
        return await self._reloads.ask()

    def _gauges(self) -> dict[str, Number]:
        """What the supervisor itself has to say in the metrics."""
        states = [worker.state for worker in self._workers]
        numbers: dict[str, Number] = {
            METRICS["outgate_workers"].series(state): states.count(state) for state in WorkerState
        }
        numbers["outgate_worker_restarts_total"] = sum(worker.restarts for worker in self._workers)
        if self._reloads.in_force:
            numbers["outgate_policy_loaded_timestamp_seconds"] = self._reloads.in_force.loaded
        if self._reloads.issuers:
            numbers["outgate_issuing_expiry_timestamp_seconds"] = self._reloads.issuers.expires
        return numbers
