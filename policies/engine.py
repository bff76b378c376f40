"""The verdict: `decide(policy, attempt)`, and `admit(verdict, address)` for the address about to be dialled.

Every part that lets a byte out asks these two (the listener, the addons, the DNS answers, the relays), and so do `why`
and `test`. Order of checks is order on the page. Nothing here reads a clock, a file or a socket.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import inf

from policies.addresses import Reach, classify
from policies.expecting import Expect as Expect  # asked beside `decide`: re-exported
from policies.expecting import any_holds
from policies.expecting import carries_plain as carries_plain
from policies.expecting import expect as expect
from policies.expecting import expects_quic as expects_quic
from policies.hostnames import Hostname, parents
from policies.index import HostGroup, Policy, PortRules, TransportTable, WorkloadIndex, is_valid, live
from policies.model import (
    AMBIGUOUS,
    CONTRADICTED,
    STALE,
    UNKNOWN,
    Action,
    Address,
    AnyRule,
    Attempt,
    Dial,
    Entry,
    HostRule,
    Mode,
    NameRule,
    Reason,
    Stage,
    Tls,
    TransportRule,
    Verdict,
)
from policies.paths import MalformedPath, Path, parse_path

QUERY_TYPES = frozenset({"A", "AAAA", "HTTPS", "SVCB"})  # every other type of an allowed name exists and is empty
METHOD = re.compile(r"[A-Z]+(?:[-_][A-Z]+)*")  # `get` is another method to us, and the same one to some servers

# What audit mode lets pass: a missing or denying rule. Malformed input, a Host that is not the SNI, ECH, the guard and
# never-reached addresses stay denied.
AUDITED = frozenset(
    {
        Reason.NO_RULE,
        Reason.PORT,
        Reason.WRONG_PROTOCOL,
        Reason.DENY_RULE,
        Reason.NO_ALLOW_ENTRY,
        Reason.EXPIRED,
        Reason.ANCESTOR,
        Reason.NO_SNI,
    }
)

# Of several rules that missed the verdict names the one that came nearest: the last of these.
_NEARNESS = (
    Reason.PORT,
    Reason.EXPIRED,
    Reason.NO_SNI,
    Reason.HOST_MISMATCH,
    Reason.PRIVATE_ADDRESS,
    Reason.NEVER_REACHED,
    Reason.DENY_RULE,
    Reason.GUARD,
)


_DOUBTS = {
    AMBIGUOUS: Reason.AMBIGUOUS_WORKLOAD,
    STALE: Reason.STALE_WORKLOAD,
    CONTRADICTED: Reason.CREDENTIALS,
}


def decide(policy: Policy, attempt: Attempt) -> Verdict:
    """The verdict on one attempt at one stage. Total: every attempt gets one, and an unknown state is a denial."""
    if attempt.fault:
        return _deny(attempt, attempt.fault)
    index = policy.index.get(attempt.workload)
    if index is None:
        return _deny(attempt, _DOUBTS.get(attempt.workload, Reason.UNKNOWN_WORKLOAD))
    verdict = _JUDGES[attempt.stage](policy, index, attempt)
    if index.workload.mode is Mode.AUDIT and verdict.reason in AUDITED:
        return _let_pass(index, attempt, verdict)
    return verdict


def admit(verdict: Verdict, address: Address, *, from_hosts: bool = False) -> Verdict:
    """The same verdict, or a denial of this very address. `from_hosts`: the operator's own `hosts:` named it, which
    exempts it from the private and loopback checks, never from metadata and link-local."""
    if not verdict.is_allow:
        return verdict
    reach = classify(address)
    if reach is Reach.PUBLIC or (reach is Reach.PRIVATE and (verdict.private or from_hosts)):
        return verdict
    if from_hosts and address.is_loopback:
        return verdict
    reason = Reason.PRIVATE_ADDRESS if reach is Reach.PRIVATE else Reason.NEVER_REACHED
    return Verdict(Action.DENY, reason, verdict.stage, verdict.rule, host=verdict.host)


def identify(policy: Policy, address: Address, user: str | None = None) -> str:
    """The workload of a source: its verified credential's, else the longest prefix's around it, else `unknown`."""
    if user is not None and (named := policy.users.get(user)):
        return named
    found = policy.sources.covering(address)
    return found[0] if found else UNKNOWN


# --- stages --------------------------------------------------------------------------------------------------------


def _decide_tls(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    name = attempt.host
    if name is None:
        return _decide_transport(index.tcp, policy, index, attempt) or _deny(attempt, Reason.NO_SNI)
    groups = index.hosts.matching(name)
    if denied := _closed(policy, groups, name):
        return _deny(attempt, *denied)
    if not groups:
        if not (index.tcp.ports or attempt.names):  # nearly every denial: nothing more to ask
            return _deny(attempt, Reason.NO_RULE)
        named = replace(attempt, names=(name, *attempt.names))  # a `tcp:` rule by name carries TLS to that name too
        return _decide_transport(index.tcp, policy, index, named) or _deny(attempt, Reason.NO_RULE)
    rules = _covering(groups[0], attempt.port)
    if rules is None:
        return _decide_beside(index, attempt, groups, name)
    if rules.plain:
        return _deny(attempt, Reason.WRONG_PROTOCOL, rules.rules[0])
    current = live(rules, _day(attempt))
    if current is None:
        return _deny(attempt, Reason.EXPIRED, rules.rules[0])
    if attempt.ech and current.tls is Tls.PASSTHROUGH and not _allows_ech(index, current):
        return _deny(attempt, Reason.ECH, current.rules[0])
    return current.admitted  # `build` refuses path entries where nothing is decrypted, so no deny is passed by here


def _decide_http(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    name = attempt.host
    if name is None or not METHOD.fullmatch(attempt.method):
        return _deny(attempt, Reason.MALFORMED_REQUEST)
    if attempt.opened_for is not None and attempt.opened_for != name:
        return _deny(attempt, Reason.HOST_MISMATCH)
    groups = index.hosts.matching(name)
    rules = _covering(groups[0], attempt.port) if groups else None
    current = live(rules, _day(attempt)) if rules else None
    try:
        path = parse_path(attempt.target, encoded_slash=current is not None and current.encoded_slash)
    except MalformedPath:
        return _deny(attempt, Reason.MALFORMED_PATH, groups[0].rules[0] if groups else None)
    if denied := _closed(policy, groups, name) or _denied_path(policy, groups, name, attempt.method, path):
        return _deny(attempt, *denied)
    if rules is None:
        carried = _decide_beside(index, attempt, groups, name)
        if carried.is_allow and attempt.upgrade is not None:
            return _deny(attempt, Reason.UPGRADE, carried.rule)
        return carried
    if rules.plain is not attempt.plain:
        return _deny(attempt, Reason.WRONG_PROTOCOL, rules.rules[0])
    if current is None:
        return _deny(attempt, Reason.EXPIRED, rules.rules[0])
    admitting = _admitting_rule(current, attempt.method, path)
    if admitting is None:
        return _deny(attempt, Reason.NO_ALLOW_ENTRY, current.rules[0])
    if not _admits_upgrade(current, attempt.upgrade):
        return _deny(attempt, Reason.UPGRADE, admitting)
    return Verdict(Action.ALLOW, Reason.RULE, Stage.HTTP, admitting, private=current.private)


def _decide_dns(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    name = attempt.host
    if name is None:
        return _deny(attempt, Reason.MALFORMED_QUERY)
    groups = index.hosts.matching(name)
    if denied := _closed(policy, groups, name):
        return _deny(attempt, *denied)
    dialled = _dialled_rules(index, groups, name)
    rules = [*dialled, *_lookup_rules(index, name)]
    day = _day(attempt)
    granting = next((rule for rule in rules if is_valid(rule, day)), None)
    if granting is None:
        if rules:
            return _deny(attempt, Reason.EXPIRED, rules[0])
        return _deny(attempt, Reason.ANCESTOR if name in index.ancestors else Reason.NO_RULE)
    if attempt.query_type not in QUERY_TYPES:
        return _deny(attempt, Reason.QUERY_TYPE, granting)
    # A name with nothing but `dns:` rules is never dialled: any answer may be seen.
    private = not dialled or any(_admits_private(rule) for rule in dialled if is_valid(rule, day))
    return Verdict(Action.ALLOW, Reason.RULE, Stage.DNS, granting, private=private)


def _dialled_rules(index: WorkloadIndex, groups: Sequence[HostGroup], name: Hostname) -> list[AnyRule]:
    """The rules that are about reaching `name` itself."""
    found: list[AnyRule] = [*groups[0].rules] if groups else []
    found += index.tcp.names.get(name, ())
    found += index.udp.names.get(name, ())
    found += index.ntp.get(name, ())
    return found


def _lookup_rules(index: WorkloadIndex, name: Hostname) -> list[NameRule]:
    """The `dns:` rules that match `name`."""
    found: list[NameRule] = []
    if index.dns:
        found += index.dns.get((name, False), ())
        for above in parents(name):
            found += index.dns.get((above, True), ())
    return found


def _decide_opaque(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    """TCP that names nobody, and UDP; `host` is there the name that QUIC shows."""
    table = index.tcp if attempt.stage is Stage.TCP else index.udp
    if verdict := _decide_transport(table, policy, index, attempt):
        if attempt.ech and _is_quic(verdict.rule) and verdict.is_allow and not index.workload.ech:
            return _deny(attempt, Reason.ECH, verdict.rule)
        return verdict
    for name in attempt.names:
        if groups := index.hosts.matching(name):  # the host rule expects TLS or HTTP
            return _deny(attempt, Reason.WRONG_PROTOCOL, groups[0].rules[0])
    return _deny(attempt, Reason.NO_RULE)


def _decide_ntp(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    """Any `ntp` rule admits UDP/123 from its workload (`host` None: a packet); the relay answers for every address."""
    if attempt.address is not None and classify(attempt.address) is Reach.NEVER:
        return _deny(attempt, Reason.NEVER_REACHED)
    misses: list[Verdict] = []
    for name in index.ntp if attempt.host is None else (attempt.host,):
        if denied := _closed(policy, index.hosts.matching(name), name):
            misses.append(_deny(attempt, *denied))
            continue
        for rule in index.ntp.get(name, ()):
            if is_valid(rule, _day(attempt)):
                return Verdict(Action.ALLOW, Reason.RULE, Stage.NTP, rule)
            misses.append(_deny(attempt, Reason.EXPIRED, rule))
    return _nearest(misses) or _deny(attempt, Reason.NO_RULE)


_JUDGES: dict[Stage, Callable[[Policy, WorkloadIndex, Attempt], Verdict]] = {
    Stage.DNS: _decide_dns,
    Stage.TLS: _decide_tls,
    Stage.HTTP: _decide_http,
    Stage.TCP: _decide_opaque,
    Stage.UDP: _decide_opaque,
    Stage.NTP: _decide_ntp,
}


# --- names and paths -----------------------------------------------------------------------------------------------


def _closed(policy: Policy, groups: Iterable[HostGroup], name: Hostname) -> tuple[Reason, HostRule] | None:
    """`deny: all` of the guard or of any matching pattern: the host is closed on every port and for DNS."""
    for group in policy.guard_table.matching(name):
        if group.deny_all:
            return Reason.GUARD, group.deny_all
    for group in groups:
        if group.deny_all:
            return Reason.DENY_RULE, group.deny_all
    return None


def _denied_path(
    policy: Policy, groups: Iterable[HostGroup], name: Hostname, method: str, path: Path
) -> tuple[Reason, HostRule] | None:
    """The first deny entry that means this request, of the guard or of any matching pattern, whatever its ports."""
    for reason, found in ((Reason.GUARD, policy.guard_table.matching(name)), (Reason.DENY_RULE, groups)):
        for group in found:
            for entry, rule in group.denies:
                if _means(entry, method) and entry.path and entry.path.denies(path):
                    return reason, rule
    return None


def _admitting_rule(rules: PortRules, method: str, path: Path) -> HostRule | None:
    if rules.allow is None:
        return rules.rules[0]
    for entry, rule in rules.allow:
        if _means(entry, method) and entry.path and entry.path.admits(path):
            return rule
    return None


def _means(entry: Entry, method: str) -> bool:
    return not entry.methods or method in entry.methods


def _covering(group: HostGroup, port: int) -> PortRules | None:
    for rules in group.ports:
        if port in rules.ports:
            return rules
    return None


def _admits_upgrade(rules: PortRules | None, protocol: str | None) -> bool:
    return protocol is None or (rules is not None and protocol in rules.upgrade)


def _allows_ech(index: WorkloadIndex, rules: PortRules | None) -> bool:
    return index.workload.ech if rules is None or rules.ech is None else rules.ech


def _admits_private(rule: AnyRule) -> bool:
    return not isinstance(rule, NameRule) and rule.private


def _day(attempt: Attempt) -> float:
    return attempt.time // 86400  # a time that is no number is after every `until`


# --- addresses and ports -------------------------------------------------------------------------------------------


def _decide_transport(table: TransportTable, policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict | None:
    """The verdict of `tcp:` or `udp:` rules: by the names that gave the address, then by the address. None: no rule."""
    misses: list[Verdict] = []
    closed: list[Verdict] = []
    for name in attempt.names:
        if denied := _closed(policy, index.hosts.matching(name), name):
            closed.append(_deny(attempt, *denied))
        elif rules := table.names.get(name):
            verdict = _carry_by_name(attempt, rules, name)
            if verdict.is_allow:
                return verdict
            misses.append(verdict)
    if closed:  # the address is a closed name's too, and no rule about addresses opens that
        return _nearest(closed)
    if attempt.address is None:
        return _nearest(misses)
    if not attempt.names and classify(attempt.address) is Reach.NEVER:
        return _deny(attempt, Reason.NEVER_REACHED)
    admitting: list[tuple[TransportRule, Verdict]] = []
    for rule, inside_private in table.prefixes.covering(attempt.address):
        if miss := _miss(rule, attempt):
            misses.append(_deny(attempt, miss, rule))
            continue
        verdict = admit(_carry(attempt, rule, Dial.ORIGINAL, private=inside_private), attempt.address)
        if verdict.is_allow:
            admitting.append((rule, verdict))
        else:
            misses.append(verdict)
    return min(admitting, key=lambda one: _strictness(one[0]))[1] if admitting else _nearest(misses)


def _decide_beside(index: WorkloadIndex, attempt: Attempt, groups: Sequence[HostGroup], name: Hostname) -> Verdict:
    """On a port that no host rule of `name` covers, a `tcp:` rule by that very name carries TLS and HTTP too."""
    if rules := index.tcp.names.get(name):
        return _carry_by_name(attempt, rules, name)
    return _deny(attempt, Reason.PORT, groups[0].rules[0]) if groups else _deny(attempt, Reason.NO_RULE)


def _carry_by_name(attempt: Attempt, rules: Iterable[TransportRule], name: Hostname) -> Verdict:
    misses: list[Verdict] = []
    admitting: list[TransportRule] = []
    for rule in rules:
        if miss := _miss(rule, attempt):
            misses.append(_deny(attempt, miss, rule))
        else:
            admitting.append(rule)
    if admitting:
        private = any(rule.private for rule in admitting)
        return _carry(attempt, min(admitting, key=_strictness), Dial.NAME, private=private, host=name)
    return max(misses, key=_nearness)  # a name stands in the table with one rule at least


def _miss(rule: TransportRule, attempt: Attempt) -> Reason | None:
    if not any_holds(rule.ports, attempt.port):
        return Reason.PORT
    if not is_valid(rule, _day(attempt)):
        return Reason.EXPIRED
    if rule.quic and attempt.host != rule.host:
        return Reason.NO_SNI if attempt.host is None else Reason.HOST_MISMATCH
    return None


def _strictness(rule: TransportRule) -> tuple[bool, float]:
    """Of several rules that admit one thing the least strict counts, in whatever order they stand: rules only grant."""
    return _is_quic(rule), -inf if rule.budget is None else -rule.budget


def _is_quic(rule: AnyRule | None) -> bool:
    return isinstance(rule, TransportRule) and rule.quic is not None


def _carry(
    attempt: Attempt, rule: TransportRule, dial: Dial, *, private: bool, host: Hostname | None = None
) -> Verdict:
    tls = Tls.PASSTHROUGH if attempt.stage is Stage.TLS else None
    return Verdict(Action.ALLOW, Reason.RULE, attempt.stage, rule, tls=tls, dial=dial, host=host, private=private)


# --- denials -------------------------------------------------------------------------------------------------------


def _deny(attempt: Attempt, reason: Reason, rule: AnyRule | None = None) -> Verdict:
    return Verdict(Action.DENY, reason, attempt.stage, rule)


def _nearest(misses: Sequence[Verdict]) -> Verdict | None:
    return max(misses, key=_nearness, default=None)


def _nearness(miss: Verdict) -> int:
    return _NEARNESS.index(miss.reason)


def _let_pass(index: WorkloadIndex, attempt: Attempt, denial: Verdict) -> Verdict:
    """Audit mode: the attempt passes undecrypted, to the name asked for or else to where it was going."""
    name = attempt.host or next(iter(attempt.names), None)
    groups = index.hosts.matching(name) if name else []
    rules = _covering(groups[0], attempt.port) if groups else None
    if attempt.stage in (Stage.TLS, Stage.UDP) and attempt.ech and not _allows_ech(index, rules):
        return _deny(attempt, Reason.ECH, denial.rule)
    if attempt.stage is Stage.HTTP and not _admits_upgrade(rules, attempt.upgrade):
        return _deny(attempt, Reason.UPGRADE, denial.rule)
    passed = replace(
        denial,
        action=Action.ALLOW,
        tls=Tls.PASSTHROUGH if attempt.stage is Stage.TLS else None,
        dial=Dial.NAME if name else Dial.ORIGINAL,
        host=name,
        private=name is not None and any(map(_admits_private, _dialled_rules(index, groups, name))),
        would_be=denial,
    )
    return passed if name or attempt.address is None else admit(passed, attempt.address)
