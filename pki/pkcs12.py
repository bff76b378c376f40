"""A CA as it is found in the wild, read from PKCS#12, PEM or DER; and the password-less PFX that a key vault takes.

It judges no certificate: that is `lint`'s work.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    PrivateFormat,
    load_der_private_key,
    load_pem_private_key,
    pkcs12,
)
from cryptography.utils import CryptographyDeprecationWarning

from pki import files
from pki.authority import CaKey
from pki.chains import is_self_signed, is_signed_by
from pki.der import OCTETS, SEQUENCE, element, elements

MAX_FILE = 1 << 20  # bytes; a CA with its chain has some thousand
MAX_PASSWORD = 1 << 10  # bytes
MAX_CERTIFICATES = 20  # a bundle of public roots is no CA, and holds some that the parser only warns of as yet

_MARK = re.compile(rb"-----(BEGIN|END) ([A-Z0-9 ]{1,40})-----")
_BASE64 = re.compile(rb"[A-Za-z0-9+/=\s]+")
_SEQUENCE = rb"\x30(?:[\x00-\x80]|\x81.|\x82..|\x83...|\x84....)"  # and its length, which BER may leave open (80)
_PFX = re.compile(_SEQUENCE + rb"\x02\x01\x03", re.DOTALL)  # RFC 7292 4: version 3
_CERTIFICATE = re.compile(_SEQUENCE + rb"\x30(?:[\x00-\x80]|\x81.|\x82..|\x83...)[\xa0\x02]", re.DOTALL)
_KEYSTORE = b"\xfe\xed\xfe\xed"
_SHA1 = bytes.fromhex("06052b0e03021a 0500")  # an AlgorithmIdentifier's content: 1.3.14.3.2.26, NULL
_NAME_IT = "name a file that holds it with --password-file"


class Unreadable(Exception):
    """No CA can be read. `str()` says why and what to do; it begins with the path where a file was named."""


class Form(StrEnum):
    """What kind of file something was found in."""

    PEM = "PEM"
    DER = "DER"
    PKCS12 = "PKCS#12"


@dataclass(frozen=True, slots=True)
class Contents:
    """What one file holds, in its own order. `is_encrypted`: it took a password."""

    form: Form
    certificates: tuple[x509.Certificate, ...] = ()
    keys: tuple[CaKey, ...] = ()
    is_encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """A CA.

    key     None where none was found; else it may be another certificate's (`lint` says so)
    chain   who signed it, who signed that, and so on, up to the root if that was found
    strays  further certificates, which stand in no such chain
    form    of the file that held the certificate
    is_encrypted  something took a password
    """

    certificate: x509.Certificate
    key: CaKey | None = None
    chain: tuple[x509.Certificate, ...] = ()
    strays: tuple[x509.Certificate, ...] = ()
    form: Form = Form.PEM
    is_encrypted: bool = False


def read_file(path: Path, password: bytes | None = None) -> Contents:
    """What the file at `path` holds. Raises Unreadable."""
    try:
        content = files.read_file(path, MAX_FILE)
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}; name the CA's own file") from error
    try:
        return read(content, password)
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from error


def read_password(path: Path) -> bytes:
    """The password in a file that is its owner's alone, without the line's end. Raises Unreadable."""
    try:
        password = files.read_secret(path, MAX_PASSWORD, shows="the password", holds="the password")
    except files.UnusableSecret as error:
        raise Unreadable(str(error)) from error
    if len(password) > MAX_PASSWORD:
        raise Unreadable(f"{path}: longer than any password; name a file that holds one line")
    password = password.removesuffix(b"\n").removesuffix(b"\r")
    if b"\0" in password:  # OpenSSL would read a part of it, and cryptography does not survive one (seen: 48.0)
        raise Unreadable(f"{path}: has a zero byte, which no password has; name a file that holds one line")
    return password


def read(content: bytes, password: bytes | None = None) -> Contents:
    """The certificates and keys in `content`. A password that is not needed is not looked at. Raises Unreadable."""
    if len(content) > MAX_FILE:
        raise Unreadable(f"more than {MAX_FILE >> 20} MB, which is no CA; name the CA's own file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)  # `lint` says what is wrong
        if _MARK.search(content):
            return _read_pem(content, password)
        if not content.strip():
            raise Unreadable("empty; name a file that holds a CA")
        return _read_binary(_unwrapped(content), password)


def assemble(*found: Contents, key: CaKey | None = None, above: Sequence[x509.Certificate] = ()) -> Loaded:
    """The CA that these files hold: its key tells it from the others; without one it is what signed none of them.

    key    where it is kept elsewhere
    above  further certificates, of which some may stand above it

    Raises Unreadable without a certificate, and with keys of several.
    """
    certificates = list(dict.fromkeys(one for file in found for one in file.certificates))
    keys = [key] if key is not None else [one for file in found for one in file.keys]
    if not certificates:
        raise Unreadable("no certificate in it; name the file that holds the CA's")
    own = [one for one in certificates if any(_public(one) == held.public_key() for held in keys)]
    if any(_public(one) != _public(own[0]) for one in own):
        raise Unreadable("keys of several certificates in it; leave the one CA's that is meant")
    # One key may stand in an older certificate too.
    certificate = max(own, key=_end) if own else _lowest(certificates)
    fitting = [held for held in keys if _public(certificate) == held.public_key()]
    chain, strays = _chain(certificate, list(dict.fromkeys((*certificates, *above))))
    home = next(file for file in found if certificate in file.certificates)
    is_encrypted = any(file.is_encrypted for file in found)
    return Loaded(certificate, next(iter(fitting or keys), None), chain, strays, home.form, is_encrypted=is_encrypted)


def passwordless_pfx(certificate: x509.Certificate, key: CaKey) -> bytes:
    """PKCS#12 of one certificate and its key with the empty password, as `openssl pkcs12 -export -passout pass:` does.

    Triple DES, for an empty password hides nothing and every reader knows it: Key Vault has refused what OpenSSL 3
    takes by default (MicrosoftDocs/azure-docs issue 39861), and Java finds no key that is not encrypted at all.
    """
    encryption = (
        PrivateFormat.PKCS12.encryption_builder()
        .key_cert_algorithm(pkcs12.PBES.PBESv1SHA1And3KeyTripleDESCBC)
        .hmac_hash(hashes.SHA1())  # noqa: S303 - see above
        .build(b"-")
    )
    encryption.password = b""  # type: ignore[attr-defined]  # build() refuses it, and what it builds does not
    return pkcs12.serialize_key_and_certificates(None, key, certificate, None, encryption)


def _read_pem(content: bytes, password: bytes | None) -> Contents:
    blocks = list(_blocks(content))
    certificates = [block for label, block in blocks if label in (b"CERTIFICATE", b"X509 CERTIFICATE")]
    if any(label == b"TRUSTED CERTIFICATE" for label, _ in blocks):
        raise Unreadable(
            "a certificate with OpenSSL's own trust settings; write it without: openssl x509 -in IN -out OUT"
        )
    if len(certificates) > MAX_CERTIFICATES:
        raise Unreadable(f"{len(certificates)} certificates, which is no CA but a bundle; name the CA's own file")
    keys = [_pem_key(block, password) for label, block in blocks if label.endswith(b"PRIVATE KEY")]
    if not certificates and not keys:
        raise Unreadable("neither a certificate nor a key in it; name the CA's own file")
    return Contents(
        Form.PEM,
        tuple(_pem_certificate(block) for block in certificates),
        tuple(key for key, _ in keys),
        is_encrypted=any(is_encrypted for _, is_encrypted in keys),
    )


def _blocks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each block of a PEM file with its label. Text between them is nothing (RFC 7468 2)."""
    start = None
    for mark in _MARK.finditer(content):
        if (start is None) != (mark[1] == b"BEGIN") or (start is not None and start[2] != mark[2]):
            break
        if start is None:
            start = mark
            continue
        yield mark[2], content[start.start() : mark.end()] + b"\n"
        start = None
    else:
        if start is None:
            return
    raise Unreadable("a BEGIN line without its END line, or the other way round; take a whole copy")


