"""The smallest edit of a policy that would allow one attempt, as YAML to paste. It writes no file.

Each edit is tried on the rules that touch the attempt, by the same engine: what does not end in an allow is not
proposed. The lines are written from the very rule that was tried. The narrowest comes first: one name, one path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from enum import StrEnum
from ipaddress import ip_network

from policies.errors import PolicyError
from policies.hostnames import Pattern
from policies.index import EPOCH, PLAIN_PORT, HostGroup, Policy, build
from policies.model import (
    ELSEWHERE,
    HTTPS_PORT,
    AnyRule,
    Attempt,
    Entry,
    HostRule,
    Mode,
    NameRule,
    Place,
    PortRange,
    Reason,
    Stage,
    Tls,
    TransportRule,
    Verdict,
    Workload,
)
from policies.paths import MalformedPath, MalformedPattern, parse_path, parse_path_pattern
from policies.render import list_text, quoted, render, scalar
from policies.words import enforced, ladder

MAX_EDITS = 6  # one attempt can meet a deny, an expiry, a missing port and a missing entry, one after the other
RENEWAL = timedelta(days=30)
NEW = "new"  # the label of a rule that stands in no file yet
UPGRADES = frozenset({"websocket"})  # h2c is refused whatever a rule says


class Change(StrEnum):
    ADD = "add"
    SET = "set"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of the file at `place`.

    key    `rules` of the workload (the item to add or to remove), or the key of the rule at `place` that changes
    where  the same in words: `add to workloads.weather.rules at weather.yaml:7`
    lines  YAML to paste, or what is to go
    """

    change: Change
    key: str
    place: Place
    where: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """The edits that together allow an attempt; or none, and the denial that no edit should or could open."""

    edits: tuple[Edit, ...] = ()
    obstacle: Verdict | None = None


@dataclass(frozen=True, slots=True)
class _Trial:
    """The rules that touch the attempt, compiled. `anchor` is the first own rule of the whole workload."""

    workload: Workload
    policy: Policy
    anchor: Place | None


type _Candidate = tuple[Edit, Workload]
type _Propose = Callable[[_Trial, Attempt, Verdict], Iterator[_Candidate]]


def propose(policy: Policy, attempt: Attempt) -> Proposal:
    """The smallest edit for `attempt`, step by step: each edit is judged, and answers the denial that it meets next."""
    verdict = enforced(ladder(policy, attempt))
    workload = policy.workloads.get(attempt.workload)
    if verdict.is_allow or workload is None:
        return Proposal(obstacle=None if verdict.is_allow else verdict)
    touching = tuple(_touching(workload.rules, attempt))
    anchor = next((rule.place for rule in workload.rules if is_own(workload.name, rule)), None)
    trial = _try(replace(workload, mode=Mode.ENFORCE, match=None, rules=touching), policy, anchor)
    edits: list[Edit] = []
    while trial is not None and len(edits) < MAX_EDITS:
        verdict = enforced(ladder(trial.policy, attempt))
        if verdict.is_allow:
            return Proposal(tuple(edits))
        edit, trial = _next_edit(trial, attempt, verdict)
        if edit is not None:
            edits.append(edit)
    return Proposal(obstacle=verdict)


def exact_entry(attempt: Attempt) -> Entry | None:
    """The `allow` entry for the method and path of `attempt` and, as far as patterns can say it, for nothing else."""
    try:
        path = parse_path(attempt.target, encoded_slash=True)
        text = "/" + "/".join(map(_segment, path.segments))
        return Entry(frozenset({attempt.method}), parse_path_pattern(text), f"{attempt.method} {text}")
    except (MalformedPath, MalformedPattern):
        return None


def denying_entries(rule: AnyRule | None, attempt: Attempt) -> tuple[Entry, ...]:
    """The deny entries of `rule` that match `attempt`."""
    if not isinstance(rule, HostRule):
        return ()
    try:
        path = parse_path(attempt.target, encoded_slash=True)
    except MalformedPath:
        path = None
    return tuple(
        entry
        for entry in rule.deny
        if entry.path is None
        or (path and entry.path.denies(path) and (not entry.methods or attempt.method in entry.methods))
    )


def is_own(workload: str, rule: AnyRule) -> bool:
    """Whether the rule stands in the workload's own `rules`, so that an edit of it changes no other workload."""
    return rule.label.startswith(f"{workload}/rules[")


def deciding_group(policy: Policy, attempt: Attempt) -> HostGroup | None:
    """The rules of the most specific pattern, which alone decides."""
    index = policy.index.get(attempt.workload)
    groups = index.hosts.matching(attempt.host) if index and attempt.host else []
    return groups[0] if groups else None


# --- trying --------------------------------------------------------------------------------------------------------


