"""Which addresses a gate may reach, by IANA's registries and the clouds' documents. It resolves and dials nothing.

The tables are ours: `ipaddress.is_private` changed its mind between patch releases of Python. An IPv6 address that
carries IPv4 addresses (mapped, NAT64, 6to4, Teredo, ISATAP, ...) is as bad as the worst of them and of itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

type Address = IPv4Address | IPv6Address
type Network = IPv4Network | IPv6Network


class Reach(StrEnum):
    PUBLIC = "public"
    PRIVATE = "private"  # reached only where a rule says so
    NEVER = "never"  # reached by no rule


_METADATA = (
    "169.254.169.254/32",  # AWS, Azure, Google, Oracle, DigitalOcean, OpenStack, Hetzner, IBM, ...
    "169.254.170.2/32",  # AWS ECS task credentials
    "169.254.170.23/32",  # AWS EKS Pod Identity
    "169.254.0.23/32",  # Tencent
    "169.254.42.42/32",  # Scaleway
    "168.63.129.16/32",  # Azure WireServer: goal state and certificates
    "100.100.100.200/32",  # Alibaba
    "192.0.0.192/32",  # Oracle Cloud Classic
    "fd00:ec2::/32",  # AWS: ::254 metadata, ::23 EKS Pod Identity, ::253 resolver
    "fd20:ce::254/128",  # Google
    "fd00:c1::a9fe:a9fe/128",  # Oracle
    "fd00:42::42/128",  # Scaleway
    "fd00:a9fe:a9fe::1/128",  # Akamai (Linode)
    "fd00:100::100:200/128",  # Alibaba
)
_LINK_LOCAL = (
    "169.254.0.0/16",  # RFC 3927
    "fe80::/10",  # RFC 4291
)
_LOOPBACK = (
    "127.0.0.0/8",  # RFC 1122
    "::1/128",  # RFC 4291
)
_NOWHERE = (
    "0.0.0.0/8",  # RFC 791: this network; Linux dials 0.0.0.0 as loopback
    "224.0.0.0/4",  # RFC 5771: multicast
    "240.0.0.0/4",  # RFC 1112: reserved, and 255.255.255.255
    "::/128",  # RFC 4291: unspecified
    "ff00::/8",  # RFC 4291: multicast
)
# Not globally reachable in the IANA special-purpose registries. "N/A" there is not "true", so it stands here.
_PRIVATE = (
    "10.0.0.0/8",  # RFC 1918
    "100.64.0.0/10",  # RFC 6598: shared address space
    "172.16.0.0/12",  # RFC 1918
    "192.0.0.0/24",  # RFC 6890: IETF protocol assignments
    "192.0.2.0/24",  # RFC 5737: TEST-NET-1
    "192.88.99.0/24",  # RFC 7526: 6to4 relay anycast, deprecated
    "192.168.0.0/16",  # RFC 1918
    "198.18.0.0/15",  # RFC 2544: benchmarking
    "198.51.100.0/24",  # RFC 5737: TEST-NET-2
    "203.0.113.0/24",  # RFC 5737: TEST-NET-3
    "64:ff9b:1::/48",  # RFC 8215: local-use NAT64
    "100::/64",  # RFC 6666: discard-only
    "100:0:0:1::/64",  # RFC 9780: dummy prefix
    "2001::/23",  # RFC 2928: IETF protocol assignments, Teredo (RFC 4380) among them
    "2001:db8::/32",  # RFC 3849: documentation
    "2002::/16",  # RFC 3056: 6to4, "N/A"
    "3fff::/20",  # RFC 9637: documentation
    "5f00::/16",  # RFC 9602: segment routing SIDs
    "fc00::/7",  # RFC 4193: unique local
    "fec0::/10",  # RFC 3879: site-local, deprecated
)
# Globally reachable parts of the blocks above, and what is reachable outside 2000::/3.
_PUBLIC = (
    "192.0.0.9/32",  # RFC 7723: PCP anycast
    "192.0.0.10/32",  # RFC 8155: TURN anycast
    "2001:1::1/128",  # RFC 7723: PCP anycast
    "2001:1::2/128",  # RFC 8155: TURN anycast
    "2001:1::3/128",  # RFC 9665: DNS-SD SRP anycast
    "2001:3::/32",  # RFC 7450: AMT
    "2001:4:112::/48",  # RFC 7535: AS112
    "2001:20::/28",  # RFC 7343: ORCHIDv2
    "2001:30::/28",  # RFC 9374: drone remote identification
    "64:ff9b::/96",  # RFC 6052: NAT64; judged by the address inside
)
_UNASSIGNED_V6 = "::/0"  # IANA gives out global unicast from 2000::/3 only; the rest leads nowhere public
_GLOBAL_UNICAST_V6 = "2000::/3"

_LOW32 = 0xFFFFFFFF
_MAPPED = 0xFFFF  # ::ffff:a.b.c.d without its last 32 bits
_BADNESS = (Reach.PUBLIC, Reach.PRIVATE, Reach.NEVER)
_ENDS_IN_V4 = frozenset(
    (
        0,  # ::a.b.c.d, RFC 4291 2.5.5.1: IPv4-compatible
        _MAPPED,
        0xFFFF0000,  # ::ffff:0:a.b.c.d, RFC 2765: IPv4-translated
        0x0064FF9B << 64,  # 64:ff9b::a.b.c.d, RFC 6052
    )
)


def is_address(text: str) -> bool:
    """Whether this is an address literal, without brackets."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def classify(address: Address) -> Reach:
    """How far `address` may be reached: the worst of itself and of every IPv4 address hidden in it."""
    number = int(address)
    if address.version == 4:
        return _V4_REACH[bisect_right(_V4_STARTS, number)]
    if number >> 32 == _MAPPED:  # to the kernel this is the IPv4 address
        return _V4_REACH[bisect_right(_V4_STARTS, number & _LOW32)]
    reach = _V6_REACH[bisect_right(_V6_STARTS, number)]
    for inner in _embedded(number):
        reach = _worse(reach, _V4_REACH[bisect_right(_V4_STARTS, inner)])
    return reach


