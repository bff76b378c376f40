"""A pod, or the template of one, with a gate in it; or why it cannot have one. Nothing that it says of itself is
believed: what bears our names is put there anew."""

from __future__ import annotations

from collections.abc import Iterable

from policies.spelling import did_you_mean
from proxy.injection.gate import CONTAINERS, GATE, HIDDEN_VOLUMES, TRUST_VOLUME, VOLUMES, containers, volumes
from proxy.injection.model import (
    ANNOTATIONS,
    DEVICES,
    DNS_PORT,
    EXCLUDE_CIDRS,
    EXCLUDE_PORTS,
    INBOUND,
    INJECTED,
    OFF,
    ON,
    PREFIX,
    TRUST,
    UDP_PORT,
    WORKLOAD,
    Injected,
    Json,
    Outcome,
    Refused,
    Settings,
)
from proxy.injection.patch import difference
from proxy.injection.reading import Unfit, items, mapping, shown, text, texts
from proxy.injection.refusals import require_container, require_guardable
from proxy.injection.trusting import trust
from proxy.injection.workload import confine
from proxy.layout import Layout, MalformedLayout, read_layout

_LISTS = ("initContainers", "containers")
_EPHEMERAL = "ephemeralContainers"
_MAX_NAME = 128  # characters of a workload's, as in the gate's configuration


def inject(template: object, settings: Settings) -> Outcome:
    """The pod with a gate in it. One that is switched off by its label stays as it is."""
    try:
        return _inject(_object(template), settings)
    except Unfit as why:
        return Refused(str(why))


def guard_ephemeral(pod: object, former: object, settings: Settings) -> Outcome:
    """The pod with those of its ephemeral containers confined that `former` did not have; they come when it runs.

    They get no trust directory: what is there already may not be changed, and a person who debugs can name it.
    """
    try:
        return _guard_ephemeral(_object(pod), _object(former), settings)
    except Unfit as why:
        return Refused(str(why))


def is_switched_off(template: Json, settings: Settings) -> bool:
    """Whether its label says so. Raises Unfit where it says neither."""
    said = texts(mapping(template, "metadata", ""), "labels", "metadata.").get(settings.label, ON)
    if said not in (ON, OFF):
        raise Unfit(f"metadata.labels: {settings.label}: {shown(said)} is neither {ON} nor {OFF}")
    return said == OFF


def _inject(template: Json, settings: Settings) -> Outcome:
    if is_switched_off(template, settings):
        return Injected(template, ())
    metadata = mapping(template, "metadata", "")
    annotations = texts(metadata, "annotations", "metadata.")
    spec = _without_ours(mapping(template, "spec", ""))
    layout, workload = _layout(annotations, settings), _workload(annotations, spec)
    require_guardable(spec, settings, "spec.")
    is_trusting = settings.trust is not None and _switch(annotations, TRUST)
    warnings: list[str] = []
    for key in (*_LISTS, _EPHEMERAL):
        if found := items(spec, key, "spec."):
            trusting = is_trusting and key in _LISTS
            guarded = [
                _guarded(one, spec, settings, f"spec.{key}[{number}].", trusting, warnings)
                for number, one in enumerate(found)
            ]
            spec[key] = guarded
    if not items(spec, "containers", "spec."):
        raise Unfit("spec.containers: none")
    spec["initContainers"] = [*containers(settings, layout, workload), *items(spec, "initContainers", "spec.")]
    spec["volumes"] = [*items(spec, "volumes", "spec."), *volumes(settings)]
    noted = {**metadata, "annotations": {**annotations, INJECTED: settings.image}}
    changed = {**template, "metadata": noted, "spec": spec}
    return Injected(changed, tuple(difference(template, changed)), tuple(warnings))


def _guard_ephemeral(pod: Json, former: Json, settings: Settings) -> Outcome:
    spec = mapping(pod, "spec", "")
    if GATE not in _names(items(spec, "initContainers", "spec.")):
        return Injected(pod, ())
    known = _names(items(mapping(former, "spec", ""), _EPHEMERAL, "spec."))
    found = items(spec, _EPHEMERAL, "spec.")
    guarded = [
        one
        if one.get("name") in known
        else _guarded(one, spec, settings, f"spec.{_EPHEMERAL}[{number}].", is_trusting=False, warnings=[])
        for number, one in enumerate(found)
    ]
    changed = {**pod, "spec": {**spec, **({_EPHEMERAL: guarded} if found else {})}}
    return Injected(changed, tuple(difference(pod, changed)))


