"""Name constraints: what a limited CA is for, as we judge it and as other implementations do."""

from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from pki import jks
from pki.authority import (
    AuthorityError,
    Issuing,
    Root,
    certificates_pem,
    create_authority,
    create_issuing,
    create_root,
    cross_sign,
    issue_leaf,
)
from pki.constraints import MAX_CONSTRAINTS, covers, name_constraints, outermost, permitted_domains
from tests.pki.clients import PYTHON, program, run, serving
from tests.pki.oracle import accepts, forge_leaf, openssl_refusal, verify
from tests.pki.test_authority_clients import JAVA_PROBE

NOW = datetime(2026, 11, 22, 12, 30, tzinfo=UTC)
AUTHORITY = create_authority(NOW, permitted=["corp.example", "xn--bcher-kva.example", "a.b.c.example"])
ROOT, ISSUING = AUTHORITY.roots[0], AUTHORITY.issuer


def limited(permitted: list[x509.GeneralName] | None = None, excluded: list[x509.GeneralName] | None = None) -> Issuing:
    """An issuing CA with the constraints of somebody else."""
    return create_issuing(ROOT, NOW, name="Corporate", permitted=x509.NameConstraints(permitted, excluded))


# What is written


def test_constraints_are_critical_and_leave_no_kind_of_name_free() -> None:
    found = ISSUING.certificate.extensions.get_extension_for_class(x509.NameConstraints)
    assert found.critical
    assert permitted_domains(ISSUING.certificate) == ("a.b.c.example", "corp.example", "xn--bcher-kva.example")
    excluded = [x509.IPAddress(ip_network("0.0.0.0/0")), x509.IPAddress(ip_network("::/0"))]
    assert found.value.excluded_subtrees == excluded
    assert permitted_domains(ROOT.certificate) is None


def test_the_rsa_line_is_limited_too() -> None:
    authority = create_authority(NOW, permitted=["corp.example"], with_rsa=True)
    assert [permitted_domains(one.certificate) for one in authority.issuers] == [("corp.example",)] * 2


def test_a_domain_below_another_is_not_written_twice() -> None:
    domains = ["b.a.example", "a.example", "a.example", "c.b.a.example", "ba.example", "example.b.a"]
    assert outermost(domains) == ["a.example", "ba.example", "example.b.a"]


