"""A listener on a thread of its own with real sockets on both sides; tests talk to it as blocking clients."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from math import inf

import pytest

from policies.engine import admit, carries_plain, decide, expect
from policies.hostnames import Hostname
from policies.index import Policy
from policies.model import Address, Attempt, Reason, Verdict
from proxy.config import UpstreamProxy
from proxy.epoll import Epoll
from proxy.guest import Identify
from proxy.inspector.handover import Handover
from proxy.limits import Limits
from proxy.listener import Listener
from proxy.original_dst import OriginalDst
from proxy.record import Record
from proxy.relays.dns_budget import Budget, NewNames
from proxy.resolver import NameNotFound, Resolution
from proxy.upstream_proxy import SiteProxy

PATIENCE_S = 20.0  # for what should happen at once, on a machine that is busy with something else
DESTINATION = ip_address("198.51.100.7")


def eventually(true: Callable[[], object], what: str = "") -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"did not happen: {what}"
        time.sleep(0.005)


class Loop:
    """An asyncio loop on a thread of its own, and an Epoll in it."""

    def __init__(self) -> None:
        self.crashes: list[Exception] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.epoll = self.call(lambda: Epoll(self.crashes.append))

    def call[T](self, function: Callable[[], T]) -> T:
        """What `function` returns, called on the loop."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE_S)

    def close(self) -> None:
        self.call(self.epoll.close)

        async def settle() -> None:  # cancelled lookups end here, not in a warning
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(settle(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()


@contextmanager
def running_loop() -> Iterator[Loop]:
    loop = Loop()
    try:
        yield loop
    finally:
        loop.close()


class Names:
    """A resolver with these entries only. `asked` are the names somebody wanted to know."""

    def __init__(self, entries: Mapping[str, Resolution], *, is_cached: bool = True) -> None:
        self.entries = {Hostname(name): entry for name, entry in entries.items()}
        self.is_cached = is_cached
        self.is_silent = False
        self.asked: list[Hostname] = []

    def cached(self, name: Hostname) -> Resolution | None:
        self.asked.append(name)
        return self.entries.get(name) if self.is_cached else None

    async def resolve(self, name: Hostname) -> Resolution:
        self.asked.append(name)
        await asyncio.sleep(3600 if self.is_silent else 0)
        if name not in self.entries:
            raise NameNotFound(name, exists=False, expires=0.0)
        return self.entries[name]


def at(address: tuple[str, int] | None, *, from_hosts: bool = True) -> Resolution:
    """The resolution the operator's `--host NAME=ADDRESS:PORT` gives."""
    assert address is not None
    return Resolution((ip_address(address[0]),), inf, from_hosts, address[1])


class Origin:
    """An upstream that keeps what it is sent. `greeting` is said first, `reply` for every bytes that come."""

    def __init__(self, greeting: bytes = b"", reply: Callable[[bytes], bytes] = lambda data: data) -> None:
        self._greeting = greeting
        self._reply = reply
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address: tuple[str, int] = self._listener.getsockname()
        self.heard: list[bytearray] = []
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            heard = bytearray()
            self.heard.append(heard)
            thread = threading.Thread(target=self._talk, args=(sock, heard), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _talk(self, sock: socket.socket, heard: bytearray) -> None:
        with sock:
            sock.settimeout(PATIENCE_S)
            try:
                sock.sendall(self._greeting)
                while data := sock.recv(65536):
                    heard += data
                    sock.sendall(self._reply(data))
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(PATIENCE_S)
        for thread in self._threads:
            thread.join(PATIENCE_S)


@contextmanager
def origin(greeting: bytes = b"", reply: Callable[[bytes], bytes] = lambda data: data) -> Iterator[Origin]:
    upstream = Origin(greeting, reply)
    try:
        yield upstream
    finally:
        upstream.close()


@dataclass
class Gate:
    """A running listener and what it did."""

    loop: Loop
    listener: Listener
    address: tuple[str, int]
    names: Names
    records: list[Record]
    handed: list[tuple[socket.socket, Handover]]
    judged: list[Attempt] = field(default_factory=list)

    def connect(self, *, timeout_s: float = PATIENCE_S) -> socket.socket:
        return socket.create_connection(self.address, timeout=timeout_s)

    def record(self) -> Record:
        """The one record that was written."""
        eventually(lambda: self.records, "a decision record")
        (record,) = self.records
        return record

    def reasons(self) -> list[object]:
        return [record["reason"] for record in self.records]


@contextmanager
def gate(
    policy: Policy,
    names: Mapping[str, Resolution] | None = None,
    *,
    workload: str = "app",
    port: int = 443,
    limits: Limits | None = None,
    original_dst: OriginalDst = lambda sock: (DESTINATION, 443),
    told: Sequence[str] = (),
    judge: Callable[[Attempt], Verdict] | None = None,
    has_inspector: bool = True,
    through: UpstreamProxy | None = None,
    hosts: Collection[str] = (),
    is_own: Callable[[Address, int], bool] | None = None,
    dialled: Callable[[float, Reason | None], None] | None = None,
    identify: Identify | None = None,
    budget: Budget | None = None,
) -> Iterator[Gate]:
    """A gate for `workload`; clients seem to have asked for DESTINATION and `port`, which lookups of `told` gave.

    through  the site's proxy; `hosts` are the names that the operator gave addresses
    """
    with running_loop() as loop:
        records: list[Record] = []
        handed: list[tuple[socket.socket, Handover]] = []
        judged: list[Attempt] = []
        resolver = Names(names or {})

        def judge_and_note(attempt: Attempt) -> Verdict:
            judged.append(attempt)
            return judge(attempt) if judge else decide(policy, attempt)

        def names_of(_workload: str, _address: Address) -> tuple[Hostname, ...]:
            return tuple(Hostname(name) for name in told)

        if port != 443:
            original_dst = lambda sock: (DESTINATION, port)  # noqa: E731 - the parameter, for another port
        listener = loop.call(
            lambda: Listener(
                loop.epoll,
                original_dst=original_dst,
                exceeded=(budget or Budget(NewNames(), time.monotonic)).exceeded,
                identify=identify or (lambda address, user: workload),
                expect=lambda workload, port: expect(policy, workload, port),
                carries_plain=lambda workload, port: carries_plain(policy, workload, port),
                decide=judge_and_note,
                admit=admit,
                names_of=names_of,
                resolver=resolver,
                inspect=(lambda sock, handover: handed.append((sock, handover))) if has_inspector else None,
                record=records.append,
                clock=time.time,
                limits=limits,
                site=SiteProxy(through, {Hostname(name) for name in hosts}, resolver, is_own=is_own)
                if through
                else None,
                is_own=is_own,
                dialled=dialled,
            )
        )
        sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
        loop.call(lambda: listener.serve(sock))
        try:
            yield Gate(loop, listener, sock.getsockname(), resolver, records, handed, judged)
        finally:
            loop.call(listener.close)
            for handed_sock, _ in handed:
                handed_sock.close()


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end. Raises ConnectionResetError where it is a reset."""
    parts = []
    while data := sock.recv(65536):
        parts.append(data)
    return b"".join(parts)


def assert_refused(it: Gate) -> None:
    """A connection made now is reset, be it while it connects or right after."""
    with pytest.raises(ConnectionResetError), it.connect() as client:
        read_all(client)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, f"ended after {len(data)} of {size} bytes"
        data += part
    return data
