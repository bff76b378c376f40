"""The trust directory in a container: mounted as a whole, and named by every runtime's variable that is not set yet."""

from __future__ import annotations

from pki.distribution import JAVA, PHP_SCAN, environment
from proxy.injection.model import Json
from proxy.injection.reading import Unfit, items, text

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # a value that another object has


def trust(container: Json, volume: str, path: str, where: str) -> list[str]:
    """Mounts `volume` at `path` and sets the variables, in place. Gives what its author should know. Raises Unfit."""
    mounts = items(container, "volumeMounts", where)
    taken = next((mount for mount in mounts if _place(mount, where) == path), None)
    if taken is not None and text(taken, "name", where) != volume:
        return [f"{where}volumeMounts: another volume is at {path}; nothing is mounted there, and no variable set"]
    if taken is None:
        container["volumeMounts"] = [*mounts, {"name": volume, "mountPath": path, "readOnly": True}]
    return _set_variables(container, path, where)


def _place(mount: Json, where: str) -> str:
    found = text(mount, "mountPath", where)
    return found.rstrip("/") or "/"


def _set_variables(container: Json, path: str, where: str) -> list[str]:
    variables = items(container, "env", where)
    existing: dict[str, str] = {}
    for number, one in enumerate(variables):
        name = text(one, "name", f"{where}env[{number}].")
        if not name:
            raise Unfit(f"{where}env[{number}].name: missing")
        given = text(one, "value", f"{where}env[{number}].")
        existing[name] = _UNKNOWN if one.get("valueFrom") is not None else given
    found = environment(path, existing, keep_existing=True)
    kept = list(found.kept)
    changed = list(variables)
    for name, value in found.variables.items():
        if existing.get(name) == _UNKNOWN:  # nothing can be added to what is not known here
            kept.append(name)
        elif name not in existing:
            changed.append({"name": name, "value": value})
        elif existing[name] != value:
            last = max(number for number, one in enumerate(changed) if one.get("name") == name)  # the last one counts
            changed[last] = {**changed[last], "value": value}
    if changed:
        container["env"] = changed
    warnings = [f"{where}env: {name} is kept; what reads it may not trust the gate" for name in dict.fromkeys(kept)]
    if container.get("envFrom"):
        named = f"{JAVA} and {PHP_SCAN}"
        warnings.append(f"{where}envFrom: variables there that trust needs give way to ours, {named} too")
    return warnings
