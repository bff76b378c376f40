"""Slow readers, large bodies and many streams over HTTP/2: what waits is bounded, and nobody waits for another."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest
from h2.settings import SettingCodes

from proxy.inspector import Bounds, core
from proxy.inspector.frames import CONNECTION_WINDOW, STREAM_WINDOW
from proxy.inspector.http2 import MAX_WAITING
from proxy.inspector.side import WRITE_BUFFER
from tests.proxy.inspecting import WAIT_S, Rig, response
from tests.proxy.speaking_http2 import Client, Heard, origin_of, rig


def reasons(gate: Rig, count: int = 1) -> list[object]:
    return [record["reason"] for record in gate.wait_for_records(count)]


MIB = 1024 * 1024
READ = 256 * 1024  # what asyncio reads at once


def buffered(gate: Rig) -> int:
    """Bytes of bodies that the gate holds: behind windows, before their origin is there, in its sockets."""

    async def count() -> int:
        total = 0
        for inspection in gate.core._inspections:
            for side in inspection._sides.values():
                total += side.transport.get_write_buffer_size()
            for layer in inspection._http.connections.values():
                frames = getattr(getattr(layer, "child_layer", layer), "frames", None)
                total += sum(one.size for one in frames._outgoing.values()) if frames else 0
            for stream in inspection._http.streams.values():
                total += sum(len(getattr(event, "data", b"")) for event in stream._paused_event_queue)
        return total

    return asyncio.run_coroutine_threadsafe(count(), gate.loop).result(WAIT_S)


def settled(gate: Rig) -> int:
    """The same, when it does not change any more."""
    seen = [-1]

    def is_steady() -> bool:
        seen.append(buffered(gate))
        return len(seen) > 5 and len(set(seen[-5:])) == 1

    gate.wait_for(is_steady)
    return seen[-1]


def send_until_held(client: Client, stream: int) -> int:
    """Send a body that has no end until no window opens any more; how much that was."""
    sent = 0
    while sent < 64 * MIB:
        if room := min(client.h2.local_flow_control_window(stream), 16384):
            client.h2.send_data(stream, bytes(room))
            client.flush()
            sent += room
        elif not client.read(0.5):
            break
    return sent


def test_a_client_that_never_opens_its_window_holds_one_window_and_no_more(tmp_path: Path) -> None:
    """mitmproxy would take all of it: 131 MB for one such stream."""
    with rig(tmp_path) as gate, Client(gate, acknowledges=False) as client:
        origin_of(gate).answer = lambda heard: heard.respond(bytes(100 * MIB if "large" in heard[":path"] else 5))
        large = client.send("/search/large")
        client.read_until(lambda: client.responses[large].received == 65535)
        held = settled(gate)
        assert 0 < held <= STREAM_WINDOW
        client.open_connection(MIB)
        assert client.get().received == 5
        assert settled(gate) == held


def test_a_client_that_opens_its_window_late_gets_all_of_it(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate, acknowledges=False) as client:
        origin_of(gate).answer = lambda heard: heard.respond(bytes(3 * MIB), trailers=[("x", "y")])
        stream = client.send()
        client.read_until(lambda: client.responses[stream].received == 65535)
        settled(gate)
        client.acknowledges = True
        client.h2.increment_flow_control_window(MIB)
        client.h2.increment_flow_control_window(MIB, stream)
        client.flush()
        found = client.wait(stream)
        assert (found.received, found.trailers) == (3 * MIB, [("x", "y")])


def test_stalled_streams_leave_room_for_the_others(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate, acknowledges=False) as client:
        origin_of(gate).answer = lambda heard: heard.respond(bytes(2 * MIB if "large" in heard[":path"] else 5))
        client.open_connection(64 * MIB)
        stalled = [client.send("/search/large") for _ in range(12)]
        client.read_until(lambda: all(client.responses[stream].received == 65535 for stream in stalled))
        assert settled(gate) <= CONNECTION_WINDOW
        for _ in range(10):
            assert client.get().received == 5
        assert {client.responses[stream].has_ended for stream in stalled} == {False}


@pytest.mark.parametrize("opens", [False, True], ids=["stays-away", "comes-back"])
def test_an_http1_origin_is_not_read_while_its_client_does_not_read(tmp_path: Path, opens: bool) -> None:
    def respond(request: bytes, _sock: socket.socket) -> bytes:
        return response(bytes(32 * MIB if b"large" in request else 5))

    with Rig(tmp_path, respond=respond) as gate, Client(gate, acknowledges=False) as client:
        large = client.send("/search/large")
        client.read_until(lambda: client.responses[large].received == 65535)
        assert settled(gate) <= MAX_WAITING + READ
        client.open_connection(MIB)
        assert client.get().received == 5
        if opens:
            client.acknowledges = True
            client.h2.increment_flow_control_window(MIB)
            client.h2.increment_flow_control_window(MIB, large)
            client.flush()
            assert client.wait(large).received == 32 * MIB


def test_an_upload_that_the_origin_does_not_take_is_held_at_its_source(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).acknowledges = False
        stream = client.send(method="POST", ends=False)
        sent = send_until_held(client, stream)
        assert 65535 < sent <= 65535 + STREAM_WINDOW
        assert buffered(gate) <= STREAM_WINDOW
        assert client.get().status == 200


def test_the_rest_of_an_upload_goes_on_when_its_response_is_over(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).acknowledges = False
        origin_of(gate).begin = lambda heard: heard.respond(b"early")
        origin_of(gate).answer = lambda _heard: None
        stream = client.send(method="POST", ends=False)
        assert client.wait(stream).body == b"early"
        assert client.upload(stream, 200_000) == 200_000
        heard = origin_of(gate).heard[0]
        gate.wait_for(lambda: heard.received == 65535)
        assert settled(gate) == 200_000 - 65535
        for window in (None, heard.stream_id):
            heard.talk.h2.increment_flow_control_window(MIB, window)
        heard.talk.flush()
        gate.wait_for(lambda: heard.has_ended)
        assert (heard.received, heard.reset) == (200_000, None)


def test_an_upload_that_an_http1_origin_does_not_read_is_held_at_its_source(tmp_path: Path) -> None:
    release = threading.Event()

    with Rig(tmp_path) as gate:
        gate.origin._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        really_read = gate.origin._read

        def read(sock: socket.socket, so_far: bytes) -> tuple[bytes, bytes] | None:
            if b"POST" in (first := so_far or sock.recv(4096)):
                release.wait(WAIT_S)
            return really_read(sock, first)

        gate.origin._read = read  # type: ignore[method-assign,assignment]
        with Client(gate) as client:
            stream = client.send(method="POST", ends=False)
            sent = send_until_held(client, stream)
            assert sent < 16 * MIB  # the kernel's buffer on the way to the origin
            assert buffered(gate) <= WRITE_BUFFER + STREAM_WINDOW + READ
            assert client.get().status == 200
            release.set()
            client.h2.end_stream(stream)
            client.flush()
            assert client.wait(stream).status == 200


def test_a_body_that_comes_before_its_origin_is_there_waits_in_one_window(tmp_path: Path) -> None:
    with rig(tmp_path) as gate:
        with Client(gate) as client:
            assert client.get().status == 200  # what the origin speaks is known: the next one dials late
        really_open, may_open = gate.core.upstream.open, threading.Event()

        async def open_late(*arguments: object, **options: object) -> asyncio.Transport:
            while not may_open.is_set():  # noqa: ASYNC110 - another thread sets it
                await asyncio.sleep(0.01)
            return await really_open(*arguments, **options)  # type: ignore[arg-type]  # passed on

        gate.core.upstream.open = open_late  # type: ignore[method-assign]
        with Client(gate) as client:
            stream = client.send(method="POST", ends=False)
            sent = send_until_held(client, stream)
            assert sent <= STREAM_WINDOW
            assert buffered(gate) <= STREAM_WINDOW
            may_open.set()
            assert client.upload(stream, MIB) == MIB
            assert client.wait(stream).status == 200
            assert origin_of(gate).heard[-1].received == sent + MIB


def test_a_client_that_does_not_read_its_socket_is_not_read_either(tmp_path: Path) -> None:
    """Each answer has a window of its own: only reading no further bounds what waits in the socket."""
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = lambda heard: heard.respond(bytes(60_000))
        client.open_connection(1 << 29)
        gate.wait_for(lambda: gate.core._inspections)
        (inspection,) = gate.core._inspections

        def is_held_or_done() -> bool:
            return bool(inspection.client._holds) or len(gate.records) == len(client.responses)

        while not inspection.client._holds and len(client.responses) < 100_000:
            for _ in range(50):
                client.send()
            client.h2.streams.clear()  # h2 would keep to the number of streams that the gate allows
            gate.wait_for(is_held_or_done)
        assert inspection.client._holds
        assert settled(gate) <= CONNECTION_WINDOW + WRITE_BUFFER + READ
        assert inspection.client.transport.get_write_buffer_size() <= WRITE_BUFFER + 2 * READ
        assert set(reasons(gate)) == {"rule"}


def test_large_bodies_pass_both_ways_at_once_and_leave_nothing_behind(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).begin = lambda heard: heard.respond(bytes(8 * MIB))
        origin_of(gate).answer = lambda _heard: None
        streams = [client.send(method="POST", ends=False) for _ in range(3)]
        most = 0
        for stream in streams:
            assert client.upload(stream, 8 * MIB) == 8 * MIB
            most = max(most, buffered(gate))
        assert {client.wait(stream).received for stream in streams} == {8 * MIB}
        gate.wait_for(lambda: all(heard.received == 8 * MIB for heard in origin_of(gate).heard))
        assert most <= 2 * CONNECTION_WINDOW
        assert settled(gate) == 0
        records = gate.wait_for_records(3)
        assert {record["bytes.received"] for record in records} == {8 * MIB}


def test_a_zero_window_held_open_ends_with_the_idle_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2019-9517: a response that its client never takes, while the connection itself looks busy."""
    monkeypatch.setattr(core, "SWEEP_S", 0.1)
    with rig(tmp_path, bounds=Bounds(idle_s=0.5)) as gate, Client(gate, acknowledges=False) as client:
        origin_of(gate).answer = lambda heard: heard.respond(bytes(MIB if "large" in heard[":path"] else 5))
        large = client.send("/search/large")
        client.read_until(lambda: client.responses[large].received == 65535)
        client.open_connection(MIB)
        while not client.responses[large].is_over:
            assert client.get().received == 5
        assert client.responses[large].reset is not None
        assert settled(gate) == 0


