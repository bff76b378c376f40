"""The compiler as a process: what it says of files, and what is said when the process itself fails."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pki.authority import KeyKind, create_key, key_pem
from pki.rotation import stage_root
from pki.store import changing
from policies.engine import decide
from policies.hostnames import Hostname
from policies.model import Attempt, Reason, Stage
from proxy import own_code
from proxy.compiled import read_policy
from proxy.options import Misused, Unready
from proxy.service.compiler import MAX_LINES, Report, Request, compile_policy
from tests.proxy.rotating import key_of, new_store, renew_issuing

HEAD = "version: 1\nworkloads:\n  app:\n    rules:\n"
RULE = "      - host: api.example\n"
INSPECTED = "      - {host: api.example, tls: inspect}\n"
OTHER = "version: 1\nworkloads:\n  other:\n    rules: [{host: other.example}]\n"
USER = HEAD.replace("    rules:", "    match: {user: ann}\n    rules:") + RULE
TAGS = '{"values": [{"name": "Cloud", "properties": {"addressPrefixes": ["192.0.2.0/24"]}}]}'


def compiled(request: Request, **more: Any) -> tuple[Report, bool]:  # Any: what compile_policy takes
    """The report, and whether a policy came with it."""
    report, policy = asyncio.run(compile_policy(request, **more))
    if policy:
        policy.close()
    return report, policy is not None


def write(directory: Path, text: str, name: str = "policy.yaml") -> str:
    (directory / name).write_text(text)
    return str(directory / name)


def test_the_policy_that_comes_back_judges(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + RULE),))
    report, file = asyncio.run(compile_policy(request))
    assert file
    with file:
        policy = read_policy(file)

    assert policy.generation == report.generation
    reasons = [
        decide(policy, Attempt(Stage.TLS, "app", Hostname(name), 443)).reason for name in ("api.example", "no.example")
    ]
    assert reasons == [Reason.RULE, Reason.NO_RULE]


def test_the_order_of_files_makes_no_other_generation(tmp_path: Path) -> None:
    one, other = write(tmp_path, HEAD + RULE), write(tmp_path, OTHER, "other.yaml")
    first, _ = compiled(Request(paths=(one, other)))
    second, _ = compiled(Request(paths=(other, one, other)))

    assert first.generation == second.generation


@pytest.mark.parametrize("changed", ["policy.yaml", "other.yaml", "tags.json"])
def test_another_text_is_another_generation(tmp_path: Path, changed: str) -> None:
    paths = (write(tmp_path, HEAD + RULE), write(tmp_path, OTHER, "other.yaml"))
    request = Request(paths=paths, tags=(write(tmp_path, TAGS, "tags.json"),))
    before, _ = compiled(request)
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    after, _ = compiled(request)

    assert before.generation != after.generation


def test_a_policy_that_is_known_is_not_compiled_again(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + RULE),))
    report, has_policy = compiled(request)
    again, has_another = compiled(replace(request, known=report.generation))

    assert (has_policy, has_another) == (True, False)
    assert again.generation == report.generation


# Files, the request, and what is refused: with which error, and in which words.
REFUSED: dict[str, tuple[str, dict[str, object], type[Unready], str]] = {
    "no YAML": ("version: [1", {}, Unready, r"policy\.yaml:2:1: not YAML"),
    "a missing file": ("", {"paths": ("nowhere.yaml",)}, Unready, r"nowhere\.yaml:1:1: cannot be read: No such file"),
    "missing tags": (HEAD + RULE, {"tags": ("tags.json",)}, Unready, r"tags\.json:1:1: cannot be read"),
    "an unknown workload": (HEAD + RULE, {"workload": "ap"}, Misused, r'unknown workload "ap"; did you mean "app"\?'),
    "users where nobody can say who it is": (USER, {}, Unready, r"policy\.yaml:4:\d+: match: user needs a gate"),
    "pods": (
        USER.replace("user: ann", "kubernetes: {namespace: app}"), {"has_users": True}, Unready,
        r"policy\.yaml:4:\d+: match: kubernetes needs a gate that watches",
    ),
    "a budget": (
        HEAD + '      - udp: {host: a.example, ports: [5000], budget: "1/s"}\n', {}, Unready, r"budget",
    ),
    "no authority named": (HEAD + INSPECTED, {}, Unready, r"policy\.yaml:5 .* is inspected: give the .* --pki DIR"),
    "no authority there": (HEAD + INSPECTED, {"pki": "nowhere"}, Unready, r"nowhere.*outgate pki init"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    text, more, error, said = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    request = replace(Request(paths=(write(tmp_path, text),)), **more)  # type: ignore[arg-type]  # fields of several types
    with pytest.raises(Unready, match=said) as caught:
        compiled(request)

    assert type(caught.value) is error
    assert len(str(caught.value).splitlines()) == 1


def test_users_are_served_by_a_proxy_that_knows_credentials(tmp_path: Path) -> None:
    report, _ = compiled(Request(paths=(write(tmp_path, USER),), has_users=True))

    assert not report.inspects


def test_rules_of_another_workload_do_not_count(tmp_path: Path) -> None:
    paths = (write(tmp_path, HEAD + INSPECTED), write(tmp_path, OTHER, "other.yaml"))
    report, _ = compiled(Request(paths=paths, workload="other"))

    assert not report.inspects


@pytest.mark.parametrize(("says", "http2"), [("", False), (", http2: false", False), (", http2: true", True)])
def test_whether_a_rule_gives_http2_is_told(tmp_path: Path, says: str, http2: bool) -> None:
    """Only then does a process of mitmproxy's have to be there before the first connection."""
    path = write(tmp_path, HEAD + f"      - {{host: api.example, tls: inspect{says}}}\n")
    report, _ = compiled(Request(paths=(path,), pki=new_store(tmp_path)))

    assert (report.inspects, report.http2) == (True, http2)


