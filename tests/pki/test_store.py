import errno
import fcntl
import json
import os
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from pki.authority import Authority, Root, certificate_id, create_authority, create_root, key_pem
from pki.files import write_file
from pki.store import StoreError, StoreExists, load, load_issuing, save

NOW = datetime(2026, 11, 22, tzinfo=UTC)
AUTHORITY = create_authority(NOW)
OTHER = create_authority(NOW)
ROOT_ID = certificate_id(AUTHORITY.roots[0].certificate)
ISSUING_ID = certificate_id(AUTHORITY.issuing.certificate)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    save(AUTHORITY, tmp_path / "pki")
    return tmp_path / "pki"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def same(one: Authority, two: Authority) -> bool:
    keys = [[key_pem(key) for key in (a.issuing.key, *(root.key for root in a.roots)) if key] for a in (one, two)]
    certificates = [
        (a.issuing.certificate, a.issuing.chain, [root.certificate for root in a.roots]) for a in (one, two)
    ]
    return keys[0] == keys[1] and certificates[0] == certificates[1]


def test_what_was_saved_is_loaded(store: Path) -> None:
    assert same(load(store), AUTHORITY)


def test_a_store_is_laid_out_as_documented(store: Path) -> None:
    assert sorted(contents(store)) == sorted(
        [
            ".lock",
            "state.json",
            f"roots/{ROOT_ID}/ca.crt",
            f"roots/{ROOT_ID}/ca.key",
            f"issuing/{ISSUING_ID}/ca.crt",
            f"issuing/{ISSUING_ID}/ca.key",
            f"issuing/{ISSUING_ID}/chain.pem",
        ]
    )
    state = json.loads((store / "state.json").read_text())
    assert state == {"version": 1, "issuing": ISSUING_ID, "roots": [ROOT_ID]}


def test_keys_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        save(AUTHORITY, tmp_path / "pki")
    finally:
        os.umask(before)
    keys = list((tmp_path / "pki").rglob("ca.key"))
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in keys} == {0o700}
    assert (tmp_path / "pki").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610], ids=lambda mode: f"{mode:04o}")
@pytest.mark.parametrize("key", [f"issuing/{ISSUING_ID}/ca.key", f"roots/{ROOT_ID}/ca.key"], ids=["issuing", "root"])
def test_a_key_open_to_others_is_refused_and_the_repair_works(store: Path, key: str, mode: int) -> None:
    (store / key).chmod(mode)
    with pytest.raises(StoreError, match=f"mode {mode:04o} shows the key to others; run: chmod 600 ") as refused:
        load(store)
    subprocess.run(["/bin/sh", "-c", str(refused.value).partition("run: ")[2]], check=True)
    assert same(load(store), AUTHORITY)


# What may be absent


def test_a_root_key_may_be_offline(store: Path) -> None:
    (store / "roots" / ROOT_ID / "ca.key").unlink()
    assert load(store).roots == (Root(AUTHORITY.roots[0].certificate, None),)


def test_a_store_without_a_root_key_is_saved_without_one(tmp_path: Path) -> None:
    save(Authority(AUTHORITY.issuing, (Root(AUTHORITY.roots[0].certificate),)), tmp_path)
    assert not (tmp_path / "roots" / ROOT_ID / "ca.key").exists()
    assert load(tmp_path).roots[0].key is None


def test_a_gate_needs_only_the_issuing_directory(store: Path) -> None:
    shutil.rmtree(store / "roots")
    found = load(store)
    assert (found.roots, found.issuing.certificate) == ((), AUTHORITY.issuing.certificate)
    assert load_issuing(store / "issuing" / ISSUING_ID).chain == AUTHORITY.issuing.chain


# Writing


def test_an_existing_store_is_not_overwritten(store: Path) -> None:
    before = contents(store)
    with pytest.raises(StoreExists, match="holds an authority already"):
        save(OTHER, store)
    assert contents(store) == before


def test_overwriting_switches_and_destroys_no_key(store: Path) -> None:
    before = contents(store)
    save(OTHER, store, overwrite=True)
    assert same(load(store), OTHER)
    after = contents(store)
    assert {name for name in before if after.get(name) != before[name]} == {"state.json"}


def test_a_second_writer_is_refused(store: Path) -> None:
    with open(store / ".lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another outgate is writing there"):
            save(OTHER, store, overwrite=True)
    assert same(load(store), AUTHORITY)


