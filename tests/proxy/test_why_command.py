"""`outgate why`: what it prints, what machines read, and its exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proxy.commands_of import WEATHER, invoke, start, write

TWO = "version: 1\nworkloads: {one: {}, two: {}}\n"


def test_a_denial_comes_first_and_ends_with_the_lines_to_paste(tmp_path: Path) -> None:
    path = write(tmp_path, WEATHER)

    result = invoke("why", "-p", path, "-w", "weather", "POST https://dataservice.accuweather.com/search")

    assert result.exit_code == 1
    assert result.stdout == (
        "DENY  POST https://dataservice.accuweather.com/search\n"
        "\n"
        "  workload  weather\n"
        "  because   no allow entry of the rule admits POST /search\n"
        f'  nearest   {path}:5 (search): "GET /search/**" is for another method than POST\n'
        "\n"
        f"  dns   allow  {path}:5 (search)\n"
        f"  tls   allow  {path}:5 (search)  inspected: method and path are judged\n"
        "  http  deny   no_allow_entry\n"
        "\n"
        f"  to allow it, add to allow: of {path}:5 (search)\n"
        '      - "POST /search"\n'
    )
    assert result.stderr == ""


def test_an_allow_names_its_rule(tmp_path: Path) -> None:
    path = write(tmp_path, WEATHER)

    result = invoke("why", "-p", path, "-w", "weather", "tls://archive.ubuntu.com")

    assert result.exit_code == 0
    assert result.stdout == (
        "ALLOW  tls://archive.ubuntu.com\n"
        "\n"
        "  workload  weather\n"
        f"  rule      {path}:10 (apt)\n"
        "\n"
        f"  dns  allow  {path}:10 (apt)\n"
        f"  tls  allow  {path}:10 (apt)  address judged at dial time\n"
    )


def test_what_no_edit_opens_says_what_to_do(tmp_path: Path) -> None:
    result = invoke("why", "-p", write(tmp_path, WEATHER), "-w", "weather", "tcp://169.254.169.254:80")

    assert result.exit_code == 1
    assert "instead   use the service's public name" in result.stdout
    assert "to allow it" not in result.stdout


def test_json_has_the_keys_that_help_promises(tmp_path: Path) -> None:
    path = write(tmp_path, WEATHER)

    result = invoke("why", "--json", "-p", path, "-w", "weather", "POST https://dataservice.accuweather.com/search")
    told = json.loads(result.stdout)

    rule = {"file": path, "line": 5, "name": "search", "label": "weather/rules[0]"}
    assert result.exit_code == 1
    assert told["stages"][-1] == {
        "stage": "http",
        "verdict": "deny",
        "reason": "no_allow_entry",
        "rule": rule,
        "note": "",
    }
    assert [stage["stage"] for stage in told.pop("stages")] == ["dns", "tls", "http"]
    assert told == {
        "attempt": "POST https://dataservice.accuweather.com/search",
        "workload": "weather",
        "verdict": "deny",
        "reason": "no_allow_entry",
        "because": "no allow entry of the rule admits POST /search",
        "stage": "http",
        "rule": rule,
        "mode": "enforce",
        "nearest": [{"rule": rule, "missed_by": '"GET /search/**" is for another method than POST'}],
        "edits": [
            {
                "change": "add",
                "key": "allow",
                "file": path,
                "line": 5,
                "where": f"add to allow: of {path}:5 (search)",
                "lines": ['- "POST /search"'],
            }
        ],
        "advice": "",
    }
    for key in ("attempt", "verdict", "reason", "stages", "nearest", "edits", "advice", "missed_by", "lines"):
        assert key in invoke("why", "--help").stdout


def test_quotes_around_the_attempt_may_be_forgotten(tmp_path: Path) -> None:
    result = invoke("why", "-p", write(tmp_path, WEATHER), "GET", "https://dataservice.accuweather.com/search")

    assert result.exit_code == 0
    assert result.stdout.startswith("ALLOW  GET https://dataservice.accuweather.com/search\n")


def test_policy_and_workload_come_from_the_environment(tmp_path: Path) -> None:
    one = write(tmp_path, "version: 1\nworkloads: {app: {rules: [{host: a.example}]}}\n", "one.yaml")
    two = write(tmp_path, "version: 1\nworkloads: {app: {rules: [{host: b.example}]}, other: {}}\n", "two.yaml")
    env = {"OUTGATE_POLICY": os.pathsep.join((one, two)), "OUTGATE_WORKLOAD": "app"}

    assert invoke("why", "tls://a.example", env=env).exit_code == 0
    assert invoke("why", "tls://b.example", env=env).exit_code == 0
    assert invoke("why", "-w", "other", "tls://b.example", env=env).exit_code == 1


def test_a_day_decides_what_is_expired(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nworkloads: {app: {rules: [{host: a.example, until: 2026-01-31}]}}\n")

    assert invoke("why", "-p", path, "--at", "2026-01-31", "tls://a.example").exit_code == 0
    late = invoke("why", "-p", path, "--at", "2026-02-01", "tls://a.example")
    assert late.exit_code == 1
    assert "until: 2026-03-03" in late.stdout
    assert invoke("why", "-p", path, "--at", "soon", "tls://a.example").exit_code == 2


def test_audit_mode_lets_pass_and_says_what_enforcement_would_do(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nworkloads: {app: {mode: audit, rules: [{host: a.example}]}}\n")

    result = invoke("why", "-p", path, "tls://x.example")

    assert result.exit_code == 0
    assert result.stdout.startswith("ALLOW  tls://x.example\naudit mode lets this pass; enforcement would deny it\n")
    assert "- host: x.example" in result.stdout
    told = json.loads(invoke("why", "--json", "-p", path, "tls://x.example").stdout)
    assert (told["verdict"], told["mode"], told["reason"]) == ("allow", "audit", "no_rule")


@pytest.mark.parametrize(
    ("text", "arguments", "exit_code", "line"),
    [
        (WEATHER, ["gopher://x"], 2, 'outgate: unknown scheme "gopher"; use one of https'),
        (WEATHER, ["https://x/y"], 2, "outgate: an HTTP attempt needs a method; write 'GET https://x/y'"),
        (WEATHER, [""], 2, "outgate: an empty attempt"),
        (WEATHER, ["-w", "wether", "tls://x"], 2, 'outgate: unknown workload "wether"; did you mean "weather"?'),
        (TWO, ["tls://x"], 2, "outgate: which workload? add -w NAME; there is one, two"),
        ("version: 1\n", ["tls://x"], 2, "outgate: which workload?"),
        ("version: 2\n", ["tls://x"], 3, "p.yaml:1:10: error: "),
        ("version: 1\nworkloads: {a: {rules: [{hst: x}]}}\n", ["tls://x"], 3, 'did you mean "host"?'),
        ("\0", ["tls://x"], 3, "p.yaml:1:1: error: "),
    ],
    ids=["scheme", "method", "empty", "workload", "which", "none", "version", "key", "nul"],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, text: str, arguments: list[str], exit_code: int, line: str
) -> None:
    result = invoke("why", "-p", write(tmp_path, text), *arguments)

    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert line in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_policy_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")

    for path, problem in ((missing, "No such file"), (str(tmp_path), "Is a directory")):
        result = invoke("why", "-p", path, "tls://x")
        assert (result.exit_code, result.stdout) == (3, "")
        assert path in result.stderr
        assert problem in result.stderr


def test_bad_flags_are_usage() -> None:
    assert invoke("why", "tls://x").exit_code == 2
    assert invoke("why", "-p", "p.yaml").exit_code == 2
    assert invoke("why", "-p", "p.yaml", "--nope", "tls://x").exit_code == 2


def test_what_comes_from_outside_cannot_forge_the_report(tmp_path: Path) -> None:
    result = invoke("why", "-p", write(tmp_path, WEATHER), "GET https://dataservice.accuweather.com/\x1b[2J\nALLOW")

    assert result.exit_code == 1
    assert "\x1b" not in result.stdout
    assert "ALLOW" not in [line.strip() for line in result.stdout.splitlines()]


def test_help_shows_an_example() -> None:
    result = invoke("why", "--help")

    assert result.exit_code == 0
    assert "outgate why -p weather.yaml -w weather 'GET https://" in result.stdout


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    path = write(tmp_path, WEATHER)

    denied = start("why", "-p", path, "-w", "weather", "tls://ubuntu.com")
    broken = start("why", "-p", path + ".missing", "tls://ubuntu.com")

    assert (denied.returncode, denied.stderr) == (1, "")
    assert denied.stdout.startswith("DENY  tls://ubuntu.com\n")
    assert (broken.returncode, broken.stdout, broken.stderr.count("\n")) == (3, "", 1)


def test_it_imports_neither_the_gate_nor_rich_into_a_pipe(tmp_path: Path) -> None:
    path = write(tmp_path, WEATHER)
    script = (
        "import sys\nfrom proxy.cli import main\n"
        f"sys.argv = ['outgate', 'why', '-p', {path!r}, 'tls://archive.ubuntu.com']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'rich', 'mitmproxy', 'cryptography', 'aiohttp', 'asyncio', 'structlog', 'ssl'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(tmp_path: Path, no_color: str | None, coloured: bool) -> None:
    path = write(tmp_path, WEATHER)
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "200", **({"NO_COLOR": no_color} if no_color else {})}

    text = _on_terminal(["why", "-p", path, "POST https://dataservice.accuweather.com/search"], env)

    assert ("\x1b[32m" in text or "\x1b[1;32m" in text) is coloured
    assert "DENY" in text
    assert '- "POST /search"' in text


def test_a_narrow_terminal_loses_nothing_and_never_breaks_what_is_pasted(tmp_path: Path) -> None:
    path = write(tmp_path, WEATHER)
    words = "GET https://dataservice.accuweather.com/a-rather-long-path/that-does-not-fit/on-one-line/of-forty"
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "40", "NO_COLOR": "1"}

    text = _on_terminal(["why", "-p", path, words], env)

    assert '      - "GET /a-rather-long-path/that-does-not-fit/on-one-line/of-forty"\r\n' in text
    shown = re.sub(r"\x1b\[[0-9;]*m|\s", "", text)
    assert words.replace(" ", "") in shown
    assert "because noallowentry".replace(" ", "") in shown


def _on_terminal(arguments: list[str], env: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        child = subprocess.Popen([sys.executable, "-m", "proxy", *arguments], stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        seen = bytearray()
        while True:
            try:
                chunk = screen.read(4096)
            except OSError:  # EIO: Linux says so when the child has closed its side
                break
            if not chunk:
                break
            seen += chunk
        child.wait(timeout=60)
    return seen.decode()
