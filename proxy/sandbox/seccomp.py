"""The system calls a workload may not make, because they reach past its network namespace or into the user's terminal.

Everything not named here stays allowed: this is a second line beside namespaces and empty capability sets.
"""

from __future__ import annotations

import errno
import platform
import sys
from dataclasses import dataclass

from proxy.sandbox.bpf import ANSWER, AT_LEAST, EQUAL, LOAD_WORD, Step, assemble

_ALLOW = 0x7FFF_0000
_REFUSE = 0x0005_0000 | errno.EPERM  # the call fails with EPERM; the program runs on
_X32 = 0x4000_0000  # the x32 ABI of x86_64: the same calls under other numbers

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
_NUMBER = 0
_ARCH = 4
# The kernel takes a socket's family and an ioctl's command as 32 bits, so only the low half may be compared
# (CVE-2019-7303: a high half that was compared let TIOCSTI through). Both machines are little-endian.
_LOW_OF_ARG_0 = 16
_LOW_OF_ARG_1 = 24

# AF_VSOCK leaves a virtual machine, AF_BLUETOOTH and AF_CAN leave by radio and bus: none knows a network namespace.
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK as Linux numbers them
# TIOCSTI types into the terminal, TIOCLINUX pastes into a virtual console: both run commands outside (CVE-2017-5226).
_IOCTLS = (0x5412, 0x541C)


@dataclass(frozen=True, slots=True)
class _Machine:
    arch: int  # AUDIT_ARCH_*
    socket: int
    socketpair: int
    ioctl: int
    keyrings: tuple[int, int, int]  # add_key, request_key, keyctl: request_key makes the host's daemon ask DNS for us


# io_uring opens sockets out of sight of this program. The number is the same on every machine (unified since 5.1).
_IO_URING_SETUP = 425
MACHINES = {
    "x86_64": _Machine(0xC000_003E, socket=41, socketpair=53, ioctl=16, keyrings=(248, 249, 250)),
    "aarch64": _Machine(0xC000_00B7, socket=198, socketpair=199, ioctl=29, keyrings=(217, 218, 219)),
}


class UnknownMachine(Exception):
    """No table of system call numbers for this processor: without one nothing may run."""


def program() -> bytes:
    """The program for this processor. Raises UnknownMachine, also for a 32-bit Python on a 64-bit kernel."""
    machine = MACHINES.get(platform.machine())
    if machine is None or sys.maxsize < 2**32:
        raise UnknownMachine(platform.machine())
    return program_for(machine)


def program_for(machine: _Machine) -> bytes:
    refused = (_IO_URING_SETUP, *machine.keyrings)
    return assemble(
        [
            # A foreign architecture has other numbers (i386's socketcall): refused whole.
            Step(LOAD_WORD, _ARCH),
            Step(EQUAL, machine.arch, no="refuse"),
            Step(LOAD_WORD, _NUMBER),
            Step(AT_LEAST, _X32, yes="refuse"),
            *(Step(EQUAL, number, yes="refuse") for number in refused),
            Step(EQUAL, machine.ioctl, yes="ioctl"),
            Step(EQUAL, machine.socket, yes="socket"),
            Step(EQUAL, machine.socketpair, yes="socket", no="allow"),
            Step(LOAD_WORD, _LOW_OF_ARG_0, label="socket"),
            *(Step(EQUAL, family, yes="allow") for family in _FAMILIES),
            Step(ANSWER, _REFUSE, label="refuse"),
            Step(LOAD_WORD, _LOW_OF_ARG_1, label="ioctl"),
            *(Step(EQUAL, command, yes="refuse_ioctl") for command in _IOCTLS),
            Step(ANSWER, _ALLOW, label="allow"),
            Step(ANSWER, _REFUSE, label="refuse_ioctl"),
        ]
    )
