"""The keys of each kind of rule, and one rule read by them. Workloads, sets and whole files are in `document`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from policies import values
from policies.errors import Problem
from policies.hostnames import Pattern
from policies.keys import FLAG, Json, Key, Scope, Shape, Table, Wrong, choice, line, listing, one_of, the_one
from policies.model import AnyRule, HostRule, NameRule, Place, Stage, Tls, TransportRule
from policies.spelling import quote
from policies.tree import MapNode, Node, Scalar

_COMMON = {
    "name": Key(line(100), "What records and reports call this rule."),
    "reason": Key(line(500), "Why the rule exists, for those who review it."),
    "owner": Key(line(100), "Who answers for the rule."),
    "until": Key(values.UNTIL, "The last day (UTC) on which the rule grants anything: 2027-01-31."),
}
_PORTS = Key(values.PORTS.named("ports"), "Ports to admit, [443] when left out. 80 carries plain HTTP.")
_PRIVATE = Key(FLAG, "true: the name may resolve to private addresses.")
_PATTERN = values.HOST_PATTERN.named("pattern")
_SYNTAX = "METHOD[,METHOD] PATH, where * is any method or any one segment and a final ** any rest"
_DENY = values.DENY.named("denies")
_DENY_SAYS = f"all: closed on every port and for DNS. Or a list of {_SYNTAX}. A deny wins over every allow."

_HOST_KEYS = {
    "host": Key(_PATTERN, "A name, or *.name: every name below it, never the name itself.", field="pattern"),
    "ports": _PORTS,
    "plain": Key(values.PORTS.named("ports"), "Further ports to admit, which carry plain HTTP."),
    "tls": Key(
        choice({tls.value: tls for tls in Tls}),
        "passthrough (default): carried undecrypted. inspect: ended at the gate, and every request is judged.",
    ),
    "allow": Key(values.ENTRIES.named("entries"), f"Where written, only these requests are allowed: {_SYNTAX}."),
    "deny": Key(_DENY, _DENY_SAYS),
    "private": _PRIVATE,
    "encodedSlash": Key(
        choice({"literal": True}), "literal: %2F in a path is a plain character of its segment, not refused."
    ),
    "ech": Key(
        choice({"allow": True, "deny": False}), "allow: Encrypted Client Hello may pass; the outer name is judged."
    ),
    "http2": Key(
        FLAG,
        "true: inspected connections speak HTTP/2 where both ends do. false: never. "
        "Not written: with clients that offer nothing else.",
    ),
    "upgrade": Key(
        listing(choice({"websocket": "websocket"}), least=1, single=True).into(frozenset),
        "Protocols that an allowed request may upgrade to.",
    ),
    "upstreamPool": Key(FLAG, "true: inspected connections to this host are kept for further requests."),
    **_COMMON,
}
_OF_HOST = dict.fromkeys(_HOST_KEYS, "it belongs to a host rule")
_HOST = Table(
    "a host rule",
    _HOST_KEYS,
    dict.fromkeys(("budget", "quic"), "it belongs to a udp rule"),
)
_GUARD = Table(
    "a guard rule",
    {
        "host": Key(_PATTERN, "A name or *.name that is denied to every workload.", field="pattern", required=True),
        "deny": Key(_DENY, _DENY_SAYS, required=True),
        **_COMMON,
    },
    dict.fromkeys(_HOST_KEYS, "the guard only denies, on every port"),
)
_NTP_SOURCE = Key(values.TIME_SERVER.named("name"), "A time source the gate asks.")
_NTP = Table("an ntp rule", {"ntp": _NTP_SOURCE, **_COMMON}, _OF_HOST)
_LOOKUP = Key(values.DNS_PATTERN.named("pattern"), "A name or *.name to look up, nothing more.", field="pattern")
_DNS = Table("a dns rule", {"dns": _LOOKUP, **_COMMON}, _OF_HOST)

_TARGETS = {
    "host": Key(values.HOSTNAME.named("name"), "One exact name; the gate dials what it resolves for it."),
    "address": Key(values.NETWORKS.named("addresses"), "Addresses or prefixes.", field="networks"),
    "tag": Key(values.TAG, "A cloud's service tag; its prefixes come from the cloud's published file."),
}
_TCP_EXTRAS = {"private": _PRIVATE, **_COMMON}
_UDP_EXTRAS = {
    **_TCP_EXTRAS,
    "budget": Key(values.BUDGET, "The most that passes in any hour, both ways: 10MiB/h."),
    "quic": Key(choice({"sni": "sni"}), "sni: QUIC alone, whose first packets must show this very name."),
}


def _destination(extras: Mapping[str, Key]) -> Shape[dict[str, Any]]:
    """`NAME-or-CIDR:PORT`, or a mapping with one of host, address and tag. Read as fields of TransportRule."""
    ports = {"ports": Key(_PORTS.shape, "Ports to admit.", required=True)}
    table = Table("a destination", {**_TARGETS, **ports, **extras})

    def read(node: Node, scope: Scope) -> dict[str, Any]:
        if type(node) is Scalar:
            host, networks, ports = values.read_destination(node, scope)
            return {"host": host, "networks": networks, "ports": ports}
        fields = table.read(node, scope)
        the_one(node, scope, "a destination", _TARGETS)
        if "tag" in fields:
            fields["tag"], fields["networks"] = fields["tag"]
        return fields

    return Shape(read, {"anyOf": [values.DESTINATION_SCHEMA, table.schema | one_of(_TARGETS)]})


def _transport(kind: str, extras: Mapping[str, Key]) -> Table:
    to = Key(_destination(extras), "NAME-or-CIDR:PORT, or a mapping with one of host, address and tag.")
    inside = dict.fromkeys((*_TARGETS, "ports"), f"it stands inside: {kind}: {{host: NAME, ports: [PORT]}}")
    return Table(f"a {kind} rule", {kind: to, **extras}, _OF_HOST | {"budget": "it belongs to a udp rule"} | inside)


_TCP = _transport("tcp", _TCP_EXTRAS)
_UDP = _transport("udp", _UDP_EXTRAS)


def _make_host(place: Place, label: str, fields: dict[str, Any]) -> HostRule:
    rule = HostRule(place=place, label=label, **fields)
    if rule.tls is Tls.PASSTHROUGH and (rule.allow or rule.deny):
        unseen = next((entry for entry in (*(rule.allow or ()), *rule.deny) if not entry.is_all), None)
        port = _first_tls_port(rule)
        if unseen and port:
            message = f"entry {quote(unseen.text)} cannot be seen on port {port}, where tls is passthrough"
            raise Wrong([Problem(place, message, "add tls: inspect, or write deny: all")])
    return rule


def _first_tls_port(rule: HostRule) -> int | None:
    plain = [(80, 80), *((ports.first, ports.last) for ports in rule.plain)]
    for ports in rule.ports:
        port = ports.first
        while last := max((last for first, last in plain if first <= port <= last), default=0):
            port = last + 1
        if port <= ports.last:
            return port
    return None


def _make_guard(place: Place, label: str, fields: dict[str, Any]) -> HostRule:
    return HostRule(place=place, label=label, **fields)


def _make_transport(place: Place, label: str, fields: dict[str, Any]) -> TransportRule:
    key, stage = ("tcp", Stage.TCP) if "tcp" in fields else ("udp", Stage.UDP)
    inside = fields.pop(key)
    if twice := sorted(inside.keys() & fields.keys()):
        raise Wrong([Problem(place, f'"{twice[0]}" stands beside {key} and inside it', "write it once")])
    rule = TransportRule(place=place, label=label, stage=stage, **({"host": None} | inside | fields))
    if rule.private and rule.host is None:
        repair = "an address rule inside one private block needs no private; others never reach private addresses"
        raise Wrong([Problem(place, "private is for names", repair)])
    if rule.quic and rule.host is None:
        raise Wrong([Problem(place, "quic is for names", "write host: NAME; an address rule carries any datagram")])
    return rule


def _make_ntp(place: Place, label: str, fields: dict[str, Any]) -> NameRule:
    source = Pattern(fields.pop("ntp"), wildcard=False)
    return NameRule(place=place, label=label, stage=Stage.NTP, pattern=source, **fields)


def _make_dns(place: Place, label: str, fields: dict[str, Any]) -> NameRule:
    return NameRule(place=place, label=label, stage=Stage.DNS, **fields)


type _Make = Callable[[Place, str, dict[str, Any]], AnyRule]
_KINDS: Mapping[str, tuple[Table, _Make]] = {
    "host": (_HOST, _make_host),
    "tcp": (_TCP, _make_transport),
    "udp": (_UDP, _make_transport),
    "ntp": (_NTP, _make_ntp),
    "dns": (_DNS, _make_dns),
}

RULE_SCHEMA: Json = {
    "type": "object",
    "oneOf": [table.schema | {"required": [kind]} for kind, (table, _) in _KINDS.items()],
}
GUARD_SCHEMA: Json = _GUARD.schema


def read_rule(node: Node, scope: Scope, label: str) -> AnyRule:
    """One rule of a workload or set, parameters already replaced. Raises Wrong."""
    if type(node) is not MapNode:
        raise scope.wrong(node, f"{node.kind} where a rule must stand", "write it as {host: NAME}")
    table, make = _KINDS[the_one(node, scope, "a rule", _KINDS)]
    fields = table.read(node, scope)
    return make(Place(scope.file, node.line, node.column), label, fields)


def read_guard(node: Node, scope: Scope, label: str) -> HostRule:
    """One rule of the guard: it only denies. Raises Wrong."""
    return _make_guard(scope.place(node), label, _GUARD.read(node, scope))
