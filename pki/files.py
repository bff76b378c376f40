"""Files that are replaced whole or not at all, also when the power fails; and secrets, which are read only where they
are one. It does not know what stands in them."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import stat
from pathlib import Path

PUBLIC = 0o644
SECRET = 0o600

_LEFT_BESIDE = re.compile(r"\..+\.[0-9a-f]{16}")  # what `write_file` writes before it takes its name


class UnusableSecret(Exception):
    """A file of secrets that cannot or must not be used. `str()` has the path and the repair, and nothing it holds."""


def read_secret(path: Path | str, most: int, *, shows: str = "it", holds: str = "it", own: bool = False) -> bytes:
    """The file at `path`, which is its owner's alone; of a larger one `most` + 1 bytes. Raises UnusableSecret.

    The messages say that others are shown `shows`, and that a file must be named which `holds` it.

    own  refuse a link too, and a file of another user, who knows what it holds and can change it
    """
    link = os.O_NOFOLLOW if own else 0
    try:
        # O_NONBLOCK: a pipe that nobody writes to would hold a gate's loop for ever
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | link), "rb") as file:
            status = os.fstat(file.fileno())  # of the very file that is read: a path could name another one then
            mode = status.st_mode
            if not stat.S_ISREG(mode):
                raise UnusableSecret(f"{path}: not a file; name one that holds {holds}")
            if own and status.st_uid != os.geteuid():
                raise UnusableSecret(f"{path}: belongs to uid {status.st_uid}, not to us; run as that user")
            if mode & 0o077:
                shown = f"mode {stat.S_IMODE(mode):04o} shows {shows} to others"
                raise UnusableSecret(f"{path}: {shown}; run: chmod 600 {shlex.quote(str(path))}")
            return file.read(most + 1) or b""  # None: nothing to be read yet, as in /proc/kmsg
    except OSError as error:
        if own and error.errno == errno.ELOOP:
            raise UnusableSecret(f"{path}: a symbolic link; put the file itself there") from error
        raise UnusableSecret(f"{path}: {error.strerror}; restore it, or run as its owner") from error


def read_file(path: Path, most: int) -> bytes:
    """A regular file of at most `most` bytes. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return file.read(most) or b""


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


def remove_file(path: Path) -> None:
    """Deletes a file, if there is one, so that it stays deleted. Raises OSError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def remove_left_beside(directory: Path) -> None:
    """Deletes what killed calls of `write_file` left. Nobody else may be writing there. Raises OSError."""
    for path in directory.iterdir():
        if _LEFT_BESIDE.fullmatch(path.name):
            remove_file(path)


def make_directory(path: Path, mode: int) -> None:
    """Makes a directory unless it is there, and those above it. Their names outlive a crash. Raises OSError."""
    if path.is_dir():
        return
    make_directory(path.parent, 0o777)
    try:
        path.mkdir(mode)
    except FileExistsError as error:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
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
