"""`outgate pki init`: what is made, where its keys are, and what makes nothing."""

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from pki.authority import KeyKind, certificate_id, create_key, fingerprint, key_pem
from pki.constraints import permitted_domains
from pki.rotation import kind_of
from pki.store import load, load_issuers
from proxy.commands.pki import pki


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(pki, list(arguments), prog_name="outgate pki")


def test_init_makes_a_store_that_loads(tmp_path: Path) -> None:
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--name", "Example Corp")
    assert result.exit_code == 0
    authority = load(tmp_path / "pki")
    assert "O=Example Corp" in authority.roots[0].certificate.subject.rfc4514_string()
    assert abs(authority.issuer.certificate.not_valid_before_utc - datetime.now(UTC)) < timedelta(hours=2)


def test_init_prints_fingerprints_expiry_and_what_to_do_next(tmp_path: Path) -> None:
    result = invoke("init", "--pki", str(tmp_path / "a store"))
    authority = load(tmp_path / "a store")
    for certificate in (authority.roots[0].certificate, authority.issuer.certificate):
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
        ("issuing", authority.issuer.certificate),
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
    before = load(tmp_path).issuer.certificate
    result = invoke("init", "--pki", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == (f"outgate: {tmp_path} holds an authority already; use it, or name another directory\n")
    assert load(tmp_path).issuer.certificate == before


def test_a_place_that_cannot_be_written_is_exit_3(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = invoke("init", "--pki", str(tmp_path / "file" / "pki"))
    assert result.exit_code == 3
    assert "choose a directory you may write" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["init"], ["init", "--pki", "x", "--name", ""], ["init", "--pki", "x", "--name", "a" * 65], ["frotz"]],
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


POLICY = """\
version: 1
workloads:
  app:
    rules:
      - {host: api.example, tls: inspect}
      - {host: "*.data.example", tls: inspect}
      - {host: carried.example}
"""
NOTHING_INSPECTED = "version: 1\nworkloads: {app: {rules: [{host: carried.example}]}}\n"
SHARED = "version: 1\nworkloads: {app: {rules: [{host: '*.github.io', tls: inspect, allow: ['GET /']}]}}\n"


def written(path: Path, content: str | bytes, mode: int = 0o644) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return str(path)


def files_with(directory: Path, content: bytes) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and content in path.read_bytes()]


def test_constraints_are_what_the_policy_has_inspected(tmp_path: Path) -> None:
    policy = written(tmp_path / "policy.yaml", POLICY)
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--constrain-to", policy)
    assert result.exit_code == 0
    assert "only for api.example, data.example and what is below\n" in result.stdout
    issuer = load(tmp_path / "pki").issuer
    assert permitted_domains(issuer.certificate) == ("api.example", "data.example")


def test_constraints_of_several_files_unite(tmp_path: Path) -> None:
    more = "version: 1\nworkloads: {other: {rules: [{host: more.example, tls: inspect}]}}\n"
    files = [written(tmp_path / "a.yaml", POLICY), written(tmp_path / "b.yaml", more)]
    to = [word for file in files for word in ("--constrain-to", file)]
    made = json.loads(invoke("init", "--pki", str(tmp_path / "pki"), *to, "--json").stdout)
    assert made["issuing"]["permitted"] == ["api.example", "data.example", "more.example"]


def test_a_policy_that_inspects_nothing_is_no_constraint(tmp_path: Path) -> None:
    policy = written(tmp_path / "policy.yaml", NOTHING_INSPECTED)
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--constrain-to", policy)
    assert (result.exit_code, result.stderr) == (
        2,
        f"outgate: {policy}: no rule is inspected, so no name is left to limit an issuing CA to; "
        "write tls: inspect in a rule, or leave --constrain-to out\n",
    )
    assert not (tmp_path / "pki").exists()


