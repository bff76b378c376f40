"""Whether files have changed, of a policy or of an authority's store: looks at them once a second and reads none.

It looks instead of being told: inotify says nothing of a network file system, and something else each time of a
ConfigMap's `..data` link, an editor that renames, a directory that is replaced. What a path leads to is one thing.
"""

from __future__ import annotations

import asyncio
import glob
import os
from collections.abc import Sequence

from pki.layout import ISSUING, STATE

LOOK_S = 1.0

type Look = tuple[tuple[str, int, int, int, int, int] | None, ...]


class Watch:
    """Files by path, and the issuing CAs of a store. Made before they are read, so that a change in between is not
    missed."""

    def __init__(self, paths: Sequence[str], store: str | None = None, look_s: float = LOOK_S) -> None:
        self._paths = tuple(paths)
        self._store = store
        self._look_s = look_s
        self._seen = self._look()

    async def changed(self) -> None:
        """Returns once some file is another than before, and two looks in a row agree on what it is now.

        A file that is missing in both is a change too: who replaces a file is not away for so long.
        """
        before = self._seen
        while True:
            last, self._seen = self._seen, await self._next()
            if self._seen != before and self._seen == last:
                return

    async def _next(self) -> Look:
        await asyncio.sleep(self._look_s)
        return self._look()

    def _look(self) -> Look:
        return look((*self._paths, *(store_files(self._store) if self._store else ())))


def store_files(directory: str) -> list[str]:
    """What the issuing CAs of a store are read from. What stands there may be half of a copy: the rest comes later, and
    is a change as well."""
    found = [STATE, *sorted(glob.glob(f"{ISSUING}/*/*", root_dir=directory))]
    return [os.path.join(directory, name) for name in found]


def look(paths: Sequence[str]) -> Look:
    """What each path leads to now: where, which file, and when it was written. None: nowhere."""
    return tuple(map(_look, paths))


def _look(path: str) -> tuple[str, int, int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
