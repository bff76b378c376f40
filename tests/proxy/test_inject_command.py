"""`outgate inject` and `outgate webhook` as they are typed; what their page lists is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from proxy.cli import outgate
from proxy.commands.inject import inject
from proxy.commands.webhook import webhook
from proxy.injection.model import ANNOTATIONS, INJECTED, TRUST_DIGEST
from proxy.injection.refusals import DROPPED, HARMLESS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "injection.md").read_text()
IMAGE = ["--image", "outgate:1"]
POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: weather}\nspec: {containers: [{name: app, image: app}]}\n"
SHARED = (
    "apiVersion: v1\nkind: Pod\nmetadata: {name: agent}\nspec: {hostNetwork: true, containers: [{name: a, image: a}]}\n"
)


def typed(*words: str, says: str = "") -> tuple[int, str, str]:
    done = CliRunner().invoke(outgate, ["inject", *words], input=says, env={"OUTGATE_IMAGE": ""})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_several_documents_come_out_in_their_order_and_others_as_they_are() -> None:
    service = 'apiVersion: v1\nkind: Service\nmetadata: {name: s, annotations: {since: 2026-11-23, text: "a\\nb\\n"}}\n'
    code, out, _ = typed(*IMAGE, "-f", "-", says=f"# a comment\n{service}---\n---\n{POD}")
    assert code == 0
    first, second = yaml.safe_load_all(out)
    assert first["metadata"]["annotations"] == {"since": "2026-11-23", "text": "a\nb\n"}
    assert [one["name"] for one in second["spec"]["initContainers"]] == ["outgate-firewall", "outgate-gate"]
    assert "#" not in out
    assert "&id" not in out


def test_what_comes_out_goes_in_again(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(POD)
    once = typed(*IMAGE, "-f", str(tmp_path / "pod.yaml"))[1]
    assert typed(*IMAGE, "-f", "-", says=once) == (0, once, "")


def test_of_files_of_which_one_cannot_be_guarded_nothing_is_printed() -> None:
    code, out, err = typed(*IMAGE, "-f", "-", says=f"{POD}---\n{SHARED}---\n{SHARED.replace('agent', 'other')}")
    assert (code, out) == (1, "")
    assert [line.partition(" spec.")[0] for line in err.splitlines()] == [
        "outgate: Pod/agent:",
        "outgate: Pod/other:",
    ]


def test_what_the_author_should_know_is_said_beside_it() -> None:
    kept = POD.replace("image: app}", "image: app, env: [{name: SSL_CERT_FILE, value: /mine}]}")
    code, out, err = typed(*IMAGE, "-f", "-", says=kept)
    assert (code, bool(out)) == (0, True)
    assert err.startswith("outgate: Pod/weather: spec.containers[0].env: SSL_CERT_FILE is kept")


UNREADABLE = {
    "no YAML": ("a: [", "while parsing"),
    "a tag of Python's": ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
    "no object": ("- a", "a document that is no object"),
    "no text": ("\x00", "unacceptable character"),
    "nested without end": ("[" * 100_000, "line 1: nested deeper than 100"),
    "an alias": ("a: &x [1]\nb: *x\n", "line 2: an alias; write out what it stands for"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_said_in_a_line(name: str) -> None:
    content, says = UNREADABLE[name]
    code, out, err = typed(*IMAGE, "-f", "-", says=content)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert says in err


def test_a_file_that_is_missing_is_said(tmp_path: Path) -> None:
    assert (
        typed(*IMAGE, "-f", str(tmp_path / "none"))[2] == f"outgate: {tmp_path / 'none'}: No such file or directory\n"
    )


USAGE = {
    "no file": IMAGE,
    "file and policy": [*IMAGE, "-f", "-", "--admission-policy"],
    "no image": ["-f", "-"],
    "image with a space": ["--image", "a b", "-f", "-"],
    "ConfigMap": [*IMAGE, "--policy-config-map", "A B", "-f", "-"],
    "key": [*IMAGE, "--policy-key", "../x", "-f", "-"],
    "path": [*IMAGE, "--trust-path", "/etc/$(HOME)", "-f", "-"],
    "resolver": [*IMAGE, "--cluster-dns", "dns", "-f", "-"],
    "root": [*IMAGE, "--gate-uid", "0", "-f", "-"],
    "label": [*IMAGE, "--label", "a b", "-f", "-"],
}


@pytest.mark.parametrize("name", USAGE)
def test_what_cannot_be_meant_is_a_usage_error(name: str) -> None:
    assert typed(*USAGE[name], says=POD)[0] == 2


def test_admission_policies_are_printed() -> None:
    kinds = [one["kind"] for one in yaml.safe_load_all(typed(*IMAGE, "--admission-policy")[1])]
    assert kinds == [
        "MutatingAdmissionPolicy",
        "ValidatingAdmissionPolicy",
        "MutatingAdmissionPolicyBinding",
        "ValidatingAdmissionPolicyBinding",
    ]


def test_a_webhook_without_a_certificate_does_not_start(tmp_path: Path) -> None:
    done = CliRunner().invoke(webhook, [*IMAGE, "--listen", "127.0.0.1:0", "--tls-dir", str(tmp_path)])
    assert done.exit_code == 3
    assert "tls.crt: No such file or directory" in done.stderr


def test_a_webhook_is_not_told_nonsense(tmp_path: Path) -> None:
    assert CliRunner().invoke(webhook, [*IMAGE, "--listen", "here", "--tls-dir", str(tmp_path)]).exit_code == 2


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [inject, webhook], ids=lambda command: command.name)
def test_every_flag_is_on_the_page(command: click.Command) -> None:
    flags = [parameter.opts for parameter in command.params if isinstance(parameter, click.Option)]
    named = [[*each.opts, *each.secondary_opts] for each in command.params if isinstance(each, click.Option)]
    assert flags
    assert [each for each in named if not any(f"`{one}`" in PAGE for one in each) and each != ["--help", "-h"]] == []


def test_every_annotation_and_every_capability_is_on_the_page() -> None:
    assert [name for name in ANNOTATIONS if f"`{name}`" not in PAGE and name != TRUST_DIGEST] == []
    assert INJECTED in PAGE
    assert [name for name in (*HARMLESS, *DROPPED) if name not in PAGE] == []


def test_every_test_on_the_page_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    there = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*inject*.py"))
    there += "".join((ROOT / "tests" / name).read_text() for name in ("proxy/test_webhook.py", "pki/test_serving.py"))
    assert {name for name in named if f"def {name}(" not in there} == set()
    assert len(named) > 10
