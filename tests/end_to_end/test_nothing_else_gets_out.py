"""Nothing else gets out: before an internet that answers everything and keeps every packet, with two workloads behind a
real gate, real rules of the kernel and a real relay, what is on the wire is what the policies allow, and all of that.

The same attacks are made with nothing in the way first: there every one of them is on the wire.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from policies.index import Policy
from policies.load import load
from policies.tree import Source
from proxy.relays.dns_budget import NewNames
from proxy.verify.packets import quic_initial
from tests.end_to_end.chrony import measured_s, needs_chronyd
from tests.end_to_end.firewalled import family_of
from tests.end_to_end.inside_allowed import Step
from tests.end_to_end.inside_attacks import ELSEWHERE4, ELSEWHERE6, OPEN_PORT, RESOLVER4, RESOLVER6, Target, question
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import Placed, make_authority
from tests.end_to_end.recorded import Fact, Internet, Recorder, allowed_by, internet
from tests.end_to_end.service import WAIT_S, children, eventually, signal_to
from tests.end_to_end.verifying import documented, verified
from tests.end_to_end.world import CHECKOUT, OUTGATE
from tests.proxy.test_dns_musl import LOOK_UP
from tests.sandbox_user import as_user

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "conntrack")
    ),
]

A4, A6, NEAR4, NEAR6 = "10.77.1.2", "fd77:1::2", "10.77.1.1", "fd77:1::1"
B4, B6, NEARB4, NEARB6 = "10.77.3.2", "fd77:3::2", "10.77.3.1", "fd77:3::1"
OUT4, OUT6, FAR4, FAR6 = "10.77.2.1", "fd77:2::1", "10.77.2.2", "fd77:2::2"
NAMESERVER = "203.0.113.53"
ZONE = {
    "passed.example": ["93.184.216.1"],
    "api.example": ["2606:2800:220:1::2"],
    "*.cdn.example": ["93.184.216.3"],
    "git.example": ["93.184.216.4", "2606:2800:220:1::4"],
    "echo.example": ["93.184.216.5"],
    "quic.example": ["93.184.216.6"],
    "time.example": ["93.184.216.7"],
    "other.example": ["93.184.216.8"],
    "db.example": ["93.184.216.9", "2606:2800:220:1::9"],
    "stream.example": ["93.184.216.10", "2606:2800:220:1::10"],
    "time-b.example": ["2606:2800:220:1::11"],
}
RULES_A = """
    rules:
      - host: passed.example
      - {host: api.example, tls: inspect, allow: ["GET /search/**"]}
      - host: "*.cdn.example"
      - tcp: git.example:22
      - tcp: 203.0.113.10:25
      - udp: {host: echo.example, ports: [9000], budget: 10MiB/h}
      - udp: {host: quic.example, ports: [443], quic: sni}
      - ntp: time.example
"""
POLICY = f"""
version: 1
workloads:
  a:
    match: {{address: [{A4}/32, "{A6}/128"]}}{RULES_A}
  b:
    match: {{address: [{B4}/32, "{B6}/128"]}}
    rules:
      - host: other.example
      - tcp: db.example:5432
      - udp: stream.example:9100
      - dns: "*.cdn-b.example"
      - ntp: time-b.example
