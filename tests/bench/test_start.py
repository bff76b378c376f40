"""How long a person waits: for a command that asks nothing, and for the first answer through the inspector."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.end_to_end.world import OUTGATE, World, a_world
from tests.sandbox_user import why_no_sandbox

GOAL_TRUE_S, GOAL_ANSWER_S = 0.5, 1.0
ROUNDS = 5
POLICY = """\
version: 1
workloads:
  app:
    rules:
      - {host: api.example, tls: inspect}
      - host: "*.cdn.example"
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with a_world() as made:
        yield made


def test_a_command_that_asks_nothing(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    if reason := why_no_sandbox():
        pytest.skip(reason)
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)

    def run() -> None:
        subprocess.run([str(OUTGATE), "run", "-p", str(policy), "--", "true"], check=True)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]  # it has no types
    benchmark.extra_info["goal_s"] = GOAL_TRUE_S


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("host", ["api.example", "one.cdn.example"], ids=["inspected", "passthrough"])
def test_from_start_to_the_first_answer(benchmark: BenchmarkFixture, world: World, host: str) -> None:
    def run() -> None:
        ran = world.run(["curl", "-s", f"https://{host}/"], policy=POLICY)
        assert ran.status == 0

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]  # it has no types
    benchmark.extra_info["goal_s"] = GOAL_ANSWER_S
