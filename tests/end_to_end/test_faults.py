"""`outgate serve` while something around it fails: nothing passes that the policy denies, and it says what is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
import trustme
from h2.config import H2Configuration
from h2.connection import H2Connection
from hyperframe.frame import Frame

from proxy.record import show_peer
from proxy.wire.client_hello import Alert, render_alert
from tests.end_to_end.service import WAIT_S, Address, Service, ask_for, eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy import gates
from tests.proxy.hellos import hello
from tests.proxy.inspecting import HOST, get, read_reply, response
from tests.proxy.speaking_http2 import CALM, CONFIGURATION, Client, Http2Origin
from tests.proxy.test_inspector_h2_attacks import FLOODS

HEAD = "version: 1\nworkloads:\n  app:\n    rules:\n"
ECHO = '      - tcp: "echo.test:7"\n'
CARRIED = '      - host: "*.carried.test"\n'
INSPECTED = "      - {host: api.test, tls: inspect}\n"


@pytest.fixture
def echo() -> Iterator[Address]:
    with gates.origin() as upstream:
        yield upstream.address


def leads_to(name: str, address: Address) -> list[str]:
    return ["--host", f"{name}=127.0.0.1:{address[1]}"]


def says(sock: socket.socket, text: bytes) -> bool:
    """Whether it comes back."""
    sock.sendall(text)
    return gates.read_exactly(sock, len(text)) == text


def limit(pid: int, what: int, soft: int) -> None:
    _, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (soft, hard))


# --- the start --------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def open_to_all(path: Path) -> None:
    path.chmod(0o644)


def make_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What became of a file of the authority, and what is said.
HARMED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no state": ("state.json", remove, r"state\.json: No such file .*; make an authority with 'outgate pki init"),
    "half a state": ("state.json", cut, r"state\.json: .*; restore it from a copy"),
    "no key": ("issuing/*/ca.key", remove, r"ca\.key: No such file or directory; restore it, or run as its owner"),
    "half a key": ("issuing/*/ca.key", cut, r"ca\.key: no PEM key, and no pkcs11: line"),
    "a key that all may read": ("issuing/*/ca.key", open_to_all, r"ca\.key: mode 0644 .*; run: chmod 600"),
    "a key that cannot be read": ("issuing/*/ca.key", make_a_directory, r"ca\.key: Is a directory; restore it, or"),
    "half a certificate": ("issuing/*/ca.crt", cut, r"ca\.crt: no PEM certificate; restore it from a copy"),
}


@pytest.mark.parametrize("case", HARMED)
def test_an_authority_that_cannot_be_used_stops_the_start(tmp_path: Path, case: str) -> None:
    pattern, harm, said = HARMED[case]
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", "pki"], cwd=tmp_path, check=True, capture_output=True)
    [path] = (tmp_path / "pki").glob(pattern)
    harm(path)
    (tmp_path / "policy.yaml").write_text(HEAD + INSPECTED)
    command = [
        str(OUTGATE), "serve", "--mode", "proxy", "--proxy-listen", "127.0.0.1:0", "--admin", "none",
        "-p", "policy.yaml", "-w", "app", "--pki", "pki",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(rf"outgate: \S*{said}[^\n]*\n", done.stderr), done.stderr


def test_an_authority_that_is_lost_later_stops_nothing_that_runs(tmp_path: Path, echo: Address) -> None:
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", "pki"], cwd=tmp_path, check=True, capture_output=True)
    with Service(tmp_path, HEAD + ECHO + INSPECTED, "--pki", "pki", *leads_to("echo.test", echo)) as it:
        remove(tmp_path / "pki" / "state.json")
        it.policy.write_text(HEAD + INSPECTED)
        it.hears("is in force")
        assert it.status("echo.test:7") == 403
        assert it.status("api.test:443") == 200


def test_an_admin_port_on_every_address_without_a_token_is_read_only(tmp_path: Path) -> None:
    with Service(tmp_path, HEAD + ECHO, "--admin", "0.0.0.0:0") as it:
        assert [it.ask(page)[0] for page in ("/healthz", "/readyz", "/metrics")] == [200] * 3
        admin = HTTPConnection("127.0.0.1", it.admin[1], timeout=WAIT_S)
        admin.request("POST", "/reload", headers={"Authorization": "Bearer guessed"})
        with admin.getresponse() as reply:
            assert reply.status == 403
            assert b"--admin-token FILE" in reply.read()
        assert 'outgate_reloads_total{result="unchanged"} 0.0' in it.ask("/metrics")[1]


# --- the resolver -----------------------------------------------------------------------------------------------------


@contextmanager
def mute() -> Iterator[int]:
    """The port of a nameserver that never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextmanager
