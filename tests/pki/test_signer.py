import copy
import logging
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import DNSName
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st

from pki.authority import (
    Authority,
    CaKey,
    Issuing,
    KeyKind,
    certificate_id,
    create_authority,
    create_issuing,
    create_key,
    create_root,
    issue_leaf,
    key_pem,
)
from pki.issuers import issuers_text, read_issuers
from pki.key_uri import MalformedKeyUri, parse_uri
from pki.rotation import activate_issuing, retire_issuing, stage_issuing
from pki.signer import RemoteEcKey, RemoteKey, RemoteRsaKey, SignerError, open_key
from pki.store import StoreError, changing, load, load_issuers, save
from tests.pki.softhsm import PIN, SoftHsm, make_softhsm

NOW = datetime(2026, 11, 22, tzinfo=UTC)
SHA256 = ec.ECDSA(hashes.SHA256())
TOKEN = "outgate hsm; ünï"
KEYS: dict[str, CaKey] = {
    "root": ec.generate_private_key(ec.SECP256R1()),
    "issuing": ec.generate_private_key(ec.SECP256R1()),
    "p384": ec.generate_private_key(ec.SECP384R1()),
    "rsa": rsa.generate_private_key(65537, 2048),
}


# Names of keys


GOOD = "pkcs11:token=hsm;object=root?module-path=/lib/m.so"


def test_a_uri_is_decoded_attribute_by_attribute() -> None:
    uri = parse_uri(
        "pkcs11:token=My%20token;serial=0%31;object=a%3Bb=%26c;id=%00%ff;type=private"
        "?module-path=/opt/x%20y/m.so&pin-source=file:/run/pin%20file"
    )
    assert (uri.token, uri.serial, uri.label, uri.id) == ("My token", b"01", "a;b=&c", b"\0\xff")
    assert (uri.module, uri.pin_source, uri.pin) == (Path("/opt/x y/m.so"), Path("/run/pin file"), None)


def test_a_pin_is_decoded_and_never_shown() -> None:
    uri = parse_uri(f"{GOOD}&pin-value=12%264;5?=")
    assert uri.pin == "12&4;5?="
    assert str(uri) == f"{GOOD}&pin-value=…"
    assert "12" not in repr(uri)


