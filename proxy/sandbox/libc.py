"""The system calls that Python lacks, each raising OSError. What they are used for is the callers' affair."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x0002_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = 0x2008_0522
_ulong = ctypes.c_ulong


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapSets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class _SockFprog(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result == 0:
        return
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _check(_libc.mount(arguments[0], arguments[1], arguments[2], _ulong(flags), arguments[3]), target)


def unmount(target: str) -> None:
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), target)


def prctl(option: int, argument: int = 0, third: int = 0) -> None:
    _check(_libc.prctl(option, _ulong(argument), _ulong(third), _ulong(0), _ulong(0)), f"prctl {option}")


def is_subreaper() -> bool:
    value = ctypes.c_int()
    _check(_libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(value), _ulong(0), _ulong(0), _ulong(0)), "prctl")
    return bool(value.value)


def clear_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets of this thread."""
    header, sets = _CapHeader(_CAPABILITY_VERSION_3, 0), (_CapSets * 2)()
    _check(_libc.capset(ctypes.byref(header), sets), "capset")


def set_seccomp(program: bytes) -> None:
    """Install a classic BPF program (8 bytes an instruction). No new privileges must be set."""
    memory = ctypes.create_string_buffer(program, len(program))
    fprog = _SockFprog(len(program) // 8, ctypes.addressof(memory))
    mode_filter = 2
    _check(_libc.prctl(PR_SET_SECCOMP, _ulong(mode_filter), ctypes.byref(fprog), _ulong(0), _ulong(0)), "seccomp")


def attach_filter(fd: int, program: bytes) -> None:
    """Give socket `fd` a classic BPF program that chooses which packets it queues."""
    memory = ctypes.create_string_buffer(program, len(program))
    fprog = _SockFprog(len(program) // 8, ctypes.addressof(memory))
    so_attach_filter, sol_socket = 26, 1
    size = ctypes.c_uint(ctypes.sizeof(fprog))
    _check(_libc.setsockopt(fd, sol_socket, so_attach_filter, ctypes.byref(fprog), size), "SO_ATTACH_FILTER")


def close_from(first: int) -> None:
    """Close every descriptor from `first` on, by close_range(2) where the kernel has it (5.9)."""
    try:
        _check(_libc.close_range(ctypes.c_uint(first), ctypes.c_uint(0xFFFF_FFFF), 0), "close_range")
    except (AttributeError, OSError):
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
