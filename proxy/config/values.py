"""The values of the gate's configuration as they are written: addresses, paths, urls, numbers. It knows no key.

Each is a shape, as in a policy: it reads a node and describes itself. Text from a flag or a variable is a node too.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Network, ip_address
from typing import Any

from policies.errors import Problem
from policies.hostnames import Hostname, MalformedName, Pattern, parse_hostname, parse_pattern
from policies.keys import Scope, Shape, Wrong, listing, read_text
from policies.model import ELSEWHERE, Network
from policies.spelling import quote
from policies.tree import MapNode, Node, Scalar
from policies.values import DESTINATION_SCHEMA, read_destination, read_network
from proxy.config import SocketAddress
from proxy.hosts import DNS_PORT, HostsEntry, MalformedHostOption, Nameserver, parse_host_options

NONE = "none"
STDERR = "-"

_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,6})?")
_SOCKET_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+)):([0-9]{1,5})")
_URL = re.compile(r"http://(?:\[([^\[\]@/?#]+)\]|([^:\[\]@/?#]+)):([0-9]{1,5})/?")
_IPV4_IN_IPV6 = IPv6Network("::ffff:0:0/96")
_WIDEST_V4, _WIDEST_V6 = 8, 16  # of balancers; whatever is wider is "everybody"


def whole(least: int, most: int) -> Shape[int]:
    """A number without a fraction."""

    def read(node: Node, scope: Scope) -> int:
        number = node.whole if type(node) is Scalar else None
        if number is None or not least <= number <= most:
            raise scope.wrong(node, f"{_shown(node)} is not a whole number from {least} to {most}")
        return number

    return Shape(read, {"type": "integer", "minimum": least, "maximum": most})


def seconds(most: float, *, least: float = 0.0) -> Shape[float]:
    """A time in seconds; fractions are allowed."""

    def read(node: Node, scope: Scope) -> float:
        text = node.text if type(node) is Scalar and node.plain else ""
        if not _NUMBER.fullmatch(text) or not least <= float(text) <= most:
            raise scope.wrong(node, f"{_shown(node)} is not a number of seconds from {least:g} to {most:g}")
        return float(text)

    return Shape(read, {"type": "number", "minimum": least, "maximum": most})


def _read_path(node: Node, scope: Scope) -> str:
    text = read_text(node, scope)
    if not text or "\0" in text:
        raise scope.wrong(node, f"{quote(text)} is no path", "write the name of a file or directory")
    return text


def _read_socket_address(node: Node, scope: Scope) -> SocketAddress:
    if type(node) is not Scalar:
        hint = 'IPv6 stands in brackets and quotes: "[::]:15001"'
        raise scope.wrong(node, f"{node.kind} where an address with its port must stand", hint)
    found = _SOCKET_ADDRESS.fullmatch(node.text)
    address = _address_of(found[1] or found[2], is_ipv6=bool(found[1])) if found else None
    if found is None or address is None or int(found[3]) > 65535:
        hint = "write ADDR:PORT, for example 0.0.0.0:15001 or [::]:15001"
        raise scope.wrong(node, f"{quote(node.text)} is not an address with its port", hint)
    return address, int(found[3])


def _read_admin(node: Node, scope: Scope) -> SocketAddress | None:
    return None if type(node) is Scalar and node.text == NONE else _read_socket_address(node, scope)


def _read_nameserver(node: Node, scope: Scope) -> Nameserver:
    text = read_text(node, scope)
    if address := _address_of(text, is_ipv6=":" in text):
        return address, DNS_PORT
    found = _SOCKET_ADDRESS.fullmatch(text)
    if found and 0 < int(found[3]) < 65536 and (address := _address_of(found[1] or found[2], is_ipv6=bool(found[1]))):
        return address, int(found[3])
    hint = "write ADDR or ADDR:PORT, for example 10.0.0.53 or [fd00::53]:5353"
    raise scope.wrong(node, f"{quote(text)} is not the address of a name server", hint)


def _address_of(text: str, *, is_ipv6: bool) -> str | None:
    """The normal spelling of an address of that version."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return str(address) if (address.version == 6) is is_ipv6 else None


def _read_balancer(node: Node, scope: Scope) -> Network:
    """A prefix whose PROXY headers are believed. Everybody's are not: who sends one chooses his own source."""
    network = read_network(node, scope)
    if _is_everybody(network):
        hint = f"name your balancers, at most a /{_WIDEST_V4} of IPv4 or a /{_WIDEST_V6} of IPv6"
        raise scope.wrong(node, f"{quote(str(network))} is everybody, who could all forge their source", hint)
    return network


def _is_everybody(network: Network) -> bool:
    if not isinstance(network, IPv6Network):
        return network.prefixlen < _WIDEST_V4
    if network.subnet_of(_IPV4_IN_IPV6):
        return network.prefixlen - _IPV4_IN_IPV6.prefixlen < _WIDEST_V4
    return network.prefixlen < _WIDEST_V6 or _IPV4_IN_IPV6.subnet_of(network)


