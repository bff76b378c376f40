"""Name constraints (RFC 5280 4.2.1.10): the names that a CA is limited to, and whether one is among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network

from cryptography import x509

from pki.profile import AuthorityError, address_of, is_host_name

# The issuing CA goes with every handshake. Java reads no handshake message over 32 KiB, rustls none over 64 and OpenSSL
# none over 100 (measured): one half of the least is for the domains, the other for the rest of the chain.
MAX_CONSTRAINTS = 16 << 10

_EVERY_ADDRESS = (ip_network("0.0.0.0/0"), ip_network("::/0"))


def name_constraints(domains: Sequence[str]) -> x509.NameConstraints:
    """These domains and what is below them, and no address: a kind of name that is not mentioned would be free.

    Raises AuthorityError for what is no domain, or for too many of them.
    """
    if wrong := [domain for domain in domains if not _is_domain(domain)]:
        raise AuthorityError(f"{wrong[0][:80]!r} is no host name in normal form; an issuing CA is not limited to it")
    permitted = [x509.DNSName(domain) for domain in outermost(domains)]
    constraints = x509.NameConstraints(permitted, [x509.IPAddress(network) for network in _EVERY_ADDRESS])
    if (size := len(constraints.public_bytes())) > MAX_CONSTRAINTS:
        raise AuthorityError(
            f"{len(permitted)} domains take {size} bytes of an issuing CA; past {MAX_CONSTRAINTS} there are clients "
            "that cannot read its chain; name domains above them"
        )
    return constraints


def outermost(domains: Sequence[str]) -> list[str]:
    """`domains` without those that are below another of them, in order."""
    every = set(domains)
    return sorted(domain for domain in every if every.isdisjoint(_above(domain)[1:]))


def constraints_of(certificate: x509.Certificate) -> x509.NameConstraints | None:
    """The name constraints of a CA, if it has any."""
    try:
        return certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return None


def permitted_domains(certificate: x509.Certificate) -> tuple[str, ...] | None:
    """The domains that a CA's name constraints permit; None: it has none, or none that limit names."""
    constraints = constraints_of(certificate)
    return tuple(_domains(constraints.permitted_subtrees or ())) or None if constraints else None


def covers(certificate: x509.Certificate, host: str) -> bool:
    """Whether this CA's constraints let clients accept a leaf for `host`: a name in normal form, or an address."""
    limits = _limits(certificate)
    if limits is None:
        return True
    if (address := address_of(host)) is not None:
        # Networks of one version limit addresses of the other too: their kind of name is mentioned.
        inside = not limits.networks or any(address in network for network in limits.networks)
        return inside and not any(address in network for network in limits.no_networks)
    # "" is above every name. A domain written with a dot in front is not above itself (as OpenSSL and Go read it).
    above = {"", *_above(host), *(f".{domain}" for domain in _above(host)[1:])}
    inside = not limits.domains or not above.isdisjoint(limits.domains)
    return inside and above.isdisjoint(limits.no_domains)


def limits_subject(certificate: x509.Certificate, host: str) -> bool:
    """Whether the subject of a leaf for `host` may violate this CA's constraints. A leaf without one violates none."""
    limits = _limits(certificate)
    if limits is None:
        return False
    return limits.has_subjects or address_of(host) is not None  # OpenSSL holds such a common name against the domains


@dataclass(frozen=True, slots=True)
class _Limits:
    domains: frozenset[str]
    no_domains: frozenset[str]
    networks: tuple[IPv4Network | IPv6Network, ...]
    no_networks: tuple[IPv4Network | IPv6Network, ...]
    has_subjects: bool


@lru_cache(maxsize=32)  # asked for every leaf, and there may be hundreds of domains
def _limits(certificate: x509.Certificate) -> _Limits | None:
    constraints = constraints_of(certificate)
    if constraints is None:
        return None
    permitted, excluded = constraints.permitted_subtrees or [], constraints.excluded_subtrees or []
    return _Limits(
        frozenset(_domains(permitted)),
        frozenset(_domains(excluded)),
        tuple(_networks(permitted)),
        tuple(_networks(excluded)),
        any(isinstance(name, x509.DirectoryName) for name in (*permitted, *excluded)),
    )


def _is_domain(text: str) -> bool:
    """Whether every client can read `text` as a constraint. One that rustls cannot read spoils every leaf there."""
    labels = text.split(".")
    has_bare_hyphen = any(label.startswith("-") or label.endswith("-") for label in labels)
    return is_host_name(text) and not has_bare_hyphen and not labels[-1].isdecimal()


def _above(host: str) -> list[str]:
    """`host` and the domains above it."""
    labels = host.split(".")
    return [".".join(labels[depth:]) for depth in range(len(labels))]


def _domains(subtrees: Sequence[x509.GeneralName]) -> list[str]:
    return [name.value.lower() for name in subtrees if isinstance(name, x509.DNSName)]


def _networks(subtrees: Sequence[x509.GeneralName]) -> list[IPv4Network | IPv6Network]:
    values = (name.value for name in subtrees if isinstance(name, x509.IPAddress))
    return [value for value in values if isinstance(value, IPv4Network | IPv6Network)]
