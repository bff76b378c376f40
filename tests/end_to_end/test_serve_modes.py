"""`outgate serve` behind the rules that docs/service.md has one load: what workloads try, and what leaves.

A gateway with two containers on its bridge; then a pod, where the gate runs beside the workload.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.clients import CURL
from tests.end_to_end.documented import GATEWAY, SERVICE, SIDECAR, command
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import Origin, Placed, Seen, make_authority, origin
from tests.end_to_end.service import eventually, is_gone
from tests.end_to_end.world import OUTGATE
from tests.sandbox_user import ORDINARY_UID, as_user

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "curl")
    ),
]

PORT = 15001
GATE_UID = 1337
ORIGIN4, ORIGIN6 = "93.184.216.34", "2606:2800:220:1::34"
ASKED4, ASKED6 = "203.0.113.7", "2001:db8:77::7"  # where clients believe the names to be: nobody has these
ONE4, ONE6, TWO4, TWO6 = "10.77.1.2", "fd77:1::2", "10.77.1.3", "fd77:1::3"
BRIDGE4, BRIDGE6, OUTSIDE4, OUTSIDE6 = "10.77.1.1", "fd77:1::1", "10.77.2.1", "fd77:2::1"
OK, ALERT, CLOSED, TIMED_OUT = {0}, {35}, {7, 56}, {28}  # curl's exit statuses; 7: closed before it had sent
RULES = """
    rules:
      - {host: api.example, ports: [80, 443], tls: inspect, allow: ["GET /search/**"]}
      - host: four.cdn.example
      - host: six.cdn.example
"""
POLICY = f"""
version: 1
workloads:
  one:
    match: {{address: [{ONE4}/32, "{ONE6}/128"]}}{RULES}
  two:
    match: {{address: [{TWO4}/32, "{TWO6}/128"]}}
    rules: [{{host: six.cdn.example}}]
"""
HOSTS = [
    word
    for name, address in (("api", ORIGIN4), ("four.cdn", ORIGIN4), ("six.cdn", f"[{ORIGIN6}]"))
    for word in ("--host", f"{name}.example={address}")
]


def towards(url: str, *addresses: str) -> list[str]:
    """curl for a URL whose name the client believes to be at these addresses."""
    scheme, _, rest = url.partition("://")
    name, port = rest.partition("/")[0], 443 if scheme == "https" else 80
    return ["--resolve", f"{name}:{port}:{','.join(addresses)}", url]


class Lab:
    """Machines, rules and an origin; a gate is started by each test that needs one."""

    def __init__(self, net: Namespaces, directory: Path, router: str, stack: ExitStack) -> None:
        net.link(router, "out", "origin", "wire")
        net.address(router, "out", f"{OUTSIDE4}/24", f"{OUTSIDE6}/64")
        net.address("origin", "wire", "10.77.2.2/24", "fd77:2::2/64")
        net.address("origin", "lo", f"{ORIGIN4}/32", f"{ORIGIN6}/128")
        net.default("origin", OUTSIDE4, OUTSIDE6)
        net.default(router, "10.77.2.2", "fd77:2::2")
        self.net = net
        self.directory = directory
        self.origin: Origin = stack.enter_context(origin(net, directory, marker_from=router))
        self.trust = make_authority(directory)

    def meets(
        self, machine: str, arguments: list[str], exits: set[int], status: str, *, uid: int | None = None
    ) -> None:
        """curl ends with one of these exit statuses, and with this HTTP status."""
        line = [*CURL, "--cacert", str(self.trust), "-o", "/dev/null", "-w", "%{http_code}", *arguments]
        line = line if uid is None else as_user(line, uid)
        done = subprocess.run(self.net.inside(machine, line), capture_output=True, text=True, timeout=60)
        assert done.stdout == status, done.stderr
        assert done.returncode in exits, done.stderr


def apply(lab: Lab, machine: str, line: str, *more: str) -> None:
    """A line of the page that loads rules, typed on that machine."""
    words = line.split()
    assert words[:3] == ["outgate", "firewall", "apply"]
    subprocess.run(lab.net.inside(machine, [str(OUTGATE), *words[1:], *more]), check=True, capture_output=True)


GATEWAY_RULES = command(SERVICE, GATEWAY, "outgate firewall", "eth0").replace("eth0", "out")
GATEWAY_RULES_WITH_NAMES = command(SERVICE, GATEWAY, "outgate firewall", "10.0.0.53").replace("eth0", "out")
POD_RULES = command(SERVICE, SIDECAR, "outgate firewall", "eth0")
POD_RULES_WITH_NAMES = command(SERVICE, SIDECAR, "outgate firewall", "10.96.0.10")
POD_RULES_WITH_ANSWERS = command(SERVICE, SIDECAR, "outgate firewall", "--inbound")


# --- a gateway --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway() -> Iterator[Lab]:
    """Two containers on br0, a router that would forward and masquerade what they send, and an origin."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-modes-")))
        net = stack.enter_context(machines("one", "two", "gateway", "origin"))
        net.ip("gateway", "link", "add", "br0", "type", "bridge")
        net.ip("gateway", "link", "set", "br0", "up")
        net.address("gateway", "br0", f"{BRIDGE4}/24", f"{BRIDGE6}/64")
        for machine, four, six in (("one", ONE4, ONE6), ("two", TWO4, TWO6)):
            net.link("gateway", machine, machine, "eth0")
            net.ip("gateway", "link", "set", machine, "master", "br0")
            net.address(machine, "eth0", f"{four}/24", f"{six}/64")
            net.default(machine, BRIDGE4, BRIDGE6)
        net.forward("gateway")
        net.rules(
            "gateway",
            'table inet docker { chain out { type nat hook postrouting priority srcnat; oifname "out" masquerade; }; }',
        )
        lab = Lab(net, directory, "gateway", stack)
        (directory / "policy.yaml").write_text(POLICY)
        yield lab


