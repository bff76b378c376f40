"""An independent look at injected pods, and a JSON Patch as its RFC has it: neither knows how injection is made."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from proxy.injection.model import Settings

_WAYS_ROUND = {"NET_RAW", "NET_ADMIN", "SETUID", "SYS_ADMIN"}
_HARMLESS = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "IPC_LOCK", "KILL", "LEASE", "MKNOD",
    "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SYS_CHROOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
}  # fmt: skip
_OURS = ("outgate-firewall", "outgate-authority", "outgate-gate")


def apply_patch(document: Any, patch: Sequence[dict[str, Any]]) -> Any:  # Any: any JSON
    """What the operations (RFC 6902: add, remove, replace) make of the document."""
    root = {"": copy.deepcopy(document)}
    for one in patch:
        *above, last = [part.replace("~1", "/").replace("~0", "~") for part in ("" + one["path"]).split("/")]
        here: Any = root
        for part in above:
            here = here[int(part)] if isinstance(here, list) else here[part]
        value = copy.deepcopy(one.get("value"))
        if isinstance(here, list):
            at = len(here) if last == "-" else int(last)
            assert at <= len(here)
            match one["op"]:
                case "add":
                    here.insert(at, value)
                case "remove":
                    del here[at]
                case _:
                    here[at] = value
        elif one["op"] == "remove":
            del here[last]
        else:
            assert one["op"] == "add" or last in here
            here[last] = value
    return root[""]


def pod_of(found: dict[str, Any]) -> dict[str, Any]:
    """The pod, or its template, in an object."""
    match found["kind"]:
        case "Pod":
            return found
        case "CronJob":
            template = found["spec"]["jobTemplate"]["spec"]["template"]
        case _:
            template = found["spec"]["template"]
    assert isinstance(template, dict)
    return template


def faults_of(found: dict[str, Any], before: dict[str, Any], settings: Settings) -> list[str]:
    """What leads round the gate in the pods of `found`, and what of `before` was lost."""
    spec, former = pod_of(found)["spec"], pod_of(before)["spec"]
    return [*_of_ours(spec, settings), *_of_theirs(spec, settings), *_lost(spec, former)]


def _of_ours(spec: dict[str, Any], settings: Settings) -> Iterator[str]:
    init = spec["initContainers"]
    wanted = [name for name in _OURS if name != "outgate-authority" or settings.authority]
    if [one["name"] for one in init[: len(wanted)]] != wanted:
        yield "ours are not the first"
    if [one["name"] for one in init].count("outgate-gate") != 1:
        yield "more than one gate"
    gate = init[len(wanted) - 1]
    if gate.get("restartPolicy") != "Always" or not {"startupProbe", "readinessProbe", "livenessProbe"} <= gate.keys():
        yield "the gate is no sidecar with probes"
    for one in init[: len(wanted)]:
        context = one["securityContext"]
        added = set(context["capabilities"].get("add", []))
        may = {"outgate-firewall": {"NET_ADMIN"}, "outgate-authority": set[str]()}.get(one["name"], set[str]())
        if one["name"] == "outgate-gate" and settings.udp:
            may = {"NET_RAW", "NET_BIND_SERVICE", "SETUID", "SETGID"}
        if context["capabilities"]["drop"] != ["ALL"] or added != may:
            yield f"{one['name']}: capabilities {added}"
        if not context["readOnlyRootFilesystem"] or context["allowPrivilegeEscalation"] or context["privileged"]:
            yield f"{one['name']}: not confined"
        if context["seccompProfile"] != {"type": "RuntimeDefault"} or one["image"] != settings.image:
            yield f"{one['name']}: seccomp or image"
        root = one["name"] == "outgate-firewall" or (one["name"] == "outgate-gate" and settings.udp)
        if context["runAsUser"] != (0 if root else settings.gate_uid):
            yield f"{one['name']}: runs as {context['runAsUser']}"
    names = [volume.get("name") for volume in spec["volumes"]]
    if any(names.count(name) != 1 for name in ("outgate-policy", *(["outgate-trust"] if settings.trust else []))):
        yield "volumes of ours are missing or there twice"


def theirs(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in ("initContainers", "containers", "ephemeralContainers"):
        yield from (one for one in spec.get(key) or [] if one.get("name") not in _OURS)


def _of_theirs(spec: dict[str, Any], settings: Settings) -> Iterator[str]:
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the node's"
    if (spec.get("securityContext") or {}).get("runAsUser") == settings.gate_uid:
        yield "the pod runs as the gate"
    for one in theirs(spec):
        context = one["securityContext"]
        dropped, added = context["capabilities"]["drop"], set(context["capabilities"].get("add") or [])
        if "ALL" not in dropped and not set(dropped) >= _WAYS_ROUND:
            yield f"{one['name']}: keeps {_WAYS_ROUND - set(dropped)}"
        if added - _HARMLESS:
            yield f"{one['name']}: gets {added - _HARMLESS}"
        if context["allowPrivilegeEscalation"] is not False or context.get("privileged"):
            yield f"{one['name']}: may get more"
        if context.get("runAsUser") == settings.gate_uid:
            yield f"{one['name']}: runs as the gate"
        for mount in one.get("volumeMounts") or []:
            if mount.get("name") in ("outgate-policy", "outgate-issuing", "outgate-state"):
                yield f"{one['name']}: mounts {mount}"


def _lost(spec: dict[str, Any], former: dict[str, Any]) -> Iterator[str]:
    """Variables and everything else that the author set, and that is not there any more."""
    for one, was in zip(theirs(spec), theirs(former), strict=True):
        kept = {key: value for key, value in one.items() if key not in ("env", "volumeMounts", "securityContext")}
        if kept != {key: value for key, value in was.items() if key not in ("env", "volumeMounts", "securityContext")}:
            yield f"{one['name']}: changed"
        now = list(one.get("env") or [])
        for variable in was.get("env") or []:
            if variable in now:
                continue
            added = [other["value"] for other in now if other.get("name") == variable["name"]]
            is_added_to = variable["name"] in ("JAVA_TOOL_OPTIONS", "PHP_INI_SCAN_DIR")
            if not is_added_to or not any(variable.get("value", "") in value for value in added):
                yield f"{one['name']}: {variable} is lost"
