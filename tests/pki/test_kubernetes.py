"""What the distribution job writes, where, and what it leaves alone: one run against an API server."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml

from pki.distribution import environment
from pki.kubernetes.api import ApiFault
from pki.kubernetes.objects import (
    CLUSTERS_OWN,
    MAX_CONFIG_MAP,
    BundleTooLarge,
    Document,
    cluster_trust_bundle,
    config_map,
)
from tests.pki.api_server import ApiServer, Object, api_server
from tests.pki.kubernetes_jobs import MOUNT, NAME, files, once

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "distribution.md"
MANIFESTS = ROOT / "docs" / "examples" / "trust-distribution.yaml"
ROLE = ROOT / "docs" / "examples" / "trust-distribution-role.yaml"
KUBERNETES = [f"1.{minor}" for minor in range(29, 38)]
FOREIGN: Object = {"data": {"ca.crt": "another's", "more": "x"}}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as it:
        yield it


def carried(found: Object) -> dict[str, bytes]:
    """What a pod that mounts it would read."""
    text = {name: value.encode() for name, value in found.get("data", {}).items()}
    return text | {name: base64.b64decode(value) for name, value in found.get("binaryData", {}).items()}


def manifests(path: Path) -> list[Object]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


# What is written


def test_every_namespace_gets_the_trust_directory_but_the_clusters_own(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("default", "team-a", *CLUSTERS_OWN)
    ran = once(server, tmp_path)
    assert ran.outcomes() == {"default": "written", "team-a": "written"}
    assert server.served() == {"default", "team-a"}
    assert carried(server.config_map("team-a")) == files()


def test_text_stands_as_text_and_only_the_trust_store_as_binary(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    once(server, tmp_path)
    found = server.config_map("a")
    assert set(found["binaryData"]) == {"truststore.jks"}
    assert found["data"]["ca.crt"].startswith("-----BEGIN CERTIFICATE-----\n")
    assert "immutable" not in found


def test_what_stands_already_is_not_written_again(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    once(server, tmp_path)
    before = server.config_map("a")
    ran = once(server, tmp_path)
    assert ran.outcomes() == {"a": "unchanged", "b": "unchanged"}
    assert len(server.requests("PATCH")) == 2
    assert server.config_map("a") == before


def test_another_root_is_written_everywhere_by_one_apply_and_without_a_gap(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    once(server, tmp_path)
    assert once(server, tmp_path, files(1, 2)).outcomes() == {"a": "written", "b": "written"}
    assert carried(server.config_map("a")) == files(1, 2)
    assert server.requests("DELETE") == []
    assert len(server.requests("PATCH", "/namespaces/a/")) == 2


def test_a_file_that_is_no_more_goes_and_what_others_added_stays(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    once(server, tmp_path, {**files(), "old.pem": b"old"})
    data = server.config_map("a")["data"]
    server.edit("a", NAME, {"data": {**data, "theirs": "x"}})
    once(server, tmp_path)
    assert set(server.config_map("a")["data"]) == {*(set(files()) - {"truststore.jks"}), "theirs"}


@pytest.mark.parametrize("part", ["data", "binaryData"])
def test_an_edited_value_is_taken_back(server: ApiServer, tmp_path: Path, part: str) -> None:
    server.add_namespace("a")
    once(server, tmp_path)
    key = {"data": "ca.crt", "binaryData": "truststore.jks"}[part]
    changed: Object = {part: {**server.config_map("a")[part], key: "ZXZpbA=="}}
    server.edit("a", NAME, changed)
    assert once(server, tmp_path).outcomes() == {"a": "written"}
    assert carried(server.config_map("a")) == files()


@pytest.mark.parametrize("key", sorted(files()))
def test_no_change_of_a_value_passes_as_the_same(key: str) -> None:
    document = config_map(NAME, files())
    whole = {"metadata": {"annotations": {"outgate/trust-sha256": document.digest}}, **document.content}
    assert document.is_in(whole)
    for part, values in document.content.items():
        if key in values:
            assert not document.is_in({**whole, part: {**values, key: values[key] + "x"}})
            assert not document.is_in({**whole, part: {k: v for k, v in values.items() if k != key}})
    assert not document.is_in({**whole, "metadata": {}})


# Where


def test_a_selector_decides_alone(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    server.add_namespace("c", "kube-system", labels={"inspected": "true"})
    once(server, tmp_path, selector="inspected=true")
    assert server.served() == {"c", "kube-system"}


def test_a_selector_that_the_server_does_not_understand_is_said(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    with pytest.raises(ApiFault, match=r"400 unable to parse requirement: a in \(b"):
        once(server, tmp_path, selector="a in (b")
    assert server.served() == set()


def test_named_namespaces_are_served_and_none_is_listed(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b", "kube-system")
    assert once(server, tmp_path, namespaces=("a", "kube-system")).outcomes() == {
        "a": "written",
        "kube-system": "written",
    }
    assert [asked.path for asked in server.asked if asked.path.endswith("/namespaces")] == []


def test_a_named_namespace_that_is_not_there_is_a_failure(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    ran = once(server, tmp_path, namespaces=("a", "typo"))
    assert ran.outcomes() == {"a": "written", "typo": "failed"}
    assert 'namespaces "typo" not found' in ran.because("typo")


def test_a_namespace_that_is_being_deleted_is_left_alone(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    server.end_namespace("b")
    assert once(server, tmp_path).outcomes() == {"a": "written"}


def test_a_namespace_that_ends_while_it_is_served_is_no_failure(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    server.fail("PATCH", "/namespaces/b/", status=403, causes=["NamespaceTerminating"])
    assert once(server, tmp_path).outcomes() == {"a": "written", "b": "gone"}
    server.delete_namespace("b")
    server.fail("PATCH", "/namespaces/a/", status=404)
    assert once(server, tmp_path, files(2)).outcomes() == {"a": "gone"}


def test_long_lists_are_read_page_by_page(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pki.kubernetes.api.PAGE", 3)
    server.add_namespace(*(f"n{number}" for number in range(8)))
    assert len(once(server, tmp_path).told) == 8
    assert len([asked for asked in server.asked if asked.path == "/api/v1/namespaces"]) == 3


def test_a_thousand_namespaces_are_served_a_few_at_a_time(server: ApiServer, tmp_path: Path) -> None:
    names = {f"n{number}" for number in range(1000)}
    server.add_namespace(*names)
    server.fail("GET", "/configmaps/", times=20, wait_s=0.05, then_answer=True)
    ran = once(server, tmp_path, deadline_s=300)
    assert set(ran.outcomes().values()) == {"written"}
    assert server.served() == names
    assert len(server.requests("PATCH")) == 1000
    assert 2 <= server.most_at_once <= 8


# What is somebody else's


def test_a_config_map_of_somebody_else_is_refused_and_the_others_are_done(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    server.write("configmaps", "a", NAME, FOREIGN)
    before = server.config_map("a")
    ran = once(server, tmp_path)
    assert ran.outcomes() == {"a": "refused", "b": "written"}
    assert ran.because("a").endswith("is not ours; delete it, or choose another name with --name")
    assert server.config_map("a") == before
    assert server.requests("PATCH", "/namespaces/a/") == []


def test_what_comes_between_the_look_and_the_write_is_not_overwritten(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    arrive_at_the_first(server, "PATCH", lambda: server.write("configmaps", "a", NAME, FOREIGN))
    assert once(server, tmp_path).outcomes() == {"a": "refused"}
    assert server.config_map("a")["data"] == FOREIGN["data"]


def test_only_the_object_that_was_looked_at_is_written_by_force(server: ApiServer, tmp_path: Path) -> None:
    """Ours when it was looked at, somebody else's when the write arrives."""
    server.add_namespace("a")
    once(server, tmp_path)
    arrive_at_the_first(server, "PATCH", lambda: server.write("configmaps", "a", NAME, FOREIGN))
    assert once(server, tmp_path, files(2)).outcomes() == {"a": "refused"}
    assert server.config_map("a")["data"] == FOREIGN["data"]