@pytest.fixture(scope="module")
def rules(gateway: Lab) -> None:
    """Those of the page, loaded as it says. Before, to show that they are needed, all that they stop arrives."""
    gateway.origin.look()
    for name, send in OTHER_PACKETS.items():
        send(gateway.net)
        eventually(lambda: gateway.origin.look().packets, f"{name} arrives where there is no rule")
    for _ in range(2):  # as often as one likes
        apply(gateway, "gateway", GATEWAY_RULES)


def serving(lab: Lab, *more: str) -> Placed:
    """The command of the page, for the page's rules."""
    words = command(SERVICE, GATEWAY, "outgate serve").split()
    assert words[0] == "outgate"
    options = ["--workers", "2", "--upstream-ca", "origin.pem", "--log", "decisions.jsonl", *HOSTS, *more]
    return Placed(lab.directory, lab.net.inside("gateway", [str(OUTGATE), *words[1:], *options]))


@pytest.fixture(scope="module")
def served(gateway: Lab, rules: None) -> Iterator[Placed]:
    with serving(gateway) as it:
        yield it


SYN4, SYN6, NOTHING = f"tcp {ORIGIN4}:443", f"tcp [{ORIGIN6}]:443", ""
EARLY = f"{SYN4}, perhaps"  # the gate may connect to an allowed host to hear what it speaks, before it judges a path
# Who asks, for what, how curl ends, the HTTP status, what the record says, and what the origin got.
TRIES: dict[str, tuple[str, list[str], set[int], str, dict[str, object], str]] = {
    "inspected": (
        "one", towards("https://api.example/search/4", ASKED4), OK, "200",
        {"workload": "one", "verdict": "allow", "url.full": "https://api.example/search/4", "source.address": ONE4},
        SYN4,
    ),
    "inspected, over IPv6": (
        "one", towards("https://api.example/search/6", f"[{ASKED6}]"), OK, "200",
        {"workload": "one", "verdict": "allow", "url.full": "https://api.example/search/6", "source.address": ONE6},
        SYN4,
    ),
    "carried": (
        "one", towards("https://four.cdn.example/x", ASKED4), OK, "200",
        {"workload": "one", "verdict": "allow", "server.name": "four.cdn.example", "tls.mode": "passthrough"}, SYN4,
    ),
    "carried, over IPv6": (
        "two", towards("https://six.cdn.example/x", f"[{ASKED6}]"), OK, "200",
        {"workload": "two", "verdict": "allow", "server.name": "six.cdn.example", "source.address": TWO6}, SYN6,
    ),
    "denied path": (
        "one", towards("https://api.example/other", ASKED4), OK, "403",
        {"workload": "one", "verdict": "deny", "reason": "no_allow_entry"}, EARLY,
    ),
    "denied path, plain": (
        "one", towards("http://api.example/plain", f"[{ASKED6}]"), OK, "403",
        {"workload": "one", "verdict": "deny", "url.full": "http://api.example/plain"}, NOTHING,
    ),
    "denied name": (
        "one", towards("https://unknown.example/", ASKED4), ALERT, "000",
        {"workload": "one", "verdict": "deny", "reason": "no_rule", "server.name": "unknown.example"}, NOTHING,
    ),
    "denied name, over IPv6": (
        "one", towards("https://un6.example/", f"[{ASKED6}]"), ALERT, "000",
        {"workload": "one", "verdict": "deny", "reason": "no_rule", "server.name": "un6.example"}, NOTHING,
    ),
    "what only the other may": (
        "two", towards("https://four.cdn.example/x", ASKED4), ALERT, "000",
        {"workload": "two", "verdict": "deny", "reason": "no_rule"}, NOTHING,
    ),
    "an allowed name, at an address of the origin": (
        "two", ["--insecure", f"https://{ORIGIN4}/"], ALERT, "000",
        {"workload": "two", "verdict": "deny", "reason": "no_sni", "destination.address": ORIGIN4}, NOTHING,
    ),
    "the gate's own port": (
        "one", [f"http://{BRIDGE4}:{PORT}/"], CLOSED, "000",
        {}, NOTHING,
    ),
    "the gate's own port, over IPv6": (
        "one", [f"http://[{BRIDGE6}]:{PORT}/"], CLOSED, "000", {}, NOTHING,
    ),
    "the gate's port, at its other address": (
        "two", [f"http://{OUTSIDE4}:{PORT}/"], OK, "403",
        {"verdict": "deny", "destination.address": OUTSIDE4, "destination.port": PORT}, NOTHING,
    ),
    "its admin port": (
        "one", [f"http://{BRIDGE4}:9901/readyz"], OK, "403",
        {"verdict": "deny", "destination.address": BRIDGE4, "destination.port": 9901}, NOTHING,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TRIES))
