"""A gate is replaced while it is used: behind a haproxy that asks /readyz, nobody is refused and nothing is cut."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Self

import pytest
import trustme
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, ResponseReceived

from proxy.record import show_peer
from tests.end_to_end.service import WAIT_S, Address, Service, ask_for, eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy import gates, inspecting
from tests.proxy.dns_gate import question, told
from tests.proxy.nameserver import unused_port
from tests.proxy.relaying import RelayProcess, time_server_thread

HAPROXY = shutil.which("haproxy", path=os.pathsep.join((os.environ["PATH"], "/usr/sbin")))
DOOR, ADMIN = 3128, 9901
DRAIN_S = 3  # haproxy asks thirty times meanwhile
GATEWAY = ("--mode", "gateway", "--listen", "127.0.0.1:0")
BESIDE = (*GATEWAY, "--dns-listen", "127.0.0.1:0", "--udp-forward", "127.0.0.1:0=echo.test:7")
POLICY = """
version: 1
workloads:
  app:
    rules:
      - tcp: "echo.test:7"
      - udp: {host: echo.test, ports: 7}
      - {host: api.test, tls: inspect, allow: ["GET /search/**"]}
"""


@dataclass(frozen=True, slots=True)
class Site:
    """What stands around the gates: an echo over TCP, an HTTPS origin, an authority."""

    directory: Path
    echo: Address
    origin: inspecting.Origin
    trust: ssl.SSLContext

    def gate(self, name: str, *options: str) -> Service:
        (self.directory / name).mkdir()
        hosts = (f"echo.test=127.0.0.1:{self.echo[1]}", f"api.test=127.0.0.1:{self.origin.port}")
        return Service(
            self.directory / name, POLICY, "--pki", str(self.directory / "pki"), "--grace-s", "300",
            "--upstream-ca", str(self.directory / "origin.pem"), *(word for host in hosts for word in ("--host", host)),
            *options,
        )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "origin.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("api.test").configure_cert(context)
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", "pki"], cwd=tmp_path, check=True, capture_output=True)
    trust = ssl.create_default_context(cafile=str(next((tmp_path / "pki" / "roots").glob("*/ca.crt"))))
    origin = inspecting.Origin(context, lambda _head, _sock: inspecting.response())
    with gates.origin() as echo, udp_echo(echo.address):
        yield Site(tmp_path, echo.address, origin, trust)
    origin.close()


@contextmanager
def udp_echo(address: Address) -> Iterator[None]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(address)

        def serve() -> None:
            while (got := sock.recvfrom(2048))[0]:
                sock.sendto(*got)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"", address)
        thread.join(WAIT_S)


def tunnel(door: Address, target: str) -> socket.socket:
    sock = socket.create_connection(door, WAIT_S)
    assert ask_for(sock, target) == 200
    return sock


def says(sock: socket.socket, text: bytes) -> bool:
    """Whether it comes back."""
    sock.sendall(text)
    return gates.read_exactly(sock, len(text)) == text


def door_of(gate: Service, kind: str) -> Address:
    found = gate.hears(rf"serving {kind} on (.*):(\d+)")
    return found[1], int(found[2])


def datagrams_to(gate: Service, kind: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(WAIT_S)
    sock.connect(door_of(gate, kind))
    return sock


class Browser:
    """Requests on a kept connection, and on another one when it is told that no more are taken."""

    def __init__(self, door: Address, trust: ssl.SSLContext) -> None:
        self._door, self._trust = door, trust
        self._http: HTTPConnection | None = None
        self.closes = 0

    def get(self) -> int:
        if self._http is None:
            self._http = HTTPConnection("api.test")
            self._http.sock = self._trust.wrap_socket(tunnel(self._door, "api.test:443"), server_hostname="api.test")
        self._http.request("GET", "/search/a")
        reply = self._http.getresponse()
        reply.read()
        if reply.will_close:
            self.closes += 1
            self.close()
        return reply.status

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
        self._http = None


class Http2:
    """Requests on one connection of HTTP/2."""

    def __init__(self, gate: Service, site: Site) -> None:
        trust = ssl.create_default_context(cafile=str(next((site.directory / "pki" / "roots").glob("*/ca.crt"))))
        trust.set_alpn_protocols(["h2"])
        self._sock = trust.wrap_socket(gate.tunnel("api.test:443"), server_hostname="api.test")
        self._http = H2Connection(H2Configuration(client_side=True))
        self._http.initiate_connection()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def get(self) -> int:
        head = {":method": "GET", ":scheme": "https", ":authority": "api.test", ":path": "/search/a"}
        self._http.send_headers(self._http.get_next_available_stream_id(), list(head.items()), end_stream=True)
        return int(dict(self.reads_until(ResponseReceived).headers)[b":status"])

    def reads_until[T](self, kind: type[T]) -> T:
        while True:
            self._sock.sendall(self._http.data_to_send())
            for event in self._http.receive_data(self._sock.recv(65536)):
                if isinstance(event, kind):
                    return event


# --- behind a balancer ------------------------------------------------------------------------------------------------


class Balancer:
    """A real haproxy with a place for each gate that will be. It tries one server, once: what that refuses is lost."""

    def __init__(self, directory: Path, places: list[str]) -> None:
        assert HAPROXY
        self.door: Address = ("127.0.0.1", unused_port())
        servers = "\n".join(
            f"    server gate{number} {address}:{DOOR} check port {ADMIN}" for number, address in enumerate(places)
        )
        (directory / "haproxy.cfg").write_text(f"""
