"""One policy file: every key of the language and what becomes of it. Mistakes are in test_document_mistakes."""

from __future__ import annotations

from datetime import date
from ipaddress import ip_network
from textwrap import indent

import pytest

from policies.hostnames import parse_hostname, parse_pattern
from policies.index import Policy
from policies.model import (
    Action,
    AnyRule,
    HostRule,
    KubernetesMatch,
    Mode,
    NameRule,
    PortRange,
    Stage,
    Tls,
    TransportRule,
)
from tests.policies.files import TAGS, read


def rule(text: str) -> AnyRule:
    """The one rule of a workload."""
    policy = read("version: 1\nworkloads:\n  app:\n    rules:\n" + indent(f"- {text}", "      "))
    return policy.workloads["app"].rules[0]


def test_a_host_rule_alone_has_the_defaults_of_the_language() -> None:
    found = rule("host: API.Example.ORG.")

    assert isinstance(found, HostRule)
    assert found.pattern == parse_pattern("api.example.org")
    assert found.ports == (PortRange(443, 443),)
    assert (found.plain, found.tls, found.allow, found.deny) == ((), Tls.PASSTHROUGH, None, ())
    assert (found.private, found.encoded_slash, found.ech, found.http2) == (False, False, None, None)
    assert (found.upgrade, found.upstream_pool, found.until) == (frozenset(), False, None)
    assert str(found) == "p.yaml:5 (app/rules[0])"


def test_every_key_of_a_host_rule_is_read() -> None:
    found = rule(
        """host: "*.example.org"
  ports: [443, "8000-8100"]
  plain: 8080
  tls: inspect
  allow: ["GET,HEAD /search/**"]
  deny: ["* /admin/**"]
  private: true
  encodedSlash: literal
  ech: deny
  http2: false
  upgrade: [websocket]
  upstreamPool: true
  name: search
  reason: people search
  owner: team
  until: 2027-01-31"""
    )

    assert isinstance(found, HostRule)
    assert found.pattern == parse_pattern("*.example.org")
    assert found.ports == (PortRange(443, 443), PortRange(8000, 8100))
    assert found.plain == (PortRange(8080, 8080),)
    assert found.tls is Tls.INSPECT
    assert found.allow is not None
    assert [(set(entry.methods), str(entry.path)) for entry in found.allow] == [({"GET", "HEAD"}, "/search/**")]
    assert [(set(entry.methods), str(entry.path)) for entry in found.deny] == [(set(), "/admin/**")]
    assert (found.private, found.encoded_slash, found.ech, found.http2) == (True, True, False, False)
    assert (found.upgrade, found.upstream_pool) == (frozenset({"websocket"}), True)
    assert (found.name, found.reason, found.owner) == ("search", "people search", "team")
    assert found.until == date(2027, 1, 31)
    assert str(found) == "p.yaml:5 (search)"


def test_deny_all_is_one_entry_that_is_all() -> None:
    found = rule("{host: x.example.org, deny: all}")

    assert isinstance(found, HostRule)
    assert [entry.is_all for entry in found.deny] == [True]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("443", [(443, 443)]),
        ("'443'", [(443, 443)]),
        ("8000-8100", [(8000, 8100)]),
        ("[80, 443]", [(80, 80), (443, 443)]),
        ("[80, '8000-8100', 9000-9000]", [(80, 80), (8000, 8100), (9000, 9000)]),
        ("[1, 65535]", [(1, 1), (65535, 65535)]),
    ],
)
def test_ports_are_written_in_any_of_these_forms(written: str, expected: list[tuple[int, int]]) -> None:
    found = rule(f"{{host: x.example.org, ports: {written}}}")

    assert isinstance(found, HostRule)
    assert [(ports.first, ports.last) for ports in found.ports] == expected


@pytest.mark.parametrize(
    ("written", "host", "networks", "ports"),
    [
        ("github.com:22", "github.com", (), (22, 22)),
        ("GitHub.COM:8000-8100", "github.com", (), (8000, 8100)),
        ("10.20.0.0/16:6379", None, ("10.20.0.0/16",), (6379, 6379)),
        ("10.20.3.4:6379", None, ("10.20.3.4/32",), (6379, 6379)),
        ("0.0.0.0/0:1-65535", None, ("0.0.0.0/0",), (1, 65535)),
        ('"[2001:db8::/32]:443"', None, ("2001:db8::/32",), (443, 443)),
        ('"[2001:db8::1]:8000-8100"', None, ("2001:db8::1/128",), (8000, 8100)),
        ("{host: db.example.org, ports: 5432}", "db.example.org", (), (5432, 5432)),
        ("{address: 10.0.0.0/8, ports: 1-9}", None, ("10.0.0.0/8",), (1, 9)),
        ("{address: [10.0.0.0/8, 'fd00::/8'], ports: 1}", None, ("10.0.0.0/8", "fd00::/8"), (1, 1)),
    ],
)
@pytest.mark.parametrize("stage", [Stage.TCP, Stage.UDP])
def test_a_destination_is_a_name_or_prefixes_with_ports(
    stage: Stage, written: str, host: str | None, networks: tuple[str, ...], ports: tuple[int, int]
) -> None:
    found = rule(f"{stage}: {written}")

    assert isinstance(found, TransportRule)
    assert found.stage is stage
    assert found.host == host
    assert found.networks == tuple(map(ip_network, networks))
    assert found.ports == (PortRange(*ports),)


