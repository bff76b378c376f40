"""What is put beside the workload: the container that loads the rules, the gate, and their volumes."""

from __future__ import annotations

from proxy.injection.model import ADMIN_PORT, DNS_PORT, UDP_PORT, Json, Settings
from proxy.layout import Layout, words_of

FIREWALL, AUTHORITY, GATE = "outgate-firewall", "outgate-authority", "outgate-gate"
CONTAINERS = (FIREWALL, AUTHORITY, GATE)
TRUST_VOLUME = "outgate-trust"
POLICY_VOLUME, ISSUING_VOLUME, STATE_VOLUME = "outgate-policy", "outgate-issuing", "outgate-state"
HIDDEN_VOLUMES = (POLICY_VOLUME, ISSUING_VOLUME, STATE_VOLUME)  # no container of the workload's mounts them
VOLUMES = (TRUST_VOLUME, *HIDDEN_VOLUMES)

_POLICY_AT, _ISSUING_AT, _STATE_AT = "/etc/outgate/policy", "/etc/outgate/issuing", "/run/outgate"
_STORE = f"{_STATE_AT}/pki"
_SMALL = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}
_GATE_SIZE = {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}}
_UDP_CAPABILITIES = ("net_raw", "net_bind_service")


def containers(settings: Settings, layout: Layout, workload: str) -> list[Json]:
    """In the order in which they start: nothing of the workload's runs before the rules are in force and the gate is
    ready, and its own init containers come after ours. An empty `workload` is told to the gate otherwise."""
    adopting = [_authority(settings)] if settings.authority else []
    return [_firewall(settings, layout), *adopting, _gate(settings, workload)]


def volumes(settings: Settings) -> list[Json]:
    made: list[Json] = [{"name": POLICY_VOLUME, "configMap": {"name": settings.policy}}]
    if settings.trust:
        made.append({"name": TRUST_VOLUME, "configMap": {"name": settings.trust}})
    if settings.authority:
        # Its owner is root, and the gate is not: everybody may read it, but nobody else mounts it.
        made.append({"name": ISSUING_VOLUME, "secret": {"secretName": settings.authority, "defaultMode": 0o444}})
        made.append({"name": STATE_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "4Mi"}})
    return made


def _firewall(settings: Settings, layout: Layout) -> Json:
    words = [word.replace(" ", "=", 1) for word in words_of(layout)]
    root: Json = {"runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False}
    return {
        **_container(FIREWALL, settings, ["firewall", "apply", *words], _SMALL),
        "securityContext": _confined(root, ["NET_ADMIN"]),
    }


def _authority(settings: Settings) -> Json:
    arguments = ["pki", "adopt", _ISSUING_AT, f"--pki={_STORE}"]
    return {
        **_container(AUTHORITY, settings, arguments, _SMALL),
        "securityContext": _confined(_as_gate(settings), []),
        "volumeMounts": [_mount(ISSUING_VOLUME, _ISSUING_AT), _state()],
    }


def _gate(settings: Settings, workload: str) -> Json:
    arguments = ["serve", "--mode=sidecar"]
    if workload:
        arguments.append(f"--workload={workload}")
    arguments += [f"--policy={_POLICY_AT}/{key}" for key in settings.policy_keys]
    arguments.append(f"--dns-listen=127.0.0.1:{DNS_PORT}")
    if _has_ipv6(settings):
        arguments.append(f"--dns-listen=[::1]:{DNS_PORT}")
    for server in settings.cluster_dns:
        shown = f"[{server}]" if server.version == 6 else str(server)
        arguments.append(f"--dns-forward={settings.cluster_domain}={shown}")
    if settings.udp:
        arguments.append(f"--udp-listen={settings.bind}:{UDP_PORT}")
    if settings.authority:
        arguments.append(f"--pki={_STORE}")
    arguments.append(f"--admin={settings.bind}:{ADMIN_PORT}")
    mounts = [_mount(POLICY_VOLUME, _POLICY_AT), *([_state()] if settings.authority else [])]
    return {
        **_container(GATE, settings, arguments, _GATE_SIZE),
        **(_started_by_root(settings, arguments) if settings.udp else {}),
        "restartPolicy": "Always",
        "ports": [{"name": "outgate-admin", "containerPort": ADMIN_PORT, "protocol": "TCP"}],
        "securityContext": _gate_context(settings),
        "volumeMounts": mounts,
        "startupProbe": _probe("/readyz", period_s=1, failures=120),
        "readinessProbe": _probe("/readyz", period_s=5, failures=3),
        "livenessProbe": _probe("/healthz", period_s=10, failures=6),
    }


def _gate_context(settings: Settings) -> Json:
    if not settings.udp:
        return _confined(_as_gate(settings), [])
    root: Json = {"runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False}
    return _confined(root, ["SETUID", "SETGID", *(name.upper() for name in _UDP_CAPABILITIES)])


def _started_by_root(settings: Settings, arguments: list[str]) -> Json:
    """Kubernetes gives a container that is not root no ambient capabilities, so util-linux does."""
    wanted = ",".join(f"+{name}" for name in _UDP_CAPABILITIES)
    user = [f"--reuid={settings.gate_uid}", f"--regid={settings.gate_uid}", "--clear-groups"]
    return {
        "command": ["setpriv", *user, f"--inh-caps={wanted}", f"--ambient-caps={wanted}"],
        "args": ["outgate", *arguments],
    }


def _container(name: str, settings: Settings, arguments: list[str], size: Json) -> Json:
    return {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": settings.pull_policy,
        "args": arguments,
        "terminationMessagePolicy": "FallbackToLogsOnError",  # why it ended stands in the pod's status, too
        "resources": size,
    }


def _as_gate(settings: Settings) -> Json:
    return {"runAsUser": settings.gate_uid, "runAsGroup": settings.gate_uid, "runAsNonRoot": True}


def _confined(user: Json, capabilities: list[str]) -> Json:
    return {
        **user,
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], **({"add": capabilities} if capabilities else {})},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _mount(volume: str, path: str) -> Json:
    return {"name": volume, "mountPath": path, "readOnly": True}


def _state() -> Json:
    return {"name": STATE_VOLUME, "mountPath": _STATE_AT}


def _probe(path: str, *, period_s: int, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": ADMIN_PORT, "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _has_ipv6(settings: Settings) -> bool:
    return ":" in settings.bind
