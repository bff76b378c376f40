"""The smallest edit: every one is pasted into the policy's text, loaded and judged again."""

# A row of a table is one line, however long.
# ruff: noqa: E501

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import PolicyError
from policies.explain import explain
from policies.index import Policy
from policies.model import Reason
from policies.words import enforced, ladder
from tests.builders import policy
from tests.policies.explained import POLICY, SAMPLE, allowed, asked, explained, paste


def carried(host: str) -> set[str]:
    """What of SAMPLE an undecrypted connection to `host` can carry."""
    return {words for words in SAMPLE if re.fullmatch(rf"[A-Z]+ https://{re.escape(host)}/.*", words)}


# words -> reason, the edit's lines, and what else of SAMPLE it opens: just what it names
EDITS: list[tuple[str, Reason, list[str], set[str]]] = [
    ("POST https://weather.example.com/search", Reason.NO_ALLOW_ENTRY, ['- "POST /search"'], set()),
    ("GET https://weather.example.com/x", Reason.NO_ALLOW_ENTRY, ['- "GET /x"'], set()),
    ("GET https://weather.example.com/a%20b/c", Reason.NO_ALLOW_ENTRY, ['- "GET /*/c"'], set()),
    ("GET https://weather.example.com/x/?q=1", Reason.NO_ALLOW_ENTRY, ['- "GET /x/"'], set()),
    ("GET https://weather.example.com/%C3%BC", Reason.NO_ALLOW_ENTRY, ['- "GET /ü"'], set()),
    ("GET https://set.example.com/x", Reason.NO_ALLOW_ENTRY,
     ["- host: set.example.com", "  tls: inspect", '  allow: ["GET /x"]'], set()),
    ("GET https://weather.example.com/forecasts", Reason.DENY_RULE, ['- "* /forecasts/**"', '- "GET /forecasts"'], set()),
    ("GET https://weather.example.com/search/private", Reason.DENY_RULE, ['- "* /search/private/**"'], set()),
    ("DELETE https://api.example.net/x", Reason.DENY_RULE, ["deny:", '  - "DELETE /**"'], set()),
    ("tls://closed.example.org", Reason.DENY_RULE,
     ["- host: closed.example.org", "  deny: all", "- host: closed.example.org"],
     carried("closed.example.org") | {"dns://closed.example.org", "tcp://closed.example.org:22"}),
    ("GET https://closed.example.org/x", Reason.DENY_RULE,
     ["- host: closed.example.org", "  deny: all", "- host: closed.example.org", "  tls: inspect", '  allow: ["GET /x"]'],
     {"tls://closed.example.org", "dns://closed.example.org", "tcp://closed.example.org:22"}),
    ("tcp://closed.example.org:22", Reason.DENY_RULE, ["- host: closed.example.org", "  deny: all"],
     {"dns://closed.example.org"}),
    ("tls://new.example.io", Reason.NO_RULE, ["- host: new.example.io"],
     carried("new.example.io") | {"dns://new.example.io"}),
    ("GET https://new.example.io/x", Reason.NO_RULE, ["- host: new.example.io", "  tls: inspect", '  allow: ["GET /x"]'],
     {"tls://new.example.io", "dns://new.example.io"}),
    ("GET https://new.example.io:8443/x", Reason.NO_RULE,
     ["- host: new.example.io", "  ports: [8443]", "  tls: inspect", '  allow: ["GET /x"]'],
     {"tls://new.example.io:8443", "dns://new.example.io"}),
    ("GET http://new.example.io/x", Reason.NO_RULE, ["- host: new.example.io", "  ports: [80]", '  allow: ["GET /x"]'],
     {"dns://new.example.io"}),
    ("GET http://new.example.io:8080/x", Reason.NO_RULE,
     ["- host: new.example.io", "  ports: [8080]", "  plain: [8080]", '  allow: ["GET /x"]'], {"dns://new.example.io"}),
    ("tls://ubuntu.com", Reason.NO_RULE, ["- host: ubuntu.com"],
     carried("ubuntu.com") | {"dns://ubuntu.com"}),
    ("tcp://new.example.io:22", Reason.NO_RULE, ["- tcp: new.example.io:22"], {"dns://new.example.io"}),
    ("udp://new.example.io:443", Reason.NO_RULE, ["- udp: new.example.io:443"], {"dns://new.example.io", "quic://new.example.io"}),
    ("quic://new.example.io", Reason.NO_RULE, ["- udp: new.example.io:443", "  quic: sni"], {"dns://new.example.io"}),
    ("ntp://new.example.io", Reason.NO_RULE, ["- ntp: new.example.io"], {"dns://new.example.io"}),
    ("dns://new.example.io", Reason.NO_RULE, ["- dns: new.example.io"], set()),
    ("dns://cluster.local", Reason.ANCESTOR, ["- dns: cluster.local"], set()),
    ("udp://[2606:4700::1111]:443", Reason.NO_RULE, ['- udp: "[2606:4700::1111]:443"'], set()),
    ("tcp://10.21.3.4:6379", Reason.PORT, ['- tcp: "10.21.3.4:6379"'], set()),
    ("tcp://10.20.3.4:22", Reason.PORT, ['- tcp: "10.20.3.4:22"'], set()),
    ("tcp://10.21.3.4:9999", Reason.PRIVATE_ADDRESS, ['- tcp: "10.21.3.4:9999"'], set()),
    ("tls://apt.ubuntu.com:8443", Reason.PORT, ["- host: apt.ubuntu.com", "  ports: [8443]"],
     {"GET https://apt.ubuntu.com:8443/x"}),
    ("GET http://apt.ubuntu.com/x", Reason.PORT, ["- host: apt.ubuntu.com", "  ports: [80]", '  allow: ["GET /x"]'], set()),
    ("tls://archive.ubuntu.com:8443", Reason.PORT, ['- host: "*.ubuntu.com"', "  ports: [8443]"],
     {"GET https://archive.ubuntu.com:8443/x", "tls://ntp.ubuntu.com:8443", "GET https://ntp.ubuntu.com:8443/x"}),
    ("tls://weather.example.com:8443", Reason.PORT, ["- host: weather.example.com", "  ports: [8443]", "  tls: inspect"],
     {"GET https://weather.example.com:8443/x"}),
    ("GET https://a.wide.example.org:8443/x", Reason.PORT,
     ['- host: "*.wide.example.org"', "  ports: [8443]", "  tls: inspect", '  allow: ["GET /x"]'],
     {"tls://a.wide.example.org:8443", "tls://b.wide.example.org:8443", "GET https://b.wide.example.org:8443/x"}),
    ("tcp://github.com:443", Reason.PORT, ["- tcp: github.com:443"],
     carried("github.com") | {"tls://github.com"}),
    ("tls://old.example.org", Reason.EXPIRED, ["until: 2026-12-22"],
     carried("old.example.org") | {"dns://old.example.org"}),
    ("GET https://oldset.example.com/x", Reason.EXPIRED, ["- host: oldset.example.com"],
     carried("oldset.example.com") | {"tls://oldset.example.com", "dns://oldset.example.com"}),
    ("tcp://old.example.org:443", Reason.PORT, [], set()),
    ("tcp://weather.example.com:443", Reason.WRONG_PROTOCOL, [], set()),
    ("udp://weather.example.com:443", Reason.WRONG_PROTOCOL, [], set()),
    ("tcp://web.example.org:22", Reason.WRONG_PROTOCOL, ["- tcp: web.example.org:22"], set()),
    ("GET http://web.example.org:8080/x", Reason.WRONG_PROTOCOL, ["plain: [8080]"], set()),
]  # fmt: skip


