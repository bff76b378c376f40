"""One world for the whole directory: the tests look at what changed in it, so they run one after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.world import World, a_world


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with a_world() as made:
        yield made
