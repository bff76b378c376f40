import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pki import jks
from pki.authority import (
    Authority,
    AuthorityError,
    Issuing,
    Leaf,
    Root,
    certificate_id,
    certificates_pem,
    create_authority,
    create_issuing,
    create_root,
    fingerprint,
    issue_leaf,
    key_pem,
)
from tests.pki.clients import PYTHON, program, run, serving

NOW = datetime(2026, 11, 22, 12, 30, 15, 123456, tzinfo=UTC)
AUTHORITY = create_authority(NOW, name="Example Corp")
ROOT, ISSUING = AUTHORITY.roots[0], AUTHORITY.issuing
LONG = ".".join(["a" * 63] * 3 + ["b" * 61])  # 253 characters
ABOVE_64 = "xn--bcher-kva." + "long." * 12 + "name.example"


def verify(leaf: Leaf, at: datetime = NOW, root: Root = ROOT, host: str | None = None) -> list[x509.Certificate]:
    """The oracle: the web PKI profile as another implementation reads it. Raises VerificationError."""
    name = host or leaf.host
    try:
        subject: x509.DNSName | x509.IPAddress = x509.IPAddress(ip_address(name))
    except ValueError:
        subject = x509.DNSName(name)
    verifier = PolicyBuilder().store(Store([root.certificate])).time(at).build_server_verifier(subject)
    return verifier.verify(leaf.certificate, list(leaf.chain))


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
    assert authority.issuing.certificate.not_valid_after_utc == authority.roots[0].certificate.not_valid_after_utc


def test_an_offline_root_signs_nothing_here() -> None:
    with pytest.raises(AuthorityError, match="has no key here; sign where its key is kept"):
        create_issuing(Root(ROOT.certificate), NOW, name="Example Corp")


def test_an_expired_root_signs_nothing() -> None:
    with pytest.raises(AuthorityError, match="expired"):
        create_issuing(create_root(NOW - timedelta(days=4000), name="Old"), NOW, name="Old")


def test_two_authorities_of_one_name_differ_in_subject() -> None:
    other = create_authority(NOW, name="Example Corp")
    subjects = {c.subject for a in (AUTHORITY, other) for c in (a.roots[0].certificate, a.issuing.certificate)}
    assert len(subjects) == 4


@pytest.mark.parametrize("name", ["", "  ", "a" * 65, "two\nlines", "nul\0", "\udcff"])
def test_a_name_that_no_certificate_can_carry_is_refused(name: str) -> None:
    with pytest.raises(AuthorityError, match="cannot name an authority"):
        create_authority(NOW, name=name)


def test_a_name_in_any_script_is_carried() -> None:
    subject = create_authority(NOW, name="Überfirma 株式会社").roots[0].certificate.subject
    assert "Überfirma 株式会社" in subject.rfc4514_string()


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
        (ISSUING.certificate.not_valid_after_utc, "expired at 2027-11-22 .*; renew it"),
        (ISSUING.certificate.not_valid_before_utc - timedelta(seconds=1), "not valid before .*; set the clock"),
    ],
    ids=["expired", "not yet valid"],
)
def test_an_issuing_ca_that_is_not_valid_issues_nothing(at: datetime, message: str) -> None:
    with pytest.raises(AuthorityError, match=message):
        issue_leaf(ISSUING, "a.example", at)


def test_a_clock_in_another_zone_gives_the_same_life() -> None:
    leaf = issue_leaf(ISSUING, "a.example", NOW.astimezone(ZoneInfo("Asia/Tokyo")))
    assert verify(leaf)


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
        verify(issue_leaf(other.issuing, "a.example", NOW))


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


# Real clients at their strictest, against a server on the loopback


@dataclass(frozen=True, slots=True)
class Gate:
    port: int
    authority: Authority
    ca: Path


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    authority = create_authority(datetime.now(UTC))
    ca = tmp_path_factory.mktemp("authority") / "ca.crt"
    ca.write_bytes(certificates_pem(authority.roots[0].certificate))
    with serving(authority.issuing) as port:
        yield Gate(port, authority, ca)