@pytest.mark.parametrize(("words", "reason", "lines", "opens"), EDITS, ids=[row[0] for row in EDITS])
def test_the_smallest_edit_allows_the_attempt_and_opens_only_what_it_names(
    words: str, reason: Reason, lines: list[str], opens: set[str]
) -> None:
    before = policy(POLICY)
    explanation = explain(before, asked(words))

    after = policy(paste(POLICY, explanation.edits))

    assert explanation.verdict.reason is reason
    assert [line for edit in explanation.edits for line in edit.lines] == lines
    assert enforced(ladder(after, asked(words))).is_allow == bool(lines)
    assert allowed(after) - allowed(before) - {words} == opens - {words}


def test_an_allowed_attempt_needs_no_words() -> None:
    assert explained("tls://archive.ubuntu.com").edits == ()
    assert explained("tls://archive.ubuntu.com").advice == ""
    assert explained("tls://archive.ubuntu.com").because == "a rule admits it"


def test_the_first_rule_of_a_workload_brings_its_key() -> None:
    (edit,) = explained("tls://new.example.io", "empty").edits

    after = policy(paste(POLICY, [edit]))

    assert (edit.where, edit.lines) == ("set in workloads.empty at p.yaml:43", ("rules:", "  - host: new.example.io"))
    assert enforced(ladder(after, asked("tls://new.example.io", "empty"))).is_allow


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("GET https://weather.example.com/x", "add to allow: of p.yaml:11 (weather)"),
        ("DELETE https://api.example.net/x", "remove from p.yaml:38 (app/rules[13])"),
        ("GET https://weather.example.com/search/private", "remove from deny: of p.yaml:11 (weather)"),
        ("tls://old.example.org", "set in p.yaml:30 (app/rules[9])"),
        ("tls://new.example.io", "add to workloads.app.rules at p.yaml:11"),
        ("tcp://closed.example.org:22", "remove from workloads.app.rules at p.yaml:27"),
    ],
)
def test_an_edit_says_where_it_goes(words: str, where: str) -> None:
    assert explained(words).edits[0].where == where


def test_ech_is_admitted_by_a_key_of_the_rule() -> None:
    meant = replace(asked("tls://archive.ubuntu.com"), ech=True)
    explanation = explain(policy(POLICY), meant)

    after = policy(paste(POLICY, explanation.edits))

    assert explanation.verdict.reason is Reason.ECH
    assert [edit.lines for edit in explanation.edits] == [("ech: allow",)]
    assert enforced(ladder(after, meant)).is_allow


