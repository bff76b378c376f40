"""A real chronyd: as a server that does not touch the clock, and as a client that says by how much it is wrong."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.service import WAIT_S

needs_chronyd = pytest.mark.skipif(shutil.which("chronyd") is None, reason="chronyd is not installed")

type Inside = Callable[[Sequence[str]], list[str]]


@contextmanager
def server(directory: Path, port: int = 0, *lines: str, inside: Inside = list) -> Iterator[int]:
    """chronyd on every address, answering from this machine's clock as stratum 2. Gives its port."""
    port = port or _unused()
    directory.mkdir(exist_ok=True)
    config = directory / "chrony.conf"
    config.write_text(
        "\n".join(
            [f"port {port}", "local stratum 2", "allow all", "cmdport 0", "bindcmdaddress /",
             f"pidfile {directory}/chronyd.pid", *lines, ""]
        )
    )  # fmt: skip
    user = pwd.getpwuid(os.getuid()).pw_name
    command = ["chronyd", "-d", "-x", "-U", "-u", user, "-f", str(config)]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(inside(command), stdout=log, stderr=log)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(WAIT_S)


def measured_s(server: str, port: int = 123, *, inside: Inside = list) -> float:
    """By how much this machine's clock is wrong, as `server` says it: `chronyd -Q`, which sets nothing."""
    source = f"server {server} port {port} iburst maxsamples 4"
    ended = subprocess.run(
        inside(["chronyd", "-Q", "-t", "15", "-U", "-u", pwd.getpwuid(os.getuid()).pw_name, source]),
        capture_output=True,
        text=True,
        timeout=3 * WAIT_S,
        check=False,
    )
    found = re.search(r"System clock wrong by (-?[0-9.]+) seconds", ended.stdout + ended.stderr)
    assert found, ended.stdout + ended.stderr
    return float(found[1])


def _unused() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
