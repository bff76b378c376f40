"""The kernel's rules for a gate, as nft's text. Loading it is `nft.py`'s work.

Own tables only, replaced as a whole. nft 1.0.6 wants `}` on a line of its own, and has no `destroy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import collapse_addresses, ip_network
from typing import Any

from policies.addresses import NEVER_REACHED, Address, Network
from proxy.layout import Layout, Mode, words_of

TABLE = "outgate"
SIGN = "made_by_outgate"  # a chain that nothing jumps to: whose the table is, and the flags that it was made from
SET4, SET6 = "allowed4", "allowed6"
EGRESS = "egress"
FRAMES = "frames"  # the counter of the guard against packet sockets
MAX_ELEMENTS = 65536
MARK = 0x80  # one bit, of a packet: led to the UDP relay; of a connection: let past the gate, or the gate's own
MARKED = f"& {MARK:#x} == {MARK:#x}"
GATE_TABLE = 15001  # of routes; no distribution has one of this number
SINCE = "since "

_NEIGHBOURS = "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }"  # IPv6 finds its neighbours
_NOT_RELAYED = {
    False: "udp dport { 53, 123, 443 } accept  # QUIC is refused at once: clients go on over TCP",
    True: "udp dport { 53, 123 } accept",
}
_TO_ALL = "fib daddr type { broadcast, multicast } counter name refused drop"
# Forged is a source that is not reached by the device it came from: what refuses it goes there, and quotes it.
_NOT_ROUTED_BACK = "fib saddr . iif oif missing"
_ERRORS = "meta l4proto { icmp, ipv6-icmp }"  # one about an open connection belongs to it, and quotes what it likes
_HAS_SOCKET = "meta skuid 0-4294967295"  # the kernel's own segments have none, and so no uid

type Lines = Iterator[str]


def render(layout: Layout, *, since: str = "", table: str = TABLE, dormant: bool = False) -> str:
    """The rules, to be loaded as one transaction; what was in our tables is gone with it.

    `since` is kept in them as it stands. `table` names them otherwise, and `dormant` rules bear on no packet: so the
    kernel shows how it would write them.
    """
    tables = {"inet": _inet(layout)}
    if layout.mode is Mode.SIDECAR:
        tables["netdev"] = _netdev(layout)
    parts = [f"# outgate firewall render {' '.join(words_of(layout))}", *_routing(layout)]
    for family, chains in tables.items():
        start = ["flags dormant"] if dormant else []
        signed = _chain(SIGN, (f'continue comment "{word}"' for word in _signature(layout, since)))
        body = _indented([*start, 'comment "outgate firewall"', *signed, *chains])
        parts += ["", f"table {family} {table}", f"delete table {family} {table}", f"table {family} {table} {{", *body]
        parts.append("}")
    return "\n".join(parts) + "\n"


def families_of(layout: Layout) -> tuple[str, ...]:
    """Of the tables that `render` makes."""
    return ("inet", "netdev") if layout.mode is Mode.SIDECAR else ("inet",)


def has_openings(layout: Layout) -> bool:
    """Whether there are sets that a DNS guard opens. In a pod everything is carried by the gate's uid."""
    return layout.mode is not Mode.SIDECAR


def _signature(layout: Layout, since: str) -> Lines:
    yield from words_of(layout)
    if since:
        yield SINCE + since


def _routing(layout: Layout) -> Lines:
    if layout.udp_port is None:
        return
    yield "# and, for what TPROXY delivers to this machine, IPv4 and IPv6 (ip -6), which `apply` adds:"
    yield f"#   ip rule add pref {GATE_TABLE} fwmark {MARK:#x}/{MARK:#x} lookup {GATE_TABLE}"
    yield f"#   ip route add local default dev lo table {GATE_TABLE}"


def _inet(layout: Layout) -> Lines:
    counters = ["never_reached", "refused"]
    if layout.mode is not Mode.SIDECAR:
        counters += ["spoofed", "invalid"]
    for name in counters:
        yield f"counter {name} {{"
        yield "}"
    if has_openings(layout):
        for name, kind in ((SET4, "ipv4_addr"), (SET6, "ipv6_addr")):
            yield f"set {name} {{"
            kinds = f"type {kind} . {kind} . inet_proto . inet_service"  # source, destination, protocol, port
            yield from _indented([kinds, "flags timeout", f"size {MAX_ELEMENTS}"])
            yield "}"
    yield from _chain(
        "refuse",
        (
            "counter name refused",
            "meta l4proto tcp reject with tcp reset",  # IPv6 programs wait on after any other answer to a SYN
            "reject with icmpx admin-prohibited",
            "drop",
        ),
    )
    yield from _sidecar(layout) if layout.mode is Mode.SIDECAR else _routed(layout)