def test_what_stays_closed_is_told(tmp_path: Path) -> None:
    report, _ = compiled(Request(paths=(write(tmp_path, HEAD + RULE + "      - ntp: time.example\n"),)))

    assert "policy.yaml:6:9: ntp is not carried by this gate: it stays closed; `outgate relay` gives" in report.closed


def test_a_thousand_problems_are_some_and_how_many_more(tmp_path: Path) -> None:
    text = HEAD + "".join(f"      - {{host: a{number}.example, por: {'x' * 2000}}}\n" for number in range(1000))
    with pytest.raises(Unready) as caught:
        compiled(Request(paths=(write(tmp_path, text),)))
    lines = str(caught.value).splitlines()

    assert len(lines) == MAX_LINES + 1
    assert lines[-1].startswith("… and ")


# --- the issuing CAs that come with it -----------------------------------------------------------------------------


def reloaded(request: Request, before: Report) -> tuple[Report, bool]:
    """As the next reload finds it, under what `before` reported."""
    assert before.issuers
    return compiled(replace(request, known=before.generation, issuers=before.issuers.public))


def test_the_authority_is_read_with_every_policy_and_told_where_it_is_another(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + INSPECTED),), pki=new_store(tmp_path))
    first, _ = compiled(request)
    same, _ = reloaded(request, first)
    renew_issuing(tmp_path / "pki")
    later, has_policy = reloaded(request, first)

    assert first.issuers
    assert "PRIVATE KEY" in first.issuers.text
    assert "PRIVATE KEY" not in repr(first)
    assert same.issuers is None
    assert later.issuers
    assert later.issuers.digest != first.issuers.digest
    assert (later.generation, has_policy, later.fault) == (first.generation, False, "")


def test_a_staged_root_changes_what_is_sent_and_so_the_issuers(tmp_path: Path) -> None:
    """Its cross certificate is for clients that trust the next root alone."""
    request = Request(paths=(write(tmp_path, HEAD + INSPECTED),), pki=new_store(tmp_path))
    first, _ = compiled(request)
    with changing(tmp_path / "pki") as change:
        change.authority = stage_root(change.authority, datetime.now(UTC))
    later, _ = reloaded(request, first)

    assert first.issuers
    assert later.issuers
    assert later.issuers.ids == first.issuers.ids
    assert later.issuers.text.count("BEGIN CERTIFICATE") > first.issuers.text.count("BEGIN CERTIFICATE")


def test_the_request_holds_no_key(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + INSPECTED),), pki=new_store(tmp_path))
    first, _ = compiled(request)
    assert first.issuers
    assert "KEY" not in str(asdict(replace(request, issuers=first.issuers.public)))


def test_new_issuing_cas_do_not_wait_for_a_policy_that_loads(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + INSPECTED),), pki=new_store(tmp_path))
    first, _ = compiled(request)
    renew_issuing(tmp_path / "pki")
    write(tmp_path, "version: [1")
    later, has_policy = reloaded(request, first)

    assert later.issuers
    assert "not YAML" in later.problems
    assert (later.generation, has_policy) == (first.generation, False)