MALFORMED = {
    "another scheme": ("http://token", "not one line of the form pkcs11:"),
    "two lines": (f"{GOOD}\n{GOOD}", "not one line of the form"),
    "a space": (GOOD.replace("hsm", "h sm"), "not one line of the form"),
    "letters that are not escaped": (GOOD.replace("hsm", "hsü"), "not one line of the form"),
    "no library": ("pkcs11:token=a;object=b", "no module-path; name the PKCS#11 library of the token"),
    "no token": ("pkcs11:object=b?module-path=/m.so", "neither token nor serial"),
    "no key": ("pkcs11:token=a?module-path=/m.so", "neither object nor id"),
    "a certificate": (GOOD.replace("?", ";type=cert?"), "type: only a private key signs"),
    "an unknown attribute": (GOOD.replace("?", ";slot-id=1?"), "slot-id: not an attribute that is known there"),
    "a vendor's attribute": (f"{GOOD}&x-muscle=1", "x-muscle: not an attribute that is known there"),
    "a PIN in the path": (f"pkcs11:token=a;pin-value={PIN};object=b?module-path=/m", "pin-value: not an attribute"),
    "a misspelt PIN": (f"{GOOD}&pin={PIN}", "pin: not an attribute that is known there"),
    "a PIN alone": (f"{GOOD}&{PIN}", "a part without a name"),
    "a token in the query": (f"{GOOD}&token=b", "token: not an attribute that is known there"),
    "twice": (GOOD.replace("?", ";token=b?"), "token: given twice"),
    "an empty value": (GOOD.replace("hsm", ""), "token: empty"),
    "half an escape": (GOOD.replace("hsm", "h%2"), "token: empty, or % is not followed by two hex digits"),
    "an escape that is none": (GOOD.replace("hsm", "%zz"), "token: empty, or % is not followed by two hex digits"),
    "bytes that are no text": (GOOD.replace("hsm", "%ff"), "token: not UTF-8"),
    "a zero byte": (GOOD.replace("/lib", "/l%00b"), "module-path: has characters that cannot be printed"),
    "a library without its place": (GOOD.replace("/lib/m.so", "m.so"), "module-path: not an absolute path"),
    "two PINs": (f"{GOOD}&pin-value={PIN}&pin-source=file:/p", "both pin-value and pin-source"),
    "a command for a PIN": (f"{GOOD}&pin-source=%7Ccat%20/p", "pin-source: not of the form file:/path"),
    "a PIN's file without its place": (f"{GOOD}&pin-source=file:p", "pin-source: not an absolute path"),
    "nothing": ("pkcs11:", "no module-path"),
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_name_of_no_key_is_refused(text: str, message: str) -> None:
    for parse in (parse_uri, open_key):
        with pytest.raises((MalformedKeyUri, SignerError), match=re.escape(message)) as refused:
            parse(text)
        assert PIN not in str(refused.value)
        assert "\n" not in str(refused.value)


@given(st.text(min_size=1).filter(str.isprintable), st.binary(min_size=1))
def test_every_label_and_id_can_be_named(label: str, key_id: bytes) -> None:
    text = f"pkcs11:token={quote(label, safe='')};id={quote(key_id, safe='')}?module-path=/m"
    uri = parse_uri(text)
    assert (uri.token, uri.id, str(uri)) == (label, key_id, text)


@given(
    st.lists(
        st.sampled_from(
            [
                "pkcs11:",
                "token=a",
                "object=b",
                ";",
                "&",
                "?",
                "=",
                "module-path=/m",
                "pin-source=file:/p",
                "%",
                "x=",
                " ",
            ]
        )
    )
)
def test_no_pin_is_shown_wherever_it_stands(parts: list[str]) -> None:
    text = "pkcs11:" + "".join(parts) + f"&pin-value={PIN}"
    try:
        uri = parse_uri(text)
        shown = f"{uri} {uri!r}"
    except MalformedKeyUri as error:
        shown = str(error)
    assert PIN not in shown


# Tokens


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    made = make_softhsm(tmp_path_factory.mktemp("hsm"))
    made.make_token(TOKEN)
    for number, (label, key) in enumerate(KEYS.items(), 1):
        made.put(key, TOKEN, label, f"0{number}")
    for label in ("twin", "twin", "locked"):
        made.make_token(label)
    made.put(KEYS["root"], "locked", "root", "01")
    for key_id in ("11", "12"):
        made.put(create_key(KeyKind.EC_P256), TOKEN, "pair", key_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(made.configuration))
        yield made
        end_module(made)


def end_module(hsm: SoftHsm) -> None:
    """Every session of this process ends, as when a token is pulled or its daemon is restarted."""
    import pkcs11

    pkcs11.lib(str(hsm.module)).finalize()


@pytest.fixture
def root(hsm: SoftHsm) -> CaKey:
    return open_key(hsm.uri(TOKEN, "root"))


@pytest.fixture
def authority(hsm: SoftHsm, root: CaKey) -> Authority:
    """Root and issuing CA in a token."""
    top = create_root(NOW, name="Example Corp", key=root)
    return Authority((top,), (create_issuing(top, NOW, name="Example Corp", key=open_key(hsm.uri(TOKEN, "issuing"))),))


def verify(authority: Authority, issuer: Issuing) -> None:
    leaf = issue_leaf(issuer, "www.example.com", NOW)
    verifier = PolicyBuilder().store(Store(list(authority.trusted))).time(NOW)
    verifier.build_server_verifier(DNSName("www.example.com")).verify(leaf.certificate, list(leaf.chain))


@pytest.mark.client
def test_a_whole_authority_is_signed_in_a_token(authority: Authority) -> None:
    verify(authority, authority.issuer)
    assert authority.roots[0].certificate.public_key() == KEYS["root"].public_key()


@pytest.mark.client
@pytest.mark.parametrize("label", ["root", "p384"])
@pytest.mark.parametrize("algorithm", [hashes.SHA256(), hashes.SHA384(), hashes.SHA512()], ids=lambda one: one.name)
def test_elliptic_curve_signatures_verify(hsm: SoftHsm, label: str, algorithm: hashes.HashAlgorithm) -> None:
    key, public = open_key(hsm.uri(TOKEN, label)), KEYS[label].public_key()
    assert isinstance(key, RemoteEcKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert (key.curve.name, key.key_size) == (public.curve.name, public.key_size)
    for _ in range(8):  # r and s are shorter than the curve now and then
        public.verify(key.sign(b"data", ec.ECDSA(algorithm)), b"data", ec.ECDSA(algorithm))
    digest = hashes.Hash(algorithm)
    digest.update(b"data")
    prehashed = ec.ECDSA(Prehashed(algorithm))
    public.verify(key.sign(digest.finalize(), prehashed), b"data", ec.ECDSA(algorithm))


PADDINGS = {
    "PKCS#1 v1.5": padding.PKCS1v15(),
    "PSS": padding.PSS(padding.MGF1(hashes.SHA256()), 32),
    "PSS, salt as long as the digest": padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH),
    "PSS, salt as long as can be": padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH),
}


