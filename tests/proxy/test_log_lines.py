"""Every record is one line, whatever a workload has put into it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from proxy.log.lines import renderer
from proxy.record import Record

DENIAL: Record = {
    "time": "2026-11-22T12:30:01.000Z",
    "id": "0123456789abcdef",
    "workload": "app",
    "stage": "http",
    "verdict": "deny",
    "reason": "no_rule",
    "server.name": "a.example",
    "destination.port": 443,
}

HOSTILE: dict[str, object] = {
    "a newline": 'x"}\n{"verdict":"allow"',
    "an escape sequence": "x\x1b[1A\x1b[2Kallow",
    "an escape sequence of one character": "x\x9b2K",
    "a lone surrogate": "x\udcff",
    "a line separator": "x\u2028y",
    "a number beyond 64 bits": 2**70,
    "bytes": b"\xff\n",
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_json_line_has_one_newline_and_reads_back(value: object) -> None:
    line = renderer(pretty=False, colour=False)(DENIAL | {"error.message": value})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line) == DENIAL | {"error.message": str(value) if isinstance(value, bytes) else value}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_words_have_one_newline_and_move_no_cursor(value: object) -> None:
    line = renderer(pretty=True, colour=False)(DENIAL | {"url.full": value, "rule": value})
    assert line.endswith(b"\n")
    assert line[:-1].decode().isprintable()


def test_words_are_those_of_why() -> None:
    line = renderer(pretty=True, colour=False)(DENIAL | {"stage": "tls", "rule": "p.yaml:3 (a)"})
    assert line == b"12:30:01  deny   app  tls://a.example  no_rule  p.yaml:3 (a)  0123456789abcdef\n"


def test_would_be_is_said_in_yellow() -> None:
    line = renderer(pretty=True, colour=True)(DENIAL | {"verdict": "allow", "would_be": "deny"})
    assert b"\x1b[33mwould deny\x1b[0m" in line


def test_line_that_is_no_record_shows_its_fields() -> None:
    line = renderer(pretty=True, colour=False)({"event": "records_lost", "count": 3})
    assert line == b"event=records_lost count=3\n"


def test_log_loads_no_rich_and_leaves_it_loadable() -> None:
    """A worker shows nothing in colour that needs it; a command that does still finds it."""
    script = "import sys, proxy.log.decision_log; assert 'rich' not in sys.modules; import rich.console"
    subprocess.run([sys.executable, "-c", script], check=True)
