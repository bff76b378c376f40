"""Start one command in a sandbox, and be its parent: sockets in, terminal and signals across, exit status out."""

from __future__ import annotations

import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from proxy.sandbox import inside, libc, masks, network, seccomp, terminal, unavailable
from proxy.sandbox.inside import Hear, Say
from proxy.sandbox.network import Kind, Ports
from proxy.sandbox.unavailable import SandboxUnavailable

_SETUP_TIMEOUT_S = 30.0  # set-up takes milliseconds; a machine that stands still must not hang us
_MESSAGE = 64 * 1024
_SPARE_FILES = 256  # descriptors for connections beside the listeners
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True, slots=True)
class Bound:
    """A listener inside: every address of `family`, at `port`. getsockname() of what it accepts is the destination."""

    kind: Kind
    family: socket.AddressFamily
    port: int
    socket: socket.socket


def launch(
    command: Sequence[str],
    *,
    ports: Ports,
    environment: Mapping[str, str],
    hide: Iterable[str] = (),
    directory: str | None = None,
) -> Sandbox:
    """Prepare `command` in a sandbox of its own; nothing of it runs before `Sandbox.release`.

    Call it before any thread or event loop exists: it forks. `environment` is the user's: what it says about agents
    and services is hidden with `hide` (existing paths) and left out for the command. `directory` is where to start.
    Raises SandboxUnavailable, and then nothing was started.
    """
    if sys.platform != "linux":
        raise unavailable.not_linux()
    try:
        seccomp.program()
        order = inside.Order(
            command=tuple(command),
            ports=ports,
            masks=masks.find(environment, hide),
            directory=os.path.realpath(directory or os.getcwd()),
            terminals=tuple(fd for fd in range(3) if os.isatty(fd)),
            open_files=_admit_listeners(ports),
        )
        control, pid = _fork(order)
    except seccomp.UnknownMachine:
        raise unavailable.unknown_machine(platform.machine()) from None
    except OSError as error:
        raise unavailable.diagnose("preparation", error) from error
    sandbox = Sandbox(pid, control, masks.without_services(environment), order)
    try:
        sandbox._receive(ports)
    except BaseException:
        sandbox.close()
        raise
    return sandbox


def _admit_listeners(ports: Ports) -> tuple[int, int]:
    """Raise our own limit of open files where the listeners need it. Returns what the command gets back."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 2 * (len(ports.tcp | network.ALWAYS_TCP) + len(ports.udp | network.ALWAYS_UDP))
    needed = count + _SPARE_FILES
    if count > network.MAX_LISTENERS or (limit[1] != resource.RLIM_INFINITY and needed > limit[1]):
        allowed = min(network.MAX_LISTENERS, limit[1]) // 2
        repair = "name fewer ports in the tcp and udp rules of this workload"
        raise SandboxUnavailable("listeners", f"the policy names {count // 2} ports, {allowed} are possible", repair)
    if limit[0] != resource.RLIM_INFINITY and needed > limit[0]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, limit[1]))
    return limit


def _fork(order: inside.Order) -> tuple[socket.socket, int]:
    """Fork twice: the child enters the namespaces, its child is process 1 there and becomes ours. Raises OSError."""
    _fill_standard_streams()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_SETUP_TIMEOUT_S)
    was_subreaper = libc.is_subreaper()
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = os.fork()
        if child == 0:
            ours.close()
            inside.enter(theirs, order)
        theirs.close()
        os.waitpid(child, 0)
        return ours, _adopt(ours)
    except BaseException:
        ours.close()
        raise
    finally:
        libc.prctl(libc.PR_SET_CHILD_SUBREAPER, int(was_subreaper))


def _adopt(control: socket.socket) -> int:
    message = control.recv(_MESSAGE)
    if message[:1] != Say.PID:
        raise _failure(message)
    control.send(Hear.ADOPTED)
    return int(message[1:])


def _failure(message: bytes) -> Exception:
    if message[:1] != Say.FAILED:
        return SandboxUnavailable("set-up", "it ended without saying why", "run it again; if it persists, report it")
    number, step, text, name = message[1:].decode().split("\0")
    return unavailable.diagnose(step, OSError(int(number), text, name or None))


def _fill_standard_streams() -> None:
    """Open /dev/null where 0, 1 or 2 is closed, or a socket of ours would become one of them in the command."""
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            os.open("/dev/null", os.O_RDWR)


class Sandbox:
    """One command, its way out (`sockets`, `packets`) and its terminal. Close it always; that ends what is inside.

    sockets       the listeners, non-blocking; the caller's to serve
    packets       for ClosedPorts
    has_ipv6      False: the command has no IPv6 at all
    has_own_proc  False: a container kept /proc from being mounted, so it shows the outer process numbers
    """

    sockets: tuple[Bound, ...] = ()
    packets: socket.socket
    has_ipv6 = False
    has_own_proc = False

    def __init__(self, pid: int, control: socket.socket, environment: dict[str, str], order: inside.Order) -> None:
        self.pid = pid  # process 1 inside, as seen from here
        self._control = control
        self._environment = environment
        self._terminals = order.terminals
        self._pidfd = os.pidfd_open(pid)
        self._outer = -1  # the relay's end of the command's terminal
        self._takes_terminal = False
        self._relay: terminal.Relay | None = None
        self._status: int | None = None

    def _receive(self, ports: Ports) -> None:
        """Take over what was made inside. Raises SandboxUnavailable."""
        fds: list[int] = []
        try:
            while True:
                message, some, _, _ = socket.recv_fds(self._control, _MESSAGE, 256, socket.MSG_CMSG_CLOEXEC)
                if message[:1] == Say.READY:
                    break
                if message[:1] != Say.SOCKETS:
                    raise _failure(message)
                fds += some
        except TimeoutError:
            raise SandboxUnavailable("set-up", f"no answer in {_SETUP_TIMEOUT_S:.0f} s", "try again") from None
        finally:
            opened = [socket.socket(fileno=fd) for fd in fds]
            self._opened = opened
        self._control.setblocking(False)
        self.has_ipv6, self.has_own_proc = struct.unpack("??", message[1:])
        families = (socket.AF_INET, socket.AF_INET6) if self.has_ipv6 else (socket.AF_INET,)
        *listening, self.packets = opened
        for each in opened:
            each.setblocking(False)
        plan = network.plan(ports, families)
        self.sockets = tuple(Bound(*planned, each) for planned, each in zip(plan, listening, strict=True))
        if some:
            self._outer = some[0]
