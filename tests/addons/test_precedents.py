"""Verdicts that are given again: only while every part of them is the same, and never instead of another one."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count

import pytest

from addons.judge import Conversation, Judge, Judgement
from addons.precedents import MAX_KNOWN, MAX_TEXT, Standing
from policies.engine import decide
from policies.hostnames import Hostname
from policies.index import Policy
from policies.model import Attempt, Reason, Verdict
from proxy.lane.http1 import parse_request
from tests.builders import WORKLOAD, rules

POLICY = rules("""
    - host: api.example.com
      ports: [80, 443, 8443]
      tls: inspect
      allow: ["GET,POST /search/**", "GET /chat"]
      upgrade: [websocket]
""")
NARROW = rules("""
    - host: api.example.com
      tls: inspect
      allow: ["GET /chat"]
      until: 2026-03-01
""")
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
DAY_S = 86400.0


class Court:
    """A judge that counts how often it asks for a verdict, and never gives one that differs from a fresh one."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.policy = policy
        self.closed_for: Reason | None = None
        self.now = NOON
        self.asked = 0
        ids = count(1)
        self.judge = Judge(self.decide, now=lambda: self.now, new_id=lambda: f"id{next(ids)}", standing=self.standing)
        self.fresh = Judge(self.decide, now=lambda: self.now, new_id=lambda: "")

    def standing(self) -> Standing:
        return self.policy, self.closed_for

    def decide(self, attempt: Attempt) -> Verdict:
        self.asked += 1
        return decide(self.policy, attempt)

    def hear(self, head: str, to: Conversation | None = None) -> Judgement:
        request = parse_request(f"{head}\r\n\r\n".encode("latin-1"))
        asked = request.method, request.target, request.fields
        to = to or conversation()
        found = self.judge.heard(to, *asked)
        before = self.asked
        fresh = self.fresh.heard(conversation(to.port, to.opened_for), *asked)
        self.asked = before
        assert (found.verdict, found.status, found.note) == (fresh.verdict, fresh.status, fresh.note)
        assert (found.has_body, found.page) == (fresh.has_body, fresh.page)
        assert found.attempt.target == fresh.attempt.target
        return found


def conversation(port: int = 443, opened_for: str | None = "api.example.com") -> Conversation:
    return Conversation(WORKLOAD, port, False, ("10.0.0.1", 5000), Hostname(opened_for) if opened_for else None)


SEARCH = "GET /search/a HTTP/1.1\r\nHost: api.example.com"


def test_the_same_request_again_is_not_judged_again() -> None:
    court = Court()
    first, second = court.hear(SEARCH), court.hear(SEARCH)
    assert court.asked == 1
    assert (first.id, second.id) == ("id1", "id2")
    assert second.verdict is first.verdict


def test_an_allow_that_is_given_again_is_the_conversation_s_latest() -> None:
    court, to = Court(), conversation()
    court.hear(SEARCH)
    court.hear(SEARCH, to)
    assert to.allowed is not None
    assert to.allowed.reason is Reason.RULE


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("POST /search/a HTTP/1.1\r\nHost: api.example.com", id="method"),
        pytest.param("DELETE /search/a HTTP/1.1\r\nHost: api.example.com", id="denied-method"),
        pytest.param("GET /search/b HTTP/1.1\r\nHost: api.example.com", id="path"),
        pytest.param("GET /search/a?q=1 HTTP/1.1\r\nHost: api.example.com", id="query"),
        pytest.param("GET /search/../chat HTTP/1.1\r\nHost: api.example.com", id="malformed-path"),
        pytest.param("GET /search/a HTTP/1.1\r\nHost: other.example.com", id="host"),
        pytest.param("GET /search/a HTTP/1.1\r\nHost: api.example.com:8443", id="port-of-host"),
        pytest.param("GET /search/a HTTP/1.1\r\nHost: api.example.com\r\nUpgrade: websocket", id="upgrade"),
        pytest.param("GET /search/a HTTP/1.1\r\nHost: api.example.com\r\nUpgrade: h2c", id="upgrade-not-admitted"),
        pytest.param(
            "GET /search/a HTTP/1.1\r\nHost: api.example.com\r\nX-HTTP-Method-Override: DELETE", id="method-overridden"
        ),
        pytest.param("GET /search/a HTTP/1.1\r\nHost: api.example.com\r\nX-Original-URL: /", id="path-overridden"),
    ],
)
def test_another_request_is_judged_by_itself(other: str) -> None:
    court = Court()
    court.hear(SEARCH)
    court.hear(other)
    court.hear(SEARCH)
    court.hear(other)
    assert court.hear(SEARCH).is_forward


def test_the_same_request_on_another_port_or_for_another_name_is_judged_by_itself() -> None:
    court = Court()
    court.hear(SEARCH)
    court.hear(SEARCH, conversation(8443))
    court.hear(SEARCH, conversation(9443))
    court.hear(SEARCH, conversation(opened_for="other.example.com"))
    assert court.asked == 4


def test_what_belongs_to_the_request_alone_is_not_given_again() -> None:
    court = Court()
    denied = "GET / HTTP/1.1\r\nHost: api.example.com\r\n"
    assert not court.hear(denied + "Accept: */*").page
    assert court.hear(denied + "Accept: text/html").page
    assert court.hear(denied + "Content-Length: 3").has_body
    assert court.asked == 1


def test_another_policy_judges_anew() -> None:
    court = Court()
    assert court.hear(SEARCH).is_forward
    court.policy = NARROW
    assert court.hear(SEARCH).verdict.reason is Reason.NO_ALLOW_ENTRY
    court.policy = POLICY
    assert court.hear(SEARCH).is_forward
    assert court.asked == 3


def test_a_gate_that_closes_judges_anew() -> None:
    court = Court()
    court.hear(SEARCH)
    court.closed_for = Reason.LOG_FAILED
    court.hear(SEARCH)
    assert court.asked == 2


def test_a_rule_ends_with_its_last_day() -> None:
    court = Court(NARROW)
    chat = "GET /chat HTTP/1.1\r\nHost: api.example.com"
    assert court.hear(chat).is_forward
    court.now += DAY_S / 2 - 1
    assert court.hear(chat).is_forward
    court.now += 1
    assert court.hear(chat).verdict.reason is Reason.EXPIRED
    court.now -= DAY_S
    assert court.hear(chat).is_forward


def test_what_is_remembered_is_bounded() -> None:
    court = Court()
    for number in range(MAX_KNOWN + 2):
        court.hear(f"GET /search/{number} HTTP/1.1\r\nHost: api.example.com")
    before = court.asked
    court.hear(f"GET /search/{MAX_KNOWN + 1} HTTP/1.1\r\nHost: api.example.com")
    assert court.asked == before
    court.hear("GET /search/0 HTTP/1.1\r\nHost: api.example.com")
    assert court.asked == before + 1
    long = f"GET /search/{'a' * MAX_TEXT} HTTP/1.1\r\nHost: api.example.com"
    court.hear(long)
    court.hear(long)
    assert court.asked == before + 3


def test_a_judge_without_a_standing_remembers_nothing() -> None:
    court = Court()
    court.judge = Judge(court.decide, now=lambda: court.now, new_id=lambda: "")
    court.hear(SEARCH)
    court.hear(SEARCH)
    assert court.asked == 2
