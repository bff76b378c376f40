"""The file of proxy credentials: `NAME:HASH`, one a line. It hashes, reads and writes; who may do what is the policy's.

The hash is scrypt (RFC 7914) with its parameters in the line: `$scrypt$n=16384,r=8,p=1$SALT$KEY`. A line that is empty
or begins with # is a comment. The file is for its owner alone and is replaced whole.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import scrypt
from hmac import compare_digest
from pathlib import Path
from unicodedata import normalize

from pki.files import SECRET, UnusableSecret, read_secret, repair, write_file

MAX_FILE = 1 << 20  # bytes; read on the gate's own loop
MAX_NAME, MAX_PASSWORD = 128, 512  # bytes of UTF-8, which with their colon fit in what is read of a client
MAX_MEMORY = 64 << 20  # bytes that one verification may take: the line says how many, and two run at once
MAX_LANES = 16
N, R, P = 1 << 14, 8, 1  # 16 MiB, and some 50 ms of one core

_SALT, _KEY = 16, 32
_HASH = re.compile(r"\$scrypt\$n=(\d{1,8}),r=(\d{1,3}),p=(\d{1,3})\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class CredentialsError(Exception):
    """The file cannot be read or written. `str()` has the place and the repair."""


class MalformedCredential(ValueError):
    """A name or password that no client could send. `str()` says what is wrong."""


@dataclass(frozen=True, slots=True)
class PasswordHash:
    """What is kept of a password. n, r and p are scrypt's: memory and time, block size, lanes."""

    salt: bytes
    key: bytes
    n: int = N
    r: int = R
    p: int = P

    def is_of(self, password: str) -> bool:
        """Whether it is the hash of `password`. Slow, on purpose; it lets other threads run meanwhile."""
        return compare_digest(_derive(password, self.salt, self.n, self.r, self.p, len(self.key)), self.key)

    def __str__(self) -> str:
        return f"$scrypt$n={self.n},r={self.r},p={self.p}${_encode(self.salt)}${_encode(self.key)}"


NOBODY = PasswordHash(bytes(_SALT), bytes(_KEY))  # of no password: takes as long for a name that there is not


def hash_password(password: str) -> PasswordHash:
    """With a new salt. Raises MalformedCredential."""
    if not 0 < len(password.encode()) <= MAX_PASSWORD:
        raise MalformedCredential(f"a password has 1 to {MAX_PASSWORD} bytes")
    if _CONTROL.search(password):
        raise MalformedCredential("the password holds a control character, which RFC 7617 does not carry")
    salt = secrets.token_bytes(_SALT)
    return PasswordHash(salt, _derive(normalize("NFC", password), salt, N, R, P, _KEY))


def parse_name(text: str) -> str:
    """A name in its one form (RFC 7617 2: NFC, no colon). Raises MalformedCredential."""
    name = normalize("NFC", text)
    if ":" in name or not name.isprintable() or name != name.strip() or name.startswith("#"):
        raise MalformedCredential("a name holds no colon and no control character, and begins with no # and no space")
    if not 0 < len(name.encode()) <= MAX_NAME:
        raise MalformedCredential(f"a name has 1 to {MAX_NAME} bytes")
    return name


def read_credentials(path: Path) -> Mapping[str, PasswordHash]:
    """Names and their hashes. Raises CredentialsError with file:line of the first mistake."""
    return _parse(path, _read(path))


def store_credential(path: Path, name: str, hash: PasswordHash) -> bool:
    """Puts `name` in the file, which is made if need be. True: it replaced a password. Raises CredentialsError."""
    with _one_writer(path):
        lines = _read(path) if path.exists() else []
        known = _parse(path, lines)
        line = f"{name}:{hash}"
        if name in known:
            lines = [line if _name_of(one) == name else one for one in lines]
        else:
            lines.append(line)
        _write(path, lines)
    return name in known


def remove_credential(path: Path, name: str) -> bool:
    """Takes `name` out of the file. False: it is not in it. Raises CredentialsError."""
    with _one_writer(path):
        lines = _read(path)
        if name not in _parse(path, lines):
            return False
        _write(path, [one for one in lines if _name_of(one) != name])
    return True


def _derive(password: str, salt: bytes, n: int, r: int, p: int, length: int) -> bytes:
    return scrypt(password.encode(), salt=salt, n=n, r=r, p=p, dklen=length, maxmem=2 * MAX_MEMORY)


def _parse(path: Path, lines: Sequence[str]) -> dict[str, PasswordHash]:
    found: dict[str, PasswordHash] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, hash = line.rstrip().partition(":")
        try:
            if not colon or parse_name(name) != name:
                raise MalformedCredential("not NAME:HASH; make the line with: outgate credentials add")
            if name in found:
                raise MalformedCredential(f'"{name}" stands in line {places[name]} already; remove one of them')
            found[name] = _parse_hash(hash)
        except MalformedCredential as error:
            raise CredentialsError(f"{path}:{number}: {error}") from error
        places[name] = number
    return found


def _parse_hash(text: str) -> PasswordHash:
    found = _HASH.fullmatch(text)
    if found is None:  # never shown: it may be a password somebody wrote there
        raise MalformedCredential("not a hash this version knows; make it with: outgate credentials add")
    n, r, p = (int(digits) for digits in found.groups()[:3])
    if n < 2 or n & (n - 1) or not r or not p:
        raise MalformedCredential(f"n={n},r={r},p={p}: n is a power of two above 1, r and p are at least 1")
    if 128 * n * r > MAX_MEMORY or p > MAX_LANES:
        raise MalformedCredential(f"n={n},r={r},p={p} would take more than {MAX_MEMORY >> 20} MiB or {MAX_LANES} lanes")
    return PasswordHash(_decode(found[4]), _decode(found[5]), n, r, p)


def _name_of(line: str) -> str | None:
    return None if line.startswith("#") else line.partition(":")[0]


def _encode(data: bytes) -> str:
    return b64encode(data).decode("ascii").rstrip("=")


def _decode(text: str) -> bytes:
    try:
        return b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise MalformedCredential("the salt or the key is not base64; make it with: outgate credentials add") from error


def _read(path: Path) -> list[str]:
    try:
        content = read_secret(path, MAX_FILE, holds="NAME:HASH lines")
    except UnusableSecret as error:
        raise CredentialsError(str(error)) from error
    if len(content) > MAX_FILE:
        raise CredentialsError(f"{path}: larger than {MAX_FILE >> 20} MiB; is it the right file?")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CredentialsError(f"{path}: not UTF-8 text; make it with: outgate credentials add") from error
    return text.removesuffix("\n").split("\n")  # not splitlines, which knows eight more ends of a line


def _write(path: Path, lines: list[str]) -> None:
    target = path.resolve()  # a link is kept, and what it leads to replaced
    owner = target.stat() if target.exists() else None
    write_file(target, "".join(f"{line}\n" for line in lines).encode(), SECRET)
    if owner is not None and (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(target, owner.st_uid, owner.st_gid)  # root adds a name to a file that the gate's own user reads


@contextmanager
def _one_writer(path: Path) -> Iterator[None]:
    """Two at once would each write what the other has not read. Maps what the kernel refuses."""
    try:
        descriptor = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CredentialsError(f"{error.filename or path}: {error.strerror}; {repair(error)}") from error
