import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import pki.leaves
from pki.authority import Authority, AuthorityError, Issuing, Leaf, certificates_pem, create_authority, issue_leaf
from pki.leaves import HTTP_1, HTTP_2, MAX_SESSIONS, Leaves, server_context

START = datetime.now(UTC)  # of today: OpenSSL judges by the machine's clock
AUTHORITY = create_authority(START)
ROOT = certificates_pem(AUTHORITY.roots[0].certificate).decode()


class Clock:
    """The time, as set."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


def client_context(alpn: list[str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ROOT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


def shake(
    server: ssl.SSLContext, host: str, client: ssl.SSLContext | None = None, session: ssl.SSLSession | None = None
) -> ssl.SSLObject:
    """A whole connection in memory, closed cleanly by both sides. Returns the client's end."""
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = (client or client_context()).wrap_bio(inward, outward, server_hostname=host, session=session)
    far = server.wrap_bio(outward, inward, server_side=True)
    for step in (near.do_handshake, far.do_handshake, near.do_handshake, far.do_handshake, near.do_handshake):
        _attempt(step)
    far.write(b"x")
    assert near.read(1) == b"x"
    for end in (near, far, near):
        _attempt(end.unwrap)
    return near


def _attempt(step: object) -> None:
    assert callable(step)
    try:
        step()
    except ssl.SSLWantReadError:
        pass


def shown(server: ssl.SSLContext, host: str) -> x509.Certificate:
    der = shake(server, host).getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


def trusting(authority: Authority) -> ssl.SSLContext:
    """A client of its roots."""
    return ssl.create_default_context(cadata=certificates_pem(*authority.trusted).decode())


def accepted(
    server: ssl.SSLContext,
    host: str,
    authority: Authority,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ciphers: str = "DEFAULT",
) -> x509.Certificate:
    """The leaf that a client of `authority` is shown, and accepts."""
    client = trusting(authority)
    client.maximum_version = version
    client.set_ciphers(ciphers)
    der = shake(server, host, client).getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


