"""The values of a rule that are written as text: names, ports, prefixes, destinations, entries, dates, budgets.

Each is a shape: it reads a node and describes itself. Which key takes which value is in `document`.
"""

from __future__ import annotations

import re
from datetime import date
from functools import partial
from ipaddress import ip_network

from policies.hostnames import Hostname, MalformedName, Pattern, parse_hostname, parse_pattern
from policies.keys import Scope, Shape, Wrong, listing, read_text
from policies.model import Entry, Network, PortRange
from policies.paths import MalformedPattern, parse_entry
from policies.spelling import did_you_mean, quote
from policies.tree import ListNode, Node, Scalar

PARAMETER = re.compile(r"<([A-Za-z][A-Za-z0-9]*)>")  # replaced before a rule of a set is read, so here it is a mistake
_PARAMETER_SCHEMA = "<[A-Za-z][A-Za-z0-9]*>"
_ONLY_IN_SETS = "a <parameter> stands only in a rule of a set"

_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_PORTS_SCHEMA = f"[0-9]{{1,5}}(?:-[0-9]{{1,5}})?|{_PARAMETER_SCHEMA}"
_PREFIX = re.compile(r"[0-9A-Fa-f:.]+(?:/(?:0|[1-9][0-9]{0,2}))?")  # no netmasks, no scopes: one spelling of one thing
_LOOKS_NUMERIC = re.compile(r"[0-9.]+(?:/.*)?|.*/.*")
_DESTINATION = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([^:]*)")
_BUDGET = re.compile(r"([1-9][0-9]{0,8})(B|KiB|MiB|GiB)/h")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _malformed(node: Node, scope: Scope, text: str, error: MalformedName, repair: str | None) -> Wrong:
    return scope.wrong(node, error.message, _ONLY_IN_SETS if PARAMETER.search(text) else repair or error.repair)


def read_hostname(node: Node, scope: Scope, *, instead: str = "write an address where addresses stand") -> Hostname:
    text = read_text(node, scope)
    if "*" in text:
        raise scope.wrong(node, f"{quote(text)} has a wildcard", "wildcards stand only in host and dns rules")
    try:
        return parse_hostname(text)
    except MalformedName as e:
        raise _malformed(node, scope, text, e, instead.format(address=text) if e.is_address else None) from e


def _read_pattern(node: Node, scope: Scope, *, is_host: bool) -> Pattern:
    text = read_text(node, scope)
    try:
        pattern = parse_pattern(text)
    except MalformedName as e:
        repair = f"a rule for an address is tcp: {_bracketed(text)}:443" if e.is_address and is_host else None
        raise _malformed(node, scope, text, e, repair) from e
    if pattern.wildcard and scope.is_public_suffix(pattern.host):
        message = f'wildcard "{pattern}" covers the public suffix "{pattern.host}", where anyone can own a name'
        raise scope.wrong(node, message, f'name the domains you mean, such as "*.example.{pattern.host}"')
    return pattern


def _bracketed(address: str) -> str:
    bare = address.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def _read_ports(node: Node, scope: Scope) -> PortRange:
    whole = node.whole if type(node) is Scalar else None
    if whole is not None:
        return _port_range(node, scope, whole, whole)
    if type(node) is not Scalar or not (found := _PORTS.fullmatch(node.text)):
        shown = quote(node.text) if type(node) is Scalar else node.kind
        hint = _ONLY_IN_SETS if type(node) is Scalar and PARAMETER.search(node.text) else "write 443 or 8000-8100"
        raise scope.wrong(node, f"{shown} is not a port or a range of ports", hint)
    return _port_range(node, scope, int(found[1]), int(found[2] or found[1]))


def _port_range(node: Node, scope: Scope, first: int, last: int) -> PortRange:
    for port in (first, last):
        if not 1 <= port <= 65535:
            raise scope.wrong(node, f"port {port} does not exist", "ports are 1 to 65535")
    if first > last:
        raise scope.wrong(node, f"range {first}-{last} runs backwards", f"did you mean {last}-{first}?")
    return PortRange(first, last)


def read_network(node: Node, scope: Scope) -> Network:
    return _network(node, scope, read_text(node, scope))


def _network(node: Node, scope: Scope, text: str) -> Network:
    if _PREFIX.fullmatch(text):
        try:
            return ip_network(text)
        except ValueError:
            pass
        try:
            repaired = ip_network(text, strict=False)
        except ValueError:
            pass
        else:
            raise scope.wrong(node, f"{quote(text)} has host bits set", f'did you mean "{repaired}"?')
    hint = _ONLY_IN_SETS if PARAMETER.search(text) else "write 10.20.0.0/16, 10.20.3.4 or 2001:db8::/32"
    raise scope.wrong(node, f"{quote(text)} is not an address or prefix", hint)


def _read_tag(node: Node, scope: Scope) -> tuple[str, tuple[Network, ...]]:
    """An imported service tag and its prefixes."""
    text = read_text(node, scope)
    networks = scope.tags.find(text) if scope.tags else ()
    if networks is not None:
        return text, networks
    if PARAMETER.search(text):
        hint = _ONLY_IN_SETS
    elif scope.tags and (names := scope.tags.names()):
        hint = did_you_mean(text, names)
    else:
        hint = "import the cloud's published file with --tags FILE"
    raise scope.wrong(node, f"unknown service tag {quote(text)}", hint)