"""
DNS_PORT, NTP_PORT, UDP_PORT = 15053, 10123, 15006
RELAYS = ["--dns-port", str(DNS_PORT), "--ntp-port", str(NTP_PORT), "--udp-port", str(UDP_PORT), "--quic"]
RESOLVED = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
BURST = 4  # of the relay's polls of a server; the next ones come after a minute


type Wrap = Callable[[list[str]], list[str]]  # of a command line: as whom, and in what


def policy_of(text: str) -> Policy:
    return load([Source("policy.yaml", text)], catalogue={}, tags={}, is_public_suffix=lambda name: False)


def general(facts: set[Fact]) -> set[Fact]:
    """With each name below a wildcard as the wildcard; a connection on which nothing was said is none."""
    found = set()
    for fact in facts:
        *rest, last = fact
        shown = re.sub(r"\S+\.(cdn(-b)?\.example)", r"*.\1", last) if isinstance(last, str) else last
        found.add((*rest, shown))
    carried = {fact[:3] for fact in found if fact[0] == "tcp" and fact[-1] != "nothing"}
    return {fact for fact in found if fact[-1] != "nothing" or fact[:3] not in carried}


@dataclass
class Tried:
    """One run of all attacks on a machine."""

    names: list[str]
    refused: set[str]
    nonce: bytes
    since: int  # packets that had come before
    requests_since: int


class Lab:
    """Machines around a wire that is recorded."""

    def __init__(self, stack: ExitStack, *names: str) -> None:
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-internet-")))
        self.directory.chmod(0o755)
        self.net: Namespaces = stack.enter_context(machines(*names, "internet"))
        self.stack = stack

    def record(self, near: str, *more: str) -> None:
        """What comes from the machine `near`, which has these addresses there beside its usual ones."""
        self.near = near
        self.internet: Internet = self.stack.enter_context(internet(self.net, self.directory, ZONE))
        self.recorder = Recorder(self.net, "internet", "wire", [OUT4, OUT6, *more])
        self.stack.callback(lambda: self.recorder.close(self.net, near))

    def outward(self, machine: str) -> None:
        """From there to the internet."""
        self.net.link(machine, "out", "internet", "wire")
        self.net.address(machine, "out", f"{OUT4}/24", f"{OUT6}/64")
        self.net.address("internet", "wire", f"{FAR4}/24", f"{FAR6}/64")
        self.net.default(machine, FAR4, FAR6)
        for net, by in (("10.77.0.0/16", OUT4), ("fd77::/16", OUT6)):  # what is answered to others goes nowhere
            self.net.ip("internet", "route", "add", net, "via", by)

    def inward(self, machine: str, device: str, far: tuple[str, str], near: tuple[str, str], router: str) -> None:
        self.net.link(router, device, machine, "eth0")
        self.net.address(router, device, f"{near[0]}/24", f"{near[1]}/64")
        self.net.address(machine, "eth0", f"{far[0]}/24", f"{far[1]}/64")
        self.net.default(machine, *near)

    @contextmanager
    def running(self, machine: str, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            self.net.inside(machine, command), cwd=self.directory, stderr=subprocess.PIPE, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(WAIT_S)
            assert process.stderr
            process.stderr.close()

    def mac(self, machine: str, device: str) -> str:
        line = self.net.inside(machine, ["cat", f"/sys/class/net/{device}/address"])
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip().replace(":", "")

    def settle(self, *workloads: str) -> None:
        """Until both families lead out: IPv6 takes its time after a link came up."""

        def leads(machine: str, address: str) -> bool:
            with self.net.open_socket(machine, family_of(address), socket.SOCK_STREAM) as sock:
                sock.settimeout(1)
                return sock.connect_ex((address, 22)) == 0

        for machine in workloads:
            for address in (ELSEWHERE4, ELSEWHERE6):
                eventually(partial(leads, machine, address), f"{address} answers {machine}")

    # --- what is on the wire

    def seen(self, since: int = 0) -> set[Fact]:
        """What came out, from that packet on, and how far it was read."""
        last = self.recorder.mark(self.net, self.near)
        return self.recorder.facts(since, last)

    def now(self) -> int:
        return self.recorder.mark(self.net, self.near)

    # --- what is tried

    def take(self, machine: str, steps: list[Step], wrap: Wrap = list, patience_s: float = WAIT_S) -> list[Any]:
        """What comes back of each step."""
        line = wrap([sys.executable, "-m", "tests.end_to_end.inside_allowed", json.dumps(steps), str(patience_s)])
        done = subprocess.run(self.net.inside(machine, line), capture_output=True, text=True, timeout=120, cwd=CHECKOUT)
        assert done.returncode == 0, done.stderr
        found: list[Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def attack(self, machine: str, target: Target, wrap: Wrap = list) -> Tried:
        nonce = os.urandom(5)
        since, requests_since = self.now(), len(self.internet.requests())
        words = [sys.executable, "-m", "tests.end_to_end.inside_attacks", replace(target, nonce=nonce.hex()).dump()]
        done = subprocess.run(
            self.net.inside(machine, wrap(words)), capture_output=True, text=True, timeout=90, cwd=CHECKOUT
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        return Tried(said["names"], set(said["refused"]), nonce, since, requests_since)

    def out(self, tried: Tried) -> dict[str, Any]:
        """Attacks of which anything is outside: by name, where to."""
        self.now()
        found: dict[str, Any] = {
            tried.names[number]: fact for number, fact in self.recorder.tags(tried.nonce, tried.since).items()
        }
        for request in self.internet.requests()[tried.requests_since :]:
            for text in re.findall(f"{tried.nonce.hex()}([0-9a-f]{{4}})", json.dumps(request).lower()):
                found[tried.names[int(text, 16)]] = request
        return found


# --- a gateway, and two workloads


class Gateway(Lab):
    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack, "a", "b", "gateway")
        self.inward("a", "a0", (A4, A6), (NEAR4, NEAR6), "gateway")
        self.inward("b", "b0", (B4, B6), (NEARB4, NEARB6), "gateway")
        self.outward("gateway")
        self.net.forward("gateway")
        for name in ("ipv4.conf.all.rp_filter=0", "ipv4.conf.default.rp_filter=0", "ipv4.conf.a0.rp_filter=0",
                     "ipv4.conf.all.accept_source_route=1", "ipv4.conf.a0.accept_source_route=1",
                     "ipv6.conf.all.accept_source_route=1", "ipv6.conf.a0.accept_source_route=1",
                     "ipv6.conf.a0.seg6_enabled=1", "ipv6.conf.all.seg6_enabled=1"):  # fmt: skip
            self.net.run("gateway", ["sysctl", "-qw", f"net.{name}"])  # a careless machine: the rules alone hold
        for machine in ("a", "b"):
            self.net.run(machine, ["sysctl", "-qw", "net.ipv4.tcp_fastopen=0x5", "net.ipv4.ping_group_range=0 99999"])
        for address in ("10.77.1.77/24", "fd77:1::77/64"):  # as which attacks speak: somebody has it, and hangs up
            self.net.ip(
                "a",
                "address",
                "add",
                address,
                "dev",
                "eth0",
                "preferred_lft",
                "0",
                *(["nodad"] if ":" in address else []),
            )
        self.record("gateway")
        (self.directory / "policy.yaml").write_text(POLICY)
        make_authority(self.directory)
        self.settle("a", "b")
        self.target = a_target(self, "gateway", "a0")

    @contextmanager
    def serving(self) -> Iterator[Placed]:
        command = [
            str(OUTGATE), "serve", "--mode", "gateway", "-p", "policy.yaml", "--pki", "pki", "--upstream-ca",
            "origin.pem", "--nameserver", NAMESERVER, "--dns-listen", f"[::]:{DNS_PORT}", "--udp-listen",
            f"[::]:{UDP_PORT}", "--openings", "true", "--workers", "2", "--log", "decisions.jsonl",
        ]  # fmt: skip
        with Placed(self.directory, self.net.inside("gateway", command)) as placed:
            placed.admin = ("127.0.0.1", 9901)
            yield placed

    @contextmanager
    def relaying(self) -> Iterator[subprocess.Popen[str]]:
        """The relay, which does not know the time yet."""
        resolv = self.directory / "resolv.conf"
        resolv.write_text(f"nameserver {NAMESERVER}\n")
        command = [
            "sh", "-c", RESOLVED, str(resolv), str(OUTGATE), "relay", "-p", "policy.yaml", "--admin", "none",
            "--listen", f"[::]:{NTP_PORT}", "--log", "time.jsonl",
        ]  # fmt: skip
        with self.running("gateway", command) as process:
            yield process

    def firewall(self, *words: str) -> None:
        self.net.run("gateway", [str(OUTGATE), "firewall", *words])


POLICY_A = {
    "tcp": ZONE["git.example"][0], "udp": ZONE["echo.example"][0], "passed": ZONE["passed.example"][0],
    "inspected": ZONE["api.example"][0], "quic": ZONE["quic.example"][0], "time": ZONE["time.example"][0],
    "nameserver": NAMESERVER,
}  # fmt: skip
OTHER = {
    "tcp": ZONE["db.example"][0], "tcp6": ZONE["db.example"][1],
    "udp": ZONE["stream.example"][0], "udp6": ZONE["stream.example"][1],
}  # fmt: skip
RULES = ["--mode", "gateway", "--workload-device", "a0", "--workload-device", "b0", "--upstream-device", "out", *RELAYS]


def a_target(lab: Lab, router: str, device: str) -> Target:
    return Target(
        nonce="", mine=(A4, A6), gateway=(NEAR4, NEAR6), outside=(OUT4, OUT6), neighbour=(B4, B6), device="eth0",
        link=lab.mac(router, device), policy=POLICY_A, other=OTHER,
    )  # fmt: skip


# --- what is allowed


def step(*words: str | int) -> Step:
    return [*words]


def lookups(*names: str) -> list[Step]:
    """Of every type that is asked for outside; whichever resolver is meant, by the family that is then connected by."""
    return [
        ["dns", at, name, kind] for name in names for kind, at in ((1, RESOLVER4), (28, RESOLVER6), (65, RESOLVER4))
    ]


ALLOWED_A: list[Step] = [
    *lookups("passed.example", "api.example", "x1.cdn.example", "git.example", "echo.example", "quic.example",
             "time.example"),
    ["https", ELSEWHERE4, "passed.example", "/"],  # at an address of its own choosing, which is not dialled
    ["https", ELSEWHERE4, "api.example", "/search/ok?q=1"],
    ["http2", ELSEWHERE4, "api.example", "/search/http2"],
    ["https", ELSEWHERE4, "x1.cdn.example", "/"],
    *(step("tcp", address, 22, "SSH-2.0-client") for address in ZONE["git.example"]),
    ["tcp", "203.0.113.10", 25, "EHLO client"],
    ["udp", ZONE["echo.example"][0], 9000, b"question".hex()],
    ["udp", ZONE["quic.example"][0], 443, quic_initial("quic.example", bytes(range(64))).hex()],
    ["ntp", ELSEWHERE4],
]  # fmt: skip
ALLOWED_B: list[Step] = [
    *lookups("other.example", "db.example", "stream.example", "x1.cdn-b.example", "time-b.example"),
    ["https", ELSEWHERE4, "other.example", "/"],
    *(step("tcp", address, 5432, "SELECT") for address in ZONE["db.example"]),
    *(step("udp", address, 9100, b"question".hex()) for address in ZONE["stream.example"]),
    ["ntp", ELSEWHERE4],
]
BRIEF: list[Step] = [["dns", RESOLVER4, "passed.example", 1], ["https", ELSEWHERE4, "passed.example", "/"]]
REQUESTS = {
    ("passed.example", "GET", "/"), ("x1.cdn.example", "GET", "/"), ("other.example", "GET", "/"),
    ("api.example", "GET", "/search/ok?q=1"),
    ("api.example", "GET", "/search/http2"),
    ("api.example", "GET", "/search/a"),  # of attacks whose second request is another
}  # fmt: skip


def is_well(found: list[Any]) -> bool:
    return not any("Error" in str(one) or "timed out" in str(one) for one in found)


# --- behind a gateway


class Stand:
    """A gateway that serves, and its time that is recorded."""

    def __init__(self, stack: ExitStack) -> None:
        self.lab = Gateway(stack)
        self.control = self.lab.attack("a", self.lab.target)
        self.reached = self.lab.out(self.control)
        self.lab.firewall("apply", *RULES)
        self.since, self.requests_since = self.lab.now(), len(self.lab.internet.requests())
        self.expected = allowed_by(policy_of(POLICY), ZONE, NAMESERVER, ["a", "b"])
        self._running = stack.enter_context(ExitStack())
        self.relay = stack.enter_context(self.lab.relaying())
        self.start()
        synchronised(self.relay)

    def start(self) -> None:
        """The gate, anew if it was there."""
        self._running.close()
        self.gate = self._running.enter_context(self.lab.serving())
        eventually(lambda: self.lab.net.made_there("gateway", self.gate.ready)[0] == 200, "the gate is ready")

    def nothing_else(self, tried: Tried) -> None:
        """Nothing of an attack is outside, and whatever has been there since the start, the policy allows."""
        assert self.lab.out(tried) == {}
        extra = general(self.lab.seen(self.since)) - self.expected
        assert extra <= {("unheard", fact[1]) for fact in self.expected}, extra  # an answer to what was killed

    def spoofed(self) -> int:
        """Packets whose source is not where they came from."""
        line = self.lab.net.inside("gateway", ["nft", "list", "counter", "inet", "outgate", "spoofed"])
        listed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        return int(listed.split("packets ")[1].split()[0])

    def requests(self) -> list[dict[str, Any]]:
        """That were read outside since the start."""
        return self.lab.internet.requests()[self.requests_since :]

    def inspectors(self) -> list[int]:
        return [pid for worker in self.gate.workers() for pid in children(worker, "proxy.inspector")]

    def openers(self) -> list[int]:
        return children(self.gate.process.pid, "proxy.opener")


def synchronised(relay: subprocess.Popen[str]) -> None:
    """Once it knows the time."""
    assert relay.stderr
    while "outgate: synchronised, policy" not in (line := relay.stderr.readline()):
        assert line, "the relay ended"


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with ExitStack() as stack:
        yield Stand(stack)


# Which no router passes on: what is sent to itself, and what Linux calls Martian.
NOWHERE = re.compile(
    rf"near.*|forged ({NEAR4}|{OUT4}|127\.0\.0\.1|0\.0\.0\.0|255\.255\.255\.255|224\.0\.0\.1|::1|::|fe80::7) .*"
)


def test_with_no_gate_every_attack_gets_out(stand: Stand) -> None:
    """So that none of the tests below holds because nothing was tried, or nothing would be seen."""
    tried = {name for name in stand.control.names if not NOWHERE.fullmatch(name)}
    assert len(tried) > 300
    assert len(set(stand.control.names)) == len(stand.control.names)
    assert tried - stand.reached.keys() == set()
    assert stand.control.refused == set()


def test_the_internet_sees_what_the_policy_allows_and_all_of_that(stand: Stand) -> None:
    lab = stand.lab
    found = lab.take("a", ALLOWED_A) + lab.take("b", ALLOWED_B)
    assert is_well(found), found
    before = lab.now()
    with lab.net.open_socket("a", socket.AF_INET, socket.SOCK_STREAM) as opened:
        opened.settimeout(WAIT_S)
        opened.bind((A4, OPEN_PORT))  # whose number attacks know
        opened.connect((POLICY_A["tcp"], 22))
        assert opened.recv(100)
        tried = lab.attack("a", lab.target)
    assert lab.out(tried) == {}
    assert general(lab.seen(stand.since)) == stand.expected
    assert {(one["headers"]["Host"], one["method"], one["target"]) for one in stand.requests()} == REQUESTS
    assert {one["sni"] for one in stand.requests()} == {host for host, _, _ in REQUESTS}
    assert len(lab.recorder.datagrams_to(123, before)) <= 2  # its own schedule may fall into this moment


def test_a_tunnel_below_a_wildcard_ends_with_its_budget(stand: Stand) -> None:
    nonce = os.urandom(5).hex()
    since = stand.lab.now()
    names = [f"x{nonce}{number:04x}.cdn.example" for number in range(200)]
    with stand.lab.net.open_socket("a", socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT_S)
        sock.connect((RESOLVER4, 53))
        for name in names:
            sock.send(question(name))
            sock.recv(4096)
    stand.lab.now()
    workers = 2
    assert 0 < len(stand.lab.recorder.tags(bytes.fromhex(nonce), since)) <= workers * NewNames().burst
    assert general(stand.lab.seen(stand.since)) - stand.expected <= {("unheard", fact[1]) for fact in stand.expected}


def test_a_forged_source_is_dropped_where_it_comes_in(stand: Stand) -> None:
    """Else what refuses it goes to whomever it names, and quotes it; and it has the rights of whomever it names."""
    forged = {name for name in stand.reached if name.startswith("forged")}
    assert len(forged) > 40
    before = stand.spoofed()
    stand.nothing_else(stand.lab.attack("a", stand.lab.target))
    assert stand.spoofed() - before >= len(forged) - 10  # two of them are its own


def test_verify_finds_no_leak_and_sends_nothing_beside_the_policy(stand: Stand) -> None:
    lab = stand.lab
    [root] = (lab.directory / "pki" / "roots").glob("*/ca.crt")
    found = verified(lab.net, "a", lab.directory, "-p", "policy.yaml", "-w", "a", "--root", str(root))
    assert found.leaks == set(), found.page
    guarded = ("dns-foreign", "dns-foreign6", "dns-denied", "dns-txt", "dns-null", "dns-any", "dns-tunnel")
    told = dict.fromkeys(guarded, "proxied") | dict.fromkeys(("ntp-random", "clock", "tcp-25"), "reached")
    assert found.on_the_page == {id: row.behind_gateway for id, row in documented().items()} | told
    assert general(lab.seen(stand.since)) == stand.expected


# --- real clients, in the same place


SEARCH = "search default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"


def client(stand: Stand, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """On machine a, whose resolver is somewhere outside."""
    resolv = stand.lab.directory / "client-resolv.conf"
    resolv.write_text(f"nameserver {RESOLVER4}\n{SEARCH}")
    line = stand.lab.net.inside("a", ["sh", "-c", RESOLVED, str(resolv), *command])
    return subprocess.run(line, capture_output=True, text=True, input=stdin, timeout=60, cwd=stand.lab.directory)


def nothing_else(stand: Stand) -> None:
    assert general(stand.lab.seen(stand.since)) - stand.expected == set()


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")


@pytest.mark.client
def test_glibc_and_musl_resolve_what_is_allowed(stand: Stand, tmp_path: Path) -> None:
    programs = [["getent", "ahosts"]]
    if shutil.which("musl-gcc"):
        (tmp_path / "look_up.c").write_text(LOOK_UP)
        musl = str(tmp_path / "look_up")
        subprocess.run(["musl-gcc", "-static", "-o", musl, str(tmp_path / "look_up.c")], check=True, timeout=60)
        programs.append([musl])
    for program in programs:
        for name in ("passed.example", "git.example"):
            found = client(stand, *program, name).stdout.split()
            assert set(ZONE[name]) <= set(found), found
        assert not re.search(r"\d\.\d", client(stand, *program, "secret.evil.example").stdout)
    nothing_else(stand)


@pytest.mark.client
@needs("dig", "dnsperf")
def test_dig_and_dnsperf_are_answered(stand: Stand, tmp_path: Path) -> None:
    for transport in ("+notcp", "+tcp"):
        assert client(stand, "dig", "+short", transport, "passed.example").stdout.split() == ZONE["passed.example"]
        assert "NXDOMAIN" in client(stand, "dig", transport, "+tries=1", "secret.evil.example").stdout
    names = "passed.example A\nsecret.evil.example A\ngit.example AAAA\n"
    (tmp_path / "names").write_text(names)
    said = client(stand, "dnsperf", "-s", RESOLVER4, "-d", str(tmp_path / "names"), "-n", "100").stdout
    assert re.search(r"Queries completed: +300 \(100.00%\)", said), said
    nothing_else(stand)


@pytest.mark.client
@needs_chronyd
def test_chronyd_is_told_the_time(stand: Stand) -> None:
    assert abs(measured_s(ELSEWHERE4, inside=lambda command: stand.lab.net.inside("a", command))) < 0.1
    nothing_else(stand)


@pytest.mark.client
@needs("openssl")
@pytest.mark.parametrize(("name", "is_ours"), [("passed.example", False), ("api.example", True)])
def test_openssl_verifies_what_is_allowed_and_is_refused_the_rest(stand: Stand, name: str, is_ours: bool) -> None:
    directory = stand.lab.directory
    root = next((directory / "pki" / "roots").glob("*/ca.crt")) if is_ours else directory / "origin.pem"
    words = ["openssl", "s_client", "-connect", f"{ELSEWHERE4}:443", "-CAfile", str(root), "-verify_return_error"]
    done = client(stand, *words, "-servername", name, "-verify_hostname", name)
    assert "Verify return code: 0 (ok)" in done.stdout, done.stderr
    assert client(stand, *words, "-servername", "secret.evil.example").returncode != 0
    nothing_else(stand)


@pytest.mark.client
@needs("ssh")
def test_ssh_reaches_the_host_that_is_allowed(stand: Stand) -> None:
    words = ["ssh", "-v", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-F", "none"]
    assert "remote software version origin" in client(stand, *words, "git.example").stderr
    assert "remote software version" not in client(stand, *words, "db.example").stderr
    assert "remote software version" not in client(stand, *words, OTHER["tcp"], "-p", "5432").stderr
    nothing_else(stand)


# --- a part of it dies


RECOVERING: dict[str, Callable[[Stand], list[int]]] = {
    "a worker": lambda stand: stand.gate.workers()[:1],
    "the inspector": lambda stand: stand.inspectors(),
    "the opener": lambda stand: stand.openers(),
}
ENDING: dict[str, Callable[[Stand], list[int]]] = {
    "the supervisor": lambda stand: [stand.gate.process.pid],
    "the relay": lambda stand: [stand.relay.pid],
    "all of it": lambda stand: [*stand.gate.processes(), stand.gate.process.pid],
}


def kill(pids: list[int]) -> None:
    """By a signal that nobody can mind."""
    assert pids
    for pid in pids:
        signal_to(pid, signal.SIGKILL)


@pytest.mark.parametrize("what", RECOVERING)
def test_nothing_else_gets_out_while_it_is_replaced(stand: Stand, what: str) -> None:
    lab = stand.lab
    kill(RECOVERING[what](stand))
    stand.nothing_else(lab.attack("a", lab.target))
    eventually(lambda: is_well(lab.take("a", ALLOWED_A)), "it serves again")
    assert general(lab.seen(stand.since)) >= stand.expected


@pytest.mark.parametrize("what", ENDING)
def test_nothing_else_gets_out_when_it_is_gone(stand: Stand, what: str) -> None:
    lab = stand.lab
    kill(ENDING[what](stand))
    stand.nothing_else(lab.attack("a", lab.target))
    if what == "the supervisor":
        before = lab.now()
        assert [one for one in lab.take("a", BRIEF, patience_s=2) if is_well([one])] == []
        assert len(lab.seen(before) - {("unheard", fact[1]) for fact in stand.expected}) == 0
        stand.start()
    if what != "all of it":
        steps = [step for step in ALLOWED_A if step[0] != "ntp" or stand.relay.poll() is None]
        eventually(lambda: is_well(lab.take("a", steps)), "the rest serves on")


# --- beside a program


GATE_UID = 1337
CAPABILITIES = "+net_raw,+net_bind_service"  # docs/udp.md


def as_the_gate(command: Sequence[str], *, capabilities: str = "") -> list[str]:
    """As the uid that the rules let out."""
    kept = [f"--{kind}-caps=-all{',' if capabilities else ''}{capabilities}" for kind in ("inh", "ambient")]
    words = ["setpriv", "--reuid", str(GATE_UID), "--regid", str(GATE_UID), "--clear-groups", *kept]
    return as_user([*words, *command], 0)


def as_a_workload(command: Sequence[str]) -> list[str]:
    """Of a pod: an ordinary user who can get no capability."""
    words = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "--inh-caps=-all",
             "--bounding-set=-all", "--no-new-privs"]  # fmt: skip
    return as_user([*words, *command], 0)


@dataclass
class Pod:
    """A pod with a gate, and what came of attacks before."""

    lab: Lab
    control: Tried
    reached: dict[str, Any]
    since: int
    gate: Placed


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    """A gate and a relay as uid 1337 beside the workload, and what came of attacks before there were rules."""
    with ExitStack() as stack:
        lab = Lab(stack, "pod", "router")
        lab.inward("pod", "in", (A4, A6), (NEAR4, NEAR6), "router")
        lab.outward("router")
        lab.net.forward("router")
        lab.net.run("pod", ["sysctl", "-qw", "net.ipv4.tcp_fastopen=0x5", "net.ipv4.ping_group_range=0 99999"])
        lab.record("router", A4, A6)
        (lab.directory / "policy.yaml").write_text(f"version: 1\nworkloads:\n  a:{RULES_A}")
        (lab.directory / "resolv.conf").write_text(f"nameserver {NAMESERVER}\n")
        make_authority(lab.directory)
        for path in (lab.directory, *lab.directory.rglob("*")):
            shutil.chown(path, GATE_UID, GATE_UID)
        lab.settle("pod")
        control = lab.attack("pod", a_target(lab, "router", "in"), as_a_workload)
        reached = lab.out(control)
        lab.net.run(
            "pod", [str(OUTGATE), "firewall", "apply", "--mode", "sidecar", "--upstream-device", "eth0", *RELAYS]
        )
        since = lab.now()
        listen = ["--listen", f"127.0.0.1:{NTP_PORT}", "--listen", f"[::1]:{NTP_PORT}"]
        relay = [
            str(OUTGATE),
            "relay",
            "-p",
            "policy.yaml",
            "-w",
            "a",
            "--admin",
            "none",
            "--log",
            "time.jsonl",
            *listen,
        ]
        stack.enter_context(lab.running("pod", ["sh", "-c", RESOLVED, "resolv.conf", *as_the_gate(relay)]))
        serve = [
            str(OUTGATE), "serve", "--mode", "sidecar", "-w", "a", "-p", "policy.yaml", "--pki", "pki",
            "--upstream-ca", "origin.pem", "--nameserver", NAMESERVER, "--log", "decisions.jsonl",
            "--dns-listen", f"127.0.0.1:{DNS_PORT}", "--dns-listen", f"[::1]:{DNS_PORT}",
            "--udp-listen", f"[::]:{UDP_PORT}",
        ]  # fmt: skip
        gate = Placed(lab.directory, lab.net.inside("pod", as_the_gate(serve, capabilities=CAPABILITIES)))
        yield Pod(lab, control, reached, since, stack.enter_context(gate))


NEEDS_PRIVILEGE = re.compile(
    r"(raw|forged|icmp|(near )?IP option).*|.*(fragment|header|options|routing|mobility|shim6).*|udp from port 53"
)


def test_beside_a_program_the_internet_sees_what_the_policy_allows(pod: Pod) -> None:
    """For a workload without capabilities; one with NET_RAW has ways round (test_firewall)."""
    lab, control = pod.lab, pod.control
    tried = {name for name in control.names if not name.startswith("near")} - control.refused
    assert tried - pod.reached.keys() == set()
    assert len(tried) > 100
    assert {name for name in control.refused if not NEEDS_PRIVILEGE.fullmatch(name)} == set()

    eventually(lambda: is_well(lab.take("pod", ALLOWED_A, as_a_workload)), "all that is allowed")
    tried_now = lab.attack("pod", a_target(lab, "router", "in"), as_a_workload)
    assert lab.out(tried_now) == {}
    expected = allowed_by(policy_of(POLICY), ZONE, NAMESERVER, ["a"])
    seen = general(lab.seen(pod.since))
    assert seen - expected == set()
    assert expected - seen <= {("tcp", ZONE["git.example"][1], 22, "opaque")}  # the gate dials one address of a name

    kill([*pod.gate.processes(), pod.gate.process.pid])
    before = lab.now()
    assert [one for one in lab.take("pod", BRIEF, as_a_workload, patience_s=2) if is_well([one])] == []
    assert lab.out(lab.attack("pod", a_target(lab, "router", "in"), as_a_workload)) == {}
    assert lab.seen(before) <= {("unheard", fact[1]) for fact in expected} | {
        fact
        for fact in expected
        if fact[-1] == "ntp"  # the relay is there
    }


# --- `outgate run`


def test_inside_run_the_internet_sees_what_the_policy_allows() -> None:
    """By an ordinary user, on a machine that the rules of no firewall guard."""
    with ExitStack() as stack:
        lab = Lab(stack, "host")
        lab.outward("host")
        lab.net.run("host", ["sysctl", "-qw", "net.ipv4.tcp_fastopen=0x5", "net.ipv4.ping_group_range=0 99999"])
        lab.record("host")
        (lab.directory / "policy.yaml").write_text(f"version: 1\nworkloads:\n  a:{RULES_A}")
        (lab.directory / "resolv.conf").write_text(f"nameserver {NAMESERVER}\n")
        (lab.directory / "decisions.jsonl").touch()
        (lab.directory / "decisions.jsonl").chmod(0o666)
        lab.settle("host")
        target = replace(a_target(lab, "host", "out"), link="", mine=(OUT4, OUT6))
        control = lab.attack("host", target, as_user)
        assert control.refused == {"udp from port 53"}
        tried = {name for name in control.names if not name.startswith("near")} - control.refused
        assert tried - lab.out(control).keys() == set()

        def sandboxed(command: Sequence[str]) -> list[str]:
            words = ["run", "-p", "policy.yaml", "-w", "a", "--upstream-ca", "origin.pem", "--log", "decisions.jsonl"]
            files = [str(lab.directory / word) if "." in word else word for word in words]
            resolv = str(lab.directory / "resolv.conf")
            return ["sh", "-c", RESOLVED, resolv, *as_user([str(OUTGATE), *files, "--", *command])]

        since = lab.now()
        eventually(lambda: is_well(lab.take("host", ALLOWED_A, sandboxed)), "all that is allowed")
        assert lab.out(lab.attack("host", target, sandboxed)) == {}
        expected = allowed_by(policy_of(POLICY), ZONE, NAMESERVER, ["a"])
        seen = general(lab.seen(since))
        assert seen - expected == set()
        assert expected - seen <= {("tcp", ZONE["git.example"][1], 22, "opaque")}
