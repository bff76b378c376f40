"""Why an attempt is refused: the sentence, the nearest rule and what it missed by, and what to do where no edit helps."""

# A row of a table is one line, however long.
# ruff: noqa: E501

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.explain import ADVICE, explain
from policies.model import Reason
from tests.builders import policy
from tests.policies.explained import POLICY, asked, explained

# --- what no edit opens --------------------------------------------------------------------------------------------

CLOSED = [
    ("tls://x.pastebin.example", Reason.GUARD, "the guard: deny: all closes it", "whoever owns the guard"),
    ("GET https://api.example.net/admin/x", Reason.GUARD, '"* /admin/**" denies it', "whoever owns the guard"),
    ("GET https://set.example.com/set/secret", Reason.DENY_RULE, '"* /set/secret" denies it', "change the set at p.yaml:46"),
    ("tcp://169.254.169.254:80", Reason.NEVER_REACHED, "no rule opens it", "use the service's public name"),
    ("tcp://127.0.0.1:9999", Reason.NEVER_REACHED, "no rule opens it", "use the service's public name"),
    ("udp://169.254.169.254:53", Reason.NEVER_REACHED, "no rule opens it", "use the service's public name"),
    ("tls://10.20.3.4", Reason.MALFORMED_NAME, "10.20.3.4 is an address", "try tcp://10.20.3.4:443"),
    ("tls://[2001:db8::1]:8443", Reason.MALFORMED_NAME, "2001:db8::1 is an address", "try tcp://[2001:db8::1]:8443"),
    ("tls://169.254.169.254", Reason.MALFORMED_NAME, "169.254.169.254 is an address", "use the service's public name"),
    ("ntp://93.184.215.14", Reason.MALFORMED_NAME, "93.184.215.14 is an address", "name the server"),
    ("quic://93.184.215.14", Reason.MALFORMED_NAME, "93.184.215.14 is an address", "try udp://93.184.215.14:443"),
    ("udp://8.8.8.8:53", Reason.NO_RULE, "no rule of app covers 8.8.8.8", "that port is the DNS guard's"),
    ("udp://8.8.8.8:123", Reason.NO_RULE, "no rule of app covers 8.8.8.8", "write an ntp rule"),
    ("tls://a..b", Reason.MALFORMED_NAME, "that is no hostname", "as DNS has it"),
    ("GET https://weather.example.com/search/../x", Reason.MALFORMED_PATH, '".." is a dot segment', "without .. or //"),
    ("get https://weather.example.com/search", Reason.MALFORMED_REQUEST, "methods are upper case", "upper-case method"),
    ("GET https://u@weather.example.com/", Reason.MALFORMED_REQUEST, "no user name", "without a user name"),
    ("GET https://archive.ubuntu.com:80/", Reason.WRONG_PROTOCOL, "another protocol than tls", "use http:// on a plain port"),
    ("GET http://archive.ubuntu.com:443/", Reason.WRONG_PROTOCOL, "another protocol than http", "https:// on every other"),
    ("tcp://weather.example.com:443", Reason.WRONG_PROTOCOL, "another protocol than tcp", "try tls://weather.example.com"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "reason", "because", "advice"), CLOSED, ids=[row[0] for row in CLOSED])
def test_what_no_edit_should_open_says_what_to_do_instead(
    words: str, reason: Reason, because: str, advice: str
) -> None:
    explanation = explained(words)

    assert (explanation.verdict.reason, explanation.edits) == (reason, ())
    assert because in explanation.because
    assert advice in explanation.advice


def test_a_connection_serves_one_name() -> None:
    meant = replace(asked("GET https://a.wide.example.org/x"), opened_for=asked("tls://b.wide.example.org").host)

    explanation = explain(policy(POLICY), meant)

    assert (explanation.verdict.reason, explanation.edits) == (Reason.HOST_MISMATCH, ())
    assert "one connection serves one name" in explanation.advice


@pytest.mark.parametrize("fault", sorted(Reason))
def test_every_reason_has_a_sentence(fault: Reason) -> None:
    explanation = explain(policy(POLICY), replace(asked("tls://x.example"), fault=fault))

    assert explanation.because
    assert "{" not in explanation.because
    assert (explanation.edits, bool(explanation.advice)) == ((), True)


