import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import VerificationError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pki.authority import (
    LEAST_LIFE,
    AuthorityError,
    CaKey,
    Issuing,
    KeyKind,
    Leaf,
    Line,
    Root,
    certificate_id,
    certificates_pem,
    create_authority,
    create_issuing,
    create_key,
    create_root,
    cross_sign,
    fingerprint,
    issue_leaf,
    key_pem,
)
from pki.profile import unsigned_ca
from tests.pki import oracle
from tests.pki.clients import program

NOW = datetime(2026, 11, 22, 12, 30, 15, 123456, tzinfo=UTC)
AUTHORITY = create_authority(NOW, name="Example Corp")
ROOT, ISSUING = AUTHORITY.roots[0], AUTHORITY.issuer
LONG = ".".join(["a" * 63] * 3 + ["b" * 61])  # 253 characters
ABOVE_64 = "xn--bcher-kva." + "long." * 12 + "name.example"


def verify(leaf: Leaf, at: datetime = NOW, root: Root = ROOT, host: str | None = None) -> list[x509.Certificate]:
    return oracle.verify(leaf, root.certificate, at=at, host=host)


def extension[T: x509.ExtensionType](certificate: x509.Certificate, kind: type[T]) -> tuple[T, bool]:
    found = certificate.extensions.get_extension_for_class(kind)
    return found.value, found.critical


# Roots and issuing CAs


@pytest.mark.parametrize(("certificate", "path_length"), [(ROOT.certificate, None), (ISSUING.certificate, 0)])
def test_a_ca_carries_what_strict_clients_ask_for(certificate: x509.Certificate, path_length: int | None) -> None:
    usage, usage_is_critical = extension(certificate, x509.KeyUsage)
    assert extension(certificate, x509.BasicConstraints) == (x509.BasicConstraints(True, path_length), True)
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature, usage_is_critical) == (True, True, True, True)
    assert not any((usage.key_encipherment, usage.key_agreement, usage.data_encipherment, usage.content_commitment))
    identifier = extension(ROOT.certificate, x509.SubjectKeyIdentifier)[0].digest
    assert extension(certificate, x509.AuthorityKeyIdentifier)[0].key_identifier == identifier
    assert not extension(certificate, x509.SubjectKeyIdentifier)[1]
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)


def test_a_root_lives_ten_years_and_an_issuing_ca_one() -> None:
    assert timedelta(days=3651) < ROOT.certificate.not_valid_after_utc - NOW < timedelta(days=3653)
    assert timedelta(days=364) < ISSUING.certificate.not_valid_after_utc - NOW < timedelta(days=366)


def test_an_issuing_ca_does_not_outlive_its_root() -> None:
    authority = create_authority(NOW, root_years=1, issuing_life=timedelta(days=3000))
    assert authority.issuer.certificate.not_valid_after_utc == authority.roots[0].certificate.not_valid_after_utc


def test_an_offline_root_signs_nothing_here() -> None:
    with pytest.raises(AuthorityError, match="has no key here; sign where its key is kept"):
        create_issuing(Root(ROOT.certificate), NOW, name="Example Corp")


def test_an_expired_root_signs_nothing() -> None:
    with pytest.raises(AuthorityError, match="expired"):
        create_issuing(create_root(NOW - timedelta(days=4000), name="Old"), NOW, name="Old")


def test_two_authorities_of_one_name_differ_in_subject() -> None:
    other = create_authority(NOW, name="Example Corp")
    subjects = {c.subject for a in (AUTHORITY, other) for c in (a.roots[0].certificate, a.issuer.certificate)}
    assert len(subjects) == 4


@pytest.mark.parametrize("name", ["", "  ", "a" * 65, "two\nlines", "nul\0", "\udcff"])
def test_a_name_that_no_certificate_can_carry_is_refused(name: str) -> None:
    with pytest.raises(AuthorityError, match="cannot name an authority"):
        create_authority(NOW, name=name)


def test_a_name_in_any_script_is_carried() -> None:
    subject = create_authority(NOW, name="Überfirma 株式会社").roots[0].certificate.subject
    assert "Überfirma 株式会社" in subject.rfc4514_string()


