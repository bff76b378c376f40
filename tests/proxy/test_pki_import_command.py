"""`outgate pki import` and `outgate pki check`: what is taken, and what is refused for which reason."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    pkcs12,
)

from pki.authority import (
    Authority,
    CaKey,
    KeyKind,
    State,
    certificate_id,
    certificates_pem,
    create_authority,
    create_key,
    issue_leaf,
    key_pem,
)
from pki.pkcs12 import passwordless_pfx
from pki.rotation import activate_root
from pki.store import load, save
from proxy.commands.pki import pki
from tests.pki.clients import program
from tests.pki.making_cas import Made, make, rsa_key, usage

NOW = datetime.now(UTC)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(pki, [str(one) for one in arguments], prog_name="outgate pki", catch_exceptions=False)


def made(issuer: Made | None = None, **changes: object) -> Made:
    return make(issuer, now=NOW, **changes)  # type: ignore[arg-type]  # checked there


def key_of(ca: Made) -> CaKey:
    assert isinstance(ca.key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    return ca.key


ROOT = made(subject="corporate root")
BETWEEN = made(ROOT, subject="corporate policy CA")
CA = made(BETWEEN, subject="gate CA")


class Files:
    """A directory with what a corporate PKI hands over."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pki = directory / "pki"

    def put(self, name: str, content: bytes, mode: int = 0o600) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def certificate(self, name: str, *of: Made) -> Path:
        return self.put(name, certificates_pem(*(one.certificate for one in of)))

    def key(self, name: str, of: Made) -> Path:
        return self.put(name, key_pem(key_of(of)))

    def pfx(self, of: Made, *above: Made, password: bytes | None = None) -> Path:
        if not above and password is None:
            return self.put("ca.pfx", passwordless_pfx(of.certificate, key_of(of)))
        encryption = BestAvailableEncryption(password or b"-")
        chain = [one.certificate for one in above]
        return self.put(
            "ca.pfx", pkcs12.serialize_key_and_certificates(None, key_of(of), of.certificate, chain, encryption)
        )

    def take(self, *arguments: str | Path) -> Result:
        return invoke("import", "--pki", self.pki, *arguments)

    @property
    def authority(self) -> Authority:
        return load(self.pki)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Into a new store


def test_pkcs12_with_its_chain_becomes_a_store_that_signs(files: Files) -> None:
    password = files.put("password", b"secret\n")
    result = files.take("--p12", files.pfx(CA, BETWEEN, ROOT, password=b"secret"), "--password-file", password)
    assert result.exit_code == 0, result.output
    authority = files.authority
    assert authority.issuer.chain == (CA.certificate, BETWEEN.certificate)
    assert authority.trusted == (ROOT.certificate,)
    assert authority.roots[0].key is None
    assert authority.issuer.state is State.ACTIVE
    assert "and in use" in result.stdout
    assert f"{files.directory}/ca.pfx still has the key: delete it" in result.stdout


@pytest.mark.client
def test_openssl_accepts_a_leaf_of_what_was_imported(files: Files) -> None:
    program("openssl")
    files.take(
        "--p12", files.pfx(CA), "--chain", files.certificate("chain", BETWEEN), "--root", files.certificate("r", ROOT)
    )
    leaf = issue_leaf(files.authority.issuer, "www.example.com", NOW)
    files.put("leaf", certificates_pem(leaf.certificate))
    files.put("sent", certificates_pem(*leaf.chain))
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "www.example.com",
         "-CAfile", "r", "-untrusted", "sent", "leaf"],
        cwd=files.directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("together", [False, True], ids=["three files", "key with the certificate"])
def test_pem_becomes_a_store_that_signs(files: Files, together: bool) -> None:
    chain, root = files.certificate("chain", BETWEEN), files.certificate("root", ROOT)
    if together:
        cert = files.put("both", key_pem(key_of(CA)) + certificates_pem(CA.certificate))
        result = files.take("--cert", cert, "--chain", chain, "--root", root)
    else:
        result = files.take(
            "--cert", files.certificate("cert", CA), "--key", files.key("key", CA), "--chain", chain, "--root", root
        )
    assert result.exit_code == 0, result.output
    assert files.authority.issuer.chain == (CA.certificate, BETWEEN.certificate)
    assert files.authority.trusted == (ROOT.certificate,)


