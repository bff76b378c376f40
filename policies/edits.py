"""The smallest edit of a policy that would allow one attempt, as YAML to paste. It writes no file.

Each edit is tried on the rules that touch the attempt, by the same engine: what does not end in an allow is not
proposed. The lines are written from the very rule that was tried. The narrowest comes first: one name, one path.
"""

from __future__ import annotations

import json
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
    HTTPS_PORT,
    AnyRule,
    Attempt,
    Entry,
    HostRule,
    Mode,
    NameRule,
    Network,
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
from policies.words import enforced, ladder

MAX_EDITS = 6  # one attempt can meet a deny, an expiry, a missing port and a missing entry, one after the other
RENEWAL = timedelta(days=30)

_PLAIN_SCALAR = re.compile(r"[a-z][a-z0-9_-]*(?:\.[a-z0-9_-]+)+(?::[0-9]+)?")  # a name with a dot is no YAML keyword


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


def render(rule: AnyRule) -> tuple[str, ...]:
    """A rule as YAML, one item of a `rules:` list. It writes the keys that an edit can contain."""
    match rule:
        case HostRule():
            return tuple(_host_lines(rule))
        case TransportRule():
            port = rule.ports[0]
            where = rule.host or next((_network_text(network) for network in rule.networks), rule.tag or "")
            return (f"- {rule.stage}: {_scalar(f'{where}:{port}')}",)
        case NameRule():
            return (f"- {rule.stage}: {_scalar(str(rule.pattern))}",)


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
    where = f"add to workloads.{workload.name} at {workload.place}"
    lines = ("rules:", *(f"  {line}" for line in render(rule)))
    return Edit(Change.ADD, "rules", workload.place, where, lines), changed


def _set_key[R: AnyRule](trial: _Trial, old: R, new: R, key: str, value: str) -> _Candidate:
    edit = Edit(Change.SET, key, old.place, f"set in {old}", (f"{key}: {value}",))
    return edit, _replaced(trial.workload, old, new)


def _replaced(workload: Workload, old: AnyRule, new: AnyRule | None) -> Workload:
    rules = (new if rule is old else rule for rule in workload.rules)
    return replace(workload, rules=tuple(rule for rule in rules if rule is not None))


# --- what to propose, by reason ------------------------------------------------------------------------------------