# How a store becomes one that cannot be read, and what is said of it.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, r"state\.json"),
    "a key that others read": (lambda store: key_of(store).chmod(0o644), r"ca\.key.*chmod"),
    "half of a copy": (lambda store: key_of(store).unlink(), r"ca\.key"),
    "another's key": (lambda store: key_of(store).write_bytes(key_pem(create_key(KeyKind.EC_P256))), r"not the key"),
    "no state": (lambda store: (store / "state.json").write_text("{}"), r"state\.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_store_that_cannot_be_read_holds_no_policy_up(tmp_path: Path, case: str) -> None:
    break_store, said = BROKEN[case]
    request = Request(paths=(write(tmp_path, HEAD + INSPECTED),), pki=new_store(tmp_path))
    first, _ = compiled(request)
    break_store(tmp_path / "pki")
    write(tmp_path, HEAD + INSPECTED + RULE.replace("api", "other"))
    later, has_policy = reloaded(request, first)

    assert has_policy
    assert later.issuers is None
    assert re.search(said, later.fault), later.fault


@pytest.mark.parametrize("case", BROKEN)
def test_no_gate_starts_on_a_store_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    """Also where nothing is inspected yet: the next policy may."""
    break_store, said = BROKEN[case]
    request = Request(paths=(write(tmp_path, HEAD + RULE),), pki=new_store(tmp_path))
    break_store(tmp_path / "pki")
    with pytest.raises(Unready, match=said):
        compiled(request)


LEFT_OUT = r'policy\.yaml:5:.* "api\.example" is inspected, and the constraints .* outgate pki rotate issuing'


def test_no_gate_starts_whose_leaves_no_client_would_accept(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + INSPECTED),), pki=new_store(tmp_path, "other.example"))
    with pytest.raises(Unready, match=LEFT_OUT):
        compiled(request)


def test_a_policy_whose_names_the_issuing_ca_may_not_sign_is_refused(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + RULE),), pki=new_store(tmp_path, "other.example"))
    first, _ = compiled(request)
    write(tmp_path, HEAD + INSPECTED)
    with pytest.raises(Unready, match=LEFT_OUT):
        reloaded(request, first)


def test_an_issuing_ca_that_may_not_sign_for_the_policy_is_refused(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + INSPECTED),), pki=new_store(tmp_path))
    first, _ = compiled(request)
    renew_issuing(tmp_path / "pki", permitted=["other.example"])
    later, _ = reloaded(request, first)
    assert later.issuers is None
    assert re.search(LEFT_OUT, later.fault)

    write(tmp_path, HEAD + RULE)
    both, has_policy = reloaded(request, first)
    assert has_policy
    assert both.issuers
    assert both.issuers.constraints == (("other.example",),)


def test_an_issuing_ca_that_may_sign_less_waits_for_a_policy_that_loads(tmp_path: Path) -> None:
    request = Request(paths=(write(tmp_path, HEAD + INSPECTED),), pki=new_store(tmp_path))
    first, _ = compiled(request)
    renew_issuing(tmp_path / "pki", permitted=["api.example"])
    write(tmp_path, "version: [1")
    with pytest.raises(Unready, match="not YAML"):
        reloaded(request, first)


# What runs instead of the compiler, and what is said of it.
FAILING: dict[str, tuple[str, str]] = {
    "crashes": ("import os; os.abort()", r"ended without a word, with status -6"),
    "ends": ("raise SystemExit(3)", r"ended without a word, with status 3"),
    "hangs": ("import time; time.sleep(60)", r"could not be compiled within 0\.5 s"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_compiler_that_fails_is_a_policy_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    code, said = FAILING[case]
    processes: list[subprocess.Popen[bytes]] = []

    def run_instead(_module: str, *_arguments: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", code]

    monkeypatch.setattr(own_code, "command", run_instead)
    start = subprocess.Popen

    def keep(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:  # Any: whatever Popen takes
        processes.append(start(*arguments, **more))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", keep)
    deadline_s = 0.5 if case == "hangs" else 20.0
    with pytest.raises(Unready, match=said):
        compiled(Request(paths=(write(tmp_path, HEAD + RULE),)), deadline_s=deadline_s)

    assert [process.returncode is not None for process in processes] == [True]
