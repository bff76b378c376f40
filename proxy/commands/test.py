"""`outgate test`: the tests written in policy files, run by the function that the gate calls."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import click

from proxy.commands import NO, YES, Json, json_option, load_policy, policy_options, rule_json

if TYPE_CHECKING:
    from policies.cases import CaseResult
    from proxy.console import Cell, Console

EPILOG = """\b
Example:
  outgate test -p weather.yaml

\b
Exit codes: 0 all passed; 1 one failed, there are none, or the policy does not load; 2 usage.
JSON keys: ok passed failed cases[file line workload attempt expected got ok reason because rule]
"""


@click.command(epilog=EPILOG)
@policy_options
@json_option
@click.pass_context
def test(ctx: click.Context, paths: tuple[str, ...], tags: tuple[str, ...], as_json: bool) -> None:
    """Run the tests written in policy files.

    Each case is judged as enforcement would, also where the mode is audit.
    """
    policy = load_policy(paths, tags, exit_code=NO)

    from policies.cases import run
    from proxy.console import Console, stop

    results = run(policy, clock.time())
    failed = sum(not result.is_pass for result in results)
    ok = bool(results) and not failed
    if as_json:
        cases = [_case_json(result) for result in results]
        Console().json({"ok": ok, "passed": len(results) - failed, "failed": failed, "cases": cases})
    elif not results:
        stop("no tests to run; write some under tests: WORKLOAD: allow: and deny:", NO)
    else:
        _show(Console(), results)
    ctx.exit(YES if ok else NO)


def _show(console: Console, results: Sequence[CaseResult]) -> None:
    from proxy.console import Style

    for (workload, file), cases in groupby(results, key=lambda result: (result.test.workload, result.place.file)):
        console.line((workload, Style.STRONG), (f"  {file}", Style.DIM))
        console.rows(map(_row, cases), indent=2)
        console.blank()
    failed = sum(not result.is_pass for result in results)
    passed = f"{len(results) - failed} passed"
    console.line((f"{failed} failed, {passed}", Style.BAD) if failed else (passed, Style.GOOD))


def _row(result: CaseResult) -> list[Cell]:
    """One case: what was expected, and the rule that decided or what came instead."""
    from policies.cases import outcome
    from proxy.console import Style

    words = [str(result.expected), result.test.words]
    if result.is_pass:
        return [("ok", Style.GOOD), *words, (_decider(result), Style.DIM)]
    return [("FAIL", Style.BAD), *words, f"line {result.place.line}: {outcome(result)}"]


def _decider(result: CaseResult) -> str:
    """The rule that decided, without its file where that stands in the heading; else the reason."""
    from policies.cases import OWED_TO_RULE

    verdict = result.verdict
    if verdict is None or verdict.rule is None or verdict.reason not in OWED_TO_RULE:
        return str(verdict.reason) if verdict else ""
    cited = str(verdict.rule)
    return cited.removeprefix(verdict.rule.place.file) if verdict.rule.place.file == result.place.file else cited


def _case_json(result: CaseResult) -> Json:
    from policies.explain import because

    verdict = result.verdict
    return {
        "file": result.place.file,
        "line": result.place.line,
        "workload": result.test.workload,
        "attempt": result.test.words,
        "expected": str(result.expected),
        "got": str(result.got) if result.got else None,
        "ok": result.is_pass,
        "reason": str(verdict.reason) if verdict else "malformed_words",
        "because": because(result.steps) if verdict else result.error,
        "rule": rule_json(verdict.rule if verdict else None),
    }
