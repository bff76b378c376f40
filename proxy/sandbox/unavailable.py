"""Why a sandbox cannot be had here, told from the kernel's switches, and what to do about it."""

from __future__ import annotations

import errno
import os
import shutil
import sys

_ADVISORY = (
    "or run with --proxy-env, which only sets proxy variables: advisory, a program that ignores them is not confined"
)
_NAMESPACE_LIMITS = ("user", "net", "mnt", "ipc", "pid")
_REFUSED = (errno.EPERM, errno.EACCES)


class SandboxUnavailable(Exception):
    """The command was not started. `what` was refused, `cause` as far as it can be told, `repair` to print as it is."""

    def __init__(self, what: str, cause: str, repair: str) -> None:
        self.what, self.cause, self.repair = what, cause, repair
        super().__init__(f"no sandbox: {what}: {cause}\n{repair}")


def diagnose(step: str, error: OSError) -> SandboxUnavailable:
    """Name the switch that refused `step`. The first that explains `error` is the answer."""
    what, number = f"{step} refused", error.errno
    if number in (errno.ENOSPC, errno.EUSERS) and (spent := _spent_limit()):
        return SandboxUnavailable(what, f"{spent} is 0", f"sudo sysctl -w {spent}=15000\n{_ADVISORY}")
    if number in (errno.ENOSPC, errno.EUSERS):
        repair = f"raise user.max_*_namespaces, or nest fewer sandboxes\n{_ADVISORY}"
        return SandboxUnavailable(what, "too many namespaces in use, or nested too deep", repair)
    if number in _REFUSED and _switch("kernel/apparmor_restrict_unprivileged_userns") == "1":
        cause = (
            "AppArmor keeps user namespaces from unconfined programs (kernel.apparmor_restrict_unprivileged_userns=1)"
        )
        return SandboxUnavailable(what, cause, _apparmor_repair())
    if number in _REFUSED and _switch("kernel/unprivileged_userns_clone") == "0":
        repair = f"sudo sysctl -w kernel.unprivileged_userns_clone=1\n{_ADVISORY}"
        return SandboxUnavailable(what, "kernel.unprivileged_userns_clone is 0", repair)
    if number in _REFUSED and (container := _container()):
        options = "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
        repair = f"start the container with {options}\n{_ADVISORY}"
        return SandboxUnavailable(what, f"{container} keeps namespaces from its programs", repair)
    if number in (errno.ENOSYS, errno.EINVAL):
        repair = f"use a kernel with user, network, mount, IPC and PID namespaces\n{_ADVISORY}"
        return SandboxUnavailable(what, "this kernel lacks a namespace or was built without it", repair)
    cause = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
    return SandboxUnavailable(what, cause, f"see docs/threat-model.md, What `run` needs\n{_ADVISORY}")


def not_linux() -> SandboxUnavailable:
    return SandboxUnavailable("namespaces", f"they exist on Linux only, this is {sys.platform}", _ADVISORY)


def unknown_machine(machine: str) -> SandboxUnavailable:
    cause = f"no system call table for {machine or 'this processor'} (x86_64 and aarch64, 64 bits, are known)"
    return SandboxUnavailable("system call filter", cause, _ADVISORY)


def _spent_limit() -> str | None:
    for kind in _NAMESPACE_LIMITS:
        if _switch(f"user/max_{kind}_namespaces") == "0":
            return f"user.max_{kind}_namespaces"
    return None


def _switch(name: str) -> str | None:
    try:
        with open(f"/proc/sys/{name}") as file:
            return file.read().strip()
    except OSError:
        return None


def _container() -> str | None:
    if os.path.exists("/.dockerenv"):
        return "Docker"
    if os.path.exists("/run/.containerenv"):
        return "Podman"
    try:
        with open("/proc/self/status") as file:
            return "a container's system call filter" if "Seccomp:\t2" in file.read() else None
    except OSError:
        return None


def _apparmor_repair() -> str:
    program = os.path.realpath(shutil.which(sys.argv[0]) or sys.argv[0])
    return f"""\
allow it for outgate alone, in /etc/apparmor.d/outgate:

    abi <abi/4.0>,
    include <tunables/global>
    profile outgate {program} flags=(unconfined) {{
      userns,
    }}

then: sudo apparmor_parser -r /etc/apparmor.d/outgate
or for every program: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0
{_ADVISORY}"""
