"""The sandbox's parts that need no namespace: programs for the kernel, what is hidden, and why it is refused."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.sandbox import ClosedPorts, masks, seccomp, unavailable
from proxy.sandbox.bpf import (
    AND,
    ANSWER,
    AT_LEAST,
    EQUAL,
    HEADER_LENGTH,
    LOAD_BYTE,
    LOAD_BYTE_AFTER_HEADER,
    LOAD_WORD,
    LOAD_WORD_AFTER_HEADER,
    Step,
    assemble,
)
from proxy.sandbox.closed_ports import PROGRAM, read_refusal

ROOT = Path(__file__).resolve().parent.parent.parent
ALLOW = 0x7FFF0000
EPERM = 0x00050000 | errno.EPERM
X86_64, AARCH64, I386 = 0xC000003E, 0xC00000B7, 0x40000003


def run(program: bytes, memory: bytes, byte_order: str) -> int:
    """What the kernel's interpreter would answer; a load past the end answers 0."""
    steps = list(struct.iter_unpack("=HBBI", program))
    a = x = at = 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        try:
            match code:
                case _ if code == LOAD_WORD:
                    a = struct.unpack_from(byte_order + "I", memory, k)[0]
                case _ if code == LOAD_BYTE:
                    a = memory[k]
                case _ if code == LOAD_WORD_AFTER_HEADER:
                    a = struct.unpack_from(byte_order + "I", memory, x + k)[0]
                case _ if code == LOAD_BYTE_AFTER_HEADER:
                    a = memory[x + k]
                case _ if code == HEADER_LENGTH:
                    x = 4 * (memory[k] & 0x0F)
                case _ if code == AND:
                    a &= k
                case _ if code == EQUAL:
                    at += yes if a == k else no
                case _ if code == AT_LEAST:
                    at += yes if a >= k else no
                case _ if code == ANSWER:
                    return int(k)
                case _:
                    raise AssertionError(f"unknown instruction {code:#x}")
        except (IndexError, struct.error):
            return 0


