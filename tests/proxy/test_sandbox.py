"""The sandbox, attacked from inside by a real program: as root and as an ordinary user."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sandbox_user import ORDINARY_UID, UNTIL_SIGNALLED, as_user, why_no_sandbox

HERE = Path(__file__).resolve().parent
DRIVER = HERE / "sandbox_driver.py"
PROBE = HERE / "sandbox_probe.py"
TIMEOUT_S = 60.0

pytestmark = pytest.mark.kernel


@dataclass(frozen=True, slots=True)
class Who:
    """Runs command lines as root or as an ordinary user, in a directory of theirs."""

    uid: int
    home: Path

    def line(self, *command: str) -> list[str]:
        return list(command) if self.uid == os.getuid() else as_user(command)

    def driver(self, *arguments: str) -> list[str]:
        return self.line(sys.executable, str(DRIVER), *arguments)

    def run(self, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.driver(*options, "--", *command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=self.home,
        )


@pytest.fixture(scope="session", params=["root", "user"])
def who(request: pytest.FixtureRequest) -> Iterator[Who]:
    if reason := why_no_sandbox():
        pytest.skip(reason)
    if request.param == "root" and os.getuid() != 0:
        pytest.skip("the tests do not run as root")
    uid = os.getuid() if request.param == "root" or os.getuid() != 0 else ORDINARY_UID
    home = Path(tempfile.mkdtemp(prefix="outgate-sandbox-"))  # pytest's own is closed to other users
    home.chmod(0o755)
    if uid != os.getuid():
        os.chown(home, uid, uid)
    yield Who(uid, home)
    shutil.rmtree(home)


def listen_unix(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    if not address.startswith("\0"):
        Path(address).chmod(0o777)
    listener.listen()
    return listener


@dataclass(frozen=True, slots=True)
class Probed:
    outcomes: dict[str, str]
    attempts: list[list[str | int]]
    took_ms: float


@pytest.fixture(scope="session")
def probed(who: Who) -> Probed:
    """One run of the hostile program, whose outcomes the tests below read."""
    hidden, directory = who.home / "agent.sock", who.home / "services"
    directory.mkdir()
    report = who.home / "report.json"
    abstract = f"outgate-{os.getpid()}-{who.uid}"
    asked = {
        "hidden": str(hidden),
        "masked_directory": str(directory),
        "abstract": abstract,
        "outer_pid": os.getpid(),
        "memory_key": os.getpid(),
    }
    options = ["--tcp", "8443", "--udp", "123", "--hide", str(directory), "--report", str(report)]
    environment = os.environ | {"SOME_AGENT_SOCK": str(hidden), "SSH_AUTH_SOCK": str(hidden)}
    inheritable, other_end = os.pipe()
    libc = ctypes.CDLL(None)
    memory = libc.shmget(asked["memory_key"], 4096, 0o1666)  # IPC_CREAT, for everyone
    assert memory >= 0
    with listen_unix(str(hidden)), listen_unix(str(directory / "outer.sock")), listen_unix("\0" + abstract):
        for address in (str(hidden), str(directory / "outer.sock"), "\0" + abstract):
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(address)  # outside they do answer
        done = subprocess.run(
            who.driver(*options, "--", sys.executable, str(PROBE), json.dumps(asked)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=directory,
            env=environment,
            pass_fds=[inheritable],
        )
    os.close(inheritable)
    os.close(other_end)
    libc.shmctl(memory, 0, None)  # IPC_RMID
    assert done.returncode == 0, done.stderr
    told = json.loads(report.read_text())
    return Probed(json.loads(done.stdout), told["attempts"], told["took_ms"])


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ("tcp4", "tcp 192.0.2.7 443"),
        ("tcp6", "tcp 2001:db8::7 443"),
        ("tcp port 80", "tcp 192.0.2.7 80"),
        ("tcp port 53", "tcp 192.0.2.7 53"),
        ("policy port", "tcp 192.0.2.7 8443"),
        ("metadata", "tcp 169.254.169.254 80"),
        ("udp4", "udp 192.0.2.9 53"),
        ("udp6", "udp 2001:db8::9 53"),
        ("udp policy port", "udp 192.0.2.9 123"),
        ("own server", "served"),
        ("own server by any address", "served"),
        ("still confined", "tcp 192.0.2.1 443"),
    ],
)
def test_every_destination_is_ours(probed: Probed, attempt: str, expected: str) -> None:
    assert probed.outcomes[attempt] == expected


@pytest.mark.parametrize("attempt", [f"unlisted {each}" for each in ("tcp4", "tcp6", "udp4", "udp6")])
def test_a_port_nobody_listens_on_is_refused_at_once(probed: Probed, attempt: str) -> None:
    assert probed.outcomes[attempt] == "ECONNREFUSED"


def test_attempts_on_closed_ports_are_told_and_no_others(probed: Probed) -> None:
    assert sorted(probed.attempts) == [
        ["tcp", "192.0.2.7", 22],
        ["tcp", "2001:db8::7", 22],
        ["udp", "192.0.2.7", 3478],
        ["udp", "2001:db8::7", 3478],
    ]


def test_there_is_no_device_but_loopback(probed: Probed) -> None:
    assert probed.outcomes["interfaces"] == "lo"


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ("abstract socket", "ECONNREFUSED"),
        ("shared memory", "ENOENT"),
        ("hidden socket", "ECONNREFUSED"),
        ("socket in a masked directory", "ENOENT"),
        ("listing a masked directory", "[]"),
        ("socket below the start directory", "ENOENT"),
        ("named in the environment", "None"),
        ("agent in the environment", "None"),
        ("terminals", "['ptmx']"),
        ("descriptors", "none"),
        ("signal to the gate", "ESRCH"),
        ("memory of process 1", "EACCES"),
    ],
)
def test_what_reaches_past_the_namespace_is_not_there(probed: Probed, attempt: str, expected: str) -> None:
    assert probed.outcomes[attempt] == expected


@pytest.mark.parametrize(
    "attempt",
    [
        "vsock",
        "vsock pair",
        "alg",
        "bluetooth",
        "family with a high half",
        "raw",
        "packet",
        "io_uring",
        "add_key",
        "request_key",
        "keyctl",
        "i386",
        "x32",
        "nested: vsock",
    ],
)
def test_system_calls_that_leave_are_refused(probed: Probed, attempt: str) -> None:
    if attempt not in probed.outcomes:
        pytest.skip("an x86_64 call")
    assert probed.outcomes[attempt] == "EPERM"


def test_no_capability_is_left(probed: Probed) -> None:
    assert probed.outcomes["capabilities"] == " ".join(["0" * 16] * 5)
    assert probed.outcomes["no new privileges"] == "1"


@pytest.mark.parametrize(
    "attempt",
    [
        "mount",
        "unmount a mask",
        "unmount a file's mask",
        "remount /proc/sys",
        "enter the own network again",
        "enter the parent's user namespace",
        "take lo down",
        "delete the route",
        "nested: take lo down",
        "nested: raw",
        "nested: core_pattern",
    ],
)
def test_the_sandbox_cannot_be_changed_from_inside(probed: Probed, attempt: str) -> None:
    assert probed.outcomes[attempt] == "EPERM"


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ("enter pid 1's network", "EACCES"),
        ("nested: unmount a mask", "EINVAL"),  # locked: mount_namespaces(7)
        ("nested: unmount a file's mask", "EINVAL"),
        ("nested: look below the masks", "EINVAL"),
        ("nested: own network", "ENETUNREACH"),  # capable of everything, over a network with nothing in it
    ],
)
def test_a_nested_user_namespace_wins_nothing(probed: Probed, attempt: str, expected: str) -> None:
    assert probed.outcomes[attempt] == expected


@pytest.mark.parametrize(
    ("attempt", "path"), [("kernel.core_pattern", "/proc/sys/kernel/core_pattern"), ("sysrq", "/proc/sysrq-trigger")]
)
def test_the_kernels_switches_are_read_only(probed: Probed, attempt: str, path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"this kernel has no {path}")
    assert probed.outcomes[attempt] in ("EROFS", "EACCES")  # EACCES: the owner is another user


def test_sys_is_read_only(probed: Probed) -> None:
    assert probed.outcomes["/sys is read-only"] == "True"


def test_set_up_takes_milliseconds(probed: Probed) -> None:
    assert probed.took_ms < 2000


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -9 $$", 137),
        ("kill -TERM $$", 143),
        ("kill -INT $$", 130),
    ],
)
def test_the_exit_status_is_the_commands(who: Who, script: str, status: int) -> None:
    done = who.run("sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_missing_command_is_127(who: Who) -> None:
    done = who.run("no-such-command")
    assert (done.returncode, done.stderr) == (127, "outgate: no-such-command: command not found\n")


def test_a_file_that_is_not_executable_is_126(who: Who) -> None:
    done = who.run("/etc/passwd")
    assert (done.returncode, done.stderr) == (126, "outgate: /etc/passwd: Permission denied\n")


def test_the_environment_of_the_release_is_added(who: Who) -> None:
    assert who.run("sh", "-c", "echo $FROM_RELEASE").stdout == "yes\n"


def test_standard_output_is_a_pipe_and_both_streams_stay_apart(who: Who) -> None:
    done = who.run("sh", "-c", "echo out; echo error >&2; test -t 1 || echo pipe")
    assert (done.stdout, done.stderr) == ("out\npipe\n", "error\n")


def test_closed_standard_streams_are_replaced(who: Who) -> None:
    """Else a socket of the gate would be the command's standard input."""
    script = 'test "$(readlink /proc/self/fd/0)" = /dev/null'
    command = who.driver("--", "sh", "-c", script)
    assert subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], timeout=TIMEOUT_S).returncode == 0


