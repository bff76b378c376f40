"""What is wrong with a policy file: every problem names its place, the value and the repair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.model import Place


@dataclass(frozen=True, slots=True)
class Problem:
    """`message` is lower case without a full stop; `hint` is the repair, where one is known."""

    place: Place
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        where = f"{self.place.file}:{self.place.line}:{self.place.column}"
        return f"{where}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class PolicyError(Exception):
    """The policy is not loaded. `problems` holds all that were found, in file order; `str()` is one line each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.place.file, p.place.line, p.place.column)))
        super().__init__("\n".join(map(str, self.problems)))