def test_what_a_ca_of_path_length_1_signs_may_sign_leaves() -> None:
    given = create_issuing(ROOT, NOW, name="Example Corp", path_length=1)
    below = create_issuing(Root(given.certificate, given.key), NOW, name="Example Corp")
    chain = (below.certificate, given.certificate)
    assert extension(given.certificate, x509.BasicConstraints) == (x509.BasicConstraints(True, 1), True)
    assert verify(issue_leaf(Issuing(below.certificate, below.key, chain), "a.example", NOW))


def test_an_issuing_ca_has_another_key_than_its_root() -> None:
    with pytest.raises(AuthorityError, match=r"an issuing CA with the key of root .*; use another key"):
        create_issuing(ROOT, NOW, name="Example Corp", key=ROOT.key)


@pytest.mark.parametrize(("above", "path_length"), [(0, 0), (1, 1)])
def test_no_ca_is_made_where_the_path_length_above_allows_none(above: int, path_length: int) -> None:
    given = create_issuing(ROOT, NOW, name="Example Corp", path_length=above)
    with pytest.raises(AuthorityError, match=f"allows {above} CAs in a row below it"):
        create_issuing(Root(given.certificate, given.key), NOW, name="Example Corp", path_length=path_length)


@pytest.mark.parametrize(
    ("curve", "digest"),
    [(ec.SECP256R1(), hashes.SHA256), (ec.SECP384R1(), hashes.SHA384), (ec.SECP521R1(), hashes.SHA512)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_curve_signs_with_the_digest_of_its_strength(
    curve: ec.EllipticCurve, digest: type[hashes.HashAlgorithm]
) -> None:
    root = create_root(NOW, name="Example Corp", key=ec.generate_private_key(curve))
    issuing = create_issuing(root, NOW, name="Example Corp", key=ec.generate_private_key(curve))
    leaf = issue_leaf(issuing, "a.example", NOW)
    signed = (root.certificate, issuing.certificate, leaf.certificate)
    assert {type(certificate.signature_hash_algorithm) for certificate in signed} == {digest}
    assert verify(leaf, root=root)


class Token(ec.EllipticCurvePrivateKey):
    """A key that is elsewhere: here are its signatures."""

    def __init__(self) -> None:
        self._there = ec.generate_private_key(ec.SECP256R1())

    def sign(self, data: object, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        assert isinstance(data, bytes)
        return self._there.sign(data, signature_algorithm)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._there.public_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._there.curve

    @property
    def key_size(self) -> int:
        return self._there.key_size

    def exchange(self, *_: object) -> bytes:
        raise AssertionError("not asked for")

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        raise AssertionError("not to be had")

    def private_bytes(self, *_: object) -> bytes:
        raise AssertionError("not to be had")

    def __copy__(self) -> "Token":
        return self

    def __deepcopy__(self, _: object) -> "Token":
        return self


def test_keys_that_are_elsewhere_sign_everything() -> None:
    root = create_root(NOW, name="Example Corp", key=Token())
    issuing = create_issuing(root, NOW, name="Example Corp", key=Token())
    assert verify(issue_leaf(issuing, "a.example", NOW), root=root)


# Cross certificates


OLD = create_root(NOW - timedelta(days=3000), name="Example Corp")


def test_a_cross_certificate_is_the_subject_under_another_issuer() -> None:
    cross = cross_sign(ROOT, OLD, NOW)
    assert (cross.subject, cross.issuer) == (ROOT.certificate.subject, OLD.certificate.subject)
    own, signers = (extension(c, x509.SubjectKeyIdentifier)[0] for c in (ROOT.certificate, OLD.certificate))
    assert extension(cross, x509.SubjectKeyIdentifier) == (own, False)
    assert extension(cross, x509.AuthorityKeyIdentifier)[0].key_identifier == signers.digest
    assert extension(cross, x509.BasicConstraints) == (x509.BasicConstraints(True, None), True)
    assert extension(cross, x509.KeyUsage) == extension(ROOT.certificate, x509.KeyUsage)


def test_a_cross_certificate_lives_as_long_as_both() -> None:
    ahead, back = cross_sign(ROOT, OLD, NOW), cross_sign(OLD, ROOT, NOW)
    assert {ahead.not_valid_after_utc, back.not_valid_after_utc} == {OLD.certificate.not_valid_after_utc}
    assert ahead.not_valid_before_utc == ROOT.certificate.not_valid_before_utc
    until = NOW + timedelta(days=90)
    assert cross_sign(OLD, ROOT, NOW, until=until).not_valid_after_utc == until.replace(microsecond=0)


def test_a_client_that_trusts_the_signer_alone_accepts_what_the_subject_signed() -> None:
    crossed = Issuing(ISSUING.certificate, ISSUING.key, (ISSUING.certificate, cross_sign(ROOT, OLD, NOW)))
    leaf = issue_leaf(crossed, "a.example", NOW)
    assert len(verify(leaf, root=OLD)) == 4
    assert len(verify(leaf, root=ROOT)) == 3


def test_a_cross_certificate_keeps_the_limits_of_its_subject() -> None:
    issuing = create_issuing(ROOT, NOW, name="Corporate", permitted=["corp.example"], path_length=2)
    limited = Root(issuing.certificate, issuing.key)
    cross = cross_sign(limited, OLD, NOW)
    assert extension(cross, x509.BasicConstraints)[0].path_length == 2
    assert extension(cross, x509.NameConstraints) == extension(limited.certificate, x509.NameConstraints)


def test_a_ca_is_known_by_the_identifier_it_has() -> None:
    identifier = x509.SubjectKeyIdentifier(b"by another rule")
    life = (ROOT.certificate.not_valid_before_utc, ROOT.certificate.not_valid_after_utc)
    key, name = create_key(KeyKind.EC_P256), ROOT.certificate.subject
    unsigned = unsigned_ca(name, key.public_key(), life, path_length=None, identifier=identifier)
    other = Root(unsigned.sign(key, hashes.SHA256()), key)
    assert extension(cross_sign(other, ROOT, NOW), x509.SubjectKeyIdentifier)[0] == identifier
    below = create_issuing(other, NOW, name="Example Corp").certificate
    assert extension(below, x509.AuthorityKeyIdentifier)[0].key_identifier == identifier.digest


def test_an_old_root_without_identifiers_can_sign_and_be_signed() -> None:
    key, name = create_key(KeyKind.EC_P256), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Old")])
    old = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(ROOT.certificate.not_valid_before_utc)
        .not_valid_after(ROOT.certificate.not_valid_after_utc)
        .sign(key, hashes.SHA256())
    )
    assert not list(old.extensions)
    cross = cross_sign(Root(old, key), ROOT, NOW)
    issuing = create_issuing(Root(old, key), NOW, name="Example Corp")
    assert verify(issue_leaf(replace(issuing, chain=(issuing.certificate, cross)), "a.example", NOW))


def test_a_root_that_has_expired_is_not_crossed() -> None:
    with pytest.raises(AuthorityError, match="expired"):
        cross_sign(create_root(NOW - timedelta(days=4000), name="Old"), ROOT, NOW)


def test_a_cross_certificate_that_has_expired_is_not_sent() -> None:
    end = OLD.certificate.not_valid_after_utc
    issuing = create_issuing(ROOT, end - timedelta(days=100), name="Example Corp")
    crossed = Issuing(issuing.certificate, issuing.key, (issuing.certificate, cross_sign(ROOT, OLD, NOW)))
    before = issue_leaf(crossed, "a.example", end - timedelta(days=1))
    assert (before.chain, before.renew_at) == (crossed.chain, end)
    assert issue_leaf(crossed, "a.example", end).chain == (issuing.certificate,)


# Leaves


def test_a_leaf_carries_what_strict_clients_ask_for() -> None:
    leaf = issue_leaf(ISSUING, "a.example", NOW).certificate
    usage, usage_is_critical = extension(leaf, x509.KeyUsage)
    assert extension(leaf, x509.BasicConstraints) == (x509.BasicConstraints(False, None), True)
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign, usage_is_critical) == (
        True,
        False,
        False,
        True,
    )
    assert list(extension(leaf, x509.ExtendedKeyUsage)[0]) == [ExtendedKeyUsageOID.SERVER_AUTH]
    issuer = extension(ISSUING.certificate, x509.SubjectKeyIdentifier)[0].digest
    assert extension(leaf, x509.AuthorityKeyIdentifier)[0].key_identifier == issuer
    assert extension(leaf, x509.SubjectKeyIdentifier)[0] == x509.SubjectKeyIdentifier.from_public_key(leaf.public_key())


def test_every_leaf_has_a_key_and_a_serial_of_its_own() -> None:
    leaves = [issue_leaf(ISSUING, "a.example", NOW) for _ in range(20)]
    keys = {key_pem(key) for key in (ISSUING.key, *(leaf.key for leaf in leaves))}
    assert all(leaf.key.public_key() == leaf.certificate.public_key() for leaf in leaves)
    serials = {leaf.certificate.serial_number for leaf in leaves}
    assert (len(keys), len(serials)) == (21, 20)
    assert all(0 < serial < 1 << 159 for serial in serials)


def test_the_chain_sent_is_without_the_root() -> None:
    leaf = issue_leaf(ISSUING, "a.example", NOW)
    assert leaf.chain == (ISSUING.certificate,)
    assert leaf.pem().count(b"BEGIN CERTIFICATE") == 2
    assert verify(leaf) == [leaf.certificate, ISSUING.certificate, ROOT.certificate]


def test_a_leaf_lives_seven_days_with_its_backdating_counted() -> None:
    leaf = issue_leaf(ISSUING, "a.example", NOW)
    start, end = leaf.certificate.not_valid_before_utc, leaf.certificate.not_valid_after_utc
    assert NOW - start == timedelta(hours=1, microseconds=NOW.microsecond)
    assert end - start + timedelta(seconds=1) == timedelta(days=7)  # both ends count (RFC 5280 4.1.2.5)
    assert verify(leaf, at=start)
    assert verify(leaf, at=end)
    with pytest.raises(VerificationError):
        verify(leaf, at=end + timedelta(seconds=1))


def test_a_leaf_does_not_outlive_its_issuer() -> None:
    end = ISSUING.certificate.not_valid_after_utc
    leaf = issue_leaf(ISSUING, "a.example", end - timedelta(hours=2))
    assert leaf.certificate.not_valid_after_utc == end
    assert leaf.renew_at == end - timedelta(hours=1)


def test_a_leaf_is_not_older_than_its_issuer() -> None:
    leaf = issue_leaf(ISSUING, "a.example", ISSUING.certificate.not_valid_before_utc)
    assert leaf.certificate.not_valid_before_utc == ISSUING.certificate.not_valid_before_utc


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (ISSUING.certificate.not_valid_after_utc, "expired at 2027-11-22 .*; replace it"),
        (ISSUING.certificate.not_valid_before_utc - timedelta(seconds=1), "not valid before .*; set the clock"),
    ],
    ids=["expired", "not yet valid"],
)
def test_an_issuing_ca_that_is_not_valid_issues_nothing(at: datetime, message: str) -> None:
    with pytest.raises(AuthorityError, match=message):
        issue_leaf(ISSUING, "a.example", at)


