"""`outgate pki rotate`: each step through the command line, what it says, what it refuses, what it leaves on disk."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509 import Certificate

from pki.authority import Authority, KeyKind, State, certificate_id, create_authority, create_key, issue_leaf, key_pem
from pki.constraints import permitted_domains
from pki.rotation import activate_root, stage_root
from pki.store import load, load_issuers, load_trusted, save
from tests.pki.clients import program
from tests.pki.oracle import is_trusted, openssl_refusal
from tests.proxy.commands_of import invoke

NOW = datetime.now(UTC)
POLICY = "version: 1\nworkloads: {app: {rules: [{host: api.example, tls: inspect}]}}\n"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return new_store(tmp_path / "pki")


def new_store(directory: Path, *, at: datetime = NOW, permitted: tuple[str, ...] = ()) -> Path:
    save(create_authority(at, permitted=permitted), directory)
    return directory


def rotate(store: Path, *words: str) -> dict[str, Any]:  # Any: JSON
    """What the step tells as JSON; it must succeed."""
    result = invoke("pki", "rotate", *words, "--pki", str(store), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert isinstance(told, dict)
    return told


def refused(store: Path, *words: str, code: int) -> str:
    """The one line of a step that must not be taken, and changes nothing."""
    before = (store / "state.json").read_bytes()
    result = invoke("pki", "rotate", *words, "--pki", str(store))
    assert (result.exit_code, result.stdout) == (code, "")
    assert (store / "state.json").read_bytes() == before
    return result.stderr


def states(authority: Authority) -> list[list[State]]:
    return [[ca.state for ca in cas] for cas in (authority.roots, authority.issuing)]


def take_root_key(store: Path, to: Path) -> Path:
    (key,) = (store / "roots").glob("*/ca.key")
    key.rename(to)
    return to


# Issuing CAs


def test_an_issuing_ca_is_replaced_in_one_go(store: Path) -> None:
    before = load(store)
    told = rotate(store, "issuing")
    after = load(store)
    assert states(after) == [[State.ACTIVE], [State.RETIRING, State.ACTIVE]]
    assert after.issuer.certificate != before.issuer.certificate
    assert is_trusted(after.issuer, *before.trusted, at=datetime.now(UTC))
    assert told["steps"] == ["stage", "activate"]
    assert told["clients"] == "leaves of the new issuing CA, whose root they trust already"


def test_it_may_be_staged_first_and_forgotten_again(store: Path) -> None:
    issuer = load(store).issuer.certificate
    assert rotate(store, "issuing", "--stage")["clients"] == "nothing new"
    assert load(store).issuer.certificate == issuer
    gone = rotate(store, "issuing", "--unstage")
    assert len(gone["keys_deleted"]) == 1
    assert states(load(store)) == [[State.ACTIVE], [State.ACTIVE]]
    rotate(store, "issuing", "--stage")
    rotate(store, "issuing", "--activate")
    assert load(store).issuer.certificate != issuer


def test_retiring_deletes_the_key_it_names_and_keeps_the_certificate(store: Path) -> None:
    former = store / "issuing" / certificate_id(load(store).issuer.certificate)
    rotate(store, "issuing")
    assert (former / "ca.key").exists()
    told = rotate(store, "issuing", "--retire")
    assert told["keys_deleted"] == [str(former / "ca.key")]
    assert not (former / "ca.key").exists()
    assert (former / "ca.crt").exists()
    (gone,) = told["changed"]
    assert (gone["was"], gone["state"], gone["key"], gone["key_is"]) == ("retiring", "gone", None, "deleted")


def test_the_next_one_is_limited_as_the_present_one_unless_otherwise_said(tmp_path: Path) -> None:
    store = new_store(tmp_path / "pki", permitted=("old.example",))
    (tmp_path / "policy.yaml").write_text(POLICY)
    found = []
    for words in ([], ["--constrain-to", str(tmp_path / "policy.yaml")], ["--no-constraints"]):
        rotate(store, "issuing", *words)
        rotate(store, "issuing", "--retire")
        found.append(permitted_domains(load(store).issuer.certificate))
    assert found == [("old.example",), ("api.example",), None]


def test_the_next_one_lives_as_long_as_the_present_one_unless_otherwise_said(tmp_path: Path) -> None:
    save(create_authority(NOW, issuing_life=timedelta(days=30)), tmp_path / "pki")
    spans = []
    for words in ([], ["--issuing-days", "90"]):
        rotate(tmp_path / "pki", "issuing", *words)
        rotate(tmp_path / "pki", "issuing", "--retire")
        certificate = load(tmp_path / "pki").issuer.certificate
        spans.append(round((certificate.not_valid_after_utc - certificate.not_valid_before_utc) / timedelta(days=1)))
    assert spans == [30, 90]


def test_an_issuing_key_is_the_next_ones(store: Path, tmp_path: Path) -> None:
    key = create_key(KeyKind.EC_P256)
    file = tmp_path / "next.key"
    file.write_bytes(key_pem(key))
    file.chmod(0o600)
    rotate(store, "issuing", "--issuing-key", str(file))
    assert load_issuers(store)[0].certificate.public_key() == key.public_key()


# Roots


def test_a_root_is_replaced_in_three_steps_and_old_and_new_clients_go_on(store: Path) -> None:
    old = load_trusted(store)
    told = rotate(store, "root", "--stage")
    new = tuple(certificate for certificate in load_trusted(store) if certificate not in old)
    assert told["clients"] == "the same leaves, and accept them with the old root, the new one or both"
    accepted = [[is_trusted(load_issuers(store)[0], *roots, at=NOW) for roots in (old, new, (*old, *new))]]
    rotate(store, "root", "--activate")
    accepted.append([is_trusted(load_issuers(store)[0], *roots, at=NOW) for roots in (old, new, (*old, *new))])
    rotate(store, "root", "--retire", "--force")
    accepted.append([is_trusted(load_issuers(store)[0], *roots, at=NOW) for roots in (old, new, (*old, *new))])
    assert accepted == [[True, True, True], [True, True, True], [False, True, True]]
    assert load_trusted(store) == new


def test_a_root_is_not_retired_before_workloads_have_learnt_the_next(store: Path) -> None:
    rotate(store, "root", "--stage")
    rotate(store, "root", "--activate")
    said = refused(store, "root", "--retire", code=1)
    since = load(store).roots[0].since
    assert since is not None
    assert said.count("\n") == 1
    assert f"possible from {since + timedelta(days=7):%Y-%m-%d %H:%M} UTC, or at once with --force\n" in said


def test_a_week_later_it_is_retired_without_force(tmp_path: Path) -> None:
    then = NOW - timedelta(days=8)
    save(activate_root(stage_root(create_authority(then), then), then), tmp_path / "pki")
    keys = sorted(map(str, (tmp_path / "pki").glob("*/*/ca.key")))
    told = rotate(tmp_path / "pki", "root", "--retire")
    left = sorted(map(str, (tmp_path / "pki").glob("*/*/ca.key")))
    assert sorted([*left, *told["keys_deleted"]]) == keys
    assert len(left) == 2


def test_a_root_is_forgotten_while_it_is_staged(store: Path) -> None:
    old = load_trusted(store)
    rotate(store, "root", "--stage")
    rotate(store, "root", "--unstage")
    assert load_trusted(store) == old
    assert "no root is staged" in refused(store, "root", "--unstage", code=1)


def test_who_forgets_an_issuing_ca_does_not_lose_a_root(store: Path) -> None:
    rotate(store, "root", "--stage")
    rotate(store, "issuing", "--stage")
    assert "run: outgate pki rotate root --unstage" in refused(store, "issuing", "--unstage", code=1)


def test_the_new_root_lives_as_long_as_the_old_one_unless_otherwise_said(tmp_path: Path) -> None:
    years = []
    for name, words in (("a", []), ("b", ["--root-years", "2"])):
        save(create_authority(NOW, root_years=5), tmp_path / name)
        rotate(tmp_path / name, "root", "--stage", *words)
        end = load_trusted(tmp_path / name)[-1].not_valid_after_utc
        years.append(round((end - NOW) / timedelta(days=365.25)))
    assert years == [5, 2]


def test_what_is_below_the_new_root_keeps_constraints_life_and_key_place(tmp_path: Path) -> None:
    save(create_authority(NOW, issuing_life=timedelta(days=30), permitted=["old.example"]), tmp_path / "pki")
    key = create_key(KeyKind.EC_P256)
    (tmp_path / "next.key").write_bytes(key_pem(key))
    (tmp_path / "next.key").chmod(0o600)
    rotate(tmp_path / "pki", "root", "--stage")
    rotate(tmp_path / "pki", "root", "--activate", "--issuing-key", str(tmp_path / "next.key"))
    certificate = load(tmp_path / "pki").issuer.certificate
    assert permitted_domains(certificate) == ("old.example",)
    assert certificate.not_valid_after_utc - NOW < timedelta(days=31)
    assert certificate.public_key() == key.public_key()


def test_what_is_staged_is_not_made_anew_by_options_that_come_later(store: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    rotate(store, "root", "--stage")
    rotate(store, "issuing", "--stage", "--constrain-to", str(tmp_path / "policy.yaml"))
    said = refused(store, "root", "--activate", "--no-constraints", code=1)
    assert "an issuing CA is staged already" in said
    rotate(store, "root", "--activate")
    assert permitted_domains(load(store).issuer.certificate) == ("api.example",)


# Offline roots


def test_an_offline_root_signs_only_with_its_key_lent_which_stays_out_of_the_store(store: Path, tmp_path: Path) -> None:
    offline = take_root_key(store, tmp_path / "offline.key")
    said = refused(store, "issuing", code=3)
    assert said.count("\n") == 1
    assert "has no key here" in said
    assert "or lend it with --root-key" in said
    rotate(store, "issuing", "--root-key", str(offline))
    assert load(store).roots[0].key is None
    assert list((store / "roots").glob("*/ca.key")) == []


def test_an_offline_root_is_replaced_by_an_offline_root(store: Path, tmp_path: Path) -> None:
    old = take_root_key(store, tmp_path / "old.key")
    new = tmp_path / "new.key"
    rotate(store, "root", "--stage", "--root-key", str(old), "--new-root-key", str(new))
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    assert "has no key here" in refused(store, "root", "--activate", code=3)
    rotate(store, "root", "--activate", "--root-key", str(new))
    rotate(store, "root", "--retire", "--force")
    assert list((store / "roots").glob("*/ca.key")) == []
    assert is_trusted(load(store).issuer, *load_trusted(store), at=datetime.now(UTC))


def test_a_lost_root_key_is_done_without_and_the_new_root_waits_for_the_bundle(store: Path, tmp_path: Path) -> None:
    old = load_trusted(store)
    take_root_key(store, tmp_path / "lost.key").unlink()
    told = rotate(store, "root", "--stage", "--no-cross")
    assert told["clients"] == "the same leaves, and accept them with the old root or both"
    assert "possible from" in refused(store, "root", "--activate", code=1)
    told = rotate(store, "root", "--activate", "--force")
    assert told["clients"] == "leaves below the new root, and accept them with the new root or both"
    issuer = load(store).issuer
    assert not is_trusted(issuer, *old, at=NOW)
    assert is_trusted(issuer, *load_trusted(store), at=NOW)


def test_a_key_of_no_root_here_is_refused(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.key"
    file.write_bytes(key_pem(create_key(KeyKind.EC_P256)))
    file.chmod(0o600)
    take_root_key(store, tmp_path / "offline.key")
    said = refused(store, "issuing", "--root-key", str(file), code=3)
    assert "the key is of no root here" in said
    assert said.count("\n") == 1


def test_where_the_store_cannot_be_written_no_new_root_key_is_left(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(store / "state.json"))

    monkeypatch.setattr("pki.store_writing.write_file", full)
    said = refused(store, "root", "--stage", "--new-root-key", str(tmp_path / "new.key"), code=3)
    assert "make room there" in said
    assert not (tmp_path / "new.key").exists()


def test_a_write_that_fails_at_its_very_end_does_not_lose_the_new_roots_only_key(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(store))

    monkeypatch.setattr("pki.store_writing._settle", full)
    result = invoke(
        "pki", "rotate", "root", "--stage", "--new-root-key", str(tmp_path / "new.key"), "--pki", str(store)
    )
    assert result.exit_code == 3
    assert len(load_trusted(store)) == 2
    assert (tmp_path / "new.key").exists()


def test_a_gate_never_holds_a_roots_key(store: Path, tmp_path: Path) -> None:
    """Not as the issuing CA's, and not as a root's that was an issuing CA's before."""
    root = take_root_key(store, tmp_path / "root.key")
    said = refused(store, "issuing", "--root-key", str(root), "--issuing-key", str(root), code=3)
    assert "an issuing CA with the key of root" in said
    (issuing,) = (store / "issuing").glob("*/ca.key")
    said = refused(store, "root", "--stage", "--root-key", str(root), "--new-root-key", str(issuing), code=3)
    assert "the new root would have the key of an issuing CA, which gates hold" in said


