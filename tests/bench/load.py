"""A load of conversations the size of a TLS 1.3 request, without its arithmetic: what remains is the gate's cost."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

TURNS = (
    (2800, 90),
    (250, 110),
    (1200, 0),
)  # bytes the origin answers, bytes the client says then; the hello came first


def _talk(sock: socket.socket, says: Iterator[bytes], expects: Iterator[int]) -> Callable[[], bool]:
    """One side of a conversation as a function to call when there is something to read. True when it is over."""
    missing = next(expects)

    def readable() -> bool:
        nonlocal missing
        data = sock.recv(65536)
        if not data:
            raise ConnectionError("the other side left early")
        missing -= len(data)
        if missing > 0:
            return False
        said = next(says, b"")
        if said:
            sock.sendall(said)
        missing = next(expects, 0)
        return missing == 0

    return readable


def run_origin(listener: socket.socket, hello_size: int) -> None:
    """Answer for ever."""
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    talks: dict[int, tuple[socket.socket, Callable[[], bool]]] = {}
    answers = [bytes(size) for size, _ in TURNS]
    hears = [hello_size, *(size for _, size in TURNS[:-1])]
    while True:
        for fd, _ in epoll.poll():
            if fd == listener.fileno():
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                talks[sock.fileno()] = sock, _talk(sock, iter(answers), iter(hears))
                epoll.register(sock.fileno(), select.EPOLLIN)
                continue
            sock, readable = talks[fd]
            try:
                over = readable()
            except OSError:
                over = True
            if over:
                del talks[fd]
                sock.close()


def converse(address: tuple[str, int], hello: bytes, count: int, in_flight: int) -> int:
    """Hold `count` conversations, so many at a time. Returns how many came to their end."""
    epoll = select.epoll()
    talks: dict[int, tuple[socket.socket, Callable[[], bool]]] = {}
    says = [bytes(size) for _, size in TURNS[:-1]]
    hears = [size for size, _ in TURNS]

    def begin() -> None:
        sock = socket.create_connection(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(hello)
        talks[sock.fileno()] = sock, _talk(sock, iter(says), iter(hears))
        epoll.register(sock.fileno(), select.EPOLLIN)

    begun = done = 0
    while begun < count or talks:
        while begun < count and len(talks) < in_flight:
            begin()
            begun += 1
        for fd, _ in epoll.poll():
            sock, readable = talks[fd]
            try:
                over = readable()
                done += over
            except OSError:
                over = True
            if over:
                del talks[fd]
                sock.close()
    return done


def _serve_loads(pipe: Connection) -> None:
    while (task := pipe.recv()) is not None:
        pipe.send(converse(*task))


@contextmanager
def processes(hello_size: int) -> Iterator[tuple[tuple[str, int], Callable[[tuple[str, int], bytes, int, int], int]]]:
    """An origin and a load client in processes of their own: the origin's address, and `converse` run over there."""
    spawn = get_context("fork")
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        origin = spawn.Process(target=run_origin, args=(listener, hello_size), daemon=True)
        origin.start()
        address = listener.getsockname()
    ours, theirs = spawn.Pipe()
    client = spawn.Process(target=_serve_loads, args=(theirs,), daemon=True)
    client.start()

    def load(to: tuple[str, int], hello: bytes, count: int, in_flight: int) -> int:
        ours.send((to, hello, count, in_flight))
        done: int = ours.recv()
        return done

    try:
        yield address, load
    finally:
        ours.send(None)
        client.join(5)
        origin.kill()
        origin.join(5)
        ours.close()
        theirs.close()
