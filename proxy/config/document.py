"""A `Config` as JSON and back, exactly: what a supervisor tells its workers. An operator writes none of this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from ipaddress import ip_address, ip_network
from typing import Any

from policies.hostnames import Hostname
from proxy.config import Config, GateMode, HttpHost, Kubernetes, OnLogFailure, OnStale, SocketAddress, UpstreamProxy
from proxy.hosts import HostsEntry
from proxy.limits import Limits


def to_document(config: Config) -> dict[str, object]:
    """JSON-able. It holds paths of secrets, never a secret."""
    document: dict[str, object] = {field.name: getattr(config, field.name) for field in fields(config)}
    proxy = config.upstream_proxy
    return document | {
        "proxy_protocol_from": [str(network) for network in config.proxy_protocol_from],
        "hosts": [[name, [str(a) for a in entry.addresses], entry.port] for name, entry in config.hosts.items()],
        "udp_forward": [[*address, target] for address, target in config.udp_forward.items()],
        "dns_forward": [[zone, list(servers)] for zone, servers in config.dns_forward.items()],
        "upstream_proxy": proxy and [proxy.host, proxy.port, proxy.credentials, [str(one) for one in proxy.direct]],
        "kubernetes": config.kubernetes and asdict(config.kubernetes),
        "limits": asdict(config.limits),
        "bounds": asdict(config.bounds),
    }


def from_document(document: Mapping[str, Any]) -> Config:
    """What `to_document` gave, also by way of JSON text."""
    from proxy.inspector.handover import Bounds  # here: the supervisor only writes
    from proxy.upstream_proxy import parse_direct

    proxy, cluster = document["upstream_proxy"], document["kubernetes"]
    read = {
        "mode": GateMode(document["mode"]),
        "policy": tuple(document["policy"]),
        "tags": tuple(document["tags"]),
        "addons": tuple(document["addons"]),
        "listen": _addresses(document["listen"]),
        "proxy_listen": _addresses(document["proxy_listen"]),
        "dns_listen": _addresses(document["dns_listen"]),
        "udp_listen": _addresses(document["udp_listen"]),
        "udp_forward": {(host, port): target for host, port, target in document["udp_forward"]},
        "dns_search": None if (search := document["dns_search"]) is None else tuple(map(Hostname, search)),
        "dns_forward": {Hostname(zone): _addresses(servers) for zone, servers in document["dns_forward"]},
        "proxy_protocol_from": tuple(map(ip_network, document["proxy_protocol_from"])),
        "nameservers": _addresses(document["nameservers"]),
        "hosts": {
            Hostname(name): HostsEntry(tuple(map(ip_address, addresses)), port)
            for name, addresses, port in document["hosts"]
        },
        "upstream_proxy": proxy and UpstreamProxy(proxy[0], proxy[1], proxy[2], tuple(map(parse_direct, proxy[3]))),
        "kubernetes": cluster and Kubernetes(**{**cluster, "on_stale": OnStale(cluster["on_stale"])}),
        "http_host": HttpHost(document["http_host"]),
        "on_log_failure": OnLogFailure(document["on_log_failure"]),
        "admin": document["admin"] and tuple(document["admin"]),
        "limits": Limits(**document["limits"]),
        "bounds": Bounds(**document["bounds"]),
    }
    return Config(**{**document, **read})


def _addresses(found: list[list[Any]] | None) -> tuple[SocketAddress, ...] | None:
    return None if found is None else tuple((address, port) for address, port in found)
