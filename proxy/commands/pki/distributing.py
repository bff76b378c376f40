"""What `outgate pki distribute` does: reads the bundle, puts it there, says what became of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pki.bundle_source import Source
from pki.trust import TrustError, write_trust
from proxy.commands import NO, NOT_STARTED, YES, Json
from proxy.commands.trust.bundle import written
from proxy.console import Console, stop
from proxy.options import say
from proxy.service.watch import Watch

if TYPE_CHECKING:  # a directory is written without a client of Kubernetes
    from pki.kubernetes.job import Aim
    from pki.kubernetes.placing import Told

AGAIN_S = 10.0  # after a directory could not be written

type Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What both ways have in common.

    path        the directory to write to; None: it goes to Kubernetes
    mount_path  where programs find the files
    watch       stay, and keep the bundle there
    ready_file  is there while it stands everywhere
    """

    source: Source
    path: Path | None
    mount_path: str
    watch: bool
    as_json: bool
    ready_file: Path | None

    def read(self) -> Files:
        """Raises TrustError."""
        return self.source.read(self.mount_path, os.environ, self.path)

    def ready(self, is_ready: bool) -> None:
        if self.ready_file is None:
            return
        try:
            if is_ready:
                self.ready_file.touch()
            else:
                self.ready_file.unlink(missing_ok=True)
        except OSError as error:
            say(f"--ready-file {self.ready_file}: {error.strerror}; name a file that can be written")


class Changes:
    """The bundle, each time that its files have become others. Made before it is read for the first time."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._watch = self._new_watch()

    async def next(self) -> Files:
        """Waits for it. What cannot be read changes nothing and is said: it may be half written."""
        while True:
            await self._watch.changed()
            self._watch = self._new_watch()
            try:
                return self._orders.read()
            except TrustError as error:
                say(f"{error}; the former bundle stays")

    def _new_watch(self) -> Watch:
        return Watch(self._orders.source.paths(os.environ))


def to_directory(orders: Orders, path: Path) -> int:
    """Writes the trust directory, and keeps it if so ordered. Returns the exit code."""

    async def work() -> int:
        changes = Changes(orders)
        _show_written(path, write_trust(path, orders.read()), orders)
        if orders.watch:
            await _keep_directory(orders, path, changes)
        return YES

    try:
        return _until_ended(work(), orders)
    except TrustError as error:
        stop(str(error), NOT_STARTED)


def to_kubernetes(orders: Orders, aim: Aim, kubeconfig: str | None, context: str | None, deadline_s: float) -> int:
    """Writes the ConfigMaps, and keeps them if so ordered. Returns the exit code."""
    from pki.kubernetes.api import ApiFault, NoCluster, connect
    from pki.kubernetes.job import Job
    from pki.kubernetes.objects import BundleTooLarge

    async def work() -> int:
        changes = Changes(orders)
        files = orders.read()
        async with connect(kubeconfig, context, connections=aim.connections) as api:
            if not orders.watch:
                job = Job(api, aim, lambda told: _show_failure(told, aim), say)
                return _show_once(await job.once(files, deadline_s), aim, orders)
            job = Job(api, aim, lambda told: _show_change(told, aim, orders), say)
            await job.keep(files, changes.next, orders.ready)
        return YES

    try:
        return _until_ended(work(), orders)
    except (TrustError, NoCluster, ApiFault, BundleTooLarge) as error:
        stop(str(error), NOT_STARTED)


async def _keep_directory(orders: Orders, path: Path, changes: Changes) -> None:
    orders.ready(True)
    owed: Files | None = None
    coming = asyncio.ensure_future(changes.next())
    try:
        while True:
            await asyncio.wait({coming}, timeout=None if owed is None else AGAIN_S)
            if coming.done():
                owed, coming = coming.result(), asyncio.ensure_future(changes.next())
            assert owed is not None, "without anything owed it waits for a change"
            try:
                _show_written(path, write_trust(path, owed), orders)
                owed = None
            except TrustError as error:
                say(f"{error}; it is tried again in {AGAIN_S:g} s")
            orders.ready(owed is None)
    finally:
        coming.cancel()


def _until_ended(work: Coroutine[None, None, int], orders: Orders) -> int:
    """The result of `work`. SIGINT and SIGTERM end it: as they should where it keeps something, else before its end."""

    async def run() -> int:
        orders.ready(False)
        task = asyncio.create_task(work)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            return YES if orders.watch else NOT_STARTED
        finally:
            orders.ready(False)

    return asyncio.run(run())


def _show_written(path: Path, names: Sequence[str], orders: Orders) -> None:
    if orders.as_json:
        click.echo(json.dumps({"directory": str(path), "written": list(names)}))
    else:
        Console().line(written(path, names))


def _show_once(told: Sequence[Told], aim: Aim, orders: Orders) -> int:
    """What became of every place; returns the exit code."""
    from pki.kubernetes.placing import Outcome

    outcomes = Counter(one.outcome for one in told)
    if orders.as_json:
        counts = {outcome.value: outcomes[outcome] for outcome in Outcome if outcomes[outcome]}
        click.echo(json.dumps({"name": aim.name, "outcomes": counts, "places": [_told_json(one) for one in told]}))
    else:
        console = Console()
        console.rows([_place(one, aim), one.outcome.value, one.because] for one in told)
        counted = (f"{outcomes[outcome]} {outcome.value}" for outcome in Outcome if outcomes[outcome])
        console.line(f"{aim.name}: {', '.join(counted) or 'no namespace matches'}")
    if outcomes[Outcome.FAILED]:
        return NOT_STARTED
    return NO if outcomes[Outcome.REFUSED] else YES


def _show_failure(told: Told, aim: Aim) -> None:
    """Said when it happens: it is tried again, and may be in order at the end."""
    from pki.kubernetes.placing import Outcome

    if told.outcome is Outcome.FAILED:
        say(f"{_place(told, aim)}: {told.because}")


def _show_change(told: Told, aim: Aim, orders: Orders) -> None:
    """One line for each change: when and where, never what."""
    from pki.kubernetes.placing import Outcome

    if told.outcome in (Outcome.UNCHANGED, Outcome.GONE):
        return
    if orders.as_json:
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        click.echo(json.dumps({"time": now, "name": aim.name, **_told_json(told)}))
    else:
        say(f"{_place(told, aim)}: {told.outcome}" + (f": {told.because}" if told.because else ""))


def _place(told: Told, aim: Aim) -> str:
    return f"namespace {told.place}" if told.place else f"ClusterTrustBundle {aim.name}"


def _told_json(told: Told) -> Json:
    return {"namespace": told.place or None, "outcome": told.outcome.value, "because": told.because}
