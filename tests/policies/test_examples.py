"""The examples: their own tests pass, `check` has nothing to say of them, and they are what they teach."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from policies.cases import run
from policies.engine import decide
from policies.index import Policy
from policies.lint import lint
from policies.model import Action, Reason
from policies.words import answer, ladder, parse_words
from proxy.policy_files import read_policy, shared_suffix

EXAMPLES = sorted((Path(__file__).parents[2] / "policies" / "examples").glob("*.yaml"))
TODAY = date(2026, 11, 22)
NOW = 1795305600.0  # the same day


def read(path: Path) -> Policy:
    return read_policy([str(path)], tags=[str(path.parent / "ServiceTags_Public.json")])


def example(name: str) -> Policy:
    [path] = [path for path in EXAMPLES if path.stem == name]
    return read(path)


def reason(policy: Policy, workload: str, words: str) -> Reason:
    return answer(ladder(policy, parse_words(workload, words, NOW))).reason


def test_the_promised_examples_are_there() -> None:
    assert [path.stem for path in EXAMPLES] == ["aks", "ci-build", "coding-agent", "weather"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_tests_of_an_example_pass(path: Path) -> None:
    results = run(read(path), NOW)

    assert [result for result in results if not result.is_pass] == []
    assert {result.test.expect for result in results} == set(Action)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_check_finds_nothing_in_an_example(path: Path) -> None:
    policy = read(path)

    assert lint(policy, run(policy, NOW), shared_suffix=shared_suffix, today=TODAY) == ()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_rule_an_example_writes_has_a_name(path: Path) -> None:
    policy = read(path)
    rules = [rule for workload in policy.workloads.values() for rule in workload.rules] + list(policy.guard)

    assert [str(rule) for rule in rules if rule.place.file == str(path) and not rule.name] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("GET https://dataservice.accuweather.com/search?q=Oslo", Reason.RULE),
        ("GET https://dataservice.accuweather.com/forecasts/v1/daily", Reason.DENY_RULE),
        ("GET https://dataservice.accuweather.com/FORECASTS", Reason.DENY_RULE),
        ("POST https://dataservice.accuweather.com/search", Reason.NO_ALLOW_ENTRY),
        ("GET https://dataservice.accuweather.com/locations/v1/cities/search", Reason.NO_ALLOW_ENTRY),
        ("tls://archive.ubuntu.com", Reason.RULE),
        ("tls://ubuntu.com", Reason.NO_RULE),
        ("tls://archive.ubuntu.com:8443", Reason.PORT),
        ("ntp://ntp.ubuntu.com", Reason.RULE),
        ("tcp://github.com:22", Reason.RULE),
        ("tcp://github.com:23", Reason.PORT),
    ],
)
def test_the_weather_example_answers_for_the_stated_reason(words: str, expected: Reason) -> None:
    assert reason(example("weather"), "weather", words) is expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("udp://20.44.17.9:1194", Reason.RULE),
        ("udp://20.44.17.9:53", Reason.PORT),
        ("udp://198.51.100.7:1194", Reason.NO_RULE),
        ("tcp://20.60.132.4:443", Reason.PORT),
        ("tls://eusmanaged17.blob.core.windows.net", Reason.RULE),
        ("tls://attacker.blob.core.windows.net", Reason.NO_RULE),
        ("tls://x.hcp.westeurope.azmk8s.io", Reason.NO_RULE),
        ("GET http://security.ubuntu.com/x", Reason.RULE),
        ("tls://security.ubuntu.com", Reason.PORT),
        ("tls://attacker.vault.azure.net", Reason.NO_RULE),
        ("tcp://168.63.129.16:80", Reason.NEVER_REACHED),
    ],
)
def test_the_nodes_of_a_cluster_reach_what_is_theirs_and_no_other_tenants(words: str, expected: Reason) -> None:
    assert reason(example("aks"), "nodes", words) is expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("POST https://github.com/acme/app.git/git-upload-pack", Reason.RULE),
        ("POST https://github.com/acme/app.git/git-receive-pack", Reason.NO_ALLOW_ENTRY),
        ("POST https://api.anthropic.com/v1/files", Reason.NO_ALLOW_ENTRY),
        ("GET https://api.github.com/repos/acme/app/keys/1", Reason.DENY_RULE),
        ("tls://x.ngrok.io", Reason.GUARD),
        ("tcp://169.254.169.254:80", Reason.NEVER_REACHED),
    ],
)
def test_the_coding_agent_reads_and_cannot_publish(words: str, expected: Reason) -> None:
    assert reason(example("coding-agent"), "coding-agent", words) is expected


def test_the_database_of_the_coding_agent_closes_after_its_last_day() -> None:
    policy = example("coding-agent")

    def verdict(day: str) -> Reason:
        time = (date.fromisoformat(day) - date(1970, 1, 1)).days * 86400.0
        return decide(policy, parse_words("coding-agent", "tcp://db.dev.acme.internal:5432", time)).reason

    assert (verdict("2027-06-30"), verdict("2027-07-01")) == (Reason.RULE, Reason.EXPIRED)
