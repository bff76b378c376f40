"""`outgate test`: a line a case, a closing count, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.proxy.commands_of import EXAMPLES, WEATHER, invoke, start, write

FAILING = WEATHER.replace('"tls://ubuntu.com"', '"tls://ubuntu.com", "tls://x.ubuntu.com", "tcp://x"')


def test_each_case_is_a_line_with_the_rule_that_decided(tmp_path: Path) -> None:
    path = write(tmp_path, WEATHER)

    result = invoke("test", "-p", path)

    assert result.exit_code == 0
    assert result.stdout == (
        f"weather  {path}\n"
        "  ok  allow  GET https://dataservice.accuweather.com/search?q=Oslo  :5 (search)\n"
        "  ok  allow  tls://archive.ubuntu.com                               :10 (apt)\n"
        "  ok  deny   GET https://dataservice.accuweather.com/forecasts/v1   :5 (search)\n"
        "  ok  deny   tls://ubuntu.com                                       no_rule\n"
        "\n"
        "4 passed\n"
    )


def test_a_failing_case_says_what_came_instead(tmp_path: Path) -> None:
    path = write(tmp_path, FAILING)

    result = invoke("test", "-p", path)

    assert result.exit_code == 1
    assert "FAIL  deny   tls://x.ubuntu.com " in result.stdout
    assert f"line 14: got allow by {path}:10 (apt)\n" in result.stdout
    assert "line 14: a tcp attempt needs a port; write tcp://x:PORT\n" in result.stdout
    assert result.stdout.endswith("\n2 failed, 4 passed\n")


def test_json_has_the_keys_that_help_promises(tmp_path: Path) -> None:
    path = write(tmp_path, FAILING)

    result = invoke("test", "--json", "-p", path)
    told = json.loads(result.stdout)

    assert result.exit_code == 1
    assert (told["ok"], told["passed"], told["failed"]) == (False, 4, 2)
    assert told["cases"][-2:] == [
        {
            "file": path, "line": 14, "workload": "weather", "attempt": "tls://x.ubuntu.com", "expected": "deny",
            "got": "allow", "ok": False, "reason": "rule", "because": "a rule admits it",
            "rule": {"file": path, "line": 10, "name": "apt", "label": "weather/rules[1]"},
        },
        {
            "file": path, "line": 14, "workload": "weather", "attempt": "tcp://x", "expected": "deny", "got": None,
            "ok": False, "reason": "malformed_words", "because": "a tcp attempt needs a port; write tcp://x:PORT",
            "rule": None,
        },
    ]  # fmt: skip
    for key in told["cases"][0]:
        assert key in invoke("test", "--help").stdout


def test_a_policy_without_tests_fails(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nworkloads: {app: {rules: [{host: a.example}]}}\n")

    plain, machine = invoke("test", "-p", path), invoke("test", "--json", "-p", path)

    assert (plain.exit_code, plain.stdout) == (1, "")
    assert plain.stderr == "outgate: no tests to run; write some under tests: WORKLOAD: allow: and deny:\n"
    assert machine.exit_code == 1
    assert json.loads(machine.stdout) == {"ok": False, "passed": 0, "failed": 0, "cases": []}


def test_a_policy_that_does_not_load_fails_with_a_line_for_each_problem(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nworkloads: {a: {rules: [{hst: x}, {host: y, prts: [1]}]}}\n")

    result = invoke("test", "-p", path)

    assert (result.exit_code, result.stdout) == (1, "")
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == [f"{path}:2:26", f"{path}:2:45"]


@pytest.mark.parametrize("name", ["weather", "coding-agent", "ci-build"])
def test_the_shipped_examples_pass_their_own_tests(name: str) -> None:
    result = invoke("test", "-p", str(EXAMPLES / f"{name}.yaml"))

    assert result.exit_code == 0, result.stdout


def test_help_shows_an_example() -> None:
    assert "outgate test -p weather.yaml" in invoke("test", "--help").stdout


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    done = start("test", "-p", write(tmp_path, FAILING))

    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.endswith("2 failed, 4 passed\n")