def test_a_clock_in_another_zone_gives_the_same_life() -> None:
    there = issue_leaf(ISSUING, "a.example", NOW.astimezone(ZoneInfo("Asia/Tokyo"))).certificate
    here = issue_leaf(ISSUING, "a.example", NOW).certificate
    assert there.not_valid_before_utc == here.not_valid_before_utc
    assert there.not_valid_after_utc == here.not_valid_after_utc


def test_a_ca_that_ends_within_minutes_signs_nothing_any_more() -> None:
    last = ISSUING.certificate.not_valid_after_utc - LEAST_LIFE
    assert verify(issue_leaf(ISSUING, "a.example", last), at=last)
    with pytest.raises(AuthorityError, match="too soon to sign anything; replace it"):
        issue_leaf(ISSUING, "a.example", last + timedelta(seconds=1))
    with pytest.raises(AuthorityError, match="too soon to sign anything; replace it"):
        create_issuing(ROOT, ROOT.certificate.not_valid_after_utc - timedelta(minutes=1), name="Example Corp")


@pytest.mark.parametrize(
    ("years", "message"),
    [(0, "is over before it begins"), (-1, "is over before it begins"), (8000, "ends after the year 9999")],
)
def test_a_life_that_no_certificate_can_have_is_refused(years: int, message: str) -> None:
    with pytest.raises(AuthorityError, match=message):
        create_root(NOW, name="Example Corp", years=years)


