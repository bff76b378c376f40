"""A disk that is soon full, for the tests of what is written."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def small_disk_at(directory: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` in a mount namespace of its own, reached through the process that lives there; else a skip."""
    script = f'mount -t tmpfs -o size={size} outgate-test "$0" && echo mounted && read -r _'
    command = ["unshare", "--mount", "sh", "-c", script, str(directory)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as inside:
        assert inside.stdin is not None
        assert inside.stdout is not None
        assert inside.stderr is not None
        if inside.stdout.readline() != "mounted\n":
            pytest.skip(f"no mount namespace here: {inside.stderr.read().strip()}")
        yield Path(f"/proc/{inside.pid}/root{directory}")
        inside.stdin.write("\n")
        inside.stdin.flush()
