"""What the closing summary counts, and what it proposes."""

from __future__ import annotations

import pytest

from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.record import Record, record_of
from proxy.summary import MAX_REMEMBERED, MAX_SHOWN, Summary
from tests.builders import attempt, policy

POLICY = policy(
    "version: 1\nworkloads: {app: {rules: [{host: a.example}, {udp: 'voip.example:5060', budget: 1KiB/h}, "
    '{host: "*.cdn.example"}]}}'
)


def denial(words: str, reason: Reason, extra: Record | None = None) -> Record:
    tried = attempt(words)
    return record_of(tried, Verdict(Action.DENY, reason, tried.stage), id="1", extra=extra)


def said(*records: Record) -> list[str]:
    summary = Summary(POLICY, "app")
    for record in records:
        summary(record)
    return list(summary.lines())


def test_nothing_attempted_is_nothing_said() -> None:
    assert said() == []


@pytest.mark.parametrize("types", [("A", "AAAA"), ("AAAA", "A")])
def test_both_families_are_one_lookup_in_any_order(types: tuple[str, str]) -> None:
    records = [denial("dns://b.example", Reason.NO_RULE, {"dns.question.type": kind}) for kind in types]
    assert said(*records)[0] == "outgate: app: 0 allowed, 1 denied"
    assert said(*records, *records)[0] == "outgate: app: 0 allowed, 2 denied"


def test_refused_lookup_is_answered_with_the_host_rule_that_was_missed() -> None:
    lines = said(denial("dns://b.example", Reason.NO_RULE, {"dns.question.type": "A"}))
    assert lines[-1].strip() == "- host: b.example"


def test_what_failed_beyond_the_policy_is_not_called_denied() -> None:
    assert said(denial("tls://a.example", Reason.UPSTREAM_REFUSED))[0] == "outgate: app: 0 allowed, 0 denied, 1 failed"


def test_no_edit_is_proposed_for_what_the_words_do_not_carry() -> None:
    lines = said(denial("tls://a.example", Reason.ECH))
    assert [line.strip() for line in lines[1:]] == ["tls://a.example  ech"]


@pytest.mark.parametrize(
    ("words", "reason", "advice"),
    [
        ("udp://voip.example:5060", Reason.BUDGET, "raise budget: of p.yaml:2 (app/rules[1]), or wait"),
        ("dns://x.cdn.example", Reason.LOOKUP_BUDGET, "name the hosts beside p.yaml:2 (app/rules[2]), or raise"),
        ("tls://x.cdn.example", Reason.LOOKUP_BUDGET, "name the hosts beside p.yaml:2 (app/rules[2]), or raise"),
    ],
)
def test_what_was_used_up_says_which_rule_it_was_of(words: str, reason: Reason, advice: str) -> None:
    assert advice in said(denial(words, reason))[-1]


def test_allowed_lookup_is_no_use_of_anything_yet() -> None:
    allow = Verdict(Action.ALLOW, Reason.RULE, Stage.DNS)
    assert said(record_of(Attempt(Stage.DNS, "app"), allow, id="1")) == []


def test_port_scan_neither_buries_the_output_nor_grows_without_end() -> None:
    records = [denial(f"tcp://203.0.113.7:{port}", Reason.NO_RULE) for port in range(1, MAX_REMEMBERED + 100)]
    lines = said(*records)
    assert lines[0] == f"outgate: app: 0 allowed, {len(records)} denied"
    assert f"… and {MAX_REMEMBERED - MAX_SHOWN} more" in lines[-1]
