"""The grammar of a request head as an explicit proxy reads it: CONNECT and absolute form. Knows bytes, never a socket.

RFC 9112 (the head and its targets), RFC 9110 (CONNECT, fields), RFC 7617 (Basic credentials). What is read twice by two
readers is refused, not repaired.
"""

from __future__ import annotations

import re
from binascii import Error as NotBase64
from binascii import a2b_base64
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from unicodedata import normalize

from policies.addresses import Address
from policies.hostnames import Hostname, MalformedName, parse_hostname

MAX_HEAD = 16 * 1024  # a head that never ends must not grow our memory
MAX_CREDENTIALS = 1024  # characters of base64: combining marks take the square of their number to normalise

_REQUEST_LINE = re.compile(rb"([A-Z]+(?:[-_][A-Z]+)*) ([\x21-\x7e]+) HTTP/1\.([01])\r\n")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
MAX_TOKEN = 8192  # characters; a service account's has some 1,200
_TOKEN = re.compile(r"[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}")  # RFC 7515 7.1
_BEARER = re.compile(rb"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:/?#@\[\]]+)):([1-9][0-9]{0,4})")
_ABSOLUTE = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*)(?:[/?].*)?", re.IGNORECASE)
_BASIC = re.compile(rb"basic +([A-Za-z0-9+/]+={0,2})", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # RFC 7617 2: neither name nor password holds one


class MalformedHead(ValueError):
    """Not a head that this proxy serves. `str()` says why, in words for the client."""


@dataclass(frozen=True, slots=True)
class Authority:
    """`NAME:PORT` (`host`) or `ADDRESS:PORT` (`address`)."""

    host: Hostname | None
    address: Address | None
    port: int


@dataclass(frozen=True, slots=True)
class ProxyHead:
    """One head, which takes `length` bytes of the input.

    authority      what CONNECT asks for, or whom the absolute form names
    authorization  the value of Proxy-Authorization; two of them joined, which is no credential
    has_body       bytes that belong to this request follow
    persists       the client would send another request on this connection
    """

    method: str
    authority: Authority
    length: int
    authorization: bytes | None
    has_body: bool
    persists: bool

    @property
    def is_connect(self) -> bool:
        return self.method == "CONNECT"


def parse_head(data: bytes) -> ProxyHead | None:
    """The head at the start of `data`, whatever follows it. None: more bytes are needed. Raises MalformedHead.

    A client that speaks something else is told at its first line. The rest is read once, when the head is whole: it may
    come byte by byte, and some of it is slow to read.
    """
    if data and not b"A" <= data[:1] <= b"Z":
        raise MalformedHead("this is an HTTP proxy, and no request begins so")
    first = data.find(b"\n")
    if first < 0:
        return None
    line = _REQUEST_LINE.fullmatch(data, 0, first + 1)
    if line is None:
        raise MalformedHead("the request line is not METHOD TARGET HTTP/1.1")
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    method, target = line[1].decode("ascii"), line[2].decode("ascii")
    authority = _read_authority(target) if method == "CONNECT" else _read_absolute(target)
    fields = [_read_field(field) for field in data[:end].split(b"\r\n")[1:]]
    return _read_head(method, authority, int(line[3]), fields, end + 4)


def parse_credentials(value: bytes) -> tuple[str, str] | None:
    """Name and password of a `Basic` value (RFC 7617, charset UTF-8), each in the one form NFC. None: it is none."""
    found = _BASIC.fullmatch(value)
    if found is None or len(found[1]) > MAX_CREDENTIALS or len(found[1]) % 4:  # RFC 4648 4: groups of four
        return None
    try:
        text = normalize("NFC", a2b_base64(found[1], strict_mode=True).decode("utf-8"))
    except (NotBase64, UnicodeDecodeError):
        return None
    name, colon, password = text.partition(":")
    return (name, password) if colon and name and not _CONTROL.search(text) else None


def parse_token(value: bytes) -> str | None:
    """The signed token (JWT) of a `Bearer` value, or of a `Basic` one as its password, whatever the name: many clients
    can do no other. None: there is none."""
    text = ""
    if (found := _BEARER.fullmatch(value)) and len(found[1]) <= MAX_TOKEN:
        text = found[1].decode("ascii")
    elif (found := _BASIC.fullmatch(value)) and len(found[1]) <= 2 * MAX_TOKEN and len(found[1]) % 4 == 0:
        try:
            text = a2b_base64(found[1], strict_mode=True).decode("ascii").partition(":")[2]
        except (NotBase64, UnicodeDecodeError):
            return None
    return text if len(text) <= MAX_TOKEN and _TOKEN.fullmatch(text) else None


def _read_field(line: bytes) -> tuple[bytes, bytes]:
    found = _FIELD.fullmatch(line)
    if found is None:  # also a folded line, and one that a bare LF would end for somebody else
        raise MalformedHead("a header line is not NAME: VALUE, or holds a control character")
    return found[1].lower(), found[2].rstrip(b" \t")


def _read_head(
    method: str, authority: Authority, minor: int, fields: list[tuple[bytes, bytes]], length: int
) -> ProxyHead:
    def values(name: bytes) -> list[bytes]:
        return [value for key, value in fields if key == name]

    lengths, codings, given = values(b"content-length"), values(b"transfer-encoding"), values(b"proxy-authorization")
    head = ProxyHead(
        method,
        authority,
        length,
        b", ".join(given) if given else None,
        has_body=bool(codings) or lengths not in ([], [b"0"]),  # WinHTTP says on CONNECT that its length is 0
        persists=_persists(minor, b",".join(values(b"connection") + values(b"proxy-connection"))),
    )
    if head.is_connect and head.has_body:  # RFC 9110 9.3.6: it would have no meaning; what follows is the tunnel's
        raise MalformedHead("CONNECT has no body, so no Content-Length and no Transfer-Encoding")
    return head


def _persists(minor: int, options: bytes) -> bool:
    """RFC 9112 9.3; Proxy-Connection is what older clients say to a proxy instead of Connection."""
    tokens = {token.strip(b" \t").lower() for token in options.split(b",")}
    return b"close" not in tokens and (minor == 1 or b"keep-alive" in tokens)


def _read_absolute(target: str) -> Authority:
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        raise MalformedHead("this is a proxy, no web server: ask for http://HOST/PATH, or CONNECT HOST:PORT")
    scheme, authority = found[1].lower(), found[2]
    if scheme == "https":
        raise MalformedHead("https:// is not asked of a proxy in clear: use CONNECT")
    if scheme != "http":
        raise MalformedHead(f"{scheme}:// is not served: ask for http://, or CONNECT HOST:PORT")
    return _read_authority(authority if re.search(r":[0-9]+\Z", authority) else f"{authority}:80")


def _read_authority(text: str) -> Authority:
    found = _AUTHORITY.fullmatch(text)
    if found is None or int(found[3]) > 0xFFFF:
        raise MalformedHead("the target is not HOST:PORT")
    bracketed, name, port = found[1], found[2], int(found[3])
    try:
        if bracketed:
            address = IPv6Address(bracketed)
            return Authority(None, address.ipv4_mapped or address, port)
        return Authority(parse_hostname(name), None, port)
    except MalformedName as error:
        if not error.is_address:
            raise MalformedHead(f"the host is no name: {error}") from error
    except ValueError as error:
        raise MalformedHead("what stands in brackets is no IPv6 address") from error
    try:
        return Authority(None, ip_address(name), port)
    except ValueError as error:  # 127.1, 0x7f.1: an address to some resolvers, and to nobody a name
        raise MalformedHead("the address is not in its plain form") from error