def test_connections_through_a_gateway_are_judged_by_their_source(gateway: Lab, served: Placed, name: str) -> None:
    machine, arguments, exit_status, http_status, expected, packets = TRIES[name]
    gateway.origin.look()
    before = len(served.records(**expected))

    gateway.meets(machine, arguments, exit_status, http_status)
    assert_only(gateway.origin.look(), packets, arguments if http_status == "200" else [])
    if expected:
        eventually(lambda: len(served.records(**expected)) == before + 1, f"one more record with {expected}")


def assert_only(seen: Seen, opened: str, asked: list[str]) -> None:
    """Of all that a try could lead to, the origin saw one connection at most, and the request of an allowed one."""
    assert seen.packets in ([[], [SYN4]] if opened == EARLY else [[opened] if opened else []])
    assert [request["target"] for request in seen.requests] == ["/" + url.split("/", 3)[3] for url in asked[-1:]]


def ipv4(protocol: int, body: bytes, source: str = ONE4) -> bytes:
    """A whole packet to the origin; the kernel fills in length and checksum."""
    ends = socket.inet_aton(source) + socket.inet_aton(ORIGIN4)
    return struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, protocol, 0) + ends + body


def segment(flags: int, port: int = 443) -> bytes:
    """A TCP segment without data. Its checksum is wrong, which no router looks at."""
    return struct.pack("!HHIIBBHHH", 40000, port, 1, 1, 5 << 4, flags, 1024, 0, 0)