def test_there_is_no_controlling_terminal_without_one(who: Who) -> None:
    assert "No such device" in who.run("sh", "-c", "echo typed > /dev/tty").stderr


def test_the_gates_death_ends_the_command(who: Who) -> None:
    with subprocess.Popen(
        who.driver("--", "sh", "-c", "trap '' TERM HUP; echo ready; sleep 1000"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as gate:
        assert gate.stdout is not None
        assert gate.stdout.readline() == b"ready\n"
        gate.kill()
        assert gate.stdout.read() == b""  # its end is seen only when nobody inside holds it any more


def test_a_daemon_left_behind_ends_with_the_command(who: Who) -> None:
    done = who.run("sh", "-c", "setsid sh -c 'trap \"\" HUP TERM; exec sleep 1000' & echo started")
    assert (done.returncode, done.stdout) == (0, "started\n")  # `run` reads to the end of stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_signals_reach_the_commands_process_group(who: Who, number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 9' {number.name[3:]}; echo ready; {UNTIL_SIGNALLED}"
    with subprocess.Popen(
        who.driver("--", "sh", "-c", script), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as gate:
        assert gate.stdout is not None
        assert gate.stdout.readline() == "ready\n"
        gate.send_signal(number)
        assert gate.stdout.read() == "caught\n"
    assert gate.returncode == 9


def test_an_orphan_inside_is_collected(who: Who) -> None:
    script = "(sleep 0.05 & ) ; sleep 0.3; ps -e -o stat= | grep -c Z; exit 0"
    assert who.run("sh", "-c", script).stdout == "0\n"


def test_a_bus_or_agent_directory_of_the_user_is_empty_and_writable(who: Who) -> None:
    directory = who.home / f"tmux-{who.uid}"
    directory.mkdir()
    os.chown(directory, who.uid, who.uid)
    (directory / "outer").touch()
    script = f"ls {directory}; touch {directory}/inner; ls {directory}"
    done = subprocess.run(
        who.driver("--", "sh", "-c", script),
        env=os.environ | {"TMUX_TMPDIR": str(who.home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout == "inner\n"
    assert [each.name for each in directory.iterdir()] == ["outer"]


def test_a_hidden_directory_of_somebody_else_is_read_only(who: Who) -> None:
    if who.uid == 0:
        pytest.skip("root owns what it hides")
    done = who.run("sh", "-c", "ls /etc/ssl; touch /etc/ssl/new", options=["--hide", "/etc/ssl"])
    assert done.stdout == ""
    assert "Read-only file system" in done.stderr


def test_a_name_server_file_that_was_hidden_with_its_directory_is_there_again(who: Who) -> None:
    """systemd-resolved: /etc/resolv.conf is a link into /run/systemd."""
    if os.getuid() != 0:
        pytest.skip("only root can bind over /etc/resolv.conf")
    directory = who.home / "resolve" / "run"
    directory.mkdir(parents=True)
    (directory / "stub-resolv.conf").write_text("nameserver 127.0.0.53\noptions edns0\nsearch corp.example\n")
    etc = who.home / "resolve" / "etc"
    etc.mkdir()
    (etc / "resolv.conf").symlink_to(directory / "stub-resolv.conf")
    for name in ("passwd", "ld.so.cache"):
        shutil.copy(f"/etc/{name}", etc / name)
    script = f'mount --bind {etc} /etc && exec "$@"'
    command = who.driver("--hide", str(directory), "--", "cat", "/etc/resolv.conf")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout == "options edns0\nsearch corp.example\nnameserver 127.0.0.1\n", done.stderr


def test_the_gate_is_the_only_name_server(who: Who) -> None:
    servers = who.run("grep", "nameserver", "/etc/resolv.conf").stdout
    assert servers == "nameserver 127.0.0.1\n"


def test_many_ports_are_listened_on_and_the_limit_of_open_files_is_given_back(who: Who) -> None:
    ports = [option for port in range(20000, 20400) for option in ("--tcp", str(port))]
    script = "import socket; socket.create_connection(('192.0.2.1', 20399), 10).makefile().readline()"
    low = ["sh", "-c", 'ulimit -Sn 512; exec "$@"', "sh"]
    done = subprocess.run(
        [*low, *who.driver(*ports, "--", "sh", "-c", f'ulimit -Sn; {sys.executable} -c "{script}" && echo reached')],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout == "512\nreached\n", done.stderr


def test_too_many_ports_are_refused_by_number(who: Who) -> None:
    ports = [option for port in range(20000, 25000) for option in ("--tcp", str(port))]
    done = who.run("echo", "ran", options=ports)
    assert (done.returncode, done.stdout) == (125, "")
    assert "the policy names 5004 ports, 4096 are possible" in done.stderr


@pytest.mark.parametrize("limit", ["user", "net", "pid"])
def test_a_spent_namespace_limit_is_named_and_nothing_runs(who: Who, limit: str) -> None:
    name = f"max_{limit}_namespaces"  # each user namespace has its own, so the machine's stays as it is
    script = f'echo 0 > /proc/sys/user/{name}; exec "$@"'
    done = subprocess.run(
        who.line(
            "unshare",
            "--user",
            "--map-root-user",
            "sh",
            "-c",
            script,
            "sh",
            sys.executable,
            str(DRIVER),
            "--",
            "echo",
            "ran",
        ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stdout) == (125, "")
    assert f"user.{name} is 0" in done.stderr
    assert f"sysctl -w user.{name}=" in done.stderr
    assert "--proxy-env" in done.stderr


def test_a_container_that_hides_parts_of_proc_still_gets_a_sandbox(who: Who) -> None:
    """Then the kernel refuses a new /proc (mount_too_revealing), and the old one shows the outer process numbers."""
    if os.getuid() != 0:
        pytest.skip("only root can hide a part of /proc")
    report = who.home / "hidden-proc.json"
    script = 'mount -t tmpfs none /proc/tty && exec "$@"'
    inner = f"kill -0 {os.getpid()} 2>&1; cat /proc/{os.getpid()}/environ >/dev/null 2>&1 || echo closed"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *who.driver("--report", str(report), "--", "sh", "-c", inner)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert "No such process" in done.stdout
    assert "closed" in done.stdout
    assert json.loads(report.read_text())["own_proc"] is False


def test_set_up_that_fails_never_runs_the_command(who: Who) -> None:
    """The start directory is gone by the time of the last step but two."""
    script = (
        f"import sys; sys.path.insert(0, {str(HERE.parent.parent)!r})\n"
        "from proxy.sandbox import Ports, SandboxUnavailable, launch\n"
        "try: launch(['echo', 'ran'], ports=Ports(), environment={}, directory='/no/such/directory')\n"
        "except SandboxUnavailable as error: print(error.what, error.cause, sep=': ')\n"
    )
    done = subprocess.run(who.line(sys.executable, "-c", script), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == "directory refused: No such file or directory: /no/such/directory\n", done.stderr


def test_a_mask_that_cannot_be_applied_stops_the_start(who: Who) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(HERE.parent.parent)!r})\n"
        "from proxy.sandbox import Ports, SandboxUnavailable, launch, masks\n"
        "masks.find = lambda *_: masks.Masks(directories=(), files=('/etc/passwd/below',))\n"
        "try: launch(['echo', 'ran'], ports=Ports(), environment={})\n"
        "except SandboxUnavailable as error: print(error.what, error.cause, sep=': ')\n"
    )
    done = subprocess.run(who.line(sys.executable, "-c", script), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == "mounts refused: Not a directory: /etc/passwd/below\n", done.stderr


def test_a_sandbox_that_is_never_released_runs_nothing(who: Who) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(HERE.parent.parent)!r})\n"
        "from proxy.sandbox import Ports, launch\n"
        "import os\n"
        "with launch(['echo', 'ran'], ports=Ports(), environment={}) as sandbox: pass\n"
        "sandbox.close()\n"
        "try: os.waitpid(-1, os.WNOHANG)\n"
        "except ChildProcessError: print('no child left')\n"
    )
    done = subprocess.run(who.line(sys.executable, "-c", script), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == "no child left\n", done.stderr
