"""Attackers on the pki and trust commands: by names, files, directories and what a process shows of itself."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pki.authority import certificates_pem, key_pem
from tests.end_to_end.world import OUTGATE
from tests.pki.making_cas import make
from tests.proxy.commands_of import WEATHER, invoke
from tests.proxy.rotating import key_of, new_store

NOW = datetime.now(UTC)
FORGED = "\x1b]0;owned\x07\x1b[2Jx\r\n  root     0123456789abcdef  fine\u202e\u2028"  # a title, a new screen, a line
EVIL = 'it\'s $(touch owned) `touch owned` "$HOME" ; rm -rf x & --json'


def outgate(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The program as a user starts it, in a locale in which not every name can be printed."""
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OUTGATE_")}
    return subprocess.run(
        [OUTGATE, *arguments], cwd=cwd, env=clean | strict | dict(env or {}), capture_output=True, timeout=60
    )


def require_plain(said: bytes) -> None:
    """No terminal does anything with it but show it."""
    text = said.decode()
    assert all(line.isprintable() for line in text.split("\n")), text
    assert "Traceback" not in text


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def forged_name(tmp_path: Path) -> Path:
    return tmp_path / os.fsdecode(b"\xff" + FORGED.encode())


def test_a_directory_whose_name_would_forge_a_line_or_is_no_text_is_shown_harmlessly(
    tmp_path: Path, forged_name: Path
) -> None:
    store = new_store(tmp_path)
    forged_store = shutil.copytree(store, forged_name)
    place = tmp_path / os.fsdecode(b"to\xff" + FORGED.encode())
    public = ("--public", "none")
    for arguments in (
        ("trust", "bundle", "--pki", store, "--to", place, "--at", "/trust", *public),
        ("trust", "bundle", "--pki", forged_store, "--to", place, "--at", "/trust", *public),
        ("trust", "bundle", "--pki", store, "--to", place, *public),
        ("trust", "env", "--pki", store, "--to", place, *public),
        ("trust", "run", "--pki", store, "--trust", place, "--", "true"),
        ("trust", "uninstall", "--prefix", forged_store),
        ("trust", "doctor", "--pki", store, "--trust", place, "openssl"),
        ("pki", "distribute", "--pki", store, "--to", "dir", place, "--mount-path", "/trust", *public),
        ("pki", "status", "--pki", forged_store),
        ("pki", "rotate", "issuing", "--pki", forged_store),
        ("pki", "rotate", "root", "--activate", "--pki", forged_store),
        ("pki", "export", "--pki", forged_store, "--profile", "aws-nfw", "--to", tmp_path / f"acm{FORGED}"),
        ("pki", "check", forged_store / "state.json"),
        ("pki", "init", "--pki", tmp_path / f"made{FORGED}", "--root-key", tmp_path / f"key{FORGED}"),
        ("pki", "import", "--pki", forged_store, "--p12", forged_store / "none"),
    ):
        done = outgate(*arguments, cwd=tmp_path)
        require_plain(done.stdout)
        require_plain(done.stderr)
        assert done.returncode in (0, 1, 2, 3, 125), (arguments, done)


def test_a_subject_that_would_forge_a_line_is_shown_harmlessly(tmp_path: Path) -> None:
    made = make(subject=FORGED, now=NOW)
    (tmp_path / "ca.crt").write_bytes(made.certificate.public_bytes(Encoding.PEM))
    (tmp_path / "ca.key").write_bytes(key_pem(made.key))  # type: ignore[arg-type]  # of `make`, elliptic
    (tmp_path / "ca.key").chmod(0o600)
    for arguments in (
        ("pki", "check", "ca.crt"),
        ("pki", "check", "ca.crt", "--profile", "azure-firewall"),
        ("pki", "import", "--pki", "pki", "--cert", "ca.crt", "--key", "ca.key"),
        ("pki", "status", "--pki", "pki"),
        ("pki", "rotate", "root", "--stage", "--pki", "pki"),
        ("pki", "export", "--pki", "pki", "--profile", "aws-nfw", "--to", "acm"),
        ("pki", "status", "--pki", "pki"),
    ):
        done = outgate(*arguments, cwd=tmp_path)
        require_plain(done.stdout)
        require_plain(done.stderr)
    found = json.loads(outgate("pki", "status", "--pki", "pki", "--json", cwd=tmp_path).stdout)
    assert found["cas"][0]["subject"] == made.certificate.subject.rfc4514_string()


TYPED = re.compile(r"\s+(?:(?:now|from [-0-9: ]+ UTC)  +)?((?:outgate|mv|rm|az keyvault|aws) .*)")


