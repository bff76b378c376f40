"""The same without a server: policies by which an API server injects by itself, in CEL. No API server was there to try
them: tests hold them to the schema alone.

A MutatingAdmissionPolicy puts the gate in. What it cannot do there a ValidatingAdmissionPolicy asks for: it refuses
what cannot be guarded, containers that keep capabilities, and a gate that is not ours.
"""

from __future__ import annotations

import json
from typing import Any

from pki.distribution import environment
from proxy.injection.gate import GATE, HIDDEN_VOLUMES, TRUST_VOLUME, VOLUMES, containers, volumes
from proxy.injection.model import ADMIN_PORT, DNS_PORT, GATE_PORT, OFF, ON, UDP_PORT, Json, Settings
from proxy.injection.refusals import DROPPED, HARMLESS
from proxy.layout import read_layout

API_VERSION = "admissionregistration.k8s.io/v1"
NAME = "outgate-inject"
WORKLOAD = "OUTGATE_WORKLOAD"
_MAPS = {"requests", "limits"}  # fields whose keys are anybody's
_CREATED: Json = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
_DEBUGGED: Json = {**_CREATED, "operations": ["UPDATE"], "resources": ["pods/ephemeralcontainers"]}
_SYSTEM = ["kube-system", "kube-public", "kube-node-lease"]


def objects(settings: Settings) -> list[Json]:
    """Two policies and their bindings, for namespaces that have the label of `settings` as `true`."""
    return [_mutating(settings), _validating(settings), _binding("Mutating"), _binding("Validating")]


def _mutating(settings: Settings) -> Json:
    mutations: list[Json] = [{"patchType": "JSONPatch", "jsonPatch": {"expression": _put_in(settings)}}]
    mutations += [
        {"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": _told(key, settings)}}
        for key in ("containers", "initContainers")
    ]
    spec = {
        "failurePolicy": "Fail",
        "reinvocationPolicy": "IfNeeded",
        "matchConstraints": _matched(settings, [_CREATED]),
        "matchConditions": [{"name": "not-yet", "expression": f'!{_init()}.exists(c, c.name == "{GATE}")'}],
        "mutations": mutations,
    }
    return {"apiVersion": API_VERSION, "kind": "MutatingAdmissionPolicy", "metadata": {"name": NAME}, "spec": spec}


def _put_in(settings: Settings) -> str:
    """Ours first, in their order: each goes before what is there, so the last one is put in first."""
    steps = [_made_sure("initContainers"), _made_sure("volumes")]
    puts = [
        _patch("/spec/initContainers/0", _cel(one, "Object.spec.initContainers")) for one in reversed(_ours(settings))
    ]
    puts += [_patch("/spec/volumes/-", _cel(one, "Object.spec.volumes")) for one in volumes(settings)]
    return " +\n".join([*steps, "[" + ",\n".join(puts) + "]"])


def _ours(settings: Settings) -> list[Json]:
    """The workload is the service account, which the kubelet tells the gate: CEL takes no annotation for a flag."""
    layout = read_layout("sidecar", _ports(settings), {"inbound": True})
    made = containers(settings, layout, "")
    made[-1]["env"] = [{"name": WORKLOAD, "valueFrom": {"fieldRef": {"fieldPath": "spec.serviceAccountName"}}}]
    return made


def _ports(settings: Settings) -> dict[str, list[str]]:
    ports = {"dns_port": [str(DNS_PORT)], "gate_uid": [str(settings.gate_uid)]}
    return {**ports, "udp_port": [str(UDP_PORT)]} if settings.udp else ports


def _told(key: str, settings: Settings) -> str:
    """Of each container: no more privileges than it begins with, the trust directory, and variables that it lacks."""
    kind = f"Object.spec.{key}"
    fields = [f"securityContext: {kind}.securityContext{{allowPrivilegeEscalation: false}}"]
    if settings.trust is not None:
        mount = {"name": TRUST_VOLUME, "mountPath": settings.trust_path, "readOnly": True}
        variables = [
            _cel({"name": name, "value": value}, f"{kind}.env")
            for name, value in environment(settings.trust_path, {}).variables.items()
        ]
        fields.append(f"volumeMounts: [{_cel(mount, f'{kind}.volumeMounts')}]")
        lacks = "!c.?env.orValue([]).exists(e, e.name == v.name)"
        fields.append(f"env: [{', '.join(variables)}].filter(v, {lacks})")
    ours = _cel(_names(settings), "")
    each = f"{kind}{{name: c.name, {', '.join(fields)}}}"
    found = f"object.spec.?{key}.orValue([]).filter(c, !(c.name in {ours}))"
    return f"Object{{spec: Object.spec{{{key}: {found}.map(c, {each})}}}}"


