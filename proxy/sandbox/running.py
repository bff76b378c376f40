"""A sandbox in use: release the command, carry terminal and signals across, hand back its exit status."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from proxy.sandbox import terminal
from proxy.sandbox.inside import Hear, Say
from proxy.sandbox.network import Kind

if TYPE_CHECKING:  # this module is loaded before the fork, and an event loop may exist only after it
    from asyncio import AbstractEventLoop, Future

_MESSAGE = 64 * 1024
_ENVIRONMENT_CHUNK = 32 * 1024  # one message of a SEQPACKET socket must fit its send buffer
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class Bound:
    """A listener inside: every address of `family` at `port`. getsockname() of what it accepts is the destination."""

    kind: Kind
    family: socket.AddressFamily
    port: int
    socket: socket.socket


class Sandbox:
    """One command and its only way out. Close it always (it is a context manager): that ends all that is inside.

    sockets       the listeners, non-blocking, for the caller to serve
    packets       for ClosedPorts
    has_own_proc  False: a container kept /proc from being mounted, so it shows the outer process numbers
    """

    def __init__(
        self,
        *,
        pid: int,
        control: socket.socket,
        sockets: tuple[Bound, ...],
        packets: socket.socket,
        terminals: tuple[int, ...],
        relay_end: int | None,
        environment: dict[str, str],
        has_own_proc: bool,
    ) -> None:
        self.sockets, self.packets = sockets, packets
        self.has_own_proc = has_own_proc
        self._pid = pid  # process 1 inside
        self._pidfd = os.pidfd_open(pid)
        self._control = control
        self._terminals, self._relay_end = terminals, relay_end
        self._environment = environment
        self._takes_terminal = False
        self._status: int | None = None
        self._is_closed = False
        control.setblocking(True)
        for each in (*(bound.socket for bound in sockets), packets):
            each.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def release(self, environment: Mapping[str, str] | None = None) -> None:
        """Let the command run, with `environment` added to its own. Call it once, when everything is served.

        From now on signals are for the command: before `wait` listens they would end us instead of it.
        """
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, _: self.signal(number))
        merged = self._environment | dict(environment or {})
        text = b"\0".join(os.fsencode(f"{name}={value}") for name, value in merged.items())
        for start in range(0, len(text), _ENVIRONMENT_CHUNK):
            self._say(Hear.ENVIRONMENT + text[start : start + _ENVIRONMENT_CHUNK])
        # In a pipeline the keyboard is another program's until the command asks for it (Relay).
        self._takes_terminal = {0, 1} <= set(self._terminals) and terminal.is_foreground(0)
        self._say(Hear.GO + bytes([self._takes_terminal]))

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group. Nothing happens once it has ended."""
        self._say(Hear.SIGNAL + bytes([number]))

    async def wait(self) -> int:
        """Relay terminal and signals until the command ends. Returns its exit status, 128+N when signal N ended it.

        Everything that it started has ended too then, and all its output is with the user's terminal. The terminal is
        given back however this ends.
        """
        import asyncio  # only now: it must not be loaded before the fork

        loop = asyncio.get_running_loop()
        relay = self._open_relay(loop)
        ended: Future[None] = loop.create_future()
        forwarded = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
        for number in forwarded:
            loop.add_signal_handler(number, self.signal, number)
        loop.add_reader(self._control, self._hear, loop, relay)
        loop.add_reader(self._pidfd, self._reap, loop, ended)
        try:
            if relay:
                relay.start(take=self._takes_terminal)
            await ended
            if relay:
                await relay.output_ended
        finally:
            loop.remove_reader(self._pidfd)
            loop.remove_reader(self._control)
            for number in forwarded:
                loop.remove_signal_handler(number)
            if relay:
                relay.close()
        assert self._status is not None  # `ended` is set by `_reap` alone
        return self._status

    def close(self) -> None:
        """End everything inside, and close all sockets. Calling it again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)  # ours and not waited for, so the number is still its own
            self._collect()
        for each in (*(bound.socket for bound in self.sockets), self.packets, self._control):
            each.close()
        os.close(self._pidfd)
        if self._relay_end is not None:
            os.close(self._relay_end)

    def _open_relay(self, loop: AbstractEventLoop) -> terminal.Relay | None:
        if self._relay_end is None:
            return None
        return terminal.Relay(loop, self._relay_end, self._terminals[0], self.signal, self._continue)

    def _continue(self, in_foreground: bool) -> None:
        self._say(Hear.FOREGROUND if in_foreground else Hear.CONTINUE)

    def _say(self, message: bytes) -> None:
        with suppress(ConnectionError):  # it has ended: `wait` says so
            self._control.send(message)

    def _hear(self, loop: AbstractEventLoop, relay: terminal.Relay | None) -> None:
        try:
            message = self._control.recv(_MESSAGE)
        except ConnectionError:  # ended with something of ours unread
            message = b""
        if not message:
            loop.remove_reader(self._control)
        elif message[:1] == Say.STOPPED and relay:
            relay.command_stopped(message[1])

    def _reap(self, loop: AbstractEventLoop, ended: Future[None]) -> None:
        loop.remove_reader(self._pidfd)
        self._collect()
        ended.set_result(None)

    def _collect(self) -> None:
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._status = code if code >= 0 else 128 - code
