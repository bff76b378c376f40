"""What `decide` answers, one row for each sentence of the language. Rows expect the reason, not just the action."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml

from policies.engine import Expect, admit, carries_plain, decide, expect, identify
from policies.errors import PolicyError
from policies.hostnames import parse_hostname
from policies.index import Policy, build
from policies.model import Action, Attempt, Dial, Place, PortRange, Reason, Stage, Tls, TransportRule, Workload
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

    GRANTS = """
        - {host: a.example, tls: inspect}
        - {host: a.example, tls: inspect, until: 1970-01-01, private: true, encodedSlash: literal, upgrade: [websocket]}
    """

    def test_what_an_expired_rule_granted_beside_another_is_gone(self) -> None:
        of = rules(self.GRANTS)
        slash = attempt("GET https://a.example/p/a%2Fb")
        websocket = replace(attempt("GET https://a.example/"), upgrade="websocket")
        assert verdict(of, "tls://a.example").private
        assert verdict(of, "dns://a.example").private
        assert decide(of, slash).is_allow
        assert decide(of, websocket).is_allow
        assert not verdict(of, "tls://a.example", time=DAY).private
        assert not verdict(of, "dns://a.example", time=DAY).private
        assert decide(of, replace(slash, time=DAY)).reason is Reason.MALFORMED_PATH
        assert decide(of, replace(websocket, time=DAY)).reason is Reason.UPGRADE

    def test_expired_rule_still_refuses_ech(self) -> None:
        text = """
            version: 1
            workloads:
              app:
                ech: allow
                rules: [{host: a.example}, {host: a.example, ech: deny, until: 1970-01-01}]
        """
        for time in (0, DAY):
            assert decide(policy(text), replace(attempt("tls://a.example", time=time), ech=True)).reason is Reason.ECH

    @pytest.mark.parametrize("time", [float("nan"), float("inf")])
    def test_a_time_that_is_none_is_past_every_until(self, time: float) -> None:
        of = rules("- {host: a.example, until: 2999-01-01}\n- host: b.example")
        check(of, "tls://a.example", Reason.EXPIRED, time=time)
        check(of, "tls://b.example", Reason.RULE, time=time)


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

    def test_rule_by_name_admits_it_to_a_name_whose_lookup_gave_the_address(self) -> None:
        hello = replace(self.HELLO, names=(parse_hostname("git.example"),))
        got = decide(rules("- tcp: git.example:443"), hello)
        assert (got.reason, got.dial, got.host) == (Reason.RULE, Dial.NAME, "git.example")
        assert decide(rules("- tcp: git.example:22"), hello).reason is Reason.PORT

    def test_sni_comes_before_the_other_names_of_its_address(self) -> None:
        of = rules("- tcp: a.example:443\n- tcp: b.example:443")
        hello = replace(self.HELLO, host=parse_hostname("b.example"), names=(parse_hostname("a.example"),))
        assert decide(of, hello).host == "b.example"


class TestOpaque:
    SHARED = Attempt(Stage.TCP, "app", port=22, address=ip_address("203.0.113.5"))
    CLOSED = """
        version: 1
        guard: [{host: bad.example, deny: all}]
        workloads:
          app:
            rules: [{tcp: "git.example:22"}, {tcp: "203.0.113.0/24:22"}]
    """

    def test_one_admitted_name_is_enough_and_is_the_one_dialled(self) -> None:
        names = (parse_hostname("bad.example"), parse_hostname("git.example"))
        got = decide(policy(self.CLOSED), replace(self.SHARED, names=names))
        assert (got.reason, got.dial, got.host) == (Reason.RULE, Dial.NAME, "git.example")

    def test_address_rule_does_not_open_the_address_of_a_closed_name(self) -> None:
        names = (parse_hostname("bad.example"), parse_hostname("other.example"))
        assert decide(policy(self.CLOSED), self.SHARED).reason is Reason.RULE
        assert decide(policy(self.CLOSED), replace(self.SHARED, names=names)).reason is Reason.GUARD

    def test_private_answers_are_meant_if_one_admitting_rule_says_so(self) -> None:
        of = rules('- tcp: "a.example:22"\n- tcp: {host: a.example, ports: [22], private: true}\n- host: a.example')
        assert verdict(of, "tcp://a.example:22").private
        assert verdict(of, "dns://a.example").private
        assert not verdict(of, "tls://a.example").private

    def test_dns_rule_lends_no_private_answers_to_a_name_that_is_dialled(self) -> None:
        of = rules('- host: a.example\n- dns: "*.example"')
        assert not verdict(of, "dns://a.example").private
        assert verdict(of, "dns://b.example").private

    def test_tag_never_reaches_private_addresses(self) -> None:
        tagged = TransportRule(
            place=Place("p.yaml", 1),
            label="app/rules[0]",
            stage=Stage.TCP,
            host=None,
            networks=(ip_network("10.0.0.0/24"),),
            tag="Storage",
            ports=(PortRange(22, 22),),
        )
        plain = replace(tagged, networks=(ip_network("10.0.0.0/8"),), tag=None)
        inside = replace(self.SHARED, address=ip_address("10.0.0.1"))
        for rules_, expected in (
            ((tagged,), Reason.PRIVATE_ADDRESS),
            ((plain,), Reason.RULE),
            ((tagged, plain), Reason.RULE),
        ):
            of = build({"app": Workload("app", Place("p.yaml", 1), rules_)})
            assert decide(of, inside).reason is expected


class TestNtp:
    PACKET = Attempt(Stage.NTP, "app", port=123, address=ip_address("203.0.113.5"))

    def test_any_rule_admits_a_packet_whatever_its_address(self) -> None:
        assert decide(rules("- ntp: t.example"), self.PACKET).reason is Reason.RULE
        assert decide(rules("- host: t.example"), self.PACKET).reason is Reason.NO_RULE

    def test_packet_needs_a_source_that_is_not_closed(self) -> None:
        closed = '- ntp: t.example\n- {host: "*.example", deny: all}'
        assert decide(rules(closed), self.PACKET).reason is Reason.DENY_RULE
        assert decide(rules(closed + "\n- ntp: t.test"), self.PACKET).reason is Reason.RULE

    @pytest.mark.parametrize("address", ["169.254.169.123", "127.0.0.1", "::ffff:169.254.169.123"])
    def test_link_local_source_is_no_destination_of_a_workload(self, address: str) -> None:
        packet = replace(self.PACKET, address=ip_address(address))
        assert decide(rules("- ntp: t.example"), packet).reason is Reason.NEVER_REACHED


class TestNamesOfAnAddress:
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
            ("tcp://a.example:22", Reason.WRONG_PROTOCOL),
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

    @pytest.mark.parametrize("host", ["a.example", "b.example"])
    def test_malformed_path_stays_denied_on_every_host(self, host: str) -> None:
        closed = self.OF.rstrip() + "\n              - {host: b.example, deny: all}\n"
        request = replace(attempt(f"GET https://{host}/"), target="/x/%2e%2e/y")
        assert decide(policy(closed), request).reason is Reason.MALFORMED_PATH

    @pytest.mark.parametrize("words", ["tls://b.example", "tls://a.example:8443"])
    def test_ech_stays_denied_without_a_rule_too(self, words: str) -> None:
        of = policy(self.OF)
        assert decide(of, replace(attempt(words), ech=True)).reason is Reason.ECH
        allowed = policy(self.OF.replace("mode: audit", "mode: audit\n            ech: allow"))
        assert decide(allowed, replace(attempt(words), ech=True)).is_allow

    @pytest.mark.parametrize("host", ["a.example", "b.example"])
    def test_h2c_stays_denied_on_every_host(self, host: str) -> None:
        request = replace(attempt(f"GET https://{host}/y"), upgrade="h2c")
        assert decide(policy(self.OF), request).reason is Reason.UPGRADE

    @pytest.mark.parametrize("words", ["tls://a.example:8443", "GET https://a.example/y", "tcp://a.example:22"])
    def test_name_whose_private_answers_are_meant_stays_reachable(self, words: str) -> None:
        of = policy(self.OF.replace("allow:", "private: true, allow:"))
        assert admit(verdict(of, words), ip_address("10.0.0.1")).is_allow
        assert not admit(verdict(of, words), ip_address("127.0.0.1")).is_allow

    def test_opaque_bytes_are_not_refused_by_waiting_for_a_hello(self) -> None:
        assert expect(policy(self.OF), "app", 22) is Expect.EITHER

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

    @pytest.mark.parametrize(
        "text",
        [
            '[{host: "*.example"}, {host: a.example, tls: inspect}]',
            '[{host: "*.example"}, {host: "*.b.example", tls: inspect}, {host: a.example, deny: all}]',
            '[{host: "*.example", deny: all}]',
            '[{host: "*.example", ports: [80]}]',
        ],
    )
    def test_guard_entry_below_a_wildcard_that_does_not_carry_its_names_is_none(self, text: str) -> None:
        guard = '[{host: a.example, deny: ["* /x"]}, {host: "*.b.example", deny: all}]'
        policy(f"version: 1\nguard: {guard}\nworkloads: {{app: {{rules: {text}}}}}")

    @pytest.mark.parametrize(
        "text",
        [
            '[{host: "*.example"}, {host: b.example, tls: inspect}]',
            '[{host: "*.x.example"}]',
            '[{host: "*.example", tls: inspect}, {host: y.x.example}]',
        ],
    )
    def test_guard_entry_for_a_wildcard_is_inherited_and_inherits(self, text: str) -> None:
        guard = '[{host: "*.x.example", deny: ["* /x"]}]'
        with pytest.raises(PolicyError, match="cannot be seen"):
            policy(f"version: 1\nguard: {guard}\nworkloads: {{app: {{rules: {text}}}}}")

    def test_allow_entry_on_a_tls_port_beside_a_plain_one_is_an_error(self) -> None:
        with pytest.raises(PolicyError, match="cannot be seen"):
            rules('- {host: a.example, ports: [80, 443], allow: ["GET /x"]}')
        with pytest.raises(PolicyError, match='port 443 is passed through undecrypted, so "GET /x"'):
            rules('- {host: a.example, ports: [80], allow: ["GET /x"], deny: ["GET /x"]}\n- host: a.example')

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

    def test_unknown_workload_may_have_rules(self) -> None:
        of = policy("version: 1\nworkloads: {unknown: {rules: [{host: a.example}]}}")
        unknown = identify(of, ip_address("10.1.2.3"))
        assert decide(of, attempt("tls://a.example", workload=unknown)).reason is Reason.RULE
        assert decide(of, attempt("tls://b.example", workload=unknown)).reason is Reason.NO_RULE
        assert decide(of, attempt("tls://a.example", workload="app")).reason is Reason.UNKNOWN_WORKLOAD

    def test_unknown_workload_is_denied(self) -> None:
        assert decide(policy(self.OF), attempt("tls://a.example", workload="unknown")).reason is Reason.UNKNOWN_WORKLOAD


class TestPorts:
    OF = '- {host: a.example, plain: [8080]}\n- tcp: b.example:22\n- tcp: "10.0.0.0/8:443"'

    @pytest.mark.parametrize(
        ("port", "expected"), [(443, Expect.EITHER), (22, Expect.OPAQUE), (8080, Expect.PEEK), (9999, Expect.PEEK)]
    )
    def test_what_a_port_expects(self, port: int, expected: Expect) -> None:
        assert expect(rules(self.OF), "app", port) is expected

    @pytest.mark.parametrize(
        ("guard", "rule", "expected"),
        [
            ("[{host: bad.example, deny: all}]", "8.8.8.0/24:22", Expect.EITHER),
            ("[{host: bad.example, deny: all}]", "git.example:22", Expect.OPAQUE),
            ("[]", "8.8.8.0/24:22", Expect.OPAQUE),
        ],
    )
    def test_closed_name_is_looked_for_where_an_address_rule_could_carry_it(
        self, guard: str, rule: str, expected: Expect
    ) -> None:
        of = policy(f'version: 1\nguard: {guard}\nworkloads: {{app: {{rules: [{{tcp: "{rule}"}}]}}}}')
        assert expect(of, "app", 22) is expected

    @pytest.mark.parametrize(("port", "plain"), [(80, True), (8080, True), (443, False), (22, False)])
    def test_which_ports_carry_plain_http(self, port: int, plain: bool) -> None:
        assert carries_plain(rules(self.OF), "app", port) is plain


def test_record_type_other_than_an_address_has_no_data() -> None:
    of = rules("- host: a.example")
    assert decide(of, replace(attempt("dns://a.example"), query_type="TXT")).reason is Reason.QUERY_TYPE
    assert decide(of, replace(attempt("dns://b.example"), query_type="TXT")).reason is Reason.NO_RULE
