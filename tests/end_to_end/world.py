"""The world that a gate under test sees: an internet in namespaces of its own, and `outgate` started inside it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
OUTGATE = Path(sys.prefix) / "bin" / "outgate"
TIMEOUT_S = 60.0

type Record = dict[str, Any]  # JSON


@dataclass(frozen=True, slots=True)
class Seen:
    """What reached the world: packets that open something, requests, and questions to its nameserver."""

    packets: list[str]
    requests: list[dict[str, Any]]  # JSON of origin.Request
    asked: list[str]

    @property
    def connections(self) -> list[str]:
        """Everything but the questions to the configured nameserver."""
        return [packet for packet in self.packets if packet != "udp 127.0.0.1:53"]


@dataclass(frozen=True, slots=True)
class Ran:
    """How one `outgate` ended, its decision records, and what reached the world meanwhile."""

    status: int
    stdout: bytes
    stderr: str
    records: list[Record]
    seen: Seen
    log: str

    def record(self, **fields: object) -> Record:
        """The one record with these fields (`_` for `.` in their names)."""
        wanted = {name.replace("__", "."): value for name, value in fields.items()}
        found = [record for record in self.records if wanted.items() <= record.items()]
        assert len(found) == 1, f"{len(found)} records with {wanted} in {self.records}"
        return found[0]


@dataclass(frozen=True, slots=True)
class Command:
    """One of several that run side by side in one sandbox."""

    argv: Sequence[str]
    stdin: bytes = b""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """How one of them ended."""

    status: int
    stdout: bytes
    stderr: str


class World:
    """One world, up while the context is open. `directory` holds its root certificate and what runs leave behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.upstream_ca = directory / "origin.pem"
        self._count = 0
        self._main = subprocess.Popen(
            [*_unshare(), sys.executable, "-m", "tests.end_to_end.inside_world", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )
        assert self._main.stdout
        self._pid = self._main.stdout.readline().strip()
        assert self._pid, "the world did not come up"

    def close(self) -> None:
        assert self._main.stdin
        assert self._main.stdout
        self._main.stdin.close()
        self._main.wait(20)
        self._main.stdout.close()

    def look(self) -> Seen:
        """What was seen since the last look."""
        assert self._main.stdin
        assert self._main.stdout
        self._main.stdin.write("look\n")
        self._main.stdin.flush()
        return Seen(**json.loads(self._main.stdout.readline()))

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in this world."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", self._pid, *user, "--net", "--mount", f"--wd={CHECKOUT}", "--", *command]

    def file(self, name: str, content: str | bytes) -> Path:
        """A file that inside programs can read too."""
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(
        self,
        command: Sequence[str],
        *,
        policy: str | Path,
        workload: str | None = "app",
        options: Sequence[str] = (),
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> Ran:
        """`outgate run … -- command` as a user types it; `before` goes before `outgate`."""
        self._count += 1
        path = self.file(f"policy-{self._count}.yaml", policy) if isinstance(policy, str) else policy
        log = self.file(f"decisions-{self._count}.jsonl", b"")
        log.chmod(0o666)
        named = [] if workload is None else ["-w", workload]
        self.look()
        done = subprocess.run(
            self.enter([
                *before, str(OUTGATE), "run", "-p", str(path), *named, "--upstream-ca", str(self.upstream_ca),
                "--log", str(log), *options, "--", *command,
            ]),
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            env=dict(os.environ) | dict(env or {}),
        )  # fmt: skip
        text = log.read_text()
        records = [json.loads(line) for line in text.splitlines()]
        return Ran(done.returncode, done.stdout, done.stderr.decode(), records, self.look(), text)

    def run_many(
        self,
        commands: Mapping[str, Command],
        *,
        policy: str | Path,
        **more: Any,  # Any: what `run` takes
    ) -> tuple[dict[str, Ended], Ran]:
        """Every command inside one `outgate run`, side by side."""
        orders = {
            name: {"argv": [*each.argv], "stdin": base64.b64encode(each.stdin).decode(), "env": dict(each.env)}
            for name, each in commands.items()
        }
        ran = self.run(
            [sys.executable, str(Path(__file__).with_name("inside_many.py"))],
            policy=policy,
            stdin=json.dumps(orders).encode(),
            **more,
        )
        assert ran.status == 0, ran.stderr
        ended = {
            name: Ended(
                each["status"],
                base64.b64decode(each["stdout"]),
                base64.b64decode(each["stderr"]).decode(errors="replace"),
            )
            for name, each in json.loads(ran.stdout).items()
        }
        return ended, ran


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount"]


@contextmanager
def a_world() -> Iterator[World]:
    """A world, or a skip that says why there is none."""
    if reason := why_no_world():
        pytest.skip(f"no namespaces of our own: {reason}")
    # not pytest's own directory, which other users may not enter
    with tempfile.TemporaryDirectory(prefix="outgate-world-") as name:
        Path(name).chmod(0o755)
        made = World(Path(name))
        try:
            yield made
        finally:
            made.close()


@cache
def why_no_world() -> str | None:
    """Why these tests cannot run here; None: they can."""
    if sys.platform != "linux":
        return "namespaces exist on Linux only"
    for program in ("unshare", "nsenter", "ip"):
        if not shutil.which(program):
            return f"{program} is not installed"
    tried = subprocess.run([*_unshare(), "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    return tried.stderr.strip() or None if tried.returncode else None
