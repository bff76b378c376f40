"""Attacks on the kernel's part of a gateway: packets by hand, races with a reload, parts that are killed or stopped.

A workload here has every capability on its own machine: a gateway does not depend on what it may do to its packets.
"""

from __future__ import annotations

import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.end_to_end.firewalled import NEAR4, ORIGIN4, PROHIBITED, WORK4, ipv4
from tests.end_to_end.opened import POLICY, RULES, SECOND4, Opened, two_workloads
from tests.end_to_end.origin import BANNER
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import WAIT_S, eventually, signal_to
from tests.end_to_end.test_openings import (
    GONE,
    REVOKED,
    all_of_git,
    is_cut,
    is_refused,
    judged_by,
    opener_of,
    serving_pid,
)
from tests.end_to_end.test_udp_serve import closed_to_nft
from tests.proxy.dns_gate import addresses, question
from tests.proxy.kernel_rules import NEEDS_ROOT

pytestmark = [
    *NEEDS_ROOT,
    pytest.mark.skipif(shutil.which("conntrack") is None, reason="conntrack is not installed"),
]
UDP_PORT = 15006
THIRD = "203.0.113.9"  # somebody on the far side whom no rule names
SECRET = b"what must not get out"
ETH_P_ALL = 0x0003


@pytest.fixture(scope="module")
def lab() -> Iterator[Opened]:
    with two_workloads() as made:
        closed_to_nft(made)
        yield made


@contextmanager
def serving(lab: Opened) -> Iterator[Placed]:
    lab.policy(POLICY)
    lab.apply("gateway", *RULES, "--udp-port", str(UDP_PORT))
    with lab.gate("--udp-listen", f"[::]:{UDP_PORT}") as placed:
        lab.ready(placed)
        lab.origin.look()
        yield placed
        placed.send(signal.SIGTERM)
        placed.ends()


@pytest.fixture
def gate(lab: Opened) -> Iterator[Placed]:
    with serving(lab) as placed:
        yield placed