def inside_one_private_block(network: Network) -> bool:
    """Whether a rule for `network` was plainly written about private addresses: 10.20.0.0/16 was, 0.0.0.0/0 was not."""
    network = _unmapped(network)
    if any(_contains(never, network) for never in NEVER_REACHED):
        return False
    return any(_contains(private, network) for private in _PRIVATE_NETWORKS)


type PrefixTables[V] = tuple[tuple[int, Mapping[int, list[V]]], ...]


class PrefixMap[V]:
    """Values by prefix. A look-up costs one access for each prefix length in use, however many prefixes.

    v4, v6  for each length, the longest first: how far an address is shifted, and the values by what is left of it
    """

    def __init__(self, pairs: Iterable[tuple[Network, V]] = ()) -> None:
        tables: dict[int, dict[int, dict[int, list[V]]]] = {4: {}, 6: {}}
        for prefix, value in pairs:
            network = _unmapped(prefix)
            shift = network.max_prefixlen - network.prefixlen
            table = tables[network.version].setdefault(shift, {})
            table.setdefault(int(network.network_address) >> shift, []).append(value)
        self.v4: PrefixTables[V] = tuple(sorted(tables[4].items()))
        self.v6: PrefixTables[V] = tuple(sorted(tables[6].items()))

    @classmethod
    def of(cls, v4: PrefixTables[V], v6: PrefixTables[V]) -> PrefixMap[V]:
        """The map of tables that were made before."""
        made = cls()
        made.v4, made.v6 = v4, v6
        return made

    def __bool__(self) -> bool:
        return bool(self.v4 or self.v6)

    def covering(self, address: Address) -> list[V]:
        """The values of every prefix that holds `address`, longest first, equal prefixes in the order given.

        An IPv4-mapped IPv6 address is looked up as its IPv4 address.
        """
        number = int(address)
        tables = self.v4
        if address.version == 6:
            if number >> 32 == _MAPPED:
                number &= _LOW32
            else:
                tables = self.v6
        found: list[V] = []
        for shift, table in tables:
            values = table.get(number >> shift)
            if values is not None:
                found += values
        return found


