"""The chart, as every Kubernetes from 1.29 on would take it."""

from __future__ import annotations

import itertools
import json
from importlib.metadata import version
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml

from tests.helm.rendering import ALL, CHART, MATRIX, Object, Refused, every_container, helm, notes, render

NEWEST = int(kubernetes_validate.latest_version().split(".")[1])
VERSIONS = [f"1.{minor}" for minor in range(29, NEWEST + 1)]
OTHERS = {  # of other projects: no schema of Kubernetes has them
    ("cert-manager.io/v1", "Certificate"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
}

pytestmark = pytest.mark.client


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_helm_finds_nothing_wrong(values: Object) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), values=values)


@pytest.mark.parametrize("kubernetes", VERSIONS)
def test_every_object_has_the_schema_of_every_kubernetes(kubernetes: str) -> None:
    found = {json.dumps(one): one for values in MATRIX.values() for one in render(values, kubernetes=f"{kubernetes}.0")}
    assert len(found) > 50
    for one in found.values():
        is_later = "AdmissionPolicy" in one["kind"] and int(kubernetes.split(".")[1]) < 36  # v1 from there on
        if (one["apiVersion"], one["kind"]) not in OTHERS and not is_later:
            kubernetes_validate.validate(one, kubernetes, strict=True)


def test_the_schemas_see_a_key_that_is_none() -> None:
    """Else the test above would be of no worth."""
    [deployment] = [one for one in render() if one["metadata"]["name"] == "outgate" and one["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["securityContexts"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.34", strict=True)


@pytest.mark.parametrize(("kubernetes", "is_named"), [("1.28.9", True), ("1.29.0", False), ("1.37.2-gke.1", False)])
def test_a_kubernetes_that_is_too_old_is_named_in_the_notes_and_not_refused(kubernetes: str, is_named: bool) -> None:
    assert ("tested with 1.29 and newer" in notes(kubernetes=kubernetes)) is is_named


@pytest.mark.parametrize(
    ("values", "kubernetes", "said", "is_said"),
    [
        ({"enabled": True}, "1.36.0", "outgate/inject=outgate.outgate", True),
        ({"enabled": True}, "1.36.0", "schemas alone", False),
        ({"enabled": True, "form": "admissionPolicy"}, "1.36.0", "schemas alone", True),
        ({"enabled": True, "form": "admissionPolicy"}, "1.36.0", "the API server has no such policies", False),
        ({"enabled": True, "form": "admissionPolicy"}, "1.35.0", "the API server has no such policies", True),
        ({}, "1.36.0", "outgate/inject", False),
    ],
)
def test_the_notes_say_which_namespaces_get_gates_and_what_was_not_tried(
    values: Object, kubernetes: str, said: str, is_said: bool
) -> None:
    assert (said in " ".join(notes({"injection": values}, kubernetes=kubernetes).split())) is is_said


def test_the_notes_say_that_everything_is_denied_until_there_is_a_policy() -> None:
    assert "everything is denied" in notes()
    assert "everything is denied" not in notes(ALL)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gateway": {"portt": 1}}, "portt"),
        ({"gatewayy": {}}, "gatewayy"),
        ({"pki": {"source": "vault"}}, "pki.source"),
        ({"pki": {"source": "secret"}}, "pki.source: secret needs pki.secretName"),
        ({"pki": {"source": "certManager"}}, "needs pki.certManager.issuerName"),
        ({"policy": {"files": {"policy.yaml": None}}}, "name at least one file"),
        ({"policy": {"configMaps": [{"name": "b", "keys": ["policy.yaml"]}]}}, "comes from two places"),
        ({"policy": {"files": {"../gate.yaml": "version: 1"}}}, "policy.files"),
        ({"policy": {"files": {"..": "version: 1"}}}, "policy.files"),
        ({"networkPolicy": {"workloads": {"namespaces": ["outgate"]}}}, "outgate is the gate's own"),
        ({"bindAddress": "127.0.0.1"}, "bindAddress"),
        ({"gateway": {"extraArgs": ["serve"]}}, "extraArgs"),
        (
            {"gateway": {"dns": {"forward": {"cluster.local": ["kube-dns.kube-system"]}}}},
            "gateway.dns.forward.cluster.local",
        ),
        ({"gateway": {"nameservers": ["dns.example"]}}, "gateway.nameservers"),
        ({"gateway": {"udpForward": [{"port": 53, "to": "a.example:53"}]}}, "udpForward"),
        ({"injection": {"failurePolicy": "Maybe"}}, "failurePolicy"),
        ({"injection": {"form": "sidecar"}}, "injection.form"),
        ({"injection": {"enabled": True, "certificate": {"source": "secret"}}}, "needs injection.certificate.caBundle"),
        (
            {"injection": {"enabled": True, "certificate": {"source": "certManager"}}},
            "needs injection.certificate.certManager.issuerName",
        ),
        (
            {"injection": {"enabled": True, "form": "admissionPolicy", "extraArgs": ["--udp"]}},
            "injection.extraArgs: for the webhook alone",
        ),
        ({"gateway": {"graceS": 3601}}, "graceS"),  # the gate takes no more
        ({"drainS": 3601}, "drainS"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"image": {"repository": 'outgate"'}}, "repository"),  # it stands in CEL, too
        ({"injection": {"clusterDNS": ["[fd00:96::a]"]}}, "clusterDNS"),
        ({"networkPolicy": {"nameservers": ["169.254.20.10"]}}, "nameservers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_mean_nothing_are_refused_by_name(values: Object, said: str) -> None:
    with pytest.raises(Refused) as refused:
        render(values)
    assert said in refused.value.said


def test_a_release_with_a_dot_is_refused() -> None:
    with pytest.raises(Refused, match="a dot is not for names of Services"):
        render(release="a.b")


def objects_in(schema: Any, path: str = "") -> list[tuple[str, Any]]:  # Any: JSON Schema
    found = [(path, schema)] if isinstance(schema, dict) and "properties" in schema else []
    inner = schema.get("properties", {}).items() if isinstance(schema, dict) else ()
    return found + list(itertools.chain(*(objects_in(one, f"{path}.{key}") for key, one in inner)))


def test_the_schema_is_closed_and_has_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for path, one in objects_in(schema):
        assert one["additionalProperties"] is False, path
        held = defaults
        for key in path.split(".")[1:]:
            held = held.get(key, {})
        if path.endswith("resources"):
            continue  # Kubernetes' own
        assert set(one["properties"]) - {"global"} == set(held), path


def test_the_image_is_that_of_this_version() -> None:
    assert {one["image"] for one in every_container(render())} == {f"outgate:{version('outgate')}"}


def test_a_digest_wins_over_the_tag() -> None:
    [image] = {one["image"] for one in every_container(render({"image": {"tag": "1", **ALL["image"]}}))}
    assert image == "outgate@sha256:" + "a" * 64
