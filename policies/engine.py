"""The verdict: `decide(policy, attempt)`, and `admit(verdict, address)` for the address about to be dialled.

Every part that lets a byte out asks these two (the listener, the addons, the DNS answers, the relays), and so do `why`
and `test`. Order of checks is order on the page. Nothing here reads a clock, a file or a socket.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum, auto

from policies.addresses import Reach, classify
from policies.hostnames import Hostname, parents
from policies.index import HostGroup, HostTable, Policy, PortRules, TransportTable, WorkloadIndex, is_valid, live
from policies.model import (
    UNKNOWN,
    Action,
    Address,
    AnyRule,
    Attempt,
    Dial,
    Entry,
    HostRule,
    Mode,
    Reason,
    Stage,
    Tls,
    TransportRule,
    Verdict,
)
from policies.paths import MalformedPath, parse_path

QUERY_TYPES = frozenset({"A", "AAAA"})  # every other type of an allowed name exists and is empty
METHOD = re.compile(
    r"[A-Z]+(?:[-_][A-Z]+)*"
)  # a lower-case method is another method to us, and the same one to some servers

# What audit mode lets pass: a missing or denying rule. Malformed input, a Host that is not the SNI, ECH, the guard and
# never-reached addresses stay denied.
AUDITED = frozenset(
    {
        Reason.NO_RULE,
        Reason.PORT,
        Reason.DENY_RULE,
        Reason.NO_ALLOW_ENTRY,
        Reason.EXPIRED,
        Reason.ANCESTOR,
        Reason.NO_SNI,
    }
)


class Expect(Enum):
    """How the listener opens a port of a workload."""

    PEEK = auto()  # TLS or HTTP: the first bytes name the host
    OPAQUE = auto()  # only `tcp:` rules cover it: relay at once, the server may speak first
    EITHER = auto()  # both: peek, and take silence for opaque


def decide(policy: Policy, attempt: Attempt) -> Verdict:
    """The verdict on one attempt at one stage. Total: every attempt gets one, and an unknown state is a denial."""
    if attempt.fault:
        return _deny(attempt, attempt.fault)
    index = policy.index.get(attempt.workload)
    if index is None:
        return _deny(attempt, Reason.UNKNOWN_WORKLOAD)
    verdict = _JUDGES[attempt.stage](policy, index, attempt)
    if index.workload.mode is Mode.AUDIT and not verdict.is_allow and verdict.reason in AUDITED:
        return _let_pass(attempt, verdict)
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


def identify(policy: Policy, address: Address) -> str:
    """The workload of a source address: the longest prefix that holds it, else `unknown`."""
    found = policy.sources.covering(address)
    return found[0] if found else UNKNOWN


def expect(policy: Policy, workload: str, port: int) -> Expect:
    """What may arrive on `port` of `workload`."""
    index = policy.index.get(workload)
    if index is None or not any(port in ports for ports in index.tcp.ports):
        return Expect.PEEK
    return Expect.EITHER if any(port in ports for ports in index.host_ports) else Expect.OPAQUE


def carries_plain(policy: Policy, workload: str, port: int) -> bool:
    """Whether a host rule of `workload` carries plain HTTP on `port`; port 80 always counts as plain."""
    index = policy.index.get(workload)
    return port == 80 or (index is not None and any(port in ports for ports in index.plain_ports))


# --- names ---------------------------------------------------------------------------------------------------------


def _deny_all(policy: Policy, groups: Iterable[HostGroup], name: Hostname) -> tuple[Reason, HostRule] | None:
    """`deny: all` of the guard or of any matching pattern: the host is closed on every port and for DNS."""
    for group in policy.guard_table.matching(name):
        if group.deny_all:
            return Reason.GUARD, group.deny_all
    for group in groups:
        if group.deny_all:
            return Reason.DENY_RULE, group.deny_all
    return None


def _covering(group: HostGroup, port: int) -> PortRules | None:
    for rules in group.ports:
        if port in rules.ports:
            return rules
    return None


def _day(attempt: Attempt) -> int:
    return int(attempt.time // 86400)


# --- stages --------------------------------------------------------------------------------------------------------


def _decide_tls(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    name = attempt.host
    if name is None:
        return _decide_transport(index.tcp, policy, index, attempt) or _deny(attempt, Reason.NO_SNI)
    groups = index.hosts.matching(name)
    if denied := _deny_all(policy, groups, name):
        return _deny(attempt, *denied)
    if not groups:
        named = replace(attempt, names=(*attempt.names, name))  # a `tcp:` rule by name carries TLS to that name too
        return _decide_transport(index.tcp, policy, index, named) or _deny(attempt, Reason.NO_RULE)
    group = groups[0]
    rules = _covering(group, attempt.port)
    if rules is None:
        return _deny(attempt, Reason.PORT, group.rules[0])
    if rules.plain:
        return _deny(attempt, Reason.WRONG_PROTOCOL, rules.rules[0])
    current = live(rules, _day(attempt))
    if current is None:
        return _deny(attempt, Reason.EXPIRED, rules.rules[0])
    if current.tls is Tls.PASSTHROUGH:
        if attempt.ech and not (index.workload.ech if current.ech is None else current.ech):
            return _deny(attempt, Reason.ECH, current.rules[0])
        if unseen := _first_deny_entry(policy, groups, name):  # loading refuses this; if it ever passes, stay closed
            return _deny(attempt, *unseen)
    return current.admitted


def _first_deny_entry(policy: Policy, groups: Iterable[HostGroup], name: Hostname) -> tuple[Reason, HostRule] | None:
    for group in policy.guard_table.matching(name):
        if group.denies:
            return Reason.GUARD, group.denies[0][1]
    for group in groups:
        if group.denies:
            return Reason.DENY_RULE, group.denies[0][1]
    return None


def _decide_http(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    name = attempt.host
    if name is None or not METHOD.fullmatch(attempt.method):
        return _deny(attempt, Reason.MALFORMED_REQUEST)
    if attempt.opened_for is not None and attempt.opened_for != name:
        return _deny(attempt, Reason.HOST_MISMATCH)
    groups = index.hosts.matching(name)
    if denied := _deny_all(policy, groups, name):
        return _deny(attempt, *denied)
    if not groups:
        return _deny(attempt, Reason.NO_RULE)
    rules = _covering(groups[0], attempt.port)
    try:
        path = parse_path(attempt.target, encoded_slash=rules is not None and rules.encoded_slash)
    except MalformedPath:
        return _deny(attempt, Reason.MALFORMED_PATH, groups[0].rules[0])

    def matches(entries: Iterable[tuple[Entry, HostRule]]) -> HostRule | None:
        for entry, rule in entries:
            if (not entry.methods or attempt.method in entry.methods) and entry.path and entry.path.denies(path):
                return rule
        return None

    for group in policy.guard_table.matching(name):
        if rule := matches(group.denies):
            return _deny(attempt, Reason.GUARD, rule)
    for group in groups:
        if rule := matches(group.denies):
            return _deny(attempt, Reason.DENY_RULE, rule)
    if rules is None:
        return _deny(attempt, Reason.PORT, groups[0].rules[0])
    if rules.plain is not attempt.plain:
        return _deny(attempt, Reason.WRONG_PROTOCOL, rules.rules[0])
    current = live(rules, _day(attempt))
    if current is None:
        return _deny(attempt, Reason.EXPIRED, rules.rules[0])
    admitting: HostRule | None = current.rules[0]
    if current.allow is not None:
        admitting = None
        for entry, rule in current.allow:
            if (not entry.methods or attempt.method in entry.methods) and entry.path and entry.path.admits(path):
                admitting = rule
                break
    if admitting is None:
        return _deny(attempt, Reason.NO_ALLOW_ENTRY, current.rules[0])
    if attempt.upgrade is not None and attempt.upgrade not in current.upgrade:
        return _deny(attempt, Reason.UPGRADE, admitting)
    return Verdict(Action.ALLOW, Reason.RULE, Stage.HTTP, admitting, private=current.private)


def _decide_dns(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    name = attempt.host
    if name is None:
        return _deny(attempt, Reason.MALFORMED_QUERY)
    groups = index.hosts.matching(name)
    if denied := _deny_all(policy, groups, name):
        return _deny(attempt, *denied)
    granted, expired = _lookup_grant(index, groups, name, _day(attempt))
    if granted is None:
        if expired:
            return _deny(attempt, Reason.EXPIRED, expired)
        return _deny(attempt, Reason.ANCESTOR if name in index.ancestors else Reason.NO_RULE)
    rule, private = granted
    if attempt.query_type not in QUERY_TYPES:
        return _deny(attempt, Reason.QUERY_TYPE, rule)
    return Verdict(Action.ALLOW, Reason.RULE, Stage.DNS, rule, private=private)


def _lookup_grant(
    index: WorkloadIndex, groups: list[HostGroup], name: Hostname, day: int
) -> tuple[tuple[AnyRule, bool] | None, AnyRule | None]:
    """The rule that admits a lookup of `name` and whether private answers are meant; else the expired one that did."""
    expired: AnyRule | None = None
    if groups:
        for rules in groups[0].ports:
            if current := live(rules, day):
                return (current.rules[0], any(r.private for r in groups[0].rules if is_valid(r, day))), None
            expired = rules.rules[0]
    for transport in (*index.tcp.names.get(name, ()), *index.udp.names.get(name, ())):
        if is_valid(transport, day):
            return (transport, transport.private), None
        expired = expired or transport
    named = [index.ntp.get(name), index.dns.get((name, False))]
    named += [index.dns.get((above, True)) for above in parents(name)] if index.dns else []
    for rule in (rule for rules_ in named if rules_ for rule in rules_):
        if is_valid(rule, day):
            return (
                rule,
                rule.stage is Stage.DNS,
            ), None  # a `dns:` name is looked up, not dialled: any answer may be seen
        expired = expired or rule
    return None, expired


def _decide_tcp(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    return _decide_transport(index.tcp, policy, index, attempt) or _deny_address(policy, index, attempt)


def _decide_udp(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    return _decide_transport(index.udp, policy, index, attempt) or _deny_address(policy, index, attempt)


def _decide_ntp(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    """Any `ntp` rule admits UDP/123 from its workload (`host` None: a packet); the relay answers for every address."""
    name = attempt.host
    if name is not None and (denied := _deny_all(policy, index.hosts.matching(name), name)):
        return _deny(attempt, *denied)
    found = index.ntp.get(name, ()) if name is not None else [rule for rules in index.ntp.values() for rule in rules]
    for rule in found:
        if is_valid(rule, _day(attempt)):
            return Verdict(Action.ALLOW, Reason.RULE, Stage.NTP, rule)
    return _deny(attempt, Reason.EXPIRED, found[0]) if found else _deny(attempt, Reason.NO_RULE)


_JUDGES = {
    Stage.DNS: _decide_dns,
    Stage.TLS: _decide_tls,
    Stage.HTTP: _decide_http,
    Stage.TCP: _decide_tcp,
    Stage.UDP: _decide_udp,
    Stage.NTP: _decide_ntp,
}


# --- addresses and ports -------------------------------------------------------------------------------------------


def _decide_transport(table: TransportTable, policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict | None:
    """The verdict of `tcp:` or `udp:` rules: by the names that gave the address, then by the address. None: no rule."""
    day = _day(attempt)
    missed: Verdict | None = None
    for name in attempt.names:
        rules = table.names.get(name, ())
        if rules and (denied := _deny_all(policy, index.hosts.matching(name), name)):
            missed = _deny(attempt, *denied)
            continue
        for rule in rules:
            if _port_admits(rule, attempt.port):
                if is_valid(rule, day):
                    return _carry(attempt, rule, dial=Dial.NAME, host=name, private=rule.private)
                missed = _deny(attempt, Reason.EXPIRED, rule)
            else:
                missed = missed or _deny(attempt, Reason.PORT, rule)
    if attempt.address is not None:
        for rule, inside_private in table.prefixes.covering(attempt.address):
            if _port_admits(rule, attempt.port):
                if is_valid(rule, day):
                    verdict = _carry(attempt, rule, dial=Dial.ORIGINAL, private=inside_private)
                    return admit(verdict, attempt.address)
                missed = _deny(attempt, Reason.EXPIRED, rule)
            else:
                missed = missed or _deny(attempt, Reason.PORT, rule)
    return missed


def _port_admits(rule: TransportRule, port: int) -> bool:
    return any(port in ports for ports in rule.ports)


def _carry(
    attempt: Attempt, rule: TransportRule, *, dial: Dial, private: bool, host: Hostname | None = None
) -> Verdict:
    tls = Tls.PASSTHROUGH if attempt.stage is Stage.TLS else None
    return Verdict(Action.ALLOW, Reason.RULE, attempt.stage, rule, tls=tls, dial=dial, host=host, private=private)


def _deny_address(policy: Policy, index: WorkloadIndex, attempt: Attempt) -> Verdict:
    for name in attempt.names:
        groups = index.hosts.matching(name)
        if denied := _deny_all(policy, groups, name):
            return _deny(attempt, *denied)
        if groups:  # opaque bytes where the host rule expects TLS or HTTP
            return _deny(attempt, Reason.WRONG_PROTOCOL, groups[0].rules[0])
    if attempt.address is not None and classify(attempt.address) is Reach.NEVER:
        return _deny(attempt, Reason.NEVER_REACHED)
    return _deny(attempt, Reason.NO_RULE)


def _deny(attempt: Attempt, reason: Reason, rule: AnyRule | None = None) -> Verdict:
    return Verdict(Action.DENY, reason, attempt.stage, rule)


def _let_pass(attempt: Attempt, denial: Verdict) -> Verdict:
    """Audit mode: the attempt passes undecrypted, to the name asked for or else to where it was going."""
    tls = Tls.PASSTHROUGH if attempt.stage is Stage.TLS else None
    name = attempt.host or next(iter(attempt.names), None)
    dial = Dial.NAME if name is not None else Dial.ORIGINAL
    passed = Verdict(
        Action.ALLOW, denial.reason, attempt.stage, denial.rule, tls=tls, dial=dial, host=name, would_be=denial
    )
    return passed if dial is Dial.NAME or attempt.address is None else admit(passed, attempt.address)


__all__ = ["Expect", "HostTable", "admit", "carries_plain", "decide", "expect", "identify"]
