"""Which names a policy has inspected, and which of these an issuing CA's name constraints leave out. It reads no
certificate: the domains of one come as text."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from policies.errors import Problem
from policies.hostnames import Hostname, Pattern, parents
from policies.index import HostGroup, Policy
from policies.model import HostRule, Tls


def inspected_domains(policy: Policy) -> tuple[str, ...]:
    """The domains an issuing CA has to be permitted for every inspected rule of every workload, sorted.

    A wildcard gives the domain it stands under: constraints cannot say less (RFC 5280 4.2.1.10: a domain permits itself
    and what is below). What lies below another one is left out.
    """
    found = {group.rules[0].pattern.host for name in policy.workloads for group in _inspected(policy, name)}
    return tuple(sorted(domain for domain in found if not any(above in found for above in parents(domain))))


def outside(policy: Policy, workload: str | None, domains: Collection[str] | None) -> list[Problem]:
    """The inspected rules of `workload` (of all: None) for whose names no client would accept a leaf.

    domains  what the issuing CA's constraints permit, as they stand there; None: it has no constraints
    """
    if domains is None:
        return []
    permitted = {domain.lower() for domain in domains}
    names = policy.workloads if workload is None else [workload]
    rules = (
        rule
        for name in names
        for group in _inspected(policy, name)
        if not _is_permitted(group.rules[0].pattern, permitted)
        for rule in _inspecting(group)
    )
    problems = [
        Problem(
            rule.place,
            f'"{rule.pattern}" is inspected, and the constraints of the issuing CA leave it out: no client would '
            "accept a certificate for it",
            "replace the issuing CA: outgate pki rotate issuing --pki DIR --constrain-to POLICY",
        )
        for rule in rules
    ]
    return list(dict.fromkeys(problems))  # a set that two workloads use has its rules once


def _inspected(policy: Policy, workload: str) -> Iterator[HostGroup]:
    """The patterns for whose names leaves are shown: inspected on some port, and closed by no `deny: all`."""
    hosts = policy.index[workload].hosts
    for group in hosts.groups():
        pattern = group.rules[0].pattern
        meeting = (*hosts.holding(pattern), *policy.guard_table.holding(pattern))
        if any(_inspecting(group)) and not any(other.deny_all for other in meeting):
            yield group


def _inspecting(group: HostGroup) -> dict[HostRule, None]:
    """The rules that have TLS ended here; `tls` has no bearing on a port that carries plain HTTP."""
    ports = (ports for ports in group.ports if ports.tls is Tls.INSPECT and not ports.plain)
    return dict.fromkeys(rule for each in ports for rule in each.rules)


def _is_permitted(pattern: Pattern, permitted: Collection[str]) -> bool:
    """Whether every name of `pattern` is permitted. Constraints of other people's CAs may begin with a dot: then only
    what is below is meant; and below the empty name is every name."""
    above: list[Hostname] = list(parents(pattern.host))
    own = [pattern.host, *above]
    below = own if pattern.wildcard else above
    return "" in permitted or any(name in permitted for name in own) or any(f".{name}" in permitted for name in below)
