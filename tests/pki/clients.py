"""A loopback TLS server with a leaf for whatever name is asked, and the programs that are to trust it."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread

import pytest

from pki.authority import Issuing
from pki.leaves import tls_leaves

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\ntrusted"
NO_REPOSITORY = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def serving(issuing: Issuing, host_without_sni: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server on 127.0.0.1 that answers `trusted` (and 404 to git) under a leaf for the SNI."""
    leaves = tls_leaves(issuing, lambda: datetime.now(UTC))
    first = leaves.context(host_without_sni)

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        connection.context = leaves.context(name or host_without_sni)

    first.sni_callback = choose
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = Thread(target=_accept, args=(listener, first))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            thread.join()


def _accept(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(20)
            try:
                with context.wrap_socket(connection, server_side=True) as stream:
                    if request := stream.recv(65536):
                        stream.sendall(NO_REPOSITORY if b"/info/refs" in request else ANSWER)
                        stream.unwrap()
            except OSError:  # the client does not trust us, or hung up: what it says is what is tested
                pass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client program did. `said` is all it printed."""

    trusted: bool
    said: str


def run(
    command: list[str], environment: Mapping[str, str], home: Path, *, trusted: Callable[[str], bool] | None = None
) -> Outcome:
    """Runs a client with `environment` alone. It trusts us if it prints the answer, or as `trusted` says."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, env=clean | dict(environment), cwd=home, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    said = (done.stdout + done.stderr).decode(errors="replace")
    is_trusted = trusted(said) if trusted else done.returncode == 0 and b"trusted" in done.stdout
    return Outcome(is_trusted, said)


def program(name: str) -> str:
    """The path of a client, or this test is skipped with the reason."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


PYTHON = sys.executable