@pytest.mark.client
@pytest.mark.parametrize("how", PADDINGS.values(), ids=PADDINGS)
def test_rsa_signatures_verify(hsm: SoftHsm, how: padding.AsymmetricPadding) -> None:
    key, public = open_key(hsm.uri(TOKEN, "rsa")), KEYS["rsa"].public_key()
    assert isinstance(key, RemoteRsaKey)
    assert isinstance(public, rsa.RSAPublicKey)
    assert key.key_size == 2048
    public.verify(key.sign(b"data", how, hashes.SHA256()), b"data", how, hashes.SHA256())


@pytest.mark.client
def test_what_no_certificate_is_signed_with_is_refused(hsm: SoftHsm) -> None:
    key = open_key(hsm.uri(TOKEN, "rsa"))
    assert isinstance(key, RemoteRsaKey)
    with pytest.raises(UnsupportedAlgorithm, match="SHA-256"):
        key.sign(b"data", padding.PKCS1v15(), hashes.SHA1())
    with pytest.raises(UnsupportedAlgorithm, match="PSS with a known length"):
        key.sign(b"data", padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO), hashes.SHA256())


@pytest.mark.client
def test_an_rsa_line_is_signed_in_a_token(hsm: SoftHsm) -> None:
    top = create_root(NOW, name="Example Corp", key=open_key(hsm.uri(TOKEN, "rsa")))
    authority = Authority((top,), (create_issuing(top, NOW, name="Example Corp", kind=KeyKind.RSA_2048),))
    verify(authority, authority.issuer)


@pytest.mark.client
def test_a_key_is_named_by_its_id_or_its_tokens_serial_too(hsm: SoftHsm) -> None:
    import pkcs11

    serial = pkcs11.lib(str(hsm.module)).get_token(token_label=TOKEN).serial.decode()
    found = open_key(f"pkcs11:serial={serial};id=%01?module-path={hsm.module}&pin-value={PIN}")
    assert found.public_key() == KEYS["root"].public_key()


@pytest.mark.client
def test_a_pin_is_read_from_a_file(hsm: SoftHsm, tmp_path: Path) -> None:
    file = tmp_path / "pin"
    file.write_text(f"{PIN}\n")
    file.chmod(0o600)
    uri = hsm.uri("locked", "root", pin=None, more=f"&pin-source=file:{file}")
    key = open_key(uri)
    assert isinstance(key, RemoteEcKey)
    key.sign(b"data", SHA256)


# What goes wrong


