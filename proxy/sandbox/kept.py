"""Which paths the command may read and not change, found before the sandbox is entered. `mounts` applies it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Kept:
    """Real paths. `read_only` cannot be written; `pinned` are the directories above, outermost first, that cannot be
    renamed: else another directory could be put where `read_only` is looked for."""

    read_only: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()


def find(paths: Iterable[str]) -> Kept:
    """What it takes to keep `paths`; those that are not there, and devices, are left out."""
    real = {os.path.realpath(path) for path in paths}
    kept: list[str] = []
    for path in sorted(path for path in real if os.path.isdir(path) or os.path.isfile(path)):
        if not any(path.startswith(above + "/") for above in kept):
            kept.append(path)
    above = {str(parent) for path in kept for parent in Path(path).parents if _may_be_renamed(parent)}
    return Kept(tuple(kept), tuple(sorted(above)))


def _may_be_renamed(directory: Path) -> bool:
    return directory != directory.parent and os.access(directory.parent, os.W_OK)
