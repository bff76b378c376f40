"""A whole gate on a loop of its own, in front of one TLS origin, whose policy is swapped while clients talk to it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import trustme

from pki.authority import Authority, certificates_pem, create_authority
from pki.issuers import issuers_text
from policies.hostnames import Hostname
from policies.index import Policy
from policies.tree import Source
from proxy.compiled import write_policy
from proxy.hosts import HostsEntry
from proxy.inspecting import HttpHost
from proxy.metrics.meter import Totals
from proxy.original_dst import Destination
from proxy.policy_files import load_sources
from proxy.record import Record
from proxy.runtime import Gate, Settings
from tests.proxy.gates import DESTINATION, PATIENCE_S, Loop, eventually
from tests.proxy.inspecting import Origin, Reply, get, read_reply, response

INSPECTED, CARRIED = "inspected.test", "carried.test"


def policy_of(text: str) -> Policy:
    return load_sources([Source("p.yaml", text)])


def of_app(*rules: str, match: str = "127.0.0.0/8") -> str:
    """One workload with these rules."""
    lines = "".join(f"      - {rule}\n" for rule in rules)
    return f"version: 1\nworkloads:\n  app:\n    match: {{address: [{match}]}}\n    rules:\n{lines or '      []'}"


@dataclass
class Serving:
    """Clients seem to have asked for `destination`; both names lead to the origin."""

    directory: Path
    policy: str
    workload: str | None = None
    destination: Destination = (DESTINATION, 443)
    http_host: HttpHost = HttpHost.MITMPROXY
    is_compiled: bool = True  # as in a worker; else the gate writes what its inspector reads, as in `outgate run`
    authority: Authority = field(default_factory=lambda: create_authority(datetime.now(UTC)))
    records: list[Record] = field(default_factory=list)
    inner: Totals = field(default_factory=Totals)

    def __enter__(self) -> Self:
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(INSPECTED, CARRIED).configure_cert(context)
        self.origin = Origin(context, lambda _request, _sock: response())
        self._origin_ca = self.directory / "origin-ca.pem"
        authority.cert_pem.write_to_path(str(self._origin_ca))
        self._roots = self.directory / "roots.pem"
        self._roots.write_bytes(certificates_pem(*(root.certificate for root in self.authority.roots)))
        self.loop = Loop()
        door = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address: tuple[str, int] = door.getsockname()
        self.gate = self.loop.call(self._make)
        self.loop.call(lambda: self.gate.listen(door))
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.gate.close())
        self.loop.close()
        self.origin.close()

    def _make(self) -> Gate:
        policy = policy_of(self.policy)
        entry = HostsEntry((ip_address("127.0.0.1"),), self.origin.port)
        issuing = issuers_text(self.authority.issuers)
        settings = Settings(
            issuing=lambda: issuing,
            compiled=write_policy(policy) if self.is_compiled else None,
            workload=self.workload,
            http_host=self.http_host,
            hosts={Hostname(INSPECTED): entry, Hostname(CARRIED): entry},
            upstream_ca=str(self._origin_ca),
            nameservers=(),
        )
        return Gate(
            policy,
            settings,
            original_dst=lambda _: self.destination,
            record=self.records.append,
            inner=self.inner,
        )

    # --- the gate ---

    def run[T](self, coroutine: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop._loop).result(PATIENCE_S)

    def swap(self, text: str) -> str:
        """Have the gate judge by another policy. Returns its generation."""
        policy = policy_of(text)
        self.run(self.gate.swap(write_policy(policy)))
        return policy.generation

    def sign_by(self, authority: Authority) -> None:
        """Have the gate show leaves of another authority; clients trust its roots as well."""
        with self._roots.open("ab") as roots:
            roots.write(certificates_pem(*authority.trusted))
        self.loop.call(lambda: self.gate.sign_by(issuers_text(authority.issuers)))

    @property
    def inspector(self) -> int:
        """The process."""
        pid = self.loop.call(lambda: self.gate._inspector.pid)
        assert pid is not None
        return pid

    # --- clients ---

    def dial(self, source: str = "127.0.0.1") -> socket.socket:
        sock = socket.create_connection(self.address, timeout=PATIENCE_S, source_address=(source, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def connect(self, host: str, source: str = "127.0.0.1") -> ssl.SSLSocket:
        """A client's TLS for `host`: verified by the gate's roots where it inspects, else by the origin's."""
        return self.shake_hands(self.dial(source), host)

    def shake_hands(self, sock: socket.socket, host: str) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self._roots if host == INSPECTED else self._origin_ca))
        return context.wrap_socket(sock, server_hostname=host)

    def ask(self, sock: socket.socket, target: str = "/search", host: str = INSPECTED) -> Reply:
        sock.sendall(get(target, host=host))
        return read_reply(sock)[0]

    def record(self, number: int) -> Record:
        """The record with this number, waited for."""
        eventually(lambda: len(self.records) > number, f"record {number}")
        return self.records[number]