class Wire:
    """All that comes over the wire to the origin, as its own kernel shows it to nobody."""

    def __init__(self, lab: Opened) -> None:
        self._sock = lab.net.open_socket("origin", socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self._sock.bind(("wire", ETH_P_ALL))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._lab = lab

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def came(self) -> list[bytes]:
        """Packets that came in by now: the gateway's own ping is the last of them."""
        marker = b"that was all %d" % time.monotonic_ns()
        with self._lab.net.open_socket("gateway", socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(marker, ("10.77.2.2", 9))
        found: list[bytes] = []
        self._sock.settimeout(WAIT_S)
        while True:
            packet, (_, _, kind, *_) = self._sock.recvfrom(65535)
            if marker in packet:
                return found
            if kind != socket.PACKET_OUTGOING:
                found.append(packet)


def send(lab: Opened, machine: str, *packets: bytes) -> None:
    """Whole IPv4 packets, whatever stands in them."""
    with lab.net.open_socket(machine, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for packet in packets:
            try:
                raw.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
            except OSError:  # the workload's own kernel refuses it
                continue


def refused(lab: Opened) -> int:
    return sum(lab.counted("gateway", counter) for counter in ("refused", "invalid", "never_reached", "spoofed"))


def datagram(source: int, port: int, body: bytes, *, size: int | None = None) -> bytes:
    return struct.pack("!HHHH", source, port, 8 + len(body) if size is None else size, 0) + body


def icmp(kind: int, code: int, body: bytes, rest: int = 0) -> bytes:
    head = struct.pack("!BBHI", kind, code, 0, rest) + body
    total = sum(struct.unpack(f"!{len(head + b'0') // 2}H", head.ljust(len(head) + len(head) % 2, b"\0")))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:2] + struct.pack("!H", ~total & 0xFFFF) + head[4:]


# --- packets by hand


def test_an_icmp_error_about_an_opened_flow_carries_nothing_to_anybody_else(lab: Opened, gate: Placed) -> None:
    """The kernel takes it for a part of that flow, by what it quotes; where it goes stands outside."""
    lab.ask("git.example")
    with lab.datagrams("one", WORK4, 40001) as near, lab.datagrams("origin", ORIGIN4, 9000) as far, Wire(lab) as wire:
        near.sendto(b"question", (ORIGIN4, 9000))
        _, peer = far.recvfrom(100)
        far.sendto(b"answer", peer)
        assert near.recv(100) == b"answer"
        before = refused(lab)
        quoted = ipv4(ORIGIN4, WORK4, 17, datagram(9000, 40001, SECRET))
        sent = ipv4(WORK4, ORIGIN4, 17, datagram(40001, 9000, SECRET))
        for body in (quoted, sent):
            for kind, code in ((3, 1), (3, 4), (11, 0), (12, 0), (5, 1)):
                send(lab, "one", ipv4(WORK4, THIRD, 1, icmp(kind, code, body + SECRET)))
                send(lab, "one", ipv4(ORIGIN4, THIRD, 1, icmp(kind, code, body + SECRET)))
        left = [packet for packet in wire.came() if SECRET in packet]
    assert [socket.inet_ntoa(packet[16:20]) for packet in left] == []
    assert refused(lab) > before


SOURCES = (WORK4, SECOND4, NEAR4, ORIGIN4, "255.255.255.255", "127.0.0.1", "0.0.0.0", "224.0.0.1")
TARGETS = (THIRD, ORIGIN4, NEAR4, "255.255.255.255", "10.77.1.255", "224.0.0.251", "127.0.0.1", "169.254.169.254")


def test_no_packet_by_hand_gets_out_or_disturbs_the_gate(lab: Opened, gate: Placed) -> None:
    """Sources that are nobody's, ports that do not exist, lengths that lie, fragments, protocols without ports."""
    lab.ask("git.example")
    bodies = [
        (17, datagram(0, 9001, SECRET)),
        (17, datagram(40002, 0, SECRET)),
        (17, datagram(40002, 9001, SECRET, size=4)),
        (17, datagram(40002, 9001, SECRET, size=65535)),
        (17, datagram(40002, 53, SECRET)),
        (17, datagram(0, 53, question("git.example") + SECRET)),
        (17, datagram(40002, UDP_PORT, SECRET)),
        (6, struct.pack("!HHIIBBHHH", 40003, 22, 1, 1, 5 << 4, 0x10, 1024, 0, 0) + SECRET),
        (6, struct.pack("!HHIIBBHHH", 40003, 9999, 1, 0, 5 << 4, 0x02, 1024, 0, 0) + SECRET),
        (132, struct.pack("!HHI", 40002, 9000, 0) + SECRET),
        (136, datagram(40002, 9000, SECRET)),
        (47, bytes(4) + SECRET),
        (4, ipv4(WORK4, THIRD, 17, datagram(1, 2, SECRET))),
        (41, bytes(40) + SECRET),
        (1, icmp(8, 0, SECRET)),
        (255, SECRET),
    ]
    before = refused(lab)
    with Wire(lab) as wire:
        for source in SOURCES:
            for target in TARGETS:
                packets = [ipv4(source, target, protocol, body) for protocol, body in bodies]
                fragments = [one[:6] + b"\x20\x00" + one[8:] for one in packets]  # more are said to follow
                send(lab, "one", *packets, *fragments)
        left = {
            (socket.inet_ntoa(one[12:16]), socket.inet_ntoa(one[16:20]), one[9]) for one in wire.came() if SECRET in one
        }
    assert left == set()
    assert refused(lab) > before + 100  # they came as far as our rules
    assert lab.ask("git.example").addresses == addresses(ORIGIN4)
    assert lab.readiness(gate) == (200, [])
    assert not [line for line in gate.said if "fault" in line.lower() or "traceback" in line.lower()]


def test_a_lookup_under_anothers_address_opens_nothing_beyond_that_ones_rules(lab: Opened, gate: Placed) -> None:
    """Each forges the other's source. What is opened is for the address that was shown, by its own rules."""
    lab.nft("gateway").run("flush set inet outgate allowed4")
    send(lab, "one", ipv4(SECOND4, NEAR4, 17, datagram(40004, 53, question("git.example"))))
    eventually(lambda: [one for one in gate.records(stage="dns") if one["source.address"] == SECOND4], "it is judged")
    assert {one for one in lab.opened() if one[0] == SECOND4} == set()
    send(lab, "two", ipv4(WORK4, NEAR4, 17, datagram(40005, 53, question("git.example"))))
    assert is_refused(lab, "two", ORIGIN4)


def test_a_flow_that_began_before_its_lookup_was_opened_goes_on(lab: Opened, gate: Placed) -> None:
    """A program that tries again from the same port: nothing of the first, which was denied, may stand in its way."""
    with lab.datagrams("origin", ORIGIN4, 9000) as far, lab.datagrams("one", WORK4, 40021) as near:
        near.sendto(b"early", (ORIGIN4, 9000))
        eventually(lambda: gate.records(stage="udp", verdict="deny"), "it is denied")
        lab.ask("git.example")
        assert lab.opened() == all_of_git(WORK4, ORIGIN4)
        near.sendto(b"late", (ORIGIN4, 9000))
        message, peer = far.recvfrom(100)
        assert message == b"late"
        far.sendto(b"answer", peer)
        assert near.recv(100) == b"answer"


# --- races with a reload


def test_a_flow_that_never_pauses_does_not_outlive_its_rule(lab: Opened, gate: Placed) -> None:
    """Both ends send without end while the right is taken away, and the workload begins new flows all the time."""
    stop = threading.Event()
    lab.ask("git.example")
    with lab.datagrams("origin", ORIGIN4, 9000) as far, lab.datagrams("one", WORK4, 40010) as near:
        far.settimeout(0.05)

        def attack() -> None:
            while not stop.is_set():
                _try(near, (ORIGIN4, 9000), SECRET)
                with lab.net.open_socket("one", socket.AF_INET, socket.SOCK_DGRAM) as fresh:
                    _try(fresh, (ORIGIN4, 9000), SECRET)

        def answer() -> None:
            peers: dict[tuple[str, int], None] = {}
            while not stop.is_set():
                try:
                    peers[far.recvfrom(100)[1]] = None
                except OSError:
                    pass
                for peer in list(peers)[-3:]:
                    _try(far, peer, b"come back")

        threads = [threading.Thread(target=one) for one in (attack, answer)]
        for thread in threads:
            thread.start()
        try:
            with Wire(lab) as wire:
                eventually(lambda: [one for one in wire.came() if SECRET in one], "it flows")
            for policy in (REVOKED, POLICY, REVOKED):
                judged_by(gate, lab, policy)
                lab.ask("git.example")
            time.sleep(2.5)  # the sweeps that follow a review are over
            with Wire(lab) as wire:
                time.sleep(0.3)
                left = [one for one in wire.came() if SECRET in one]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert left == []


def _try(sock: socket.socket, to: tuple[str, int], message: bytes) -> None:
    try:
        sock.sendto(message, to)
    except OSError:
        pass


def test_the_ports_of_a_connection_that_was_cut_are_no_way_back(lab: Opened, gate: Placed) -> None:
    """The same addresses and ports once more: the kernel must not take the new one for the old one."""
    lab.ask("git.example")
    first = lab.connect("one", ORIGIN4, 22)
    assert first.recv(100) == BANNER
    port = first.getsockname()[1]
    judged_by(gate, lab, REVOKED)
    assert is_cut(first)
    first.close()
    with Wire(lab) as wire:
        with lab.net.open_socket("one", socket.AF_INET, socket.SOCK_STREAM) as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.settimeout(WAIT_S)
            again.bind((WORK4, port))
            try:
                again.connect((ORIGIN4, 22))
                assert is_cut(again)
            except GONE:
                pass
        left = [one for one in wire.came() if one[9] == 6 and one[20:22] == port.to_bytes(2) and one[33] & 2]
    assert left == []


# --- parts that are killed or stopped


def test_a_gate_that_is_killed_leaves_nothing_open(lab: Opened) -> None:
    """All of it at once but the opener, which is stopped in that moment and goes on later."""
    with serving(lab) as mortal:
        lab.ask("git.example")
        assert lab.opened() == all_of_git(WORK4, ORIGIN4)
        pid = opener_of(mortal)
        assert pid
        signal_to(pid, signal.SIGSTOP)
        signal_to(serving_pid(mortal), signal.SIGKILL)
        mortal.ends()
        signal_to(pid, signal.SIGCONT)
        eventually(lambda: lab.opened() == set(), "it is closed")
    assert lab.refusal_of_udp("one", ORIGIN4, 9000) in PROHIBITED


def test_an_opener_that_is_stopped_is_said(lab: Opened) -> None:
    with serving(lab) as patient:
        lab.ask("git.example")
        pid = opener_of(patient)
        assert pid
        signal_to(pid, signal.SIGSTOP)
        eventually(lambda: lab.readiness(patient)[0] == 503, "it is said")
        signal_to(pid, signal.SIGCONT)
        lab.ready(patient)
