"""A private view of the file tree, in which the paths that lead outside are hidden. Which ones is `masks`' work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from proxy.sandbox import libc
from proxy.sandbox.kept import Kept
from proxy.sandbox.masks import Masks

_RESOLV_CONF = "/etc/resolv.conf"
# The kernel's own switches: uid 0 may write them without any capability (kernel.core_pattern names a program that the
# host then runs). Container runtimes keep the same list.
_SWITCHES = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_LOCKED_FLAGS = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC  # no remount may lose these; statvfs has the same bits


def apply(masks: Masks, kept: Kept) -> bool:
    """Make the tree private, keep `kept` as it is, hide `masks`. Returns whether /proc shows this PID namespace alone.

    Raises OSError for a mask that cannot be applied, unless its path is gone by now.
    """
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
    for path in (*kept.pinned, *kept.read_only):  # a mount point can be neither renamed nor removed
        libc.mount(path, path, None, libc.MS_BIND | libc.MS_REC)
    for path in kept.read_only:
        _make_read_only(path)
    resolv_conf = os.path.realpath(_RESOLV_CONF)
    text = _resolv_conf_text()
    for path in masks.directories:
        with suppress(FileNotFoundError):
            _hide_directory(path, {resolv_conf: text})
    for path in masks.files:
        with suppress(FileNotFoundError):
            libc.mount("/dev/null", path, None, libc.MS_BIND)
    if os.path.exists(resolv_conf) and not masks.cover(resolv_conf):
        _replace_file(resolv_conf, text)
    if os.path.isdir("/dev/pts"):
        # The user's terminals are files of the same owner: without this they could be read and written.
        libc.mount(
            "devpts", "/dev/pts", "devpts", libc.MS_NOSUID | libc.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"
        )
    has_own_proc = _mount_proc()
    _lock_switches()
    return has_own_proc


def _resolv_conf_text() -> str:
    """The user's search list and options, and the gate as the only name server: every address is the gate's."""
    try:
        with open(_RESOLV_CONF, errors="replace") as file:
            lines = [line.rstrip("\n") for line in file if line.split(maxsplit=1)[:1] != ["nameserver"]]
    except OSError:
        lines = []
    return "\n".join([*lines, "nameserver 127.0.0.1", ""])


def _hide_directory(path: str, files: dict[str, str]) -> None:
    """Put an empty file system over `path`, with those of `files` that belong in it.

    A directory that was the user's own (XDG_RUNTIME_DIR, tmux) is private and writable, others are read-only.
    """
    is_own = os.stat(path).st_uid == os.geteuid()
    flags = libc.MS_NOSUID | libc.MS_NODEV
    libc.mount("tmpfs", path, "tmpfs", flags, "mode=0700" if is_own else "mode=0755")
    for name, text in files.items():
        if name.startswith(path + "/"):
            os.makedirs(os.path.dirname(name), exist_ok=True)
            _write(name, text)
    if not is_own:
        _make_read_only(path)


def _replace_file(path: str, text: str) -> None:
    """Bind a read-only file with `text` over `path`. Its file system is nowhere to be seen afterwards."""
    libc.mount("tmpfs", "/proc", "tmpfs", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC, "mode=0755")
    _write("/proc/text", text)
    libc.mount("/proc/text", path, None, libc.MS_BIND)
    libc.unmount("/proc")
    _make_read_only(path)


def _write(path: str, text: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
        file.write(text)


def _mount_proc() -> bool:
    """A /proc of our own; refused where a container hides parts of its own (then the PIDs in it are the outer ones)."""
    try:
        libc.mount("proc", "/proc", "proc", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC)
    except PermissionError:
        return False
    return True


def _lock_switches() -> None:
    for path in filter(os.path.exists, _SWITCHES):
        libc.mount(path, path, None, libc.MS_BIND | libc.MS_REC)
        _make_read_only(path)
    for path in list(_mount_points("/sys")):
        with suppress(FileNotFoundError):
            if os.access(path, os.F_OK):  # what we cannot reach the workload cannot reach either
                _make_read_only(path)


def _make_read_only(path: str) -> None:
    kept = os.statvfs(path).f_flag & _LOCKED_FLAGS
    libc.mount("none", path, None, libc.MS_REMOUNT | libc.MS_BIND | libc.MS_RDONLY | kept)


def _mount_points(root: str) -> Iterator[str]:
    with open("/proc/self/mountinfo", errors="surrogateescape") as lines:
        for line in lines:
            path = line.split(" ", 5)[4]
            if path == root or path.startswith(root + "/"):
                yield path
