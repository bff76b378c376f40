"""Two releases in one cluster, and one release over the years."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helm.rendering import ALL, CHART, MATRIX, Object, named, of_kind, pods, render, selects, where

pytestmark = pytest.mark.client

RELEASES = [("outgate", "outgate"), ("outgate", "egress"), ("second", "outgate"), ("outgate-2", "outgate")]


def test_two_releases_have_no_object_in_common() -> None:
    seen: dict[tuple[str, str, str], tuple[str, str]] = {}
    for release, namespace in RELEASES:
        values = {**ALL, "trust": {"namespaces": ["weather"]}}  # all of them write into the same namespaces
        for one in render(values, release=release, namespace=namespace):
            assert where(one) not in seen, seen.get(where(one))
            seen[where(one)] = release, namespace


def test_two_releases_write_trust_bundles_of_different_names() -> None:
    names = set()
    for release, namespace in RELEASES:
        found = render(release=release, namespace=namespace)
        names |= {arg for pod in pods(found) for arg in pod["spec"]["containers"][0]["args"] if arg[:7] == "--name="}
    assert len(names) == len(RELEASES)


@pytest.mark.parametrize("other", ["second", "outgate-2"])
def test_no_selector_of_one_selects_pods_of_the_other(other: str) -> None:
    mine, others = render(ALL), list(pods(render(ALL, release=other)))
    for one in of_kind(mine, "Deployment", "PodDisruptionBudget"):
        assert not [pod for pod in others if selects(one["spec"]["selector"]["matchLabels"], pod)]
    for one in of_kind(mine, "Service"):
        assert not [pod for pod in others if selects(one["spec"]["selector"], pod)]
    for one in of_kind(mine, "NetworkPolicy"):
        selector = one["spec"]["podSelector"].get("matchLabels", {})
        if one["metadata"]["namespace"] == "outgate":
            assert not [pod for pod in others if selects(selector, pod)]


def test_long_names_that_differ_in_their_end_stay_different() -> None:
    one, other = (
        {where(found) for found in render(ALL, release="r" * 52 + last)} for last in "ab"
    )  # fmt: skip
    assert one & other == set()


def test_a_name_of_the_longest_kind_stays_one_that_kubernetes_takes() -> None:
    for one in render(ALL, release="r" * 53, namespace="n" * 63):
        longest = {"Service": 63, "Job": 63, "Deployment": 63, "CronJob": 52}.get(one["kind"], 253)
        assert len(one["metadata"]["name"]) <= longest


def injected_namespaces(objects: list[Object]) -> list[str]:
    """What the label of a namespace must be to get gates of this release."""
    found = of_kind(objects, "MutatingWebhookConfiguration", "MutatingAdmissionPolicy", "ValidatingAdmissionPolicy")
    spec = [
        hook
        for one in found
        for hook in one.get("webhooks", [one["spec"]["matchConstraints"]] if "spec" in one else [])
    ]
    return [one["namespaceSelector"]["matchLabels"]["outgate/inject"] for one in spec]


def test_two_releases_do_not_inject_into_one_namespace() -> None:
    """A label has one value, and by each of its two forms a release wants its own."""
    wanted = []
    for form, release, namespace in [
        *(("webhook", *one) for one in [*RELEASES, ("r" * 53, "n" * 63), ("r" * 53, "n" * 62 + "m")]),
        ("admissionPolicy", "third", "outgate"),
    ]:
        objects = render({"injection": {"enabled": True, "form": form}}, release=release, namespace=namespace)
        [one] = set(injected_namespaces(objects))
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", one)  # what the API server takes as a label
        wanted.append(one)
    assert len(set(wanted)) == len(RELEASES) + 3


# Over the years


def upgraded(directory: Path, **changed: str) -> Path:
    """The chart of a later version."""
    chart = Path(shutil.copytree(CHART, directory / "outgate"))
    said = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump(said | changed))
    return chart


def unchangeable(one: Object) -> object:
    """What the API server refuses to see changed."""
    if one["kind"] == "Deployment":
        return one["spec"]["selector"]
    if one["kind"] in ("RoleBinding", "ClusterRoleBinding"):
        return one["roleRef"]
    if one["kind"] == "Job":
        return one["spec"]["template"]
    if one["kind"] == "Service":
        return one["spec"].get("clusterIP")
    return None


@pytest.mark.parametrize("values", [{}, ALL, MATRIX["trust job"]], ids=["default", "all", "trust job"])
def test_an_upgrade_changes_nothing_that_cannot_be_changed(values: Object, tmp_path: Path) -> None:
    later = upgraded(tmp_path, version="0.2.0", appVersion="0.2.0")
    before = {where(one): unchangeable(one) for one in render(values)}
    after = {where(one): unchangeable(one) for one in render(values, chart=later)}
    assert [at for at in before.keys() & after.keys() if before[at] != after[at]] == []
    gone = before.keys() - after.keys()
    assert {kind for kind, _, _ in gone} <= {"Job"}  # another Job takes its place, since none can be changed


@pytest.mark.parametrize(
    "values",
    [
        {"trust": {"mode": "job"}},
        {"pki": {"organisation": "Corp"}},
        {"gateway": {"replicas": 5}},
        {"relay": {"enabled": True}},
    ],
    ids=str,
)
def test_a_change_of_values_changes_nothing_that_cannot_be_changed(values: Object) -> None:
    before = {where(one): unchangeable(one) for one in render()}
    after = {where(one): unchangeable(one) for one in render(values)}
    assert [at for at in before.keys() & after.keys() if before[at] != after[at]] == []


def test_a_change_of_policy_restarts_nothing() -> None:
    before, after = (
        list(pods(render({"policy": {"files": {"policy.yaml": text}}})))
        for text in ("version: 1\n", "version: 1\nmode: audit\n")
    )
    assert before == after


def test_a_further_policy_file_is_named_to_the_gate() -> None:
    """And rolls it out, for which files there are is said once."""
    found = named(render({"policy": {"files": {"team-b.yaml": "version: 1\n"}}}), "Deployment", "outgate")
    args = next(one["args"] for one in found["spec"]["template"]["spec"]["containers"] if one["name"] == "gate")
    assert "--policy=/etc/outgate/policy/policy.yaml" in args
    assert "--policy=/etc/outgate/policy/team-b.yaml" in args


def test_a_secret_with_keys_is_in_no_release() -> None:
    """So that neither `helm get manifest` nor what stores releases holds it, and an uninstallation keeps it."""
    for values in MATRIX.values():
        assert of_kind(render(values), "Secret") == []
