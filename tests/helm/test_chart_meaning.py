"""What the rendered objects mean: who may do what, who reaches whom, and whether the program knows the words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from ipaddress import collapse_addresses, ip_address, ip_network
from pathlib import Path
from typing import Any

import click
import pytest

from policies.addresses import NEVER_REACHED
from proxy.config import Config, GateMode
from proxy.config.reading import read_config
from proxy.injection.model import Settings
from proxy.relay import read_address
from tests.helm.admission_policies import PLACE, of_a_release, written
from tests.helm.rendering import (
    ALL,
    CHART,
    MATRIX,
    Object,
    containers,
    every_container,
    named,
    of_kind,
    parsed,
    pods,
    render,
    selects,
)

pytestmark = pytest.mark.client

EVERY = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)


def gate(objects: list[Object]) -> Object:
    """The gateway's pod."""
    template: Object = named(objects, "Deployment", "outgate")["spec"]["template"]
    return template


def container(pod: Object, name: str) -> Object:
    [found] = [one for one in containers(pod) if one["name"] == name]
    return found


def config(values: Object) -> Config:
    _, flags = parsed(container(gate(render(values)), "gate")["args"])
    file = flags.pop("file")
    assert not flags.pop("check")
    return read_config(file, {}, flags)


# The words


@EVERY
def test_every_word_is_one_that_the_program_knows(values: Object) -> None:
    for one in every_container(render(values)):
        command, params = parsed(one["args"])
        assert command in {"serve", "relay", "pki adopt", "pki secret", "pki serving", "pki distribute", "webhook"}
        if command == "serve":
            assert isinstance(config(values), Config)
        if command == "relay":
            assert [read_address("--listen", text)[1] for text in params["listen"]] == [10123]


def test_a_flag_that_the_program_does_not_know_would_be_found() -> None:
    with pytest.raises(click.UsageError, match="No such option"):
        parsed(["serve", "--proxy-listens=0.0.0.0:3128"])
    with pytest.raises(click.UsageError, match="no command"):
        parsed(["pki", "adoptt"])


def test_the_values_mean_this_to_the_gate() -> None:
    found = config(ALL)
    assert found.mode is GateMode.GATEWAY
    assert found.policy == ("/etc/outgate/policy/policy.yaml", "/etc/outgate/policy/team-b.yaml")
    assert found.tags == ("/etc/outgate/policy/azure.tags.json",)
    assert found.kubernetes is not None
    assert (found.kubernetes.api, found.kubernetes.token_audience) == ("in-cluster", "outgate")
    assert found.limits.max_connections == 20000
    assert (found.drain_s, found.grace_s) == (10, 30)


def test_the_webhook_injects_what_the_chart_runs() -> None:
    objects = render(ALL)
    [words] = [one["args"] for one in every_container(objects) if one["name"] == "webhook"]
    _, told = parsed(words)
    assert told["image"] == container(gate(objects), "gate")["image"]
    assert told["trust_config_map"] == "outgate.outgate-trust"
    assert told["label"] == "outgate/inject"
    assert (told["authority_secret"], told["may_exclude"]) == ("ca", False)


def test_without_the_guard_it_is_a_proxy_alone() -> None:
    assert config(MATRIX["least"]).mode is GateMode.PROXY


@pytest.mark.parametrize("name", ["default", "least", "ipv6"])
def test_a_gate_would_start_with_what_was_rendered(name: str, tmp_path: Path) -> None:
    objects = render(MATRIX[name])
    store = tmp_path / "store"
    outgate("pki", "init", "--pki", str(store))
    for file, text in named(objects, "ConfigMap", "outgate-policy")["data"].items():
        (tmp_path / file).write_text(text)
    args = container(gate(objects), "gate")["args"]
    here = [one.replace("/etc/outgate/policy", str(tmp_path)).replace("/run/outgate/pki", str(store)) for one in args]
    assert "would start" in outgate(here[0], "--check", *here[1:])


