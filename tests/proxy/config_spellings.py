"""One key of the configuration said in its three ways, with what else it needs to mean something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy.config.key import ConfigKey, Many
from proxy.config.keys import KEYS
from tests.policies.trees import read_python

NEEDS: Mapping[str, Mapping[str, object]] = {
    "listen": {"mode": "gateway"},
    "dnsSearch": {"dns_listen": ("127.0.0.1:0",)},
    "openings": {"dns_listen": ("127.0.0.1:0",)},
    "credentials": {"proxy_listen": ("127.0.0.1:0",)},
    "proxyProtocolFrom": {"proxy_listen": ("127.0.0.1:0",)},
    "kubernetes.onStale": {"kubernetes_api": "in-cluster"},
    "kubernetes.staleS": {"kubernetes_api": "in-cluster"},
    "kubernetes.tokenAudience": {"kubernetes_api": "in-cluster", "proxy_listen": ("127.0.0.1:0",)},
    "upstreamProxy.credentials": {"upstream_proxy_url": "http://proxy.example:1"},
    "upstreamProxy.direct": {"upstream_proxy_url": "http://proxy.example:1"},
    "limits.maxPerSource": {"limits_max_connections": "100000"},
}


def needed(key: ConfigKey) -> dict[str, object]:
    """Flags that go with `key`."""
    policy = {} if key.path == "policy" else {"policy": ("needed.yaml",)}
    return {**policy, **NEEDS.get(key.path, {})}


def in_file(key: ConfigKey) -> str:
    above, _, name = key.path.rpartition(".")
    return f"{above}: {{{name}: {key.example}}}\n" if above else f"{name}: {key.example}\n"


def texts(key: ConfigKey) -> list[str]:
    """The example as it is written on a command line, one text for each value."""
    match read_python(key.example):
        case dict() as hosts:
            return [
                f"{name}={target}"
                for name, targets in hosts.items()
                for target in (targets if isinstance(targets, list) else [targets])
            ]
        case bool(flag):
            return [str(flag).lower()]
        case list() as several:
            return [str(one) for one in several]
        case one:
            return [str(one)]


def in_variable(key: ConfigKey) -> dict[str, str]:
    return {key.variable: (":" if key.many is Many.PATHS else ", ").join(texts(key))}


def in_flag(key: ConfigKey) -> dict[str, object]:
    return {key.argument: tuple(texts(key)) if key.many else texts(key)[0]}


def ids(keys: Sequence[ConfigKey] = KEYS) -> list[str]:
    return [key.path for key in keys]
