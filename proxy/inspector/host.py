"""The gate's side of the inspector: starts the process on first need, hands it sockets, takes its records.

Nothing here blocks the gate. Connections wait, up to a bound, while the process starts. When it dies, its connections
are lost; it is started again for the next one, after a pause, and every connection that was not served is recorded.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import IO

import orjson

from addons.answers import answer
from addons.judge import BAD_GATEWAY, Judgement
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy import own_code
from proxy.inspector.channel import Channel
from proxy.inspector.handover import Configuration, Handover
from proxy.record import Sink, record_of
from proxy.wire.client_hello import Alert, render_alert

MAX_WAITING = 1024  # connections that wait for the process; each holds a descriptor
START_S = 20.0  # a process that is not ready by then never will be
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
SETTLED_S = 60.0  # it ran so long: the next failure is a new one
DRAIN_S = 1.0  # what clients that are gone have left behind is judged and recorded within it
MAX_UNREAD = 64 * 1024


class Inspector:
    """Takes over connections. Runs on the loop that is current when the first one comes.

    configuration  asked when the process starts, so that a gate which inspects nothing holds no key
    record         told of every request, and of every connection that could not be served
    log            told, in one line, of what went wrong with the process
    """

    def __init__(
        self,
        configuration: Callable[[], Configuration],
        record: Sink,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._configuration = configuration
        self._record = record
        self._log = log or _print
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._waiting: list[tuple[socket.socket, Handover]] = []
        self._is_ready = False
        self._deadline: asyncio.TimerHandle | None = None
        self._started = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._not_before = 0.0
        self._drained: asyncio.Event | None = None
        self._is_used = False  # this process was given a connection

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    def inspect(self, sock: socket.socket, handover: Handover) -> None:
        """Take over `sock`, of which nothing was read. Never blocks and never raises."""
        self.start()
        self._is_used = True
        if self._channel is None or self._channel.unsent + len(self._waiting) >= MAX_WAITING:
            self._refuse(sock, handover)
        elif self._is_ready:
            self._channel.send(handover.to_bytes(), sock)
        else:
            self._waiting.append((sock, handover))

    async def drain(self) -> None:
        """End the process when it has finished what it was given, and told of it; within DRAIN_S in any case."""
        if self._channel is None or not self._is_used:  # it may be starting still, for nothing
            self.close()
            return
        self._drained = asyncio.Event()
        if self._is_ready or not self._waiting:
            self._channel.end()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._drained.wait()
        self.close()

    def close(self) -> None:
        """End the process, and with it every connection it has. Records still under way are lost; `drain` waits."""
        if self._channel is not None:
            self._stop()

    def start(self) -> None:
        """Start the process, unless it runs or failed a moment ago. Only saves the first connection the wait."""
        if self._channel is None and monotonic() >= self._not_before:
            self._start()

    def _start(self) -> None:
        try:
            configuration = self._configuration().to_bytes()
        except Exception as error:  # a process that waits for it in vain would keep its connections waiting too
            self._log(f"the inspector has no configuration: {type(error).__name__}")
            self._pause()
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # No -O: it would save a tenth of a request, but where nobody has compiled for it the start takes twice as long.
        # A group of its own: the terminal's interrupt is for the gate, which then lets go of the inspector.
        command = own_code.command("proxy.inspector.main", str(theirs.fileno()), str(os.getpid()))
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )
        except OSError as error:
            ours.close()
            self._log(f"the inspector did not start: {error}")
            self._pause()
            return
        finally:
            theirs.close()
        self._started = monotonic()
        self._is_used = False
        self._channel = Channel(ours, received=self._receive, closed=self._lose)
        self._channel.send(b"configuration", _memory(configuration))
        self._deadline = asyncio.get_running_loop().call_later(START_S, self._lose)

    def _receive(self, message: bytes, _descriptor: int | None) -> None:
        match orjson.loads(message):
            case {"records": [*records]}:
                for record in records:
                    self._record(record)
            case {"ready": True}:
                self._serve_waiting()
            case {"failed": str(text)}:
                self._log(f"the inspector did not start: {text}")
            case {"log": str(text)}:
                self._log(f"the inspector failed on one connection: {text}")

    def _serve_waiting(self) -> None:
        self._is_ready = True
        if self._deadline:
            self._deadline.cancel()
        waiting, self._waiting = self._waiting, []
        for sock, handover in waiting:
            self.inspect(sock, handover)
        if self._drained and self._channel is not None:
            self._channel.end()

    def _lose(self) -> None:
        """The process is gone, or has not become ready in time."""
        if self._drained:
            self._drained.set()
            return
        self._log(f"the inspector ended; it is started again, not before {self._pause_s:g} s from now")
        self._stop()
        self._pause()

    def _pause(self) -> None:
        if monotonic() - self._started > SETTLED_S:
            self._pause_s = FIRST_PAUSE_S
        self._not_before = monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _stop(self) -> None:
        if self._deadline:
            self._deadline.cancel()
        if self._channel is not None:
            for message, carried in self._channel.close():
                if isinstance(carried, socket.socket):
                    self._refuse(carried, Handover.from_bytes(message))
        if self._process:
            self._process.kill()
            self._process.wait()
        waiting, self._waiting = self._waiting, []
        self._channel = self._process = None
        self._is_ready = False
        for sock, handover in waiting:
            self._refuse(sock, handover)

    def _refuse(self, sock: socket.socket, handover: Handover) -> None:
        """Say so in the client's own protocol, record it, close."""
        stage = Stage.HTTP if handover.plain else Stage.TLS
        reason = Reason.CLIENT_GONE if _has_gone(sock) else Reason.GATE_FAILED
        attempt = Attempt(
            stage,
            handover.workload,
            handover.host,
            handover.port,
            time=handover.opened,
            plain=handover.plain,
            fault=reason,
        )
        verdict = Verdict(Action.DENY, reason, stage)
        reply = render_alert(Alert.INTERNAL_ERROR)
        if handover.plain:
            judgement = Judgement(handover.id, attempt, verdict, BAD_GATEWAY, "the inspector is not running")
            reply = answer(judgement, closes=True).to_bytes()
        with sock:
            try:
                sock.setblocking(False)
                sock.recv(MAX_UNREAD)  # bytes left in the queue would turn the close into a reset
                sock.send(reply)
            except OSError:
                pass  # the client is gone, and recorded below
        self._record(
            record_of(
                attempt,
                verdict,
                id=handover.id,
                source=handover.source,
                destination=handover.destination,
                started=handover.opened,
            )
        )


def _has_gone(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _memory(content: bytes) -> IO[bytes]:
    """A file that is on no disk, for what is too long for one message and must not be seen."""
    file = open(os.memfd_create("configuration"), "w+b")  # noqa: SIM115 - the channel closes it
    file.write(content)
    file.seek(0)
    return file


def _print(line: str) -> None:
    print(f"outgate: {line}", file=sys.stderr)