def test_frames_that_are_too_many_for_one_turn_are_read_in_several(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        stream = client.send(method="POST", ends=False)
        for _ in range(3000):
            client.h2.send_data(stream, b"a")
        client.h2.end_stream(stream)
        client.flush()
        assert client.wait(stream).status == 200
        assert origin_of(gate).heard[0].received == 3000


def test_padding_counts_as_taken(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        stream = client.send(method="POST", ends=False)
        for _ in range(3000):  # 768,000 bytes of padding
            while client.h2.local_flow_control_window(stream) < 300:
                assert client.read()
            client.h2.send_data(stream, b"a", pad_length=255)
            client.flush()
        client.h2.end_stream(stream)
        client.flush()
        assert client.wait(stream).status == 200
        assert origin_of(gate).heard[0].received == 3000


def test_small_windows_and_changing_ones_are_kept_to(tmp_path: Path) -> None:
    with rig(tmp_path) as gate, Client(gate) as client:
        origin_of(gate).answer = lambda heard: heard.respond(bytes(100_000))
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 100})
        client.flush()
        stream = client.send()
        client.read_until(lambda: client.responses[stream].received >= 100)
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 200_000})
        client.flush()
        assert client.wait(stream).received == 100_000
        assert isinstance(origin_of(gate).heard[0], Heard)
