"""What is wrong with a CA, and what to change: for the strictest clients, and for firewalls that are given one.

It reads no clock and no file. What a firewall asks for is what its maker publishes, beside what clients ask for anyway:

azure-firewall  learn.microsoft.com, "Azure Firewall Premium certificates", Intermediate CA certificate requirements
aws-nfw         docs.aws.amazon.com, "Using SSL/TLS certificates with TLS inspection configurations in AWS Network
                Firewall", and what that builds on: "Prerequisites for importing ACM certificates", "ImportCertificate"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, ExtensionOID

from pki.authority import AuthorityError, key_pem
from pki.chains import is_self_signed
from pki.constraints import constraints_of, name_constraints
from pki.der import elements
from pki.pkcs12 import Form, Loaded

SOON = timedelta(days=30)
A_YEAR_FORWARD = timedelta(days=365)
MAX_ACM_KEY = 5120  # bytes: ImportCertificate
MAX_ACM_OCSP = 1000  # characters: ImportCertificate

_ANEW = "have it issued anew with"
_CONSTRAINTS = "basicConstraints=critical,CA:TRUE"
_USAGE = "keyUsage=critical,keyCertSign,cRLSign"
_LARGER = "make the CA anew with an EC P-256 key, or RSA-3072"
_UNDERSTOOD = {  # what every client that verifies chains knows (RFC 5280 4.2)
    ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.NAME_CONSTRAINTS, ExtensionOID.CERTIFICATE_POLICIES, ExtensionOID.POLICY_CONSTRAINTS,
    ExtensionOID.INHIBIT_ANY_POLICY, ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
}  # fmt: skip
_UTC_TIME, _INTEGER, _VERSION = 0x17, 0x02, 0xA0  # DER tags


class Profile(StrEnum):
    """Who is to accept the CA."""

    STRICT = "strict"  # the strictest clients: our issuing CA or, where it is self-signed, our root
    AZURE_FIREWALL = "azure-firewall"
    AWS_NFW = "aws-nfw"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong and what to change. `breaks`: somebody refuses the CA for it; else it is advice."""

    what: str
    repair: str
    breaks: bool = True


def faults(loaded: Loaded, profile: Profile, now: datetime) -> list[Fault]:
    """All that is wrong with a CA and what stands above it: what its user asks for, then what every client does."""
    certificates = (loaded.certificate, *loaded.chain)
    if any(_unparsed(one) for one in certificates):
        return [fault for one in certificates for fault in _unparsed(one)]
    match profile:
        case Profile.STRICT:
            below, own = int(is_self_signed(loaded.certificate)), _alone(loaded)
        case Profile.AZURE_FIREWALL:
            below, own = 1, _azure_firewall(loaded, now)
        case Profile.AWS_NFW:
            below, own = 0, _aws_nfw(loaded)
    found = [*_pair(loaded), *own]
    for distance, ca in enumerate(certificates):
        issuer = certificates[distance + 1] if distance + 1 < len(certificates) else None
        place = f"above it, {ca.subject.rfc4514_string()}: " if distance else ""
        found += [replace(one, what=place + one.what) for one in _as_ca(ca, issuer, below + distance, now)]
    return found


# What the users ask for


def _alone(loaded: Loaded) -> Iterator[Fault]:
    if loaded.strays:
        yield Fault(
            f"{_counted(loaded.strays)} beside it did not sign it",
            "leave in the file what stands above it",
            breaks=False,
        )


def _azure_firewall(loaded: Loaded, now: datetime) -> Iterator[Fault]:
    ca, key = loaded.certificate, loaded.certificate.public_key()
    anew = "issue one with 'outgate pki export --profile azure-firewall'"
    if is_self_signed(ca):
        yield Fault("self-signed, and Azure Firewall takes an intermediate CA", anew)
    if loaded.key is None:
        yield Fault("no private key with it", "put the key into the PFX, or name its file with --key")
    if loaded.form is not Form.PKCS12:
        pfx = "openssl pkcs12 -export -passout pass: -inkey KEY -in CERTIFICATE -out PFX"
        yield Fault(f"{loaded.form} and not a PFX", f"write it as one: {pfx}")
    elif loaded.is_encrypted:
        yield Fault("the PFX has a password", "write it anew with the empty one: openssl pkcs12 -export -passout pass:")
    if further := (*loaded.chain, *loaded.strays):
        yield Fault(f"{_counted(further)} beside it, and it must stand alone", "leave the chain out of the PFX")
    if not isinstance(key, rsa.RSAPublicKey):
        yield Fault(f"{_described(key)} key, and Azure Firewall takes RSA of 4096 bits or more", anew)
    elif key.key_size < 4096:
        yield Fault(f"RSA-{key.key_size} key, and Azure Firewall takes 4096 bits or more", anew)
    if now <= ca.not_valid_after_utc < now + A_YEAR_FORWARD:
        yield Fault(f"ends {_date(ca)}, and it must be valid for one year forward", anew)
    if (constraints := _extension(ca, x509.BasicConstraints)) and constraints.ca and constraints.path_length is None:
        yield Fault("no path length, and Azure Firewall looks for one or more", f"{_ANEW} {_CONSTRAINTS},pathlen:1")


