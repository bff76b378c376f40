"""`outgate serve` on a machine of the test's own: what tests behind real rules share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.end_to_end.inside_origin import MARKER
from tests.end_to_end.namespaces import Namespaces
from tests.end_to_end.service import WAIT_S, Service
from tests.end_to_end.world import CHECKOUT, OUTGATE

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OUTGATE_")}


class Placed(Service):
    """A gate by any command line. `directory` has policy and log; relative paths begin there."""

    def __init__(self, directory: Path, command: Sequence[str], *, env: dict[str, str] | None = None) -> None:
        self.policy = directory / "policy.yaml"
        self.log = directory / "decisions.jsonl"
        self.said: list[str] = []
        self._seen: set[int] = set()
        self.process = subprocess.Popen(
            command, cwd=directory, stderr=subprocess.PIPE, text=True, env=CLEAN | (env or {})
        )
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def __enter__(self) -> Self:
        try:
            self.hears(r"serving")
        except BaseException:
            self.__exit__()
            raise
        return self


@dataclass(frozen=True, slots=True)
class Seen:
    """What reached an origin: packets that open something or belong to nothing, and requests."""

    packets: list[str]
    requests: list[dict[str, Any]]  # JSON of origin.Request


class Origin:
    """The servers of `origin` on the machine `origin`, and the wire to it as `wire`."""

    def __init__(self, net: Namespaces, directory: Path, marker_from: str) -> None:
        self._net, self._marker_from = net, marker_from
        self._process = subprocess.Popen(
            net.inside("origin", [sys.executable, "-m", "tests.end_to_end.inside_origin", str(directory), "wire"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )
        assert self._line() == "ready\n"

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()
        self._process.kill()
        self._process.wait(WAIT_S)

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    def look(self) -> Seen:
        """What came in since the last look."""
        with self._net.open_socket(self._marker_from, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", MARKER)
        assert self._process.stdin
        self._process.stdin.write("look\n")
        self._process.stdin.flush()
        return Seen(**json.loads(self._line()))


@contextmanager
def origin(net: Namespaces, directory: Path, *, marker_from: str) -> Iterator[Origin]:
    made = Origin(net, directory, marker_from)
    try:
        yield made
    finally:
        made.close()


def make_authority(directory: Path) -> Path:
    """`pki` as the commands make it, and a file of its root and the origin's, which clients trust."""
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", "pki"], cwd=directory, check=True, capture_output=True)
    trust = directory / "trust.pem"
    [root] = (directory / "pki" / "roots").glob("*/ca.crt")
    trust.write_bytes(root.read_bytes() + (directory / "origin.pem").read_bytes())
    return trust
