"""The `tests:` of a policy, run by the engine that the gate uses. It judges; it neither loads nor prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.explain import because
from policies.index import Policy
from policies.model import Action, AnyRule, Place, Reason, Test, Verdict
from policies.words import MalformedWords, Step, enforced, ladder, parse_words

# A verdict with one of these comes from the rule that it cites; any other denial only names a rule that missed.
OWED_TO_RULE = frozenset({Reason.RULE, Reason.DENY_RULE, Reason.GUARD, Reason.NO_ALLOW_ENTRY})


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One line under `tests:` and what came of it. `error` is set, and `verdict` None, where its words mean nothing."""

    test: Test
    steps: tuple[Step, ...] = ()
    verdict: Verdict | None = None
    error: str = ""

    @property
    def place(self) -> Place:
        return self.test.place

    @property
    def expected(self) -> Action:
        return self.test.expect

    @property
    def got(self) -> Action | None:
        return self.verdict.action if self.verdict else None

    @property
    def is_pass(self) -> bool:
        return self.got is self.expected


def run(policy: Policy, time: float) -> tuple[CaseResult, ...]:
    """Every case of the policy, in file order, judged at `time` as enforcement would also where the mode is audit."""
    return tuple(_run_case(policy, test, time) for test in policy.tests)


def unreached(policy: Policy, results: Iterable[CaseResult]) -> tuple[AnyRule, ...]:
    """The rules that no verdict of `results` is owed to: nothing would fail if they were gone."""
    reached = {
        verdict.rule.place
        for result in results
        for step in result.steps[-1:]  # the lookup on the way to a host reaches nothing that was asked about
        if (verdict := step.verdict.would_be or step.verdict).rule and verdict.reason in OWED_TO_RULE
    }
    rules = (rule for workload in policy.workloads.values() for rule in workload.rules)
    return tuple(rule for rule in rules if rule.place not in reached)


def outcome(result: CaseResult) -> str:
    """What came of a case, in words: `got allow by weather.yaml:9 (search)`."""
    if result.verdict is None:
        return result.error
    if result.verdict.is_allow:
        return f"got allow by {result.verdict.rule}"
    return f"got deny, {because(result.steps)}"


def _run_case(policy: Policy, test: Test, time: float) -> CaseResult:
    try:
        attempt = parse_words(test.workload, test.words, time)
    except MalformedWords as error:
        return CaseResult(test, error=str(error))
    steps = ladder(policy, attempt)
    return CaseResult(test, steps, enforced(steps))
