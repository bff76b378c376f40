"""`outgate check`: problems at their lines, warnings that `--strict` makes errors, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.proxy.commands_of import EXAMPLES, WEATHER, invoke, start, write

WARNED = WEATHER.replace("*.ubuntu.com", "*.github.io").replace("archive.ubuntu.com", "x.github.io")
EXPIRED = WEATHER.replace("name: apt,", "name: apt, until: 2020-01-31,")
BROKEN = "version: 1\nworkloads: {a: {rules: [{hst: x}, {host: y, prts: [1]}]}}\n"


def test_a_good_policy_is_one_quiet_line(tmp_path: Path) -> None:
    result = invoke("check", "-p", write(tmp_path, WEATHER))

    assert (result.exit_code, result.stdout) == (0, "1 workload, 2 rules, 4 tests: no problems\n")


def test_a_warning_passes_unless_strict(tmp_path: Path) -> None:
    path = write(tmp_path, WARNED)

    plain, strict = invoke("check", "-p", path), invoke("check", "--strict", "-p", path)

    warning = (
        '"*.github.io" admits every tenant of github.io, and anyone can own a name there; '
        "name the accounts you use, or write tls: inspect with an allow list\n"
    )
    assert (plain.exit_code, strict.exit_code) == (0, 1)
    assert plain.stdout == f"{path}:10:9: warning: {warning}1 workload, 2 rules, 4 tests: 1 warning\n"
    assert strict.stdout == f"{path}:10:9: error: {warning}1 workload, 2 rules, 4 tests: 1 error\n"


def test_an_expired_rule_and_a_failing_test_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path, EXPIRED)

    result = invoke("check", "-p", path)

    assert result.exit_code == 1
    assert f'{path}:10:9: error: the rule "apt" ended on 2020-01-31 and admits nothing' in result.stdout
    assert (
        f'{path}:13:70: error: the test that weather must allow "tls://archive.ubuntu.com" fails: '
        "got deny, the rule that admits it ended on 2020-01-31\n"
    ) in result.stdout
    assert result.stdout.endswith("1 workload, 2 rules, 4 tests: 2 errors\n")


def test_what_does_not_load_is_a_line_for_each_problem(tmp_path: Path) -> None:
    path = write(tmp_path, BROKEN)

    result = invoke("check", "-p", path)

    assert (result.exit_code, result.stdout) == (1, "")
    assert [line.split(": ")[:2] for line in result.stderr.splitlines()] == [
        [f"{path}:2:26", "error"],
        [f"{path}:2:45", "error"],
    ]


@pytest.mark.parametrize(
    ("text", "codes", "exit_code"),
    [
        (WEATHER, [], 0),
        (WARNED, ["shared_suffix"], 0),
        (EXPIRED, ["expired", "test"], 1),
        (BROKEN, ["load", "load"], 1),
    ],
    ids=["good", "warned", "expired", "broken"],
)
def test_json_has_the_keys_that_help_promises(tmp_path: Path, text: str, codes: list[str], exit_code: int) -> None:
    path = write(tmp_path, text)

    result = invoke("check", "--json", "-p", path)
    told = json.loads(result.stdout)

    assert (result.exit_code, result.stderr) == (exit_code, "")
    assert told["ok"] is (exit_code == 0)
    assert [problem["code"] for problem in told["problems"]] == codes
    for problem in told["problems"]:
        assert list(problem) == ["file", "line", "column", "level", "code", "message", "repair"]
        assert problem["file"] == path
    for key in ("ok", "workloads", "rules", "tests", "problems", "file", "line", "column", "level", "code", "repair"):
        assert key in invoke("check", "--help").stdout


def test_files_merge(tmp_path: Path) -> None:
    first = write(tmp_path, WEATHER)
    second = write(
        tmp_path, "version: 1\nworkloads: {weather: {rules: [{name: git, tcp: 'git.example:22'}]}}\n", "q.yaml"
    )

    result = invoke("check", "-p", first, "-p", second)

    assert result.exit_code == 0
    assert f'{second}:2:31: warning: no test reaches the rule "git"' in result.stdout
    assert "1 workload, 3 rules, 4 tests: 1 warning\n" in result.stdout


@pytest.mark.parametrize("name", ["weather", "coding-agent", "ci-build"])
def test_the_shipped_examples_have_no_problems(name: str) -> None:
    result = invoke("check", "--strict", "-p", str(EXAMPLES / f"{name}.yaml"))

    assert result.exit_code == 0, result.stdout


def test_usage_is_exit_2() -> None:
    assert invoke("check").exit_code == 2
    assert invoke("check", "--nope", "-p", "x").exit_code == 2


def test_help_shows_an_example() -> None:
    assert "outgate check -p weather.yaml --strict" in invoke("check", "--help").stdout


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    good = start("check", "-p", write(tmp_path, WEATHER))
    bad = start("check", "-p", write(tmp_path, BROKEN, "bad.yaml"))

    assert (good.returncode, good.stdout, good.stderr) == (0, "1 workload, 2 rules, 4 tests: no problems\n", "")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (1, "", 2)
