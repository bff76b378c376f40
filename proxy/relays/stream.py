"""Carries bytes between two connected TCP sockets inside the kernel (splice(2)); they never enter this process.

Half-close, reset, back-pressure and the idle deadline pass through as if the two ends were one connection.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable
from enum import StrEnum
from os import SPLICE_F_MOVE, SPLICE_F_NONBLOCK, splice

from proxy.epoll import ERR, IN, OUT, Epoll

PIPE_SIZE = 1 << 19  # asked for; the kernel may grant less (fs.pipe-user-pages-soft)
# At most so much moves in one call: a fast flow must not hold up the others, nor a slow one hold memory.
CHUNK = 1 << 19
SPARE_PIPES = 64
PAST_URGENT = 4096  # bytes read the plain way behind an urgent one: no more than the smallest pipe takes
_MOVE = SPLICE_F_MOVE | SPLICE_F_NONBLOCK
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

type Pipe = tuple[int, int]


class Pipes:
    """Empty pipes for reuse. A direction holds one only while bytes are in it, so idle flows hold none."""

    def __init__(self) -> None:
        self._spare: list[Pipe] = []

    def take(self) -> Pipe:
        """An empty pipe. Raises OSError when descriptors have run out."""
        if self._spare:
            return self._spare.pop()
        pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except PermissionError:  # over the user's share of pipe memory: the default size works, more slowly
            pass
        return pipe

    def give(self, pipe: Pipe) -> None:
        """Take back an empty pipe."""
        if len(self._spare) < SPARE_PIPES:
            self._spare.append(pipe)
        else:
            drop_pipe(pipe)

    def close(self) -> None:
        while self._spare:
            drop_pipe(self._spare.pop())


def drop_pipe(pipe: Pipe) -> None:
    os.close(pipe[0])
    os.close(pipe[1])


def reset(sock: socket.socket) -> None:
    """Close `sock` so that its peer sees a reset: what was sent is not to be taken for the whole."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    except OSError:
        pass  # the connection is gone, there is nobody to tell
    sock.close()


class End(StrEnum):
    """How a flow ended."""

    CLOSED = "closed"  # both sides said goodbye
    RESET = "reset"
    IDLE = "idle"
    CRASHED = "crashed"


class _Side:
    """One of the two sockets, and what epoll is asked about it."""

    __slots__ = ("events", "fd", "inward", "is_broken", "is_parked", "outward", "relay", "sock")

    inward: _Direction  # what is read here
    outward: _Direction  # what is written here

    def __init__(self, relay: StreamRelay, sock: socket.socket) -> None:
        self.relay = relay
        self.sock = sock
        self.fd = sock.fileno()
        self.events = IN
        self.is_parked = False
        self.is_broken = False  # a write failed: the end of its input, when it comes, is a reset

    def ready(self, events: int) -> None:
        relay = self.relay
        relay.deadline = relay.epoll.now + relay.idle_s
        if not self.events:
            self._end_unasked(events)
            return
        if self.events & IN and events & ~OUT:
            self.inward.pump()
        if self.events & OUT and events & ~IN and not relay.is_over:
            self.outward.resume()

    def _end_unasked(self, events: int) -> None:
        """It reports its end, for ever, and there is nothing to do about it yet: look away until there is."""
        if events & ERR and self.inward.is_done:
            self.relay.end(End.RESET)
        else:
            self.relay.epoll.remove(self.fd)
            self.is_parked = True

    def ask(self, events: int) -> None:
        """Wait for these events from now on, or for none."""
        if events == self.events:
            return
        self.events = events
        relay = self.relay
        if not self.is_parked:
            relay.epoll.change(self.fd, events)
        elif events:
            self.is_parked = False
            relay.epoll.put(self.fd, events, self.ready, relay.failed)


