import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pki.authority import (
    Authority,
    AuthorityError,
    CaKey,
    Line,
    Root,
    State,
    certificate_id,
    certificates_pem,
    create_authority,
    create_issuing,
    create_root,
    issue_leaf,
    key_pem,
)
from pki.issuers import issuers_text
from pki.rotation import activate_issuing, retire_issuing, stage_issuing, stage_root, with_root_key
from pki.signer import open_key
from pki.state import MalformedState, parse_state, state_text
from pki.store import (
    KeyPlace,
    StoreError,
    StoreExists,
    changing,
    load,
    load_issuers,
    load_trusted,
    save,
    survey,
)

NOW = datetime(2026, 11, 22, 7, 8, 9, 123456, tzinfo=UTC)
LATER = NOW + timedelta(days=30)
AUTHORITY = create_authority(NOW)
OTHER = create_authority(NOW)
ROOT, ISSUING = AUTHORITY.roots[0], AUTHORITY.issuer
ROOT_ID, ISSUING_ID = certificate_id(ROOT.certificate), certificate_id(ISSUING.certificate)
ROOT_KEY, ISSUING_KEY = f"roots/{ROOT_ID}/ca.key", f"issuing/{ISSUING_ID}/ca.key"
CERTIFICATE = certificates_pem(ISSUING.certificate)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    save(AUTHORITY, tmp_path / "pki")
    return tmp_path / "pki"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def keys(directory: Path) -> set[str]:
    return {name for name in contents(directory) if "ca.key" in name}


def facts(authority: Authority) -> Authority:
    """What can be compared of an authority: keys are equal where their numbers are."""

    def numbers(key: CaKey | None) -> object:
        return key_pem(key) if key else None

    return Authority(
        tuple(replace(root, key=numbers(root.key)) for root in authority.roots),  # type: ignore[arg-type]
        tuple(replace(one, key=numbers(one.key)) for one in authority.issuing),  # type: ignore[arg-type]
        authority.given,
    )


def same(one: Authority, two: Authority) -> bool:
    return facts(one) == facts(two)


def change(directory: Path, step: Callable[[Authority], Authority]) -> Authority:
    with changing(directory) as store:
        store.authority = step(store.authority)
    return store.authority


def test_what_was_saved_is_loaded(store: Path) -> None:
    assert same(load(store), AUTHORITY)


def test_whatever_an_authority_holds_is_loaded_again(tmp_path: Path) -> None:
    authority = stage_root(create_authority(NOW, with_rsa=True), LATER)
    given = create_issuing(authority.roots[0], NOW, name="Firewall", path_length=1).certificate
    authority = replace(authority, given=(given,))
    save(authority, tmp_path)
    assert same(load(tmp_path), authority)
    assert {root.state for root in load(tmp_path).roots} == {State.ACTIVE, State.STAGED}
    assert [one.line for one in load_issuers(tmp_path)] == [Line.MAIN, Line.RSA]


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
    known = {"state": "active", "line": "main", "since": "2026-11-22T07:08:09.123456+00:00"}
    assert json.loads((store / "state.json").read_text()) == {
        "version": 2,
        "roots": [{"id": ROOT_ID, **known, "crosses": []}],
        "issuing": [{"id": ISSUING_ID, **known, "chain": [ISSUING_ID]}],
        "given": [],
    }


def test_a_store_of_the_first_version_is_read_and_changed(store: Path) -> None:
    (store / "state.json").write_text(json.dumps({"version": 1, "issuing": ISSUING_ID, "roots": [ROOT_ID]}))
    unknown = replace(AUTHORITY, roots=(replace(ROOT, since=None),), issuing=(replace(ISSUING, since=None),))
    assert same(load(store), unknown)
    changed = change(store, lambda authority: stage_issuing(authority, LATER))
    assert same(load(store), changed)
    assert json.loads((store / "state.json").read_text())["version"] == 2