def absent() -> Iterator[int]:
    """A port where there is none."""
    with mute() as port:
        pass
    yield port


@pytest.mark.parametrize("nameserver", [mute, absent])
def test_a_dead_resolver_denies_what_it_has_to_find_and_nothing_else(
    tmp_path: Path, echo: Address, nameserver: Callable[[], ExitStack]
) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(nameserver())
        options = ["--nameserver", f"127.0.0.1:{port}", "--resolve-s", "0.5", *leads_to("echo.test", echo)]
        it = stack.enter_context(Service(tmp_path, HEAD + CARRIED + ECHO, *options))
        with it.tunnel("a.carried.test:443") as sock:
            sock.sendall(hello("a.carried.test"))
            assert gates.read_all(sock) == render_alert(Alert.INTERNAL_ERROR)
        with it.tunnel("echo.test:7") as sock:  # which the operator gave an address
            assert says(sock, b"still served")
        [record] = eventually(lambda: it.records(verdict="deny"), "a record")
        assert record["reason"] == "resolver_failed"
        assert record["rule"].startswith(str(it.policy))
        eventually(lambda: it.metric('outgate_lookups_total{outcome="failed"}') == 1, "it is counted")
        assert it.ready() == (200, [], [])  # else a workload could turn the gate red by asking for such names


# --- workers ----------------------------------------------------------------------------------------------------------


class Crowd:
    """Clients that ask for what is allowed and for what is not, over and over, and count what came of it."""

    def __init__(self, service: Service, size: int) -> None:
        self.seen: Counter[str] = Counter()
        self._service = service
        self._is_over = False
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(size)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join(WAIT_S)

    def _ask(self, number: int) -> None:
        while not self._is_over:
            wanted = "echo.test:7" if number % 2 else "denied.test:7"
            try:
                with self._service.connect() as sock:
                    status = ask_for(sock, wanted)
                    self.seen[f"{wanted} {status}"] += 1
                    if status == 200:
                        self.seen["echoed"] += says(sock, b"text")
            except (OSError, AssertionError):
                self.seen["lost"] += 1


def test_workers_killed_under_load_let_nothing_pass_that_is_denied(tmp_path: Path, echo: Address) -> None:
    options = ["--workers", "2", *leads_to("echo.test", echo)]
    with Service(tmp_path, HEAD + ECHO, *options) as it, Crowd(it, 4) as crowd:
        for killed in (1, 2, 3):
            eventually(lambda: crowd.seen["echoed"] > 20 * killed, "some are served")  # noqa: B023 - asked at once
            os.kill(it.workers()[0], signal.SIGKILL)
            eventually(lambda: it.metric("outgate_worker_restarts_total") == killed, "it is missed")  # noqa: B023
            eventually(lambda: it.ready()[0] == 200, "another serves")
        served = crowd.seen["echoed"]
        eventually(lambda: crowd.seen["echoed"] > served + 20, "all is as before")
    assert crowd.seen["denied.test:7 403"] > 0
    assert crowd.seen.keys() <= {"denied.test:7 403", "echo.test:7 200", "echoed", "lost"}
    assert crowd.seen["lost"] <= 3 * 4  # each kill those under way, one of each client


# --- the log ----------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(service: Service) -> Iterator[None]:
    """No process of the service may make a file longer than the log is now."""
    length = service.log.stat().st_size
    workers = service.workers()
    for worker in workers:
        limit(worker, resource.RLIMIT_FSIZE, length + 1)  # of which one byte is still taken: a line is cut off
    yield
    for worker in workers:
        limit(worker, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)