def outgate(*words: str) -> str:
    ran = subprocess.run([sys.executable, "-m", "proxy", *words], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


# Privileges


@EVERY
def test_no_container_has_more_than_it_needs(values: Object) -> None:
    for one in every_container(render(values)):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert one["resources"]["limits"]["memory"]
        assert one["terminationMessagePolicy"] == "FallbackToLogsOnError"  # why it ended stands in the pod's status
        assert "env" not in one  # neither a secret nor what could contradict the flags
        assert "envFrom" not in one
        assert not [
            mount for mount in one.get("volumeMounts", []) if "subPath" in mount
        ]  # never changed by the kubelet


@EVERY
def test_no_pod_has_more_than_it_needs(values: Object) -> None:
    objects = render(values)
    bound = {
        (subject["namespace"], subject["name"])
        for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding")
        for subject in binding["subjects"]
    }
    for pod in pods(objects):
        spec = pod["spec"]
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 1337, 1337)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume]
        # A credential of the API is there where it has a right, and nowhere else.
        assert spec["automountServiceAccountToken"] is ((pod["namespace"], spec["serviceAccountName"]) in bound)
        assert spec["enableServiceLinks"] is False  # OUTGATE_PORT is Kubernetes' word for our Service, and none of ours
    assert all(one["automountServiceAccountToken"] is False for one in of_kind(objects, "ServiceAccount"))


@EVERY
def test_the_key_is_seen_by_those_alone_who_need_it(values: Object) -> None:
    for pod in pods(render(values)):
        held = {one["name"]: one["secret"] for one in pod["spec"].get("volumes", []) if "secret" in one}
        assert "root.key" not in str(held)
        for one in containers(pod):
            for mount in one.get("volumeMounts", []):
                if mount["name"] in held:
                    keys = {item["key"] for item in held[mount["name"]].get("items", [])}
                    assert (one["name"], keys) in [
                        ("adopt", {"tls.crt", "tls.key", "ca.crt"}),
                        ("follow", {"tls.crt", "tls.key", "ca.crt"}),
                        ("distribute", {"ca.crt"}),
                        ("webhook", set()),
                    ]


@EVERY
def test_a_pod_waits_for_what_it_mounts(values: Object) -> None:
    """What is missing is told by the kubelet, as an event of the pod; a program would find an empty directory."""
    for pod in pods(render(values)):
        assert "optional" not in str(pod["spec"].get("volumes", []))


RIGHTS: dict[tuple[str, str], list[Object]] = {
    ("ClusterRole", "outgate.outgate"): [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
    ],
    ("ClusterRole", "outgate.outgate-trust"): [
        {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["list", "watch"]},
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": ["outgate.outgate-trust"],
            "verbs": ["get", "list", "watch", "create", "patch"],
        },
        {
            "apiGroups": ["certificates.k8s.io"],
            "resources": ["clustertrustbundles"],
            "resourceNames": ["outgate.outgate-trust"],
            "verbs": ["get", "list", "watch", "create", "patch"],
        },
    ],
    ("ClusterRole", "outgate.outgate-serving"): [
        {
            "apiGroups": ["admissionregistration.k8s.io"],
            "resources": ["mutatingwebhookconfigurations"],
            "resourceNames": ["outgate.outgate"],
            "verbs": ["get", "patch"],
        },
    ],
    ("Role", "outgate-serving"): [
        {
            "apiGroups": [""],
            "resources": ["secrets"],
            "resourceNames": ["outgate-webhook-tls"],
            "verbs": ["get", "create", "patch"],
        },
    ],
    ("Role", "outgate-pki"): [
        {
            "apiGroups": [""],
            "resources": ["secrets"],
            "resourceNames": ["outgate-pki"],
            "verbs": ["get", "create", "patch"],
        },
    ],
}  # fmt: skip


def test_the_most_rights_that_are_asked_for_are_these() -> None:
    found = of_kind(render(ALL), "Role", "ClusterRole")
    assert {(one["kind"], one["metadata"]["name"]): one["rules"] for one in found} == RIGHTS