def test_an_encrypted_key_needs_the_password_file(files: Files) -> None:
    pem = key_of(CA).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    cert, key, password = files.certificate("cert", CA), files.put("key", pem), files.put("password", b"secret")
    refused = files.take("--cert", cert, "--key", key)
    assert refused.exit_code == 3
    assert refused.stderr == (
        f"outgate: {key}: the key in it asks for a password; name a file that holds it with --password-file\n"
    )
    assert files.take("--cert", cert, "--key", key, "--password-file", password).exit_code == 0


def test_without_a_root_the_gate_signs_and_the_answer_says_what_is_missing(files: Files) -> None:
    result = files.take("--p12", files.pfx(CA))
    assert result.exit_code == 0
    assert files.authority.trusted == ()
    assert issue_leaf(files.authority.issuer, "example.com", NOW).chain == (CA.certificate,)
    assert "its root is not here: workloads must trust it already" in result.stdout
    assert "outgate trust bundle" not in result.stdout


def test_a_self_signed_ca_becomes_a_root_and_an_issuing_ca_is_made_below(files: Files) -> None:
    result = files.take("--p12", files.pfx(ROOT))
    assert result.exit_code == 0, result.output
    (root,), (issuing,) = files.authority.roots, files.authority.issuing
    assert root.certificate == ROOT.certificate
    assert root.key is not None
    issuing.certificate.verify_directly_issued_by(ROOT.certificate)
    assert certificate_id(issuing.certificate) in str(next((files.pki / "issuing").iterdir()))


def test_json_names_what_came(files: Files) -> None:
    told = json.loads(files.take("--p12", files.pfx(CA), "--json").stdout)
    assert (told["pki"], told["state"], told["root"]) == (str(files.pki), "active", None)
    assert told["issuing"]["id"] == certificate_id(CA.certificate)
    assert told["advice"] == []


def test_advice_is_given_and_the_ca_is_taken(files: Files) -> None:
    result = files.take("--p12", files.pfx(made(ROOT, key=rsa_key(2048))))
    assert result.exit_code == 0
    assert result.stderr.startswith(f"{files.directory}/ca.pfx: advice: RSA-2048 key, good until 2030")


def test_no_key_is_printed(files: Files) -> None:
    assert "PRIVATE" not in files.take("--p12", files.pfx(CA), "--json").output


# Into a store in use


@pytest.fixture
def in_use(files: Files) -> Files:
    """A store whose root `NEXT` stands below too."""
    save(OWN, files.pki)
    return files


OWN = create_authority(NOW)
OWN_ROOT = Made(OWN.roots[0].certificate, OWN.roots[0].key)  # type: ignore[arg-type]  # its key is here
NEXT = made(OWN_ROOT, subject="next")


def test_a_ca_below_a_trusted_root_takes_over(in_use: Files) -> None:
    result = in_use.take("--p12", in_use.pfx(NEXT))
    assert result.exit_code == 0, result.output
    states = {one.certificate: one.state for one in in_use.authority.issuing}
    assert states == {NEXT.certificate: State.ACTIVE, OWN.issuer.certificate: State.RETIRING}
    assert in_use.authority.trusted == OWN.trusted
    assert f"outgate pki rotate issuing --retire --pki {in_use.pki}" in result.stdout
    assert OWN.roots[0].certificate.subject.rfc4514_string() in result.stdout


def test_staged_it_waits_whoever_trusts_its_root(in_use: Files) -> None:
    result = in_use.take("--p12", in_use.pfx(NEXT), "--stage")
    assert result.exit_code == 0
    assert in_use.authority.issuer.certificate == OWN.issuer.certificate
    assert f"outgate pki rotate issuing --activate --pki {in_use.pki}" in result.stdout


