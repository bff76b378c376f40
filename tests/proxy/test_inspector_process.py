"""The inspector as a process: starting, handing over, dying, memory, and what it lets be seen."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from policies.hostnames import Hostname
from proxy import child
from proxy.channel import MAX_MESSAGE, Channel
from proxy.inspector import Configuration, Handover, Inspector, host
from proxy.record import Record
from tests.proxy.inspecting import HOST, NOTHING, WAIT_S, WORKLOAD, Rig, get, read_reply

MEGABYTE = 1 << 20


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def pid_of(rig: Rig) -> int:
    pid = rig.inspector.pid
    assert pid is not None
    return pid


# --- start


def test_it_starts_on_first_need_and_serves_what_comes_after(tmp_path: Path) -> None:
    with Rig(tmp_path, in_process=True) as rig:
        assert rig.inspector.pid is None
        assert rig.send(get()).body == b"sunny"
        first = pid_of(rig)
        assert rig.send(get("/forecasts")).reason == "no_allow_entry"
        assert pid_of(rig) == first
        assert [record["reason"] for record in rig.wait_for_records(2)] == ["rule", "no_allow_entry"]
    assert not is_running(first)
    assert rig.log == []


def test_connections_that_come_while_it_starts_are_all_served(tmp_path: Path) -> None:
    with Rig(tmp_path, in_process=True) as rig:
        bodies: list[bytes] = []
        threads = [threading.Thread(target=lambda: bodies.append(rig.send(get()).body)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert bodies == [b"sunny"] * 8


def test_more_than_can_wait_are_refused_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MAX_WAITING", 0)
    with Rig(tmp_path, in_process=True) as rig:
        with pytest.raises(ssl.SSLError, match="INTERNAL_ERROR"):
            rig.connect()
        (record,) = rig.wait_for_records(1)
    assert (record["reason"], record["stage"], record["server.name"]) == ("gate_failed", "tls", HOST)


def test_a_plain_connection_that_is_refused_gets_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MAX_WAITING", 0)
    with Rig(tmp_path, in_process=True, plain=True) as rig:
        reply = rig.send(get())
    assert (reply.status, reply.reason) == (502, "gate_failed")


def test_a_process_that_cannot_start_says_why_and_nothing_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rig, "compiled", lambda _: child.memory(b"no policy", "policy"))
    with Rig(tmp_path, in_process=True) as rig:
        with pytest.raises(OSError, match=r".*"):
            rig.connect()
        rig.wait_for(lambda: rig.records and len(rig.log) == 2)
        assert [record["reason"] for record in rig.records] == ["gate_failed"]
        assert "NotCompiled" in rig.log[0]
        with pytest.raises(OSError, match=r".*"):  # during the pause it is not even tried
            rig.connect()
        assert len(rig.log) == 2


def test_a_process_that_never_becomes_ready_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "START_S", 0.05)
    with Rig(tmp_path, in_process=True) as rig:
        with pytest.raises(OSError, match=r".*"):
            rig.connect()
        assert [record["reason"] for record in rig.wait_for_records(1)] == ["gate_failed"]


# --- death


def test_it_is_started_again_after_it_died_but_not_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "FIRST_PAUSE_S", 0.3)
    with Rig(tmp_path, in_process=True) as rig:
        with rig.connect() as sock:
            sock.sendall(get())
            assert read_reply(sock)[0].status == 200
            rig.wait_for_records(1)
            first = pid_of(rig)
            os.kill(first, signal.SIGKILL)
            assert read_reply(sock) == (NOTHING, b"")
        rig.wait_for(lambda: rig.log)
        with pytest.raises(OSError, match=r".*"):
            rig.connect()
        assert [record["reason"] for record in rig.wait_for_records(2)] == ["rule", "gate_failed"]
        time.sleep(0.35)
        assert rig.send(get()).status == 200
        assert pid_of(rig) != first


def test_it_ends_when_the_gate_is_killed(tmp_path: Path) -> None:
    with Rig(tmp_path, in_process=True) as rig:
        configuration = tmp_path / "configuration"
        configuration.write_bytes(rig.configuration().to_bytes())
        policy = tmp_path / "p.yaml"
        policy.write_text(rig.policy)
        gate = subprocess.Popen(
            [sys.executable, "-c", GATE, str(configuration), str(policy)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        assert gate.stdout is not None
        assert gate.stdin is not None
        pid = int(gate.stdout.readline())
        assert is_running(pid)
        gate.kill()
        gate.wait()
        gate.stdout.close()
        gate.stdin.close()
        rig.wait_for(lambda: not is_running(pid))
    assert not is_running(pid)


GATE = """
import asyncio, pathlib, sys
from proxy.compiled import write_policy
from proxy.inspector import Configuration, Inspector
from proxy.policy_files import read_policy