def test_the_least_asks_for_none() -> None:
    assert of_kind(render(MATRIX["least"]), "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding") == []


def test_with_namespaces_named_no_right_is_asked_for_in_another() -> None:
    objects = render(MATRIX["trust job"])
    assert [one["metadata"]["name"] for one in of_kind(objects, "ClusterRole")] == ["outgate.outgate"]
    assert {one["metadata"]["namespace"] for one in of_kind(objects, "Role")} == {"outgate", "weather", "build"}


# Who reaches whom


@EVERY
def test_every_port_of_a_service_is_one_of_its_pods(values: Object) -> None:
    objects = render(values)
    for service in of_kind(objects, "Service"):
        [pod] = [one for one in pods(objects) if selects(service["spec"]["selector"], one)]
        ports = {
            port["name"]: port.get("protocol", "TCP")
            for one in containers(pod)
            for port in one.get("ports", [])
        }  # fmt: skip
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port.get("protocol", "TCP")


@EVERY
def test_every_selector_selects_pods_of_the_chart(values: Object) -> None:
    objects = render(values)
    for one in of_kind(objects, "PodDisruptionBudget", "Deployment"):
        selector = one["spec"]["selector"]["matchLabels"]
        assert sum(selects(selector, pod) for pod in pods(objects)) == 1
    for one in of_kind(objects, "NetworkPolicy"):
        if one["metadata"]["namespace"] == "outgate":
            assert sum(selects(one["spec"]["podSelector"]["matchLabels"], pod) for pod in pods(objects)) == 1


def networks(blocks: list[str], family: int) -> list[Any]:  # Any: of either version, which the types keep apart
    found: list[Any] = [one for one in map(ip_network, blocks) if one.version == family]
    return list(collapse_addresses(found))


@pytest.mark.parametrize("name", ["outgate-gateway", "outgate-relay"])
def test_the_gate_reaches_the_world_but_where_no_policy_leads(name: str) -> None:
    world = named(render(ALL), "NetworkPolicy", name)["spec"]["egress"][0]
    blocks = [peer["ipBlock"] for peer in world["to"]]
    assert [block["cidr"] for block in blocks] == ["0.0.0.0/0", "::/0"]
    closed = [one for block in blocks for one in block["except"]]
    for family in (4, 6):
        assert networks(closed, family) == networks([str(one) for one in NEVER_REACHED], family)
    for block in blocks:
        outer = ip_network(block["cidr"])
        assert all(ip_network(one).version == outer.version for one in block["except"])  # else the API refuses it


@pytest.mark.parametrize("namespace", ["weather", "build"])
def test_workloads_reach_the_gate_the_guard_and_the_relay_and_nothing_else(namespace: str) -> None:
    values = {**ALL, "networkPolicy": {"workloads": {"namespaces": ["weather", "build"]}}}
    objects = render(values)
    [policy] = [one for one in of_kind(objects, "NetworkPolicy") if one["metadata"]["namespace"] == namespace]
    spec = policy["spec"]
    assert (spec["podSelector"], spec["policyTypes"]) == ({}, ["Egress"])
    reached = set()
    for rule in spec["egress"]:
        [peer] = rule["to"]
        assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "outgate"}}
        [pod] = [one for one in pods(objects) if selects(peer["podSelector"]["matchLabels"], one)]
        part = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        reached |= {(part, port["port"], port["protocol"]) for port in rule["ports"]}
    assert reached == {
        ("gateway", 3128, "TCP"),
        ("gateway", 15053, "TCP"),
        ("gateway", 15053, "UDP"),
        ("gateway", 5060, "UDP"),
        ("relay", 10123, "UDP"),
    }


def admitted(values: Object, name: str) -> dict[int, Any]:  # Any: peers
    rules = named(render(values), "NetworkPolicy", name)["spec"]["ingress"]
    assert all(rule.get("from") for rule in rules)  # an empty one means everybody
    return {port["port"]: rule["from"] for rule in rules for port in rule["ports"]}


