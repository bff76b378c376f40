"""`decide` against a naive twin written from docs/policy's sentences, and what must hold for every policy and attempt.

The twin looks at every rule every time and shares nothing with `index`. Names, ports and prefixes are few, so that
patterns nest and collide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from random import Random

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from policies.addresses import Reach, classify
from policies.engine import Expect, admit, carries_plain, decide, expect
from policies.errors import PolicyError
from policies.hostnames import Hostname, Pattern
from policies.index import Policy, build
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
    NameRule,
    PortRange,
    Reason,
    Rule,
    Stage,
    Tls,
    TransportRule,
    Verdict,
    Workload,
)
from policies.model import Place as Place_
from policies.paths import MalformedPath, Path, parse_path, parse_path_pattern

DAY_S = 86400.0
EPOCH = date(1970, 1, 1)


def many(examples: int) -> settings:
    unhurried = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, deadline=None, suppress_health_check=unhurried)


# --- the twin ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What of a verdict bears on what happens next. `would_be` is the reason of the denial that audit mode let pass."""

    reason: Reason
    is_allow: bool = False
    tls: Tls | None = None
    dial: Dial = Dial.NAME
    host: str | None = None
    private: bool = False
    would_be: Reason | None = None


def answer(verdict: Verdict) -> Answer:
    if not verdict.is_allow:
        return Answer(verdict.reason)
    would_be = verdict.would_be.reason if verdict.would_be else None
    return Answer(verdict.reason, True, verdict.tls, verdict.dial, verdict.host, verdict.private, would_be)


STAYS_DENIED = {
    Reason.NEVER_REACHED,
    Reason.PRIVATE_ADDRESS,
    Reason.MALFORMED_REQUEST,
    Reason.MALFORMED_PATH,
    Reason.MALFORMED_QUERY,
    Reason.HOST_MISMATCH,
    Reason.ECH,
    Reason.GUARD,
    Reason.UPGRADE,
    Reason.QUERY_TYPE,
}


