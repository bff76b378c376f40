"""How a store is written: new files beside what is in use, then state.json, then what nothing names any more goes.

So a writer may fail or be killed anywhere: .unfinished names what the next one is to settle for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from pki.authority import Authority, CaKey, certificate_id, certificates_pem
from pki.files import (
    PUBLIC,
    SECRET,
    make_directory,
    remove_file,
    remove_left_beside,
    repair,
    sync_directory,
    write_file,
)
from pki.layout import CERTIFICATE, CHAIN, GIVEN, ISSUING, KEY, ROOTS, STATE, cross_name
from pki.signer import key_text
from pki.state import Register, state_text
from pki.store_reading import (
    StoreError,
    is_there,
    read_certificates,
    read_key,
    read_public,
    read_state,
    register_of,
    require_ca,
)

LOCK = ".lock"
UNFINISHED = ".unfinished"  # names what goes unless state.json names its CA; there while somebody writes

_UNFINISHED_PATH = re.compile(rf"(?:{ROOTS}|{ISSUING}|{GIVEN})/[0-9a-f]{{16}}(?:/{re.escape(KEY)})?")


@dataclass(frozen=True, slots=True)
class _Folder:
    """What is to stand at `path` of the store. A key that stands there already stays as it is."""

    path: str
    certificate: x509.Certificate
    key: CaKey | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    chain: tuple[x509.Certificate, ...] = ()


def write(
    authority: Authority, directory: Path, *, offline: frozenset[str] = frozenset(), former: Register | None = None
) -> None:
    """Puts everything beside what is in use, then state.json, then removes what nothing names any more.

    offline  roots whose key is not written
    former   what was in use: the keys of its CAs go where `authority` has them no more; None: all stay
    """
    text = state_text(authority)
    kept = register_of(directory, text).folders
    folders = _folders(authority, offline)
    for folder in folders:
        _require_sound(directory, folder)
    retired = former.folders - kept if former else frozenset()
    with writing(directory):
        going = {*_unfinished(directory), *_new(directory, folders), *(f"{folder}/{KEY}" for folder in retired)}
        write_file(directory / UNFINISHED, json.dumps(sorted(going)).encode(), PUBLIC)
        try:
            for folder in folders:
                _write_folder(directory, folder)
            write_file(directory / STATE, text, PUBLIC)
        except BaseException as error:
            if not _is_made(directory, text):
                with suppress(OSError, StoreError):  # the first error is the one to tell; the next writer settles it
                    _settle(directory)
            elif isinstance(error, OSError):
                raise _unsettled(directory, error) from error
            raise
    try:
        for folder in folders:
            _write_chain(directory, folder, keep=False)
        _settle(directory)
    except OSError as error:
        raise _unsettled(directory, error) from error


def settle(directory: Path) -> None:
    """Deletes what an earlier writer left unfinished, or had no time to delete. Raises StoreError."""
    with writing(directory):
        if is_there(directory / UNFINISHED):
            sync_directory(directory)  # what is deleted must not be named by a former state, should the power fail
            _settle(directory)


def _is_made(directory: Path, text: bytes) -> bool:
    """Whether the state was replaced, though its writer failed."""
    try:
        return read_state(directory) == text
    except StoreError:
        return False


def _unsettled(directory: Path, error: OSError) -> StoreError:
    """What to raise once the state is replaced. Nothing more is deleted: the former state may come back in a crash."""
    where = f"{error.filename or directory}: {error.strerror}"
    return StoreError(f"{where}; the change is made, and the next one deletes what this one had to leave")


def _folders(authority: Authority, offline: frozenset[str]) -> list[_Folder]:
    folders = []
    for root in authority.roots:
        root_id = certificate_id(root.certificate)
        crosses = {cross_name(certificate_id(cross)): certificates_pem(cross) for cross in root.crosses}
        key = None if root_id in offline else root.key
        folders.append(_Folder(f"{ROOTS}/{root_id}", root.certificate, key, crosses))
    for one in authority.issuing:
        path = f"{ISSUING}/{certificate_id(one.certificate)}"
        folders.append(_Folder(path, one.certificate, one.key, chain=one.chain))
    folders += [_Folder(f"{GIVEN}/{certificate_id(one)}", one) for one in authority.given]
    return folders


def _require_sound(directory: Path, folder: _Folder) -> None:
    """Nothing is written that could not be loaded, and no key in the place of another. Raises StoreError."""
    path = directory / folder.path
    require_ca(path / CERTIFICATE, folder.certificate)
    if folder.chain and folder.chain[0] != folder.certificate:
        raise StoreError(f"{path / CHAIN}: would not start with {CERTIFICATE}; nothing was written")
    if folder.key is None:
        return
    if folder.key.public_key() != folder.certificate.public_key():
        raise StoreError(f"{path / KEY}: the key at hand is not that of the certificate; nothing was written")
    if is_there(path / KEY) and key_text(read_key(path / KEY, folder.certificate)) != key_text(folder.key):
        raise StoreError(f"{path / KEY}: says that the key is elsewhere; move that file away first")


def _new(directory: Path, folders: Iterable[_Folder]) -> Iterator[str]:
    """The folders that are not there yet, and the keys in those that are."""
    for folder in folders:
        if not is_there(directory / folder.path):
            yield folder.path
        elif folder.key is not None and not is_there(directory / folder.path / KEY):
            yield f"{folder.path}/{KEY}"


def _write_folder(directory: Path, folder: _Folder) -> None:
    path = directory / folder.path
    make_directory(path.parent, 0o700)
    make_directory(path, 0o700)
    if folder.key is not None and not is_there(path / KEY):
        write_file(path / KEY, key_text(folder.key), SECRET)
    for name, content in ({CERTIFICATE: certificates_pem(folder.certificate)} | folder.files).items():
        _replace(path / name, content)
    _write_chain(directory, folder, keep=True)


def _write_chain(directory: Path, folder: _Folder, *, keep: bool) -> None:
    """chain.pem; with `keep`, what it holds for the state in force stands behind what the next one names."""
    if not folder.chain:
        return
    path = directory / folder.path / CHAIN
    former: tuple[x509.Certificate, ...] = ()
    if keep:
        with suppress(StoreError):  # none there, or none that could be in use
            former = read_certificates(path)
    _replace(path, certificates_pem(*dict.fromkeys((*folder.chain, *former))))


def _replace(path: Path, content: bytes) -> None:
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    write_file(path, content, PUBLIC)


def _settle(directory: Path) -> None:
    """Deletes what .unfinished names and state.json does not, and what is left beside files. Raises either error."""
    left = _unfinished(directory)
    in_use = register_of(directory, read_state(directory)).folders if is_there(directory / STATE) else frozenset()
    failure: OSError | None = None
    for path in [directory / one for one in left if one.removesuffix(f"/{KEY}") not in in_use]:
        try:
            if path.is_dir():
                shutil.rmtree(path)
                sync_directory(path.parent)
            else:
                remove_file(path)
        except OSError as error:  # and on with the next one, which may be a key
            failure = failure or error
    for folder in [directory, *(one for kind in (ROOTS, ISSUING, GIVEN) for one in (directory / kind).glob("*/"))]:
        remove_left_beside(folder)
    if failure:
        raise failure
    remove_file(directory / UNFINISHED)


def _unfinished(directory: Path) -> list[str]:
    path = directory / UNFINISHED
    if not is_there(path):
        return []
    try:
        found = json.loads(read_public(path))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list) and all(isinstance(one, str) and _UNFINISHED_PATH.fullmatch(one) for one in found):
        return found
    raise StoreError(f"{path}: not the list that an interrupted writer leaves; look for strange keys, then delete it")


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Holds the store's lock. Raises StoreError."""
    with writing(directory):
        found = directory.stat()
        owner, mode = found.st_uid, stat.S_IMODE(found.st_mode)
        if owner != os.geteuid():  # who could put other keys in the place of ours, and could not read ours
            raise StoreError(f"{directory}: belongs to uid {owner}, and we are uid {os.geteuid()}; run as its owner")
        if mode & 0o022:  # workloads would be told to trust whatever root they put there
            repair = f"see who did, then: chmod go-w {shlex.quote(str(directory))}"
            raise StoreError(f"{directory}: mode {mode:04o} lets others put CAs there; {repair}")
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, SECRET)
    try:
        with writing(directory):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(f"{directory}: another outgate is writing there; try again when it is done") from error
        yield
    finally:
        os.close(descriptor)  # and with it the lock, as it would be if we were killed


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Maps what goes wrong. Raises StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error.filename or directory}: {error.strerror}; {repair(error)}") from error
