"""What a hostile workload tries from inside a sandbox, as a program. Prints one JSON object: attempt → what came of it.

An outcome is a text that the attempt produced, or the name of the error (`EPERM`). Standard library only: a workload
knows nothing of ours.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import signal
import socket
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MS_BIND, MS_REMOUNT = 4096, 32
TIMEOUT_S = 10.0
IS_X86 = platform.machine() == "x86_64"


def outcome(attempt: Callable[[], object]) -> str:
    try:
        return str(attempt())
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


def check(result: int) -> str:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return "done"


def syscall(number: int, *arguments: int) -> str:
    return check(libc.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments)))


def tcp(address: str, port: int) -> str:
    with socket.create_connection((address, port), TIMEOUT_S) as connection:
        return connection.makefile().readline().strip()


def udp(address: str, port: int) -> str:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT_S)
        client.connect((address, port))
        client.send(b"hello")
        return client.recv(512).decode().strip()


def unix(address: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(address)
        return client.recv(100).decode()


def own_server(address: str) -> str:
    with socket.create_server(("", 0)) as server:
        with socket.create_connection((address, server.getsockname()[1]), TIMEOUT_S):
            accepted, _ = server.accept()
            accepted.close()
        return "served"


def opened(family: int, kind: int, protocol: int = 0) -> str:
    socket.socket(family, kind, protocol).close()
    return "opened"


def mount(source: str, target: str, kind: str, flags: int) -> str:
    return check(libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None))


def umount(path: str) -> str:
    return check(libc.umount2(path.encode(), 0))


def enter_namespace(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return check(libc.setns(descriptor, 0))
    finally:
        os.close(descriptor)


def enter_parent_network() -> str:
    """The network of whoever is behind our own user namespace, by ioctl NS_GET_USERNS on what we can open."""
    descriptor = os.open("/proc/self/ns/net", os.O_RDONLY)
    owner = fcntl.ioctl(descriptor, 0xB701)  # NS_GET_USERNS
    parent = fcntl.ioctl(owner, 0xB702)  # NS_GET_PARENT
    return check(libc.setns(parent, 0))


def change_routes() -> str:
    """`ip link set lo down`, `ip route del`: what would open or close a way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", 0))
    return "done"


def delete_route() -> str:
    message = struct.pack("IHHII8BI", 28, 25, 0x5, 1, 0, 2, 0, 0, 0, 255, 3, 254, 2, 0)  # RTM_DELROUTE, local default
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.send(message)
        (negative,) = struct.unpack_from("i", netlink.recv(4096), 16)
    return errno.errorcode[-negative] if negative else "done"


def in_nested_user_namespace(attempt: Callable[[], object], flags: int = 0) -> str:
    """Try it with every capability over a user namespace of our own making."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            uid, gid = os.getuid(), os.getgid()
            check(libc.unshare(CLONE_NEWUSER | flags))
            # Refused to root (the map would name uid 0 without CAP_SETFCAP): the capabilities are there all the same.
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                with suppress(PermissionError), open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            os.write(writer, outcome(attempt).encode())
        except BaseException as error:
            os.write(writer, f"no nested namespace: {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    answer = os.read(reader, 4096).decode()
    os.close(reader)
    return answer


def in_child(attempt: Callable[[], object]) -> str:
    """An attempt that may end its process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, outcome(attempt).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    answer = os.read(reader, 4096).decode()
    os.close(reader)
    return answer or f"status {status}"


