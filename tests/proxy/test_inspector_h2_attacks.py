"""HTTP/2 attacks on the inspector, frame by frame: the connection that makes them ends, and no other notices."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    ExtensionFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from proxy.inspector import Bounds, core, side
from proxy.inspector.frames import MAX_STREAMS, RESETS, RESETS_PER_S
from tests.proxy.inspecting import HOST, WAIT_S, Rig
from tests.proxy.speaking_http2 import CALM, Client, Heard, Talk, origin_of, rig

MANY = 3000
HEAD = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", HOST.encode()), (b":path", b"/search")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One gate for all attacks: what one leaves behind, the next would meet."""
    with pytest.MonkeyPatch.context() as patch, rig(tmp_path_factory.mktemp("attacks")) as gate:
        patch.setattr(side, "LINGER_S", WAIT_S)  # an attacker reads when all is sent, on a slow machine late
        origin_of(gate).begin = lambda _heard: None
        yield gate


def headers(stream_id: int, block: bytes = b"", *flags: str) -> HeadersFrame:
    return HeadersFrame(stream_id, block, flags=flags)


def request(stream_id: int, *flags: str, head: list[tuple[bytes, bytes]] = HEAD) -> HeadersFrame:
    """A head without a table, so that any number of them stands alone."""
    block = b"".join(b"\x10" + _text(name) + _text(value) for name, value in head)
    return headers(stream_id, block, "END_HEADERS", *flags)


def _text(value: bytes) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value


def data(stream_id: int, content: bytes = b"", *flags: str) -> DataFrame:
    return DataFrame(stream_id, content, flags=flags)


def settings(values: dict[int, int]) -> SettingsFrame:
    return SettingsFrame(0, values)


def attack(gate: Rig, frames: Iterator[Frame | bytes] | list[Frame | bytes]) -> tuple[Client, list[object]]:
    """What the gate says to a client that sends these, and the reasons it records."""
    with Client(gate) as client:
        port = client.sock.getsockname()[1]
        for frame in frames:
            client.raw(frame)
        client.read_to_goaway()
    gate.wait_for(lambda: port not in {one._conversation.source[1] for one in gate.core._inspections})
    return client, [record["reason"] for record in gate.records if record["source.port"] == port]


def check(gate: Rig) -> None:
    """Nobody else notices anything."""
    assert gate.failures == []
    with Client(gate) as client:
        assert client.get().body == b"sunny"


def pair(first: Frame, second: Frame) -> bytes:
    """Both in one segment: no answer can come between them."""
    return first.serialize() + second.serialize()


def resets() -> Iterator[Frame | bytes]:
    for number in range(MANY):
        yield pair(request(2 * number + 1, "END_STREAM"), RstStreamFrame(2 * number + 1, error_code=ErrorCodes.CANCEL))


def provoked(frame: Callable[[int], Frame]) -> Callable[[], Iterator[Frame | bytes]]:
    """MadeYouReset (CVE-2025-8671): the client breaks a rule of each stream, and the server resets it."""

    def frames() -> Iterator[Frame | bytes]:
        for number in range(MANY):
            yield pair(request(2 * number + 1, "END_STREAM"), frame(2 * number + 1))

    return frames


def repeated(frame: Frame | bytes) -> Callable[[], Iterator[Frame | bytes]]:
    return lambda: (frame for _ in range(MANY))


def after_head(frame: Frame) -> Callable[[], Iterator[Frame | bytes]]:
    def frames() -> Iterator[Frame | bytes]:
        yield request(1)
        yield from repeated(frame)()

    return frames


def malformed_heads() -> Iterator[Frame | bytes]:
    return (headers(2 * number + 1, b"", "END_HEADERS", "END_STREAM") for number in range(MANY))


def continuations(content: bytes) -> Callable[[], Iterator[Frame | bytes]]:
    def frames() -> Iterator[Frame | bytes]:
        yield headers(1, content)
        for _ in range(100):
            yield ContinuationFrame(1, content)

    return frames


def bomb() -> Iterator[Frame | bytes]:
    """One entry of 4,000 bytes in the table, then two bytes for each use of it: 16 MB."""
    value = b"a" * 4000
    entry = b"\x40\x01x" + b"\x7f" + _integer(len(value) - 127) + value
    yield headers(1, entry + b"\xbe" * 4000, "END_HEADERS", "END_STREAM")


def _integer(value: int) -> bytes:
    """RFC 7541 5.1, what follows a full prefix."""
    octets = bytearray()
    while value >= 128:
        octets.append(value % 128 | 128)
        value //= 128
    return bytes([*octets, value])