def _aws_nfw(loaded: Loaded) -> Iterator[Fault]:
    ca, key = loaded.certificate, loaded.certificate.public_key()
    anew = "issue one with 'outgate pki export --profile aws-nfw'"
    if loaded.key is None:
        yield Fault("no private key with it", "name its file with --key")
    elif len(key_pem(loaded.key)) > MAX_ACM_KEY:
        yield Fault(f"the key is longer than {MAX_ACM_KEY} bytes of PEM, the most that ACM takes", anew)
    if loaded.form is not Form.PEM:
        yield Fault(f"{loaded.form}, and ACM takes PEM", "write certificate, chain and key to a PEM file each")
    elif loaded.is_encrypted:
        yield Fault("the key has a password, and ACM takes none", "write it without: openssl pkey -in KEY -out NEW")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size not in (2048, 3072, 4096):
        yield Fault(f"RSA-{key.key_size} key, and ACM with clients takes 2048, 3072 and 4096 bits", anew)
    if not is_self_signed(ca) and not (loaded.chain and is_self_signed(loaded.chain[-1])):
        yield Fault("its chain does not lead to a root, and ACM asks for all of it", "name its file with --chain")
    for address in _ocsp_addresses(ca):
        if len(address) > MAX_ACM_OCSP:
            yield Fault(f"an OCSP address longer than {MAX_ACM_OCSP} characters, the most that ACM takes", anew)
        if ".acm-pca." in address:
            yield Fault("issued by AWS Private CA, whose CAs Network Firewall does not take", anew)
    yield from _alone(loaded)


def _pair(loaded: Loaded) -> Iterator[Fault]:
    if loaded.key is not None and loaded.key.public_key() != loaded.certificate.public_key():
        yield Fault("the key is another certificate's", "name the key that the CA was made with")


# What every client asks for


def _unparsed(certificate: x509.Certificate) -> list[Fault]:
    try:
        certificate.extensions, certificate.subject, certificate.issuer  # noqa: B018 - parsed when asked for
        certificate.not_valid_before_utc, certificate.not_valid_after_utc  # noqa: B018
    except Exception as error:  # whatever its parsers meet: ValueError, DuplicateExtension, KeyError (seen)
        return [Fault(f"cannot be parsed: {error}", f"{_ANEW} the encodings of RFC 5280")]
    try:
        certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return [Fault("a public key of a kind that clients do not know", _LARGER)]
    return []


def _as_ca(ca: x509.Certificate, issuer: x509.Certificate | None, below: int, now: datetime) -> Iterator[Fault]:
    yield from _form(ca)
    yield from _life(ca, issuer, now)
    yield from _key(ca)
    yield from _signature(ca)
    yield from _constraints(ca, below)
    yield from _usages(ca)
    yield from _identifiers(ca, issuer)
    yield from _names(ca)
    yield from _critical(ca)


def _form(ca: x509.Certificate) -> Iterator[Fault]:
    if ca.version is not x509.Version.v3:
        yield Fault("X.509 version 1, which marks no CA", f"{_ANEW} version 3 and {_CONSTRAINTS}")
    serial, times = _serial_and_times(ca.tbs_certificate_bytes)
    if serial[0] & 0x80 or not any(serial):
        yield Fault("its serial number is not positive (RFC 5280 4.1.2.2)", f"{_ANEW} another one")
    elif len(serial) > 20:
        yield Fault("its serial number is longer than 20 octets (RFC 5280 4.1.2.2)", f"{_ANEW} a shorter one")
    if not ca.subject.rdns or not ca.issuer.rdns:
        yield Fault("no subject or no issuer (RFC 5280 4.1.2.4, 4.1.2.6)", f"{_ANEW} a subject")
    for tag, moment in zip(times, (ca.not_valid_before_utc, ca.not_valid_after_utc), strict=True):
        if (tag == _UTC_TIME) != (moment.year < 2050):
            yield Fault("a date is encoded against RFC 5280 4.1.2.5", f"{_ANEW} UTCTime up to 2049", breaks=False)


