"""What a policy that loads may still get wrong: each warning with a policy that earns it and one that does not."""

# A row of a table is one line, however long.
# ruff: noqa: E501

from __future__ import annotations

from datetime import date

import pytest

from policies.cases import run
from policies.hostnames import Hostname
from policies.lint import Code, Finding, Level, example_words, lint
from policies.words import ladder, parse_words
from tests.builders import policy, rules

TODAY = date(2026, 11, 22)
SHARED = {
    "blob.core.windows.net": "blob.core.windows.net",
    "windows.net": "blob.core.windows.net",
    "github.io": "github.io",
}


def shared_suffix(name: Hostname) -> Hostname | None:
    found = SHARED.get(name)
    return Hostname(found) if found else None


def findings(text: str, whole: bool = False) -> tuple[Finding, ...]:
    of = policy(text) if whole else rules(text)
    return lint(of, run(of, 0.0), shared_suffix=shared_suffix, today=TODAY)


def told(text: str, code: Code, *, whole: bool = False) -> list[str]:
    return [str(finding.problem) for finding in findings(text, whole) if finding.code is code]


ROWS = [
    # a wildcard that every tenant of a service is below
    ('- host: "*.blob.core.windows.net"', Code.SHARED_SUFFIX, "admits every tenant of blob.core.windows.net"),
    ('- host: "*.windows.net"', Code.SHARED_SUFFIX, "admits every tenant of blob.core.windows.net"),
    ('- {host: "*.github.io", tls: inspect}', Code.SHARED_SUFFIX, "name the accounts you use"),
    ('- {host: "*.github.io", tls: inspect, allow: ["GET /docs/**"]}', Code.SHARED_SUFFIX, None),
    ('- {host: "*.github.io", deny: all}', Code.SHARED_SUFFIX, None),
    ("- host: mine.blob.core.windows.net", Code.SHARED_SUFFIX, None),
    ('- host: "*.mine.github.io"', Code.SHARED_SUFFIX, None),
    # fronting
    ('- host: "*.a.example"\n- {host: x.a.example, tls: inspect}', Code.FRONTING, "x.a.example is inspected at p.yaml:6"),
    ('- host: "*.a.example"\n- {host: x.a.example, deny: all}', Code.FRONTING, "x.a.example is denied at p.yaml:6"),
    ('- host: "*.a.example"\n- {host: "*.x.a.example", tls: inspect}', Code.FRONTING, "*.x.a.example is inspected"),
    ('- host: "*.a.example"\n- {host: x.a.example, deny: all}\n- {host: y.a.example, deny: all}', Code.FRONTING, "(and 1 more)"),
    ('- {host: "*.a.example", tls: inspect}\n- {host: x.a.example, deny: all}', Code.FRONTING, None),
    ('- {host: "*.a.example", ports: [80]}\n- {host: x.a.example, deny: all}', Code.FRONTING, None),
    ('- host: "*.a.example"\n- host: x.a.example', Code.FRONTING, None),
    ('- host: "*.a.example"\n- {host: a.example, tls: inspect}', Code.FRONTING, None),
    # wide tcp
    ("- tcp: 203.0.112.0/23:443", Code.WIDE_TCP, "203.0.112.0/23 on port 443"),
    ("- {tcp: {address: 203.0.112.0/20, ports: [1-1024]}}", Code.WIDE_TCP, "203.0.112.0/20 on port 80"),
    ('- tcp: "[2001:4860::/32]:443"', Code.WIDE_TCP, "2001:4860::/32 on port 443"),
    ("- tcp: 203.0.113.0/24:443", Code.WIDE_TCP, None),
    ('- tcp: "[2001:4860:1:2::/64]:443"', Code.WIDE_TCP, None),
    ("- tcp: 203.0.112.0/20:6379", Code.WIDE_TCP, None),
    ("- udp: 203.0.112.0/20:443", Code.WIDE_TCP, None),
    # without effect
    ('- {host: "*.a.example", deny: all}\n- host: x.a.example', Code.NO_EFFECT, "deny: all at p.yaml:5 closes *.a.example"),
    ("- {host: a.example, deny: all}\n- host: a.example", Code.NO_EFFECT, "deny: all at p.yaml:5 closes a.example"),
    ("- {host: a.example, deny: all}\n- tcp: a.example:22", Code.NO_EFFECT, "deny: all at p.yaml:5"),
    ("- {host: a.example, deny: all}\n- dns: a.example", Code.NO_EFFECT, "deny: all at p.yaml:5"),
    ('- {host: "*.a.example", deny: all}\n- dns: "*.x.a.example"', Code.NO_EFFECT, "deny: all at p.yaml:5"),
    ('- {host: "*.a.example", deny: all}\n- host: a.example', Code.NO_EFFECT, None),
    ("- host: a.example\n- host: a.example", Code.NO_EFFECT, "says again what p.yaml:5"),
    ("- {name: x, host: a.example}\n- {host: a.example, ports: [443], reason: y}", Code.NO_EFFECT, "says again what p.yaml:5 (x)"),
    ("- host: a.example\n- {host: a.example, ports: [8443]}", Code.NO_EFFECT, None),
    ('- {host: a.example, tls: inspect, allow: ["GET /x"]}\n- {host: a.example, tls: inspect}', Code.NO_EFFECT,
     "for the same name and port the allow list at p.yaml:5 decides"),
    ('- {host: a.example, tls: inspect, allow: ["GET /x"]}\n- {host: a.example, tls: inspect, ports: [443, 8443]}',
     Code.NO_EFFECT, None),
    ('- {host: a.example, tls: inspect, allow: ["GET /x"]}\n- {host: a.example, tls: inspect, deny: ["* /x"]}',
     Code.NO_EFFECT, None),
    ("- tcp: 169.254.169.254:80", Code.NO_EFFECT, "are never reached"),
    ("- tcp: 127.0.0.0/8:80", Code.NO_EFFECT, "are never reached"),
    ('- udp: "[ff00::/8]:53"', Code.NO_EFFECT, "are never reached"),
    ("- tcp: 0.0.0.0/0:22", Code.NO_EFFECT, None),
    ("- udp: 8.8.8.8:53", Code.NO_EFFECT, "that port is the DNS guard's"),
    ("- {udp: {host: a.example, ports: [53, 123]}}", Code.NO_EFFECT, "that port is the DNS guard's"),
    ("- udp: 93.184.215.14:123", Code.NO_EFFECT, "write an ntp rule"),
    ("- udp: 93.184.215.14:53-54", Code.NO_EFFECT, None),
    ("- tcp: 8.8.8.8:53", Code.NO_EFFECT, None),
    ('- tcp: "[64:ff9b::/96]:22"', Code.NO_EFFECT, None),
    ("- host: a.example\n- dns: a.example", Code.NO_EFFECT, "p.yaml:5 (app/rules[0]) admits the lookup already"),
    ('- host: "*.a.example"\n- dns: x.a.example', Code.NO_EFFECT, "admits the lookup already"),
    ('- host: a.example\n- dns: "*.a.example"', Code.NO_EFFECT, None),
    ("- {host: a.example, until: 2027-01-01}\n- dns: a.example", Code.NO_EFFECT, None),
    # dates
    ("- {name: old, host: a.example, until: 2026-11-21}", Code.EXPIRED, 'rule "old" ended on 2026-11-21'),
    ("- {host: a.example, until: 2026-11-22}", Code.EXPIRED, None),
    ("- {host: a.example, until: 2026-11-22}", Code.ENDS_SOON, "ends today"),
    ("- {host: a.example, until: 2026-11-23}", Code.ENDS_SOON, "ends tomorrow"),
    ("- {host: a.example, until: 2026-12-06}", Code.ENDS_SOON, "ends in 14 days"),
    ("- {host: a.example, until: 2026-12-07}", Code.ENDS_SOON, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "message"), ROWS, ids=[f"{row[1]}: {row[0]}" for row in ROWS])