@pytest.mark.parametrize(("name", "port"), [("outgate-gateway", 9901), ("outgate-relay", 9902)])
def test_the_admin_port_is_for_those_who_are_named(name: str, port: int) -> None:
    assert admitted(ALL, name)[port] == ALL["networkPolicy"]["admin"]
    assert port not in admitted({"relay": {"enabled": True}}, name)


def test_the_gate_admits_the_namespaces_that_are_closed() -> None:
    expression = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["weather", "build"]}
    assert admitted(ALL, "outgate-gateway")[3128] == [{"namespaceSelector": {"matchExpressions": [expression]}}]
    assert admitted({}, "outgate-gateway")[3128] == [{"namespaceSelector": {}}]


def test_the_webhook_waits_for_nobody_it_makes_wait() -> None:
    [hook] = named(render(ALL), "MutatingWebhookConfiguration", "outgate.outgate")["webhooks"]
    [excluded] = hook["namespaceSelector"]["matchExpressions"]
    assert set(excluded["values"]) == {"kube-system", "kube-public", "kube-node-lease", "outgate"}
    assert hook["namespaceSelector"]["matchLabels"] == {"outgate/inject": "outgate.outgate"}  # no namespace unasked
    asked = [(rule["operations"], rule["resources"]) for rule in hook["rules"]]
    assert asked == [(["CREATE"], ["pods"]), (["UPDATE"], ["pods/ephemeralcontainers"])]
    assert (hook["sideEffects"], hook["reinvocationPolicy"]) == ("None", "IfNeeded")


def test_the_webhook_is_asked_and_asks_nobody() -> None:
    spec = named(render(ALL), "NetworkPolicy", "outgate-webhook")["spec"]
    assert (spec["policyTypes"], spec["egress"]) == (["Ingress", "Egress"], [])
    assert spec["ingress"] == [{"ports": [{"port": 8443, "protocol": "TCP"}]}]
    peers = [{"ipBlock": {"cidr": "10.0.0.0/28"}}]
    values = {"injection": {"enabled": True}, "networkPolicy": {"apiServer": peers}}
    [rule] = named(render(values), "NetworkPolicy", "outgate-webhook")["spec"]["ingress"]
    assert rule["from"] == peers


def bundle_and_annotations(values: Object) -> tuple[object, object]:
    config = named(render(values), "MutatingWebhookConfiguration", "outgate.outgate")
    return config["webhooks"][0]["clientConfig"].get("caBundle"), config["metadata"].get("annotations")


def test_who_signed_the_webhooks_certificate_is_said_by_one_alone() -> None:
    """What the chart said would be written back by an upgrade, over what the Job or cert-manager has written."""
    assert bundle_and_annotations(ALL) == (None, None)
    assert bundle_and_annotations(MATRIX["secret"]) == ("UEVN", None)
    told = {"cert-manager.io/inject-ca-from": "outgate/outgate-webhook"}
    assert bundle_and_annotations(MATRIX["cert-manager"]) == (None, told)
    asked = named(render(MATRIX["cert-manager"]), "Certificate", "outgate-webhook")["spec"]
    assert (asked["dnsNames"], asked["secretName"]) == (["outgate-webhook.outgate.svc"], "outgate-webhook-tls")
    for name in ("secret", "cert-manager", "admission policy"):
        assert "outgate-serving" not in str(render(MATRIX[name]))


# Without a server


def test_the_files_of_the_chart_are_what_inject_prints() -> None:
    found = {path: path.read_text() for path in PLACE.iterdir()}
    assert found == written(), "run: python -m tests.helm.admission_policies"


