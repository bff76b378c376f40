"""`outgate serve` on the command line: its options are the table's, and --check says why it would not start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.config.key import Group
from proxy.config.keys import KEYS
from tests.proxy.commands_of import WEATHER, invoke, write

PASSED = "version: 1\nworkloads:\n  app:\n    rules:\n      - host: api.example\n"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OUTGATE_")}


def start(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy", "serve", *arguments]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    environ = {**CLEAN, "PYTHONPATH": path, **variables}
    return subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_help_has_every_option_under_its_heading() -> None:
    lines = invoke("serve", "--help").stdout.splitlines()
    headings = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    heading, found = "", {}
    for line in lines:
        if line.removesuffix(":") in headings:
            heading = line.removesuffix(":")
        for word in line.replace(",", " ").split()[:3]:
            if line.startswith("  -") and word.startswith("--"):
                found[word] = heading

    assert headings == ["Options", *Group]
    assert {key.flag: key.group.value for key in KEYS}.items() <= found.items()


def test_help_imports_nothing_that_only_serving_needs() -> None:
    code = "import sys, proxy.commands.serve; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "asyncio",
        "ssl",
        "cryptography",
        "mitmproxy",
        "aiohttp",
        "prometheus_client",
        "rich",
        "orjson",
        "structlog",
    ]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "[]\n"


def test_it_checks_and_ends(tmp_path: Path) -> None:
    write(tmp_path, PASSED, "policy.yaml")
    write(tmp_path, "policy: policy.yaml\nmode: proxy\n", "gate.yaml")

    done = start(tmp_path, "--config", "gate.yaml", "--check")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mode proxy, policy ")


def test_the_variable_names_the_file_and_a_flag_wins_over_it(tmp_path: Path) -> None:
    write(tmp_path, PASSED, "policy.yaml")
    write(tmp_path, "policy: nowhere.yaml\nmode: sidecar\nworkload: app\n", "gate.yaml")

    done = start(tmp_path, "--check", "-p", "policy.yaml", OUTGATE_CONFIG="gate.yaml", OUTGATE_MODE="gateway")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mode gateway, ")


REFUSED = {
    "a configuration that cannot be meant": ("policy: policy.yaml\nworkers: 0\n", PASSED, 2, "gate.yaml:2:10: "),
    "no policy": ("workers: 1\n", PASSED, 2, "no policy: say --policy FILE"),
    "an unknown workload": ("policy: policy.yaml\nworkload: ap\n", PASSED, 2, 'workload "ap"; did you mean "app"?'),
    "a policy that does not load": ("policy: policy.yaml\n", PASSED + "   x", 3, "policy.yaml:"),
    "a policy that is not there": ("policy: nowhere.yaml\n", PASSED, 3, "nowhere.yaml:1:1: cannot be read"),
    "no authority": ("policy: policy.yaml\n", WEATHER, 3, "is inspected: give the authority"),
    "no roots": ("policy: policy.yaml\nupstreamCa: roots.pem\n", PASSED, 3, "roots.pem: No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_check_says_what_would_keep_it_from_starting(tmp_path: Path, case: str) -> None:
    gate, policy, code, said = REFUSED[case]
    write(tmp_path, gate, "gate.yaml")
    write(tmp_path, policy, "policy.yaml")

    done = start(tmp_path, "--config", "gate.yaml", "--check")

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert all(line.startswith("outgate: ") for line in done.stderr.splitlines())


def test_a_misspelt_variable_is_warned_of(tmp_path: Path) -> None:
    write(tmp_path, PASSED, "policy.yaml")

    done = start(tmp_path, "--check", "-p", "policy.yaml", OUTGATE_WORKLAOD="app")

    assert done.returncode == 0
    assert done.stderr == 'outgate: OUTGATE_WORKLAOD is not read; did you mean "OUTGATE_WORKLOAD"?\n'


def test_the_schema_of_gate_yaml_is_printed() -> None:
    result = invoke("schema", "--gate")

    assert result.exit_code == 0
    assert '"proxyListen"' in result.stdout
    assert '"proxyListen"' not in invoke("schema").stdout
