"""Which programs of this machine trust an authority: it offers them a leaf on the loopback, starts each, and reads what
it says. What it knows of each program is `clients`'s."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from threading import Thread

from pki.authority import AuthorityError, Issuing
from pki.clients import Client, Target
from pki.constraints import covers, permitted_domains
from pki.leaves import Leaves

AT_ONCE = 3  # programs; some take a second of a core to start
CONNECTIONS = 16
MAX_HELD = 256  # connections, of those that wait too
MAX_HEAD = 8192  # bytes
VERSION_TIMEOUT_S = 10
MAX_SAID = 1 << 18  # bytes kept of what a program prints
MAX_SENTENCE = 140
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\ntrusted"
NO_REPOSITORY = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
CONNECTED = b"HTTP/1.1 200 Connected\r\n\r\n"

# Words in the language that we read, no questions asked, nobody else contacted, no module taken from where we stand.
QUIET = {
    "LC_ALL": "C.UTF-8",
    "LANGUAGE": "C",
    "NO_COLOR": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "DENO_NO_UPDATE_CHECK": "1",
    "PYTHONSAFEPATH": "1",
}

_VERSION = re.compile(r"\d+(?:\.\d+)+")
_REFUSAL = re.compile(
    r"verify error|(?:certificate )?verif\w* failed|failed to verify|not trusted|PKIX|UnknownIssuer|unknown authority"
    r"|certificate problem|peer certificate|ISSUER_CERT|SELF_SIGNED",
    re.IGNORECASE,
)
_ERROR = re.compile(r"error|fail|fatal|unable|cannot|could not|refused", re.IGNORECASE)
_ABOUT_TRUST = re.compile(r"certificat|PKIX|x509|_CERT\b|issuer|CAfile|trustAnchors|trust store", re.IGNORECASE)
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?")
_NOISE = re.compile(r"(?:NOTE: )?Picked up |- (?:subject|Certificate)")  # the JVM repeats options that say `trust`


class Trust(StrEnum):
    """What became of a program."""

    YES = "yes"
    NO = "no"
    UNVERIFIED = "does not verify"  # it accepts us, and anybody else
    UNCLEAR = "unclear"  # it failed over something else


@dataclass(frozen=True, slots=True)
class Found:
    """A client program of this machine."""

    client: Client
    program: str
    version: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a program trusts us. `said` are its own words where it does not, on one line."""

    found: Found
    trust: Trust
    said: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """What a program printed and how it ended: `code` is None where it had to be ended."""

    said: str
    code: int | None


# The server


@contextmanager
def offering(issuers: Sequence[Issuing]) -> Iterator[Target]:
    """A server with a fresh leaf of `issuers`, as what to fetch. Raises AuthorityError where they issue none now."""
    host = _host(issuers)
    with answering(Leaves(issuers, lambda: datetime.now(UTC)).context(host)) as port:
        yield Target(f"https://{host}:{port}/", via=None if host == "localhost" else port)


@contextmanager
def answering(context: ssl.SSLContext) -> Iterator[int]:
    """The port of a server on the loopback that answers every request with `trusted`, but git's with 404.

    To CONNECT it is a proxy that leads any name to itself: so a leaf can be offered for a name that leads elsewhere.
    """
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))]
        port: int = listeners[0].getsockname()[1]
        try:  # `localhost` may be either; left free, somebody else could answer there
            listeners.append(stack.enter_context(socket.create_server(("::1", port), family=socket.AF_INET6)))
        except OSError:  # no IPv6 on this machine, or the port is taken
            pass
        connections = stack.enter_context(ThreadPoolExecutor(CONNECTIONS))
        held: set[socket.socket] = set()
        stack.callback(_hang_up, connections, held)
        for listener in listeners:
            thread = Thread(target=_accept, args=(listener, context, connections, held))
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes accept()
        yield port


def _host(issuers: Sequence[Issuing]) -> str:
    """`localhost`, or a name that their constraints permit."""
    domains = [domain for issuer in issuers for domain in permitted_domains(issuer.certificate) or ()]
    for host in ("localhost", *(f"outgate{domain}" if domain.startswith(".") else domain for domain in domains)):
        if all(covers(issuer.certificate, host) for issuer in issuers):
            return host
    raise AuthorityError("the constraints of the issuing CA permit no name that programs could be offered")


def _accept(
    listener: socket.socket, context: ssl.SSLContext, connections: ThreadPoolExecutor, held: set[socket.socket]
) -> None:
    while True:
        try:
            connection, _ = listener.accept()
            if len(held) >= MAX_HELD:
                connection.close()
                continue
            also = connection.dup()
        except OSError:
            return
        held.add(also)
        connections.submit(_answer, connection, context).add_done_callback(partial(_let_go, also, held))


def _let_go(also: socket.socket, held: set[socket.socket], _: object) -> None:
    held.discard(also)
    also.close()


def _hang_up(connections: ThreadPoolExecutor, held: set[socket.socket]) -> None:
    """On who is still there: every user of this machine may connect, say nothing and stay."""
    connections.shutdown(wait=False, cancel_futures=True)
    for also in list(held):
        with suppress(OSError):  # it has gone meanwhile
            also.shutdown(socket.SHUT_RDWR)


def _answer(connection: socket.socket, context: ssl.SSLContext) -> None:
    with connection:
        connection.settimeout(20)
        try:
            if connection.recv(1, socket.MSG_PEEK) == b"C":  # no TLS record starts like CONNECT
                _read_head(connection)
                connection.sendall(CONNECTED)
            with context.wrap_socket(connection, server_side=True) as stream:
                if request := stream.recv(65536):
                    # To any other answer git says nothing at all.
                    stream.sendall(NO_REPOSITORY if b"/info/refs" in request else ANSWER)
                    stream.unwrap()
        except OSError:  # the client does not trust us, or hung up: what counts is what it says
            pass


