"""Heads as an explicit proxy reads them, and the credentials in them: tables, byte by byte, and garbage."""

from __future__ import annotations

from base64 import b64encode
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.hostnames import Hostname
from proxy.explicit.credentials import MAX_NAME, MAX_PASSWORD
from proxy.wire.proxy_head import Authority, MalformedHead, ProxyHead, parse_credentials, parse_head, parse_token


def head(line: str, *fields: str) -> bytes:
    return "".join(f"{text}\r\n" for text in (line, *fields, "")).encode("latin-1")


def read(data: bytes) -> ProxyHead:
    found = parse_head(data)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("line", "authority"),
    [
        ("CONNECT a.example:443 HTTP/1.1", ("a.example", None, 443)),
        ("CONNECT A.Example.:8443 HTTP/1.0", ("a.example", None, 8443)),
        ("CONNECT 203.0.113.9:22 HTTP/1.1", (None, "203.0.113.9", 22)),
        ("CONNECT [2001:db8::9]:443 HTTP/1.1", (None, "2001:db8::9", 443)),
        ("CONNECT [::ffff:169.254.169.254]:80 HTTP/1.1", (None, "169.254.169.254", 80)),
        ("GET http://a.example/x?y=http://b.example/ HTTP/1.1", ("a.example", None, 80)),
        ("GET HTTP://a.example:8080 HTTP/1.0", ("a.example", None, 8080)),
        ("OPTIONS http://a.example HTTP/1.1", ("a.example", None, 80)),
        ("GET http://a.example?q HTTP/1.1", ("a.example", None, 80)),
        ("GET http://203.0.113.9/ HTTP/1.1", (None, "203.0.113.9", 80)),
        ("GET http://[2001:db8::9]/ HTTP/1.1", (None, "2001:db8::9", 80)),
        ("VERSION-CONTROL http://a.example/ HTTP/1.1", ("a.example", None, 80)),
    ],
)
def test_head_names_one_authority(line: str, authority: tuple[str | None, str | None, int]) -> None:
    host, address, port = authority
    data = head(line, "Host: other.example")
    found = read(data + b"the rest")
    assert found.authority == Authority(
        None if host is None else Hostname(host), None if address is None else ip_address(address), port
    )
    assert (found.method, found.length) == (line.partition(" ")[0], len(data))