def test_a_policy_is_warned_of(text: str, code: Code, message: str | None) -> None:
    found = told(text, code)

    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert message in found[0]


def test_an_expired_rule_is_an_error_and_a_rule_that_ends_soon_a_note() -> None:
    levels = {
        finding.code: finding.level
        for finding in findings("- {host: a.example, until: 2026-01-01}\n- {host: b.example, until: 2026-12-01}")
    }

    assert levels[Code.EXPIRED] is Level.ERROR
    assert levels[Code.ENDS_SOON] is Level.NOTE
    assert levels[Code.UNTESTED] is Level.WARNING


def test_the_guard_makes_a_name_reachable_by_fronting_too() -> None:
    text = """
    version: 1
    guard: [{host: x.a.example, deny: all}]
    workloads: {app: {rules: [{host: "*.a.example"}, {host: x.a.example}]}}
    """

    assert len(told(text, Code.FRONTING, whole=True)) == 1
    assert "closes x.a.example" in told(text, Code.NO_EFFECT, whole=True)[0]


def test_a_workload_without_tests_is_one_warning() -> None:
    (found,) = told("- host: a.example\n- host: b.example", Code.UNTESTED)

    assert 'the workload "app" has no tests' in found
    assert "tls://a.example" in found


def test_a_rule_that_no_test_reaches_comes_with_a_test_to_write() -> None:
    text = """
    version: 1
    workloads:
      app:
        use: [shared]
        rules:
          - {name: api, host: api.example, tls: inspect, allow: ["GET /search/**"]}
          - {name: closed, host: closed.example, deny: all}
          - {name: seen, host: seen.example}
    sets: {shared: [{host: set.example}]}
    tests: {app: {allow: ["tls://seen.example"]}}
    """

    api, closed = told(text, Code.UNTESTED, whole=True)  # and none for the set's rule

    assert 'add to tests.app.allow: "GET https://api.example/search/x"' in api
    assert 'add to tests.app.deny: "tls://closed.example"' in closed