domain = st.lists(st.sampled_from(["a", "b", "example"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(domain, min_size=1, max_size=6), domain)
def test_leaving_out_what_is_below_changes_nothing(domains: list[str], host: str) -> None:
    def is_below(one: str, other: str) -> bool:
        return one == other or one.endswith(f".{other}")

    left = outermost(domains)
    assert any(is_below(host, one) for one in left) == any(is_below(host, one) for one in domains)
    assert not any(is_below(one, other) for one in left for other in left if one != other)


@pytest.mark.parametrize(
    "wrong",
    ["", "*.example.com", ".example.com", "example.com.", "EXAMPLE.com", "bücher.example", "a b", "192.0.2.1", "::1",
     "-a.example", "a-.example", "a.123", "a" * 64 + ".example", "a." * 127 + "b"],
)  # fmt: skip
def test_what_some_client_cannot_read_is_no_domain(wrong: str) -> None:
    with pytest.raises(AuthorityError, match="is no host name in normal form; an issuing CA is not limited to it"):
        name_constraints(["a.example", wrong])


def test_an_underscore_is_read_by_every_client_program() -> None:
    issuing = create_issuing(ROOT, NOW, name="Example Corp", permitted=["my_bucket.example"])
    assert issue_leaf(issuing, "a.my_bucket.example", NOW)


MANY = [f"name{i:05d}.example.com" for i in range(5000)]
FITTING = 653


def test_more_than_clients_can_take_is_refused_with_the_repair() -> None:
    name_constraints(MANY[:FITTING])
    with pytest.raises(AuthorityError, match=f"5000 domains take .* past {MAX_CONSTRAINTS} .*; name domains above"):
        name_constraints(MANY)
    with pytest.raises(AuthorityError, match=f"{FITTING + 1} domains take"):
        create_authority(NOW, permitted=MANY[: FITTING + 1])
    assert name_constraints([*MANY, "example.com"]).permitted_subtrees == [x509.DNSName("example.com")]


# What they mean


@pytest.mark.parametrize(
    ("host", "covered"),
    [
        pytest.param("corp.example", True, id="the domain"),
        pytest.param("a.corp.example", True, id="below"),
        pytest.param("a.b.c.d.corp.example", True, id="far below"),
        pytest.param("evilcorp.example", False, id="the same ending"),
        pytest.param("corp.example.evil", False, id="the same start"),
        pytest.param("example", False, id="above"),
        pytest.param("b.c.example", False, id="between"),
        pytest.param("xn--bcher-kva.example", True, id="IDN"),
        pytest.param("www.xn--bcher-kva.example", True, id="below an IDN"),
        pytest.param("xn--bcher-kvb.example", False, id="another IDN"),
        pytest.param("my_bucket.corp.example", True, id="underscore"),
        pytest.param("192.0.2.1", False, id="address"),
        pytest.param("2001:db8::1", False, id="IPv6 address"),
    ],
)
def test_a_limited_ca_is_for_its_domains_and_what_is_below(host: str, covered: bool, tmp_path: Path) -> None:
    assert covers(ISSUING.certificate, host) == covered
    leaf = forge_leaf(ISSUING, host, NOW)
    if "_" not in host:  # this oracle knows no underscores
        assert accepts(leaf, ROOT.certificate, at=NOW) == covered
    refusal = openssl_refusal(leaf, ROOT.certificate, at=NOW, folder=tmp_path)
    assert (refusal == "") == covered
    assert covered or "permitted subtree violation" in refusal or "excluded subtree violation" in refusal


@settings(deadline=None, max_examples=80)
@given(st.lists(domain, min_size=1, max_size=4), domain | st.ip_addresses().map(str).filter(lambda a: "%" not in a))
def test_we_judge_a_host_as_the_oracle_does(domains: list[str], host: str) -> None:
    issuing = create_issuing(ROOT, NOW, name="Example Corp", permitted=domains)
    covered = covers(issuing.certificate, host)
    assert accepts(forge_leaf(issuing, host, NOW), ROOT.certificate, at=NOW) == covered


def test_no_leaf_is_issued_that_every_client_would_refuse() -> None:
    assert verify(issue_leaf(ISSUING, "a.corp.example", NOW), ROOT.certificate, at=NOW)
    with pytest.raises(AuthorityError, match=r"CA [0-9a-f]{16} is not for evil\.example, and every client would"):
        issue_leaf(ISSUING, "evil.example", NOW)


def test_the_limits_of_every_ca_of_the_chain_hold() -> None:
    above = create_issuing(ROOT, NOW, name="Corporate", permitted=["corp.example"], path_length=1)
    domains = ["a.corp.example", "evil.example"]
    below = create_issuing(Root(above.certificate, above.key), NOW, name="Example Corp", permitted=domains)
    issuing = Issuing(below.certificate, below.key, (below.certificate, above.certificate))
    assert verify(issue_leaf(issuing, "a.corp.example", NOW), ROOT.certificate, at=NOW)
    for host in ("b.corp.example", "evil.example"):
        assert not accepts(forge_leaf(issuing, host, NOW), ROOT.certificate, at=NOW)
        with pytest.raises(AuthorityError, match="is not for"):
            issue_leaf(issuing, host, NOW)


def test_the_limits_of_a_root_reach_through_its_cross_certificate() -> None:
    narrow = create_issuing(ROOT, NOW, name="Corporate", permitted=["corp.example"], path_length=1)
    foreign = Root(narrow.certificate, narrow.key)
    issuing = create_issuing(foreign, NOW, name="Example Corp")
    crossed = Issuing(issuing.certificate, issuing.key, (issuing.certificate, cross_sign(foreign, ROOT, NOW)))
    assert not accepts(forge_leaf(crossed, "evil.example", NOW), ROOT.certificate, at=NOW)
    assert verify(issue_leaf(crossed, "corp.example", NOW), ROOT.certificate, at=NOW)


# The constraints that others write


DNS, NETWORK = x509.DNSName, x509.IPAddress
TEN, SIX = NETWORK(ip_network("10.0.0.0/8")), NETWORK(ip_network("2001:db8::/32"))


@pytest.mark.parametrize(
    ("issuing", "host", "covered"),
    [
        pytest.param(limited([DNS("corp.example")]), "192.0.2.1", True, id="addresses not mentioned"),
        pytest.param(limited([TEN]), "10.1.2.3", True, id="in the network"),
        pytest.param(limited([TEN]), "11.1.2.3", False, id="beside the network"),
        pytest.param(limited([TEN]), "2001:db8::1", False, id="of the other version"),
        pytest.param(limited([TEN, SIX]), "2001:db8::1", True, id="in one of two networks"),
        pytest.param(limited([TEN]), "a.example", True, id="names not mentioned"),
        pytest.param(limited(None, [TEN]), "10.1.2.3", False, id="in an excluded network"),
        pytest.param(limited(None, [TEN]), "11.1.2.3", True, id="beside an excluded network"),
        pytest.param(limited(None, [DNS("corp.example")]), "a.corp.example", False, id="excluded"),
        pytest.param(limited(None, [DNS("corp.example")]), "evilcorp.example", True, id="beside what is excluded"),
        pytest.param(limited([DNS("example")], [DNS("b.example")]), "a.b.example", False, id="excluded of permitted"),
        pytest.param(limited([DNS("CORP.Example")]), "a.corp.example", True, id="upper case"),
        pytest.param(limited([DNS(".corp.example")]), "a.corp.example", True, id="below a leading dot"),
        pytest.param(limited([DNS(".corp.example")]), "corp.example", False, id="at a leading dot"),
        pytest.param(limited([DNS("")]), "a.example", True, id="everything permitted"),
        pytest.param(limited(None, [DNS("")]), "a.example", False, id="everything excluded"),
        pytest.param(limited([x509.RFC822Name("corp.example")]), "a.example", True, id="mail only"),
    ],
)
def test_foreign_constraints_are_read_as_openssl_does(
    issuing: Issuing, host: str, covered: bool, tmp_path: Path
) -> None:
    assert covers(issuing.certificate, host) == covered
    leaf = issue_leaf(issuing, host, NOW) if covered else forge_leaf(issuing, host, NOW)
    refusal = openssl_refusal(leaf, ROOT.certificate, at=NOW, folder=tmp_path)
    assert (refusal == "") == covered, refusal


def test_a_leaf_has_no_subject_where_subjects_are_limited(tmp_path: Path) -> None:
    corporate = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Corporate")]))
    issuing = limited([DNS("corp.example"), corporate])
    leaf = issue_leaf(issuing, "corp.example", NOW)
    assert leaf.certificate.subject == x509.Name([])
    assert leaf.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
    assert openssl_refusal(leaf, ROOT.certificate, at=NOW, folder=tmp_path) == ""
    named = forge_leaf(issuing, "corp.example", NOW)
    assert "permitted subtree violation" in openssl_refusal(named, ROOT.certificate, at=NOW, folder=tmp_path)


# As many as may be, through the clients with the least patience


@pytest.mark.client
def test_the_largest_chain_that_we_send_is_read_by_clients(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    old, new = (create_root(now, name="Example Corp") for _ in range(2))
    issuing = create_issuing(new, now, name="Example Corp", permitted=MANY[:FITTING])
    crossed = Issuing(issuing.certificate, issuing.key, (issuing.certificate, cross_sign(new, old, now)))
    (tmp_path / "ca.crt").write_bytes(certificates_pem(old.certificate))
    (tmp_path / "trust.jks").write_bytes(jks.truststore([old.certificate.public_bytes(Encoding.DER)]))
    (tmp_path / "Probe.java").write_text(JAVA_PROBE)
    program("javac")  # a source file is launched by compiling it
    host = f"a.{MANY[FITTING // 2]}"
    with serving(crossed, host) as port:
        for command in (
            [program("java"), "-Djavax.net.ssl.trustStore=trust.jks", "Probe.java", str(port), host],
            [program("curl"), "-sS", "--cacert", "ca.crt", "--connect-to", f"::127.0.0.1:{port}", f"https://{host}/"],
            [PYTHON, "-c", PYTHON_PROBE, str(port), host],
        ):
            outcome = run(command, {}, tmp_path)
            assert outcome.trusted, outcome.said


PYTHON_PROBE = """
import socket, ssl, sys
context = ssl.create_default_context(cafile="ca.crt")
context.verify_flags |= ssl.VERIFY_X509_STRICT
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as s:
    with context.wrap_socket(s, server_hostname=sys.argv[2]) as t:
        t.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
        print(t.recv(4096).decode())
"""