def _new_rule(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    """A rule for this very destination."""
    for rule in _narrow_rules(trial.workload, attempt):
        yield _add_rule(trial, rule)


def _same_pattern(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    """One more rule for the pattern that decides. A narrower pattern would take over its other ports as well."""
    group = deciding_group(trial.policy, attempt)
    if group is None or not isinstance(verdict.rule, HostRule):
        yield from _new_rule(trial, attempt, verdict)
        return
    for rule in _host_rules(trial.workload, attempt, group.rules[0].pattern):
        yield _add_rule(trial, rule)


def _allow_entry(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    entry = exact_entry(attempt)
    rule = verdict.rule
    if entry is None or not isinstance(rule, HostRule):
        return
    if rule.allow is not None and is_own(trial.workload.name, rule):
        edit = Edit(Change.ADD, "allow", rule.place, f"add to allow: of {rule}", (f"- {_quoted(entry.text)}",))
        yield edit, _replaced(trial.workload, rule, replace(rule, allow=(*rule.allow, entry)))
    else:
        yield from _same_pattern(trial, attempt, verdict)


def _renewal(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    rule = verdict.rule
    if rule is None or not is_own(trial.workload.name, rule):
        yield from _same_pattern(trial, attempt, verdict)
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
        whole = (f"- host: {_scalar(str(rule.pattern))}", "  deny: all")
        where = f"remove from workloads.{trial.workload.name}.rules at {rule.place}"
        yield Edit(Change.REMOVE, "rules", rule.place, where, whole), _replaced(trial.workload, rule, None)
        return
    kept = tuple(entry for entry in rule.deny if entry not in entries)
    lines = tuple(f"- {_quoted(entry.text)}" for entry in entries)
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
        if not any(attempt.port in ports for ports in (*rule.ports, *rule.plain)):  # else it would go round inspection
            yield from _new_rule(trial, attempt, verdict)
    elif attempt.plain and attempt.port != HTTPS_PORT.first and is_own(trial.workload.name, rule):
        plain = (*rule.plain, PortRange(attempt.port, attempt.port))
        yield _set_key(trial, rule, replace(rule, plain=plain), "plain", _ports_text(plain))


def _ech(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    rule = verdict.rule
    if not isinstance(rule, HostRule):
        return
    if is_own(trial.workload.name, rule):
        yield _set_key(trial, rule, replace(rule, ech=True), "ech", "allow")
    else:
        for same in _host_rules(trial.workload, attempt, rule.pattern):
            yield _add_rule(trial, replace(same, ech=True))


def _upgrade(trial: _Trial, attempt: Attempt, verdict: Verdict) -> Iterator[_Candidate]:
    rule = verdict.rule
    if attempt.upgrade != "websocket" or not isinstance(rule, HostRule):  # h2c is refused whatever a rule says
        return
    upgrade = frozenset({"websocket"})
    if is_own(trial.workload.name, rule):
        yield _set_key(trial, rule, replace(rule, upgrade=upgrade), "upgrade", "[websocket]")
    else:
        for same in _host_rules(trial.workload, attempt, rule.pattern):
            yield _add_rule(trial, replace(same, upgrade=upgrade))


# A reason that is not here is opened by no edit: explain.ADVICE says what to do instead.
_PROPOSALS: dict[Reason, _Propose] = {
    Reason.NO_RULE: _new_rule,
    Reason.NO_SNI: _new_rule,
    Reason.ANCESTOR: _new_rule,
    Reason.PRIVATE_ADDRESS: _new_rule,
    Reason.PORT: _same_pattern,
    Reason.NO_ALLOW_ENTRY: _allow_entry,
    Reason.EXPIRED: _renewal,
    Reason.DENY_RULE: _removal,
    Reason.WRONG_PROTOCOL: _other_protocol,
    Reason.ECH: _ech,
    Reason.UPGRADE: _upgrade,
}


# --- rules ---------------------------------------------------------------------------------------------------------


def _narrow_rules(workload: Workload, attempt: Attempt) -> Iterator[AnyRule]:
    """The narrowest rule for the destination of `attempt`, and after it what may be tried instead."""
    place, label = workload.place, _new_label(workload)
    name = attempt.host or next(iter(attempt.names), None)
    match attempt.stage:
        case Stage.HTTP | Stage.TLS if attempt.host:
            yield from _host_rules(workload, attempt, Pattern(attempt.host, wildcard=False))
        case Stage.NTP | Stage.DNS if name:
            yield NameRule(place=place, label=label, stage=attempt.stage, pattern=Pattern(name, wildcard=False))
        case Stage.TCP | Stage.UDP | Stage.TLS if name or attempt.address:
            yield TransportRule(
                place=place,
                label=label,
                stage=Stage.UDP if attempt.stage is Stage.UDP else Stage.TCP,
                host=name,
                networks=() if name or not attempt.address else (ip_network(attempt.address),),
                ports=(PortRange(attempt.port, attempt.port),),
            )


def _host_rules(workload: Workload, attempt: Attempt, pattern: Pattern) -> Iterator[HostRule]:
    port = (PortRange(attempt.port, attempt.port),)
    rule = HostRule(place=workload.place, label=_new_label(workload), pattern=pattern, ports=port)
    if attempt.stage is Stage.TLS:
        yield rule
        yield replace(rule, tls=Tls.INSPECT)  # where an inherited deny has a path, it must be seen
    elif entry := exact_entry(attempt):
        plain = port if attempt.plain and attempt.port != PLAIN_PORT.first else ()
        tls = Tls.PASSTHROUGH if attempt.plain else Tls.INSPECT
        yield replace(rule, plain=plain, tls=tls, allow=(entry,))


def _new_label(workload: Workload) -> str:
    return f"{workload.name}/rules[{len(workload.rules)}]"


# --- YAML ----------------------------------------------------------------------------------------------------------


def _host_lines(rule: HostRule) -> Iterator[str]:
    yield f"- host: {_scalar(str(rule.pattern))}"
    if rule.ports != (HTTPS_PORT,):
        yield f"  ports: {_ports_text(rule.ports)}"
    if rule.plain:
        yield f"  plain: {_ports_text(rule.plain)}"
    if rule.tls is Tls.INSPECT:
        yield "  tls: inspect"
    if rule.allow is not None:
        yield f"  allow: [{', '.join(_quoted(entry.text) for entry in rule.allow)}]"
    if rule.ech:
        yield "  ech: allow"
    if rule.upgrade:
        yield f"  upgrade: [{', '.join(sorted(rule.upgrade))}]"


def _ports_text(ports: Iterable[PortRange]) -> str:
    return f"[{', '.join(map(str, ports))}]"


def _network_text(network: Network) -> str:
    text = str(network.network_address if network.num_addresses == 1 else network)
    return f"[{text}]" if network.version == 6 else text


def _scalar(text: str) -> str:
    return text if _PLAIN_SCALAR.fullmatch(text) else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML one


def _segment(segment: str) -> str:
    """A decoded segment as a pattern; `*` (any one segment) where a pattern has no way to say just this one."""
    return "*" if re.search(r"[*%?#<>\\/\s\x00-\x1f\x7f-\x9f]", segment) else segment