class Twin:
    """The policy language once more, slowly: one attempt judged by looking at every rule."""

    def __init__(self, policy: Policy, attempt: Attempt) -> None:
        self.attempt = attempt
        self.guard = policy.guard
        self.workload = policy.workloads.get(attempt.workload)
        self.rules: Sequence[AnyRule] = self.workload.rules if self.workload else ()
        self.hosts = [rule for rule in self.rules if isinstance(rule, HostRule)]

    def judge(self) -> Answer:
        if self.attempt.fault:
            return Answer(self.attempt.fault)
        if self.workload is None:
            return Answer(Reason.UNKNOWN_WORKLOAD)
        enforced: Answer = getattr(self, self.attempt.stage.value)()
        if self.workload.mode is Mode.AUDIT and not enforced.is_allow and enforced.reason not in STAYS_DENIED:
            return self.audit(enforced.reason)
        return enforced

    # "Audit lets pass what only a missing or denying rule refuses."
    def audit(self, reason: Reason) -> Answer:
        attempt = self.attempt
        is_tls = attempt.stage is Stage.TLS
        name = attempt.host or (attempt.names[0] if attempt.names else None)
        if attempt.stage in (Stage.TLS, Stage.UDP) and attempt.ech:
            said = [rule.ech for rule in (self.on_port(name) if name else []) if rule.ech is not None]
            assert self.workload
            if not (any(said) if said else self.workload.ech):
                return Answer(Reason.ECH)
        upgrades = [protocol for rule in (self.on_port(name) if name else []) for protocol in rule.upgrade]
        if attempt.stage is Stage.HTTP and attempt.upgrade not in (None, *upgrades):
            return Answer(Reason.UPGRADE)
        private = False
        if name:
            by_name = [rule for rule in self.rules if isinstance(rule, TransportRule) and rule.host == name]
            private = any(rule.private for rule in self.chosen(name)) or any(rule.private for rule in by_name)
        elif attempt.address is not None:
            reach = classify(attempt.address)
            if reach is not Reach.PUBLIC:
                return Answer(Reason.NEVER_REACHED if reach is Reach.NEVER else Reason.PRIVATE_ADDRESS)
        tls = Tls.PASSTHROUGH if is_tls else None
        return Answer(reason, True, tls, Dial.NAME if name else Dial.ORIGINAL, name, private, would_be=reason)

    # "`until` is the last valid day, UTC."
    def valid(self, rule: Rule) -> bool:
        return rule.until is None or self.attempt.time < ((rule.until - EPOCH).days + 1) * DAY_S

    # "The most specific pattern is chosen by name alone, whatever its ports (exact > longer wildcard > shorter)."
    def matching(self, rules: Iterable[HostRule], name: str) -> list[HostRule]:
        found = [rule for rule in rules if below(name, rule.pattern)]
        return sorted(found, key=lambda rule: (not rule.pattern.wildcard, len(rule.pattern.host)), reverse=True)

    def chosen(self, name: str) -> list[HostRule]:
        found = self.matching(self.hosts, name)
        return [rule for rule in found if rule.pattern == found[0].pattern]

    def on_port(self, name: str) -> list[HostRule]:
        port = self.attempt.port
        return [rule for rule in self.chosen(name) if covers(rule.ports, port) or covers(rule.plain, port)]

    # "Denies of every matching pattern (and of `guard`) apply on every port; any deny wins."
    def denies(self, name: str, denied: Callable[[Entry], bool]) -> Answer | None:
        for rules, reason in ((self.guard, Reason.GUARD), (self.hosts, Reason.DENY_RULE)):
            if any(denied(entry) for rule in self.matching(rules, name) for entry in rule.deny):
                return Answer(reason)
        return None

    def closed(self, name: str) -> Answer | None:
        return self.denies(name, lambda entry: entry.is_all)

    def ech_allowed(self, rules: Sequence[HostRule]) -> bool:
        assert self.workload
        if any(rule.ech for rule in rules if self.valid(rule)):
            return True
        return self.workload.ech and not any(rule.ech is False for rule in rules)

    def is_plain(self, rules: Sequence[HostRule]) -> bool:
        return self.attempt.port == 80 or covers(rules[0].plain, self.attempt.port)

    def tls(self) -> Answer:
        attempt, name = self.attempt, self.attempt.host
        if name is None:
            return self.opaque(Stage.TCP, attempt.names, attempt.address) or Answer(Reason.NO_SNI)
        if closed := self.closed(name):
            return closed
        if not self.chosen(name):
            return self.opaque(Stage.TCP, (name, *attempt.names), attempt.address) or Answer(Reason.NO_RULE)
        rules = self.on_port(name)
        if not rules:
            return self.opaque(Stage.TCP, (name,), None) or Answer(Reason.PORT)
        if self.is_plain(rules):
            return Answer(Reason.WRONG_PROTOCOL)
        valid = [rule for rule in rules if self.valid(rule)]
        if not valid:
            return Answer(Reason.EXPIRED)
        tls = valid[0].tls
        if tls is Tls.PASSTHROUGH and attempt.ech and not self.ech_allowed(rules):
            return Answer(Reason.ECH)
        return Answer(Reason.RULE, True, tls, private=any(rule.private for rule in valid))

    def http(self) -> Answer:
        attempt, name = self.attempt, self.attempt.host
        if name is None or attempt.method != attempt.method.upper() or not attempt.method:
            return Answer(Reason.MALFORMED_REQUEST)
        if attempt.opened_for not in (None, name):
            return Answer(Reason.HOST_MISMATCH)
        rules = self.on_port(name)
        valid = [rule for rule in rules if self.valid(rule)]
        try:
            path = parse_path(attempt.target, encoded_slash=any(rule.encoded_slash for rule in valid))
        except MalformedPath:
            return Answer(Reason.MALFORMED_PATH)
        if denied := self.closed(name) or self.denies(name, lambda entry: is_meant(entry, attempt.method, path)):
            return denied
        if not rules:
            carried = self.opaque(Stage.TCP, (name,), None)
            if carried and carried.is_allow and attempt.upgrade is not None:
                return Answer(Reason.UPGRADE)
            return carried or Answer(Reason.PORT if self.chosen(name) else Reason.NO_RULE)
        if self.is_plain(rules) is not attempt.plain:
            return Answer(Reason.WRONG_PROTOCOL)
        if not valid:
            return Answer(Reason.EXPIRED)
        entries = [entry for rule in valid for entry in rule.allow or ()]
        admitted = any(
            entry.path and (not entry.methods or attempt.method in entry.methods) and entry.path.admits(path)
            for entry in entries
        )
        if any(rule.allow is not None for rule in rules) and not admitted:
            return Answer(Reason.NO_ALLOW_ENTRY)
        if attempt.upgrade is not None and not any(attempt.upgrade in rule.upgrade for rule in valid):
            return Answer(Reason.UPGRADE)
        return Answer(Reason.RULE, True, private=any(rule.private for rule in valid))

    # "A host, tcp, udp or ntp rule by name also admits the lookup of that name, unless `deny: all` covers it."
    def dns(self) -> Answer:
        name = self.attempt.host
        if name is None:
            return Answer(Reason.MALFORMED_QUERY)
        if closed := self.closed(name):
            return closed
        dialled: list[AnyRule] = [*self.chosen(name)]
        dialled += [rule for rule in self.rules if isinstance(rule, TransportRule) and rule.host == name]
        by_name = [rule for rule in self.rules if isinstance(rule, NameRule) and below(name, rule.pattern)]
        dialled += [rule for rule in by_name if rule.stage is Stage.NTP]
        lookups = [rule for rule in by_name if rule.stage is Stage.DNS]
        if not any(map(self.valid, [*dialled, *lookups])):
            if dialled or lookups:
                return Answer(Reason.EXPIRED)
            return Answer(Reason.ANCESTOR if any(stands_above(name, rule) for rule in self.rules) else Reason.NO_RULE)
        if self.attempt.query_type not in ("A", "AAAA", "HTTPS", "SVCB"):
            return Answer(Reason.QUERY_TYPE)
        meant = [r for r in dialled if isinstance(r, HostRule | TransportRule) and r.private and self.valid(r)]
        return Answer(Reason.RULE, True, private=bool(meant) if dialled else True)

    def ntp(self) -> Answer:
        attempt = self.attempt
        if attempt.address is not None and classify(attempt.address) is Reach.NEVER:
            return Answer(Reason.NEVER_REACHED)
        rules = [rule for rule in self.rules if isinstance(rule, NameRule) and rule.stage is Stage.NTP]
        if attempt.host is not None:
            if closed := self.closed(attempt.host):
                return closed
            rules = [rule for rule in rules if rule.pattern.host == attempt.host]
        closed_names = [closed for rule in rules if (closed := self.closed(rule.pattern.host))]
        open_rules = [rule for rule in rules if not self.closed(rule.pattern.host)]
        if any(map(self.valid, open_rules)):
            return Answer(Reason.RULE, True)
        return nearest(closed_names + [Answer(Reason.EXPIRED) for _ in open_rules]) or Answer(Reason.NO_RULE)

    def tcp(self) -> Answer:
        attempt = self.attempt
        judged = self.opaque(attempt.stage, attempt.names, attempt.address)
        if judged and judged.reason is not Reason.PORT:
            return judged
        if not attempt.names and attempt.address is not None and classify(attempt.address) is Reach.NEVER:
            return Answer(Reason.NEVER_REACHED)
        if judged:
            return judged
        return Answer(Reason.WRONG_PROTOCOL if any(map(self.chosen, attempt.names)) else Reason.NO_RULE)

    udp = tcp

    # "Opaque TCP to an address counts as name N when this workload's current lookup of N gave that address (several
    # names: allowed if a rule admits one)." "Address and tag rules dial the original destination."
    def opaque(self, stage: Stage, names: Sequence[str], address: Address | None) -> Answer | None:
        rules = [rule for rule in self.rules if isinstance(rule, TransportRule) and rule.stage is stage]
        tls = Tls.PASSTHROUGH if self.attempt.stage is Stage.TLS else None
        closed = [found for name in names if (found := self.closed(name))]
        misses = list(closed)
        for name in names:
            mine = [rule for rule in rules if rule.host == name and not self.closed(name)]
            misses += filter(None, map(self.miss, mine))
            if admitting := [rule for rule in mine if not self.miss(rule)]:
                assert self.workload
                if self.attempt.ech and all(rule.quic for rule in admitting) and not self.workload.ech:
                    return Answer(Reason.ECH)
                return Answer(Reason.RULE, True, tls, Dial.NAME, name, self.private_of(rules, name))
        if address is not None and not closed:
            if not names and classify(address) is Reach.NEVER:
                return Answer(Reason.NEVER_REACHED)
            for rule in rules:
                for network in rule.networks:
                    if unwrapped(address) not in network:
                        continue
                    private = rule.tag is None and any(network.subnet_of(block) for block in blocks(network.version))
                    reach = classify(address)
                    if miss := self.miss(rule):
                        misses.append(miss)
                    elif reach is Reach.NEVER:
                        misses.append(Answer(Reason.NEVER_REACHED))
                    elif reach is Reach.PRIVATE and not private:
                        misses.append(Answer(Reason.PRIVATE_ADDRESS))
                    else:
                        inside = reach is Reach.PRIVATE
                        return Answer(Reason.RULE, True, tls, Dial.ORIGINAL, private=inside)
        return nearest(misses)

    def private_of(self, rules: Iterable[TransportRule], name: str) -> bool:
        return any(r.private for r in rules if r.host == name and not self.miss(r))

    def miss(self, rule: TransportRule) -> Answer | None:
        if not covers(rule.ports, self.attempt.port):
            return Answer(Reason.PORT)
        if not self.valid(rule):
            return Answer(Reason.EXPIRED)
        if rule.quic and rule.host != self.attempt.host:
            return Answer(Reason.HOST_MISMATCH if self.attempt.host else Reason.NO_SNI)
        return None


