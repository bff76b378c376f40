"""`outgate why`: whether an attempt passes, by which rule, and the smallest edit that would change a denial."""

from __future__ import annotations

import time as clock
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from proxy.commands import (
    NO,
    NOT_STARTED,
    USAGE,
    YES,
    Json,
    json_option,
    load_policy,
    policy_options,
    rule_json,
    workload_named,
)

if TYPE_CHECKING:
    from policies.explain import Explanation
    from policies.words import Step
    from proxy.console import Cell, Console, Span

EPILOG = """\b
ATTEMPT is one of
  'GET https://host[:port]/path'   also http://; any method
  tls://host[:port]                a TLS hello for the host
  tcp://host-or-address:port       bytes of any other kind; udp:// alike
  quic://host[:port]               QUIC that shows the host
  ntp://host   dns://host

\b
Example:
  outgate why -p weather.yaml -w weather 'GET https://dataservice.accuweather.com/forecasts'

\b
Exit codes: 0 allowed, 1 denied, 2 usage, 3 the policy does not load.
JSON keys: attempt workload verdict reason because stage rule mode stages[stage verdict reason rule note]
  nearest[rule missed_by] edits[change key file line where lines] advice
"""


@click.command(epilog=EPILOG)
@policy_options
@click.option("-w", "--workload", metavar="NAME", envvar="OUTGATE_WORKLOAD", show_envvar=True, help="Who attempts it.")
@click.option("--at", "day", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="Judge as of this day (UTC).")
@json_option
@click.argument("attempt", nargs=-1, required=True, metavar="ATTEMPT")
@click.pass_context
def why(
    ctx: click.Context,
    paths: tuple[str, ...],
    tags: tuple[str, ...],
    workload: str | None,
    day: datetime | None,
    as_json: bool,
    attempt: tuple[str, ...],
) -> None:
    """Say whether an attempt passes, by which rule, and what would change it.

    The answer comes from the function that the gate calls. Nothing is looked up or dialled.
    """
    policy = load_policy(paths, tags, exit_code=NOT_STARTED)

    from policies.explain import explain
    from policies.words import MalformedWords, answer, parse_words
    from proxy.console import Console, stop

    name = workload_named(policy, workload)
    words = " ".join(attempt)  # the quotes around 'GET https://…' are easily forgotten
    time = day.replace(tzinfo=UTC).timestamp() if day else clock.time()
    try:
        explanation = explain(policy, parse_words(name, words, time))
    except MalformedWords as error:
        stop(str(error), USAGE)
    audited = answer(explanation.steps).is_allow and not explanation.verdict.is_allow
    if as_json:
        Console().json(_json(explanation, words, name, audited=audited))
    else:
        _show(Console(), explanation, words, name, audited=audited)
    ctx.exit(YES if audited or explanation.verdict.is_allow else NO)


def _show(console: Console, explanation: Explanation, words: str, workload: str, *, audited: bool) -> None:
    from policies.model import Reason
    from proxy.console import Style

    verdict = explanation.verdict
    allowed = audited or verdict.is_allow
    answer = ("ALLOW", Style.GOOD) if allowed else ("DENY", Style.BAD)
    console.line(answer, "  ", (words, Style.STRONG))
    if audited:
        console.line(("audit mode lets this pass; enforcement would deny it", Style.WARN))
    console.blank()
    facts: list[list[Cell]] = [[("workload", Style.DIM), workload]]
    if not verdict.is_allow:
        facts.append([("because", Style.DIM), explanation.because])
    if verdict.rule and verdict.reason in (Reason.RULE, Reason.DENY_RULE, Reason.GUARD):  # else it is the nearest
        facts.append([("rule", Style.DIM), str(verdict.rule)])
    facts += [[("nearest", Style.DIM), f"{miss.rule}: {miss.by}"] for miss in explanation.nearest]
    if explanation.advice:
        facts.append([("instead", Style.DIM), explanation.advice])
    console.rows(facts, indent=2)
    console.blank()
    console.rows(map(_stage_row, explanation.steps), indent=2)
    for number, edit in enumerate(explanation.edits):
        console.blank()
        console.line(("to allow it, " if number == 0 else "and ", Style.DIM), edit.where, indent=2)
        console.code(edit.lines, indent=6)


def _stage_row(step: Step) -> list[Cell]:
    from proxy.console import Style

    verdict = step.verdict.would_be or step.verdict
    answer: Span = ("allow", Style.GOOD) if verdict.is_allow else ("deny", Style.BAD)
    detail = str(verdict.rule) if verdict.is_allow else str(verdict.reason)
    return [step.stage.value, answer, [detail, (f"  {step.note}" if step.note else "", Style.DIM)]]


def _json(explanation: Explanation, words: str, workload: str, *, audited: bool) -> Json:
    verdict = explanation.verdict
    return {
        "attempt": words,
        "workload": workload,
        "verdict": "allow" if audited else str(verdict.action),
        "reason": str(verdict.reason),
        "because": explanation.because,
        "stage": str(verdict.stage),
        "rule": rule_json(verdict.rule),
        "mode": "audit" if audited else "enforce",
        "stages": list(_stages_json(explanation)),
        "nearest": [{"rule": rule_json(miss.rule), "missed_by": miss.by} for miss in explanation.nearest],
        "edits": [
            {
                "change": str(edit.change),
                "key": edit.key,
                "file": edit.place.file,
                "line": edit.place.line,
                "where": edit.where,
                "lines": list(edit.lines),
            }
            for edit in explanation.edits
        ],
        "advice": explanation.advice,
    }


def _stages_json(explanation: Explanation) -> Iterator[Json]:
    for step in explanation.steps:
        verdict = step.verdict.would_be or step.verdict
        yield {
            "stage": str(step.stage),
            "verdict": str(verdict.action),
            "reason": str(verdict.reason),
            "rule": rule_json(verdict.rule),
            "note": step.note,
        }
