"""Attacks on a gate that serves: each test is one that once succeeded, or that would if a bound were taken away."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from hpack import Encoder
from hyperframe.frame import HeadersFrame, SettingsFrame

import policies.engine
from policies.addresses import Reach
from policies.load import Source
from proxy.explicit.credentials import hash_password, store_credential
from proxy.inspector import host
from proxy.inspector.frames import Frames
from proxy.log import decision_log
from proxy.policy_files import load_sources
from proxy.resolver import Resolution, Resolver
from proxy.upstream_proxy import CredentialsUnusable, read_credentials
from proxy.wire.proxy_protocol import MalformedProxyHeader, parse_proxy_header
from tests.end_to_end.service import Address, Service, answered, children, eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy import gates
from tests.proxy.inspecting import HOST, Rig, get, read_reply
from tests.proxy.speaking_http2 import Client, Http2Origin

HEAD = "version: 1\nworkloads:\n  app:\n    rules:\n"
ECHO = '      - tcp: "echo.test:7"\n'
PLAIN = '      - {host: plain.test, ports: [80], tls: inspect, allow: ["GET /ok"]}\n'


@pytest.fixture
def echo() -> Iterator[Address]:
    with gates.origin() as upstream:
        yield upstream.address


# --- what is kept open ------------------------------------------------------------------------------------------------


def test_a_kept_connection_to_a_private_address_is_not_used_once_no_rule_admits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(_resolver: Resolver, _name: str) -> Resolution:
        return Resolution(found.addresses, found.expires, port=found.port)  # as of a lookup, and not of the operator

    def policy(private: str) -> str:
        return f"version: 1\nworkloads:\n  app:\n    rules: [{{host: {HOST}, tls: inspect, private: {private}}}]\n"

    with Rig(tmp_path, policy=policy("true")) as gate:
        found = Resolution((ip_address("127.0.0.1"),), float("inf"), port=gate.origin.port)
        monkeypatch.setattr(Resolver, "resolve", resolve)
        monkeypatch.setattr(policies.engine, "classify", lambda _address: Reach.PRIVATE)
        with gate.connect() as sock:
            sock.sendall(get())
            assert read_reply(sock)[0].status == 200
            gate.bench.swap(load_sources([Source("p.yaml", policy("false"))]))
            sock.sendall(get())
            reply, _ = read_reply(sock)
        assert (reply.status, reply.reason) == (403, "private_address")
        assert len(gate.origin.requests) == 1

    with Rig(tmp_path, policy=policy("true"), make_origin=Http2Origin) as gate:
        found = Resolution((ip_address("127.0.0.1"),), float("inf"), port=gate.origin.port)
        with Client(gate) as client:
            assert client.get("/").status == 200
            gate.bench.swap(load_sources([Source("p.yaml", policy("false"))]))
            response = client.get("/")
        assert (response.status, response.reason) == (403, "private_address")
        assert len(gate.origin.heard) == 1  # type: ignore[attr-defined]  # an Http2Origin


# --- one client and all the others ------------------------------------------------------------------------------------


def test_pipelined_requests_are_all_answered_however_many_come_at_once(tmp_path: Path) -> None:
    with Rig(tmp_path, plain=True) as gate, gate.connect() as sock:
        sock.sendall(get("/denied") * 1000 + get())
        buffered = b""
        for _ in range(1000):
            reply, buffered = read_reply(sock, buffered)
            assert reply.reason == "no_allow_entry"
        assert read_reply(sock, buffered)[0].status == 200
        assert gate.failures == []


def test_a_client_that_does_not_read_its_denials_is_not_read_either(tmp_path: Path) -> None:
    """Else each request of 60 bytes leaves an answer of 600 in memory, for as long as the client likes."""
    with Rig(tmp_path, plain=True) as gate, gate.connect() as sock:
        sock.settimeout(2.0)
        asked = get("/denied") * 200_000
        with pytest.raises(TimeoutError):
            sock.sendall(asked)
        assert len(gate.records) < 20_000  # some MiB of answers in the kernel, and a quarter in the inspector
        assert gate.failures == []
        sock.settimeout(20.0)
        reply, _ = read_reply(sock)
        assert reply.reason == "no_allow_entry"


def test_a_client_that_leaves_before_its_denial_is_no_fault_of_ours(tmp_path: Path) -> None:
    """Each would be a line of the gate's own log, and a record that says the gate failed."""
    with Rig(tmp_path, plain=True) as gate:
        for _ in range(200):
            with gate.connect() as sock:
                sock.sendall(get("/denied", method="POST", fields="Content-Length: 9\r\n") + b"part")
        assert {record["reason"] for record in gate.wait_for_records(200)} <= {"no_allow_entry", "client_gone"}
        gate.wait_for(lambda: gate.core.is_idle)
        assert gate.failures == []