def test_a_life_past_2049_is_written_in_four_digits() -> None:
    root = create_root(NOW, name="Example Corp", years=40)
    issuing = create_issuing(root, NOW, name="Example Corp", life=timedelta(days=12000))
    at = datetime(2059, 1, 1, tzinfo=UTC)
    assert verify(issue_leaf(issuing, "a.example", at), at=at, root=root)


@pytest.mark.parametrize(
    ("host", "named"),
    [
        pytest.param("a.example", True, id="short"),
        pytest.param("a" * 55 + ".example", True, id="63 characters"),
        pytest.param("a" * 56 + ".example", True, id="64 characters"),
        pytest.param("a" * 57 + ".example", False, id="65 characters"),
        pytest.param(LONG, False, id="253 characters"),
    ],
)
def test_the_alternative_name_is_critical_exactly_when_there_is_no_subject(host: str, named: bool) -> None:
    leaf = issue_leaf(ISSUING, host, NOW)
    assert leaf.certificate.subject.rfc4514_string() == (f"CN={host}" if named else "")
    assert extension(leaf.certificate, x509.SubjectAlternativeName) == (
        x509.SubjectAlternativeName([x509.DNSName(host)]),
        not named,
    )
    assert verify(leaf)


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.9", "::1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_an_address_is_named_as_an_address(host: str) -> None:
    leaf = issue_leaf(ISSUING, host, NOW)
    assert list(extension(leaf.certificate, x509.SubjectAlternativeName)[0]) == [x509.IPAddress(ip_address(host))]
    assert verify(leaf)


