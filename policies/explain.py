"""Why an attempt is refused: the rule that came nearest, what it missed by, the smallest edit. Nothing is decided here.

All of this may scan the whole policy, so it is worked out when a person asks and never on the gate's way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network
from itertools import islice

from policies.addresses import Reach, classify
from policies.edits import Edit, deciding_group, denying_entries, is_own, propose
from policies.errors import PolicyError
from policies.hostnames import Hostname
from policies.index import HostGroup, Policy, build
from policies.model import (
    ELSEWHERE,
    Address,
    AnyRule,
    Attempt,
    Entry,
    HostRule,
    Mode,
    Network,
    PortRange,
    Reason,
    Stage,
    TransportRule,
    Verdict,
)
from policies.paths import MalformedPath, parse_path
from policies.render import bracketed
from policies.words import Step, enforced, ladder

MAX_NEAREST = 2


@dataclass(frozen=True, slots=True)
class Miss:
    """A rule that does not admit the attempt, and what it missed by."""

    rule: AnyRule
    by: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `why` tells. `nearest`, `edits` and `advice` are empty where the attempt is allowed.

    verdict  as enforcement gives it; in audit mode the gate lets pass what this denies
    because  the reason in one sentence
    edits    all of them together allow the attempt; empty where no edit should, and then `advice` says what to do
    """

    steps: tuple[Step, ...]
    verdict: Verdict
    because: str
    nearest: tuple[Miss, ...] = ()
    edits: tuple[Edit, ...] = ()
    advice: str = ""


def explain(policy: Policy, attempt: Attempt) -> Explanation:
    """The verdict on `attempt` with everything a person needs to change it, or to see why it should not be changed."""
    steps = ladder(policy, attempt)
    verdict = enforced(steps)
    if verdict.is_allow:
        return Explanation(steps, verdict, because(steps))
    judged = _judged(steps, verdict)
    proposal = propose(policy, attempt)
    nearest = tuple(islice(_nearest(policy, judged, verdict), MAX_NEAREST))
    advice = _advice(proposal.obstacle, judged) if proposal.obstacle else ""
    return Explanation(steps, verdict, because(steps), nearest, proposal.edits, advice)


def because(steps: Sequence[Step]) -> str:
    """The reason of a ladder's answer in one sentence."""
    verdict = enforced(steps)
    return _sentence(verdict, _judged(steps, verdict))


def _judged(steps: Sequence[Step], verdict: Verdict) -> Attempt:
    return next(step.attempt for step in reversed(steps) if step.stage is verdict.stage)


# --- the reason in a sentence --------------------------------------------------------------------------------------


def destination(attempt: Attempt) -> str:
    """What was asked for: `dataservice.accuweather.com`, or `10.20.3.4`."""
    return attempt.host or next(iter(attempt.names), None) or (str(attempt.address) if attempt.address else "it")


def _sentence(verdict: Verdict, attempt: Attempt) -> str:
    text = _BECAUSE.get(verdict.reason, "the policy admits this; the gate or the far end could not")
    if verdict.reason is Reason.NO_SNI and attempt.stage is Stage.UDP:
        text = "the rule for {to} admits QUIC that shows this name, and no other datagrams"
    entries = denying_entries(verdict.rule, attempt)
    return text.format(
        to=destination(attempt),
        port=attempt.port,
        stage=attempt.stage,
        workload=attempt.workload,
        names="covers" if attempt.address else "names",
        request=f"{attempt.method} {attempt.target.partition('?')[0]}",
        opened=attempt.opened_for,
        entry=_entry(entries),
        until=verdict.rule.until if verdict.rule else "",
        query=attempt.query_type,
        upgrade=attempt.upgrade,
        fault=_fault(attempt),
    )


def _entry(entries: Sequence[Entry]) -> str:
    if not entries or entries[0].is_all:
        return "deny: all closes it"
    return f'"{entries[0].text}" denies it'