def read_destination(node: Scalar, scope: Scope) -> tuple[Hostname | None, tuple[Network, ...], tuple[PortRange, ...]]:
    """`NAME-or-CIDR:PORT`, an IPv6 address or prefix in brackets."""
    text = read_text(node, scope)
    found = _DESTINATION.fullmatch(text)
    if not found:
        if text.count(":") > 1 and "[" not in text:
            address, _, port = text.rpartition(":")
            raise scope.wrong(node, f"{quote(text)} has colons in its address", f'did you mean "[{address}]:{port}"?')
        raise scope.wrong(node, f"{quote(text)} is not NAME-or-CIDR:PORT", f'such as "{_sample(text)}:443"')
    inside, bare, port = found.groups()
    ports = (_read_ports(node._replace(text=port, plain=False), scope),)
    if inside is not None or _LOOKS_NUMERIC.fullmatch(bare):
        return None, (_network(node, scope, inside if inside is not None else bare),), ports
    return read_hostname(node._replace(text=bare, plain=False), scope), (), ports


def _sample(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9.-]+(?:/[0-9]+)?", text) else "db.example.com"


def _read_entry(node: Node, scope: Scope) -> Entry:
    text = read_text(node, scope)
    if PARAMETER.search(text):
        raise scope.wrong(node, f"entry {quote(text)}", _ONLY_IN_SETS)
    try:
        methods, path = parse_entry(text)
    except MalformedPattern as e:
        raise scope.wrong(node, e.message, e.repair) from e
    if path is None:
        raise scope.wrong(node, '"all" stands alone', "write deny: all; without allow everything is allowed")
    return Entry(methods, path, text)


def _read_denies(node: Node, scope: Scope) -> tuple[Entry, ...]:
    if type(node) is Scalar and node.text == "all":
        return (DENY_ALL,)
    if type(node) is ListNode:
        return ENTRIES.read(node, scope)
    raise scope.wrong(node, f"{node.kind} where all or a list must stand", 'write deny: all, or deny: ["* /path/**"]')


def _read_until(node: Node, scope: Scope) -> date:
    text = read_text(node, scope)
    try:
        if _DATE.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise scope.wrong(node, f"{quote(text)} is not a date", "write the last valid day as 2027-01-31")


def _read_budget(node: Node, scope: Scope) -> int:
    text = read_text(node, scope)
    if not (found := _BUDGET.fullmatch(text)):
        raise scope.wrong(node, f"{quote(text)} is not a budget", "write bytes an hour as 10MiB/h (B, KiB, MiB, GiB)")
    return int(found[1]) * _UNITS[found[2]]


DENY_ALL = Entry(frozenset(), None, "all")

_NAME_SCHEMA = {"type": "string", "pattern": r"^[^\s*/:@#?%\[\]\\]+$"}
_ENTRY_SCHEMA = {
    "type": "string",
    "pattern": r"^\s*(?:\*|[A-Z0-9!#$&'+.^_`|~-]+(?:,[A-Z0-9!#$&'+.^_`|~-]+)*)\s+/[^\s%?#\\]*\s*$",
}

HOSTNAME = Shape(read_hostname, _NAME_SCHEMA)
_TIME_SERVER = "write a name, and have it asked at that address: outgate relay --host NAME={address}"
TIME_SERVER = Shape(partial(read_hostname, instead=_TIME_SERVER), _NAME_SCHEMA)
PATTERN_SCHEMA = {"type": "string", "pattern": r"^(?:\*\.)?[^\s*/:@#?%\[\]\\]+$"}
HOST_PATTERN = Shape(partial(_read_pattern, is_host=True), PATTERN_SCHEMA)
DNS_PATTERN = Shape(partial(_read_pattern, is_host=False), PATTERN_SCHEMA)
_PORT = Shape(
    _read_ports,
    {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": 65535},
            {"type": "string", "pattern": f"^(?:{_PORTS_SCHEMA})$"},
        ]
    },
)
PORTS = listing(_PORT, least=1, single=True)
NETWORK = Shape(
    read_network, {"type": "string", "pattern": r"^(?:[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?|<[A-Za-z][A-Za-z0-9]*>.*)$"}
)
NETWORKS = listing(NETWORK, least=1, single=True)
TAG = Shape(_read_tag, {"type": "string", "minLength": 1})
DESTINATION_SCHEMA = {
    "type": "string",
    "pattern": rf"^(?:\[[^\[\]]+\]|[^\s:*\[\]]+):(?:{_PORTS_SCHEMA})$",
}
ENTRIES = listing(Shape(_read_entry, _ENTRY_SCHEMA), least=1)
DENY = Shape(_read_denies, {"anyOf": [{"const": "all"}, ENTRIES.schema]})
UNTIL = Shape(_read_until, {"type": "string", "pattern": f"^{_DATE.pattern}$"})
BUDGET = Shape(_read_budget, {"type": "string", "pattern": f"^{_BUDGET.pattern}$"})