def _touching(rules: Iterable[AnyRule], attempt: Attempt) -> Iterator[AnyRule]:
    """The rules that can bear on `attempt`. Trying an edit then costs the same with ten rules and with 100,000."""
    names = {name for name in (attempt.host, attempt.opened_for, *attempt.names) if name}
    for rule in rules:
        if isinstance(rule, TransportRule):
            if rule.host in names or (attempt.address and any(attempt.address in net for net in rule.networks)):
                yield rule
        elif any(map(rule.pattern.matches, names)) or (not names and attempt.stage is Stage.NTP):
            yield rule


def _try(workload: Workload, policy: Policy, anchor: Place | None) -> _Trial | None:
    """None where the rules contradict one another, which loading would refuse."""
    try:
        return _Trial(workload, build({workload.name: workload}, policy.guard), anchor)
    except PolicyError:
        return None


def _next_edit(trial: _Trial, attempt: Attempt, verdict: Verdict) -> tuple[Edit | None, _Trial | None]:
    proposals = _PROPOSALS.get(verdict.reason)
    for edit, workload in proposals(trial, attempt, verdict) if proposals else ():
        if changed := _try(workload, trial.policy, trial.anchor):
            return edit, changed
    return None, None


def _add_rule(trial: _Trial, rule: AnyRule) -> _Candidate:
    workload = trial.workload
    changed = replace(workload, rules=(*workload.rules, rule))
    if trial.anchor is not None:
        where = f"add to workloads.{workload.name}.rules at {trial.anchor}"
        return Edit(Change.ADD, "rules", trial.anchor, where, render(rule)), changed
    where = f"set in workloads.{workload.name} at {workload.place}"
    lines = ("rules:", *(f"  {line}" for line in render(rule)))
    return Edit(Change.SET, "rules", workload.place, where, lines), changed


def _set_key[R: AnyRule](trial: _Trial, old: R, new: R, key: str, value: str) -> _Candidate:
    edit = Edit(Change.SET, key, old.place, f"set in {old}", (f"{key}: {value}",))
    return edit, _replaced(trial.workload, old, new)


def _replaced(workload: Workload, old: AnyRule, new: AnyRule | None) -> Workload:
    rules = (new if rule is old else rule for rule in workload.rules)
    return replace(workload, rules=tuple(rule for rule in rules if rule is not None))


# --- what to propose, by reason ------------------------------------------------------------------------------------


