"""HTTP/2 heads and frames by themselves: garbage gives our errors, and no head says more in HTTP/1.1 than it said."""

from __future__ import annotations

from h2.events import Event, RequestReceived
from h2.exceptions import ProtocolError
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from mitmproxy.net.http.http1 import assemble_request_head

from proxy.inspector import reading
from proxy.inspector.frames import CONNECTION_WINDOW, STREAM_WINDOW, Frames
from proxy.inspector.heads import as_http1, read_request, read_response, read_trailers, write_response
from proxy.inspector.reading import MalformedHead

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)[:3] + b"\x04" + bytes(5)
NAMES = (":method", ":scheme", ":authority", ":path", ":status", "host", "content-length", "te", "cookie", "x")
VALUES = ("GET", "POST", "https", "a.test", "/", "/a b", "200", "5", "0", "trailers", "a\r\nb: c", "a\0", " a", "")

octets = st.one_of(st.sampled_from([value.encode() for value in VALUES]), st.binary(max_size=12))
names = st.one_of(st.sampled_from([name.encode() for name in NAMES]), st.binary(max_size=8))
heads = st.lists(st.tuples(names, octets), max_size=10)
fair_heads = st.builds(
    lambda method, path, more: [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", b"a.test"),
        (b":path", path),
        *more,
    ],
    st.one_of(st.sampled_from([b"GET", b"POST"]), octets),
    octets.map(lambda rest: b"/" + rest),
    heads,
)


@given(st.one_of(heads, fair_heads), st.booleans())
@settings(max_examples=400, deadline=None)
def test_a_head_that_is_read_says_the_same_in_http1(head: list[tuple[bytes, bytes]], ends: bool) -> None:
    try:
        request, length = read_request(head, ends=ends)
    except MalformedHead:
        return
    written: bytes = assemble_request_head(as_http1(request, has_body=not ends))  # type: ignore[no-untyped-call]
    again = reading.read_request(written)
    assert (again.data.method, again.data.path) == (request.data.method, request.data.path)
    kept = [field for field in request.data.headers.fields if field[0] not in (b"te", b"host")]
    names = [name for name, _ in again.data.headers.fields]
    assert [field for field in again.data.headers.fields if field in kept] == kept
    assert len(names) - len(kept) in (1, 2)  # Host, and a length or a coding
    assert (length == 0) == ends or length is not None


@given(heads, st.sampled_from([b"GET", b"HEAD"]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_response_that_is_read_can_be_written(head: list[tuple[bytes, bytes]], method: bytes, ends: bool) -> None:
    try:
        response, _ = read_response([(b":status", b"200"), *head], method, ends=ends)
    except MalformedHead:
        return
    assert write_response(response) == [(b":status", b"200"), *head]


@given(heads)
@settings(max_examples=200, deadline=None)
def test_trailers_that_are_read_are_fields_alone(head: list[tuple[bytes, bytes]]) -> None:
    try:
        trailers = read_trailers(head)
    except MalformedHead:
        return
    assert all(not name.startswith(b":") and b"\n" not in value for name, value in trailers.fields)


def frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    return len(body).to_bytes(3) + bytes([kind, flags]) + stream_id.to_bytes(4) + body


blocks = st.lists(st.sampled_from([(b":method", b"GET"), (b":path", b"/"), (b"a", b"b")]), max_size=4).map(
    Encoder().encode
)
frames = st.builds(
    frame,
    st.one_of(st.integers(0, 10), st.integers(0, 255)),
    st.one_of(st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x24]), st.integers(0, 255)),
    st.one_of(st.sampled_from([0, 1, 1, 3, 5]), st.integers(0, 2**31 - 1)),
    st.one_of(blocks, st.binary(max_size=20), st.integers(0, 2**32 - 1).map(lambda number: number.to_bytes(4))),
)


@given(st.lists(frames, max_size=12), st.integers(1, 60), st.booleans())
@settings(max_examples=300, deadline=None)
def test_garbage_gives_events_or_a_protocol_error(said: list[bytes], step: int, is_client: bool) -> None:
    one = Frames(client_side=is_client)
    one.open()
    data = (b"" if is_client else PREFACE) + b"".join(said)
    try:
        for at in range(0, len(data), step):
            for event in one.receive(data[at : at + step]):
                if isinstance(event, RequestReceived) and one.can_send(event.stream_id):
                    one.send_head(event.stream_id, [(b":status", b"200")])
                    one.queue(event.stream_id, bytes(100_000))
                    one.end(event.stream_id)
            one.pump()
            for stream_id in one.untaken:
                one.take(stream_id)
    except ProtocolError:
        pass


class Peers:
    """A client's and a server's frames, and what is on its way between them."""

    def __init__(self) -> None:
        self.client, self.server = Frames(client_side=True), Frames(client_side=False)
        self.client.open()
        self.server.open()

    def exchange(self) -> tuple[list[Event], list[Event]]:
        """Carry what both say until neither says more: what the client hears, and the server."""
        heard: tuple[list[Event], list[Event]] = ([], [])
        while True:
            self.client.pump()
            self.server.pump()
            up, down = self.client.data_to_send(), self.server.data_to_send()
            if not up and not down:
                return heard
            heard[1].extend(self.server.receive(up))
            heard[0].extend(self.client.receive(down))


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=6), st.integers(0, 300_000))
@settings(max_examples=50, deadline=None)
def test_no_more_comes_than_was_taken_and_a_window(sizes: list[int], left: int) -> None:
    peers = Peers()
    peers.exchange()
    for number, size in enumerate(sizes):
        stream_id = 2 * number + 1
        peers.client.send_head(stream_id, [(b":method", b"POST")])
        peers.client.queue(stream_id, bytes(size))
        peers.client.end(stream_id)
    for _ in range(10):
        peers.exchange()
        held = sum(peers.server._unacknowledged.values())
        assert held <= min(CONNECTION_WINDOW, len(sizes) * STREAM_WINDOW)
        for stream_id in peers.server.untaken:
            peers.server.take(stream_id, min(left, peers.server._unacknowledged[stream_id] // 2))
    assert peers.client.backlog(1) <= sizes[0]
