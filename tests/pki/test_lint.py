import subprocess
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, ObjectIdentifier
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pki.authority import (
    YEAR,
    Authority,
    CaKey,
    KeyKind,
    certificates_pem,
    create_authority,
    create_issuing,
    create_key,
    create_root,
    cross_sign,
    key_pem,
)
from pki.lint import Fault, Profile, faults
from pki.pkcs12 import Form, Loaded, assemble, passwordless_pfx, read
from tests.pki.clients import program
from tests.pki.making_cas import NOW, Made, make, name, resigned, rsa_key, usage, with_sha1

STRICT, AZURE, AWS = Profile.STRICT, Profile.AZURE_FIREWALL, Profile.AWS_NFW
ROOT = make(subject="a root")


def lint(ca: Made | x509.Certificate, *above: Made, profile: Profile = STRICT) -> list[Fault]:
    certificate = ca.certificate if isinstance(ca, Made) else ca
    return faults(Loaded(certificate, chain=tuple(one.certificate for one in above)), profile, NOW)


def broken(found: list[Fault]) -> list[str]:
    return [fault.what for fault in found if fault.breaks]


def advised(found: list[Fault]) -> list[str]:
    return [fault.what for fault in found if not fault.breaks]


def domains(*permitted: str, excluded: tuple[str, ...] = ()) -> x509.NameConstraints:
    return x509.NameConstraints(
        [x509.DNSName(one) for one in permitted] or None, [x509.DNSName(one) for one in excluded] or None
    )


# What we make ourselves


@pytest.mark.parametrize("with_rsa", [False, True], ids=["ec", "rsa"])
def test_what_we_make_has_no_fault_and_earns_no_advice(with_rsa: bool) -> None:
    authority = create_authority(NOW, with_rsa=with_rsa, permitted=["example.com"])
    for root, issuing in zip(authority.roots, authority.issuing, strict=True):
        assert faults(Loaded(root.certificate, root.key), STRICT, NOW) == []
        assert faults(Loaded(issuing.certificate, issuing.key, (root.certificate,)), STRICT, NOW) == []


def test_a_cross_certificate_has_no_fault() -> None:
    old, new = create_root(NOW, name="old"), create_root(NOW + YEAR, name="new")
    crossed = cross_sign(new, old, NOW + YEAR)
    assert faults(Loaded(crossed, new.key, (old.certificate,)), STRICT, NOW + YEAR) == []


# What breaks clients