def test_a_policy_that_does_not_load_makes_nothing(tmp_path: Path) -> None:
    policy = written(tmp_path / "policy.yaml", "version: 1\nworkloads: {app: {rules: [{hst: x}]}}\n")
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--constrain-to", policy)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"{policy}:2:")
    assert not (tmp_path / "pki").exists()


def test_a_domain_below_which_anyone_owns_a_name_is_warned_of(tmp_path: Path) -> None:
    policy = written(tmp_path / "policy.yaml", SHARED)
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--constrain-to", policy, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["issuing"]["permitted"] == ["github.io"]
    assert result.stderr == (
        'outgate: warning: the issuing CA is limited to "github.io", and anyone can own a name below github.io; '
        "inspect the names you use\n"
    )


def test_lives_are_as_said_and_an_issuing_ca_does_not_outlive_its_root(tmp_path: Path) -> None:
    made = invoke("init", "--pki", str(tmp_path), "--root-years", "1", "--issuing-days", "3650")
    assert made.exit_code == 0
    authority = load(tmp_path)
    end = authority.roots[0].certificate.not_valid_after_utc
    assert timedelta(days=364) < end - datetime.now(UTC) < timedelta(days=366)
    assert authority.issuer.certificate.not_valid_after_utc == end


def test_a_root_key_file_is_made_for_its_owner_and_is_nowhere_else(tmp_path: Path) -> None:
    key = tmp_path / "offline.key"
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--root-key", str(key))
    assert result.exit_code == 0
    assert f"# {key} was made and has the root's key, and {tmp_path}/pki has not: keep it safe\n" in result.stdout
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    (root,) = load(tmp_path / "pki").roots
    assert root.key is None
    made = load_pem_private_key(key.read_bytes(), None)
    assert made.public_key() == root.certificate.public_key()
    assert files_with(tmp_path / "pki", key.read_bytes()[28:80]) == []


def test_a_root_key_that_is_there_signs_and_stays_as_it_is(tmp_path: Path) -> None:
    key = create_key(KeyKind.EC_P256)
    file = tmp_path / "offline.key"
    written(file, key_pem(key), 0o600)
    made = json.loads(invoke("init", "--pki", str(tmp_path / "pki"), "--root-key", str(file), "--json").stdout)
    assert (made["root"]["key"], made["root"]["key_is"]) == (str(file), "offline")
    assert load(tmp_path / "pki").roots[0].certificate.public_key() == key.public_key()
    assert file.read_bytes() == key_pem(key)


def test_a_password_encrypts_the_root_key(tmp_path: Path) -> None:
    password = written(tmp_path / "password", "correct horse\n", 0o600)
    arguments = ["--root-key", str(tmp_path / "offline.key"), "--password-file", password]
    assert invoke("init", "--pki", str(tmp_path / "a"), *arguments).exit_code == 0
    pem = (tmp_path / "offline.key").read_bytes()
    assert b"ENCRYPTED" in pem
    assert load_pem_private_key(pem, b"correct horse").public_key() == load(tmp_path / "a").trusted[0].public_key()
    assert invoke("init", "--pki", str(tmp_path / "b"), *arguments).exit_code == 0
    assert load(tmp_path / "b").trusted[0].public_key() == load(tmp_path / "a").trusted[0].public_key()


def test_an_issuing_key_is_copied_for_gates(tmp_path: Path) -> None:
    key = create_key(KeyKind.EC_P256)
    file = written(tmp_path / "issuing.key", key_pem(key), 0o600)
    assert invoke("init", "--pki", str(tmp_path / "pki"), "--issuing-key", file).exit_code == 0
    assert load_issuers(tmp_path / "pki")[0].certificate.public_key() == key.public_key()


