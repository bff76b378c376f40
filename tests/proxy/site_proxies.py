"""A site's proxy on loopback, obedient or hostile, that keeps the heads it was sent."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tests.proxy.gates import PATIENCE_S

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_CONNECT = re.compile(rb"CONNECT (\[[0-9a-f:.]+\]|[^:\s]+):([0-9]+) HTTP/1\.1\r\n")

type Reply = Callable[[bytes], bytes | None]  # to a head; None: obey


class SiteProxy:
    """Connects CONNECTs to `origins` by name or address, and forwards plain requests in absolute form there too."""

    def __init__(self, origins: Mapping[str, tuple[str, int]], reply: Reply, *, address: str) -> None:
        self._origins = origins
        self.reply = reply
        self._listener = socket.create_server((address, 0), backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()
        self.heads: list[bytes] = []
        self.closed = threading.Semaphore(0)  # one for each connection that has ended
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def targets(self) -> list[str]:
        """What was asked for, in order."""
        return [head.split(b" ")[1].decode() for head in self.heads]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(PATIENCE_S)
        for sock in tuple(self._open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        self._open.add(sock)
        try:
            with sock:
                sock.settimeout(PATIENCE_S)
                self._talk(sock)
        except OSError:
            pass
        finally:
            self._open.discard(sock)
            self.closed.release()

    def _talk(self, sock: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(65536)
            if not data:
                return
            head += data
        self.heads.append(head)
        reply = self.reply(head)
        if reply is not None:
            sock.sendall(reply)
            while sock.recv(65536):  # keeps the connection until the other side ends it
                pass
            return
        if found := _CONNECT.match(head):
            with self._reach(found[1].decode().strip("[]")) as origin:
                sock.sendall(ESTABLISHED)
                self._relay(sock, origin)
            return
        host = re.match(rb"[A-Z]+ http://([^/:]+)", head)
        assert host, head
        with self._reach(host[1].decode()) as origin:
            origin.sendall(head)
            self._relay(sock, origin)

    def _reach(self, target: str) -> socket.socket:
        return socket.create_connection(self._origins[target], timeout=PATIENCE_S)

    def _relay(self, client: socket.socket, origin: socket.socket) -> None:
        def carry(source: socket.socket, target: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        upward = threading.Thread(target=carry, args=(client, origin), daemon=True)
        upward.start()
        carry(origin, client)
        upward.join(PATIENCE_S)


@contextmanager
def site_proxy(
    origins: Mapping[str, tuple[str, int]] | None = None,
    reply: Reply = lambda head: None,
    *,
    address: str = "127.0.0.1",
) -> Iterator[SiteProxy]:
    """`origins`: where each name or address leads. `reply`: the bytes to send instead of obeying."""
    proxy = SiteProxy({} if origins is None else origins, reply, address=address)
    try:
        yield proxy
    finally:
        proxy.close()