_BECAUSE = {
    Reason.RULE: "a rule admits it",
    Reason.GUARD: "the guard: {entry}, for every workload",
    Reason.DENY_RULE: "{entry}, and any deny wins",
    Reason.NO_RULE: "no rule of {workload} {names} {to}",
    Reason.PORT: "{to} has a rule, none for {stage} port {port}",
    Reason.NO_ALLOW_ENTRY: "no allow entry of the rule admits {request}",
    Reason.EXPIRED: "the rule that admits it ended on {until}",
    Reason.ANCESTOR: "a name below {to} is allowed, {to} itself is not",
    Reason.QUERY_TYPE: "{to} may be looked up, records of type {query} may not",
    Reason.UPGRADE: "the rule does not admit an upgrade to {upgrade}",
    Reason.UNKNOWN_WORKLOAD: "there is no workload {workload}",
    Reason.AMBIGUOUS_WORKLOAD: "the source matches more than one workload",
    Reason.WRONG_PROTOCOL: "the rule for {to} carries another protocol than {stage} on port {port}",
    Reason.NO_SNI: "the TLS hello names no host, and no address rule covers {to}",
    Reason.ECH: "the TLS hello is encrypted (ECH): the name it shows need not be the name it means",
    Reason.HOST_MISMATCH: "the request names {to}, its connection was opened for {opened}",
    Reason.MALFORMED_NAME: "{fault}",
    Reason.MALFORMED_HELLO: "the TLS hello cannot be read",
    Reason.MALFORMED_PATH: "{fault}",
    Reason.MALFORMED_REQUEST: "{fault}",
    Reason.MALFORMED_QUERY: "the DNS query cannot be read",
    Reason.NEVER_REACHED: "{to} is metadata, loopback, link-local or multicast: no rule opens it",
    Reason.PRIVATE_ADDRESS: "{to} is a private address, and no rule was written for those",
}


def _fault(attempt: Attempt) -> str:
    """What is malformed, in the words of the part that refuses it."""
    if attempt.fault is Reason.MALFORMED_NAME:
        return f"{attempt.address} is an address, where a name must stand" if attempt.address else "that is no hostname"
    if attempt.fault is Reason.MALFORMED_REQUEST:
        return "a request carries no user name in its target"
    if attempt.method != attempt.method.upper():
        return f"{attempt.method} is no method; methods are upper case"
    try:
        parse_path(attempt.target)
    except MalformedPath as error:
        return f"two servers may read this path differently: {error}"
    return "the request cannot be judged"


# --- what to do where no edit helps --------------------------------------------------------------------------------


def _advice(verdict: Verdict, attempt: Attempt) -> str:
    if verdict.reason is Reason.DENY_RULE and verdict.rule and not is_own(attempt.workload, verdict.rule):
        return f"the deny stands in a set that others use: change the set at {verdict.rule.place}, or stop using it"
    if verdict.reason in (Reason.NO_RULE, Reason.PORT) and attempt.stage is Stage.UDP and attempt.port in ELSEWHERE:
        return ELSEWHERE[attempt.port]
    if verdict.reason in (Reason.WRONG_PROTOCOL, Reason.PORT) and attempt.stage in (Stage.TCP, Stage.UDP):
        return f"a host rule carries TLS and HTTP only, and opaque bytes would go round it; try tls://{destination(attempt)}"
    if verdict.reason is Reason.WRONG_PROTOCOL:
        return "use http:// on a plain port and https:// on every other; plain: in the rule names further plain ports"
    if verdict.reason is Reason.MALFORMED_NAME and attempt.stage is Stage.NTP:
        return "name the server; which address a client asks for the time means nothing, the relay answers for all"
    if verdict.reason is Reason.MALFORMED_NAME and attempt.address is not None:
        if classify(attempt.address) is Reach.NEVER:
            return ADVICE[Reason.NEVER_REACHED]
        kind = "udp" if attempt.stage is Stage.UDP else "tcp"
        where = f"{bracketed(attempt.address)}:{attempt.port}"
        return f"name the host; or, for bytes to the address itself, try {kind}://{where}"
    return ADVICE.get(verdict.reason, "see the decision record of the attempt")


ADVICE = {
    Reason.GUARD: "ask whoever owns the guard; no workload can undo it",
    Reason.NO_RULE: "name the destination in a rule of this workload",
    Reason.QUERY_TYPE: "look up A, AAAA, HTTPS or SVCB; other record types carry data out and are never asked for",
    Reason.UPGRADE: "only websocket can be admitted; h2c never is",
    Reason.UNKNOWN_WORKLOAD: "give the source a workload by match:",
    Reason.AMBIGUOUS_WORKLOAD: "make the match of one workload stricter, so that a source is one workload only",
    Reason.HOST_MISMATCH: "open a connection for each host; one connection serves one name",
    Reason.MALFORMED_NAME: "write the name as DNS has it",
    Reason.MALFORMED_HELLO: "find out what the client sends; a TLS library in order does not send this",
    Reason.MALFORMED_PATH: "spell the path in its one plain way: encoded once, without .. or //",
    Reason.MALFORMED_REQUEST: "send an upper-case method and a target without a user name",
    Reason.MALFORMED_QUERY: "find out what the client sends; a resolver library in order does not send this",
    Reason.NEVER_REACHED: "use the service's public name, or give the workload its credentials another way",
}