def test_keys_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        save(AUTHORITY, tmp_path / "pki")
        change(tmp_path / "pki", lambda authority: stage_root(authority, LATER))
    finally:
        os.umask(before)
    files = list((tmp_path / "pki").rglob("ca.key"))
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in files} == {0o700}
    assert (tmp_path / "pki").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610], ids=lambda mode: f"{mode:04o}")
@pytest.mark.parametrize("key", [ISSUING_KEY, ROOT_KEY], ids=["issuing", "root"])
def test_a_key_open_to_others_is_refused_and_the_repair_works(store: Path, key: str, mode: int) -> None:
    (store / key).chmod(mode)
    with pytest.raises(StoreError, match=f"mode {mode:04o} shows the key to others; run: chmod 600 ") as refused:
        load(store)
    subprocess.run(["/bin/sh", "-c", str(refused.value).partition("run: ")[2]], check=True)
    assert same(load(store), AUTHORITY)


def test_a_link_in_the_place_of_a_key_is_refused(store: Path) -> None:
    (store / ISSUING_KEY).rename(store / "elsewhere")
    (store / ISSUING_KEY).symlink_to(store / "elsewhere")
    with pytest.raises(StoreError, match=r"ca\.key: a symbolic link; put the file itself there"):
        load_issuers(store)


# What may be absent


def test_a_root_key_may_be_offline(store: Path) -> None:
    (store / ROOT_KEY).unlink()
    assert load(store).roots == (replace(ROOT, key=None),)


def test_a_store_without_a_root_key_is_saved_without_one(tmp_path: Path) -> None:
    save(Authority((Root(ROOT.certificate),), AUTHORITY.issuing), tmp_path)
    assert keys(tmp_path) == {ISSUING_KEY}
    assert load(tmp_path).roots[0].key is None


def test_a_gate_needs_only_the_state_and_the_active_issuing_cas(store: Path, tmp_path: Path) -> None:
    change(store, lambda authority: stage_issuing(authority, LATER))
    (tmp_path / "gate" / "issuing").mkdir(parents=True)
    shutil.copy(store / "state.json", tmp_path / "gate")
    shutil.copytree(store / "issuing" / ISSUING_ID, tmp_path / "gate" / "issuing" / ISSUING_ID)
    assert [one.certificate for one in load_issuers(tmp_path / "gate")] == [ISSUING.certificate]
    found = load(tmp_path / "gate")
    assert (found.roots, found.issuer.chain) == ((), ISSUING.chain)
    assert [one.certificate for one in survey(tmp_path / "gate").issuing] == [ISSUING.certificate]


def test_a_gate_opens_no_root(store: Path) -> None:
    (store / ROOT_KEY).chmod(0o644)
    (store / "roots" / ROOT_ID / "ca.crt").write_bytes(b"garbage")
    assert [one.certificate for one in load_issuers(store)] == [ISSUING.certificate]


def test_a_trust_bundle_needs_every_root(store: Path) -> None:
    change(store, lambda authority: stage_root(authority, LATER))
    assert len(load_trusted(store)) == 2
    shutil.rmtree(store / "roots" / ROOT_ID)
    with pytest.raises(StoreError, match=rf"{ROOT_ID}/ca\.crt: No such file or directory"):
        load_trusted(store)


def test_what_a_gate_has_of_a_store_is_not_changed(store: Path) -> None:
    shutil.rmtree(store / "roots")
    before = contents(store)
    with pytest.raises(StoreError, match="change the whole store, not a gate's part of it"), changing(store):
        pass
    assert contents(store) == before


# Changes


def test_a_change_is_written_when_it_is_left(store: Path) -> None:
    changed = change(store, lambda authority: activate_issuing(stage_issuing(authority, LATER), LATER))
    assert same(load(store), changed)
    assert len(load(store).issuing) == 2
    assert load_issuers(store)[0].certificate == changed.issuer.certificate != ISSUING.certificate