# --- what comes in by a device: gateway and bridge ---


def _routed(layout: Layout) -> Lines:
    comes = f"iifname {_names(layout.workload_devices)}"
    sources = [comes]  # a packet is a workload's when one of these holds
    if layout.is_one_armed:
        sources = [f"{comes} {match}" for match in _matches("saddr", layout.subnets)]
    yield from _base("arriving", "filter hook prerouting priority raw", _goto("from_workload", sources))
    yield from _chain("from_workload", _from_workload(layout))
    if layout.udp_port is not None:
        datagrams = [f"{one} meta l4proto udp" for one in sources]
        yield from _base("relayed", "filter hook prerouting priority mangle", _goto("to_relay", datagrams))
        yield from _chain("to_relay", _to_relay(layout, layout.udp_port))
    yield from _base("redirected", "nat hook prerouting priority dstnat - 10", _goto("to_gate", sources))
    yield from _chain("to_gate", _to_gate(layout))
    yield from _base("entering", "filter hook input priority filter - 10", _goto("to_this_machine", sources))
    yield from _chain("to_this_machine", _to_this_machine(layout))
    forwarded = [*_reopened(layout), *_goto("past_the_gate", [comes])]
    yield from _base("forwarded", "filter hook forward priority filter - 10", forwarded)
    yield from _chain("past_the_gate", _past_the_gate(layout))
    if layout.masquerade:
        masquerade = f"{_leaves(layout)} ct mark {MARKED} masquerade"
        yield from _base("leaving", "nat hook postrouting priority srcnat", [masquerade])


def _from_workload(layout: Layout) -> Lines:
    """Before anything that could lead it elsewhere, and before connections are known."""
    yield f"{_NEIGHBOURS} accept"
    yield f"{_NOT_ROUTED_BACK} counter name spoofed drop"
    if layout.subnets and not layout.is_one_armed:
        yield from _closed_but("saddr", layout.subnets, "counter name spoofed drop")
    if not layout.ipv6:
        yield "meta nfproto ipv6 goto refuse"
    yield from (f"{match} accept" for match in _asks(layout))
    yield _TO_ALL
    yield from _never_reached()
    yield "accept  # on to the chains below"


def _to_relay(layout: Layout, port: int) -> Lines:
    yield "fib daddr type local accept"
    yield _NOT_RELAYED[layout.quic]
    yield f"ct mark {MARKED} accept  # what was opened and is established goes on"
    yield from (f"{match} accept" for match in _asks(layout))
    # A flow that the relay has had stays the relay's: past it, nothing would mark it any more, and it were refused.
    yield from (f"ct status & confirmed != confirmed {match} accept" for match in _OPENED)
    for version, family in _FAMILIES:
        led = f"meta nfproto {version} meta l4proto udp tproxy {family} to :{port}"
        yield f"{led} meta mark set meta mark | {MARK:#x} accept"


# An address of this machine is not past the gate: it would be a way to its own services.
_OPENED = tuple(
    f"fib daddr type != local {family} saddr . {family} daddr . meta l4proto . th dport @{name}"
    for family, name in (("ip", SET4), ("ip6", SET6))
)


def _to_gate(layout: Layout) -> Lines:
    """The first packet of each connection."""
    past = f"ct mark set ct mark | {MARK:#x} accept"
    yield from (f"{match} {past}" for match in _asks(layout))
    yield from _redirects_of_relays(layout)
    yield from (f"{match} {past}" for match in _OPENED)
    yield f"meta l4proto tcp redirect to :{layout.gate_port}"


def _to_this_machine(layout: Layout) -> Lines:
    """Only what was led here. The gate's own ports are no proxy for who connects to them."""
    yield f"{_NEIGHBOURS} accept"
    yield "ct state invalid counter name invalid drop"
    yield f"ct status dnat tcp dport {layout.gate_port} accept"
    if layout.dns_port is not None:
        yield f"ct status dnat meta l4proto {{ tcp, udp }} th dport {layout.dns_port} accept"
    if layout.ntp_port is not None:
        yield f"ct status dnat udp dport {layout.ntp_port} accept"
    if layout.udp_port is not None:
        yield f"meta mark {MARKED} meta l4proto udp accept"
    if layout.resolvers:
        yield f"ct mark {MARKED} accept"
    yield "ct direction reply ct state established accept  # answers to this machine's own programs"
    yield "meta l4proto { icmp, ipv6-icmp } ct state related accept"
    yield "goto refuse"