def raw4(protocol: int, body: bytes, source: str = ONE4) -> Callable[[Namespaces], None]:
    def send(net: Namespaces) -> None:
        with net.open_socket("one", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            sock.sendto(ipv4(protocol, body, source), (ORIGIN4, 0))

    return send


def raw6(protocol: int, body: bytes) -> Callable[[Namespaces], None]:
    def send(net: Namespaces) -> None:
        with net.open_socket("one", socket.AF_INET6, socket.SOCK_RAW, protocol) as sock:
            sock.sendto(body, (ORIGIN6, 0))

    return send


def datagram(address: str, port: int, size: int = 1) -> Callable[[Namespaces], None]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def send(net: Namespaces) -> None:
        with net.open_socket("one", family, socket.SOCK_DGRAM) as sock:
            sock.sendto(bytes(size), (address, port))

    return send


ECHO4, ECHO6 = b"\x08\x00\xf7\xff\x00\x00\x00\x00", b"\x80\x00\x00\x00\x00\x00\x00\x00"
UDP = struct.pack("!HHHH", 40000, 53, 8, 0)
# What no TCP connection is, so that no rule leads it to the gate.
OTHER_PACKETS: dict[str, Callable[[Namespaces], None]] = {
    "UDP, as DNS": datagram(ORIGIN4, 53),
    "UDP, as QUIC": datagram(ORIGIN4, 443),
    "UDP, as NTP": datagram(ORIGIN4, 123),
    "UDP over IPv6": datagram(ORIGIN6, 53),
    "QUIC over IPv6": datagram(ORIGIN6, 443),
    "UDP in fragments": datagram(ORIGIN4, 53, 3000),
    "UDP over IPv6 in fragments": datagram(ORIGIN6, 53, 3000),
    "ICMP echo": raw4(1, ECHO4),
    "ICMPv6 echo": raw6(58, ECHO6),
    "SCTP": raw4(132, bytes(16)),
    "GRE": raw4(47, bytes(16)),
    "ESP": raw4(50, bytes(16)),
    "IPv4 in IPv4": raw4(4, ipv4(17, UDP)),
    "IPv6 in IPv4": raw4(41, bytes(40)),
    "an unknown protocol over IPv6": raw6(253, bytes(16)),
    "UDP behind destination options": raw6(60, b"\x11\x00\x01\x04\x00\x00\x00\x00" + UDP),
    "a TCP segment of no connection": raw4(6, segment(0x10)),
    "a TCP segment without flags": raw4(6, segment(0)),
    "a TCP answer to nothing": raw4(6, segment(0x12)),
    "a TCP reset": raw4(6, segment(0x04)),
    "UDP with a forged source": raw4(17, UDP, "198.51.100.9"),
    "UDP with the other's source": raw4(17, UDP, TWO4),
}


@pytest.mark.parametrize("name", list(OTHER_PACKETS))
def test_nothing_but_judged_connections_leaves_through_a_gateway(gateway: Lab, served: Placed, name: str) -> None:
    gateway.origin.look()
    OTHER_PACKETS[name](gateway.net)
    assert gateway.origin.look().packets == []


def test_a_gateway_may_let_names_be_looked_up_and_nothing_else(gateway: Lab, served: Placed) -> None:
    apply(gateway, "gateway", GATEWAY_RULES_WITH_NAMES.replace("10.0.0.53", ORIGIN4))
    try:
        gateway.origin.look()
        for name in ("UDP, as DNS", "UDP, as QUIC", "UDP over IPv6", "ICMP echo"):
            OTHER_PACKETS[name](gateway.net)
        assert set(gateway.origin.look().packets) == {f"udp {ORIGIN4}:53"}
    finally:
        apply(gateway, "gateway", GATEWAY_RULES)


def test_the_rules_fit_a_docker_network_too(gateway: Lab) -> None:
    """Under the names of the machine `one`, where nothing depends on them."""
    gateway.net.ip("one", "link", "add", "br-out", "type", "bridge")
    apply(gateway, "one", command(SERVICE, "A gateway for a docker network", "outgate firewall"))
    shown = subprocess.run(gateway.net.inside("one", ["nft", "list", "ruleset"]), capture_output=True, text=True).stdout
    assert 'iifname "br-out"' in shown
    gateway.net.rules("one", "flush ruleset")


def test_a_connection_that_was_made_before_the_rules_ends_with_them(gateway: Lab, served: Placed) -> None:
    gateway.net.rules("gateway", "delete table inet outgate")
    with gateway.net.open_socket("one", socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect((ORIGIN4, 22))
        assert sock.recv(100)
        apply(gateway, "gateway", GATEWAY_RULES)
        sock.sendall(b"more")
        with pytest.raises(ConnectionResetError):
            sock.recv(100)


def test_while_every_worker_is_gone_nothing_passes_and_what_waits_is_served_later(gateway: Lab, served: Placed) -> None:
    workers = served.workers()
    assert len(workers) == 2
    gateway.origin.look()
    served.send(signal.SIGSTOP)  # so that it replaces none yet
    try:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        eventually(lambda: all(map(is_gone, workers)), "both are gone")
        for name in ("inspected", "denied name"):
            gateway.meets("one", ["--max-time", "1", *TRIES[name][1]], TIMED_OUT, "000")
        assert gateway.origin.look().packets == []
        line = [*CURL, "--cacert", str(gateway.trust), "-o", "/dev/null", "-w", "%{http_code}"]
        waiting = subprocess.Popen(
            gateway.net.inside("one", [*line, *towards("https://four.cdn.example/later", ASKED4)]),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        served.send(signal.SIGCONT)
    assert waiting.communicate(timeout=30)[0] == "200"
    gateway.meets("one", TRIES["inspected"][1], OK, "200")
    assert len(served.workers()) == 2


def test_a_gate_that_stopped_lets_nothing_pass(gateway: Lab, rules: None) -> None:
    with serving(gateway, "--listen", f"[::]:{PORT + 1}", "--admin", "none") as it:  # beside the one that serves
        it.send(signal.SIGTERM)
        assert it.ends() == 0
    apply(gateway, "gateway", GATEWAY_RULES, "--gate-port", str(PORT + 1))
    try:
        gateway.origin.look()
        for name in ("inspected", "inspected, over IPv6", "carried", "denied name"):
            machine, arguments, *_ = TRIES[name]
            gateway.meets(machine, arguments, CLOSED, "000")
        for send in OTHER_PACKETS.values():
            send(gateway.net)
        assert gateway.origin.look().packets == []
    finally:
        apply(gateway, "gateway", GATEWAY_RULES)


# --- beside one program -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pod() -> Iterator[Lab]:
    """One network namespace with a way out, the rules of the page in it, and the origin behind."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-pod-")))
        directory.chmod(0o755)
        net = stack.enter_context(machines("pod", "router", "origin"))
        net.link("router", "pod", "pod", "eth0")
        net.address("router", "pod", f"{BRIDGE4}/24", f"{BRIDGE6}/64")
        net.address("pod", "eth0", f"{ONE4}/24", f"{ONE6}/64")
        net.default("pod", BRIDGE4, BRIDGE6)
        net.forward("router")
        lab = Lab(net, directory, "router", stack)
        net.run("pod", ["sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647"])  # so that the workload may try
        (directory / "policy.yaml").write_text("version: 1\nworkloads:\n  weather:" + RULES)
        for path in (directory, *directory.rglob("*")):
            os.chown(path, GATE_UID, GATE_UID)
        for _ in range(2):
            apply(lab, "pod", POD_RULES)
        yield lab


@pytest.fixture(scope="module")
def beside(pod: Lab) -> Iterator[Placed]:
    """The gate, by the command of the page, as its user."""
    words = command(SERVICE, SIDECAR, "runuser").split()
    assert words[:5] == ["runuser", "-u", "outgate", "--", "outgate"]
    options = ["--upstream-ca", "origin.pem", "--log", "decisions.jsonl", *HOSTS]
    with Placed(pod.directory, pod.net.inside("pod", as_user([str(OUTGATE), *words[5:], *options], GATE_UID))) as it:
        yield it


POD_TRIES: dict[str, tuple[list[str], set[int], str, dict[str, object], str]] = {
    "inspected": (
        towards("https://api.example/search/4", ASKED4), OK, "200",
        {"verdict": "allow", "url.full": "https://api.example/search/4", "destination.address": ASKED4}, SYN4,
    ),
    "carried": (
        towards("https://four.cdn.example/x", ASKED4), OK, "200",
        {"verdict": "allow", "server.name": "four.cdn.example"}, SYN4,
    ),
    "carried, over IPv6": (
        towards("https://six.cdn.example/x", f"[{ASKED6}]"), OK, "200",
        {"verdict": "allow", "server.name": "six.cdn.example", "destination.address": ASKED6}, SYN6,
    ),
    "denied path": (
        towards("https://api.example/other", f"[{ASKED6}]"), OK, "403", {"verdict": "deny", "reason": "no_allow_entry"},
        EARLY,
    ),
    "denied name": (
        towards("https://unknown.example/", ASKED4), ALERT, "000", {"verdict": "deny", "reason": "no_rule"}, NOTHING,
    ),
    "the gate's own port": (
        [f"http://127.0.0.1:{PORT}/"], CLOSED, "000",
        {"reason": "never_reached", "destination.address": "127.0.0.1"}, NOTHING,
    ),
    "the gate's own port, over IPv6": (
        [f"http://[::1]:{PORT}/"], CLOSED, "000", {"reason": "never_reached", "destination.address": "::1"}, NOTHING,
    ),
    "a reload": (["--request", "POST", "http://127.0.0.1:9901/reload"], OK, "403", {}, NOTHING),
}  # fmt: skip


@pytest.mark.parametrize("name", list(POD_TRIES))
def test_what_a_program_in_a_pod_connects_to_is_judged(pod: Lab, beside: Placed, name: str) -> None:
    arguments, exit_status, http_status, expected, packets = POD_TRIES[name]
    pod.origin.look()

    pod.meets("pod", arguments, exit_status, http_status, uid=ORDINARY_UID)
    assert_only(pod.origin.look(), packets, arguments if http_status == "200" else [])
    if expected:
        eventually(lambda: beside.records(workload="weather", **expected), f"a record with {expected}")


# Ways out that a program has besides TCP, each tried. The arguments are the origin's addresses.
WAYS_OUT = """
import contextlib, socket, sys
four, six = sys.argv[1:]
def send(address, port, family=socket.AF_INET, kind=socket.SOCK_DGRAM, protocol=0, body=b"x"):
    with contextlib.suppress(PermissionError), socket.socket(family, kind, protocol) as sock:
        sock.sendto(body, (address, port))
send(four, 53)
send(six, 443, socket.AF_INET6)
send("::ffff:" + four, 123, socket.AF_INET6)
send(four, 53, protocol=136)
send(four, 0, protocol=1, body=bytes([8, 0, 0, 0, 0, 0, 0, 0]))
send(six, 0, socket.AF_INET6, protocol=58, body=bytes([128, 0, 0, 0, 0, 0, 0, 0]))
send(four, 0, kind=socket.SOCK_RAW, protocol=132, body=bytes(16))
"""
# As the page has it: what may not be among the capabilities of a container, though it runs as root.
WITHOUT = "-net_raw,-net_admin,-setuid,-sys_admin"
WORKLOADS: dict[str, Callable[[list[str]], list[str]]] = {
    "an ordinary user": as_user,
    "root, less what the page takes away": lambda line: ["setpriv", "--bounding-set", WITHOUT, *line],
}


def tries_all(pod: Lab, who: Callable[[list[str]], list[str]]) -> list[str]:
    """What comes out when somebody tries all of them."""
    pod.origin.look()
    pod.net.run("pod", who([sys.executable, "-c", WAYS_OUT, ORIGIN4, ORIGIN6]))
    return pod.origin.look().packets


@pytest.mark.parametrize("who", list(WORKLOADS))
def test_no_program_in_a_pod_gets_out_around_the_gate(pod: Lab, beside: Placed, who: str) -> None:
    assert tries_all(pod, WORKLOADS[who]) == []


def test_the_gates_own_uid_gets_out(pod: Lab, beside: Placed) -> None:
    """Which is why the page lets no container run as it."""
    assert set(tries_all(pod, lambda line: as_user(line, GATE_UID))) == {
        f"udp {ORIGIN4}:53", f"udp [{ORIGIN6}]:443", f"udp {ORIGIN4}:123", f"protocol 136 {ORIGIN4}",
        f"icmp {ORIGIN4}", f"icmp [{ORIGIN6}]",
    }  # fmt: skip


def test_a_pod_may_look_names_up_and_nothing_else(pod: Lab, beside: Placed) -> None:
    apply(pod, "pod", POD_RULES_WITH_NAMES.replace("10.96.0.10", ORIGIN4))
    try:
        assert tries_all(pod, as_user) == [f"udp {ORIGIN4}:53"]
    finally:
        apply(pod, "pod", POD_RULES)


def test_a_pod_that_serves_others_may_answer_them(pod: Lab, beside: Placed) -> None:
    with pod.net.open_socket("pod", socket.AF_INET, socket.SOCK_STREAM) as door:
        door.bind(("0.0.0.0", 8080))
        door.listen()
        assert not is_reached(pod, (ONE4, 8080))
        apply(pod, "pod", POD_RULES_WITH_ANSWERS)
        try:
            assert is_reached(pod, (ONE4, 8080))
            assert tries_all(pod, as_user) == []
        finally:
            apply(pod, "pod", POD_RULES)


def is_reached(pod: Lab, address: tuple[str, int]) -> bool:
    """By a neighbour of the pod."""
    with pod.net.open_socket("router", socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        try:
            sock.connect(address)
        except TimeoutError:
            return False
        return True


def test_a_connection_that_the_gate_closes_first_ends_at_the_origin_too(pod: Lab, beside: Placed) -> None:
    """Its last segment has no socket any more, and so no uid by which the rules could know it."""
    pod.meets("pod", POD_TRIES["inspected"][0], OK, "200", uid=ORDINARY_UID)
    eventually(lambda: not tcp_states(pod.net) & {LAST_ACK, ESTABLISHED}, "the origin has closed every connection")


ESTABLISHED, LAST_ACK = 1, 9  # net/tcp_states.h


def tcp_states(net: Namespaces) -> set[int]:
    """Of the origin's connections."""
    tables = net.inside("origin", ["cat", "/proc/net/tcp", "/proc/net/tcp6"])
    rows = subprocess.run(tables, capture_output=True, text=True, check=True).stdout.splitlines()
    return {int(row.split()[3], 16) for row in rows if ":" in row.split()[0]}


def test_a_pod_whose_gate_is_gone_gets_nothing_out(pod: Lab, beside: Placed) -> None:
    """The last test of the pod: it ends its gate."""
    pids = [beside.process.pid, *beside.processes()]
    beside.send(signal.SIGKILL)
    eventually(lambda: beside.ends() is not None, "it has ended")
    eventually(lambda: all(map(is_gone, pids)), "its workers too")
    pod.origin.look()
    for name in ("inspected", "carried", "carried, over IPv6", "denied name"):
        pod.meets("pod", POD_TRIES[name][0], CLOSED, "000", uid=ORDINARY_UID)
    assert pod.origin.look().packets == tries_all(pod, as_user) == []