def _life(ca: x509.Certificate, issuer: x509.Certificate | None, now: datetime) -> Iterator[Fault]:
    if now < ca.not_valid_before_utc:
        yield Fault(f"not valid before {ca.not_valid_before_utc:%Y-%m-%d %H:%M} UTC", "wait, or set this clock right")
    elif now > ca.not_valid_after_utc:
        yield Fault(f"expired {_date(ca)}", "have it issued anew, or renewed")
    elif now > ca.not_valid_after_utc - SOON:
        yield Fault(f"ends {_date(ca)}", "have it renewed now: leaves end with it", breaks=False)
    if issuer is not None and ca.not_valid_after_utc > issuer.not_valid_after_utc:
        yield Fault(f"outlives its issuer, which ends {_date(issuer)}", "count with that day", breaks=False)


def _key(ca: x509.Certificate) -> Iterator[Fault]:
    match ca.public_key():
        case rsa.RSAPublicKey() as key:
            if key.key_size < 2048:
                yield Fault(f"RSA-{key.key_size} key, and clients take 2048 bits or more", _LARGER)
            elif key.key_size < 3072:
                yield Fault(f"RSA-{key.key_size} key, good until 2030 (NIST SP 800-57)", _LARGER, breaks=False)
            if key.public_numbers().e < 65537:
                yield Fault(f"RSA exponent {key.public_numbers().e}, and clients take 65537", _LARGER)
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1() | ec.SECP384R1()):
            pass
        case ec.EllipticCurvePublicKey(curve=ec.SECP521R1()):
            yield Fault("EC P-521 key, which BoringSSL's defaults do not verify", _LARGER, breaks=False)
        case key:
            yield Fault(f"{_described(key)} key, and clients take EC P-256, P-384 or RSA", _LARGER)


def _signature(ca: x509.Certificate) -> Iterator[Fault]:
    try:
        algorithm = ca.signature_hash_algorithm
    except UnsupportedAlgorithm:
        yield Fault("signed by an algorithm that clients do not know", f"{_ANEW} SHA-256")
        return
    if isinstance(algorithm, hashes.MD5 | hashes.SHA1):
        # Nobody verifies a root's own signature; auditors stumble over it all the same.
        yield Fault(f"signed with {algorithm.name.upper()}", f"{_ANEW} SHA-256", breaks=not is_self_signed(ca))


def _constraints(ca: x509.Certificate, below: int) -> Iterator[Fault]:
    constraints = _extension(ca, x509.BasicConstraints)
    wanted = f"{_ANEW} {_CONSTRAINTS}" + (f",pathlen:{below}" if below else "")
    if constraints is None or not constraints.ca:
        yield Fault("not a CA: basicConstraints does not say CA:TRUE", "name a CA's certificate and not a leaf's")
        return
    if not _is_critical(ca, x509.BasicConstraints):
        yield Fault("basicConstraints is not critical (RFC 5280 4.2.1.9)", wanted)
    if constraints.path_length is not None and constraints.path_length < below:
        permits = f"permits {constraints.path_length} CA below it, and {below} must stand there"
        yield Fault(f"path length {constraints.path_length} {permits}", wanted)


def _usages(ca: x509.Certificate) -> Iterator[Fault]:
    usage = _extension(ca, x509.KeyUsage)
    if usage is None or not usage.key_cert_sign:
        yield Fault("keyUsage does not say keyCertSign: it may sign no certificate", f"{_ANEW} {_USAGE}")
    elif not _is_critical(ca, x509.KeyUsage):
        yield Fault("keyUsage is not critical (RFC 5280 4.2.1.3)", f"{_ANEW} {_USAGE}")
    extended = _extension(ca, x509.ExtendedKeyUsage)
    if extended is not None and ExtendedKeyUsageOID.SERVER_AUTH not in extended:
        yield Fault(
            "extendedKeyUsage lacks serverAuth: it may sign for no server", f"{_ANEW} it, or without the extension"
        )


