"""The chart as helm renders it: objects, their pods, and what the words in their containers mean to the program."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from proxy.cli import outgate

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "outgate"
HELM = ROOT / ".venv" / "js" / "node_modules" / ".bin" / "helm"
KUBERNETES = "1.34.0"

type Object = dict[str, Any]  # Any: YAML

ALL: Object = {
    "policy": {
        "files": {"policy.yaml": "version: 1\nworkloads: {node: {rules: [{ntp: time1.example}]}}\n"},
        "configMaps": [{"name": "team-b", "keys": ["team-b.yaml"]}],
        "tags": [{"name": "tags", "keys": ["azure.tags.json"]}],
    },
    "gateway": {
        "udpForward": [{"port": 5060, "to": "sip.example:5060"}],
        "nameservers": ["10.0.0.53"],
        "extraArgs": ["--max-connections=20000"],
        "dns": {
            "clusterIP": "10.96.0.53",
            "forward": {"cluster.local": ["10.96.0.10", "10.96.0.11"]},
            "search": ["cluster.local"],
        },
        "autoscaling": {"enabled": True},
        "priorityClassName": "system-cluster-critical",
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "egress", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"example/note": "1"},
        "podLabels": {"example/tier": "egress"},
    },
    "image": {"digest": "sha256:" + "a" * 64, "pullSecrets": ["registry"]},
    "identity": {"tokenAudience": "outgate", "onStale": "keep"},
    "trust": {"selector": "outgate.example/inspected=true", "clusterTrustBundle": True},
    "relay": {"enabled": True, "workload": "node", "hosts": ["time1.example=10.0.0.7"], "nts": ["time1.example"]},
    "networkPolicy": {
        "admin": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "nameservers": ["169.254.20.10/32"],
        "workloads": {"namespaces": ["weather", "build"], "podLabels": {"egress": "gate"}, "clusterDNS": True},
    },
    "metrics": {"serviceMonitor": {"enabled": True}, "rules": {"enabled": True, "labels": {"release": "prometheus"}}},
    "injection": {
        "enabled": True,
        "authoritySecret": "ca",
        "clusterDNS": ["10.96.0.10"],
        "extraArgs": ["--no-exclusions"],
    },
}

MATRIX: Mapping[str, Object] = {
    "default": {},
    "all": ALL,
    "least": {
        "gateway": {"dns": {"enabled": False}, "disruptionBudget": {"enabled": False}, "replicas": 1},
        "identity": {"kubernetes": False},
        "pki": {"source": "none"},
        "networkPolicy": {"enabled": False},
    },
    "ipv6": {"bindAddress": "[::]", "relay": {"enabled": True}},
    "secret": {
        "pki": {"source": "secret", "secretName": "corp-ca", "follow": False},
        "injection": {"enabled": True, "certificate": {"source": "secret", "secretName": "tls", "caBundle": "PEM"}},
    },
    "cert-manager": {
        "pki": {"source": "certManager", "certManager": {"issuerName": "corp"}},
        "injection": {
            "enabled": True,
            "certificate": {"source": "certManager", "certManager": {"issuerName": "corp"}},
        },
    },
    "admission policy": {"injection": {"enabled": True, "form": "admissionPolicy"}},
    "trust job": {"trust": {"mode": "job", "namespaces": ["weather", "build"], "name": "outgate-trust"}},
    "no trust": {"trust": {"enabled": False}, "networkPolicy": {"workloads": {"namespaces": ["weather"]}}},
}


class Refused(Exception):
    """helm did not render it. `said` is what it printed."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


def helm(*words: str, values: Object | None = None) -> str:
    """What helm prints. Raises Refused. Skips where it is not installed."""
    if not HELM.exists():
        pytest.skip("helm is not installed; run make system")
    more = ["--values", "-"] if values is not None else []
    ran = subprocess.run([HELM, *words, *more], input=json.dumps(values or {}), capture_output=True, text=True)
    if ran.returncode:
        raise Refused(ran.stdout + ran.stderr)
    return ran.stdout


def render(
    values: Object | None = None,
    *,
    release: str = "outgate",
    namespace: str = "outgate",
    kubernetes: str = KUBERNETES,
    chart: Path = CHART,
) -> list[Object]:
    """The objects. Raises Refused."""
    found: list[Object] = json.loads(_rendered(json.dumps(values or {}), release, namespace, kubernetes, chart))
    return found


@cache
def _rendered(values: str, release: str, namespace: str, kubernetes: str, chart: Path) -> str:
    """As JSON: most of what the tests of the chart take is helm, and reading what it prints."""
    words = ("template", release, str(chart), "--namespace", namespace, "--kube-version", kubernetes)
    text = helm(*words, values=json.loads(values))
    return json.dumps([one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one])


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def named(objects: Sequence[Object], kind: str, name: str) -> Object:
    [found] = [one for one in of_kind(objects, kind) if one["metadata"]["name"] == name]
    return found


def where(one: Object) -> tuple[str, str, str]:
    return one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]


def pods(objects: Sequence[Object]) -> Iterator[Object]:
    """Every pod template, with the namespace of what makes its pods."""
    for one in of_kind(objects, "Deployment", "Job", "CronJob"):
        spec = one["spec"]["jobTemplate"]["spec"] if one["kind"] == "CronJob" else one["spec"]
        template = spec["template"]
        yield {**template, "namespace": one["metadata"]["namespace"]}


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def every_container(objects: Sequence[Object]) -> list[Object]:
    return [container for pod in pods(objects) for container in containers(pod)]


def selects(selector: Mapping[str, str], pod: Object) -> bool:
    return set(selector.items()) <= set(pod["metadata"]["labels"].items())


def parsed(args: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Which command it is and what its options mean to it. Raises click.UsageError as the program would."""
    command: click.Command = outgate
    words, rest = [], list(args)
    with click.Context(outgate, info_name="outgate") as context:
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            words.append(rest.pop(0))
            found = command.get_command(context, words[-1])
            if found is None:
                raise click.UsageError(f"no command {' '.join(words)}")
            command = found
        return " ".join(words), command.make_context(words[-1], rest, parent=context).params


def notes(values: Object | None = None, *, kubernetes: str = KUBERNETES) -> str:
    """What is said after an installation. helm shows it with a cluster alone: here it is rendered as an object."""
    with tempfile.TemporaryDirectory() as directory:
        chart = Path(shutil.copytree(CHART, Path(directory) / "outgate"))
        text = (chart / "templates" / "NOTES.txt").read_text()
        said = '{{ define "notes" }}' + text + '{{ end }}\nkind: Notes\nsaid: {{ include "notes" . | toJson }}\n'
        (chart / "templates" / "said.yaml").write_text(said)
        [found] = of_kind(render(values, kubernetes=kubernetes, chart=chart), "Notes")
        return str(found["said"])
