"""Files that are replaced whole or not at all, also when the power fails; and secrets, which are read only where they
are one. It does not know what stands in them."""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import stat
from pathlib import Path

PUBLIC = 0o644
SECRET = 0o600


class UnusableSecret(Exception):
    """A file of secrets that cannot or must not be used. `str()` has the path and the repair, and nothing it holds."""


def read_secret(path: Path | str, most: int, *, shows: str = "it", holds: str = "it") -> bytes:
    """The file at `path`, which is its owner's alone; of a larger one `most` + 1 bytes. Raises UnusableSecret.

    The messages say that others are shown `shows`, and that a file must be named which `holds` it.
    """
    try:
        # O_NONBLOCK: a pipe that nobody writes to would hold a gate's loop for ever
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode  # of the very file that is read: a path could name another one then
            if not stat.S_ISREG(mode):
                raise UnusableSecret(f"{path}: not a file; name one that holds {holds}")
            if mode & 0o077:
                shown = f"mode {stat.S_IMODE(mode):04o} shows {shows} to others"
                raise UnusableSecret(f"{path}: {shown}; run: chmod 600 {shlex.quote(str(path))}")
            return file.read(most + 1)
    except OSError as error:
        raise UnusableSecret(f"{path}: {error.strerror}; restore it, or run as its owner") from error


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Puts `content` at `path` in one step: a reader sees the old file or the new one. Raises OSError."""
    # A name nobody can foretell, opened exclusively: in a shared directory nobody can put a link in its place.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes names just written in `directory` outlive a crash. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def repair(error: OSError) -> str:
    """What to do about a failed write, for the end of a message."""
    return "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a directory you may write"
