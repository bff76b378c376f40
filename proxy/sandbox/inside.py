"""What happens inside: build the network and the view of the tree, give up privileges, run one command.

Process 1 of the PID namespace stays as the parent of the command; when it ends, the kernel ends all else inside.
It speaks with `launch` over one socket: a letter, then bytes (`Say` and `Hear`).
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from proxy.sandbox import libc, mounts, namespaces, network, privileges, terminal
from proxy.sandbox.kept import Kept
from proxy.sandbox.masks import Masks

NOT_STARTED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127
FDS_A_MESSAGE = 250  # SCM_MAX_FD is 253
_MESSAGE = 64 * 1024


class Say:
    """From inside to the gate."""

    PID = b"P"  # the number of process 1, as the gate sees it
    FAILED = b"E"  # errno, step, message
    SOCKETS = b"S"  # with descriptors: listeners in the order of `network.plan`, then the packet socket
    READY = b"R"  # what was possible here; with the terminal's other end, where one is wanted
    STOPPED = b"T"  # the signal that stopped the command


class Hear:
    """From the gate to inside."""

    ADOPTED = b"A"  # the gate is the parent now
    ENVIRONMENT = b"e"  # a part of it, NUL-separated NAME=VALUE
    GO = b"G"  # start the command; 1 when in the terminal's foreground
    SIGNAL = b"s"  # to the command's process group
    FOREGROUND = b"f"  # give it the terminal, and continue
    CONTINUE = b"c"


@dataclass(frozen=True, slots=True)
class Order:
    """What to run and in what surroundings."""

    command: tuple[str, ...]
    ports: network.Ports
    masks: Masks
    kept: Kept
    directory: str
    terminals: tuple[int, ...]  # those of 0, 1, 2 that are the user's terminal
    open_files: tuple[int, int]  # the limit that the command gets back


class _Step:
    """Where we are, for the message when it fails."""

    name = "user namespace"


def enter(control: socket.socket, order: Order) -> NoReturn:
    """In a fork of the gate: never returns, and never executes the command unless every step succeeded."""
    step, code = _Step(), NOT_STARTED
    try:
        namespaces.enter()
        step.name = "process"
        if pid := os.fork():
            control.send(Say.PID + str(pid).encode())
            code = 0
        else:
            _first_process(control, order, step)
    except OSError as error:
        text = "\0".join((str(error.errno or 0), step.name, error.strerror or str(error), str(error.filename or "")))
        with suppress(OSError):
            control.send(Say.FAILED + text.encode(errors="replace"))
    finally:
        os._exit(code)  # whatever happened, the gate's own stack must not run a second time


def _first_process(control: socket.socket, order: Order, step: _Step) -> NoReturn:
    if control.recv(_MESSAGE) != Hear.ADOPTED:
        os._exit(NOT_STARTED)
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    # Our memory is a copy of the gate's: no process of the same user may trace or read it.
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    os.setsid()
    step.name = "network namespace"
    families = network.build()
    step.name = "listeners"
    sockets = [*network.listeners(order.ports, families), network.packets()]
    step.name = "mounts"
    has_own_proc = mounts.apply(order.masks, order.kept)
    step.name = "directory"
    os.chdir(order.directory)  # again by its path: the old one would still lead below a mask
    step.name = "terminal"
    pair = terminal.open_pair(order.terminals[0]) if order.terminals else None
    step.name = "privileges"
    privileges.drop()
    for start in range(0, len(sockets), FDS_A_MESSAGE):
        part = sockets[start : start + FDS_A_MESSAGE]
        socket.send_fds(control, [Say.SOCKETS], [each.fileno() for each in part])
    flags = struct.pack("??", socket.AF_INET6 in families, has_own_proc)
    socket.send_fds(control, [Say.READY + flags], [pair.outer] if pair else [])
    for each in sockets:
        each.close()
    environment, is_foreground = _await_release(control)
    _run(control, order, environment, pair.inner if pair else None, is_foreground)


def _await_release(control: socket.socket) -> tuple[dict[bytes, bytes], bool]:
    text = b""
    while message := control.recv(_MESSAGE):
        if message[:1] == Hear.GO:
            pairs = (entry.partition(b"=") for entry in text.split(b"\0") if entry)
            return {name: value for name, _, value in pairs}, message[1:] == b"\1"
        text += message[1:]
    os._exit(NOT_STARTED)  # the gate is gone


def _run(
    control: socket.socket, order: Order, environment: Mapping[bytes, bytes], tty: int | None, is_foreground: bool
) -> NoReturn:
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # we hand out the foreground without being in it
    command = os.fork()
    if command == 0:
        _become(order, environment, tty, is_foreground)
    with suppress(OSError):
        os.setpgid(command, command)  # here too: a signal may come before the child has done it
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):  # whoever reads the command's output must see its end
        os.dup2(null, standard)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if woken in ready:
            os.read(woken, _MESSAGE)
            _reap(control, command)
        if control.fileno() in ready:
            _obey(control.recv(_MESSAGE), command, tty)


def _reap(control: socket.socket, command: int) -> None:
    """Collect what ended (orphans are ours); with the command we end ourselves, and all else inside with us."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid != command:
            continue
        if os.WIFSTOPPED(status):
            with suppress(OSError):
                control.send(Say.STOPPED + bytes([os.WSTOPSIG(status)]), socket.MSG_DONTWAIT)
            continue
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)


def _obey(message: bytes, command: int, tty: int | None) -> None:
    if not message:
        os._exit(NOT_STARTED)  # the gate is gone
    with suppress(OSError):  # it has ended, or left its session
        if message[:1] == Hear.SIGNAL:
            os.killpg(command, message[1])
            return
        if message[:1] == Hear.FOREGROUND and tty is not None:
            os.tcsetpgrp(tty, command)
        os.killpg(command, signal.SIGCONT)


def _become(order: Order, environment: Mapping[bytes, bytes], tty: int | None, is_foreground: bool) -> NoReturn:
    """The last moments before exec. Failure is told on stderr as a shell would."""
    code = NOT_EXECUTABLE
    try:
        os.setpgid(0, 0)
        if tty is not None:
            if is_foreground:
                os.tcsetpgrp(tty, os.getpid())
            for standard in order.terminals:
                os.dup2(tty, standard)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTTOU, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores the last two
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_NOFILE, order.open_files)
        libc.close_from(3)
        os.execvpe(order.command[0], order.command, environment)  # noqa: S606 - the command is what we are for
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            code = NOT_FOUND
        reason = "command not found" if code == NOT_FOUND else error.strerror
        print(f"outgate: {order.command[0]}: {reason}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)
