"""The stream relay: two connections that behave as one, and bytes that never enter this process."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256

import pytest

from proxy.relays import stream
from proxy.relays.stream import End, Pipes, StreamRelay
from tests.proxy.gates import PATIENCE_S, Loop, eventually, read_all, read_exactly, running_loop

MB = 1 << 20


@dataclass
class Flow:
    """A relay with its two far ends."""

    loop: Loop
    relay: StreamRelay
    pipes: Pipes
    client: socket.socket
    upstream: socket.socket
    ends: list[End]

    def end(self) -> End:
        eventually(lambda: self.ends, "the flow to end")
        (how,) = self.ends
        return how


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname(), timeout=PATIENCE_S)
        near, _ = listener.accept()
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    near.setblocking(False)
    return far, near


@contextmanager
def flow(loop: Loop, *, idle_s: float = 60.0, first: bytes = b"") -> Iterator[Flow]:
    """`first` is what the client has said before the relay starts."""
    client, near_client = tcp_pair()
    upstream, near_upstream = tcp_pair()
    ends: list[End] = []
    if first:
        client.sendall(first)
    with client, upstream:
        pipes = Pipes()

        def start() -> StreamRelay:
            relay = StreamRelay(loop.epoll, pipes, near_client, near_upstream, idle_s=idle_s, ended=ends.append)
            relay.start()
            return relay

        relay = loop.call(start)
        try:
            yield Flow(loop, relay, pipes, client, upstream, ends)
        finally:
            loop.call(lambda: relay.end(End.RESET))
            loop.call(pipes.close)
            assert near_client.fileno() == near_upstream.fileno() == -1


@pytest.fixture
def loop() -> Iterator[Loop]:
    with running_loop() as running:
        yield running
        assert running.crashes == []
        assert running.call(lambda: (len(running.epoll._watched), len(running.epoll._bucket_of))) == (0, 0)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def fill(sock: socket.socket) -> int:
    """Send until nothing more is taken for a moment. Returns how many bytes were."""
    sent = 0
    sock.settimeout(0.2)
    try:
        while True:
            sent += sock.send(bytes(MB))
    except TimeoutError:
        sock.settimeout(PATIENCE_S)
        return sent


def send_until_reset(sock: socket.socket) -> None:
    for _ in range(2000):
        sock.sendall(b"x")
        time.sleep(0.01)


def test_bytes_pass_both_ways_and_are_counted(loop: Loop) -> None:
    with flow(loop, first=b"hello") as it:
        assert read_exactly(it.upstream, 5) == b"hello"
        it.upstream.sendall(b"welcome")
        assert read_exactly(it.client, 7) == b"welcome"
        it.client.sendall(b"again")
        assert read_exactly(it.upstream, 5) == b"again"
        it.client.close()
        it.upstream.close()
        assert it.end() is End.CLOSED
        assert (it.relay.sent, it.relay.received) == (10, 7)


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_an_urgent_byte_is_left_out_and_holds_up_nothing(loop: Loop, who: str) -> None:
    """splice(2) stops in front of it while epoll goes on reporting it: one byte kept the whole gate busy for ever."""
    with flow(loop) as it:
        one, other = (it.client, it.upstream) if who == "client" else (it.upstream, it.client)
        one.sendall(b"before")
        one.send(b"!", socket.MSG_OOB)
        one.sendall(b"after")
        assert read_exactly(other, 11) == b"beforeafter"
        one.send(b"!", socket.MSG_OOB)
        one.close()
        assert read_all(other) == b""
        other.close()
        assert it.end() is End.CLOSED


@pytest.mark.parametrize("first_to_end", ["client", "upstream"])
def test_half_close_passes_and_the_other_half_goes_on(loop: Loop, first_to_end: str) -> None:
    with flow(loop) as it:
        one, other = (it.client, it.upstream) if first_to_end == "client" else (it.upstream, it.client)
        one.sendall(b"last words")
        one.shutdown(socket.SHUT_WR)
        assert read_all(other) == b"last words"
        other.sendall(b"an answer " * 1000)
        assert read_exactly(one, 10_000) == b"an answer " * 1000
        assert it.ends == []
        other.close()
        assert read_all(one) == b""
        assert it.end() is End.CLOSED


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_reset_passes(loop: Loop, who: str) -> None:
    with flow(loop, first=b"x") as it:
        read_exactly(it.upstream, 1)
        one, other = (it.client, it.upstream) if who == "client" else (it.upstream, it.client)
        reset(one)
        with pytest.raises(ConnectionResetError):
            read_all(other)
        assert it.end() is End.RESET


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_reset_after_half_close_passes(loop: Loop, who: str) -> None:
    with flow(loop) as it:
        one, other = (it.client, it.upstream) if who == "client" else (it.upstream, it.client)
        one.shutdown(socket.SHUT_WR)
        assert read_all(other) == b""
        reset(one)
        eventually(lambda: it.ends)
        assert it.end() is End.RESET
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_until_reset(other)


def test_reset_under_a_blocked_writer_passes(loop: Loop) -> None:
    """The upstream goes while the client is pushing more than it takes."""
    with flow(loop) as it:
        fill(it.client)
        reset(it.upstream)
        assert it.end() is End.RESET
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_until_reset(it.client)


def test_answer_before_a_reset_is_delivered_and_not_taken_for_whole(loop: Loop) -> None:
    """A server that answers early and leaves the upload unread resets: the answer arrives, a clean end does not."""
    with flow(loop) as it:
        fill(it.client)
        it.upstream.sendall(b"413 too large")
        it.upstream.close()  # unread bytes make it a reset
        assert read_exactly(it.client, 13) == b"413 too large"
        with pytest.raises(ConnectionResetError):
            read_all(it.client)
        assert it.end() is End.RESET


def digest_of(sock: socket.socket, size: int, pause_s: float = 0.0) -> bytes:
    digest = sha256()
    left = size
    while left:
        data = sock.recv(min(left, MB))
        assert data
        digest.update(data)
        left -= len(data)
        if pause_s:
            time.sleep(pause_s)
    return digest.digest()


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_slow_reader_holds_back_the_sender_and_costs_no_memory(loop: Loop, direction: str) -> None:
    size = 64 * MB
    block = os.urandom(MB)
    with flow(loop) as it:
        source, sink = (it.client, it.upstream) if direction == "up" else (it.upstream, it.client)
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        sent = 0

        def send() -> None:
            nonlocal sent
            for _ in range(size // MB):
                source.sendall(block)
                sent += MB
            source.shutdown(socket.SHUT_WR)

        before = rss()
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        time.sleep(0.3)
        stuck, used = sent, cpu_s()
        time.sleep(0.3)
        assert stuck < size // 2  # held back: only kernel buffers are full
        assert cpu_s() - used < 0.2  # and nobody spins meanwhile
        expected = sha256(block * (size // MB)).digest()
        del_before = rss()
        assert digest_of(sink, size, pause_s=0.001) == expected
        sender.join(PATIENCE_S)
        assert rss() - min(before, del_before) < 40 * MB  # the test's own copies; the relay holds none of the 64 MB
        sink.close()
        assert it.end() is End.CLOSED
        assert (it.relay.sent if direction == "up" else it.relay.received) == size


def test_both_directions_flood_without_starving_each_other(loop: Loop) -> None:
    size = 16 * MB
    up, down = os.urandom(MB), os.urandom(MB)
    with flow(loop) as it:

        def send(sock: socket.socket, block: bytes) -> None:
            for _ in range(size // MB):
                sock.sendall(block)

        digests: dict[str, bytes] = {}

        def receive(name: str, sock: socket.socket) -> None:
            digests[name] = digest_of(sock, size, pause_s=0.002)

        threads = [
            threading.Thread(target=send, args=(it.client, up), daemon=True),
            threading.Thread(target=send, args=(it.upstream, down), daemon=True),
            threading.Thread(target=receive, args=("up", it.upstream), daemon=True),
            threading.Thread(target=receive, args=("down", it.client), daemon=True),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE_S)
        assert digests == {"up": sha256(up * 16).digest(), "down": sha256(down * 16).digest()}


def test_end_of_a_source_behind_a_full_target_does_not_spin(loop: Loop) -> None:
    """The upstream has sent more than the client takes, both ends have said goodbye: nothing moves, nothing spins."""
    with flow(loop) as it:
        sent = fill(it.upstream)
        it.client.shutdown(socket.SHUT_WR)
        assert read_all(it.upstream) == b""
        it.upstream.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        used = cpu_s()
        time.sleep(0.4)
        assert cpu_s() - used < 0.25
        assert len(read_all(it.client)) == sent
        assert it.end() is End.CLOSED


def test_idle_flow_is_reset_and_a_busy_one_is_not(loop: Loop) -> None:
    with flow(loop, idle_s=0.5) as it:
        for _ in range(10):
            it.client.sendall(b"x")
            read_exactly(it.upstream, 1)
            time.sleep(0.1)
        assert it.ends == []
        with pytest.raises(ConnectionResetError):
            read_all(it.client)
        with pytest.raises(ConnectionResetError):
            read_all(it.upstream)
        assert it.end() is End.IDLE


def test_idle_flows_hold_no_pipes(loop: Loop) -> None:
    with flow(loop, first=b"x") as it:
        read_exactly(it.upstream, 1)
        it.upstream.sendall(b"y")
        read_exactly(it.client, 1)
        eventually(lambda: it.relay.up.pipe is None and it.relay.down.pipe is None)
        assert len(it.pipes._spare) == 1  # one was enough for both directions in turn


def test_pipes_are_kept_within_bounds() -> None:
    pipes = Pipes()
    taken = [pipes.take() for _ in range(stream.SPARE_PIPES + 5)]
    for pipe in taken:
        pipes.give(pipe)
    assert len(pipes._spare) == stream.SPARE_PIPES
    pipes.close()
    for pipe in taken:
        for fd in pipe:
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                os.fstat(fd)


def test_pipe_works_where_the_kernel_grants_no_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "over the share")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    pipes = Pipes()
    pipe = pipes.take()
    os.write(pipe[1], b"x")
    assert os.read(pipe[0], 1) == b"x"
    pipes.give(pipe)
    pipes.close()


def test_crash_in_a_relay_ends_that_flow_alone() -> None:
    with running_loop() as loop, flow(loop) as broken, flow(loop) as sound:
        broken.pipes.take = lambda: [][0]  # type: ignore[method-assign]  # the fault to be contained
        broken.client.sendall(b"x")
        assert broken.end() is End.CRASHED
        with pytest.raises(ConnectionResetError):
            read_all(broken.upstream)
        sound.client.sendall(b"fine")
        assert read_exactly(sound.upstream, 4) == b"fine"
        assert [type(error) for error in loop.crashes] == [IndexError]
