"""What `decide` answers, one row for each sentence of the language. Rows expect the reason, not just the action."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml

from policies.engine import Expect, admit, carries_plain, decide, expect, identify
from policies.errors import PolicyError
from policies.hostnames import parse_hostname
from policies.index import Policy
from policies.model import Action, Attempt, Dial, Reason, Stage, Tls
from tests.builders import attempt, policy, rules, verdict

DAY = 86400.0


def check(of: Policy, words: str, expected: Reason, time: float = 0.0) -> None:
    got = verdict(of, words, time=time)
    assert (got.reason, got.is_allow) == (expected, expected is Reason.RULE), f"{words}: {got}"


VECTORS = yaml.safe_load((Path(__file__).parent.parent / "vectors" / "verdicts.yaml").read_text())
ROWS = [
    pytest.param(group["rules"], words, Reason(reason), id=f"{group['name']}: {words} -> {reason}")
    for group in VECTORS
    for words, reason in group["verdicts"].items()
]


@pytest.mark.parametrize(("text", "words", "reason"), ROWS)
def test_row(text: str, words: str, reason: Reason) -> None:
    check(rules(text or "[]"), words, reason)


class TestUntil:
    TEXT = """
        - {host: a.example, until: 1970-01-02}
        - {tcp: "b.example:22", until: 1970-01-02}
        - {ntp: t.example, until: 1970-01-02}
    """

    @pytest.mark.parametrize(
        "words", ["tls://a.example", "tcp://b.example:22", "ntp://t.example", "dns://a.example", "dns://b.example"]
    )
    def test_last_valid_day_is_the_whole_day_utc(self, words: str) -> None:
        of = rules(self.TEXT)
        check(of, words, Reason.RULE, time=2 * DAY - 1)
        check(of, words, Reason.EXPIRED, time=2 * DAY)

    def test_expired_rule_keeps_its_place_in_specificity(self) -> None:
        of = rules('- host: "*.example"\n- {host: a.example, until: 1970-01-01}')
        check(of, "tls://a.example", Reason.EXPIRED, time=DAY)
        check(of, "tls://b.example", Reason.RULE, time=DAY)

    def test_expired_rule_keeps_its_denies(self) -> None:
        of = rules("- {host: a.example, deny: all, until: 1970-01-01}")
        check(of, "tls://a.example", Reason.DENY_RULE, time=9 * DAY)

    def test_expiry_never_loosens_a_rule_of_the_same_pattern(self) -> None:
        of = rules(
            '- {host: a.example, tls: inspect}\n- {host: a.example, tls: inspect, allow: ["GET /x"], until: 1970-01-01}'
        )
        check(of, "GET https://a.example/x", Reason.RULE, time=0)
        check(of, "GET https://a.example/y", Reason.NO_ALLOW_ENTRY, time=0)
        check(of, "GET https://a.example/y", Reason.NO_ALLOW_ENTRY, time=DAY)
        check(of, "GET https://a.example/x", Reason.NO_ALLOW_ENTRY, time=DAY)

    def test_rule_of_the_same_pattern_that_lives_on_still_admits(self) -> None:
        of = rules(
            '- {host: a.example, tls: inspect, allow: ["GET /y"]}\n'
            '- {host: a.example, tls: inspect, allow: ["GET /x"], until: 1970-01-01}'
        )
        check(of, "GET https://a.example/y", Reason.RULE, time=DAY)
        check(of, "GET https://a.example/x", Reason.NO_ALLOW_ENTRY, time=DAY)


class TestGuard:
    TEXT = """
        version: 1
        guard:
          - {host: "*.pastebin.example", deny: all}
          - {host: api.example, deny: ["* /admin/**"]}
        workloads:
          app:
            rules:
              - host: x.pastebin.example
              - {host: api.example, tls: inspect}
              - tcp: y.pastebin.example:22
    """

    def test_nothing_below_undoes_it(self) -> None:
        of = policy(self.TEXT)
        check(of, "tls://x.pastebin.example", Reason.GUARD)
        check(of, "dns://x.pastebin.example", Reason.GUARD)
        check(of, "tcp://y.pastebin.example:22", Reason.GUARD)
        check(of, "GET https://api.example/Admin/x", Reason.GUARD)
        check(of, "GET https://api.example/x", Reason.RULE)

    def test_audit_does_not_undo_it(self) -> None:
        check(
            policy(self.TEXT.replace("app:", "app:\n            mode: audit")), "tls://x.pastebin.example", Reason.GUARD
        )


class TestEch:
    def hello(self, of: Policy) -> Reason:
        return decide(of, replace(attempt("tls://a.example"), ech=True)).reason

    def test_passthrough_refuses_it_by_default(self) -> None:
        assert self.hello(rules("- host: a.example")) is Reason.ECH

    def test_rule_may_allow_it(self) -> None:
        assert self.hello(rules("- {host: a.example, ech: allow}")) is Reason.RULE

    def test_workload_may_allow_it(self) -> None:
        text = "version: 1\nworkloads:\n  app:\n    ech: allow\n    rules: [{host: a.example}]"
        assert self.hello(policy(text)) is Reason.RULE

    def test_inspection_ignores_it(self) -> None:
        assert self.hello(rules("- {host: a.example, tls: inspect}")) is Reason.RULE


class TestWithoutName:
    HELLO = Attempt(Stage.TLS, "app", port=443, address=ip_address("203.0.113.5"))

    def test_no_sni_is_denied(self) -> None:
        assert decide(rules("- host: a.example"), self.HELLO).reason is Reason.NO_SNI

    def test_address_rule_admits_it_to_its_original_destination(self) -> None:
        got = decide(rules("- host: a.example\n- tcp: 203.0.113.0/24:443"), self.HELLO)
        assert (got.reason, got.dial, got.tls) == (Reason.RULE, Dial.ORIGINAL, Tls.PASSTHROUGH)

    def test_name_that_a_host_pattern_matches_is_decided_by_host_rules_alone(self) -> None:
        of = rules("- {host: a.example, ports: [8443]}\n- tcp: 203.0.113.0/24:443")
        assert decide(of, replace(self.HELLO, host=parse_hostname("a.example"))).reason is Reason.PORT
        assert decide(of, replace(self.HELLO, host=parse_hostname("b.example"))).reason is Reason.RULE

    def test_guard_closes_a_name_even_where_an_address_rule_covers_it(self) -> None:
        of = policy(
            "version: 1\nguard: [{host: bad.example, deny: all}]\n"
            "workloads: {app: {rules: [{tcp: '203.0.113.0/24:443'}]}}"
        )
        assert decide(of, replace(self.HELLO, host=parse_hostname("bad.example"))).reason is Reason.GUARD


class TestOpaque:
    def test_address_counts_as_the_names_whose_lookup_gave_it(self) -> None:
        of = rules("- tcp: git.example:22")
        names = tuple(map(parse_hostname, ("other.example", "git.example")))
        got = decide(of, Attempt(Stage.TCP, "app", port=22, address=ip_address("203.0.113.5"), names=names))
        assert (got.reason, got.dial, got.host) == (Reason.RULE, Dial.NAME, "git.example")

    def test_address_without_a_lookup_counts_as_no_name(self) -> None:
        of = rules("- tcp: git.example:22")
        assert (
            decide(of, Attempt(Stage.TCP, "app", port=22, address=ip_address("203.0.113.5"))).reason is Reason.NO_RULE
        )


class TestHostMismatch:
    def test_host_is_the_name_the_connection_was_opened_for(self) -> None:
        of = rules("- {host: a.example, tls: inspect}\n- {host: b.example, tls: inspect}")
        request = replace(attempt("GET https://b.example/"), opened_for=parse_hostname("a.example"))
        assert decide(of, request).reason is Reason.HOST_MISMATCH

    def test_lower_case_method_is_malformed(self) -> None:
        of = rules("- {host: a.example, tls: inspect}")
        assert decide(of, replace(attempt("GET https://a.example/"), method="get")).reason is Reason.MALFORMED_REQUEST

    def test_upgrade_needs_the_rule(self) -> None:
        request = replace(attempt("GET https://a.example/"), upgrade="websocket")
        assert decide(rules("- {host: a.example, tls: inspect}"), request).reason is Reason.UPGRADE
        assert decide(rules("- {host: a.example, tls: inspect, upgrade: [websocket]}"), request).reason is Reason.RULE
        assert (
            decide(
                rules("- {host: a.example, tls: inspect, upgrade: [websocket]}"), replace(request, upgrade="h2c")
            ).reason
            is Reason.UPGRADE
        )


class TestAudit:
    OF = """
        version: 1
        workloads:
          app:
            mode: audit
            rules:
              - {host: a.example, tls: inspect, allow: ["GET /x"]}
    """

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ("tls://b.example", Reason.NO_RULE),
            ("tls://a.example:8443", Reason.PORT),
            ("GET https://a.example/y", Reason.NO_ALLOW_ENTRY),
            ("dns://b.example", Reason.NO_RULE),
            ("tcp://203.0.113.5:22", Reason.PRIVATE_ADDRESS),
            ("tcp://8.8.8.8:22", Reason.NO_RULE),
        ],
    )
    def test_what_only_a_missing_rule_refuses_passes(self, words: str, reason: Reason) -> None:
        got = verdict(policy(self.OF), words)
        if reason is Reason.PRIVATE_ADDRESS:
            assert not got.is_allow
            return
        assert got.is_allow
        assert got.would_be is not None
        assert got.would_be.reason is reason

    @pytest.mark.parametrize(
        "words", ["tcp://169.254.169.254:80", "tls://a..b", "GET https://a.example/x/../y", "tcp://127.0.0.1:80"]
    )
    def test_the_rest_stays_denied(self, words: str) -> None:
        assert verdict(policy(self.OF), words).action is Action.DENY

    def test_private_answer_for_an_unnamed_name_stays_denied(self) -> None:
        got = admit(verdict(policy(self.OF), "tls://b.example"), ip_address("10.0.0.1"))
        assert got.reason is Reason.PRIVATE_ADDRESS


class TestAdmit:
    @pytest.mark.parametrize(
        ("text", "address", "from_hosts", "reason"),
        [
            ("- host: a.example", "93.184.216.34", False, Reason.RULE),
            ("- host: a.example", "10.0.0.1", False, Reason.PRIVATE_ADDRESS),
            ("- host: a.example", "fc00::1", False, Reason.PRIVATE_ADDRESS),
            ("- {host: a.example, private: true}", "10.0.0.1", False, Reason.RULE),
            ("- {host: a.example, private: true}", "127.0.0.1", False, Reason.NEVER_REACHED),
            ("- {host: a.example, private: true}", "169.254.169.254", False, Reason.NEVER_REACHED),
            ("- {host: a.example, private: true}", "::ffff:169.254.169.254", False, Reason.NEVER_REACHED),
            ("- {host: a.example, private: true}", "64:ff9b::a9fe:a9fe", False, Reason.NEVER_REACHED),
            ("- {host: a.example, private: true}", "2002:7f00:1::", False, Reason.NEVER_REACHED),
            ("- host: a.example", "127.0.0.1", True, Reason.RULE),
            ("- host: a.example", "10.0.0.1", True, Reason.RULE),
            ("- host: a.example", "169.254.169.254", True, Reason.NEVER_REACHED),
            ("- host: a.example", "fe80::1", True, Reason.NEVER_REACHED),
            ("- host: a.example", "224.0.0.1", True, Reason.NEVER_REACHED),
        ],
    )
    def test_resolved_address(self, text: str, address: str, from_hosts: bool, reason: Reason) -> None:
        got = admit(verdict(rules(text), "tls://a.example"), ip_address(address), from_hosts=from_hosts)
        assert (got.reason, got.is_allow) == (reason, reason is Reason.RULE)


class TestContradictions:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("- {host: a.example, tls: inspect}\n- host: a.example", "tls: passthrough here, tls: inspect at p.yaml:5"),
            ("- {host: a.example, plain: [8080]}\n- {host: a.example, ports: [8080]}", "plain HTTP in one rule"),
            (
                '- {host: "*.example", tls: inspect, deny: ["* /x"]}\n- host: a.example',
                '"* /x" of p.yaml:5 cannot be seen',
            ),
        ],
    )
    def test_is_an_error_that_names_both_lines(self, text: str, said: str) -> None:
        with pytest.raises(PolicyError, match=r"p\.yaml:\d+:\d+: .*") as caught:
            rules(text)
        assert said in str(caught.value)

    def test_guard_entry_that_cannot_be_seen_is_an_error(self) -> None:
        with pytest.raises(PolicyError, match="cannot be seen"):
            policy(
                'version: 1\nguard: [{host: a.example, deny: ["* /x"]}]\n'
                'workloads: {app: {rules: [{host: "*.example"}]}}'
            )

    def test_different_tls_on_disjoint_ports_is_none(self) -> None:
        rules("- {host: a.example, tls: inspect}\n- {host: a.example, ports: [8443]}")

    def test_one_prefix_in_two_workloads_is_an_error(self) -> None:
        with pytest.raises(PolicyError, match="one workload only"):
            policy(
                "version: 1\nworkloads:\n"
                "  a: {match: {address: [10.1.0.0/16]}, rules: []}\n"
                "  b: {match: {address: [10.1.0.0/16]}, rules: []}"
            )


class TestWorkloads:
    OF = """
        version: 1
        workloads:
          wide: {match: {address: [10.1.0.0/16]}, rules: []}
          narrow: {match: {address: [10.1.2.0/24]}, rules: []}
    """

    @pytest.mark.parametrize(
        ("address", "name"),
        [("10.1.2.3", "narrow"), ("10.1.3.3", "wide"), ("10.2.0.1", "unknown"), ("::ffff:10.1.2.3", "narrow")],
    )
    def test_longest_prefix_names_the_workload(self, address: str, name: str) -> None:
        assert identify(policy(self.OF), ip_address(address)) == name

    def test_unknown_workload_is_denied(self) -> None:
        assert decide(policy(self.OF), attempt("tls://a.example", workload="unknown")).reason is Reason.UNKNOWN_WORKLOAD


class TestPorts:
    OF = '- {host: a.example, plain: [8080]}\n- tcp: b.example:22\n- tcp: "10.0.0.0/8:443"'

    @pytest.mark.parametrize(
        ("port", "expected"), [(443, Expect.EITHER), (22, Expect.OPAQUE), (8080, Expect.PEEK), (9999, Expect.PEEK)]
    )
    def test_what_a_port_expects(self, port: int, expected: Expect) -> None:
        assert expect(rules(self.OF), "app", port) is expected

    @pytest.mark.parametrize(("port", "plain"), [(80, True), (8080, True), (443, False), (22, False)])
    def test_which_ports_carry_plain_http(self, port: int, plain: bool) -> None:
        assert carries_plain(rules(self.OF), "app", port) is plain


def test_record_type_other_than_an_address_has_no_data() -> None:
    of = rules("- host: a.example")
    assert decide(of, replace(attempt("dns://a.example"), query_type="TXT")).reason is Reason.QUERY_TYPE
    assert decide(of, replace(attempt("dns://b.example"), query_type="TXT")).reason is Reason.NO_RULE
