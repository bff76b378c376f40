"""What stands in a store: state.json, and the folder of one CA, where each file is checked as it is read.

It writes nothing, and knows of no lock.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from pki.authority import CaKey, CaPublicKey, Issuing, Root, certificate_id
from pki.files import UnusableSecret, read_file, read_secret
from pki.key_uri import SCHEME, MalformedKeyUri, parse_uri
from pki.layout import CERTIFICATE, CHAIN, KEY, STATE, cross_name
from pki.profile import require_readable, weakness
from pki.signer import NoCaKey, RemoteKey, SignerError, key_of
from pki.state import Entry, MalformedState, Register, parse_state

MAX_KEY = 1 << 16  # bytes; what is longer is no key
MAX_FILE = 1 << 20  # of certificates, and of state.json

_TOKEN_LINE = SCHEME.encode()


class StoreError(Exception):
    """The store cannot be read or written. `str()` has the path and the repair."""


class KeyPlace(StrEnum):
    """Where the key of a CA is."""

    FILE = "file"
    TOKEN = "token"  # noqa: S105  # a place, no password
    OFFLINE = "offline"


def read_state(directory: Path) -> bytes:
    """state.json. Raises StoreError, also where there is none."""
    return read_public(directory / STATE, f"make an authority with 'outgate pki init --pki {directory}'")


def register_of(directory: Path, text: bytes) -> Register:
    """What state.json says. Raises StoreError."""
    try:
        return parse_state(text)
    except MalformedState as error:
        raise StoreError(f"{directory / STATE}: {error}") from error


def read_root(folder: Path, entry: Entry) -> Root:
    """The root at `folder`, without a key where none stands there. Raises StoreError."""
    certificate = read_ca(folder, entry.id)
    key = read_key(folder / KEY, certificate) if is_there(folder / KEY) else None
    return Root(certificate, key, read_crosses(folder, entry), entry.state, entry.line, entry.since)


def read_issuing(folder: Path, entry: Entry) -> Issuing:
    """The issuing CA at `folder`. Raises StoreError."""
    certificate = read_ca(folder, entry.id)
    key = read_key(folder / KEY, certificate)
    return Issuing(certificate, key, read_chain(folder, entry), entry.state, entry.line, entry.since)


def read_ca(folder: Path, ca_id: str) -> x509.Certificate:
    """The CA whose id the folder bears: no other one, and with a key that is strong enough. Raises StoreError."""
    certificate = _named(folder / CERTIFICATE, ca_id)
    require_ca(folder / CERTIFICATE, certificate)
    return certificate


def require_ca(path: Path, certificate: x509.Certificate) -> None:
    """Raises StoreError."""
    if not _is_ca(certificate):
        raise StoreError(f"{path}: not a CA certificate; no client accepts what it signs")
    _require_strong(path, certificate.public_key())


def read_crosses(folder: Path, entry: Entry) -> tuple[x509.Certificate, ...]:
    """The cross certificates of a root, each in a file of its own. Raises StoreError."""
    return tuple(_named(folder / cross_name(one), one) for one in entry.sent or ())


def read_chain(folder: Path, entry: Entry) -> tuple[x509.Certificate, ...]:
    """What is sent after a leaf: those of chain.pem that the entry names, in its order. Raises StoreError."""
    path = folder / CHAIN
    found = {certificate_id(certificate): certificate for certificate in read_certificates(path)}
    sent = tuple(found) if entry.sent is None else entry.sent
    if sent[:1] != (entry.id,) or next(iter(found)) != entry.id:
        raise StoreError(f"{path}: does not start with {CERTIFICATE}; restore it from a copy")
    if missing := [one for one in sent if one not in found]:
        raise StoreError(f"{path}: lacks certificate {missing[0]}; restore it from a copy")
    return tuple(found[one] for one in sent)


def read_certificates(path: Path) -> tuple[x509.Certificate, ...]:
    """Raises StoreError, also where there is none."""
    try:
        found = tuple(x509.load_pem_x509_certificates(read_public(path)))
        for certificate in found:
            require_readable(certificate)
    except (ValueError, x509.InvalidVersion) as error:
        raise StoreError(f"{path}: no PEM certificate; restore it from a copy") from error
    return found


def read_key(path: Path, certificate: x509.Certificate) -> CaKey:
    """The key of `certificate`. One in a token is compared when it signs: `signer` verifies that. Raises StoreError."""
    try:
        text = read_secret(path, MAX_KEY, shows="the key", own=True)
        key = key_of(text, certificate.public_key())
    except UnusableSecret as error:
        raise StoreError(str(error)) from error
    except (SignerError, NoCaKey) as error:
        raise StoreError(f"{path}: {error}") from error
    except TypeError as error:
        raise StoreError(f"{path}: is encrypted, and nobody is there to ask; store it unencrypted") from error
    except ValueError as error:
        raise StoreError(f"{path}: no PEM key, and no {SCHEME} line; restore it from a copy") from error
    if isinstance(key, RemoteKey):
        return key
    _require_strong(path, key.public_key())
    if not _is_pair(key, certificate.public_key()):
        raise StoreError(f"{path}: not the key of {CERTIFICATE} beside it; restore it from a copy")
    return key


def key_place(path: Path) -> tuple[KeyPlace, str | None]:
    """Where the key is; its URI without the PIN if it is in a token. Of a PEM key no more than the start is read."""
    if not is_there(path):
        return KeyPlace.OFFLINE, None
    try:
        if read_secret(path, len(_TOKEN_LINE) - 1, own=True) != _TOKEN_LINE:
            return KeyPlace.FILE, None
        return KeyPlace.TOKEN, str(parse_uri(read_secret(path, MAX_KEY, own=True).decode().strip()))
    except (UnusableSecret, MalformedKeyUri, UnicodeDecodeError):  # who needs the key will hear what is wrong with it
        return KeyPlace.FILE, None


def is_there(path: Path) -> bool:
    """Also a link that leads nowhere. Raises StoreError where nobody can tell."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; run as its owner") from error
    return True


def read_public(path: Path, advice: str = "restore it, or run as its owner") -> bytes:
    """Raises StoreError."""
    try:
        return read_file(path, MAX_FILE)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {advice}") from error


def _named(path: Path, certificate_name: str) -> x509.Certificate:
    """The certificate of this id, alone in its file."""
    certificates = read_certificates(path)
    if len(certificates) != 1:
        raise StoreError(f"{path}: {len(certificates)} certificates where one must stand; restore it from a copy")
    found = certificate_id(certificates[0])
    if found != certificate_name:
        raise StoreError(f"{path}: holds certificate {found}, not {certificate_name}; restore it from a copy")
    return certificates[0]


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _is_pair(key: CaKey, public_key: CaPublicKey) -> bool:
    if key.public_key() != public_key:
        return False
    if not isinstance(key, rsa.RSAPrivateKey):
        return True  # an elliptic curve key is not loaded unless its halves fit
    try:
        signature = key.sign(b"", padding.PKCS1v15(), hashes.SHA256())
        key.public_key().verify(signature, b"", padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError, InternalError):
        return False
    return True


def _require_strong(path: Path, key: CaPublicKey) -> None:
    if why := weakness(key):
        raise StoreError(f"{path}: {why}")
