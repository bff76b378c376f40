"""The command's own terminal: what a person at the keyboard expects, and what must not reach their shell."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.sandbox_user import UNTIL_SIGNALLED, as_user, why_no_sandbox

DRIVER = Path(__file__).resolve().parent / "sandbox_driver.py"
TIMEOUT_S = 30.0

pytestmark = pytest.mark.kernel


class Desk:
    """A terminal with a person at it: what is typed goes in, what appears is kept."""

    def __init__(self) -> None:
        self.keyboard, self.terminal = os.openpty()
        self.resize(33, 101)
        self.settings = termios.tcgetattr(self.terminal)
        self.seen = b""
        self.started: list[subprocess.Popen[bytes]] = []

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for each in (self.keyboard, self.terminal):
            if each >= 0:
                os.close(each)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def start(self, *command: str, stdin: int | None = None, stdout: int | None = None) -> subprocess.Popen[bytes]:
        """Run it as the session leader of this terminal, each stream that is not given being the terminal."""
        terminal = self.terminal

        def sit_down() -> None:
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            command,
            stdin=terminal if stdin is None else stdin,
            stdout=terminal if stdout is None else stdout,
            stderr=terminal,
            preexec_fn=sit_down,
        )
        self.started.append(process)
        return process

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def read(self, wait_s: float = TIMEOUT_S) -> bytes:
        readable, _, _ = select.select([self.keyboard], [], [], wait_s)
        chunk = os.read(self.keyboard, 65536) if readable else b""
        self.seen += chunk
        return chunk

    def wait_for(self, pattern: str) -> re.Match[bytes]:
        """Read until `pattern` appears; what is before its end is not looked at again."""
        end = time.monotonic() + TIMEOUT_S
        while not (found := re.search(pattern.encode(), self.seen)):
            if not self.read() or time.monotonic() > end:
                raise AssertionError(f"{pattern!r} did not appear in {self.seen!r}")
        self.seen = self.seen[found.end() :]
        return found

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        """Read on until it ends, as a terminal does."""
        end = time.monotonic() + TIMEOUT_S
        while process.poll() is None:
            self.read(0.02)
            if time.monotonic() > end:
                process.kill()
                raise AssertionError(f"still running; seen {self.seen!r}")
        while self.read(0):
            pass
        return process.wait()

    def waiting_input(self) -> int:
        (count,) = struct.unpack("i", fcntl.ioctl(self.terminal, termios.FIONREAD, bytes(4)))
        return int(count)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


@pytest.fixture(params=["root", "user"])
def line(request: pytest.FixtureRequest) -> Sequence[str]:
    """The command line before the command."""
    driver = [sys.executable, str(DRIVER), "--"]
    if reason := why_no_sandbox():
        pytest.skip(reason)
    if os.getuid() != 0:
        if request.param == "root":
            pytest.skip("the tests do not run as root")
        return driver
    return driver if request.param == "root" else as_user(driver)


def test_an_interactive_shell_talks_and_the_terminal_is_given_back(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, "sh", "-i")
    desk.wait_for(r"[#$] ")
    assert termios.tcgetattr(desk.terminal)[3] & termios.ICANON == 0  # raw while it runs
    desk.type("echo $((6*7)); tty\r")
    desk.wait_for(r"42\r\n/dev/pts/0\r\n")
    desk.type("exit 4\r")
    assert desk.finish(process) == 4
    assert termios.tcgetattr(desk.terminal) == desk.settings


def test_interactive_python_answers(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, "env", "PYTHON_BASIC_REPL=1", "TERM=dumb", sys.executable, "-i", "-q")
    desk.wait_for(">>> ")
    desk.type("print(6 * 7)\r")
    desk.wait_for("42\r\n>>> ")
    desk.type("\x04")  # ^D
    assert desk.finish(process) == 0


def test_the_size_is_the_users_and_follows_it(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, "sh", "-c", f"trap 'stty size; exit 0' WINCH; stty size; {UNTIL_SIGNALLED}")
    desk.wait_for("33 101\r\n")
    desk.resize(40, 132)
    desk.wait_for("40 132\r\n")
    assert desk.finish(process) == 0


def test_interrupt_reaches_the_command_alone(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, "sh", "-c", f"trap 'echo interrupted; exit 5' INT; echo ready; {UNTIL_SIGNALLED}")
    desk.wait_for("ready")
    desk.type("\x03")
    desk.wait_for("interrupted")
    assert desk.finish(process) == 5
    assert termios.tcgetattr(desk.terminal) == desk.settings


def test_an_uncaught_interrupt_is_130(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, "sh", "-c", "echo ready; exec sleep 1000")
    desk.wait_for("ready")
    desk.type("\x03")
    assert desk.finish(process) == 130


def test_a_signal_to_the_gate_is_the_commands_and_the_terminal_is_given_back(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, "sh", "-c", "echo ready; exec sleep 1000")
    desk.wait_for("ready")
    process.send_signal(signal.SIGTERM)
    assert desk.finish(process) == 143
    assert termios.tcgetattr(desk.terminal) == desk.settings


def test_all_output_arrives_though_the_reader_is_slow(desk: Desk, line: Sequence[str]) -> None:
    size = 500_000
    process = desk.start(*line, "sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x; echo end")
    time.sleep(0.3)  # nothing is read: the relay has to wait
    assert desk.finish(process) == 0
    assert desk.seen == b"x" * size + b"end\r\n"


def test_typed_text_arrives_though_the_command_is_slow(desk: Desk, line: Sequence[str]) -> None:
    script = "stty raw -echo; echo ready; sleep 0.3; head -c 40000 | wc -c"
    process = desk.start(*line, "sh", "-c", script)
    desk.wait_for("ready")
    os.set_blocking(desk.keyboard, False)
    left = b"y" * 40_000
    end = time.monotonic() + TIMEOUT_S
    while left and time.monotonic() < end:
        select.select([], [desk.keyboard], [], TIMEOUT_S)
        try:
            left = left[os.write(desk.keyboard, left) :]
        except BlockingIOError:
            time.sleep(0.01)  # a terminal says writable before its line buffer has room
    os.set_blocking(desk.keyboard, True)
    desk.wait_for("40000")
    assert desk.finish(process) == 0


PUSH = """
import errno, fcntl, sys, termios
def push(terminal, command, argument):
    try:
        fcntl.ioctl(terminal, command, argument)
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]
with open("/dev/tty", "rb", buffering=0) as own:
    print("pushed", push(own, termios.TIOCSTI, b"x"), push(own, 0x541C, b"\\x03"), push(0, termios.TIOCSTI, b"x"))