def test_the_old_key_file_is_not_overwritten_by_the_new_roots(store: Path, tmp_path: Path) -> None:
    old = take_root_key(store, tmp_path / "old.key")
    before = old.read_bytes()
    refused(store, "root", "--stage", "--root-key", str(old), "--new-root-key", str(old), code=3)
    assert old.read_bytes() == before


# What is refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["issuing", "--activate"], "no issuing CA is staged; stage one first"),
        (["issuing", "--retire"], "no issuing CA is retiring"),
        (["issuing", "--unstage"], "nothing is staged"),
        (["root", "--activate"], "no root is staged; stage one first"),
        (["root", "--retire"], "no root is retiring"),
        (["root", "--retire", "--force"], "no root is retiring"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_step_out_of_turn_is_exit_1(words: list[str], expected: str, store: Path) -> None:
    assert refused(store, *words, code=1) == f"outgate: {store}: {expected}\n"


def test_a_second_rotation_waits_for_the_first(store: Path) -> None:
    rotate(store, "issuing")
    assert "is retiring already; retire it first" in refused(store, "issuing", code=1)
    rotate(store, "root", "--stage")
    assert "is staged already" in refused(store, "root", "--stage", code=1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["root"], "a root is replaced in three steps: --stage"),
        (["issuing", "--stage", "--activate"], "one step at a time: --stage or --activate"),
        (["issuing", "--force"], "--force has no meaning for rotate issuing"),
        (["root", "--stage", "--force"], "--force has no meaning for rotate root --stage"),
        (["root", "--stage", "--constrain-to", "p"], "--constrain-to has no meaning for rotate root --stage"),
        (["issuing", "--retire", "--root-key", "k"], "--root-key has no meaning for rotate issuing --retire"),
        (["issuing", "--constrain-to", "p", "--no-constraints"], "say the opposite"),
        (["leaf"], "'leaf' is not one of 'issuing', 'root'"),
        ([], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_exit_2(words: list[str], expected: str, store: Path) -> None:
    assert expected in refused(store, *words, code=2)


def test_tags_of_the_environment_are_no_option_given(store: Path) -> None:
    result = invoke("pki", "rotate", "root", "--stage", "--pki", str(store), env={"OUTGATE_TAGS": "/nowhere.json"})
    assert result.exit_code == 0


def test_without_a_store_it_says_how_to_make_one(tmp_path: Path) -> None:
    result = invoke("pki", "rotate", "issuing", "--pki", str(tmp_path))
    assert result.exit_code == 3
    assert f"make an authority with 'outgate pki init --pki {tmp_path}'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_inspects_nothing_changes_nothing(store: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("version: 1\nworkloads: {app: {rules: [{host: a.example}]}}\n")
    said = refused(store, "issuing", "--constrain-to", str(tmp_path / "policy.yaml"), code=2)
    assert "no rule is inspected" in said


# What it says


def test_no_key_is_printed(store: Path) -> None:
    for words in (["issuing"], ["root", "--stage"], ["issuing", "--retire"], ["root", "--activate"]):
        for as_json in ([], ["--json"]):
            result = invoke("pki", "rotate", *words, "--pki", str(store), *as_json)
            assert "PRIVATE" not in result.output


def test_a_person_reads_what_changed_what_clients_see_and_what_comes_next(store: Path) -> None:
    invoke("pki", "rotate", "root", "--stage", "--pki", str(store))
    said = invoke("pki", "rotate", "root", "--activate", "--pki", str(store)).stdout
    before, after = load(store).issuing
    assert re.search(rf"issuing +{certificate_id(before.certificate)} .*\(was active, retiring now\)", said)
    assert re.search(rf"issuing +{certificate_id(after.certificate)} .*\(new, active\)", said)
    assert "clients see leaves below the new root, and accept them with the old root, the new one or both\n" in said
    assert re.search(rf"from \d{{4}}-\d\d-\d\d \d\d:\d\d UTC +outgate pki rotate root --retire --pki {store}", said)
    (key,) = re.findall(r"mv (\S+) OFFLINE\n", said)
    assert Path(key) == store / "roots" / certificate_id(load(store).roots[1].certificate) / "ca.key"


def test_staging_says_to_publish_the_bundle_and_the_command_to_go_on(store: Path) -> None:
    said = invoke("pki", "rotate", "root", "--stage", "--pki", str(store)).stdout
    assert f"publish it:\n  outgate trust bundle --pki {store} --to TRUST\n" in said
    assert re.search(rf"now +outgate pki rotate root --activate --pki {store}", said)


def test_an_offline_key_that_retires_is_said_to_be_left(store: Path, tmp_path: Path) -> None:
    old = take_root_key(store, tmp_path / "old.key")
    rotate(store, "root", "--stage", "--root-key", str(old))
    rotate(store, "root", "--activate")
    said = invoke("pki", "rotate", "root", "--retire", "--force", "--pki", str(store)).stdout
    assert "its key was not here and is not deleted: offline\n" in said
    assert old.exists()


def test_both_lines_rotate_together(tmp_path: Path) -> None:
    save(create_authority(NOW, with_rsa=True), tmp_path / "pki")
    told = rotate(tmp_path / "pki", "issuing")
    assert [(ca["line"], ca["was"], ca["state"]) for ca in told["changed"]] == [
        ("main", "active", "retiring"),
        ("rsa", "active", "retiring"),
        ("main", None, "active"),
        ("rsa", None, "active"),
    ]
    commands = [task["command"] for task in told["next"]]
    assert len(commands) == len(set(commands))


# As a program


@pytest.mark.client
def test_openssl_accepts_every_step_of_a_rotation_with_every_root_that_it_should(tmp_path: Path) -> None:
    """The whole walk as a person types it, judged by `openssl verify -x509_strict`."""
    program("openssl")
    store = tmp_path / "pki"

    def outgate(*words: str) -> None:
        command = [sys.executable, "-m", "proxy", "pki", *words, "--pki", str(store)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")

    def accepted(*roots: tuple[Certificate, ...]) -> list[bool]:
        now = datetime.now(UTC)
        leaf = issue_leaf(load_issuers(store)[0], "api.example", now)
        return [not openssl_refusal(leaf, *some, at=now, folder=tmp_path) for some in roots]

    outgate("init")
    old = load_trusted(store)
    outgate("rotate", "issuing")
    assert accepted(old) == [True]
    outgate("rotate", "issuing", "--retire")
    assert accepted(old) == [True]
    outgate("rotate", "root", "--stage")
    new = tuple(certificate for certificate in load_trusted(store) if certificate not in old)
    assert accepted(old, new, (*old, *new)) == [True, True, True]
    outgate("rotate", "root", "--activate")
    assert accepted(old, new, (*old, *new)) == [True, True, True]
    outgate("rotate", "root", "--retire", "--force")
    assert accepted(old, new, (*old, *new)) == [False, True, True]
    outgate("status")