def _identifiers(ca: x509.Certificate, issuer: x509.Certificate | None) -> Iterator[Fault]:
    own, above = _extension(ca, x509.SubjectKeyIdentifier), _extension(ca, x509.AuthorityKeyIdentifier)
    if own is None:
        yield Fault("no subjectKeyIdentifier (RFC 5280 4.2.1.2)", f"{_ANEW} subjectKeyIdentifier=hash")
    if (above is None or above.key_identifier is None) and not is_self_signed(ca):
        yield Fault("no authorityKeyIdentifier (RFC 5280 4.2.1.1)", f"{_ANEW} authorityKeyIdentifier=keyid:always")
    if above is None or issuer is None:
        return
    of_issuer = _extension(issuer, x509.SubjectKeyIdentifier)
    if of_issuer and above.key_identifier and above.key_identifier != of_issuer.digest:
        yield Fault("authorityKeyIdentifier is not its issuer's subjectKeyIdentifier", f"{_ANEW} the issuer's own")
    if above.authority_cert_serial_number is not None:
        what = "authorityKeyIdentifier holds the issuer's serial number, so no cross certificate of its root will do"
        yield Fault(what, f"{_ANEW} authorityKeyIdentifier=keyid:always", breaks=False)


def _names(ca: x509.Certificate) -> Iterator[Fault]:
    constraints = constraints_of(ca)
    if constraints is None:
        return
    permitted, excluded = constraints.permitted_subtrees or [], constraints.excluded_subtrees or []
    if not permitted and not excluded:
        yield Fault("nameConstraints is empty (RFC 5280 4.2.1.10)", f"{_ANEW} domains in it, or without it")
    if not _is_critical(ca, x509.NameConstraints):
        yield Fault("nameConstraints is not critical (RFC 5280 4.2.1.10)", f"{_ANEW} it critical", breaks=False)
    if any(isinstance(one, x509.DirectoryName) for one in (*permitted, *excluded)):
        what = "nameConstraints limits directory names, which a leaf with a subject does not meet"
        yield Fault(what, f"{_ANEW} domains only", breaks=False)
    for domain in dict.fromkeys(one.value for one in (*permitted, *excluded) if isinstance(one, x509.DNSName)):
        if domain.startswith("."):
            what = f"nameConstraints has {domain!r}, which clients read differently"
            yield Fault(what, f"{_ANEW} the domain without the dot", breaks=False)
        elif domain and not _is_readable(domain):
            yield Fault(
                f"nameConstraints has {domain!r}, which clients cannot read", f"{_ANEW} a domain in normal form"
            )
    if any(isinstance(one, x509.DNSName) and not one.value for one in excluded):
        yield Fault("nameConstraints excludes every name", f"{_ANEW} the domains that are meant")


def _critical(ca: x509.Certificate) -> Iterator[Fault]:
    for extension in ca.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            what = f"extension {extension.oid.dotted_string} is critical, and clients take it only as not critical"
            yield Fault(what, f"{_ANEW} it not critical, or without it")
    policy = _extension(ca, x509.PolicyConstraints)
    if policy is not None and policy.require_explicit_policy is not None:
        yield Fault(
            "policyConstraints asks for a policy in each leaf, and they have none", f"{_ANEW} no such constraint"
        )


# Reading


def _extension[E: x509.ExtensionType](certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _is_readable(domain: str) -> bool:
    try:
        name_constraints([domain])
    except AuthorityError:
        return False
    return True


def _is_critical(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> bool:
    return certificate.extensions.get_extension_for_class(kind).critical


def _ocsp_addresses(certificate: x509.Certificate) -> list[str]:
    access = _extension(certificate, x509.AuthorityInformationAccess) or ()
    return [
        one.access_location.value
        for one in access
        if one.access_method == AuthorityInformationAccessOID.OCSP
        and isinstance(one.access_location, x509.UniformResourceIdentifier)
    ]


def _serial_and_times(signed: bytes) -> tuple[bytes, tuple[int, int]]:
    """The octets of the serial number, and the tags of both dates, which the parsed certificate no longer has."""
    fields = [field for field in elements(next(elements(signed))[1]) if field[0] != _VERSION]
    before, after = (tag for tag, _ in elements(fields[3][1]))
    return fields[0][1], (before, after)


def _described(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return type(key).__name__.removesuffix("PublicKey").lstrip("_")


def _counted(certificates: tuple[x509.Certificate, ...]) -> str:
    return f"{len(certificates)} certificate" + "s" * (len(certificates) != 1)


def _date(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"
