"""What is to be done with a store, and when, as commands to type. What that is, `pki/plan.py` knows."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.commands import Json
from proxy.commands.pki.showing import moment, stamp

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from pki.plan import Due
    from pki.store import Survey
    from proxy.console import Cell, Console

GRACE = timedelta(days=7)  # what is due for longer is overdue: a job that asks every day has told somebody by then

WHY = {  # by the step
    "rotate issuing --stage": "two thirds of the issuing CA's life are over by then",
    "rotate issuing --activate": "the next issuing CA is staged",
    "rotate issuing --retire": "the former issuing CA signs nothing; its key need not be kept",
    "rotate root --stage": "two thirds of the root's life are over by then",
    "rotate root --activate": "the next root is staged; publish the trust bundle first",
    "rotate root --retire": "by then every workload has the new trust bundle",
    "import": "the CA was made elsewhere: import the next one before this one ends",
    "export": "the CA that another system has ends, or its root does",
}

NAMED = {"import": " --p12 FILE", "export": " --profile PROFILE --to FILE"}  # what only a person knows


@dataclass(frozen=True, slots=True)
class Task:
    """Something to do.

    command     what to type
    start       from when on it is to be done, or can be
    late        from when on clients refuse something, unless it is done; None: never
    is_overdue  it should have been done
    """

    command: str
    start: datetime
    late: datetime | None
    why: str
    is_overdue: bool

    def json(self) -> Json:
        late = stamp(self.late) if self.late else None
        return {
            "command": self.command,
            "start": stamp(self.start),
            "late": late,
            "why": self.why,
            "overdue": self.is_overdue,
        }


def tasks(directory: Path, found: Survey, now: datetime) -> list[Task]:
    """What is to be done, the next thing first. What one command does for two lines stands there once."""
    from pki.plan import plan

    made: dict[str, Task] = {}
    for due in plan(found, now):
        words = _command(due, directory, found)
        is_overdue = now >= due.due + GRACE or (due.late is not None and now >= due.late)
        made.setdefault(words, Task(words, due.due, due.late, WHY[due.step], is_overdue))
    return list(made.values())


def show_tasks(console: Console, found: Iterable[Task], now: datetime) -> None:
    """One line each: when, what to type, why."""
    from proxy.console import Style

    rows: list[list[Cell]] = []
    for task in found:
        when: Cell = f"from {moment(task.start)}"
        if task.is_overdue:
            when = (f"overdue since {task.start:%Y-%m-%d}", Style.BAD)
        elif task.start <= now:
            when = ("now", Style.STRONG)
        rows.append([when, (task.command, Style.CODE), (task.why, Style.DIM)])
    console.rows(rows, indent=2)


def _command(due: Due, directory: Path, found: Survey) -> str:
    from pki.plan import Step

    # In one go: nobody is to be told between the two steps.
    step = "rotate issuing" if due.step is Step.STAGE_ISSUING else due.step.value
    lent = " --root-key FILE" if _needs_offline_key(due, found) else ""
    return f"outgate pki {step} --pki {shlex.quote(str(directory))}{lent}{NAMED.get(due.step, '')}"


def _needs_offline_key(due: Due, found: Survey) -> bool:
    """Whether the step has a root sign whose key is not in the directory."""
    from pki.authority import State
    from pki.chains import root_above
    from pki.plan import Step
    from pki.store import KeyPlace

    if due.step not in (Step.STAGE_ISSUING, Step.STAGE_ROOT, Step.ACTIVATE_ROOT):
        return False
    if due.step is Step.ACTIVATE_ROOT and any(
        one.line is due.line and one.state is State.STAGED for one in found.issuing
    ):
        return False
    below = next((one for one in found.issuing if one.certificate == due.ca), None)
    own = next((root for root in found.roots if root.certificate == due.ca), None)
    root = root_above(found.roots, below) if below else own
    return root is not None and root.key is KeyPlace.OFFLINE
