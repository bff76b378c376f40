"""What the kernel's rules have to know of a gate's surroundings: devices, ports, prefixes; and as flags, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address, ip_network

from policies.addresses import Address, Network

GATE_UID = 1337
GATE_PORT = 15001  # the gate's own default, proxy/config

# What the kernel takes as a name is more; this is what no rule can be forged with. `*` is nft's wildcard.
_DEVICE = re.compile(r"[A-Za-z0-9_.@:+-]{1,15}", re.ASCII)
_MAX_UID = (1 << 32) - 2


class Mode(StrEnum):
    GATEWAY = "gateway"
    SIDECAR = "sidecar"
    BRIDGE = "bridge"


class MalformedLayout(Exception):
    """A flag that cannot be meant. `str()` names it, its value and the repair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the workload is, where the gate listens, and what is let past it.

    workload_devices  what workloads come in by; a sidecar has none, its workload is on the same machine
    upstream_devices  what leads out; none: anything but `workload_devices`
    dns_port, ntp_port, udp_port  where the gate's relays listen; None: that protocol is closed
    subnets           the sources that are workloads; none: whatever comes in by the devices
    resolvers         name servers that a workload may ask past the gate, on port 53
    excluded, excluded_ports      destinations that a pod reaches past the gate
    quic              whether UDP 443 is led to the relay, too
    inbound           whether workloads may answer connections that others make to them
    """

    mode: Mode
    workload_devices: tuple[str, ...] = ()
    upstream_devices: tuple[str, ...] = ()
    gate_port: int = GATE_PORT
    dns_port: int | None = None
    ntp_port: int | None = None
    udp_port: int | None = None
    gate_uid: int = GATE_UID
    subnets: tuple[Network, ...] = ()
    resolvers: tuple[Address, ...] = ()
    excluded: tuple[Network, ...] = ()
    excluded_ports: tuple[int, ...] = ()
    quic: bool = False
    inbound: bool = False
    masquerade: bool = False
    ipv6: bool = True

    @property
    def is_one_armed(self) -> bool:
        """Whether workloads and the internet are behind the same device, so that the source alone says who sends."""
        return bool(set(self.workload_devices) & set(self.upstream_devices))


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: the field it fills, how its text is read, and the modes in which it has a meaning."""

    name: str
    field: str
    read: Callable[[str], object]
    says: str
    metavar: str
    modes: frozenset[Mode]
    many: bool = False


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text) or text in (".", ".."):
        raise ValueError("no name of a device; such are eth0, br-out")
    return text


def _port(text: str) -> int:
    return _number(text, 1, 65535, "a port from 1 to 65535")


def _uid(text: str) -> int:
    return _number(text, 1, _MAX_UID, "a uid of the gate's own; as root many a workload runs too")