def test_a_ca_below_a_new_root_waits_with_it(in_use: Files) -> None:
    root = in_use.certificate("root", ROOT)
    result = in_use.take("--p12", in_use.pfx(CA), "--chain", in_use.certificate("chain", BETWEEN), "--root", root)
    assert result.exit_code == 0, result.output
    authority = in_use.authority
    assert authority.issuer.certificate == OWN.issuer.certificate
    assert {one.certificate: one.state for one in authority.roots}[ROOT.certificate] is State.STAGED
    assert set(authority.trusted) == {*OWN.trusted, ROOT.certificate}
    assert "staged: it signs nothing yet" in result.stdout
    assert f"outgate pki rotate root --activate --pki {in_use.pki}" in result.stdout
    activated = activate_root(authority, NOW + timedelta(minutes=1))
    assert activated.issuer.chain[:2] == (CA.certificate, BETWEEN.certificate)
    # Who has the old root alone finds a path: it signed the new one.
    activated.issuer.chain[2].verify_directly_issued_by(OWN.roots[0].certificate)


def test_a_new_self_signed_ca_waits_with_its_key(in_use: Files) -> None:
    result = in_use.take("--p12", in_use.pfx(ROOT))
    assert result.exit_code == 0, result.output
    (staged,) = (root for root in in_use.authority.roots if root.state is State.STAGED)
    assert staged.certificate == ROOT.certificate
    assert staged.key is not None
    assert sum(one.state is State.STAGED for one in in_use.authority.issuing) == 1


def test_a_ca_of_nobody_knows_which_root_is_not_taken_beside_others(in_use: Files) -> None:
    before = contents(in_use.pki)
    result = in_use.take("--p12", in_use.pfx(CA))
    assert result.exit_code == 1
    assert "give it too, for workloads must trust it" in result.stderr
    assert result.stderr.count("\n") == 1
    assert contents(in_use.pki) == before


@pytest.mark.parametrize("which", [NEXT, OWN_ROOT], ids=["issuing CA", "root"])
def test_what_is_here_is_not_taken_again(in_use: Files, which: Made) -> None:
    in_use.take("--p12", in_use.pfx(NEXT), "--stage")
    before = contents(in_use.pki)
    result = in_use.take("--p12", in_use.pfx(which))
    assert result.exit_code == 1
    assert "here already" in result.stderr
    assert contents(in_use.pki) == before


def test_without_any_root_here_a_renewed_ca_takes_over_and_another_waits(files: Files) -> None:
    assert files.take("--p12", files.pfx(CA)).exit_code == 0
    renewed = made(BETWEEN, subject="gate CA")
    assert files.take("--p12", files.pfx(renewed)).exit_code == 0
    assert files.authority.issuer.certificate == renewed.certificate
    other = made(made(subject="another root"), subject="gate CA")
    assert "staged" in files.take("--p12", files.pfx(other)).stdout
    assert files.authority.issuer.certificate == renewed.certificate


# What is not taken: each with its reason, and nothing written

REFUSED: dict[str, tuple[Callable[[], Made], str]] = {
    "expired": (lambda: made(ROOT, days=(-9, -1)), "expired"),
    "not yet valid": (lambda: made(ROOT, days=(1, 9)), "not valid before"),
    "a leaf": (lambda: made(ROOT, ca=False), "not a CA"),
    "may not sign": (lambda: made(ROOT, put=((usage("crl_sign"), True),)), "keyUsage does not say keyCertSign"),
    "RSA-1024": (lambda: made(ROOT, key=rsa_key(1024)), "RSA-1024 key"),
    "P-192": (lambda: made(ROOT, key=ec.generate_private_key(ec.SECP192R1())), "EC secp192r1 key"),
    "no identifier": (lambda: made(ROOT, drop=(x509.SubjectKeyIdentifier,)), "no subjectKeyIdentifier"),
    "a root with path length 0": (lambda: made(path_length=0), "path length 0 permits 0 CA below it"),
}