def test_a_rule_without_effect_is_not_told_to_be_tested() -> None:
    text = """
    version: 1
    workloads: {app: {rules: [{host: a.example}, {host: a.example}]}}
    tests: {app: {allow: ["tls://a.example"]}}
    """

    assert told(text, Code.UNTESTED, whole=True) == []


def test_a_tag_on_a_web_port_is_wide() -> None:
    from ipaddress import ip_network

    from policies.load import load
    from policies.tree import Source

    text = "version: 1\nworkloads: {app: {rules: [{tcp: {tag: Sql.EastUS2, ports: [443]}}]}}\n"
    of = load([Source("p.yaml", text)], catalogue={}, tags={"Sql.EastUS2": (ip_network("203.0.113.0/28"),)},
              is_public_suffix=lambda name: False)  # fmt: skip

    found = [f for f in lint(of, (), shared_suffix=shared_suffix, today=TODAY) if f.code is Code.WIDE_TCP]

    assert "tag Sql.EastUS2 on port 443" in str(found[0].problem)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("host: a.example", "tls://a.example"),
        ('host: "*.a.example"', "tls://x.a.example"),
        ("{host: a.example, ports: [8443]}", "tls://a.example:8443"),
        ("{host: a.example, ports: [80]}", "GET http://a.example/"),
        ("{host: a.example, ports: [8080], plain: [8080]}", "GET http://a.example:8080/"),
        ('{host: a.example, tls: inspect, allow: ["POST,PUT /up/*/x"]}', "POST https://a.example/up/x/x"),
        ('{host: a.example, tls: inspect, allow: ["* /**"]}', "GET https://a.example/x"),
        ("tcp: a.example:22", "tcp://a.example:22"),
        ("tcp: 203.0.113.0/24:8000-8100", "tcp://203.0.113.1:8000"),
        ('udp: "[2606:4700::1111]:53"', "udp://[2606:4700::1111]:53"),
        ("{udp: {host: a.example, ports: 443, quic: sni}}", "quic://a.example:443"),
        ("ntp: a.example", "ntp://a.example"),
        ('dns: "*.a.example"', "dns://x.a.example"),
    ],
)
def test_the_example_of_a_rule_is_an_attempt_that_the_rule_admits(rule: str, words: str) -> None:
    of = rules(f"- {rule}")
    (written,) = of.workloads["app"].rules

    steps = ladder(of, parse_words("app", example_words(written)))

    assert example_words(written) == words
    assert steps[-1].verdict.rule is written
    assert steps[-1].verdict.is_allow


def test_findings_come_in_file_order() -> None:
    found = findings('- tcp: 203.0.112.0/20:443\n- host: "*.github.io"\n- {host: old.example, until: 2026-01-01}')

    assert [finding.problem.place.line for finding in found] == sorted(finding.problem.place.line for finding in found)
    assert {finding.code for finding in found} == {Code.WIDE_TCP, Code.SHARED_SUFFIX, Code.EXPIRED, Code.UNTESTED}