def commands_in(said: str) -> list[list[str]]:
    """What a person is told to type, as a shell reads it; in a table the reason stands beside it."""
    found = map(TYPED.match, said.splitlines())
    return [shlex.split(one[1].split("  ")[0]) for one in found if one]


def test_what_is_printed_to_be_typed_names_the_very_path_and_runs_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / EVIL
    place.mkdir()
    store, acm, pfx = str(place / "pki"), str(place / "acm"), str(place / "azure.pfx")
    said = ""
    for arguments in (
        ("pki", "init", "--pki", store),
        ("pki", "rotate", "issuing", "--pki", store),
        ("pki", "rotate", "root", "--stage", "--pki", store),
        ("pki", "status", "--pki", store),
        ("pki", "export", "--pki", store, "--profile", "aws-nfw", "--to", acm),
        ("pki", "export", "--pki", store, "--profile", "azure-firewall", "--to", pfx),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        said += result.stdout
    typed = commands_in(said)
    assert len(typed) > 10
    for words in typed:
        assert any(one.removeprefix("fileb://").startswith(str(place)) for one in words), words
        assert not {"owned", "touch", "-rf"} & set(words), words


@pytest.mark.parametrize("spelling", ["PKCS11:", "Pkcs11:", " pkcs11:"])
def test_a_keys_uri_that_is_spelled_otherwise_makes_no_key_file_and_shows_no_pin(tmp_path: Path, spelling: str) -> None:
    uri = f"{spelling}token=t;object=o?module-path=/lib/p11.so&pin-value=73112"
    for option in ("--root-key", "--issuing-key"):
        done = outgate("pki", "init", "--pki", "pki", option, uri, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (3, b"")
        assert b"73112" not in done.stderr
    assert not list(tmp_path.iterdir())


# --- keys ------------------------------------------------------------------------------------------------------------


def cut(key: bytes) -> bytes:
    return key[: len(key) // 2]


def without_its_marks(key: bytes) -> bytes:
    return key.replace(b"-----BEGIN PRIVATE KEY-----\n", b"")


def doubled(key: bytes) -> bytes:
    return key + key


def as_a_token(key: bytes) -> bytes:
    return b"pkcs11:token=t;object=o?module-path=/x&pin-value=" + base64.b64encode(key)[:200]


def in_a_certificate(key: bytes) -> bytes:
    return key.replace(b"PRIVATE KEY", b"CERTIFICATE")


@pytest.mark.parametrize("spoil", [cut, without_its_marks, doubled, as_a_token, in_a_certificate])
def test_no_part_of_a_key_is_said_whatever_is_wrong_with_it(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    store = Path(new_store(tmp_path))
    path = key_of(store)
    key = path.read_bytes()
    path.write_bytes(spoil(key))
    (tmp_path / "ca.crt").write_bytes(certificates_pem(*load_certificates(store)))
    shutil.copy(path, tmp_path / "spoiled.key")
    (tmp_path / "policy.yaml").write_text(WEATHER)
    said = b""
    for arguments in (
        ("pki", "status", "--pki", store),
        ("pki", "rotate", "issuing", "--pki", store),
        ("pki", "check", "ca.crt", "--key", "spoiled.key"),
        ("pki", "import", "--pki", "new", "--cert", "ca.crt", "--key", "spoiled.key"),
        ("pki", "init", "--pki", "new", "--root-key", "spoiled.key"),
        ("pki", "rotate", "root", "--stage", "--pki", store, "--root-key", "spoiled.key"),
        ("trust", "doctor", "--pki", store, "openssl"),
        ("run", "-p", "policy.yaml", "-w", "weather", "--pki", store, "--", "true"),
    ):
        done = outgate(*arguments, cwd=tmp_path)
        said += done.stdout + done.stderr
    assert b"Traceback" not in said
    secret = b"".join(line for line in key.splitlines() if not line.startswith(b"-----"))
    for text in (secret, base64.b64encode(key)):
        assert not [text[at : at + 12] for at in range(len(text) - 12) if text[at : at + 12] in said]


def load_certificates(store: Path) -> list[x509.Certificate]:
    return [x509.load_pem_x509_certificate(path.read_bytes()) for path in store.glob("issuing/*/ca.crt")]


CORE = """
import resource, sys
from proxy.cli import outgate
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
try:
    outgate(sys.argv[1:])
except SystemExit:
    print(resource.getrlimit(resource.RLIMIT_CORE)[0])
"""


@pytest.mark.parametrize("words", ["pki status --pki pki", "trust doctor --pki pki openssl"])
@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_CORE)[1] == 0, reason="no process here leaves a core")
def test_a_command_that_holds_keys_leaves_no_core(tmp_path: Path, words: str) -> None:
    new_store(tmp_path)
    done = subprocess.run([sys.executable, "-c", CORE, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] in ("0", "1"), done


# --- trust directories -----------------------------------------------------------------------------------------------


def test_no_program_is_led_to_a_directory_in_which_others_may_put_code(tmp_path: Path) -> None:
    store, shared = new_store(tmp_path), tmp_path / "shared"
    shared.mkdir()
    (shared / "evil.ini").write_text("auto_prepend_file = /tmp/evil.php\n")  # PHP reads every .ini file there
    shared.chmod(0o1777)
    for arguments in (
        ("bundle", "--pki", store, "--to", str(shared)),
        ("env", "--pki", store, "--to", str(shared)),
        ("run", "--pki", store, "--trust", str(shared), "--", "true"),
    ):
        result = invoke("trust", *arguments)
        assert result.exit_code != 0
        assert result.stdout == ""
        assert f"{shared}: mode 1777 lets others write there" in result.stderr
    result = invoke("pki", "distribute", "--pki", store, "--to", "dir", str(shared))
    assert result.exit_code == 3
    assert [path.name for path in shared.iterdir()] == ["evil.ini"]


SHOW = "import os, sys; d = os.path.dirname(os.environ['SSL_CERT_FILE']); print(d, oct(os.stat(d).st_mode & 0o777))"


def test_the_directory_of_a_command_is_its_users_alone_wherever_temporary_files_go(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "link").symlink_to("shared")
    for place in ("shared", "link", "./shared/../shared"):
        done = outgate(
            "trust", "run", "--pki", store, "--", sys.executable, "-c", SHOW, cwd=tmp_path, env={"TMPDIR": place}
        )
        directory, mode = done.stdout.decode().split()
        assert os.path.isabs(directory), done
        assert mode == "0o700"


# --- what leaves the machine -----------------------------------------------------------------------------------------

COUNTED = """
set -e
ip link set lo up
ip link add outside type veth peer name far
for one in outside far; do sysctl -qw net.ipv6.conf.$one.disable_ipv6=1; ip link set $one up; done
ip addr add 203.0.113.1/24 dev outside
ip neigh add 203.0.113.2 lladdr 02:00:00:00:00:02 dev outside
ip route add default via 203.0.113.2
sent() { awk '$1 == "outside:" { print $11 }' /proc/net/dev; }
test "$(sent)" = 0
"$@" || true
echo "sent $(sent)"
echo x >/dev/udp/203.0.113.9/9
test "$(sent)" -gt 0  # it counts
"""


@pytest.mark.kernel
@pytest.mark.client
@pytest.mark.skipif("os.geteuid() != 0", reason="only root has a network of its own here")
@pytest.mark.parametrize("trusting", [False, True], ids=["refused", "trusted"])
def test_the_doctor_and_its_clients_send_nothing_out_of_the_machine(tmp_path: Path, trusting: bool) -> None:
    store = new_store(tmp_path)
    clients = ["curl", "wget", "openssl", "git", "python", "pip", "node", "npm"]
    start = [str(OUTGATE), "trust", "doctor", "--pki", store, "--json", *clients]
    if trusting:
        start = [str(OUTGATE), "trust", "run", "--pki", store, "--", *start]
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", COUNTED, "bash", *start],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "https_proxy": "http://203.0.113.7:3128", "no_proxy": ""},
        capture_output=True,
        text=True,
        timeout=180,
    )
    answer, _, sent = done.stdout.rpartition("sent ")
    assert sent == "0\n", done
    assert {one["trusts"] for one in json.loads(answer)["clients"]} == {"yes" if trusting else "no"}


# --- the machine's store ---------------------------------------------------------------------------------------------


def test_what_is_no_ca_is_not_installed_and_says_so_in_one_line(tmp_path: Path) -> None:
    der = make(now=NOW).certificate.public_bytes(Encoding.DER)
    for number, (old, new) in enumerate(
        [
            (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x04"),
            (bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d0209")),
            (bytes.fromhex("0603551d0e"), bytes.fromhex("0603551d0f")),
        ]
    ):
        path = tmp_path / f"{number}.crt"
        body = base64.encodebytes(der.replace(old, new))
        path.write_bytes(b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n")
        result = invoke("trust", "install", "--root", str(path), "--prefix", str(tmp_path))
        assert (result.exit_code, result.stderr.count("\n")) == (3, 1)
        assert "no CA's certificate" in result.stderr
