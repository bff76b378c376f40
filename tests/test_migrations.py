"""The policies in the notes on migration load, mean what their tests say, and leave `check` nothing to say."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest

from policies.cases import run
from policies.lint import lint
from policies.model import Action
from proxy.policy_files import read_policy, shared_suffix

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("migrate-*.md"))
TODAY, NOW = date(2026, 11, 22), 1795305600.0


def policy_in(page: Path) -> str:
    [text] = [
        block for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S) if "version: 1" in block
    ]
    return str(text)


def test_there_is_a_note_for_each_that_people_come_from() -> None:
    assert [page.stem for page in PAGES] == ["migrate-cilium", "migrate-istio", "migrate-squid"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_policy_means_what_it_says(page: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_in(page))
    policy = read_policy([str(path)])
    results = run(policy, NOW)
    assert [result for result in results if not result.is_pass] == []
    assert {result.test.expect for result in results} == set(Action)
    assert lint(policy, results, shared_suffix=shared_suffix, today=TODAY) == ()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_it_has_a_table_and_says_what_has_no_counterpart(page: Path) -> None:
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert {len(row) for row in rows} == {5}
    assert "\nWithout a counterpart: " in page.read_text()
