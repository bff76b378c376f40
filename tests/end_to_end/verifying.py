"""`outgate verify` on machines of a test's own, before an internet that answers everything."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.end_to_end.inside_origin import MARKER
from tests.end_to_end.namespaces import Namespaces
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.world import CHECKOUT, OUTGATE

PAGE = "docs/verify.md"
ANSWERING = ("1.1.1.1/32", "203.0.113.10/32", "2606:4700:4700::1111/128", "2001:db8:10::10/128")  # pings, too
SOCKETS = (
    "docker.sock", "containerd/containerd.sock", "podman/podman.sock", "crio/crio.sock", "dbus/system_bus_socket",
    "systemd/resolve/io.systemd.Resolve", "nscd/socket", "avahi-daemon/socket",
)  # fmt: skip
# In a mount namespace of its own: a /run with those services, and a resolver; then the command.
_FURNISH = """
import pathlib, socket, subprocess, sys
resolv, sockets, command = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
subprocess.run(["mount", "--bind", resolv, "/etc/resolv.conf"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
listening = []
for name in filter(None, sockets):
    path = pathlib.Path("/run") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    one = socket.socket(socket.AF_UNIX)
    one.bind(str(path))
    one.listen()
    listening.append(one)
sys.exit(subprocess.run(command).returncode)
"""


@dataclass(frozen=True, slots=True)
class Verified:
    """How one `outgate verify --json` ended."""

    status: int
    page: Mapping[str, Any]
    stderr: str

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        return {row["id"]: row for row in self.page["rows"]}

    @property
    def leaks(self) -> set[str]:
        return {id for id, row in self.rows.items() if row["status"] == "leak"}

    @property
    def outcomes(self) -> dict[str, str]:
        return {id: row["outcome"] for id, row in self.rows.items()}

    @property
    def on_the_page(self) -> dict[str, str]:
        """In the words of the page's list, which does not say how fast something is blocked."""
        return {id: outcome.partition(" ")[0] for id, outcome in self.outcomes.items()}


class Internet:
    """The machine `internet` behind the device `wire`, which answers whoever asks for anything."""

    def __init__(self, net: Namespaces, marker_from: str, manner: str = "honest") -> None:
        self._net, self._marker_from = net, marker_from
        net.address("internet", "lo", *ANSWERING)
        self._process = subprocess.Popen(
            net.inside("internet", [sys.executable, "-m", "tests.end_to_end.inside_internet", "wire", manner]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
        )  # fmt: skip
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

    def look(self) -> list[str]:
        """What came in since the last look."""
        with self._net.open_socket(self._marker_from, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", MARKER)
        assert self._process.stdin
        self._process.stdin.write("look\n")
        self._process.stdin.flush()
        found: list[str] = json.loads(self._line())
        return found


@contextmanager
def internet(net: Namespaces, *, marker_from: str, manner: str = "honest") -> Iterator[Internet]:
    made = Internet(net, marker_from, manner)
    try:
        yield made
    finally:
        made.close()


def settle(net: Namespaces, machine: str) -> None:
    """Until both families lead there: IPv6 takes its time after a link came up."""

    def is_answered(address: str) -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with net.open_socket(machine, family, socket.SOCK_STREAM) as sock:
            sock.settimeout(1)
            try:
                sock.connect((address, 80))
            except OSError:
                return False
            return True

    for address in ("1.1.1.1", "2606:4700:4700::1111"):
        eventually(partial(is_answered, address), f"{address} answers {machine}")


def verify(
    net: Namespaces,
    machine: str,
    directory: Path,
    options: Sequence[str],
    *,
    sockets: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    become: Sequence[str] = (),
    resolver: str = "10.0.0.53",
) -> subprocess.CompletedProcess[str]:
    """`outgate verify OPTIONS` on a machine with this resolver; `become` goes before it."""
    resolv = directory / "verify-resolv.conf"
    resolv.write_text(f"nameserver {resolver}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OUTGATE_")}
    clean = {name: value for name, value in clean.items() if not name.lower().endswith("_proxy")}
    furnished = [
        "unshare", "--mount", sys.executable, "-c", _FURNISH, str(resolv), ",".join(sockets), *become,
        str(OUTGATE), "verify", *options,
    ]  # fmt: skip
    return subprocess.run(
        net.inside(machine, furnished), capture_output=True, text=True, timeout=90, cwd=directory,
        env=clean | dict(env or {}),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Documented:
    """A row of the page's list."""

    to: str
    sends: str
    inside_run: str
    behind_gateway: str


def documented() -> dict[str, Documented]:
    """The page's list."""
    text = (CHECKOUT / PAGE).read_text()
    found = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \| (.+) \| (\w+) \| (\w+) \|$", text, re.MULTILINE)
    return {id: Documented(*columns) for id, *columns in found}


def verified(net: Namespaces, machine: str, directory: Path, *options: str, **more: Any) -> Verified:
    done = verify(net, machine, directory, ["--json", *options], **more)
    assert done.stdout, done.stderr
    return Verified(done.returncode, json.loads(done.stdout), done.stderr)