@pytest.fixture
def minted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts for which leaves were signed."""
    hosts: list[str] = []

    def note(issuing: Issuing, host: str, *rest: Any) -> Leaf:  # Any: what issue_leaf takes
        hosts.append(host)
        return issue_leaf(issuing, host, *rest)

    monkeypatch.setattr(pki.leaves, "issue_leaf", note)
    return hosts


def test_a_strict_client_accepts_the_context_of_a_name() -> None:
    leaf = shown(Leaves(AUTHORITY.issuers, Clock()).context("a.example"), "a.example")
    assert leaf.subject.rfc4514_string() == "CN=a.example"


def test_a_strict_client_accepts_the_context_of_an_address() -> None:
    shake(Leaves(AUTHORITY.issuers, Clock()).context("2001:db8::1"), "2001:db8::1")


def test_a_client_of_another_name_refuses_the_context() -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(Leaves(AUTHORITY.issuers, Clock()).context("a.example"), "b.example")


def test_the_chain_sent_is_leaf_and_issuing_ca_without_the_root() -> None:
    client = shake(Leaves(AUTHORITY.issuers, Clock()).context("a.example"), "a.example")
    if not hasattr(client, "get_unverified_chain"):
        pytest.skip("Python before 3.13 does not show what was sent")
    _, *rest = client.get_unverified_chain()
    assert rest == [AUTHORITY.issuer.certificate.public_bytes(Encoding.DER)]


def test_a_context_is_minted_once() -> None:
    leaves = Leaves(AUTHORITY.issuers, Clock())
    assert leaves.cached("a.example") is None
    context = leaves.context("a.example")
    assert leaves.context("a.example") is context
    assert leaves.cached("a.example") is context


def test_a_context_is_minted_again_at_half_life() -> None:
    clock = Clock()
    leaves = Leaves(AUTHORITY.issuers, clock)
    first = leaves.context("a.example")
    clock.now += timedelta(days=3, hours=11)
    assert leaves.context("a.example") is first
    clock.now += timedelta(hours=1)
    assert leaves.cached("a.example") is None
    assert leaves.context("a.example") is not first
    assert len(leaves) == 1


def test_near_its_issuers_end_a_leaf_is_not_minted_for_every_connection() -> None:
    clock = Clock()
    leaves = Leaves(AUTHORITY.issuers, clock)
    clock.now = AUTHORITY.issuer.certificate.not_valid_after_utc - timedelta(minutes=30)
    first = leaves.context("a.example")
    clock.now += timedelta(minutes=14)
    assert leaves.context("a.example") is first


def test_nothing_is_minted_after_the_issuing_ca_expired() -> None:
    clock = Clock()
    leaves = Leaves(AUTHORITY.issuers, clock)
    leaves.context("a.example")
    clock.now = AUTHORITY.issuer.certificate.not_valid_after_utc
    with pytest.raises(AuthorityError, match="expired"):
        leaves.context("a.example")


def test_the_contexts_of_the_hosts_used_last_are_kept_and_the_leaves_of_more() -> None:
    leaves = Leaves(AUTHORITY.issuers, Clock(), leaves=3, contexts=2)
    for host in ("a.example", "b.example", "a.example", "c.example"):
        leaves.context(host)
    assert [host for host in ("a.example", "b.example", "c.example") if leaves.cached(host)] == [
        "a.example",
        "c.example",
    ]
    assert len(leaves) == 3
    leaves.context("d.example")
    assert len(leaves) == 3


def test_a_context_is_built_again_from_its_leaf_and_nothing_is_signed_for_it(minted: list[str]) -> None:
    leaves = Leaves(AUTHORITY.issuers, Clock(), contexts=1)
    first = leaves.context("a.example")
    serial = shown(first, "a.example").serial_number
    leaves.context("b.example")
    again = leaves.context("a.example")
    assert again is not first
    assert shown(again, "a.example").serial_number == serial
    assert minted == ["a.example", "b.example"]


def test_both_protocols_of_a_host_show_one_leaf(minted: list[str]) -> None:
    leaves = Leaves(AUTHORITY.issuers, Clock())
    spoken = []
    for alpn in (HTTP_1, HTTP_2):
        client = client_context(["h2", "http/1.1"])
        spoken.append(shake(leaves.context("a.example", alpn), "a.example", client).selected_alpn_protocol())
    assert spoken == ["http/1.1", "h2"]
    assert minted == ["a.example"]


def test_many_threads_may_ask_at_once() -> None:
    leaves = Leaves(AUTHORITY.issuers, Clock(), leaves=4, contexts=4)
    hosts = [f"h{number % 8}.example" for number in range(64)]
    with ThreadPoolExecutor(8) as threads:
        contexts = list(threads.map(leaves.context, hosts))
    for host, context in zip(hosts[:8], contexts[:8], strict=True):
        assert shown(context, host).subject.rfc4514_string() == f"CN={host}"
    assert len(leaves) == 4


# Issuers that are replaced


def test_after_a_replacement_every_context_is_of_the_new_issuer(minted: list[str]) -> None:
    other = create_authority(START)
    leaves = Leaves(AUTHORITY.issuers, Clock())
    before = leaves.context("a.example")
    leaves.replace(other.issuers)
    assert leaves.cached("a.example") is None
    leaf = accepted(leaves.context("a.example"), "a.example", other)
    assert leaf.issuer == other.issuer.certificate.subject
    assert shown(before, "a.example").issuer == AUTHORITY.issuer.certificate.subject  # connections that have it keep it
    assert minted == ["a.example", "a.example"]


def test_a_leaf_that_was_being_signed_at_a_replacement_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    other = create_authority(START)
    leaves = Leaves(AUTHORITY.issuers, Clock())

    def slowly(issuing: Issuing, *rest: Any) -> Leaf:  # Any: what issue_leaf takes
        leaf = issue_leaf(issuing, *rest)
        if issuing is AUTHORITY.issuer:
            leaves.replace(other.issuers)
        return leaf

    monkeypatch.setattr(pki.leaves, "issue_leaf", slowly)
    assert accepted(leaves.context("a.example"), "a.example", other).issuer == other.issuer.certificate.subject
    leaf = leaves.cached("a.example")
    assert leaf is not None
    assert accepted(leaf, "a.example", other).issuer == other.issuer.certificate.subject


def test_equal_issuers_may_replace_each_other() -> None:
    leaves = Leaves(AUTHORITY.issuers, Clock())
    leaves.context("a.example")
    leaves.replace(AUTHORITY.issuers)
    shake(leaves.context("a.example"), "a.example")
    assert len(leaves) == 1


# Two lines


@pytest.fixture(scope="module")
def both_lines() -> Authority:
    return create_authority(START, with_rsa=True)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
def test_a_client_is_shown_the_leaf_that_it_can_read(both_lines: Authority, version: ssl.TLSVersion) -> None:
    """An RSA-only client is one that trusts the RSA root, and offers no ECDSA."""
    context = Leaves(both_lines.issuers, Clock()).context("a.example")
    modern = accepted(context, "a.example", both_lines, version)
    assert isinstance(modern.public_key(), ec.EllipticCurvePublicKey)
    if version is ssl.TLSVersion.TLSv1_3:
        return  # which signatures a client of TLS 1.3 knows, Python cannot set
    old = accepted(context, "a.example", both_lines, version, "ECDHE-RSA-AES128-GCM-SHA256")
    assert isinstance(old.public_key(), rsa.RSAPublicKey)
    assert old.issuer == both_lines.issuers[1].certificate.subject


def test_each_leaf_comes_with_the_chain_of_its_own_line(both_lines: Authority) -> None:
    context = Leaves(both_lines.issuers, Clock()).context("a.example")
    for ciphers, issuer in zip(("ECDHE+ECDSA", "ECDHE+aRSA"), both_lines.issuers, strict=True):
        client = trusting(both_lines)
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        client.set_ciphers(ciphers)
        end = shake(context, "a.example", client)
        if not hasattr(end, "get_unverified_chain"):
            pytest.skip("Python before 3.13 does not show what was sent")
        assert end.get_unverified_chain()[1:] == [issuer.certificate.public_bytes(Encoding.DER)]


def test_one_rsa_key_serves_all_leaves_and_each_has_an_elliptic_curve_key_of_its_own(both_lines: Authority) -> None:
    leaves = Leaves(both_lines.issuers, Clock())
    keys: dict[str, set[bytes]] = {"ECDHE+ECDSA": set(), "ECDHE+aRSA": set()}
    for host in ("a.example", "b.example"):
        for ciphers, seen in keys.items():
            leaf = accepted(leaves.context(host), host, both_lines, ssl.TLSVersion.TLSv1_2, ciphers)
            seen.add(leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    assert [len(seen) for seen in keys.values()] == [2, 1]


# What a context speaks


@pytest.mark.parametrize(
    ("offered", "agreed"), [(["h2", "http/1.1"], "http/1.1"), (["h2"], None)], ids=["both", "only the other"]
)
def test_by_default_a_context_speaks_http_1(offered: list[str], agreed: str | None) -> None:
    context = Leaves(AUTHORITY.issuers, Clock()).context("a.example")
    assert shake(context, "a.example", client_context(offered)).selected_alpn_protocol() == agreed


def test_a_context_speaks_what_it_is_told_in_that_order() -> None:
    context = Leaves(AUTHORITY.issuers, Clock()).context("a.example", ("h2", "http/1.1"))
    client = client_context(["http/1.1", "h2"])
    assert shake(context, "a.example", client).selected_alpn_protocol() == "h2"


def test_tls_1_1_is_refused() -> None:
    client = client_context()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
        shake(Leaves(AUTHORITY.issuers, Clock()).context("a.example"), "a.example", client)


def test_the_key_touches_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = ssl.SSLContext.load_cert_chain

    def watched(context: ssl.SSLContext, shown: str, secret: str) -> None:
        loaded.extend(map(os.readlink, (shown, secret)))
        load(context, shown, secret)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watched)
    before = set(os.listdir("/proc/self/fd"))
    Leaves(AUTHORITY.issuers, Clock()).context("a.example")
    assert loaded == ["/memfd:leaf (deleted)"] * 2
    assert set(os.listdir("/proc/self/fd")) == before


# Sessions


def tls_1_2(options: int = 0) -> ssl.SSLContext:
    client = client_context()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.options |= options
    return client


@pytest.mark.parametrize("options", [0, ssl.OP_NO_TICKET], ids=["tickets", "session ids"])
def test_a_session_is_never_resumed_under_another_name(options: int) -> None:
    leaves = Leaves(AUTHORITY.issuers, Clock())
    client = tls_1_2(options)
    first = shake(leaves.context("a.example"), "a.example", client)
    assert shake(leaves.context("a.example"), "a.example", client, first.session).session_reused  # the control
    other = shake(leaves.context("b.example"), "b.example", client, first.session)
    assert not other.session_reused
    assert other.getpeercert()["subject"] == ((("commonName", "b.example"),),)  # type: ignore[index]  # verified: not None


def test_tls_1_3_gives_no_ticket() -> None:
    session = shake(Leaves(AUTHORITY.issuers, Clock()).context("a.example"), "a.example").session
    assert session is None or not session.has_ticket


def test_a_client_that_leaves_a_session_behind_each_time_does_not_fill_the_memory(minted: list[str]) -> None:
    leaves = Leaves(AUTHORITY.issuers, Clock())
    client = tls_1_2(ssl.OP_NO_TICKET)
    for _ in range(MAX_SESSIONS + 5):
        context = leaves.context("a.example")
        shake(context, "a.example", client)
        assert context.session_stats()["number"] <= MAX_SESSIONS
    assert leaves.context("a.example").session_stats()["number"] < MAX_SESSIONS
    assert minted == ["a.example"]  # the context alone is another


def test_a_handshake_over_sockets_shows_the_leaf() -> None:
    near, far = socket.socketpair()
    leaf = issue_leaf(AUTHORITY.issuer, "a.example", START)
    context = server_context(leaf)
    with ThreadPoolExecutor(1) as threads, near, far:
        server = threads.submit(context.wrap_socket, far, server_side=True)
        with client_context().wrap_socket(near, server_hostname="a.example") as stream, server.result():
            assert stream.getpeercert(binary_form=True) == leaf.certificate.public_bytes(Encoding.DER)
