"""The authority from the Job that makes it to the store that the gate reads, with the rights that the chart gives."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from pki.authority import Authority, certificates_pem, create_authority, key_pem
from pki.files import SECRET
from pki.store import load, load_issuers
from proxy.cli import outgate
from tests.helm.rendering import ALL, Object, containers, named, of_kind, pods, render
from tests.pki.api_server import ApiServer, api_server

NAME = "outgate-pki"
WAIT_S = 30.0


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as it:
        it.add_namespace("outgate", "other")
        yield it


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(outgate, [str(one) for one in arguments], prog_name="outgate", catch_exceptions=False)


def secret(server: ApiServer, directory: Path, *more: str, name: str = NAME, namespace: str = "outgate") -> Result:
    config = server.kubeconfig(directory)
    return invoke("pki", "secret", name, "--namespace", namespace, "--kubeconfig", config, *more)


def held(server: ApiServer, name: str = NAME) -> dict[str, bytes]:
    with server.changed:
        found = server._objects["secrets", "outgate", name]["data"]
    return {key: base64.b64decode(text) for key, text in found.items()}


def mounted(directory: Path, files: dict[str, bytes]) -> Path:
    """As the kubelet mounts a Secret: readable for the group, behind links, all changed in one step."""
    directory.mkdir(exist_ok=True)
    version = directory / f"..{time.monotonic_ns()}"
    version.mkdir()
    for name, content in files.items():
        (version / name).write_bytes(content)
        (version / name).chmod(0o440)
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    (directory / "..data_tmp").symlink_to(version.name)
    (directory / "..data_tmp").replace(directory / "..data")
    return directory


def flat(authority: Authority) -> dict[str, bytes]:
    return {
        "tls.crt": certificates_pem(*authority.issuer.chain),
        "tls.key": key_pem(authority.issuer.key),
        "ca.crt": certificates_pem(*authority.trusted),
    }


# Made once


def test_the_job_makes_an_authority_once(server: ApiServer, tmp_path: Path) -> None:
    first = secret(server, tmp_path, "--organisation", "Example Corp")
    assert (first.exit_code, first.output) == (0, f"secret {NAME}: made an authority\n")
    before = held(server)
    again = secret(server, tmp_path)
    assert (again.exit_code, again.output) == (0, f"secret {NAME}: stands already, and is left as it is\n")
    assert held(server) == before
    assert set(before) == {"tls.crt", "tls.key", "ca.crt", "root.key"}


def test_what_the_job_made_is_what_the_gate_signs_with(server: ApiServer, tmp_path: Path) -> None:
    secret(server, tmp_path)
    ca = mounted(tmp_path / "ca", {key: value for key, value in held(server).items() if key != "root.key"})
    assert invoke("pki", "adopt", ca, "--pki", tmp_path / "pki").exit_code == 0
    found = load(tmp_path / "pki")
    assert certificates_pem(*found.issuer.chain) == held(server)["tls.crt"]
    assert certificates_pem(*found.trusted) == held(server)["ca.crt"]
    assert [root.key for root in found.roots] == [None]


def test_two_jobs_at_once_leave_one_authority(server: ApiServer, tmp_path: Path) -> None:
    """The other one has written between our look and our write: nothing of it is replaced."""
    server.fail("GET", f"/secrets/{NAME}", status=404)
    theirs = {key: base64.b64encode(value).decode() for key, value in flat(create_authority(now())).items()}
    server.write("secrets", "outgate", NAME, {"data": theirs}, manager="outgate-0123456789abcdef")
    assert secret(server, tmp_path).output == f"secret {NAME}: stands already, and is left as it is\n"
    assert {key: base64.b64encode(value).decode() for key, value in held(server).items()} == theirs


def test_a_secret_of_something_else_is_left_alone(server: ApiServer, tmp_path: Path) -> None:
    server.write("secrets", "outgate", NAME, {"data": {"password": "eA=="}})
    refused = secret(server, tmp_path)
    assert refused.exit_code == 1
    assert "lacks tls.crt, tls.key, ca.crt; name another one" in refused.output
    assert held(server) == {"password": b"x"}


def test_an_api_that_refuses_is_one_clear_line(server: ApiServer, tmp_path: Path) -> None:
    server.rules = []
    refused = secret(server, tmp_path)
    assert refused.exit_code == 3
    assert 'cannot get resource "secrets"' in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.client
def test_the_role_of_the_chart_is_enough_for_its_job_and_for_no_other_secret(server: ApiServer, tmp_path: Path) -> None:
    objects = render(ALL)
    role = named(objects, "Role", NAME)
    server.rules = [("outgate", rule) for rule in role["rules"]]
    [words] = [one["args"] for pod in pods(objects) for one in containers(pod) if one["name"] == "pki"]
    config = server.kubeconfig(tmp_path)
    assert invoke(*words, "--kubeconfig", config).exit_code == 0
    assert invoke(*words, "--kubeconfig", config).exit_code == 0
    for name, namespace in [("other", "outgate"), (NAME, "other")]:
        refused = secret(server, tmp_path, name=name, namespace=namespace)
        assert (refused.exit_code, "403" in refused.output) == (3, True)


@pytest.mark.client
@pytest.mark.parametrize("verb", ["get", "create", "patch"])
def test_each_verb_of_the_role_is_needed(server: ApiServer, tmp_path: Path, verb: str) -> None:
    [role] = of_kind(render(), "Role")
    less = [{**rule, "verbs": [one for one in rule["verbs"] if one != verb]} for rule in role["rules"]]
    server.rules = [("outgate", rule) for rule in less]
    assert secret(server, tmp_path).exit_code == 3


@pytest.mark.client
def test_the_role_of_the_chart_is_enough_for_the_trust_bundle(server: ApiServer, tmp_path: Path) -> None:
    objects = render({"trust": {"mode": "job", "clusterTrustBundle": True}})
    [role] = [one for one in of_kind(objects, "ClusterRole") if one["metadata"]["name"].endswith("-trust")]
    server.rules = [(None, rule) for rule in role["rules"]]
    (tmp_path / "ca.crt").write_bytes(flat(create_authority(now()))["ca.crt"])
    [words] = [one["args"] for pod in pods(objects) for one in containers(pod) if one["name"] == "distribute"]
    here = [one.replace("/etc/outgate/roots", str(tmp_path)) for one in words]
    assert invoke(*here, "--public", "none", "--kubeconfig", server.kubeconfig(tmp_path)).exit_code == 0
    assert server.served("outgate.outgate-trust") == {"outgate", "other"}


# The webhook's certificate

HOOK = "mutatingwebhookconfigurations"


def rights_of_serving(objects: list[Object]) -> list[tuple[str | None, Object]]:
    role, cluster = named(objects, "Role", "outgate-serving"), named(objects, "ClusterRole", "outgate.outgate-serving")
    return [("outgate", role["rules"][0]), (None, cluster["rules"][0])]


def serve_hook(server: ApiServer, objects: list[Object]) -> list[str]:
    """The configuration is there as the chart has it. The words of the Job, which are those of the CronJob."""
    server.write(HOOK, "", "outgate.outgate", named(objects, "MutatingWebhookConfiguration", "outgate.outgate"))
    [words, again] = [one["args"] for pod in pods(objects) for one in containers(pod) if one["name"] == "serving"]
    assert words == again
    return list(words)


@pytest.mark.client
def test_the_rights_of_the_chart_are_enough_for_the_certificate_of_its_webhook(
    server: ApiServer, tmp_path: Path
) -> None:
    objects = render(ALL)
    words = serve_hook(server, objects)
    server.rules = rights_of_serving(objects)
    config = server.kubeconfig(tmp_path)
    assert invoke(*words, "--kubeconfig", config).output == "secret outgate-webhook-tls: made a certificate\n"
    assert invoke(*words, "--kubeconfig", config).output == "secret outgate-webhook-tls: its certificate is good\n"
    [told] = json.loads(server.requests("PATCH", HOOK)[0].body)["webhooks"]
    [hook] = named(objects, "MutatingWebhookConfiguration", "outgate.outgate")["webhooks"]
    assert told["name"] == hook["name"]  # by which an API server finds whose caBundle it is
    assert base64.b64decode(told["clientConfig"]["caBundle"]) == held(server, "outgate-webhook-tls")["ca.crt"]
    leaf = x509.load_pem_x509_certificate(held(server, "outgate-webhook-tls")["tls.crt"])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    service = named(objects, "Service", "outgate-webhook")["metadata"]
    assert f"{service['name']}.{service['namespace']}.svc" in names.get_values_for_type(x509.DNSName)
    [template] = [pod for pod in pods(objects) for one in containers(pod) if one["name"] == "webhook"]
    assert template["spec"]["volumes"][0]["secret"]["secretName"] == "outgate-webhook-tls"


@pytest.mark.client
@pytest.mark.parametrize(("at", "verb"), [(0, "get"), (0, "create"), (0, "patch"), (1, "get"), (1, "patch")])
def test_each_of_these_rights_is_needed(server: ApiServer, tmp_path: Path, at: int, verb: str) -> None:
    objects = render(ALL)
    words = serve_hook(server, objects)
    rights = rights_of_serving(objects)
    scope, rule = rights[at]
    assert verb in rule["verbs"]
    rights[at] = scope, {**rule, "verbs": [one for one in rule["verbs"] if one != verb]}
    server.rules = rights
    assert invoke(*words, "--kubeconfig", server.kubeconfig(tmp_path)).exit_code == 3


# Adopted


def now() -> datetime:
    return datetime.now(UTC)


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    """The kubelet runs init containers again in the same volume, when the pod's sandbox was lost."""
    ca, store = mounted(tmp_path / "ca", flat(create_authority(now()))), tmp_path / "pki"
    assert invoke("pki", "adopt", ca, "--pki", store).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = invoke("pki", "adopt", ca, "--pki", store)
    assert (again.exit_code, "in use already" in again.output) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


