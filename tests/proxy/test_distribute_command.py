"""`outgate pki distribute`, as a user and as a pod start it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from pki.authority import certificates_pem, create_authority
from pki.distribution import trust_files
from pki.rotation import stage_root
from pki.store import changing, save
from proxy.commands.pki.distribute import MOUNT_PATH, distribute
from tests.pki.api_server import ApiServer, api_server

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "trust-distribution.yaml"
WAIT_S = 60.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, not to be changed."""
    directory = tmp_path_factory.mktemp("made") / "pki"
    save(create_authority(datetime.now(UTC)), directory)
    return directory


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pki"))


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as it:
        it.add_namespace("a", "b", "kube-system")
        yield it


def invoke(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(
        distribute, [str(one) for one in arguments], env=dict(env or {}), prog_name="outgate", catch_exceptions=False
    )


def roots(store: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(store.glob("roots/*/ca.crt")))


# To a directory


def test_a_directory_is_written_and_then_left_as_it_is(store: Path, tmp_path: Path) -> None:
    to = ("--pki", store, "--public", "none", "--to", "dir", tmp_path / "trust")
    first, second = invoke(*to), invoke(*to)
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.stdout.startswith(f"{tmp_path}/trust: wrote ca.crt, bundle.pem, ")
    assert second.stdout == f"{tmp_path}/trust: as it should be\n"
    files = {path.name: path.read_bytes() for path in (tmp_path / "trust").iterdir()}
    assert files == trust_files(str(tmp_path / "trust"), roots(store), b"")


def test_a_relative_directory_is_written_with_its_whole_path(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("--pki", "pki", "--to", "dir", "trust", "--public", "none").exit_code == 0
    assert (tmp_path / "trust" / "wgetrc").read_text() == f"ca_certificate = {tmp_path}/trust/bundle.pem\n"


def test_the_mount_path_is_what_programs_see(store: Path, tmp_path: Path) -> None:
    invoke("--pki", store, "--public", "none", "--to", "dir", tmp_path / "trust", "--mount-path", "/in/the/pod")
    assert (tmp_path / "trust" / "wgetrc").read_text() == "ca_certificate = /in/the/pod/bundle.pem\n"


def test_json_says_what_was_written(store: Path, tmp_path: Path) -> None:
    to = ("--pki", store, "--public", "none", "--to", "dir", tmp_path / "trust", "--json")
    assert "truststore.jks" in json.loads(invoke(*to).stdout)["written"]
    assert json.loads(invoke(*to).stdout) == {"directory": f"{tmp_path}/trust", "written": []}


# Where it comes from


def test_a_trust_directory_is_a_source_with_its_public_roots(store: Path, tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    public.write_bytes(certificates_pem(create_authority(datetime.now(UTC)).roots[0].certificate))
    invoke("--pki", store, "--public", public, "--to", "dir", tmp_path / "one")
    assert invoke("--bundle", tmp_path / "one", "--to", "dir", tmp_path / "two").exit_code == 0
    for name in ("ca.crt", "bundle.pem", "truststore.jks"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert (tmp_path / "two" / "bundle.pem").read_bytes() == roots(store) + public.read_bytes()


def test_a_file_of_roots_is_a_source_and_no_key_is_needed(store: Path, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(roots(store))
    result = invoke("--root", tmp_path / "ca.crt", "--public", "none", "--to", "dir", tmp_path / "trust")
    assert result.exit_code == 0
    assert (tmp_path / "trust" / "ca.crt").read_bytes() == roots(store)


def test_the_public_roots_of_the_machine_are_the_default(store: Path, tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    public.write_bytes(certificates_pem(create_authority(datetime.now(UTC)).roots[0].certificate))
    invoke("--pki", store, "--to", "dir", tmp_path / "trust", env={"SSL_CERT_FILE": str(public)})
    assert (tmp_path / "trust" / "bundle.pem").read_bytes() == roots(store) + public.read_bytes()


def test_a_store_in_the_environment_gives_way_to_what_is_said(store: Path, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(roots(store))
    to = ("--public", "none", "--to", "dir", tmp_path / "trust")
    assert invoke("--root", tmp_path / "ca.crt", *to, env={"OUTGATE_PKI": "/nowhere"}).exit_code == 0
    assert invoke(*to, env={"OUTGATE_PKI": str(store)}).exit_code == 0


# Bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "dir", "x"], "one of --pki, --bundle and --root"),
        (["--pki", "p", "--root", "r", "--to", "dir", "x"], "one of --pki, --bundle and --root"),
        (["--bundle", "p", "--root", "r", "--to", "dir", "x"], "one of --pki, --bundle and --root"),
        (["--pki", "p", "--to", "dir"], "--to dir needs a PATH"),
        (["--pki", "p", "--to", "kubernetes", "x"], "--to kubernetes takes no PATH"),
        (["--pki", "p", "--to", "nowhere"], "'nowhere' is not one of"),
        (["--pki", "p"], "Missing option '--to'"),
        (["--pki", "p", "--to", "dir", "x", "--selector", "a=b"], "--selector goes with --to kubernetes"),
        (["--pki", "p", "--to", "dir", "x", "--prune"], "--prune goes with --to kubernetes"),
        (["--pki", "p", "--to", "kubernetes", "--namespace", "a", "--selector", "a"], "leave out --selector"),
        (["--pki", "p", "--to", "kubernetes", "--namespace", "a", "--prune"], "leave out --selector and --prune"),
        (["--pki", "p", "--to", "kubernetes", "--namespace", "../secrets"], "no name that Kubernetes gives"),
        (["--pki", "p", "--to", "kubernetes", "--namespace", "a.b"], "no name that Kubernetes gives"),
        (["--pki", "p", "--to", "kubernetes", "--name", "a/b"], "no name that Kubernetes gives"),
        (["--pki", "p", "--to", "kubernetes", "--name", "a\n"], "no name that Kubernetes gives"),
        (["--pki", "p", "--to", "kubernetes", "--ready-file", "x"], "--ready-file goes with --watch"),
        (["--pki", "p", "--to", "kubernetes", "--deadline", "0"], "is not in the range"),
    ],
)
def test_wrong_usage_is_exit_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (["--pki", "nowhere"], "nowhere"),
        (["--root", "nowhere"], "nowhere: No such file or directory; name a readable PEM bundle in --root"),
        (["--bundle", "nowhere"], "nowhere/ca.crt: No such file or directory"),
        (["--root", "empty"], "empty: no CERTIFICATE in it"),
        (
            ["--root", "good", "--public", "empty"],
            "empty: no CERTIFICATE in it; name a readable PEM bundle in --public",
        ),
        (["--root", "good", "--public", "none", "--mount-path", "relative"], "'relative' is relative"),
    ],
    ids=["no store", "no roots", "no bundle", "no certificate", "no public root", "relative mount path"],
)
def test_a_bundle_that_cannot_be_had_is_one_line_and_exit_3(
    source: list[str], says: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "good").write_bytes(roots(made))
    result = invoke(*source, "--to", "kubernetes", "--kubeconfig", "nowhere")
    assert result.exit_code == 3
    assert result.stderr.startswith("outgate: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_a_directory_that_cannot_be_written_is_exit_3(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = invoke("--pki", store, "--public", "none", "--to", "dir", tmp_path / "file" / "trust")
    assert result.exit_code == 3
    assert result.stderr.endswith("choose a directory you may write\n")


def test_no_cluster_is_one_line_and_exit_3(store: Path, tmp_path: Path) -> None:
    result = invoke("--pki", store, "--public", "none", "--to", "kubernetes", "--kubeconfig", tmp_path / "none")
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert "name a kubeconfig with --kubeconfig, or run in a pod" in result.stderr


def test_help_imports_neither_cryptography_nor_a_client_of_kubernetes() -> None:
    script = (
        "import sys; from proxy.commands.pki import pki; pki(['distribute', '--help'], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('cryptography', 'lightkube', 'httpx2')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0
    assert "--to kubernetes" in done.stdout


def test_a_directory_is_written_without_a_client_of_kubernetes(store: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from proxy.commands.pki import pki\n"
        f"try: pki(['distribute', '--root', {str(tmp_path / 'ca.crt')!r}, '--public', 'none', '--to', 'dir',"
        f" {str(tmp_path / 'trust')!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit(any(name in sys.modules for name in ('cryptography', 'lightkube', 'httpx2')))"
    )
    (tmp_path / "ca.crt").write_bytes(roots(store))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, "")


# To a cluster


def cluster(store: Path, server: ApiServer, tmp_path: Path) -> Sequence[object]:
    kubeconfig = server.kubeconfig(tmp_path)
    return ("--pki", store, "--public", "none", "--to", "kubernetes", "--kubeconfig", kubeconfig)


def test_a_run_shows_every_place_and_the_sum(store: Path, server: ApiServer, tmp_path: Path) -> None:
    result = invoke(*cluster(store, server, tmp_path), "--cluster-trust-bundle")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["ClusterTrustBundle", "outgate-trust", "written"],
        ["namespace", "a", "written"],
        ["namespace", "b", "written"],
        ["outgate-trust:", "3", "written"],
    ]
    assert server.config_map("a")["data"]["wgetrc"] == f"ca_certificate = {MOUNT_PATH}/bundle.pem\n"


def test_one_that_is_refused_is_exit_1_and_named(store: Path, server: ApiServer, tmp_path: Path) -> None:
    server.write("configmaps", "a", "outgate-trust", {"data": {"x": "theirs"}})
    result = invoke(*cluster(store, server, tmp_path))
    assert result.exit_code == 1
    assert "namespace a  refused  /api/v1/namespaces/a/configmaps/outgate-trust is not ours" in result.stdout
    assert result.stdout.endswith("outgate-trust: 1 written, 1 refused\n")


def test_one_that_fails_is_exit_3_also_beside_one_refused(store: Path, server: ApiServer, tmp_path: Path) -> None:
    server.write("configmaps", "a", "outgate-trust", {"data": {"x": "theirs"}})
    server.fail("PATCH", "/namespaces/b/", status=403, message="forbidden")
    result = invoke(*cluster(store, server, tmp_path))
    assert result.exit_code == 3
    assert "outgate: namespace b: /api/v1/namespaces/b/configmaps/outgate-trust: 403 forbidden\n" in result.stderr


def test_a_run_is_one_json_object(store: Path, server: ApiServer, tmp_path: Path) -> None:
    server.write("configmaps", "a", "trust", {"data": {"x": "theirs"}})
    result = invoke(
        *cluster(store, server, tmp_path), "--json", "--name", "trust", "--namespace", "a", "--namespace", "b"
    )
    told = json.loads(result.stdout)
    assert told["name"] == "trust"
    assert told["outcomes"] == {"written": 1, "refused": 1}
    assert told["places"][1] == {"namespace": "b", "outcome": "written", "because": ""}


def test_no_namespace_is_said(store: Path, server: ApiServer, tmp_path: Path) -> None:
    result = invoke(*cluster(store, server, tmp_path), "--selector", "no=such")
    assert (result.exit_code, result.stdout) == (0, "outgate-trust: no namespace matches\n")


def test_a_bundle_that_is_too_large_says_what_to_leave_out(server: ApiServer, tmp_path: Path) -> None:
    roots_file = tmp_path / "roots.pem"
    roots_file.write_bytes(b"".join(_certificate_like(number) for number in range(600)))
    result = invoke(
        "--root", roots_file, "--public", "none", "--to", "kubernetes", "--kubeconfig", server.kubeconfig(tmp_path)
    )
    assert result.exit_code == 3
    assert "--public none" in result.stderr
    assert server.asked == []


def _certificate_like(number: int) -> bytes:
    """DER of some length in PEM: what distributes reads no further."""
    der = b"\x30\x82\x02\x00" + number.to_bytes(2) + bytes(510)
    return b"-----BEGIN CERTIFICATE-----\n" + base64.b64encode(der) + b"\n-----END CERTIFICATE-----\n"


# Staying


@contextmanager
def staying(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy", "pki", "distribute", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr, after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


def eventually(what: Callable[[], bool], why: str) -> None:
    until = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until, why
        time.sleep(0.02)


def test_a_staying_job_ends_when_it_is_told_to(store: Path, server: ApiServer, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.touch()  # of a former life
    with staying(*cluster(store, server, tmp_path), "--watch", "--ready-file", ready) as process:
        server.wait_for_watches("namespaces", "configmaps")
        eventually(ready.exists, "it is ready")
        eventually(lambda: server.served() == {"a", "b"}, "both are served")
        code, out, err = ended(process)
    assert (code, out) == (0, "")
    assert sorted(err.splitlines()) == ["outgate: namespace a: written", "outgate: namespace b: written"]
    assert not ready.exists()


def test_a_rotation_of_the_root_reaches_every_namespace(store: Path, server: ApiServer, tmp_path: Path) -> None:
    old = roots(store).decode()
    with staying(*cluster(store, server, tmp_path), "--watch", "--json") as process:
        eventually(lambda: server.served() == {"a", "b"}, "both are served")
        with changing(store) as change:
            change.authority = stage_root(change.authority, datetime.now(UTC))
        new = [path.read_text() for path in store.glob("roots/*/ca.crt")]
        assert len(new) == 2

        def both() -> bool:
            found = [server.config_map(namespace)["data"]["ca.crt"] for namespace in ("a", "b")]
            return all(root in text for root in new for text in found)

        eventually(both, "both roots are everywhere")
        assert old in new
        code, out, err = ended(process)
    assert (code, err) == (0, "")
    told = [json.loads(line) for line in out.splitlines()]
    assert [one["outcome"] for one in told] == ["written"] * 4
    assert all(datetime.fromisoformat(one["time"]) <= datetime.now(UTC) for one in told)
    assert "BEGIN" not in out


def test_a_store_that_is_lost_leaves_the_former_bundle(store: Path, server: ApiServer, tmp_path: Path) -> None:
    with staying(*cluster(store, server, tmp_path), "--watch") as process:
        eventually(lambda: server.served() == {"a", "b"}, "both are served")
        before = server.config_map("a")
        (store / "state.json").unlink()
        assert process.stderr
        said = ""
        while "stays" not in said:
            said = process.stderr.readline()
            assert said
        assert str(store) in said
        server.add_namespace("new")
        eventually(lambda: "new" in server.served(), "the job lives")
        assert server.config_map("a") == before
        assert server.config_map("new")["data"] == before["data"]


def test_a_run_that_is_ended_early_has_not_done_it(store: Path, server: ApiServer, tmp_path: Path) -> None:
    server.fail("PATCH", "/namespaces/b/", times=1000, status=500)
    with staying(*cluster(store, server, tmp_path)) as process:
        eventually(lambda: len(server.requests("PATCH", "/namespaces/b/")) > 1, "b is tried again")
        assert ended(process)[0] == 3
    assert server.served() == {"a"}


def test_a_directory_follows_the_store(store: Path, tmp_path: Path) -> None:
    trust = tmp_path / "trust"
    with staying("--pki", store, "--public", "none", "--to", "dir", trust, "--watch") as process:
        eventually(lambda: (trust / "manifest.json").exists(), "it is written")
        with changing(store) as change:
            change.authority = stage_root(change.authority, datetime.now(UTC))
        eventually(lambda: (trust / "ca.crt").read_bytes().count(b"BEGIN") == 2, "both roots")
        code, out, err = ended(process)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2


def test_a_directory_that_cannot_be_written_is_tried_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust, ready = tmp_path / "trust", tmp_path / "ready"
    script = (
        "import proxy.commands.pki.distributing as work, sys; work.AGAIN_S = 0.2\nfrom proxy.cli import main; main()"
    )
    command = ["pki", "distribute", "--pki", store, "--public", "none", "--to", "dir", trust, "--watch"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, command), "--ready-file", str(ready)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(ready.exists, "it is written")
        shutil.rmtree(trust)
        trust.write_bytes(b"in the way")
        with changing(store) as change:
            change.authority = stage_root(change.authority, datetime.now(UTC))
        assert process.stderr
        assert "it is tried again in 0.2 s" in process.stderr.readline()
        eventually(lambda: not ready.exists(), "it is not ready")
        trust.unlink()
        eventually(ready.exists, "it is written after all")
        assert (trust / "ca.crt").read_bytes().count(b"BEGIN") == 2
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0


# The example


def test_the_commands_of_the_example_are_understood() -> None:
    pods = [
        document["spec"]["template"]["spec"]
        for document in yaml.safe_load_all(EXAMPLE.read_text())
        if document and document["kind"] in ("Deployment", "Job")
    ]
    assert len(pods) == 2
    for pod in pods:
        (container,) = pod["containers"]
        assert container["command"] == ["outgate", "pki", "distribute"]
        context = distribute.make_context("distribute", list(container["args"]))
        assert isinstance(context, click.Context)
        mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
        assert context.params["roots"].parent in mounts
        if context.params["watch"]:
            assert container["readinessProbe"]["exec"]["command"] == ["test", "-f", str(context.params["ready_file"])]
            assert context.params["ready_file"].parent in mounts
