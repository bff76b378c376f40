"""Which paths lead past the network namespace, found before it is entered. Hiding them is `mounts`' work.

A unix socket with a path, a terminal or a disk is reached through the file tree, and the file tree is shared.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Masks:
    """Real paths to hide: an empty file system goes over each directory, /dev/null over each file."""

    directories: tuple[str, ...]
    files: tuple[str, ...]

    def cover(self, path: str) -> bool:
        """True for a path that is hidden already, with a directory above it."""
        return any(path == directory or path.startswith(directory + "/") for directory in self.directories)


# Services that act for whoever connects: they run, fetch, resolve or type outside the sandbox.
_SERVICE_DIRECTORIES = (
    "/run/dbus",
    "/run/systemd",
    "/run/nscd",
    "/run/avahi-daemon",
    "/run/docker",
    "/run/containerd",
    "/run/podman",
    "/run/crio",
    "/run/buildkit",
    "/run/libvirt",
    "/run/lxd",
    "/run/screen",
    "/run/WSL",  # starts Windows programs
    "/mnt/wslg",
    "/tmp/.X11-unix",  # noqa: S108 - where X11 puts it
    "/tmp/.ICE-unix",  # noqa: S108
    "/var/lib/lxd",
    "/var/snap/lxd/common/lxd",
)
# Searched for sockets two levels deep (those bound in another network namespace are not in the kernel's list here).
_SEARCHED = ("/run", "/var/run", "~/.gnupg", "~/.ssh", "~/.1password", "~/.docker", "~/.colima", "~/.rd")
_DEVICES = ("/dev/uinput", "/dev/vhost-vsock")  # types at the user's desktop; plays a virtual machine to the host

# Variables that only say where such a service is. A program that finds none tries less.
_SERVICE_VARIABLES = frozenset(
    (
        *("SSH_AUTH_SOCK", "SSH_AGENT_PID", "GPG_AGENT_INFO", "SESSION_MANAGER", "NOTIFY_SOCKET", "JOURNAL_STREAM"),
        *("DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS", "DBUS_STARTER_ADDRESS", "WSL_INTEROP"),
        *("DISPLAY", "WAYLAND_DISPLAY", "WAYLAND_SOCKET", "XAUTHORITY", "ICEAUTHORITY", "PULSE_SERVER"),
        *("PIPEWIRE_REMOTE", "TMUX", "TMUX_PANE", "STY", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
        *("VSCODE_IPC_HOOK_CLI", "VSCODE_GIT_IPC_HANDLE"),
    )
)
_ADDRESS_VARIABLES = frozenset({"DOCKER_HOST", "CONTAINER_HOST", "BUILDKIT_HOST", "CONTAINERD_ADDRESS"})


def find(environment: Mapping[str, str], extra: Iterable[str] = ()) -> Masks:
    """Everything to hide from a command started by this user. Raises OSError when the sockets cannot be listed."""
    uid = os.geteuid()
    named = [*_SERVICE_DIRECTORIES, f"/run/user/{uid}", f"/tmp/tmux-{uid}"]  # noqa: S108 - tmux's own choice
    if tmux := environment.get("TMUX_TMPDIR"):
        named.append(f"{tmux}/tmux-{uid}")
    wanted = _real(named)
    extra_paths = _real(extra)
    directories = Masks(_outermost(path for path in (*wanted, *extra_paths) if os.path.isdir(path)), ())
    searched = (*_SEARCHED, environment.get("XDG_RUNTIME_DIR", "/run"))
    files = {
        *(path for path in extra_paths if not os.path.isdir(path)),
        *_real(filter(_may_write, _DEVICES)),
        *_real(
            socket for root in searched for socket in _sockets_below(os.path.expanduser(root), directories, depth=2)
        ),
        *_real(_bound_sockets()),
        *_real(_named_sockets(environment)),
        *_other_devices(),
    }
    return Masks(directories.directories, tuple(sorted(path for path in files if not directories.cover(path))))


def without_services(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without variables that name what is hidden."""
    return {name: value for name, value in environment.items() if not _names_service(name, value)}


def _names_service(name: str, value: str) -> bool:
    if name in _SERVICE_VARIABLES or _socket_path(value):
        return True
    return name in _ADDRESS_VARIABLES and not value.startswith(("tcp:", "http:", "https:", "ssh:"))


def _socket_path(value: str) -> str | None:
    path = value.removeprefix("unix:").removeprefix("path=").removeprefix("//")
    return path if path.startswith("/") and _is_socket(path) else None


def _named_sockets(environment: Mapping[str, str]) -> Iterator[str]:
    return (path for value in environment.values() if (path := _socket_path(value)))


def _bound_sockets() -> Iterator[str]:
    """Every socket in the kernel's list that has a path this user may connect to."""
    with open("/proc/net/unix", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=7)
            if len(fields) == 8 and fields[7].startswith("/") and _may_write(fields[7]):
                yield fields[7]


def _sockets_below(directory: str, hidden: Masks, depth: int) -> Iterator[str]:
    for entry in _entries(directory):
        if entry.is_dir(follow_symlinks=False):
            if depth > 1 and not hidden.cover(entry.path):
                yield from _sockets_below(entry.path, hidden, depth - 1)
        elif not entry.is_file() and _is_socket(entry.path) and _may_write(entry.path):
            yield entry.path


def _other_devices() -> Iterator[str]:
    """Terminals that are not the workload's own (a serial line leaves the machine), and whole disks."""
    for directory in ("/dev", "/dev/mapper"):
        for entry in _entries(directory):
            if entry.is_symlink() or not (_is_terminal(entry.name) or _is_disk(entry)):
                continue
            if os.access(entry.path, os.R_OK) or _may_write(entry.path):
                yield entry.path


def _is_terminal(name: str) -> bool:
    return name == "console" or (name != "tty" and name.startswith(("tty", "hvc", "vcs")))


def _is_disk(entry: os.DirEntry[str]) -> bool:
    return stat.S_ISBLK(entry.stat(follow_symlinks=False).st_mode)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as found:
            return list(found)
    except OSError:  # not there, or closed to us and so to the workload
        return []


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _may_write(path: str) -> bool:
    return os.access(path, os.W_OK)  # connect(2) asks for write permission on the socket


def _real(paths: Iterable[str]) -> list[str]:
    found = (os.path.realpath(os.path.expanduser(path)) for path in paths)
    return [path for path in found if os.path.lexists(path)]


def _outermost(directories: Iterable[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for path in sorted(set(directories)):
        if not Masks(tuple(kept), ()).cover(path):
            kept.append(path)
    return tuple(kept)