def test_the_key_that_the_volume_shows_to_its_group_is_its_owners_alone_in_the_store(tmp_path: Path) -> None:
    (volume := tmp_path / "run").mkdir()
    volume.chmod(0o2777)  # an emptyDir with fsGroup
    ca, store = mounted(tmp_path / "ca", flat(create_authority(now()))), volume / "pki"
    invoke("pki", "adopt", ca, "--pki", store)
    [key] = store.rglob("ca.key")
    assert key.stat().st_mode & 0o777 == SECRET
    assert store.stat().st_mode & 0o077 == 0
    assert len(load_issuers(store)) == 1


FAULTS: dict[str, tuple[Callable[[Authority, dict[str, bytes]], dict[str, bytes]], int, str]] = {
    "another's key": (lambda _, files: files | {"tls.key": flat(create_authority(now()))["tls.key"]}, 1, "key"),
    "no key": (lambda _, files: files | {"tls.key": b""}, 3, "tls.key"),
    "no certificate": (lambda _, files: files | {"tls.crt": b"garbage"}, 3, "tls.crt"),
    "a missing file": (lambda _, files: {"tls.crt": files["tls.crt"], "tls.key": files["tls.key"]}, 3, "ca.crt"),
    "a root": (
        lambda authority, files: {
            **files,
            "tls.crt": files["ca.crt"],
            "tls.key": key_pem(authority.roots[0].key),  # type: ignore[arg-type]  # a new authority has it
        },
        1,
        "a root; give a gate an issuing CA below it",
    ),
    "one that is over": (
        lambda *_: flat(create_authority(now() - timedelta(days=9), issuing_life=timedelta(days=2))),
        1,
        "expired",
    ),
}


