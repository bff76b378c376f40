"""Machines around rules of `outgate firewall`, and what workloads try there. What must come of it, the tests say."""

from __future__ import annotations

import errno
import re
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path

from proxy.elements import Element, Transport, close_text, open_text
from proxy.firewall import apply
from proxy.layout import read_words
from proxy.nft import Library, Nft
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import Origin, origin
from tests.end_to_end.world import OUTGATE
from tests.proxy.kernel_rules import everything

ORIGIN4, ORIGIN6 = "93.184.216.34", "2606:2800:220:1::34"
WORK4, WORK6, NEAR4, NEAR6 = "10.77.1.2", "fd77:1::2", "10.77.1.1", "fd77:1::1"
OTHER4 = "10.78.0.2"
OUT4, OUT6, FAR4, FAR6 = "10.77.2.1", "fd77:2::1", "10.77.2.2", "fd77:2::2"
GATE_PORT, GATE_UID = 15001, 1337
WAIT_S = 20.0  # generous: others load the machine
IP_TRANSPARENT, IPV6_TRANSPARENT, IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR = 19, 75, 20, 74  # linux/in.h, in6.h
SO_MARK, PACKET_QDISC_BYPASS, SOL_PACKET = 36, 20, 263
REFUSED = {errno.ECONNREFUSED}
PROHIBITED = {errno.EHOSTUNREACH, errno.EACCES, errno.EPERM}  # ICMP's or ICMPv6's "administratively prohibited"


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Lab:
    """Machines, and an origin behind a wire on which every packet is seen."""

    def __init__(self, net: Namespaces, seen_from: str, directory: Path, stack: ExitStack) -> None:
        self.net = net
        self.origin: Origin = stack.enter_context(origin(net, directory, marker_from=seen_from))

    def firewall(self, machine: str, *words: str) -> subprocess.CompletedProcess[str]:
        line = self.net.inside(machine, [str(OUTGATE), "firewall", *words])
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, 1), done.stderr
        return done

    def apply(self, machine: str, *words: str) -> None:
        """`outgate firewall apply` in this process, which is soon done."""
        layout = read_words(re.split(" (?=--)", " ".join(words)))
        self.net.made_there(machine, lambda: apply(Library(), layout, since=""))

    def nft(self, machine: str) -> Library:
        return self.net.made_there(machine, Library)

    def listed(self, machine: str) -> str:
        """Every rule and route of that machine."""
        return self.net.made_there(machine, everything)

    def counted(self, machine: str, counter: str) -> int:
        """Packets, since the rules were loaded."""
        listed = self.nft(machine).run(f"list counter inet outgate {counter}")
        return int(listed.split("packets ")[1].split()[0])

    # --- what a workload tries ---

    def connect(self, machine: str, address: str, port: int) -> socket.socket:
        """A TCP connection. Raises OSError."""
        sock = self.net.open_socket(machine, family_of(address), socket.SOCK_STREAM)
        sock.settimeout(WAIT_S)
        try:
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def refusal_of_tcp(self, machine: str, address: str, port: int) -> int:
        """The error of a connection that is refused at once."""
        try:
            self.connect(machine, address, port).close()
        except OSError as error:
            return error.errno or 0
        return 0

    def listener(self, machine: str, address: str, port: int) -> socket.socket:
        """A TCP listener there, in the place of the gate."""
        sock = self.net.open_socket(machine, family_of(address), socket.SOCK_STREAM)
        sock.settimeout(WAIT_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen()
        return sock

    def datagrams(self, machine: str, address: str, port: int) -> socket.socket:
        """A UDP socket there."""
        sock = self.net.open_socket(machine, family_of(address), socket.SOCK_DGRAM)
        sock.settimeout(WAIT_S)
        sock.bind((address, port))
        return sock

    def refusal_of_udp(self, machine: str, address: str, port: int) -> int:
        """The error of a datagram that is refused; 0 for one that nobody answers."""
        end = time.monotonic() + WAIT_S
        with self.net.open_socket(machine, family_of(address), socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.2)
            sock.connect((address, port))
            while time.monotonic() < end:  # again: the kernel sends six ICMP errors at once, then one a second
                try:
                    sock.send(b"x")
                    sock.recv(1)
                except TimeoutError:
                    continue
                except OSError as error:
                    return error.errno or 0
        return 0


@contextmanager
def a_gateway(*, one_armed: bool = False) -> Iterator[Lab]:
    """`work` behind br0 of `gateway`, which would forward it to `origin`, behind `out`; one-armed: behind br0 too.

    `other` is routed there as well, and is nobody's workload.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-firewall-")))
        net = stack.enter_context(machines("work", "other", "gateway", "origin"))
        net.ip("gateway", "link", "add", "br0", "type", "bridge")
        net.ip("gateway", "link", "set", "br0", "up")
        net.link("gateway", "work", "work", "eth0")
        net.ip("gateway", "link", "set", "work", "master", "br0")
        net.link("gateway", "out", "origin", "wire")
        if one_armed:
            net.ip("gateway", "link", "set", "out", "master", "br0")
            net.run("gateway", ["sysctl", "-qw", "net.ipv4.conf.all.send_redirects=0"])
            net.run("gateway", ["sysctl", "-qw", "net.ipv4.conf.br0.send_redirects=0"])
        net.link("gateway", "other", "other", "eth0")
        net.address("gateway", "other", "10.78.0.1/24")
        net.address("other", "eth0", f"{OTHER4}/24")
        net.default("other", "10.78.0.1")
        net.address("gateway", "br0", f"{NEAR4}/24", f"{NEAR6}/64")
        net.address("work", "eth0", f"{WORK4}/24", f"{WORK6}/64")
        net.default("work", NEAR4, NEAR6)
        far_side(net, "gateway", "br0" if one_armed else "out")
        yield Lab(net, "gateway", directory, stack)


@contextmanager
def a_pod() -> Iterator[Lab]:
    """`pod` behind `router`, which forwards whatever it sends."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-firewall-")))
        net = stack.enter_context(machines("pod", "router", "origin"))
        net.link("router", "in", "pod", "eth0")
        net.link("router", "out", "origin", "wire")
        net.address("router", "in", f"{NEAR4}/24", f"{NEAR6}/64")
        net.address("pod", "eth0", f"{WORK4}/24", f"{WORK6}/64")
        net.default("pod", NEAR4, NEAR6)
        net.forward("pod")  # as in a container, which inherits it
        far_side(net, "router", "out")
        yield Lab(net, "router", directory, stack)