def test_ech_to_an_unnamed_host_is_one_new_rule() -> None:
    meant = replace(asked("tls://new.example.io"), ech=True)
    explanation = explain(policy(POLICY), meant)

    assert [edit.lines for edit in explanation.edits] == [("- host: new.example.io", "  ech: allow")]
    assert enforced(ladder(policy(paste(POLICY, explanation.edits)), meant)).is_allow


@pytest.mark.parametrize(("upgrade", "lines"), [("websocket", [("upgrade: [websocket]",)]), ("h2c", [])])
def test_only_websocket_can_be_admitted(upgrade: str, lines: list[tuple[str, ...]]) -> None:
    meant = replace(asked("GET https://a.wide.example.org/x"), upgrade=upgrade)
    explanation = explain(policy(POLICY), meant)

    after = policy(paste(POLICY, explanation.edits))

    assert explanation.verdict.reason is Reason.UPGRADE
    assert [edit.lines for edit in explanation.edits] == lines
    assert bool(explanation.advice) is not bool(lines)
    assert enforced(ladder(after, meant)).is_allow is bool(lines)


def test_tls_without_a_name_is_admitted_by_address() -> None:
    meant = replace(asked("tls://x.example"), host=None, address=ip_address("93.184.215.14"))
    explanation = explain(policy(POLICY), meant)

    after = policy(paste(POLICY, explanation.edits))

    assert [edit.lines for edit in explanation.edits] == [('- tcp: "93.184.215.14:443"',)]
    assert enforced(ladder(after, meant)).is_allow


def test_a_name_that_yaml_would_read_otherwise_is_quoted() -> None:
    for host in ("true", "null", "1e3", "x"):
        explanation = explained(f"tls://{host}")
        assert explanation.edits[0].lines == (f'- host: "{host}"',)
        assert enforced(ladder(policy(paste(POLICY, explanation.edits)), asked(f"tls://{host}"))).is_allow


# --- whatever the policy -------------------------------------------------------------------------------------------

HOSTS = ["a.example", "b.a.example", "c.b.a.example", "d.example"]
PATTERNS = [*HOSTS, "*.a.example", "*.b.a.example"]
RULES = st.one_of(
    st.builds(
        lambda host, tls, ports, allow, deny, until: {
            "host": host, "tls": tls, "ports": ports, "allow": allow, "deny": deny, "until": until,
        },
        st.sampled_from(PATTERNS),
        st.sampled_from([None, "inspect"]),
        st.sampled_from([None, "[80, 443]", "[8443]"]),
        st.sampled_from([None, "GET /x", "GET /x/**", "POST /y"]),
        st.sampled_from([None, None, "* /x/z", "all"]),
        st.sampled_from([None, None, "2026-01-31"]),
    ),
    st.builds(lambda host, port: {"tcp": f"{host}:{port}"}, st.sampled_from(HOSTS), st.sampled_from([22, 443])),
    st.builds(lambda host: {"ntp": host}, st.sampled_from(HOSTS)),
    st.builds(lambda host: {"dns": f'"{host}"'}, st.sampled_from(PATTERNS)),
)  # fmt: skip
WORDS = [
    f"{scheme}{host}{end}"
    for host in (*HOSTS, "e.example")
    for scheme, end in (
        ("GET https://", "/x"), ("GET https://", "/x/z"), ("POST https://", "/y"), ("GET http://", "/x"), ("tls://", ""),
        ("tls://", ":8443"), ("tcp://", ":22"), ("tcp://", ":443"), ("udp://", ":9"), ("quic://", ""),
        ("ntp://", ""), ("dns://", ""),
    )
]  # fmt: skip


def written(rules: list[dict[str, str | None]]) -> str:
    lines = ["version: 1", "workloads:", "  app:", "    rules:"]
    for rule in rules:
        inspected = rule.get("tls") == "inspect"
        items = []
        for key, value in rule.items():
            if value is None or (key == "allow" and not inspected):
                continue
            if value == "all":
                items.append("deny: all")
            elif key in ("allow", "deny"):
                items += [f"{key}:", f'  - "{value}"'] if inspected else []
            else:
                items.append(f"{key}: {value}" if key != "host" else f'host: "{value}"')
        lines += ["      - " + items[0], *("        " + item for item in items[1:])]
    return "\n".join(lines) + "\n"


@settings(max_examples=150, deadline=None)
@given(st.lists(RULES, min_size=1, max_size=6), st.sampled_from(WORDS))
def test_a_proposed_edit_always_allows_and_never_takes_away(rules: list[dict[str, str | None]], words: str) -> None:
    text = written(rules)
    before = _loaded(text)
    if before is None:
        return
    explanation = explain(before, asked(words))
    if not explanation.edits:
        assert explanation.verdict.is_allow or explanation.advice
        return

    after = policy(paste(text, explanation.edits))

    assert enforced(ladder(after, asked(words))).is_allow
    assert allowed(before, WORDS) <= allowed(after, WORDS)


def _loaded(text: str) -> Policy | None:
    try:
        return policy(text)
    except PolicyError:
        return None