@pytest.mark.parametrize(("ca", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("stage", [False, True], ids=["new store", "store in use"])
def test_a_ca_that_would_break_clients_is_not_taken(
    files: Files, ca: Callable[[], Made], reason: str, stage: bool
) -> None:
    if stage:
        save(OWN, files.pki)
    before = contents(files.directory / "pki")
    result = files.take("--p12", files.pfx(ca()), *(["--stage"] if stage else []))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert any(line.startswith(f"{files.directory}/ca.pfx: fault: {reason}") for line in result.stderr.splitlines())
    assert contents(files.directory / "pki") == before


def test_a_fault_above_it_is_a_reason_too(files: Files) -> None:
    root = made(subject="R", path_length=0)
    between = made(root, subject="between")
    above = files.certificate("above", between)
    result = files.take("--p12", files.pfx(made(between)), "--chain", above, "--root", files.certificate("root", root))
    assert result.exit_code == 1
    assert "above it, CN=R: path length 0 permits 0 CA below it, and 2 must stand there" in result.stderr
    assert not files.pki.exists()


def test_the_wrong_key_is_not_taken(files: Files) -> None:
    result = files.take("--cert", files.certificate("cert", CA), "--key", files.key("key", ROOT))
    assert result.exit_code == 1
    assert f"{files.directory}/cert: fault: the key is another certificate's" in result.stderr
    assert not files.pki.exists()


def test_a_ca_without_its_key_is_not_taken(files: Files) -> None:
    result = files.take("--cert", files.certificate("cert", CA))
    assert result.exit_code == 1
    assert "no private key in it; name the key's file with --key, or take PKCS#12 with the key" in result.stderr


@pytest.mark.parametrize("root", [made(subject="another"), BETWEEN], ids=["another root", "no root"])
def test_a_root_that_did_not_sign_it_is_not_taken(files: Files, root: Made) -> None:
    result = files.take("--p12", files.pfx(CA), "--root", files.certificate("root", root))
    assert result.exit_code == 1
    assert f"{files.directory}/root is no root that leads to it" in result.stderr
    assert not files.pki.exists()


UNREADABLE: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "empty; name a file that holds a CA"),
    "garbage": (b"\x30\x03\x02\x01\x05", "neither PKCS#12 nor PEM nor DER, or damaged; take a fresh copy"),
    "too large": (bytes(10 << 20), "File too large; name the CA's own file"),
    "a directory": (None, "Is a directory; name the CA's own file"),
}


@pytest.mark.parametrize(("content", "said"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("option", ["--p12", "--cert", "--root", "check"])
def test_what_cannot_be_read_is_one_line(files: Files, content: bytes | None, said: str, option: str) -> None:
    path = files.directory / "file"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    beside: list[str | Path] = ["--p12", files.pfx(CA)] if option == "--root" else []
    result = invoke("check", path) if option == "check" else files.take(option, path, *beside)
    assert result.exit_code == 3
    assert result.stderr == f"outgate: {path}: {said}\n"
    assert not files.pki.exists()


def test_the_wrong_password_is_one_line_without_it(files: Files) -> None:
    pfx = files.pfx(CA, password=b"secret")
    result = files.take("--p12", pfx, "--password-file", files.put("password", b"wr0ng"))
    assert result.exit_code == 3
    assert result.stderr == (
        f"outgate: {pfx}: the password does not open it, or it is damaged; check the file that holds it\n"
    )
    open_password = files.put("open", b"secret", mode=0o644)
    result = files.take("--p12", pfx, "--password-file", open_password)
    assert result.exit_code == 3
    assert "mode 0644 shows the password to others; run: chmod 600" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["--p12", "x", "--cert", "y"], ["--key", "x"], ["--p12", "x", "--key", "y"]],
    ids=["no CA", "two", "a key alone", "a key beside PKCS#12"],
)
def test_wrong_usage_is_exit_2(files: Files, arguments: list[str]) -> None:
    assert files.take(*arguments).exit_code == 2
    assert not files.pki.exists()


def test_a_place_that_cannot_be_written_is_exit_3(files: Files) -> None:
    files.put("pki", b"")
    result = files.take("--p12", files.pfx(CA))
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1


# Keys in a token


MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so")