def system_call(machine: str, arch: int, number: int, *arguments: int) -> int:
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    program = seccomp.program_for(seccomp.MACHINES[machine])
    return run(program, struct.pack("<iIQ6Q", number, arch, 0, *padded), "<")


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        pytest.param(41, (socket.AF_INET, 1, 0), ALLOW, id="tcp"),
        pytest.param(41, (socket.AF_INET6, 2, 0), ALLOW, id="udp6"),
        pytest.param(41, (socket.AF_UNIX, 1, 0), ALLOW, id="unix"),
        pytest.param(41, (socket.AF_NETLINK, 3, 0), ALLOW, id="netlink"),
        pytest.param(41, (40, 1, 0), EPERM, id="vsock"),
        pytest.param(41, (38, 5, 0), EPERM, id="alg"),
        pytest.param(41, (40 | 2 << 32, 1, 0), EPERM, id="vsock with a high half"),
        pytest.param(41, (socket.AF_INET | 1 << 32, 1, 0), ALLOW, id="tcp with a high half"),
        pytest.param(53, (socket.AF_UNIX, 1, 0), ALLOW, id="unix pair"),
        pytest.param(53, (30, 1, 0), EPERM, id="tipc pair"),
        pytest.param(16, (0, 0x5412, 0), EPERM, id="TIOCSTI"),
        pytest.param(16, (0, 0x5412 | 1 << 32, 0), EPERM, id="TIOCSTI with a high half"),
        pytest.param(16, (0, 0x541C, 0), EPERM, id="TIOCLINUX"),
        pytest.param(16, (0, 0x5413, 0), ALLOW, id="TIOCGWINSZ"),
        pytest.param(16, (0x5412, 0x5413, 0), ALLOW, id="descriptor that looks like TIOCSTI"),
        pytest.param(425, (1, 0), EPERM, id="io_uring_setup"),
        pytest.param(250, (0,), EPERM, id="keyctl"),
        pytest.param(249, (0,), EPERM, id="request_key"),
        pytest.param(248, (0,), EPERM, id="add_key"),
        pytest.param(0, (0,), ALLOW, id="read"),
        pytest.param(59, (0,), ALLOW, id="execve"),
        pytest.param(0x40000000 | 41, (40, 1, 0), EPERM, id="x32 socket"),
        pytest.param(0x40000000, (), EPERM, id="x32 read"),
        pytest.param(-1, (), EPERM, id="number -1"),
    ],
)
def test_system_calls_on_x86_64(number: int, arguments: tuple[int, ...], expected: int) -> None:
    assert system_call("x86_64", X86_64, number, *arguments) == expected


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        pytest.param(198, (socket.AF_INET, 1, 0), ALLOW, id="tcp"),
        pytest.param(198, (40, 1, 0), EPERM, id="vsock"),
        pytest.param(199, (socket.AF_UNIX, 1, 0), ALLOW, id="unix pair"),
        pytest.param(199, (40, 1, 0), EPERM, id="vsock pair"),
        pytest.param(29, (0, 0x5412, 0), EPERM, id="TIOCSTI"),
        pytest.param(29, (0, 0x5401, 0), ALLOW, id="TCGETS"),
        pytest.param(425, (1, 0), EPERM, id="io_uring_setup"),
        pytest.param(217, (), EPERM, id="add_key"),
        pytest.param(218, (), EPERM, id="request_key"),
        pytest.param(219, (), EPERM, id="keyctl"),
        pytest.param(41, (40, 1, 0), ALLOW, id="pivot_root, which is socket on x86_64"),
    ],
)
def test_system_calls_on_aarch64(number: int, arguments: tuple[int, ...], expected: int) -> None:
    assert system_call("aarch64", AARCH64, number, *arguments) == expected


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", I386), ("aarch64", 0x40000028), ("x86_64", AARCH64)])
def test_a_foreign_architecture_is_refused_whole(machine: str, arch: int) -> None:
    assert system_call(machine, arch, 3, 0) == EPERM


def test_a_machine_without_a_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(seccomp.UnknownMachine, match="riscv64"):
        seccomp.program()


def test_a_jump_to_a_missing_label_is_no_program() -> None:
    with pytest.raises(KeyError):
        assemble([Step(EQUAL, 1, yes="nowhere"), Step(ANSWER, 0)])


def test_a_jump_backwards_is_no_program() -> None:
    with pytest.raises(struct.error):
        assemble([Step(ANSWER, 0, label="start"), Step(EQUAL, 1, yes="start"), Step(ANSWER, 0)])


