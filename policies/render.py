"""A rule as YAML to paste: the keys that a proposed edit can contain. Reading YAML is `document`'s work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from policies.model import HTTPS_PORT, Address, AnyRule, HostRule, NameRule, Network, Tls, TransportRule

_PLAIN_SCALAR = re.compile(r"[a-z][a-z0-9_-]*(?:\.[a-z0-9_-]+)+(?::[0-9]+)?")  # a name with a dot is no YAML keyword


def render(rule: AnyRule) -> tuple[str, ...]:
    """One item of a `rules:` list."""
    match rule:
        case HostRule():
            return tuple(_host_lines(rule))
        case TransportRule():
            where = rule.host or next(map(_network_text, rule.networks))
            first = f"- {rule.stage}: {scalar(f'{where}:{rule.ports[0]}')}"
            return (first, f"  quic: {rule.quic}") if rule.quic else (first,)
        case NameRule():
            return (f"- {rule.stage}: {scalar(str(rule.pattern))}",)


def scalar(text: str) -> str:
    return text if _PLAIN_SCALAR.fullmatch(text) else quoted(text)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML one


def list_text(items: Iterable[object]) -> str:
    return f"[{', '.join(map(str, items))}]"


def _host_lines(rule: HostRule) -> Iterator[str]:
    yield f"- host: {scalar(str(rule.pattern))}"
    if rule.ports != (HTTPS_PORT,):
        yield f"  ports: {list_text(rule.ports)}"
    if rule.plain:
        yield f"  plain: {list_text(rule.plain)}"
    if rule.tls is Tls.INSPECT:
        yield "  tls: inspect"
    if rule.allow is not None:
        yield f"  allow: {list_text(quoted(entry.text) for entry in rule.allow)}"
    if rule.ech:
        yield "  ech: allow"
    if rule.upgrade:
        yield f"  upgrade: {list_text(sorted(rule.upgrade))}"


def _network_text(network: Network) -> str:
    return bracketed(network.network_address if network.num_addresses == 1 else network)


def bracketed(address: Address | Network) -> str:
    """As it stands before a port: IPv6 in brackets (RFC 3986 3.2.2)."""
    return f"[{address}]" if address.version == 6 else str(address)