def _new_rule(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    """A rule for this very destination. Never one for opaque bytes on a port of a host rule: they would go round it."""
    if attempt.stage in (Stage.TCP, Stage.UDP) and _is_host_port(trial, attempt):
        return
    if attempt.stage is Stage.UDP and attempt.port in ELSEWHERE:
        return  # the rule would admit it, and nothing would carry it
    for rule in _narrow_rules(trial, attempt):
        yield _add_rule(trial, rule)


def _is_host_port(trial: _Trial, attempt: Attempt) -> bool:
    hosts = trial.policy.index[attempt.workload].hosts
    groups = [group for name in attempt.names for group in hosts.matching(name)[:1]]
    return any(attempt.port in ports.ports for group in groups for ports in group.ports)


def _allow_entry(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    entry = exact_entry(attempt)
    rule = verdict.rule
    if entry is None or not isinstance(rule, HostRule):
        return
    if rule.allow is not None and is_own(trial.workload.name, rule):
        edit = Edit(Change.ADD, "allow", rule.place, f"add to allow: of {rule}", (f"- {quoted(entry.text)}",))
        yield edit, _replaced(trial.workload, rule, replace(rule, allow=(*rule.allow, entry)))
    else:
        yield from _new_rule(trial, attempt, verdict)


def _renewal(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    rule = verdict.rule
    if rule is None or not is_own(trial.workload.name, rule):
        yield from _new_rule(trial, attempt, verdict)
        return
    until = date.fromordinal(int(attempt.time // 86400) + EPOCH) + RENEWAL
    yield _set_key(trial, rule, replace(rule, until=until), "until", until.isoformat())


def _removal(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    rule = verdict.rule
    if not isinstance(rule, HostRule) or not is_own(trial.workload.name, rule):
        return  # a set denies for everyone who uses it
    entries = denying_entries(rule, attempt)
    if not entries:
        return
    if any(entry.is_all for entry in entries):
        # Without its `deny: all` the rule would open the whole host, so the rule goes.
        whole = (f"- host: {scalar(str(rule.pattern))}", "  deny: all")
        where = f"remove from workloads.{trial.workload.name}.rules at {rule.place}"
        yield Edit(Change.REMOVE, "rules", rule.place, where, whole), _replaced(trial.workload, rule, None)
        return
    kept = tuple(entry for entry in rule.deny if entry not in entries)
    lines = tuple(f"- {quoted(entry.text)}" for entry in entries)
    if kept:
        edit = Edit(Change.REMOVE, "deny", rule.place, f"remove from deny: of {rule}", lines)
    else:  # an empty list is an error
        edit = Edit(Change.REMOVE, "deny", rule.place, f"remove from {rule}", ("deny:", *(f"  {x}" for x in lines)))
    yield edit, _replaced(trial.workload, rule, replace(rule, deny=kept))


def _other_protocol(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    rule = verdict.rule
    if not isinstance(rule, HostRule):
        return
    if attempt.stage in (Stage.TCP, Stage.UDP):
        yield from _new_rule(trial, attempt, verdict)
    elif attempt.plain and attempt.port != HTTPS_PORT.first and is_own(trial.workload.name, rule):
        plain = (*rule.plain, PortRange(attempt.port, attempt.port))
        yield _set_key(trial, rule, replace(rule, plain=plain), "plain", list_text(plain))


def _ech(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    rule = verdict.rule
    if isinstance(rule, HostRule) and is_own(trial.workload.name, rule):
        yield _set_key(trial, rule, replace(rule, ech=True), "ech", "allow")
    else:
        yield from _new_rule(trial, attempt, verdict)


def _upgrade(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    rule = verdict.rule
    if isinstance(rule, HostRule) and is_own(trial.workload.name, rule) and attempt.upgrade in UPGRADES:
        yield _set_key(trial, rule, replace(rule, upgrade=UPGRADES), "upgrade", list_text(UPGRADES))
    else:
        yield from _new_rule(trial, attempt, verdict)


# A reason that is not here is opened by no edit: explain.ADVICE says what to do instead.
_PROPOSALS: dict[Reason, _Propose] = {
    Reason.NO_RULE: _new_rule,
    Reason.NO_SNI: _new_rule,
    Reason.ANCESTOR: _new_rule,
    Reason.PRIVATE_ADDRESS: _new_rule,
    Reason.PORT: _new_rule,
    Reason.NO_ALLOW_ENTRY: _allow_entry,
    Reason.EXPIRED: _renewal,
    Reason.DENY_RULE: _removal,
    Reason.WRONG_PROTOCOL: _other_protocol,
    Reason.ECH: _ech,
    Reason.UPGRADE: _upgrade,
}


# --- rules ---------------------------------------------------------------------------------------------------------


def _narrow_rules(trial: _Trial, attempt: Attempt) -> Iterator[AnyRule]:
    """The narrowest rule for the destination of `attempt`, and after it what may be tried instead."""
    place = trial.workload.place
    name = attempt.host or next(iter(attempt.names), None)
    match attempt.stage:
        case Stage.HTTP | Stage.TLS if attempt.host:
            # A pattern narrower than the one that decides would take over its other ports as well.
            group = deciding_group(trial.policy, attempt)
            pattern = group.rules[0].pattern if group else Pattern(attempt.host, wildcard=False)
            yield from _host_rules(place, attempt, pattern)
        case Stage.NTP | Stage.DNS if name:
            yield NameRule(place=place, label=NEW, stage=attempt.stage, pattern=Pattern(name, wildcard=False))
        case Stage.TCP | Stage.UDP | Stage.TLS if name or attempt.address:
            yield TransportRule(
                place=place,
                label=NEW,
                stage=Stage.UDP if attempt.stage is Stage.UDP else Stage.TCP,
                host=name,
                networks=() if name or not attempt.address else (ip_network(attempt.address),),
                ports=(PortRange(attempt.port, attempt.port),),
                quic="sni" if attempt.stage is Stage.UDP and attempt.host else None,
            )


def _host_rules(place: Place, attempt: Attempt, pattern: Pattern) -> Iterator[HostRule]:
    port = (PortRange(attempt.port, attempt.port),)
    rule = HostRule(place=place, label=NEW, pattern=pattern, ports=port, ech=attempt.ech or None)
    if attempt.stage is Stage.HTTP and (entry := exact_entry(attempt)):
        yield replace(
            rule,
            plain=port if attempt.plain and attempt.port != PLAIN_PORT.first else (),
            tls=Tls.PASSTHROUGH if attempt.plain else Tls.INSPECT,
            allow=(entry,),
            upgrade=UPGRADES & {attempt.upgrade},
            ech=None,
        )
    if not attempt.plain:
        yield rule  # for a request: where another rule of the pattern carries this port undecrypted
        yield replace(rule, tls=Tls.INSPECT)  # where an inherited deny has a path, it must be seen


def _segment(segment: str) -> str:
    """A decoded segment as a pattern; `*` (any one segment) where a pattern has no way to say just this one."""
    return "*" if re.search(r"[*%?#<>\\/\s\x00-\x1f\x7f-\x9f]", segment) else segment