def ipv4(
    protocol: int, body: bytes, *, source: str = "192.0.2.7", target: str = "192.0.2.1", options: bytes = b""
) -> bytes:
    length = 20 + len(options)
    head = struct.pack("!BBHHHBBH", 0x40 | length // 4, 0, length + len(body), 0, 0, 64, protocol, 0)
    return head + socket.inet_aton(source) + socket.inet_aton(target) + options + body


def ipv6(protocol: int, body: bytes, *, source: str = "2001:db8::7", target: str = "2001:db8::1") -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + addresses + body


def tcp(flags: int, *, source_port: int = 22, sequence: int = 0) -> bytes:
    return struct.pack("!HHIIBBHHH", source_port, 50000, sequence, 1, 5 << 4, flags, 0, 0, 0)


def udp(port: int, source_port: int = 50000) -> bytes:
    return struct.pack("!HHHH", source_port, port, 8, 0)


SYN, SYN_ACK, RST_ACK, RST = 0x02, 0x12, 0x14, 0x04
UNREACHABLE4, UNREACHABLE6 = bytes([3, 3]) + bytes(6), bytes([1, 4]) + bytes(6)


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        pytest.param(ipv4(6, tcp(RST_ACK)), ("tcp", "192.0.2.7", 22), id="tcp4 refused"),
        pytest.param(ipv4(6, tcp(RST_ACK), options=bytes(8)), ("tcp", "192.0.2.7", 22), id="tcp4 with IP options"),
        pytest.param(ipv6(6, tcp(RST_ACK)), ("tcp", "2001:db8::7", 22), id="tcp6 refused"),
        pytest.param(
            ipv4(1, UNREACHABLE4 + ipv4(17, udp(3478), target="192.0.2.9")), ("udp", "192.0.2.9", 3478), id="udp4"
        ),
        pytest.param(
            ipv4(1, UNREACHABLE4 + ipv4(17, udp(3478), target="192.0.2.9", options=bytes(12))),
            ("udp", "192.0.2.9", 3478),
            id="udp4 with IP options",
        ),
        pytest.param(
            ipv6(58, UNREACHABLE6 + ipv6(17, udp(3478), target="2001:db8::9")), ("udp", "2001:db8::9", 3478), id="udp6"
        ),
        pytest.param(ipv4(6, tcp(SYN)), None, id="tcp4 attempt"),
        pytest.param(ipv4(6, tcp(SYN_ACK)), None, id="tcp4 accepted"),
        pytest.param(ipv4(6, tcp(RST_ACK, sequence=7)), None, id="tcp4 reset later"),
        pytest.param(ipv4(6, tcp(RST)), None, id="tcp4 bare reset"),
        pytest.param(ipv6(6, tcp(RST_ACK, sequence=7)), None, id="tcp6 reset later"),
        pytest.param(ipv4(17, udp(53)), None, id="udp4 itself"),
        pytest.param(ipv4(1, bytes([3, 1]) + bytes(6) + ipv4(17, udp(1))), None, id="icmp host unreachable"),
        pytest.param(ipv4(1, bytes([8, 0]) + bytes(6)), None, id="icmp echo"),
        pytest.param(ipv6(58, bytes([1, 0]) + bytes(6) + ipv6(17, udp(1))), None, id="icmp6 no route"),
        pytest.param(bytes(60), None, id="no IP"),
    ],
)
def test_only_refusals_are_heard_and_read(packet: bytes, expected: tuple[str, str, int] | None) -> None:
    heard = run(PROGRAM, packet, ">") > 0
    assert heard == (expected is not None)
    if expected:
        protocol, address, port = expected
        assert read_refusal(packet) == (protocol, ip_address(address), port)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(ipv4(1, UNREACHABLE4 + ipv4(17, udp(50000, source_port=53))), id="udp4"),
        pytest.param(ipv6(58, UNREACHABLE6 + ipv6(17, udp(50000, source_port=53))), id="udp6"),
        pytest.param(ipv4(1, UNREACHABLE4 + ipv4(17, udp(50000, source_port=123))), id="NTP"),
    ],
)
def test_an_answer_that_nobody_waited_for_is_no_attempt(packet: bytes) -> None:
    """The gate's own answer bounces off the port of a client that has ended."""
    assert read_refusal(packet) is None


@given(st.binary(max_size=128))
def test_garbage_is_a_refusal_or_none(packet: bytes) -> None:
    found = read_refusal(packet)
    assert found is None or found[0] in ("tcp", "udp")


async def hear(packets: list[bytes], *, quiet_s: float) -> tuple[list[int], int]:
    """The ports told for packets that arrive one by one, and how many were not."""
    told: list[int] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    closed = ClosedPorts(
        ours, lambda protocol, address, port: told.append(port), asyncio.get_running_loop(), quiet_s=quiet_s
    )
    with theirs:
        for packet in packets:
            theirs.send(packet)
            await asyncio.sleep(0)
        closed.close()
    return told, closed.untold


def refused(port: int, source: str = "192.0.2.7") -> bytes:
    return ipv4(6, tcp(RST_ACK, source_port=port), source=source)


