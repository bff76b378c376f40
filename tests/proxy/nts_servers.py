"""A time server with a key exchange, both on loopback, that does what a test scripts and keeps what it was shown."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from OpenSSL import SSL

from proxy.record import Peer
from proxy.wire.nts import EXPORTER, TO_CLIENT, TO_SERVER
from tests.proxy.ntp_servers import answer

UNIQUE, COOKIE, PLACEHOLDER, AUTHENTICATOR = 0x0104, 0x0204, 0x0304, 0x0404
COOKIE_SIZE = 100

type Field = tuple[int, bytes]


def record(kind: int, body: bytes, *, critical: bool = True) -> bytes:
    return struct.pack("!HH", kind | critical << 15, len(body)) + body


def response(
    *more: bytes, cookies: Sequence[bytes] = (), protocol: bytes = b"\0\0", aead: bytes = b"\0\x0f", end: bool = True
) -> bytes:
    """What a key exchange answers, or what it should not."""
    given = b"".join(record(5, cookie, critical=False) for cookie in cookies)
    return record(1, protocol) + record(4, aead) + b"".join(more) + given + (record(0, b"") if end else b"")


def fields(message: bytes) -> list[Field]:
    """The extension fields of a packet, read the simplest way."""
    found, at = [], 48
    while at < len(message):
        kind, size = struct.unpack_from("!HH", message, at)
        found.append((kind, message[at + 4 : at + size]))
        at += size
    return found


def extension(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack("!HH", kind, len(body) + 4) + body


def sealed(packet: bytes, key: bytes, inside: bytes = b"") -> bytes:
    nonce = os.urandom(16)
    text = AESSIV(key).encrypt(inside, [packet, nonce])
    return packet + extension(AUTHENTICATOR, struct.pack("!HH", len(nonce), len(text)) + nonce + text)


@dataclass
class Asked:
    """A query, and what its fields hold."""

    message: bytes
    unique: bytes
    cookie: bytes
    placeholders: int
    keys: tuple[bytes, bytes]
    peer: Peer


type Script = Callable[["NtsServer", Asked], Sequence[bytes]]


def honest(server: NtsServer, asked: Asked) -> Sequence[bytes]:
    return [server.sealed(asked)]


def listening(kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    return sock


@dataclass
class NtsServer:
    """Up while `serving` is open."""

    leaf: trustme.LeafCert
    script: Script = honest
    records: Callable[[Sequence[bytes]], bytes] | None = None  # instead of an honest response with these cookies
    alpn: bytes = b"ntske/1"  # empty: it chooses none
    is_old_tls: bool = False
    exchanges: int = 0
    asked: list[Asked] = field(default_factory=list)
    unproved: int = 0  # packets without a cookie of ours, or with a proof that does not hold
    sent: list[bytes] = field(default_factory=list)
    keys: dict[bytes, tuple[bytes, bytes]] = field(default_factory=dict)  # by cookie
    _tcp: socket.socket = field(default_factory=lambda: listening(socket.SOCK_STREAM))
    _udp: socket.socket = field(default_factory=lambda: listening(socket.SOCK_DGRAM))

    @property
    def exchange(self) -> Peer:
        host, port = self._tcp.getsockname()
        return host, port

    @property
    def time(self) -> Peer:
        host, port = self._udp.getsockname()
        return host, port

    def bake(self, keys: tuple[bytes, bytes]) -> bytes:
        cookie = os.urandom(COOKIE_SIZE)
        self.keys[cookie] = keys
        return cookie

    def sealed(self, asked: Asked, *, ahead_s: float = 0.0, key: bytes | None = None) -> bytes:
        """An answer as an honest server gives it: as many cookies as were asked for."""
        cookies = [self.bake(asked.keys) for _ in range(1 + asked.placeholders)]
        inside = b"".join(extension(COOKIE, cookie) for cookie in cookies)
        packet = answer(asked.message[:48], ahead_s=ahead_s) + extension(UNIQUE, asked.unique)
        return sealed(packet, key or asked.keys[1], inside)

    def close(self) -> None:
        self._tcp.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):  # it is connected to nobody; whoever reads there wakes up all the same
            self._udp.shutdown(socket.SHUT_RDWR)

    def serve_keys(self) -> None:
        self._tcp.listen()
        with self._tcp:
            while True:
                try:
                    sock, _ = self._tcp.accept()
                except OSError:
                    return
                with sock, suppress(SSL.Error):  # the client may not like what it is shown
                    self._exchange(sock)

    def _exchange(self, sock: socket.socket) -> None:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        if self.is_old_tls:
            context.set_max_proto_version(SSL.TLS1_2_VERSION)
        chain = self.leaf.cert_chain_pems
        with chain[0].tempfile() as certificate, self.leaf.private_key_pem.tempfile() as key:
            context.use_certificate_file(certificate)
            context.use_privatekey_file(key)
        context.set_alpn_select_callback(lambda _, offered: self.alpn or SSL.NO_OVERLAPPING_PROTOCOLS)
        tls = SSL.Connection(context, sock)
        tls.set_accept_state()
        tls.do_handshake()
        self.exchanges += 1
        tls.recv(4096)
        to_server, to_client = (tls.export_keying_material(EXPORTER, 32, each) for each in (TO_SERVER, TO_CLIENT))
        cookies = [self.bake((to_server, to_client)) for _ in range(8)]
        port = record(7, self.time[1].to_bytes(2), critical=False)
        tls.sendall(self.records(cookies) if self.records else response(port, cookies=cookies))
        with suppress(SSL.Error):
            tls.shutdown()

    def serve_time(self) -> None:
        with self._udp:
            while True:
                try:
                    message, peer = self._udp.recvfrom(4096)
                except OSError:
                    return
                if not message:
                    return
                for reply in self._replies(message, peer):
                    self.sent.append(reply)
                    self._udp.sendto(reply, peer)

    def _replies(self, message: bytes, peer: Peer) -> Sequence[bytes]:
        found = fields(message)
        kinds = [kind for kind, _ in found]
        bodies = dict(found)
        cookie = bodies.get(COOKIE, b"")
        if cookie not in self.keys or not self._is_proved(message, bodies, self.keys[cookie][0]):
            self.unproved += 1
            return []
        asked = Asked(message, bodies[UNIQUE], cookie, kinds.count(PLACEHOLDER), self.keys[cookie], peer)
        self.asked.append(asked)
        return self.script(self, asked)

    def _is_proved(self, message: bytes, bodies: dict[int, bytes], key: bytes) -> bool:
        body = bodies[AUTHENTICATOR]
        before = message[: -(len(body) + 4)]
        return AESSIV(key).decrypt(body[20:36], [before, body[4:20]]) == b""


@contextmanager
def serving(server: NtsServer) -> Iterator[NtsServer]:
    threads = [threading.Thread(target=each, daemon=True) for each in (server.serve_keys, server.serve_time)]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        server.close()
        for thread in threads:
            thread.join(20)


def roots(authority: trustme.CA, directory: Path) -> str:
    path = directory / "roots.pem"
    authority.cert_pem.write_to_path(str(path))
    ssl.create_default_context(cafile=str(path))  # it can be read
    return str(path)
