"""A configuration as JSON and back: a worker has exactly the gate that the supervisor was told of."""

from __future__ import annotations

import json
from dataclasses import fields
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.hostnames import Hostname, Pattern
from proxy.config import Config, GateMode, HttpHost, Kubernetes, OnLogFailure, OnStale, UpstreamProxy
from proxy.config.document import from_document, to_document
from proxy.hosts import HostsEntry
from proxy.inspector.handover import Bounds
from proxy.limits import Limits

NAMES = st.from_regex(r"[a-z0-9_]{1,9}(\.[a-z]{1,9}){0,2}", fullmatch=True).map(Hostname)
PORTS = st.integers(0, 65535)
TEXTS = st.text(min_size=1, max_size=20)
ADDRESSES = st.ip_addresses() | st.just(IPv6Address("fe80::1%eth0"))
SOCKET_ADDRESSES = st.tuples(ADDRESSES.map(str), PORTS)
NETWORKS = st.builds(
    lambda n, bits: IPv4Network((n >> bits << bits, 32 - bits)), st.integers(0, 2**32 - 1), st.integers(0, 32)
)
NETWORKS6 = st.builds(lambda n, b: IPv6Network((n >> b << b, 128 - b)), st.integers(0, 2**128 - 1), st.integers(0, 128))
NUMBERS = {"int": st.integers(1, 10**9), "float": st.floats(0, 1e9, allow_nan=False)}


def several[T](one: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(one, max_size=3).map(tuple)


def numbers[T: (Limits, Bounds)](kind: type[T]) -> st.SearchStrategy[T]:
    """Every field another number."""
    return st.builds(kind, **{field.name: NUMBERS[str(field.type)] for field in fields(kind)})


FIELDS: dict[str, st.SearchStrategy[Any]] = {  # of many types
    "mode": st.sampled_from(GateMode),
    "policy": several(TEXTS),
    "tags": several(TEXTS),
    "workload": st.none() | TEXTS,
    "listen": st.none() | several(SOCKET_ADDRESSES),
    "proxy_listen": st.none() | several(SOCKET_ADDRESSES),
    "dns_listen": several(SOCKET_ADDRESSES),
    "udp_listen": several(SOCKET_ADDRESSES),
    "udp_forward": st.dictionaries(SOCKET_ADDRESSES, TEXTS, max_size=3),
    "dnstap_listen": st.none() | TEXTS,
    "dns_search": st.none() | several(NAMES),
    "dns_new_names": st.integers(0, 10**6),
    "dns_new_names_burst": st.integers(1, 10**6),
    "dns_labels": st.integers(1, 10),
    "dns_per_source": st.integers(1, 10**6),
    "dns_forward": st.dictionaries(NAMES, several(SOCKET_ADDRESSES), max_size=3),
    "credentials": st.none() | TEXTS,
    "proxy_protocol_from": several(NETWORKS | NETWORKS6),
    "workers": st.integers(1, 64),
    "nameservers": st.none() | several(SOCKET_ADDRESSES),
    "hosts": st.dictionaries(
        NAMES, st.builds(HostsEntry, several(ADDRESSES | st.just(IPv4Address(1))), st.none() | PORTS), max_size=3
    ),
    "upstream_proxy": st.none()
    | st.builds(
        UpstreamProxy,
        NAMES,
        PORTS,
        st.none() | TEXTS,
        several(NETWORKS | NETWORKS6 | st.builds(Pattern, NAMES, st.booleans())),
    ),
    "kubernetes": st.none()
    | st.builds(Kubernetes, TEXTS, st.sampled_from(OnStale), NUMBERS["float"], st.none() | TEXTS),
    "upstream_ca": st.none() | TEXTS,
    "pki": st.none() | TEXTS,
    "log": st.none() | TEXTS,
    "http_host": st.sampled_from(HttpHost),
    "addons": several(TEXTS),
    "on_log_failure": st.sampled_from(OnLogFailure),
    "admin": st.none() | SOCKET_ADDRESSES,
    "admin_token": st.none() | TEXTS,
    "drain_s": NUMBERS["float"],
    "grace_s": NUMBERS["float"],
    "openings": st.booleans(),
    "limits": numbers(Limits),
    "bounds": numbers(Bounds),
}
CONFIGS = st.builds(Config, **FIELDS)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(CONFIGS)
def test_a_configuration_is_the_same_after_json(config: Config) -> None:
    told = from_document(json.loads(json.dumps(to_document(config))))

    assert told == config
    assert [type(getattr(told, field.name)) for field in fields(Config)] == [
        type(getattr(config, field.name)) for field in fields(Config)
    ]
    assert from_document(to_document(config)) == config


def test_every_field_of_the_model_goes_round() -> None:
    assert set(FIELDS) == {field.name for field in fields(Config)}
