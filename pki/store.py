"""An authority on disk. Keys are for their owner alone, files are replaced whole, and one writer at a time may write.

state.json                            the ids in use; written last, so a store without it was never finished
roots/ID/ca.crt, ca.key               the key may be absent: kept offline
issuing/ID/ca.crt, ca.key, chain.pem  with state.json all that a gate needs
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pki.authority import Authority, Issuing, Root, certificate_id, certificates_pem, key_pem
from pki.files import PUBLIC, SECRET, UnusableSecret, read_secret, repair, sync_directory, write_file

VERSION = 1
STATE = "state.json"
LOCK = ".lock"
CERTIFICATE, KEY, CHAIN = "ca.crt", "ca.key", "chain.pem"
MAX_KEY = 1 << 16  # bytes; what is longer is no key

_ID = re.compile(r"[0-9a-f]{16}")  # becomes a path: nothing else may stand in state.json


class StoreError(Exception):
    """The store cannot be read or written. `str()` has the path and the repair."""


class StoreExists(StoreError):
    """There is a store already, and nobody said to replace it."""


def save(authority: Authority, directory: Path, *, overwrite: bool = False) -> None:
    """Writes `authority` to `directory`, which is made if need be.

    With `overwrite` it becomes the one in use, and the files of the former one stay: no key is ever destroyed here.
    Raises StoreExists, or StoreError; then no key is left behind.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _one_writer(directory):
            if (directory / STATE).exists() and not overwrite:
                raise StoreExists(f"{directory} holds an authority already; use it, or name another directory")
            _write(authority, directory)
    except OSError as error:
        raise StoreError(f"{error.filename or directory}: {error.strerror}; {repair(error)}") from error


def load(directory: Path) -> Authority:
    """The authority in use at `directory`.

    `roots` lacks those whose directory is absent, and their keys where they are offline. Raises StoreError.
    """
    issuing_id, root_ids = _state(directory / STATE)
    issuing = load_issuing(directory / "issuing" / issuing_id)
    roots = tuple(root for root_id in root_ids if (root := _load_root(directory / "roots" / root_id)))
    if roots and not any(_signed(issuing.certificate, root.certificate) for root in roots):
        raise StoreError(
            f"{directory}: no root there signed issuing CA {issuing_id}; restore the directory from a copy"
        )
    return Authority(issuing, roots)


def load_issuing(directory: Path) -> Issuing:
    """The issuing CA whose three files stand at `directory`. Raises StoreError."""
    certificate = _one_certificate(directory / CERTIFICATE)
    chain = _certificates(directory / CHAIN)
    key = _key(directory / KEY)
    _require_pair(directory, certificate, key)
    if chain[0] != certificate:
        raise StoreError(f"{directory / CHAIN}: does not start with {CERTIFICATE}; restore it from a copy")
    return Issuing(certificate, key, chain)


def _write(authority: Authority, directory: Path) -> None:
    issuing = authority.issuing
    issuing_id = certificate_id(issuing.certificate)
    root_ids = [certificate_id(root.certificate) for root in authority.roots]
    folders: list[Path] = []
    try:
        for root_id, root in zip(root_ids, authority.roots, strict=True):
            folder = _new_folder(directory / "roots", root_id, folders)
            write_file(folder / CERTIFICATE, certificates_pem(root.certificate), PUBLIC)
            if root.key is not None:
                write_file(folder / KEY, key_pem(root.key), SECRET)
        folder = _new_folder(directory / "issuing", issuing_id, folders)
        write_file(folder / KEY, key_pem(issuing.key), SECRET)
        write_file(folder / CERTIFICATE, certificates_pem(issuing.certificate), PUBLIC)
        write_file(folder / CHAIN, certificates_pem(*issuing.chain), PUBLIC)
        state = {"version": VERSION, "issuing": issuing_id, "roots": root_ids}
        write_file(directory / STATE, (json.dumps(state, indent=2) + "\n").encode(), PUBLIC)
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _new_folder(parent: Path, name: str, made: list[Path]) -> Path:
    """`parent/name`, remembered in `made` if it was not there before."""
    parent.mkdir(mode=0o700, exist_ok=True)
    folder = parent / name
    if not folder.exists():
        folder.mkdir(mode=0o700)
        made.append(folder)
    sync_directory(parent)
    return folder


@contextmanager
def _one_writer(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SECRET)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"{directory}: another outgate is writing there; try again when it is done") from error
        yield
    finally:
        os.close(descriptor)  # and with it the lock, as it would be if we were killed


def _state(path: Path) -> tuple[str, list[str]]:
    text = _read(path, f"make an authority with 'outgate pki init --pki {path.parent}'")
    try:
        match json.loads(text):
            case {"version": 1, "issuing": str(issuing), "roots": list(roots)} if all(
                isinstance(name, str) and _ID.fullmatch(name) for name in [issuing, *roots]
            ):
                return issuing, roots
    except ValueError as error:
        raise StoreError(f"{path}: {error}; restore it from a copy") from error
    raise StoreError(f"{path}: not a state that this version knows; restore it from a copy, or use a newer outgate")


def _load_root(folder: Path) -> Root | None:
    """The root at `folder`: without a key where that is offline, None where there is no such folder."""
    try:
        if not folder.exists():
            return None
        has_key = (folder / KEY).exists()
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror}; run as its owner") from error
    certificate = _one_certificate(folder / CERTIFICATE)
    if not has_key:
        return Root(certificate)
    key = _key(folder / KEY)
    _require_pair(folder, certificate, key)
    return Root(certificate, key)


def _require_pair(folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    if key.public_key() != certificate.public_key():
        raise StoreError(f"{folder / KEY}: not the key of {CERTIFICATE} beside it; restore it from a copy")


def _signed(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _one_certificate(path: Path) -> x509.Certificate:
    certificates = _certificates(path)
    if len(certificates) != 1:
        raise StoreError(f"{path}: {len(certificates)} certificates where one must stand; restore it from a copy")
    return certificates[0]


def _certificates(path: Path) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(x509.load_pem_x509_certificates(_read(path)))
    except ValueError as error:
        raise StoreError(f"{path}: no PEM certificate; restore it from a copy") from error


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(read_secret(path, MAX_KEY, shows="the key"), password=None)
    except UnusableSecret as error:
        raise StoreError(str(error)) from error
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise StoreError(f"{path}: no unencrypted PEM key; restore it from a copy") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StoreError(f"{path}: not an elliptic curve key, the only kind a store holds")
    return key


def _read(path: Path, advice: str = "restore it, or run as its owner") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {advice}") from error
