"""Through the site's proxy: by name and unresolved, no byte of the origin's lost, and never past it when it fails."""

from __future__ import annotations

import socket
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from math import inf
from pathlib import Path
from typing import Any

import pytest

from policies.hostnames import Pattern, parse_pattern
from policies.model import Address, Network, Reason
from proxy.config import UpstreamProxy
from proxy.epoll import Epoll
from proxy.limits import Limits
from proxy.original_dst import OriginalDst
from proxy.own_doors import OwnDoors
from proxy.relays.stream import reset
from proxy.resolver import Resolution
from proxy.upstream_proxy import MAX_CREDENTIALS, CredentialsUnusable, SiteProxy, read_credentials
from proxy.wire.client_hello import Alert, render_alert
from proxy.wire.connect import MAX_HEAD
from tests.builders import policy, rules
from tests.proxy.gates import (
    PATIENCE_S,
    Gate,
    Names,
    assert_refused,
    at,
    eventually,
    gate,
    origin,
    read_all,
    read_exactly,
)
from tests.proxy.hellos import hello
from tests.proxy.site_proxies import ESTABLISHED, site_proxy

NAME = "a.example"
A = rules("- host: a.example")
OPAQUE = rules("- tcp: mail.example:25\n- tcp: 198.51.100.0/24:2222")
SECRET = "gate:s3cret"


def by(address: tuple[str, int], *direct: Pattern | Network, credentials: Path | None = None) -> UpstreamProxy:
    return UpstreamProxy(*address, str(credentials) if credentials else None, direct)


def going_to(address: str, port: int) -> OriginalDst:
    return lambda _: (ip_address(address), port)


# --- what is carried