def _validating(settings: Settings) -> Json:
    spec = {
        "failurePolicy": "Fail",
        "matchConstraints": _matched(settings, [_CREATED, _DEBUGGED]),
        "matchConditions": [
            {
                "name": "made-or-guarded",
                "expression": f'request.operation == "CREATE" || {_init()}.exists(c, c.name == "{GATE}")',
            }
        ],
        "variables": [{"name": "theirs", "expression": _theirs(settings)}],
        "validations": [
            {"expression": expression, "message": f"outgate: {message}"}
            for expression, message in _required(settings).items()
        ],
    }
    return {"apiVersion": API_VERSION, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": NAME}, "spec": spec}


def _theirs(settings: Settings) -> str:
    ours = _cel(_names(settings), "")
    return (
        "object.spec.containers + object.spec.?ephemeralContainers.orValue([]) + "
        f"{_init()}.filter(c, !(c.name in {ours}))"
    )


def _required(settings: Settings) -> dict[str, str]:
    """What must hold, and what is said where it does not."""
    uid, dropped, harmless = settings.gate_uid, _cel(list(DROPPED), ""), _cel(sorted(HARMLESS), "")
    ports = _cel([GATE_PORT, DNS_PORT, UDP_PORT, ADMIN_PORT], "")
    theirs, context = "variables.theirs.all(c, {})", "c.?securityContext"
    drop = f"{context}.?capabilities.?drop.orValue([])"
    paths = " || ".join(_below(path) for path in settings.host_paths) or "false"
    required = {
        f"!object.spec.?{key}.orValue(false)": f"{key} leads round the gate"
        for key in ("hostNetwork", "hostPID", "hostIPC")
    }
    required |= {
        f"object.spec.?volumes.orValue([]).all(v, !has(v.hostPath) || {paths})": "hostPath leads round the gate",
        theirs.format(f"!{context}.?privileged.orValue(false)"): "privileged leads round the gate",
        theirs.format(f"!{context}.?allowPrivilegeEscalation.orValue(true)"): "allowPrivilegeEscalation must be false",
        theirs.format(f"{context}.?capabilities.?add.orValue([]).all(x, x in {harmless})"): (
            "a capability that is added leads round the gate"
        ),
        theirs.format(f'("ALL" in {drop} || {dropped}.all(x, x in {drop}))'): (
            f"capabilities.drop must have ALL, or {', '.join(DROPPED)}"
        ),
        theirs.format(f'{context}.?procMount.orValue("Default") == "Default"'): "procMount must be Default",
        theirs.format(f"{context}.?runAsUser.orValue(0) != {uid}"): f"the uid {uid} is the gate's",
        f"object.spec.?securityContext.?runAsUser.orValue(0) != {uid}": f"the uid {uid} is the gate's",
        theirs.format(f"c.?ports.orValue([]).all(p, !(p.containerPort in {ports}))"): "a port is the gate's",
        theirs.format(f"c.?volumeMounts.orValue([]).all(m, !(m.name in {_cel(list(HIDDEN_VOLUMES), '')}))"): (
            "a volume is the gate's alone"
        ),
    }
    if settings.is_user_needed:
        said = "object.spec.?securityContext.?runAsUser.hasValue()"
        required[theirs.format(f"{context}.?runAsUser.hasValue() || {said}")] = "each container must say runAsUser"
    for number, one in enumerate(_ours(settings)):
        required[_is_ours(number, one)] = f"initContainers[{number}] must be {one['name']}, as the policy makes it"
    named = f"object.spec.?volumes.orValue([]).filter(v, v.name in {_cel(list(VOLUMES), '')})"
    required[f"{named}.all(v, {_of_ours(settings)})"] = "a volume of ours is another than the policy makes"
    return required


def _is_ours(number: int, one: Json) -> str:
    """Nobody else's container in its place: whoever writes pods could have put one there."""
    at = f"object.spec.initContainers[{number}]"
    context = one["securityContext"]
    said = [
        f"size({_init()}) > {number}",
        f"{at}.name == {_cel(one['name'], '')}",
        f"{at}.image == {_cel(one['image'], '')}",
        f"{at}.?args.orValue([]) == {_cel(one['args'], '')}",
        f"{at}.?command.orValue([]) == {_cel(one.get('command', []), '')}",
        f"size({at}.?env.orValue([])) == {len(one.get('env', []))}",
        f"!has({at}.envFrom) && !has({at}.lifecycle)",
        f"{at}.?securityContext.?runAsUser.orValue(-1) == {context['runAsUser']}",
        f"{at}.?securityContext.?capabilities.?add.orValue([]) == {_cel(context['capabilities'].get('add', []), '')}",
        f"!{at}.?securityContext.?privileged.orValue(false)",
        *(f"{at}.?env[?0].name.orValue('') == {_cel(each['name'], '')}" for each in one.get("env", [])),
        f"{at}.?restartPolicy.orValue('') == {_cel(one.get('restartPolicy', ''), '')}",
    ]
    return " && ".join(said)


def _of_ours(settings: Settings) -> str:
    """Whether `v` leads where ours does."""
    kinds = {
        "configMap": "has(v.configMap) && v.configMap.name == {}",
        "secret": "has(v.secret) && v.secret.secretName == {}",
        "emptyDir": "has(v.emptyDir)",
    }
    ways = []
    for volume in volumes(settings):
        kind = next(kind for kind in kinds if kind in volume)
        source = volume[kind].get("name") or volume[kind].get("secretName") or ""
        ways.append(f"(v.name == {_cel(volume['name'], '')} && {kinds[kind].format(_cel(source, ''))})")
    return " || ".join(ways)


def _names(settings: Settings) -> list[str]:
    return [one["name"] for one in _ours(settings)]


def _below(path: str) -> str:
    place = "v.hostPath.path"
    below = f"{place}.startsWith({_cel(path + '/', '')}) && !{place}.contains('..')"
    return f"{place} == {_cel(path, '')} || ({below})"


def _matched(settings: Settings, rules: list[Json]) -> Json:
    return {
        "resourceRules": [{**rule, "scope": "Namespaced"} for rule in rules],
        "namespaceSelector": {
            "matchLabels": {settings.label: ON},
            "matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": _SYSTEM}],
        },
        "objectSelector": {"matchExpressions": [{"key": settings.label, "operator": "NotIn", "values": [OFF]}]},
    }


