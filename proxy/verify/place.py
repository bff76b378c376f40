"""Where a verification runs: devices, routes, nameserver, proxy, cluster. It asks the kernel and sends nothing."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from policies.addresses import is_address
from proxy.hosts import system_nameservers

# linux/netlink.h, linux/rtnetlink.h and linux/if.h
_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=8BI")
_ATTRIBUTE = struct.Struct("=HH")
_GETROUTE, _NEWROUTE, _REQUEST = 26, 24, 1
_DESTINATION, _DEVICE, _GATEWAY = 1, 4, 5
_SIOCGIFFLAGS = 0x8913
_UP, _LOOPBACK = 0x1, 0x8
_MAX_REPLY = 4096
_PATIENCE_S = 1.0  # the kernel answers within the call
_SOMEWHERE4, _SOMEWHERE6 = "1.1.1.1", "2606:4700:4700::1111"
_NODE_VARIABLES = ("NODE_IP", "HOST_IP")  # as people name `status.hostIP` of the downward API
_PROXY_VARIABLES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
_SERVICE = "10.96.0.1"  # kubeadm's default; what KUBERNETES_SERVICE_HOST says goes first


@dataclass(frozen=True, slots=True)
class Route:
    """How the kernel would send to an address. `gateway` None: it is a neighbour, or this machine."""

    gateway: str | None
    device: int


@dataclass(frozen=True, slots=True)
class Place:
    """What probes need to know of here.

    is_closed  no device but a loopback is up
    routers    the first of each family, IPv4's before IPv6's
    node       the machine below, as the environment says, or else the router
    proxy      address or name, and port
    """

    is_closed: bool
    has_ipv6: bool
    routers: tuple[str, ...]
    node: str | None
    nameserver: tuple[str, int]
    api: tuple[str, int]
    proxy: tuple[str, int] | None
    device6: int  # that leads outside

    @property
    def router(self) -> str:
        return next(iter(self.routers), "")


def look_around(environment: Mapping[str, str]) -> Place:
    """The place that this process is in."""
    route4, route6 = find_route(_SOMEWHERE4), find_route(_SOMEWHERE6)
    routers = tuple(route.gateway for route in (route4, route6) if route and route.gateway)
    named = filter(is_address, (environment.get(variable, "") for variable in _NODE_VARIABLES))
    service, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
    return Place(
        is_closed=is_closed(),
        has_ipv6=route6 is not None,
        routers=routers,
        node=next(iter((*named, *routers)), None),
        nameserver=system_nameservers()[0],
        api=(service if is_address(service) else _SERVICE, int(port) if port.isdecimal() else 443),
        proxy=_proxy(environment),
        device6=route6.device if route6 else 0,
    )


def is_closed() -> bool:
    """Whether this network namespace has no device that is up, but for loopbacks. False where nobody can tell."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            return all(_leads_nowhere(sock, name) for _, name in socket.if_nameindex())
    except OSError:
        return False


def _leads_nowhere(sock: socket.socket, device: str) -> bool:
    found = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH14x", device.encode(), 0))
    flags: int = struct.unpack_from("H", found, 16)[0]
    return not flags & _UP or bool(flags & _LOOPBACK)


def find_route(text: str) -> Route | None:
    """The kernel's route to an address, or to the first of a name. None: there is none, or it does not say."""
    try:
        found = socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    address = ip_address(str(found[0][4][0]).partition("%")[0])
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    route = _ROUTE.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    body = route + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address.packed), _DESTINATION) + address.packed
    request = _HEADER.pack(_HEADER.size + len(body), _GETROUTE, _REQUEST, 1, 0) + body
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.settimeout(_PATIENCE_S)
            sock.sendto(request, (0, 0))
            reply = sock.recv(_MAX_REPLY)
    except OSError:
        return None
    if _HEADER.unpack_from(reply)[1] != _NEWROUTE:
        return None
    attributes = dict(_attributes(reply[_HEADER.size + _ROUTE.size :]))
    gateway = attributes.get(_GATEWAY)
    device = int.from_bytes(attributes.get(_DEVICE, b""), sys.byteorder)
    return Route(str(ip_address(gateway)) if gateway else None, device)


def _attributes(body: bytes) -> list[tuple[int, bytes]]:
    found = []
    while len(body) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(body)
        if length < _ATTRIBUTE.size:
            break
        found.append((kind, body[_ATTRIBUTE.size : length]))
        body = body[length + 3 & ~3 :]
    return found


def _proxy(environment: Mapping[str, str]) -> tuple[str, int] | None:
    for variable in _PROXY_VARIABLES:
        url = environment.get(variable, "")
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            if parts.hostname and parts.scheme == "http":
                return parts.hostname, parts.port or 80
        except ValueError:
            continue
    return None


def gate_address(text: str) -> tuple[str, int]:
    """`ADDR:PORT` or `[ADDR6]:PORT`. Raises ValueError, which says how to write it."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not is_address(host) or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise ValueError(f'"{text}" is not ADDRESS:PORT; write 10.0.0.1:15001 or [fd00::1]:15001')
    return host, int(port)
