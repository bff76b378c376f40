"""Rule sets: where they are found, what their parameters may be, and how their rules are cited."""

from __future__ import annotations

from textwrap import dedent

import pytest

from policies.errors import PolicyError
from policies.index import Policy
from policies.load import Source, load
from policies.model import HostRule, NameRule, PortRange, TransportRule

CATALOGUE = {
    "ubuntu": Source(
        "catalogue/ubuntu.yaml", "version: 1\nsets:\n  ubuntu:\n    - {host: '*.ubuntu.com', ports: 80}\n"
    ),
    "azure/kubernetes": Source(
        "catalogue/azure/kubernetes.yaml",
        "version: 1\n"
        "sets:\n"
        "  azure/kubernetes: [{host: '*.hcp.<location>.azmk8s.io'}]\n"
        "  azure/kubernetes/gpu: [{host: gpu.example}]\n",
    ),
    "broken": Source("catalogue/broken.yaml", "version: 1\nsets: {broken/one: [], brokn: x}"),
}


def read(text: str, catalogue: dict[str, Source] | None = None) -> Policy:
    shipped = {name: source for name, source in CATALOGUE.items() if name != "broken"}
    return load(
        [Source("p.yaml", dedent(text))],
        catalogue=shipped if catalogue is None else catalogue,
        tags={},
        is_public_suffix=lambda name: name in {"com", "co.uk"},
    )


def problems(text: str, catalogue: dict[str, Source] | None = None) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        read(text, catalogue)
    return [str(problem) for problem in caught.value.problems]


def used(use: str, sets: str = "{}") -> str:
    return f"version: 1\nworkloads: {{app: {{use: [{use}]}}}}\nsets: {sets}\n"


def test_a_rule_of_a_shipped_set_stands_in_its_file_and_its_label_tells_the_use() -> None:
    policy = read(used("ubuntu, {set: azure/kubernetes, location: eastus2}, azure/kubernetes/gpu"))

    assert [str(rule) for rule in policy.workloads["app"].rules] == [
        "catalogue/ubuntu.yaml:4 (app/use[0]/ubuntu[0])",
        "catalogue/azure/kubernetes.yaml:3 (app/use[1]/azure/kubernetes[0])",
        "catalogue/azure/kubernetes.yaml:4 (app/use[2]/azure/kubernetes/gpu[0])",
    ]


def test_a_set_of_ones_own_wins_over_a_shipped_one_of_its_name() -> None:
    policy = read(used("ubuntu", "{ubuntu: [{host: mirror.example}]}"))

    assert [str(rule) for rule in policy.workloads["app"].rules] == ["p.yaml:3 (app/use[0]/ubuntu[0])"]


def test_rules_of_a_workload_and_of_its_sets_unite() -> None:
    policy = read("version: 1\nworkloads: {app: {use: [ubuntu], rules: [{dns: a.example}]}}")

    assert [type(rule) for rule in policy.workloads["app"].rules] == [NameRule, HostRule]


def test_a_parameter_is_replaced_wherever_it_stands() -> None:
    sets = (
        "{s: [{host: '<a>.x.example', tls: inspect, allow: ['GET /<a>/<b>/**'], name: '<a> and <b>', reason: '<b>'}, "
        "{tcp: {host: db-<a>.example, ports: [<port>, 1-<port>]}}, {udp: 'u.<a>.x:<port>'}, {ntp: <a>.x.example}]}"
    )

    host, tcp, udp, ntp = read(used("{set: s, a: eu, b: app.v_2, port: 8080}", sets)).workloads["app"].rules

    assert isinstance(host, HostRule)
    assert host.allow
    assert (str(host.pattern), host.allow[0].text, host.name, host.reason) == (
        "eu.x.example",
        "GET /eu/app.v_2/**",
        "eu and app.v_2",
        "app.v_2",
    )
    assert isinstance(tcp, TransportRule)
    assert (tcp.host, tcp.ports) == ("db-eu.example", (PortRange(8080, 8080), PortRange(1, 8080)))
    assert isinstance(udp, TransportRule)
    assert (udp.host, udp.ports) == ("u.eu.x", (PortRange(8080, 8080),))
    assert isinstance(ntp, NameRule)
    assert str(ntp.pattern) == "eu.x.example"


def test_one_set_may_be_used_twice_with_other_values() -> None:
    policy = read(used("{set: azure/kubernetes, location: eastus2}, {set: azure/kubernetes, location: westus}"))

    patterns = [str(rule.pattern) for rule in policy.workloads["app"].rules if isinstance(rule, HostRule)]
    assert patterns == ["*.hcp.eastus2.azmk8s.io", "*.hcp.westus.azmk8s.io"]


@pytest.mark.parametrize(
    "value",
    ["'*'", "'*.evil'", "a.b", "evil.example", "'<x>'", "''", "-a", "a-", "a/b", "'a b'", "a:1", "bücher", "a" * 64],
)
def test_a_value_that_is_not_one_label_cannot_move_a_name(value: str) -> None:
    found = problems(used(f"{{set: azure/kubernetes, location: {value}}}"))

    assert len(found) == 1
    assert found[0].startswith('p.yaml:2:59: parameter "location" is "')
    assert found[0].endswith(", not one label (letters, digits, - inside); anything else could widen the set")


