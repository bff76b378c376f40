"""The examples that the help of every `outgate pki` command ends with are typed, and succeed."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates

from pki.authority import certificates_pem, create_authority, create_issuing, key_pem
from pki.pkcs12 import passwordless_pfx
from proxy.commands.pki import COMMANDS, pki
from tests.proxy.commands_of import invoke

NOW = datetime.now(UTC)
IN_A_CLUSTER = {"secret", "serving"}  # typed against an API server elsewhere
POLICY = "version: 1\nworkloads: {build: {rules: [{host: api.example, tls: inspect}]}}\n"


def prepare(command: str) -> None:
    """What the examples of a command find in the working directory."""
    Path("policy.yaml").write_text(POLICY)
    corporate = create_authority(NOW, name="Corporate")
    secret = {"password": b"secret\n"}
    if command == "import":
        vaulted, kept = (create_issuing(corporate.roots[0], NOW, name="Corporate") for _ in range(2))
        Path("corporate-root.crt").write_bytes(certificates_pem(*corporate.trusted))
        Path("ca.crt").write_bytes(certificates_pem(kept.certificate))
        Path("chain.pem").write_bytes(certificates_pem(*kept.chain))
        secret |= {
            "from-the-vault.pfx": passwordless_pfx(vaulted.certificate, vaulted.key),
            "ca.key": key_pem(kept.key),
        }
    elif command not in ("init", ""):
        assert invoke("pki", "init", "--pki", "pki").exit_code == 0
        secret["offline.key"] = next(Path("pki/roots").glob("*/ca.key")).read_bytes()
    if command == "adopt":
        mounted = Path("etc/outgate/ca")
        mounted.mkdir(parents=True)
        (mounted / "tls.crt").write_bytes(certificates_pem(*corporate.issuer.chain))
        (mounted / "tls.key").write_bytes(key_pem(corporate.issuer.key))
        (mounted / "ca.crt").write_bytes(certificates_pem(*corporate.trusted))
    if command == "check":
        issuing = corporate.issuer
        secret["issuing.pfx"] = serialize_key_and_certificates(
            None, issuing.key, issuing.certificate, None, BestAvailableEncryption(b"secret")
        )
        assert (
            invoke("pki", "export", "--pki", "pki", "--profile", "azure-firewall", "--to", "azure.pfx").exit_code == 0
        )
    for name, content in secret.items():
        Path(name).write_bytes(content)
        Path(name).chmod(0o600)


def examples(command: str) -> list[list[str]]:
    """The words of each example behind `outgate`, paths made relative; without those that need a network."""
    described = pki.get_command(click.Context(pki), command) if command else pki
    assert described
    lines = [line.strip() for line in str(described.epilog).partition("Example")[2].splitlines()[1:]]
    typed = [shlex.split(line)[1:] for line in lines if line.startswith("outgate pki ") and "kubernetes" not in line]
    return [[word.lstrip("/") for word in words] for words in typed]


@pytest.mark.parametrize(
    "command",
    ["", *(name for name in COMMANDS if name not in IN_A_CLUSTER)],
    ids=lambda command: command or "the group",
)
def test_the_examples_of_the_help_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(command)
    found = examples(command)
    assert found
    for words in found:
        result = invoke(*words)
        assert result.exit_code == 0, f"outgate {shlex.join(words)}: {result.output}"
