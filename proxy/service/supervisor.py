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
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING

from proxy.child import memory
from proxy.config import Config, OnLogFailure, SocketAddress
from proxy.config.document import to_document
from proxy.identity import Change
from proxy.issuing import DAY_S, reminder
from proxy.kubernetes.watching import Cluster
from proxy.log.target import share_turns
from proxy.metrics.meter import Counts, Number, Totals, merge
from proxy.metrics.table import METRICS, Part
from proxy.opener.host import OpenerProcess
from proxy.options import Unready, say
from proxy.rings import share_rings
from proxy.service.compiler import request_for
from proxy.service.doors import OpenDoor
from proxy.service.notify import Notifier
from proxy.service.processes import Processes
from proxy.service.reloading import Reloads
from proxy.service.status import ReloadResult, WorkerState
from proxy.service.watch import Watch
from proxy.worker.host import Sent, Worker
from proxy.worker.messages import Configuration, Door, Leave, LogTurns, LookupRings, Reopen, ToOpener

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
        self._rings = share_rings(config.workers)
        self._totals = Totals()
        self._processes = Processes()
        self._counts = Counts(self._gauges)
        self._watch = Watch((*config.policy, *config.tags), config.pki)
        self._moved = asyncio.Event()  # some worker is in another state
        self._cluster = Cluster(config.kubernetes, self._tell_all, say) if config.kubernetes else None
        review = self._cluster.review if self._cluster else None
        self._workers = [
            Worker(number, partial(self._introduce, number), self._judge_again, self._moved.set, self._totals, review)
            for number in range(1, config.workers + 1)
        ]
        self._reloads = Reloads(request_for(config), self._workers, self._moved, self._counts)
        self._opener = OpenerProcess(self._link_all, say) if config.openings else None
        self._admin: Admin | None = None
        self._is_ending = False
        self._notifier = Notifier()

    # --- its life ---

    async def start(self) -> None:
        """Returns when every worker serves. Raises Unready."""
        if self._config.admin and not self._config.admin[1]:  # a port of ours, which no worker may ever dial
            await self._open_admin()
        if self._cluster:
            self._cluster.start()
        if self._opener:
            self._opener.start()
        for worker in self._workers:
            worker.start()  # it loads its code while the compiler reads the policy
        loading = asyncio.create_task(self._reloads.first())
        try:
            await self._open_admin()
            if self._opener and (why := await self._opener.first()):
                raise Unready(why)
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

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event) -> None:
        """Replace, reload and answer until `stop` is set, and while the service stands down, unless `hurry` is."""
        self._notifier.ready(self._shown())
        async with asyncio.TaskGroup() as group:
            works = (self._reloads.run, self._ask_workers, self._watch_files, self._remind, self._say_alive)
            tasks = [group.create_task(work()) for work in works]
            if self._cluster:
                tasks.append(group.create_task(self._cluster.run()))
            await stop.wait()
            await self._stand_down(hurry)
            for task in tasks:
                task.cancel()

    async def _stand_down(self, hurry: asyncio.Event) -> None:
        """Not ready, and all doors open: until a balancer has seen it, what it sends here would be refused."""
        self._is_ending = True
        self._notifier.stopping()
        if not self._config.drain_s:
            return
        say(f"new connections are to go elsewhere; the doors close in {self._config.drain_s:g} s")
        for worker in self._workers:
            worker.tell(Leave())
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_s):
                await hurry.wait()

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
        if self._cluster:
            self._cluster.close()
        if self._opener:
            await self._opener.close()
        self._reloads.close()
        os.close(self._turns)
        os.close(self._rings)

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
                if worker.answer and worker.answer.opener_missing:
                    self._link(worker)
            if self._opener:
                self._opener.look()
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
        rings = open(os.dup(self._rings), "rb")  # noqa: SIM115 - given away
        yield LookupRings(number - 1, self._config.workers), rings
        config = replace(self._config, admin=self.admin_address or self._config.admin)
        yield Configuration(), memory(json.dumps(to_document(config)).encode(), "configuration")
        if self._opener and (link := self._opener.link()):
            yield ToOpener(), link
        for door in self._doors:
            if number <= len(door.sockets):
                yield Door(door.kind, door.target), door.sockets[number - 1].dup()
        if self._cluster:
            yield from ((change, None) for change in self._cluster.told())
        yield from self._reloads.told()
        if self._is_ending:
            yield Leave(), None

    def _link(self, worker: Worker) -> None:
        if self._opener and worker.pid and (link := self._opener.link()):
            worker.tell(ToOpener(), link)

    def _link_all(self) -> None:
        for worker in self._workers:
            self._link(worker)

    def _tell_all(self, change: Change) -> None:
        for worker in self._workers:
            worker.tell(change)

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
        others = [part.unready for part in (self._cluster, self._opener) if part and part.unready]
        return others + [f"worker {worker.number} {why}" for worker in self._workers if (why := self._unready(worker))]

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
        if worker.answer and worker.answer.opener_missing:
            return "is not linked to the opener"
        if worker.answer and worker.answer.openings_stale and not self._reloads.is_swapping:
            return "has not closed yet what an older policy opened"
        if worker.answer and worker.answer.udp_failing:
            return "cannot read a socket where datagrams arrive"
        if worker.answer and worker.answer.unanswered:
            return f"cannot answer {worker.answer.unanswered}"
        return None

    def notes(self) -> list[str]:
        found = [
            f"worker {worker.number} cannot write the decision log"
            for worker in self._workers
            if worker.answer and worker.answer.log_failing
        ]
        if self._reloads.refused:
            found.append(self._reloads.refused_note)
        if self._reloads.fault:
            found.append("the issuing CAs cannot be replaced by those of the store; the former stay in force")
        if told := self._reminder():
            found.append(told)
        if self._cluster:
            found += self._cluster.notes
        return found

    async def metrics(self, openmetrics: bool) -> bytes:
        from proxy.metrics.page import render

        pids = [worker.pid for worker in self._workers if worker.pid]
        others = {
            Part.WATCH: self._cluster.pid if self._cluster else None,
            Part.OPENER: self._opener.pid if self._opener else None,
        }
        counted = merge((self._totals.sum(), self._counts.snapshot(), self._processes.look(pids, others)))
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
        if self._cluster:
            numbers |= self._cluster.gauges()
        if self._opener:
            numbers |= self._opener.gauges()
        if self._reloads.issuers:
            numbers["outgate_issuing_expiry_timestamp_seconds"] = self._reloads.issuers.expires
        return numbers
