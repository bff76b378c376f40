import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pki.authority import certificate_id, fingerprint
from pki.store import load
from proxy.commands.pki import pki


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(pki, list(arguments), prog_name="outgate pki")


def test_init_makes_a_store_that_loads(tmp_path: Path) -> None:
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--name", "Example Corp")
    assert result.exit_code == 0
    authority = load(tmp_path / "pki")
    assert "O=Example Corp" in authority.roots[0].certificate.subject.rfc4514_string()
    assert abs(authority.issuing.certificate.not_valid_before_utc - datetime.now(UTC)) < timedelta(hours=2)


def test_init_prints_fingerprints_expiry_and_what_to_do_next(tmp_path: Path) -> None:
    result = invoke("init", "--pki", str(tmp_path / "a store"))
    authority = load(tmp_path / "a store")
    for certificate in (authority.roots[0].certificate, authority.issuing.certificate):
        assert fingerprint(certificate) in result.stdout
        assert f"{certificate.not_valid_after_utc:%Y-%m-%d}" in result.stdout
    assert f"--pki '{tmp_path}/a store' -- COMMAND" in result.stdout


def test_the_command_it_prints_takes_the_root_key_away(tmp_path: Path) -> None:
    result = invoke("init", "--pki", str(tmp_path / "a store"))
    move = next(line for line in result.stdout.splitlines() if line.startswith("  mv "))
    subprocess.run(["/bin/sh", "-c", move.replace("OFFLINE", "offline")], cwd=tmp_path, check=True)
    assert (tmp_path / "offline").exists()
    assert load(tmp_path / "a store").roots[0].key is None


def test_json_is_one_object_that_names_every_file(tmp_path: Path) -> None:
    made = json.loads(invoke("init", "--pki", str(tmp_path / "pki"), "--json").stdout)
    authority = load(tmp_path / "pki")
    assert made["pki"] == str(tmp_path / "pki")
    for role, certificate in (
        ("root", authority.roots[0].certificate),
        ("issuing", authority.issuing.certificate),
    ):
        assert made[role]["id"] == certificate_id(certificate)
        assert made[role]["sha256"] == fingerprint(certificate)
        assert datetime.fromisoformat(made[role]["expires"]) == certificate.not_valid_after_utc
        assert Path(made[role]["certificate"]).exists()
        assert Path(made[role]["key"]).exists()


def test_no_key_is_printed(tmp_path: Path) -> None:
    assert "PRIVATE" not in invoke("init", "--pki", str(tmp_path), "--json").output


def test_an_existing_authority_stays_and_the_answer_is_no(tmp_path: Path) -> None:
    invoke("init", "--pki", str(tmp_path))
    before = load(tmp_path).issuing.certificate
    result = invoke("init", "--pki", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == (f"outgate: {tmp_path} holds an authority already; use it, or name another directory\n")
    assert load(tmp_path).issuing.certificate == before


def test_a_place_that_cannot_be_written_is_exit_3(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = invoke("init", "--pki", str(tmp_path / "file" / "pki"))
    assert result.exit_code == 3
    assert "choose a directory you may write" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["init"], ["init", "--pki", "x", "--name", ""], ["init", "--pki", "x", "--name", "a" * 65], ["rotate"]],
    ids=["no directory", "empty name", "long name", "unknown command"],
)
def test_wrong_usage_is_exit_2_and_writes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(*arguments).exit_code == 2
    assert os.listdir(tmp_path) == []


def test_help_shows_an_example_and_imports_no_cryptography() -> None:
    script = (
        "import sys; from proxy.commands.pki import pki; pki(['init', '--help'], standalone_mode=False); "
        "sys.exit('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert "outgate pki init --pki pki" in done.stdout
