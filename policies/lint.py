"""What a policy that loads may still get wrong: too wide, reachable another way, without effect, untested, expired.

It warns and proposes; nothing here changes a verdict. The list of shared suffixes and the day come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from enum import StrEnum

from policies.addresses import Reach, classify
from policies.cases import CaseResult, unreached
from policies.edits import is_own
from policies.errors import Problem
from policies.hostnames import Hostname, Pattern, parents
from policies.index import HostGroup, HostTable, Policy, WorkloadIndex
from policies.model import ELSEWHERE, AnyRule, HostRule, NameRule, Network, Place, Stage, Tls, TransportRule
from policies.render import bracketed

ENDS_SOON = timedelta(days=14)
NARROW_V4, NARROW_V6 = 24, 64  # a wider prefix on a web port holds other people's servers
WEB_PORTS = (80, 443)


class Level(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Code(StrEnum):
    """The closed list of findings, for machines that read `check --json`."""

    SHARED_SUFFIX = "shared_suffix"
    FRONTING = "fronting"
    WIDE_TCP = "wide_tcp"
    NO_EFFECT = "no_effect"
    UNTESTED = "untested"
    EXPIRED = "expired"
    ENDS_SOON = "ends_soon"


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    code: Code
    problem: Problem


def lint(
    policy: Policy,
    results: Sequence[CaseResult],
    *,
    shared_suffix: Callable[[Hostname], Hostname | None],
    today: date,
) -> tuple[Finding, ...]:
    """Every finding, in file order. `results` are the policy's own tests, run.

    `shared_suffix` gives the multi-tenant suffix (private section of the public suffix list) at or below a name.
    """
    found: list[Finding] = []
    useless: set[Place] = set()
    for index in policy.index.values():
        idle = [*_ended(index, today), *_without_effect(index, policy.guard_table)]
        useless |= {finding.problem.place for finding in idle}
        found += idle
        found += _ending(index, today)
        found += _shared_suffixes(index, shared_suffix)
        found += _fronting(index, policy.guard_table)
        found += _wide_tcp(index)
    found += _untested(policy, results, useless)
    return tuple(sorted(found, key=lambda f: (f.problem.place.file, f.problem.place.line, f.problem.place.column)))


def example_words(rule: AnyRule) -> str:
    """An attempt in words that this rule is about, for a test to start from."""
    if isinstance(rule, TransportRule):
        where = rule.host or next((_first_address(network) for network in rule.networks), "ADDRESS")
        return f"{'quic' if rule.quic else rule.stage}://{where}:{rule.ports[0].first}"
    name = f"x.{rule.pattern.host}" if rule.pattern.wildcard else rule.pattern.host
    if isinstance(rule, NameRule):
        return f"{rule.stage}://{name}"
    port = rule.ports[0].first
    entry = next((entry for entry in (*(rule.allow or ()), *rule.deny) if entry.path), None)
    plain = port == 80 or any(port in ports for ports in rule.plain)
    if entry is None and not plain:
        return f"tls://{name}" if port == 443 else f"tls://{name}:{port}"
    method = min(entry.methods, default="GET") if entry else "GET"
    path = str(entry.path).replace("**", "x").replace("*", "x") if entry else "/"
    shown = name if port in WEB_PORTS else f"{name}:{port}"
    return f"{method} {'http' if plain else 'https'}://{shown}{path}"


# --- dates ---------------------------------------------------------------------------------------------------------


def _ended(index: WorkloadIndex, today: date) -> Iterator[Finding]:
    for rule in _own_rules(index):
        if rule.until and rule.until < today:
            message = f"the rule {_named(rule)} ended on {rule.until} and admits nothing"
            yield _finding(Level.ERROR, Code.EXPIRED, rule.place, message, "give it a later until:, or remove it")


def _ending(index: WorkloadIndex, today: date) -> Iterator[Finding]:
    for rule in _own_rules(index):
        if rule.until and today <= rule.until <= today + ENDS_SOON:
            days = (rule.until - today).days
            left = "today" if days == 0 else "tomorrow" if days == 1 else f"in {days} days"
            message = f"the rule {_named(rule)} ends {left}, after {rule.until}"
            yield _finding(Level.NOTE, Code.ENDS_SOON, rule.place, message, "renew until:, or remove the rule then")


# --- too wide ------------------------------------------------------------------------------------------------------


def _shared_suffixes(index: WorkloadIndex, shared_suffix: Callable[[Hostname], Hostname | None]) -> Iterator[Finding]:
    for rule in _own_rules(index):
        if not isinstance(rule, HostRule) or not rule.pattern.wildcard or _is_closed(rule):
            continue
        if rule.tls is Tls.INSPECT and rule.allow is not None:
            continue
        if suffix := shared_suffix(rule.pattern.host):
            message = f'"{rule.pattern}" admits every tenant of {suffix}, and anyone can own a name there'
            repair = "name the accounts you use, or write tls: inspect with an allow list"
            yield _finding(Level.WARNING, Code.SHARED_SUFFIX, rule.place, message, repair)


def _wide_tcp(index: WorkloadIndex) -> Iterator[Finding]:
    for rule in _own_rules(index):
        if not isinstance(rule, TransportRule) or rule.stage is not Stage.TCP:
            continue
        port = next((port for port in WEB_PORTS if any(port in ports for ports in rule.ports)), None)
        wide = next((network for network in rule.networks if _is_wide(network)), None)
        if port is None or (wide is None and rule.tag is None):
            continue
        what = f"tag {rule.tag}" if rule.tag else str(wide)
        message = f"{what} on port {port}: TLS without a name, and any other bytes, reach every server there"
        repair = "write host: rules for the names, or prefixes of /24 (IPv6 /64) and narrower"
        yield _finding(Level.WARNING, Code.WIDE_TCP, rule.place, message, repair)


def _is_wide(network: Network) -> bool:
    return network.prefixlen < (NARROW_V4 if network.version == 4 else NARROW_V6)


# --- reachable another way -----------------------------------------------------------------------------------------


def _fronting(index: WorkloadIndex, guard: HostTable) -> Iterator[Finding]:
    """Names that are inspected or denied below a wildcard that is not decrypted: a client shows another name below the
    wildcard in its TLS hello, and a server that serves both answers for the Host inside."""
    carried = {host: group for host, group in index.hosts.wildcards.items() if _is_passthrough(group)}
    below: dict[Hostname, list[str]] = {}
    for group in (*index.hosts.groups(), *guard.groups()):
        kind = _kind(group)
        pattern = group.rules[0].pattern
        above = next((host for host in parents(pattern.host) if host in carried), None) if kind else None
        if above is not None:
            below.setdefault(above, []).append(f"{pattern} is {kind} at {group.rules[0].place}")
    for host, names in below.items():
        rule = carried[host].rules[0]
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        message = (
            f'"{rule.pattern}" is carried undecrypted, and {names[0]}{more}: a client can show another name below '
            "the wildcard and ask for this one inside (fronting)"
        )
        repair = "write tls: inspect for the wildcard, or name its hosts"
        yield _finding(Level.WARNING, Code.FRONTING, rule.place, message, repair)


def _is_passthrough(group: HostGroup) -> bool:
    return not group.deny_all and any(not ports.plain and ports.tls is Tls.PASSTHROUGH for ports in group.ports)


def _kind(group: HostGroup) -> str:
    if group.deny_all or group.denies:
        return "denied"
    return "inspected" if any(not ports.plain and ports.tls is Tls.INSPECT for ports in group.ports) else ""


# --- without effect ------------------------------------------------------------------------------------------------


def _without_effect(index: WorkloadIndex, guard: HostTable) -> Iterator[Finding]:
    seen: dict[AnyRule, AnyRule] = {}
    for rule in index.workload.rules:
        bare = replace(rule, place=Place("", 0), label="", name=None, reason=None, owner=None)
        first = seen.setdefault(bare, rule)
        if not is_own(index.workload.name, rule):
            continue
        if first is not rule:
            yield _useless(rule, f"it says again what {first} says")
        elif why := _closed_by(rule, index, guard) or _outdone(rule, index):
            yield _useless(rule, why)


def _useless(rule: AnyRule, why: str) -> Finding:
    message = f"the rule {_named(rule)} has no effect: {why}"
    return _finding(Level.WARNING, Code.NO_EFFECT, rule.place, message, "remove it")


def _closed_by(rule: AnyRule, index: WorkloadIndex, guard: HostTable) -> str:
    """The `deny: all` that closes everything this rule names."""
    if isinstance(rule, TransportRule):
        if rule.host is None:
            return ""
        pattern = Pattern(rule.host, wildcard=False)
    else:
        pattern = rule.pattern
    if isinstance(rule, HostRule) and _is_closed(rule):
        return ""
    for table in (guard, index.hosts):
        for group in table.holding(pattern):
            if group.deny_all is not None:
                return f"deny: all at {group.deny_all.place} closes {group.deny_all.pattern}"
    return ""


def _outdone(rule: AnyRule, index: WorkloadIndex) -> str:
    match rule:
        case TransportRule() if rule.networks and all(map(_is_never_reached, rule.networks)):
            return "metadata, loopback, link-local and multicast addresses are never reached, whatever a rule says"
        case TransportRule(stage=Stage.UDP) if all(p.first == p.last and p.first in ELSEWHERE for p in rule.ports):
            return ELSEWHERE[rule.ports[0].first]
        case NameRule(stage=Stage.DNS):
            hosts = [host for group in index.hosts.holding(rule.pattern) for host in group.rules]
            lasting = next((host for host in hosts if host.until is None), None)
            return f"{lasting} admits the lookup already" if lasting else ""
        case HostRule(allow=None, deny=()) if not (rule.private or rule.encoded_slash or rule.ech or rule.upgrade):
            return _overruled(rule, index)
        case _:
            return ""


def _overruled(rule: HostRule, index: WorkloadIndex) -> str:
    """The rule of the same pattern whose allow list decides on every port of this one."""
    table = index.hosts.wildcards if rule.pattern.wildcard else index.hosts.exact
    mine = [ports for ports in table[rule.pattern.host].ports if rule in ports.rules]
    if not mine or any(not ports.allow for ports in mine):
        return ""
    return f"for the same name and port the allow list at {(mine[0].allow or ())[0][1].place} decides"


def _is_never_reached(network: Network) -> bool:
    # First, middle and last: 0.0.0.0/0 and the NAT64 prefix begin and end with such addresses and hold others.
    return all(classify(network[i]) is Reach.NEVER for i in (0, network.num_addresses // 2, -1))


# --- untested ------------------------------------------------------------------------------------------------------


def _untested(policy: Policy, results: Sequence[CaseResult], useless: set[Place]) -> Iterator[Finding]:
    tested = {test.workload for test in policy.tests}
    for name, workload in policy.workloads.items():
        if name not in tested and workload.rules:
            words = example_words(workload.rules[0])
            message = f'the workload "{name}" has no tests'
            repair = f'write one under tests.{name}, such as "{words}"'
            yield _finding(Level.WARNING, Code.UNTESTED, workload.place, message, repair)
    names = {rule.place: name for name in tested for rule in policy.workloads[name].rules if is_own(name, rule)}
    for rule in unreached(policy, results):
        if rule.place in names and rule.place not in useless:
            verb = "deny" if isinstance(rule, HostRule) and _is_closed(rule) else "allow"
            repair = f'add to tests.{names[rule.place]}.{verb}: "{example_words(rule)}"'
            message = f"no test reaches the rule {_named(rule)}"
            yield _finding(Level.WARNING, Code.UNTESTED, rule.place, message, repair)


# --- words ---------------------------------------------------------------------------------------------------------


def _own_rules(index: WorkloadIndex) -> Iterable[AnyRule]:
    return (rule for rule in index.workload.rules if is_own(index.workload.name, rule))


def _is_closed(rule: HostRule) -> bool:
    return any(entry.is_all for entry in rule.deny)


def _named(rule: AnyRule) -> str:
    return f'"{rule.name or rule.label}"'


def _first_address(network: Network) -> str:
    return bracketed(network[1] if network.num_addresses > 2 else network[0])


def _finding(level: Level, code: Code, place: Place, message: str, repair: str) -> Finding:
    return Finding(level, code, Problem(place, message, repair))
