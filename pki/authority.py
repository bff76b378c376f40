"""Certificates in memory: roots, the issuing CA below them, and a leaf for each host. It reads no clock and no file.

The profile is what the strictest clients ask for (RFC 5280 4.2.1, CA/B baseline, Python 3.13's VERIFY_X509_STRICT):
key identifiers everywhere, critical basic constraints and key usage, an address as iPAddress and never as dNSName.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BACKDATING = timedelta(hours=1)  # a workload's clock may be slow; counted in every life below
LEAF_LIFE = timedelta(days=7)  # clients refuse long-lived leaves: 398 days once, 200 now, 47 from 2029 (CA/B SC-081v3)
YEAR = timedelta(days=365.25)
MAX_NAME = 64  # RFC 5280 A.1: ub-organization-name and ub-common-name

_HOST = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_MAX_HOST = 253


class AuthorityError(Exception):
    """No certificate is issued: the name cannot stand in one, or its issuer is not valid now. `str()` says which."""


@dataclass(frozen=True, slots=True)
class Root:
    """What workloads trust. `key` is None where it is kept offline."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | None = None


@dataclass(frozen=True, slots=True)
class Issuing:
    """What signs leaves. `chain` is sent after every leaf: this CA's certificate first, never a root."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True)
class Authority:
    """An issuing CA and the roots above it. A gate works without any root; a trust bundle needs one."""

    issuing: Issuing
    roots: tuple[Root, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate for one host with a key of its own. From `renew_at` on, mint another."""

    host: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]
    renew_at: datetime

    def pem(self) -> bytes:
        """What a TLS server loads: the leaf, what is sent after it, and the leaf's key."""
        return certificates_pem(self.certificate, *self.chain) + key_pem(self.key)


def create_authority(
    now: datetime, *, name: str = "Outgate", root_years: int = 10, issuing_life: timedelta = YEAR
) -> Authority:
    """A new root, and an issuing CA that it signed. Raises AuthorityError when `name` cannot stand in a certificate."""
    root = create_root(now, name=name, years=root_years)
    return Authority(create_issuing(root, now, name=name, life=issuing_life), (root,))


def create_root(now: datetime, *, name: str, years: int = 10) -> Root:
    """A new self-signed root, without a path length: Go and OpenSSL would hold cross certificates against it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _ca_name(name, "root", key)
    unsigned = _unsigned_ca(subject, key, _life(now, years * YEAR), path_length=None)
    return Root(unsigned.sign(key, hashes.SHA256()), key)


def create_issuing(root: Root, now: datetime, *, name: str, life: timedelta = YEAR) -> Issuing:
    """A new issuing CA below `root`, which it does not outlive. Raises AuthorityError without the root's key."""
    if root.key is None:
        raise AuthorityError(f"root {certificate_id(root.certificate)} has no key here; sign where its key is kept")
    _require_valid(root.certificate, now)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _ca_name(name, "issuing CA", key)
    unsigned = _unsigned_ca(subject, key, _life(now, life, root.certificate), root.certificate, path_length=0)
    certificate = unsigned.sign(root.key, hashes.SHA256())
    return Issuing(certificate, key, (certificate,))


def issue_leaf(issuing: Issuing, host: str, now: datetime) -> Leaf:
    """A leaf for `host`: a name in normal form, or an address.

    Raises AuthorityError when `host` is neither, or when the issuing CA is not valid at `now`.
    """
    alternative = _alternative_name(host)
    _require_valid(issuing.certificate, now)
    key = ec.generate_private_key(ec.SECP256R1())
    life = _life(now, LEAF_LIFE, issuing.certificate)
    # RFC 5280 4.2.1.6: without a subject the alternative name is critical. Java 17 and Python 3.13 insist.
    named = len(host) <= MAX_NAME
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)] if named else [])
    certificate = (
        _unsigned(subject, key, life, issuing.certificate)
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=not named)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(issuing.key, hashes.SHA256())
    )
    # Counted from now, not from the backdated start: near its issuer's end a leaf would be stale as it is minted.
    return Leaf(host, certificate, key, issuing.chain, renew_at=now + (life[1] - now) / 2)


def certificate_id(certificate: x509.Certificate) -> str:
    """The short name of a CA in paths, aliases and messages: the first 16 hex digits of its SHA-256."""
    return certificate.fingerprint(hashes.SHA256()).hex()[:16]


def fingerprint(certificate: x509.Certificate) -> str:
    """The SHA-256 as `openssl x509 -fingerprint -sha256` prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def certificates_pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _alternative_name(host: str) -> x509.GeneralName:
    address = _address(host)
    if address is not None:
        return x509.IPAddress(address)
    if len(host) > _MAX_HOST or not _HOST.fullmatch(host):
        raise AuthorityError(f"{host[:80]!r} is no host name in normal form; no leaf is issued for it")
    return x509.DNSName(host)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    if "%" in host:  # a zone identifier is local to one machine and has no place in a certificate
        return None
    try:
        return ip_address(host)
    except ValueError:
        return None


def _require_valid(issuer: x509.Certificate, now: datetime) -> None:
    if now >= issuer.not_valid_after_utc:
        raise AuthorityError(f"CA {certificate_id(issuer)} expired at {issuer.not_valid_after_utc}; renew it")
    if now < issuer.not_valid_before_utc:
        raise AuthorityError(
            f"CA {certificate_id(issuer)} is not valid before {issuer.not_valid_before_utc}; set the clock"
        )


def _life(now: datetime, life: timedelta, issuer: x509.Certificate | None = None) -> tuple[datetime, datetime]:
    """First and last second of a certificate made at `now`, inside its issuer's. Both ends count (RFC 5280 4.1.2.5)."""
    before = now.astimezone(UTC).replace(microsecond=0) - BACKDATING
    after = before + life - timedelta(seconds=1)
    if issuer is None:
        return before, after
    return max(before, issuer.not_valid_before_utc), min(after, issuer.not_valid_after_utc)


def _unsigned_ca(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    life: tuple[datetime, datetime],
    issuer: x509.Certificate | None = None,
    *,
    path_length: int | None,
) -> x509.CertificateBuilder:
    return (
        _unsigned(subject, key, life, issuer)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
    )


def _unsigned(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    life: tuple[datetime, datetime],
    issuer: x509.Certificate | None,
) -> x509.CertificateBuilder:
    """What every certificate carries. Without an issuer it is its own."""
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_identifier = _identifier_of(issuer) if issuer else identifier
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(life[0])
        .not_valid_after(life[1])
        .add_extension(identifier, critical=False)
        # The issuer's own identifier, not a digest made again: a client finds the issuer by comparing the two.
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
        )
    )


def _identifier_of(certificate: x509.Certificate) -> x509.SubjectKeyIdentifier:
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _ca_name(name: str, role: str, key: ec.EllipticCurvePrivateKey) -> x509.Name:
    """`O=name, CN=Outgate root 1a2b3c4d`: the digits keep two authorities of one name apart in a client's store."""
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise AuthorityError(f"{name[:80]!r} cannot name an authority; use 1 to {MAX_NAME} printable characters")
    digits = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
            x509.NameAttribute(NameOID.COMMON_NAME, f"Outgate {role} {digits}"),
        ]
    )
