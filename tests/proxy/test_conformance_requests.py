"""Every request trick of the conformance table, against both HTTP hosts: what is answered, recorded and forwarded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.proxy.conformance.client import Cut
from tests.proxy.conformance.framing import framing_rows
from tests.proxy.conformance.hosts import HOSTS, rig_of
from tests.proxy.conformance.judged import judge_rows
from tests.proxy.conformance.rows import Row, check_table
from tests.proxy.conformance.running import Runner

ROWS = [*framing_rows(), *judge_rows()]
STATUSES = {400, 403, 405, 414, 417, 421, 431, 501, 505}


@pytest.fixture(scope="module", params=HOSTS)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with rig_of(request.param, tmp_path_factory.mktemp("table")) as rig:
        yield Runner(request.param, rig)


def test_the_table_is_large_and_keeps_its_own_rules() -> None:
    assert check_table(ROWS) == []
    assert sum(not row.id.startswith("path-") for row in ROWS) >= 200
    assert {answer.status for row in ROWS for answer in row.outcome.answers} > STATUSES


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_request(runner: Runner, row: Row) -> None:
    assert runner.run(row) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_request_in_two(runner: Runner, row: Row) -> None:
    cut = (Cut.RECORD, Cut.TCP)[sum(row.id.encode()) % 2]
    assert runner.run(row, cut) == []