WRONG = {
    "origin form": (head("GET / HTTP/1.1", "Host: a.example"), "this is a proxy, no web server"),
    "asterisk form": (head("OPTIONS * HTTP/1.1"), "this is a proxy, no web server"),
    "https": (head("GET https://a.example/ HTTP/1.1"), "use CONNECT"),
    "ftp": (head("GET ftp://a.example/ HTTP/1.1"), "ftp:// is not served"),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "the request line is not"),
    "HTTP/0.9": (b"GET http://a.example/\r\n\r\n", "the request line is not"),
    "HTTP/1.2": (head("CONNECT a.example:443 HTTP/1.2"), "the request line is not"),
    "lower case": (head("connect a.example:443 HTTP/1.1"), "no request begins so"),
    "two spaces": (head("CONNECT  a.example:443 HTTP/1.1"), "the request line is not"),
    "tab": (head("CONNECT a.example:443\tHTTP/1.1"), "the request line is not"),
    "space before the method": (head(" CONNECT a.example:443 HTTP/1.1"), "no request begins so"),
    "empty line first": (b"\r\n" + head("CONNECT a.example:443 HTTP/1.1"), "no request begins so"),
    "bare line feeds": (b"CONNECT a.example:443 HTTP/1.1\n\n", "the request line is not"),
    "bare line feed between fields": (head("CONNECT a.example:443 HTTP/1.1", "A: b\nC: d"), "a header line is not"),
    "carriage return in a value": (head("CONNECT a.example:443 HTTP/1.1", "A: b\rc"), "a header line is not"),
    "folded line": (head("CONNECT a.example:443 HTTP/1.1", "A: b", " c"), "a header line is not"),
    "space before the colon": (head("CONNECT a.example:443 HTTP/1.1", "Host : a"), "a header line is not"),
    "no colon": (head("CONNECT a.example:443 HTTP/1.1", "Host"), "a header line is not"),
    "NUL": (head("CONNECT a.example:443 HTTP/1.1", "A: \0"), "a header line is not"),
    "no port": (head("CONNECT a.example HTTP/1.1"), "the target is not HOST:PORT"),
    "port 0": (head("CONNECT a.example:0 HTTP/1.1"), "the target is not HOST:PORT"),
    "port too large": (head("CONNECT a.example:65536 HTTP/1.1"), "the target is not HOST:PORT"),
    "user": (head("CONNECT user@a.example:443 HTTP/1.1"), "the target is not HOST:PORT"),
    "user in a URL": (head("GET http://user:pass@a.example/ HTTP/1.1"), "the target is not HOST:PORT"),
    "CONNECT with a URL": (head("CONNECT http://a.example:443/ HTTP/1.1"), "the target is not HOST:PORT"),
    "CONNECT with a path": (head("CONNECT a.example:443/x HTTP/1.1"), "the target is not HOST:PORT"),
    "no host": (head("GET http:/// HTTP/1.1"), "the target is not HOST:PORT"),
    "empty port": (head("GET http://a.example:/ HTTP/1.1"), "the target is not HOST:PORT"),
    "open bracket": (head("CONNECT [::1:443 HTTP/1.1"), "the target is not HOST:PORT"),
    "IPv6 without brackets": (head("CONNECT ::1:443 HTTP/1.1"), "the target is not HOST:PORT"),
    "IPv4 in brackets": (head("CONNECT [127.0.0.1]:443 HTTP/1.1"), "no IPv6 address"),
    "zone": (head("CONNECT [fe80::1%eth0]:443 HTTP/1.1"), "the target is not HOST:PORT"),
    "short address": (head("CONNECT 127.1:443 HTTP/1.1"), "not in its plain form"),
    "hexadecimal address": (head("CONNECT 0x7f000001:443 HTTP/1.1"), "not in its plain form"),
    "percent": (head("CONNECT a%2eexample:443 HTTP/1.1"), "the host is no name"),
    "underscore of nothing": (head("CONNECT a..example:443 HTTP/1.1"), "the host is no name"),
    "CONNECT with a body": (head("CONNECT a.example:443 HTTP/1.1", "Content-Length: 5"), "CONNECT has no body"),
    "CONNECT with two lengths": (
        head("CONNECT a.example:443 HTTP/1.1", "Content-Length: 0", "Content-Length: 5"), "CONNECT has no body"),
    "CONNECT with a coding": (
        head("CONNECT a.example:443 HTTP/1.1", "Transfer-Encoding: chunked"), "CONNECT has no body"),
    "TLS": (b"\x16\x03\x01", "no request begins so"),
    "SOCKS": (b"\x05\x01\x00", "no request begins so"),
    "PROXY header": (b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2\r\n", "the request line is not"),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", "the request line is not"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "says"), WRONG.values(), ids=WRONG)
def test_head_that_no_proxy_should_serve_says_why(data: bytes, says: str) -> None:
    with pytest.raises(MalformedHead, match=says):
        parse_head(data)


def test_client_that_speaks_something_else_is_told_at_its_first_line() -> None:
    with pytest.raises(MalformedHead, match="the request line is not"):
        parse_head(b"GET / HTTP/2.0\r\nHost: a.exa")


def test_every_beginning_of_a_head_needs_more() -> None:
    data = head("GET http://a.example/ HTTP/1.1", "Host: a.example", "Proxy-Authorization: Basic YTpi", "A:")
    assert {parse_head(data[:size]) for size in range(len(data))} == {None}


@pytest.mark.parametrize(
    ("fields", "authorization"),
    [
        ([], None),
        (["Proxy-Authorization: Basic YTpi"], b"Basic YTpi"),
        (["proxy-authorization:\t Basic YTpi \t"], b"Basic YTpi"),
        (["Authorization: Basic YTpi"], None),
        (["Proxy-Authorization: Basic YTpi", "Proxy-Authorization: Basic YTpi"], b"Basic YTpi, Basic YTpi"),
        (["Proxy-Authorization:"], b""),
    ],
)
def test_authorization_is_its_value_as_it_stands(fields: list[str], authorization: bytes | None) -> None:
    assert read(head("CONNECT a.example:443 HTTP/1.1", *fields)).authorization == authorization


@pytest.mark.parametrize(
    ("version", "fields", "persists"),
    [
        ("1.1", [], True),
        ("1.1", ["Connection: close"], False),
        ("1.1", ["Connection: TE, Close"], False),
        ("1.1", ["Proxy-Connection: close"], False),
        ("1.0", [], False),
        ("1.0", ["Connection: keep-alive"], True),
        ("1.0", ["Proxy-Connection: Keep-Alive"], True),
        ("1.0", ["Proxy-Connection: Keep-Alive", "Connection: close"], False),
    ],
)
def test_connection_persists_as_version_and_options_say(version: str, fields: list[str], persists: bool) -> None:
    assert read(head(f"CONNECT a.example:443 HTTP/{version}", *fields)).persists is persists