async def main():
    configuration = Configuration.from_bytes(pathlib.Path(sys.argv[1]).read_bytes())
    inspector = Inspector(lambda: configuration, lambda: write_policy(read_policy([sys.argv[2]])), print)
    inspector.start()
    while not inspector._is_ready:
        await asyncio.sleep(0.01)
    print(inspector.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


# --- what can be seen


def test_the_key_is_in_no_argument_and_no_environment(tmp_path: Path) -> None:
    with Rig(tmp_path, in_process=True) as rig:
        assert rig.send(get()).status == 200
        shown = Path(f"/proc/{pid_of(rig)}/cmdline").read_bytes() + Path(f"/proc/{pid_of(rig)}/environ").read_bytes()
    assert b"PRIVATE KEY" not in shown
    assert b"BEGIN" not in shown
    assert "PRIVATE KEY" not in repr(rig.configuration())


def test_it_imports_nothing_from_the_directory_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    (trap / "proxy").mkdir(parents=True)
    (trap / "proxy" / "__init__.py").write_text("raise SystemExit('taken over')")
    (trap / "orjson.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(trap)
    with Rig(tmp_path, in_process=True) as rig:
        assert rig.send(get()).status == 200


# --- memory and back-pressure


def test_memory_does_not_grow_with_the_body(tmp_path: Path) -> None:
    size = 256 * MEGABYTE
    block = b"x" * MEGABYTE

    def respond(_request: bytes, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // len(block)):
            sock.sendall(block)

    with Rig(tmp_path, in_process=True) as rig:
        assert rig.send(get()).status == 200
        before = resident_mb(pid_of(rig))
        with rig.connect() as sock:
            sock.sendall(f"PUT /search HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {size}\r\n\r\n".encode())
            for _ in range(size // len(block)):
                sock.sendall(block)
            assert read_reply(sock)[0].status == 200
        assert rig.origin.received == size
        after_upload = resident_mb(pid_of(rig))
        rig.origin.respond = respond
        with rig.connect() as sock:
            sock.sendall(get())
            received = 0
            while received < size:
                received += len(sock.recv(MEGABYTE))
        after_download = resident_mb(pid_of(rig))
    assert after_upload - before < 16
    assert after_download - before < 16
    assert before < 90


def test_a_slow_reader_holds_the_origin_and_not_our_memory(tmp_path: Path) -> None:
    sent = 0

    def respond(_request: bytes, sock: socket.socket) -> None:
        nonlocal sent
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            sock.sendall(b"x" * 65536)
            sent += 65536

    with Rig(tmp_path, in_process=True) as rig:
        assert rig.send(get()).status == 200
        rig.origin.respond = respond
        before = resident_mb(pid_of(rig))
        with rig.connect() as sock:
            sock.sendall(get())
            sock.recv(1)
            last = -1
            while sent != last:
                last = sent
                time.sleep(0.3)
            grown = resident_mb(pid_of(rig)) - before
    assert sent < 64 * MEGABYTE
    assert grown < 16


def test_an_upload_to_an_origin_that_is_still_dialled_is_not_collected(tmp_path: Path) -> None:
    with Rig(tmp_path, in_process=True) as rig:
        assert rig.send(get()).status == 200
        rig.origin._context = None  # takes the ClientHello for a head and waits for its end
        before = resident_mb(pid_of(rig))
        sent = 0
        with rig.connect() as sock:
            sock.settimeout(1)
            try:
                sock.sendall(f"PUT /search HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 1000000000\r\n\r\n".encode())
                while sent < 200 * MEGABYTE:
                    sock.sendall(b"x" * 65536)
                    sent += 65536
            except TimeoutError:
                pass
            grown = resident_mb(pid_of(rig)) - before
    assert sent < 64 * MEGABYTE
    assert grown < 16


# --- the channel and what goes over it


def test_a_handover_survives_the_wire() -> None:
    handover = Handover("id", WORKLOAD, None, 80, True, ("::1", 5), ("10.0.0.1", 80), 1.5)
    assert Handover.from_bytes(handover.to_bytes()) == handover
    assert Handover.from_bytes(replace(handover, destination=None).to_bytes()).destination is None


def test_a_configuration_survives_the_wire(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        configuration = replace(
            rig.configuration(),
            workload=None,
            nameservers=(("127.0.0.1", 53),),
            system_hosts=((Hostname(HOST), ("::1",)),),
        )
    assert Configuration.from_bytes(configuration.to_bytes()) == configuration


def test_a_channel_never_blocks_and_loses_nothing() -> None:
    async def run() -> tuple[list[bytes], int, int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        received: list[bytes] = []
        drained = closed = 0

        def count_drained() -> None:
            nonlocal drained
            drained += 1

        def count_closed() -> None:
            nonlocal closed
            closed += 1

        sender = Channel(ours, received=lambda _message, _descriptor: None, closed=count_closed, drained=count_drained)
        messages = [b"%d:" % number + b"x" * 60_000 for number in range(100)]
        for message in messages:
            sender.send(message)
        assert sender.unsent > 0
        receiver = Channel(theirs, received=lambda message, _: received.append(message), closed=count_closed)
        while len(received) < len(messages):  # noqa: ASYNC110 - the messages are what is waited for
            await asyncio.sleep(0)
        assert received == messages
        receiver.close()
        await asyncio.sleep(0.01)
        sender.close()
        return received, drained, closed

    received, drained, closed = asyncio.run(asyncio.wait_for(run(), WAIT_S))
    assert (len(received), drained, closed) == (100, 1, 1)


def test_what_was_not_sent_comes_back_from_a_channel() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, socket.socket() as carried:
            channel = Channel(ours, received=lambda _message, _descriptor: None, closed=lambda: None)
            while not channel.unsent:
                channel.send(b"x" * 60_000)
            channel.send(b"last", carried)
            assert channel.close()[-1] == (b"last", carried)

    asyncio.run(run())


def test_a_message_over_the_limit_ends_the_channel() -> None:
    async def run() -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ended = 0

        def closed() -> None:
            nonlocal ended
            ended += 1

        with ours:
            channel = Channel(theirs, received=lambda _message, _descriptor: None, closed=closed)
            ours.send(b"x" * (MAX_MESSAGE + 1))
            await asyncio.sleep(0.01)
            channel.close()
        return ended

    assert asyncio.run(run()) == 1


def test_records_of_any_size_reach_the_gate(tmp_path: Path) -> None:
    with Rig(tmp_path, in_process=True) as rig:
        with rig.connect() as sock:
            for _ in range(50):
                sock.sendall(get("/search/" + "%C3%A9" * 2700))
                assert read_reply(sock)[0].status == 200
        assert len(rig.wait_for_records(50)) == 50
        assert max(len(str(record["url.full"])) for record in rig.records) < 10_000


def test_closing_twice_is_closing_once() -> None:
    records: list[Record] = []
    inspector = Inspector(lambda: Configuration(""), BytesIO, records.append)
    inspector.close()
    inspector.close()
    assert records == []
