"""What the gate tells its inspector: the configuration, and each connection it hands over. Text only, no sockets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from policies.hostnames import Hostname
from proxy.record import Peer


@dataclass(frozen=True, slots=True)
class Handover:
    """A connection that the listener gives away; nothing was read from it.

    host         the SNI; on a plain port the name that a CONNECT asked for, else None
    port         the original destination's
    destination  the original destination, where the listener knows it
    opened       POSIX seconds
    user         the name of the proxy credential that was verified, if one was
    http2        HTTP/2 is what it is given, if its origin speaks it as well (`gives_http2`)
    proxied      plain requests in absolute form, as to an explicit proxy: each names its own host and port
    credential   `addons.credential.seal` of the `Proxy-Authorization` that was verified: a later request on a proxied
                 connection must carry the same (`is_sealed`), else it is answered 407; None: none was asked for, and
                 what requests carry has no bearing
    """

    id: str
    workload: str
    host: Hostname | None
    port: int
    plain: bool
    source: Peer
    destination: Peer | None
    opened: float
    user: str | None = None
    proxied: bool = False
    credential: str | None = None
    http2: bool = False

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Handover:
        fields = json.loads(text)
        fields["source"] = tuple(fields["source"])
        fields["destination"] = fields["destination"] and tuple(fields["destination"])
        return cls(**fields)


def gives_http2(rule: bool | None, offers: Sequence[bytes]) -> bool:
    """Whether a client that makes these offers (ALPN) is given HTTP/2, by what its rule says of `http2`."""
    if b"h2" not in offers:
        return False
    return b"http/1.1" not in offers if rule is None else rule


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the inspector bears, each with the attack it answers."""

    connections: int = 4096  # descriptors: each takes two
    per_source: int = 2048  # one workload must not shut out the others
    handshake_s: float = 10.0  # half a ClientHello
    head_s: float = 15.0  # slowloris: a request head dribbled byte by byte
    idle_s: float = 300.0  # nothing moves in either direction
    dial_s: float = 10.0  # lookup, connect and TLS of the origin together
    total_s: float = 86400.0  # one request, or one tunnel: nothing that trickles holds its two connections for ever
    least_rate: int = 64  # bytes a second of a body, looked at over `idle_s`: a byte now and then is no transfer
    waiting: int = 256 << 20  # bytes that wait in the lane: for slow readers, for the rest of a head


@dataclass(frozen=True, slots=True)
class Configuration:
    """All that an inspector needs besides the policy; it holds the keys of issuing CAs, so it travels in memory only.

    issuing      what signs leaves, as `pki.issuers` writes it
    workload     every connection is this workload's; None: as its source address or its user says
    upstream_ca  path of a PEM file; None: the system's store
    hosts        name to addresses and port, as the operator said; `system_hosts` as the machine says
    nameservers  address and port each
    forward      zones with name servers of their own, each with those
    upstream_proxy  the site's proxy: host, port, path of its credentials, names and prefixes that are dialled directly
    watches_pods    the gate tells which pods there are
    own_doors    addresses and ports that the gate listens on
    addons       paths of the operator's own addons
    """

    issuing: str = field(repr=False)
    workload: str | None = None
    upstream_ca: str | None = None
    hosts: tuple[tuple[Hostname, tuple[str, ...], int | None], ...] = ()
    system_hosts: tuple[tuple[Hostname, tuple[str, ...]], ...] = ()
    nameservers: tuple[tuple[str, int], ...] = ()
    forward: tuple[tuple[Hostname, tuple[tuple[str, int], ...]], ...] = ()
    upstream_proxy: tuple[str, int, str | None, tuple[str, ...]] | None = None
    watches_pods: bool = False
    own_doors: tuple[tuple[str, int], ...] = ()
    addons: tuple[str, ...] = ()
    bounds: Bounds = Bounds()

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Configuration:
        fields = json.loads(text)
        site = fields["upstream_proxy"]
        return cls(
            issuing=fields["issuing"],
            workload=fields["workload"],
            upstream_ca=fields["upstream_ca"],
            hosts=tuple((name, tuple(addresses), port) for name, addresses, port in fields["hosts"]),
            system_hosts=tuple((name, tuple(addresses)) for name, addresses in fields["system_hosts"]),
            nameservers=tuple((address, port) for address, port in fields["nameservers"]),
            forward=tuple((zone, tuple((host, port) for host, port in servers)) for zone, servers in fields["forward"]),
            upstream_proxy=site and (*site[:3], tuple(site[3])),
            watches_pods=fields["watches_pods"],
            own_doors=tuple((address, port) for address, port in fields["own_doors"]),
            addons=tuple(fields["addons"]),
            bounds=Bounds(**fields["bounds"]),
        )
