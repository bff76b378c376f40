"""Requests through the inspector to real origins: what passes, what is answered, and what hostile ends cannot do."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from addons.judge import Conversation
from addons.upstream import Resolution
from pki.authority import create_authority
from policies.hostnames import Hostname
from proxy.inspector import Bounds, core
from tests.proxy.gates import eventually
from tests.proxy.inspecting import HAS_CURL, HOST, NOTHING, WAIT_S, Reply, Rig, get, read_reply, response

needs_curl = pytest.mark.skipif(not HAS_CURL, reason="curl is not installed")
PUT = f"PUT /search HTTP/1.1\r\nHost: {HOST}\r\n"


def reasons(rig: Rig, count: int = 1) -> list[object]:
    return [record["reason"] for record in rig.wait_for_records(count)]


# --- what passes


@needs_curl
@pytest.mark.client
def test_curl_gets_what_the_origin_says(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        done = rig.curl(f"https://{HOST}/search?q=Oslo", "-i")
        assert done.stdout == b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsunny"
        (request,) = rig.origin.requests
    assert request.startswith(b"GET /search?q=Oslo HTTP/1.1\r\nHost: weather.test\r\nUser-Agent: curl/")


@needs_curl
@pytest.mark.client
def test_curl_sees_why_it_was_denied(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        done = rig.curl(f"https://{HOST}/forecasts", "-w", "%{http_code} %{content_type}")
        assert done.stdout.endswith(b"403 application/problem+json")
        assert b"p.yaml:6 (weather) lists what is allowed on weather.test" in done.stdout
        assert rig.origin.requests == []


@needs_curl
@pytest.mark.client
def test_an_upload_that_expects_100_is_carried(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"x" * 200_000)
    with Rig(tmp_path) as rig:
        done = rig.curl(f"https://{HOST}/search", "-T", str(body), "-H", "Expect: 100-continue", "-v")
        assert done.stdout == b"sunny"
        assert b"100 Continue" in done.stderr
        assert rig.origin.received == 200_000
        assert b"Expect" not in rig.origin.requests[0]


@needs_curl
@pytest.mark.client
def test_chunked_uploads_are_carried(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        done = rig.curl(f"https://{HOST}/search", "-d", "x" * 1000, "-H", "Transfer-Encoding: chunked")
        assert done.stdout == b"sunny"
        assert rig.origin.requests[0].endswith(b"x" * 1000 + b"\r\n0\r\n\r\n")


def test_a_head_request_has_no_body(tmp_path: Path) -> None:
    says = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
    with Rig(tmp_path, respond=lambda _request, _sock: says) as rig, rig.connect() as sock:
        sock.sendall(get(method="HEAD"))
        assert b"Content-Length: 500" in sock.recv(4096)
        sock.sendall(get(method="HEAD", target="/forecasts"))
        head = sock.recv(4096)
    assert head.startswith(b"HTTP/1.1 403")
    assert head.endswith(b"\r\n\r\n")


def test_one_connection_upstream_serves_one_client_connection(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig, rig.connect() as sock:
        for _ in range(5):
            sock.sendall(get())
            assert read_reply(sock)[0].body == b"sunny"
        assert (rig.origin.connections, len(rig.origin.requests)) == (1, 5)


def test_an_origin_that_closes_each_time_is_dialled_each_time(tmp_path: Path) -> None:
    with Rig(tmp_path, respond=lambda _request, _sock: response(fields="Connection: close\r\n")) as rig:
        for _ in range(3):
            assert rig.send(get()).body == b"sunny"
        assert rig.origin.connections == 3


def test_an_origin_that_closes_a_kept_connection_is_for_the_client_to_try_again(tmp_path: Path) -> None:
    replies = [response(), None, response()]
    with Rig(tmp_path, respond=lambda _request, _sock: replies.pop(0)) as rig:
        with rig.connect() as sock:
            sock.sendall(get())
            assert read_reply(sock)[0].status == 200
            sock.sendall(get())
            assert read_reply(sock)[0] == NOTHING
        assert rig.send(get()).status == 200
        rig.wait_for_records(3)
    assert [(one["verdict"], one["reason"]) for one in rig.records] == [
        ("allow", "rule"),
        ("allow", "upstream_failed"),
        ("allow", "rule"),
    ]


def test_a_body_that_the_end_of_the_connection_delimits_is_whole(tmp_path: Path) -> None:
    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000)
        sock.unwrap() if isinstance(sock, ssl.SSLSocket) else None

    with Rig(tmp_path, respond=respond) as rig, rig.connect() as sock:
        sock.sendall(get())
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.endswith(b"\r\n\r\n" + b"x" * 100_000)


def test_a_websocket_is_carried_after_its_verdict(tmp_path: Path) -> None:
    policy = f"""