# --- the nearest rules ---------------------------------------------------------------------------------------------


def _nearest(policy: Policy, attempt: Attempt, verdict: Verdict) -> Iterator[Miss]:
    rule = verdict.rule
    match verdict.reason:
        case Reason.PORT if rule:
            if attempt.address:
                yield from _near_prefix(policy.workloads[attempt.workload].rules, attempt)
            yield Miss(rule, f"it is for {_covered(rule)}, not port {attempt.port}")
            yield from _hidden(policy, attempt)
        case Reason.NO_ALLOW_ENTRY if isinstance(rule, HostRule):
            yield Miss(rule, _missed_entry(policy, attempt, rule))
            yield from _hidden(policy, attempt)
        case Reason.EXPIRED if rule:
            yield Miss(rule, f"its last day was {rule.until}")
            yield from _hidden(policy, attempt)
        case Reason.WRONG_PROTOCOL if isinstance(rule, HostRule):
            yield Miss(rule, f"it carries {_protocols(rule)}")
        case Reason.PRIVATE_ADDRESS if isinstance(rule, TransportRule):
            yield Miss(rule, "a prefix opens private addresses only if all of it is private")
        case Reason.ECH | Reason.UPGRADE | Reason.QUERY_TYPE if rule:
            yield Miss(rule, f"it does not say {_KEY[verdict.reason]}")
        case Reason.NO_SNI if isinstance(rule, TransportRule):
            yield Miss(rule, f"it says quic: sni, for quic://{rule.host}:{attempt.port}")
        case Reason.NO_RULE | Reason.NO_SNI | Reason.ANCESTOR:
            yield from _nearest_rules(policy, attempt)


_KEY = {
    Reason.ECH: "ech: allow",
    Reason.UPGRADE: "upgrade: [websocket]",
    Reason.QUERY_TYPE: "more than A, AAAA, HTTPS and SVCB",
}


def _covered(rule: AnyRule) -> str:
    if isinstance(rule, HostRule):
        ports: tuple[PortRange, ...] = (*rule.ports, *(p for p in rule.plain if p not in rule.ports))
        return _counted(ports)
    if isinstance(rule, TransportRule):
        return f"{rule.stage} {_counted(rule.ports)}"
    return "NTP" if rule.stage is Stage.NTP else "lookups only"


def _counted(ports: Sequence[PortRange]) -> str:
    return f"port{'s' * (len(ports) > 1)} {', '.join(map(str, ports))}"


def _protocols(rule: HostRule) -> str:
    plain = [str(ports) for ports in (*rule.ports, *rule.plain) if 80 in ports or ports in rule.plain]
    tls = [str(ports) for ports in rule.ports if str(ports) not in plain]
    parts = [f"TLS on port {', '.join(tls)}"] * bool(tls)
    parts += [f"plain HTTP on port {', '.join(dict.fromkeys(plain))}"] * bool(plain)
    return " and ".join(parts)


def _missed_entry(policy: Policy, attempt: Attempt, rule: HostRule) -> str:
    """The allow entry that came nearest: right path and wrong method, else right method and longest common path."""
    group = deciding_group(policy, attempt)
    listed = [e for ports in group.ports if attempt.port in ports.ports for e, _ in ports.allow or ()] if group else []
    try:
        path = parse_path(attempt.target, encoded_slash=True)
    except MalformedPath:
        return "its allow list names other paths"
    if other := next((entry for entry in listed if entry.path and entry.path.admits(path)), None):
        return f'"{other.text}" is for another method than {attempt.method}'

    def in_common(entry: Entry) -> int:
        pairs = zip(entry.path.segments if entry.path else (), path.segments, strict=False)
        return next((i for i, (mine, one) in enumerate(pairs) if mine not in ("*", one)), len(path.segments))

    same = [entry for entry in listed if not entry.methods or attempt.method in entry.methods]
    nearest = max(same or listed, key=in_common, default=None)
    return f'"{nearest.text}" is for another path' if nearest else "its allow list is empty"