NEAREST_LAST = [
    Reason.PORT,
    Reason.EXPIRED,
    Reason.NO_SNI,
    Reason.HOST_MISMATCH,
    Reason.PRIVATE_ADDRESS,
    Reason.NEVER_REACHED,
    Reason.DENY_RULE,
    Reason.GUARD,
]


def nearest(misses: Sequence[Answer]) -> Answer | None:
    return max(misses, key=lambda miss: NEAREST_LAST.index(miss.reason), default=None)


def below(name: str, pattern: Pattern) -> bool:
    """`*.example.com` is any depth below, never the apex."""
    return name.endswith(f".{pattern.host}") if pattern.wildcard else name == pattern.host


def covers(ranges: Iterable[PortRange], port: int) -> bool:
    return any(ports.first <= port <= ports.last for ports in ranges)


def is_meant(entry: Entry, method: str, path: Path) -> bool:
    return entry.path is not None and (not entry.methods or method in entry.methods) and entry.path.denies(path)


def stands_above(name: str, rule: AnyRule) -> bool:
    if isinstance(rule, HostRule) and any(entry.is_all for entry in rule.deny):
        return False
    if isinstance(rule, TransportRule):
        return rule.host is not None and rule.host.endswith(f".{name}")
    lowest = f"x.{rule.pattern.host}" if rule.pattern.wildcard else rule.pattern.host
    return lowest.endswith(f".{name}")


