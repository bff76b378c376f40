"""`outgate run` at a person's terminal: interactive programs work, and what the gate says does not get in their way."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.world import OUTGATE
from tests.proxy.test_sandbox_terminal import Desk
from tests.sandbox_user import UNTIL_SIGNALLED, why_no_sandbox

pytestmark = pytest.mark.kernel

POLICY = """\
version: 1
workloads:
  app:
    rules:
      - host: api.example
"""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    if reason := why_no_sandbox():
        pytest.skip(reason)
    (tmp_path / "policy.yaml").write_text(POLICY)
    made = Desk()
    try:
        yield made
    finally:
        made.close()


def run(tmp_path: Path, script: str, *options: str) -> list[str]:
    return [str(OUTGATE), "run", "-p", str(tmp_path / "policy.yaml"), *options, "--", "sh", "-c", script]


def test_the_command_has_a_terminal_of_the_users_size_and_reads_the_keyboard(desk: Desk, tmp_path: Path) -> None:
    started = desk.start(*run(tmp_path, "test -t 0 && test -t 1 && stty size && read line && echo got:$line"))
    desk.wait_for("33 101")
    desk.type("hello\n")

    desk.wait_for("got:hello")
    assert started.wait(30) == 0


def test_the_interrupt_key_is_the_commands(desk: Desk, tmp_path: Path) -> None:
    started = desk.start(*run(tmp_path, f"trap 'echo caught; exit 9' INT; echo ready; {UNTIL_SIGNALLED}"))
    desk.wait_for("ready")
    desk.type("\x03")

    desk.wait_for("caught")
    assert started.wait(30) == 9


def test_the_closing_summary_comes_after_the_last_output_and_stands_at_the_line_start(
    desk: Desk, tmp_path: Path
) -> None:
    started = desk.start(*run(tmp_path, "getent ahosts unknown.example; printf 'last words'"))
    desk.wait_for("last words[^\n]*\n?outgate: app: 0 allowed, 1 denied\r\n")

    assert started.wait(30) == 0


def test_records_are_readable_lines_on_a_terminal(desk: Desk, tmp_path: Path) -> None:
    started = desk.start(*run(tmp_path, "getent ahosts unknown.example", "--log", "-"))
    desk.wait_for(r"\d\d:\d\d:\d\d\S*  \S*deny \S*  app  dns://unknown\.example  no_rule")

    started.wait(30)


def test_a_pipe_gets_the_output_while_the_terminal_gets_the_rest(desk: Desk, tmp_path: Path) -> None:
    started = desk.start(*run(tmp_path, "getent ahosts unknown.example; echo out"), stdout=subprocess.PIPE)
    assert started.stdout
    with started.stdout as pipe:
        assert pipe.read() == b"out\n"
    desk.wait_for("outgate: app: 0 allowed, 1 denied")
    started.wait(30)


def test_the_terminal_is_as_it_was_when_the_command_is_killed(desk: Desk, tmp_path: Path) -> None:
    import termios

    started = desk.start(*run(tmp_path, "stty raw -echo; echo ready; kill -KILL $$"))
    desk.wait_for("ready")

    assert started.wait(30) == 128 + 9
    assert termios.tcgetattr(desk.terminal) == desk.settings
