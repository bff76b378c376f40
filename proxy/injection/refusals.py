"""What a pod must not have, since no guard inside its network would hold then. It changes nothing.

docs/injection.md has each of these with the way out that it would be.
"""

from __future__ import annotations

from posixpath import normpath

from proxy.injection.model import ADMIN_PORT, DNS_PORT, GATE_PORT, UDP_PORT, Json, Settings
from proxy.injection.reading import Unfit, flag, items, mapping, shown, text, whole, words

DROPPED = ("NET_ADMIN", "NET_RAW", "SETUID", "SYS_ADMIN", "SYS_PTRACE", "SYS_MODULE")
# What leads round no guard. A capability that is not here is refused: the kernel gets new ones.
HARMLESS = frozenset(
    {
        "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "IPC_LOCK", "KILL", "LEASE", "MKNOD",
        "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SYS_CHROOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
    }
)  # fmt: skip
_SHARED = {
    "hostNetwork": "its packets leave by the node's network, where no gate is",
    "hostPID": "it could enter other processes of the node, and speak from there",
    "hostIPC": "it could speak through the memory of other pods",
}
_OWN_PORTS = (GATE_PORT, DNS_PORT, UDP_PORT, ADMIN_PORT)


def require_guardable(spec: Json, settings: Settings, where: str) -> None:
    """What a pod has as a whole. Raises Unfit."""
    for key, why in _SHARED.items():
        if flag(spec, key, where):
            raise Unfit(f"{where}{key}: {why}; leave it out, or {_opt_out(settings)}")
    if text(mapping(spec, "os", where), "name", f"{where}os.") not in ("", "linux"):
        raise Unfit(f"{where}os.name: the gate's rules are Linux's; {_opt_out(settings)}")
    _require_user(mapping(spec, "securityContext", where), settings, f"{where}securityContext.")
    for number, volume in enumerate(items(spec, "volumes", where)):
        _require_volume(volume, settings, f"{where}volumes[{number}].")


def require_container(container: Json, spec: Json, settings: Settings, where: str) -> None:
    """What one container asks for. Raises Unfit."""
    context = mapping(container, "securityContext", where)
    within = f"{where}securityContext."
    if flag(context, "privileged", within):
        raise Unfit(f"{within}privileged: it could change the gate's rules; name the capabilities that it needs")
    if flag(context, "allowPrivilegeEscalation", within):
        raise Unfit(f"{within}allowPrivilegeEscalation: a set-uid file could make it the gate; leave it out")
    for capability in words(mapping(context, "capabilities", within), "add", f"{within}capabilities."):
        if capability.upper().removeprefix("CAP_") not in HARMLESS:
            why = f"{shown(capability)} leads round the gate"
            raise Unfit(f"{within}capabilities.add: {why}; leave it out, or {_opt_out(settings)}")
    if text(context, "procMount", within) not in ("", "Default"):
        raise Unfit(f"{within}procMount: the kernel's settings would be open to it; leave it out")
    _require_user(context, settings, within)
    users = [whole(one, "runAsUser", within) for one in (context, mapping(spec, "securityContext", "spec."))]
    if settings.is_user_needed and users == [None, None]:
        raise Unfit(f"{within}runAsUser: missing, so its image says, and may say {settings.gate_uid}; name a uid")
    for number, port in enumerate(items(container, "ports", where)):
        if (taken := whole(port, "containerPort", f"{where}ports[{number}].")) in _OWN_PORTS:
            raise Unfit(f"{where}ports[{number}].containerPort: {taken} is the gate's; use another")


def _opt_out(settings: Settings) -> str:
    return f"label the pod {settings.label}=false if it must be so"


def _require_user(context: Json, settings: Settings, where: str) -> None:
    if whole(context, "runAsUser", where) == settings.gate_uid:
        raise Unfit(f"{where}runAsUser: {settings.gate_uid} is the gate's, which the rules let out; use another")
    if flag(mapping(context, "windowsOptions", where), "hostProcess", f"{where}windowsOptions."):
        raise Unfit(f"{where}windowsOptions.hostProcess: the gate's rules are Linux's; {_opt_out(settings)}")


def _require_volume(volume: Json, settings: Settings, where: str) -> None:
    if volume.get("hostPath") is None:
        return
    path = text(mapping(volume, "hostPath", where), "path", f"{where}hostPath.")
    if not any(_is_below(path, allowed) for allowed in settings.host_paths):
        raise Unfit(
            f"{where}hostPath: {shown(path)} is the node's, whose sockets and files lead round the gate; "
            f"leave it out, or have the operator name it (--host-path)"
        )


def _is_below(path: str, directory: str) -> bool:
    if ".." in path.split("/"):  # a way that the node's links may turn elsewhere
        return False
    place, allowed = normpath(path), normpath(directory)
    return place == allowed or place.startswith(allowed.rstrip("/") + "/")
