"""Pods before and after: golden files that a person reads, the reason of each refusal, and what holds for every pod.

After a change that is meant: `python -m tests.proxy.test_injection --update`, and read the diff.
"""

from __future__ import annotations

import json
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.commands.inject import dumped
from proxy.injection.admission_policy import objects
from proxy.injection.gate import GATE
from proxy.injection.model import Injected, Refused, Settings
from proxy.injection.objects import inject_object
from proxy.injection.patch import difference
from proxy.injection.pod import inject
from proxy.injection.refusals import DROPPED, HARMLESS
from tests.proxy.injected import apply_patch, faults_of

GOLDEN = Path(__file__).parent / "golden" / "inject"
PLAIN = Settings(image="registry.example/outgate@sha256:" + "a" * 64)
FULL = Settings(
    image="registry.example/outgate:1",
    policy="policy-of-this-namespace",
    policy_keys=("team.yaml", "base.yaml"),
    trust_path="/var/trust",
    authority="outgate-pki",
    bind="[::]",
    gate_uid=2000,
    cluster_dns=(ip_address("10.96.0.10"), ip_address("fd00:96::a")),
    udp=True,
)
GOLDENS = {
    "pod": PLAIN,
    "deployment": PLAIN,
    "job": Settings(image=PLAIN.image, trust=None),
    "cronjob": PLAIN,
    "statefulset": FULL,
    "daemonset": Settings(image=PLAIN.image, host_paths=("/var/log",)),
    "list": PLAIN,
}
SCHEMAS = ("1.29.0", "1.31.0", "1.33.0", "1.35.0", "1.37.0")


def read(name: str) -> dict[str, Any]:
    found = yaml.safe_load((GOLDEN / f"{name}.in.yaml").read_text())
    assert isinstance(found, dict)
    return found


def injected(found: dict[str, Any], settings: Settings = PLAIN) -> Injected:
    outcome = inject_object(found, settings)
    assert isinstance(outcome, Injected), outcome
    return outcome


def pod(
    *, spec: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None, **container: Any
) -> dict[str, Any]:
    one = {"name": "app", "image": "app:1", **container}
    return {"metadata": metadata or {}, "spec": {"containers": [one], **(spec or {})}}


def context(**fields: Any) -> dict[str, Any]:
    return pod(securityContext=fields)


# --- golden files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
def test_what_comes_out_is_as_it_was_read(name: str) -> None:
    assert dumped([injected(read(name), GOLDENS[name]).changed]) == (GOLDEN / f"{name}.out.yaml").read_text()


def test_admission_policies_are_as_they_were_read() -> None:
    assert dumped(objects(FULL)) == (GOLDEN / "admission-policy.yaml").read_text()


@pytest.mark.parametrize("name", GOLDENS)
def test_the_patch_makes_the_same_of_it(name: str) -> None:
    before = read(name)
    outcome = injected(before, GOLDENS[name])
    assert apply_patch(before, outcome.patch) == outcome.changed
    assert before == read(name)


@pytest.mark.parametrize("name", GOLDENS)
def test_what_is_injected_stays_as_it_is(name: str) -> None:
    once = injected(read(name), GOLDENS[name])
    again = injected(once.changed, GOLDENS[name])
    assert again.patch == ()
    assert again.changed == once.changed


@pytest.mark.parametrize("version", SCHEMAS)
@pytest.mark.parametrize("name", GOLDENS)
def test_what_comes_out_fits_the_schema(name: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    changed = injected(read(name), GOLDENS[name]).changed
    for one in changed["items"] if name == "list" else [changed]:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", ["1.36.0", "1.37.0"])
@pytest.mark.parametrize("settings", [PLAIN, FULL], ids=["plain", "full"])
def test_admission_policies_fit_the_schema(settings: Settings, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for one in objects(settings):
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "list"])
def test_every_container_of_what_comes_out_is_guarded(name: str) -> None:
    assert faults_of(injected(read(name), GOLDENS[name]).changed, read(name), GOLDENS[name]) == []


