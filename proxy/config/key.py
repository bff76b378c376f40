"""What one thing is that an operator can say to a gate: how it is written, and which fields of `Config` it fills."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from policies.keys import Shape, snake

PREFIX = "OUTGATE_"


class Group(StrEnum):
    """The headings of `--help` and of the manual."""

    POLICY = "Policy"
    LISTENERS = "Listeners"
    UPSTREAM = "Upstream"
    RECORDS = "Records and administration"
    PROCESS = "Process"
    LIMITS = "Limits, of each worker"


class Many(StrEnum):
    """How several values stand in one variable: a regular expression of what is between them."""

    PATHS = re.escape(os.pathsep)
    WORDS = r"[,\s]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKey:
    """One thing to say.

    path     the key in gate.yaml, with a dot before one that stands within another
    fields   what it fills in `Config`, with a dot before a field of a part
    shape    how it is read from gate.yaml; from text too, unless there is `texts`
    example  as it stands in gate.yaml
    unsaid   what holds where nobody says, if the default in `Config` does not tell
    many     it takes several values: the flag is repeatable
    is_path  relative to the directory of gate.yaml, or to the working directory
    """

    path: str
    group: Group
    fields: tuple[str, ...]
    shape: Shape[Any]  # a table holds keys of many types
    metavar: str
    says: str
    example: str
    unsaid: str = ""
    flags: tuple[str, ...] = ()
    texts: Shape[Any] | None = None
    many: Many | None = None
    is_path: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def flag(self) -> str:
        return self.flags[-1] if self.flags else "--" + snake(self.name).replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()

    @property
    def argument(self) -> str:
        """What the command calls it."""
        return snake(self.path).replace(".", "_")