def _read_upstream_url(node: Node, scope: Scope) -> tuple[str, int]:
    text = read_text(node, scope)
    if "@" in text:  # not shown: what stands before it is a secret
        hint = "put NAME:PASSWORD into a file and name it under upstreamProxy.credentials"
        raise scope.wrong(node, "credentials in the url of a proxy", hint)
    found = _URL.fullmatch(text)
    host = _url_host(found[1], found[2]) if found else None
    if found is None or host is None or not 0 < int(found[3]) < 65536:
        hint = "write http://HOST:PORT, for example http://proxy.corp.example:3128"
        raise scope.wrong(node, f"{quote(text)} is not the url of a proxy", hint)
    return host, int(found[3])


def _url_host(in_brackets: str | None, bare: str) -> str | None:
    if in_brackets:
        return _address_of(in_brackets, is_ipv6=True)
    try:
        return _address_of(bare, is_ipv6=False) or parse_hostname(bare)
    except MalformedName:
        return None


def _read_direct(node: Node, scope: Scope) -> Pattern | Network:
    text = read_text(node, scope)
    try:
        return parse_pattern(text)
    except MalformedName as error:
        if error.is_address:
            return read_network(node, scope)
        raise scope.wrong(node, error.message, error.repair or "write a name, *.NAME or a prefix") from error


def _read_hosts(node: Node, scope: Scope) -> dict[Hostname, HostsEntry]:
    """A name to one address or several, each with or without a port."""
    if type(node) is not MapNode:
        raise scope.wrong(node, f"{node.kind} where hosts must stand", "write NAME: ADDRESS below it")
    entries: dict[Hostname, HostsEntry] = {}
    problems: list[Problem] = []
    for key, value in node.entries:
        try:
            targets = TEXTS.read(value, scope)
            [(name, entry)] = parse_host_options(f"{key.text}={target}" for target in targets).items()
            if name in entries:
                raise scope.wrong(key, f"{quote(key.text)} stands here twice", "list its addresses in one place")
            entries[name] = entry
        except MalformedHostOption as error:
            problems += scope.wrong(key, f"host {quote(key.text)}: {error.message}").problems
        except Wrong as error:
            problems += error.problems
    if problems:
        raise Wrong(problems)
    return entries


def _read_host_texts(node: Node, scope: Scope) -> dict[Hostname, HostsEntry]:
    """The same said as `NAME=ADDRESS`, several times."""
    try:
        return parse_host_options(TEXTS.read(node, scope))
    except MalformedHostOption as error:
        raise scope.wrong(node, f"{quote(error.text)}: {error.message}") from error


def _read_name(node: Node, scope: Scope) -> Hostname:
    text = read_text(node, scope)
    try:
        return parse_hostname(text)
    except MalformedName as error:
        raise scope.wrong(node, error.message, error.repair or "write a name, for example cluster.local") from error


def _read_zones(node: Node, scope: Scope) -> dict[Hostname, tuple[Nameserver, ...]]:
    """A zone to its name server or several."""
    if type(node) is not MapNode:
        raise scope.wrong(node, f"{node.kind} where zones must stand", "write ZONE: ADDRESS below it")
    zones: dict[Hostname, tuple[Nameserver, ...]] = {}
    problems: list[Problem] = []
    for key, value in node.entries:
        try:
            zone = _read_name(key, scope)
            if zone in zones:
                raise scope.wrong(key, f"{quote(key.text)} stands here twice", "list its servers in one place")
            zones[zone] = tuple(NAMESERVERS.read(value, scope))
        except Wrong as error:
            problems += error.problems
    if problems:
        raise Wrong(problems)
    return zones


def _read_zone_texts(node: Node, scope: Scope) -> dict[Hostname, tuple[Nameserver, ...]]:
    """The same said as `ZONE=ADDRESS`, several times; servers of one zone add up."""
    zones: dict[Hostname, tuple[Nameserver, ...]] = {}
    for text in TEXTS.read(node, scope):
        name, equals, server = text.partition("=")
        if not equals:
            raise scope.wrong(node, f"{quote(text)} names no server", "write ZONE=ADDRESS, or ZONE=ADDRESS:PORT")
        zone = _read_name(Scalar(name, False, 1, 1), scope)
        zones[zone] = (*zones.get(zone, ()), _read_nameserver(Scalar(server, False, 1, 1), scope))
    return zones