def test_a_full_disk_denies_everything_where_nothing_may_pass_unrecorded(tmp_path: Path, echo: Address) -> None:
    options = ["--on-log-failure", "deny", *leads_to("echo.test", echo)]
    with Service(tmp_path, HEAD + ECHO, *options) as it, it.tunnel("echo.test:7") as before:
        assert says(before, b"before")
        assert it.status("denied.test:7") == 403
        eventually(it.records, "a record")
        with full_disk(it):
            assert it.status("denied.test:7") == 403  # its record is what fails
            it.hears("the decision log cannot be written: .*File too large")
            why = ["worker 1 cannot write the decision log, and denies everything"]
            eventually(lambda: it.ready()[:2] == (503, why), "readiness says so")
            assert it.status("echo.test:7") == 503
            assert says(before, b"was let through, and is recorded later")
            assert it.metric("outgate_log_failing") == 1
        it.hears("the decision log is written again")
        eventually(lambda: it.ready()[0] == 200, "ready again")
        with it.tunnel("echo.test:7") as after:
            assert says(after, b"after")
        eventually(lambda: len(it.records(reason="log_failed")) == 1, "what was denied meanwhile is recorded")
        assert len(it.records(reason="no_rule")) == 2  # the line that was cut off is there once, and whole


def test_a_full_disk_is_told_and_stops_nothing_where_the_gate_is_to_continue(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, "--workers", "2", *leads_to("echo.test", echo)) as it:
        assert it.status("denied.test:7") == 403
        eventually(it.records, "a record")
        with full_disk(it):
            for _ in range(20):
                assert it.status("denied.test:7") == 403
                with it.tunnel("echo.test:7") as sock:
                    assert says(sock, b"unrecorded for now")
            it.hears("the decision log cannot be written: .*File too large")
            eventually(lambda: it.metric("outgate_log_failing") >= 1, "it is counted")
            assert it.ready()[0] == 200
        eventually(lambda: it.metric("outgate_log_failing") == 0, "it is over")
        eventually(lambda: whole_records(it.log) == Counter(deny=21, allow=20), "what waited is written, once")


def whole_records(log: Path) -> Counter[str]:
    """Verdicts. What was cut off when the other worker had its turn stays as a line of its own, and is written anew."""
    found: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        with suppress(ValueError):
            found[json.loads(line)["verdict"]] += 1
    return found


