"""What a client reads when its request is not forwarded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pytest

from addons.answers import Answer, answer, describe
from addons.judge import Judgement
from policies.hostnames import parse_hostname
from policies.model import Action, Attempt, Reason, Stage, Verdict
from tests.builders import WORKLOAD, rules

POLICY = rules("- {host: api.example.com, tls: inspect, name: the api, allow: [GET /search]}")
RULE = POLICY.workloads[WORKLOAD].rules[0]
ATTEMPT = Attempt(
    Stage.HTTP,
    WORKLOAD,
    parse_hostname("api.example.com"),
    method="GET",
    target="/forecasts?key=hidden",
    opened_for=parse_hostname("api.example.com"),
)
HTTP_REASONS = (
    Reason.GUARD, Reason.DENY_RULE, Reason.NO_RULE, Reason.PORT, Reason.NO_ALLOW_ENTRY, Reason.EXPIRED, Reason.UPGRADE,
    Reason.UNKNOWN_WORKLOAD, Reason.AMBIGUOUS_WORKLOAD, Reason.STALE_WORKLOAD, Reason.CREDENTIALS,
    Reason.WRONG_PROTOCOL, Reason.HOST_MISMATCH, Reason.MALFORMED_NAME, Reason.MALFORMED_PATH,
    Reason.MALFORMED_REQUEST, Reason.HELLO_TIMEOUT, Reason.NEVER_REACHED, Reason.PRIVATE_ADDRESS, Reason.NAME_NOT_FOUND,
    Reason.RESOLVER_FAILED, Reason.UPSTREAM_REFUSED, Reason.UPSTREAM_TIMEOUT, Reason.UPSTREAM_CERTIFICATE,
    Reason.UPSTREAM_FAILED, Reason.ADDON_FAILED, Reason.GATE_FAILED,
)  # fmt: skip


def judgement(reason: Reason = Reason.NO_ALLOW_ENTRY, **changes: Any) -> Judgement:  # Any: fields of both dataclasses
    attempt = replace(ATTEMPT, **{k: v for k, v in changes.items() if k in ("method", "target", "upgrade")})
    rest = {k: v for k, v in changes.items() if k in ("status", "note", "has_body", "page", "grpc")}
    return Judgement("a1b2", attempt, Verdict(Action.DENY, reason, Stage.HTTP, RULE), **({"status": 403} | rest))


def header(made: Answer, name: bytes) -> bytes | None:
    return dict(made.headers).get(name)


def test_a_denial_is_problem_json() -> None:
    made = answer(judgement())
    assert header(made, b"Content-Type") == b"application/problem+json"
    assert json.loads(made.body) == {
        "type": "urn:outgate:no_allow_entry",
        "title": "Denied by policy",
        "status": 403,
        "detail": "p.yaml:5 (the api) lists what is allowed on api.example.com, and GET /forecasts is not listed",
        "workload": "app",
        "rule": "p.yaml:5 (the api)",
        "reason": "no_allow_entry",
        "id": "a1b2",
    }


def test_the_decision_is_also_in_a_header_and_is_not_cached() -> None:
    made = answer(judgement())
    assert header(made, b"Outgate-Decision") == b"deny; reason=no_allow_entry; id=a1b2"
    assert header(made, b"Cache-Control") == b"no-store"


def test_the_bytes_are_one_whole_response() -> None:
    made = answer(judgement())
    head, _, body = made.to_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 Forbidden\r\nContent-Type: ")
    assert f"Content-Length: {len(body)}".encode() in head


def test_a_head_request_gets_the_length_and_no_body() -> None:
    whole, head = answer(judgement()), answer(judgement(method="HEAD"))
    assert head.body == b""
    assert int(header(head, b"Content-Length") or 0) == len(whole.body) + len("HEAD") - len("GET")


@pytest.mark.parametrize("reason", HTTP_REASONS)
def test_every_reason_has_a_sentence_of_its_own(reason: Reason) -> None:
    sentence = describe(judgement(reason, note="what happened"))
    assert sentence
    assert "the gate denied it" not in sentence
    assert "{" not in sentence
    assert not sentence.endswith(".")


def test_a_query_is_never_repeated() -> None:
    assert b"hidden" not in answer(judgement(Reason.DENY_RULE)).to_bytes()


def test_a_page_is_escaped_and_loads_nothing() -> None:
    made = answer(judgement(target="/<script>alert(1)</script>\"'&", page=True))
    text = made.body.decode()
    assert header(made, b"Content-Type") == b"text/html; charset=utf-8"
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "a1b2" in text
    assert header(made, b"Content-Security-Policy") == b"default-src 'none'; style-src 'unsafe-inline'"


def test_a_method_cannot_break_out_of_the_page() -> None:
    assert "<b>" not in answer(judgement(method="<b>", page=True)).body.decode()


def test_a_long_path_does_not_grow_the_answer() -> None:
    assert len(answer(judgement(target="/" + "a" * 60_000)).body) < 1000


def test_control_characters_reach_no_terminal() -> None:
    assert "\x1b" not in describe(judgement(target="/\x1b[31m"))
    assert "\x9b" not in describe(judgement(target="/\x9b"))


@pytest.mark.parametrize(
    ("made", "closes"),
    [
        (answer(judgement()), None),
        (answer(judgement(has_body=True)), b"close"),
        (answer(judgement(), closes=True), b"close"),
    ],
    ids=["no-body", "unread-body", "asked-for"],
)
def test_connection_close_is_said(made: Answer, closes: bytes | None) -> None:
    assert header(made, b"Connection") == closes


def test_a_method_that_is_not_served_names_those_that_are() -> None:
    assert b"GET" in (header(answer(judgement(Reason.MALFORMED_REQUEST, status=405)), b"Allow") or b"")


@pytest.mark.parametrize(
    ("reason", "status", "grpc"),
    [
        (Reason.NO_ALLOW_ENTRY, 403, b"7"),
        (Reason.HOST_MISMATCH, 421, b"7"),
        (Reason.MALFORMED_REQUEST, 400, b"13"),
        (Reason.UPSTREAM_REFUSED, 502, b"14"),
        (Reason.LOG_FAILED, 503, b"14"),
    ],
)
def test_a_grpc_client_reads_a_status_of_its_own(reason: Reason, status: int, grpc: bytes) -> None:
    made = answer(judgement(reason, status=status, grpc=True, note="50 % of Malmö"))
    assert (made.status, made.body, header(made, b"Grpc-Status")) == (200, b"", grpc)
    assert header(made, b"Outgate-Decision") == f"deny; reason={reason}; id=a1b2".encode()
    message = header(made, b"Grpc-Message") or b""
    assert unquote(message.decode("ascii")) == describe(judgement(reason, note="50 % of Malmö"))
    assert not re.search(rb"[^ -~]", message)


def test_a_failure_of_the_upstream_says_so() -> None:
    made = answer(judgement(Reason.UPSTREAM_CERTIFICATE, status=502, note="certificate has expired"))
    problem = json.loads(made.body)
    assert (made.status, made.phrase, problem["title"]) == (502, "Bad Gateway", "Not reached")
    assert problem["detail"] == "the certificate of api.example.com does not verify: certificate has expired"
