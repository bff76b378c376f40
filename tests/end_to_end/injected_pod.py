"""The containers of an injected pod run as a node would: user, capabilities, no_new_privs and read-only root as their
securityContext has them, arguments as they stand, volumes as directories of the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.end_to_end.namespaces import Namespaces
from tests.end_to_end.world import OUTGATE
from tests.sandbox_user import as_user

# What containerd and CRI-O give a container that says nothing.
DEFAULT = (
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
    "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
)  # fmt: skip
_READ_ONLY = 'for kept; do shift; [ "$kept" = -- ] && break; mount --bind "$kept" "$kept"; done; '
_READ_ONLY += 'mount -o remount,bind,ro / && exec "$@"'


def container_of(pod: dict[str, Any], name: str) -> dict[str, Any]:
    spec = pod["spec"]
    found = next(one for one in (*spec["initContainers"], *spec["containers"]) if one["name"] == name)
    assert isinstance(found, dict)
    return found


def capabilities_of(context: dict[str, Any]) -> set[str]:
    """What a runtime leaves in the bounding set."""
    said = context.get("capabilities", {})
    dropped = said.get("drop", [])
    left = set() if "ALL" in dropped else set(DEFAULT) - set(dropped)
    return left | set(said.get("add", []))


def command_of(container: dict[str, Any], volumes: dict[str, Path]) -> list[str]:
    """Its command line, where each path of a volume is the directory that stands for it."""
    words = [*container.get("command", [str(OUTGATE)]), *container["args"]]
    if "command" in container:
        words = [str(OUTGATE) if word == "outgate" else word for word in words]
    for mount in container.get("volumeMounts", []):
        there = str(volumes[mount["name"]])
        words = [word.replace(mount["mountPath"], there) for word in words]
    return words


def running(
    net: Namespaces,
    container: dict[str, Any],
    command: list[str],
    *,
    user: int | None = None,
    writable: tuple[Path, ...] = (),
) -> list[str]:
    """The command line that runs `command` on the machine `pod` as that container.

    user      whom its image says it runs as, where its context does not
    writable  volumes that it may write; the rest is read-only where it says so
    """
    context = container["securityContext"]
    uid = context.get("runAsUser", user if user is not None else 0)
    gid = context.get("runAsGroup", uid)
    bounding = ",".join(["-all", *(f"+{name.lower()}" for name in sorted(capabilities_of(context)))])
    line = ["setpriv", f"--bounding-set={bounding}", "--inh-caps=-all", f"--reuid={uid}", f"--regid={gid}"]
    line += ["--clear-groups", *(["--no-new-privs"] if context.get("allowPrivilegeEscalation") is False else [])]
    inside = as_user([*line, *command], 0)
    if context.get("readOnlyRootFilesystem"):
        script = ["sh", "-c", _READ_ONLY, "sh", *map(str, writable), "--"]
        inside = ["unshare", "--mount", "--propagation", "private", *script, *inside]
    return net.inside("pod", inside)
