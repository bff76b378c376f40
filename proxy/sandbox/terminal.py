"""The command's own terminal, and the relay between it and the user's.

A terminal that is shared can be typed into (TIOCSTI), so the command gets a pair of its own, and only bytes cross.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
import tty
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the pair is opened before an event loop may exist
    from asyncio import AbstractEventLoop

_TIOCSPTLCK = 0x4004_5431
_TIOCGPTPEER = 0x5441
_CHUNK = 64 * 1024
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Pair:
    outer: int  # the relay's end
    inner: int  # the command's end


def open_pair(like: int) -> Pair:
    """A new terminal with the settings and size of `like`, made the controlling one of this session."""
    outer = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(outer, _TIOCSPTLCK, struct.pack("i", 0))
    inner = fcntl.ioctl(outer, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    os.set_inheritable(inner, False)
    termios.tcsetattr(inner, termios.TCSANOW, termios.tcgetattr(like))
    copy_size(like, outer)
    fcntl.ioctl(inner, termios.TIOCSCTTY, 0)
    return Pair(outer, inner)


def copy_size(source: int, target: int) -> None:
    with suppress(OSError):  # a terminal that is going away has no size
        fcntl.ioctl(target, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, bytes(8)))


def is_foreground(terminal: int) -> bool:
    """True when we may read `terminal` without being stopped for it (also when it is not our controlling one)."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True


class _Pump:
    """Carries bytes one way, at the pace of the slower side: while a chunk waits to be written, nothing is read."""

    def __init__(self, loop: AbstractEventLoop, source: int, sink: int, ended: Callable[[], None]) -> None:
        self._loop, self._source, self._sink, self._ended = loop, source, sink, ended
        self._waiting = b""
        self._is_running = False

    def resume(self) -> None:
        self._is_running = True
        if not self._waiting:
            self._loop.add_reader(self._source, self._read)

    def pause(self) -> None:
        """Read no more. What was read is still written."""
        self._is_running = False
        self._loop.remove_reader(self._source)

    def stop(self) -> None:
        self.pause()
        self._loop.remove_writer(self._sink)

    def _read(self) -> None:
        try:
            self._waiting = os.read(self._source, _CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody is left at the other end of the terminal
            pass
        if not self._waiting:
            self.pause()
            self._ended()
            return
        self._write()
        if self._waiting:
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._sink, self._write_rest)

    def _write_rest(self) -> None:
        self._write()
        if self._waiting:
            return
        self._loop.remove_writer(self._sink)
        if self._is_running:
            self._loop.add_reader(self._source, self._read)

    def _write(self) -> None:
        try:
            self._waiting = self._waiting[os.write(self._sink, self._waiting) :]
        except BlockingIOError:
            pass
        except OSError:  # the sink is gone: read on and forget, or the source would stand still for ever
            self._waiting = b""


class Relay:
    """Joins the command's terminal (`outer`) with the user's (`like`), which it takes in raw mode and gives back.

    `signal_command(n)` and `continue_command(in_foreground)` reach the command. In a pipeline (`outgate run -- cmd |
    less`) the keyboard belongs to another program until the command asks for it: it then starts in the background
    of its own terminal and is stopped by SIGTTIN or SIGTTOU when it does.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        outer: int,
        like: int,
        signal_command: Callable[[int], None],
        continue_command: Callable[[bool], None],
    ) -> None:
        self._loop, self._outer = loop, outer
        self._continue_command = continue_command
        self._user = _reopen(like)
        self._ttou = signal.getsignal(signal.SIGTTOU)
        self._settings: list[int | list[bytes | int]] | None = None  # the user's own, while ours are in force
        self.output_ended = loop.create_future()
        os.set_blocking(outer, False)
        self._output = _Pump(loop, outer, self._user, self._end_output)
        self._input = _Pump(loop, self._user, outer, lambda: signal_command(signal.SIGHUP))

    def start(self, *, take: bool) -> None:
        # Giving the terminal back must not stop us when we are no longer in its foreground.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        self._loop.add_signal_handler(signal.SIGWINCH, copy_size, self._user, self._outer)
        self._loop.add_signal_handler(signal.SIGCONT, self.continued)
        self._output.resume()
        if take:
            self._take()

    def continued(self) -> None:
        """We were stopped from outside and continued: the shell has set the terminal its own way meanwhile."""
        if self._settings is not None:
            self._take()

    def close(self) -> None:
        """Give the terminal back and stop. What the command has written stays with the kernel: await `output_ended`."""
        self._give_back()
        self._loop.remove_signal_handler(signal.SIGWINCH)
        self._loop.remove_signal_handler(signal.SIGCONT)
        signal.signal(signal.SIGTTOU, self._ttou)
        self._input.stop()
        self._output.stop()
        os.close(self._user)

    def command_stopped(self, number: int) -> None:
        """The command stopped: to get the terminal, or by ^Z; then we stop too, with our whole pipeline."""
        wants_terminal = number in (signal.SIGTTIN, signal.SIGTTOU)
        if wants_terminal and self._take():
            self._continue_command(True)
            return
        self._give_back()
        os.kill(0, signal.SIGTTIN if wants_terminal else signal.SIGTSTP)
        # Here again after `fg` or `bg`, or at once where nobody could continue us (an orphaned process group).
        if self._take():
            self._continue_command(True)
        elif wants_terminal:
            self._loop.call_later(_RETRY_S, self._continue_command, False)
        else:
            self._continue_command(False)

    def _take(self) -> bool:
        if not is_foreground(self._user):
            return False
        with suppress(termios.error):  # hung up
            if self._settings is None:
                self._settings = termios.tcgetattr(self._user)
            raw = termios.tcgetattr(self._user)
            tty.cfmakeraw(raw)
            termios.tcsetattr(self._user, termios.TCSANOW, raw)
        copy_size(self._user, self._outer)
        self._input.resume()
        return True

    def _give_back(self) -> None:
        self._input.pause()
        if self._settings is None:
            return
        with suppress(termios.error):  # hung up
            termios.tcsetattr(self._user, termios.TCSANOW, self._settings)
        self._settings = None

    def _end_output(self) -> None:
        if not self.output_ended.done():
            self.output_ended.set_result(None)


def _reopen(terminal: int) -> int:
    """A descriptor of our own: O_NONBLOCK on the given one would be the shell's and stderr's too."""
    try:
        return os.open(f"/proc/self/fd/{terminal}", os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # the terminal of another user (su)
        return os.dup(terminal)