def test_name_is_sent_by_name_and_not_looked_up() -> None:
    with origin() as upstream, site_proxy({NAME: upstream.address}) as site:
        with gate(A, through=by(site.address)) as it, it.connect() as client:
            client.sendall(hello())
            assert read_exactly(client, len(hello())) == hello()
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
            record = it.record()
        assert site.heads == [b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n"]
        assert it.names.asked == []
        assert (record["verdict"], record["upstream.address"], record["upstream.port"]) == ("allow", *site.address)
        assert record["bytes.sent"] == record["bytes.received"] == len(hello())


def test_site_proxy_known_by_name_is_looked_up_by_the_gate() -> None:
    for is_cached in (True, False):
        with origin() as upstream, site_proxy({NAME: upstream.address}) as site:
            through = by(("proxy.site.example", 3128))
            with gate(A, {"proxy.site.example": at(site.address)}, through=through) as it, it.connect() as client:
                it.names.is_cached = is_cached
                client.sendall(hello())
                assert read_exactly(client, len(hello())) == hello()
                assert set(it.names.asked) == {"proxy.site.example"}


def test_origin_may_speak_first_and_beside_the_answer() -> None:
    """What follows the answer's head in one segment is the origin's: it reaches the client, once and in order."""
    with site_proxy(reply=lambda _: ESTABLISHED + b"220 mail.example ready\r\n\r\n") as site:
        through, original = by(site.address), going_to("198.51.100.9", 25)
        with gate(OPAQUE, through=through, original_dst=original, told=["mail.example"]) as it, it.connect() as client:
            assert read_exactly(client, 26) == b"220 mail.example ready\r\n\r\n"
        assert site.targets == ["mail.example:25"]


def test_address_rule_sends_the_address_after_it_was_admitted() -> None:
    with origin(b"SSH-2.0-x\r\n") as upstream, site_proxy({"198.51.100.9": upstream.address}) as site:
        original = going_to("198.51.100.9", 2222)
        with gate(OPAQUE, through=by(site.address), original_dst=original) as it, it.connect() as client:
            assert read_exactly(client, 11) == b"SSH-2.0-x\r\n"
        assert site.targets == ["198.51.100.9:2222"]


def test_address_that_no_rule_may_reach_is_never_sent() -> None:
    everywhere = policy("version: 1\nmode: audit\nworkloads: {app: {rules: [{tcp: '0.0.0.0/0:2222'}]}}")
    for address in ("169.254.169.254", "127.0.0.1", "10.0.0.1", "168.63.129.16"):
        with site_proxy() as site:
            original = going_to(address, 2222)
            with gate(everywhere, through=by(site.address), original_dst=original) as it:
                assert_refused(it)
                assert it.record()["reason"] in ("never_reached", "private_address")
            assert site.heads == []


def refused(client: socket.socket) -> bool:
    try:
        return read_all(client) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("direct", ["a.example", "*.example"])
def test_direct_name_is_resolved_checked_and_dialled(direct: str) -> None:
    with origin() as upstream, site_proxy() as site:
        through = by(site.address, parse_pattern(direct))
        with gate(A, {NAME: at(upstream.address)}, through=through) as it, it.connect() as client:
            client.sendall(hello())
            assert read_exactly(client, len(hello())) == hello()
        with gate(A, {NAME: Resolution((ip_address("10.0.0.1"),), inf)}, through=through) as it, it.connect() as client:
            client.sendall(hello())
            assert read_all(client) == render_alert(Alert.ACCESS_DENIED)
            assert it.record()["reason"] == "private_address"
        assert site.heads == []


def test_name_that_the_operator_gave_an_address_is_dialled_there() -> None:
    with origin() as upstream, site_proxy() as site:
        through = by(site.address)
        with gate(A, {NAME: at(upstream.address)}, through=through, hosts=[NAME]) as it, it.connect() as client:
            client.sendall(hello())
            assert read_exactly(client, len(hello())) == hello()
        assert site.heads == []


def test_direct_address_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dial itself is a fake: an address that an address rule may reach is none of this machine's."""
    dialled: list[tuple[list[Address], int]] = []

    def dial(_epoll: Epoll, addresses: list[Address], port: int, *_: object, **callbacks: Any) -> None:
        dialled.append((addresses, port))
        callbacks["unreachable"](Reason.UPSTREAM_REFUSED)

    monkeypatch.setattr("proxy.way_out.Dial", dial)
    with site_proxy() as site:
        through, original = by(site.address, ip_network("198.51.100.0/24")), going_to("198.51.100.9", 2222)
        with gate(OPAQUE, through=through, original_dst=original) as it:
            assert_refused(it)
            assert it.record()["reason"] == "upstream_refused"
        assert (dialled, site.heads) == ([([ip_address("198.51.100.9")], 2222)], [])


@pytest.mark.parametrize(
    ("target", "carried"),
    [
        ("a.example", True),
        ("one.example", False),
        ("sub.one.example", True),
        ("below.example", True),
        ("a.below.example", False),
        ("a.b.below.example", False),
        ("xbelow.example", True),
        ("fixed.example", False),
    ],
)
def test_direct_patterns_mean_what_they_mean_in_a_policy(target: str, carried: bool) -> None:
    config = by(("192.0.2.1", 1), parse_pattern("one.example"), parse_pattern("*.below.example"))
    site = SiteProxy(config, {parse_pattern("fixed.example").host}, Names({}))
    assert site.carries(parse_pattern(target).host) is carried


@pytest.mark.parametrize(
    ("target", "carried"),
    [("10.1.2.3", False), ("::ffff:10.1.2.3", False), ("11.1.2.3", True), ("fd00::1", False), ("2001:db8::1", True)],
)
def test_direct_prefixes_are_about_addresses(target: str, carried: bool) -> None:
    config = by(("192.0.2.1", 1), ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    assert SiteProxy(config, (), Names({})).carries(ip_address(target)) is carried


# --- credentials


def secret_file(directory: Path, text: bytes = SECRET.encode() + b"\n", mode: int = 0o600) -> Path:
    path = directory / "site proxy"
    path.write_bytes(text)
    path.chmod(mode)
    return path


def test_credentials_are_sent_and_read_anew_for_each_connection(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    with (
        origin() as upstream,
        site_proxy({NAME: upstream.address}) as site,
        gate(A, through=by(site.address, credentials=path)) as it,
    ):
        for credentials in (SECRET, "gate:changed"):
            secret_file(tmp_path, credentials.encode())
            with it.connect() as client:
                client.sendall(hello())
                assert read_exactly(client, len(hello())) == hello()
            assert b"Proxy-Authorization: Basic " + b64encode(credentials.encode()) + b"\r\n" in site.heads[-1]
        eventually(lambda: len(it.records) == 2)
        assert "s3cret" not in str(it.records)
        assert b64encode(SECRET.encode()).decode() not in str(it.records)


@pytest.mark.parametrize(
    ("text", "mode", "fault"),
    [
        (b"", 0o600, "NAME:PASSWORD"),
        (b"gate s3cret\n", 0o600, "NAME:PASSWORD"),
        (b":s3cret\n", 0o600, "NAME:PASSWORD"),
        (b"gate:s3cret\nother:s3cret\n", 0o600, "one line"),
        (b"gate:s3cret\r\nX-Injected: 1\r\n", 0o600, "one line"),
        (b"gate:s3cret" + b"x" * MAX_CREDENTIALS, 0o600, "one line"),
        (b"gate:s3cret\n", 0o644, "mode 0644 shows the password to others; run: chmod 600 '"),
        (b"gate:s3cret\n", 0o640, "mode 0640"),
    ],
    ids=["empty", "no colon", "no name", "two lines", "injected", "too long", "for all", "for the group"],
)
def test_file_that_is_no_credentials_says_why_and_not_what(tmp_path: Path, text: bytes, mode: int, fault: str) -> None:
    path = secret_file(tmp_path, text, mode)
    with pytest.raises(CredentialsUnusable) as raised:
        read_credentials(str(path))
    assert str(path) in str(raised.value)
    assert fault in str(raised.value)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "read"),
    [(b"gate:s3cret", b"gate:s3cret"), (b"gate:a:b\r\n", b"gate:a:b"), (b"gate:\n", b"gate:"), (b"g: p \n", b"g: p ")],
    ids=["no newline", "colon and CR LF", "empty password", "spaces"],
)
def test_credentials_are_one_line(tmp_path: Path, text: bytes, read: bytes) -> None:
    assert read_credentials(str(secret_file(tmp_path, text))) == read


def test_unreadable_credentials_let_nothing_pass(tmp_path: Path) -> None:
    path = secret_file(tmp_path, mode=0o644)
    with site_proxy() as site, gate(A, through=by(site.address, credentials=path)) as it, it.connect() as client:
        client.sendall(hello())
        assert read_all(client) == render_alert(Alert.INTERNAL_ERROR)
        record = it.record()
        assert record["reason"] == "gate_failed"
        assert record["error.message"] == "the credentials for the site's proxy cannot be used"
        assert site.heads == []


# --- what the site's proxy answers


@pytest.mark.parametrize(
    ("answer", "reason", "message"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", "upstream_refused", "answered 403"),
        (b"HTTP/1.1 407 Who are you\r\n\r\n", "upstream_refused", "answered 407: it wants credentials"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n" + ESTABLISHED, "upstream_refused", "answered 502"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n", "upstream_refused", "answered 302"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "upstream_refused", "answered 101"),
        (b"<html>welcome</html>" + ESTABLISHED, "upstream_failed", "did not answer in HTTP/1"),
        (b"HTTP/1.1 100 Continue\r\n\r\nbody" + ESTABLISHED, "upstream_failed", "did not answer in HTTP/1"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD, "upstream_failed", "a head of more than 16384 bytes"),
        (b"HTTP/1.1 200 OK\r\nX\r\n\r\n", "upstream_failed", "a malformed header field"),
        (b"HTTP/1.1 200 OK\r\nVia: 1.1 site\r\n", "upstream_timeout", "did not answer in time"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "upstream_timeout", "did not answer in time"),
        (b"", "upstream_timeout", "did not answer in time"),
    ],
    ids=["403", "407", "502 then 200", "portal", "101", "page", "body before 2xx", "endless", "field", "half", "1xx",
         "silence"],
)  # fmt: skip
def test_answer_that_is_no_tunnel_denies(answer: bytes, reason: str, message: str) -> None:
    with site_proxy(reply=lambda _: answer) as site:
        limits = Limits(dial_s=0.5 if reason == "upstream_timeout" else 30.0)
        with gate(A, through=by(site.address), limits=limits) as it, it.connect() as client:
            client.sendall(hello())
            assert read_all(client) == render_alert(Alert.INTERNAL_ERROR)
            record = it.record()
            assert (record["verdict"], record["reason"]) == ("deny", reason)
            assert message in str(record["error.message"])
            assert site.closed.acquire(timeout=20)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
    ids=["chunked", "length", "informational"],
)
def test_what_follows_an_established_tunnel_is_never_read_as_http(head: bytes) -> None:
    with (
        site_proxy(reply=lambda _: head + b"5\r\nhello\r\n") as site,
        gate(A, through=by(site.address)) as it,
        it.connect() as client,
    ):
        client.sendall(hello())
        assert read_exactly(client, 10) == b"5\r\nhello\r\n"