def _number(text: str, least: int, most: int, wanted: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or not least <= int(text) <= most:
        raise ValueError(f"not {wanted}")
    return int(text)


def _network(text: str) -> Network:
    try:
        loose = ip_network(text, strict=False)
    except ValueError as error:
        raise ValueError("not a prefix, such as 10.0.0.0/16") from error
    if loose.prefixlen == 0:
        raise ValueError("that is every address; name what is meant")
    if "/" in text and ip_address(text.partition("/")[0]) != loose.network_address:
        raise ValueError(f"has bits beyond its length; did you mean {loose}")
    return loose


def _address(text: str) -> Address:
    try:
        found = ip_address(text)
    except ValueError as error:
        raise ValueError("not an address, such as 10.0.0.53") from error
    if getattr(found, "scope_id", None):
        raise ValueError("an address with a zone stands in no rule")
    return found


def _ipv6(text: str) -> bool:
    if text not in ("on", "closed"):
        raise ValueError("not on or closed")
    return text == "on"


_EVERY = frozenset(Mode)
_ROUTED = frozenset({Mode.GATEWAY, Mode.BRIDGE})
_SIDECAR = frozenset({Mode.SIDECAR})

FLAGS = (
    Flag(
        "--workload-device", "workload_devices", _device,
        "What workloads come in by. Default: br0; bridge: br-outgate.", "DEVICE", _ROUTED, many=True,
    ),
    Flag(
        "--upstream-device", "upstream_devices", _device,
        "What leads out; in a pod, each of its devices. Default: eth0; bridge: every other device.", "DEVICE", _EVERY,
        many=True,
    ),
    Flag("--gate-port", "gate_port", _port, "The gate's `listen`. Default: 15001.", "PORT", _EVERY),
    Flag("--dns-port", "dns_port", _port, "The gate's DNS guard. Default: closed.", "PORT", _EVERY),
    Flag("--ntp-port", "ntp_port", _port, "Its NTP relay. Default: closed.", "PORT", _EVERY),
    Flag("--udp-port", "udp_port", _port, "Its UDP relay (TPROXY). Default: closed.", "PORT", _EVERY),
    Flag("--gate-uid", "gate_uid", _uid, "Whom the gate of a pod runs as. Default: 1337.", "UID", _SIDECAR),
    Flag(
        "--workload-subnet", "subnets", _network, "Sources that are workloads. Default: every source.", "CIDR",
        _ROUTED, many=True,
    ),
    Flag(
        "--resolver", "resolvers", _address, "A name server asked past the gate, port 53. Default: none.", "ADDR",
        _EVERY, many=True,
    ),
    Flag(
        "--exclude", "excluded", _network, "Reached past the gate, never judged. Default: nothing.", "CIDR", _SIDECAR,
        many=True,
    ),
    Flag(
        "--exclude-port", "excluded_ports", _port, "Likewise, a TCP or UDP port of any address.", "PORT", _SIDECAR,
        many=True,
    ),
    Flag("--ipv6", "ipv6", _ipv6, "on (default): as IPv4; closed: refused to workloads.", "on|closed", _EVERY),
)  # fmt: skip
SWITCHES: dict[str, tuple[str, frozenset[Mode]]] = {
    "quic": ("UDP 443 is led to the UDP relay, too, not refused. Default: no.", _EVERY),
    "inbound": ("Workloads may answer connections made to them. Default: no.", _EVERY),
    "masquerade": ("What is let out has this machine's source address. Default: gateway yes, bridge no.", _ROUTED),
}

_DEFAULTS: Mapping[Mode, Mapping[str, object]] = {
    Mode.GATEWAY: {"workload_devices": ("br0",), "upstream_devices": ("eth0",), "masquerade": True},
    Mode.BRIDGE: {"workload_devices": ("br-outgate",)},
    Mode.SIDECAR: {"upstream_devices": ("eth0",)},
}


def read_layout(mode: str, texts: Mapping[str, Iterable[str]], switches: Mapping[str, bool]) -> Layout:
    """The layout that flags describe: by field their texts, and what is switched on or off. Raises MalformedLayout."""
    where = Mode(mode)
    fields: dict[str, object] = dict(_DEFAULTS[where])
    for flag in FLAGS:
        given = tuple(texts.get(flag.field, ()))
        if given:
            _require_mode(flag.name, where, flag.modes)
            values = tuple(_read(flag, text) for text in dict.fromkeys(given))
            fields[flag.field] = values if flag.many else values[-1]
    for field, value in switches.items():
        _require_mode(f"--{field}", where, SWITCHES[field][1])
        fields[field] = value
    layout = Layout(mode=where, **fields)  # type: ignore[arg-type]  # each was read by its own flag
    _require_sense(layout)
    return layout


def words_of(layout: Layout) -> Iterator[str]:
    """The layout as flags, each with its value, everything said: `read_words` gives the same back."""
    yield f"--mode {layout.mode}"
    for flag in FLAGS:
        value = getattr(layout, flag.field)
        if layout.mode not in flag.modes or value is None:
            continue
        if flag.field == "ipv6":
            value = "on" if value else "closed"
        yield from (f"{flag.name} {one}" for one in (value if flag.many else (value,)))
    for field, (_, modes) in SWITCHES.items():
        if layout.mode in modes:
            yield f"--{field}" if getattr(layout, field) else f"--no-{field}"


def read_words(words: Iterable[str]) -> Layout:
    """What `words_of` wrote. Raises MalformedLayout."""
    by_name = {flag.name: flag for flag in FLAGS}
    mode, texts, switches = "", dict[str, list[str]](), dict[str, bool]()
    for word in words:
        name, _, value = word.partition(" ")
        if name == "--mode" and value in set(Mode):
            mode = value
        elif name in by_name:
            texts.setdefault(by_name[name].field, []).append(value)
        elif name.removeprefix("--").removeprefix("no-") in SWITCHES:
            switches[name.removeprefix("--").removeprefix("no-")] = not name.startswith("--no-")
        else:
            raise MalformedLayout(f"{word}: no flag of this version")
    if not mode:
        raise MalformedLayout("--mode: missing")
    return read_layout(mode, texts, switches)


def _read(flag: Flag, text: str) -> object:
    try:
        return flag.read(text)
    except ValueError as error:
        raise MalformedLayout(f"{flag.name} {text}: {error}") from error


def _require_mode(flag: str, mode: Mode, modes: frozenset[Mode]) -> None:
    if mode not in modes:
        raise MalformedLayout(f"{flag}: has no meaning with --mode {mode}; leave it out")


def _require_sense(layout: Layout) -> None:
    """What no single flag can know."""
    ports = [port for port in (layout.gate_port, layout.dns_port) if port is not None]
    datagrams = [port for port in (layout.dns_port, layout.ntp_port, layout.udp_port) if port is not None]
    if len(set(ports)) < len(ports) or len(set(datagrams)) < len(datagrams):
        raise MalformedLayout("--gate-port, --dns-port, --ntp-port, --udp-port: two are equal; each relay has its own")
    if layout.quic and layout.udp_port is None:
        raise MalformedLayout("--quic: there is no relay to lead it to; say where it listens with --udp-port")
    if layout.dns_port is not None and layout.resolvers:
        raise MalformedLayout("--resolver: the DNS guard of --dns-port answers every question; leave one of them out")
    if layout.is_one_armed and not layout.subnets:
        raise MalformedLayout(
            "--workload-device and --upstream-device are the same: say with --workload-subnet who the workloads are"
        )
