"""An authority whose keys are in a token from the first day through its rotations, by the program as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pki.authority import KeyKind, create_key
from pki.chains import is_signed_by
from pki.store import load_trusted, survey
from tests.pki.softhsm import PIN, SoftHsm, make_softhsm

NAMES = ("root", "issuing", "next-issuing", "next-root", "last-issuing")


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftHsm:
    """A token `outgate` that holds a key by each name. Only programs that are started here see it."""
    (tmp_path / "hsm").mkdir()
    made = make_softhsm(tmp_path / "hsm")
    made.make_token("outgate")
    for number, name in enumerate(NAMES, start=1):
        made.put(create_key(KeyKind.EC_P256), "outgate", name, f"{number:02x}")
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.configuration))
    return made


def outgate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "proxy", "pki", *words], capture_output=True, text=True, timeout=60)


@pytest.mark.client
def test_every_key_stays_in_its_token_and_no_pin_is_shown(token: SoftHsm, tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    root, issuing, next_issuing, next_root, last_issuing = (token.uri("outgate", name) for name in NAMES)
    store = ("--pki", str(pki))
    walk = [
        outgate("init", *store, "--root-key", root, "--issuing-key", issuing),
        outgate("rotate", "issuing", *store, "--issuing-key", next_issuing),
        outgate("rotate", "issuing", *store, "--retire"),
        outgate("rotate", "root", *store, "--stage", "--new-root-key", next_root),
        outgate("rotate", "root", *store, "--activate", "--issuing-key", last_issuing),
        outgate("status", *store),
        outgate("status", *store, "--json"),
    ]
    assert [(done.returncode, done.stderr) for done in walk] == [(0, "")] * len(walk)
    assert all(PIN not in done.stdout for done in walk)
    told = json.loads(walk[-1].stdout)["cas"]
    assert {ca["key_is"] for ca in told} == {"token"}
    assert [ca["key"].partition("object=")[2].partition("?")[0] for ca in told] == [
        "root",
        "next-root",
        "next-issuing",
        "last-issuing",
    ]
    assert all(f"key {ca['key']}\n" in walk[-2].stdout for ca in told)
    assert is_signed_by(survey(pki).issuing[-1].certificate, load_trusted(pki)[1])
    assert [path for path in pki.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()] == []

    retired = outgate("rotate", "root", *store, "--retire", "--force")
    assert (retired.returncode, retired.stderr) == (0, "")
    assert f"its key was not here and is not deleted: {told[0]['key']}\n" in retired.stdout
    assert PIN not in retired.stdout


@pytest.mark.client
def test_a_key_in_a_token_is_not_followed_by_a_file_unasked(token: SoftHsm, tmp_path: Path) -> None:
    store = ("--pki", str(tmp_path / "pki"))
    uris = (token.uri("outgate", name) for name in ("root", "issuing"))
    made = outgate(
        "init", *store, *(word for pair in zip(("--root-key", "--issuing-key"), uris, strict=True) for word in pair)
    )
    assert made.returncode == 0
    for what, option in (("issuing",), "--issuing-key"), (("root", "--stage"), "--new-root-key"):
        refused = outgate("rotate", *what, *store)
        assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
        assert f"is in a token; name the next one's with {option}: pkcs11:URI, or FILE" in refused.stderr
    assert outgate("rotate", "root", *store, "--stage", "--new-root-key", str(tmp_path / "new.key")).returncode == 0


@pytest.mark.client
def test_a_token_that_is_gone_is_one_line_and_changes_nothing(token: SoftHsm, tmp_path: Path) -> None:
    store = ("--pki", str(tmp_path / "pki"))
    assert outgate("init", *store, "--root-key", token.uri("outgate", "root")).returncode == 0
    before = (tmp_path / "pki" / "state.json").read_bytes()
    token.tokens.rename(tmp_path / "elsewhere")
    token.tokens.mkdir()
    refused = outgate("rotate", "issuing", *store)
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
    assert refused.stderr.startswith("outgate: pkcs11:")
    assert PIN not in refused.stderr
    assert (tmp_path / "pki" / "state.json").read_bytes() == before