version: 1
workloads:
  app:
    rules:
      - {{host: {HOST}, tls: inspect, upgrade: [websocket]}}
"""

    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst")
        while data := sock.recv(4096):
            sock.sendall(data.upper())

    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a\r\n"
    with Rig(tmp_path, policy=policy, respond=respond) as rig:
        with rig.connect() as sock:
            sock.sendall(get("/chat", fields=upgrade))
            received = b""
            while not received.endswith(b"first"):
                received += sock.recv(4096)
            assert received.startswith(b"HTTP/1.1 101")
            for message in (b"\x81\x05hello", b"not a frame at all"):
                sock.sendall(message)
                assert sock.recv(4096) == message.upper()
        (record,) = rig.wait_for_records(1)
    assert record["http.response.status_code"] == 101


# --- plain HTTP


def test_plain_http_is_judged_the_same_way(tmp_path: Path) -> None:
    with Rig(tmp_path, plain=True) as rig:
        assert rig.send(get()).body == b"sunny"
        assert rig.send(get("/forecasts")).reason == "no_allow_entry"
        assert rig.send(get("/a//b")).status == 400
        assert rig.send(get(host="nowhere.test")).reason == "no_rule"
        assert rig.origin.requests == [get()]


def test_a_later_request_for_another_host_on_a_plain_connection_is_misdirected(tmp_path: Path) -> None:
    with Rig(tmp_path, plain=True) as rig, rig.connect() as sock:
        sock.sendall(get())
        assert read_reply(sock)[0].status == 200
        sock.sendall(get("/", host="other.test"))
        assert (read_reply(sock)[0].status, len(rig.origin.requests)) == (421, 1)


def test_a_client_that_ends_its_side_still_gets_the_response(tmp_path: Path) -> None:
    release = threading.Event()

    def respond(_request: bytes, _sock: socket.socket) -> bytes:
        release.wait(WAIT_S)
        return response()

    with Rig(tmp_path, plain=True, respond=respond) as rig, rig.connect() as sock:
        sock.sendall(get())
        sock.shutdown(socket.SHUT_WR)
        rig.wait_for(lambda: rig.origin.requests)
        release.set()
        assert read_reply(sock)[0].body == b"sunny"
        assert sock.recv(1) == b""


# --- denied at the headers


def test_nothing_is_looked_up_or_dialled_for_a_denied_request(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        looked_up: list[Hostname] = []

        async def resolve(name: Hostname) -> Resolution:
            looked_up.append(name)
            raise AssertionError

        rig.core.upstream._resolve = resolve
        for target in ("/forecasts", "/search/secret/x", "/a//b"):
            assert rig.send(get(target)).reason
        assert rig.send(get(host="other.test")).status == 421
        assert (looked_up, rig.origin.connections) == ([], 0)


@pytest.mark.parametrize("plain", [False, True], ids=["tls", "plain"])
def test_a_denied_upload_is_answered_while_it_goes_on_and_its_body_is_not_read(tmp_path: Path, plain: bool) -> None:
    total = 100 * 1024 * 1024
    sent = 0
    with Rig(tmp_path, plain=plain) as rig, rig.connect() as sock:
        sock.sendall(f"PUT /forecasts HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {total}\r\n\r\n".encode())
        sock.settimeout(1.0)
        try:
            while sent < total:
                sock.sendall(b"x" * 65536)
                sent += 65536
        except OSError:
            pass  # the gate stopped reading, or hung up
        reply = read_reply(sock)[0]
        assert rig.origin.connections == 0
    assert (reply.status, reply.fields["connection"]) == (403, "close")
    assert sent < 20 * 1024 * 1024


@needs_curl
@pytest.mark.client
def test_curl_sees_the_denial_of_a_large_upload(tmp_path: Path) -> None:
    body = tmp_path / "body"
    with open(body, "wb") as file:
        file.truncate(64 * 1024 * 1024)
    with Rig(tmp_path) as rig:
        done = rig.curl(f"https://{HOST}/forecasts", "-T", str(body), "-H", "Expect:", "-o", "-", "-w", "%{http_code}")
        assert done.stdout.endswith(b"403")
        assert rig.origin.requests == []


def test_a_denial_without_a_body_keeps_the_connection(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig, rig.connect() as sock:
        for target, status in (("/forecasts", 403), ("/search", 200), ("/a//b", 400), ("/search", 200)):
            sock.sendall(get(target))
            assert read_reply(sock)[0].status == status


# --- upstream failures


FAILURES: list[tuple[str, dict[str, object], str, int]] = [
    ("refused", {"refuses": True}, "upstream_refused", 502),
    ("certificate-of-another-authority", {"trusted": False}, "upstream_certificate", 502),
    ("certificate-for-another-name", {"origin_names": ("elsewhere.test",)}, "upstream_certificate", 502),
]


@pytest.mark.parametrize(("how", "reason", "status"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES])
def test_an_upstream_that_cannot_be_had(tmp_path: Path, how: dict[str, object], reason: str, status: int) -> None:
    with replace(Rig(tmp_path), **how) as rig:  # type: ignore[arg-type]  # fields by name
        reply = rig.send(get())
        assert (reply.status, reply.reason, reply.problem["reason"]) == (status, reason, reason)
        assert HOST in reply.problem["detail"]
        assert rig.origin.requests == []
        assert reasons(rig) == [reason]


def test_a_certificate_failure_names_the_name_and_the_error(tmp_path: Path) -> None:
    with Rig(tmp_path, origin_names=("elsewhere.test",)) as rig:
        detail = rig.send(get()).problem["detail"]
    assert detail.startswith("the certificate of weather.test does not verify: hostname mismatch")


def test_an_origin_without_tls_is_not_reached(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.origin._context = None

        def greet(sock: socket.socket, _buffered: bytes) -> None:
            sock.sendall(b"220 ready\r\n")

        rig.origin._read = greet  # type: ignore[method-assign,assignment]
        assert rig.send(get()).reason == "upstream_failed"


def test_a_name_that_nobody_resolves(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        reply = rig.send(get("/", host="unresolved.test"), host="unresolved.test")
    assert (reply.status, reply.reason) == (502, "resolver_failed")


def test_a_name_that_leads_to_cloud_metadata_is_denied(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        reply = rig.send(get("/", host="metadata.test"), host="metadata.test")
    assert (reply.status, reply.reason) == (403, "never_reached")
    assert "169.254.169.254" in reply.problem["detail"]


def test_an_origin_that_never_finishes_its_handshake_times_out(tmp_path: Path) -> None:
    with Rig(tmp_path, bounds=Bounds(dial_s=0.3)) as rig:
        rig.origin._context = None  # takes the ClientHello for a head and waits for its end
        assert rig.send(get()).reason == "upstream_timeout"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are looked at often."""
    monkeypatch.setattr(core, "SWEEP_S", 0.1)