def _worse(one: Reach, other: Reach) -> Reach:
    return max(one, other, key=_BADNESS.index)


def _embedded(number: int) -> Iterator[int]:
    """Every IPv4 address that an IPv6 address carries."""
    low = number & _LOW32
    high = number >> 32
    if high in _ENDS_IN_V4:
        yield low
    if high & 0xFDFFFFFF == 0x5EFE:  # RFC 5214 6.1: ISATAP, with and without the universal bit
        yield low
    top = number >> 112
    if top == 0x2002:  # RFC 3056: 6to4
        yield number >> 80 & _LOW32
    elif number >> 96 == 0x20010000:  # RFC 4380 4: Teredo; server, and client with its bits flipped
        yield number >> 64 & _LOW32
        yield low ^ _LOW32
    elif number >> 80 == 0x0064FF9B0001:  # RFC 8215
        yield from _local_nat64(number)


def _local_nat64(number: int) -> Iterator[int]:
    """Each IPv4 address that a translator may read, as it is set up for /96, /64, /56 or /48 (RFC 6052 2.2)."""
    joined = number >> 64 << 56 | number & (1 << 56) - 1  # the shorter three lie around the octet of bits 64 to 71
    readings = [number & _LOW32]
    readings += [joined >> zeros & _LOW32 for zeros in (24, 32, 40) if joined & (1 << zeros) - 1 == 0]
    yield from filter(None, readings)  # nothing in one place: the address stands in another


def _unmapped(network: Network) -> Network:
    """`::ffff:10.0.0.0/104` is 10.0.0.0/8."""
    if network.version == 6 and network.prefixlen >= 96 and int(network.network_address) >> 32 == _MAPPED:
        return IPv4Network((int(network.network_address) & _LOW32, network.prefixlen - 96))
    return network


def _contains(outer: Network, inner: Network) -> bool:
    shift = outer.max_prefixlen - outer.prefixlen
    return (
        outer.version == inner.version
        and outer.prefixlen <= inner.prefixlen
        and int(outer.network_address) >> shift == int(inner.network_address) >> shift
    )


def _parse(*tables: Iterable[str]) -> tuple[Network, ...]:
    return tuple(ip_network(text) for table in tables for text in table)


NEVER_REACHED = _parse(_METADATA, _LINK_LOCAL, _LOOPBACK, _NOWHERE)
_PRIVATE_NETWORKS = _parse(_PRIVATE)


def _flatten(version: int) -> tuple[list[int], list[Reach]]:
    """The tables as one sorted list of starts: the address space cut where the most specific prefix changes."""
    networks = [(network, Reach.NEVER) for network in NEVER_REACHED]
    networks += [(network, Reach.PRIVATE) for network in (*_PRIVATE_NETWORKS, ip_network(_UNASSIGNED_V6))]
    networks += [(network, Reach.PUBLIC) for network in _parse(_PUBLIC, (_GLOBAL_UNICAST_V6, "0.0.0.0/0"))]
    mine = sorted(
        ((network, reach) for network, reach in networks if network.version == version),
        key=lambda pair: pair[0].prefixlen,
    )
    edges = {int(network.network_address) for network, _ in mine}
    edges |= {int(network.broadcast_address) + 1 for network, _ in mine}
    starts = sorted(edges)
    reaches = [Reach.NEVER]  # below the first start, where no address is
    for start in starts:
        holding = [
            reach for network, reach in mine if int(network.network_address) <= start <= int(network.broadcast_address)
        ]
        reaches.append(holding[-1] if holding else Reach.NEVER)
    return starts, reaches


_V4_STARTS, _V4_REACH = _flatten(4)
_V6_STARTS, _V6_REACH = _flatten(6)