def test_a_change_that_fails_writes_nothing(store: Path) -> None:
    before = contents(store)

    def fail(authority: Authority) -> Authority:
        stage_root(authority, LATER)
        raise AuthorityError("no")

    with pytest.raises(AuthorityError, match="no"):
        change(store, fail)
    assert contents(store) == before


def test_looking_is_no_change(store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    change(store, lambda authority: authority)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_a_retired_ca_loses_its_key_and_nothing_else(store: Path) -> None:
    change(store, lambda authority: activate_issuing(stage_issuing(authority, LATER), LATER))
    before = contents(store)
    change(store, retire_issuing)
    after = contents(store)
    assert set(before) - set(after) == {ISSUING_KEY}
    assert {name for name in after if after[name] != before[name]} == {"state.json"}


def test_a_lent_root_key_is_never_written(store: Path) -> None:
    assert ROOT.key is not None
    lent = ROOT.key
    (store / ROOT_KEY).unlink()
    changed = change(store, lambda authority: stage_root(with_root_key(authority, lent), LATER))
    assert changed.roots[0].key is lent
    new = certificate_id(changed.roots[1].certificate)
    assert keys(store) == {f"roots/{new}/ca.key", ISSUING_KEY}
    assert not any(key_pem(lent).strip() in content for content in contents(store).values())
    assert load(store).roots[0].key is None


def test_a_key_is_not_deleted_because_somebody_left_it_out(store: Path) -> None:
    change(store, lambda authority: replace(authority, roots=(replace(authority.roots[0], key=None),)))
    assert same(load(store), AUTHORITY)


def test_the_chain_follows_the_roots(store: Path) -> None:
    change(store, lambda authority: stage_root(authority, LATER))
    chain = x509.load_pem_x509_certificates((store / "issuing" / ISSUING_ID / "chain.pem").read_bytes())
    assert tuple(chain) == load_issuers(store)[0].chain
    assert len(chain) == 2
    assert chain[0] == ISSUING.certificate


def test_a_key_of_another_certificate_is_not_written(store: Path) -> None:
    before = contents(store)
    wrong = replace(OTHER, issuing=(replace(OTHER.issuer, key=ISSUING.key),))
    with pytest.raises(StoreError, match="the key at hand is not that of the certificate; nothing was written"):
        save(wrong, store, overwrite=True)
    with pytest.raises(StoreError, match="would not start with"):
        save(replace(OTHER, issuing=(replace(OTHER.issuer, chain=ISSUING.chain),)), store, overwrite=True)
    assert contents(store) == before


def test_what_could_not_be_loaded_is_not_written(store: Path) -> None:
    before = contents(store)
    weak = rsa.generate_private_key(65537, 1024)
    root = create_root(NOW, name="Weak", key=weak)
    for authority, message in [
        (replace(OTHER, roots=(root,)), "an RSA key of 1024 bits; a CA's has 2048 at least"),
        (replace(OTHER, given=(no_ca(),)), "not a CA certificate"),
        (replace(OTHER, roots=OTHER.roots * 2), "names a CA twice"),
    ]:
        with pytest.raises(StoreError, match=message):
            save(authority, store, overwrite=True)
    assert contents(store) == before


def test_a_key_that_stands_there_is_not_given_up_for_a_line(store: Path) -> None:
    before = contents(store)
    elsewhere = open_key("pkcs11:token=a;object=b?module-path=/m.so", ROOT.certificate.public_key())
    with pytest.raises(StoreError, match=r"ca\.key: says that the key is elsewhere; move that file away first"):
        change(store, lambda authority: replace(authority, roots=(replace(ROOT, key=elsewhere),)))
    assert contents(store) == before
    (store / ROOT_KEY).unlink()
    save(replace(AUTHORITY, roots=(replace(ROOT, key=elsewhere),)), store, overwrite=True)
    assert (store / ROOT_KEY).read_text() == "pkcs11:token=a;object=b?module-path=/m.so\n"


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
    change(store, lambda authority: retire_issuing(activate_issuing(stage_issuing(authority, LATER), LATER)))
    assert {ROOT_KEY, ISSUING_KEY} < keys(store)


def test_overwriting_repairs_a_damaged_state(store: Path) -> None:
    (store / "state.json").write_text("{")
    save(AUTHORITY, store, overwrite=True)
    assert same(load(store), AUTHORITY)


def test_a_damaged_key_is_not_taken_for_the_one_to_be_saved(store: Path) -> None:
    (store / ISSUING_KEY).write_bytes(b"")
    with pytest.raises(StoreError, match="no PEM key"):
        save(AUTHORITY, store, overwrite=True)
    (store / ISSUING_KEY).unlink()
    save(AUTHORITY, store, overwrite=True)
    assert same(load(store), AUTHORITY)


def test_a_second_writer_is_refused(store: Path) -> None:
    with open(store / ".lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another outgate is writing there"):
            save(OTHER, store, overwrite=True)
        with pytest.raises(StoreError, match="another outgate is writing there"), changing(store):
            pass
    assert same(load(store), AUTHORITY)


def test_a_directory_that_cannot_be_made_names_the_repair(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="Not a directory; choose a directory you may write"):
        save(AUTHORITY, tmp_path / "file" / "pki")


# What is seen of a store


def test_a_survey_tells_where_each_key_is_and_opens_none(store: Path) -> None:
    changed = change(store, lambda authority: stage_root(authority, LATER))
    (store / ROOT_KEY).unlink()
    line = "pkcs11:token=hsm;object=issuing?module-path=/nowhere.so&pin-value=1234\n"
    (store / ISSUING_KEY).write_text(line)
    found = survey(store)
    assert [(one.key, one.state, one.since) for one in found.roots] == [
        (KeyPlace.OFFLINE, State.ACTIVE, NOW),
        (KeyPlace.FILE, State.STAGED, LATER),
    ]
    assert [one.certificate for one in found.roots] == [root.certificate for root in changed.roots]
    assert [one.sent for one in found.roots] == [root.crosses for root in changed.roots]
    (issuing,) = found.issuing
    assert (issuing.key, issuing.folder) == (KeyPlace.TOKEN, store / "issuing" / ISSUING_ID)
    assert issuing.uri == "pkcs11:token=hsm;object=issuing?module-path=/nowhere.so&pin-value=…"
    assert issuing.sent == changed.issuer.chain


def test_a_key_that_is_of_no_use_is_surveyed_all_the_same(store: Path) -> None:
    (store / ISSUING_KEY).write_text("pkcs11:not a uri")
    assert survey(store).issuing[0].key is KeyPlace.FILE


# Stores that are damaged


@pytest.mark.parametrize("read", [load, load_issuers, load_trusted, survey], ids=lambda read: read.__name__)
def test_no_store_names_the_command_that_makes_one(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(StoreError, match="No such file or directory; make an authority with 'outgate pki init --pki "):
        read(tmp_path)


def test_what_is_not_there_is_not_changed(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="make an authority"), changing(tmp_path):
        pass
    assert contents(tmp_path) == {}


def state(**different: object) -> str:
    return json.dumps(json.loads(state_text(AUTHORITY)) | different)


def record(**different: object) -> list[dict[str, object]]:
    return [{"id": ISSUING_ID, "state": "active", "line": "main", "since": None, "chain": [ISSUING_ID]} | different]


BROKEN = {
    "not JSON": ("{", "Expecting property name"),
    "not text": ("\xff", "can't decode"),
    "nested deeper than we read": ("[" * 200_000, "recursion|not a state"),
    "not an object": ("[]", "not a state that this version knows"),
    "newer": (state(version=3), "version 3 is not known here; use a newer outgate"),
    "older, and not so": ('{"version": 1, "issuing": 1, "roots": []}', "1 is not the id of a CA, 16 hex digits"),
    "an id that is a path, version 1": (
        '{"version": 1, "issuing": "../../../../etc/passwd", "roots": []}',
        "'../../../../etc/passwd' is not the id of a CA",
    ),
    "a root that is a path, version 1": (
        json.dumps({"version": 1, "issuing": ISSUING_ID, "roots": ["../escape"]}),
        "'../escape' is not the id of a CA",
    ),
    "an id that is a path": (state(issuing=record(id="../../escape")), "'../../escape' is not the id of a CA"),
    "a given id that is a path": (state(given=["/etc/passwd0000"]), "'/etc/passwd0000' is not the id of a CA"),
    "a link of a chain that is a path": (state(issuing=record(chain=["../x"])), "'../x' is not the id of a CA"),
    "an id and a line's end": (state(given=[ISSUING_ID + "\n"]), "is not the id of a CA"),
    "an id in capitals": (state(given=["ABCDEF0123456789"]), "is not the id of a CA"),
    "a state nobody knows": (state(issuing=record(state="revoked")), "'revoked' is not a valid State"),
    "a line nobody knows": (state(issuing=record(line="pq")), "'pq' is not a valid Line"),
    "a time without a zone": (state(issuing=record(since="2026-11-22")), "'2026-11-22' is no time with its zone"),
    "a time that is none": (state(issuing=record(since=7)), "7 is no time with its zone"),
    "a CA that is none": (state(issuing=[7]), "7 describes no CA"),
    "a CA twice": (state(issuing=record() * 2), "names a CA twice"),
    "an issuing CA that is gone": (state(issuing=record(id="0" * 16)), "ca.crt: No such file or directory"),
    "a chain of another CA": (state(issuing=record(chain=["0" * 16])), "chain.pem: does not start with ca.crt"),
    "a chain that lacks a link": (
        state(issuing=record(chain=[ISSUING_ID, "0" * 16])),
        "chain.pem: lacks certificate 0000000000000000",
    ),
    "no issuing CA that signs": (state(issuing=record(state="staged")), "no issuing CA is active"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_state_is_refused(store: Path, text: str, message: str) -> None:
    (store / "state.json").write_bytes(text.encode("latin-1"))
    before = contents(store)
    with pytest.raises(StoreError, match=message) as refused:
        load_issuers(store)
    assert str(refused.value).startswith(str(store))
    assert "\n" not in str(refused.value)
    assert contents(store) == before


def test_a_state_that_was_written_is_parsed() -> None:
    register = parse_state(state_text(AUTHORITY))
    assert register.folders == {f"roots/{ROOT_ID}", f"issuing/{ISSUING_ID}"}
    with pytest.raises(MalformedState):
        parse_state(b"null")


def encrypted(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))


def plain(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


DAMAGED = {
    "another key": ("ca.key", key_pem(OTHER.issuer.key), "not the key of ca.crt beside it"),
    "another kind of key": ("ca.key", plain(rsa.generate_private_key(65537, 2048)), "not the key of ca.crt beside it"),
    "a short RSA key": ("ca.key", plain(rsa.generate_private_key(65537, 1024)), "an RSA key of 1024 bits"),
    "an odd curve": ("ca.key", plain(ec.generate_private_key(ec.SECP256K1())), "a key on secp256k1"),
    "a DSA key": ("ca.key", plain(dsa.generate_private_key(1024)), "neither an elliptic curve nor an RSA key"),
    "an empty key": ("ca.key", b"", "no PEM key, and no pkcs11: line"),
    "an encrypted key": ("ca.key", encrypted(ISSUING.key), "is encrypted, and nobody is there to ask"),
    "a line that names no key": ("ca.key", b"pkcs11:token=x", "no module-path"),
    "two lines": ("ca.key", b"pkcs11:token=x;object=y?module-path=/m.so\nmore", "not one line of the form pkcs11:"),
    "no certificate": ("ca.crt", b"garbage", "no PEM certificate"),
    "two certificates": ("ca.crt", CERTIFICATE * 2, "2 certificates where one must stand"),
    "another CA": ("ca.crt", certificates_pem(OTHER.issuer.certificate), "holds certificate [0-9a-f]{16}, not "),
    "another chain": ("chain.pem", certificates_pem(OTHER.issuer.certificate), "does not start with ca.crt"),
    "more than a certificate": ("ca.crt", CERTIFICATE + b"x" * (1 << 20), "File too large"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_name(store: Path, name: str, content: bytes, message: str) -> None:
    (store / "issuing" / ISSUING_ID / name).write_bytes(content)
    for read in (load, load_issuers):
        with pytest.raises(StoreError, match=message) as refused:
            read(store)
        assert str(refused.value).startswith(f"{store}/issuing/{ISSUING_ID}/{name}: ")
        assert "\n" not in str(refused.value)


def test_an_rsa_key_whose_numbers_do_not_fit_is_refused(tmp_path: Path) -> None:
    """Its modulus is the certificate's, and what it signs is wrong: a disk may give back other bits."""
    key, other = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    numbers, wrong = key.private_numbers(), other.private_numbers()
    damaged = rsa.RSAPrivateNumbers(
        numbers.p, numbers.q, wrong.d, wrong.dmp1, numbers.dmq1, numbers.iqmp, numbers.public_numbers
    ).private_key(unsafe_skip_rsa_key_validation=True)
    authority = Authority((), (create_issuing(ROOT, NOW, name="Example", key=key),))
    save(authority, tmp_path)
    file = tmp_path / "issuing" / certificate_id(authority.issuer.certificate) / "ca.key"
    assert key_pem(load_issuers(tmp_path)[0].key) == file.read_bytes()
    file.write_bytes(key_pem(damaged))
    with pytest.raises(StoreError, match=r"not the key of ca\.crt beside it"):
        load_issuers(tmp_path)


@pytest.mark.parametrize("name", ["ca.key", "ca.crt"])
def test_a_pipe_does_not_hold_who_reads_it(store: Path, name: str) -> None:
    path = store / "issuing" / ISSUING_ID / name
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(StoreError, match="not a file"):
        load_issuers(store)


def test_a_root_that_was_exchanged_is_refused(store: Path) -> None:
    (store / "roots" / ROOT_ID / "ca.crt").write_bytes(certificates_pem(OTHER.roots[0].certificate))
    for read in (load, load_trusted, survey):
        with pytest.raises(StoreError, match=re.escape(f"not {ROOT_ID}; restore it from a copy")):
            read(store)


def no_ca() -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "no CA")])
    return x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, LATER).sign(key, hashes.SHA256())


def test_a_certificate_that_is_no_ca_is_refused(store: Path) -> None:
    certificate = no_ca()
    own = certificate_id(certificate)
    (store / "issuing" / ISSUING_ID).rename(store / "issuing" / own)
    for file in ("ca.crt", "chain.pem"):
        (store / "issuing" / own / file).write_bytes(certificates_pem(certificate))
    (store / "state.json").write_text(state(issuing=record(id=own, chain=[own])))
    with pytest.raises(StoreError, match=r"ca\.crt: not a CA certificate; no client accepts what it signs"):
        load_issuers(store)


def test_an_expired_authority_still_loads_and_signs_nothing(tmp_path: Path) -> None:
    save(create_authority(NOW - timedelta(days=4000)), tmp_path)
    assert load(tmp_path).roots
    (issuer,) = load_issuers(tmp_path)
    with pytest.raises(AuthorityError, match="expired at"):
        issue_leaf(issuer, "example.com", NOW)
    with pytest.raises(AuthorityError, match="expired at"), changing(tmp_path) as store_change:
        store_change.authority = stage_issuing(store_change.authority, NOW)


def test_issuers_of_a_store_travel_as_text(store: Path) -> None:
    assert issuers_text(load_issuers(store)) == issuers_text(AUTHORITY.issuers)