WRONG: dict[str, tuple[Callable[[], Made], str]] = {
    "no basic constraints": (lambda: make(ROOT, drop=(x509.BasicConstraints,)), "not a CA"),
    "a leaf": (lambda: make(ROOT, ca=False), "not a CA"),
    "basic constraints not critical": (
        lambda: make(ROOT, put=((x509.BasicConstraints(True, 0), False),)),
        "basicConstraints is not critical",
    ),
    "no key usage": (lambda: make(ROOT, drop=(x509.KeyUsage,)), "keyUsage does not say keyCertSign"),
    "no keyCertSign": (lambda: make(ROOT, put=((usage("crl_sign"), True),)), "keyUsage does not say keyCertSign"),
    "key usage not critical": (lambda: make(ROOT, put=((usage("key_cert_sign"), False),)), "keyUsage is not critical"),
    "no subject key identifier": (lambda: make(ROOT, drop=(x509.SubjectKeyIdentifier,)), "no subjectKeyIdentifier"),
    "no authority key identifier": (
        lambda: make(ROOT, drop=(x509.AuthorityKeyIdentifier,)),
        "no authorityKeyIdentifier",
    ),
    "critical subject key identifier": (
        lambda: make(ROOT, put=((x509.SubjectKeyIdentifier(b"1234"), True),)),
        "extension 2.5.29.14 is critical",
    ),
    "another issuer's identifier": (
        lambda: make(ROOT, put=((x509.AuthorityKeyIdentifier(b"another", None, None), False),)),
        "authorityKeyIdentifier is not its issuer's subjectKeyIdentifier",
    ),
    "expired": (lambda: make(ROOT, days=(-9, -1)), "expired 2026-11-21"),
    "not yet valid": (lambda: make(ROOT, days=(1, 99)), "not valid before 2026-11-23"),
    "RSA-1024": (lambda: make(ROOT, key=rsa_key(1024)), "RSA-1024 key"),
    "exponent 3": (lambda: make(ROOT, key=rsa_key(2048, 3)), "RSA exponent 3"),
    "P-192": (lambda: make(ROOT, key=ec.generate_private_key(ec.SECP192R1())), "EC secp192r1 key"),
    "P-224": (lambda: make(ROOT, key=ec.generate_private_key(ec.SECP224R1())), "EC secp224r1 key"),
    "secp256k1": (lambda: make(ROOT, key=ec.generate_private_key(ec.SECP256K1())), "EC secp256k1 key"),
    "Ed25519": (lambda: make(ROOT, key=ed25519.Ed25519PrivateKey.generate()), "Ed25519 key"),
    "SHA-1": (lambda: with_sha1(make(make(key=rsa_key(2048))), rsa_key(2048)), "signed with SHA1"),
    "client authentication alone": (
        lambda: make(ROOT, put=((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),)),
        "extendedKeyUsage lacks serverAuth",
    ),
    "any extended usage": (
        lambda: make(ROOT, put=((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), False),)),
        "extendedKeyUsage lacks serverAuth",
    ),
    "unknown critical extension": (
        lambda: make(ROOT, put=((x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\5\0"), True),)),
        "extension 1.2.3.4 is critical",
    ),
    "asks for a policy": (
        lambda: make(ROOT, put=((x509.PolicyConstraints(0, None), True),)),
        "policyConstraints asks for a policy",
    ),
    "constraints nobody can read": (
        lambda: make(ROOT, put=((domains("192.0.2.1"), True),)),
        "nameConstraints has '192.0.2.1', which clients cannot read",
    ),
    "constraints exclude all": (
        lambda: make(ROOT, put=((domains(excluded=("",)), True),)),
        "nameConstraints excludes every name",
    ),
    "no subject": (lambda: make(ROOT, subject=""), "no subject or no issuer"),
}


@pytest.mark.parametrize(("ca", "what"), WRONG.values(), ids=WRONG)
def test_what_breaks_clients_is_a_fault_with_a_repair(ca: Callable[[], Made], what: str) -> None:
    made = ca()
    above = [ROOT] if made.certificate.issuer == ROOT.certificate.subject else []
    found = [fault for fault in lint(made, *above) if fault.breaks]
    assert any(fault.what.startswith(what) for fault in found), found
    assert all(fault.repair for fault in found)


ADVICE: dict[str, tuple[Callable[[], Made], str]] = {
    "RSA-2048": (lambda: make(ROOT, key=rsa_key(2048)), "RSA-2048 key"),
    "P-521": (lambda: make(ROOT, key=ec.generate_private_key(ec.SECP521R1())), "EC P-521 key"),
    "ends soon": (lambda: make(ROOT, days=(-9, 29)), "ends 2026-12-21"),
    "outlives its issuer": (lambda: make(ROOT, days=(-1, 701)), "outlives its issuer, which ends 2028-10-22"),
    "serial number of the issuer": (
        lambda: make(
            ROOT,
            put=(
                (
                    x509.AuthorityKeyIdentifier(
                        x509.SubjectKeyIdentifier.from_public_key(ROOT.key.public_key()).digest,
                        [x509.DirectoryName(name("a root"))],
                        ROOT.certificate.serial_number,
                    ),
                    False,
                ),
            ),
        ),
        "authorityKeyIdentifier holds the issuer's serial number",
    ),
    "constraints not critical": (
        lambda: make(ROOT, put=((domains("example.com"), False),)),
        "nameConstraints is not critical",
    ),
    "constraints with a dot": (
        lambda: make(ROOT, put=((domains(".example.com"), True),)),
        "nameConstraints has '.example.com', which clients read differently",
    ),
    "constraints on subjects": (
        lambda: make(ROOT, put=((x509.NameConstraints([x509.DirectoryName(name("x"))], None), True),)),
        "nameConstraints limits directory names",
    ),
    "self-signed with SHA-1": (lambda: with_sha1(make(key=rsa_key(3072)), rsa_key(3072)), "signed with SHA1"),
}


@pytest.mark.parametrize(("ca", "what"), ADVICE.values(), ids=ADVICE)
def test_what_only_may_go_wrong_is_advice(ca: Callable[[], Made], what: str) -> None:
    made = ca()
    found = lint(made, *([ROOT] if made.certificate.issuer == ROOT.certificate.subject else []))
    assert broken(found) == []
    assert [one.startswith(what) for one in advised(found)] == [True]


FINE: dict[str, Callable[[], Made]] = {
    "P-384": lambda: make(ROOT, key=ec.generate_private_key(ec.SECP384R1())),
    "RSA-3072": lambda: make(ROOT, key=rsa_key(3072)),
    "server authentication among others": lambda: make(
        ROOT,
        put=((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), False),),
    ),
    "unknown extension, not critical": lambda: make(
        ROOT, put=((x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\5\0"), False),)
    ),
    "constraints on domains and addresses": lambda: make(
        ROOT,
        put=((x509.NameConstraints([x509.DNSName("example.com")], [x509.IPAddress(ip_network("0.0.0.0/0"))]), True),),
    ),
    "an old root's own identifier missing": lambda: make(drop=(x509.AuthorityKeyIdentifier,)),
    "ends on the second": lambda: make(ROOT, days=(0, 30)),
}


@pytest.mark.parametrize("ca", FINE.values(), ids=FINE)
def test_what_clients_accept_is_no_fault(ca: Callable[[], Made]) -> None:
    made = ca()
    assert lint(made, *([ROOT] if made.certificate.issuer == ROOT.certificate.subject else [])) == []


# Encodings that no builder makes


def test_a_certificate_of_version_1_is_a_fault() -> None:
    made = make(drop=(x509.BasicConstraints, x509.KeyUsage, x509.SubjectKeyIdentifier, x509.AuthorityKeyIdentifier))
    certificate = resigned(made.certificate, made.key, b"\xa0\x03\x02\x01\x02", b"")
    assert certificate.version is x509.Version.v1
    assert "X.509 version 1, which marks no CA" in broken(lint(certificate))


@pytest.mark.parametrize(
    ("octets", "what"),
    [
        (b"\x00", "its serial number is not positive"),
        (b"\x7f" * 21, "its serial number is longer than 20 octets"),
        (b"\x7f" * 20, ""),
        (b"\x01", ""),
    ],
    ids=["zero", "21 octets", "20 octets", "one"],
)
def test_serial_numbers_are_positive_and_short(octets: bytes, what: str) -> None:
    made = make(ROOT)
    serial = made.certificate.serial_number.to_bytes(20).lstrip(b"\0")
    serial = b"\0" * (serial[0] >> 7) + serial
    old, new = (b"\x02" + bytes([len(one)]) + one for one in (serial, octets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cryptography warns of what the test is about
        certificate = resigned(made.certificate, ROOT.key, old, new)
        found = broken(lint(certificate, ROOT))
    assert [one.startswith(what) for one in found] == [True] * bool(what)


def test_a_date_in_the_wrong_encoding_is_advice() -> None:
    made = make(ROOT)
    ends = made.certificate.not_valid_after_utc
    old, new = f"\x17\x0d{ends:%y%m%d%H%M%SZ}".encode(), f"\x18\x0f{ends:%Y%m%d%H%M%SZ}".encode()
    signed = made.certificate.tbs_certificate_bytes
    start = f"\x17\x0d{made.certificate.not_valid_before_utc:%y%m%d%H%M%SZ}".encode()
    assert start + old in signed
    length = bytes([0x30, len(start + old)])
    certificate = resigned(
        made.certificate, ROOT.key, length + start + old, bytes([0x30, len(start + new)]) + start + new
    )
    assert advised(lint(certificate, ROOT)) == ["a date is encoded against RFC 5280 4.1.2.5"]


def test_what_cannot_be_parsed_is_one_fault() -> None:
    twice = (
        (x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\5\0"), False),
        (x509.CertificatePolicies([x509.PolicyInformation(ObjectIdentifier("1.2.3.9"), None)]), False),
    )
    made = make(ROOT, put=twice)
    certificate = resigned(made.certificate, ROOT.key, b"\x06\x03\x2a\x03\x04", b"\x06\x03\x55\x1d\x0e")
    assert [fault.what.partition(":")[0] for fault in lint(certificate, ROOT)] == ["cannot be parsed"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_certificate_gets_an_answer(data: st.DataObject) -> None:
    der = bytearray(DAMAGED)
    for _ in range(data.draw(st.integers(1, 4))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            certificate = x509.load_der_x509_certificate(bytes(der))
        except (ValueError, x509.InvalidVersion):
            return
        for profile in Profile:
            assert all(fault.what and fault.repair for fault in faults(Loaded(certificate), profile, NOW))


DAMAGED = make(ROOT, put=((domains("example.com"), True),)).certificate.public_bytes(Encoding.DER)


# What stands above


def test_path_length_0_where_an_intermediate_is_needed_is_a_fault() -> None:
    root = make(subject="a root", path_length=0)
    assert broken(lint(root)) == ["path length 0 permits 0 CA below it, and 1 must stand there"]
    assert broken(lint(make(root), root)) == [
        "above it, CN=a root: path length 0 permits 0 CA below it, and 1 must stand there"
    ]


def test_path_length_counts_every_ca_below() -> None:
    root = make(subject="a root", path_length=1)
    between = make(root, subject="between")
    assert broken(lint(between, root)) == []
    assert broken(lint(make(between), between, root)) == [
        "above it, CN=a root: path length 1 permits 1 CA below it, and 2 must stand there"
    ]


@pytest.mark.parametrize(
    ("above", "what"),
    [
        (lambda: make(subject="R", days=(-9, -1)), "above it, CN=R: expired 2026-11-21"),
        (
            lambda: make(subject="R", put=((usage("crl_sign"), True),)),
            "above it, CN=R: keyUsage does not say keyCertSign",
        ),
        (lambda: make(subject="R", key=rsa_key(1024)), "above it, CN=R: RSA-1024 key"),
        (lambda: make(subject="R", drop=(x509.BasicConstraints,)), "above it, CN=R: not a CA"),
    ],
    ids=["expired", "may not sign", "weak key", "not a CA"],
)
def test_a_fault_above_it_is_a_fault(above: Callable[[], Made], what: str) -> None:
    root = above()
    found = broken(lint(make(root, days=(-9, 700)), root))
    assert [one.startswith(what) for one in found] == [True]


def test_the_wrong_key_is_a_fault() -> None:
    loaded = Loaded(make(ROOT).certificate, create_key(KeyKind.EC_P256))
    assert broken(faults(loaded, STRICT, NOW)) == ["the key is another certificate's"]


def test_certificates_that_did_not_sign_it_are_mentioned() -> None:
    loaded = Loaded(make(ROOT).certificate, strays=(make().certificate, make().certificate))
    assert advised(faults(loaded, STRICT, NOW)) == ["2 certificates beside it did not sign it"]


# Azure Firewall Premium: each requirement that it publishes


def azure(**changes: object) -> Loaded:
    """What fits it, but for `changes`, which `make` takes."""
    put = {"key": rsa_key(4096), "path_length": 1} | changes
    made = make(ROOT, **put)  # type: ignore[arg-type]  # checked there
    return Loaded(made.certificate, made.key, form=Form.PKCS12)  # type: ignore[arg-type]  # EC or RSA


def azure_faults(loaded: Loaded) -> list[str]:
    return broken(faults(loaded, AZURE, NOW))


def test_azure_takes_what_it_asks_for() -> None:
    assert faults(azure(), AZURE, NOW) == []
    assert faults(azure(path_length=2, days=(-1, 366)), AZURE, NOW) == []


def test_azure_asks_for_a_pfx_without_password() -> None:
    assert azure_faults(replace(azure(), form=Form.PEM)) == ["PEM and not a PFX"]
    assert azure_faults(replace(azure(), is_encrypted=True)) == ["the PFX has a password"]


def test_azure_asks_for_a_certificate_and_a_private_key() -> None:
    assert azure_faults(replace(azure(), key=None)) == ["no private key with it"]
    assert azure_faults(replace(azure(), key=rsa_key(2048))) == ["the key is another certificate's"]


def test_azure_asks_for_a_single_certificate() -> None:
    chained = replace(azure(), chain=(ROOT.certificate,))
    assert azure_faults(chained) == ["1 certificate beside it, and it must stand alone"]
    assert azure_faults(replace(azure(), strays=(ROOT.certificate,))) == azure_faults(chained)


def test_azure_asks_for_one_year_forward() -> None:
    assert azure_faults(azure(days=(-1, 364))) == ["ends 2027-11-21, and it must be valid for one year forward"]
    assert azure_faults(azure(days=(-9, -1))) == ["expired 2026-11-21"]
    assert azure_faults(azure(days=(1, 700))) == ["not valid before 2026-11-23 12:00 UTC"]


def test_azure_asks_for_rsa_of_4096_bits() -> None:
    assert azure_faults(azure(key=rsa_key(3072))) == ["RSA-3072 key, and Azure Firewall takes 4096 bits or more"]
    assert azure_faults(azure(key=create_key(KeyKind.EC_P256))) == [
        "EC secp256r1 key, and Azure Firewall takes RSA of 4096 bits or more"
    ]


def test_azure_asks_for_a_critical_key_usage_with_key_cert_sign() -> None:
    assert azure_faults(azure(put=((usage("key_cert_sign"), False),))) == [
        "keyUsage is not critical (RFC 5280 4.2.1.3)"
    ]
    assert azure_faults(azure(put=((usage("crl_sign"), True),))) == [
        "keyUsage does not say keyCertSign: it may sign no certificate"
    ]


def test_azure_asks_for_critical_basic_constraints() -> None:
    assert azure_faults(azure(put=((x509.BasicConstraints(True, 1), False),))) == [
        "basicConstraints is not critical (RFC 5280 4.2.1.9)"
    ]


def test_azure_asks_for_the_ca_flag() -> None:
    assert any(what.startswith("not a CA") for what in azure_faults(azure(ca=False)))


def test_azure_asks_for_a_path_length_of_one_or_more() -> None:
    assert azure_faults(azure(path_length=0)) == ["path length 0 permits 0 CA below it, and 1 must stand there"]
    assert azure_faults(azure(path_length=None)) == ["no path length, and Azure Firewall looks for one or more"]


def test_azure_asks_for_an_intermediate_ca() -> None:
    made = make(key=rsa_key(4096), path_length=1)
    loaded = Loaded(made.certificate, rsa_key(4096), form=Form.PKCS12)
    assert azure_faults(loaded) == ["self-signed, and Azure Firewall takes an intermediate CA"]


@pytest.mark.client
def test_the_command_that_makes_a_pfx_of_pem_repairs_it(tmp_path: Path) -> None:
    program("openssl")
    loaded = replace(azure(), form=Form.PEM)
    (fault,) = [fault for fault in faults(loaded, AZURE, NOW) if fault.breaks]
    assert loaded.key is not None
    (tmp_path / "KEY").write_bytes(key_pem(loaded.key))
    (tmp_path / "CERTIFICATE").write_bytes(certificates_pem(loaded.certificate))
    subprocess.run(["/bin/sh", "-c", fault.repair.partition(": ")[2]], cwd=tmp_path, check=True)
    assert faults(assemble(read((tmp_path / "PFX").read_bytes())), AZURE, NOW) == []


# AWS Network Firewall


def aws(key: CaKey | None = None, **changes: object) -> Loaded:
    made = make(ROOT, key=key, path_length=0, **changes)  # type: ignore[arg-type]  # checked there
    return Loaded(made.certificate, made.key, (ROOT.certificate,))  # type: ignore[arg-type]  # EC or RSA


def aws_faults(loaded: Loaded) -> list[str]:
    return broken(faults(loaded, AWS, NOW))


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_aws_takes_these_sizes_of_rsa(bits: int) -> None:
    assert aws_faults(aws(rsa_key(bits))) == []


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_aws_takes_these_curves(curve: ec.EllipticCurve) -> None:
    assert aws_faults(aws(ec.generate_private_key(curve))) == []


def test_aws_takes_no_other_size() -> None:
    assert aws_faults(aws(rsa_key(2056))) == ["RSA-2056 key, and ACM with clients takes 2048, 3072 and 4096 bits"]


def test_aws_asks_for_pem_with_an_unencrypted_key_and_the_whole_chain() -> None:
    assert aws_faults(replace(aws(), form=Form.PKCS12)) == ["PKCS#12, and ACM takes PEM"]
    assert aws_faults(replace(aws(), form=Form.DER)) == ["DER, and ACM takes PEM"]
    assert aws_faults(replace(aws(), is_encrypted=True)) == ["the key has a password, and ACM takes none"]
    assert aws_faults(replace(aws(), key=None)) == ["no private key with it"]
    assert aws_faults(replace(aws(), chain=())) == ["its chain does not lead to a root, and ACM asks for all of it"]


def test_aws_takes_a_self_signed_ca() -> None:
    made = make(path_length=0)
    assert faults(Loaded(made.certificate, made.key), AWS, NOW) == []  # type: ignore[arg-type]  # EC


def test_aws_takes_no_ca_of_aws_private_ca_and_no_endless_address() -> None:
    def answered_at(address: str) -> Loaded:
        place = x509.UniformResourceIdentifier(address)
        access = x509.AccessDescription(AuthorityInformationAccessOID.OCSP, place)
        return aws(put=((x509.AuthorityInformationAccess([access]), False),))

    assert aws_faults(answered_at("http://ocsp.acm-pca.eu-west-1.amazonaws.com")) == [
        "issued by AWS Private CA, whose CAs Network Firewall does not take"
    ]
    assert aws_faults(answered_at("http://ocsp.example.com/" + "a" * 1000)) == [
        "an OCSP address longer than 1000 characters, the most that ACM takes"
    ]
    assert aws_faults(answered_at("http://ocsp.example.com")) == []


def test_aws_takes_no_key_longer_than_5120_bytes() -> None:
    found = aws_faults(aws(rsa_key(2048)))
    assert found == []
    assert len(key_pem(rsa_key(4096))) < 5120


# What OpenSSL says of the same, as strictly as Python 3.13 does

REFUSED_BY_OPENSSL = (
    "no basic constraints", "a leaf", "basic constraints not critical", "no key usage", "no keyCertSign",
    "no subject key identifier", "no authority key identifier", "critical subject key identifier",
    "another issuer's identifier", "expired", "not yet valid", "RSA-1024", "client authentication alone",
    "any extended usage", "unknown critical extension", "constraints exclude all", "no subject",
)  # fmt: skip


def verified_by_openssl(ca: Made, directory: Path) -> subprocess.CompletedProcess[str]:
    """Whether a leaf below `ca` is a server to OpenSSL, for who trusts ROOT."""
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca.key.public_key())
    try:
        identifier = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        pass
    signer = Made(ca.certificate, ca.key)
    above = (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False)
    names = (x509.SubjectAlternativeName([x509.DNSName("www.example.com")]), False)
    server = (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    try:
        leaf = make(signer, subject="www.example.com", ca=False, put=(above, names, server), days=(-1, 7))
    except x509.ExtensionNotFound:
        parent = make(ROOT, key=ca.key)  # has the identifier that the CA lacks
        leaf = make(Made(parent.certificate, ca.key), subject="www.example.com", ca=False, put=(above, names, server))
    for file, certificate in (("root", ROOT), ("ca", ca), ("leaf", leaf)):
        (directory / file).write_bytes(certificates_pem(certificate.certificate))
    return subprocess.run(
        ["openssl", "verify", "-x509_strict", "-auth_level", "2", "-purpose", "sslserver", "-attime",
         str(int(NOW.timestamp())), "-verify_hostname", "www.example.com", "-CAfile", "root", "-untrusted", "ca",
         "leaf"],
        cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.client
@pytest.mark.parametrize("case", REFUSED_BY_OPENSSL)
def test_openssl_refuses_what_is_called_broken(case: str, tmp_path: Path) -> None:
    program("openssl")
    assert verified_by_openssl(WRONG[case][0](), tmp_path).returncode != 0


@pytest.mark.client
@pytest.mark.parametrize("case", [case for case in FINE if "root" not in case])
def test_openssl_accepts_what_is_called_fine(case: str, tmp_path: Path) -> None:
    program("openssl")
    done = verified_by_openssl(FINE[case](), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_authority_of_another_system_fits_it() -> None:
    root = create_root(NOW, name="Example")
    given = create_issuing(root, NOW, name="Example", life=2 * YEAR, kind=KeyKind.RSA_4096, path_length=1)
    loaded = assemble(read(passwordless_pfx(given.certificate, given.key)))
    assert faults(loaded, AZURE, NOW + timedelta(minutes=1)) == []
    assert Authority((root,), (), (given.certificate,)).given == (loaded.certificate,)