@pytest.mark.client
def test_a_key_that_stays_in_its_token_signs(files: Files) -> None:
    tool = program("softhsm2-util")
    module = next((path for path in MODULES if os.path.exists(path)), None)
    if module is None:
        pytest.skip("softhsm2's library is not found")
    (files.directory / "tokens").mkdir()
    configuration = files.put("softhsm2.conf", f"directories.tokendir = {files.directory}/tokens\n".encode())
    environment = os.environ | {"SOFTHSM2_CONF": str(configuration)}
    ca = made(ROOT, subject="in a token")
    key = files.key("key", ca)
    for arguments in (
        ["--init-token", "--free", "--label", "t", "--pin", "1234", "--so-pin", "1234"],
        ["--import", str(key), "--token", "t", "--label", "ca", "--id", "01", "--pin", "1234"],
    ):
        subprocess.run([tool, *arguments], env=environment, check=True, capture_output=True)
    key.unlink()
    pin = files.put("pin", b"1234")
    uri = f"pkcs11:token=t;object=ca?module-path={module}&pin-source=file:{pin}"
    command = [sys.executable, "-m", "proxy", "pki", "import", "--pki", str(files.pki), "--key", uri]
    command += ["--cert", str(files.certificate("cert", ca)), "--root", str(files.certificate("root", ROOT))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    held = (files.pki / "issuing" / certificate_id(ca.certificate) / "ca.key").read_text()
    assert held == uri + "\n"
    assert "still has the key" not in done.stdout
    wrong = [*command, "--cert", str(files.certificate("wrong", CA))]
    done = subprocess.run(wrong, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "the key is another certificate's" in done.stderr


# outgate pki check


def test_check_says_in_one_line_that_a_ca_is_fine(files: Files) -> None:
    result = invoke(
        "check", files.pfx(CA, BETWEEN, ROOT, password=b"-"), "--password-file", files.put("password", b"-")
    )
    assert result.exit_code == 0
    expires = f"{CA.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    assert result.stdout == f"{files.directory}/ca.pfx: fine for strict: CN=gate CA, expires {expires}\n"


def test_check_has_a_line_for_each_fault_with_its_repair(files: Files) -> None:
    bad = made(ROOT, key=rsa_key(1024), put=((usage("key_cert_sign"), False),))
    result = invoke("check", files.certificate("bad", bad))
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{files.directory}/bad: fault: RSA-1024 key, and clients take 2048 bits or more; make the CA anew with an "
        "EC P-256 key, or RSA-3072",
        f"{files.directory}/bad: fault: keyUsage is not critical (RFC 5280 4.2.1.3); have it issued anew with "
        "keyUsage=critical,keyCertSign,cRLSign",
    ]


def test_check_knows_profiles_and_chains(files: Files) -> None:
    cert, key = files.certificate("cert", CA), files.key("key", CA)
    chain = files.certificate("chain", BETWEEN, ROOT)
    assert invoke("check", cert, "--profile", "aws-nfw", "--key", key, "--chain", chain).exit_code == 0
    assert "its chain does not lead to a root" in invoke("check", cert, "--profile", "aws-nfw", "--key", key).stdout
    assert "Azure Firewall takes RSA" in invoke("check", cert, "--profile", "azure-firewall", "--key", key).stdout


def test_check_as_json(files: Files) -> None:
    told = json.loads(invoke("check", files.certificate("cert", made(ROOT, key=rsa_key(2048))), "--json").stdout)
    assert (told["ok"], told["profile"], len(told["faults"])) == (True, "strict", 1)
    assert set(told["faults"][0]) == {"what", "repair", "breaks"}
    assert told["faults"][0]["breaks"] is False
    told = json.loads(invoke("check", files.certificate("cert", made(ROOT, ca=False)), "--json").stdout)
    assert told["ok"] is False


def test_a_name_in_a_certificate_cannot_move_the_cursor(files: Files) -> None:
    result = invoke("check", files.certificate("cert", made(subject="a\x1b[2Jb")))
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("command", ["import", "export", "check"])
def test_help_shows_an_example_and_imports_no_cryptography(command: str) -> None:
    script = (
        f"import sys; from proxy.commands.pki import pki; pki(['{command}', '--help'], standalone_mode=False); "
        "sys.exit('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"outgate pki {command}" in done.stdout.partition("Example")[2]
    assert "Exit codes: 0" in done.stdout


def test_a_key_of_its_own_kind_is_kept(files: Files) -> None:
    ca = made(ROOT, key=create_key(KeyKind.RSA_3072))
    assert files.take("--p12", files.pfx(ca)).exit_code == 0
    assert key_pem(files.authority.issuer.key) == key_pem(key_of(ca))