@pytest.mark.parametrize(
    ("fields", "has_body"),
    [
        ([], False),
        (["Content-Length: 0"], False),
        (["Content-Length: 1"], True),
        (["Content-Length: 00"], True),
        (["Content-Length: 0", "Content-Length: 0"], True),
        (["Transfer-Encoding: chunked"], True),
        (["Transfer-Encoding: identity", "Content-Length: 0"], True),
    ],
)
def test_every_doubt_about_a_body_is_one(fields: list[str], has_body: bool) -> None:
    assert read(head("POST http://a.example/ HTTP/1.1", *fields)).has_body is has_body


def test_connect_that_says_it_has_no_body_is_served() -> None:  # WinHTTP
    assert not read(head("CONNECT a.example:443 HTTP/1.0", "Content-Length: 0")).has_body


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda rest: b"CONNECT a:1 HTTP/1.1\r\n" + rest)))
def test_garbage_is_a_head_or_needs_more_or_is_malformed(data: bytes) -> None:
    try:
        found = parse_head(data)
    except MalformedHead:
        return
    assert found is None or 0 < found.length <= len(data)


# --- credentials ---


def basic(text: str, encoding: str = "utf-8") -> bytes:
    return b"Basic " + b64encode(text.encode(encoding))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (basic("ann:secret"), ("ann", "secret")),
        (basic("ann:a:b:c"), ("ann", "a:b:c")),
        (basic("ann:"), ("ann", "")),
        (b"bAsIc   " + b64encode(b"ann:x"), ("ann", "x")),
        (basic("Jos\u00e9:na\u00efve"), ("Jos\u00e9", "na\u00efve")),
        (basic("Jose\u0301:nai\u0308ve"), ("Jos\u00e9", "na\u00efve")),
        (basic(":secret"), None),
        (basic("ann"), None),
        (basic("ann:se\x00cret"), None),
        (basic("a\nn:secret"), None),
        (basic("Jos\u00e9:x", "latin-1"), None),
        (basic("ann:" + "x" * 700), ("ann", "x" * 700)),
        (basic("ann:" + "x" * 800), None),
        (b"Basic", None),
        (b"Basic ", None),
        (b"Basic YTpi, Basic YTpi", None),
        (b"Basic YTp", None),
        (b"Basic YTpi=", None),
        (b"Basic YT-_", None),
        (b"Bearer YTpi", None),
        (b"Negotiate YII=", None),
        (b"YTpi", None),
        (b"", None),
    ],
)
def test_credentials_are_basic_in_utf_8_or_none(value: bytes, found: tuple[str, str] | None) -> None:
    assert parse_credentials(value) == found


def test_longest_name_and_password_that_a_file_may_hold_are_read() -> None:
    name, password = "n" * MAX_NAME, "p" * MAX_PASSWORD
    assert parse_credentials(basic(f"{name}:{password}")) == (name, password)


@given(st.binary(max_size=60), st.booleans())
def test_any_value_is_credentials_or_none(value: bytes, encoded: bool) -> None:
    found = parse_credentials(b"Basic " + (b64encode(value) if encoded else value))
    assert found is None or (found[0] and ":" not in found[0])


@pytest.mark.parametrize(
    ("value", "token"),
    [
        (b"Bearer aa.bb.cc", "aa.bb.cc"),
        (b"bearer  aa.b-_b.cc", "aa.b-_b.cc"),
        (b"Basic " + b64encode(b"any:aa.bb.cc"), "aa.bb.cc"),
        (b"Basic " + b64encode(b":aa.bb.cc"), "aa.bb.cc"),
        (b"Bearer aa.bb", None),
        (b"Bearer aa.bb.cc.dd", None),
        (b"Bearer aa.bb.cc x", None),
        (b"Bearer aa.bb.c=", None),
        (b"Bearer " + b"a" * 9000 + b".bb.cc", None),
        (b"Basic " + b64encode(b"any:password"), None),
        (b"Basic " + b64encode("any:aa.bb.c\u00e9".encode()), None),
        (b"Basic aa.bb.cc", None),
        (b"", None),
    ],
    ids=["bearer", "another spelling", "a password", "a password of nobody", "two parts", "four parts", "more behind",
         "padded", "too long", "another password", "not ASCII", "not base64", "nothing"],
)  # fmt: skip
def test_a_token_has_the_form_of_one(value: bytes, token: str | None) -> None:
    assert parse_token(value) == token


@given(st.binary(max_size=200))
def test_whatever_is_shown_is_a_token_or_none(value: bytes) -> None:
    for shown in (value, b"Bearer " + value, b"Basic " + b64encode(value)):
        token = parse_token(shown)
        assert token is None or token.count(".") == 2
