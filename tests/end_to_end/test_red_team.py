"""An attacker inside who knows the gate's own files, runs as their owner, and has the whole run to change them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy import own_code
from tests.end_to_end.world import CHECKOUT, Ran, World

pytestmark = pytest.mark.kernel

PACKAGES = ("proxy", "addons", "pki", "policies")
POLICY = """
version: 1
workloads:
  app:
    rules:
      - {host: web.example, ports: 80}
"""
ATTACK = r"""
import os, socket, sys
code, log, roots = sys.argv[1:]

def attempt(name, change):
    try:
        change()
    except OSError as error:
        print(f"{name}: {error.strerror}")
    else:
        print(f"{name}: done")

def append(path):
    with open(path, "a") as file:
        file.write("\nopen(%r, 'w').close()\n" % (log + ".owned"))

def swap(path):
    os.rename(path, path + ".old")
    os.rename(path + ".old", path)

attempt("edit the inspector", lambda: append(code + "/proxy/inspector/main.py"))
attempt("add a module", lambda: append(code + "/sitecustomize.py"))
attempt("swap a package", lambda: swap(code + "/proxy"))
attempt("swap the code", lambda: swap(code))
attempt("swap what is above it", lambda: swap(os.path.dirname(code)))
python = os.path.realpath(sys.executable)
attempt("rename the interpreter", lambda: os.rename(python, python))  # to itself: it is the real one
attempt("forge the log", lambda: append(log))
attempt("cut the log", lambda: os.truncate(log, 0))
attempt("swap the log", lambda: swap(log))
attempt("trust another root", lambda: append(roots))
with socket.create_connection(("93.184.216.34", 80), 20) as sock:  # the inspector starts on first need: now
    sock.sendall(b"GET / HTTP/1.1\r\nHost: web.example\r\nConnection: close\r\n\r\n")
    answer = b"".join(iter(lambda: sock.recv(4096), b""))  # to its end: who leaves early is recorded as gone
    print("answer:", answer[9:12].decode())
"""


@dataclass(frozen=True, slots=True)
class Attacked:
    ran: Ran
    said: dict[str, str]
    log: Path


@pytest.fixture(scope="module")
def attacked(world: World) -> Attacked:
    """The attack on a copy of the gate, so that a success harms nobody."""
    code = world.directory / "above" / "code"
    for package in PACKAGES:
        shutil.copytree(CHECKOUT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    script = world.file("attack.py", ATTACK)
    log = world.directory / "decisions-attacked.jsonl"
    ran = world.run(
        [sys.executable, str(script), str(code), str(log), str(world.upstream_ca)],
        policy=POLICY,
        options=["--log", str(log)],
        before=["env", f"PYTHONPATH={code}"],
    )
    said = dict(line.split(": ") for line in ran.stdout.decode().splitlines())
    return Attacked(ran, said, log)


@pytest.mark.parametrize(
    "attempt",
    [
        "edit the inspector",
        "add a module",
        "swap a package",
        "swap the code",
        "swap what is above it",
        "rename the interpreter",
        "forge the log",
        "cut the log",
        "swap the log",
        "trust another root",
    ],
)
def test_what_the_gate_is_made_of_cannot_be_changed_from_inside(attacked: Attacked, attempt: str) -> None:
    assert attacked.said[attempt] in ("Read-only file system", "Device or resource busy"), attacked.ran


def test_the_gate_goes_on_with_its_own_code(attacked: Attacked) -> None:
    assert attacked.said["answer"] == "200", attacked.ran
    assert not attacked.log.with_name(attacked.log.name + ".owned").exists()
    assert [json.loads(line)["reason"] for line in attacked.log.read_text().splitlines()] == ["rule"]


def test_a_process_of_ours_imports_nothing_that_its_surroundings_offer(tmp_path: Path) -> None:
    for module in ("sitecustomize", "click", "policies"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('owned')")
    surroundings = {"PYTHONPATH": f":{tmp_path}", "PYTHONHOME": str(tmp_path), "PYTHONSTARTUP": "sitecustomize.py"}
    command = own_code.command("proxy", "version")
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "outgate" in done.stdout