@contextmanager
def by_hand(limits: Limits | None = None) -> Iterator[tuple[Gate, socket.socket, socket.socket]]:
    """A gate whose client has sent a hello, that client, and the accepted end at the site's proxy."""
    with (
        socket.create_server(("127.0.0.1", 0)) as door,
        gate(A, through=by(door.getsockname()), limits=limits) as it,
        it.connect() as client,
    ):
        client.sendall(hello())
        accepted, _ = door.accept()
        with accepted:
            accepted.settimeout(PATIENCE_S)
            yield it, client, accepted


def test_answer_dribbled_byte_by_byte_is_read_to_its_end() -> None:
    with by_hand() as (_, client, accepted):
        accepted.recv(4096)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"HTTP/1.1 200 OK\r\nVia: 1.1 site\r\n\r\n+":
            accepted.sendall(bytes([byte]))
            time.sleep(0.002)  # so that most come alone; how many do changes nothing
        assert read_exactly(client, 1) == b"+"
        assert read_exactly(accepted, len(hello())) == hello()


@pytest.mark.parametrize("is_reset", [True, False], ids=["resets", "closes"])
def test_site_proxy_that_goes_before_it_answers_denies(is_reset: bool) -> None:
    with by_hand() as (it, client, accepted):
        if is_reset:
            reset(accepted)
        else:
            accepted.recv(4096)
            accepted.close()
        assert read_all(client) == render_alert(Alert.INTERNAL_ERROR)
        assert it.record()["reason"] == "upstream_failed"