def test_of_a_list_the_pods_are_guarded_that_are_not_switched_off() -> None:
    before = read("list")["items"]
    service, alone, weather = injected(read("list")).changed["items"]
    assert (service, alone) == (before[0], before[1])
    assert faults_of(weather, before[2], PLAIN) == []


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "host network": (pod(spec={"hostNetwork": True}), "spec.hostNetwork: its packets leave by the node's network"),
    "host processes": (pod(spec={"hostPID": True}), "spec.hostPID: it could enter other processes"),
    "host memory": (pod(spec={"hostIPC": True}), "spec.hostIPC: it could speak through the memory"),
    "windows": (pod(spec={"os": {"name": "windows"}}), "spec.os.name: the gate's rules are Linux's"),
    "uid of the pod": (pod(spec={"securityContext": {"runAsUser": 1337}}), "spec.securityContext.runAsUser: 1337 is"),
    "uid of the pod as a float": (
        pod(spec={"securityContext": {"runAsUser": 1337.0}}),
        "runAsUser: 1337 is the gate's",
    ),
    "uid of a container": (context(runAsUser=1337), "spec.containers[0].securityContext.runAsUser: 1337 is the gate's"),
    "privileged": (context(privileged=True), "spec.containers[0].securityContext.privileged: it could change"),
    "escalation": (context(allowPrivilegeEscalation=True), "allowPrivilegeEscalation: a set-uid file could make it"),
    "unmasked proc": (context(procMount="Unmasked"), "procMount: the kernel's settings"),
    **{
        f"capability {name}": (context(capabilities={"add": [name], "drop": ["ALL"]}), f"{name} leads round the gate")
        for name in (*DROPPED, "ALL", "BPF", "DAC_READ_SEARCH", "SYS_RAWIO", "CAP_NET_RAW", "net_admin", "NEW_IN_7_0")
    },
    "host path": (
        pod(spec={"volumes": [{"name": "run", "hostPath": {"path": "/run/containerd"}}]}),
        "spec.volumes[0].hostPath: /run/containerd is the node's",
    ),
    "port of the gate's": (pod(ports=[{"containerPort": 15001}]), "ports[0].containerPort: 15001 is the gate's"),
    "name of ours": (pod(name=GATE), "spec.containers[0].name: outgate-gate is the name of one of ours"),
    "volume of ours": (
        pod(volumeMounts=[{"name": "outgate-issuing", "mountPath": "/ca"}]),
        "spec.containers[0].volumeMounts[0].name: that volume is the gate's alone",
    ),
    "init container": (
        pod(spec={"initContainers": [{"name": "i", "image": "i", "securityContext": {"privileged": True}}]}),
        "spec.initContainers[0].securityContext.privileged",
    ),
    "ephemeral container": (
        pod(spec={"ephemeralContainers": [{"name": "e", "image": "e", "securityContext": {"runAsUser": 1337}}]}),
        "spec.ephemeralContainers[0].securityContext.runAsUser",
    ),
    "label that is neither": (
        pod(metadata={"labels": {"outgate/inject": "no"}}),
        "outgate/inject: no is neither true nor false",
    ),
    "annotation misspelt": (
        pod(metadata={"annotations": {"outgate/exclude-port": "53"}}),
        "has no meaning; did you mean",
    ),
    "excluded everything": (
        pod(metadata={"annotations": {"outgate/exclude-cidrs": "0.0.0.0/0"}}),
        "--exclude 0.0.0.0/0: that is every address",
    ),
    "excluded nonsense": (
        pod(metadata={"annotations": {"outgate/exclude-ports": "9000,ssh"}}),
        "--exclude-port ssh: not a port",
    ),
    "device that is a rule": (pod(metadata={"annotations": {"outgate/devices": 'e" accept'}}), "no name of a device"),
    "inbound": (pod(metadata={"annotations": {"outgate/inbound": "yes"}}), "outgate/inbound: yes is neither"),
    "workload that is a flag": (
        pod(metadata={"annotations": {"outgate/workload": "--mode=proxy"}}),
        "is no name of a workload",
    ),
    "workload that is expanded": (
        pod(metadata={"annotations": {"outgate/workload": "$(HOSTNAME)"}}),
        "is no name of a workload",
    ),
    "no containers": ({"spec": {}}, "spec.containers: none"),
    "containers no list": ({"spec": {"containers": {}}}, "spec.containers: not a list"),
    "a container no object": ({"spec": {"containers": ["app"]}}, "spec.containers[0]: not an object"),
    "value that is no string": (pod(env=[{"name": "A", "value": 1}]), "spec.containers[0].env[0].value: not a string"),
    "nothing": (None, "not an object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_guard_can_hold_is_refused_with_its_reason(name: str) -> None:
    found, reason = REFUSED[name]
    outcome = inject(found, PLAIN)
    assert isinstance(outcome, Refused), outcome
    assert reason in outcome.reason
    assert outcome.reason.isprintable()


def test_a_refusal_says_how_a_pod_is_left_alone() -> None:
    outcome = inject(pod(spec={"hostNetwork": True}), Settings(image="outgate:1", label="example/gate"))
    assert isinstance(outcome, Refused)
    assert outcome.reason.endswith("leave it out, or label the pod example/gate=false if it must be so")


def test_a_container_without_a_user_is_refused_where_the_operator_wants_to_know() -> None:
    strict = Settings(image="outgate:1", is_user_needed=True)
    outcome = inject(pod(), strict)
    assert isinstance(outcome, Refused)
    assert "runAsUser: missing, so its image says" in outcome.reason
    assert isinstance(inject(context(runAsUser=1000), strict), Injected)
    assert isinstance(inject(pod(spec={"securityContext": {"runAsUser": 1000}}), strict), Injected)


def test_nothing_goes_past_the_gate_where_the_operator_forbids_it() -> None:
    strict = Settings(image="outgate:1", may_exclude=False)
    asking = pod(metadata={"annotations": {"outgate/exclude-ports": "9000"}})
    assert isinstance(inject(asking, PLAIN), Injected)
    outcome = inject(asking, strict)
    assert isinstance(outcome, Refused)
    assert "nothing may go past the gate here" in outcome.reason


@pytest.mark.parametrize("path", ["/var/logs", "/var/log/../../run", "/var", "/", "var/log", ""])
def test_a_host_path_beside_those_that_the_operator_named_is_refused(path: str) -> None:
    named = Settings(image="outgate:1", host_paths=("/var/log",))
    volume = {"name": "v", "hostPath": {"path": path}}
    assert isinstance(inject(pod(spec={"volumes": [volume]}), named), Refused)


@pytest.mark.parametrize("path", ["/var/log", "/var/log/", "/var/log/pods"])
def test_a_host_path_that_the_operator_named_is_mounted(path: str) -> None:
    named = Settings(image="outgate:1", host_paths=("/var/log",))
    volume = {"name": "v", "hostPath": {"path": path}}
    assert isinstance(inject(pod(spec={"volumes": [volume]}), named), Injected)


# --- what is changed --------------------------------------------------------------------------------------------------


def args_of(outcome: object, name: str) -> list[str]:
    assert isinstance(outcome, Injected), outcome
    found = next(one for one in outcome.changed["spec"]["initContainers"] if one["name"] == name)
    args = found["args"]
    assert isinstance(args, list)
    return args


def after(args: list[str], flag: str) -> list[str]:
    return [value for name, _, value in (word.partition("=") for word in args) if name == flag]


def test_a_gate_that_somebody_else_put_there_is_replaced() -> None:
    forged = {"name": GATE, "image": "evil:1", "securityContext": {"runAsUser": 1337, "privileged": True}}
    outcome = inject(pod(spec={"initContainers": [forged]}), PLAIN)
    assert isinstance(outcome, Injected)
    names = [(one["name"], one["image"]) for one in outcome.changed["spec"]["initContainers"]]
    assert names == [("outgate-firewall", PLAIN.image), (GATE, PLAIN.image)]


def test_our_containers_come_before_those_of_the_pod_and_of_others() -> None:
    found = pod(spec={"initContainers": [{"name": "istio-init", "image": "i"}, {"name": "setup", "image": "s"}]})
    once = inject(found, PLAIN)
    assert isinstance(once, Injected)
    spec = once.changed["spec"]
    moved = {
        **once.changed,
        "spec": {**spec, "initContainers": [{"name": "late", "image": "l"}, *spec["initContainers"]]},
    }
    again = inject(moved, PLAIN)
    assert isinstance(again, Injected)
    names = [one["name"] for one in again.changed["spec"]["initContainers"]]
    assert names == ["outgate-firewall", GATE, "late", "istio-init", "setup"]
    assert apply_patch(moved, again.patch) == again.changed


def test_a_pod_that_is_switched_off_stays_as_it_is() -> None:
    off = pod(metadata={"labels": {"outgate/inject": "false"}}, securityContext={"privileged": True})
    assert inject(off, PLAIN) == Injected(off, ())


WORKLOADS = {
    "its annotation": (
        pod(metadata={"annotations": {"outgate/workload": "weather"}}, spec={"serviceAccountName": "x"}),
        "weather",
    ),
    "its service account": (pod(spec={"serviceAccountName": "weather-app"}), "weather-app"),
    "no account": (pod(), "default"),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_workload_is_said_by(name: str) -> None:
    found, workload = WORKLOADS[name]
    assert after(args_of(inject(found, PLAIN), GATE), "--workload") == [workload]


def test_annotations_become_flags_of_the_firewall() -> None:
    annotations = {
        "outgate/exclude-cidrs": "10.96.0.0/12, fd00:96::/108",
        "outgate/exclude-ports": "9000",
        "outgate/devices": "eth0,net1",
        "outgate/inbound": "false",
    }
    args = args_of(inject(pod(metadata={"annotations": annotations}), PLAIN), "outgate-firewall")
    assert after(args, "--exclude") == ["10.96.0.0/12", "fd00:96::/108"]
    assert after(args, "--exclude-port") == ["9000"]
    assert after(args, "--upstream-device") == ["eth0", "net1"]
    assert "--no-inbound" in args


def variables_of(outcome: object) -> list[dict[str, Any]]:
    assert isinstance(outcome, Injected), outcome
    found = outcome.changed["spec"]["containers"][0]["env"]
    assert isinstance(found, list)
    return found


def test_a_variable_that_is_set_stays_and_is_told() -> None:
    from_secret = {"name": "CURL_CA_BUNDLE", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    java = {"name": "JAVA_TOOL_OPTIONS", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}
    mine = [{"name": "SSL_CERT_FILE", "value": "/mine.pem"}, from_secret, java]
    outcome = inject(pod(env=mine), PLAIN)
    assert variables_of(outcome)[:3] == mine
    assert isinstance(outcome, Injected)
    kept = [
        name
        for name in ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "JAVA_TOOL_OPTIONS")
        if any(name in w for w in outcome.warnings)
    ]
    assert kept == ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "JAVA_TOOL_OPTIONS"]


def test_of_two_values_the_later_one_counts() -> None:
    twice = [{"name": "JAVA_TOOL_OPTIONS", "value": "-Xmx1g"}, {"name": "JAVA_TOOL_OPTIONS", "value": "-Xmx2g"}]
    found = [one["value"] for one in variables_of(inject(pod(env=twice), PLAIN)) if one["name"] == "JAVA_TOOL_OPTIONS"]
    assert found[0] == "-Xmx1g"
    assert found[1].startswith("-Xmx2g -Djavax.net.ssl.trustStore=")


def test_the_trust_directory_is_mounted_whole_and_read_only() -> None:
    """A subPath is never updated."""
    outcome = inject(pod(), PLAIN)
    assert isinstance(outcome, Injected)
    [mount] = outcome.changed["spec"]["containers"][0]["volumeMounts"]
    assert mount == {"name": "outgate-trust", "mountPath": "/etc/outgate/trust", "readOnly": True}


def test_another_volume_at_the_place_of_the_trust_directory_stays() -> None:
    mounts = [{"name": "mine", "mountPath": "/etc/outgate/trust/"}]
    outcome = inject(pod(volumeMounts=mounts), PLAIN)
    assert isinstance(outcome, Injected)
    made = outcome.changed["spec"]["containers"][0]
    assert made["volumeMounts"] == mounts
    assert "env" not in made
    assert "another volume is at /etc/outgate/trust" in outcome.warnings[0]


def test_capabilities_that_are_dropped_already_are_not_dropped_twice() -> None:
    outcome = inject(context(capabilities={"drop": ["NET_RAW", "MKNOD"], "add": ["CHOWN"]}), PLAIN)
    assert isinstance(outcome, Injected)
    made = outcome.changed["spec"]["containers"][0]["securityContext"]["capabilities"]
    assert made["add"] == ["CHOWN"]
    assert made["drop"] == ["NET_RAW", "MKNOD", *(name for name in DROPPED if name != "NET_RAW")]


# --- whatever the pod -------------------------------------------------------------------------------------------------

words = st.sampled_from(["", "app", "ALL", "NET_RAW", "CHOWN", GATE, "outgate-trust", "/etc/outgate/trust", "a\x1b[2J"])
garbage = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2000) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