FLOODS: list[tuple[str, Callable[[], Iterator[Frame | bytes]]]] = [
    ("rapid-reset", resets),
    ("made-you-reset-by-window", provoked(lambda stream: WindowUpdateFrame(stream, window_increment=2**31 - 1))),
    ("made-you-reset-by-data", provoked(lambda stream: data(stream, b"late"))),
    ("malformed-heads", malformed_heads),
    ("settings", repeated(settings({SettingCodes.INITIAL_WINDOW_SIZE: 65535}))),
    ("empty-settings", repeated(settings({}))),
    ("settings-acks", repeated(SettingsFrame(0, flags=["ACK"]))),
    ("pings", repeated(PingFrame(0, b"12345678"))),
    ("ping-acks", repeated(PingFrame(0, b"12345678", flags=["ACK"]))),
    ("priorities", repeated(PriorityFrame(1, depends_on=3))),
    ("unknown-frames", repeated(ExtensionFrame(type=0xBE, stream_id=0, flag_byte=0, body=b""))),
    ("window-updates", repeated(WindowUpdateFrame(0, window_increment=1))),
    ("empty-data", after_head(data(1))),
    ("padding-alone", after_head(DataFrame(1, b"", pad_length=10, flags=["PADDED"]))),
    ("continuations", continuations(b"\x00\x01a\x01b" * 1000)),
    ("small-continuations", continuations(b"\x00\x01a\x01b")),
    ("empty-continuations", continuations(b"")),
    ("hpack-bomb", bomb),
]


@pytest.mark.parametrize("frames", [row[1] for row in FLOODS], ids=[row[0] for row in FLOODS])
def test_a_flood_ends_its_connection(shared: Rig, frames: Callable[[], Iterator[Frame | bytes]]) -> None:
    client, reasons = attack(shared, frames())
    assert client.goaway == CALM
    assert reasons.count("http2_flood") == 1
    assert set(reasons) <= {"http2_flood", "client_gone", "malformed_request", "rule"}
    check(shared)


def test_rapid_reset_asks_little_of_the_origin(tmp_path: Path) -> None:
    with rig(tmp_path) as gate:
        began = time.monotonic()
        attack(gate, resets())
        took_s = time.monotonic() - began
        assert len(origin_of(gate).heard) <= RESETS + RESETS_PER_S * took_s + 1
        check(gate)


def test_the_reason_of_a_flood_is_in_its_record(shared: Rig) -> None:
    attack(shared, repeated(PingFrame(0, b"12345678"))())
    record = shared.records[-1]
    assert record["reason"] == "http2_flood"
    assert (record["verdict"], record["stage"], record["server.name"]) == ("deny", "http", HOST)
    assert "http.response.status_code" not in record


def begun(*frames: Frame | bytes) -> list[Frame | bytes]:
    return [request(1), *frames]


def too_much() -> list[Frame | bytes]:
    return [request(1), *(data(1, bytes(16384)) for _ in range(30))]


