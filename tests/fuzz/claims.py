"""What must hold of any bytes. Each claim says whether the lane accepted them, and raises where it does not hold."""

from __future__ import annotations

from random import Random

from proxy.lane.body import Chunked
from proxy.lane.http1 import Fields, Refused, find_end, parse_request, parse_response
from tests.fuzz.oracles import (
    METHODS_OF_LLHTTP,
    Seen,
    h11_chunks,
    h11_request,
    h11_response,
    llhttp_chunks,
    llhttp_request,
    llhttp_response,
)


class Disagreement(AssertionError):
    """Two readers read these bytes differently."""

    def __init__(self, what: str, data: bytes, *seen: object) -> None:
        super().__init__("\n".join((what, f"  bytes: {data!r}", *(f"  {one!r}" for one in seen))))


def framing_of(fields: Fields) -> bytes:
    if fields.is_chunked:
        return b"Transfer-Encoding: chunked\r\n"
    return b"" if fields.length is None else b"Content-Length: %d\r\n" % fields.length


def _seen(line: tuple[bytes, ...], lines: bytes) -> Seen:
    pairs = [text.partition(b": ") for text in lines.split(b"\r\n")[:-1]]
    return Seen(line, tuple((name.lower(), value) for name, _, value in pairs))


def _split(data: bytes) -> bytes | None:
    """The head that the data begins with; None: more is needed. Where it ends must not depend on how it came."""
    end = find_end(data)
    for cut in (1, len(data) // 2, max(0, end - 2)):
        begun = find_end(data[:cut])
        later = begun or find_end(data, max(0, cut - 3))
        if later != end:
            raise Disagreement("where a head ends depends on how it came", data, end, (cut, later))
    return data[:end] if end else None


def request_reads_alike(data: bytes) -> bool:
    """A request that is accepted is sent on in a form, and came in one, that nobody reads otherwise."""
    head = _split(data)
    if head is None:
        return False
    try:
        request = parse_request(head)
    except Refused:
        return False
    fields = request.fields
    host = (fields.host or "").encode("latin-1")
    framing = framing_of(fields)
    lines = b"Host: %b\r\n%b%b" % (host, fields.lines, framing)
    method, target = request.method.encode(), request.target.encode("latin-1")
    expected = _seen((method, target, b"1.1"), lines)
    sent_on = b"%b %b HTTP/1.1\r\n%b\r\n" % (method, target, lines)
    if any(octet >= 0x80 for octet in target):
        return True  # no target that the judge lets pass (policy.md, Paths)
    _compare("h11 reads what is sent on otherwise", sent_on, expected, h11_request(sent_on), must=True)
    is_known = request.method in METHODS_OF_LLHTTP and target.startswith(b"/")
    _compare("llhttp reads what is sent on otherwise", sent_on, expected, llhttp_request(sent_on), must=is_known)
    for name, read in (("h11", h11_request(head)), ("llhttp", llhttp_request(head))):
        if read and _framing_seen(read) != _framing_seen(expected):
            raise Disagreement(f"{name} frames what came otherwise", head, expected, read)
    return True


def response_reads_alike(data: bytes) -> bool:
    head = _split(data)
    if head is None:
        return False
    try:
        response = parse_response(head, "GET")
    except Refused:
        return False
    fields = response.fields
    lines = fields.lines + framing_of(fields)
    sent_on = b"HTTP/1.1 %d %b\r\n%b\r\n" % (response.status, response.phrase, lines)
    expected = _seen((b"%d" % response.status, b"1.1"), lines)
    _compare(
        "h11 reads what is sent on otherwise", sent_on, expected, h11_response(sent_on), must=response.status >= 200
    )
    _compare("llhttp reads what is sent on otherwise", sent_on, expected, llhttp_response(sent_on), must=False)
    return True


def _compare(what: str, data: bytes, expected: Seen, read: Seen | None, *, must: bool) -> None:
    if read is None:
        if must:
            raise Disagreement(what + ": not at all", data, expected)
    elif read.line != expected.line or sorted(read.fields) != sorted(expected.fields):
        raise Disagreement(what, data, expected, read)


def _framing_seen(seen: Seen) -> list[tuple[bytes, object]]:
    found: list[tuple[bytes, object]] = []
    for name, value in seen.fields:
        if name == b"content-length":
            found.append((name, int(value)))
        elif name == b"transfer-encoding":
            found.append((name, value.lower()))
    return found


def chunks_read_alike(random: Random, data: bytes, *, in_request: bool = True) -> bool:
    """A chunked body gives the same however it is cut, and what h11 and llhttp give if it is accepted."""
    whole = _feed([data], in_request)
    cuts = sorted(random.randrange(len(data) + 1) for _ in range(random.randrange(1, 6)))
    pieces = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    if (cut := _feed(pieces, in_request)) != whole:
        raise Disagreement(f"cut at {cuts}, chunks read otherwise", data, whole, cut)
    if whole is None or not whole[1]:
        return False
    payload, _, rest, _ = whole
    read = h11_chunks(data)
    if read is not None and read != (payload, rest):
        raise Disagreement("h11 reads chunks otherwise", data, whole, read)
    seen = llhttp_chunks(data[: len(data) - len(rest)])
    if seen is not None and seen != payload:
        raise Disagreement("llhttp reads chunks otherwise", data, whole, seen)
    if read is None and seen is None:
        raise Disagreement("nobody else accepts these chunks", data, whole)
    return True


def _feed(pieces: list[bytes], in_request: bool) -> tuple[bytes, bool, bytes, bytes] | None:
    """Payload, whether it is over, what stands behind it, trailers; None: refused."""
    body = Chunked(in_request=in_request)
    payload = b""
    for number, piece in enumerate(pieces):
        try:
            parts, done, rest = body.feed(piece)
        except Refused:
            return None
        payload += b"".join(parts)
        if done:
            return payload, True, rest + b"".join(pieces[number + 1 :]), body.trailers
    return payload, False, b"", b""
