"""HTTP/2 through the inspector: what passes, which protocol is spoken, what each stream is answered."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame, PingFrame

from proxy.inspector import Bounds, core
from tests.proxy.inspecting import HAS_CURL, HOST, POLICY, WAIT_S, Rig, get, read_reply, response
from tests.proxy.speaking_http2 import Client, Heard, Pairs, origin_of, rig

needs_curl = pytest.mark.skipif(not HAS_CURL, reason="curl is not installed")
BOTH = ("h2", "http/1.1")


def reasons(gate: Rig, count: int = 1) -> list[object]:
    return [record["reason"] for record in gate.wait_for_records(count)]


# --- what passes


@needs_curl
@pytest.mark.client
def test_curl_speaks_http2_with_an_origin_that_does(tmp_path: Path) -> None:
    with rig(tmp_path) as gate:
        done = gate.curl(f"https://{HOST}/search?q=Oslo", "--http2", "-w", " %{http_version} %{http_code}")
        assert done.stdout == b"sunny 2 200"
        (heard,) = origin_of(gate).heard
        assert heard.fields[:4] == [
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", HOST),
            (":path", "/search?q=Oslo"),
        ]
        assert origin_of(gate).connections == 1


@needs_curl
@pytest.mark.client
def test_curl_sees_over_http2_why_it_was_denied(tmp_path: Path) -> None:
    with rig(tmp_path) as gate:
        done = gate.curl(f"https://{HOST}/forecasts", "--http2", "-i")
        assert done.stdout.startswith(b"HTTP/2 403 \r\ncontent-type: application/problem+json")
        assert b"p.yaml:6 (weather) lists what is allowed on weather.test" in done.stdout
        assert origin_of(gate).heard == []


@needs_curl
@pytest.mark.client
def test_curl_uploads_and_downloads_over_http2(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(bytes(8 * 1024 * 1024))
    with rig(tmp_path) as gate:
        origin_of(gate).answer = lambda heard: heard.respond(bytes(heard.received))
        done = gate.curl(f"https://{HOST}/search", "--http2", "-T", str(body), "-H", "Expect: 100-continue", "-v")
        assert len(done.stdout) == 8 * 1024 * 1024
        assert b"HTTP/2 100" in done.stderr
        (record,) = gate.wait_for_records(1)
    assert (record["bytes.sent"], record["bytes.received"]) == (8 * 1024 * 1024, 8 * 1024 * 1024)


def test_streams_of_one_connection_share_one_connection_upstream(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        streams = [client.send(f"/search/{number}") for number in range(20)]
        assert {client.wait(stream).body for stream in streams} == {b"sunny"}
        assert sorted(heard[":path"] for heard in origin_of(gate).heard) == sorted(f"/search/{n}" for n in range(20))
        assert origin_of(gate).connections == 1


def test_trailers_are_carried_both_ways(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = lambda heard: heard.respond(b"body", trailers=[("x-checksum", "1")])
        stream = client.send(method="POST", body=b"abc", ends=False)
        client.h2.send_headers(stream, [("x-digest", "2")], end_stream=True)
        client.flush()
        found = client.wait(stream)
        assert (found.body, found.trailers) == (b"body", [("x-checksum", "1")])
        assert origin_of(gate).heard[0].trailers == [("x-digest", "2")]


def test_a_response_without_a_body_ends_with_its_head(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = lambda heard: heard.respond(b"", status=204)
        assert client.get().status == 204
        origin_of(gate).answer = lambda heard: heard.respond(b"", fields=[("content-length", "500")])
        found = client.get(method="HEAD")
        assert (found.status, found["content-length"], found.body) == (200, "500", b"")


def test_early_hints_reach_the_client(tmp_path: Path) -> None:
    def answer(heard: Heard) -> None:
        for status in ("100", "102", "103"):
            heard.talk.h2.send_headers(heard.stream_id, [(":status", status), ("link", "</style.css>")])
        heard.respond()

    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = answer
        found = client.get()
        assert (found.status, found.body) == (200, b"sunny")
        assert found.informational == [
            [(":status", "102"), ("link", "</style.css>")],
            [(":status", "103"), ("link", "</style.css>")],
        ]


def test_cookie_crumbs_are_joined(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        client.get(fields=[("cookie", "a=1"), ("accept", "*/*"), ("cookie", "b=2")])
        assert [value for name, value in origin_of(gate).heard[0].fields if name == "cookie"] == ["a=1; b=2"]


def test_what_is_forwarded_is_for_the_host_that_was_judged(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        head = [*client.head(authority="Weather.TEST.:443"), ("host", "weather.test:443")]
        assert client.wait(client.send_head(head)).status == 200
        fields = origin_of(gate).heard[0].fields
        assert dict(fields)[":authority"] == "weather.test:443"
        assert "host" not in dict(fields)


def test_credentials_for_proxies_are_not_forwarded(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        assert client.get(fields=[("proxy-authorization", "Basic eA==")]).status == 200
        assert "proxy-authorization" not in dict(origin_of(gate).heard[0].fields)


def test_a_response_may_end_before_its_request_does(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).begin = lambda heard: heard.respond(b"early")
        origin_of(gate).answer = lambda _heard: None
        stream = client.send(method="POST", ends=False)
        assert client.wait(stream).body == b"early"
        client.h2.send_data(stream, b"the rest", end_stream=True)
        client.flush()
        gate.wait_for(lambda: origin_of(gate).heard[0].has_ended)
        assert (origin_of(gate).heard[0].body, client.responses[stream].reset) == (b"the rest", None)


def test_an_origin_that_wants_no_more_of_a_body_ends_it_for_the_client_too(tmp_path: Path) -> None:
    def begin(heard: Heard) -> None:
        heard.respond(b"too large", status=413)
        heard.talk.h2.reset_stream(heard.stream_id, ErrorCodes.NO_ERROR)

    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).begin = begin
        stream = client.send(method="POST", ends=False)
        client.read_until(lambda: client.responses[stream].reset is not None)
        found = client.responses[stream]
        assert (found.status, found.body, found.has_ended, found.reset) == (413, b"too large", True, 0)


def test_a_request_that_the_client_cancels_is_cancelled_upstream(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = lambda _heard: None
        stream = client.send()
        gate.wait_for(lambda: origin_of(gate).heard and origin_of(gate).heard[0].has_ended)
        client.h2.reset_stream(stream, ErrorCodes.CANCEL)
        client.flush()
        gate.wait_for(lambda: origin_of(gate).heard[0].reset is not None)
        assert origin_of(gate).heard[0].reset == ErrorCodes.CANCEL
        assert reasons(gate) == ["client_gone"]
        origin_of(gate).answer = Heard.respond
        assert client.get().body == b"sunny"


def test_a_client_that_leaves_takes_its_streams_along(tmp_path: Path) -> None:
    with rig(tmp_path) as gate:
        origin_of(gate).answer = lambda _heard: None
        with Client(gate) as client:
            for _ in range(3):
                client.send()
            gate.wait_for(lambda: len(origin_of(gate).heard) == 3)
        assert reasons(gate, 3) == ["client_gone"] * 3
        assert gate.failures == []


# --- which protocol


@pytest.mark.parametrize(
    ("offered", "spoken", "upstream"),
    [
        (BOTH, "h2", "h2"),
        (("http/1.1", "h2"), "h2", "h2"),
        (("h2",), "h2", "h2"),
        (("http/1.1",), "http/1.1", "http/1.1"),
    ],
    ids=["both", "h1-preferred", "h2-alone", "h1-alone"],
)
def test_a_client_gets_what_an_origin_with_http2_speaks(
    tmp_path: Path, offered: tuple[str, ...], spoken: str, upstream: str
) -> None:
    with rig(tmp_path) as gate, Client(gate, alpn=offered) as client:
        assert client.sock.selected_alpn_protocol() == spoken
        if spoken == "h2":
            assert client.get().body == b"sunny"
        else:
            client.sock.sendall(get())
            assert read_reply(client.sock)[0].body == b"sunny"
        assert origin_of(gate).alpn == [upstream]


@pytest.mark.parametrize("offered", [BOTH, ("http/1.1",)], ids=["both", "h1-alone"])
def test_a_client_gets_http1_where_the_origin_speaks_nothing_else(tmp_path: Path, offered: tuple[str, ...]) -> None:
    with Rig(tmp_path) as gate, Client(gate, alpn=offered) as client:
        assert client.sock.selected_alpn_protocol() == "http/1.1"
        for _ in range(2):
            client.sock.sendall(get())
            assert read_reply(client.sock)[0].body == b"sunny"
        assert gate.origin.connections == 1


def test_what_an_origin_speaks_is_remembered(tmp_path: Path) -> None:
    with rig(tmp_path) as gate:
        with Client(gate, alpn=BOTH) as client:
            assert client.get().status == 200
        gate.wait_for(lambda: origin_of(gate).connections == 1)
        with Client(gate, alpn=BOTH) as client:
            assert client.get("/forecasts").status == 403
            assert origin_of(gate).connections == 1  # the denied request touched no origin
            assert client.get().status == 200
            assert origin_of(gate).connections == 2


@pytest.mark.parametrize("says", ["http2: false", ""], ids=["never", "not-said"])
def test_a_client_that_offers_both_gets_http1_unless_its_rule_asks_for_http2(tmp_path: Path, says: str) -> None:
    policy = POLICY.replace("http2: true", says, 1)
    with rig(tmp_path, policy=policy) as gate, Client(gate, alpn=BOTH) as client:
        assert client.sock.selected_alpn_protocol() == "http/1.1"
        assert origin_of(gate).connections == 0
        client.sock.sendall(get())
        assert read_reply(client.sock)[0].status == 200
        assert origin_of(gate).alpn == ["http/1.1"]


@pytest.mark.parametrize("offered", [BOTH, ("http/1.1", "h2")], ids=["h2-first", "h1-first"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [({"refuses": True}, "upstream_refused"), ({"trusted": False}, "upstream_certificate")],
    ids=["refused", "certificate"],
)
def test_a_client_whose_origin_cannot_be_had_is_told_so_in_words(
    tmp_path: Path, how: dict[str, Any], reason: str, offered: tuple[str, ...]
) -> None:
    with rig(tmp_path, **how) as gate, Client(gate, alpn=offered) as client:
        assert client.sock.selected_alpn_protocol() == offered[0]
        if offered[0] == "h2":
            found = client.get()
            assert (found.status, found.reason) == (502, reason)
            assert (client.get().status, client.get("/forecasts").status) == (502, 403)
        else:
            client.sock.sendall(get())
            assert read_reply(client.sock)[0].reason == reason


def test_a_host_that_the_policy_does_not_let_dial_is_not_dialled(tmp_path: Path) -> None:
    policy = POLICY.replace(f"- host: {HOST}", "- host: elsewhere.test")
    with rig(tmp_path, policy=policy) as gate, Client(gate, alpn=("h2",)) as client:
        assert client.get().reason == "no_rule"
        assert origin_of(gate).connections == 0


def test_an_early_connection_that_nobody_uses_is_closed(tmp_path: Path) -> None:
    with rig(tmp_path) as gate:
        gate.roots.write_bytes((tmp_path / "origin-ca.pem").read_bytes())
        with pytest.raises(ssl.SSLCertVerificationError):
            Client(gate, alpn=BOTH)
        assert reasons(gate) == ["client_certificate_refused"]
        gate.wait_for(lambda: origin_of(gate).connections and not origin_of(gate)._open)
        assert not origin_of(gate)._open


def test_h2c_is_refused(tmp_path: Path) -> None:
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    with Rig(tmp_path, plain=True) as gate:
        assert gate.send(get(fields=upgrade)).reason == "upgrade"
        with gate.connect() as sock:
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert read_reply(sock)[0].status == 505
        assert gate.origin.requests == []


# --- an origin that speaks HTTP/1.1, for a client that speaks HTTP/2 alone


def test_requests_are_written_for_http1(tmp_path: Path) -> None:
    with Rig(tmp_path) as gate, Client(gate) as client:
        assert (
            client.get("/search?q=1", fields=[("te", "trailers"), ("cookie", "a=1"), ("cookie", "b=2")]).status == 200
        )
        assert client.get(method="POST").status == 200
        assert client.get(method="POST", fields=[("content-length", "3")], body=b"abc").status == 200
        assert client.get(method="POST", body=b"abc").status == 200
        assert gate.origin.requests == [
            b"GET /search?q=1 HTTP/1.1\r\nHost: weather.test\r\ncookie: a=1; b=2\r\n\r\n",
            b"POST /search HTTP/1.1\r\nHost: weather.test\r\nContent-Length: 0\r\n\r\n",
            b"POST /search HTTP/1.1\r\nHost: weather.test\r\ncontent-length: 3\r\n\r\nabc",
            b"POST /search HTTP/1.1\r\nHost: weather.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ]
        assert gate.origin.connections == 1


def test_responses_are_read_from_http1(tmp_path: Path) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 9\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nX-Up: 1\r\nConnection: X-Hop\r\nX-Hop: 2\r\nKeep-Alive: timeout=5\r\n"
    body = b"Transfer-Encoding: chunked\r\n\r\n5\r\nsunny\r\n0\r\nX-Trailer: 3\r\n\r\n"
    with Rig(tmp_path, respond=lambda _request, _sock: hints + head + body) as gate, Client(gate) as client:
        found = client.get()
        assert (found.fields, found.body) == ([(":status", "200"), ("x-up", "1")], b"sunny")
        assert found.informational == [[(":status", "103"), ("link", "</a>")]]


def test_a_coding_that_http2_does_not_have_is_not_passed_on(tmp_path: Path) -> None:
    says = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    with Rig(tmp_path, respond=lambda _request, _sock: says) as gate, Client(gate) as client:
        assert client.get().reason == "upstream_failed"


def test_parallel_streams_take_a_bounded_number_of_connections(tmp_path: Path) -> None:
    gathered = threading.Barrier(9)

    def respond(_request: bytes, _sock: socket.socket) -> bytes:
        if gathered.n_waiting or not gathered.broken:
            try:
                gathered.wait(WAIT_S)
            except threading.BrokenBarrierError:
                pass
        return response()

    with Rig(tmp_path, respond=respond) as gate, Client(gate) as client:
        streams = [client.send(f"/search/{number}") for number in range(20)]
        gate.wait_for(lambda: gathered.n_waiting == 8)
        assert gate.origin.connections == 8
        gathered.abort()
        assert {client.wait(stream).status for stream in streams} == {200}
        assert gate.origin.connections == 8


def test_a_stream_cancelled_while_it_waits_reaches_no_origin(tmp_path: Path) -> None:
    release = threading.Event()

    def respond(_request: bytes, _sock: socket.socket) -> bytes:
        release.wait(WAIT_S)
        return response()

    with Rig(tmp_path, respond=respond) as gate, Client(gate) as client:
        streams = [client.send(f"/search/{number}") for number in range(10)]
        gate.wait_for(lambda: len(gate.origin.requests) == 8)
        for stream in streams[8:]:
            client.h2.reset_stream(stream, ErrorCodes.CANCEL)
        client.flush()
        assert reasons(gate, 2) == ["client_gone"] * 2
        release.set()
        for stream in streams[:8]:
            assert client.wait(stream).status == 200
        assert client.get().status == 200
        assert len(gate.origin.requests) == 9


@pytest.mark.parametrize(("method", "code"), [("GET", ErrorCodes.REFUSED_STREAM), ("POST", ErrorCodes.INTERNAL_ERROR)])
def test_a_kept_connection_that_the_origin_closed_is_for_the_client_to_try_again(
    tmp_path: Path, method: str, code: ErrorCodes
) -> None:
    """REFUSED_STREAM says that it is safe to repeat, which nobody knows of a POST."""
    replies = [response(), None, response()]
    with Rig(tmp_path, respond=lambda _request, _sock: replies.pop(0)) as gate, Client(gate) as client:
        assert client.get().status == 200
        assert client.get(method=method).reset == code
        assert client.get(method=method).status == 200


# --- one judge for each stream

HEADS: list[tuple[str, dict[str, Any], int, str]] = [
    ("another-host", {"set": {":authority": "other.test"}}, 421, "host_mismatch"),
    ("another-port", {"set": {":authority": "weather.test:8443"}}, 421, "host_mismatch"),
    ("host-beside-authority", {"more": [("host", "other.test")]}, 400, "malformed_request"),
    ("two-hosts", {"more": [("host", HOST), ("host", HOST)]}, 400, "malformed_request"),
    ("no-authority", {"drop": ":authority"}, 400, "malformed_request"),
    ("another-host-without-authority", {"drop": ":authority", "more": [("host", "other.test")]}, 421, "host_mismatch"),
    ("user-in-authority", {"set": {":authority": "x@weather.test"}}, 400, "malformed_request"),
    ("address-as-authority", {"set": {":authority": "127.0.0.1"}}, 400, "malformed_name"),
    ("no-path", {"drop": ":path"}, 400, "malformed_request"),
    ("empty-path", {"set": {":path": ""}}, 400, "malformed_request"),
    ("asterisk", {"set": {":path": "*"}}, 400, "malformed_path"),
    ("absolute-path", {"set": {":path": "https://weather.test/search"}}, 400, "malformed_request"),
    ("space-in-path", {"set": {":path": "/search HTTP/1.1"}}, 400, "malformed_request"),
    ("line-in-query", {"set": {":path": "/search?a\r\nX: b"}}, 400, "malformed_request"),
    ("dot-segments", {"set": {":path": "/search/../forecasts"}}, 400, "malformed_path"),
    ("no-method", {"drop": ":method"}, 400, "malformed_request"),
    ("lower-case-method", {"set": {":method": "get"}}, 400, "malformed_request"),
    ("line-in-method", {"set": {":method": "GET / HTTP/1.1\r\nX:"}}, 400, "malformed_request"),
    ("no-scheme", {"drop": ":scheme"}, 400, "malformed_request"),
    ("plain-scheme", {"set": {":scheme": "http"}}, 400, "malformed_request"),
    ("connect", {"set": {":method": "CONNECT"}}, 405, "malformed_request"),
    (
        "extended-connect",
        {"set": {":method": "CONNECT"}, "more": [(":protocol", "websocket")]},
        405,
        "malformed_request",
    ),
    ("protocol-without-connect", {"first": [(":protocol", "websocket")]}, 400, "malformed_request"),
    ("trace", {"set": {":method": "TRACE"}}, 405, "malformed_request"),
    ("unknown-pseudo", {"first": [(":x", "y")]}, 400, "malformed_request"),
    ("response-pseudo", {"first": [(":status", "299")]}, 400, "malformed_request"),
    ("pseudo-twice", {"first": [(":path", "/search")]}, 400, "malformed_request"),
    ("pseudo-behind-fields", {"drop": ":path", "more": [("a", "b"), (":path", "/search")]}, 400, "malformed_request"),
    ("upper-case-name", {"more": [("X-Up", "1")]}, 400, "malformed_request"),
    ("empty-name", {"more": [("", "1")]}, 400, "malformed_request"),
    ("colon-in-name", {"more": [("a:b", "1")]}, 400, "malformed_request"),
    ("line-in-name", {"more": [("a\r\nb", "1")]}, 400, "malformed_request"),
    ("space-in-name", {"more": [("a ", "1")]}, 400, "malformed_request"),
    ("line-in-value", {"more": [("a", "b\r\nX: c")]}, 400, "malformed_request"),
    ("line-feed-in-value", {"more": [("a", "b\nX: c")]}, 400, "malformed_request"),
    ("carriage-return-in-value", {"more": [("a", "b\rX: c")]}, 400, "malformed_request"),
    ("nul-in-value", {"more": [("a", "b\0c")]}, 400, "malformed_request"),
    ("space-before-value", {"more": [("a", " b")]}, 400, "malformed_request"),
    ("request-in-a-value", {"more": [("a", "b\r\n\r\nGET /forecasts HTTP/1.1\r\n")]}, 400, "malformed_request"),
    ("connection", {"more": [("connection", "close")]}, 400, "malformed_request"),
    ("keep-alive", {"more": [("keep-alive", "1")]}, 400, "malformed_request"),
    ("proxy-connection", {"more": [("proxy-connection", "close")]}, 400, "malformed_request"),
    ("transfer-encoding", {"more": [("transfer-encoding", "chunked")]}, 400, "malformed_request"),
    ("upgrade", {"more": [("upgrade", "websocket")]}, 400, "malformed_request"),
    ("te-gzip", {"more": [("te", "gzip")]}, 400, "malformed_request"),
    ("te-list", {"more": [("te", "trailers, gzip")]}, 400, "malformed_request"),
    ("length-without-body", {"more": [("content-length", "5")]}, 400, "malformed_request"),
    ("two-lengths", {"more": [("content-length", "0"), ("content-length", "0")]}, 400, "malformed_request"),
    ("signed-length", {"more": [("content-length", "+0")]}, 400, "malformed_request"),
    ("underscored-length", {"more": [("content-length", "0_0")]}, 400, "malformed_request"),
    ("too-many-fields", {"more": [(f"x-{number}", "1") for number in range(101)]}, 431, "malformed_request"),
    ("65536-byte-header", {"more": [("x-long", "a" * 65536)]}, 431, "malformed_request"),
    ("method-override", {"more": [("x-http-method-override", "DELETE")]}, 403, "no_allow_entry"),
    ("denied", {"set": {":path": "/search/secret/x"}}, 403, "deny_rule"),
]


def spoiled(head: Pairs, how: dict[str, Any]) -> Pairs:
    kept = [(name, how.get("set", {}).get(name, value)) for name, value in head if name != how.get("drop")]
    return [*how.get("first", []), *kept, *how.get("more", [])]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An origin without HTTP/2 behind the gate: what is let through is written as HTTP/1.1."""
    with Rig(tmp_path_factory.mktemp("heads")) as gate, Client(gate) as client:
        yield gate, client


