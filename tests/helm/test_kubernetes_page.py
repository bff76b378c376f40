"""What docs/kubernetes.md shows is what the program, the chart and Kubernetes take."""

from __future__ import annotations

import re
from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml

from tests.helm.rendering import MATRIX, ROOT, containers, named, of_kind, parsed, pods, render
from tests.proxy.commands_of import invoke

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()


def shown(name: str) -> str:
    [text] = re.findall(rf"```yaml\n# {re.escape(name)}\n(.*?)```", PAGE, re.DOTALL)
    return str(text)


@pytest.mark.parametrize("name", ["policy.yaml", "news.yaml"])
def test_its_policy_passes_its_own_tests(name: str, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(shown(name))
    ran = invoke("check", "-p", str(tmp_path / "policy.yaml"))
    assert ran.exit_code == 0, ran.output


@pytest.mark.client
def test_its_pod_names_what_its_values_make() -> None:
    objects = render(yaml.safe_load(shown("values.yaml")))
    pod = yaml.safe_load(shown("pod.yaml"))
    kubernetes_validate.validate(pod, "1.34", strict=True)
    dns = named(objects, "Service", "outgate-dns")["spec"]
    assert pod["spec"]["dnsConfig"]["nameservers"] == [dns["clusterIP"]]
    [proxy] = [one["value"] for one in pod["spec"]["containers"][0]["env"] if one["name"] == "HTTPS_PROXY"]
    port = named(objects, "Service", "outgate")["spec"]["ports"][0]["port"]
    assert proxy == f"http://outgate.outgate.svc.cluster.local:{port}"
    [distribute] = [one for each in pods(objects) for one in containers(each) if one["name"] == "distribute"]
    _, told = parsed(distribute["args"])
    [volume] = pod["spec"]["volumes"]
    [mount] = pod["spec"]["containers"][0]["volumeMounts"]
    assert (volume["configMap"]["name"], mount["mountPath"]) == (told["name"], told["mount_path"])
    closed = [one["metadata"]["namespace"] for one in of_kind(objects, "NetworkPolicy")]
    assert pod["metadata"]["namespace"] in closed


@pytest.mark.client
def test_its_way_to_a_sidecar_is_the_charts(tmp_path: Path) -> None:
    """What it says by kubectl is what the webhook reads and what the gate that it puts there is told."""
    objects = render(yaml.safe_load(shown("values.yaml")) | {"injection": {"enabled": True}})
    [hook] = named(objects, "MutatingWebhookConfiguration", "outgate.outgate")["webhooks"]
    [(key, value)] = hook["namespaceSelector"]["matchLabels"].items()
    assert f"kubectl label namespace news {key}={value}\n" in PAGE
    [webhook] = [one for each in pods(objects) for one in containers(each) if one["name"] == "webhook"]
    pod = tmp_path / "pod.yaml"
    pod.write_text("{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{name: a, image: a}]}}")
    words = [one for one in webhook["args"][1:] if not one.startswith(("--listen", "--tls-dir"))]
    ran = invoke("inject", *words, "-f", str(pod))
    assert ran.exit_code == 0, ran.output
    made = yaml.safe_load(ran.stdout)["spec"]
    gate = made["initContainers"][-1]
    assert "--workload=default" in gate["args"]  # the account of a pod that names none
    assert list(yaml.safe_load(shown("news.yaml"))["workloads"]) == ["default"]
    [policy] = [one["configMap"]["name"] for one in made["volumes"] if one["name"] == "outgate-policy"]
    [file] = [one.rpartition("/")[2] for one in gate["args"] if one.startswith("--policy=")]
    assert f"create configmap {policy} --from-file={file}=news.yaml\n" in PAGE


@pytest.mark.client
def test_it_counts_the_sets_of_values_that_are_tried() -> None:
    assert len(MATRIX) == 9
    assert "over nine sets of values" in PAGE


def test_the_tests_that_it_names_exist() -> None:
    have = "\n".join(path.read_text() for path in (ROOT / "tests" / "helm").glob("test_*.py"))
    named_there = re.findall(r"`(test_\w+)`", PAGE)
    assert named_there
    assert [name for name in named_there if f"def {name}(" not in have] == []