def far_side(net: Namespaces, router: str, device: str) -> None:
    net.address(router, device, f"{OUT4}/24", f"{OUT6}/64")
    net.address("origin", "wire", f"{FAR4}/24", f"{FAR6}/64")
    net.address("origin", "lo", f"{ORIGIN4}/32", f"{ORIGIN6}/128")
    net.default("origin", OUT4, OUT6)
    net.default(router, FAR4, FAR6)
    net.forward(router)


def open_for_work(nft: Nft, address: str, protocol: Transport, port: int, time_s: float) -> None:
    """Let `work` past the gate to this."""
    nft.run(open_text({_of_work(address, protocol, port): time_s}))


def close_for_work(nft: Nft, address: str, protocol: Transport, port: int) -> None:
    nft.run(close_text([_of_work(address, protocol, port)]))


def _of_work(address: str, protocol: Transport, port: int) -> Element:
    return Element(ip_address(WORK6 if ":" in address else WORK4), ip_address(address), protocol, port)


def ipv4(source: str, target: str, protocol: int, body: bytes) -> bytes:
    """A whole packet with its checksum."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0) + ends
    total = sum(struct.unpack("!10H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:] + body


def udp(port: int, body: bytes = b"x") -> bytes:
    return struct.pack("!HHHH", 40000, port, 8 + len(body), 0) + body


def mac_of(lab: Lab, machine: str, device: str) -> bytes:
    listed = subprocess.run(
        lab.net.inside(machine, ["cat", f"/sys/class/net/{device}/address"]), capture_output=True, text=True, check=True
    )
    return bytes.fromhex(listed.stdout.strip().replace(":", ""))
