"""Which parts of the policy language this gate does not serve yet. It starts on none that it would loosen by ignoring.

A rule that is not served (ntp, udp) only leaves its port closed: a warning. A key that says who a source is would be
wrong either way when ignored: refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from policies.errors import Problem
from policies.index import Policy
from policies.model import ELSEWHERE, HostRule, Match, Stage, TransportRule, Workload

IN_SANDBOX = frozenset({Stage.NTP, Stage.UDP})  # carried by `outgate run`, where it has a sandbox

_INSTEAD = {
    Stage.NTP: "`outgate relay` gives the time, in a process of its own (docs/ntp.md)",
    Stage.UDP: "say --udp-listen or --udp-forward (docs/udp.md)",
}


def refused_keys(
    policy: Policy, workload: str | None, *, has_users: bool = False, has_pods: bool = False
) -> list[Problem]:
    """Every key in force that this gate cannot serve. With `workload` only its rules count, and no `match`.

    has_users  it is an explicit proxy as well, which knows its clients by their credentials
    has_pods   it watches a cluster
    """
    problems: list[Problem] = []
    for one in _asked(policy, workload):
        if workload is None and one.match:
            problems += _refused_match(one.match, has_users=has_users, has_pods=has_pods)
    return problems


def closed_rules(policy: Policy, workload: str | None, *, carried: Collection[Stage] = ()) -> list[Problem]:
    """Rules of a kind that this gate does not carry: what they admit stays closed.

    carried  those of these kinds that it does carry
    """
    closed = {Stage.NTP, Stage.UDP}.difference(carried)
    return [*_closed_ports(policy, workload)] + [
        Problem(rule.place, f"{rule.stage} is not carried by this gate: it stays closed", _INSTEAD.get(rule.stage))
        for one in _asked(policy, workload)
        for rule in one.rules
        if not isinstance(rule, HostRule) and rule.stage in closed
    ]


def _closed_ports(policy: Policy, workload: str | None) -> Iterator[Problem]:
    """Ports whose datagrams are led elsewhere, whatever a rule says."""
    for one in _asked(policy, workload):
        for rule in one.rules:
            if isinstance(rule, TransportRule) and rule.stage is Stage.UDP:
                for port, whose in ELSEWHERE.items():
                    if any(port in ports for ports in rule.ports):
                        yield Problem(rule.place, f"udp port {port} stays closed", whose)


def _asked(policy: Policy, workload: str | None) -> Iterable[Workload]:
    return policy.workloads.values() if workload is None else [policy.workloads[workload]]


def _refused_match(match: Match, *, has_users: bool, has_pods: bool) -> Iterator[Problem]:
    if match.kubernetes and not has_pods:
        hint = "give it --kubernetes in-cluster, or use match: address, or -w"
        yield Problem(match.place, "match: kubernetes needs a gate that watches a cluster", hint)
    if match.user and not has_users:
        hint = "give it --proxy-listen and --credentials, or use match: address, or -w"
        yield Problem(match.place, "match: user needs a gate that is a proxy and knows credentials", hint)