def sometimes(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, good, good, garbage)


variables = st.fixed_dictionaries(
    {
        "name": st.sampled_from(
            ["A", "SSL_CERT_FILE", "JAVA_TOOL_OPTIONS", "PHP_INI_SCAN_DIR", "NPM_CONFIG_CAFILE", "SSL_CERT_DIR"]
        )
    },
    optional={
        "value": sometimes(st.sampled_from(["", "/x", "-Xmx1g", "-Djavax.net.ssl.trustStore=/mine"])),
        "valueFrom": garbage,
    },
)
capabilities = st.fixed_dictionaries(
    {},
    optional={
        "add": sometimes(st.lists(st.sampled_from([*sorted(HARMLESS), *DROPPED]), max_size=2)),
        "drop": sometimes(st.lists(st.sampled_from(["ALL", "NET_RAW", "CHOWN", "SETUID"]), max_size=3)),
    },
)
contexts = st.fixed_dictionaries(
    {},
    optional={
        "capabilities": sometimes(capabilities),
        "privileged": sometimes(st.just(False)),
        "allowPrivilegeEscalation": sometimes(st.just(False)),
        "runAsUser": sometimes(st.sampled_from([0, 1000, 1337])),
    },
)
some_containers = st.fixed_dictionaries(
    {"name": sometimes(st.sampled_from(["app", "other"])), "image": sometimes(st.just("app:1"))},
    optional={
        "env": sometimes(st.lists(variables, max_size=3)),
        "securityContext": sometimes(contexts),
        "volumeMounts": sometimes(
            st.lists(
                st.fixed_dictionaries({"name": words, "mountPath": st.sampled_from(["/a", "/etc/outgate/trust"])}),
                max_size=2,
            )
        ),
        "ports": sometimes(st.lists(st.fixed_dictionaries({"containerPort": st.sampled_from([80, 9901])}), max_size=2)),
        "envFrom": garbage,
    },
)
specs = st.fixed_dictionaries(
    {"containers": sometimes(st.lists(some_containers, min_size=1, max_size=2))},
    optional={
        "initContainers": sometimes(st.lists(some_containers, max_size=2)),
        "ephemeralContainers": sometimes(st.lists(some_containers, max_size=1)),
        "volumes": sometimes(
            st.lists(st.fixed_dictionaries({"name": words}, optional={"hostPath": garbage}), max_size=2)
        ),
        "hostNetwork": sometimes(st.just(False)),
        "serviceAccountName": sometimes(st.just("weather")),
        "securityContext": sometimes(contexts),
    },
)
pods = st.fixed_dictionaries(
    {"apiVersion": st.just("v1"), "kind": st.just("Pod"), "spec": sometimes(specs)},
    optional={
        "metadata": sometimes(
            st.fixed_dictionaries(
                {},
                optional={
                    "annotations": sometimes(
                        st.dictionaries(st.sampled_from(["outgate/workload", "outgate/exclude-ports", "x"]), words)
                    ),
                    "labels": sometimes(
                        st.dictionaries(
                            st.sampled_from(["app", "outgate/inject"]), st.sampled_from(["true", "false", "x"])
                        )
                    ),
                },
            )
        )
    },
)


