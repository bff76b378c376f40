"""The relay between real chronyds: behind it a server, before it a client, and a gateway that leads packets to it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from proxy.wire.ntp import build_query
from tests.end_to_end.chrony import measured_s, needs_chronyd, server
from tests.end_to_end.documented import section
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.world import CHECKOUT, OUTGATE
from tests.proxy.ntp_servers import query, told
from tests.proxy.relaying import RelayProcess
from tests.sandbox_user import as_user

NEAR_S = 0.005  # others load the machine; tests/bench/test_ntp.py measures
UNIT = CHECKOUT / "docs" / "examples" / "outgate-relay.service"

pytestmark = pytest.mark.client


@needs_chronyd
def test_a_real_client_gets_the_time_of_a_real_server(tmp_path: Path) -> None:
    policy = """
version: 1
workloads:
  app:
    rules: [{ntp: one.example}, {ntp: two.example}, {ntp: three.example}]
"""
    with ExitStack() as stack:
        ports = [stack.enter_context(server(tmp_path / str(number))) for number in range(3)]
        hosts = [f"{name}.example=127.0.0.1:{port}" for name, port in zip(("one", "two", "three"), ports, strict=True)]
        options = [word for host in hosts for word in ("--host", host)]
        relay = stack.enter_context(RelayProcess(tmp_path, "-w", "app", *options, policy=policy))
        relay.hears("outgate: synchronised, policy")
        assert abs(measured_s("127.0.0.1", relay.port)) < NEAR_S
        assert relay.records(verdict="allow", workload="app")


# --- on a gateway, and in a pod

CLIENT4, CLIENT6, GATE4, GATE6 = "10.77.1.2", "fd77:1::2", "10.77.1.1", "fd77:1::1"
OUT4, OUT6, SERVER4, SERVER6 = "93.184.216.1", "2606:2800:220:1::1", "93.184.216.34", "2606:2800:220:1::34"
ASKED4, ASKED6 = "203.0.113.7", "2001:db8:77::7"  # nobody has these


MISSING = [name for name in ("ip", "nft", "chronyd") if shutil.which(name) is None]
NO_ROOT = "named network namespaces need root" if os.geteuid() else ""
needs_machines = pytest.mark.skipif(bool(NO_ROOT or MISSING), reason=NO_ROOT or f"not installed: {MISSING}")
POLICY = f"""
version: 1
workloads:
  app:
    match: {{address: [{CLIENT4}/32, "{CLIENT6}/128"]}}
    rules: [{{ntp: time.example}}]
"""
ETH_P_ALL = 3


class Recorder:
    """Every UDP payload on a device, with the addresses of its packet, as anybody outside could see them."""

    def __init__(self, net: Namespaces, machine: str) -> None:
        self._sock = net.open_socket(machine, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self._sock.settimeout(0.1)
        self._is_over = threading.Event()
        self.packets: list[bytes] = []
        self._thread = threading.Thread(target=self._record)
        self._thread.start()

    def _record(self) -> None:
        while not self._is_over.is_set():
            try:
                self.packets.append(self._sock.recv(65536))
            except TimeoutError:
                continue

    def close(self) -> None:
        self._is_over.set()
        self._thread.join(WAIT_S)
        self._sock.close()

    def queries(self) -> list[bytes]:
        """What was sent to port 123."""
        found = []
        for packet in self.packets:
            is_ipv4 = packet[0] >> 4 == 4
            protocol, start = (packet[9], (packet[0] & 15) * 4) if is_ipv4 else (packet[6], 40)
            if protocol == socket.IPPROTO_UDP and packet[start + 2 : start + 4] == (123).to_bytes(2):
                found.append(packet[start + 8 :])
        return found


@contextmanager
def running(net: Namespaces, machine: str, tmp_path: Path, *options: str, uid: int | None = None) -> Iterator[None]:
    """A relay on that machine, once it is synchronised."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{SERVER4} time.example\n{SERVER6} time.example\n")
    command = [str(OUTGATE), "relay", "-p", str(tmp_path / "policy.yaml"), "--admin", "none", *options]
    line = net.inside(machine, command if uid is None else as_user(command, uid), hosts=hosts)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said: list[str] = []

    def listen() -> None:
        assert process.stderr
        said.extend(line for line in process.stderr)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        eventually(lambda: any("synchronised, policy" in line for line in tuple(said)), f"synchronised: {said}")
        yield
    finally:
        process.kill()
        process.wait(WAIT_S)
        thread.join(WAIT_S)
        assert process.stderr
        process.stderr.close()


def rules_of(heading: str) -> list[str]:
    """The nft tables that docs/ntp.md prints there."""
    return re.findall(r"```nft\n(.*?)```", section("docs/ntp.md", heading), re.DOTALL)


