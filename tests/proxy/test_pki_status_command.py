"""`outgate pki status`: every CA, what is to be done when, and an exit code for a daily job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from pki.authority import Authority, Line, certificate_id, create_authority, create_issuing, fingerprint
from pki.rotation import activate_issuing, activate_root, retire_issuing, stage_issuing, stage_root
from pki.store import load, save
from proxy.commands.pki import COMMANDS
from tests.proxy.commands_of import invoke
from tests.sandbox_user import as_user

ROOT = Path(__file__).parents[2]
NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def stored(authority: Authority, directory: Path) -> Path:
    save(authority, directory)
    return directory


def status(directory: Path) -> dict[str, Any]:  # Any: JSON
    """What it tells as JSON, whatever its exit code, which must agree."""
    result = invoke("pki", "status", "--pki", str(directory), "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if told["ok"] else 1)
    assert isinstance(told, dict)
    return told


def todo(told: dict[str, Any]) -> list[tuple[str, bool]]:  # Any: JSON
    return [(re.sub(r"outgate pki | --pki \S+", "", task["command"]), task["overdue"]) for task in told["todo"]]


def at_step(name: str, then: datetime) -> Authority:
    """An authority whose rotation came to this step at `then`."""
    made = create_authority(min(then, NOW - DAY))
    match name:
        case "issuing staged":
            return stage_issuing(made, then)
        case "issuing active":
            return activate_issuing(stage_issuing(made, then), then)
        case "root staged":
            return stage_root(made, then)
        case "root active":
            return activate_root(stage_root(made, then), then)
    return made


def test_every_ca_is_told_with_all_that_tells_it_from_another(tmp_path: Path) -> None:
    authority = activate_root(stage_root(create_authority(NOW, permitted=["a.example"]), NOW), NOW)
    told = status(stored(authority, tmp_path))
    old, new, former, present = told["cas"]
    assert [(ca["role"], ca["line"], ca["state"]) for ca in told["cas"]] == [
        ("root", "main", "retiring"),
        ("root", "main", "active"),
        ("issuing", "main", "retiring"),
        ("issuing", "main", "active"),
    ]
    for ca, certificate in ((new, authority.trusted[1]), (present, authority.issuer.certificate)):
        assert ca["id"] == certificate_id(certificate)
        assert ca["sha256"] == fingerprint(certificate)
        assert ca["subject"] == certificate.subject.rfc4514_string()
        assert datetime.fromisoformat(ca["expires"]) == certificate.not_valid_after_utc
        assert x509.load_pem_x509_certificate(Path(ca["certificate"]).read_bytes()) == certificate
        assert Path(ca["key"]).exists()
        assert ca["key_is"] == "file"
    assert new["days_left"] in (3651, 3652)
    assert new["permitted"] is None
    assert present["permitted"] == former["permitted"] == ["a.example"]
    assert [[cross["signed_by"] for cross in root["crosses"]] for root in (old, new)] == [[new["id"]], [old["id"]]]


def test_a_person_reads_the_same(tmp_path: Path) -> None:
    directory = stored(create_authority(NOW, permitted=["a.example", "b.example"]), tmp_path / "pki")
    said = invoke("pki", "status", "--pki", str(directory)).stdout
    for ca in status(directory)["cas"]:
        for fact in ("id", "subject", "sha256", "key"):
            assert ca[fact] in said
        assert f"expires {datetime.fromisoformat(ca['expires']):%Y-%m-%d %H:%M} UTC, in" in said
        assert f", in {ca['days_left']} days\n" in said
    assert "only for a.example, b.example and what is below\n" in said
    assert re.search(rf"from \d{{4}}-\d\d-\d\d \d\d:\d\d UTC +outgate pki rotate issuing --pki {directory} ", said)


def test_an_offline_root_and_a_ca_given_away_are_told(tmp_path: Path) -> None:
    directory = tmp_path / "pki"
    assert invoke("pki", "init", "--pki", str(directory), "--root-key", str(tmp_path / "root.key")).exit_code == 0
    root = load(directory).roots[0]
    given = create_issuing(create_authority(NOW).roots[0], NOW, name="Firewall").certificate
    save(Authority((root,), load(directory).issuing, (given,)), directory, overwrite=True)
    told = status(directory)
    assert (told["cas"][0]["key"], told["cas"][0]["key_is"]) == (None, "offline")
    assert told["cas"][-1] == {
        "role": "given",
        "id": certificate_id(given),
        "subject": given.subject.rfc4514_string(),
        "sha256": fingerprint(given),
        "expires": f"{given.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        "days_left": told["cas"][-1]["days_left"],
    }
    said = invoke("pki", "status", "--pki", str(directory)).stdout
    assert "key offline: not in this directory\n" in said
    assert f"given    {certificate_id(given)}" in said
    assert re.search(r"outgate pki rotate issuing --pki \S+ --root-key FILE ", said)


@pytest.mark.parametrize(
    ("step", "age", "expected", "ok"),
    [
        ("made", 0, ("rotate issuing", False), True),
        ("made", 240, ("rotate issuing", False), True),
        ("made", 252, ("rotate issuing", True), False),
        ("made", 366, ("rotate issuing", True), False),
        ("issuing staged", 0, ("rotate issuing --activate", False), True),
        ("issuing staged", 8, ("rotate issuing --activate", True), False),
        ("issuing active", 0, ("rotate issuing --retire", False), True),
        ("issuing active", 8, ("rotate issuing --retire", True), False),
        ("root staged", 0, ("rotate root --activate", False), True),
        ("root staged", 8, ("rotate root --activate", True), False),
    ],
    ids=lambda value: f"{value} days" if isinstance(value, int) and not isinstance(value, bool) else None,
)
def test_what_comes_next_and_whether_it_is_overdue(
    step: str, age: int, expected: tuple[str, bool], ok: bool, tmp_path: Path
) -> None:
    told = status(stored(at_step(step, NOW - age * DAY), tmp_path))
    assert (todo(told)[0], told["ok"]) == (expected, ok)


@pytest.mark.parametrize(("age", "overdue"), [(0, False), (8, False), (15, True)], ids=["at once", "8 days", "15 days"])
def test_a_root_is_to_be_retired_a_week_after_the_next_one_is_active(age: int, overdue: bool, tmp_path: Path) -> None:
    then = NOW - age * DAY
    told = status(stored(retire_issuing(at_step("root active", then)), tmp_path))
    (retire,) = [task for task in told["todo"] if " root --retire " in task["command"]]
    assert datetime.fromisoformat(retire["start"]) == (then + 7 * DAY).replace(microsecond=0)
    assert (retire["overdue"], told["ok"]) == (overdue, not overdue)


def test_what_is_due_reads_now_and_what_was_forgotten_reads_overdue(tmp_path: Path) -> None:
    due = stored(at_step("root staged", NOW), tmp_path / "due")
    overdue = stored(at_step("root staged", NOW - 8 * DAY), tmp_path / "overdue")
    assert re.search(
        r"^  now +outgate pki rotate root --activate", invoke("pki", "status", "--pki", str(due)).stdout, re.M
    )
    forgotten = invoke("pki", "status", "--pki", str(overdue))
    assert forgotten.exit_code == 1
    assert re.search(rf"^  overdue since {NOW - 8 * DAY:%Y-%m-%d} +outgate pki rotate root", forgotten.stdout, re.M)


def test_an_expired_ca_is_exit_1_and_says_which(tmp_path: Path) -> None:
    authority = create_authority(NOW - 400 * DAY)
    result = invoke("pki", "status", "--pki", str(stored(authority, tmp_path)))
    assert result.exit_code == 1
    assert f"wrong: CA {certificate_id(authority.issuer.certificate)} expired at " in result.stdout
    assert "           expired 20" in result.stdout


@pytest.mark.parametrize("role", ["roots", "issuing"])
def test_a_key_that_others_may_read_is_exit_1_with_the_repair(role: str, tmp_path: Path) -> None:
    directory = stored(create_authority(NOW), tmp_path)
    (key,) = (directory / role).glob("*/ca.key")
    key.chmod(0o640)
    told = status(directory)
    assert told["faults"] == [f"{key}: mode 0640 shows the key to others; run: chmod 600 {key}"]


def test_an_issuing_ca_without_its_key_is_exit_1(tmp_path: Path) -> None:
    directory = stored(create_authority(NOW), tmp_path)
    (key,) = (directory / "issuing").glob("*/ca.key")
    key.unlink()
    assert status(directory)["faults"] == [f"{key}: not there, and the gate signs with it; restore it from a copy"]


def test_both_lines_are_told_apart(tmp_path: Path) -> None:
    directory = stored(create_authority(NOW, with_rsa=True), tmp_path)
    told = status(directory)
    assert [ca["line"] for ca in told["cas"]] == [Line.MAIN, Line.RSA, Line.MAIN, Line.RSA]
    assert [task["command"] for task in told["todo"]] == [
        f"outgate pki rotate issuing --pki {directory}",
        f"outgate pki rotate root --stage --pki {directory}",
    ]
    assert ", rsa line)\n" in invoke("pki", "status", "--pki", str(directory)).stdout


@pytest.mark.kernel
def test_who_may_not_read_keys_is_told_all_but_what_they_hold() -> None:
    """As another user, in directories that their owner opened to readers; the keys stay the owner's."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as open_to_all:
        directory = stored(create_authority(NOW), Path(open_to_all) / "pki")
        for path in (Path(open_to_all), directory, *(path for path in directory.rglob("*") if path.is_dir())):
            path.chmod(0o755)
        command = as_user([sys.executable, "-m", "proxy", "pki", "status", "--pki", str(directory), "--json"])
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert [ca["key_is"] for ca in json.loads(done.stdout)["cas"]] == ["unreadable", "unreadable"]


def test_it_changes_nothing(tmp_path: Path) -> None:
    directory = stored(create_authority(NOW), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    invoke("pki", "status", "--pki", str(directory))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_no_store_is_exit_3_with_the_command_that_makes_one(tmp_path: Path) -> None:
    result = invoke("pki", "status", "--pki", str(tmp_path))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (3, "", 1)
    assert f"make an authority with 'outgate pki init --pki {tmp_path}'" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_cryptography(command: str) -> None:
    script = (
        f"import sys; from proxy.commands.pki import pki; pki(['{command}', '--help'], standalone_mode=False); "
        "sys.exit('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