@pytest.mark.parametrize(
    "host",
    ["", "*", "*.example.com", "a..b", ".a", "a.", "A.example", "bücher.example", "a b", "a/b", "a\0.example", "a\n",
     "user@a.example", "a:443", "[::1]", "fe80::1%eth0", "a" * 64, "b." + LONG],
)  # fmt: skip
def test_no_leaf_is_issued_for_what_is_no_host(host: str) -> None:
    with pytest.raises(AuthorityError, match="is no host name in normal form; no leaf is issued for it"):
        issue_leaf(ISSUING, host, NOW)


label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True) | st.just("xn--bcher-kva")
names = (
    st.tuples(st.lists(label, max_size=6), st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z]", fullmatch=True))
    .map(lambda parts: ".".join([*parts[0], parts[1]]))
    .filter(lambda name: len(name) <= 253)
)


@settings(deadline=None, max_examples=60)
@example(LONG)
@example(ABOVE_64)
@given(names | st.ip_addresses().map(str).filter(lambda text: "%" not in text))
def test_every_leaf_satisfies_the_oracle_for_its_host_alone(host: str) -> None:
    leaf = issue_leaf(ISSUING, host, NOW)
    assert verify(leaf)
    with pytest.raises(VerificationError):
        verify(leaf, host="other.invalid")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80))
def test_any_text_gives_a_leaf_or_our_error(text: str) -> None:
    try:
        leaf = issue_leaf(ISSUING, text, NOW)
    except AuthorityError:
        return
    assert leaf.host == text


def test_a_leaf_of_another_authority_is_refused() -> None:
    other = create_authority(NOW, name="Example Corp")
    with pytest.raises(VerificationError):
        verify(issue_leaf(other.issuer, "a.example", NOW))


def test_a_leaf_cannot_sign_a_leaf() -> None:
    leaf = issue_leaf(ISSUING, "a.example", NOW)
    forged = issue_leaf(Issuing(leaf.certificate, leaf.key, (leaf.certificate, ISSUING.certificate)), "b.example", NOW)
    with pytest.raises(VerificationError):
        verify(forged)