@given(pods, st.sampled_from([PLAIN, FULL]))
def test_a_pod_is_guarded_or_refused_whatever_it_is(found: dict[str, Any], settings: Settings) -> None:
    before = json.dumps(found)
    outcome = inject_object(found, settings)
    assert json.dumps(found) == before
    if isinstance(outcome, Refused):
        assert outcome.reason.isprintable()
        return
    assert apply_patch(found, outcome.patch) == outcome.changed
    if not outcome.patch:  # switched off
        assert found["metadata"]["labels"]["outgate/inject"] == "false"
        return
    assert faults_of(outcome.changed, found, settings) == []
    again = inject_object(outcome.changed, settings)
    assert again == Injected(outcome.changed, (), again.warnings if isinstance(again, Injected) else ())


@given(garbage)
def test_garbage_is_told_or_left_as_it_is(found: Any) -> None:
    assert isinstance(inject(found, PLAIN), Injected | Refused)
    if isinstance(found, dict):
        assert isinstance(inject_object(found, PLAIN), Injected | Refused)


@given(garbage, garbage)
def test_a_patch_makes_the_one_of_the_other(before: Any, later: Any) -> None:
    assert apply_patch(before, tuple(difference(before, later))) == later


def update() -> None:
    for name, settings in GOLDENS.items():
        (GOLDEN / f"{name}.out.yaml").write_text(dumped([injected(read(name), settings).changed]))
    (GOLDEN / "admission-policy.yaml").write_text(dumped(objects(FULL)))


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    update()
