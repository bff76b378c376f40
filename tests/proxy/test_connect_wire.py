"""The CONNECT codec: what is sent, and every answer a proxy may give to it, whole, in pieces and hostile."""

from __future__ import annotations

from base64 import b64decode
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.hostnames import parse_hostname
from proxy.wire.connect import MAX_HEAD, Answer, MalformedAnswer, basic, parse_answer, render_connect

OK = b"HTTP/1.1 200 Connection established\r\n\r\n"


@pytest.mark.parametrize(
    ("target", "authority"),
    [
        (parse_hostname("a.example"), "a.example:443"),
        (ip_address("192.0.2.7"), "192.0.2.7:443"),
        (ip_address("2001:db8::7"), "[2001:db8::7]:443"),
    ],
    ids=["name", "IPv4", "IPv6"],
)
def test_request_names_the_target_twice(target: object, authority: str) -> None:
    expected = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n"
    assert render_connect(target, 443) == expected.encode()  # type: ignore[arg-type]  # rows of two types


def test_request_carries_the_credentials() -> None:
    request = render_connect(parse_hostname("a.example"), 443, basic("gate:pä:ss".encode()))
    (line,) = [line for line in request.split(b"\r\n") if line.startswith(b"Proxy-Authorization: Basic ")]
    assert b64decode(line.rpartition(b" ")[2]) == "gate:pä:ss".encode()
    assert request.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (OK, 200),
        (b"HTTP/1.0 200 OK\r\n\r\n", 200),
        (b"HTTP/1.1 200\r\n\r\n", 200),
        (b"HTTP/1.1 200 \r\nVia: 1.1 site\r\nX-Empty:\r\n\r\n", 200),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 3 + OK, 200),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", 101),
        (b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n", 302),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n", 407),
        (b"HTTP/1.1 503 \xfcberlastet\r\n\r\n", 503),
    ],
)
def test_answer_is_read_whole_in_pieces_and_with_what_follows(head: bytes, status: int) -> None:
    answer = Answer(status, len(head))
    assert parse_answer(head) == answer
    assert parse_answer(head + b"220 mail.example\r\n\r\n") == answer
    assert [parse_answer(head[:size]) for size in range(len(head))] == [None] * len(head)
    assert answer.is_established is (200 <= status < 300)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"\r\n" + OK,
        b"\r\n\r\n",
        b" " + OK,
        b"HTTP/2 200\r\n",
        b"HTTP/1.1 2000 OK\r\n",
        b"HTTP/1.1 20 OK\r\n",
        b"HTTP/1.1 600 OK\r\n",
        b"HTTP/1.1  200 OK\r\n",
        b"HTTP/1.1 200 OK\n\n",
        b"HTTP/1.1 200 O\x00K\r\n",
        b"HTTP/1.1 200 OK\r\nVia 1.1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nVia : 1.1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nVia: 1.1\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nVia: 1.1\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nVia: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nVia: \x1b[2J\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n<html>hello" + OK,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD,
        b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_HEAD // 25 + 1),
    ],
)
def test_what_is_no_answer_is_refused_and_stays_refused(data: bytes) -> None:
    for more in (b"", b"\r\n\r\n", OK):
        with pytest.raises(MalformedAnswer):
            parse_answer(data + more)


def test_the_largest_head_is_read_and_one_byte_more_is_not() -> None:
    head = b"HTTP/1.1 200 OK\r\nX: " + b"x" * (MAX_HEAD - 24) + b"\r\n\r\n"
    assert (len(head), parse_answer(head)) == (MAX_HEAD, Answer(200, MAX_HEAD))
    with pytest.raises(MalformedAnswer, match="16384"):
        parse_answer(head.replace(b"X: ", b"X: x"))


def outcome(data: bytes) -> Answer | type[MalformedAnswer] | None:
    try:
        return parse_answer(data)
    except MalformedAnswer:
        return MalformedAnswer


PIECES = (
    OK,
    b"HTTP/1.1 100 Continue\r\n",
    b"HTTP/1.",
    b"200",
    b"\r\n",
    b"\n",
    b"\r",
    b"Via: 1\r\n",
    b"\0",
    b"x" * 9000,
)


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=20), max_size=8).map(b"".join), st.floats(0, 1))
def test_garbage_gives_an_answer_or_nothing_yet_or_our_error_and_more_bytes_change_none(
    data: bytes, part: float
) -> None:
    whole = outcome(data)
    assert outcome(data[: int(len(data) * part)]) in (None, whole)
    if isinstance(whole, Answer):
        assert data[: whole.size].endswith(b"\r\n\r\n")
        assert whole.size <= MAX_HEAD