@pytest.mark.parametrize(("how", "status", "reason"), [row[1:] for row in HEADS], ids=[row[0] for row in HEADS])
def test_a_stream_is_answered_alone(served: tuple[Rig, Client], how: dict[str, Any], status: int, reason: str) -> None:
    gate, client = served
    forwarded, recorded = len(gate.origin.requests), len(gate.records)
    other = client.send(ends=False, method="POST")
    found = client.wait(client.send_head(spoiled(client.head(), how)))
    assert (found.status, found.reason, found.has_ended) == (status, reason, True)
    assert "connection" not in dict(found.fields)
    client.h2.end_stream(other)
    client.flush()
    assert client.wait(other).status == 200
    assert len(gate.origin.requests) == forwarded + 1
    assert [record["reason"] for record in gate.wait_for_records(recorded + 2)[recorded:]] == [reason, "rule"]
    assert gate.failures == []


@pytest.mark.parametrize(
    ("length", "body", "trailers"),
    [("5", b"abc", None), ("2", b"abc", None), ("5", b"abc", [("x", "y")]), ("2", b"abc", [("x", "y")])],
    ids=["short", "long", "short-with-trailers", "long-with-trailers"],
)
@pytest.mark.parametrize("speaks_http2", [True, False], ids=["h2", "h1"])
def test_a_body_that_is_not_as_long_as_announced_ends_its_stream(
    tmp_path: Path, length: str, body: bytes, trailers: Pairs | None, speaks_http2: bool
) -> None:
    """Written as HTTP/1.1, what is missing would be taken from the next request (HTTP/2 request smuggling)."""
    with rig(tmp_path) if speaks_http2 else Rig(tmp_path) as gate, Client(gate) as client:
        stream = client.send(method="POST", fields=[("content-length", length)], ends=False)
        client.h2.send_data(stream, body, end_stream=trailers is None)
        if trailers:
            client.h2.send_headers(stream, trailers, end_stream=True)
        client.flush()
        found = client.wait(stream)
        assert (found.status, found.reason) == (400, "malformed_request")
        assert client.get().status == 200
        assert gate.failures == []
        assert reasons(gate, 2) == ["malformed_request", "rule"]


