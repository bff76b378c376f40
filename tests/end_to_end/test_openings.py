"""What a lookup opens past a real gate, and how it closes: real rules, a real kernel, programs that connect at once."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.end_to_end.firewalled import (
    GATE_PORT,
    NEAR4,
    NEAR6,
    ORIGIN4,
    ORIGIN6,
    PROHIBITED,
    WORK4,
    WORK6,
    open_for_work,
)
from tests.end_to_end.opened import AAAA, DNS_PORT, POLICY, RULES, A, Opened, element, two_workloads
from tests.end_to_end.origin import BANNER
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import WAIT_S, children, eventually, signal_to
from tests.end_to_end.world import OUTGATE
from tests.proxy.dns_gate import addresses
from tests.proxy.kernel_rules import NEEDS_ROOT

pytestmark = [
    *NEEDS_ROOT,
    pytest.mark.skipif(shutil.which("conntrack") is None, reason="conntrack is not installed"),
]
FAMILIES = pytest.mark.parametrize(
    ("to", "kind", "source", "address"),
    [(NEAR4, A, WORK4, ORIGIN4), (NEAR6, AAAA, WORK6, ORIGIN6)],
    ids=["IPv4", "IPv6"],
)
REVOKED = POLICY.replace("ports: [22, 2222]", "ports: [2200]").replace("ports: [9000]", "ports: [9009]")
OTHERWISE = POLICY.replace("dns: git.example", "dns: other.example")  # which bears on no opening
GONE = (BrokenPipeError, ConnectionResetError, TimeoutError)


@pytest.fixture(scope="module")
def lab() -> Iterator[Opened]:
    with two_workloads() as made:
        yield made


@contextmanager
def serving(lab: Opened, *rules: str, workers: int = 1) -> Iterator[Placed]:
    lab.policy(POLICY)
    lab.apply("gateway", *RULES, *rules)
    with lab.gate(workers=workers) as placed:
        lab.ready(placed)
        lab.origin.look()
        yield placed
        placed.send(signal.SIGTERM)
        assert placed.ends() == 0


@pytest.fixture
def gate(lab: Opened) -> Iterator[Placed]:
    """With the rules of a gateway and nothing open yet."""
    with serving(lab) as placed:
        yield placed


def judged_by(gate: Placed, lab: Opened, policy: str) -> None:
    """Reload, until it is in force everywhere."""
    before = len([line for line in gate.said if "is in force" in line])
    lab.policy(policy)
    gate.send(signal.SIGHUP)
    eventually(lambda: len([line for line in gate.said if "is in force" in line]) > before, "it is in force")


def all_of_git(source: str, address: str) -> set[tuple[str, str, str, int]]:
    ports = (("tcp", 22), ("tcp", 2222), ("udp", 9000))
    return {element(source, address, protocol, port) for protocol, port in ports}


def is_cut(sock: socket.socket) -> bool:
    """Whether what is sent on it is answered by nobody."""
    try:
        for _ in range(3):
            sock.sendall(b"still there\n")
            if not sock.recv(100):
                return True
    except GONE:
        return True
    return False


def is_refused(lab: Opened, machine: str, address: str) -> bool:
    """Whether the gate, to which it is led, denies the connection."""
    try:
        with lab.connect(machine, address, 22) as sock:
            return is_cut(sock)
    except ConnectionResetError:
        return True


# --- opening ---


@FAMILIES
def test_a_lookup_opens_what_its_rules_say_and_the_flow_goes_past_the_gate(
    lab: Opened, gate: Placed, to: str, kind: int, source: str, address: str
) -> None:
    answer = lab.ask("git.example", kind=kind, to=to)
    assert answer.addresses == addresses(address)
    assert lab.opened() == all_of_git(source, address)
    with lab.connect("one", address, 22) as sock:
        assert sock.recv(100) == BANNER
        assert sock.getpeername()[0] == address
    with lab.datagrams("origin", address, 9000) as far, lab.datagrams("one", source, 0) as near:
        near.sendto(b"question", (address, 9000))
        message, peer = far.recvfrom(100)
        far.sendto(b"answer", peer)
        assert (message, near.recv(100)) == (b"question", b"answer")
    eventually(lambda: gate.records(stage="dns"), "the record of the lookup")
    assert {record["stage"] for record in gate.records()} == {"dns"}  # of the flow the gate saw nothing
    assert lab.opened() == all_of_git(source, address)


def test_what_a_lookup_opens_is_of_no_use_to_another_source(lab: Opened, gate: Placed) -> None:
    """Another workload of the same gateway, which may look the name up and not connect."""
    lab.ask("git.example")
    assert lab.ask("git.example", machine="two").addresses == addresses(ORIGIN4)
    lab.connect("one", ORIGIN4, 22).close()
    lab.origin.look()
    assert is_refused(lab, "two", ORIGIN4)
    assert lab.refusal_of_udp("two", ORIGIN4, 9000) in PROHIBITED
    assert lab.origin.look().packets == []
    record = eventually(lambda: gate.records(verdict="deny"), "the denial")[0]
    assert (record["workload"], record["destination.address"]) == ("other", ORIGIN4)
    assert {source for source, *_ in lab.opened()} == {WORK4}


def test_nothing_beside_the_rule_is_open(lab: Opened, gate: Placed) -> None:
    lab.ask("git.example")
    assert lab.refusal_of_udp("one", ORIGIN4, 22) in PROHIBITED
    assert lab.refusal_of_udp("one", ORIGIN4, 9001) in PROHIBITED
    assert lab.origin.look().packets == []


def test_an_answer_of_another_family_than_its_question_opens_nothing(lab: Opened, gate: Placed) -> None:
    """Nobody knows by which address of that family the program would connect. The gate carries it."""
    assert lab.ask("git.example", kind=AAAA, to=NEAR4).addresses == addresses(ORIGIN6)
    assert lab.opened() == set()
    with lab.connect("one", ORIGIN6, 22) as sock:
        assert sock.recv(100) == BANNER
    eventually(lambda: gate.records(stage="tcp", verdict="allow"), "the gate carried it")


def test_private_addresses_metadata_and_denied_names_are_never_opened(lab: Opened, gate: Placed) -> None:
    for name in ("inside.example", "meta.example", "evil.example"):
        lab.ask(name)
    assert lab.opened() == set()


def test_a_client_that_connects_the_instant_its_answer_comes_is_never_refused(lab: Opened) -> None:
    """Two hundred first lookups, each of another address. It prints how long they took with and without the kernel."""
    count = 200
    names = [f"n{number}.example" for number in range(count)]
    net = "93.184.217"
    lab.net.address("origin", "lo", f"{net}.0/24")
    rules = "\n".join(f"      - tcp: {name}:22" for name in names)
    lab.policy(f"version: 1\nworkloads:\n  app:\n    match: {{address: [{WORK4}/32]}}\n    rules:\n{rules}\n")
    lab.apply("gateway", *RULES)
    hosts = [word for number, name in enumerate(names) for word in ("--host", f"{name}={net}.{number}")]
    with lab.gate(*hosts, workers=2) as placed:
        lab.ready(placed)
        lab.origin.look()
        first, again = [], []
        for number, name in enumerate(names):
            started = time.perf_counter()
            [address] = lab.ask(name).addresses
            first.append(time.perf_counter() - started)
            with lab.connect("one", str(address), 22) as sock:
                assert sock.recv(100) == BANNER
            started = time.perf_counter()
            lab.ask(names[0])
            again.append(time.perf_counter() - started)
            assert str(address) == f"{net}.{number}"
        assert set(lab.origin.look().packets) == {f"tcp {net}.{number}:22" for number in range(count)}
        eventually(lambda: len(placed.records(stage="dns")) == 2 * count, "every lookup is recorded")
        assert placed.records(stage="tcp") == []
        eventually(lambda: lab.metric(placed, 'outgate_openings_total{outcome="opened"}') >= count, "all are counted")
    print(f"median first {sorted(first)[count // 2] * 1e3:.2f} ms, again {sorted(again)[count // 2] * 1e3:.2f} ms")


# --- closing ---


@FAMILIES
def test_a_reload_that_revokes_cuts_what_was_opened(
    lab: Opened, gate: Placed, to: str, kind: int, source: str, address: str
) -> None:
    lab.ask("git.example", kind=kind, to=to)
    near = lab.datagrams("one", source, 0)
    with lab.connect("one", address, 22) as sock, lab.datagrams("origin", address, 9000) as far, near:
        assert sock.recv(100) == BANNER
        near.sendto(b"x", (address, 9000))
        _, peer = far.recvfrom(100)
        assert not is_cut(sock)
        judged_by(gate, lab, REVOKED)
        assert lab.opened() == set()
        assert is_cut(sock)
        far.sendto(b"late", peer)  # nor does the far side reach the workload any more
        near.settimeout(0.3)
        with pytest.raises((TimeoutError, ConnectionRefusedError)):
            near.recv(100)
        assert lab.refusal_of_udp("one", address, 9000) in PROHIBITED
    assert [line for line in lab.conntrack("-L", "-p", "tcp", "--dport", "22") if "ESTABLISHED" in line] == []
    assert is_refused(lab, "one", address)


def test_a_reload_that_still_admits_it_cuts_nothing(lab: Opened, gate: Placed) -> None:
    """Also where the opening has ended with its time meanwhile."""
    lab.ask("git.example")
    with lab.connect("one", ORIGIN4, 22) as sock:
        assert sock.recv(100) == BANNER
        lab.nft("gateway").run("flush set inet outgate allowed4")  # as it is when their time is over
        judged_by(gate, lab, OTHERWISE)
        assert not is_cut(sock)
        judged_by(gate, lab, REVOKED)
        assert is_cut(sock)


@pytest.mark.parametrize("masquerade", ["--masquerade", "--no-masquerade"])
def test_a_revoked_flow_stays_cut_when_its_server_speaks_first(lab: Opened, masquerade: str) -> None:
    """The kernel takes a segment of a connection that it does not know for the first of one, whoever sends it."""
    with serving(lab, masquerade, "--inbound") as gate, lab.listener("origin", ORIGIN4, 2222) as door:
        lab.ask("git.example")
        with lab.connect("one", ORIGIN4, 2222) as sock, door.accept()[0] as met:
            sock.settimeout(0.5)
            met.settimeout(WAIT_S)
            met.sendall(b"hello")
            assert sock.recv(100) == b"hello"
            judged_by(gate, lab, REVOKED)
            lab.origin.look()
            met.sendall(b"after")
            with pytest.raises(GONE):
                sock.recv(100)
            assert is_cut(sock)
            with pytest.raises(ConnectionResetError):
                met.recv(100)


def test_what_a_worker_opened_that_is_gone_is_revoked_too(lab: Opened, gate: Placed) -> None:
    lab.ask("git.example")
    with lab.connect("one", ORIGIN4, 22) as sock:
        assert sock.recv(100) == BANNER
        [pid] = children(serving_pid(gate), "proxy.worker.main")
        signal_to(pid, signal.SIGKILL)
        gate.hears("worker 1 was ended by SIGKILL")
        assert lab.opened() == all_of_git(WORK4, ORIGIN4)
        judged_by(gate, lab, REVOKED)
        assert lab.opened() == set()
        assert is_cut(sock)


def serving_pid(gate: Placed) -> int:
    """`ip netns exec` becomes the gate."""
    return gate.process.pid


def test_a_gate_that_starts_closes_and_cuts_what_an_earlier_one_opened(lab: Opened) -> None:
    with serving(lab):
        lab.ask("git.example")
        sock = lab.connect("one", ORIGIN4, 22)
    with sock:
        assert lab.opened() == set()  # closed as the first one ended
        assert sock.recv(100) == BANNER
        assert not is_cut(sock)  # what is established goes on
        nft = lab.nft("gateway")
        open_for_work(nft, ORIGIN4, "tcp", 22, 600)
        lab_reapplied_keeps(lab)
        with lab.gate() as second:
            lab.ready(second)
            assert lab.opened() == set()
            assert is_cut(sock)
        nft.close()


def lab_reapplied_keeps(lab: Opened) -> None:
    lab.apply("gateway", *RULES)
    assert lab.opened() == {element(WORK4, ORIGIN4, "tcp", 22)}


# --- faults ---


def opener_of(gate: Placed) -> int | None:
    return next(iter(children(serving_pid(gate), "proxy.opener.main")), None)


def test_an_opener_that_is_killed_is_replaced_and_leaves_nothing_open(lab: Opened, gate: Placed) -> None:
    lab.ask("git.example")
    with lab.connect("one", ORIGIN4, 22) as sock:
        assert sock.recv(100) == BANNER
        because: list[str] = []
        for _ in range(5):  # each time the pause is longer
            pid = eventually(lambda: opener_of(gate), "there is an opener")
            signal_to(pid, signal.SIGKILL)
            eventually(lambda pid=pid: opener_of(gate) != pid, "it is gone")  # type: ignore[misc]  # bound at once
            because += lab.readiness(gate)[1]
        assert any("openings cannot be made: the opener is not running" in why for why in because)
        lab.ready(gate)
        assert lab.opened() == set()
        assert is_cut(sock)
    lab.ask("git.example")
    assert lab.opened() == all_of_git(WORK4, ORIGIN4)
    assert lab.metric(gate, "outgate_opener_restarts_total") == 5


def test_an_answer_does_not_wait_for_an_opener_that_hangs(lab: Opened, gate: Placed) -> None:
    pid = eventually(lambda: opener_of(gate), "there is an opener")
    signal_to(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert lab.ask("git.example").addresses == addresses(ORIGIN4)
        assert time.monotonic() - started >= 1.0
        with lab.connect("one", ORIGIN4, 22) as sock:  # the gate carries it
            assert sock.recv(100) == BANNER
        eventually(lambda: lab.metric(gate, 'outgate_openings_total{outcome="late"}') == 1, "it is counted")
    finally:
        signal_to(pid, signal.SIGCONT)


def test_a_table_that_is_removed_is_told_and_one_that_comes_back_is_used(lab: Opened, gate: Placed) -> None:
    lab.ask("git.example")
    lab.firewall("gateway", "remove")
    because = eventually(lambda: lab.readiness(gate)[1], "it is not ready")
    assert because == ["openings cannot be made: none of our rules is in force: outgate firewall apply loads them"]
    lab.apply("gateway", *RULES)
    lab.ready(gate)
    assert lab.opened() == all_of_git(WORK4, ORIGIN4)  # for the time they have left


def test_an_apply_under_way_loses_no_opening_and_brings_none_back(lab: Opened, gate: Placed) -> None:
    """As if one had been added, and another revoked, in the very moment in which the table was replaced."""
    lab.ask("git.example")
    nft = lab.nft("gateway")
    nft.run("flush set inet outgate allowed4")
    open_for_work(nft, ORIGIN4, "tcp", 5432, 600)
    lab.apply("gateway", *RULES)
    eventually(lambda: lab.opened() == all_of_git(WORK4, ORIGIN4), "it is as the opener has it")
    nft.close()


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ([], "none of our rules is in force: outgate firewall apply loads them"),
        (["--mode", "sidecar", "--upstream-device", "br0", "--upstream-device", "out", "--upstream-device", "one",
          "--upstream-device", "two"], "the rules in force are a sidecar's"),
    ],
    ids=["none", "sidecar"],
)  # fmt: skip
def test_a_gate_that_can_open_nothing_does_not_start(lab: Opened, rules: list[str], why: str) -> None:
    lab.firewall("gateway", "remove")
    if rules:
        lab.apply("gateway", *rules)
    with pytest.raises(AssertionError, match="ended") as ended, lab.gate():
        pass
    lab.firewall("gateway", "remove")
    assert why in str(ended.value)


def test_without_the_capability_a_gate_does_not_start(lab: Opened) -> None:
    lab.apply("gateway", *RULES)
    command = [
        "setpriv", "--bounding-set", "-net_admin", str(OUTGATE), "serve", "--openings", "true",
        "--listen", f"[::]:{GATE_PORT}", "--dns-listen", f"[::]:{DNS_PORT}", "-p", "policy.yaml", "--admin", "none",
    ]  # fmt: skip
    done = subprocess.run(
        lab.net.inside("gateway", command), cwd=lab.directory, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert done.stderr.count("openings cannot be made: needs CAP_NET_ADMIN") == 1
