"""What one connection, one source and all of them may take of the lane: time by the byte, and memory by fair parts."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.inspector import Bounds
from proxy.lane.bounds import LEAST_SHARE, Budget, Share
from proxy.lane.pace import Pace
from tests.proxy.inspecting import HOST, POLICY, WAIT_S, Rig, get, read_reply, response

UPGRADES = POLICY.replace("        name: weather\n", "        name: weather\n        upgrade: [websocket]\n")
SOON = Bounds(idle_s=0.6, least_rate=1000)
BEAT_S = 0.05  # well within idle_s: something moves all the time
MIB = 1 << 20


class Drip:
    """An origin's, or a client's, byte now and then, until the test is over or nobody takes it."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.was_cut = False

    def run(self, send: Callable[[], object]) -> None:
        while not self.is_over.wait(BEAT_S):
            try:
                send()
            except OSError:
                self.was_cut = True
                return


def read_all(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


@pytest.fixture
def drip() -> Iterator[Drip]:
    it = Drip()
    yield it
    it.is_over.set()


# --- a byte now and then is no transfer ------------------------------------------------------------------------------


def test_a_body_that_trickles_in_is_answered_408(tmp_path: Path, drip: Drip) -> None:
    with Rig(tmp_path, bounds=SOON, in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/search", method="POST", fields="Content-Length: 100000\r\n"))
        threading.Thread(target=drip.run, args=(lambda: sock.sendall(b"x"),)).start()
        reply, _ = read_reply(sock)
        drip.is_over.set()
        assert (reply.status, reply.reason) == (408, "too_slow")
        record = rig.wait_for_records(1)[0]
        assert (record["verdict"], record["reason"]) == ("deny", "too_slow")


def test_an_answer_of_known_length_that_trickles_is_cut(tmp_path: Path, drip: Drip) -> None:
    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        drip.run(lambda: sock.sendall(b"x"))

    with Rig(tmp_path, bounds=SOON, respond=respond, in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/search"))
        with pytest.raises((ConnectionResetError, ssl.SSLError)):  # not the end of a body
            read_all(sock)
        assert rig.wait_for_records(1)[0]["reason"] == "too_slow"
        rig.wait_for(lambda: drip.was_cut)
        assert drip.was_cut


def test_a_reader_of_a_byte_now_and_then_is_cut(tmp_path: Path, drip: Drip) -> None:
    body = bytes(20 * MIB)
    with Rig(tmp_path, bounds=SOON, respond=lambda *_: response(body), in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/search"))
        threading.Thread(target=drip.run, args=(lambda: sock.recv(1),)).start()
        assert rig.wait_for_records(1)[0]["reason"] == "too_slow"
        rig.wait_for(lambda: not rig.lane.open_connections)
        assert (rig.lane.open_connections, rig.lane.held_bytes) == (0, 0)


def test_an_origin_that_takes_no_upload_holds_nobody_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    with Rig(tmp_path, bounds=SOON, in_lane=True) as rig, rig.connect() as sock:
        monkeypatch.setattr(rig.origin, "converse", lambda _sock: stop.wait(WAIT_S))
        sock.settimeout(WAIT_S)
        sock.sendall(get("/search", method="PUT", fields=f"Content-Length: {50 * MIB}\r\n"))
        sending = threading.Thread(target=_send_all, args=(sock, bytes(50 * MIB)))
        sending.start()
        assert rig.wait_for_records(1)[0]["reason"] == "client_gone"  # nothing moves at all, so silence ends it first
        rig.wait_for(lambda: not rig.lane.held_bytes)
        assert rig.lane.held_bytes == 0
        stop.set()
        sock.close()
        sending.join(WAIT_S)


def _send_all(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except (OSError, ValueError):
        pass


def test_a_stream_may_be_as_slow_as_it_likes(tmp_path: Path) -> None:
    """Server-sent events: nobody has said how much is to come, and each is on its way at once."""

    def respond(_request: bytes, sock: socket.socket) -> bytes:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(30):
            time.sleep(BEAT_S)
            sock.sendall(b"2\r\n:\n\r\n")
        return b"0\r\n\r\n"

    with Rig(tmp_path, bounds=SOON, respond=respond, in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/search", fields="Connection: close\r\n"))
        received = b""
        while data := sock.recv(65536):
            received += data
        assert received.count(b":\n") == 30
        assert received.endswith(b"0\r\n\r\n")
        assert rig.wait_for_records(1)[0]["reason"] == "rule"


def test_an_answer_that_is_thought_about_is_waited_for(tmp_path: Path) -> None:
    """A long poll: nothing moves, and nothing is owed. Silence alone ends it, at idle_s."""

    def respond(_request: bytes, _sock: socket.socket) -> bytes:
        time.sleep(0.4)
        return response()

    with Rig(tmp_path, bounds=SOON, respond=respond, in_lane=True) as rig, rig.connect() as sock:
        for _ in range(4):
            sock.sendall(get("/search"))
            assert read_reply(sock)[0].status == 200


# --- and nothing lasts for ever --------------------------------------------------------------------------------------


def test_a_stream_ends_at_the_total(tmp_path: Path, drip: Drip) -> None:
    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        drip.run(lambda: sock.sendall(b"1\r\nx\r\n"))

    bounds = replace(SOON, total_s=1.0)
    with Rig(tmp_path, bounds=bounds, respond=respond, in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/search"))
        with pytest.raises((ConnectionResetError, ssl.SSLError)):
            read_all(sock)
        assert rig.wait_for_records(1)[0]["reason"] == "too_slow"


def test_a_tunnel_ends_at_the_total(tmp_path: Path, drip: Drip) -> None:
    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        drip.run(lambda: sock.sendall(b"x"))

    bounds = replace(SOON, total_s=1.0)
    with Rig(tmp_path, policy=UPGRADES, bounds=bounds, respond=respond, in_lane=True) as rig, rig.connect() as sock:
        sock.sendall(get("/search", fields="Connection: Upgrade\r\nUpgrade: websocket\r\n"))
        assert rig.wait_for_records(1)[0]["reason"] == "too_slow"
        rig.wait_for(lambda: drip.was_cut)
        assert drip.was_cut


def test_many_requests_on_one_connection_are_each_counted_alone(tmp_path: Path) -> None:
    with Rig(tmp_path, bounds=replace(SOON, total_s=1.0), in_lane=True) as rig, rig.connect() as sock:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            sock.sendall(get("/search"))
            assert read_reply(sock)[0].status == 200
            time.sleep(BEAT_S)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_who_makes_memory_scarce_is_refused_and_nobody_else(tmp_path: Path) -> None:
    body = bytes(8 * MIB)
    bounds = Bounds(waiting=2 * MIB)
    with Rig(tmp_path, bounds=bounds, respond=lambda *_: response(body), in_lane=True) as rig, ExitStack() as stack:
        stalled = [stack.enter_context(_from(rig, "127.0.0.1")) for _ in range(16)]
        for sock in stalled:
            sock.sendall(get("/search"))
        rig.wait_for(lambda: rig.lane.held_bytes > LEAST_SHARE)
        rig.origin.respond = lambda *_: response()
        with _from(rig, "127.0.0.1") as sock:
            sock.sendall(get("/search"))
            refused, _ = read_reply(sock)
            assert (refused.status, refused.reason) == (503, "overloaded")
        with _from(rig, "127.0.0.2") as sock:
            sock.sendall(get("/search"))
            assert read_reply(sock)[0].status == 200
        assert rig.lane.held_bytes < 2 * MIB
        for sock in stalled:
            sock.close()
        rig.wait_for(lambda: rig.lane.held_bytes == 0)
        with _from(rig, "127.0.0.1") as sock:
            sock.sendall(get("/search"))
            assert read_reply(sock)[0].status == 200
        assert rig.lane.held_bytes == 0


def test_a_download_goes_on_while_memory_is_scarce_by_smaller_steps(tmp_path: Path) -> None:
    body = bytes(12 * MIB)
    bounds = Bounds(waiting=MIB + MIB // 8)
    with Rig(tmp_path, bounds=bounds, respond=lambda *_: response(body), in_lane=True) as rig, ExitStack() as stack:
        socks = [stack.enter_context(_from(rig, "127.0.0.1")) for _ in range(6)]
        for sock in socks:
            sock.sendall(get("/search"))
        rig.wait_for(lambda: rig.lane.held_bytes > LEAST_SHARE)
        for sock in socks:
            reply, _ = read_reply(sock)
            assert reply.status == 503 or len(reply.body) == len(body)


def _from(rig: Rig, source: str) -> ssl.SSLSocket:
    sock = socket.create_connection(("127.0.0.1", rig.port), WAIT_S, source_address=(source, 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    return rig.context().wrap_socket(sock, server_hostname=HOST)


# --- the parts -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4 * MIB)), max_size=40))
def test_a_source_that_holds_nothing_is_never_refused_and_one_that_holds_most_is_when_memory_is_out(
    held: list[tuple[int, int]],
) -> None:
    budget = Budget(100, 100, 8 * MIB)
    shares: dict[int, Share] = {}
    for source, size in held:
        share = shares.get(source) or budget.enter(str(source))
        assert share is not None
        shares[source] = share
        share.add(size)
    newcomer = budget.enter("newcomer")
    assert newcomer is not None
    assert not newcomer.is_exceeded
    assert budget.held == sum(size for _, size in held)
    if budget.held >= 8 * MIB:
        assert max(shares.values(), key=lambda share: share.held).is_exceeded


def test_nobody_is_refused_while_there_is_room() -> None:
    budget = Budget(10, 10, 64 * MIB)
    share = budget.enter("one")
    assert share is not None
    share.add(31 * MIB)
    before = share.is_exceeded
    share.add(MIB)
    assert (before, share.is_exceeded) == (False, True)
    others = [budget.enter(f"{number}") for number in range(2)]
    assert share.is_exceeded
    assert not any(other is None or other.is_exceeded for other in others)


def test_a_pace_of_zero_asks_for_anything_but_silence() -> None:
    pace = Pace(least_rate=0, window_s=1.0, total_s=100.0)
    assert [pace.look(float(now), "request", now) for now in range(50)] == [""] * 50
    assert pace.look(50.0, "request", 49) == "0 bytes of a body in 1 s are no transfer"


def test_a_pace_looks_at_each_window_by_itself() -> None:
    """A fast beginning does not buy a slow rest."""
    pace = Pace(least_rate=10, window_s=10.0, total_s=1000.0)
    moved = [0, 10_000, 10_000]
    assert [bool(pace.look(10.0 * at, "request", size)) for at, size in enumerate(moved)] == [False, False, True]


def test_a_pace_forgets_the_request_before() -> None:
    pace = Pace(least_rate=10, window_s=10.0, total_s=15.0)
    for at in range(30):
        assert pace.look(float(at), f"request {at // 9}", 0) == ""