def _past_the_gate(layout: Layout) -> Lines:
    """What was opened, and nothing that was there before these rules: that has no mark."""
    yield "ct state invalid counter name invalid drop"
    for source in _matches("saddr", layout.subnets) if layout.is_one_armed else ("",):
        yield f"{source} {_ERRORS} goto refuse".lstrip()
    yield f"{_leaves(layout)} ct mark {MARKED} accept"
    if layout.inbound:
        yield "ct direction reply ct state established accept"
    if layout.is_one_armed:  # a refusal would go out to whomever the packet says that it is from
        yield from _closed_but("saddr", layout.subnets, "counter name spoofed drop")
    yield "goto refuse"


def _reopened(layout: Layout) -> Lines:
    """A connection that was cut is unknown here, and its server's next segment would count as opening one inward."""
    if layout.inbound:
        stray = "ct state new tcp flags & (fin | syn | rst | ack) != syn"
        yield f"oifname {_names(layout.workload_devices)} {stray} goto refuse"


def _leaves(layout: Layout) -> str:
    if layout.upstream_devices:
        return f"oifname {_names(layout.upstream_devices)}"
    return f"oifname != {_names(layout.workload_devices)}"


# --- a workload on the same machine: a pod ---


def _sidecar(layout: Layout) -> Lines:
    own = f"meta skuid {layout.gate_uid}"
    open_to_all = [f"{match} accept" for match in (*_asks(layout), *_excluded(layout))]
    yield from _base("attempted", "filter hook output priority raw", _attempted(layout, own))
    if layout.udp_port is not None:
        yield from _relayed_in_a_pod(layout, layout.udp_port, own, open_to_all)
    redirected = [
        f"{own} ct mark set ct mark | {MARK:#x} accept",
        *_redirects_of_relays(layout),  # of a local resolver too: it asks others
        "fib daddr type local accept",
        *open_to_all,
        f"meta l4proto tcp redirect to :{layout.gate_port}",
    ]
    yield from _base("redirected", "nat hook output priority -100", redirected)
    yield from _base("leaving", "filter hook output priority filter", _leaving(layout, own, open_to_all), "drop")
    yield from _base("entering", "filter hook input priority filter", _entering(layout))
    # A frame that a packet socket puts on lo would be routed out as if it came from elsewhere.
    yield from _base("forwarded", "filter hook forward priority filter", ["counter name refused drop"], "drop")


def _attempted(layout: Layout, own: str) -> Lines:
    """Before anything that could lead it elsewhere."""
    yield f"{own} accept"
    yield "fib daddr type local accept"
    yield f"{_NEIGHBOURS} accept"
    if not layout.ipv6:
        yield "meta nfproto ipv6 goto refuse"
    yield from (f"{match} accept" for match in _asks(layout))
    yield _TO_ALL
    yield from _never_reached()


def _relayed_in_a_pod(layout: Layout, port: int, own: str, open_to_all: Iterable[str]) -> Lines:
    """Routed to lo by its mark, and there given to the relay with its destination."""
    yield from _base(
        "marked",
        "route hook output priority mangle",
        [
            f"{own} accept",
            "fib daddr type local accept",
            *open_to_all,
            _NOT_RELAYED[layout.quic],
            f"meta l4proto udp meta mark set meta mark | {MARK:#x}",
        ],
    )
    led = f'iif "lo" meta mark {MARKED} meta l4proto udp'
    yield from _base(
        "relayed",
        "filter hook prerouting priority mangle",
        [f"{led} meta nfproto {version} tproxy {family} to :{port} accept" for version, family in _FAMILIES],
    )
    # Were the route gone, the mark would let it out.
    stray = f'oifname != "lo" meta mark {MARKED} counter name refused drop'
    yield from _base("marked_left", "filter hook postrouting priority filter", [stray])


_FAMILIES = (("ipv4", "ip"), ("ipv6", "ip6"))


