"""Which parts of the policy language this gate does not serve yet. It starts on none that it would loosen by ignoring.

A rule that is not served (ntp, udp) only leaves its port closed: a warning. A key that limits or widens another rule
(budget, quic, upstreamPool) or says who a source is would be wrong either way when ignored: refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from policies.errors import Problem
from policies.index import Policy
from policies.model import AnyRule, HostRule, Match, Stage, TransportRule, Workload


def refused_keys(policy: Policy, workload: str | None, *, has_users: bool = False) -> list[Problem]:
    """Every key in force that this gate cannot serve. With `workload` only its rules count, and no `match`.

    has_users  it is an explicit proxy as well, which knows its clients by their credentials
    """
    problems: list[Problem] = []
    for one in _asked(policy, workload):
        if workload is None and one.match:
            problems += _refused_match(one.match, has_users=has_users)
        problems += [
            Problem(rule.place, f"{key} is not served by this gate yet", "remove it, or wait for the release that does")
            for rule in one.rules
            for key in _refused(rule)
        ]
    return problems


def closed_rules(policy: Policy, workload: str | None) -> list[Problem]:
    """Rules of a kind that this gate does not carry yet: what they admit stays closed."""
    return [
        Problem(rule.place, f"{rule.stage} is not carried by this gate yet: it stays closed")
        for one in _asked(policy, workload)
        for rule in one.rules
        if not isinstance(rule, HostRule) and rule.stage in (Stage.NTP, Stage.UDP)
    ]


def _asked(policy: Policy, workload: str | None) -> Iterable[Workload]:
    return policy.workloads.values() if workload is None else [policy.workloads[workload]]


def _refused_match(match: Match, *, has_users: bool) -> Iterator[Problem]:
    if match.kubernetes:
        yield Problem(match.place, "match: kubernetes is not served by this gate yet", "use match: address, or -w")
    if match.user and not has_users:
        hint = "give it --proxy-listen and --credentials, or use match: address, or -w"
        yield Problem(match.place, "match: user needs a gate that is a proxy and knows credentials", hint)


def _refused(rule: AnyRule) -> Iterator[str]:
    if isinstance(rule, HostRule) and rule.upstream_pool:
        yield "upstreamPool"
    if isinstance(rule, TransportRule):
        if rule.budget is not None:
            yield "budget"
        if rule.quic is not None:
            yield "quic"
