"""Tokens of SoftHSM for tests: made by its own tool, in a directory of their own."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from pki.authority import CaKey, key_pem

MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",  # Debian, Ubuntu, Alpine
    "/usr/lib64/softhsm/libsofthsm.so",  # Fedora, RHEL
    "/usr/local/lib/softhsm/libsofthsm2.so",
)
PIN = "pin-9b1d"  # to be looked for where none may stand


@dataclass(frozen=True, slots=True)
class SoftHsm:
    """Where its tokens are. SOFTHSM2_CONF must name `configuration` before a process loads the module."""

    directory: Path
    module: Path

    @property
    def configuration(self) -> Path:
        return self.directory / "softhsm2.conf"

    @property
    def tokens(self) -> Path:
        return self.directory / "tokens"

    def make_token(self, label: str) -> None:
        self._run("--init-token", "--free", "--label", label, "--so-pin", "so-pin-1", "--pin", PIN)

    def put(self, key: CaKey, token: str, label: str, key_id: str) -> None:
        """Imports a key. `key_id` is hex."""
        file = self.directory / "key.pem"
        file.write_bytes(key_pem(key))
        self._run("--import", str(file), "--token", token, "--label", label, "--id", key_id, "--pin", PIN)
        file.unlink()

    def uri(self, token: str, label: str, *, pin: str | None = PIN, more: str = "") -> str:
        value = f"&pin-value={quote(pin)}" if pin is not None else ""
        return f"pkcs11:token={quote(token)};object={quote(label)}?module-path={self.module}{value}{more}"

    def _run(self, *arguments: str) -> None:
        subprocess.run(
            ["softhsm2-util", *arguments],
            env={"SOFTHSM2_CONF": str(self.configuration), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            check=True,
            capture_output=True,
        )


def make_softhsm(directory: Path) -> SoftHsm:
    """Skips the test where SoftHSM is not installed."""
    module = next((Path(path) for path in MODULES if Path(path).exists()), None)
    if module is None or shutil.which("softhsm2-util") is None:
        pytest.skip("softhsm2 is not installed")
    made = SoftHsm(directory, module)
    made.tokens.mkdir()
    made.configuration.write_text(
        f"directories.tokendir = {made.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    return made