def _leaving(layout: Layout, own: str, open_to_all: Iterable[str]) -> Lines:
    yield f"{own} accept"
    yield "fib daddr type local accept"
    yield f"{_NEIGHBOURS} accept"
    if layout.inbound:
        yield "ct direction reply ct state established accept"
    if layout.udp_port is not None:
        yield f"meta mark {MARKED} meta l4proto udp accept"
    yield from open_to_all
    yield f"{_HAS_SOCKET} goto refuse"
    yield f"ct mark {MARKED} tcp flags & syn == 0 accept  # the last segments of what the gate has closed"
    yield "goto refuse"


def _entering(layout: Layout) -> Lines:
    """No neighbour may use the gate's ports, wherever it listens."""
    streams = [port for port in (layout.gate_port, layout.dns_port) if port is not None]
    datagrams = [port for port in (layout.dns_port, layout.ntp_port, layout.udp_port) if port is not None]
    for protocol, ports in (("tcp", streams), ("udp", datagrams)):
        if ports:
            yield f'iifname != "lo" {protocol} dport {_ports(ports)} goto refuse'


def _netdev(layout: Layout) -> Lines:
    """Frames of packet sockets pass none of the chains above (CAP_NET_RAW is in every container by default)."""
    yield f"counter {FRAMES} {{"
    yield "}"
    devices = ", ".join(f'"{device}"' for device in layout.upstream_devices)
    yield from _chain(
        EGRESS,
        (
            f"type filter hook egress devices = {{ {devices} }} priority filter; policy drop;",
            "meta rtclassid 0 accept  # it has a route, so IP sent it, and it was judged",
            f"{_HAS_SOCKET} counter name {FRAMES} drop",
            "meta protocol arp accept  # the kernel's own",
            f"counter name {FRAMES} drop",
        ),
    )


# --- pieces ---


def _redirects_of_relays(layout: Layout) -> Lines:
    if layout.dns_port is not None:
        yield f"meta l4proto {{ tcp, udp }} th dport 53 redirect to :{layout.dns_port}"
    if layout.ntp_port is not None:
        yield f"udp dport 123 redirect to :{layout.ntp_port}"


def _never_reached() -> Lines:
    yield from (f"{match} counter name never_reached goto refuse" for match in _matches("daddr", NEVER_REACHED))


def _asks(layout: Layout) -> Lines:
    """Questions to the resolvers that workloads may ask."""
    for match in _matches("daddr", layout.resolvers):
        yield f"{match} meta l4proto {{ tcp, udp }} th dport 53"


def _excluded(layout: Layout) -> Lines:
    yield from _matches("daddr", layout.excluded)
    if layout.excluded_ports:
        yield f"meta l4proto {{ tcp, udp }} th dport {_ports(layout.excluded_ports)}"


def _matches(which: str, addresses: Iterable[Address | Network]) -> Lines:
    """Of each family that is among them."""
    for version, (_, family) in zip((4, 6), _FAMILIES, strict=True):
        if mine := _of_version(version, addresses):
            yield f"{family} {which} {_braced(mine)}"


def _closed_but(which: str, networks: Iterable[Network], verdict: str) -> Lines:
    """A family without a prefix is closed whole."""
    for version, (name, family) in zip((4, 6), _FAMILIES, strict=True):
        mine = _of_version(version, networks)
        yield f"{family} {which} != {_braced(mine)} {verdict}" if mine else f"meta nfproto {name} {verdict}"


def _of_version(version: int, addresses: Iterable[Address | Network]) -> list[Network]:
    """As prefixes that do not overlap: those of a set may not."""
    networks: Iterable[Any] = (ip_network(one) for one in addresses if one.version == version)  # typeshed has no union
    return list(collapse_addresses(networks))


def _names(devices: Iterable[str]) -> str:
    return _braced(f'"{device}"' for device in devices)


def _ports(ports: Iterable[int]) -> str:
    return _braced(sorted(set(ports)))


def _braced(values: Iterable[object]) -> str:
    return f"{{ {', '.join(map(str, values))} }}"


def _goto(chain: str, matches: Iterable[str]) -> Lines:
    return (f"{match} goto {chain}" for match in matches)


def _base(name: str, kind: str, lines: Iterable[str], policy: str = "accept") -> Lines:
    return _chain(name, [f"type {kind}; policy {policy};", *lines])


def _chain(name: str, lines: Iterable[str]) -> Lines:
    yield f"chain {name} {{"
    yield from _indented(lines)
    yield "}"


def _indented(lines: Iterable[str]) -> Lines:
    for line in lines:
        yield f"    {line}"
