"""`outgate pki export`: a CA that the other firewall takes, recorded, with a key that nobody else has."""

import fcntl
import itertools
import json
import os
import shlex
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

import pki.authority
from pki.authority import (
    Authority,
    Issuing,
    KeyKind,
    Line,
    Root,
    State,
    certificate_id,
    certificates_pem,
    create_authority,
    create_issuing,
    fingerprint,
    issue_leaf,
    key_pem,
)
from pki.lint import Profile, faults
from pki.pkcs12 import Form, Loaded, assemble, read_file
from pki.rotation import activate_root, stage_root
from pki.store import KeyPlace, load, load_trusted, save, survey
from proxy.commands.pki import pki as command
from tests.pki.clients import program
from tests.pki.making_cas import make, rsa_key

NOW = datetime.now(UTC)
LIMITED = make(path_length=1, now=NOW, subject="limited root")


@pytest.fixture(autouse=True)
def few_large_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two RSA-4096 keys, the first one once, for a root: a new one takes seconds. One test makes its own."""
    large = itertools.chain([rsa_key(4096)], itertools.repeat(rsa_key(4096, number=1)))
    create = pki.authority.create_key
    monkeypatch.setattr(
        pki.authority, "create_key", lambda kind: next(large) if kind is KeyKind.RSA_4096 else create(kind)
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    save(create_authority(NOW, name="Example Corp"), tmp_path / "pki")
    return tmp_path / "pki"


def export(store: Path, to: Path, *arguments: str | Path, profile: str = "azure-firewall") -> Result:
    line = ["export", "--pki", store, "--profile", profile, "--to", to, *arguments]
    return CliRunner().invoke(command, [str(one) for one in line], prog_name="outgate pki", catch_exceptions=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def exported(path: Path) -> Loaded:
    return assemble(read_file(path))


def fits(loaded: Loaded, profile: Profile) -> bool:
    return faults(loaded, profile, datetime.now(UTC)) == []


# Azure Firewall


def test_the_pfx_is_what_azure_asks_for_and_the_store_never_has_its_key(store: Path, tmp_path: Path) -> None:
    before = contents(store)
    result = export(store, tmp_path / "azure.pfx")
    assert result.exit_code == 0, result.output
    loaded = exported(tmp_path / "azure.pfx")
    assert fits(loaded, Profile.AZURE_FIREWALL)
    assert (loaded.form, loaded.is_encrypted, loaded.chain, loaded.strays) == (Form.PKCS12, False, (), ())
    assert isinstance(loaded.key, rsa.RSAPrivateKey)
    assert loaded.key.key_size == 4096
    loaded.certificate.verify_directly_issued_by(load_trusted(store)[0])
    after = contents(store)
    record = f"given/{certificate_id(loaded.certificate)}/ca.crt"
    assert {name for name in after if after[name] != before.get(name)} == {"state.json", record}
    assert survey(store).given == (loaded.certificate,)


def test_a_key_is_made_for_every_export(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert export(store, tmp_path / "azure.pfx").exit_code == 0
    known = [rsa_key(4096, number=number).public_key() for number in range(3)]
    assert exported(tmp_path / "azure.pfx").certificate.public_key() not in known


def test_the_file_is_its_owners_alone_whatever_the_umask(store: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        export(store, tmp_path / "azure.pfx")
        export(store, tmp_path / "acm", profile="aws-nfw")
    finally:
        os.umask(before)
    for path in (tmp_path / "azure.pfx", *(tmp_path / "acm").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "acm").stat().st_mode) == 0o700
    assert sorted(os.listdir(tmp_path)) == ["acm", "azure.pfx", "pki"]  # nothing left beside


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_nothing_is_overwritten(store: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "azure.pfx"
    match kind:
        case "file":
            path.write_bytes(b"precious")
        case "link":
            path.symlink_to(tmp_path / "elsewhere")
        case _:
            path.mkdir()
    before = contents(store)
    result = export(store, path)
    assert result.exit_code == 1
    assert result.stderr == f"outgate: {path}: is there already; name another place\n"
    assert contents(store) == before
    assert not (tmp_path / "elsewhere").exists()


def test_who_is_quicker_keeps_his_file(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, before = tmp_path / "azure.pfx", contents(store)
    create = pki.authority.create_key

    def meanwhile(kind: KeyKind) -> object:
        path.write_bytes(b"precious")
        return create(kind)

    monkeypatch.setattr(pki.authority, "create_key", meanwhile)
    result = export(store, path)
    assert result.exit_code == 1
    assert result.stderr == f"outgate: {path}: is there already; name another place\n"
    assert path.read_bytes() == b"precious"
    assert contents(store) == before
    assert sorted(os.listdir(tmp_path)) == ["azure.pfx", "pki"]


def test_a_ca_that_is_not_recorded_is_not_handed_out(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(store)
    link = os.link

    def linked_before_the_store_fails(source: Path, path: Path) -> None:
        link(source, path)
        (store / "given").write_bytes(b"in the way")

    monkeypatch.setattr(os, "link", linked_before_the_store_fails)
    result = export(store, tmp_path / "azure.pfx")
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "azure.pfx").exists()
    assert {name: content for name, content in contents(store).items() if name != "given"} == before


def test_a_store_that_somebody_writes_is_left_alone(store: Path, tmp_path: Path) -> None:
    with open(store / ".lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = export(store, tmp_path / "azure.pfx")
    assert result.exit_code == 3
    assert "another outgate is writing there" in result.stderr
    assert not (tmp_path / "azure.pfx").exists()


def test_a_place_that_cannot_be_written_records_nothing(store: Path, tmp_path: Path) -> None:
    before = contents(store)
    result = export(store, tmp_path / "missing" / "azure.pfx")
    assert result.exit_code == 3
    assert result.stderr == (
        f"outgate: {tmp_path}/missing/azure.pfx: No such file or directory; choose a directory you may write\n"
    )
    assert contents(store) == before


def test_no_store_is_exit_3(tmp_path: Path) -> None:
    result = export(tmp_path / "pki", tmp_path / "azure.pfx")
    assert result.exit_code == 3
    assert "outgate pki init --pki" in result.stderr


def test_what_is_printed_names_the_ca_the_root_and_the_commands(store: Path, tmp_path: Path) -> None:
    result = export(store, tmp_path / "a file.pfx")
    loaded = exported(tmp_path / "a file.pfx")
    assert fingerprint(loaded.certificate) in result.stdout
    assert fingerprint(load_trusted(store)[0]) in result.stdout
    assert f"expires {loaded.certificate.not_valid_after_utc:%Y-%m-%d}" in result.stdout
    assert f"--name outgate-tls --file '{tmp_path}/a file.pfx'" in result.stdout
    assert f"outgate trust bundle --pki {store} --to trust" in result.stdout
    assert "PRIVATE" not in result.output
    remove = next(line for line in result.stdout.splitlines() if line.startswith("  rm "))
    subprocess.run(["/bin/sh", "-c", remove], check=True)
    assert not (tmp_path / "a file.pfx").exists()


def test_json_names_everything(store: Path, tmp_path: Path) -> None:
    told = json.loads(export(store, tmp_path / "azure.pfx", "--json", "--years", "5").stdout)
    loaded = exported(tmp_path / "azure.pfx")
    left = loaded.certificate.not_valid_after_utc - NOW
    assert abs(left - 5 * timedelta(days=365.25)) < timedelta(days=1)
    assert (told["pki"], told["profile"], told["files"]) == (
        str(store),
        "azure-firewall",
        [str(tmp_path / "azure.pfx")],
    )
    assert told["ca"]["id"] == certificate_id(loaded.certificate)
    assert told["root"]["id"] == certificate_id(load_trusted(store)[0])
    assert told["root_is_new"] is False


# How long, and below which root


def test_azure_gets_no_ca_that_is_too_short_tomorrow(store: Path, tmp_path: Path) -> None:
    result = export(store, tmp_path / "azure.pfx", "--years", "1")
    assert result.exit_code == 2
    assert "Azure Firewall asks for a year forward on any day; take 2" in result.stderr


def test_a_root_that_ends_too_soon_is_said_and_nothing_is_issued(tmp_path: Path) -> None:
    save(create_authority(NOW - timedelta(days=9.5 * 365.25), name="Old"), tmp_path / "pki")
    before = contents(tmp_path / "pki")
    result = export(tmp_path / "pki", tmp_path / "azure.pfx")
    assert result.exit_code == 1
    assert "no CA fits: ends " in result.stderr
    assert not (tmp_path / "azure.pfx").exists()
    assert contents(tmp_path / "pki") == before


def test_a_root_that_permits_one_ca_below_is_none_for_azure(tmp_path: Path) -> None:
    root = Root(LIMITED.certificate, LIMITED.key)  # type: ignore[arg-type]  # EC
    save(Authority((root,), (create_issuing(root, NOW, name="x"),)), tmp_path / "pki")
    result = export(tmp_path / "pki", tmp_path / "azure.pfx")
    assert result.exit_code == 1
    assert not (tmp_path / "azure.pfx").exists()
    assert export(tmp_path / "pki", tmp_path / "acm", profile="aws-nfw").exit_code == 0


def test_without_a_root_there_is_nothing_to_issue_below(tmp_path: Path) -> None:
    authority = create_authority(NOW)
    save(Authority((), authority.issuing), tmp_path / "pki")
    result = export(tmp_path / "pki", tmp_path / "azure.pfx")
    assert result.exit_code == 1
    assert "no root here; import it with its key, or make an authority with a root" in result.stderr


def test_an_offline_root_is_lent_its_key_and_not_given_it(store: Path, tmp_path: Path) -> None:
    root_id = certificate_id(load_trusted(store)[0])
    offline = tmp_path / "offline.key"
    (store / "roots" / root_id / "ca.key").rename(offline)
    result = export(store, tmp_path / "azure.pfx")
    assert result.exit_code == 3
    assert "the root's key is kept offline; name it with --root-key" in result.stderr
    result = export(store, tmp_path / "azure.pfx", "--root-key", offline)
    assert result.exit_code == 0, result.output
    assert survey(store).roots[0].key is KeyPlace.OFFLINE
    exported(tmp_path / "azure.pfx").certificate.verify_directly_issued_by(load_trusted(store)[0])


# A root with an RSA key


def test_root_rsa_makes_a_root_beside_that_bundles_carry_from_now_on(store: Path, tmp_path: Path) -> None:
    main = load_trusted(store)[0]
    result = export(store, tmp_path / "azure.pfx", "--root-rsa")
    assert result.exit_code == 0, result.output
    assert "made now, so no bundle has it yet" in result.stdout
    first, made = survey(store).roots
    assert first.certificate == main
    assert (made.line, made.state) == (Line.RSA, State.ACTIVE)
    key = made.certificate.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 4096
    loaded = exported(tmp_path / "azure.pfx")
    loaded.certificate.verify_directly_issued_by(made.certificate)
    assert fits(replace(loaded, chain=(made.certificate,)), Profile.STRICT)


def test_the_second_export_takes_the_same_rsa_root(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "one.pfx", "--root-rsa")
    trusted = load_trusted(store)
    result = export(store, tmp_path / "two.pfx", "--root-rsa")
    assert result.exit_code == 0, result.output
    assert load_trusted(store) == trusted
    assert "made now" not in result.stdout
    assert len(survey(store).given) == 2


def test_the_rsa_line_of_the_store_is_taken(tmp_path: Path) -> None:
    save(create_authority(NOW, with_rsa=True), tmp_path / "pki")
    before = load_trusted(tmp_path / "pki")
    export(tmp_path / "pki", tmp_path / "azure.pfx", "--root-rsa")
    assert load_trusted(tmp_path / "pki") == before
    exported(tmp_path / "azure.pfx").certificate.verify_directly_issued_by(before[1])


def test_the_main_root_still_rotates_beside_it(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "azure.pfx", "--root-rsa")
    authority = activate_root(stage_root(load(store), NOW), NOW + timedelta(minutes=1))
    assert authority.issuer.line is Line.MAIN
    issue_leaf(authority.issuer, "example.com", NOW + timedelta(minutes=1))


# Who trusts what the firewall signs


def below(loaded: Loaded) -> Iterator[Issuing]:
    """What may sign leaves at the firewall: the CA itself, and one that it makes below itself."""
    yield Issuing(loaded.certificate, loaded.key, (loaded.certificate,))  # type: ignore[arg-type]  # it has one
    under = create_issuing(Root(loaded.certificate, loaded.key), NOW, name="made at the firewall")
    yield replace(under, chain=(under.certificate, loaded.certificate))


@pytest.mark.client
@pytest.mark.parametrize("options", [[], ["--root-rsa"]], ids=["ec root", "rsa root"])
def test_openssl_trusts_what_the_firewall_signs_by_the_root_alone(
    store: Path, tmp_path: Path, options: list[str]
) -> None:
    program("openssl")
    export(store, tmp_path / "azure.pfx", *options)
    (tmp_path / "trusted").write_bytes(certificates_pem(*load_trusted(store)))
    for issuing in below(exported(tmp_path / "azure.pfx")):
        leaf = issue_leaf(issuing, "www.example.com", datetime.now(UTC))
        (tmp_path / "leaf").write_bytes(certificates_pem(leaf.certificate))
        (tmp_path / "sent").write_bytes(certificates_pem(*leaf.chain))
        done = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "trusted", "-untrusted", "sent",
             "-verify_hostname", "www.example.com", "leaf"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "line"), [([], Line.MAIN), (["--root-rsa"], Line.RSA)], ids=["ec root", "rsa root"]
)
def test_what_azure_signs_with_can_move_to_the_gate(
    store: Path, tmp_path: Path, options: list[str], line: Line
) -> None:
    """The workloads trust the root before and after: nothing changes for them."""
    export(store, tmp_path / "azure.pfx", *options)
    trusted = load_trusted(store)
    taken = CliRunner().invoke(command, ["import", "--pki", str(store), "--p12", str(tmp_path / "azure.pfx")])
    assert taken.exit_code == 0, taken.output
    signs = {one.line: one.certificate for one in survey(store).issuing if one.state is State.ACTIVE}
    assert signs[line] == survey(store).given[0]
    assert load_trusted(store) == trusted


# AWS Network Firewall


@pytest.mark.parametrize("options", [[], ["--root-rsa"]], ids=["ec root", "rsa root"])
def test_the_three_files_are_what_acm_and_aws_network_firewall_ask_for(
    store: Path, tmp_path: Path, options: list[str]
) -> None:
    result = export(store, tmp_path / "acm", *options, profile="aws-nfw")
    assert result.exit_code == 0, result.output
    parts = [read_file(tmp_path / "acm" / name) for name in ("certificate.pem", "private-key.pem")]
    loaded = assemble(*parts, above=read_file(tmp_path / "acm" / "chain.pem").certificates)
    assert fits(loaded, Profile.AWS_NFW)
    assert [len(part.certificates) for part in parts] == [1, 0]
    assert loaded.chain[0] in load_trusted(store)
    assert survey(store).given == (loaded.certificate,)
    checked = CliRunner().invoke(
        command,
        ["check", "--profile", "aws-nfw", f"{tmp_path}/acm/certificate.pem", "--key", f"{tmp_path}/acm/private-key.pem",
         "--chain", f"{tmp_path}/acm/chain.pem"],
    )  # fmt: skip
    assert checked.exit_code == 0, checked.output


def test_the_command_for_acm_names_the_files(store: Path, tmp_path: Path) -> None:
    result = export(store, tmp_path / "a c m", profile="aws-nfw")
    line = next(line for line in result.stdout.splitlines() if "aws acm import-certificate" in line)
    given = [word.removeprefix("fileb://") for word in shlex.split(line) if word.startswith("fileb://")]
    assert [Path(path).name for path in given] == ["certificate.pem", "chain.pem", "private-key.pem"]
    assert all(Path(path).is_file() for path in given)


def test_a_directory_that_holds_one_of_the_files_is_left_as_it_is(store: Path, tmp_path: Path) -> None:
    (tmp_path / "acm").mkdir()
    (tmp_path / "acm" / "chain.pem").write_bytes(b"precious")
    result = export(store, tmp_path / "acm", profile="aws-nfw")
    assert result.exit_code == 1
    assert result.stderr == f"outgate: {tmp_path}/acm/chain.pem: is there already; name another place\n"
    assert os.listdir(tmp_path / "acm") == ["chain.pem"]


def test_the_key_is_that_of_the_certificate(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "acm", profile="aws-nfw")
    certificate = x509.load_pem_x509_certificate((tmp_path / "acm" / "certificate.pem").read_bytes())
    (key,) = read_file(tmp_path / "acm" / "private-key.pem").keys
    assert key.public_key() == certificate.public_key()
    assert key_pem(key) not in contents(store).values()