def _read_target(node: Node, scope: Scope) -> str:
    """`NAME-or-ADDR:PORT`, one of each, as it is written in a policy."""
    text = read_text(node, scope)
    host, networks, (ports,) = read_destination(Scalar(text, False, node.line, node.column), scope)
    if any(network.num_addresses > 1 for network in networks) or ports.first != ports.last:
        hint = "write NAME:PORT or ADDR:PORT, for example time.example:4460"
        raise scope.wrong(node, f"{quote(text)} is no single destination", hint)
    if ports.first in ELSEWHERE:
        raise scope.wrong(node, f"{quote(text)}: udp port {ports.first} stays closed", ELSEWHERE[ports.first])
    return f"{host or _bracketed(str(networks[0].network_address))}:{ports.first}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _read_forwards(node: Node, scope: Scope) -> dict[SocketAddress, str]:
    """An address of the gate to the destination behind it."""
    if type(node) is not MapNode:
        raise scope.wrong(node, f"{node.kind} where addresses must stand", "write ADDR:PORT: NAME:PORT below it")
    forwards: dict[SocketAddress, str] = {}
    problems: list[Problem] = []
    for key, value in node.entries:
        try:
            address = _read_socket_address(key, scope)
            if address in forwards:
                raise scope.wrong(key, f"{quote(key.text)} stands here twice", "each address leads to one destination")
            forwards[address] = _read_target(value, scope)
        except Wrong as error:
            problems += error.problems
    if problems:
        raise Wrong(problems)
    return forwards


def _read_forward_texts(node: Node, scope: Scope) -> dict[SocketAddress, str]:
    """The same said as `ADDR:PORT=TO`, several times."""
    forwards: dict[SocketAddress, str] = {}
    for text in TEXTS.read(node, scope):
        address, equals, target = text.partition("=")
        if not equals:
            raise scope.wrong(node, f"{quote(text)} names no destination", "write ADDR:PORT=NAME:PORT")
        where = _read_socket_address(Scalar(address, False, 1, 1), scope)
        if where in forwards:
            raise scope.wrong(node, f"{quote(address)} stands here twice", "each address leads to one destination")
        forwards[where] = _read_target(Scalar(target, False, 1, 1), scope)
    return forwards


def _shown(node: Node) -> str:
    return quote(node.text) if type(node) is Scalar else node.kind


_ADDRESS_PATTERN = r"(?:\[[0-9A-Fa-f:.]+(?:%[^\[\]]+)?\]|[0-9.]+)"
_TARGET: dict[str, Any] = {
    "type": "string",
    "pattern": rf"^(?:{_ADDRESS_PATTERN}(?::[0-9]{{1,5}})?|[0-9A-Fa-f:.]+(?:%[^\[\]]+)?)$",
}

TEXTS = listing(Shape(read_text, {"type": "string"}), least=1, single=True)
PATH = Shape(_read_path, {"type": "string", "minLength": 1})
PATHS = listing(PATH, least=1, single=True)
SOCKET_ADDRESS = Shape(_read_socket_address, {"type": "string", "pattern": f"^{_ADDRESS_PATTERN}:[0-9]{{1,5}}$"})
SOCKET_ADDRESSES = listing(SOCKET_ADDRESS, least=1, single=True)
ADMIN = Shape(_read_admin, {"type": "string", "pattern": f"^(?:{NONE}|{_ADDRESS_PATTERN}:[0-9]{{1,5}})$"})
NAMESERVERS = listing(Shape(_read_nameserver, _TARGET), least=1, single=True)
BALANCERS = listing(
    Shape(_read_balancer, {"type": "string", "pattern": r"^[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?$"}), least=1, single=True
)
UPSTREAM_URL = Shape(_read_upstream_url, {"type": "string", "pattern": r"^http://[^@/?#]+:[0-9]{1,5}/?$"})
DIRECT = listing(Shape(_read_direct, {"type": "string", "minLength": 1}), least=1, single=True)
HOSTS = Shape(
    _read_hosts,
    {
        "type": "object",
        "propertyNames": {"type": "string", "pattern": r"^[^\s*/:@#?%\[\]\\=]+$"},
        "additionalProperties": {"anyOf": [_TARGET, {"type": "array", "items": _TARGET, "minItems": 1}]},
    },
)
HOST_TEXTS = Shape(_read_host_texts, {})
_NAME: dict[str, Any] = {"type": "string", "pattern": r"^[^\s*/:@#?%\[\]\\=]+$"}
NAMES = listing(Shape(_read_name, _NAME), least=1, single=True)
ZONES = Shape(
    _read_zones,
    {
        "type": "object",
        "propertyNames": _NAME,
        "additionalProperties": {"anyOf": [_TARGET, {"type": "array", "items": _TARGET, "minItems": 1}]},
    },
)
ZONE_TEXTS = Shape(_read_zone_texts, {})
FORWARDS = Shape(
    _read_forwards,
    {
        "type": "object",
        "propertyNames": SOCKET_ADDRESS.schema,
        "additionalProperties": DESTINATION_SCHEMA,
    },
)
FORWARD_TEXTS = Shape(_read_forward_texts, {})
