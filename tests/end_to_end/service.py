"""`outgate serve` as a process of its own, and a client of it that speaks CONNECT: what tests of the service share."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.end_to_end.world import OUTGATE

WAIT_S = 20.0  # generous: others load the machine
_CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OUTGATE_")}

type Address = tuple[str, int]


def eventually[T](look: Callable[[], T | None], what: str) -> T:
    """What `look` gives once it is true."""
    end = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < end, f"did not happen: {what}"
        time.sleep(0.02)
    return found


class Service:
    """A gate in proxy mode on loopback, up while the context is open. `said` is what it tells whoever started it."""

    def __init__(self, directory: Path, policy: str | Path, *options: str, workload: str | None = "app") -> None:
        self.policy = policy if isinstance(policy, Path) else directory / "policy.yaml"
        if isinstance(policy, str):
            self.policy.write_text(policy)
        self.log = directory / "decisions.jsonl"
        self.said: list[str] = []
        self._seen: set[int] = set()
        command = [
            str(OUTGATE), "serve", "--mode", "proxy", "--proxy-listen", "127.0.0.1:0", "--admin", "127.0.0.1:0",
            "-p", str(self.policy), "--log", str(self.log), *options,
        ]  # fmt: skip
        command += ["-w", workload] if workload else []
        self.process = subprocess.Popen(command, cwd=directory, stderr=subprocess.PIPE, text=True, env=_CLEAN)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def __enter__(self) -> Self:
        try:
            self.address = self._address(r"serving proxy clients on (.*):(\d+)")
            self.admin = self._address(r"answering .* on (.*):(\d+)")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """However a test ends, nothing of it stays."""
        self.processes()
        self.process.kill()
        self.process.wait(WAIT_S)
        for pid in self._seen:
            signal_to(pid, signal.SIGKILL)
        self._listening.join(WAIT_S)
        assert self.process.stderr
        self.process.stderr.close()

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))

    def _address(self, pattern: str) -> Address:
        found = self.hears(pattern)
        return found[1], int(found[2])

    # --- the process ---

    def hears(self, pattern: str) -> re.Match[str]:
        """The first line that matches, once it is said."""

        def look() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in tuple(self.said))), None)

        def look_while_it_lives() -> re.Match[str] | None:
            assert self.process.poll() is None or look(), f"ended: {self.said}"
            return look()

        return eventually(look_while_it_lives, f"{pattern} in {self.said}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(WAIT_S)

    def workers(self) -> list[int]:
        """In the order in which they were started."""
        return sorted(children(self.process.pid, "proxy.worker.main"))

    def processes(self) -> list[int]:
        """Of this service, but for the first."""
        workers = children(self.process.pid)
        found = [*workers, *(child for worker in workers for child in children(worker))]
        self._seen.update(found)
        return found

    # --- the admin port ---

    def ask(self, path: str) -> tuple[int, str]:
        return self._fetch(urllib.request.Request(self._url(path)))

    def reload(self, token: str) -> tuple[int, dict[str, Any]]:
        """POST /reload with the token."""
        headers = {"Authorization": f"Bearer {token}"}
        status, text = self._fetch(urllib.request.Request(self._url("/reload"), b"", headers, method="POST"))
        return status, json.loads(text)

    def ready(self) -> tuple[int, list[str], list[str]]:
        """Status, why not, notes."""
        status, text = self.ask("/readyz")
        page = json.loads(text)
        return status, page["because"], page["notes"]

    def metric(self, series: str) -> float:
        """The value of a series, as Prometheus writes it."""
        lines = self.ask("/metrics")[1].splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == series), 0.0)

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.admin[1]}{path}"

    def _fetch(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=WAIT_S) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    # --- the proxy ---

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, WAIT_S)

    def tunnel(self, target: str) -> socket.socket:
        """A connection through it to `NAME:PORT`."""
        sock = self.connect()
        status = ask_for(sock, target)
        assert status == 200, f"{status}: {self.said}"
        return sock

    def status(self, target: str) -> int:
        """How it answers a CONNECT."""
        with self.connect() as sock:
            return ask_for(sock, target)

    def records(self, **fields: object) -> list[dict[str, Any]]:
        """Those with these fields."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [record for record in map(json.loads, lines) if fields.items() <= record.items()]


def ask_for(sock: socket.socket, target: str) -> int:
    """CONNECT, and the status of the answer."""
    sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    return answered(sock)


def answered(sock: socket.socket) -> int:
    """The status of a reply of which only the head matters."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, f"ended after {head!r}"
        head += byte
    return int(head.split()[1])


def children(pid: int, module: str = "") -> list[int]:
    """Processes that `pid` started, of a module of ours."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in found if module in Path(f"/proc/{child}/cmdline").read_text()]
    except (FileNotFoundError, ProcessLookupError):  # gone meanwhile, before or after it was opened
        return []


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def signal_to(pid: int, number: signal.Signals) -> None:
    """Send it, if the process is still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