@pytest.mark.parametrize(("change", "code", "said"), FAULTS.values(), ids=FAULTS)
def test_a_ca_that_no_client_would_accept_is_not_taken(
    tmp_path: Path, change: Callable[[Authority, dict[str, bytes]], dict[str, bytes]], code: int, said: str
) -> None:
    authority = create_authority(now())
    ca = mounted(tmp_path / "ca", change(authority, flat(authority)))
    refused = invoke("pki", "adopt", ca, "--pki", tmp_path / "pki")
    assert (refused.exit_code, said in refused.output) == (code, True), refused.output
    assert not (tmp_path / "pki" / "state.json").exists()


@contextmanager
def following(ca: Path, store: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "proxy", "pki", "adopt", str(ca), "--pki", str(store), "--watch"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def in_use(store: Path) -> bytes:
    return certificates_pem(*load(store).issuer.chain) if (store / "state.json").exists() else b""


def test_a_renewed_ca_is_taken_while_the_gate_runs_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    first, wrong, second = (flat(create_authority(now())) for _ in range(3))
    ca, store = mounted(tmp_path / "ca", first), tmp_path / "pki"
    with following(ca, store) as running:
        wait_for(lambda: in_use(store) == first["tls.crt"])
        mounted(ca, wrong | {"tls.key": first["tls.key"]})
        assert running.stderr is not None
        assert any("the former CA stays in use" in line for line in running.stderr)
        assert in_use(store) == first["tls.crt"]
        mounted(ca, second)
        wait_for(lambda: in_use(store) == second["tls.crt"])
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait(WAIT_S) == 0
