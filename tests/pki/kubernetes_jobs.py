"""Running the distribution job against a stand-in: once, or in a thread of its own for as long as a test asks."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pki.authority import Root, certificates_pem, create_root
from pki.distribution import trust_files
from pki.kubernetes.api import Pace, connect
from pki.kubernetes.job import Aim, Job
from pki.kubernetes.placing import Outcome, Told
from tests.pki.api_server import ApiServer

NAME, MOUNT = "outgate-trust", "/etc/outgate/trust"
QUICK = Pace(first_s=0.02, most_s=0.1)
DEADLINE_S = 60.0

type Files = Mapping[str, bytes]


@cache
def root(number: int = 1) -> Root:
    return create_root(datetime.now(UTC), name=f"Root {number}")


@cache
def files(*numbers: int) -> Files:
    """A bundle of these roots, and of no public ones."""
    return trust_files(MOUNT, certificates_pem(*(root(number).certificate for number in numbers or (1,))), b"")


@dataclass(frozen=True, slots=True)
class Ran:
    """What one run told."""

    told: list[Told]
    said: list[str]

    def outcomes(self) -> dict[str, str]:
        return {one.place: one.outcome.value for one in self.told}

    def because(self, place: str) -> str:
        return next(one.because for one in self.told if one.place == place)


def once(
    server: ApiServer,
    directory: Path,
    carried: Files | None = None,
    *,
    deadline_s: float = DEADLINE_S,
    patience_s: float = 15.0,
    pace: Pace = QUICK,
    **aim: Any,  # Any: the fields of Aim
) -> Ran:
    said: list[str] = []
    aimed = Aim(**{"name": NAME, **aim})

    async def run() -> list[Told]:
        config = server.kubeconfig(directory)
        async with connect(config, None, connections=aimed.connections, patience_s=patience_s) as api:
            job = Job(api, aimed, lambda _: None, said.append, pace)
            return await job.once(carried or files(), deadline_s)

    return Ran(asyncio.run(run()), said)


@dataclass(slots=True)
class Kept:
    """A job that stays. `told` and `said` grow while it works."""

    server: ApiServer
    told: list[Told] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    is_ready: bool = False
    was_ready: int = 0
    bundles: queue.SimpleQueue[Files] = field(default_factory=queue.SimpleQueue)
    coming: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop | None = None

    def carry(self, bundle: Files) -> None:
        """As when the store has changed."""
        self.bundles.put(bundle)
        assert self.loop
        self.loop.call_soon_threadsafe(self.coming.set)

    async def changes(self) -> Files:
        while self.bundles.empty():
            self.coming.clear()
            await self.coming.wait()
        return self.bundles.get()

    def tell(self, told: Told) -> None:
        self.told.append(told)
        self._notify()

    def say(self, text: str) -> None:
        self.said.append(text)
        self._notify()

    def ready(self, is_ready: bool) -> None:
        self.is_ready = is_ready
        self.was_ready += is_ready
        self._notify()

    def outcomes(self, place: str) -> list[Outcome]:
        return [told.outcome for told in self.told if told.place == place]

    def wait_until_ready(self) -> None:
        self.server.wait_for(lambda: self.is_ready, f"the job is ready; it said {self.said}, {self.told[-3:]}")

    def _notify(self) -> None:
        with self.server.changed:
            self.server.changed.notify_all()


@contextmanager
def keeping(
    server: ApiServer,
    directory: Path,
    carried: Files | None = None,
    *,
    patience_s: float = 15.0,
    pace: Pace = QUICK,
    user: Mapping[str, object] | None = None,
    **aim: Any,  # Any: the fields of Aim
) -> Iterator[Kept]:
    """The job at work; a fault of its own is raised on leaving."""
    kept = Kept(server)
    aimed = Aim(**{"name": NAME, **aim})
    config = server.kubeconfig(directory, **(user or {}))
    started: queue.SimpleQueue[asyncio.Task[None]] = queue.SimpleQueue()
    faults: list[BaseException] = []

    async def work() -> None:
        kept.loop = asyncio.get_running_loop()
        async with connect(config, None, connections=aimed.connections, patience_s=patience_s) as api:
            job = Job(api, aimed, kept.tell, kept.say, pace)
            await job.keep(carried or files(), kept.changes, kept.ready)

    async def main() -> None:
        task = asyncio.create_task(work())
        started.put(task)
        try:
            await task
        except asyncio.CancelledError:
            pass

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as fault:  # raised below, in the test
            faults.append(fault)

    thread = threading.Thread(target=run)
    thread.start()
    task = started.get(timeout=DEADLINE_S)
    try:
        yield kept
    finally:
        if kept.loop and thread.is_alive():
            kept.loop.call_soon_threadsafe(task.cancel)
        thread.join(DEADLINE_S)
    assert not thread.is_alive()
    if faults:
        raise faults[0]