HOSTS = [pytest.param(h, id=i) for h, i in (("a.example", "name"), (ABOVE_64, "no subject"), ("127.0.0.1", "address"))]


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_curl_accepts(host: str, gate: Gate, tmp_path: Path) -> None:
    to = f"{host}:443:127.0.0.1:{gate.port}"
    outcome = run(
        [program("curl"), "-sS", "--cacert", str(gate.ca), "--connect-to", to, f"https://{host}/"], {}, tmp_path
    )
    assert outcome.trusted, outcome.said


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_openssl_accepts_strictly(host: str, gate: Gate, tmp_path: Path) -> None:
    name = (
        ["-noservername", "-verify_ip", host]
        if host == "127.0.0.1"
        else ["-servername", host, "-verify_hostname", host]
    )
    strict = ["-CAfile", str(gate.ca), "-no-CApath", "-x509_strict", "-verify_return_error"]
    command = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{gate.port}", *strict, *name]
    outcome = run(command, {}, tmp_path, trusted=lambda said: "Verify return code: 0 (ok)" in said)
    assert outcome.trusted, outcome.said


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_python_accepts_strictly(host: str, gate: Gate, tmp_path: Path) -> None:
    script = (
        "import socket, ssl, sys\n"
        "context = ssl.create_default_context(cafile=sys.argv[1])\n"
        "context.verify_flags |= ssl.VERIFY_X509_STRICT\n"
        "with socket.create_connection(('127.0.0.1', int(sys.argv[2]))) as s:\n"
        "    with context.wrap_socket(s, server_hostname=sys.argv[3]) as t:\n"
        "        t.sendall(b'GET / HTTP/1.1\\r\\n\\r\\n'); print(t.recv(4096).decode())\n"
    )
    outcome = run([PYTHON, "-c", script, str(gate.ca), str(gate.port), host], {}, tmp_path)
    assert outcome.trusted, outcome.said


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_node_accepts(host: str, gate: Gate, tmp_path: Path) -> None:
    script = (
        "const [ca, port, host] = process.argv.slice(1);\n"
        "const options = {host: '127.0.0.1', port, ca: require('fs').readFileSync(ca), servername: host};\n"
        "if (host == '127.0.0.1') delete options.servername;\n"
        "require('https').get({...options, headers: {host}}, r => r.pipe(process.stdout));\n"
    )
    outcome = run([program("node"), "-e", script, str(gate.ca), str(gate.port), host], {}, tmp_path)
    assert outcome.trusted, outcome.said


@pytest.mark.client
def test_java_accepts_every_kind_of_host(gate: Gate, tmp_path: Path) -> None:
    (tmp_path / "Probe.java").write_text(JAVA_PROBE)
    store = jks.truststore([gate.authority.roots[0].certificate.public_bytes(Encoding.DER)])
    (tmp_path / "trust.jks").write_bytes(store)
    program("javac")  # a source file is launched by compiling it
    hosts = [str(row.values[0]) for row in HOSTS]
    command = [program("java"), "-Djavax.net.ssl.trustStore=trust.jks", "Probe.java", str(gate.port), *hosts]
    outcome = run(command, {}, tmp_path)
    assert outcome.said.count("trusted") == len(hosts), outcome.said


JAVA_PROBE = """
import java.net.Socket; import javax.net.ssl.*;
class Probe { public static void main(String[] a) throws Exception {
  var factory = (SSLSocketFactory) SSLSocketFactory.getDefault();
  for (int i = 1; i < a.length; i++) {
    var plain = new Socket("127.0.0.1", Integer.parseInt(a[0]));
    try (var tls = (SSLSocket) factory.createSocket(plain, a[i], 443, true)) {
      var parameters = tls.getSSLParameters();
      parameters.setEndpointIdentificationAlgorithm("HTTPS");
      tls.setSSLParameters(parameters);
      tls.getOutputStream().write("GET / HTTP/1.1\\r\\n\\r\\n".getBytes());
      System.out.println(new String(tls.getInputStream().readAllBytes()));
    }
  }
}}
"""


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_git_accepts(host: str, gate: Gate, tmp_path: Path) -> None:
    resolve = ["-c", f"http.curloptResolve={host}:{gate.port}:127.0.0.1", "-c", f"http.sslCAInfo={gate.ca}"]
    command = [program("git"), *resolve, "ls-remote", f"https://{host}:{gate.port}/"]
    outcome = run(command, {}, tmp_path, trusted=lambda said: "not found" in said)  # the 404 that follows TLS
    assert outcome.trusted, outcome.said
