"""`outgate relay` as a process of its own, for tests of the program."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from proxy.record import Peer
from tests.end_to_end.service import WAIT_S, eventually
from tests.proxy.ntp_servers import Script, Told, query, right, time_server, told

POLICY = """\
version: 1
workloads:
  app:
    match: {address: [127.0.0.1/32, "::1/128"]}
    rules:
      - {name: clock, ntp: time.example}
"""
_CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OUTGATE_")}


class RelayProcess:
    """Up while the context is open. `said` is what it tells whoever started it."""

    def __init__(self, directory: Path, *options: str, policy: str = POLICY, env: dict[str, str] | None = None) -> None:
        self.policy = directory / "policy.yaml"
        self.policy.write_text(policy)
        self.log = directory / "decisions.jsonl"
        self.said: list[str] = []
        command = [
            sys.executable, "-m", "proxy", "relay", "-p", str(self.policy), "--listen", "127.0.0.1:0",
            "--admin", "127.0.0.1:0", "--log", str(self.log), *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_CLEAN | (env or {}))
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

        self.manager: socket.socket | None = None  # where it speaks to its service manager

    def __enter__(self) -> Self:
        try:
            self.port = int(self.hears(r"giving time on .*:(\d+)")[1])
            self.admin = f"127.0.0.1:{self.hears(r'answering .* on .*:(\d+)')[1]}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        self._listening.join(WAIT_S)
        assert self.process.stderr
        self.process.stderr.close()

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))

    def hears(self, pattern: str) -> re.Match[str]:
        """The first line that matches, once it is said."""
        return eventually(
            lambda: next(filter(None, (re.search(pattern, line) for line in tuple(self.said))), None),
            f"{pattern} in {self.said}",
        )

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self) -> int:
        return self.process.wait(WAIT_S)

    def ask(self, *, source: str = "127.0.0.1") -> Told | None:
        """What a client is told; None: nothing within a moment."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.3)
            sock.bind((source, 0))
            sock.connect(("127.0.0.1", self.port))
            sock.send(query())
            try:
                return told(sock.recv(1024))
            except TimeoutError:
                return None

    def records(self, **fields: object) -> list[dict[str, Any]]:
        """Those with these fields."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [record for record in map(json.loads, lines) if fields.items() <= record.items()]


@contextmanager
def time_server_thread(script: Script = right) -> Iterator[Peer]:
    """A scripted server that answers while the test itself waits for a process."""
    loop = asyncio.new_event_loop()
    address: list[Peer] = []
    up, down = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with time_server(script) as server:
            address.append(server.address)
            up.set()
            await down.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert up.wait(WAIT_S)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join(WAIT_S)
        loop.close()