def test_a_body_in_tiny_chunks_costs_no_more_than_its_bytes(tmp_path: Path) -> None:
    """One event for each chunk of a byte keeps every other connection of the inspector waiting for seconds."""
    with Rig(tmp_path, plain=True) as gate, gate.connect() as sock:
        sock.sendall(
            get(method="POST", fields="Transfer-Encoding: chunked\r\n") + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n"
        )
        assert read_reply(sock)[0].status == 200
        [request] = gate.origin.requests
    body = request.partition(b"\r\n\r\n")[2]
    assert body.count(b"a") >= 50_000  # and those in sizes
    assert body.count(b"\r\n") < 2_000


def test_heads_that_unfold_are_few_in_one_turn() -> None:
    """2,400 fields in as many bytes take 15 ms: a turn of 256 such heads would be seconds for everybody else."""
    small = Encoder().encode([(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/")])
    frames = Frames(client_side=False)
    frames.open()
    heads = [
        HeadersFrame(1 + 2 * number, small + b"\x93" * 2400, flags=["END_HEADERS", "END_STREAM"]).serialize()
        for number in range(25)
    ]
    said = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize() + b"".join(heads)
    heard = [event for event in frames.receive(said) if type(event).__name__ == "RequestReceived"]
    assert 1 <= len(heard) <= 6
    assert frames.has_more


# --- what another reader would read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["content-length", "Host", "close, transfer-encoding", "authorization"])
def test_what_frames_or_routes_a_request_is_no_connection_option(tmp_path: Path, named: str) -> None:
    """RFC 9110 7.6.1: the next proxy removes what Connection names, and would read a body as another request."""
    with Rig(tmp_path, plain=True) as gate:
        reply = gate.send(get(method="POST", fields=f"Connection: {named}\r\nContent-Length: 3\r\n") + b"abc")
        assert (reply.status, reply.reason) == (400, "malformed_request")
        assert gate.origin.requests == []


@pytest.mark.parametrize("address", ["::1%lo", "fe80::1%\x1b[31m"])
def test_a_zone_in_a_balancers_header_makes_no_other_source_of_a_client(address: str) -> None:
    with pytest.raises(MalformedProxyHeader):
        parse_proxy_header(f"PROXY TCP6 {address} ::1 1 2\r\n".encode())


# --- files that are no files ------------------------------------------------------------------------------------------


def proves(service: Service, password: str) -> int:
    credential = base64.b64encode(f"ann:{password}".encode()).decode()
    with service.connect() as sock:
        sock.sendall(f"CONNECT echo.test:7 HTTP/1.1\r\nProxy-Authorization: Basic {credential}\r\n\r\n".encode())
        return answered(sock)


def test_a_pipe_in_place_of_the_credentials_holds_up_nobody(tmp_path: Path, echo: Address) -> None:
    users = tmp_path / "users"
    store_credential(users, "ann", hash_password("secret"))
    options = ["--credentials", str(users), "--host", f"echo.test=127.0.0.1:{echo[1]}"]
    with Service(tmp_path, HEAD + ECHO, *options) as it:
        assert proves(it, "secret") == 200
        users.unlink()
        os.mkfifo(users, 0o600)

        def is_said() -> bool:
            assert proves(it, "secret") == 200
            return any("users: not a file; name one that holds NAME:HASH lines" in line for line in it.said)

        eventually(is_said, "it is said")
        assert it.metric("outgate_worker_restarts_total") == 0


def test_a_pipe_in_place_of_the_site_proxys_credentials_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    os.mkfifo(path, 0o600)
    with pytest.raises(CredentialsUnusable, match="not a file"):
        read_credentials(str(path))


# --- the gate's own ports ---------------------------------------------------------------------------------------------


def test_an_admin_port_that_the_kernel_chose_is_not_reached_through_the_gate(tmp_path: Path) -> None:
    with Service(tmp_path, HEAD + '      - tcp: "any.test:1-65535"\n', "--host", "any.test=127.0.0.1") as it:
        with it.tunnel(f"any.test:{it.admin[1]}") as sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
        eventually(lambda: it.records(reason="never_reached"), "a record")


# --- what hangs -------------------------------------------------------------------------------------------------------


def test_an_inspector_that_hangs_turns_readiness_red(tmp_path: Path) -> None:
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", "pki"], cwd=tmp_path, check=True, capture_output=True)
    with Service(tmp_path, HEAD + PLAIN, "--pki", "pki", "--http-host", "mitmproxy") as it:
        assert denied(it) == 403
        [worker] = it.workers()
        [inspector] = children(worker)
        os.kill(inspector, signal.SIGSTOP)
        why = ["worker 1 has an inspector that does not answer"]
        eventually(lambda: it.ready()[:2] == (503, why), "it is missed")
        os.kill(inspector, signal.SIGCONT)
        eventually(lambda: it.ready()[0] == 200, "ready again")
        assert denied(it) == 403
        assert (it.workers(), children(worker)) == ([worker], [inspector])


def denied(service: Service) -> int:
    with service.connect() as sock:
        sock.sendall(b"GET http://plain.test/denied HTTP/1.1\r\nHost: plain.test\r\n\r\n")
        return answered(sock)


def test_an_inspector_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SILENCE_S", 0.2)
    with Rig(tmp_path, in_process=True, plain=True) as gate:
        assert gate.send(get()).status == 200
        hung = gate.inspector.pid
        assert hung is not None
        os.kill(hung, signal.SIGSTOP)

        def is_replaced() -> bool:
            gate.loop.call_soon_threadsafe(gate.inspector.ask)
            gate.loop.call_soon_threadsafe(gate.inspector.start)
            return gate.inspector.pid not in (None, hung)

        eventually(is_replaced, "another takes its place")
        assert gate.send(get()).status == 200
        assert gate.log[0] == "the inspector was silent for 0.2 s"


def test_a_log_that_hangs_is_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 65,536 attempts pass with no record but in memory, where nothing was to pass unrecorded."""
    monkeypatch.setattr(decision_log, "HANG_S", 0.2)
    path = tmp_path / "log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    changes: list[bool] = []
    log = decision_log.open_log(str(path), changed=changes.append)
    record = {"time": "", "verdict": "deny", "note": "x" * 4096}
    noted = 0

    def fails() -> bool:
        nonlocal noted
        log(dict(record))
        noted += 1
        return bool(changes)

    try:
        eventually(fails, "it is told")
        assert noted < decision_log.QUEUE_LIMIT // 2
        assert log.failure is not None
        assert log.failure.text.endswith("has stalled")

        reading = threading.Thread(target=lambda: [*iter(lambda: _read(reader, log), b"")])
        reading.start()
        eventually(lambda: changes == [True, False], "it works again")
        log.close()
        reading.join(20)
    finally:
        os.close(reader)
    assert log.lost_total == 0


def _read(reader: int, log: decision_log.DecisionLog) -> bytes:
    """What is there; nothing once the writer has gone."""
    while True:
        try:
            return os.read(reader, 1 << 16)
        except BlockingIOError:
            threading.Event().wait(0.01)