def test_an_unknown_workload_is_told_so() -> None:
    explanation = explained("tls://new.example.io", "nobody")

    assert (explanation.because, explanation.edits) == ("there is no workload nobody", ())
    assert explanation.advice == ADVICE[Reason.UNKNOWN_WORKLOAD]


def test_opaque_datagrams_miss_a_rule_for_quic_by_that() -> None:
    of = policy("{version: 1, workloads: {app: {rules: [{udp: {host: a.example, ports: 443, quic: sni}}]}}}")
    explanation = explain(of, asked("udp://a.example:443"))

    assert explanation.verdict.reason is Reason.NO_SNI
    assert explanation.because == "the rule for a.example admits QUIC that shows this name, and no other datagrams"
    assert [miss.by for miss in explanation.nearest] == ["it says quic: sni, for quic://a.example:443"]
    assert explain(of, asked("quic://a.example")).verdict.is_allow


# --- the nearest rules ---------------------------------------------------------------------------------------------

NEAREST = [
    ("POST https://weather.example.com/search", 'p.yaml:11 (weather): "GET /search/**" is for another method than POST'),
    ("GET https://weather.example.com/token", 'p.yaml:11 (weather): "POST /token" is for another method than GET'),
    ("GET https://weather.example.com/x", 'p.yaml:11 (weather): "GET /search/**" is for another path'),
    ("tls://weather.example.com:8443", "p.yaml:11 (weather): it is for port 443, not port 8443"),
    ("tls://archive.ubuntu.com:8443", "p.yaml:20 (app/rules[1]): it is for ports 80, 443, not port 8443"),
    ("GET http://apt.ubuntu.com/", "p.yaml:20 (app/rules[1]): it would admit this, but the narrower apt.ubuntu.com decides alone"),
    ("tls://ubuntu.com", "p.yaml:20 (app/rules[1]): it is every name below ubuntu.com, never ubuntu.com itself"),
    ("tls://wether.example.com", "p.yaml:11 (weather): it names weather.example.com; is that what was meant?"),
    ("tls://weather.example.co", "p.yaml:11 (weather): it names weather.example.com; is that what was meant?"),
    ("tls://waether.example.com", "p.yaml:11 (weather): it names weather.example.com; is that what was meant?"),
    ("tls://archive.ubunut.com", "p.yaml:20 (app/rules[1]): it names *.ubuntu.com; is that what was meant?"),
    ("tls://x.weather.example.com", "p.yaml:11 (weather): it names weather.example.com alone, nothing below it"),
    ("tls://maps.example.com", "p.yaml:11 (weather): it names its sibling weather.example.com"),
    ("tls://old.example.org", "p.yaml:30 (app/rules[9]): its last day was 2026-01-31"),
    ("ntp://apt.ubuntu.com", "p.yaml:20 (app/rules[1]): it is for ports 80, 443"),
    ("tcp://10.21.3.4:6379", "p.yaml:25 (app/rules[5]): its 10.20.0.0/16 runs from 10.20.0.0 to 10.20.255.255"),
    ("tcp://10.21.3.4:9999", "p.yaml:26 (app/rules[6]): a prefix opens private addresses only if all of it is private"),
    ("tcp://github.com:2222", "p.yaml:24 (app/rules[4]): it is for tcp port 22, not port 2222"),
    ("tls://web.example.org:22", "p.yaml:36 (app/rules[12]): it is for port 8080, not port 22"),
    ("GET http://web.example.org:8080/", "p.yaml:36 (app/rules[12]): it carries TLS on port 8080"),
    ("dns://svc.cluster.local", "p.yaml:42 (app/rules[14]): it is every name below svc.cluster.local, never svc.cluster.local itself"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "near"), NEAREST, ids=[row[0] for row in NEAREST])
def test_the_nearest_rule_is_named_with_what_it_missed_by(words: str, near: str) -> None:
    assert near in [f"{miss.rule}: {miss.by}" for miss in explained(words).nearest]


@pytest.mark.parametrize("words", ["tls://unrelated.test", "tls://x2.example.test", "tcp://93.184.215.14:1"])
def test_a_far_rule_is_no_near_one(words: str) -> None:
    of = policy('{version: 1, workloads: {app: {rules: [{host: x1.test.example}, {tcp: "10.0.0.0/8:1"}]}}}')

    assert explain(of, asked(words)).nearest == ()
