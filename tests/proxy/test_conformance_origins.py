"""Every hostile origin of the conformance table, behind both HTTP hosts: what clients read, and what is recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.proxy.conformance.hostile import OriginRow, origin_rows
from tests.proxy.conformance.hosts import HOSTS, rig_of
from tests.proxy.conformance.running import Runner

ROWS = list(origin_rows())


@pytest.fixture(scope="module", params=HOSTS)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with rig_of(request.param, tmp_path_factory.mktemp("origins")) as rig:
        yield Runner(request.param, rig)


def test_the_table_is_large() -> None:
    assert len(ROWS) >= 40
    assert len({row.id for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_origin(runner: Runner, row: OriginRow) -> None:
    assert runner.run_origin(row) == []
