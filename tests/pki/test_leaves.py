import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pki.authority import AuthorityError, Leaf, certificates_pem, create_authority
from pki.leaves import MAX_SESSIONS, Leaves, server_context, tls_leaves

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


def test_a_strict_client_accepts_the_context_of_a_name() -> None:
    leaf = shown(tls_leaves(AUTHORITY.issuing, Clock()).context("a.example"), "a.example")
    assert leaf.subject.rfc4514_string() == "CN=a.example"


def test_a_strict_client_accepts_the_context_of_an_address() -> None:
    shake(tls_leaves(AUTHORITY.issuing, Clock()).context("2001:db8::1"), "2001:db8::1")


def test_a_client_of_another_name_refuses_the_context() -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(tls_leaves(AUTHORITY.issuing, Clock()).context("a.example"), "b.example")


def test_the_chain_sent_is_leaf_and_issuing_ca_without_the_root() -> None:
    client = shake(tls_leaves(AUTHORITY.issuing, Clock()).context("a.example"), "a.example")
    if not hasattr(client, "get_unverified_chain"):
        pytest.skip("Python before 3.13 does not show what was sent")
    _, *rest = client.get_unverified_chain()
    assert rest == [AUTHORITY.issuing.certificate.public_bytes(Encoding.DER)]


def test_a_context_is_minted_once() -> None:
    leaves = tls_leaves(AUTHORITY.issuing, Clock())
    assert leaves.cached("a.example") is None
    context = leaves.context("a.example")
    assert leaves.context("a.example") is context
    assert leaves.cached("a.example") is context


def test_a_context_is_minted_again_at_half_life() -> None:
    clock = Clock()
    leaves = tls_leaves(AUTHORITY.issuing, clock)
    first = leaves.context("a.example")
    clock.now += timedelta(days=3, hours=11)
    assert leaves.context("a.example") is first
    clock.now += timedelta(hours=1)
    assert leaves.cached("a.example") is None
    assert leaves.context("a.example") is not first
    assert len(leaves) == 1


def test_near_its_issuers_end_a_leaf_is_not_minted_for_every_connection() -> None:
    clock = Clock()
    leaves = tls_leaves(AUTHORITY.issuing, clock)
    clock.now = AUTHORITY.issuing.certificate.not_valid_after_utc - timedelta(minutes=30)
    first = leaves.context("a.example")
    clock.now += timedelta(minutes=14)
    assert leaves.context("a.example") is first


def test_nothing_is_minted_after_the_issuing_ca_expired() -> None:
    clock = Clock()
    leaves = tls_leaves(AUTHORITY.issuing, clock)
    leaves.context("a.example")
    clock.now = AUTHORITY.issuing.certificate.not_valid_after_utc
    with pytest.raises(AuthorityError, match="expired"):
        leaves.context("a.example")


def test_the_least_recently_used_host_is_forgotten_first() -> None:
    leaves = Leaves(AUTHORITY.issuing, Clock(), lambda leaf: leaf.host, size=2)
    for host in ("a.example", "b.example", "a.example", "c.example"):
        leaves.context(host)
    assert len(leaves) == 2
    assert [host for host in ("a.example", "b.example", "c.example") if leaves.cached(host)] == [
        "a.example",
        "c.example",
    ]


def test_another_tls_library_gets_the_leaf_it_can_load() -> None:
    leaves: Leaves[Leaf] = Leaves(AUTHORITY.issuing, Clock(), lambda leaf: leaf)
    leaf = leaves.context("a.example")
    assert leaf.key.public_key() == leaf.certificate.public_key()
    assert leaf.chain == (AUTHORITY.issuing.certificate,)


def test_many_threads_may_ask_at_once() -> None:
    leaves = tls_leaves(AUTHORITY.issuing, Clock(), size=4)
    hosts = [f"h{number % 8}.example" for number in range(64)]
    with ThreadPoolExecutor(8) as threads:
        contexts = list(threads.map(leaves.context, hosts))
    for host, context in zip(hosts[:8], contexts[:8], strict=True):
        assert shown(context, host).subject.rfc4514_string() == f"CN={host}"
    assert len(leaves) == 4


# What a context speaks


@pytest.mark.parametrize(
    ("offered", "agreed"), [(["h2", "http/1.1"], "http/1.1"), (["h2"], None)], ids=["both", "only the other"]
)
def test_by_default_a_context_speaks_http_1(offered: list[str], agreed: str | None) -> None:
    context = tls_leaves(AUTHORITY.issuing, Clock()).context("a.example")
    assert shake(context, "a.example", client_context(offered)).selected_alpn_protocol() == agreed


def test_a_context_speaks_what_it_is_told_in_that_order() -> None:
    context = tls_leaves(AUTHORITY.issuing, Clock(), alpn=["h2", "http/1.1"]).context("a.example")
    client = client_context(["http/1.1", "h2"])
    assert shake(context, "a.example", client).selected_alpn_protocol() == "h2"


def test_tls_1_1_is_refused() -> None:
    client = client_context()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
        shake(tls_leaves(AUTHORITY.issuing, Clock()).context("a.example"), "a.example", client)


def test_the_key_touches_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = ssl.SSLContext.load_cert_chain

    def watched(context: ssl.SSLContext, path: str) -> None:
        loaded.append(os.readlink(path))
        load(context, path)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watched)
    before = set(os.listdir("/proc/self/fd"))
    tls_leaves(AUTHORITY.issuing, Clock()).context("a.example")
    assert loaded == ["/memfd:leaf (deleted)"]
    assert set(os.listdir("/proc/self/fd")) == before


# Sessions


def tls_1_2(options: int = 0) -> ssl.SSLContext:
    client = client_context()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.options |= options
    return client


@pytest.mark.parametrize("options", [0, ssl.OP_NO_TICKET], ids=["tickets", "session ids"])
def test_a_session_is_never_resumed_under_another_name(options: int) -> None:
    leaves = tls_leaves(AUTHORITY.issuing, Clock())
    client = tls_1_2(options)
    first = shake(leaves.context("a.example"), "a.example", client)
    assert shake(leaves.context("a.example"), "a.example", client, first.session).session_reused  # the control
    other = shake(leaves.context("b.example"), "b.example", client, first.session)
    assert not other.session_reused
    assert other.getpeercert()["subject"] == ((("commonName", "b.example"),),)  # type: ignore[index]  # verified: not None


def test_tls_1_3_gives_no_ticket() -> None:
    session = shake(tls_leaves(AUTHORITY.issuing, Clock()).context("a.example"), "a.example").session
    assert session is None or not session.has_ticket


def test_a_client_that_leaves_a_session_behind_each_time_does_not_fill_the_memory() -> None:
    leaves = tls_leaves(AUTHORITY.issuing, Clock())
    client = tls_1_2(ssl.OP_NO_TICKET)
    for _ in range(MAX_SESSIONS + 5):
        context = leaves.context("a.example")
        shake(context, "a.example", client)
        assert context.session_stats()["number"] <= MAX_SESSIONS
    assert len(leaves) == 1


def test_a_handshake_over_sockets_shows_the_leaf() -> None:
    near, far = socket.socketpair()
    context = server_context(tls_leaf := Leaves(AUTHORITY.issuing, Clock(), lambda leaf: leaf).context("a.example"))
    with ThreadPoolExecutor(1) as threads, near, far:
        server = threads.submit(context.wrap_socket, far, server_side=True)
        with client_context().wrap_socket(near, server_hostname="a.example") as stream, server.result():
            assert stream.getpeercert(binary_form=True) == tls_leaf.certificate.public_bytes(Encoding.DER)