def _guarded(
    container: Json, spec: Json, settings: Settings, where: str, is_trusting: bool, warnings: list[str]
) -> Json:
    """A copy of a container of the workload's that leads round no gate. Raises Unfit."""
    name = text(container, "name", where)
    if name in CONTAINERS:
        raise Unfit(f"{where}name: {name} is the name of one of ours; use another")
    for number, mount in enumerate(items(container, "volumeMounts", where)):
        if text(mount, "name", f"{where}volumeMounts[{number}].") in HIDDEN_VOLUMES:
            raise Unfit(f"{where}volumeMounts[{number}].name: that volume is the gate's alone")
    require_container(container, spec, settings, where)
    made = dict(container)
    confine(made, where)
    if is_trusting:
        warnings += trust(made, TRUST_VOLUME, settings.trust_path, where)
    return made


def _without_ours(spec: Json) -> Json:
    """A copy without what an earlier injection, or somebody in its name, put there."""
    made = dict(spec)
    for key, ours in (("initContainers", CONTAINERS), ("volumes", VOLUMES)):
        if found := items(spec, key, "spec."):
            made[key] = [one for one in found if one.get("name") not in ours]
    return made


def _layout(annotations: dict[str, str], settings: Settings) -> Layout:
    """The rules that the pod's network gets. Raises Unfit."""
    for name in annotations:
        if name.startswith(PREFIX) and name not in ANNOTATIONS:
            raise Unfit(f"metadata.annotations: {shown(name)} has no meaning; {did_you_mean(name, ANNOTATIONS)}")
    ports = {"dns_port": [str(DNS_PORT)], "gate_uid": [str(settings.gate_uid)]}
    said = {
        "upstream_devices": (DEVICES, _parts(annotations, DEVICES)),
        "excluded": (EXCLUDE_CIDRS, _parts(annotations, EXCLUDE_CIDRS)),
        "excluded_ports": (EXCLUDE_PORTS, _parts(annotations, EXCLUDE_PORTS)),
    }
    for name, values in (said["excluded"], said["excluded_ports"]):
        if values and not settings.may_exclude:
            raise Unfit(f"metadata.annotations: {name}: nothing may go past the gate here; leave it out")
    if settings.udp:
        ports["udp_port"] = [str(UDP_PORT)]
    switches = {"inbound": _switch(annotations, INBOUND)}
    try:
        return read_layout("sidecar", {**ports, **{field: values for field, (_, values) in said.items()}}, switches)
    except MalformedLayout as error:
        names = ", ".join(name for name, values in said.values() if values)
        raise Unfit(f"metadata.annotations: {names}: {_one_line(str(error))}") from error


def _parts(annotations: dict[str, str], name: str) -> list[str]:
    return [part.strip() for part in annotations.get(name, "").split(",") if part.strip()]


def _switch(annotations: dict[str, str], name: str) -> bool:
    """Raises Unfit where it is neither; on where it is not said."""
    said = annotations.get(name, ON)
    if said not in (ON, OFF):
        raise Unfit(f"metadata.annotations: {name}: {shown(said)} is neither {ON} nor {OFF}")
    return said == ON


def _workload(annotations: dict[str, str], spec: Json) -> str:
    """Whose rules count: the pod's word for itself, else its service account. Raises Unfit."""
    found = annotations.get(WORKLOAD) or text(spec, "serviceAccountName", "spec.") or "default"
    # One argument of the gate's, and never a flag; Kubernetes would expand $(NAME).
    if not found.isprintable() or found[0] == "-" or "$" in found or len(found) > _MAX_NAME or found != found.strip():
        raise Unfit(f"metadata.annotations: {WORKLOAD}: {shown(found)} is no name of a workload")
    return found


def _names(of: Iterable[Json]) -> set[object]:
    return {name for one in of if isinstance(name := one.get("name"), str)}


def _object(value: object) -> Json:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise Unfit("not an object; a pod is one")
    return value


def _one_line(message: str) -> str:
    """A message that holds words of somebody else, as one line."""
    return "".join(c if c.isprintable() else "?" for c in message)[:300]
