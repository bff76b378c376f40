"""Dialling: the families take turns, a slow address does not hold up the next, and what lost is closed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from policies.model import Address, Reason
from proxy.dialer import Dial, interleave
from proxy.limits import Limits
from tests.proxy.gates import Loop, eventually, running_loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    with running_loop() as running:
        yield running
        assert running.crashes == []


def addresses(*texts: str) -> list[Address]:
    return [ip_address(text) for text in texts]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), ()),
        (("192.0.2.1",), ("192.0.2.1",)),
        (("192.0.2.1", "192.0.2.2"), ("192.0.2.1", "192.0.2.2")),
        (("192.0.2.1", "192.0.2.2", "2001:db8::1"), ("192.0.2.1", "2001:db8::1", "192.0.2.2")),
        (
            ("2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1"),
            ("2001:db8::1", "192.0.2.1", "2001:db8::2", "2001:db8::3"),
        ),
        (("192.0.2.1", "192.0.2.1"), ("192.0.2.1",)),
    ],
)
def test_families_take_turns(given: Sequence[str], expected: Sequence[str]) -> None:
    assert interleave(addresses(*given)) == addresses(*expected)


class Outcome:
    """What a dial ended with."""

    def __init__(self, loop: Loop, to: Sequence[Address], port: int, limits: Limits | None = None) -> None:
        self.loop = loop
        self.sock: socket.socket | None = None
        self.address: Address | None = None
        self.reasons: list[Reason] = []
        self.crashes: list[Exception] = []
        self.started = time.monotonic()
        self.took_s = 0.0

        def start() -> Dial:
            return Dial(
                loop.epoll,
                to,
                port,
                limits or Limits(),
                connected=self._connected,
                unreachable=self._unreachable,
                crashed=self.crashes.append,
            )

        self.dial = loop.call(start)

    def _connected(self, sock: socket.socket, address: Address) -> None:
        self.loop.epoll.remove(sock.fileno())
        self.sock, self.address, self.took_s = sock, address, time.monotonic() - self.started

    def _unreachable(self, reason: Reason) -> None:
        self.reasons.append(reason)
        self.took_s = time.monotonic() - self.started

    def end(self) -> Reason | Address | None:
        eventually(lambda: self.sock or self.reasons, "the dial to end")
        if self.sock:
            self.sock.close()
        return self.address or self.reasons[0]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port of 127.0.0.2 whose backlog is full: it answers no SYN, as an address behind a dropping firewall."""
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket())
        sock.bind(("127.0.0.2", 0))
        sock.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(sock.getsockname())
        port: int = sock.getsockname()[1]
        yield port


def test_dial_connects_to_the_only_address(loop: Loop, listener: socket.socket) -> None:
    outcome = Outcome(loop, addresses("127.0.0.1"), listener.getsockname()[1])
    assert outcome.end() == ip_address("127.0.0.1")


def test_ipv6_is_dialled(loop: Loop) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        outcome = Outcome(loop, addresses("::1"), listener.getsockname()[1])
        assert outcome.end() == ip_address("::1")


def test_refused_address_is_passed_over_at_once(loop: Loop, listener: socket.socket) -> None:
    outcome = Outcome(loop, addresses("127.0.0.3", "127.0.0.1"), listener.getsockname()[1], Limits(stagger_s=15.0))
    assert outcome.end() == ip_address("127.0.0.1")
    assert outcome.took_s < 10


def test_silent_address_is_passed_over_after_the_stagger(loop: Loop, deaf: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", deaf))
        listener.listen()
        outcome = Outcome(loop, addresses("127.0.0.2", "127.0.0.1"), deaf, Limits(stagger_s=0.3, dial_s=30.0))
        assert outcome.end() == ip_address("127.0.0.1")
        assert 0.3 <= outcome.took_s < 15


def test_every_address_refusing_is_refused(loop: Loop, listener: socket.socket) -> None:
    outcome = Outcome(loop, addresses("127.0.0.3", "127.0.0.4", "127.0.0.5"), listener.getsockname()[1])
    assert outcome.end() is Reason.UPSTREAM_REFUSED
    time.sleep(0.2)
    assert outcome.reasons == [Reason.UPSTREAM_REFUSED]


def test_silence_everywhere_ends_at_the_deadline(loop: Loop, deaf: int) -> None:
    time.sleep(0.3)  # nothing has been watched for a while: the deadline counts from now
    outcome = Outcome(loop, addresses("127.0.0.2"), deaf, Limits(dial_s=0.4))
    assert outcome.end() is Reason.UPSTREAM_TIMEOUT
    assert outcome.took_s >= 0.4


def test_address_without_route_fails_and_refusal_says_more(loop: Loop, listener: socket.socket) -> None:
    broadcast = "255.255.255.255"  # connect(2) fails at once
    assert Outcome(loop, addresses(broadcast), 9).end() is Reason.UPSTREAM_FAILED
    for order in ((broadcast, "127.0.0.3"), ("127.0.0.3", broadcast)):
        outcome = Outcome(loop, addresses(*order), listener.getsockname()[1])
        assert outcome.end() is Reason.UPSTREAM_REFUSED


def test_no_address_at_all_fails(loop: Loop) -> None:
    assert Outcome(loop, [], 443).end() is Reason.UPSTREAM_FAILED


def test_losers_and_cancelled_dials_leave_nothing_open(loop: Loop, deaf: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", deaf))
        listener.listen()
        outcome = Outcome(loop, addresses("127.0.0.2", "127.0.0.1"), deaf, Limits(stagger_s=0.1))
        outcome.end()
        cancelled = Outcome(loop, addresses("127.0.0.2"), deaf, Limits(dial_s=0.3))
        loop.call(cancelled.dial.cancel)
        time.sleep(0.6)
        assert (cancelled.sock, cancelled.reasons) == (None, [])
        assert loop.call(lambda: (len(loop.epoll._watched), len(loop.epoll._bucket_of))) == (0, 0)


def test_owner_that_crashes_is_told_and_the_socket_closed(listener: socket.socket) -> None:
    with running_loop() as loop:
        won: list[socket.socket] = []
        told: list[Exception] = []

        def connected(sock: socket.socket, _address: Address) -> None:
            won.append(sock)
            raise ZeroDivisionError("asked for")

        def start() -> None:
            Dial(
                loop.epoll,
                addresses("127.0.0.1"),
                listener.getsockname()[1],
                Limits(),
                connected=connected,
                unreachable=lambda reason: None,
                crashed=told.append,
            )

        loop.call(start)
        eventually(lambda: told and loop.crashes)
        assert won[0].fileno() == -1
        assert len(told) == 1
