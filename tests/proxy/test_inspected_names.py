"""The domains that inspection needs, and the inspected rules that constraints leave out."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pki.authority import create_authority
from pki.constraints import permitted_domains
from policies.hostnames import Hostname, parents
from policies.model import Tls
from proxy.inspected_names import inspected_domains, outside
from tests.builders import policy, rules, verdict
from tests.pki.oracle import accepts, forge_leaf

NOW = datetime.now(UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- {host: a.example, tls: inspect}", ("a.example",)),
        ('- {host: "*.a.example", tls: inspect}', ("a.example",)),
        ("- {host: a.example}", ()),
        ("- {host: b.example, tls: inspect}\n- {host: a.example, tls: inspect}", ("a.example", "b.example")),
        ('- {host: x.a.example, tls: inspect}\n- {host: "*.a.example", tls: inspect}', ("a.example",)),
        ("- {host: a.example, tls: inspect}\n- {host: xa.example, tls: inspect}", ("a.example", "xa.example")),
        ("- {host: a.example, tls: inspect, ports: [80]}", ()),
        ("- {host: a.example, tls: inspect, ports: [8080], plain: [8080]}", ()),
        ("- {host: a.example, tls: inspect, ports: [80, 443]}", ("a.example",)),
        ("- {host: a.example, tls: inspect, ports: [8443]}\n- {host: a.example}", ("a.example",)),
        ("- {host: a.example, tls: inspect, deny: all}", ()),
        ('- {host: x.a.example, tls: inspect}\n- {host: "*.a.example", deny: all}', ()),
        ("- {host: a.example, tls: inspect, until: 2020-01-31}", ("a.example",)),
        ("- {host: Bücher.example, tls: inspect}", ("xn--bcher-kva.example",)),
        ("- {tcp: 'a.example:443'}\n- {dns: b.example}\n- {ntp: c.example}", ()),
    ],
    ids=[
        "a name",
        "a wildcard gives its base",
        "passthrough needs no leaf",
        "sorted",
        "what is below another is left out",
        "a common ending is not below",
        "no TLS on port 80",
        "no TLS on a plain port",
        "TLS beside plain",
        "inspected on one port of two",
        "closed",
        "closed by a broader pattern",
        "an expired rule may be renewed",
        "an A-label",
        "other kinds",
    ],
)
def test_the_domains_that_are_inspected(text: str, expected: tuple[str, ...]) -> None:
    assert inspected_domains(rules(text)) == expected


def test_every_workload_counts_and_the_guard_closes_for_all() -> None:
    text = """
        version: 1
        guard: [{host: "*.closed.example", deny: all}, {host: c.example, deny: ["GET /x"]}]
        workloads:
          one: {rules: [{host: a.example, tls: inspect}, {host: x.closed.example, tls: inspect}]}
          two: {rules: [{host: b.example, tls: inspect}, {host: c.example, tls: inspect}]}
          unknown: {rules: [{host: d.example, tls: inspect}]}
    """
    assert inspected_domains(policy(text)) == ("a.example", "b.example", "c.example", "d.example")


@pytest.mark.parametrize(
    ("host", "domains", "is_outside"),
    [
        ("a.example", ["a.example"], False),
        ("x.y.a.example", ["a.example"], False),
        ("*.a.example", ["a.example"], False),
        ("*.x.a.example", ["a.example"], False),
        ("a.example", ["A.Example"], False),
        ("a.example", [""], False),
        ("x.a.example", [".a.example"], False),
        ("*.a.example", [".a.example"], False),
        ("a.example", [".a.example"], True),
        ("a.example", ["x.a.example"], True),
        ("*.a.example", ["x.a.example"], True),
        ("xa.example", ["a.example"], True),
        ("a.example", ["b.example"], True),
        ("a.example", [], True),
    ],
    ids=[
        "itself",
        "below",
        "a wildcard at its base",
        "a wildcard below",
        "spelt otherwise",
        "the empty domain is above all",
        "a dotted domain permits what is below",
        "a dotted domain permits a wildcard",
        "a dotted domain leaves itself out",
        "only a name below is permitted",
        "only a part of the wildcard",
        "a common ending",
        "another name",
        "nothing is permitted",
    ],
)
def test_rules_that_constraints_leave_out(host: str, domains: list[str], is_outside: bool) -> None:
    found = outside(rules(f'- {{host: "{host}", tls: inspect}}'), "app", domains)
    assert [bool(found)] == [is_outside]


def test_a_rule_outside_is_a_line_with_place_and_repair() -> None:
    (problem,) = outside(rules("- {host: a.example, tls: inspect}"), "app", ["b.example"])
    assert str(problem) == (
        'p.yaml:5:9: "a.example" is inspected, and the constraints of the issuing CA leave it out: no client would '
        "accept a certificate for it; replace the issuing CA: "
        "outgate pki rotate issuing --pki DIR --constrain-to POLICY"
    )


def test_without_constraints_nothing_is_outside() -> None:
    assert outside(rules("- {host: a.example, tls: inspect}"), "app", None) == []


def test_only_what_is_inspected_is_outside() -> None:
    text = "- {host: a.example}\n- {host: b.example, tls: inspect, deny: all}\n- {host: c.example, tls: inspect}"
    assert [problem.place.line for problem in outside(rules(text), "app", ["z.example"])] == [7]


def test_a_workload_answers_for_its_own_rules_and_a_shared_set_once_for_all() -> None:
    text = """
        version: 1
        sets: {s: [{host: a.example, tls: inspect}]}
        workloads:
          one: {use: [{set: s}]}
          two: {use: [{set: s}], rules: [{host: b.example, tls: inspect}]}
    """
    found = policy(text)
    assert [len(outside(found, name, ["z.example"])) for name in ("one", "two")] == [1, 2]
    assert [problem.place.line for problem in outside(found, None, ["z.example"])] == [3, 6]


LABELS = st.sampled_from(["a", "b", "c"])
HOSTS = st.lists(LABELS, min_size=1, max_size=4).map(lambda labels: ".".join([*labels, "example"]))


@given(st.lists(st.tuples(HOSTS, st.booleans(), st.booleans()), min_size=1, max_size=6, unique_by=lambda row: row[:2]))
def test_domains_suffice_for_every_rule_and_none_is_idle(found: list[tuple[str, bool, bool]]) -> None:
    lines = [
        f'- {{host: "{"*." * wildcard}{host}", tls: {"inspect" if inspected else "passthrough"}}}'
        for host, wildcard, inspected in found
    ]
    made = rules("\n".join(lines))
    domains = inspected_domains(made)
    assert outside(made, None, domains) == []
    assert domains == tuple(sorted(domains))
    for domain in domains:
        assert not set(parents(Hostname(domain))) & set(domains)
        assert outside(made, None, [other for other in domains if other != domain])


@pytest.mark.parametrize("host", ["a.example", "x.a.example", "b.example", "xa.example", "a.example.test"])
def test_a_rule_is_outside_exactly_where_a_verifier_refuses_its_leaf(host: str) -> None:
    """The oracle is `cryptography`'s verifier, with the constraints as they stand in a certificate."""
    made = rules(f"- {{host: {host}, tls: inspect}}")
    assert verdict(made, f"tls://{host}").tls is Tls.INSPECT
    authority = create_authority(NOW, permitted=["a.example"])
    domains = permitted_domains(authority.issuer.certificate)
    is_accepted = accepts(forge_leaf(authority.issuer, host, NOW), *authority.trusted, at=NOW)
    assert bool(outside(made, None, domains)) is not is_accepted
