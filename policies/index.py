"""A policy made fast to ask: rules grouped by pattern, names in dicts, prefixes by length. Contradictions stop here.

Cost of a lookup: one dict access for each label of the name, one for each distinct prefix length. It does not grow with
the number of rules. `engine` reads these tables; nothing else needs them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise

from policies.addresses import PrefixMap, inside_one_private_block
from policies.errors import PolicyError, Problem
from policies.hostnames import Hostname, Pattern, parents
from policies.model import (
    AMBIGUOUS,
    Action,
    AnyRule,
    Entry,
    HostRule,
    KubernetesMatch,
    NameRule,
    PortRange,
    Reason,
    Stage,
    Test,
    Tls,
    TransportRule,
    Verdict,
    Workload,
)

PLAIN_PORT = PortRange(80, 80)  # carries plain HTTP in every rule; every other port TLS unless `plain` names it
EPOCH = date(1970, 1, 1).toordinal()


@dataclass(frozen=True, slots=True)
class PortRules:
    """What the rules of one pattern say together about one range of ports."""

    ports: PortRange
    plain: bool
    tls: Tls
    rules: tuple[HostRule, ...]
    last_day: int | None  # the first day (since the epoch, UTC) on which every rule still counts is up to here
    allow: tuple[tuple[Entry, HostRule], ...] | None  # None: no list, all is allowed that no deny matches
    private: bool
    encoded_slash: bool
    ech: bool | None
    upgrade: frozenset[str]
    admitted: Verdict  # the tls-stage allow, made once


@dataclass(frozen=True, slots=True)
class HostGroup:
    """All rules of one pattern in one workload (or in the guard)."""

    rules: tuple[HostRule, ...]
    ports: tuple[PortRules, ...]  # disjoint
    deny_all: HostRule | None
    denies: tuple[tuple[Entry, HostRule], ...]  # entries with a path; they count on every port


class HostTable:
    """Groups of host rules by their pattern. `closes`: some pattern is `deny: all`."""

    __slots__ = ("closes", "exact", "wildcards")

    def __init__(
        self, exact: Mapping[Hostname, HostGroup], wildcards: Mapping[Hostname, HostGroup], *, closes: bool
    ) -> None:
        self.exact = exact
        self.wildcards = wildcards
        self.closes = closes

    @classmethod
    def of(cls, rules: Iterable[HostRule]) -> HostTable:
        by_pattern: dict[tuple[Hostname, bool], list[HostRule]] = {}
        for rule in rules:
            by_pattern.setdefault((rule.pattern.host, rule.pattern.wildcard), []).append(rule)
        exact: dict[Hostname, HostGroup] = {}
        wildcards: dict[Hostname, HostGroup] = {}
        for (host, wildcard), found in by_pattern.items():
            (wildcards if wildcard else exact)[host] = group_of(found)
        closes = any(found.deny_all for found in (*exact.values(), *wildcards.values()))
        return cls(exact, wildcards, closes=closes)

    def matching(self, name: Hostname) -> list[HostGroup]:
        """The groups whose pattern matches `name`, the most specific first."""
        found = []
        if group := self.exact.get(name):
            found.append(group)
        if self.wildcards:
            found.extend(group for above in parents(name) if (group := self.wildcards.get(above)))
        return found

    def holding(self, pattern: Pattern) -> list[HostGroup]:
        """The groups whose pattern matches every name that `pattern` matches."""
        if not pattern.wildcard:
            return self.matching(pattern.host)
        return [group for name in (pattern.host, *parents(pattern.host)) if (group := self.wildcards.get(name))]

    def groups(self) -> Iterator[HostGroup]:
        yield from self.exact.values()
        yield from self.wildcards.values()


@dataclass(frozen=True, slots=True)
class TransportTable:
    """`tcp:` or `udp:` rules by name and by prefix. A prefix carries whether it admits private addresses."""

    names: Mapping[Hostname, tuple[TransportRule, ...]]
    prefixes: PrefixMap[tuple[TransportRule, bool]]
    ports: frozenset[PortRange]
    prefix_ports: frozenset[PortRange]  # of the rules by prefix alone
    quic_ports: frozenset[PortRange]  # of the rules with `quic: sni`


@dataclass(frozen=True, slots=True)
class WorkloadIndex:
    workload: Workload
    hosts: HostTable
    tcp: TransportTable
    udp: TransportTable
    ntp: Mapping[Hostname, tuple[NameRule, ...]]
    dns: Mapping[tuple[Hostname, bool], tuple[NameRule, ...]]
    host_ports: frozenset[PortRange]
    plain_ports: frozenset[PortRange]
    ancestors: Collection[Hostname]  # every name above a named one; wildcards count with the name they stand under


# By namespace (`` for those that name none): workload and match.
type PodMatches = Mapping[str, tuple[tuple[str, KubernetesMatch], ...]]


@dataclass(frozen=True, slots=True)
class Policy:
    """All workloads of all merged files, compiled. Equal when the rules are; swapped whole on reload.

    generation  tells one policy from another in records: twelve hex digits; empty where nobody asked for it
    """

    workloads: Mapping[str, Workload]
    guard: Sequence[HostRule]
    tests: Sequence[Test]
    index: Mapping[str, WorkloadIndex] = field(repr=False, compare=False)
    guard_table: HostTable = field(repr=False, compare=False)
    sources: PrefixMap[str] = field(repr=False, compare=False)
    users: Mapping[str, str] = field(repr=False, compare=False)  # name of a verified credential to workload
    pods: PodMatches = field(default_factory=dict, repr=False, compare=False)
    generation: str = field(default="", repr=False, compare=False)


def build(workloads: Mapping[str, Workload], guard: Sequence[HostRule] = (), tests: Sequence[Test] = ()) -> Policy:
    """The policy of these workloads. Raises PolicyError with every contradiction, each naming both lines."""
    guard_table = HostTable.of(guard)
    index = {name: _index_workload(workload) for name, workload in workloads.items()}
    problems = [problem for entry in index.values() for problem in _contradictions(entry, guard_table)]
    problems += _shared_sources(workloads.values())
    if problems:
        raise PolicyError(problems)
    sources = PrefixMap(
        (network, workload.name)
        for workload in workloads.values()
        if workload.match
        for network in workload.match.address
    )
    users = {one.match.user: one.name for one in workloads.values() if one.match and one.match.user}
    pods = _pod_matches(workloads.values())
    return Policy(dict(workloads), tuple(guard), tuple(tests), index, guard_table, sources, users, pods)


def _pod_matches(workloads: Iterable[Workload]) -> PodMatches:
    found: dict[str, list[tuple[str, KubernetesMatch]]] = defaultdict(list)
    for workload in workloads:
        if workload.match and (match := workload.match.kubernetes):
            found[match.namespace or ""].append((workload.name, match))
    return {namespace: tuple(matches) for namespace, matches in found.items()}


def match_pod(pods: PodMatches, namespace: str, service_account: str, labels: Mapping[str, str]) -> str | None:
    """The workload whose `match: kubernetes` means this pod; AMBIGUOUS where two do, None where none does."""
    found = [
        workload
        for within in (namespace, "")
        for workload, match in pods.get(within, ())
        if match.service_account in (None, service_account)
        and all(labels.get(key) == value for key, value in match.labels)
    ]
    if len(found) > 1:
        return AMBIGUOUS
    return found[0] if found else None


def live(rules: PortRules, day: float) -> PortRules | None:
    """These rules on `day`: what expired ones grant is gone, what they narrow stays. None where all are expired."""
    if rules.last_day is None or day <= rules.last_day:
        return rules
    valid = tuple(rule for rule in rules.rules if is_valid(rule, day))
    return _port_rules(rules.ports, rules.plain, rules.rules, valid) if valid else None


def is_valid(rule: AnyRule, day: float) -> bool:
    """Whether `rule` still counts on `day` (since the epoch, UTC): `until` is the last valid day."""
    return rule.until is None or day <= rule.until.toordinal() - EPOCH


def _index_workload(workload: Workload) -> WorkloadIndex:
    hosts: list[HostRule] = []
    tcp: list[TransportRule] = []
    udp: list[TransportRule] = []
    ntp: dict[Hostname, list[NameRule]] = defaultdict(list)
    dns: dict[tuple[Hostname, bool], list[NameRule]] = defaultdict(list)
    for rule in workload.rules:
        match rule:
            case HostRule():
                hosts.append(rule)
            case TransportRule():
                (tcp if rule.stage is Stage.TCP else udp).append(rule)
            case NameRule(stage=Stage.NTP):
                ntp[rule.pattern.host].append(rule)
            case NameRule():
                dns[rule.pattern.host, rule.pattern.wildcard].append(rule)
    table = HostTable.of(hosts)
    ranges = {(ports.ports, ports.plain) for group in table.groups() for ports in group.ports}
    return WorkloadIndex(
        workload=workload,
        hosts=table,
        tcp=_transport_table(tcp),
        udp=_transport_table(udp),
        ntp={host: tuple(rules) for host, rules in ntp.items()},
        dns={key: tuple(rules) for key, rules in dns.items()},
        host_ports=frozenset(ports for ports, _ in ranges),
        plain_ports=frozenset(ports for ports, plain in ranges if plain),
        ancestors=frozenset(_ancestors(workload.rules)),
    )


def _ancestors(rules: Iterable[AnyRule]) -> Iterator[Hostname]:
    for rule in rules:
        if isinstance(rule, TransportRule):
            if rule.host:
                yield from parents(rule.host)
        elif not (isinstance(rule, HostRule) and any(entry.is_all for entry in rule.deny)):
            yield from parents(rule.pattern.host)
            if rule.pattern.wildcard:
                yield rule.pattern.host


def _transport_table(rules: Sequence[TransportRule]) -> TransportTable:
    names: dict[Hostname, list[TransportRule]] = defaultdict(list)
    for rule in rules:
        if rule.host:
            names[rule.host].append(rule)
    # A tag's prefixes come from the cloud's file: nobody wrote there that private addresses are meant.
    prefixes = (
        (network, (rule, rule.tag is None and inside_one_private_block(network)))
        for rule in rules
        for network in rule.networks
    )
    return TransportTable(
        names={host: tuple(found) for host, found in names.items()},
        prefixes=PrefixMap(prefixes),
        ports=frozenset(ports for rule in rules for ports in rule.ports),
        prefix_ports=frozenset(ports for rule in rules if rule.networks for ports in rule.ports),
        quic_ports=frozenset(ports for rule in rules if rule.quic for ports in rule.ports),
    )


def group_of(found: Iterable[HostRule]) -> HostGroup:
    """What rules of one pattern say together."""
    rules = tuple(found)
    entries = [(entry, rule) for rule in rules for entry in rule.deny]
    return HostGroup(
        rules=rules,
        ports=tuple(_port_segments(rules)),
        deny_all=next((rule for entry, rule in entries if entry.is_all), None),
        denies=tuple((entry, rule) for entry, rule in entries if not entry.is_all),
    )


def _port_segments(rules: tuple[HostRule, ...]) -> Iterator[PortRules]:
    """The ports of these rules cut into disjoint ranges, each with the rules that cover it."""
    if len(rules) == 1 and len(rules[0].ports) == 1 and not rules[0].plain:  # nearly every rule
        ports = rules[0].ports[0]
        if PLAIN_PORT.first not in ports or ports == PLAIN_PORT:
            yield _port_rules(ports, ports == PLAIN_PORT, rules, rules)
            return
    edges = {80, 81}
    for rule in rules:
        for ports in (*rule.ports, *rule.plain):
            edges.update((ports.first, ports.last + 1))
    for first, after in pairwise(sorted(edges)):
        covering = tuple(rule for rule in rules if any(first in ports for ports in (*rule.ports, *rule.plain)))
        if covering:
            yield _port_rules(PortRange(first, after - 1), _is_plain(covering[0], first), covering, covering)


def _is_plain(rule: HostRule, port: int) -> bool:
    return port in PLAIN_PORT or any(port in ports for ports in rule.plain)


def _port_rules(ports: PortRange, plain: bool, rules: tuple[HostRule, ...], valid: tuple[HostRule, ...]) -> PortRules:
    """What `valid`, those of `rules` that are not expired, grant together within what all of them narrow."""
    first = valid[0]
    allow = None
    if any(rule.allow is not None for rule in rules):
        allow = tuple((entry, rule) for rule in valid for entry in rule.allow or ())
    until = [rule.until for rule in valid if rule.until]
    private = any(rule.private for rule in valid)
    return PortRules(
        ports=ports,
        plain=plain,
        tls=first.tls,
        rules=valid,
        last_day=min(until).toordinal() - EPOCH if until else None,
        allow=allow,
        private=private,
        encoded_slash=any(rule.encoded_slash for rule in valid),
        ech=_ech(rules, valid),
        upgrade=first.upgrade if len(valid) == 1 else frozenset().union(*(rule.upgrade for rule in valid)),
        admitted=Verdict(Action.ALLOW, Reason.RULE, Stage.TLS, first, tls=first.tls, private=private),
    )


def _ech(rules: Sequence[HostRule], valid: Sequence[HostRule]) -> bool | None:
    if any(rule.ech for rule in valid):
        return True
    return False if any(rule.ech is False for rule in rules) else None


def _contradictions(index: WorkloadIndex, guard: HostTable) -> Iterator[Problem]:
    for group in index.hosts.groups():
        yield from _mixed_ports(group)
    yield from _unseen_entries(index.hosts, guard)


def _mixed_ports(group: HostGroup) -> Iterator[Problem]:
    for ports in group.ports if len(group.rules) > 1 else ():
        first = ports.rules[0]
        what = f'host "{first.pattern}" port {ports.ports}'
        for other in ports.rules[1:]:
            if not ports.plain and other.tls is not first.tls:
                yield Problem(
                    other.place,
                    f"{what}: tls: {other.tls} here, tls: {first.tls} at {first.place}",
                    "rules of one pattern and port must agree: write the same tls in both",
                )
            if _is_plain(other, ports.ports.first) != ports.plain:
                yield Problem(
                    other.place,
                    f"{what}: plain HTTP in one rule, TLS in the one at {first.place}",
                    "list the port under plain in both rules, or in none",
                )


def _unseen_entries(hosts: HostTable, guard: HostTable) -> Iterator[Problem]:
    """Method and path entries that no part of the gate could see, because the port is carried undecrypted."""
    for group in hosts.groups():
        if blind := _blind_port(group):
            pattern = group.rules[0].pattern
            meeting = [*hosts.holding(pattern), *guard.holding(pattern)]
            if not any(other.deny_all for other in meeting):
                entries = [found for other in meeting for found in other.denies]
                yield from _unseen(group, blind, [*(blind.allow or ()), *entries])
    for narrow in guard.groups():  # below a wildcard that decides for its names
        pattern = narrow.rules[0].pattern
        deciding = hosts.holding(pattern)[:1] if narrow.denies else []
        for group in deciding:
            blind = _blind_port(group)
            closed = narrow.deny_all or any(other.deny_all for other in hosts.holding(pattern))
            if blind and not closed and group.rules[0].pattern != pattern:
                yield from _unseen(group, blind, narrow.denies)


def _blind_port(group: HostGroup) -> PortRules | None:
    return next((ports for ports in group.ports if not ports.plain and ports.tls is Tls.PASSTHROUGH), None)


def _unseen(group: HostGroup, blind: PortRules, entries: Iterable[tuple[Entry, HostRule]]) -> Iterator[Problem]:
    rule = group.rules[0]
    for entry, source in {id(source): (entry, source) for entry, source in entries}.values():
        yield Problem(
            rule.place,
            f'host "{rule.pattern}" port {blind.ports} is passed through undecrypted, '
            f'so "{entry.text}" of {source.place} cannot be seen',
            "write tls: inspect here, or deny: all there",
        )


def _shared_sources(workloads: Iterable[Workload]) -> Iterator[Problem]:
    seen: dict[object, Workload] = {}
    for workload in workloads:
        match = workload.match
        keys: list[object] = [*match.address, *([match.user] if match.user else [])] if match else []
        for key in keys:
            other = seen.setdefault(key, workload)
            if other is not workload and match:
                yield Problem(
                    match.place,
                    f'workload "{workload.name}" matches {key}, and so does "{other.name}" at {other.place}',
                    "a source can be one workload only: make one of the two longer, or remove it",
                )