def ask_from(net: Namespaces, machine: str, server_: str, message: bytes) -> bytes | None:
    """What comes back from that address; None: nothing within a moment."""
    family = socket.AF_INET6 if ":" in server_ else socket.AF_INET
    with net.open_socket(machine, family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.connect((server_, 123))
        sock.send(message)
        try:
            return sock.recv(1024)
        except TimeoutError:
            return None


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Namespaces, Recorder]]:
    """client — gate — net: a relay on the gate by the rules of the manual, a chronyd and a recorder in the net."""
    tmp_path = tmp_path_factory.mktemp("gateway")
    (tmp_path / "policy.yaml").write_text(POLICY)
    with ExitStack() as stack:
        net = stack.enter_context(machines("client", "gate", "net"))
        net.link("client", "eth0", "gate", "br0")
        net.link("gate", "up0", "net", "eth0")
        net.address("client", "eth0", f"{CLIENT4}/24", f"{CLIENT6}/64")
        net.address("gate", "br0", f"{GATE4}/24", f"{GATE6}/64")
        net.address("gate", "up0", f"{OUT4}/24", f"{OUT6}/64")
        net.address("net", "eth0", f"{SERVER4}/24", f"{SERVER6}/64")
        net.default("client", GATE4, GATE6)
        net.default("net", OUT4, OUT6)
        net.forward("gate")
        net.rules("gate", rules_of("Leading packets to it")[0])
        stack.enter_context(server(tmp_path / "chrony", 123, inside=lambda command: net.inside("net", command)))
        recorder = Recorder(net, "net")
        stack.callback(recorder.close)
        stack.enter_context(running(net, "gate", tmp_path))
        yield net, recorder


@pytest.mark.kernel
@needs_machines
@pytest.mark.parametrize("asked", [ASKED4, ASKED6, SERVER4, GATE4], ids=["nobody", "nobody v6", "server", "gate"])
def test_a_gateway_answers_for_whatever_address_is_asked(gateway: tuple[Namespaces, Recorder], asked: str) -> None:
    net, _ = gateway
    got = eventually(lambda: ask_from(net, "client", asked, query()), "an answer")
    assert (told(got).leap, told(got).reference_id) == (0, b"GATE")


@pytest.mark.kernel
@needs_machines
def test_a_real_client_behind_a_gateway_gets_the_time(gateway: tuple[Namespaces, Recorder]) -> None:
    net, _ = gateway
    assert abs(measured_s(ASKED4, inside=lambda command: net.inside("client", command))) < NEAR_S


@pytest.mark.kernel
@needs_machines
def test_nothing_of_a_covert_client_is_on_the_wire(gateway: tuple[Namespaces, Recorder]) -> None:
    """It writes into every field, asks the outside server itself, and asks often: outside nobody sees any of it."""
    net, recorder = gateway
    before = len(recorder.queries())
    family = socket.AF_INET
    with net.open_socket("client", family, socket.SOCK_DGRAM) as sock:
        for number in range(300):
            message = query(cookie=b"LEAKED" + number.to_bytes(2))
            sock.sendto(message if number % 3 else b"\x26" + message[1:] + b"LEAKED", (SERVER4, 123))
    with net.open_socket("client", socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.sendto(query(cookie=b"LEAKED66"), (SERVER6, 123))
    assert eventually(lambda: ask_from(net, "client", ASKED6, query()), "an answer")  # it has dealt with all of them
    assert len(recorder.queries()) - before <= 1  # its own schedule may fall into this moment
    assert recorder.queries()
    assert {packet[:40] for packet in recorder.queries()} == {build_query(0)[:40]}
    seen = b"".join(recorder.packets)
    for secret in (b"LEAKED", b"SECRET", socket.inet_pton(family, CLIENT4), socket.inet_pton(socket.AF_INET6, CLIENT6)):
        assert secret not in seen


@pytest.mark.kernel
@needs_machines
def test_a_sidecar_answers_for_whatever_address_is_asked() -> None:
    with ExitStack() as stack:
        tmp_path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-ntp-")))
        tmp_path.chmod(0o755)  # another user reads it
        (tmp_path / "policy.yaml").write_text("version: 1\nworkloads: {app: {rules: [{ntp: time.example}]}}\n")
        net = stack.enter_context(machines("pod", "net"))
        net.link("pod", "eth0", "net", "eth0")
        net.address("pod", "eth0", f"{OUT4}/24", f"{OUT6}/64")
        net.address("net", "eth0", f"{SERVER4}/24", f"{SERVER6}/64")
        net.default("pod", SERVER4, SERVER6)
        net.rules("pod", rules_of("Leading packets to it")[1])
        stack.enter_context(server(tmp_path / "chrony", 123, inside=lambda command: net.inside("net", command)))
        listen = ("--listen", "127.0.0.1:10123", "--listen", "[::1]:10123", "-w", "app")
        stack.enter_context(running(net, "pod", tmp_path, *listen, uid=1337))
        for asked in (ASKED4, ASKED6, SERVER4):
            got = eventually(partial(ask_from, net, "pod", asked, query()), f"an answer of {asked}")
            assert told(got).reference_id == b"GATE"


# --- the unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_every_line_of_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/outgate/bin/outgate", "/bin/true")  # it looks whether that is there
    (tmp_path / UNIT.name).write_text(text)
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, [line for line in ended.stderr.splitlines() if UNIT.name in line]) == (0, [])