def unwrapped(address: Address) -> Address:
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def blocks(version: int) -> list:  # type: ignore[type-arg]  # subnet_of wants one version, and each list has one
    return [ip_network(text) for text in (["10.0.0.0/8"] if version == 4 else ["fc00::/7"])]


# --- random policies -----------------------------------------------------------------------------------------------

HERE = Place_("p.yaml", 1)
NAMES = [Hostname(name) for name in ("t", "a.t", "b.a.t")]
RANGES = [PortRange(443, 443), PortRange(80, 80), PortRange(22, 22), PortRange(8080, 8080), PortRange(70, 500)]
PORTS = [443, 443, 80, 22, 8080]
ADDRESSES = [
    ip_address(text)
    for text in ("8.8.8.8", "8.9.9.9", "10.0.0.1", "127.0.0.1", "169.254.169.254", "2606:4700::1", "fd00::1")
]
ADDRESSES += [ip_address("::ffff:10.0.0.1"), ip_address("::ffff:8.8.8.8"), ip_address("64:ff9b::a9fe:a9fe")]
NETWORKS = [
    ip_network(text)
    for text in (
        "8.8.8.0/24",
        "8.0.0.0/7",
        "10.0.0.0/24",
        "10.0.0.0/8",
        "0.0.0.0/0",
        "::/0",
        "fd00::/64",
        "127.0.0.0/8",
    )
]
METHODS = [frozenset[str](), frozenset({"GET"}), frozenset({"GET", "POST"})]
ENTRIES = [
    Entry(methods, parse_path_pattern(path), f"{sorted(methods)} {path}")
    for methods in METHODS
    for path in ("/p", "/p/**", "/p/*", "/q")
]
CLOSED = Entry(frozenset(), None, "all")
UNTIL = [None, None, EPOCH, EPOCH + timedelta(1)]