def _pem_certificate(block: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(block)
    except (ValueError, x509.InvalidVersion) as error:
        raise Unreadable("a certificate in it is damaged; take a fresh copy") from error


def _pem_key(block: bytes, password: bytes | None) -> tuple[CaKey, bool]:
    try:
        return _ca_key(load_pem_private_key(block, None)), False
    except TypeError:  # encrypted
        pass
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Unreadable("the key in it cannot be read; take a fresh copy, an EC or RSA key in PKCS#8") from error
    if password is None:
        raise Unreadable(f"the key in it asks for a password; {_NAME_IT}")
    try:
        return _ca_key(load_pem_private_key(block, password)), True
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Unreadable("the password does not open the key in it; check the file that holds it") from error


def _unwrapped(content: bytes) -> bytes:
    """What base64 stands for: a key vault hands its secrets out so (azure-docs issue 85465). Other content as it is."""
    if _BASE64.fullmatch(content):
        try:
            return base64.b64decode(content)
        except ValueError:
            pass
    return content


def _read_binary(content: bytes, password: bytes | None) -> Contents:
    if content.startswith(_KEYSTORE):
        raise Unreadable(
            "a Java keystore; write it as PKCS#12: keytool -importkeystore -deststoretype pkcs12 "
            "-srckeystore IN -destkeystore OUT"
        )
    if _PFX.match(content):
        return _read_pkcs12(content, password)
    try:
        if _CERTIFICATE.match(content):
            return Contents(Form.DER, (x509.load_der_x509_certificate(content),))
        return Contents(Form.DER, keys=(_ca_key(load_der_private_key(content, None)),))
    except TypeError:
        pass  # encrypted
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise Unreadable("neither PKCS#12 nor PEM nor DER, or damaged; take a fresh copy") from error
    if password is None:
        raise Unreadable(f"the key asks for a password; {_NAME_IT}")
    try:
        return Contents(Form.DER, keys=(_ca_key(load_der_private_key(content, password)),), is_encrypted=True)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Unreadable("the password does not open the key; check the file that holds it") from error


def _read_pkcs12(content: bytes, password: bytes | None) -> Contents:
    for form in (content, _with_mac(content)):
        with suppress(ValueError):
            return _opened(form, None)
    if password is None:
        raise Unreadable(f"asks for a password, or is damaged; {_NAME_IT}")
    try:
        return _opened(content, password)
    except ValueError as error:
        raise Unreadable("the password does not open it, or it is damaged; check the file that holds it") from error


def _opened(content: bytes, password: bytes | None) -> Contents:
    """PKCS#12, opened. None is the empty password too, and none at all. Raises ValueError when it is another."""
    try:
        key, own, others = pkcs12.load_key_and_certificates(content, password)
    except (UnsupportedAlgorithm, TypeError, x509.InvalidVersion) as error:
        raise Unreadable(
            "encrypted as this machine's OpenSSL does not read; write it anew: openssl pkcs12 -legacy -in IN -out OUT"
        ) from error
    certificates = (own, *others) if own else tuple(others)
    if len(certificates) > MAX_CERTIFICATES:
        raise Unreadable(f"{len(certificates)} certificates, which is no CA but a bundle; name the CA's own file")
    keys = (_ca_key(key),) if key is not None else ()
    return Contents(Form.PKCS12, certificates, keys, is_encrypted=password is not None)


def _with_mac(content: bytes) -> bytes:
    """PKCS#12 that has no MAC, with that of the empty password; any other as it is.

    The empty password and none at all encrypt differently (RFC 7292 B.1: two zero bytes, or nothing), and OpenSSL finds
    out by the MAC which it is. Without one it takes none, and the empty one cannot be said.
    """
    try:
        [(_, pfx)] = elements(content)
        _, (_, safe) = elements(pfx)  # a third value would be the MAC (RFC 7292 4)
        _, (_, wrapped) = elements(safe)
        [(_, authenticated)] = elements(wrapped)
    except ValueError:  # another number of them, or no DER
        return content
    salt = bytes(8)
    key = hashlib.sha1(b"\x03" * 64 + salt * 8 + bytes(64), usedforsecurity=False)  # RFC 7292 B.2, its one round
    mac = hmac.digest(key.digest(), authenticated, "sha1")
    digest = element(SEQUENCE, element(SEQUENCE, _SHA1), element(OCTETS, mac))
    return element(SEQUENCE, pfx, element(SEQUENCE, digest, element(OCTETS, salt)))


def _ca_key(key: object) -> CaKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise Unreadable("its key is neither EC nor RSA, and clients know no other; make the CA anew with such a key")
    return key


def _public(certificate: x509.Certificate) -> object:
    """The public key; the certificate itself, which equals no key, where it is of a kind that cannot be read."""
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return certificate


def _end(certificate: x509.Certificate) -> datetime:
    """When it ends; long ago, where the date is none (the year 0): `lint` says so."""
    try:
        return certificate.not_valid_after_utc
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)


def _lowest(certificates: Sequence[x509.Certificate]) -> x509.Certificate:
    """The first that signed no other."""

    def signed_another(certificate: x509.Certificate) -> bool:
        return any(is_signed_by(other, certificate) for other in certificates if other != certificate)

    return next((one for one in certificates if not signed_another(one)), certificates[0])


def _chain(
    certificate: x509.Certificate, certificates: Sequence[x509.Certificate]
) -> tuple[tuple[x509.Certificate, ...], tuple[x509.Certificate, ...]]:
    """Who signed it, nearest first, a root before its cross certificates; and the others."""
    left = sorted((one for one in certificates if one != certificate), key=lambda one: not is_self_signed(one))
    chain: list[x509.Certificate] = []
    last = certificate
    while not is_self_signed(last):
        issuer = next((one for one in left if is_signed_by(last, one)), None)
        if issuer is None:
            break
        left.remove(issuer)
        chain.append(issuer)
        last = issuer
    return tuple(chain), tuple(left)