def test_a_tag_stands_for_its_imported_prefixes_whatever_its_case() -> None:
    found = rule("tcp: {tag: storage.eastus2, ports: [443, 445]}")

    assert isinstance(found, TransportRule)
    assert found.tag == "storage.eastus2"
    assert found.networks == TAGS["Storage.EastUS2"]


@pytest.mark.parametrize(
    "written",
    [
        "{udp: {host: h.example, ports: 1, private: true, budget: 10MiB/h, quic: sni, owner: me, until: 2027-01-31}}",
        "{udp: {host: h.example, ports: 1}, private: true, budget: 10MiB/h, quic: sni, owner: me, until: 2027-01-31}",
        "{udp: 'h.example:1', private: true, budget: 10MiB/h, quic: sni, owner: me, until: 2027-01-31}",
    ],
)
def test_what_a_udp_rule_carries_stands_inside_the_destination_or_beside_it(written: str) -> None:
    found = rule(written)

    assert isinstance(found, TransportRule)
    assert (found.host, found.private, found.budget, found.quic) == ("h.example", True, 10 * 1024 * 1024, "sni")
    assert (found.owner, found.until) == ("me", date(2027, 1, 31))


def test_ntp_is_an_exact_name_and_dns_may_be_a_wildcard() -> None:
    time, lookup = rule("ntp: ntp.ubuntu.com"), rule('dns: "*.svc.cluster.local"')

    assert isinstance(time, NameRule)
    assert isinstance(lookup, NameRule)
    assert (time.stage, time.pattern) == (Stage.NTP, parse_pattern("ntp.ubuntu.com"))
    assert (lookup.stage, lookup.pattern) == (Stage.DNS, parse_pattern("*.svc.cluster.local"))


def test_every_key_of_a_workload_is_read() -> None:
    policy = read("""
        version: 1
        workloads:
          pod:
            match: {kubernetes: {namespace: ns, serviceAccount: sa, labels: {b: "2", a: x}}}
            mode: audit
            logQuery: true
            ech: allow
            rules: []
            use: []
          vm: {match: {address: [10.1.0.0/16, 10.2.0.1]}}
          person: {match: {user: alice}}
          unknown: {rules: [{dns: a.example}]}
    """)

    pod = policy.workloads["pod"]
    assert pod.match
    assert pod.match.kubernetes == KubernetesMatch("ns", "sa", (("a", "x"), ("b", "2")))
    assert (pod.mode, pod.log_query, pod.ech, pod.rules) == (Mode.AUDIT, True, True, ())
    vm, person = policy.workloads["vm"].match, policy.workloads["person"].match
    assert vm
    assert vm.address == (ip_network("10.1.0.0/16"), ip_network("10.2.0.1/32"))
    assert person
    assert person.user == "alice"
    assert len(policy.workloads["unknown"].rules) == 1


def test_guard_and_tests_are_read_with_their_places() -> None:
    policy = read("""\
        version: 1
        guard:
          - {host: "*.paste.example", deny: all, name: no-paste}
          - {host: api.example.org, deny: ["DELETE /**"], until: 2027-01-31}
        workloads: {app: {}}
        tests:
          app:
            allow: [tls://a.example]
            deny:
              - GET https://b.example/x
    """)

    assert [(str(guard), guard.label) for guard in policy.guard] == [
        ("p.yaml:3 (no-paste)", "guard[0]"),
        ("p.yaml:4 (guard[1])", "guard[1]"),
    ]
    assert [(test.workload, test.words, test.expect, str(test.place)) for test in policy.tests] == [
        ("app", "tls://a.example", Action.ALLOW, "p.yaml:8"),
        ("app", "GET https://b.example/x", Action.DENY, "p.yaml:10"),
    ]


def test_a_policy_of_version_alone_has_no_workload_at_all() -> None:
    of = read("version: 1")
    assert of == Policy({}, (), (), {}, of.guard_table, of.sources, {})


def test_names_are_read_into_their_normal_form() -> None:
    found = rule("host: bücher.example")

    assert isinstance(found, HostRule)
    assert found.pattern.host == parse_hostname("xn--bcher-kva.example")


def test_entries_are_free_on_plain_ports_without_inspection() -> None:
    found = rule("{host: a.example, ports: [80, 8081], plain: 8080-8090, allow: [GET /x]}")

    assert isinstance(found, HostRule)
    assert found.tls is Tls.PASSTHROUGH
