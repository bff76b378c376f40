"""What the operator says besides the policy: one model for flags, `OUTGATE_*` variables and `gate.yaml`.

It knows values, not how they are written (`keys`, `values`) and not what is done with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from policies.hostnames import Hostname, Pattern
from policies.model import Network
from proxy.hosts import HostsEntry, Nameserver
from proxy.limits import Limits

if TYPE_CHECKING:
    from proxy.inspector.handover import Bounds

type SocketAddress = tuple[str, int]  # an address as text, without brackets, and a port

GATE_PORT, PROXY_PORT, ADMIN_PORT = 15001, 3128, 9901
MAX_WORKERS = 64
IN_CLUSTER = "in-cluster"


class GateMode(StrEnum):
    """How connections arrive, and who they are."""

    GATEWAY = "gateway"  # redirected from other hosts or pods; the source address says which workload
    SIDECAR = "sidecar"  # redirected inside one pod; `workload` says which
    PROXY = "proxy"  # CONNECT and absolute form alone; credentials or the source address say which


class OnLogFailure(StrEnum):
    """What happens to attempts while decision records cannot be written."""

    CONTINUE = "continue"
    DENY = "deny"


class HttpHost(StrEnum):
    """What carries HTTP under inspection."""

    AUTO = "auto"  # the lane, and mitmproxy for what the lane does not speak
    MITMPROXY = "mitmproxy"  # mitmproxy for everything


def carrier(said: HttpHost, addons: Sequence[str]) -> HttpHost:
    """What carries HTTP under inspection, whatever was said: the lane calls no addons of the operator's."""
    return HttpHost.MITMPROXY if addons else said


class OnStale(StrEnum):
    """What happens to sources that are known by address alone once the cluster has been silent for too long."""

    DENY = "deny"
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """A cluster whose pods the gate watches, so that it knows which of them a source address is.

    api             path of a kubeconfig, or IN_CLUSTER: the gate runs in it
    stale_s         so long after its last word the cluster's API has been silent for too long
    token_audience  clients of the proxy may prove who they are by a service account token for it; None: they may not
    """

    api: str = IN_CLUSTER
    on_stale: OnStale = OnStale.DENY
    stale_s: float = 300.0
    token_audience: str | None = None

    @property
    def kubeconfig(self) -> str | None:
        """None: it is found as every pod finds it."""
        return None if self.api == IN_CLUSTER else self.api


@dataclass(frozen=True, slots=True)
class UpstreamProxy:
    """A proxy of the site through which everything is dialled that `direct` does not name.

    credentials  path of a file that holds `NAME:PASSWORD`; None: none are sent
    direct       names and prefixes that are dialled directly
    """

    host: str
    port: int
    credentials: str | None = None
    direct: tuple[Pattern | Network, ...] = ()


class DoorKind(StrEnum):
    """What arrives at a door; the value is the key that says where it is."""

    REDIRECTED = "listen"
    PROXY = "proxyListen"  # CONNECT and absolute form
    DNS = "dnsListen"  # questions, by UDP and TCP
    DNSTAP = "dnstapListen"  # a unix socket: what name servers answered
    UDP = "udpListen"  # datagrams that TPROXY led here
    UDP_FORWARD = "udpForward"  # datagrams for one destination

    @property
    def says(self) -> str:
        """What arrives, to people."""
        return _ARRIVES[self]

    @property
    def is_stream(self) -> bool:
        """Whether connections arrive (at that of DNS, too)."""
        return self not in (DoorKind.UDP, DoorKind.UDP_FORWARD)

    @property
    def is_datagram(self) -> bool:
        """Whether datagrams do."""
        return self is DoorKind.DNS or not self.is_stream


_ARRIVES = {
    DoorKind.REDIRECTED: "redirected connections",
    DoorKind.PROXY: "proxy clients",
    DoorKind.DNS: "DNS",
    DoorKind.DNSTAP: "dnstap",
    DoorKind.UDP: "redirected datagrams",
    DoorKind.UDP_FORWARD: "datagrams to forward",
}


@dataclass(frozen=True, slots=True)
class Door:
    """Where the gate listens. `target`: whom datagrams are for that are forwarded, as a policy writes it."""

    address: SocketAddress
    kind: DoorKind = DoorKind.REDIRECTED
    target: str = ""