@pytest.mark.parametrize("name", ["roots", "ca.key", "chain.pem", "state.json"])
def test_a_full_disk_leaves_no_half_store(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device; make room there"):
        save(AUTHORITY, tmp_path / "pki")
    assert set(contents(tmp_path / "pki")) == {".lock"}
    monkeypatch.undo()
    save(AUTHORITY, tmp_path / "pki")
    assert same(load(tmp_path / "pki"), AUTHORITY)


def test_a_full_disk_leaves_the_old_store_in_use(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(store)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        save(OTHER, store, overwrite=True)
    assert contents(store) == before


def test_a_directory_that_cannot_be_made_names_the_repair(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="Not a directory; choose a directory you may write"):
        save(AUTHORITY, tmp_path / "file" / "pki")


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b"old")
    with open(tmp_path / "state.json", "rb") as reader:
        write_file(tmp_path / "state.json", b"new", 0o600)
        assert reader.read() == b"old"
    assert contents(tmp_path) == {"state.json": b"new"}


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "ca.key").symlink_to(tmp_path / "victim")
    write_file(tmp_path / "ca.key", b"key", 0o600)
    assert contents(tmp_path) == {"victim": b"precious", "ca.key": b"key"}
    assert not (tmp_path / "ca.key").is_symlink()


# Stores that are damaged


def test_no_store_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory; make an authority with 'outgate pki init --pki "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param("{", "Expecting property name", id="not JSON"),
        pytest.param("\xff", "can't decode", id="not text"),
        pytest.param("[]", "not a state that this version knows", id="not an object"),
        pytest.param('{"version": 2}', "not a state that this version knows", id="newer"),
        pytest.param(
            '{"version": 1, "issuing": "../../../../etc/passwd", "roots": []}',
            "not a state that this version knows",
            id="path traversal",
        ),
        pytest.param(
            json.dumps({"version": 1, "issuing": ISSUING_ID, "roots": ["../escape"]}),
            "not a state that this version knows",
            id="path traversal in roots",
        ),
        pytest.param(
            json.dumps({"version": 1, "issuing": "0" * 16, "roots": []}),
            "ca.crt: No such file or directory",
            id="issuing CA gone",
        ),
    ],
)
def test_a_broken_state_is_refused(store: Path, state: str, message: str) -> None:
    (store / "state.json").write_bytes(state.encode("latin-1"))
    with pytest.raises(StoreError, match=message):
        load(store)


ENCRYPTED = AUTHORITY.issuing.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
RSA_KEY = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
CERTIFICATE = AUTHORITY.issuing.certificate.public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("ca.key", key_pem(OTHER.issuing.key), "not the key of ca.crt beside it", id="another key"),
        pytest.param("ca.key", RSA_KEY, "not an elliptic curve key", id="an RSA key"),
        pytest.param("ca.key", b"", "no unencrypted PEM key", id="an empty key"),
        pytest.param("ca.key", ENCRYPTED, "no unencrypted PEM key", id="an encrypted key"),
        pytest.param("ca.crt", b"garbage", "no PEM certificate", id="no certificate"),
        pytest.param("ca.crt", CERTIFICATE * 2, "2 certificates where one must stand", id="two certificates"),
        pytest.param(
            "chain.pem",
            OTHER.issuing.certificate.public_bytes(Encoding.PEM),
            "does not start with ca.crt",
            id="another chain",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name(store: Path, name: str, content: bytes, message: str) -> None:
    (store / "issuing" / ISSUING_ID / name).write_bytes(content)
    with pytest.raises(StoreError, match=message) as refused:
        load(store)
    assert name in str(refused.value)


def test_an_issuing_ca_of_another_root_is_refused(store: Path) -> None:
    stranger = create_root(NOW, name="Stranger")
    folder = store / "roots" / ROOT_ID
    (folder / "ca.key").unlink()
    (folder / "ca.crt").write_bytes(stranger.certificate.public_bytes(Encoding.PEM))
    with pytest.raises(StoreError, match="no root there signed issuing CA"):
        load(store)


def test_an_expired_authority_still_loads(tmp_path: Path) -> None:
    save(create_authority(NOW - timedelta(days=4000)), tmp_path)
    assert load(tmp_path).roots
