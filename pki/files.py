"""Files that are replaced whole or not at all, also when the power fails. It does not know what stands in them."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

PUBLIC = 0o644
SECRET = 0o600


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
