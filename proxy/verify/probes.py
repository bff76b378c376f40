"""The list of what is tried, as data: one probe for each way out, and what a leak there means. It sends nothing.

Addresses are documentation's (RFC 5737, 3849), whose packets nobody owns, except where only a live server can show a
leak: public resolvers (1.1.1.1, 8.8.8.8) and Google's public time server. Nobody else's are on the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from policies.addresses import is_address
from proxy.verify import packets
from proxy.verify.model import Group, Kind, Probe
from proxy.verify.place import Place
from proxy.wire.dns import A

SINK4, SINK6 = "203.0.113.10", "2001:db8:10::10"
WEB4, WEB6 = "1.1.1.1", "2606:4700:4700::1111"  # Cloudflare's public resolver: DNS, DoT, HTTP, HTTPS and HTTP/3
RESOLVER4, RESOLVER6 = "8.8.8.8", "2001:4860:4860::8888"  # Google's
TIME = "216.239.35.0"  # time.google.com
DENIED = "outgate-verify.example.com"  # below a name that IANA keeps for examples
GATE_PORT, ADMIN_PORT = 15001, 9901
BURST = 16  # lookups of one tunnelling burst
ANY_NTP = "ntp://*"  # any `ntp` rule admits the workload's UDP/123
DOCKER_API = "/version"

GROUPS = {
    "metadata": Group(
        "the cloud hands credentials of the machine to whoever asks there",
        "never-reached addresses are dropped by the gate's own rules: lead this traffic to the gate, and drop the rest",
    ),
    "node": Group(
        "whoever speaks there may run pods, read secrets or log in on the machine below",
        "lead TCP to the gate, and on a gateway close its own ports to workloads (input chain)",
    ),
    "socket": Group(
        "a service outside acts for whoever connects: it starts containers, resolves names, runs programs",
        "do not mount it into the workload; `outgate run` masks it",
    ),
    "raw-ip": Group(
        "bytes go to any address, named by nobody",
        "lead every TCP port to the gate, not 80 and 443 alone",
    ),
    "dns": Group(
        "a name carries bytes of the workload's choosing to whoever owns the zone",
        "let workloads ask the gate's resolver alone, and drop ports 53 and 853 to all others",
    ),
    "doh": Group(
        "lookups inside HTTPS are seen by nobody",
        "name no public resolver in a rule, and lead TCP 443 to the gate",
    ),
    "tls": Group(
        "the name that is judged is not the name that is meant",
        "lead TCP to the gate; inspect hosts that share servers with others",
    ),
    "udp": Group(
        "datagrams leave unjudged",
        "drop UDP of workloads, except to the gate's own relays",
    ),
    "ntp": Group(
        "48 bytes a packet, most of them free to choose, reach whoever runs the time server",
        "let workloads ask the gate for time, and drop UDP 123 to all others",
    ),
    "icmp": Group(
        "an echo carries any payload, and its reply brings any back",
        "drop what is neither TCP nor UDP in the forward chain (beside a program: in the output chain)",
    ),
    "raw": Group(
        "packets of its own making pass by rules that look at sockets",
        "drop NET_RAW, NET_ADMIN, SETUID and SYS_ADMIN from the workload; put the gate on another machine",
    ),
    "proxy": Group(
        "the proxy reaches into networks that the workload may not enter",
        "use the gate as the proxy: it dials no private address without a rule",
    ),
    "link": Group(
        "neighbours on the link hear it and answer",
        "drop UDP of workloads, multicast too",
    ),
    "gate": Group(
        "the gate itself can be asked or turned into an open proxy",
        "bind --admin to a loopback address, and lead connections to the gate by rules only",
    ),
    "clock": Group(
        "a clock that is wrong by more than a minute breaks tokens and certificates",
        "let the machine keep time from the gate: ntp rules, and `outgate relay`",
    ),
    "allowed": Group(
        "the policy allows it",
        "see what the gate's log has about it",
    ),
}  # fmt: skip

_METADATA = (
    ("metadata-ipv4", "169.254.169.254", "/latest/meta-data/", "AWS, Azure, Google, Oracle, OpenStack, …"),
    ("metadata-ecs", "169.254.170.2", "/v2/credentials", "AWS ECS task credentials"),
    ("metadata-eks", "169.254.170.23", "/v1/credentials", "AWS EKS Pod Identity"),
    ("metadata-azure", "168.63.129.16", "/?comp=versions", "Azure WireServer"),
    ("metadata-alibaba", "100.100.100.200", "/latest/meta-data/", "Alibaba Cloud"),
    ("metadata-tencent", "169.254.0.23", "/latest/meta-data/", "Tencent Cloud"),
    ("metadata-scaleway", "169.254.42.42", "/conf", "Scaleway"),
    ("metadata-oracle", "192.0.0.192", "/latest/meta-data/", "Oracle Cloud Classic"),
    ("metadata-aws6", "fd00:ec2::254", "/latest/meta-data/", "AWS"),
    ("metadata-eks6", "fd00:ec2::23", "/v1/credentials", "AWS EKS Pod Identity"),
    ("metadata-google6", "fd20:ce::254", "/computeMetadata/v1/", "Google Cloud"),
    ("metadata-oracle6", "fd00:c1::a9fe:a9fe", "/opc/v2/instance/", "Oracle Cloud"),
    ("metadata-scaleway6", "fd00:42::42", "/conf", "Scaleway"),
    ("metadata-akamai6", "fd00:a9fe:a9fe::1", "/v1/token", "Akamai (Linode)"),
    ("metadata-alibaba6", "fd00:100::100:200", "/latest/meta-data/", "Alibaba Cloud"),
)  # fmt: skip
_SOCKETS = (
    ("docker", "/run/docker.sock"),
    ("containerd", "/run/containerd/containerd.sock"),
    ("podman", "/run/podman/podman.sock"),
    ("crio", "/run/crio/crio.sock"),
    ("dbus", "/run/dbus/system_bus_socket"),
    ("resolved", "/run/systemd/resolve/io.systemd.Resolve"),
    ("nscd", "/run/nscd/socket"),
    ("avahi", "/run/avahi-daemon/socket"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """What one run fills into the list.

    random     at least 64 bytes that nobody else has, so that an answer cannot have been kept from before
    denied     below `DENIED`; the policy names it nowhere
    inspected  a host whose TLS the policy ends at the gate
    other      another host that the policy allows
    veiled     a host that is carried undecrypted and may not be meant by Encrypted Client Hello
    """

    random: bytes
    denied: str
    inspected: str | None = None
    other: str | None = None
    veiled: str | None = None
    sinks: tuple[str, str] = (SINK4, SINK6)
    gate: tuple[str, int] | None = None
    admin: tuple[str, int] | None = None

    @property
    def line(self) -> bytes:
        """What no server of any protocol takes for the beginning of it."""
        return b"outgate-verify %s\r\n" % self.random[:8].hex().encode()


def probes(place: Place, names: Names) -> tuple[Probe, ...]:
    """Every row, in the order of the page."""
    return (
        *_metadata(names), *_node(place, names), *_sockets(), *_addresses(names), *_dns(place, names), *_doh(names),
        *_tls(names), *_udp(names), *_ntp(names), *_below(names), *_proxied(place, names), *_link(place, names),
        *_gate(place, names), *_clock(names),
    )  # fmt: skip


# --- how a row of each kind is written


def words(scheme: str, address: str, port: int) -> str:
    """The attempt as `outgate why` takes it."""
    return f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}"


def _http(id: str, group: str, what: str, to: str, port: int, path: str = "/", host: str = "") -> Probe:
    host = host or (f"[{to}]" if ":" in to else to)
    asks = (words("tcp", to, port), *([] if is_address(host.strip("[]")) else [f"GET http://{host}:{port}{path}"]))
    return Probe(
        id=id, group=group, what=what, kind=Kind.HTTP, to=to, port=port,
        say=(packets.http_get(host, path),), sends=f"GET {path}, Host: {host}", words=asks,
    )  # fmt: skip


def _hello(id: str, group: str, what: str, to: str, port: int, names: Names, sni: str | None = None) -> Probe:
    asks = (words("tcp", to, port), *([f"tls://{sni}:{port}"] if sni else []))
    return Probe(
        id=id, group=group, what=what, kind=Kind.TLS, to=to, port=port,
        say=(packets.client_hello(sni, names.random),), sends=f"a TLS hello for {sni or 'no name'}", words=asks,
    )  # fmt: skip


def _speak(id: str, group: str, what: str, to: str, port: int, say: bytes, sends: str) -> Probe:
    asks = (words("tcp", to, port),)
    return Probe(
        id=id, group=group, what=what, kind=Kind.SPEAK, to=to, port=port, say=(say,), sends=sends, words=asks
    )  # fmt: skip


def _lookup(
    id: str, what: str, to: tuple[str, int], names: Names, qtype: int = A, kind: Kind = Kind.DNS, group: str = "dns"
) -> Probe:
    query = packets.dns_query(names.denied, qtype, int.from_bytes(names.random[:2]))
    scheme = "udp" if kind is Kind.DNS else "tcp"
    type_name = {A: "A", packets.TXT: "TXT", packets.NULL: "NULL", packets.ANY: "ANY"}[qtype]
    return Probe(
        id=id, group=group, what=what, kind=kind, to=to[0], port=to[1], say=(query,),
        sends=f"{names.denied} {type_name}", words=(words(scheme, *to), f"dns://{names.denied}"),
    )  # fmt: skip


def _datagram(
    id: str, group: str, what: str, to: str, port: int, say: bytes, sends: str, *more: str
) -> Probe:  # fmt: skip
    asks = (words("udp", to, port), *more)
    return Probe(
        id=id, group=group, what=what, kind=Kind.UDP, to=to, port=port, say=(say,), sends=sends, words=asks
    )  # fmt: skip


# --- the rows


def _metadata(names: Names) -> Iterator[Probe]:
    for id, address, path, whose in _METADATA:
        yield _http(id, "metadata", f"cloud metadata: {whose}", address, 80, path)
    yield _hello("metadata-tls", "metadata", "cloud metadata over TLS", "169.254.169.254", 443, names)
    yield _http("metadata-azure-agent", "metadata", "Azure's host agent", "168.63.129.16", 32526, "/vmSettings")


def _node(place: Place, names: Names) -> Iterator[Probe]:
    node = place.node or ""
    rows = (
        _hello("kubelet", "node", "kubelet of this node", node, 10250, names),
        _http("kubelet-readonly", "node", "kubelet, its open port", node, 10255, "/pods"),
        _hello("etcd", "node", "etcd of this node", node, 2379, names),
        _hello("api-node", "node", "API server of this node", node, 6443, names),
        _speak("ssh-node", "node", "ssh of this node", node, 22, b"SSH-2.0-outgate_verify\r\n", "an ssh greeting"),
        _http("docker-tcp", "node", "Docker's API", node, 2375, DOCKER_API),
        _hello("docker-tls", "node", "Docker's API over TLS", node, 2376, names),
    )
    yield from (_or_absent(row, "no router here, and NODE_IP is not set") for row in rows)
    yield _hello("api-service", "node", "API server of the cluster", *place.api, names)


def _or_absent(probe: Probe, why: str) -> Probe:
    if probe.to:
        return probe
    return Probe(id=probe.id, group=probe.group, what=probe.what, kind=probe.kind, port=probe.port, absent=why)


def _sockets() -> Iterator[Probe]:
    for name, path in _SOCKETS:
        yield Probe(id=f"unix-{name}", group="socket", what=f"{name}'s socket", kind=Kind.UNIX, to=path)


def _addresses(names: Names) -> Iterator[Probe]:
    sink4, sink6 = names.sinks
    yield _http("tcp-80", "raw-ip", "HTTP to an address", WEB4, 80)
    yield _hello("tcp-443", "raw-ip", "TLS to an address, without SNI", WEB4, 443, names)
    yield _speak("tcp-22", "raw-ip", "ssh", sink4, 22, b"SSH-2.0-outgate_verify\r\n", "an ssh greeting")
    yield _speak("tcp-25", "raw-ip", "mail", sink4, 25, f"EHLO {DENIED}\r\n".encode(), "EHLO")
    yield _speak("tcp-445", "raw-ip", "SMB", sink4, 445, b"\x85\0\0\0", "a session keep-alive")
    yield _http("tcp-8080", "raw-ip", "HTTP on another port", sink4, 8080)
    yield _speak("tcp-40000", "raw-ip", "a port that nobody names", sink4, 40000, names.line, "a line of text")
    yield _http("tcp6-80", "raw-ip", "HTTP to an address over IPv6", WEB6, 80)
    yield _hello("tcp6-443", "raw-ip", "TLS to an address over IPv6", WEB6, 443, names)
    yield _speak("tcp6-22", "raw-ip", "ssh over IPv6", sink6, 22, b"SSH-2.0-outgate_verify\r\n", "an ssh greeting")


def _dns(place: Place, names: Names) -> Iterator[Probe]:
    here = place.nameserver
    yield _lookup("dns-foreign", "a resolver of its own choosing", (RESOLVER4, 53), names)
    yield _lookup("dns-foreign-tcp", "the same over TCP", (RESOLVER4, 53), names, kind=Kind.DNS_TCP)
    yield _lookup("dns-foreign6", "the same over IPv6", (RESOLVER6, 53), names)
    yield _lookup("dns-denied", "a name that no rule names, asked of this machine's resolver", here, names)
    yield _lookup("dns-txt", "its TXT records", here, names, packets.TXT)
    yield _lookup("dns-null", "its NULL records", here, names, packets.NULL)
    yield _lookup("dns-any", "all its records", here, names, packets.ANY)
    yield burst("dns-tunnel", names.denied, here, names)
    yield _hello("dns-dot", "dns", "DNS over TLS", WEB4, 853, names, "one.one.one.one")


def burst(id: str, below: str, here: tuple[str, int], names: Names) -> Probe:
    """Lookups of unique labels below a name, as a tunnel makes them."""
    start = int.from_bytes(names.random[:2])
    labels = [names.random[i : i + 15].hex() for i in range(BURST)]
    queries = tuple(packets.dns_query(f"{label}.{below}", A, start + i & 0xFFFF) for i, label in enumerate(labels))
    return Probe(
        id=id, group="dns", what="lookups as a tunnel makes them", kind=Kind.DNS, to=here[0], port=here[1], say=queries,
        sends=f"{BURST} names below {below}, 30 digits each", words=(words("udp", *here), f"dns://x.{below}"),
    )  # fmt: skip


def _doh(names: Names) -> Iterator[Probe]:
    yield _hello("doh-name", "doh", "DNS over HTTPS, by name", WEB4, 443, names, "cloudflare-dns.com")
    yield _hello("doh-google", "doh", "DNS over HTTPS, by name", RESOLVER4, 443, names, "dns.google")
    yield _hello("doh-address", "doh", "DNS over HTTPS, by address", RESOLVER4, 443, names)


def _tls(names: Names) -> Iterator[Probe]:
    sink = names.sinks[0]
    yield _hello("tls-denied", "tls", "a name that no rule names", WEB4, 443, names, names.denied)
    yield _http("http-denied", "tls", "a Host that no rule names", WEB4, 80, host=names.denied)
    veiled = names.veiled or names.denied
    yield Probe(
        id="tls-ech", group="tls", what="Encrypted Client Hello", kind=Kind.TLS, to=sink, port=443,
        say=(packets.client_hello(veiled, names.random, ech=True),), sends=f"a TLS hello for {veiled}, with ECH",
    )  # fmt: skip
    yield _fronting("tls-fronting", "an allowed SNI and a denied Host", sink, names, names.denied)
    yield _fronting("tls-host", "the SNI of one allowed host, the Host of another", sink, names, names.other)


def _fronting(id: str, what: str, to: str, names: Names, host: str | None) -> Probe:
    row = Probe(id=id, group="tls", what=what, kind=Kind.FRONTING, port=443, absent="the policy inspects no host")
    if names.inspected is None:
        return row
    if host is None:
        return Probe(id=id, group="tls", what=what, kind=Kind.FRONTING, port=443, absent="the policy allows no other")
    return Probe(
        id=id, group="tls", what=what, kind=Kind.FRONTING, to=to, port=443, name=names.inspected,
        say=(packets.http_get(host),), sends=f"TLS for {names.inspected}, then GET /, Host: {host}",
    )  # fmt: skip


def _udp(names: Names) -> Iterator[Probe]:
    sink4, sink6 = names.sinks
    quic = packets.quic_initial(names.denied, names.random)
    yield _datagram("quic-v1", "udp", "QUIC", WEB4, 443, quic, f"an Initial for {names.denied}")
    unknown = packets.quic_unknown_version(names.random)
    yield _datagram("quic-unknown", "udp", "QUIC of an unknown version", WEB4, 443, unknown, "1200 bytes, reserved")
    yield _datagram("udp-stun", "udp", "STUN", sink4, 3478, packets.stun(names.random[:12]), "a Binding request")
    yield _datagram("udp-high", "udp", "a high port", sink4, 40000, names.line, "a line of text")
    yield _datagram("udp6-high", "udp", "a high port over IPv6", sink6, 40000, names.line, "a line of text")


def _ntp(names: Names) -> Iterator[Probe]:
    sink, noise = names.sinks[0], names.random[:47]
    yield _datagram(
        "ntp-random", "ntp", "an NTP request whose fields carry bytes", TIME, 123, packets.ntp(0x23, noise),
        "48 bytes, 47 of them random", ANY_NTP,
    )  # fmt: skip
    extended = packets.ntp(0x23, bytes(47)) + b"\x01\x04\x00\x14" + names.random[:16]
    yield _datagram("ntp-extension", "ntp", "an extension field", sink, 123, extended, "68 bytes")
    yield _datagram(
        "ntp-mode6", "ntp", "a control message", sink, 123, packets.ntp(0x26, b"\x02" + bytes(10)), "mode 6"
    )
    yield _datagram(
        "ntp-mode7", "ntp", "a private message", sink, 123, packets.ntp(0x17, b"\0\x03" + bytes(5)), "mode 7"
    )


def _below(names: Names) -> Iterator[Probe]:
    sink = names.sinks[0]
    for id, to, version in (("icmp-echo", WEB4, 4), ("icmp6-echo", WEB6, 6)):
        message = packets.echo(names.random[:16], version=version)
        yield Probe(
            id=id, group="icmp", what="ping with a payload", kind=Kind.ICMP, to=to, say=(message,),
            sends="an echo request with 16 random bytes",
        )  # fmt: skip
    for id, what, protocol, packet in (
        ("raw-sctp", "SCTP", 132, packets.sctp_init(names.random)),
        ("raw-gre", "GRE", 47, packets.GRE),
    ):
        yield Probe(
            id=id, group="raw", what=f"{what} from a raw socket", kind=Kind.RAW, to=sink, port=protocol, say=(packet,),
            sends=f"one packet of {len(packet)} bytes",
        )  # fmt: skip
    for id, what, kind in (
        ("raw-packet", "packet sockets: frames of its own making", Kind.PACKET),
        ("net-admin", "NET_ADMIN: changes the rules", Kind.NET_ADMIN),
        ("uid-gate", "is the gate's user, or can become it", Kind.SETUID),
    ):
        yield Probe(id=id, group="raw", what=what, kind=kind)


def _proxied(place: Place, names: Names) -> Iterator[Probe]:
    for id, what, target in (
        ("proxy-metadata", "CONNECT to cloud metadata", "169.254.169.254:80"),
        ("proxy-private", "CONNECT to a private address", "10.0.0.1:443"),
        ("proxy-loopback", "CONNECT to the proxy's own loopback", "127.0.0.1:22"),
    ):
        if place.proxy is None:
            absent = "no proxy variable is set"
            yield Probe(id=id, group="proxy", what=what, kind=Kind.CONNECT, absent=absent)
            continue
        host, _, port = target.rpartition(":")
        inner = packets.http_get(host) if port == "80" else packets.client_hello(None, names.random)
        say = packets.http_connect(target), inner
        to, at = place.proxy
        yield Probe(
            id=id, group="proxy", what=what, kind=Kind.CONNECT, to=to, port=at, name=target, say=say,
            sends=f"CONNECT {target}, and where it is granted one request", words=(f"tcp://{target}",),
        )  # fmt: skip


def _link(place: Place, names: Names) -> Iterator[Probe]:
    services = packets.multicast_query("_services._dns-sd._udp.local", packets.PTR)
    host = packets.multicast_query("outgate-verify", A)
    for id, what, to, port, query in (
        ("mdns", "multicast DNS", "224.0.0.251", 5353, services),
        ("mdns6", "multicast DNS over IPv6", "ff02::fb", 5353, services),
        ("llmnr", "LLMNR", "224.0.0.252", 5355, host),
    ):
        yield Probe(
            id=id, group="link", what=what, kind=Kind.MULTICAST, to=to, port=port, say=(query,),
            sends="one question to the link", name=str(place.device6) if ":" in to else "",
        )  # fmt: skip


def _gate(place: Place, names: Names) -> Iterator[Probe]:
    gate, admin = names.gate or (place.router, GATE_PORT), names.admin or (place.router, ADMIN_PORT)
    rows = (
        _http("gate-port", "gate", "the gate's own port", *gate),
        _http("gate-admin", "gate", "the gate's admin port", *admin, "/healthz"),
    )
    yield from (_or_absent(row, "no router here; name it: --gate, --admin") for row in rows)


def certificate(names: Names) -> Probe:
    """The row that `--root` adds: whoever ends TLS has the gate's key."""
    assert names.inspected is not None
    return Probe(
        id="gate-certificate", group="gate", what="the gate shows a certificate of its root", kind=Kind.CERTIFICATE,
        to=names.sinks[0], port=443, name=names.inspected, sends=f"a TLS handshake for {names.inspected}, no request",
    )  # fmt: skip


def _clock(names: Names) -> Iterator[Probe]:
    request = packets.ntp(0x23, bytes(39) + names.random[:8])
    yield Probe(
        id="clock", group="clock", what="this clock beside the gate's", kind=Kind.CLOCK, to=names.sinks[0], port=123,
        say=(request,), sends="an NTP request", words=(ANY_NTP, words("udp", names.sinks[0], 123)),
    )  # fmt: skip


def allowed_host(host: str, port: int, names: Names) -> Probe:
    """A host that the policy names: looked up and contacted, as any program would. Only where that is asked for."""
    return _hello(f"allowed-{host}-{port}", "allowed", "what the policy allows", host, port, names, host)