def test_a_repeated_attempt_is_told_once() -> None:
    assert asyncio.run(hear([refused(22), refused(25), refused(22)], quiet_s=60)) == ([22, 25], 0)


def test_a_later_attempt_is_told_again() -> None:
    assert asyncio.run(hear([refused(22), refused(22)], quiet_s=0)) == ([22, 22], 0)


def test_a_port_scan_is_counted_beyond_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClosedPorts, "MAX_REMEMBERED", 3)
    assert asyncio.run(hear([refused(port) for port in range(1, 9)], quiet_s=60)) == ([1, 2, 3], 5)


def test_refusals_on_loopback_are_nobodys_business() -> None:
    assert asyncio.run(hear([refused(22, "127.0.0.1"), refused(25)], quiet_s=60)) == ([25], 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def agent(home: Path) -> Iterator[Path]:
    path = home / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield path


def test_a_socket_in_the_kernels_list_is_hidden(agent: Path) -> None:
    assert str(agent) in masks.find({}).files


def test_a_socket_that_only_a_variable_names_is_hidden(home: Path) -> None:
    """One of another network namespace is not in the list that the kernel shows us."""
    path = home / "elsewhere.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert str(path) in masks.find({"SOME_HOST": f"unix://{path}"}).files


def test_sockets_of_agents_are_found_and_their_files_left(home: Path) -> None:
    (home / ".gnupg").mkdir()
    (home / ".gnupg" / "pubring.kbx").touch()
    path = home / ".gnupg" / "S.gpg-agent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    found = masks.find({})
    assert str(path) in found.files
    assert not found.cover(str(home / ".gnupg" / "pubring.kbx"))


def test_links_are_followed_to_what_they_hide(agent: Path, home: Path) -> None:
    link = home / "link.sock"
    link.symlink_to(agent)
    found = masks.find({"SSH_AUTH_SOCK": str(link)})
    assert str(agent) in found.files
    assert str(link) not in found.files


def test_a_socket_below_a_hidden_directory_needs_no_mask_of_its_own(agent: Path, home: Path) -> None:
    found = masks.find({}, [str(home), str(home / "below")])
    assert str(home) in found.directories
    assert str(agent) not in found.files


def test_an_extra_file_is_hidden(home: Path) -> None:
    (home / "key.pem").touch()
    assert str(home / "key.pem") in masks.find({}, [str(home / "key.pem")]).files


def test_a_runtime_directory_elsewhere_is_searched_not_hidden(home: Path) -> None:
    """XDG_RUNTIME_DIR=/tmp must not hide all of /tmp."""
    path = home / "bus"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    found = masks.find({"XDG_RUNTIME_DIR": str(home)})
    assert str(path) in found.files
    assert str(home) not in found.directories


@pytest.mark.parametrize("path", ["/dev/null", "/dev/tty", "/dev/ptmx", "/dev/zero", "/dev/urandom"])
def test_the_ordinary_devices_stay(path: str) -> None:
    found = masks.find({})
    assert path not in found.files
    assert not found.cover(path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may open them")
def test_disks_and_other_terminals_are_hidden_from_root() -> None:
    found = set(masks.find({}).files)
    present = {
        path
        for path in ("/dev/console", "/dev/tty0", "/dev/tty1", "/dev/ttyS0", "/dev/vda", "/dev/sda")
        if os.path.exists(path)
    }
    assert present <= found


@pytest.mark.parametrize(
    ("name", "value", "stays"),
    [
        ("PATH", "/usr/bin:/bin", True),
        ("XDG_RUNTIME_DIR", "/run/user/1000", True),
        ("SSH_AUTH_SOCK", "/nowhere", False),
        ("DISPLAY", ":0", False),
        ("TMUX", "/tmp/tmux-0/default,1,0", False),
        ("DBUS_SESSION_BUS_ADDRESS", "unix:path=/run/user/1000/bus", False),
        ("DOCKER_HOST", "unix:///var/run/docker.sock", False),
        ("DOCKER_HOST", "tcp://build.example:2376", True),
        ("CONTAINER_HOST", "unix:/run/podman/podman.sock", False),
        ("HTTPS_PROXY", "http://proxy.example:3128", True),
        ("EMPTY", "", True),
        ("NUL", "/a\0b", True),
    ],
)
def test_variables_that_name_services_go(name: str, value: str, stays: bool) -> None:
    assert masks.without_services({name: value}) == ({name: value} if stays else {})


def test_any_variable_that_names_a_socket_goes(agent: Path) -> None:
    environment = {
        "A": str(agent),
        "B": f"unix:{agent}",
        "C": f"unix:path={agent}",
        "D": f"unix://{agent}",
        "E": str(agent.parent),
    }
    assert masks.without_services(environment) == {"E": str(agent.parent)}


@pytest.mark.parametrize(
    ("number", "switches", "container", "cause", "repair"),
    [
        pytest.param(
            errno.EPERM,
            {"kernel/apparmor_restrict_unprivileged_userns": "1"},
            None,
            "kernel.apparmor_restrict_unprivileged_userns=1",
            "flags=(unconfined)",
            id="ubuntu",
        ),
        pytest.param(
            errno.EACCES,
            {"kernel/apparmor_restrict_unprivileged_userns": "1"},
            "Docker",
            "AppArmor",
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
            id="ubuntu, by the map",
        ),
        pytest.param(
            errno.EPERM,
            {"kernel/unprivileged_userns_clone": "0"},
            None,
            "kernel.unprivileged_userns_clone is 0",
            "sudo sysctl -w kernel.unprivileged_userns_clone=1",
            id="debian",
        ),
        pytest.param(
            errno.ENOSPC, {"user/max_user_namespaces": "0"}, None, "user.max_user_namespaces is 0", "sysctl", id="rhel"
        ),
        pytest.param(errno.ENOSPC, {"user/max_user_namespaces": "9"}, None, "too many", "raise", id="all in use"),
        pytest.param(errno.EUSERS, {}, None, "nested too deep", "raise", id="nested"),
        pytest.param(errno.EPERM, {}, "Docker", "Docker keeps", "seccomp=unconfined", id="docker"),
        pytest.param(errno.EINVAL, {}, None, "this kernel lacks", "use a kernel", id="old kernel"),
        pytest.param(errno.EPERM, {}, None, "unshare", "threat-model", id="unknown"),
    ],
)
def test_the_switch_that_refuses_is_named_with_its_repair(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    switches: dict[str, str],
    container: str | None,
    cause: str,
    repair: str,
) -> None:
    monkeypatch.setattr(unavailable, "_switch", switches.get)
    monkeypatch.setattr(unavailable, "_container", lambda: container)
    found = unavailable.diagnose("user namespace", OSError(number, os.strerror(number), "unshare"))
    assert found.what == "user namespace refused"
    assert cause in found.cause
    assert repair in found.repair
    assert found.repair.endswith("is not confined")  # --proxy-env is always offered, and called advisory


def test_elsewhere_than_on_linux_proxy_variables_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    from proxy.sandbox import Ports, SandboxUnavailable, launch

    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="--proxy-env"):
        launch(["true"], ports=Ports(), environment={})


def test_it_can_be_imported_elsewhere_and_without_an_event_loop() -> None:
    """On another system Linux's constants are missing; and no event loop may exist before the fork."""
    script = (
        "import socket, sys\n"
        "for name in ('AF_NETLINK', 'AF_PACKET', 'NETLINK_ROUTE', 'MSG_CMSG_CLOEXEC'): delattr(socket, name)\n"
        "import proxy.sandbox\n"
        "print([name for name in ('asyncio', 'ssl') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