@pytest.mark.client
@pytest.mark.parametrize(
    ("different", "message"),
    [
        pytest.param({"token": "nowhere"}, "no such token; connect it, or correct its name", id="no token"),
        pytest.param({"token": "twin"}, "more than one such token; add its serial", id="two tokens"),
        pytest.param({"label": "nothing"}, "no such private key in the token", id="no key"),
        pytest.param({"label": "pair"}, "2 such private keys in the token; name one by its id", id="two keys"),
        pytest.param(
            {"more": "&pin-source=file:/nowhere/pin", "pin": None}, "/nowhere/pin: No such file", id="no PIN file"
        ),
    ],
)
def test_what_is_not_there_is_told_in_one_line(hsm: SoftHsm, different: dict[str, str], message: str) -> None:
    end_module(hsm)
    with pytest.raises(SignerError, match=re.escape(message)) as refused:
        open_key(hsm.uri(**({"token": TOKEN, "label": "root"} | different)))
    assert "\n" not in str(refused.value)
    assert PIN not in str(refused.value)


@pytest.mark.client
def test_a_missing_key_is_told_to_who_is_logged_in_too(hsm: SoftHsm, root: CaKey) -> None:
    assert isinstance(root, RemoteEcKey)
    root.prove()
    with pytest.raises(SignerError, match=r"no such private key in the token; make it there, or correct its name$"):
        open_key(hsm.uri(TOKEN, "nothing"))
    root.prove()


@pytest.mark.client
def test_without_a_pin_the_repair_is_told(hsm: SoftHsm) -> None:
    end_module(hsm)
    with pytest.raises(SignerError, match="or give pin-source, where it is not seen without a PIN"):
        open_key(hsm.uri(TOKEN, "root", pin=None))


@pytest.mark.client
@pytest.mark.parametrize(
    ("module", "message"),
    [
        pytest.param("/nowhere/module.so", "module-path: .*No such file.*; name the PKCS#11 library", id="none"),
        pytest.param(__file__, "module-path: OS exception while loading", id="no library"),
    ],
)
def test_a_library_that_is_none_is_told_in_one_line(hsm: SoftHsm, module: str, message: str) -> None:
    with pytest.raises(SignerError, match=message) as refused:
        open_key(hsm.uri(TOKEN, "root").replace(str(hsm.module), module))
    assert "\n" not in str(refused.value)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pkcs11"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    with pytest.raises(SignerError, match=re.escape("need python-pkcs11; install outgate[pkcs11]")):
        open_key(GOOD)


@pytest.mark.client
def test_a_wrong_pin_is_tried_once(hsm: SoftHsm, tmp_path: Path) -> None:
    """A token locks itself after a few; a gate would try once for each leaf."""
    end_module(hsm)
    file = tmp_path / "pin"
    file.write_text("wrong-1")
    file.chmod(0o600)
    uri = hsm.uri("locked", "root", pin=None, more=f"&pin-source=file:{file}")
    key = open_key(uri, KEYS["root"].public_key())
    assert isinstance(key, RemoteEcKey)
    with pytest.raises(SignerError, match=r"the token refuses the PIN \(PinIncorrect\); correct it") as refused:
        key.prove()
    assert "wrong-1" not in str(refused.value)
    file.write_text(PIN)
    with pytest.raises(SignerError, match="refuses the PIN"):
        key.prove()
    again = open_key(uri, KEYS["root"].public_key())
    assert isinstance(again, RemoteEcKey)
    again.prove()


