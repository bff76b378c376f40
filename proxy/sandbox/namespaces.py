"""Enter new namespaces as oneself: the same uid and gid inside, so files keep their owner."""

from __future__ import annotations

import os

from proxy.sandbox import libc

# IPC: System V segments and queues are shared by uid. PID: what is not seen cannot be signalled, and all of it ends
# with its first process (its own fork enters it, not the caller).
_ALL = libc.CLONE_NEWUSER | libc.CLONE_NEWNET | libc.CLONE_NEWNS | libc.CLONE_NEWIPC | libc.CLONE_NEWPID


def enter() -> None:
    """Leave the caller's namespaces. The next fork is process 1 inside. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    libc.unshare(_ALL)
    _write("/proc/self/setgroups", "deny")  # user_namespaces(7): without it gid_map is refused
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
