"""`upstreamPool: true`: what one client leaves, another of its workload may use, and nobody else, and nothing odd."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.load import Source
from proxy.lane import pool
from proxy.policy_files import load_sources
from tests.proxy.inspecting import HOST, POLICY, WORKLOAD, Reply, Rig, get, read_reply, response

POOLED = POLICY.replace("        name: weather\n", "        name: weather\n        upstreamPool: true\n")
TWO = f"""
version: 1
workloads:
  {WORKLOAD}:
    match: {{address: [127.0.0.1/32]}}
    rules: [{{host: {HOST}, tls: inspect, upstreamPool: true}}]
  other:
    match: {{address: [127.0.0.2/32]}}
    rules: [{{host: {HOST}, tls: inspect, upstreamPool: true}}]
"""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, policy=POOLED, in_lane=True) as it:
        yield it
    assert it.failures == []


def ask(rig: Rig, request: bytes | None = None, *, waits: int | None = 1) -> Reply:
    """One request on a connection of its own, once so many connections to the origin wait that it has left."""
    with rig.connect() as sock:
        sock.sendall(request or get("/search"))
        reply, _ = read_reply(sock)
    if waits is not None:
        rig.wait_for(lambda: rig.lane.pooled == waits)
        assert rig.lane.pooled == waits
    return reply


def swap(rig: Rig, text: str) -> None:
    def carry_out() -> None:
        rig.in_force.policy = load_sources([Source("p.yaml", text)])
        rig.lane.swap()

    rig.loop.call_soon_threadsafe(carry_out)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_another_client_of_the_workload_is_given_the_connection(rig: Rig) -> None:
    assert [ask(rig).status for _ in range(5)] == [200] * 5
    assert rig.origin.connections == 1
    assert [record["reason"] for record in rig.wait_for_records(5)] == ["rule"] * 5


def test_a_client_that_says_it_closes_leaves_a_connection_all_the_same(rig: Rig) -> None:
    assert ask(rig, get("/search", fields="Connection: close\r\n")).status == 200
    assert ask(rig).status == 200
    assert rig.origin.connections == 1


def test_how_many_wait_is_told(rig: Rig) -> None:
    ask(rig)
    assert rig.lane.stats() == {
        "outgate_connections_inspected": 0,
        "outgate_leaves_remembered": 1,
        "outgate_lane_waiting_bytes": 0,
        "outgate_upstreams_pooled": 1,
    }


def test_without_the_key_nothing_is_kept(tmp_path: Path) -> None:
    with Rig(tmp_path, in_lane=True) as rig:
        assert [ask(rig, waits=0).status for _ in range(2)] == [200, 200]
        assert rig.origin.connections == 2


def test_two_clients_at_once_have_two(rig: Rig) -> None:
    with rig.connect() as first, rig.connect() as second:
        for sock in (first, second, first, second):
            sock.sendall(get("/search"))
            assert read_reply(sock)[0].status == 200
    rig.wait_for(lambda: rig.lane.pooled == 2)
    assert (rig.lane.pooled, rig.origin.connections) == (2, 2)


# --- whose it is -----------------------------------------------------------------------------------------------------


def send_from(rig: Rig, source: str) -> int:
    plain = socket.create_connection(("127.0.0.1", rig.port), source_address=(source, 0))
    with rig.context().wrap_socket(plain, server_hostname=HOST) as sock:
        sock.sendall(get("/search"))
        return read_reply(sock)[0].status


def test_no_other_workload_is_given_it(tmp_path: Path) -> None:
    with Rig(tmp_path, policy=TWO, workload=None, in_lane=True) as rig:
        assert send_from(rig, "127.0.0.1") == 200
        rig.wait_for(lambda: rig.lane.pooled == 1)
        assert send_from(rig, "127.0.0.2") == 200
        rig.wait_for(lambda: rig.lane.pooled == 2)
        assert rig.origin.connections == 2
        assert send_from(rig, "127.0.0.2") == 200
        assert rig.origin.connections == 2
    assert [record["workload"] for record in rig.records] == [WORKLOAD, "other", "other"]


def test_a_policy_that_takes_the_right_away_closes_what_waits(rig: Rig) -> None:
    ask(rig)
    swap(rig, POLICY)
    rig.wait_for(lambda: rig.lane.pooled == 0)
    assert ask(rig, waits=0).status == 200
    assert rig.origin.connections == 2


def test_what_was_asked_under_a_former_policy_is_not_kept_by_the_next(rig: Rig) -> None:
    with rig.connect() as sock:
        sock.sendall(get("/search"))
        assert read_reply(sock)[0].status == 200
        swap(rig, POOLED.replace("weather\n", "weather-too\n"))
        rig.wait_for(lambda: rig.lane._judge.generation == rig.in_force.policy.generation)
    ask(rig)
    assert rig.origin.connections == 2


# --- what is not fit to wait -----------------------------------------------------------------------------------------

ODD = {
    "the origin says it closes": (get("/search"), response(fields="Connection: close\r\n")),
    "HTTP/1.0": (get("/search"), b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "bytes behind the answer": (get("/search"), response() + b"HTTP/1.1 200 OK\r\n"),
    "a body that the end delimits": (get("/search"), b"HTTP/1.1 200 OK\r\n\r\nbody"),
    "NTLM is asked for": (get("/search"), response(status="401 U", fields="WWW-Authenticate: NTLM\r\n")),
    "Negotiate in a list": (
        get("/search"),
        response(status="401 U", fields='WWW-Authenticate: Basic realm="x", Negotiate\r\n'),
    ),
    "a proxy's NTLM": (get("/search"), response(status="407 P", fields="Proxy-Authenticate: NTLM\r\n")),
    "NTLM is given": (get("/search", fields="Authorization: NTLM TlRMTVNTUAAB\r\n"), response()),
    "early hints": (get("/search"), b"HTTP/1.1 103 Early Hints\r\n\r\n" + response()),
    "100 unasked": (get("/search"), b"HTTP/1.1 100 Continue\r\n\r\n" + response()),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_connection_with_anything_odd_about_it_is_given_to_nobody(rig: Rig, odd: str) -> None:
    request, answer = ODD[odd]

    def respond(_request: bytes, sock: socket.socket) -> bytes | None:
        if odd != "a body that the end delimits":
            return answer
        sock.sendall(answer)
        return None

    rig.origin.respond = respond
    with rig.connect() as sock:
        sock.sendall(request)
        assert read_reply(sock)[0].status > 0
    rig.wait_for_records(1)
    rig.origin.respond = lambda _head, _sock: response()
    assert ask(rig).status == 200
    assert rig.origin.connections == 2


def test_an_answer_that_came_before_the_body_ends_the_connection(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.origin, "_read", lambda sock, _buffered: (sock.recv(4096), b""))  # and no body
    with rig.connect() as sock:
        sock.sendall(get("/search", method="POST", fields="Content-Length: 100000\r\n"))
        assert read_reply(sock)[0].status == 200
    rig.wait_for_records(1)
    assert rig.lane.pooled == 0


def test_one_that_speaks_unasked_is_closed(rig: Rig) -> None:
    speakers: list[socket.socket] = []

    def respond(_request: bytes, sock: socket.socket) -> bytes:
        speakers.append(sock)
        return response()

    rig.origin.respond = respond
    ask(rig)
    speakers[0].sendall(response(b"an answer to what the next client asks"))
    rig.wait_for(lambda: rig.lane.pooled == 0)
    assert ask(rig).body == b"sunny"
    assert rig.origin.connections == 2


# --- one that is gone ------------------------------------------------------------------------------------------------


def test_a_request_that_may_be_repeated_is_asked_again_once_where_the_origin_has_closed(rig: Rig) -> None:
    """It closes in the instant in which it is asked: nothing could have told."""

    def respond(request: bytes, _sock: socket.socket) -> bytes | None:
        return response() if len(rig.origin.requests) != 2 else None

    rig.origin.respond = respond
    ask(rig)
    assert ask(rig).status == 200
    assert (rig.origin.connections, len(rig.origin.requests)) == (2, 3)


def test_it_is_not_asked_a_third_time(rig: Rig) -> None:
    rig.origin.respond = lambda _head, _sock: response() if len(rig.origin.requests) == 1 else None
    ask(rig)
    assert (ask(rig, waits=0).status, len(rig.origin.requests)) == (502, 3)


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_request_that_may_not_be_repeated_is_asked_on_a_new_connection(rig: Rig, method: str) -> None:
    ask(rig)
    assert ask(rig, get("/search", method=method, fields="Content-Length: 0\r\n"), waits=2).status == 200
    assert rig.origin.connections == 2


def test_what_waits_for_long_is_closed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "IDLE_S", 0.2)
    ask(rig, waits=None)
    rig.wait_for(lambda: not rig.origin._open)
    assert ask(rig, waits=None).status == 200
    assert rig.origin.connections == 2


def test_no_more_wait_than_there_is_room_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MOST_PER_ORIGIN", 1)
    with rig.connect() as first, rig.connect() as second:
        for sock in (first, second):
            sock.sendall(get("/search"))
            assert read_reply(sock)[0].status == 200
    ask(rig)
    assert rig.lane.pooled == 1