# --- descriptors ------------------------------------------------------------------------------------------------------


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def no_descriptors(pid: int, spare: int = 0) -> Iterator[None]:
    """It can open so many more, and no other."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in range(1 << 20) if number not in used)
    for _ in range(spare):
        next(free)
    limit(pid, resource.RLIMIT_NOFILE, next(free))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def refused(service: Service) -> bool:
    try:
        with service.connect() as sock:
            return ask_for(sock, "echo.test:7") != 200
    except (ConnectionError, AssertionError):
        return True


def test_a_worker_without_descriptors_refuses_lives_and_recovers(tmp_path: Path, echo: Address) -> None:
    with Service(tmp_path, HEAD + ECHO, *leads_to("echo.test", echo)) as it, it.tunnel("echo.test:7") as open_before:
        [worker] = it.workers()
        assert says(open_before, b"before")
        with no_descriptors(worker):
            assert all(refused(it) for _ in range(20))
            assert says(open_before, b"meanwhile")
        with it.tunnel("echo.test:7") as sock:
            assert says(sock, b"after")
        assert it.workers() == [worker]
        assert it.metric("outgate_worker_restarts_total") == 0
        eventually(lambda: len(it.records(reason="too_many_connections")) == 20, "each is recorded")


@pytest.mark.parametrize("spare", [0, 3, 6])
def test_a_supervisor_without_descriptors_lives_and_recovers(tmp_path: Path, echo: Address, spare: int) -> None:
    """Whatever it is that it cannot open, of a reload's or of a worker's start."""
    with Service(tmp_path, HEAD + CARRIED, "--workers", "2", *leads_to("echo.test", echo)) as it:
        first, _ = it.workers()
        with no_descriptors(it.process.pid, spare):
            os.kill(first, signal.SIGKILL)
            it.hears("worker . was ended by SIGKILL")
            it.policy.write_text(HEAD + ECHO)
            it.hears("is not reloaded|is in force")
            eventually(lambda: has_started_another(it, first), "it tried to start another")
        it.send(signal.SIGHUP)
        it.hears("is in force")
        eventually(lambda: it.ready()[0] == 200, f"ready again: {it.said}")
        assert it.status("a.carried.test:443") == 403
        with it.tunnel("echo.test:7") as sock:
            assert says(sock, b"judged by the new policy")
        assert not any("Traceback" in line for line in it.said), it.said


def has_started_another(service: Service, than: int) -> bool:
    workers = service.workers()
    return (len(workers) == 2 and than not in workers) or any("did not start" in line for line in service.said)


def test_a_successor_takes_the_doors_while_the_former_lets_connections_finish(tmp_path: Path, echo: Address) -> None:
    """An upgrade: each with an admin address of its own, which the former keeps until its end."""
    (tmp_path / "next").mkdir()
    to_echo = leads_to("echo.test", echo)
    with Service(tmp_path, HEAD + ECHO, "--grace-s", "60", *to_echo) as former, ExitStack() as stack:
        carried = former.tunnel("echo.test:7")
        former.send(signal.SIGTERM)
        eventually(lambda: former.ready()[:2] == (503, ["the gate is ending"]), "it says so")
        eventually(lambda: refused(former), "its doors are closed")
        door = show_peer(former.address)
        stack.enter_context(Service(tmp_path / "next", HEAD + ECHO, "--proxy-listen", door, *to_echo))
        with former.tunnel("echo.test:7") as sock:
            assert says(sock, b"by the next one")
        assert says(carried, b"by the former")
        carried.close()
        assert former.ends() == 0


# --- HTTP/2 and heads -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Site:
    """A service that inspects HOST, whose origin speaks HTTP/2."""

    service: Service
    trust: ssl.SSLContext

    def connect(self, *alpn: str) -> ssl.SSLSocket:
        self.trust.set_alpn_protocols([*alpn])
        sock = self.trust.wrap_socket(self.service.tunnel(f"{HOST}:443"), server_hostname=HOST)
        assert sock.selected_alpn_protocol() in alpn
        return sock


class Http2(Client):
    """A client on a connection that is there already."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.sock = sock
        self.host = HOST
        self.h2 = H2Connection(H2Configuration(**CONFIGURATION))
        self.acknowledges = True
        self.responses = {}
        self.goaway = None
        self.is_closed = False
        self.events: list[object] = []
        self.begin()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for all attacks: what one leaves behind, the next would meet."""
    directory = tmp_path_factory.mktemp("site")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "origin.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(context)
    origin = Http2Origin(context, lambda _head, _sock: response())
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", "pki"], cwd=directory, check=True, capture_output=True)
    trust = b"".join(path.read_bytes() for path in (directory / "pki").rglob("*.crt"))
    options = ["--pki", "pki", "--upstream-ca", "origin.pem", *leads_to(HOST, ("127.0.0.1", origin.port))]
    with Service(directory, HEAD + f"      - {{host: {HOST}, tls: inspect, http2: true}}\n", *options) as it:
        yield Site(it, ssl.create_default_context(cadata=trust.decode()))
    origin.close()


def send_all(client: Client, frames: Iterator[Frame | bytes]) -> None:
    for frame in frames:
        client.raw(frame)


@pytest.mark.parametrize("flood", [flood for _, flood in FLOODS], ids=[name for name, _ in FLOODS])
def test_an_http2_flood_ends_its_own_connection_and_nobody_else_waits(
    site: Site, flood: Callable[[], Iterator[Frame | bytes]]
) -> None:
    processes = site.service.processes()
    with Http2(site.connect("h2")) as attacker, Http2(site.connect("h2")) as other:
        assert other.get().status == 200
        attacking = threading.Thread(target=send_all, args=(attacker, flood()))
        attacking.start()
        answered = 0
        while attacking.is_alive() or not answered:
            assert other.get().body == b"sunny"
            answered += 1
        attacking.join()
        attacker.read_to_goaway()
        assert attacker.goaway == CALM
        assert other.get().status == 200
        port = attacker.sock.getsockname()[1]
        eventually(lambda: site.service.records(reason="http2_flood", **{"source.port": port}), "it is recorded")
    assert site.service.processes() == processes


def test_a_head_beyond_64_kib_is_431_in_http1(site: Site) -> None:
    with site.connect("http/1.1") as sock:
        sock.sendall(get("/", host=HOST, fields=f"X-Large: {'a' * 65_536}\r\n"))
        reply, _ = read_reply(sock)
        assert (reply.status, reply.reason) == (431, "malformed_request")


def test_a_head_beyond_64_kib_is_431_in_http2_and_the_connection_goes_on(site: Site) -> None:
    with Http2(site.connect("h2")) as client:
        assert client.get(fields=[("x-large", "a" * 65_536)]).status == 431
        assert client.get().status == 200
