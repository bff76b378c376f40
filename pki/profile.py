"""What stands in a certificate: names, life, extensions. Who signs it, and whether it may be signed, is `authority`'s.

The profile is what the strictest clients ask for (RFC 5280 4.2.1, CA/B baseline, Python 3.13's VERIFY_X509_STRICT):
key identifiers everywhere, critical basic constraints and key usage, an address as iPAddress and never as dNSName.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BACKDATING = timedelta(hours=1)  # a workload's clock may be slow; counted in every life
MAX_NAME = 64  # RFC 5280 A.1: ub-organization-name and ub-common-name

MIN_RSA = 2048  # bits
NO_CA_KEY = "neither an elliptic curve nor an RSA key, the kinds that a CA has"

_CURVES, _CURVE_NAMES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1), "P-256, P-384 or P-521"
_HOST = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_MAX_HOST = 253

type CaKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
type CaPublicKey = CertificatePublicKeyTypes
type LeafName = x509.DNSName | x509.IPAddress
type Life = tuple[datetime, datetime]  # the first and the last second; both count (RFC 5280 4.1.2.5)


class AuthorityError(Exception):
    """No certificate is issued: the name cannot stand in one, or its issuer cannot sign it now. `str()` says why."""


class KeyOffline(AuthorityError):
    """The key of the CA that is to sign is not here."""


def unsigned_ca(
    subject: x509.Name,
    key: CaPublicKey,
    life: Life,
    issuer: x509.Certificate | None = None,
    *,
    path_length: int | None,
    identifier: x509.SubjectKeyIdentifier | None = None,
) -> x509.CertificateBuilder:
    """A CA, without an issuer a root.

    path_length  how many CAs may stand below it
    identifier   that it is known by already, if it is
    """
    return (
        _unsigned(subject, key, life, issuer, identifier)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
    )


def unsigned_leaf(
    name: LeafName, key: CaPublicKey, life: Life, issuer: x509.Certificate, *, with_subject: bool = True
) -> x509.CertificateBuilder:
    """A leaf for `name`, which is also its common name where that has the space."""
    common = str(name.value)
    with_subject = with_subject and len(common) <= MAX_NAME
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if with_subject else [])
    return (
        _unsigned(subject, key, life, issuer)
        # RFC 5280 4.2.1.6: without a subject the alternative name is critical. Java 17 and Python 3.13 insist.
        .add_extension(x509.SubjectAlternativeName([name]), critical=not with_subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False, encipherment=isinstance(key, rsa.RSAPublicKey)), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )


def leaf_name(host: str) -> LeafName:
    """The name in a leaf for `host`. Raises AuthorityError for what is neither a name in normal form nor an address."""
    address = address_of(host)
    if address is not None:
        return x509.IPAddress(address)
    if not is_host_name(host):
        raise AuthorityError(f"{host[:80]!r} is no host name in normal form; no leaf is issued for it")
    return x509.DNSName(host)


def digest_for(key: CaKey) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512:
    """What `key` signs with. Clients pair a curve with the digest of its strength (RFC 8446 4.2.3)."""
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.key_size > 256:
        return hashes.SHA384() if key.curve.key_size == 384 else hashes.SHA512()
    return hashes.SHA256()


def life_from(now: datetime, life: timedelta | None, *within: x509.Certificate) -> Life:
    """The life of a certificate made at `now`, inside that of each of `within`; None: as long as these allow."""
    before = now.astimezone(UTC).replace(microsecond=0) - BACKDATING
    ends = [certificate.not_valid_after_utc for certificate in within]
    if life is not None:
        try:
            ends.append(before + life - timedelta(seconds=1))
        except OverflowError as error:
            raise AuthorityError(
                f"a life of {life.days} days ends after the year 9999; choose a shorter one"
            ) from error
    if min(ends) <= now:
        raise AuthorityError(f"a life of {life} is over before it begins; choose a longer one")
    return max([before, *(certificate.not_valid_before_utc for certificate in within)]), min(ends)


def ca_name(name: str, role: str, key: CaKey) -> x509.Name:
    """`O=name, CN=Outgate root 1a2b3c4d`: the digits keep two authorities of one name apart in a client's store."""
    if not is_organisation(name):
        raise AuthorityError(f"{name[:80]!r} cannot name an authority; use 1 to {MAX_NAME} printable characters")
    digits = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
            x509.NameAttribute(NameOID.COMMON_NAME, f"Outgate {role} {digits}"),
        ]
    )


def is_organisation(name: str) -> bool:
    """Whether a certificate can carry `name` as an organisation's."""
    return bool(name.strip()) and len(name) <= MAX_NAME and name.isprintable()


def organisation_of(ca: x509.Certificate) -> str:
    """What a CA that succeeds this one, or is issued below it, is named by."""
    found = ca.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    name = str(found[0].value) if found else ""
    return name if is_organisation(name) else "Outgate"


def weakness(key: CaPublicKey) -> str:
    """Why clients would refuse a CA with this key, for the end of a message; empty: they do not."""
    match key:
        case ec.EllipticCurvePublicKey():
            return "" if isinstance(key.curve, _CURVES) else f"a key on {key.curve.name}; a CA's is on {_CURVE_NAMES}"
        case rsa.RSAPublicKey():
            enough = key.key_size >= MIN_RSA
            return "" if enough else f"an RSA key of {key.key_size} bits; a CA's has {MIN_RSA} at least"
    return NO_CA_KEY


def stays_in_token(key: CaKey | None) -> bool:
    """Whether it is one of `signer`'s, which can sign and not be copied."""
    return hasattr(key, "uri")


def is_host_name(text: str) -> bool:
    """Whether this is a host name in normal form: lower case, IDN as A-labels, no final dot."""
    return len(text) <= _MAX_HOST and bool(_HOST.fullmatch(text))


def address_of(host: str) -> IPv4Address | IPv6Address | None:
    """The address that `host` is, if it is one."""
    if "%" in host:  # a zone identifier is local to one machine and has no place in a certificate
        return None
    try:
        return ip_address(host)
    except ValueError:
        return None


def identifier_of(certificate: x509.Certificate) -> x509.SubjectKeyIdentifier:
    """What a CA is known by: its own identifier, not a digest made again, for clients compare the two."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:  # an old root of somebody else's
        return x509.SubjectKeyIdentifier.from_public_key(certificate.public_key())


def require_readable(certificate: x509.Certificate) -> None:
    """Raises ValueError where a part of it cannot be parsed, for each is parsed only when it is asked for."""
    try:
        _ = certificate.subject.rfc4514_string(), certificate.issuer, certificate.extensions, certificate.public_key()
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except Exception as error:  # whatever its parsers meet: ValueError, DuplicateExtension, UnsupportedAlgorithm
        raise ValueError(f"cannot be parsed: {error}") from error


def path_length_of(certificate: x509.Certificate) -> int | None:
    """How many CAs may stand below this one; None: any number."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    except x509.ExtensionNotFound:
        return None


def _unsigned(
    subject: x509.Name,
    key: CaPublicKey,
    life: Life,
    issuer: x509.Certificate | None,
    identifier: x509.SubjectKeyIdentifier | None = None,
) -> x509.CertificateBuilder:
    """What every certificate carries. Without an issuer it is its own."""
    identifier = identifier or x509.SubjectKeyIdentifier.from_public_key(key)
    issuer_identifier = identifier_of(issuer) if issuer else identifier
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(life[0])
        .not_valid_after(life[1])
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
        )
    )


def _key_usage(*, ca: bool, encipherment: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=encipherment,  # TLS 1.2 without forward secrecy: the last resort of old RSA clients
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