VIOLATIONS: list[tuple[str, list[Frame | bytes], ErrorCodes]] = [
    ("connection-window-overflow", [WindowUpdateFrame(0, window_increment=2**31 - 1)], ErrorCodes.FLOW_CONTROL_ERROR),
    ("settings-that-overflow-a-window", begun(WindowUpdateFrame(1, window_increment=2**31 - 65536),
     settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})), ErrorCodes.FLOW_CONTROL_ERROR),
    ("window-update-of-nothing", [b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00"], ErrorCodes.PROTOCOL_ERROR),
    ("setting-out-of-range", [b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\xff\xff\xff\xff"],
     ErrorCodes.FLOW_CONTROL_ERROR),
    ("frame-size-out-of-range", [settings({SettingCodes.MAX_FRAME_SIZE: 1})], ErrorCodes.PROTOCOL_ERROR),
    ("settings-on-a-stream", [b"\x00\x00\x00\x04\x00\x00\x00\x00\x01"], ErrorCodes.PROTOCOL_ERROR),
    ("half-a-setting", [b"\x00\x00\x03\x04\x00\x00\x00\x00\x00abc"], ErrorCodes.FRAME_SIZE_ERROR),
    ("short-ping", [b"\x00\x00\x01\x06\x00\x00\x00\x00\x00a"], ErrorCodes.FRAME_SIZE_ERROR),
    ("large-frame", [b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"], ErrorCodes.FRAME_SIZE_ERROR),
    ("padding-longer-than-its-frame", begun(b"\x00\x00\x01\x00\x08\x00\x00\x00\x01\xff"), ErrorCodes.PROTOCOL_ERROR),
    ("data-before-a-head", [data(1, b"a")], ErrorCodes.PROTOCOL_ERROR),
    ("data-on-no-stream", [b"\x00\x00\x01\x00\x00\x00\x00\x00\x00a"], ErrorCodes.PROTOCOL_ERROR),
    ("more-than-its-windows-allow", too_much(), ErrorCodes.FLOW_CONTROL_ERROR),
    ("continuation-of-nothing", [ContinuationFrame(1, b"")], ErrorCodes.PROTOCOL_ERROR),
    ("frame-within-a-head", [headers(1), PingFrame(0, b"12345678")], ErrorCodes.PROTOCOL_ERROR),
    ("continuation-of-another-stream", [headers(1), ContinuationFrame(3, b"")], ErrorCodes.PROTOCOL_ERROR),
    ("even-stream", [request(2, "END_STREAM")], ErrorCodes.PROTOCOL_ERROR),
    ("lower-stream", [request(5, "END_STREAM"), request(3, "END_STREAM")], ErrorCodes.PROTOCOL_ERROR),
    ("second-head-that-does-not-end", begun(request(1)), ErrorCodes.PROTOCOL_ERROR),
    ("reset-of-nothing", [RstStreamFrame(9)], ErrorCodes.PROTOCOL_ERROR),
    ("depends-on-itself", [PriorityFrame(1, depends_on=1)], ErrorCodes.PROTOCOL_ERROR),
    ("push", [PushPromiseFrame(1, 2, b"", flags=["END_HEADERS"])], ErrorCodes.PROTOCOL_ERROR),
    ("index-beyond-the-table", [headers(1, b"\xff\xff\x01", "END_HEADERS")], ErrorCodes.PROTOCOL_ERROR),
    ("half-a-field", [headers(1, b"\x00\x7f", "END_HEADERS")], ErrorCodes.PROTOCOL_ERROR),
    ("table-larger-than-allowed", [headers(1, b"\x3f\xe1\xff\x03", "END_HEADERS")], ErrorCodes.PROTOCOL_ERROR),
    ("endless-integer", [headers(1, b"\x7f" + b"\xff" * 5000, "END_HEADERS")], ErrorCodes.PROTOCOL_ERROR),
]  # fmt: skip


@pytest.mark.parametrize(("frames", "code"), [row[1:] for row in VIOLATIONS], ids=[row[0] for row in VIOLATIONS])
def test_a_broken_rule_of_the_connection_ends_it(shared: Rig, frames: list[Frame | bytes], code: ErrorCodes) -> None:
    client, reasons = attack(shared, frames)
    assert client.goaway == code
    assert reasons.count("malformed_request") == 1
    check(shared)


def test_a_stream_that_ended_cannot_be_used_again(shared: Rig) -> None:
    with Client(shared) as client:
        assert client.get().status == 200
        client.raw(request(1, "END_STREAM"))
        client.read_to_goaway()
    assert client.goaway == ErrorCodes.STREAM_CLOSED
    check(shared)


def test_data_on_streams_that_are_over_is_borne_a_while(shared: Rig) -> None:
    """A denied upload leaves some on its way."""
    with Client(shared) as client:
        stream = client.send("/forecasts", method="POST", ends=False)
        client.read_until(lambda: client.responses[stream].reset is not None)
        for _ in range(100):
            client.raw(data(stream, bytes(1000)))
        assert client.get().status == 200
        for _ in range(MANY):
            client.raw(data(stream, b"a"))
        client.read_to_goaway()
    assert client.goaway == CALM
    check(shared)


def test_something_else_than_http2_is_refused(shared: Rig) -> None:
    before = len(shared.records)
    with Client.__new__(Client) as client:
        Client.open(client, shared)
        client.sock.sendall(b"GET / HTTP/1.1\r\nHost: weather.test\r\n\r\n")
        client.read_to_goaway()
    assert client.goaway == ErrorCodes.PROTOCOL_ERROR
    assert "malformed_request" in [record["reason"] for record in shared.wait_for_records(before + 1)[before:]]
    check(shared)


def test_one_stream_too_many_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = lambda heard: None if heard[":path"] == "/search" else heard.respond()
        waiting = [client.send() for _ in range(MAX_STREAMS)]
        gate.wait_for(lambda: len(origin_of(gate).heard) == MAX_STREAMS)
        client.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
        client.h2.remote_settings.acknowledge()
        assert client.get().reset == ErrorCodes.REFUSED_STREAM
        client.h2.reset_stream(waiting[0], ErrorCodes.CANCEL)
        assert client.get("/search/next").body == b"sunny"
        assert gate.failures == []


def test_a_table_that_the_client_offers_is_not_filled(tmp_path: Path) -> None:
    """Each denial has a new id: in a table of 4 GB they would all stay."""
    with rig(tmp_path) as gate, Client(gate) as client:
        client.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: 2**32 - 1})
        client.flush()
        for _ in range(50):
            assert client.get("/forecasts").status == 403
        (inspection,) = gate.core._inspections
        encoder = inspection._http.client_side.frames.encoder  # type: ignore[union-attr]  # HTTP/2's
        assert encoder.header_table._current_size <= 4096


@pytest.mark.parametrize(
    "frames",
    [[b"PRI * HTTP/2.0\r\n"], [headers(1, b"\x82")], [b"\x00\x00\x50\x01\x00"], [b"\x00"]],
    ids=["half-a-preface", "head-without-end", "half-a-frame", "one-byte"],
)
def test_a_head_dribbled_for_too_long_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: list[Frame | bytes]
) -> None:
    monkeypatch.setattr(core, "SWEEP_S", 0.1)
    with rig(tmp_path, bounds=Bounds(head_s=0.3)) as gate:
        with Client.__new__(Client) as client:
            Client.open(client, gate)
            if frames[0] != b"PRI * HTTP/2.0\r\n":
                client.begin()
            client.raw(*frames)
            client.read_to_goaway()
        assert client.goaway == ErrorCodes.NO_ERROR
        assert [record["reason"] for record in gate.wait_for_records(1)] == ["hello_timeout"]


# --- origins

HARM: list[tuple[str, Callable[[Talk], None]]] = [
    ("garbage", lambda talk: talk.raw(b"\xff" * 100)),
    ("http1", lambda talk: talk.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsunny")),
    ("pings", lambda talk: talk.raw(*[PingFrame(0, b"12345678")] * MANY)),
    ("settings", lambda talk: talk.raw(*[settings({})] * MANY)),
    ("resets", lambda talk: talk.raw(*[RstStreamFrame(1)] * MANY)),
    ("window-overflow", lambda talk: talk.raw(WindowUpdateFrame(0, window_increment=2**31 - 1))),
    ("push", lambda talk: talk.raw(PushPromiseFrame(1, 2, Encoder().encode(HEAD), flags=["END_HEADERS"]))),
    ("hpack-bomb", lambda talk: talk.raw(*bomb())),
    ("continuations", lambda talk: talk.raw(*continuations(b"\x00\x01a\x01b" * 1000)())),
    ("head-of-nothing", lambda talk: talk.raw(headers(99, b"\x88", "END_HEADERS"))),
    ("informational-for-ever", lambda talk: talk.raw(*[headers(1, b"\x08\x03103", "END_HEADERS")] * 100)),
    ("more-than-its-windows-allow", lambda talk: talk.raw(headers(1, b"\x88", "END_HEADERS"),
     *[data(1, bytes(16384))] * 400)),
]  # fmt: skip


@pytest.mark.parametrize("harm", [row[1] for row in HARM], ids=[row[0] for row in HARM])
def test_an_origin_that_does_harm_fails_its_own_streams(tmp_path: Path, harm: Callable[[Talk], None]) -> None:
    def answer(heard: Heard) -> None:
        harm(heard.talk)

    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = answer
        found = client.get()
        assert found.reason == "upstream_failed" or (found.status == 200 and found.reset is not None)
        assert [record["reason"] for record in gate.wait_for_records(1)] == ["upstream_failed"]
        origin_of(gate).answer = Heard.respond
        assert client.get().body == b"sunny"
        check(gate)


def test_random_frames_crash_nothing(shared: Rig) -> None:
    for seed in range(30):
        chance = random.Random(seed)
        with Client(shared) as client:
            client.raw(request(1))
            for _ in range(chance.randrange(1, 12)):
                kind, flags = chance.randrange(11), chance.choice([0, 1, 4, 5, 8, chance.randrange(256)])
                body = chance.randbytes(chance.choice([0, 4, 5, 8, chance.randrange(40)]))
                stream_id = chance.choice([0, 1, 3, 5])
                client.raw(len(body).to_bytes(3) + bytes([kind, flags]) + stream_id.to_bytes(4) + body)
    check(shared)


def test_many_bad_connections_leave_nothing_behind(shared: Rig) -> None:
    def connections() -> Any:
        async def count() -> tuple[int, int]:
            return len(shared.core._inspections), len(shared.core.conversations)

        return asyncio.run_coroutine_threadsafe(count(), shared.loop).result(WAIT_S)

    for _ in range(5):
        attack(shared, [request(1), b"\xff" * 100])
    shared.wait_for(lambda: connections() == (0, 0))
    assert connections() == (0, 0)
