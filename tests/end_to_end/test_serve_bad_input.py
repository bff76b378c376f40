"""`outgate serve` with input that cannot be served: one line with what, where and the repair, and its exit code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.world import OUTGATE

PASSED = "version: 1\nworkloads:\n  app:\n    rules:\n      - host: api.example\n"
INSPECTED = PASSED + "        tls: inspect\n"
PODS = PASSED.replace("    rules:", "    match: {kubernetes: {namespace: app}}\n    rules:")
LISTEN = ["--listen", "127.0.0.1:0", "--admin", "none"]

REFUSED: dict[str, tuple[str, list[str], int, str]] = {
    "a door without a port": (PASSED, ["--listen", "127.0.0.1"], 2, r'--listen: "127\.0\.0\.1" is not .*; write ADDR'),
    "a door with a name": (PASSED, ["--listen", "localhost:80"], 2, r'--listen: "localhost:80" is not .*; write ADDR'),
    "a port too large": (PASSED, ["--listen", "127.0.0.1:70000"], 2, r"write ADDR:PORT"),
    "somebody else's address": (PASSED, ["--listen", "192.0.2.1:15001"], 3, r"--listen 192\.0\.2\.1:15001: "),
    "an unknown workload": (PASSED, [*LISTEN, "-w", "ap"], 2, r'unknown workload "ap"; did you mean "app"\?'),
    "a host without an address": (PASSED, [*LISTEN, "--host", "api.example"], 2, r"write NAME=ADDR"),
    "not YAML": ("version: [1", LISTEN, 3, r"policy\.yaml:2:1: not YAML: "),
    "no authority named": (INSPECTED, LISTEN, 3, r"policy\.yaml:5 \(app/rules\[0\]\) is inspected: .*--pki DIR"),
    "no authority there": (INSPECTED, [*LISTEN, "--pki", "pki"], 3, r"pki.*outgate pki init"),
    "pods": (PODS, LISTEN, 3, r"policy\.yaml:4:\d+: match: kubernetes needs .* --kubernetes in-cluster"),
    "a log that cannot be written": (PASSED, [*LISTEN, "--log", "no/where"], 3, r"--log \S*/no/where: No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_the_gate_says_in_a_line_why_it_does_not_start(tmp_path: Path, case: str) -> None:
    policy, arguments, code, said = REFUSED[case]
    (tmp_path / "policy.yaml").write_text(policy)
    command = [str(OUTGATE), "serve", "-p", "policy.yaml", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.search(said, done.stderr), done.stderr
    if "Usage:" not in done.stderr:
        assert re.fullmatch(r"outgate: [^\n]+\n", done.stderr), done.stderr
