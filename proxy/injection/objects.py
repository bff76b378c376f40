"""Where the pods are in an object of Kubernetes, and the object with a gate in each of them."""

from __future__ import annotations

from proxy.injection.model import Injected, Json, Outcome, Refused, Settings
from proxy.injection.patch import apply_in
from proxy.injection.pod import inject
from proxy.injection.reading import Unfit, items, mapping, shown, text

_CORE, _APPS, _BATCH = "", "apps", "batch"
_TEMPLATE = ("spec", "template")
TEMPLATES: dict[tuple[str, str], tuple[str, ...]] = {
    (_CORE, "Pod"): (),
    (_CORE, "PodTemplate"): ("template",),
    (_CORE, "ReplicationController"): _TEMPLATE,
    (_APPS, "Deployment"): _TEMPLATE,
    (_APPS, "ReplicaSet"): _TEMPLATE,
    (_APPS, "StatefulSet"): _TEMPLATE,
    (_APPS, "DaemonSet"): _TEMPLATE,
    (_BATCH, "Job"): _TEMPLATE,
    (_BATCH, "CronJob"): ("spec", "jobTemplate", *_TEMPLATE),
}
_MAX_DEPTH = 4  # lists of lists


def inject_object(found: Json, settings: Settings, depth: int = 0) -> Outcome:
    """The object with a gate in each pod that it makes, and itself where it makes none."""
    try:
        kind = text(found, "kind", "")
        if kind == "List" or (kind.endswith("List") and "items" in found):
            return _inject_list(found, settings, depth)
        path = TEMPLATES.get((_group(text(found, "apiVersion", "")), kind))
        return Injected(found, ()) if path is None else _inject_at(found, path, settings)
    except Unfit as why:
        return Refused(f"{title(found)}: {why}")


def title(found: Json) -> str:
    """Which object, to people."""
    metadata = found.get("metadata")
    name = metadata.get("name") or metadata.get("generateName") if isinstance(metadata, dict) else None
    return shown(f"{found.get('kind') or 'object'}/{name or 'without-a-name'}")


def _inject_at(found: Json, path: tuple[str, ...], settings: Settings) -> Outcome:
    above = [found]
    for key in path:
        above.append(mapping(above[-1], key, ""))
    outcome = inject(above[-1], settings)
    if isinstance(outcome, Refused):
        return Refused(f"{title(found)}: {outcome.reason}")
    changed = outcome.changed
    for key, one in zip(reversed(path), reversed(above[:-1]), strict=True):
        changed = {**one, key: changed}
    return Injected(changed, apply_in(path, outcome.patch), outcome.warnings)


def _inject_list(found: Json, settings: Settings, depth: int) -> Outcome:
    if depth >= _MAX_DEPTH:
        return Refused(f"{title(found)}: lists within lists")
    outcomes = [inject_object(one, settings, depth + 1) for one in items(found, "items", "", most=None)]
    injected: list[Injected] = []
    for outcome in outcomes:
        if isinstance(outcome, Refused):
            return outcome
        injected.append(outcome)
    patch = [one for number, each in enumerate(injected) for one in apply_in(("items", str(number)), each.patch)]
    warnings = tuple(warning for each in injected for warning in each.warnings)
    return Injected({**found, "items": [each.changed for each in injected]}, tuple(patch), warnings)


def _group(api_version: str) -> str:
    group, slash, _ = api_version.rpartition("/")
    return group if slash else _CORE