class _Direction:
    """Bytes from one side to the other, through a pipe that is held only while bytes are in it."""

    __slots__ = ("count", "held", "is_done", "opposite", "pipe", "relay", "source", "target")

    opposite: _Direction

    def __init__(self, relay: StreamRelay, source: _Side, target: _Side) -> None:
        self.relay = relay
        self.source = source
        self.target = target
        self.pipe: Pipe | None = None
        self.held = 0  # bytes in the pipe
        self.count = 0  # bytes the target took
        self.is_done = False
        source.inward = target.outward = self

    def pump(self) -> None:
        """The source has something to read. Where the target takes no more, only its room is asked for."""
        if self._fill() and not self._drain():
            self.source.ask(self.source.events & ~IN)
            self.target.ask(self.target.events | OUT)

    def resume(self) -> None:
        """The target has room again, or is gone. What has come meanwhile is moved at once, before anything is asked."""
        if self._drain() and (self.is_done or not self._fill() or self._drain()) and not self.relay.is_over:
            self.target.ask(self.target.events & ~OUT)
            if not self.is_done:
                self.source.ask(self.source.events | IN)

    def _fill(self) -> bool:
        """Take what has come into the pipe. False: nothing, the end, or a reset."""
        pipes = self.relay.pipes
        pipe = pipes.take()
        try:
            try:
                got = splice(self.source.fd, pipe[1], CHUNK, flags=_MOVE)
            except BlockingIOError:  # nothing; or an urgent byte, at which splice stops while epoll reports it for ever
                got = self._step_over(pipe)
        except BlockingIOError:
            pipes.give(pipe)
            return False
        except OSError:
            pipes.give(pipe)
            self.relay.end(End.RESET)
            return False
        if got:
            self.pipe = pipe
            self.held = got
            return True
        pipes.give(pipe)
        self._finish()
        return False

    def _step_over(self, pipe: Pipe) -> int:
        """Read past an urgent byte (RFC 6093), which is left out. Raises BlockingIOError where there is none."""
        data = self.source.sock.recv(PAST_URGENT)
        return os.write(pipe[1], data) if data else 0

    def _drain(self) -> bool:
        """Empty the pipe into the target. False: the target has no room for the rest."""
        assert self.pipe is not None
        try:
            while self.held:
                moved = splice(self.pipe[0], self.target.fd, self.held, flags=_MOVE)
                self.held -= moved
                self.count += moved
        except BlockingIOError:
            return False
        except OSError:
            self._break()
            return True
        self.relay.pipes.give(self.pipe)
        self.pipe = None
        return True

    def _finish(self) -> None:
        """The source ended: repeat that to the target, which may go on talking."""
        self.is_done = True
        if self.source.is_broken:
            self.relay.end(End.RESET)
            return
        if self.opposite.is_done:
            self.relay.end(End.RESET if self.target.is_broken else End.CLOSED)
            return
        self.source.ask(self.source.events & ~IN)
        try:
            self.target.sock.shutdown(socket.SHUT_WR)
        except OSError:  # reset; its input says so as well, after what it still sent
            self.target.is_broken = True

    def _break(self) -> None:
        """The target takes nothing any more. What it sent before is still delivered, then the source is reset too."""
        self.is_done = True
        self.target.is_broken = True
        self.drop()
        if self.opposite.is_done:
            self.relay.end(End.RESET)
        else:
            self.source.ask(self.source.events & ~IN)

    def drop(self) -> None:
        """Throw away the pipe with the bytes in it."""
        if self.pipe is not None:
            drop_pipe(self.pipe)
            self.pipe = None
            self.held = 0


class StreamRelay:
    """One flow. `start()` takes over both sockets; `ended` is called once with how it ended, both are closed then.

    sent, received  bytes that reached the upstream, and the client
    """

    __slots__ = (
        "__weakref__",
        "_ended",
        "client",
        "deadline",
        "down",
        "epoll",
        "idle_s",
        "is_over",
        "pipes",
        "up",
        "upstream",
    )

    def __init__(
        self,
        epoll: Epoll,
        pipes: Pipes,
        client: socket.socket,
        upstream: socket.socket,
        *,
        idle_s: float,
        ended: Callable[[End], None],
    ) -> None:
        self.epoll = epoll
        self.pipes = pipes
        self.idle_s = idle_s
        self.is_over = False
        self._ended = ended
        self.client = _Side(self, client)
        self.upstream = _Side(self, upstream)
        self.up = _Direction(self, self.client, self.upstream)
        self.down = _Direction(self, self.upstream, self.client)
        self.up.opposite = self.down
        self.down.opposite = self.up
        self.deadline = 0.0

    @property
    def sent(self) -> int:
        return self.up.count

    @property
    def received(self) -> int:
        return self.down.count

    def start(self) -> None:
        """Begin with what the client has sent already."""
        for side in (self.client, self.upstream):
            self.epoll.put(side.fd, IN, side.ready, self.failed)
        self.deadline = self.epoll.now + self.idle_s
        self.epoll.watch(self)
        self.up.pump()

    def end(self, how: End) -> None:
        """Close both sockets: with a reset unless both sides had ended."""
        if self.is_over:
            return
        self.is_over = True
        self.epoll.unwatch(self)
        self.up.drop()
        self.down.drop()
        for side in (self.client, self.upstream):
            self.epoll.forget(side.fd)
            if how is End.CLOSED:
                side.sock.close()
            else:
                reset(side.sock)
        self._ended(how)

    def expired(self) -> None:
        self.end(End.IDLE)

    def failed(self, _error: Exception) -> None:
        self.end(End.CRASHED)
