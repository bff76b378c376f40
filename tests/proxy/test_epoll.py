"""One epoll in asyncio: callbacks by descriptor and deadline, and crashes that stay where they happen."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from proxy.epoll import IN, ONESHOT, OUT, TICK_S, Epoll
from tests.proxy.gates import Loop, eventually, running_loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    with running_loop() as running:
        yield running


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


class Reader:
    """Counts the bytes its socket gives; crashes on the byte `!`."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.data = b""
        self.failures: list[Exception] = []
        loop.call(lambda: loop.epoll.put(sock.fileno(), IN, self.ready, self.failed))

    def ready(self, _events: int) -> None:
        data = self.sock.recv(100)
        if b"!" in data:
            raise ZeroDivisionError("asked for")
        self.data += data

    def failed(self, error: Exception) -> None:
        self.failures.append(error)


def test_descriptor_is_reported_while_it_has_something(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    reader = Reader(loop, pair[0])
    pair[1].sendall(b"x" * 250)  # three reads: level-triggered
    eventually(lambda: reader.data == b"x" * 250)


def test_crash_ends_the_one_it_happened_in_and_is_reported(loop: Loop) -> None:
    good, good_peer = socket.socketpair()
    bad, bad_peer = socket.socketpair()
    with good, good_peer, bad, bad_peer:
        fine, crashing = Reader(loop, good), Reader(loop, bad)
        bad_peer.sendall(b"!")
        eventually(lambda: loop.crashes)
        bad_peer.sendall(b"again")
        good_peer.sendall(b"still here")
        eventually(lambda: fine.data == b"still here")
        assert [type(error) for error in crashing.failures] == [ZeroDivisionError]
        assert [type(error) for error in loop.crashes] == [ZeroDivisionError]
        assert crashing.data == b""


def test_owner_that_crashes_over_its_crash_is_reported_twice(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    reader = Reader(loop, pair[0])
    reader.failed = lambda error: [][0]  # type: ignore[method-assign]  # a broken owner
    loop.call(lambda: loop.epoll.put(pair[0].fileno(), IN, reader.ready, reader.failed))
    pair[1].sendall(b"!")
    eventually(lambda: len(loop.crashes) == 2)
    assert {type(error) for error in loop.crashes} == {IndexError, ZeroDivisionError}


def test_stale_event_does_not_reach_a_reused_descriptor(loop: Loop) -> None:
    """Two sockets are ready at once; the first to be called closes both, and a third gets the other's number."""
    one, one_peer = socket.socketpair()
    two, two_peer = socket.socketpair()
    called: list[str] = []
    reused: list[socket.socket] = []

    def close_both(me: socket.socket, other: socket.socket) -> None:
        called.append("first")
        number = other.fileno()
        for sock in (me, other):
            loop.epoll.forget(sock.fileno())
            sock.close()
        fresh = [socket.socket() for _ in range(4)]
        for sock in fresh:
            if sock.fileno() == number:
                reused.append(sock)
                loop.epoll.put(number, OUT | ONESHOT, lambda events: called.append(f"third {events & IN}"), failing)
            else:
                sock.close()

    def failing(error: Exception) -> None:
        raise error

    with one_peer, two_peer:
        one_peer.sendall(b"x")
        two_peer.sendall(b"x")

        def watch() -> None:
            loop.epoll.put(one.fileno(), IN, lambda _: close_both(one, two), failing)
            loop.epoll.put(two.fileno(), IN, lambda _: close_both(two, one), failing)

        loop.call(watch)
        eventually(lambda: len(called) == 2)
        assert called == ["first", "third 0"]  # its own event (an unconnected socket is writable), not the stale IN
        loop.call(lambda: loop.epoll.remove(reused[0].fileno()))
        reused[0].close()
    assert loop.crashes == []


def test_removed_descriptor_is_not_reported(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    reader = Reader(loop, pair[0])
    loop.call(lambda: loop.epoll.remove(pair[0].fileno()))
    loop.call(lambda: loop.epoll.remove(pair[0].fileno()))  # twice does no harm
    pair[1].sendall(b"x")
    time.sleep(0.05)
    assert reader.data == b""


def watch(loop: Loop, *alarms: Alarm) -> None:
    def arrange() -> None:
        for alarm in alarms:
            loop.epoll.watch(alarm)

    loop.call(arrange)


class Alarm:
    def __init__(self, deadline: float, error: Exception | None = None) -> None:
        self.deadline = deadline
        self.error = error
        self.rang: list[float] = []
        self.failures: list[Exception] = []

    def expired(self) -> None:
        self.rang.append(time.monotonic())
        if self.error:
            raise self.error

    def failed(self, error: Exception) -> None:
        self.failures.append(error)


class Silencer(Alarm):
    silences: tuple[Loop, Alarm]

    def expired(self) -> None:
        super().expired()
        loop, other = self.silences
        loop.epoll.unwatch(other)


def test_deadlines_ring_once_in_order_and_never_early(loop: Loop) -> None:
    now = time.monotonic()
    alarms = [Alarm(now + delay) for delay in (0.25, 0.05, 0.15)]
    watch(loop, *alarms)
    eventually(lambda: all(alarm.rang for alarm in alarms))
    time.sleep(2 * TICK_S)
    assert [len(alarm.rang) for alarm in alarms] == [1, 1, 1]
    assert all(alarm.rang[0] >= alarm.deadline for alarm in alarms)
    assert alarms[1].rang < alarms[2].rang < alarms[0].rang


def test_deadline_moves_later_by_itself_and_earlier_by_watching_again(loop: Loop) -> None:
    now = time.monotonic()
    later, earlier, gone = Alarm(now + 0.05), Alarm(now + 60), Alarm(now + 0.05)

    def arrange() -> None:
        for alarm in (later, earlier, gone):
            loop.epoll.watch(alarm)
        later.deadline = now + 0.5
        earlier.deadline = now + 0.05
        loop.epoll.watch(earlier)
        loop.epoll.unwatch(gone)

    loop.call(arrange)
    eventually(lambda: later.rang and earlier.rang)
    assert loop.call(lambda: (loop.epoll._buckets, loop.epoll._bucket_of)) == ({}, {})  # nothing is left behind
    assert later.rang[0] >= now + 0.5
    assert earlier.rang[0] < now + 30
    assert gone.rang == []


def test_expiry_that_crashes_spares_the_others(loop: Loop) -> None:
    now = time.monotonic()
    alarms = [Alarm(now + 0.05, error) for error in (None, ValueError("asked for"), None)]
    watch(loop, *alarms)
    eventually(lambda: all(alarm.rang for alarm in alarms))
    eventually(lambda: loop.crashes)
    assert [type(error) for error in alarms[1].failures] == [ValueError]


def test_alarm_that_silences_another_of_the_same_tick_is_obeyed(loop: Loop) -> None:
    now = time.monotonic()
    one, two = Silencer(now + 0.05), Silencer(now + 0.05)
    one.silences, two.silences = (loop, two), (loop, one)
    watch(loop, one, two)
    eventually(lambda: one.rang or two.rang)
    time.sleep(2 * TICK_S)
    assert len(one.rang + two.rang) == 1


def test_idle_epoll_does_not_wake() -> None:
    """Without deadlines there is no timer: an idle gate costs nothing."""

    async def run() -> None:
        epoll = Epoll(lambda error: None)
        alarm = Alarm(epoll.now)
        epoll.watch(alarm)
        await asyncio.sleep(3 * TICK_S)
        assert alarm.rang
        assert epoll._timer is None
        epoll.watch(alarm)  # and it starts again
        await asyncio.sleep(3 * TICK_S)
        assert len(alarm.rang) == 2
        epoll.close()
        epoll.close()

    asyncio.run(run())
