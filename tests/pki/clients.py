"""A loopback TLS server with a leaf for whatever name is asked, and the programs that are to trust it."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pki.authority import Issuing
from pki.clients import CLIENTS, Client, Target
from pki.doctor import Found, answering
from pki.leaves import Leaves

PYTHON = sys.executable
# The environment that the tests run in comes first; Deno and Bun come from npm into it.
SEARCHED = os.pathsep.join(
    [os.path.dirname(PYTHON), os.environ.get("PATH", os.defpath), f"{sys.prefix}/js/node_modules/.bin"]
)


@contextmanager
def serving(issuing: Issuing | Sequence[Issuing], host_without_sni: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server on 127.0.0.1 that answers `trusted` (and 404 to git) under a leaf for the SNI."""
    issuers = [issuing] if isinstance(issuing, Issuing) else issuing
    leaves = Leaves(issuers, lambda: datetime.now(UTC))
    first = leaves.context(host_without_sni)

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        connection.context = leaves.context(name or host_without_sni)

    first.sni_callback = choose
    with answering(first) as port:
        yield port


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client program did. `said` is all it printed."""

    trusted: bool
    said: str


def run(
    command: list[str], environment: Mapping[str, str], home: Path, *, trusted: Callable[[str], bool] | None = None
) -> Outcome:
    """Runs a client with `environment` alone. It trusts us if it prints the answer, or as `trusted` says."""
    done = subprocess.run(
        command,
        env=alone(home) | dict(environment),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    said = (done.stdout + done.stderr).decode(errors="replace")
    is_trusted = trusted(said) if trusted else done.returncode == 0 and b"trusted" in done.stdout
    return Outcome(is_trusted, said)


def alone(home: Path) -> dict[str, str]:
    """The variables of a program that was told nothing about trust."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8"}


def program(name: str) -> str:
    """The path of a client, or this test is skipped with the reason."""
    path = shutil.which(name, path=SEARCHED)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def client(name: str, ca: Path | None = None) -> Found:
    """One of our clients on this machine, or this test is skipped with the reason.

    Python's are those of the environment that the tests run in, at their strictest. gnutls-cli, which reads no
    variable, is given `ca` as an option.
    """
    one = next(one for one in CLIENTS if one.name == name)
    if one.every:
        return Found(_strict(one), PYTHON, "")
    if name == "gnutls-cli" and ca is not None:
        return Found(_given(one, ca), program("gnutls-cli"), "")
    return Found(one, program(one.program), "")


# Python 3.13 does this by itself.
STRICT = """
import ssl
lenient = ssl.create_default_context
def create_default_context(*given, **named):
    context = lenient(*given, **named)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context
ssl.create_default_context = ssl._create_default_https_context = create_default_context
"""


def _strict(one: Client) -> Client:
    def arguments(target: Target) -> tuple[str, ...]:
        option, script, *urls = one.arguments(target)
        return (option, STRICT + script, *urls)

    return replace(one, arguments=arguments)


def _given(one: Client, ca: Path) -> Client:
    return replace(one, arguments=lambda target: (f"--x509cafile={ca}", *one.arguments(target)))