names = st.sampled_from(NAMES)
patterns = st.builds(Pattern, names, st.booleans())
common = {"place": st.just(HERE), "label": st.just("app/rules[0]"), "until": st.sampled_from(UNTIL)}
ranges = st.lists(st.sampled_from(RANGES), min_size=1, max_size=2).map(tuple)
entries = st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=2).map(tuple)
rarely = st.sampled_from([False, False, False, True])


def host_rules(tls: st.SearchStrategy[Tls], lists: bool) -> st.SearchStrategy[HostRule]:
    """`lists`: also with method and path entries, which a passed-through port cannot have."""
    all_closed = st.just((CLOSED,))
    return st.builds(
        HostRule,
        **common,
        pattern=patterns,
        ports=ranges,
        plain=st.sampled_from([(), (), (), (PortRange(8080, 8080),)]),
        tls=tls,
        allow=st.none() | entries if lists else st.none(),
        deny=st.sampled_from([0, 0, 0, 0, 1, 2]).flatmap(
            lambda n: st.just(()) if n == 0 else entries if n == 1 and lists else all_closed if n == 2 else st.just(())
        ),
        private=rarely,
        encoded_slash=rarely,
        ech=st.sampled_from([None, None, True, False]),
        upgrade=st.sampled_from([frozenset(), frozenset({"websocket"})]),
    )


def guard_rules(lists: bool) -> st.SearchStrategy[HostRule]:
    deny = st.just((CLOSED,)) | entries if lists else st.just((CLOSED,))
    return st.builds(HostRule, place=st.just(HERE), label=st.just("guard[0]"), pattern=patterns, deny=deny)


stages = st.sampled_from([Stage.TCP, Stage.UDP])
by_name = st.builds(TransportRule, **common, stage=stages, host=names, ports=ranges, private=rarely)
by_sni = st.builds(
    TransportRule, **common, stage=st.just(Stage.UDP), host=names, ports=ranges, private=rarely, quic=st.just("sni")
)
by_address = st.builds(
    TransportRule,
    **common,
    stage=stages,
    host=st.none(),
    networks=st.lists(st.sampled_from(NETWORKS), min_size=1, max_size=2).map(tuple),
    tag=st.sampled_from([None, None, "Storage"]),
    ports=ranges,
)
ntp_rules = st.builds(NameRule, **common, stage=st.just(Stage.NTP), pattern=st.builds(Pattern, names, st.just(False)))
dns_rules = st.builds(NameRule, **common, stage=st.just(Stage.DNS), pattern=patterns)


