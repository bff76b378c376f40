"""An explicit proxy on a listener of its own, and a client that speaks to it byte by byte: what these tests share."""

from __future__ import annotations

import asyncio
import json
import socket
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from policies.engine import identify
from policies.index import Policy
from policies.model import Address
from proxy.explicit.credentials import hash_password, store_credential
from proxy.explicit.entrance import Entrance
from proxy.explicit.verifier import Verifier
from proxy.limits import Limits
from proxy.record import Record
from proxy.resolver import Resolution
from tests.builders import policy
from tests.proxy.gates import PATIENCE_S, Gate, eventually, gate

ANN, BOB = "127.0.0.1", "127.0.0.2"  # the address of no workload, and that of `bob`
UNMATCHED = "127.0.0.66"

POLICY = policy(
    """
    version: 1
    workloads:
      ann:
        match: {user: ann}
        rules: [{host: a.example, ports: [80, 443]}, {host: b.example}, {tcp: "c.example:22"}]
      bob:
        match: {address: [127.0.0.2/32, 192.0.2.0/24, "2001:db8::/32"]}
        rules: [{host: b.example, ports: [80, 443]}, {tcp: "127.0.0.0/8:1-65535"}]
    """
)


def authorization(name: str, password: str) -> str:
    return f"Proxy-Authorization: Basic {b64encode(f'{name}:{password}'.encode()).decode()}"


def connect(target: str, *fields: str, version: str = "1.1") -> bytes:
    return "".join(f"{line}\r\n" for line in (f"CONNECT {target} HTTP/{version}", *fields, "")).encode()


def get(url: str, *fields: str, version: str = "1.1", method: str = "GET") -> bytes:
    host = url.split("/")[2]
    lines = (f"{method} {url} HTTP/{version}", f"Host: {host}", *fields, "")
    return "".join(f"{line}\r\n" for line in lines).encode()


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer of the proxy."""

    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def problem(self) -> Any:  # JSON
        return json.loads(self.body)


class Client:
    """One connection to the proxy."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE_S)
        self._read = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, data: bytes) -> Answered:
        self.send(data)
        return self.answered()

    def answered(self) -> Answered:
        head = self._take_until(b"\r\n\r\n").decode()
        lines = head.split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return Answered(int(lines[0].split(" ")[1]), fields, self._take(int(fields.get("content-length", "0"))))

    def read_to_end(self) -> bytes:
        data, self._read = self._read, b""
        while more := self.sock.recv(65536):
            data += more
        return data

    def is_closed(self) -> bool:
        """It is over, one way or the other."""
        try:
            return not self.read_to_end()
        except ConnectionResetError:
            return True

    def _take_until(self, mark: bytes) -> bytes:
        while mark not in self._read:
            self._more()
        return self._take(self._read.index(mark) + len(mark))

    def _take(self, size: int) -> bytes:
        while len(self._read) < size:
            self._more()
        taken, self._read = self._read[:size], self._read[size:]
        return taken

    def _more(self) -> None:
        data = self.sock.recv(65536)
        assert data, f"ended after {self._read!r}"
        self._read += data


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy and what it did."""

    gate: Gate
    address: tuple[str, int]
    users: Path
    said: list[str]

    @contextmanager
    def client(self, source: str = UNMATCHED) -> Iterator[Client]:
        with socket.create_connection(self.address, PATIENCE_S, source_address=(source, 0)) as sock:
            yield Client(sock)

    def ask(self, data: bytes, source: str = UNMATCHED) -> Answered:
        """The one answer on a connection of its own."""
        with self.client(source) as client:
            return client.ask(data)

    def record(self) -> Record:
        return self.gate.record()

    def reasons(self) -> list[object]:
        return self.gate.reasons()

    def is_idle(self) -> bool:
        return self.gate.listener.open_connections == 0


@contextmanager
def proxy(
    directory: Path,
    *,
    of: Policy = POLICY,
    users: Mapping[str, str] | None = None,
    names: Mapping[str, Resolution] | None = None,
    balancers: Sequence[str] = (),
    limits: Limits | None = None,
    failure_s: float = 0.05,
    has_inspector: bool = True,
) -> Iterator[Proxy]:
    """A proxy for `of`; with `users` (names and passwords) it asks for credentials."""
    path = directory / "users"
    for name, password in (users or {}).items():
        store_credential(path, name, hash_password(password))
    said: list[str] = []

    def identify_by(address: Address, user: str | None) -> str:
        return identify(of, address, user)

    with gate(of, names, limits=limits, identify=identify_by, has_inspector=has_inspector) as it:
        verifier = Verifier(path, said.append, failure_s=failure_s) if users is not None else None
        entrance = Entrance(verifier, [ip_network(network) for network in balancers])
        door = socket.create_server(("127.0.0.1", 0), backlog=256)
        it.loop.call(lambda: it.listener.serve(door, entrance.meet))
        yield Proxy(it, door.getsockname(), path, said)
        eventually(lambda: it.listener.open_connections == 0 or it.loop.crashes, "every connection ends")
        assert it.loop.crashes == []
        it.loop.call(_cancel_tasks)


def _cancel_tasks() -> None:
    """Guesses may still be waiting for their turn."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