class Almost:
    """A token that has had wrong PINs, as python-pkcs11 shows it; SoftHSM never locks itself."""

    def __init__(self, flags: object) -> None:
        self.flags, self.pins = flags, list[str | None]()

    def open(self, user_pin: str | None = None) -> SimpleNamespace:
        self.pins.append(user_pin)
        return SimpleNamespace(get_objects=lambda _: iter(()), close=lambda: None)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        pytest.param("USER_PIN_FINAL_TRY", "one more wrong PIN locks the token", id="final try"),
        pytest.param("USER_PIN_LOCKED", "the token has locked the PIN", id="locked"),
    ],
)
def test_the_last_try_is_left_to_a_person(flag: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pkcs11 = pytest.importorskip("pkcs11")
    token = Almost(pkcs11.TokenFlag[flag])
    library = SimpleNamespace(get_token=lambda **_: token, finalize=lambda: None)
    monkeypatch.setattr(pkcs11, "lib", lambda _: library)
    with pytest.raises(SignerError, match=message):
        open_key(f"pkcs11:token=a;object=b?module-path={quote(__file__)}&pin-value={PIN}")
    assert token.pins == [None]


@pytest.mark.client
def test_a_lost_session_is_opened_again(hsm: SoftHsm, root: CaKey) -> None:
    issuing = open_key(hsm.uri(TOKEN, "issuing"))
    assert isinstance(root, RemoteEcKey)
    assert isinstance(issuing, RemoteEcKey)
    for _ in range(3):
        end_module(hsm)
        root.prove()
        issuing.prove()
        root.prove()


@pytest.mark.client
def test_a_token_that_is_pulled_signs_again_when_it_is_back(hsm: SoftHsm, root: CaKey) -> None:
    issuing = open_key(hsm.uri(TOKEN, "issuing"))
    assert isinstance(root, RemoteEcKey)
    assert isinstance(issuing, RemoteEcKey)
    away = hsm.directory / "away"
    hsm.tokens.rename(away)
    for _ in range(2):
        with pytest.raises(SignerError, match=r"see to the token|no such token") as refused:
            root.prove()
        assert PIN not in str(refused.value)
    away.rename(hsm.tokens)
    root.prove()
    issuing.prove()


@pytest.mark.client
def test_a_session_of_a_former_life_is_not_taken_for_a_new_one(hsm: SoftHsm) -> None:
    """A module that is started anew gives out the same handles again: the other key's, by now."""
    end_module(hsm)
    root, issuing = (open_key(hsm.uri(TOKEN, label), KEYS[label].public_key()) for label in ("root", "issuing"))
    assert isinstance(root, RemoteEcKey)
    assert isinstance(issuing, RemoteEcKey)
    issuing.prove()
    away = hsm.directory / "away"
    hsm.tokens.rename(away)
    with pytest.raises(SignerError):
        root.prove()
    away.rename(hsm.tokens)
    root.prove()
    issuing.prove()


@pytest.mark.client
def test_a_signature_by_another_key_is_noticed(hsm: SoftHsm) -> None:
    for label in ("issuing", "p384", "rsa"):
        key = open_key(hsm.uri(TOKEN, label), KEYS["root"].public_key())
        assert isinstance(key, RemoteEcKey)
        with pytest.raises(SignerError, match=r"not the key of the certificate|see to the token"):
            key.prove()


@pytest.mark.client
def test_threads_sign_side_by_side(hsm: SoftHsm) -> None:
    keys = [open_key(hsm.uri(TOKEN, label)) for label in ("root", "issuing")]

    def sign(number: int) -> None:
        key = keys[number % 2]
        assert isinstance(key, RemoteEcKey)
        if number == 40:
            end_module_gently(key)
        data = str(number).encode()
        key.public_key().verify(key.sign(data, SHA256), data, SHA256)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sign, range(80)))


def end_module_gently(key: RemoteEcKey) -> None:
    """Its session is closed while others sign."""
    from pki import signer

    with signer._one_at_a_time:
        key._place._session.close()  # type: ignore[union-attr]  # it has signed before


# What a remote key gives away


@pytest.mark.client
def test_a_key_in_a_token_is_not_exported(root: CaKey, hsm: SoftHsm) -> None:
    other = open_key(hsm.uri(TOKEN, "rsa"))
    assert isinstance(root, RemoteEcKey)
    assert isinstance(other, RemoteRsaKey)
    attempts: list[Callable[[], object]] = [
        root.private_numbers,
        lambda: root.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        lambda: root.exchange(ec.ECDH(), root.public_key()),
        lambda: key_pem(root),
        lambda: pickle.dumps(root),
        lambda: other.decrypt(b"", padding.PKCS1v15()),
        other.private_numbers,
    ]
    for attempt in attempts:
        with pytest.raises(SignerError, match="the key stays in its token"):
            attempt()
    assert copy.copy(root) is root
    assert copy.deepcopy(root) is root