@st.composite
def workloads(draw: st.DrawFn, lists: bool, tls: st.SearchStrategy[Tls], name: str = "app") -> Workload:
    kinds: list[st.SearchStrategy[AnyRule]] = [
        host_rules(tls, lists),
        host_rules(tls, lists),
        by_name,
        by_sni,
        by_address,
        ntp_rules,
        dns_rules,
    ]
    rules = draw(st.lists(st.one_of(kinds), max_size=7))
    placed: tuple[AnyRule, ...] = tuple(
        replace(rule, place=Place_("p.yaml", line)) for line, rule in enumerate(rules, 10)
    )
    return Workload(name, HERE, placed, mode=draw(st.sampled_from([Mode.ENFORCE, Mode.AUDIT])), ech=draw(rarely))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Mostly policies that load: all inspected, or none with method and path. The rest mixes and is often refused."""
    kind = draw(st.sampled_from(["inspect", "passthrough", "mixed"]))
    lists = kind != "passthrough"
    tls = st.sampled_from(list(Tls)) if kind == "mixed" else st.just(Tls(kind))
    found = {"app": draw(workloads(lists, tls))}
    if draw(rarely):
        found[UNKNOWN] = draw(workloads(lists, tls, UNKNOWN))
    guard = [
        replace(rule, place=Place_("p.yaml", line))
        for line, rule in enumerate(draw(st.lists(guard_rules(lists), max_size=2)), 2)
    ]
    try:
        return build(found, guard)
    except PolicyError:
        assume(False)
        raise


targets = st.sampled_from(["/p", "/P/x", "/p/x;y", "/q?z=1", "/p/a%2Fb", "/p/../q", "/p//q", "/"])
attempts = st.builds(
    Attempt,
    stage=st.sampled_from([*Stage, Stage.HTTP, Stage.TLS]),
    workload=st.sampled_from(["app", "app", "app", "app", UNKNOWN]),
    host=st.none() | names | names | names,
    port=st.sampled_from(PORTS),
    time=st.sampled_from([0.0, DAY_S - 1, DAY_S, 3 * DAY_S]),
    address=st.none() | st.sampled_from(ADDRESSES),
    names=st.lists(names, max_size=2, unique=True).map(tuple),
    ech=rarely,
    method=st.sampled_from(["GET", "POST", "HEAD", "get"]),
    target=targets,
    plain=st.booleans(),
    upgrade=st.sampled_from([None, None, None, "websocket", "h2c"]),
    opened_for=st.none() | names,
    query_type=st.sampled_from(["A", "AAAA", "HTTPS", "TXT"]),
    fault=st.sampled_from([None] * 9 + [Reason.MALFORMED_NAME]),
)
some_attempts = st.lists(attempts, min_size=8, max_size=16)


def judged(policy: Policy, attempt: Attempt) -> Answer:
    return answer(decide(policy, attempt))


# --- the same answer -----------------------------------------------------------------------------------------------


@many(300)
@given(policies(), some_attempts)
def test_engine_agrees_with_its_naive_twin(policy: Policy, tried: list[Attempt]) -> None:
    for attempt in tried:
        expected = Twin(policy, attempt).judge()
        got = judged(policy, attempt)
        assert got == expected, f"{attempt}\n{policy.guard}\n{policy.workloads.get(attempt.workload)}"


@many(100)
@given(policies())
def test_port_expectations_agree_with_looking_at_every_rule(policy: Policy) -> None:
    closes = [rule for rule in policy.guard if CLOSED in rule.deny]
    for name, workload in policy.workloads.items():
        hosts = [rule for rule in workload.rules if isinstance(rule, HostRule)]
        tcp = [rule for rule in workload.rules if isinstance(rule, TransportRule) and rule.stage is Stage.TCP]
        closed = closes or [rule for rule in hosts if CLOSED in rule.deny]
        for port in PORTS:
            by_host = any(covers((*rule.ports, *rule.plain), port) for rule in hosts)
            opaque = [rule for rule in tcp if covers(rule.ports, port)]
            if not opaque:
                expected = Expect.EITHER if workload.mode is Mode.AUDIT else Expect.PEEK
            elif by_host or (closed and any(rule.networks for rule in opaque)):
                expected = Expect.EITHER
            else:
                expected = Expect.OPAQUE
            assert expect(policy, name, port) is expected
            plain = any(covers(rule.plain, port) for rule in hosts)
            assert carries_plain(policy, name, port) is (port == 80 or plain)


# --- what holds for every policy -----------------------------------------------------------------------------------


def rebuilt(policy: Policy, change: Callable[[Workload], Workload], guard: Sequence[HostRule] | None = None) -> Policy:
    """The policy with every workload changed. A change that makes a contradiction is no example."""
    try:
        return build(
            {name: change(workload) for name, workload in policy.workloads.items()},
            policy.guard if guard is None else guard,
        )
    except PolicyError:
        assume(False)
        raise


def enforced(workload: Workload) -> Workload:
    return replace(workload, mode=Mode.ENFORCE)


@many(80)
@given(policies(), some_attempts, st.randoms(use_true_random=False))
def test_order_of_rules_and_workloads_never_matters(policy: Policy, tried: list[Attempt], random: Random) -> None:
    def shuffled[T](items: Iterable[T]) -> list[T]:
        items = list(items)
        random.shuffle(items)
        return items

    mixed = build(
        {
            name: replace(workload, rules=tuple(shuffled(workload.rules)))
            for name, workload in shuffled(policy.workloads.items())
        },
        shuffled(policy.guard),
    )
    for attempt in tried:
        assert judged(mixed, attempt) == judged(policy, attempt), attempt


@many(80)
@given(policies(), st.builds(HostRule, **common, pattern=patterns, deny=st.just((CLOSED,)) | entries), some_attempts)
def test_another_deny_never_turns_a_denial_into_an_allow(policy: Policy, deny: HostRule, tried: list[Attempt]) -> None:
    # A rule with a path deny is also a rule: it admits what that does not mean. So the deny joins the rules there are.
    def denied(workload: Workload) -> Workload:
        rules = tuple(
            replace(rule, deny=rule.deny + deny.deny)
            if isinstance(rule, HostRule) and rule.pattern == deny.pattern
            else rule
            for rule in workload.rules
        )
        closing = (deny,) if CLOSED in deny.deny else ()
        return replace(workload, rules=rules + closing)

    policy = rebuilt(policy, enforced)  # audit mode passes what a deny refuses, and has a test of its own
    in_workload = rebuilt(policy, denied)
    in_guard = rebuilt(policy, lambda workload: workload, [*policy.guard, deny])
    for attempt in tried:
        if not decide(policy, attempt).is_allow:
            assert not decide(in_workload, attempt).is_allow, attempt
            assert not decide(in_guard, attempt).is_allow, attempt


@many(80)
@given(policies(), some_attempts, st.integers(1, 4), st.sampled_from(ADDRESSES))
def test_time_never_turns_a_denial_into_an_allow(
    policy: Policy, tried: list[Attempt], days: int, address: Address
) -> None:
    policy = rebuilt(policy, enforced)
    for attempt in tried:
        later = decide(policy, replace(attempt, time=attempt.time + days * DAY_S))
        if later.is_allow:
            now = decide(policy, attempt)
            assert now.is_allow, attempt
            if later.dial is now.dial and admit(later, address).is_allow:
                assert admit(now, address).is_allow, attempt


@many(80)
@given(policies(), host_rules(st.sampled_from(Tls), lists=True), some_attempts)
def test_broader_host_rule_never_loosens_a_narrower_one(policy: Policy, broad: HostRule, tried: list[Attempt]) -> None:
    broad = replace(broad, pattern=Pattern(broad.pattern.host, wildcard=True))
    wider = rebuilt(rebuilt(policy, enforced), lambda w: replace(w, rules=(*w.rules, broad)))
    for attempt in tried:
        workload = policy.workloads.get(attempt.workload)
        hosts = [rule for rule in workload.rules if isinstance(rule, HostRule)] if workload else []
        narrower = [rule for rule in hosts if len(rule.pattern.host) > len(broad.pattern.host)]
        if attempt.host and any(below(attempt.host, rule.pattern) for rule in narrower):
            before, after = judged(rebuilt(policy, enforced), attempt), judged(wider, attempt)
            assert before == after or not after.is_allow, attempt


@many(80)
@given(policies(), some_attempts)
def test_no_undecrypted_name_has_a_path_deny_that_nobody_sees(policy: Policy, tried: list[Attempt]) -> None:
    policy = rebuilt(policy, enforced)
    for attempt in (replace(attempt, stage=Stage.TLS, ech=False, fault=None) for attempt in tried):
        verdict = decide(policy, attempt)
        if verdict.tls is Tls.PASSTHROUGH and isinstance(verdict.rule, HostRule) and attempt.host:
            twin = Twin(policy, attempt)
            assert not twin.denies(attempt.host, lambda entry: True), attempt
            assert not any(rule.allow for rule in twin.on_port(attempt.host)), attempt


@many(80)
@given(policies(), some_attempts)
def test_audit_passes_only_what_a_missing_or_denying_rule_refuses(policy: Policy, tried: list[Attempt]) -> None:
    audited = rebuilt(policy, lambda workload: replace(workload, mode=Mode.AUDIT))
    strict = rebuilt(policy, enforced)
    for attempt in tried:
        enforce, verdict = decide(strict, attempt), decide(audited, attempt)
        if enforce.is_allow:
            assert answer(verdict) == answer(enforce)
        if enforce.is_allow or not verdict.is_allow:
            continue
        assert verdict.would_be is not None
        assert answer(verdict.would_be) == answer(enforce)
        assert enforce.reason not in STAYS_DENIED
        assert attempt.fault is None
        if verdict.dial is Dial.ORIGINAL and attempt.address is not None:
            assert classify(attempt.address) is Reach.PUBLIC


# --- whatever comes ------------------------------------------------------------------------------------------------

anything = st.builds(
    Attempt,
    stage=st.sampled_from(Stage),
    workload=st.text(max_size=3) | st.just("app"),
    host=st.none() | st.text(max_size=12).map(Hostname) | names,
    port=st.integers(),
    time=st.floats(),
    address=st.none() | st.ip_addresses(),
    names=st.lists(st.text(max_size=8).map(Hostname) | names, max_size=3).map(tuple),
    ech=st.booleans(),
    method=st.text(max_size=8) | st.just("GET"),
    target=st.text(max_size=12) | st.text("/%2fF.;\\#?\x00 aé", max_size=12).map(lambda rest: f"/{rest}"),
    plain=st.booleans(),
    upgrade=st.none() | st.text(max_size=4),
    opened_for=st.none() | st.text(max_size=4).map(Hostname),
    query_type=st.text(max_size=4),
    fault=st.none() | st.sampled_from(Reason),
)


@many(80)
@given(policies(), st.lists(anything, min_size=5, max_size=10))
def test_every_attempt_gets_a_verdict(policy: Policy, tried: list[Attempt]) -> None:
    for attempt in tried:
        verdict = decide(policy, attempt)
        assert verdict.stage is attempt.stage
        assert not (attempt.fault and verdict.is_allow)


# --- the address that is dialled -----------------------------------------------------------------------------------


def disguised(inner: IPv4Address) -> list[Address]:
    high, low = int(inner) >> 16, int(inner) & 0xFFFF
    flipped = IPv4Address(int(inner) ^ 0xFFFFFFFF)
    forms = (
        f"::ffff:{inner}",
        f"::{inner}",
        f"::ffff:0:{inner}",
        f"64:ff9b::{inner}",
        f"64:ff9b:1::{inner}",
        f"2002:{high:x}:{low:x}::1",
        f"2001:0:{high:x}:{low:x}::f7f7:f7f7",
        f"2001:0:808:808::{flipped}",
        f"2607:f8b0::5efe:{inner}",
    )
    return [inner, *map(ip_address, forms)]


bad_v4 = st.sampled_from([ip_network(text) for text in ("127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")])
verdicts = st.builds(
    Verdict,
    st.sampled_from(Action),
    st.just(Reason.RULE),
    st.sampled_from(Stage),
    private=st.booleans(),
    dial=st.sampled_from(Dial),
)


@given(verdicts, bad_v4, st.integers(0, 2**32), st.booleans())
def test_no_disguise_reaches_a_never_reached_address(
    verdict: Verdict, network: IPv4Network, offset: int, from_hosts: bool
) -> None:
    inner = network[offset % network.num_addresses]
    for address in disguised(inner):
        exempt = from_hosts and address.is_loopback
        assert not admit(verdict, address, from_hosts=from_hosts).is_allow or exempt, address


@given(verdicts, st.ip_addresses() | st.sampled_from(ADDRESSES), st.booleans())
def test_address_is_admitted_only_as_far_as_it_is_meant(verdict: Verdict, address: Address, from_hosts: bool) -> None:
    judged = admit(verdict, address, from_hosts=from_hosts)
    if not judged.is_allow:
        assert judged is verdict or judged.reason in (Reason.NEVER_REACHED, Reason.PRIVATE_ADDRESS)
        return
    reach = classify(address)
    assert judged is verdict
    assert reach is not Reach.NEVER or (from_hosts and address.is_loopback)
    assert reach is not Reach.PRIVATE or verdict.private or from_hosts