def test_rsa_stands_beside_and_both_root_keys_are_in_one_file(tmp_path: Path) -> None:
    key = tmp_path / "offline.key"
    made = invoke("init", "--pki", str(tmp_path / "a"), "--rsa", "--root-key", str(key), "--json")
    told = json.loads(made.stdout)
    assert [told["rsa"][role]["line"] for role in ("root", "issuing")] == ["rsa", "rsa"]
    authority = load(tmp_path / "a")
    assert [root.key for root in authority.roots] == [None, None]
    assert [kind_of(issuer.certificate) for issuer in authority.issuers] == [KeyKind.EC_P256, KeyKind.RSA_3072]
    assert key.read_bytes().count(b"BEGIN PRIVATE KEY") == 2
    again = invoke("init", "--pki", str(tmp_path / "b"), "--rsa", "--root-key", str(key))
    assert again.exit_code == 0
    assert [one.public_key() for one in load(tmp_path / "b").trusted] == [one.public_key() for one in authority.trusted]


WEAK = rsa.generate_private_key(65537, 1024)


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (key_pem(create_key(KeyKind.EC_P256)), 0o644, "shows the key to others; run: chmod 600"),
        (b"", 0o600, "empty"),
        (b"-----BEGIN PRIVATE KEY-----\nMIG\n-----END PRIVATE KEY-----\n", 0o600, "cannot be read"),
        (key_pem(WEAK), 0o600, "an RSA key of 1024 bits; a CA's has 2048 at least"),
        (key_pem(ec.generate_private_key(ec.SECP256K1())), 0o600, "a key on secp256k1"),
        (
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
            ),
            0o600,
            "--password-file",
        ),
    ],
    ids=["shown to others", "empty", "damaged", "weak", "a curve that clients do not know", "encrypted"],
)
@pytest.mark.parametrize("option", ["--root-key", "--issuing-key"])
def test_a_key_that_cannot_be_used_makes_nothing(
    option: str, content: bytes, mode: int, expected: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.key", content, mode)
    result = invoke("init", "--pki", str(tmp_path / "pki"), option, file)
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1)
    assert result.stderr.startswith(f"outgate: {file}: ")
    assert expected in result.stderr
    assert not (tmp_path / "pki").exists()


def test_a_gate_does_not_hold_the_roots_key_as_its_own(tmp_path: Path) -> None:
    file = written(tmp_path / "a.key", key_pem(create_key(KeyKind.EC_P256)), 0o600)
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--root-key", file, "--issuing-key", file)
    assert result.exit_code == 2
    assert "an issuing CA with the key of root" in result.stderr
    assert not (tmp_path / "pki").exists()


def test_where_nothing_is_written_no_root_key_is_left(tmp_path: Path) -> None:
    invoke("init", "--pki", str(tmp_path / "pki"))
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--root-key", str(tmp_path / "offline.key"))
    assert result.exit_code == 1
    assert os.listdir(tmp_path) == ["pki"]


def test_a_root_key_file_that_cannot_be_written_is_exit_3_and_makes_nothing(tmp_path: Path) -> None:
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--root-key", str(tmp_path / "missing" / "offline.key"))
    assert result.exit_code == 3
    assert result.stderr == (
        f"outgate: {tmp_path}/missing/offline.key: No such file or directory; choose a directory you may write\n"
    )
    assert os.listdir(tmp_path) == []


def test_an_empty_password_encrypts_nothing(tmp_path: Path) -> None:
    password = written(tmp_path / "password", "\n", 0o600)
    key = tmp_path / "offline.key"
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--root-key", str(key), "--password-file", password)
    assert (result.exit_code, result.stderr) == (
        3,
        f"outgate: {password}: empty; write a password there, or leave --password-file out\n",
    )
    assert os.listdir(tmp_path) == ["password"]


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:object=root?module-path=/m.so&pin-value=geheim",
        "pkcs11:token=t;object=o?module-path=/no.so&pin-value=geheim",
    ],
    ids=["malformed", "no such module"],
)
def test_a_token_that_cannot_be_used_is_one_line_without_its_pin(uri: str, tmp_path: Path) -> None:
    result = invoke("init", "--pki", str(tmp_path / "pki"), "--root-key", uri)
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1)
    assert result.stderr.startswith("outgate: pkcs11:")
    assert "geheim" not in result.output
    assert not (tmp_path / "pki").exists()