def test_client_that_leaves_while_the_site_proxy_thinks_costs_one_deadline() -> None:
    with by_hand(Limits(dial_s=0.5)) as (it, client, accepted):
        client.close()
        assert read_all(accepted).startswith(b"CONNECT ")
        eventually(lambda: it.listener.open_connections == 0)
        assert it.reasons() == ["upstream_timeout"]


def test_gate_that_stops_while_the_site_proxy_thinks_closes_both() -> None:
    with by_hand() as (it, client, accepted):
        read_exactly(accepted, 7)
        it.loop.call(it.listener.close)
        assert refused(client)
        assert read_all(accepted).endswith(b"\r\n\r\n")
        assert it.reasons() == ["gate_failed"]


def test_site_proxy_that_is_down_denies_and_nothing_is_dialled_past_it() -> None:
    with origin() as upstream, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        with gate(A, {NAME: at(upstream.address)}, through=by(bound.getsockname())) as it, it.connect() as client:
            client.sendall(hello())
            assert read_all(client) == render_alert(Alert.INTERNAL_ERROR)
            assert it.record()["reason"] == "upstream_refused"
        assert (upstream.heard, it.names.asked) == ([], [])


@pytest.mark.parametrize(
    ("host", "entries", "reason"),
    [
        ("gone.example", {}, "upstream_failed"),
        ("169.254.169.254", {}, "never_reached"),
        ("evil.example", {"evil.example": Resolution((ip_address("169.254.169.254"),), inf, True)}, "never_reached"),
    ],
    ids=["no such name", "metadata", "name of metadata"],
)
def test_site_proxy_without_an_address_that_may_be_dialled_denies(
    host: str, entries: dict[str, Resolution], reason: str
) -> None:
    with gate(A, entries, through=by((host, 3128))) as it, it.connect() as client:
        it.names.is_cached = bool(entries)
        client.sendall(hello())
        assert it.record()["reason"] == reason


def test_second_address_of_the_site_proxy_is_tried() -> None:
    with origin() as upstream, site_proxy({NAME: upstream.address}, address="127.0.0.2") as site:
        both = Resolution((ip_address("127.0.0.3"), ip_address("127.0.0.2")), inf, True, site.address[1])
        with gate(A, {"proxy.example": both}, through=by(("proxy.example", 1))) as it, it.connect() as client:
            client.sendall(hello())
            assert read_exactly(client, len(hello())) == hello()
            assert len(site.heads) == 1


# --- the gate's own doors, and what a dial took


@pytest.mark.parametrize("is_wildcard", [True, False])
def test_gate_never_dials_itself(is_wildcard: bool) -> None:
    with origin() as door:
        own = OwnDoors([("0.0.0.0" if is_wildcard else door.address[0], door.address[1])])
        with gate(A, {NAME: at(door.address)}, is_own=own.holds) as it, it.connect() as client:
            client.sendall(hello())
            assert read_all(client) == render_alert(Alert.ACCESS_DENIED)
            assert it.record()["reason"] == "never_reached"
        assert door.heard == []


def test_site_proxy_that_is_the_gate_itself_is_never_dialled() -> None:
    with site_proxy() as site:
        own = OwnDoors([("0.0.0.0", site.address[1])])
        with gate(A, through=by(site.address), is_own=own.holds) as it, it.connect() as client:
            client.sendall(hello())
            assert read_all(client) == render_alert(Alert.ACCESS_DENIED)
            assert it.record()["reason"] == "never_reached"
        assert site.heads == []


def test_each_dial_is_told_with_its_time_and_its_failure() -> None:
    told: list[tuple[float, Reason | None]] = []

    def dialled(seconds: float, reason: Reason | None) -> None:
        told.append((seconds, reason))

    with origin() as upstream, site_proxy(reply=lambda _: b"HTTP/1.1 403 No\r\n\r\n") as site:
        for entry in (at(upstream.address), at(("127.0.0.2", 1)), Resolution((ip_address("10.0.0.1"),), inf)):
            with gate(A, {NAME: entry}, dialled=dialled) as it, it.connect() as client:
                client.sendall(hello())
                read_exactly(client, 7)
        with gate(A, through=by(site.address), dialled=dialled) as it, it.connect() as client:
            client.sendall(hello())
            read_exactly(client, 7)
    assert [reason for _, reason in told] == [None, Reason.UPSTREAM_REFUSED, Reason.UPSTREAM_REFUSED]
    assert all(0 <= seconds < 20 for seconds, _ in told)
