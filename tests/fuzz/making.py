"""Heads and chunked bodies that are nearly right: made of parts that servers read differently, then harmed."""

from __future__ import annotations

from random import Random

METHODS = (
    b"GET",
    b"POST",
    b"PUT",
    b"HEAD",
    b"OPTIONS",
    b"DELETE",
    b"PATCH",
    b"get",
    b"M-SEARCH",
    b"PRI",
    b"TRACE",
    b"G\tT",
)
TARGETS = (
    b"/", b"/x", b"/x?q=1", b"/a//b", b"/a/../b", b"/%2e%2e/x", b"*", b"https://weather.test/x", b"weather.test:443",
    b"/\xff",
    b"/a;b=c", b"/a#b", b"/%00", b"/a b", b"http://evil.test/", b"/" + b"a" * 300,
)  # fmt: skip
VERSIONS = (
    *(b"HTTP/1.1",) * 8,
    b"HTTP/1.0",
    b"HTTP/1.2",
    b"HTTP/2.0",
    b"http/1.1",
    b"HTTP/1.10",
    b"HTTP/1,1",
    b"HTTP/1.1 ",
)
NAMES = (
    b"X", b"Y", b"Cookie", b"Accept", b"Authorization",
    b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Upgrade", b"Expect", b"TE", b"Trailer",
    b"host", b"content-length", b"TRANSFER-ENCODING", b"Content_Length", b"Content-Length ", b"Transfer-Encoding\t",
    b"X\0",
    b"Keep-Alive", b"Proxy-Connection", b"X-HTTP-Method-Override", b"", b"X Y", b"\xe9",
)  # fmt: skip
VALUES = (
    b"x", b"", b"a\tb", b"caf\xe9", b"text/html", b'"a"', b"5", b"0", b"close",
    b"weather.test", b"weather.test:443", b"evil.test", b"+5", b"-1", b"5, 5", b"0x5", b"005", b"chunked", b"Chunked",
    b"chunked, chunked", b"gzip, chunked", b"xchunked", b"identity", b"\x0bchunked", b"keep-alive", b"Upgrade",
    b"websocket", b"h2c", b"100-continue", b"host", b"content-length", b"close, x", b"\0", b"a\rb",
    b"a\nb", b"a\r\n b", b"18446744073709551616", b"trailers",
)  # fmt: skip
PHRASES = (b" OK", b"", b" \xe9", b" ", b" a\rb", b"  ")
PAIRS = (
    (b"Content-Length", b"5"), (b"Content-Length", b"0"), (b"Transfer-Encoding", b"chunked"), (b"Connection", b"close"),
    (b"Connection", b"keep-alive"), (b"Connection", b"X"), (b"Upgrade", b"websocket"), (b"Expect", b"100-continue"),
)  # fmt: skip
ENDS = (b"\r\n", b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n ", b"\0\r\n", b" \r\n", b"\r\n\r\n")
COLONS = (b": ", b":", b":\t", b":  ", b" : ", b"")
SIZES = (
    b"1",
    b"5",
    b"a",
    b"A",
    b"0",
    b"00",
    b"05",
    b"+5",
    b"-1",
    b"0x5",
    b"",
    b" 5",
    b"5 ",
    b"5;x",
    b"5;x=y",
    b"fffffffff",
    b"g",
    b"5_0",
)
STATUSES = (b"200", b"204", b"304", b"100", b"101", b"103", b"404", b"99", b"1000", b"2xx", b"+20", b"999", b"000")
HARM = (
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"\x0b",
    b"\x0c",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"0",
    b"/",
    b"%",
    b"_",
)


def a_request(random: Random) -> bytes:
    """A head with its empty line; a good part of them are right."""
    wild = _wildness(random)
    line = b" ".join(
        (_usual(random, METHODS, 6, wild), _usual(random, TARGETS, 3, wild), _usual(random, VERSIONS, 9, wild))
    )
    fields = [] if random.random() < wild else [(b"Host", b"weather.test")]
    return _head(random, line, fields, wild)


def a_response(random: Random) -> bytes:
    wild = _wildness(random)
    line = (
        _usual(random, VERSIONS, 9, wild) + b" " + _usual(random, STATUSES, 7, wild) + _usual(random, PHRASES, 3, wild)
    )
    return _head(random, line, [], wild)


def a_body(random: Random) -> bytes:
    """A chunked body with trailers, and bytes behind it."""
    wild = _wildness(random)
    parts = []
    for _ in range(random.randrange(4)):
        size = random.choice((1, 2, 5, 10, 16, 17, 300))
        said = random.choice(SIZES) if random.random() < wild else b"%x" % size
        parts += [said, _usual(random, ENDS, 1, wild), b"x" * size, _usual(random, ENDS, 1, wild)]
    parts += [_usual(random, (b"0", *SIZES), 1, wild), _usual(random, ENDS, 1, wild)]
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        parts += _field(
            random, random.choice((b"X", b"X-Sum")) if random.random() > wild else random.choice(NAMES), wild
        )
    parts += [b"\r\n", random.choice((b"", b"", b"GET / HTTP/1.1\r\n\r\n", b"x", b"\r\n"))]
    return harmed(random, b"".join(parts), wild)


def harmed(random: Random, text: bytes, wild: float) -> bytes:
    """With up to three bytes put in, taken out, doubled or changed."""
    while random.random() < 2 * wild:
        at = random.randrange(len(text) + 1)
        match random.randrange(4):
            case 0:
                text = text[:at] + random.choice(HARM) + text[at:]
            case 1:
                text = text[:at] + text[at + 1 :]
            case 2:
                text = text[:at] + text[at : at + random.randrange(30)] + text[at:]
            case _:
                text = text[:at] + bytes([random.randrange(256)]) + text[at + 1 :]
    return text


def _wildness(random: Random) -> float:
    """How often this one is not as usual: many tricks at once are refused for any of them, and prove little."""
    return random.choice((0.0, 0.02, 0.05, 0.1, 0.3))


def _head(random: Random, line: bytes, fields: list[tuple[bytes, bytes]], wild: float) -> bytes:
    for _ in range(random.choice((0, 1, 1, 2, 3, 5))):
        if random.random() < 0.4:
            fields.append(random.choice(PAIRS))
        else:
            fields.append((_usual(random, NAMES, 5, wild), _usual(random, VALUES, 9, wild)))
    random.shuffle(fields)
    text = line + _usual(random, ENDS, 1, wild)
    text += b"".join(part for name, value in fields for part in _field(random, name, wild, value))
    return harmed(random, text + b"\r\n", wild)


def _field(random: Random, name: bytes, wild: float, value: bytes | None = None) -> list[bytes]:
    said = _usual(random, VALUES, 9, wild) if value is None else value
    return [name, _usual(random, COLONS, 3, wild), said, _usual(random, ENDS, 1, wild)]


def _usual(random: Random, choices: tuple[bytes, ...], usual: int, wild: float) -> bytes:
    """One of the first `usual`, but for the wild ones."""
    return random.choice(choices if random.random() < wild else choices[:usual])
