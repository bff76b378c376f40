"""`outgate run` carries `udp:` rules: a program inside speaks UDP to what its rules name, and to nothing else."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.world import OUTGATE
from tests.sandbox_user import why_no_sandbox

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif("sys.platform != 'linux'", reason="sandboxes exist on Linux only"),
]

INSIDE = """
import errno, json, socket, sys

def ask(host, port, message=b"question"):
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(found[0], socket.SOCK_DGRAM) as sock:
        sock.settimeout(float(sys.argv[1]))
        try:
            sock.connect(found[4][:2])
            sock.send(message)
            return sock.recv(65536).decode()
        except TimeoutError:
            return "silence"
        except OSError as error:
            return errno.errorcode[error.errno]

print(json.dumps([ask(host, port) for host, port in json.loads(sys.argv[2])]))
"""


@contextmanager
def echo_server() -> Iterator[tuple[int, list[bytes]]]:
    """On this machine, outside."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            while (got := sock.recvfrom(65536))[0] != b"\0end":
                heard.append(got[0])
                sock.sendto(b"echo of " + got[0], got[1])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield sock.getsockname()[1], heard
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"\0end", sock.getsockname())
        thread.join(20)


def run(
    directory: Path, rules: str, asked: list[tuple[str, int]], *options: str, patience_s: float = 15
) -> tuple[list[str], list[dict[str, Any]], str]:
    """What the program was answered, the records of UDP, and what was said."""
    if reason := why_no_sandbox():
        pytest.skip(reason)
    policy, log = directory / "policy.yaml", directory / "decisions.jsonl"
    policy.write_text(f"version: 1\nworkloads:\n  app:\n    rules: {rules}\n")
    done = subprocess.run(
        [str(OUTGATE), "run", "-p", str(policy), "--log", str(log), *options, "--", sys.executable, "-c", INSIDE,
         str(patience_s), json.dumps(asked)],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return json.loads(done.stdout), [record for record in records if record["stage"] == "udp"], done.stderr


def test_a_rule_by_name_is_carried_and_recorded(tmp_path: Path) -> None:
    with echo_server() as (port, heard):
        answers, [record], said = run(
            tmp_path, "[{udp: {host: echo.example, ports: 9000, budget: 1MiB/h}}]",
            [("echo.example", 9000)], "--host", f"echo.example=127.0.0.1:{port}",
        )  # fmt: skip
    assert answers == ["echo of question"]
    assert heard == [b"question"]
    assert (record["verdict"], record["server.names"], record["workload"]) == ("allow", ["echo.example"], "app")
    assert (record["bytes.sent"], record["bytes.received"]) == (8, 16)
    assert "stays closed" not in said


@pytest.mark.parametrize("address", ["203.0.113.9", "2001:db8::9"])
def test_another_address_on_a_port_that_is_bound_is_denied_and_one_that_is_not_is_refused(
    tmp_path: Path, address: str
) -> None:
    """Silence on the one: the gate cannot send the kernel's refusal. The other's comes at once."""
    with echo_server() as (port, heard):
        answers, records, _ = run(
            tmp_path, "[{udp: 'echo.example:9000'}]", [(address, 9000), (address, 9001)],
            "--host", f"echo.example=127.0.0.1:{port}", patience_s=0.5,
        )  # fmt: skip
    assert answers == ["silence", "ECONNREFUSED"]
    assert heard == []
    denied = [(record["verdict"], record["reason"], record["destination.port"]) for record in records]
    assert denied == [("deny", "no_rule", 9000), ("deny", "no_rule", 9001)]


def test_the_last_words_of_a_program_are_carried(tmp_path: Path) -> None:
    with echo_server() as (port, heard):
        _, records, _ = run(
            tmp_path, "[{udp: 'echo.example:9000'}]", [("echo.example", 9000)],
            "--host", f"echo.example=127.0.0.1:{port}", patience_s=0.001,
        )  # fmt: skip
        assert [record["verdict"] for record in records] == ["allow"]
    assert heard == [b"question"]


def test_an_answer_that_nobody_waits_for_is_no_attempt(tmp_path: Path) -> None:
    """The kernel refuses it inside, which looks as if the program had tried a port that nobody serves."""
    with echo_server() as (port, _):
        _, records, _ = run(
            tmp_path, "[{udp: 'echo.example:9000'}]", [("echo.example", 9000)] * 3,
            "--host", f"echo.example=127.0.0.1:{port}", patience_s=0.001,
        )  # fmt: skip
    assert {record["verdict"] for record in records} == {"allow"}


def test_udp_443_is_refused_at_once_unless_a_rule_names_it(tmp_path: Path) -> None:
    answers, _, _ = run(tmp_path, "[{host: echo.example}]", [("203.0.113.9", 443)])
    assert answers == ["ECONNREFUSED"]


def test_a_port_of_the_guards_stays_theirs_and_is_said(tmp_path: Path) -> None:
    _, _, said = run(tmp_path, "[{udp: '203.0.113.9:53'}, {udp: '203.0.113.9:123'}]", [])
    assert "udp port 53 stays closed; that port is the DNS guard's" in said
    assert "udp port 123 stays closed; that port is the time relay's; write an ntp rule" in said
