"""Attacks on the reading of a request, sent as raw bytes over TLS: what is refused never reaches the origin, and what
passes reaches it byte for byte as judged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.proxy.inspecting import HOST, WORKLOAD, Reply, Rig, get, read_reply

VECTORS: list[dict[str, Any]] = yaml.safe_load(  # Any: rows of the vector file
    (Path(__file__).parents[1] / "vectors" / "paths.yaml").read_text("utf-8")
)
SLASH_HOST = "other.test"
POLICY = f"""
version: 1
workloads:
  {WORKLOAD}:
    rules:
      - {{host: {HOST}, tls: inspect, deny: ["* /denied/**"]}}
      - {{host: {SLASH_HOST}, tls: inspect, encodedSlash: literal}}
"""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("attacks"), policy=POLICY, origin_names=(HOST, SLASH_HOST)) as rig:
        yield rig


def octets(target: str) -> bytes:
    try:
        return target.encode("latin-1")
    except UnicodeEncodeError:
        return target.encode("utf-8")


def test_there_are_enough_tricks() -> None:
    assert sum(vector["verdict"] == "malformed" for vector in VECTORS) >= 60


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_target(rig: Rig, vector: dict[str, Any]) -> None:
    host = SLASH_HOST if vector.get("encoded_slash") else HOST
    target = octets(vector["target"])
    before = len(rig.origin.requests)
    reply = rig.send(b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, host.encode()), host=host)
    if vector["verdict"] == "ok":
        assert reply.status == 200
        assert rig.origin.requests[before:] == [b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, host.encode())]
    else:
        assert (reply.status, reply.reason) in ((400, "malformed_path"), (400, "malformed_request"))
        assert rig.origin.requests[before:] == []


LINE = f"GET /x HTTP/1.1\r\nHost: {HOST}\r\n"
POST = f"POST /x HTTP/1.1\r\nHost: {HOST}\r\n"
DENIED = get("/denied").decode()

# id, bytes, the statuses that come back in order, how many requests the origin sees
SMUGGLING = [
    ("both-lengths", POST + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400], 0),
    ("both-lengths-the-other-way", POST + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", [400], 0),
    ("two-lengths", POST + "Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + DENIED, [400], 0),
    ("two-equal-lengths", POST + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nab", [400], 0),
    ("list-of-lengths", POST + "Content-Length: 0,44\r\n\r\n" + DENIED, [400], 0),
    ("signed-length", POST + "Content-Length: +2\r\n\r\nab", [400], 0),
    ("negative-length", POST + "Content-Length: -1\r\n\r\n", [400], 0),
    ("hex-length", POST + "Content-Length: 0x2\r\n\r\nab", [400], 0),
    ("empty-length", POST + "Content-Length:\r\n\r\n", [400], 0),
    ("underscore-length", POST + "Content_Length: 2\r\n\r\n", [400], 0),
    ("length-with-leading-zeros", POST + "Content-Length: 002\r\n\r\nab", [400], 0),
    ("length-with-a-vertical-tab", POST + "Content-Length: \x0b2\r\n\r\nab", [400], 0),
    ("two-codings", POST + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", [400], 0),
    ("coding-with-a-tab", POST + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", [400], 0),
    ("coding-unknown", POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", [501], 0),
    ("coding-last-not-chunked", POST + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", [400], 0),
    ("coding-gzip", POST + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", [501], 0),
    ("coding-quoted", POST + 'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', [400], 0),
    ("space-before-the-colon", POST + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", [400], 0),
    ("tab-before-the-colon", POST + "Content-Length\t: 4\r\n\r\nabcd", [400], 0),
    ("folded-coding", POST + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", [400], 0),
    ("folded-header", LINE + "X: a\r\n b\r\n\r\n", [400], 0),
    ("space-before-the-first-header", "GET /x HTTP/1.1\r\n Host: a\r\n" + f"Host: {HOST}\r\n\r\n", [400], 0),
    ("bare-line-feeds", LINE.replace("\r\n", "\n") + "\n", [400], 0),
    ("one-bare-line-feed", LINE + "X: a\nY: b\r\n\r\n", [400], 0),
    ("bare-carriage-return", LINE + "X: a\rY: b\r\n\r\n", [400], 0),
    ("nul-in-a-value", LINE + "X: a\0b\r\n\r\n", [400], 0),
    ("nul-in-a-name", LINE + "X\0: a\r\n\r\n", [400], 0),
    ("header-without-a-colon", LINE + "X\r\n\r\n", [400], 0),
    ("header-without-a-name", LINE + ": a\r\n\r\n", [400], 0),
    ("leading-empty-line", "\r\n" + LINE + "\r\n", [400], 0),
    ("leading-line-feed", "\n" + LINE + "\r\n", [400], 0),
    ("no-version", f"GET /x\r\nHost: {HOST}\r\n\r\n", [400], 0),
    ("http-0.9", "GET /x\r\n\r\n", [400], 0),
    ("http-1.2", LINE.replace("1.1", "1.2") + "\r\n", [505], 0),
    ("http-2", LINE.replace("1.1", "2.0") + "\r\n", [505], 0),
    ("http-2-preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505], 0),
    ("two-spaces", LINE.replace("GET ", "GET  ") + "\r\n", [400], 0),
    ("tab-for-a-space", LINE.replace("GET ", "GET\t") + "\r\n", [400], 0),
    ("space-at-the-end-of-the-line", LINE.replace("1.1\r\n", "1.1 \r\n", 1) + "\r\n", [400], 0),
    ("lower-case-version", LINE.replace("HTTP", "http") + "\r\n", [400], 0),
    ("lower-case-method", LINE.replace("GET", "get") + "\r\n", [400], 0),
    ("method-with-a-colon", LINE.replace("GET", "G:T") + "\r\n", [400], 0),
    ("trace", LINE.replace("GET", "TRACE") + "\r\n", [405], 0),
    ("connect", f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n", [405], 0),
    ("connect-elsewhere", f"CONNECT evil.test:22 HTTP/1.1\r\nHost: {HOST}\r\n\r\n", [405], 0),
    ("no-host", "GET /x HTTP/1.1\r\n\r\n", [400], 0),
    ("no-host-in-1.0", "GET /x HTTP/1.0\r\n\r\n", [400], 0),
    ("two-hosts", LINE + "Host: evil.test\r\n\r\n", [400], 0),
    ("two-equal-hosts", LINE + f"Host: {HOST}\r\n\r\n", [400], 0),
    ("another-host", get("/x", host="evil.test").decode(), [421], 0),
    ("host-with-another-port", get("/x", host=f"{HOST}:444").decode(), [421], 0),
    ("host-with-a-user", get("/x", host=f"a@{HOST}").decode(), [400], 0),
    ("host-with-a-fragment", get("/x", host=f"{HOST}#.evil.test").decode(), [400], 0),
    ("host-with-a-nul", get("/x", host=f"{HOST}\0.evil.test").decode(), [400], 0),
    ("host-with-a-comma", get("/x", host=f"{HOST},evil.test").decode(), [400], 0),
    ("host-that-ends-in-two-dots", get("/x", host=f"{HOST}..").decode(), [400], 0),
    ("host-that-is-an-address", get("/x", host="127.0.0.1").decode(), [400], 0),
    ("absolute-form-elsewhere", get("https://evil.test/x").decode(), [400], 0),
    ("absolute-form-without-tls", get(f"http://{HOST}/x").decode(), [400], 0),
    ("absolute-form-with-a-user", get(f"https://evil.test@{HOST}/x").decode(), [400], 0),
    ("absolute-form-with-a-backslash", get(f"https://{HOST}\\@evil.test/x").decode(), [400], 0),
    ("absolute-form-and-another-host", get(f"https://{HOST}/x", host="evil.test").decode(), [400], 0),
    ("absolute-form-denied", get(f"https://{HOST}/denied/x").decode(), [403], 0),
    ("absolute-form-with-dots", get(f"https://{HOST}/a/../denied").decode(), [400], 0),
    ("asterisk", get("*", method="OPTIONS").decode(), [400], 0),
    ("h2c", get("/x", fields="Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n").decode(), [403], 0),
    ("denied-behind-an-allowed-one", get("/x").decode() + DENIED, [200, 403], 1),
    ("allowed-behind-a-denied-one", DENIED + get("/x").decode(), [403, 200], 1),
    ("denied-behind-a-body", POST + "Content-Length: 2\r\n\r\nab" + DENIED, [200, 403], 1),
    ("denied-behind-chunks", POST + "Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n" + DENIED, [200, 403], 1),
    ("elsewhere-behind-an-allowed-one", get("/x").decode() + get("/x", host="evil.test").decode(), [200, 421], 1),
    ("malformed-behind-an-allowed-one", get("/x").decode() + "GET /x\r\n\r\n", [200, 400], 1),
    ("anything-behind-a-malformed-one", LINE + "X\r\n\r\n" + get("/x").decode(), [400], 0),
    ("the-body-of-a-denied-one-is-no-request", f"POST /denied HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 99\r\n\r\n"
     + get("/x").decode(), [403], 0),
    ("chunk-extension", POST + "Transfer-Encoding: chunked\r\n\r\n2;x\r\nab\r\n0\r\n\r\n", [400], 0),
    ("chunk-size-with-a-sign", POST + "Transfer-Encoding: chunked\r\n\r\n+2\r\nab\r\n0\r\n\r\n", [400], 0),
    ("chunk-size-in-0x", POST + "Transfer-Encoding: chunked\r\n\r\n0x2\r\nab\r\n0\r\n\r\n", [400], 0),
    ("chunk-size-too-long", POST + "Transfer-Encoding: chunked\r\n\r\n" + "1" * 25 + "\r\nab", [400], 0),
    ("chunk-without-its-end", POST + "Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n0\r\n\r\n", [400], 0),
    ("endless-chunk-line", POST + "Transfer-Encoding: chunked\r\n\r\n2;" + "a" * 40_000, [400], 0),
    ("head-over-the-limit", LINE + "X: " + "a" * 70_000 + "\r\n\r\n", [431], 0),
    ("head-without-an-end", LINE + "X: " + "a" * 70_000, [431], 0),
    ("not-http-at-all", "SSH-2.0-OpenSSH_9.2\r\n\r\n", [400], 0),
]  # fmt: skip


def replies(rig: Rig, payload: bytes, count: int, *, cut: int = 0) -> list[Reply]:
    """The responses to these bytes, sent in two records where `cut` is set."""
    with rig.connect() as sock:
        if cut:
            sock.sendall(payload[:cut])
        sock.sendall(payload[cut:])
        sock.settimeout(10)
        found: list[Reply] = []
        rest = b""
        for _ in range(count):
            reply, rest = read_reply(sock, rest)
            found.append(reply)
        return found


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in-two"])
@pytest.mark.parametrize(
    ("payload", "statuses", "seen"), [row[1:] for row in SMUGGLING], ids=[row[0] for row in SMUGGLING]
)
def test_smuggling(rig: Rig, payload: str, statuses: list[int], seen: int, cut: bool) -> None:
    before = len(rig.origin.requests)
    octet = payload.encode("latin-1")
    got = replies(rig, octet, len(statuses), cut=len(octet) // 2 if cut else 0)
    assert [reply.status for reply in got] == statuses
    whole = [one for one in rig.origin.requests[before:] if b"denied" not in one]
    assert (len(whole), len(rig.origin.requests) - before) == (seen, seen)


def test_trailers_stop_at_the_gate(rig: Rig) -> None:
    before = len(rig.origin.requests)
    body = "2\r\nab\r\n0\r\nX-Trailer: Host\r\n\r\n"
    (reply,) = replies(rig, (POST + "Transfer-Encoding: chunked\r\n\r\n" + body).encode(), 1)
    assert reply.status == 200
    (request,) = rig.origin.requests[before:]
    assert request.endswith(b"\r\n\r\n2\r\nab\r\n0\r\n\r\n")


def test_absolute_form_reaches_the_origin_in_origin_form(rig: Rig) -> None:
    before = len(rig.origin.requests)
    assert rig.send(get(f"https://{HOST}/x?q=1")).status == 200
    assert rig.origin.requests[before:] == [get("/x?q=1")]


def test_a_host_in_another_spelling_reaches_the_origin_as_judged(rig: Rig) -> None:
    before = len(rig.origin.requests)
    assert rig.send(get("/x", host="WEATHER.Test.:443")).status == 200
    assert rig.origin.requests[before:] == [get("/x", host=f"{HOST}:443")]


def test_a_head_sent_byte_by_byte_is_read_as_a_whole_one(rig: Rig) -> None:
    before = len(rig.origin.requests)
    with rig.connect() as sock:
        for octet in get("/x"):
            sock.sendall(bytes([octet]))
        assert read_reply(sock)[0].status == 200
    assert rig.origin.requests[before:] == [get("/x")]


def test_no_answer_names_mitmproxy(rig: Rig) -> None:
    for payload in (b"SSH-2.0\r\n\r\n", get("/denied"), POST.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"):
        reply = rig.send(payload)
        assert "server" not in reply.fields
        assert b"mitmproxy" not in reply.body
        assert reply.fields["content-type"] == "application/problem+json"