@pytest.mark.parametrize(
    "trailers",
    [
        [(":path", "/forecasts")],
        [("content-length", "3")],
        [("X-Up", "1")],
        [("a", "b\r\nc")],
        [("connection", "close")],
    ],
    ids=["pseudo", "length", "upper-case", "line", "connection"],
)
def test_malformed_trailers_end_their_stream(tmp_path: Path, trailers: Pairs) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        stream = client.send(method="POST", body=b"abc", ends=False)
        client.h2.send_headers(stream, trailers, end_stream=True)
        client.flush()
        assert client.wait(stream).reason == "malformed_request"
        assert client.get().status == 200


def test_a_denied_upload_is_answered_and_its_body_not_read(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        stream = client.send("/forecasts", method="PUT", fields=[("content-length", "100000000")], ends=False)
        sent = client.upload(stream, 100_000_000)
        client.read_until(lambda: client.responses[stream].reset is not None)
        found = client.responses[stream]
        assert (found.status, found.has_ended, found.reset) == (403, True, ErrorCodes.NO_ERROR)
        assert sent <= 1024 * 1024
        assert client.get().status == 200
        assert [heard[":path"] for heard in origin_of(gate).heard] == ["/search"]


# --- an origin that does not keep to the rules

ANSWERS: list[tuple[str, Pairs]] = [
    ("no-status", [("x", "y")]),
    ("status-of-four-digits", [(":status", "2000")]),
    ("switches-protocols", [(":status", "101")]),
    ("two-statuses", [(":status", "200"), (":status", "404")]),
    ("request-pseudo", [(":status", "200"), (":path", "/")]),
    ("upper-case-name", [(":status", "200"), ("X-Up", "1")]),
    ("line-in-value", [(":status", "200"), ("x", "a\r\nset-cookie: b")]),
    ("connection", [(":status", "200"), ("connection", "close")]),
    ("transfer-encoding", [(":status", "200"), ("transfer-encoding", "chunked")]),
    ("two-lengths", [(":status", "200"), ("content-length", "1"), ("content-length", "2")]),
    ("length-without-body", [(":status", "200"), ("content-length", "5")]),
    ("too-large", [(":status", "200"), ("x", "a" * 70_000)]),
]


@pytest.mark.parametrize("head", [row[1] for row in ANSWERS], ids=[row[0] for row in ANSWERS])
def test_an_answer_that_cannot_be_passed_on_is_a_failure_of_its_stream(tmp_path: Path, head: Pairs) -> None:
    def answer(heard: Heard) -> None:
        if heard[":path"] == "/search/broken":
            heard.talk.h2.send_headers(heard.stream_id, head, end_stream=(":status", "101") not in head)
        else:
            heard.respond()

    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = answer
        found = client.get("/search/broken")
        assert (found.status, found.reason) == (502, "upstream_failed")
        assert client.get().status == 200
        assert origin_of(gate).connections == 1
        assert gate.failures == []


def test_a_response_that_breaks_off_breaks_off_for_the_client_too(tmp_path: Path) -> None:
    def answer(heard: Heard) -> None:
        heard.talk.h2.send_headers(heard.stream_id, [(":status", "200")])
        heard.talk.h2.send_data(heard.stream_id, b"half")
        heard.talk.h2.reset_stream(heard.stream_id, ErrorCodes.INTERNAL_ERROR)

    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = answer
        found = client.get()
        assert (found.status, found.has_ended, found.reset) == (200, False, ErrorCodes.INTERNAL_ERROR)
        assert reasons(gate) == ["upstream_failed"]
        assert gate.records[0]["verdict"] == "allow"


@pytest.mark.parametrize(
    ("fields", "is_whole"),
    [([("content-length", "4")], True), ([("content-length", "5")], False), ([], False)],
    ids=["whole", "short", "of unknown length"],
)
def test_a_reset_without_error_ends_a_response_that_is_whole(tmp_path: Path, fields: Pairs, is_whole: bool) -> None:
    """Node's server sends it before its END_STREAM, when its socket was full."""

    def answer(heard: Heard) -> None:
        heard.talk.h2.send_headers(heard.stream_id, [(":status", "200"), *fields])
        heard.talk.h2.send_data(heard.stream_id, b"body")
        heard.talk.h2.reset_stream(heard.stream_id, ErrorCodes.NO_ERROR)

    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = answer
        found = client.get()
        assert found.has_ended == is_whole
        assert found.body == b"body" or not is_whole
        assert reasons(gate) == ["rule" if is_whole else "upstream_failed"]


@pytest.mark.parametrize("length", ["3", "9"], ids=["longer", "shorter"])
def test_a_response_that_is_not_as_long_as_announced_breaks_off(tmp_path: Path, length: str) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = lambda heard: heard.respond(fields=[("content-length", length)])
        found = client.get()
        assert (found.has_ended, found.reset) == (False, ErrorCodes.INTERNAL_ERROR)


def test_an_origin_that_leaves_finishes_what_it_has_taken_up(tmp_path: Path) -> None:
    """nginx says GOAWAY after a thousand requests, with others under way."""

    def answer(heard: Heard) -> None:
        if heard[":path"] == "/search/last":
            taken = next(one for one in origin_of(gate).heard if one[":path"] == "/search/first")
            heard.talk.raw(GoAwayFrame(0, last_stream_id=taken.stream_id))
            taken.respond(b"finished")

    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = answer
        first = client.send("/search/first")
        gate.wait_for(lambda: origin_of(gate).heard)
        last = client.send("/search/last")
        assert client.wait(first).body == b"finished"
        assert client.wait(last).reset == ErrorCodes.REFUSED_STREAM  # to be tried again: it was not taken up
        origin_of(gate).answer = Heard.respond
        assert client.get().body == b"sunny"
        assert origin_of(gate).connections == 2


def test_an_origin_that_hangs_up_fails_its_streams(tmp_path: Path) -> None:
    def answer(heard: Heard) -> None:
        raise ConnectionError

    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = answer
        streams = [client.send(), client.send()]
        assert {client.wait(stream).reason for stream in streams} == {"upstream_failed"}
        origin_of(gate).answer = Heard.respond
        assert client.get().body == b"sunny"


def test_an_origin_that_takes_few_streams_gets_few(tmp_path: Path) -> None:
    most = [0]

    def begin(heard: Heard) -> None:
        most[0] = max(most[0], heard.talk.h2.open_inbound_streams)

    with rig(tmp_path) as gate:
        origin_of(gate).settings = {SettingCodes.MAX_CONCURRENT_STREAMS: 3}
        origin_of(gate).begin = begin
        with Client(gate) as client:
            client.get()
            streams = [client.send() for _ in range(30)]
            assert {client.wait(stream).body for stream in streams} == {b"sunny"}
            assert 1 <= most[0] <= 3


# --- time


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are looked at often."""
    monkeypatch.setattr(core, "SWEEP_S", 0.1)


@pytest.mark.usefixtures("often")
def test_a_stream_that_its_origin_never_answers_is_given_up_alone(tmp_path: Path) -> None:
    def answer(heard: Heard) -> None:
        if heard[":path"] != "/search/never":
            heard.respond()

    with rig(tmp_path, bounds=Bounds(idle_s=0.5)) as gate, Client(gate) as client:
        origin_of(gate).answer = answer
        never = client.send("/search/never")
        while not client.responses[never].is_over:
            assert client.get().status == 200
        found = client.responses[never]
        assert (found.status, found.reason) == (502, "upstream_timeout")
        gate.wait_for(lambda: [one for one in origin_of(gate).heard if one.reset is not None])


@pytest.mark.usefixtures("often")
def test_a_stream_whose_client_stops_in_its_body_is_reset_alone(tmp_path: Path) -> None:
    with rig(tmp_path, bounds=Bounds(idle_s=0.5)) as gate, Client(gate) as client:
        stopped = client.send(method="POST", body=b"half", ends=False)
        while not client.responses[stopped].is_over:
            assert client.get().status == 200
        assert client.responses[stopped].reset == ErrorCodes.CANCEL
        assert "client_gone" in [record["reason"] for record in gate.records]


@pytest.mark.usefixtures("often")
def test_an_idle_connection_is_closed_with_goaway_and_without_a_record(tmp_path: Path) -> None:
    with rig(tmp_path, bounds=Bounds(idle_s=0.3)) as gate, Client(gate) as client:
        assert client.get().status == 200
        client.read_to_the_end()
        assert client.goaway == ErrorCodes.NO_ERROR
        assert reasons(gate) == ["rule"]


@pytest.mark.usefixtures("often")
def test_pings_do_not_keep_an_idle_connection(tmp_path: Path) -> None:
    with rig(tmp_path, bounds=Bounds(idle_s=0.3)) as gate, Client(gate) as client:
        assert client.get().status == 200
        while not client.is_closed:
            client.raw(PingFrame(0, opaque_data=b"12345678"))
            client.read()
            time.sleep(0.02)  # no flood
        assert client.goaway == ErrorCodes.NO_ERROR


# --- our own failures, and the end


@pytest.mark.parametrize("hook", ["requestheaders", "responseheaders"])
def test_a_fault_of_ours_ends_one_connection_and_every_stream_of_it_is_recorded(tmp_path: Path, hook: str) -> None:
    def broken(flow: Any) -> None:
        if flow.request.path == "/search/broken":
            raise RuntimeError("a fault of ours")

    with rig(tmp_path) as gate, Client(gate) as client, Client(gate) as other:
        origin_of(gate).answer = lambda heard: None if heard[":path"] == "/search/slow" else heard.respond()
        gate.core.hooks[hook].insert(0, broken)  # type: ignore[attr-defined]  # a list
        client.send("/search/slow")
        gate.wait_for(lambda: origin_of(gate).heard)
        client.send("/search/broken")
        client.read_to_the_end()
        assert client.goaway == ErrorCodes.INTERNAL_ERROR
        assert set(reasons(gate, 2 if hook == "responseheaders" else 1)) == {"gate_failed"}
        assert other.get().status == 200
        assert [type(error).__name__ for error in gate.failures] == ["RuntimeError"]


def test_at_the_end_clients_are_asked_to_go_and_streams_are_finished(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = lambda _heard: None
        stream = client.send()
        gate.wait_for(lambda: origin_of(gate).heard and origin_of(gate).heard[0].has_ended)
        gate.loop.call_soon_threadsafe(gate.core.leave)
        client.read_until(lambda: client.goaway is not None)
        assert client.goaway == ErrorCodes.NO_ERROR
        heard = origin_of(gate).heard[0]
        heard.respond()
        heard.talk.flush()
        client.h2.state_machine.state = type(client.h2.state_machine.state).CLIENT_OPEN  # h2 takes GOAWAY for the end
        assert client.wait(stream).body == b"sunny"
