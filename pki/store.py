"""An authority on disk. Keys are for their owner alone, files are replaced whole, and one writer at a time may write.

state.json                             what is in use: the store changes as this one file does
roots/ID/ca.crt, ca.key, cross-ID.crt  the key may be absent: kept offline
issuing/ID/ca.crt, ca.key, chain.pem   the active ones and state.json are all that a gate needs
given/ID/ca.crt                        CAs that were signed for other systems

Files never change, but for chain.pem: state.json names what is sent of it, so that it can hold the certificates of the
state in force and of the next one at a time. So a reader needs no lock, and a writer may be killed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from pki.authority import Authority, Issuing, Line, State, certificate_id
from pki.files import make_directory
from pki.layout import GIVEN, ISSUING, KEY, ROOTS, STATE
from pki.signer import RemoteKey, SignerError
from pki.state import Entry, Register
from pki.store_reading import (
    KeyPlace,
    StoreError,
    is_there,
    key_place,
    read_ca,
    read_chain,
    read_crosses,
    read_issuing,
    read_root,
    read_state,
    register_of,
)
from pki.store_writing import one_writer, settle, write, writing

MAX_READS = 20  # of a store that is changed each time

__all__ = [
    "Change",
    "KeyPlace",
    "StoreError",
    "StoreExists",
    "Survey",
    "Surveyed",
    "changing",
    "load",
    "load_issuers",
    "load_trusted",
    "save",
    "survey",
]


class StoreExists(StoreError):
    """There is a store already, and nobody said to replace it."""


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What can be seen of a CA without its key.

    sent    a root's cross certificates, an issuing CA's chain
    folder  where it stands
    uri     of a key in a token, without the PIN; None also where that file may not be read
    """

    certificate: x509.Certificate
    state: State
    line: Line
    since: datetime | None
    sent: tuple[x509.Certificate, ...]
    folder: Path
    key: KeyPlace
    uri: str | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What a store holds, for a person to see."""

    roots: tuple[Surveyed, ...]
    issuing: tuple[Surveyed, ...]
    given: tuple[x509.Certificate, ...]


@dataclass(slots=True)
class Change:
    """What a store holds. Whoever changes it puts the next authority here."""

    authority: Authority


def save(authority: Authority, directory: Path, *, overwrite: bool = False) -> None:
    """Writes `authority` to `directory`, which is made if need be.

    With `overwrite` it becomes the one in use, and the files of the former one stay: no key is ever destroyed here.
    Raises StoreExists, or StoreError; then no key is left behind.
    """
    with writing(directory):
        make_directory(directory, 0o700)
    with one_writer(directory):
        if is_there(directory / STATE) and not overwrite:
            raise StoreExists(f"{directory} holds an authority already; use it, or name another directory")
        write(authority, directory)


def load(directory: Path) -> Authority:
    """The authority in use at `directory`.

    It lacks roots and given CAs whose folder is absent, and the keys of offline roots. Keys in tokens were not tried
    yet: they raise SignerError when they are to sign. Raises StoreError.
    """
    return _read_steadily(directory, lambda register: _authority(directory, register))


def load_issuers(directory: Path) -> tuple[Issuing, ...]:
    """What signs leaves now, the main line first. state.json and the active issuing CAs are read, and nothing else.

    Keys in tokens have proven that they sign. Raises StoreError, also where no issuing CA is active.
    """
    issuers = _read_steadily(directory, lambda register: _issuers(directory, register))
    for one in issuers:
        if isinstance(one.key, RemoteKey):
            try:
                one.key.prove()
            except SignerError as error:
                path = directory / ISSUING / certificate_id(one.certificate) / KEY
                raise StoreError(f"{path}: {error}") from error
    return issuers


def load_trusted(directory: Path) -> tuple[x509.Certificate, ...]:
    """The roots, all of them. It opens no key, and needs no right to. Raises StoreError."""
    return _read_steadily(
        directory, lambda register: tuple(read_ca(directory / ROOTS / entry.id, entry.id) for entry in register.roots)
    )


def survey(directory: Path) -> Survey:
    """What `directory` holds. It needs no right to read keys. Roots and given CAs that are absent are left out.

    Raises StoreError.
    """
    return _read_steadily(directory, lambda register: _survey(directory, register))


@contextmanager
def changing(directory: Path) -> Iterator[Change]:
    """The store, for one writer: `with changing(directory) as change: change.authority = …`.

    On leaving, the authority is written whole, and of CAs that it has no more the keys are deleted, the certificates
    kept. After an exception, or without a change, nothing is written. A root without a key on entering has none on
    leaving, whoever lent it one meanwhile. Raises StoreError.
    """
    read_state(directory)  # where there is no store, no lock is made either
    with one_writer(directory):
        settle(directory)
        register = register_of(directory, read_state(directory))
        for folder in sorted(register.folders):
            if not is_there(directory / folder):
                raise StoreError(f"{directory / folder}: is not here; change the whole store, not a gate's part of it")
        before = _authority(directory, register)
        change = Change(before)
        yield change
        if change.authority is not before:
            offline = frozenset(certificate_id(root.certificate) for root in before.roots if root.key is None)
            write(change.authority, directory, offline=offline, former=register)


# Reading: no lock


def _read_steadily[T](directory: Path, read: Callable[[Register], T]) -> T:
    """What `read` makes of one state of the store. It reads again where a writer was quicker."""
    text = read_state(directory)
    for _ in range(MAX_READS):
        found: T | StoreError
        try:
            found = read(register_of(directory, text))
        except StoreError as error:
            found = error
        before, text = text, read_state(directory)
        if text == before:
            if isinstance(found, StoreError):
                raise found
            return found
    raise StoreError(f"{directory}: changed {MAX_READS} times while it was read; try again")


def _authority(directory: Path, register: Register) -> Authority:
    return Authority(
        tuple(read_root(directory / ROOTS / entry.id, entry) for entry in _roots(directory, register)),
        tuple(read_issuing(directory / ISSUING / entry.id, entry) for entry in _issuing(directory, register)),
        _given(directory, register),
    )


def _issuers(directory: Path, register: Register) -> tuple[Issuing, ...]:
    active = [entry for entry in register.issuing if entry.state is State.ACTIVE]
    if not active:
        raise StoreError(f"{directory / STATE}: no issuing CA is active; activate the staged one")
    return Authority((), tuple(read_issuing(directory / ISSUING / entry.id, entry) for entry in active)).issuers


def _survey(directory: Path, register: Register) -> Survey:
    return Survey(
        tuple(_surveyed(directory / ROOTS, entry, read_crosses) for entry in _roots(directory, register)),
        tuple(_surveyed(directory / ISSUING, entry, read_chain) for entry in _issuing(directory, register)),
        _given(directory, register),
    )


def _surveyed(parent: Path, entry: Entry, read_sent: Callable[[Path, Entry], tuple[x509.Certificate, ...]]) -> Surveyed:
    folder = parent / entry.id
    certificate, (place, uri) = read_ca(folder, entry.id), key_place(folder / KEY)
    return Surveyed(
        certificate, entry.state, entry.line, entry.since, read_sent(folder, entry), folder, key=place, uri=uri
    )


def _roots(directory: Path, register: Register) -> list[Entry]:
    return [entry for entry in register.roots if is_there(directory / ROOTS / entry.id)]


def _issuing(directory: Path, register: Register) -> list[Entry]:
    """A gate may lack those that sign nothing, and none that does."""
    entries = register.issuing
    return [entry for entry in entries if entry.state is State.ACTIVE or is_there(directory / ISSUING / entry.id)]


def _given(directory: Path, register: Register) -> tuple[x509.Certificate, ...]:
    folders = (directory / GIVEN / one for one in register.given)
    return tuple(read_ca(folder, folder.name) for folder in folders if is_there(folder))
