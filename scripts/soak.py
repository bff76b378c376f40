"""Many connections through a service for a while: does its memory stay flat, is every attempt recorded, is all closed?

    python -m scripts.soak [CONNECTIONS] [--workers N]

Everything is in a network namespace of its own: origins, a nameserver that knows every name, the clients, the gate; nft
leads the clients to it, or they ask it as a proxy. 1,000 connections idle throughout; the others last an exchange each.
Beside them a slower stream is inspected, each connection under a name that was never seen before, so that leaves and
lookups are forgotten again. The policy is reloaded all the while. Root, or a user that may make namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import trustme

from proxy.record import show_peer
from scripts.soak_ends import (
    ANSWER,
    ASKED,
    ORIGINS,
    PATIENCE_S,
    PROXY,
    SOURCES,
    Browser,
    Load,
    Tally,
    answer_all,
    answer_tls,
    browse,
    connect,
)
from tests.proxy.hellos import hello

OUTGATE = Path(sys.prefix) / "bin" / "outgate"  # of the environment that runs this
FORK = get_context("fork")
GATE, ADMIN = ("127.0.0.1", 15001), ("127.0.0.1", 9901)
REDIRECT = f"""
table inet soak {{
  chain output {{
    type nat hook output priority -100
    ip daddr {ASKED}.0/24 meta l4proto tcp redirect to :{GATE[1]}
  }}
}}
"""
POLICY = """
version: 1
workloads:
  app:
    rules:
      - host: "*.cdn.example"
      - {{host: "*.api.example", ports: [8443], tls: inspect, allow: ["GET /search/**"]}}
      - {{host: generation{generation}.example}}
"""
SETTINGS = {
    "net.ipv4.tcp_tw_reuse": 1,  # the ports of one host run out otherwise: it is all the hosts
    "net.netfilter.nf_conntrack_tcp_timeout_time_wait": 5,
}
IDLE, IDLE_INSPECTED = 950, 25  # of the latter in each HTTP version
WARM_UP = 400
ASKED_S = 1.0  # how often a worker tells what it counted
REPORT_S = 10.0
RELOAD_S = 15.0
# So much may a process have grown in the second half: a few bytes a connection are no leak. An inspector's memory of
# names still fills up then, in steps; a connection that is not let go takes 50 times as much.
FLAT_KIB = {"supervisor": 1024, "worker": 1024, "inspector": 16 * 1024}
SPARE_PIPES = 2 * 64  # descriptors that a worker keeps in reserve (proxy.relays.stream)
NOTHING = (
    "outgate_connections_open",
    "outgate_connections_inspected",
    "outgate_log_records_lost_total",
    "outgate_worker_restarts_total",
)


# --- the gate ---


@dataclass(slots=True)
class Sample:
    """What a process had, when so many connections were done."""

    done: int
    rss_kib: int
    pss_kib: int
    fds: int

    def __str__(self) -> str:
        return f"{self.rss_kib / 1024:.1f}/{self.pss_kib / 1024:.1f} {self.fds}"


@dataclass(slots=True)
class Part:
    """One process of the gate."""

    name: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    def look(self, done: int) -> None:
        proc = Path("/proc", str(self.pid))
        sizes = dict(line.split()[:2] for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
        self.samples.append(Sample(done, int(sizes["Rss:"]), int(sizes["Pss:"]), count_fds(self.pid)))

    @property
    def is_fitted(self) -> bool:
        """It was looked at often enough for the following."""
        return len(self._second_half()) > 2

    @property
    def slope(self) -> float:
        """KiB for each 1,000 connections, fitted over the second half."""
        if not self.is_fitted:
            return 0.0
        half = self._second_half()
        return 1000 * statistics.linear_regression([one.done for one in half], [one.rss_kib for one in half]).slope

    @property
    def growth_kib(self) -> float:
        """By the fit, over the second half."""
        half = self._second_half()
        return self.slope * (half[-1].done - half[0].done) / 1000

    def _second_half(self) -> list[Sample]:
        return [one for one in self.samples if one.done >= self.samples[-1].done / 2]


class Service:
    """`outgate serve` with some workers."""

    def __init__(self, directory: Path, workers: int, upstream_ca: Path) -> None:
        self._policy = directory / "policy.yaml"
        self._generation = 0
        self._write_policy()
        subprocess.run([str(OUTGATE), "pki", "init", "--pki", str(directory / "pki")], check=True, capture_output=True)
        self.trust = directory / "trust.pem"
        self.trust.write_bytes(b"".join(path.read_bytes() for path in (directory / "pki").rglob("*.crt")))
        config = directory / "gate.yaml"
        config.write_text(
            json.dumps(
                {
                    "policy": str(self._policy),
                    "workload": "app",
                    "pki": str(directory / "pki"),
                    "listen": show_peer(GATE),
                    "proxyListen": show_peer(PROXY),
                    "admin": show_peer(ADMIN),
                    "nameservers": "127.0.0.1",
                    "upstreamCa": str(upstream_ca),
                    "workers": workers,
                    "log": "/dev/null",
                    "limits": {"idleS": 86400},
                }
            )
        )
        self.process = subprocess.Popen([str(OUTGATE), "serve", "--config", str(config)])
        self._workers = workers
        self._wait_until_ready()
        self.parts = self._find_parts()

    def reload(self) -> None:
        self._generation += 1
        self._write_policy()
        self.process.send_signal(signal.SIGHUP)

    def metrics(self) -> dict[str, float]:
        with self._admin("/metrics") as page:
            lines = [line for line in page.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def decisions(self) -> int:
        return int(sum(value for name, value in self.metrics().items() if name.startswith("outgate_decisions_total")))

    def close(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def _admin(self, page: str) -> HTTPResponse:
        connection = HTTPConnection(*ADMIN, timeout=PATIENCE_S)
        connection.request("GET", page)
        return connection.getresponse()

    def _write_policy(self) -> None:
        self._policy.write_text(POLICY.format(generation=self._generation % 2))

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(OSError):
                if self._admin("/readyz").status == HTTPStatus.OK:
                    return
            time.sleep(0.1)
        raise SystemExit("the gate did not become ready")

    def _find_parts(self) -> list[Part]:
        parts = [Part("supervisor", self.process.pid)]
        end = time.monotonic() + PATIENCE_S
        while len(parts) < 1 + 2 * self._workers:
            if time.monotonic() > end:
                raise SystemExit(f"there are only {[part.name for part in parts]}")
            time.sleep(0.2)
            workers = children(self.process.pid, "proxy.worker.main")
            inner = [pid for worker in workers for pid in children(worker, "proxy.inspector.main")]
            parts[1:] = [Part(f"worker {n}", pid) for n, pid in enumerate(workers, 1)]
            parts += [Part(f"inspector {n}", pid) for n, pid in enumerate(inner, 1)]
        return parts


def children(pid: int, module: str) -> list[int]:
    """Those that run this module."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if module.encode() in Path(f"/proc/{child}/cmdline").read_bytes()]


