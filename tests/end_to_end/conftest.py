"""One world for the whole directory: the tests look at what changed in it, so they run one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.world import World, why_no_world


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    if reason := why_no_world():
        pytest.skip(f"no namespaces of our own: {reason}")
    # not pytest's own directory, which other users may not enter
    with tempfile.TemporaryDirectory(prefix="outgate-world-") as name:
        Path(name).chmod(0o755)
        made = World(Path(name))
        try:
            yield made
        finally:
            made.close()