def _read_head(connection: socket.socket) -> None:
    """Up to the blank line and no further: the hello comes next. Raises OSError for one without end."""
    head = bytearray()
    while not head.endswith(b"\r\n\r\n") and (byte := connection.recv(1)):
        head += byte
        if len(head) > MAX_HEAD:
            raise OSError("a head without end")


# The programs


def find(clients: Sequence[Client], variables: Mapping[str, str]) -> list[Found]:
    """Those of `clients` that are on the PATH of `variables` and can be used, in their order."""
    candidates = [(client, program) for client in clients for program in _programs(client, variables)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = pool.map(lambda one: run([one[1], *one[0].version], _quiet(variables), VERSION_TIMEOUT_S), candidates)
        found: dict[tuple[str, str], Found] = {}
        for (client, program), done in zip(candidates, runs, strict=True):
            if done.code:  # the stub of a version manager, a runtime without the module
                continue
            said = "\n".join(line for line in done.said.splitlines() if not _NOISE.match(line))
            version = _VERSION.search(said)
            key = (client.name, said if client.every else program)
            found.setdefault(key, Found(client, program, version.group() if version else "?"))
    return list(found.values())


def examine(
    found: Sequence[Found],
    target: Target,
    impostor: Target,
    variables: Mapping[str, str],
    timeout_s: float | None = None,
) -> list[Finding]:
    """Whether each program trusts `target` when started with `variables`.

    impostor   nobody is to trust it: who does, does not verify
    timeout_s  for each program, instead of its own
    """

    def judge(one: Found) -> Finding:
        done = fetch(one, target, variables, timeout_s)
        if one.client.answered.search(done.said):
            other = fetch(one, impostor, variables, timeout_s)
            return Finding(one, Trust.UNVERIFIED if one.client.answered.search(other.said) else Trust.YES)
        said = sentence(done.said, target.url)
        if done.code is None:
            return Finding(one, Trust.UNCLEAR, f"no answer in {timeout_s or one.client.timeout_s:g} s; {said}")
        return Finding(one, Trust.NO if _ABOUT_TRUST.search(said) else Trust.UNCLEAR, said)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(judge, found))


def fetch(found: Found, target: Target, variables: Mapping[str, str], timeout_s: float | None = None) -> Run:
    """Starts a program with `variables`, to fetch `target`. Proxies that they name are left out on the loopback."""
    given = _quiet(variables)
    if target.is_here:
        given = {name: value for name, value in given.items() if not name.lower().endswith("_proxy")}
        if target.via is None:  # a proxy may stand in its settings
            given |= dict.fromkeys(("no_proxy", "NO_PROXY"), target.host)
        else:
            via = f"http://127.0.0.1:{target.via}"
            given |= dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), via)
    command = [found.program, *found.client.arguments(target)]
    return run(command, given, timeout_s or found.client.timeout_s)


def run(command: Sequence[str], variables: Mapping[str, str], timeout_s: float) -> Run:
    """Runs a program to its end, or ends it and all that it started."""
    deadline = time.monotonic() + timeout_s
    try:
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Run(f"{command[0]}: {error.strerror}", code=126)
    said, has_ended = bytearray(), False
    assert process.stdout is not None
    with process.stdout as output:
        try:
            for chunk in _chunks(output.fileno(), deadline):
                said += chunk[: MAX_SAID - len(said)]
            has_ended = _has_ended(process.pid, deadline)
        finally:  # also what it left behind; it is not waited for, so its number is nobody else's yet
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    return Run(said.decode(errors="replace"), code if has_ended else None)


def sentence(said: str, url: str = "") -> str:
    """The line that tells most, without what would move a cursor, cut to what fits beside a name."""
    cleaned = (_printable(line).replace(f"refused {url} ", "") for line in said.splitlines())
    lines = [line for line in cleaned if line and not _NOISE.match(line)]
    for telling in (_REFUSAL, _ERROR):
        for line in lines:
            if found := telling.search(line):
                return _cut(line if len(line) <= MAX_SENTENCE else line[found.start() :])
    return _cut(lines[-1]) if lines else "it said nothing"


def _cut(line: str) -> str:
    return line if len(line) <= MAX_SENTENCE else f"{line[: MAX_SENTENCE - 1]}…"


def _printable(line: str) -> str:
    plain = _ESCAPE.sub("", line)
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())


def _chunks(descriptor: int, deadline: float) -> Iterator[bytes]:
    """What can be read until the end of file or the deadline."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
        if not (chunk := os.read(descriptor, 65536)):
            return
        yield chunk


def _has_ended(pid: int, deadline: float) -> bool:
    """Whether the process has ended by then. It is not waited for."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)  # its output has ended, and so it has as good as always
    return True


def _quiet(variables: Mapping[str, str]) -> dict[str, str]:
    return {**variables, **QUIET}


def _programs(client: Client, variables: Mapping[str, str]) -> list[str]:
    path = variables.get("PATH", os.defpath)
    if not client.every:
        first = shutil.which(client.program, path=path)
        return [first] if first else []
    found: dict[str, str] = {}  # by directory, for /bin may be /usr/bin
    for directory in path.split(os.pathsep):
        if directory and (program := shutil.which(client.program, path=directory)):
            found.setdefault(os.path.realpath(directory), program)
    return list(found.values())