def call_as_i386() -> str:
    """getpid by the 32-bit gate, int 0x80: mov eax, 20; int 0x80; ret."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    return errno.errorcode[-result] if result < 0 else "done"


def push_into_terminal(command: int) -> str:
    argument = b"x" if command == termios.TIOCSTI else b"\x03"  # TIOCL_PASTESEL
    fcntl.ioctl(0, command, argument)
    return "done"


def push_with_high_half() -> str:
    """The kernel reads 32 bits of the command; a comparison of 64 would miss this one."""
    letter = ctypes.create_string_buffer(b"x")
    return syscall(16 if IS_X86 else 29, 0, termios.TIOCSTI | 1 << 32, ctypes.addressof(letter))


def read_file(path: str) -> str:
    with open(path) as file:
        return file.read()


def write_file(path: str) -> str:
    with open(path, "w") as file:
        file.write("")
    return "done"


def kill_outer(pid: int) -> str:
    os.kill(pid, 0)
    return "done"


def status(name: str) -> str:
    with open("/proc/self/status") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith(name + ":"))


def interfaces() -> str:
    return " ".join(name for _, name in socket.if_nameindex())


def main() -> None:
    asked = json.loads(sys.argv[1])
    hidden, masked_directory = asked["hidden"], asked["masked_directory"]
    dial = lambda: tcp("192.0.2.1", 443)  # noqa: E731
    keys = (248, 249, 250) if IS_X86 else (217, 218, 219)
    attempts: dict[str, Callable[[], object]] = {
        "descriptors": inherited,
        "tcp4": lambda: tcp("192.0.2.7", 443),
        "tcp6": lambda: tcp("2001:db8::7", 443),
        "tcp port 80": lambda: tcp("192.0.2.7", 80),
        "tcp port 53": lambda: tcp("192.0.2.7", 53),
        "policy port": lambda: tcp("192.0.2.7", 8443),
        "metadata": lambda: tcp("169.254.169.254", 80),
        "udp4": lambda: udp("192.0.2.9", 53),
        "udp6": lambda: udp("2001:db8::9", 53),
        "udp policy port": lambda: udp("192.0.2.9", 123),
        "unlisted tcp4": lambda: tcp("192.0.2.7", 22),
        "unlisted tcp6": lambda: tcp("2001:db8::7", 22),
        "unlisted udp4": lambda: udp("192.0.2.7", 3478),
        "unlisted udp6": lambda: udp("2001:db8::7", 3478),
        "unlisted on loopback": lambda: tcp("127.0.0.1", 9),
        "unlisted on loopback6": lambda: tcp("::1", 9),
        "own server": lambda: own_server("127.0.0.1"),
        "own server by any address": lambda: own_server("192.0.2.99"),
        "interfaces": interfaces,
        "abstract socket": lambda: unix("\0" + asked["abstract"]),
        "hidden socket": lambda: unix(hidden),
        "socket in a masked directory": lambda: unix(masked_directory + "/outer.sock"),
        "listing a masked directory": lambda: os.listdir(masked_directory),
        "socket below the start directory": lambda: unix("outer.sock"),
        "named in the environment": lambda: os.environ.get("SOME_AGENT_SOCK"),
        "agent in the environment": lambda: os.environ.get("SSH_AUTH_SOCK"),
        "vsock": lambda: opened(40, socket.SOCK_STREAM),
        "vsock pair": lambda: syscall(53 if IS_X86 else 199, 40, 1, 0, 0),
        "alg": lambda: opened(38, socket.SOCK_SEQPACKET),
        "bluetooth": lambda: opened(31, socket.SOCK_RAW),
        "family with a high half": lambda: syscall(41 if IS_X86 else 198, 40 | 1 << 32, 1, 0),
        "raw": lambda: opened(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        "packet": lambda: opened(socket.AF_PACKET, socket.SOCK_RAW),
        "io_uring": lambda: syscall(425, 1, 0),
        "add_key": lambda: syscall(keys[0], 0, 0, 0, 0, 0),
        "request_key": lambda: syscall(keys[1], 0, 0, 0, 0),
        "keyctl": lambda: syscall(keys[2], 0, 0, 0, 0, 0),
        "capabilities": lambda: " ".join(status(f"Cap{kind}") for kind in ("Eff", "Prm", "Inh", "Bnd", "Amb")),
        "no new privileges": lambda: status("NoNewPrivs"),
        "mount": lambda: mount("none", "/tmp", "tmpfs", 0),
        "unmount a mask": lambda: umount(masked_directory),
        "unmount a file's mask": lambda: umount(hidden),
        "remount /proc/sys": lambda: mount("none", "/proc/sys", "", MS_REMOUNT | MS_BIND),
        "enter pid 1's network": lambda: enter_namespace("/proc/1/ns/net"),
        "enter the own network again": lambda: enter_namespace("/proc/self/ns/net"),
        "enter the parent's user namespace": enter_parent_network,
        "take lo down": change_routes,
        "delete the route": delete_route,
        "kernel.core_pattern": lambda: write_file("/proc/sys/kernel/core_pattern"),
        "/sys is read-only": lambda: bool(os.statvfs("/sys").f_flag & os.ST_RDONLY),
        "shared memory": lambda: check(libc.shmget(asked["memory_key"], 0, 0)),
        "sysrq": lambda: write_file("/proc/sysrq-trigger"),
        "memory of process 1": lambda: read_file("/proc/1/environ"),
        "signal to the gate": lambda: kill_outer(asked["outer_pid"]),
        "terminals": lambda: sorted(os.listdir("/dev/pts")),
        "nested: unmount a mask": lambda: in_nested_user_namespace(lambda: umount(masked_directory), CLONE_NEWNS),
        "nested: unmount a file's mask": lambda: in_nested_user_namespace(lambda: umount(hidden), CLONE_NEWNS),
        "nested: look below the masks": lambda: in_nested_user_namespace(
            lambda: mount("/", "/mnt", "", MS_BIND), CLONE_NEWNS
        ),
        "nested: take lo down": lambda: in_nested_user_namespace(change_routes),
        "nested: raw": lambda: in_nested_user_namespace(
            lambda: opened(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        ),
        "nested: own network": lambda: in_nested_user_namespace(dial, CLONE_NEWNET),
        "nested: vsock": lambda: in_nested_user_namespace(lambda: opened(40, socket.SOCK_STREAM)),
        "nested: core_pattern": lambda: in_nested_user_namespace(
            lambda: mount("none", "/proc/sys", "", MS_REMOUNT | MS_BIND), CLONE_NEWNS
        ),
        "still confined": dial,
    }
    if IS_X86:
        attempts["i386"] = lambda: in_child(call_as_i386)
        attempts["x32"] = lambda: syscall(0x40000000 | 39)
    print(json.dumps({name: outcome(attempt) for name, attempt in attempts.items()}))


def inherited() -> str:
    """What descriptor the gate left open to us, of those beyond the three standard ones."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
        if int(name) > 2:
            found.append(target)
    return " ".join(found) or "none"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
