"""Mistakes in a policy file: each is named with its place, the value and the repair. No text gives another error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import PolicyError
from policies.index import Policy
from tests.policies.files import problems, read


def rule_problems(text: str) -> list[str]:
    """What is wrong with one rule that stands at line 2, column 31."""
    found = problems("version: 1\nworkloads: {app: {rules: [  " + text + "]}}")
    return [problem.removeprefix("p.yaml:") for problem in found]


IN_A_RULE = [
    ("hots: a.example", '2:29: a rule knows no key "hots"; did you mean "host"?'),
    ("{}", "2:29: a rule has none of host, tcp, udp, ntp, dns; write one of them"),
    (
        "{host: a.example, tcp: 'b.example:1'}",
        '2:47: a rule is one of host, tcp, udp, ntp, dns: "host" and "tcp" are two; make two of it',
    ),
    ("a.example", "2:29: text where a rule must stand; write it as {host: NAME}"),
    ("{host: a.example, prots: 1}", '2:47: a host rule knows no key "prots"; did you mean "ports"?'),
    (
        "{host: a.example, encoded_slash: literal}",
        '2:47: a host rule knows no key "encoded_slash"; did you mean "encodedSlash"?',
    ),
    ("{host: a.example, budget: 1B/h}", '2:47: a host rule knows no key "budget"; it belongs to a udp rule'),
    ("{tcp: 'a.example:1', budget: 1B/h}", '2:50: a tcp rule knows no key "budget"; it belongs to a udp rule'),
    ("{tcp: 'a.example:1', allow: [GET /]}", '2:50: a tcp rule knows no key "allow"; it belongs to a host rule'),
    (
        "{udp: 'a.example:1', ports: [2]}",
        '2:50: a udp rule knows no key "ports"; it stands inside: udp: {host: NAME, ports: [PORT]}',
    ),
    ("{ntp: a.example, ports: 123}", '2:46: an ntp rule knows no key "ports"; it belongs to a host rule'),
    # names
    (
        "host: 10.20.3.4",
        '2:35: "10.20.3.4" is an address, not a name; a rule for an address is tcp: 10.20.3.4:443',
    ),
    (
        "host: '[2001:db8::1]'",
        '2:35: "[2001:db8::1]" is an address, not a name; a rule for an address is tcp: [2001:db8::1]:443',
    ),
    (
        "ntp: 169.254.169.123",
        '2:34: "169.254.169.123" is an address, not a name; write a name, and have it asked at that address: '
        "outgate relay --host NAME=169.254.169.123",
    ),
    ("host: 127.1", '2:35: a number where text must stand; write "127.1" in quotes'),
    ("host: '*.com'", 'PUBLIC SUFFIX "*.com"'),
    ("dns: '*.co.uk'", 'PUBLIC SUFFIX "*.co.uk"'),
    ("host: ~", "2:35: nothing where text must stand; write a value, or remove the key"),
    ("tcp: '*.a.example:22'", '2:34: "*.a.example" has a wildcard; wildcards stand only in host and dns rules'),
    ("ntp: '*.a.example'", '2:34: "*.a.example" has a wildcard; wildcards stand only in host and dns rules'),
    # ports
    ("{host: a.example, ports: []}", "2:54: an empty list; list something, or remove the key"),
    ("{host: a.example, ports: 0}", "2:54: port 0 does not exist; ports are 1 to 65535"),
    ("{host: a.example, ports: [443, 65536]}", "2:60: port 65536 does not exist; ports are 1 to 65535"),
    ("{host: a.example, ports: -1}", "2:54: port -1 does not exist; ports are 1 to 65535"),
    ("{host: a.example, ports: 90-80}", "2:54: range 90-80 runs backwards; did you mean 80-90?"),
    ("{host: a.example, ports: 4.5}", '2:54: "4.5" is not a port or a range of ports; write 443 or 8000-8100'),
    ("{host: a.example, ports: https}", '2:54: "https" is not a port or a range of ports; write 443 or 8000-8100'),
    ("{host: a.example, ports: ٤٤٣}", '2:54: "٤٤٣" is not a port or a range of ports; write 443 or 8000-8100'),
    (
        "{host: a.example, ports: {a: 1}}",
        "2:54: a mapping where a list must stand; write [one, another], or one per line after -",
    ),
    # destinations
    ("tcp: a.example", '2:34: "a.example" is not NAME-or-CIDR:PORT; such as "a.example:443"'),
    ("tcp: 'a.example:'", '2:34: "" is not a port or a range of ports; write 443 or 8000-8100'),
    ("tcp: 10.1.2.0/16:443", '2:34: "10.1.2.0/16" has host bits set; did you mean "10.1.0.0/16"?'),
    ("tcp: '[2001:db8::1/32]:443'", '2:34: "2001:db8::1/32" has host bits set; did you mean "2001:db8::/32"?'),
    ("tcp: '2001:db8::1:443'", '2:34: "2001:db8::1:443" has colons in its address; did you mean "[2001:db8::1]:443"?'),
    (
        "tcp: 10.0.0.256:1",
        '2:34: "10.0.0.256" is not an address or prefix; write 10.20.0.0/16, 10.20.3.4 or 2001:db8::/32',
    ),
    (
        "tcp: 010.0.0.1:1",
        '2:34: "010.0.0.1" is not an address or prefix; write 10.20.0.0/16, 10.20.3.4 or 2001:db8::/32',
    ),
    (
        "tcp: 10.0.0.0/255.0.0.0:1",
        '2:34: "10.0.0.0/255.0.0.0" is not an address or prefix; write 10.20.0.0/16, 10.20.3.4 or 2001:db8::/32',
    ),
    (
        "tcp: '[fe80::1%eth0]:1'",
        '2:34: "fe80::1%eth0" is not an address or prefix; write 10.20.0.0/16, 10.20.3.4 or 2001:db8::/32',
    ),
    ("tcp: {ports: 1}", "2:34: a destination has none of host, address, tag; write one of them"),
    ("tcp: {host: a.example}", '2:34: a destination needs the key "ports"; write ports: …'),
    (
        "tcp: {host: a.example, address: 10.0.0.0/8, ports: 1}",
        '2:52: a destination is one of host, address, tag: "host" and "address" are two; make two of it',
    ),
    (
        "tcp: {tag: Storage.EastUS3, ports: 1}",
        '2:40: unknown service tag "Storage.EastUS3"; did you mean "Storage.EastUS2"?',
    ),
    (
        "{tcp: {host: a.example, ports: 1, private: true}, private: true}",
        '2:29: "private" stands beside tcp and inside it; write it once',
    ),
    (
        "{tcp: 10.0.0.0/8:1, private: true}",
        "2:29: private is for names; "
        "an address rule inside one private block needs no private; others never reach private addresses",
    ),
    # entries
    ("{host: a.example, tls: inspect, allow: []}", "2:68: an empty list; list something, or remove the key"),
    ("{host: a.example, tls: inspect, deny: []}", "2:67: an empty list; list something, or remove the key"),
    (
        "{host: a.example, tls: inspect, allow: all}",
        "2:68: text where a list must stand; write [one, another], or one per line after -",
    ),
    (
        "{host: a.example, tls: inspect, deny: GET /x}",
        '2:67: text where all or a list must stand; write deny: all, or deny: ["* /path/**"]',
    ),
    (
        "{host: a.example, tls: inspect, deny: [all]}",
        '2:68: "all" stands alone; write deny: all; without allow everything is allowed',
    ),
    ("{host: a.example, tls: inspect, allow: [get /x]}", '2:69: method "get" is not upper case; did you mean GET?'),
    (
        "{host: a.example, allow: [GET /x]}",
        '2:29: entry "GET /x" cannot be seen on port 443, where tls is passthrough; '
        "add tls: inspect, or write deny: all",
    ),
    (
        "{host: a.example, ports: [80, 8080], deny: [GET /x]}",
        '2:29: entry "GET /x" cannot be seen on port 8080, where tls is passthrough; '
        "add tls: inspect, or write deny: all",
    ),
    (
        "{host: a.example, ports: 79-90, plain: [81-90], deny: [GET /x]}",
        '2:29: entry "GET /x" cannot be seen on port 79, where tls is passthrough; '
        "add tls: inspect, or write deny: all",
    ),
    # words, flags, dates
    (
        "{host: a.example, tls: inspcet}",
        '2:52: "inspcet" where passthrough or inspect must stand; did you mean "inspect"?',
    ),
    ("{host: a.example, tls: bump}", '2:52: "bump" where passthrough or inspect must stand'),
    (
        "{host: a.example, private: yes}",
        '2:56: "yes" where true or false must stand; write true or false, without quotes',
    ),
    (
        "{host: a.example, http2: 'true'}",
        '2:54: "true" where true or false must stand; write true or false, without quotes',
    ),
    ("{host: a.example, ech: true}", '2:52: "true" where allow or deny must stand'),
    ("{host: a.example, upgrade: h2c}", '2:56: "h2c" where websocket must stand'),
    (
        "{host: a.example, until: 2027-02-30}",
        '2:54: "2027-02-30" is not a date; write the last valid day as 2027-01-31',
    ),
    ("{host: a.example, until: 20270131}", '2:54: a number where text must stand; write "20270131" in quotes'),
    (
        "{host: a.example, until: '2027-W05-7'}",
        '2:54: "2027-W05-7" is not a date; write the last valid day as 2027-01-31',
    ),
    ("{host: a.example, name: 12}", '2:53: a number where text must stand; write "12" in quotes'),
    ("{host: a.example, name: ''}", '2:53: "" is not one line of 1 to 100 printable characters'),
    ('{host: a.example, name: "a\\nb"}', '2:53: "a\\nb" is not one line of 1 to 100 printable characters'),
    (
        "{udp: 'a.example:1', budget: 10MB/h}",
        '2:58: "10MB/h" is not a budget; write bytes an hour as 10MiB/h (B, KiB, MiB, GiB)',
    ),
    # parameters
    (
        "host: <region>.example.org",
        '2:35: "<region>.example.org" has "<", which no hostname has; a <parameter> stands only in a rule of a set',
    ),
    (
        "{host: a.example, tls: inspect, allow: [GET /<x>/**]}",
        '2:69: entry "GET /<x>/**"; a <parameter> stands only in a rule of a set',
    ),
    (
        "tcp: a.example:<port>",
        '2:34: "<port>" is not a port or a range of ports; a <parameter> stands only in a rule of a set',
    ),
]


@pytest.mark.parametrize(("written", "expected"), IN_A_RULE, ids=[written for written, _ in IN_A_RULE])
def test_a_mistake_in_a_rule_is_named_with_its_place_and_repair(written: str, expected: str) -> None:
    if expected.startswith("PUBLIC SUFFIX"):
        pattern = expected.split('"')[1]
        column = 29 + written.index(":") + 2
        expected = (
            f'2:{column}: wildcard "{pattern}" covers the public suffix "{pattern[2:]}", where anyone can own a name; '
            f'name the domains you mean, such as "*.example.{pattern[2:]}"'
        )

    assert rule_problems(written) == [expected]


IN_A_FILE = [
    ("", '1:1: a policy needs the key "version"; write version: 1'),
    ("[]", "1:1: a list where a policy must stand; write key: value, or {} for none"),
    ("version: 2", '1:10: "2" is no version of this language; write version: 1'),
    ("version: '1'", '1:10: "1" is no version of this language; write version: 1'),
    ("version: 1\nworkload: {}", '2:1: a policy knows no key "workload"; did you mean "workloads"?'),
    (
        "version: 1\nrules: []",
        '2:1: a policy knows no key "rules"; rules stand in a workload: workloads: {NAME: {rules: …}}',
    ),
    ("version: 1\nmode: report", '2:7: "report" where enforce or audit must stand'),
    ("version: 1\nworkloads: [a]", "2:12: a list where workloads must stand; write NAME: … below it, or {} for none"),
    ("version: 1\nworkloads: {a: }", "2:16: nothing where a workload must stand; write key: value, or {} for none"),
    (
        "version: 1\nworkloads: {a/b: {}}",
        '2:13: "a/b" is not a workload name; letters, digits, and - . _ between them',
    ),
    (
        "version: 1\nworkloads: {a: {sets: [x]}}",
        '2:17: a workload knows no key "sets"; sets stand at the top of the file; a workload names them under use',
    ),
    (
        "version: 1\nworkloads: {a: {use: ubuntu}}",
        "2:22: text where a list must stand; begin each item with -, or write []",
    ),
    (
        "version: 1\nworkloads: {a: {use: [{location: x}]}}",
        "2:23: this use names no set; write {set: NAME, PARAMETER: VALUE}",
    ),
    (
        "version: 1\nworkloads: {a: {match: {}}}",
        "2:24: match has none of kubernetes, address, user; write one of them",
    ),
    (
        "version: 1\nworkloads: {a: {match: {user: x, address: 10.0.0.1}}}",
        '2:34: match is one of kubernetes, address, user: "user" and "address" are two; make two of it',
    ),
    (
        "version: 1\nworkloads: {a: {match: {kubernetes: {}}}}",
        "2:37: kubernetes matches every pod; write a namespace, a serviceAccount or labels",
    ),
    (
        "version: 1\nworkloads: {a: {match: {kubernetes: {namespace: 'prod-*'}}}}",
        '2:49: "prod-*" is not a Kubernetes name; lower case, digits, - and .',
    ),
    (
        "version: 1\nworkloads: {a: {match: {kubernetes: {labels: {a: true}}}}}",
        '2:50: true where text must stand; write "true" in quotes',
    ),
    (
        "version: 1\nworkloads: {a: {match: {address: [10.1.2.0/16]}}}",
        '2:35: "10.1.2.0/16" has host bits set; did you mean "10.1.0.0/16"?',
    ),
    (
        "version: 1\nworkloads: {unknown: {match: {user: x}}}",
        '2:30: "unknown" has no match; it is the workload of the sources that no match names',
    ),
    (
        "version: 1\nguard: [{host: a.example}]",
        '2:9: a guard rule needs the key "deny"; write deny: …',
    ),
    (
        "version: 1\nguard: [{host: a.example, deny: all, allow: [GET /]}]",
        '2:38: a guard rule knows no key "allow"; the guard only denies, on every port',
    ),
    (
        "version: 1\nguard: [{host: a.example, deny: all, tcp: 'a.example:1'}]",
        '2:38: a guard rule knows no key "tcp"; there is deny, host, name, owner, reason, until',
    ),
    ("version: 1\nsets: {a b: []}", '2:8: "a b" is not a set name; such as ubuntu or azure/kubernetes-service'),
    ("version: 1\nsets: {../a: []}", '2:8: "../a" is not a set name; such as ubuntu or azure/kubernetes-service'),
    ("version: 1\nsets: {a: {}}", "2:11: a mapping where the rules of a set must stand; begin each rule with -"),
    (
        "version: 1\nworkloads: {a: {}}\ntests: {a: [x]}",
        "3:12: a list where tests must stand; write key: value, or {} for none",
    ),
    (
        "version: 1\nworkloads: {a: {}}\ntests: {a: {alow: []}}",
        '3:13: tests knows no key "alow"; did you mean "allow"?',
    ),
]


@pytest.mark.parametrize(("written", "expected"), IN_A_FILE, ids=[written for written, _ in IN_A_FILE])
def test_a_mistake_in_a_file_is_named_with_its_place_and_repair(written: str, expected: str) -> None:
    found = problems(written)

    assert found == [f"p.yaml:{expected}"]


def test_all_mistakes_of_a_file_are_reported_in_its_order() -> None:
    found = problems("""\
        version: 3
        workloads:
          b:
            rules:
              - {host: "*", ports: 0}
              - {hots: x}
            moed: audit
        guard: [{host: a.example}]
        tests: {b: {allow: [""]}}
    """)

    assert [problem.split(": ")[0] for problem in found] == [
        "p.yaml:1:10",
        "p.yaml:5:16",
        "p.yaml:5:28",
        "p.yaml:6:10",
        "p.yaml:7:5",
        "p.yaml:8:9",
        "p.yaml:9:21",
    ]


def test_a_mistake_repeated_by_a_generator_is_reported_a_hundred_times_at_most() -> None:
    found = problems("version: 1\nworkloads:\n  a:\n    rules:\n" + "    - {hots: x}\n" * 5000)

    assert len(found) == 100


KEYS = ["version", "workloads", "rules", "host", "tcp", "udp", "ntp", "dns", "sets", "use", "guard", "tests", "match"]
MORE_KEYS = ["address", "kubernetes", "user", "allow", "deny", "tls", "ports", "plain", "private", "until", "name"]
VALUES = ["1", "443", "a.example", "'*.com'", "'10.0.0.0/8:1'", "all", "inspect", "GET /x", "true", "~", "<p>"]
WORDS = st.sampled_from(KEYS + MORE_KEYS + VALUES)
TREES = st.recursive(
    WORDS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]")
        | st.lists(st.tuples(WORDS, inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=25,
)


@given(TREES)
@settings(max_examples=300)
def test_any_text_gives_a_policy_or_a_policy_error(text: str) -> None:
    for document in (text, f"version: 1\nworkloads: {{a: {{rules: [{text}]}}}}", f"version: 1\nsets: {{s: [{text}]}}"):
        outcome: Policy | PolicyError
        try:
            outcome = read(document)
        except PolicyError as error:
            outcome = error

        assert isinstance(outcome, Policy) or outcome.problems