global
    maxconn 200
    stats socket {directory}/stats
defaults
    mode tcp
    retries 0
    timeout connect 20s
    timeout client 300s
    timeout server 300s
frontend door
    bind 127.0.0.1:{self.door[1]}
    default_backend gates
backend gates
    balance roundrobin
    option httpchk GET /readyz
    default-server inter 100ms fall 1 rise 1
{servers}
""")
        self._stats = directory / "stats"
        self._process = subprocess.Popen([HAPROXY, "-db", "-q", "-f", str(directory / "haproxy.cfg")], cwd=directory)

    def up(self) -> list[int]:
        """The gates that new connections are sent to."""
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self._stats))
            except OSError:  # it is starting
                return []
            sock.sendall(b"show stat\n")
            lines = b"".join(iter(lambda: sock.recv(65536), b"")).decode().splitlines()
        rows = [line.split(",") for line in lines if line.startswith("gates,gate")]
        return [number for number, row in enumerate(rows) if row[17] == "UP"]

    def sends_to(self, *gates: int) -> None:
        eventually(lambda: self.up() == sorted(gates), f"haproxy sends to {gates}, not {self.up()}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait(WAIT_S)


@dataclass(slots=True)
class Load:
    """Threads that repeat what they do until they are stopped, or until it fails."""

    stop: threading.Event = field(default_factory=threading.Event)
    failures: list[BaseException] = field(default_factory=list)
    done: list[int] = field(default_factory=list)  # how often each did it
    threads: list[threading.Thread] = field(default_factory=list)

    def add(self, once: Callable[[], None]) -> None:
        self.done.append(0)
        self.threads.append(threading.Thread(target=self._repeat, args=(len(self.done) - 1, once), daemon=True))
        self.threads[-1].start()

    def _repeat(self, number: int, once: Callable[[], None]) -> None:
        try:
            while not self.stop.wait(0.02):
                once()
                self.done[number] += 1
        except BaseException as error:  # told by the test
            self.failures.append(error)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(WAIT_S)


@contextmanager
def loaded(door: Address, trust: ssl.SSLContext) -> Iterator[tuple[Load, list[Browser]]]:
    """New connections all the time, kept ones with requests, and long ones on which something is said all the time."""
    load = Load()
    with ExitStack() as stack:

        def short() -> None:
            with tunnel(door, "echo.test:7") as sock:
                assert says(sock, b"short")

        def long(sock: socket.socket) -> Callable[[], None]:
            def once() -> None:
                assert says(sock, b"long" * 1000)

            return once

        def browse(browser: Browser) -> Callable[[], None]:
            def once() -> None:
                assert browser.get() == 200

            return once

        browsers = [Browser(door, trust) for _ in range(3)]
        for browser in browsers:
            stack.callback(browser.close)
            load.add(browse(browser))
        for _ in range(2):
            load.add(short)
        for _ in range(4):
            load.add(long(stack.enter_context(tunnel(door, "echo.test:7"))))
        stack.callback(load.end)
        yield load, browsers


def has_moved(load: Load) -> Callable[[], bool]:
    """Whether each did something since now."""
    before = list(load.done)
    return lambda: bool(load.failures) or all(now > then for then, now in zip(before, load.done, strict=True))


@pytest.mark.client
@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")
def test_two_rollouts_behind_haproxy_lose_no_connection_and_refuse_none(site: Site) -> None:
    # Addresses of this test alone: no connection of the load takes a port there.
    places = [f"127.{64 + os.getpid() // 256 % 64}.{os.getpid() % 256}.{number}" for number in range(1, 7)]
    balancer = Balancer(site.directory, places)
    with ExitStack() as stack:
        stack.callback(balancer.close)

        def start(number: int) -> Service:
            at = places[number]
            options = ("--proxy-listen", f"{at}:{DOOR}", "--admin", f"{at}:{ADMIN}")
            return stack.enter_context(site.gate(str(number), *options, "--drain-s", str(DRAIN_S)))

        old = [start(0), start(1)]
        balancer.sends_to(0, 1)
        ended: list[Service] = []
        with loaded(balancer.door, site.trust) as (load, browsers):
            for first in (2, 4):
                new = [start(first), start(first + 1)]
                balancer.sends_to(*range(first - 2, first + 2))
                for gate in old:  # one after the other, as a Deployment does
                    gate.send(signal.SIGTERM)
                    gate.hears("the doors close in")
                    eventually(partial(refuses, gate.address), "its doors are closed")
                    ended.append(gate)
                balancer.sends_to(first, first + 1)
                old = new
            eventually(has_moved(load), "everybody goes on")
            assert any(gate.process.poll() is None for gate in ended)  # they carry the long ones still
        assert load.failures == []
        assert sum(browser.closes for browser in browsers) > 0  # they were asked to go, and went
        assert [gate.ends() for gate in ended] == [0] * 4
        denied = {record["reason"] for gate in ended for record in gate.records(verdict="deny")}
        assert denied <= {"client_gone"}  # of who looked whether the doors were closed


def test_who_overstays_is_cut_at_the_deadline_and_not_before(site: Site) -> None:
    with site.gate("a", "--drain-s", "0.5", "--grace-s", "1") as gate, gate.tunnel("echo.test:7") as sock:
        assert says(sock, b"here")
        began = time.monotonic()
        gate.send(signal.SIGTERM)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert time.monotonic() - began >= 1.5
        assert gate.ends() == 0


# --- what a gate does while it stands down ----------------------------------------------------------------------------


def test_clients_of_the_other_http_host_are_asked_to_go_as_well(site: Site) -> None:
    with site.gate("a", "--http-host", "mitmproxy", "--drain-s", "600") as gate:
        with closing(Browser(gate.address, site.trust)) as browser, Http2(gate, site) as http2:
            assert browser.get() == http2.get() == 200
            assert browser.closes == 0
            gate.send(signal.SIGTERM)
            assert http2.reads_until(ConnectionTerminated).error_code == ErrorCodes.NO_ERROR
            eventually(lambda: browser.get() == 200 and browser.closes, "an answer says that no other follows")
        assert gate.records(verdict="deny") == []


def test_everything_is_served_until_the_doors_close(site: Site) -> None:
    with (
        site.gate("a", *BESIDE, "--workers", "2", "--drain-s", "600") as leaving,
        leaving.tunnel("echo.test:7") as before,
        datagrams_to(leaving, "datagrams to forward") as session,
        datagrams_to(leaving, "DNS") as dns,
        closing(Browser(leaving.address, site.trust)) as browser,
    ):
        assert says(session, b"first")
        assert [browser.get(), browser.get()] == [200, 200]
        assert browser.closes == 0
        leaving.send(signal.SIGTERM)
        leaving.hears("new connections are to go elsewhere; the doors close in 600 s")
        assert leaving.ready()[:2] == (503, ["the gate is ending"])
        eventually(lambda: browser.get() == 200 and browser.closes, "an answer says that no other follows")
        eventually(lambda: browser.get() == 200 and browser.closes > 1, "so does one on a connection made meanwhile")
        assert says(before, b"before")
        assert says(session, b"before")
        with leaving.tunnel("echo.test:7") as sock:
            assert says(sock, b"meanwhile")
        dns.send(question("echo.test"))
        assert told(dns.recv(1024)).rcode == 0

        leaving.send(signal.SIGTERM)
        assert leaving.ends() == 0
        with pytest.raises(OSError, match="reset"):
            before.recv(1)


@pytest.mark.parametrize("host", ["auto", "mitmproxy"])
def test_a_worker_that_replaces_another_stands_down_as_well(site: Site, host: str) -> None:
    """So does the process that it starts."""
    with site.gate("a", "--http-host", host, "--drain-s", "600") as gate:
        gate.send(signal.SIGTERM)
        gate.hears("the doors close in")
        [worker] = gate.workers()
        os.kill(worker, signal.SIGKILL)
        gate.hears("is started again in")
        with closing(Browser(gate.address, site.trust)) as browser:
            assert browser.get() == 200
            assert browser.closes == 1


def test_every_door_is_free_while_connections_finish(site: Site) -> None:
    """A successor takes them, also those for datagrams."""
    with site.gate("a", *BESIDE) as former:
        carried = former.tunnel("echo.test:7")
        dns, udp = (door_of(former, kind) for kind in ("DNS", "datagrams to forward"))
        former.send(signal.SIGTERM)
        eventually(lambda: refuses(former.address) and is_free(dns) and is_free(udp), "its doors are free")
        doors = (*GATEWAY, "--dns-listen", show_peer(dns), "--udp-forward", f"{show_peer(udp)}=echo.test:7")
        with site.gate("b", *doors) as successor, datagrams_to(successor, "DNS") as sock:
            sock.send(question("echo.test"))
            assert told(sock.recv(1024)).rcode == 0
            assert says(carried, b"by the former")
        carried.close()
        assert former.ends() == 0


def test_a_relay_gives_time_until_it_is_left(tmp_path: Path) -> None:
    with (
        time_server_thread() as server,
        RelayProcess(tmp_path, "--host", f"time.example={show_peer(server)}", "--drain-s", "600") as relay,
    ):
        relay.hears("synchronised, policy")
        eventually(relay.ask, "an answer")
        relay.send(signal.SIGTERM)
        relay.hears("the relay is ending")
        assert eventually(relay.ask, "an answer, not ready").stratum == 3
        relay.send(signal.SIGTERM)
        assert relay.ends() == 0


def is_free(address: Address) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(address)
        except OSError:
            return False
        return True


def refuses(address: Address) -> bool:
    try:
        socket.create_connection(address, WAIT_S).close()
    except ConnectionRefusedError:
        return True
    return False
