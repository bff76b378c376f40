"""The `tests:` of a policy: which pass, what a failing one tells, and which rules none of them reaches."""

from __future__ import annotations

from policies.cases import run, unreached
from policies.model import Action, Reason
from tests.builders import policy

NOW = 1_795_000_000.0  # November 2026

POLICY = """
version: 1
workloads:
  app:
    rules:
      - {name: api, host: api.example, tls: inspect, allow: ["GET /search/**"], deny: ["* /secret/**"]}
      - {name: apt, host: "*.apt.example"}
      - {name: git, tcp: "git.example:22"}
      - {name: unused, host: unused.example}
      - {name: ended, host: ended.example, until: 2026-01-31}
  audited:
    mode: audit
    rules: [{name: known, host: known.example}]
tests:
  app:
    allow: ["GET https://api.example/search?q=x", "tls://x.apt.example", "tcp://git.example:22"]
    deny: ["GET https://api.example/secret/x", "tls://apt.example", "tls://ended.example", "tls://unused.example:8443"]
  audited:
    allow: ["tls://known.example"]
    deny: ["tls://other.example"]
"""


def test_every_case_is_judged_by_the_engine() -> None:
    results = run(policy(POLICY), NOW)

    assert all(result.is_pass for result in results)
    assert [(r.expected, r.got, r.verdict.reason if r.verdict else None) for r in results] == [
        (Action.ALLOW, Action.ALLOW, Reason.RULE),
        (Action.ALLOW, Action.ALLOW, Reason.RULE),
        (Action.ALLOW, Action.ALLOW, Reason.RULE),
        (Action.DENY, Action.DENY, Reason.DENY_RULE),
        (Action.DENY, Action.DENY, Reason.NO_RULE),
        (Action.DENY, Action.DENY, Reason.EXPIRED),
        (Action.DENY, Action.DENY, Reason.PORT),
        (Action.ALLOW, Action.ALLOW, Reason.RULE),
        (Action.DENY, Action.DENY, Reason.NO_RULE),  # as enforcement would: audit mode must not fail every deny
    ]


def test_a_case_that_is_wrong_fails_at_its_line() -> None:
    of = policy(
        'version: 1\nworkloads: {app: {rules: [{host: a.example}]}}\ntests:\n  app:\n    deny: ["tls://a.example"]\n'
    )

    (result,) = run(of, NOW)

    assert (result.is_pass, result.expected, result.got) == (False, Action.DENY, Action.ALLOW)
    assert str(result.place) == "p.yaml:5"
    assert result.verdict is not None
    assert str(result.verdict.rule) == "p.yaml:2 (app/rules[0])"


def test_a_case_that_means_nothing_fails_whatever_it_expects() -> None:
    of = policy("version: 1\nworkloads: {app: {}}\ntests:\n  app: {deny: [gopher://a.example, tcp://a.example]}\n")

    for result in run(of, NOW):
        assert (result.is_pass, result.got) == (False, None)
        assert result.error


def test_the_day_decides_what_is_expired() -> None:
    of = policy(
        "version: 1\nworkloads: {app: {rules: [{host: a.example, until: 2026-01-31}]}}\n"
        "tests: {app: {allow: [tls://a.example]}}\n"
    )

    assert run(of, 0.0)[0].is_pass
    assert not run(of, NOW)[0].is_pass


def test_a_rule_that_no_verdict_is_owed_to_is_unreached() -> None:
    of = policy(POLICY)

    names = [rule.name for rule in unreached(of, run(of, NOW))]

    assert names == ["unused", "ended"]  # a denial that only names the nearest rule reaches nothing


def test_without_cases_nothing_is_reached() -> None:
    of = policy("version: 1\nworkloads: {app: {rules: [{host: a.example}, {ntp: n.example}]}}")

    assert run(of, NOW) == ()
    assert len(unreached(of, ())) == 2
