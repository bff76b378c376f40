"""What a supervisor says of itself to whoever asks: whether it is ready, its metrics, what came of a reload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class WorkerState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    ENDING = "ending"


class ReloadOutcome(StrEnum):
    """What came of a reload."""

    LOADED = "loaded"  # a new policy, or new issuing CAs, are in force
    UNCHANGED = "unchanged"  # the files say what they said before
    REFUSED = "refused"  # the files have problems; what they should have replaced stays in force
    FAILED = "failed"  # a part of the gate failed


@dataclass(frozen=True, slots=True)
class ReloadResult:
    """`generation`, where known, is that of the policy in force now; `problems` are lines with place and repair."""

    outcome: ReloadOutcome
    generation: str = ""
    problems: tuple[str, ...] = ()


def refused_note(paths: Sequence[str], problems: str, generation: str) -> str:
    """Which of the files that a gate reads have problems. What these are is for the log: it may name hosts."""
    lines = problems.splitlines()
    refused = [path for path in paths if any(line.startswith(f"{path}:") for line in lines)]
    found = ", ".join(refused) or "the policy files"
    return f"{found} cannot be loaded; policy {generation} stays in force, and the log says why"


class Status(Protocol):
    """What the admin port asks. Texts are shown to anybody who reaches it: no host, no workload, no secret in them."""

    def ready(self) -> Sequence[str]:
        """Why it is not ready; empty: it is."""
        ...

    def notes(self) -> Sequence[str]:
        """What an operator should know and what does not make it unready: a policy file that was refused."""
        ...

    async def metrics(self, openmetrics: bool) -> bytes: ...

    async def reload(self) -> ReloadResult: ...
