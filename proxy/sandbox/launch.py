"""Start one command in a sandbox: fork, take out its sockets. Living with it is `running`'s work."""

from __future__ import annotations

import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence

from proxy.sandbox import inside, kept, libc, masks, network, seccomp, unavailable
from proxy.sandbox.inside import Hear, Say
from proxy.sandbox.network import Ports
from proxy.sandbox.running import Bound, Sandbox
from proxy.sandbox.unavailable import SandboxUnavailable

_SETUP_TIMEOUT_S = 30.0  # set-up takes milliseconds; a machine that stands still must not hang us
_MESSAGE = 64 * 1024
_SPARE_FILES = 256  # descriptors for connections beside the listeners


def launch(
    command: Sequence[str],
    *,
    ports: Ports,
    environment: Mapping[str, str],
    hide: Iterable[str] = (),
    keep: Iterable[str] = (),
    directory: str | None = None,
) -> Sandbox:
    """Prepare `command` in a sandbox of its own; nothing of it runs before `Sandbox.release`.

    Call it before any thread or event loop exists: it forks. `environment` is the user's: the services that it names
    are hidden (with `hide`, existing paths) and left out for the command. It cannot change what is in `keep`. It starts
    in `directory`.
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
            kept=kept.find(keep),
            directory=os.path.realpath(directory or os.getcwd()),
            terminals=tuple(fd for fd in range(3) if os.isatty(fd)),
            open_files=_admit_listeners(ports),
        )
        control = _fork(order)
    except seccomp.UnknownMachine:
        raise unavailable.unknown_machine(platform.machine()) from None
    except OSError as error:
        raise unavailable.diagnose("preparation", error) from error
    return _take_over(control, order, masks.without_services(environment))


def _admit_listeners(ports: Ports) -> tuple[int, int]:
    """Raise our own limit of open files where the listeners need it. Returns the limit that the command gets back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = sum(1 for _ in network.plan(ports, network.FAMILIES))
    needed = count + _SPARE_FILES
    possible = network.MAX_LISTENERS
    if hard != resource.RLIM_INFINITY:
        possible = min(possible, hard - _SPARE_FILES)
    if count > possible:
        cause = f"the policy names {count // 2} ports, {possible // 2} are possible"
        raise SandboxUnavailable("listeners", cause, "name fewer ports in the tcp and udp rules of this workload")
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return soft, hard


def _fork(order: inside.Order) -> socket.socket:
    """Fork twice: the child enters the namespaces, its own child is process 1 there and becomes ours.

    Returns our end of the control socket, on which the first message waits.
    """
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
        os.waitpid(child, 0)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        libc.prctl(libc.PR_SET_CHILD_SUBREAPER, int(was_subreaper))
    return ours


def _take_over(control: socket.socket, order: inside.Order, environment: dict[str, str]) -> Sandbox:
    """Become the parent of process 1 and receive what it opened. Ends it when that fails."""
    pid = None
    sockets: list[socket.socket] = []
    try:
        pid = _adopt(control)
        while True:
            message, fds, _, _ = socket.recv_fds(control, _MESSAGE, inside.FDS_A_MESSAGE, socket.MSG_CMSG_CLOEXEC)
            if message[:1] != Say.SOCKETS:
                break
            sockets += [socket.socket(fileno=fd) for fd in fds]
        if message[:1] != Say.READY:
            raise _failure(message)
    except BaseException as error:
        for each in (*sockets, control):
            each.close()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if isinstance(error, OSError):
            raise unavailable.diagnose("set-up", error) from error
        raise
    has_ipv6, has_own_proc = struct.unpack("??", message[1:])
    *listening, packets = sockets
    plan = network.plan(order.ports, network.FAMILIES if has_ipv6 else network.FAMILIES[:1])
    return Sandbox(
        pid=pid,
        control=control,
        sockets=tuple(Bound(*planned, each) for planned, each in zip(plan, listening, strict=True)),
        packets=packets,
        terminals=order.terminals,
        relay_end=fds[0] if fds else None,
        environment=environment,
        has_own_proc=has_own_proc,
    )


def _adopt(control: socket.socket) -> int:
    message = control.recv(_MESSAGE)
    if message[:1] != Say.PID:
        raise _failure(message)
    control.send(Hear.ADOPTED)
    return int(message[1:])


def _failure(message: bytes) -> SandboxUnavailable:
    if message[:1] != Say.FAILED:
        return SandboxUnavailable("set-up", "it ended without saying why", "try again; if it persists, report it")
    number, step, text, name = message[1:].decode().split("\0")
    return unavailable.diagnose(step, OSError(int(number), text, name or None))


def _fill_standard_streams() -> None:
    """Open /dev/null where 0, 1 or 2 is closed, or a socket of ours would become one of them in the command."""
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)