def test_one_of_ours_that_was_made_immutable_fails_and_the_others_are_done(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    once(server, tmp_path)
    server.edit("a", NAME, {"immutable": True})
    assert once(server, tmp_path).outcomes() == {"a": "unchanged", "b": "unchanged"}
    ran = once(server, tmp_path, files(2))
    assert ran.outcomes() == {"a": "failed", "b": "written"}
    assert "field is immutable" in ran.because("a")
    assert server.requests("DELETE") == []


def arrive_at_the_first(server: ApiServer, method: str, change: Any) -> None:  # Any: a function, whatever it returns
    taken = server.take

    def take(asked: Any) -> Any:
        if asked.method == method:
            server.take = taken  # type: ignore[method-assign]  # a test's own hook
            change()
        return taken(asked)

    server.take = take  # type: ignore[method-assign]  # a test's own hook


# Taking it away


def test_prune_removes_ours_where_it_is_not_meant_and_nothing_else(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b", "c", labels={"inspected": "true"})
    once(server, tmp_path)
    server.label("b", inspected=None)
    server.label("c", inspected=None)
    server.delete("configmaps", "c", NAME)
    server.write("configmaps", "c", NAME, FOREIGN)
    assert once(server, tmp_path, selector="inspected").outcomes() == {"a": "unchanged"}
    assert server.served() == {"a", "b", "c"}
    ran = once(server, tmp_path, selector="inspected", prune=True)
    assert (ran.outcomes()["a"], ran.outcomes()["b"]) == ("unchanged", "removed")
    assert server.served() == {"a", "c"}
    assert [asked.path for asked in server.requests("DELETE")] == ["/api/v1/namespaces/b/configmaps/outgate-trust"]


def test_only_the_object_that_was_looked_at_is_removed(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b", labels={"inspected": "true"})
    once(server, tmp_path)
    server.label("b", inspected=None)
    arrive_at_the_first(server, "DELETE", lambda: server.write("configmaps", "b", NAME, FOREIGN))
    once(server, tmp_path, selector="inspected", prune=True)
    assert server.config_map("b")["data"] == FOREIGN["data"]


def test_a_selector_that_means_nothing_ends_no_trust(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    once(server, tmp_path)
    ran = once(server, tmp_path, selector="inspetced=true", prune=True)
    assert ran.told == []
    assert server.served() == {"a", "b"}


# How large


def test_a_bundle_too_large_for_a_config_map_is_said_before_anything_is_asked(
    server: ApiServer, tmp_path: Path
) -> None:
    server.add_namespace("a")
    large = {**files(), "bundle.pem": b"x" * MAX_CONFIG_MAP}
    with pytest.raises(BundleTooLarge, match=r"holds 1048576 \(bundle.pem 1048576, .*--public none"):
        once(server, tmp_path, large)
    assert server.asked == []


def test_a_bundle_as_large_as_a_config_map_is_written(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    others = sum(map(len, files().values()))
    full = {**files(), "more": b"x" * (MAX_CONFIG_MAP - others)}
    assert once(server, tmp_path, full).outcomes() == {"a": "written"}
    with pytest.raises(BundleTooLarge):
        config_map(NAME, {**full, "one": b"x"})


# ClusterTrustBundle


@pytest.mark.parametrize(
    ("versions", "taken"), [(["v1beta1", "v1"], "v1"), (["v1alpha1", "v1beta1"], "v1beta1"), (["v1alpha1"], "v1alpha1")]
)
def test_our_roots_alone_become_a_cluster_trust_bundle(
    server: ApiServer, tmp_path: Path, versions: list[str], taken: str
) -> None:
    server.add_namespace("a")
    server.trust_bundle_versions = versions
    assert once(server, tmp_path, files(1, 2), cluster_trust_bundle=True).outcomes() == {"": "written", "a": "written"}
    found = server.find("clustertrustbundles", NAME)
    assert found["apiVersion"] == f"certificates.k8s.io/{taken}"
    assert found["spec"] == {"trustBundle": files(1, 2)["ca.crt"].decode()}
    assert once(server, tmp_path, files(1, 2), cluster_trust_bundle=True).outcomes()[""] == "unchanged"


def test_a_cluster_without_that_api_gets_the_config_maps(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    server.trust_bundle_versions = []
    ran = once(server, tmp_path, cluster_trust_bundle=True)
    assert ran.outcomes() == {"a": "written"}
    assert "this cluster has no ClusterTrustBundle" in ran.said[0]


def test_a_cluster_trust_bundle_of_somebody_else_is_refused(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    server.write("clustertrustbundles", "", NAME, {"spec": {"trustBundle": "theirs"}})
    assert once(server, tmp_path, cluster_trust_bundle=True).outcomes() == {"": "refused", "a": "written"}
    assert server.find("clustertrustbundles", NAME)["spec"] == {"trustBundle": "theirs"}


# Schemas


def applied(document: Document) -> Object:
    found = yaml.safe_load(document.body("7"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", KUBERNETES)
def test_what_is_written_has_the_schema_of_every_kubernetes(version: str) -> None:
    kubernetes_validate.validate(applied(config_map(NAME, files())), version, strict=True)
    for api in {"v1": 37, "v1beta1": 33, "v1alpha1": 29}.items():
        if int(version[2:]) >= api[1] and not (api[0] == "v1alpha1" and version == "1.37"):
            kubernetes_validate.validate(applied(cluster_trust_bundle(api[0], NAME, files())), version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", [MANIFESTS, ROLE, PAGE], ids=lambda path: path.name)
def test_manifests_have_the_schema_of_every_kubernetes(path: Path, version: str) -> None:
    found = manifests(path) if path is not PAGE else pods_of_the_page()
    assert found
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


# Rights


def rules(path: Path, scope: str | None, *, but: str = "") -> list[tuple[str | None, Object]]:
    kind = "ClusterRole" if scope is None else "Role"
    return [
        (scope, rule)
        for document in manifests(path)
        if document["kind"] == kind and document["metadata"]["name"] != but
        for rule in document["rules"]
    ]


def test_the_cluster_role_of_the_example_is_enough(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    server.rules = rules(MANIFESTS, None)
    assert set(once(server, tmp_path, cluster_trust_bundle=True).outcomes().values()) == {"written"}


@pytest.mark.parametrize("verb", ["get", "list", "create", "patch"])
def test_each_verb_of_the_example_is_needed(server: ApiServer, tmp_path: Path, verb: str) -> None:
    server.add_namespace("a")
    server.rules = [
        (scope, {**rule, "verbs": [one for one in rule["verbs"] if one != verb]})
        for scope, rule in rules(MANIFESTS, None)
    ]
    if verb == "list":
        with pytest.raises(ApiFault, match=r'403 .*cannot list resource "namespaces" at the cluster scope'):
            once(server, tmp_path)
    else:
        assert once(server, tmp_path).outcomes() == {"a": "failed"}
    assert server.served() == set()


def test_no_other_config_map_may_be_touched_with_the_rights_of_the_example(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a")
    server.rules = rules(MANIFESTS, None)
    ran = once(server, tmp_path, name="other")
    assert ran.outcomes() == {"a": "failed"}
    assert "403" in ran.because("a")


def test_a_role_in_a_namespace_is_enough_for_it_and_fails_no_other(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    server.rules = rules(ROLE, "a")
    ran = once(server, tmp_path, namespaces=("a", "b"))
    assert ran.outcomes() == {"a": "written", "b": "failed"}
    assert 'cannot get resource "configmaps" in the namespace "b"' in ran.because("b")


# The page


def pods_of_the_page() -> list[Object]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found = [document for block in blocks for document in yaml.safe_load_all(block)]
    return [document for document in found if isinstance(document, dict) and "kind" in document]


def test_the_variables_of_the_page_are_those_of_the_code() -> None:
    containers = [container for pod in pods_of_the_page() for container in pod["spec"]["containers"]]
    listed: Mapping[str, str] = {one["name"]: one["value"] for container in containers for one in container["env"]}
    assert listed == environment(MOUNT, {}).variables
    mounts = [mount for container in containers for mount in container["volumeMounts"]]
    assert mounts == [{"name": "trust", "mountPath": MOUNT, "readOnly": True}]


def test_every_fault_of_the_page_names_a_test_that_exists() -> None:
    rows = [line for line in PAGE.read_text().partition("## Faults")[2].splitlines() if line.startswith("| ")][1:]
    texts = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = {name for text in texts for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= tests, row
