import base64
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    pkcs12,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pki.authority import (
    KeyKind,
    certificates_pem,
    create_authority,
    create_key,
    create_root,
    cross_sign,
    key_pem,
)
from pki.pkcs12 import (
    MAX_FILE,
    Contents,
    Form,
    Loaded,
    Unreadable,
    assemble,
    passwordless_pfx,
    read,
    read_file,
    read_password,
)
from pki.trust import system_bundle_path
from tests.pki.clients import program
from tests.pki.making_cas import NOW, Made, make, rsa_key

AUTHORITY = create_authority(NOW)
ROOT = AUTHORITY.roots[0]
CA, KEY = AUTHORITY.issuer.certificate, AUTHORITY.issuer.key
BETWEEN = make(Made(ROOT.certificate, ROOT.key), subject="between")  # type: ignore[arg-type]  # its key is here
BELOW = make(BETWEEN, subject="below")
LEGACY = ("-legacy",)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The CA, its key and its root as files that openssl reads."""
    (tmp_path / "ca").write_bytes(certificates_pem(CA))
    (tmp_path / "key").write_bytes(key_pem(KEY))
    (tmp_path / "root").write_bytes(certificates_pem(ROOT.certificate))
    return tmp_path


def openssl(directory: Path, *arguments: str) -> str:
    program("openssl")
    done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def pfx(directory: Path, *options: str, password: str = "", key: bool = True) -> bytes:
    own = ("-inkey", "key") if key else ("-nokeys",)
    openssl(directory, "pkcs12", "-export", "-in", "ca", *own, "-out", "pfx", "-passout", f"pass:{password}", *options)
    return (directory / "pfx").read_bytes()


def same(loaded: Loaded, *, certificate: x509.Certificate = CA) -> bool:
    return loaded.certificate == certificate and loaded.key is not None and key_pem(loaded.key) == key_pem(KEY)


# PKCS#12 as it is found


@pytest.mark.client
@pytest.mark.parametrize(
    "options",
    [
        (),
        LEGACY,
        ("-nomac",),
        ("-keypbe", "NONE", "-certpbe", "NONE"),
        ("-keypbe", "NONE", "-certpbe", "NONE", "-nomac"),
        ("-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-3DES", "-macalg", "sha1"),
        ("-certpbe", "PBE-SHA1-RC2-40", *LEGACY),
        ("-certpbe", "PBE-SHA1-RC2-40", *LEGACY, "-nomac"),
        ("-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-3DES", "-nomac"),
        ("-keypbe", "AES-256-CBC", "-certpbe", "AES-256-CBC", "-macalg", "sha512"),
    ],
    ids=[
        "openssl 3",
        "legacy",
        "no mac",
        "not encrypted",
        "neither",
        "3des",
        "rc2",
        "rc2 and no mac",
        "3des and no mac",
        "aes and sha-512",
    ],
)
@pytest.mark.parametrize("password", ["", "pässword"], ids=["empty", "password"])
def test_pkcs12_of_every_kind_is_read(files: Path, options: tuple[str, ...], password: str) -> None:
    content = pfx(files, *options, password=password)
    found = read(content, password.encode() or None)
    assert same(assemble(found))
    assert found.form is Form.PKCS12
    has_nothing_to_open = "NONE" in options and "-nomac" in options
    assert found.is_encrypted is (password != "" and not has_nothing_to_open)


@pytest.mark.client
@pytest.mark.parametrize("option", ["--empty-password", "--null-password"])
def test_both_empty_passwords_are_read(files: Path, option: str) -> None:
    program("certtool")
    subprocess.run(
        ["certtool", "--to-p12", "--load-privkey", "key", "--load-certificate", "ca", "--p12-name", "x", "--outder",
         "--outfile", "pfx", option],
        cwd=files, check=True, capture_output=True,
    )  # fmt: skip
    assert same(assemble(read_file(files / "pfx")))
    assert same(assemble(read_file(files / "pfx", b"")))


@pytest.mark.client
def test_a_chain_comes_with_it_in_order(files: Path) -> None:
    (files / "ca").write_bytes(certificates_pem(BELOW.certificate))
    (files / "key").write_bytes(key_pem(BELOW.key))  # type: ignore[arg-type]  # EC
    (files / "chain").write_bytes(certificates_pem(ROOT.certificate, BETWEEN.certificate, CA))
    loaded = assemble(read(pfx(files, "-certfile", "chain")))
    assert loaded.certificate == BELOW.certificate
    assert loaded.chain == (BETWEEN.certificate, ROOT.certificate)
    assert loaded.strays == (CA,)


@pytest.mark.client
def test_what_a_key_vault_hands_out_as_text_is_read(files: Path) -> None:
    content = base64.encodebytes(pfx(files))
    assert same(assemble(read(content)))
    assert read(content).form is Form.PKCS12


@pytest.mark.client
@pytest.mark.parametrize("password", [None, b"", b"wrong"], ids=["none", "empty", "wrong"])
@pytest.mark.parametrize("options", [(), LEGACY], ids=["openssl 3", "legacy"])
def test_the_wrong_password_is_one_clear_error(files: Path, options: tuple[str, ...], password: bytes | None) -> None:
    content = pfx(files, *options, password="right")
    asked = "asks for a password, or is damaged; name a file that holds it with --password-file"
    said = "the password does not open it, or it is damaged; check the file that holds it"
    with pytest.raises(Unreadable) as refused:
        read(content, password)
    assert str(refused.value) == (asked if password is None else said)


def test_a_password_that_is_not_needed_is_not_looked_at() -> None:
    found = read(passwordless_pfx(CA, KEY), b"anything")
    assert same(assemble(found))
    assert not found.is_encrypted


@pytest.mark.client
def test_pkcs12_without_a_key_holds_certificates(files: Path) -> None:
    found = read(pfx(files, key=False))
    assert (found.certificates, found.keys) == ((CA,), ())


# PEM and DER


def test_pem_is_read_in_any_order() -> None:
    parts = [key_pem(KEY), certificates_pem(ROOT.certificate), b"Bag Attributes\n  x: y\n", certificates_pem(CA)]
    for order in (parts, parts[::-1]):
        loaded = assemble(read(b"".join(order)))
        assert same(loaded)
        assert loaded.chain == (ROOT.certificate,)


@pytest.mark.parametrize("change", [lambda pem: pem.replace(b"\n", b"\r\n"), lambda pem: b"\xef\xbb\xbf" + pem])
def test_pem_from_windows_is_read(change: object) -> None:
    assert callable(change)
    assert same(assemble(read(change(certificates_pem(CA) + key_pem(KEY)))))


@pytest.mark.parametrize("style", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key_is_read_with_its_password(style: PrivateFormat) -> None:
    pem = KEY.private_bytes(Encoding.PEM, style, BestAvailableEncryption(b"right"))
    found = read(pem, b"right")
    assert same(assemble(found, Contents(Form.PEM, (CA,))))
    assert found.is_encrypted
    with pytest.raises(Unreadable, match="the key in it asks for a password; name a file that holds it"):
        read(pem)
    with pytest.raises(Unreadable, match="the password does not open the key in it"):
        read(pem, b"wrong")


@pytest.mark.parametrize("style", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("key", [KEY, rsa_key(2048)], ids=["ec", "rsa"])
def test_der_is_read(style: PrivateFormat, key: ec.EllipticCurvePrivateKey) -> None:
    content = key.private_bytes(Encoding.DER, style, NoEncryption())
    assert [key_pem(one) for one in read(content).keys] == [key_pem(key)]
    assert read(CA.public_bytes(Encoding.DER)).certificates == (CA,)
    assert read(CA.public_bytes(Encoding.DER)).form is Form.DER


def test_an_encrypted_der_key_is_read_with_its_password() -> None:
    content = KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, BestAvailableEncryption(b"right"))
    assert [key_pem(one) for one in read(content, b"right").keys] == [key_pem(KEY)]
    with pytest.raises(Unreadable, match="the key asks for a password"):
        read(content)
    with pytest.raises(Unreadable, match="the password does not open the key"):
        read(content, b"wrong")


# Whose key it is


def test_the_key_tells_the_ca_from_the_others() -> None:
    everything = Contents(Form.PEM, (ROOT.certificate, BELOW.certificate, CA, BETWEEN.certificate), (KEY,))
    loaded = assemble(everything)
    assert same(loaded)
    assert loaded.chain == (ROOT.certificate,)
    assert set(loaded.strays) == {BELOW.certificate, BETWEEN.certificate}


def test_without_a_key_it_is_what_signed_none_of_the_others() -> None:
    loaded = assemble(Contents(Form.PEM, (ROOT.certificate, BETWEEN.certificate, BELOW.certificate)))
    assert (loaded.certificate, loaded.key) == (BELOW.certificate, None)
    assert loaded.chain == (BETWEEN.certificate, ROOT.certificate)


def test_the_chain_ends_at_a_root_before_it_goes_on_through_a_cross_certificate() -> None:
    new = create_root(NOW, name="new")
    crossed = cross_sign(new, ROOT, NOW)
    below = make(Made(new.certificate, new.key)).certificate  # type: ignore[arg-type]  # its key is here
    for order in ((crossed, new.certificate), (new.certificate, crossed)):
        loaded = assemble(Contents(Form.PEM, (below,)), above=order)
        assert (loaded.chain, loaded.strays) == ((new.certificate,), (crossed,))


def test_the_wrong_key_is_kept_for_lint_to_see() -> None:
    other = create_key(KeyKind.EC_P256)
    loaded = assemble(Contents(Form.PEM, (CA,)), Contents(Form.PEM, keys=(other,)))
    assert (loaded.certificate, loaded.key) == (CA, other)


def test_a_renewed_certificate_goes_before_the_older_one_of_the_same_key() -> None:
    key = create_key(KeyKind.EC_P256)
    older, newer = make(key=key, days=(-9, 9)), make(key=key, days=(-1, 99))
    for order in ((older, newer), (newer, older)):
        loaded = assemble(Contents(Form.PEM, tuple(one.certificate for one in order), (key,)))
        assert loaded.certificate == newer.certificate


def test_keys_of_two_certificates_are_not_guessed_about() -> None:
    both = Contents(Form.PEM, (CA, ROOT.certificate), (KEY, ROOT.key) if ROOT.key else ())
    with pytest.raises(Unreadable, match="keys of several certificates"):
        assemble(both)


def test_what_stands_above_is_never_the_ca() -> None:
    loaded = assemble(Contents(Form.PEM, (ROOT.certificate,)), above=(CA,))
    assert (loaded.certificate, loaded.strays) == (ROOT.certificate, (CA,))


def test_no_certificate_is_an_error() -> None:
    with pytest.raises(Unreadable, match="no certificate in it"):
        assemble(Contents(Form.PEM, keys=(KEY,)))


# What is no CA

GARBAGE = {
    "empty": (b"", "empty"),
    "blank": (b" \n", "empty"),
    "text": (b"hello, world!", "neither PKCS#12 nor PEM nor DER"),
    "base64 of nothing": (b"aGVsbG8=", "neither PKCS#12 nor PEM nor DER"),
    "zeros": (bytes(1000), "neither PKCS#12 nor PEM nor DER"),
    "a PFX's first bytes": (passwordless_pfx(CA, KEY)[:200], "asks for a password, or is damaged"),
    "a certificate's first bytes": (CA.public_bytes(Encoding.DER)[:200], "neither PKCS#12 nor PEM nor DER"),
    "half a PEM": (certificates_pem(CA)[:200], "a BEGIN line without its END line"),
    "an END alone": (b"-----END CERTIFICATE-----\n", "a BEGIN line without its END line"),
    "mixed labels": (
        b"-----BEGIN CERTIFICATE-----\nAA==\n-----END PRIVATE KEY-----\n",
        "a BEGIN line without its END line",
    ),
    "PEM of garbage": (
        b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n",
        "a certificate in it is damaged",
    ),
    "a key of garbage": (
        b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n",
        "the key in it cannot be read",
    ),
    "a request": (
        b"-----BEGIN CERTIFICATE REQUEST-----\nAA==\n-----END CERTIFICATE REQUEST-----\n",
        "neither a certificate nor a key in it",
    ),
    "OpenSSL's own trust": (
        b"-----BEGIN TRUSTED CERTIFICATE-----\nAA==\n-----END TRUSTED CERTIFICATE-----\n",
        "openssl x509 -in IN -out OUT",
    ),
    "a Java keystore": (b"\xfe\xed\xfe\xed\0\0\0\2\0\0\0\0", "keytool -importkeystore"),
    "a bundle": (certificates_pem(CA) * 21, "21 certificates, which is no CA but a bundle"),
    "a bundle as PKCS#12": (
        pkcs12.serialize_key_and_certificates(
            None, None, None, [make().certificate for _ in range(21)], NoEncryption()
        ),
        "21 certificates, which is no CA but a bundle",
    ),
    "an Ed25519 key": (
        ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "its key is neither EC nor RSA",
    ),
    "too much": (bytes(MAX_FILE + 1), "more than 1 MB"),
}


@pytest.mark.parametrize(("content", "said"), GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("password", [None, b"x"], ids=["no password", "password"])
def test_garbage_is_one_clear_error(content: bytes, said: str, password: bytes | None) -> None:
    if password and "asks for" in said:
        said = "the password does not open it, or it is damaged"
    with pytest.raises(Unreadable) as refused:
        read(content, password)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_public_bundle_is_not_parsed() -> None:
    bundle = system_bundle_path()
    if bundle is None:
        pytest.skip("this system has no bundle of public roots")
    with pytest.raises(Unreadable, match="certificates, which is no CA but a bundle"):
        read_file(bundle)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=400), st.sampled_from([None, b"", b"x"]))
def test_any_bytes_are_answered_or_refused(content: bytes, password: bytes | None) -> None:
    with suppress(Unreadable):
        read(content, password)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_file_is_answered_or_refused(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(Unreadable):
        assemble(read(bytes(content), data.draw(st.sampled_from([None, b"x"]))))


WHOLE = (
    pkcs12.serialize_key_and_certificates(None, KEY, CA, [ROOT.certificate], NoEncryption()),
    certificates_pem(CA, ROOT.certificate) + key_pem(KEY),
    CA.public_bytes(Encoding.DER),
    KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
)


# Files


def test_a_file_is_named_in_its_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "large").write_bytes(bytes(10 << 20))
    os.mkfifo(tmp_path / "pipe")
    rows = {
        "empty": "empty; name a file that holds a CA",
        "large": "File too large; name the CA's own file",
        "pipe": "not a file; name the CA's own file",
        "missing": "No such file or directory; name the CA's own file",
        ".": "Is a directory; name the CA's own file",
    }
    for file, said in rows.items():
        with pytest.raises(Unreadable) as refused:
            read_file(tmp_path / file)
        assert str(refused.value) == f"{tmp_path / file}: {said}"


@pytest.mark.parametrize("content", [b"secret", b"secret\n", b"secret\r\n"])
def test_a_password_is_a_line_of_a_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    path.chmod(0o600)
    assert read_password(path) == b"secret"


def test_a_password_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(b"secret")
    path.chmod(0o644)
    with pytest.raises(Unreadable, match="mode 0644 shows the password to others; run: chmod 600 ") as refused:
        read_password(path)
    assert "secret" not in str(refused.value)
    path.chmod(0o600)
    path.write_bytes(bytes(2000))
    with pytest.raises(Unreadable, match="longer than any password"):
        read_password(path)
    path.write_bytes(b"sec\0ret\n")
    with pytest.raises(Unreadable, match="has a zero byte, which no password has"):
        read_password(path)


# The PFX that we write


@pytest.mark.parametrize("key", [KEY, rsa_key(2048)], ids=["ec", "rsa"])
def test_our_pfx_is_read_back(key: ec.EllipticCurvePrivateKey) -> None:
    certificate = CA if key is KEY else make(key=key).certificate
    found = read(passwordless_pfx(certificate, key))
    assert found == Contents(Form.PKCS12, (certificate,), found.keys)
    assert [key_pem(one) for one in found.keys] == [key_pem(key)]


@pytest.mark.client
@pytest.mark.parametrize("options", [(), LEGACY], ids=["openssl 3", "legacy"])
def test_openssl_opens_our_pfx_with_the_empty_password_and_sees_one_certificate(
    files: Path, options: tuple[str, ...]
) -> None:
    (files / "ours").write_bytes(passwordless_pfx(CA, KEY))
    said = openssl(files, "pkcs12", "-info", "-in", "ours", "-passin", "pass:", "-nodes", *options)
    assert said.count("BEGIN CERTIFICATE") == 1
    assert said.count("BEGIN PRIVATE KEY") == 1
    assert "MAC: sha1, Iteration 2048" in said
    assert "localKeyID" in said


@pytest.mark.client
def test_our_pfx_is_of_the_kind_that_azures_own_script_writes(files: Path) -> None:
    ours, theirs = (
        passwordless_pfx(CA, KEY),
        pfx(files, "-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-3DES", "-macalg", "sha1"),
    )
    seen = []
    for content in (ours, theirs):
        (files / "one").write_bytes(content)
        said = openssl(files, "pkcs12", "-info", "-in", "one", "-passin", "pass:", "-noout")
        seen.append([line.partition(", Iteration")[0] for line in said.splitlines()])
    assert seen[0] == seen[1]


@pytest.mark.client
def test_java_finds_the_key_in_our_pfx(files: Path) -> None:
    keytool = program("keytool")
    (files / "ours.pfx").write_bytes(passwordless_pfx(CA, KEY))
    done = subprocess.run(
        [keytool, "-list", "-storetype", "pkcs12", "-keystore", "ours.pfx", "-storepass", ""],
        cwd=files, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "PrivateKeyEntry" in done.stdout, done.stdout + done.stderr


@pytest.mark.client
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_opens_our_pfx(files: Path) -> None:
    (files / "ours.pfx").write_bytes(passwordless_pfx(CA, KEY))
    script = 'require("tls").createSecureContext({pfx: require("fs").readFileSync("ours.pfx"), passphrase: ""})'
    assert subprocess.run(["node", "-e", script], cwd=files, capture_output=True, check=False).returncode == 0