def _hidden(policy: Policy, attempt: Attempt) -> Iterator[Miss]:
    """Broader patterns that would admit the attempt, were there not a narrower one that decides alone."""
    index = policy.index[attempt.workload]
    groups = index.hosts.matching(attempt.host) if attempt.host else []
    for group in groups[1:]:
        if _would_admit(policy, attempt, group):
            yield Miss(
                group.rules[0], f"it would admit this, but the narrower {groups[0].rules[0].pattern} decides alone"
            )


def _would_admit(policy: Policy, attempt: Attempt, group: HostGroup) -> bool:
    workload = replace(policy.workloads[attempt.workload], rules=group.rules, match=None, mode=Mode.ENFORCE)
    try:
        return enforced(ladder(build({workload.name: workload}, policy.guard), attempt)).is_allow
    except PolicyError:
        return False


def _nearest_rules(policy: Policy, attempt: Attempt) -> Iterator[Miss]:
    rules = policy.workloads[attempt.workload].rules
    name = attempt.host or next(iter(attempt.names), None)
    if name:
        found = sorted(_near_names(rules, name, attempt), key=lambda pair: pair[0])
        yield from (miss for _, miss in found)
    elif attempt.address:
        yield from _near_prefix(rules, attempt)


def _near_names(rules: Iterable[AnyRule], name: Hostname, attempt: Attempt) -> Iterator[tuple[int, Miss]]:
    """Rules with a name like this one, each with its rank: the smaller, the likelier that it was meant."""
    parent = name.partition(".")[2]
    for rule in rules:
        pattern = rule.host if isinstance(rule, TransportRule) else rule.pattern.host
        if pattern is None:
            continue
        wildcard = not isinstance(rule, TransportRule) and rule.pattern.wildcard
        if pattern == name:
            by = f"it is every name below {name}, never {name} itself" if wildcard else f"it is for {_covered(rule)}"
            yield (1 if wildcard else 0), Miss(rule, by)
        elif wildcard and name.endswith(f".{pattern}"):
            yield 0, Miss(rule, f"it is for {_covered(rule)}")
        elif name.endswith(f".{pattern}"):
            yield 3, Miss(rule, f"it names {pattern} alone, nothing below it")
        elif _is_slip(_tail(name, pattern) if wildcard else name, pattern):
            yield 2, Miss(rule, f"it names {'*.' * wildcard}{pattern}; is that what was meant?")
        elif pattern.endswith(f".{name}"):
            yield 4, Miss(rule, f"it names {'*.' * wildcard}{pattern}, below {name}")
        elif "." in parent and pattern.partition(".")[2] == parent and not wildcard:
            yield 5, Miss(rule, f"it names its sibling {pattern}")


def _tail(name: Hostname, pattern: Hostname) -> str:
    """As many last labels of `name` as `pattern` has, where there is one more before them."""
    labels, wanted = name.split("."), pattern.count(".") + 1
    return ".".join(labels[-wanted:]) if len(labels) > wanted else ""


def _is_slip(name: str, other: str) -> bool:
    """Whether up to two characters in one place turn one into the other. `a1.x` is no slip for `a2.x`."""
    if abs(len(name) - len(other)) > 2 or len(name) < 6 or name.count(".") != other.count("."):
        return False
    start = next((i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), min(len(name), len(other)))
    room = min(len(name), len(other)) - start
    end = next((i for i in range(room) if name[-1 - i] != other[-1 - i]), room)
    changed = name[start : len(name) - end] + other[start : len(other) - end]
    return len(changed) <= 4 and not any(character.isdigit() for character in changed)


def _near_prefix(rules: Iterable[AnyRule], attempt: Attempt) -> Iterator[Miss]:
    """The prefix for this port that shares most leading bits with the address, if at least a quarter of them."""
    address, stage = attempt.address, Stage.UDP if attempt.stage is Stage.UDP else Stage.TCP
    if address is None:
        return
    best: tuple[int, TransportRule, Network] | None = None
    for rule in rules:
        if not isinstance(rule, TransportRule) or rule.stage is not stage:
            continue
        if any(attempt.port in ports for ports in rule.ports):
            for network in rule.networks:
                bits = _common_bits(network, address)
                if bits >= address.max_prefixlen // 4 and (best is None or bits > best[0]):
                    best = bits, rule, network
    if best is not None:
        _, rule, network = best
        yield Miss(rule, f"its {network} runs from {network[0]} to {network[-1]}")


def _common_bits(network: Network, address: Address) -> int:
    if network.version != address.version:
        return 0
    different = int(network.network_address) ^ int(ip_network(address).network_address)
    return min(network.prefixlen, address.max_prefixlen - different.bit_length())
