"""CAs with any one thing wrong: what `pki.authority` never makes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
USAGES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
          "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip

SHA256 = hashes.SHA256()

type Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class Made:
    certificate: x509.Certificate
    key: Key


@cache
def rsa_key(bits: int, exponent: int = 65537, number: int = 0) -> rsa.RSAPrivateKey:
    """The same key each time, for large ones take seconds; by `number` another one."""
    return rsa.generate_private_key(exponent, bits)


def usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in names for name in USAGES})


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


def make(
    issuer: Made | None = None,
    *,
    subject: str = "a CA",
    key: Key | None = None,
    days: tuple[float, float] = (-1, 700),
    ca: bool = True,
    path_length: int | None = None,
    drop: tuple[type[x509.ExtensionType], ...] = (),
    put: tuple[tuple[x509.ExtensionType, bool], ...] = (),
    now: datetime = NOW,
) -> Made:
    """A CA as it should be, but for what is said.

    days  from `now`: when it begins and ends
    drop  extensions that it lacks
    put   extensions with `critical`, in the place of those of the same kind
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    signer = issuer or Made(None, key)  # type: ignore[arg-type]  # its own issuer
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    above = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value if issuer else own
    extensions: dict[type[x509.ExtensionType], tuple[x509.ExtensionType, bool]] = {
        x509.BasicConstraints: (x509.BasicConstraints(ca, path_length if ca else None), True),
        x509.KeyUsage: (usage("key_cert_sign", "crl_sign") if ca else usage("digital_signature"), True),
        x509.SubjectKeyIdentifier: (own, False),
        x509.AuthorityKeyIdentifier: (
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(above), False,
        ),
    }  # fmt: skip
    extensions |= {type(extension): (extension, critical) for extension, critical in put}
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(issuer.certificate.subject if issuer else name(subject))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
    )
    for kind, (extension, critical) in extensions.items():
        if kind not in drop:
            builder = builder.add_extension(extension, critical)
    return Made(builder.sign(signer.key, None if isinstance(signer.key, ed25519.Ed25519PrivateKey) else SHA256), key)


def resigned(
    certificate: x509.Certificate, key: Key, old: bytes, new: bytes, digest: hashes.HashAlgorithm = SHA256
) -> x509.Certificate:
    """The certificate with other bytes in what is signed, and in the algorithm, signed again: what no builder makes."""
    signed = certificate.tbs_certificate_bytes
    whole = certificate.public_bytes(Encoding.DER)
    algorithm = whole[_head(whole) + len(signed) :]
    algorithm = algorithm[: 2 + algorithm[1]].replace(old, new)
    assert signed.count(old) == 1
    signed = _element(0x30, signed[_head(signed) :].replace(old, new))
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(signed, padding.PKCS1v15(), digest)
    else:
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        signature = key.sign(signed, ec.ECDSA(digest))
    return x509.load_der_x509_certificate(_element(0x30, signed + algorithm + _element(3, b"\0" + signature)))


def with_sha1(made: Made, signer: rsa.RSAPrivateKey) -> Made:
    """Signed with SHA-1: the builder does no such thing any more."""
    sha256, sha1 = (bytes.fromhex("06092a864886f70d0101") + bytes([last]) for last in (11, 5))
    return Made(resigned(made.certificate, signer, sha256, sha1, hashes.SHA1()), made.key)


def _element(tag: int, content: bytes) -> bytes:
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8)
    return bytes([tag, *([0x80 | len(length)] if len(content) >= 0x80 else [])]) + length + content


def _head(element: bytes) -> int:
    return 2 + (element[1] & 0x7F if element[1] & 0x80 else 0)