POLICIES: dict[str, tuple[Object, Settings]] = {
    "default": (
        {},
        Settings(image=f"outgate:{version('outgate')}", trust="egress.outgate-trust"),
    ),
    "all": (
        {
            "bindAddress": "[::]",
            "image": {"repository": "registry.example/outgate", "digest": "sha256:" + "a" * 64, "pullPolicy": "Always"},
            "trust": {"name": "roots", "mountPath": "/var/trust"},
            "injection": {
                "policyConfigMap": "rules",
                "policyKeys": ["team.yaml", "base.yaml"],
                "authoritySecret": "ca",
                "clusterDNS": ["10.96.0.10", "fd00:96::a"],
                "label": "example.com/gate",
            },
        },
        Settings(
            image="registry.example/outgate@sha256:" + "a" * 64,
            pull_policy="Always",
            policy="rules",
            policy_keys=("team.yaml", "base.yaml"),
            trust="roots",
            trust_path="/var/trust",
            authority="ca",
            bind="[::]",
            cluster_dns=(ip_address("10.96.0.10"), ip_address("fd00:96::a")),
            label="example.com/gate",
        ),
    ),
    "no trust": (
        {"trust": {"enabled": False}, "injection": {"authoritySecret": "ca"}},
        Settings(image=f"outgate:{version('outgate')}", trust=None, authority="ca"),
    ),
    "nothing inspected": ({"pki": {"source": "none"}}, Settings(image=f"outgate:{version('outgate')}", trust=None)),
}


@pytest.mark.parametrize(("values", "settings"), POLICIES.values(), ids=POLICIES)
def test_the_api_server_is_given_what_inject_prints_for_the_same_values(values: Object, settings: Settings) -> None:
    injection = {**values.get("injection", {}), "enabled": True, "form": "admissionPolicy"}
    objects = render({**values, "injection": injection}, namespace="egress")
    found = [one for one in objects if "AdmissionPolicy" in one["kind"]]
    labels = found[0]["metadata"]["labels"]
    said = {(one["kind"], json.dumps(one)) for one in found}
    wanted = of_a_release(settings, "egress.outgate", "egress", "egress.outgate", labels)
    assert said == {(one["kind"], json.dumps(one)) for one in wanted}
    assert not of_kind(objects, "MutatingWebhookConfiguration", "CronJob")


# Life and death of a pod


@EVERY
def test_nothing_needs_a_shell(values: Object) -> None:
    for one in every_container(render(values)):
        assert "command" not in one
        execs = [str(one.get(probe, {}).get("exec", "")) for probe in ("readinessProbe", "livenessProbe", "lifecycle")]
        assert not [text for text in execs if "sh'" in text or "bash" in text]


def test_a_pod_outlives_what_its_program_may_take_to_end() -> None:
    values = {"drainS": 20, "gateway": {"graceS": 120}, "relay": {"enabled": True}, "injection": {"enabled": True}}
    objects = render(values)
    serving = container(gate(objects), "gate")
    assert {"--drain-s=20", "--grace-s=120"} < set(serving["args"])
    relay = named(objects, "Deployment", "outgate-relay")["spec"]["template"]["spec"]
    assert "--drain-s=20" in relay["containers"][0]["args"]
    webhook = named(objects, "Deployment", "outgate-webhook")["spec"]["template"]["spec"]
    assert "sleep(20)" in str(webhook["containers"][0]["lifecycle"])
    life = [spec["terminationGracePeriodSeconds"] for spec in (gate(objects)["spec"], relay, webhook)]
    assert life == [20 + 120 + 15, 20 + 15, 20 + 15]
    # Two sleeps would add up.
    assert "lifecycle" not in serving
    assert "lifecycle" not in relay["containers"][0]


def test_the_alerts_are_about_metrics_that_there_are() -> None:
    [rule] = of_kind(render(ALL), "PrometheusRule")
    documented = (CHART.parents[1] / "docs" / "metrics.md").read_text() + (
        CHART.parents[1] / "docs" / "ntp.md"
    ).read_text()
    alerts = rule["spec"]["groups"][0]["rules"]
    assert len(alerts) == 7
    for alert in alerts:
        [metric] = re.findall(r"outgate_\w+", alert["expr"])
        assert f"`{metric}`" in documented
        assert '{namespace="outgate"' in alert["expr"]
