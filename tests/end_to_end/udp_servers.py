"""UDP servers on a machine of a test, run by the test's own process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.end_to_end.firewalled import family_of
from tests.end_to_end.namespaces import Namespaces

type Script = Callable[[bytes], bytes | None]


@dataclass
class Heard:
    """What came, and from which address."""

    messages: list[bytes] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


@contextmanager
def udp_server(net: Namespaces, machine: str, address: str, port: int, answer: Script) -> Iterator[Heard]:
    """Answers at that address as scripted; None says nothing."""
    heard = Heard()
    sock = net.open_socket(machine, family_of(address), socket.SOCK_DGRAM)
    sock.bind((address, port))

    def serve() -> None:
        while True:
            try:
                message, peer = sock.recvfrom(1 << 16)
            except OSError:
                return
            if message == b"\0end":
                return
            heard.messages.append(message)
            heard.sources.append(peer[0])
            if (reply := answer(message)) is not None:
                sock.sendto(reply, peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        with net.open_socket(machine, family_of(address), socket.SOCK_DGRAM) as ending:
            ending.sendto(b"\0end", (address, port))
        thread.join(20)
        sock.close()
