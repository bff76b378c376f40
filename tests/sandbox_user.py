"""Run a program as an ordinary user although the tests run as root, and root's home and the checkout may be closed.

    subprocess.run(as_user([sys.executable, ...]))

A mount namespace of its own opens the way to the interpreter, the virtual environment and the checkout; nothing on
disk is changed.
"""

from __future__ import annotations

import functools
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ORDINARY_UID = 4242  # nobody's
# Shell that lives until a trap ends it. `wait` alone hears every signal: a dash that starts a program (vfork) drops one
# that comes in that moment.
UNTIL_SIGNALLED = "sleep 1000 & while :; do wait; done"
_CHECKOUT = Path(__file__).resolve().parent.parent


def as_user(command: Sequence[str], uid: int = ORDINARY_UID) -> list[str]:
    """The command line that runs `command` as `uid`. Only root may use it."""
    return [sys.executable, str(Path(__file__).resolve()), str(uid), *command]


@functools.cache
def why_no_sandbox() -> str:
    """Why a sandbox cannot be had on this machine, or an empty text."""
    driver = str(_CHECKOUT / "tests" / "proxy" / "sandbox_driver.py")
    tried = subprocess.run(
        [sys.executable, driver, "--", "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return "" if tried.returncode == 0 else tried.stderr.strip() or f"exit status {tried.returncode}"


def _closed_parents(path: Path) -> list[Path]:
    """Directories above `path` that other users may not pass."""
    return [parent for parent in path.parents if not parent.stat().st_mode & stat.S_IXOTH]


def _open_ways(paths: list[Path]) -> None:
    from proxy.sandbox import libc

    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
    opened = [(path, os.open(path, os.O_PATH)) for path in paths if _closed_parents(path)]
    for parent in {_closed_parents(path)[-1] for path, _ in opened}:
        libc.mount("tmpfs", str(parent), "tmpfs", 0, "mode=0755")
    for path, descriptor in opened:
        path.mkdir(parents=True, exist_ok=True)
        libc.mount(f"/proc/self/fd/{descriptor}", str(path), None, libc.MS_BIND)
        os.close(descriptor)


def main() -> None:
    sys.path.insert(0, str(_CHECKOUT))
    uid = int(sys.argv[1])
    _open_ways([Path(sys.base_prefix), Path(sys.prefix), _CHECKOUT])
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
