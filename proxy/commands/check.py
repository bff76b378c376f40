"""`outgate check`: loads policy files, runs their tests, and warns of what loads and is still risky."""

from __future__ import annotations

import sys
import time as clock
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from proxy.commands import NO, YES, Json, json_option, policy_options, problem_json

if TYPE_CHECKING:
    from policies.cases import CaseResult
    from policies.errors import Problem
    from policies.index import Policy
    from proxy.console import Console

EPILOG = """\b
Example:
  outgate check -p weather.yaml --strict

\b
Exit codes: 0 no errors; 1 errors, or with --strict warnings; 2 usage.
JSON keys: ok workloads rules tests problems[file line column level code message repair]
  level is error, warning or note; rules counts those of used sets for each workload that uses them
"""
ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True, slots=True)
class Report:
    """One problem as `check` tells it."""

    level: str
    code: str
    problem: Problem


@click.command(epilog=EPILOG)
@policy_options
@click.option("--strict", is_flag=True, help="Count warnings as errors.")
@json_option
@click.pass_context
def check(ctx: click.Context, paths: tuple[str, ...], tags: tuple[str, ...], strict: bool, as_json: bool) -> None:
    """Load policy files, run their tests, and warn of what is risky.

    A rule that is expired or a test that fails is an error. Warned of: wildcards over suffixes that many tenants share,
    names reachable by fronting, wide tcp rules, rules without effect, rules that no test reaches.
    """
    from policies.errors import PolicyError
    from proxy.console import Console
    from proxy.policy_files import read_policy

    policy = None
    results: tuple[CaseResult, ...] = ()
    try:
        policy = read_policy(paths, tags=tags)
    except PolicyError as error:
        reports = [Report(ERROR, "load", problem) for problem in error.problems]
    else:
        results, reports = _examine(policy)
    if strict:
        reports = [Report(ERROR if r.level == WARNING else r.level, r.code, r.problem) for r in reports]
    ok = all(report.level != ERROR for report in reports)
    if as_json:
        Console().json(_json(policy, results, reports, ok=ok))
    else:
        _show(Console(sys.stdout if policy else sys.stderr), policy, results, reports)
    ctx.exit(YES if ok else NO)


def _examine(policy: Policy) -> tuple[tuple[CaseResult, ...], list[Report]]:
    """The policy's tests, run, and every problem of a policy that loads, in file order."""
    from policies.cases import run
    from policies.lint import lint
    from proxy.policy_files import shared_suffix

    now = clock.time()
    results = run(policy, now)
    findings = lint(policy, results, shared_suffix=shared_suffix, today=datetime.fromtimestamp(now, UTC).date())
    reports = [Report(finding.level, finding.code, finding.problem) for finding in findings]
    reports += [Report(ERROR, "test", _failure(result)) for result in results if not result.is_pass]
    return results, sorted(reports, key=lambda r: (r.problem.place.file, r.problem.place.line, r.problem.place.column))


def _failure(result: CaseResult) -> Problem:
    from policies.cases import outcome
    from policies.errors import Problem

    asked = f'{result.test.workload} must {result.expected} "{result.test.words}"'
    return Problem(result.place, f"the test that {asked} fails: {outcome(result)}")


def _show(console: Console, policy: Policy | None, results: Sequence[CaseResult], reports: Sequence[Report]) -> None:
    from proxy.console import Style

    styles = {ERROR: Style.BAD, WARNING: Style.WARN}
    for report in reports:
        console.problem(report.problem, report.level, styles.get(report.level, Style.DIM))
    if policy is None:
        return
    levels = Counter(report.level for report in reports)
    found = ", ".join(_counted(levels[level], level) for level in (ERROR, WARNING, NOTE) if levels[level])
    seen = ", ".join(
        [_counted(len(policy.workloads), "workload"), _counted(_rules(policy), "rule"), _counted(len(results), "test")]
    )
    style = Style.BAD if levels[ERROR] else Style.WARN if levels[WARNING] else Style.GOOD
    console.line(f"{seen}: ", (found or "no problems", style))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _rules(policy: Policy) -> int:
    return sum(len(workload.rules) for workload in policy.workloads.values())


def _json(policy: Policy | None, results: Sequence[CaseResult], reports: Iterable[Report], *, ok: bool) -> Json:
    problems = []
    for report in reports:
        told = problem_json(report.problem)
        where = {key: told[key] for key in ("file", "line", "column")}
        problems.append({**where, "level": report.level, "code": report.code, **told})
    return {
        "ok": ok,
        "workloads": len(policy.workloads) if policy else 0,
        "rules": _rules(policy) if policy else 0,
        "tests": len(results),
        "problems": problems,
    }