def _binding(kind: str) -> Json:
    spec: Json = {"policyName": NAME}
    if kind == "Validating":
        spec["validationActions"] = ["Deny"]
    return {
        "apiVersion": API_VERSION,
        "kind": f"{kind}AdmissionPolicyBinding",
        "metadata": {"name": NAME},
        "spec": spec,
    }


def _init() -> str:
    return "object.spec.?initContainers.orValue([])"


def _made_sure(key: str) -> str:
    return f'(has(object.spec.{key}) ? [] : [JSONPatch{{op: "add", path: "/spec/{key}", value: []}}])'


def _patch(path: str, value: str) -> str:
    return f'JSONPatch{{op: "add", path: "{path}", value: {value}}}'


def _cel(value: Any, kind: str) -> str:  # Any: JSON of ours
    """A literal. An object is of the type that its place in a pod has; maps of CEL would have to be of one type."""
    if isinstance(value, dict):
        is_map = kind.rpartition(".")[2] in _MAPS
        fields = (f"{json.dumps(key) if is_map else key}: {_cel(one, f'{kind}.{key}')}" for key, one in value.items())
        return f"{'' if is_map else kind}{{{', '.join(fields)}}}"
    if isinstance(value, list):
        return f"[{', '.join(_cel(one, kind) for one in value)}]"
    return json.dumps(value)
