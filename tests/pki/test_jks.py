import struct
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from pki.authority import certificates_pem, create_root
from pki.distribution import trust_files
from pki.jks import truststore
from pki.trust import system_bundle_path
from tests.pki.clients import program

NOW = datetime(2026, 11, 22, tzinfo=UTC)
ONE, TWO = (create_root(NOW, name=name).certificate for name in ("One", "Two"))
DER = [certificate.public_bytes(Encoding.DER) for certificate in (ONE, TWO)]


def test_a_store_is_the_same_bytes_whatever_the_order() -> None:
    assert truststore(DER) == truststore(reversed(DER))


def test_a_certificate_given_twice_stands_once() -> None:
    assert truststore([DER[0], DER[0]]) == truststore(DER[:1])


def test_a_store_begins_with_magic_version_and_count() -> None:
    assert struct.unpack(">III", truststore(DER)[:12]) == (0xFEEDFEED, 2, 2)


def test_an_empty_store_is_a_store() -> None:
    assert len(truststore([])) == 12 + 20


def keytool(store: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        program("keytool"),
        "-J-Duser.language=en",
        "-list",
        "-storetype",
        "jks",
        "-keystore",
        str(store),
        *options,
    ]
    return subprocess.run(command, input="\n", capture_output=True, text=True, timeout=60)


@pytest.mark.client
@pytest.mark.parametrize("password", [["-storepass", "changeit"], []], ids=["changeit", "no password"])
def test_keytool_opens_a_store(password: list[str], tmp_path: Path) -> None:
    (tmp_path / "trust.jks").write_bytes(truststore(DER))
    listed = keytool(tmp_path / "trust.jks", *password)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert listed.stdout.count("trustedCertEntry") == 2


@pytest.mark.client
def test_keytool_refuses_a_store_under_another_password(tmp_path: Path) -> None:
    (tmp_path / "trust.jks").write_bytes(truststore(DER))
    assert "password was incorrect" in keytool(tmp_path / "trust.jks", "-storepass", "changed").stdout


@pytest.mark.client
def test_keytool_reads_every_public_root_of_this_machine(tmp_path: Path) -> None:
    system = system_bundle_path()
    if system is None:
        pytest.skip("this machine has no bundle of public roots")
    files = trust_files("/trust", certificates_pem(ONE), system.read_bytes())
    (tmp_path / "trust.jks").write_bytes(files["truststore.jks"])
    listed = keytool(tmp_path / "trust.jks", "-storepass", "changeit")
    assert listed.stdout.count("trustedCertEntry") == files["bundle.pem"].count(b"BEGIN CERTIFICATE") > 1