"""


def test_nothing_can_be_typed_into_the_users_terminal(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, sys.executable, "-c", PUSH)
    desk.wait_for("pushed EPERM EPERM EPERM\r\n")
    assert desk.finish(process) == 0
    assert desk.waiting_input() == 0


def test_without_a_sandbox_it_can_be_typed_into(desk: Desk) -> None:
    """The attack above does work: on this kernel, or by an administrator on any."""
    process = desk.start(sys.executable, "-c", PUSH)
    answer = desk.wait_for(r"pushed (\w+)")[1]
    assert desk.finish(process) == 0
    if answer != b"done":
        pytest.skip("dev.tty.legacy_tiocsti is 0: this kernel stops it for everyone")
    termios.tcsetattr(
        desk.terminal, termios.TCSANOW, [*desk.settings[:3], 0, *desk.settings[4:]]
    )  # count without a line
    assert desk.waiting_input() > 0


def test_no_other_terminal_is_there(desk: Desk, line: Sequence[str]) -> None:
    script = "ls -m /dev/pts; stat -Lc %t:%T /dev/null /dev/console /dev/tty1 2>/dev/null | sort -u"
    process = desk.start(*line, "sh", "-c", script)
    assert desk.finish(process) == 0
    assert desk.seen.startswith(b"0, ptmx\r\n")
    if line[1] == str(DRIVER) and os.getuid() == 0:  # closed to others, so left as they are
        assert desk.seen == b"0, ptmx\r\n1:3\r\n"


def test_only_the_streams_that_are_terminals_are_replaced(desk: Desk, line: Sequence[str]) -> None:
    reader, writer = os.pipe()
    process = desk.start(*line, "sh", "-c", "test -t 0 && test -t 2 && ! test -t 1 && echo right", stdout=writer)
    os.close(writer)
    assert desk.finish(process) == 0
    with open(reader, "rb") as output:
        assert output.read() == b"right\n"


def test_in_a_pipeline_the_keyboard_is_left_to_the_pager(desk: Desk, line: Sequence[str]) -> None:
    reader, writer = os.pipe()
    process = desk.start(*line, "sh", "-c", "echo ready >&2; sleep 0.3; echo page", stdout=writer)
    os.close(writer)
    desk.wait_for("ready")
    desk.type("for the pager\n")
    assert termios.tcgetattr(desk.terminal) == desk.settings  # not raw
    assert desk.finish(process) == 0
    assert desk.waiting_input() == len("for the pager\n")
    os.close(reader)


def test_in_a_pipeline_a_command_that_reads_the_keyboard_gets_it(desk: Desk, line: Sequence[str]) -> None:
    reader, writer = os.pipe()
    process = desk.start(*line, "sh", "-c", "echo 'name?' >&2; read name; echo hello $name", stdout=writer)
    os.close(writer)
    desk.wait_for(r"name\?")
    desk.type("you\r")
    assert desk.finish(process) == 0
    with open(reader, "rb") as output:
        assert output.read() == b"hello you\n"
    assert termios.tcgetattr(desk.terminal) == desk.settings


def test_a_password_is_read_from_the_terminal_when_stdin_is_a_pipe(desk: Desk, line: Sequence[str]) -> None:
    reader, writer = os.pipe()
    process = desk.start(*line, sys.executable, "-c", "import getpass; print('got', getpass.getpass())", stdin=reader)
    os.close(reader)
    desk.wait_for("Password: ")
    desk.type("secret\r")
    desk.wait_for("got secret")
    assert desk.finish(process) == 0
    os.close(writer)


def talk_to_cat(desk: Desk) -> None:
    """Until it answers it may be stopped between vfork and exec, and its shell with it, on any terminal."""
    desk.wait_for("started\r\n")
    desk.type("first\r")
    desk.wait_for("first\r\nfirst\r\n")


def test_suspend_stops_the_gate_and_the_shell_continues_it(desk: Desk, line: Sequence[str]) -> None:
    shell = desk.start("env", "PS1=ready> ", "bash", "--norc", "--noprofile", "--noediting", "-i")
    desk.wait_for("ready> ")
    desk.type(" ".join(line) + " sh -c 'echo started; cat; echo after'\r")
    talk_to_cat(desk)
    desk.type("\x1a")  # ^Z
    desk.wait_for("Stopped.*\n")
    desk.wait_for("ready> ")
    desk.type("fg\r")
    desk.wait_for("fg\r\n.*\n")
    desk.type("typed\r")
    desk.wait_for("typed\r\ntyped\r\n")
    desk.type("\x04")
    desk.wait_for("after\r\n")
    desk.wait_for("ready> ")
    desk.type("exit\r")
    assert desk.finish(shell) == 0


def test_suspend_without_a_shell_to_continue_goes_on(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, "sh", "-c", "echo started; cat")
    talk_to_cat(desk)
    desk.type("\x1aline\r")
    desk.wait_for("line\r\nline\r\n")
    desk.type("\x04")
    assert desk.finish(process) == 0


def test_a_closed_window_hangs_up_the_command(desk: Desk, line: Sequence[str]) -> None:
    process = desk.start(*line, "sh", "-c", "echo ready; exec sleep 1000")
    desk.wait_for("ready")
    os.close(desk.keyboard)
    os.close(desk.terminal)
    desk.keyboard = desk.terminal = -1
    assert process.wait(TIMEOUT_S) == 129