@pytest.mark.parametrize("value", ["'**'", "'*'", "..", ".a", "a/b", "'a b'", "'%2e'", "'<x>'", "a?b", "''"])
def test_a_value_that_is_not_one_segment_cannot_widen_a_path(value: str) -> None:
    sets = "{s: [{host: x.example, tls: inspect, allow: ['GET /<owner>/*']}]}"

    found = problems(used(f"{{set: s, owner: {value}}}", sets))

    assert len(found) == 1
    assert found[0].endswith(", not one segment (letters, digits, . _ -); anything else could widen the set")


@pytest.mark.parametrize("value", ["https", "1-65535", "'*'", "123456", "-1"])
@pytest.mark.parametrize("rule", ["{tcp: 'db.example:<port>'}", "{host: x.example, ports: [80, <port>]}"])
def test_a_value_that_is_not_one_port_cannot_open_others(value: str, rule: str) -> None:
    found = problems(used(f"{{set: s, port: {value}}}", f"{{s: [{rule}]}}"))

    assert len(found) == 1
    assert found[0].endswith(", not one port; anything else could widen the set")


@pytest.mark.parametrize("value", ["[a]", "{a: b}", "true", "~", "1.5"])
def test_a_value_is_text_or_a_whole_number(value: str) -> None:
    found = problems(used(f"{{set: azure/kubernetes, location: {value}}}"))

    assert len(found) == 1
    assert " must stand" in found[0]


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("ubunto", 'p.yaml:2:25: unknown set "ubunto"; did you mean "ubuntu"?'),
        ("azure/kubernets", 'p.yaml:2:25: unknown set "azure/kubernets"; did you mean "azure/kubernetes"?'),
        (
            "azure/kubernetes/gpus",
            'p.yaml:2:25: unknown set "azure/kubernetes/gpus"; did you mean "azure/kubernetes/gpu"?',
        ),
        (
            "azure/kubernetes",
            'p.yaml:2:25: set "azure/kubernetes" needs a value for its parameter "location"; '
            "write {set: azure/kubernetes, location: …}",
        ),
        (
            "{set: azure/kubernetes, location: x, region: y}",
            'p.yaml:2:70: set "azure/kubernetes" has no parameter "region"; there is location',
        ),
        ("{set: ubuntu, location: x}", 'p.yaml:2:49: set "ubuntu" has no parameter "location"; it has no parameters'),
        (
            "'../../etc/passwd'",
            'p.yaml:2:25: "../../etc/passwd" is not a set name; such as ubuntu or azure/kubernetes-service',
        ),
        ("{set: [a]}", "p.yaml:2:31: a list where text must stand"),
    ],
)
def test_a_mistake_in_a_use_is_named_with_its_place_and_repair(use: str, expected: str) -> None:
    assert problems(used(use)) == [expected]


def test_a_misspelt_parameter_is_missing_under_its_right_name_too() -> None:
    found = problems(used("{set: azure/kubernetes, locaton: x}"))

    assert [problem.partition("; ")[2] for problem in found] == [
        "write {set: azure/kubernetes, location: …}",
        'did you mean "location"?',
    ]


def test_a_parameter_cannot_be_called_set() -> None:
    found = problems(used("s", "{s: [{host: <set>.example}]}"))

    assert found == ['p.yaml:2:25: set "s" needs a value for its parameter "set"; rename it in the set']


def test_a_wildcard_over_a_public_suffix_is_found_after_replacing() -> None:
    found = problems(used("{set: s, domain: com}", "{s: [{host: '*.<domain>'}]}"))

    assert len(found) == 1
    assert 'covers the public suffix "com", where anyone can own a name (as used at p.yaml:2)' in found[0]


def test_a_set_that_nobody_uses_is_read_all_the_same() -> None:
    assert problems("version: 1\nsets: {s: [{hots: '<x>.example'}]}") == [
        'p.yaml:2:13: a rule knows no key "hots"; did you mean "host"?'
    ]


@pytest.mark.parametrize(
    "rule",
    [
        "{tcp: 'db.example:<port>'}",
        "{host: example.<tld>}",
        "{tcp: {tag: 'Cloud.<region>', ports: 1}}",
        "{host: a.<b>}",
    ],
)
def test_an_unused_set_is_right_where_some_value_would_be(rule: str) -> None:
    read(f"version: 1\nsets: {{s: [{rule}]}}")


def test_a_mistake_in_a_set_used_often_is_reported_once() -> None:
    text = "version: 1\nworkloads: {a: {use: [s, s]}, b: {use: [s]}}\nsets: {s: [{hots: x.example}]}"

    assert problems(text) == ['p.yaml:3:13: a rule knows no key "hots"; did you mean "host"?']


def test_a_set_cannot_use_sets() -> None:
    assert problems("version: 1\nsets: {s: [{use: [ubuntu]}]}") == [
        "p.yaml:2:12: a rule has none of host, tcp, udp, ntp, dns; write one of them"
    ]


def test_a_catalogue_file_is_not_read_before_one_of_its_sets_is_asked_for() -> None:
    read(used("ubuntu"), CATALOGUE)

    assert problems(used("broken/one"), CATALOGUE) == [
        "catalogue/broken.yaml:2:31: text where the rules of a set must stand; begin each rule with -"
    ]