# What each mode listens on where nobody says: redirected connections, and those to a proxy.
_DEFAULT_LISTEN: Mapping[GateMode, tuple[SocketAddress, ...]] = {
    GateMode.GATEWAY: (("::", GATE_PORT),),
    GateMode.SIDECAR: (("127.0.0.1", GATE_PORT), ("::1", GATE_PORT)),
    GateMode.PROXY: (),
}
_DEFAULT_PROXY_LISTEN: Mapping[GateMode, tuple[SocketAddress, ...]] = {
    GateMode.GATEWAY: (),
    GateMode.SIDECAR: (),
    GateMode.PROXY: (("127.0.0.1", PROXY_PORT),),
}
_IPV4_OF = {"::": "0.0.0.0"}  # noqa: S104 - a gateway is there for others


def _bounds() -> Bounds:
    from proxy.inspector.handover import Bounds  # here: with it comes the inspector, which no command line needs

    return Bounds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One gate. Paths are absolute, but those of policies and tags; docs/configuration.md says what each key means."""

    mode: GateMode = GateMode.GATEWAY
    policy: tuple[str, ...]
    tags: tuple[str, ...] = ()
    workload: str | None = None
    listen: tuple[SocketAddress, ...] | None = None  # redirected connections; None: as the mode has it, see `doors`
    proxy_listen: tuple[SocketAddress, ...] | None = None  # CONNECT and absolute form; None: as the mode has it
    dns_listen: tuple[SocketAddress, ...] = ()
    udp_listen: tuple[SocketAddress, ...] = ()
    udp_forward: Mapping[SocketAddress, str] = field(default_factory=dict)  # to NAME-or-ADDR:PORT
    dnstap_listen: str | None = None  # path of a unix socket
    dns_search: tuple[Hostname, ...] | None = None  # None: the system's
    dns_forward: Mapping[Hostname, tuple[Nameserver, ...]] = field(default_factory=dict)  # zones with their own servers
    dns_new_names: int = 60  # an hour, of one workload below one wildcard
    dns_new_names_burst: int = 30
    dns_labels: int = 4
    dns_per_source: int = 1000  # questions a second, twice as many at once
    openings: bool = False  # what is looked up behind tcp and udp rules is let past the gate
    kubernetes: Kubernetes | None = None  # None: no cluster is watched
    credentials: str | None = None
    proxy_protocol_from: tuple[Network, ...] = ()
    workers: int = 1
    nameservers: tuple[Nameserver, ...] | None = None  # None: the system's
    hosts: Mapping[Hostname, HostsEntry] = field(default_factory=dict)
    upstream_proxy: UpstreamProxy | None = None
    upstream_ca: str | None = None
    pki: str | None = None
    http_host: HttpHost = HttpHost.AUTO
    addons: tuple[str, ...] = ()
    log: str | None = None  # a path, `-` for standard error, None for standard output
    on_log_failure: OnLogFailure = OnLogFailure.CONTINUE
    admin: SocketAddress | None = ("127.0.0.1", ADMIN_PORT)
    admin_token: str | None = None  # path of a file
    drain_s: float = 0.0  # at the end: how long the doors stay open, not ready, before the grace begins
    grace_s: float = 5.0  # at the end: how long open connections may take to finish
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=_bounds)

    def doors(self, *, has_ipv6: bool = True) -> tuple[Door, ...]:
        """Every address and port to listen on; each must be bound, or the gate does not start.

        A host without IPv6 (`has_ipv6` False) has other defaults. What was asked for by name stays, and fails there.
        """
        redirected, proxied = self.listen, self.proxy_listen
        if redirected is None:
            redirected = _bindable(_DEFAULT_LISTEN[self.mode], has_ipv6)
        if proxied is None:
            proxied = _bindable(_DEFAULT_PROXY_LISTEN[self.mode], has_ipv6)
        return (
            *(Door(address) for address in redirected),
            *(Door(address, DoorKind.PROXY) for address in proxied),
            *(Door(address, DoorKind.DNS) for address in self.dns_listen),
            *(Door(address, DoorKind.UDP) for address in self.udp_listen),
            *(Door(address, DoorKind.UDP_FORWARD, target) for address, target in self.udp_forward.items()),
        )


def _bindable(addresses: tuple[SocketAddress, ...], has_ipv6: bool) -> tuple[SocketAddress, ...]:
    """Defaults for this host: without IPv6 there is no ::1, and [::], which takes both, is 0.0.0.0."""
    if has_ipv6:
        return addresses
    return tuple((_IPV4_OF.get(address, address), port) for address, port in addresses if address != "::1")