@pytest.mark.client
def test_the_pin_is_in_no_text(hsm: SoftHsm, authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    end_module(hsm)
    verify(authority, authority.issuer)
    assert PIN not in f"{authority} {authority!r} {authority.issuer.key!r} {caplog.text}"
    assert repr(authority.issuer.key).endswith("&pin-value=…>")


@pytest.mark.client
def test_issuers_travel_with_the_uri_and_nothing_more(hsm: SoftHsm, authority: Authority) -> None:
    text = issuers_text(authority.issuers)
    (read,) = read_issuers(text)
    assert isinstance(read.key, RemoteKey)
    assert (read.key.uri, read.chain) == (hsm.uri(TOKEN, "issuing"), authority.issuer.chain)
    assert "PRIVATE" not in text
    assert PIN not in text.replace(f"&pin-value={PIN}", "")
    assert issuers_text((read,)) == text
    verify(authority, read)


@pytest.mark.parametrize("key", ["pkcs11:nothing", "", "-----BEGIN"])
def test_a_text_that_was_never_written_is_refused(key: str) -> None:
    text = issuers_text(create_authority(NOW).issuers)
    broken = re.sub(r'"key": "[^"]*"', f'"key": "{key}"', text)
    with pytest.raises((ValueError, SignerError)):
        read_issuers(broken)


# Stores


@pytest.mark.client
def test_a_store_holds_the_line_and_no_key(authority: Authority, tmp_path: Path, hsm: SoftHsm) -> None:
    save(authority, tmp_path / "pki")
    files = {path.parent.parent.name: path for path in (tmp_path / "pki").rglob("ca.key")}
    assert {kind: path.read_text() for kind, path in files.items()} == {
        "roots": hsm.uri(TOKEN, "root") + "\n",
        "issuing": hsm.uri(TOKEN, "issuing") + "\n",
    }
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}
    (issuer,) = load_issuers(tmp_path / "pki")
    verify(authority, issuer)


@pytest.mark.client
def test_an_authority_in_a_token_is_rotated(authority: Authority, tmp_path: Path, hsm: SoftHsm) -> None:
    later = NOW + timedelta(days=200)
    save(authority, tmp_path)
    with changing(tmp_path) as store:
        staged = stage_issuing(store.authority, later, key=open_key(hsm.uri(TOKEN, "p384")))
        store.authority = retire_issuing(activate_issuing(staged, later))
    (issuer,) = load_issuers(tmp_path)
    assert issuer.certificate.public_key() == KEYS["p384"].public_key()
    assert not (tmp_path / "issuing" / certificate_id(authority.issuer.certificate) / "ca.key").exists()
    assert open_key(hsm.uri(TOKEN, "issuing")).public_key() == KEYS["issuing"].public_key()


@pytest.mark.client
def test_a_root_whose_token_is_away_holds_nobody_up_but_who_signs_with_it(
    authority: Authority, tmp_path: Path, hsm: SoftHsm
) -> None:
    elsewhere = open_key(hsm.uri("nowhere", "root"), KEYS["root"].public_key())
    save(replace(authority, roots=(replace(authority.roots[0], key=elsewhere),)), tmp_path)
    assert len(load_issuers(tmp_path)) == 1
    loaded = load(tmp_path)
    with pytest.raises(SignerError, match="no such token; connect it"):
        stage_issuing(loaded, NOW, key=create_key(KeyKind.EC_P256))


@pytest.mark.client
def test_a_gate_whose_token_is_away_is_told_before_the_first_leaf(
    authority: Authority, tmp_path: Path, hsm: SoftHsm
) -> None:
    save(authority, tmp_path)
    line = tmp_path / "issuing" / certificate_id(authority.issuer.certificate) / "ca.key"
    for token, label, message in [
        ("nowhere", "issuing", "no such token; connect it"),
        (TOKEN, "root", "not the key of the certificate"),
    ]:
        line.write_text(hsm.uri(token, label))
        with pytest.raises(StoreError, match=message) as refused:
            load_issuers(tmp_path)
        assert str(refused.value).startswith(f"{line}: pkcs11:token=")
        assert PIN not in str(refused.value)