def test_ids_and_fingerprints_are_those_openssl_prints(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(certificates_pem(ROOT.certificate))
    command = [program("openssl"), "x509", "-in", str(tmp_path / "ca.crt"), "-noout", "-fingerprint", "-sha256"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert printed.rpartition("=")[2] == fingerprint(ROOT.certificate)
    assert certificate_id(ROOT.certificate) == fingerprint(ROOT.certificate).replace(":", "").lower()[:16]


# RSA beside it


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def both() -> tuple[Root, Issuing]:
    """The RSA line of an authority that has two."""
    authority = create_authority(NOW, with_rsa=True)
    assert [issuer.line for issuer in authority.issuers] == [Line.MAIN, Line.RSA]
    assert issue_leaf(authority.issuer, "a.example", NOW).chain == (authority.issuers[0].certificate,)
    return authority.roots[1], authority.issuers[1]


def test_the_rsa_line_is_rsa_throughout(both: tuple[Root, Issuing], rsa_key: CaKey) -> None:
    root, issuing = both
    leaf = issue_leaf(issuing, "a.example", NOW, rsa_key)
    keys = [certificate.public_key() for certificate in (root.certificate, issuing.certificate, leaf.certificate)]
    assert [key.key_size for key in keys if isinstance(key, rsa.RSAPublicKey)] == [3072, 3072, 2048]
    assert leaf.key is rsa_key
    assert verify(leaf, root=root)


def test_an_rsa_leaf_also_serves_clients_without_forward_secrecy(both: tuple[Root, Issuing], rsa_key: CaKey) -> None:
    usage = extension(issue_leaf(both[1], "a.example", NOW, rsa_key).certificate, x509.KeyUsage)[0]
    assert (usage.digital_signature, usage.key_encipherment, usage.key_cert_sign) == (True, True, False)
    assert not extension(issue_leaf(ISSUING, "a.example", NOW).certificate, x509.KeyUsage)[0].key_encipherment


def test_a_leaf_of_the_rsa_line_has_an_rsa_key_by_default(both: tuple[Root, Issuing]) -> None:
    assert isinstance(issue_leaf(both[1], "a.example", NOW).key, rsa.RSAPrivateKey)


# What openssl says, at its strictest


ODD = [
    pytest.param("a.example", id="name"),
    pytest.param(ABOVE_64, id="no subject"),
    pytest.param(LONG, id="253 characters"),
    pytest.param("my_bucket.a.example", id="underscore"),
    pytest.param("_service.a.example", id="leading underscore"),
    pytest.param("203.0.113.9", id="address"),
    pytest.param("2001:db8::1", id="IPv6 address"),
]


@pytest.mark.client
@pytest.mark.parametrize("host", ODD)
def test_openssl_verifies_every_kind_of_leaf(host: str, tmp_path: Path) -> None:
    leaf = issue_leaf(ISSUING, host, NOW)
    assert oracle.openssl_refusal(leaf, ROOT.certificate, at=NOW, folder=tmp_path) == ""


@pytest.mark.client
def test_openssl_verifies_every_kind_of_chain(both: tuple[Root, Issuing], rsa_key: CaKey, tmp_path: Path) -> None:
    limited = create_issuing(ROOT, NOW, name="Example Corp", permitted=["a.example"])
    crossed = Issuing(ISSUING.certificate, ISSUING.key, (ISSUING.certificate, cross_sign(ROOT, OLD, NOW)))
    p384 = create_issuing(ROOT, NOW, name="Example Corp", key=ec.generate_private_key(ec.SECP384R1()))
    for root, issuing, key in [
        (both[0], both[1], rsa_key),
        (ROOT, ISSUING, rsa_key),
        (ROOT, limited, None),
        (ROOT, crossed, None),
        (OLD, crossed, None),
        (ROOT, p384, create_key(KeyKind.EC_P256)),
    ]:
        leaf = issue_leaf(issuing, "x.a.example", NOW, key)
        assert oracle.openssl_refusal(leaf, root.certificate, at=NOW, folder=tmp_path) == ""
    assert "unable to get" in oracle.openssl_refusal(leaf, OLD.certificate, at=NOW, folder=tmp_path)