# --- the run ---


class Soak:
    """Prints what it sees; `complaints` is what is wrong."""

    def __init__(self, service: Service, tally: Tally) -> None:
        self.complaints: list[str] = []
        self._service = service
        self._tally = tally
        self._load = Load()
        self._browser = Browser(str(service.trust))
        self._begun = self._told_at = self._reloaded_at = time.monotonic()
        self._told_done = 0
        self._reloads = 0

    def warm_up(self) -> None:
        """Some of everything, so that every part is there. What it has when that is over is what it has at rest."""
        Load().run(WARM_UP, lambda: None)
        for number in range(WARM_UP // 10):
            with self._browser.open(number, "w") as sock:
                self._browser.ask(sock, [("/search", 200)])
        self._expect_nothing_open()
        time.sleep(2 * ASKED_S)  # what was counted has been told
        self._recorded = self._service.decisions()
        for part in self._service.parts:
            part.look(0)
        self._begun = self._told_at = time.monotonic()

    def run(self, total: int, end_browsing: Callable[[], None]) -> None:
        idle = [*self._open_idle()]
        self._load.run(total, self._now_and_then)
        end_browsing()
        self._tell()
        self._end_idle(idle)
        self._compare()

    def _open_idle(self) -> Iterator[socket.socket]:
        for number in range(IDLE):
            sock = connect(number)
            sock.sendall(hello(f"n{number % 50}.cdn.example"))
            yield sock
        for number in range(IDLE_INSPECTED):
            yield self._browser.open(2 * number, "idle")  # in HTTP/1.1
            yield self._browser.open(2 * number + 1, "idle")

    def _end_idle(self, idle: list[socket.socket]) -> None:
        """They were there all the time, and still are."""
        for sock in idle:
            with sock:
                try:
                    if isinstance(sock, ssl.SSLSocket):
                        self._browser.ask(sock, [("/search", 200)])
                        continue
                    heard = 0
                    sock.sendall(b"still there?")
                    while heard < 2 * len(ANSWER):  # to the hello, and to this
                        data = sock.recv(65536)
                        if not data:
                            raise OSError("closed")
                        heard += len(data)
                except OSError as error:
                    self.complaints.append(f"an idle connection was lost: {error}")

    @property
    def _done(self) -> int:
        return self._load.done.total() + self._tally.connections.value

    def _now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._reloaded_at > RELOAD_S:
            self._reloaded_at = now
            self._service.reload()
            self._reloads += 1
        if now - self._told_at > REPORT_S:
            self._tell()

    def _tell(self) -> None:
        for part in self._service.parts:
            part.look(self._done)
        now, done = time.monotonic(), self._done
        rate = (done - self._told_done) / (now - self._told_at)
        self._told_at, self._told_done = now, done
        print(
            f"{now - self._begun:5.0f} s {done:8d} connections, {self._tally.connections.value} inspected, "
            f"{self._reloads} reloads, {rate:5.0f}/s;  RSS/PSS in MiB, descriptors: "
            + ", ".join(f"{part.name} {part.samples[-1]}" for part in self._service.parts),
            flush=True,
        )

    def _compare(self) -> None:
        """What it has now with what it had before anybody came."""
        attempts = self._load.done.total() + self._tally.requests.value + IDLE + 2 * IDLE_INSPECTED
        if failed := self._load.failed.total() + self._tally.failed.value:
            self.complaints.append(f"{failed} connections did not end as they should: {self._load.errors}")
        else:
            self._expect("decision records", lambda: self._service.decisions() - self._recorded, attempts, attempts)
        self._expect_nothing_open()
        for part in self._service.parts:
            before, after = part.samples[0], part.samples[-1]
            spare = SPARE_PIPES if part.name.startswith("worker") else 0
            self._expect(f"descriptors of {part.name}", partial(count_fds, part.pid), 0, before.fds + spare)
            slope = f"{part.slope:+.2f} KiB" if part.is_fitted else "too short a run to say how many KiB"
            print(f"{part.name}: at rest {before}, at the end {after}; {slope} each 1,000 connections")
            if part.growth_kib > FLAT_KIB[part.name.partition(" ")[0]]:
                self.complaints.append(
                    f"the memory of {part.name} grew by {part.growth_kib:.0f} KiB in the second half"
                )
        print(f"{self._load.done}, {self._tally.requests.value} requests inspected, {attempts} attempts")

    def _expect_nothing_open(self) -> None:
        for name in NOTHING:
            self._expect(name, lambda name=name: int(self._service.metrics()[name]), 0, 0)  # type: ignore[misc]

    def _expect(self, what: str, ask: Callable[[], int], least: int, most: int) -> None:
        """What is counted is told once a second, and what ends may linger."""
        end = time.monotonic() + PATIENCE_S
        while not least <= (got := ask()) <= most:
            if time.monotonic() > end:
                self.complaints.append(f"{what}: {got} where {least} to {most} were expected")
                return
            time.sleep(0.5)


def count_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def prepare() -> None:
    """The namespace that this process is in: one loopback device that is every host."""
    commands = ["ip link set lo up", f"ip address add {SOURCES}.0/32 dev lo"]
    commands += [f"ip route add local {net}.0/24 dev lo" for net in (ASKED, ORIGINS, SOURCES)]
    commands += [f"sysctl -qw {name}={value}" for name, value in SETTINGS.items()]
    subprocess.run(["nft", "-f", "-"], input=REDIRECT, text=True, check=True)  # first: it brings what sysctl sets
    for command in commands:
        subprocess.run(command.split(), check=True)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start(stack: ExitStack, target: Callable[..., None], *arguments: object) -> Connection:
    """A process that is ready when this returns, and gone when `stack` ends."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    stack.callback(process.kill)
    wait_for(ours, target.__name__)
    return ours


def wait_for(pipe: Connection, what: str) -> None:
    if not pipe.poll(PATIENCE_S):
        raise SystemExit(f"{what}: nothing is heard")
    pipe.recv()


def soak(total: int, workers: int) -> list[str]:
    """Returns what was wrong."""
    prepare()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-soak-")))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(directory / "origin.pem"))
        certificate = directory / "api.pem"
        authority.issue_cert("*.api.example").private_key_and_cert_chain_pem.write_to_path(str(certificate))
        start(stack, answer_all)
        start(stack, answer_tls, str(certificate))
        service = Service(directory, workers, directory / "origin.pem")
        stack.callback(service.process.kill)
        tally = Tally(*(FORK.Value("q", start) for start in (0, 0, 0, 1)))
        run = Soak(service, tally)
        run.warm_up()
        browsing = start(stack, browse, str(service.trust), tally)

        def end_browsing() -> None:
            tally.goes_on.value = 0
            wait_for(browsing, "browse")

        run.run(total, end_browsing)
        if status := service.close():
            run.complaints.append(f"the gate ended with status {status}")
        return run.complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("connections", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        again = [sys.executable, "-m", "scripts.soak", "--inside", *sys.argv[1:]]
        return subprocess.run(["unshare", *user, "--net", *again]).returncode
    complaints = soak(arguments.connections, arguments.workers)
    print("\n".join(complaints) or "nothing is left open, and memory is flat")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