@pytest.mark.usefixtures("often")
def test_an_origin_that_never_answers_is_given_up(tmp_path: Path) -> None:
    release = threading.Event()

    def respond(_request: bytes, _sock: socket.socket) -> None:
        release.wait(WAIT_S)

    with Rig(tmp_path, respond=respond, bounds=Bounds(idle_s=0.5)) as rig:
        reply = rig.send(get())
        release.set()
    assert (reply.status, reply.reason) == (502, "upstream_timeout")


def receive_all(sock: socket.socket) -> tuple[bytes, bool]:
    """What comes until the end, and whether it ended as TLS says."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except OSError:
        return received, False
    return received, True


# --- hostile origins: what they send, and what the client gets


def chunked(rest: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + rest


HOSTILE: list[tuple[str, bytes, int, bytes]] = [
    ("trailers", chunked(b"5\r\nsunny\r\n0\r\nX-Checksum: 1\r\n\r\n"), 200, b"5\r\nsunny\r\n0\r\n\r\n"),
    ("continues-unasked", b"HTTP/1.1 100 Continue\r\n\r\n" + response(), 200, b"sunny"),
    ("hints-for-ever", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100, 103, b"upstream_failed"),
    ("bare-line-feeds", b"HTTP/1.1 200 OK\nContent-Length: 5\n\nsunny", 200, b"sunny"),
    ("no-reason-phrase", b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nsunny", 200, b"sunny"),
    ("no-content", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    ("switches-unasked", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", 502, b"upstream_failed"),
    ("garbage", b"\x00\x01\x02\x03\r\n\r\n", 502, b"upstream_failed"),
    ("no-version", b"200 OK\r\n\r\n", 502, b"upstream_failed"),
    ("status-of-four-digits", b"HTTP/1.1 2000 OK\r\n\r\n", 502, b"upstream_failed"),
    ("empty-line-first", b"\r\n" + response(), 502, b"upstream_failed"),
    ("folded-header", b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n", 502, b"upstream_failed"),
    ("carriage-return-in-a-value", b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\n\r\n", 502, b"upstream_failed"),
    ("carriage-return-in-the-phrase", b"HTTP/1.1 200 OK\rX: a\r\nContent-Length: 0\r\n\r\n", 502, b"upstream_failed"),
    ("nul-in-a-value", b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n", 502, b"upstream_failed"),
    ("both-lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + chunked(b"0\r\n\r\n")[17:], 502, b"upstream_failed"),
    ("two-lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nsunny", 502, b"upstream_failed"),
    ("unknown-coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: x\r\n\r\n", 502, b"upstream_failed"),
    ("head-without-an-end", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000, 502, b"upstream_failed"),
    ("closes-at-once", b"", 502, b"upstream_failed"),
    ("half-a-head", b"HTTP/1.1 200 OK\r\nContent-", 502, b"upstream_failed"),
]


@pytest.mark.parametrize(("says", "status", "body"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_an_origin_that_says(tmp_path: Path, says: bytes, status: int, body: bytes) -> None:
    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.sendall(says)

    with Rig(tmp_path, respond=respond) as rig:
        with rig.connect() as sock:
            sock.sendall(get())
            received = b""
            while body not in received.partition(b"\r\n\r\n")[2] or b"\r\n\r\n" not in received:
                data = sock.recv(65536)
                assert data, received
                received += data
        assert received.startswith(b"HTTP/1.1 %d" % status)
        assert rig.failures == []
        rig.wait_for_records(1)


@pytest.mark.parametrize(
    "begins",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsunny",
        chunked(b"5\r\nsunny\r\n"),
        chunked(b"5\r\nsunny\r\nzz\r\n"),
        chunked(b"5\r\nsunny\r\n0\r\nX: " + b"a" * 100_000),
    ],
    ids=["shorter-than-said", "chunks-without-an-end", "malformed-chunk", "endless-trailers"],
)
def test_a_response_that_breaks_off_breaks_off_for_the_client_too(tmp_path: Path, begins: bytes) -> None:
    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.sendall(begins)

    with Rig(tmp_path, respond=respond) as rig:
        with rig.connect() as sock:
            sock.sendall(get())
            received, is_whole = receive_all(sock)
        assert not is_whole
        assert not received.endswith(b"0\r\n\r\n")
        assert reasons(rig) == ["upstream_failed"]
        assert rig.records[0]["verdict"] == "allow"


def test_an_origin_that_speaks_before_it_was_asked_is_not_believed(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        really_open = rig.core.upstream.open

        async def open_and_hear(
            conversation: Conversation, protocol: Callable[[], asyncio.BaseProtocol], *, http2: bool = False
        ) -> asyncio.Transport:
            transport = await really_open(conversation, protocol, http2=http2)
            side = protocol()
            assert isinstance(side, asyncio.Protocol)
            side.data_received(response(b"poisoned"))
            return transport

        rig.core.upstream.open = open_and_hear  # type: ignore[method-assign]
        reply = rig.send(get())
        assert (reply.status, reply.reason) == (502, "upstream_failed")


def test_early_hints_reach_the_client(tmp_path: Path) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 5\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    with Rig(tmp_path, respond=lambda _request, _sock: hints + response()) as rig, rig.connect() as sock:
        for _ in range(2):
            sock.sendall(get())
            assert read_reply(sock) == (
                Reply(103, {"link": "</a>"}, b""),
                b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsunny",
            )
        sock.sendall(get().replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert read_reply(sock)[0].body == b"sunny"


def test_an_early_answer_reaches_a_client_that_still_sends(tmp_path: Path) -> None:
    def respond(request: bytes, sock: socket.socket) -> None:
        raise AssertionError(request)

    with Rig(tmp_path, respond=respond) as rig:

        def answer_at_once(sock: socket.socket, buffered: bytes) -> None:
            sock.recv(65536)
            sock.sendall(response(b"too large", status="413 Content Too Large", fields="Connection: close\r\n"))

        rig.origin._read = answer_at_once  # type: ignore[method-assign]
        with rig.connect() as sock:
            sock.sendall(PUT.encode() + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1000)
            assert read_reply(sock)[0].status == 413


# --- hostile clients


def test_a_client_that_does_not_trust_us_is_recorded_with_a_hint(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.roots.write_bytes((tmp_path / "origin-ca.pem").read_bytes())
        with pytest.raises(ssl.SSLCertVerificationError):
            rig.connect()
        (record,) = rig.wait_for_records(1)
    assert (record["reason"], record["stage"], record["server.name"]) == ("client_certificate_refused", "tls", HOST)
    assert "trust bundle" in str(record["hint"])


def test_a_client_that_goes_away_in_its_handshake_is_recorded(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        sock = socket.create_connection(("127.0.0.1", rig.port))
        context = ssl.create_default_context()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            context.wrap_bio(incoming, outgoing, server_hostname=HOST).do_handshake()
        sock.sendall(outgoing.read())
        sock.recv(1)
        sock.close()
        assert reasons(rig) == ["client_gone"]


@pytest.mark.usefixtures("often")
def test_a_head_dribbled_for_too_long_is_cut(tmp_path: Path) -> None:
    with Rig(tmp_path, bounds=Bounds(head_s=0.3)) as rig, rig.connect() as sock:
        sock.sendall(get()[:-2])
        reply = read_reply(sock)[0]
        assert (reply.status, reply.reason) == (408, "hello_timeout")
        assert reasons(rig) == ["hello_timeout"]


@pytest.mark.usefixtures("often")
def test_an_idle_connection_is_closed_without_a_record(tmp_path: Path) -> None:
    with Rig(tmp_path, bounds=Bounds(idle_s=0.3)) as rig, rig.connect() as sock:
        sock.sendall(get())
        assert read_reply(sock)[0].status == 200
        assert sock.recv(1) == b""
        assert reasons(rig) == ["rule"]


@pytest.mark.usefixtures("often")
def test_a_client_that_stops_in_its_body_is_closed_and_recorded(tmp_path: Path) -> None:
    with Rig(tmp_path, bounds=Bounds(idle_s=0.5)) as rig, rig.connect() as sock:
        sock.sendall(PUT.encode() + b"Content-Length: 10\r\n\r\nhalf")
        assert read_reply(sock)[0] == NOTHING
        assert reasons(rig) == ["client_gone"]


def test_a_client_that_leaves_takes_its_upstream_connection_along(tmp_path: Path) -> None:
    ended = threading.Event()

    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        try:
            sock.recv(1)
        except OSError:
            pass
        ended.set()

    with Rig(tmp_path, respond=respond) as rig:
        with rig.connect() as sock:
            sock.sendall(get())
            rig.wait_for(lambda: rig.origin.requests)
        assert ended.wait(WAIT_S)
        assert reasons(rig) == ["client_gone"]


def test_a_client_that_leaves_while_its_origin_is_dialled_is_recorded(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.origin._context = None  # takes the ClientHello for a head and waits for its end
        with rig.connect() as sock:
            sock.sendall(get())
            rig.wait_for(lambda: rig.origin.connections)
        assert reasons(rig) == ["client_gone"]
        assert rig.failures == []


def test_requests_sent_ahead_wait_in_the_clients_own_buffers(tmp_path: Path) -> None:
    release = threading.Event()

    def respond(_request: bytes, _sock: socket.socket) -> bytes:
        release.wait(WAIT_S)
        return response()

    with Rig(tmp_path, respond=respond) as rig, rig.connect() as sock:
        sock.sendall(get())
        rig.wait_for(lambda: rig.origin.requests)
        sock.settimeout(0.5)
        sent = 0
        try:
            while sent < 64 * 1024 * 1024:
                sent += sock.send(get() * 500)
        except TimeoutError:
            pass
        assert sent < 32 * 1024 * 1024
        release.set()
        assert read_reply(sock)[0].status == 200


def test_more_connections_than_the_bound_are_refused_and_recorded(tmp_path: Path) -> None:
    with Rig(tmp_path, bounds=Bounds(connections=1)) as rig, rig.connect() as first:
        with pytest.raises(OSError, match=r".*"):
            rig.connect()
        assert reasons(rig) == ["too_many_connections"]
        first.sendall(get())
        assert read_reply(first)[0].status == 200


def test_one_source_cannot_take_every_place(tmp_path: Path) -> None:
    with Rig(tmp_path, bounds=Bounds(connections=10, per_source=1)) as rig, rig.connect() as first:
        with pytest.raises(OSError, match=r".*"):
            rig.connect()
        assert reasons(rig) == ["too_many_connections"]
        first.close()
        eventually(lambda: not rig.core._by_source, "its place to be free")
        assert rig.send(get()).status == 200


def test_an_inspector_without_descriptors_refuses_and_goes_on(tmp_path: Path) -> None:
    """The kernel drops the socket that comes with a message then; that must not end every other connection."""
    with Rig(tmp_path, in_process=True) as rig, rig.connect() as first:
        first.sendall(get())
        assert read_reply(first)[0].status == 200
        pid = rig.inspector.pid
        assert pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, limits[1]))
        with pytest.raises(OSError, match=r".*"):
            rig.connect()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert reasons(rig, 2) == ["rule", "too_many_connections"]
        first.sendall(get())
        assert read_reply(first)[0].status == 200
        assert rig.inspector.pid == pid


def test_a_name_that_no_leaf_can_be_made_for_fails_closed(tmp_path: Path) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=900)
    with Rig(tmp_path, authority=create_authority(long_ago)) as rig:
        with pytest.raises(OSError, match=r".*"):
            rig.connect()
        assert reasons(rig) == ["gate_failed"]
        assert [type(error).__name__ for error in rig.failures] == ["NoLeaf"]


# --- our own failures


def break_hook(rig: Rig, name: str) -> None:
    def broken(_flow: object) -> None:
        raise RuntimeError("a fault of ours")

    hooks = rig.core.hooks[name]
    assert isinstance(hooks, list)
    hooks.insert(0, broken)


@pytest.mark.parametrize("hook", ["requestheaders", "responseheaders"])
def test_a_fault_of_ours_ends_one_connection_closed_and_recorded(tmp_path: Path, hook: str) -> None:
    with Rig(tmp_path) as rig:
        break_hook(rig, hook)
        reply = rig.send(get())
        assert reply == NOTHING or reply.reason == "gate_failed"
        assert reasons(rig) == ["gate_failed"]
        rig.core.hooks[hook].pop(0)  # type: ignore[attr-defined]  # a list, see above
        assert rig.send(get()).status == 200
        assert [type(error).__name__ for error in rig.failures] == ["RuntimeError"]


def test_records_that_the_gate_does_not_take_hold_the_requests(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig, rig.connect() as sock:
        rig.loop.call_soon_threadsafe(rig.core.hold, True)
        sock.sendall(get())
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert rig.origin.requests == []
        rig.loop.call_soon_threadsafe(rig.core.hold, False)
        sock.settimeout(WAIT_S)
        assert read_reply(sock)[0].status == 200


# --- the record


def test_the_record_of_a_request(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        assert (
            rig.send(PUT.replace("/search", "/search?key=s3cret").encode() + b"Content-Length: 3\r\n\r\nabc").status
            == 200
        )
        (record,) = rig.wait_for_records(1)
        origin_port = rig.origin.port
    assert {
        name: record[name] for name in sorted(record) if name not in ("time", "id", "duration_ms", "source.port")
    } == {
        "bytes.received": 5,
        "bytes.sent": 3,
        "destination.port": 443,
        "http.request.method": "PUT",
        "http.response.status_code": 200,
        "policy.generation": rig.bench.policy.generation,
        "reason": "rule",
        "rule": "p.yaml:6 (weather)",
        "server.name": HOST,
        "source.address": "127.0.0.1",
        "stage": "http",
        "upstream.address": "127.0.0.1",
        "upstream.port": origin_port,
        "url.full": record["url.full"],
        "verdict": "allow",
        "workload": "app",
    }
    assert str(record["url.full"]).startswith(f"https://{HOST}/search?key=~")
    assert "s3cret" not in str(record)


def test_raw_bytes_of_a_target_draw_on_nobodys_terminal(tmp_path: Path) -> None:
    """U+009B begins an escape sequence as ESC [ does; the record is shown by `cat`, by a terminal log, by `run`."""
    with Rig(tmp_path) as rig, rig.connect() as sock:
        sock.sendall(f"GET /\x9b2J\xe9 HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode("latin-1"))
        assert read_reply(sock)[0].status == 400
        (record,) = rig.wait_for_records(1)
    assert record["url.full"] == f"https://{HOST}/\\x9b2J\\xe9"


def test_the_id_in_the_answer_is_the_one_in_the_record(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        reply: Reply = rig.send(get("/forecasts"))
        (record,) = rig.wait_for_records(1)
    assert reply.problem["id"] == record["id"]
    assert (record["verdict"], record["http.response.status_code"]) == ("deny", 403)
