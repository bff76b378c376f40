"""What the operator says besides the policy: one model for flags, `OUTGATE_*` variables and `gate.yaml`.

It knows values, not how they are written (`config_keys`) and not what is done with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from policies.hostnames import Hostname, Pattern
from policies.model import Network
from proxy.hosts import HostsEntry, Nameserver
from proxy.inspector.handover import Bounds
from proxy.limits import Limits

type SocketAddress = tuple[str, int]  # an address as text, without brackets, and a port


class GateMode(StrEnum):
    """How connections arrive, and who they are."""

    GATEWAY = "gateway"  # redirected from other hosts or pods; the source address says which workload
    SIDECAR = "sidecar"  # redirected inside one pod; `workload` says which
    PROXY = "proxy"  # CONNECT and absolute form alone; credentials or the source address say which


class OnLogFailure(StrEnum):
    """What happens to attempts while decision records cannot be written."""

    CONTINUE = "continue"
    DENY = "deny"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One gate. Paths are absolute; what a key means to the operator stands in docs/configuration.md."""

    mode: GateMode
    policy: tuple[str, ...]
    tags: tuple[str, ...] = ()
    workload: str | None = None
    listen: tuple[SocketAddress, ...] = ()  # redirected connections
    proxy_listen: tuple[SocketAddress, ...] = ()  # CONNECT and absolute form
    credentials: str | None = None
    proxy_protocol_from: tuple[Network, ...] = ()
    workers: int = 1
    nameservers: tuple[Nameserver, ...] | None = None  # None: the system's
    hosts: Mapping[Hostname, HostsEntry] = field(default_factory=dict)
    upstream_proxy: UpstreamProxy | None = None
    upstream_ca: str | None = None
    pki: str | None = None
    log: str | None = None  # a path, `-` for standard error, None for standard output
    on_log_failure: OnLogFailure = OnLogFailure.CONTINUE
    admin: SocketAddress | None = ("127.0.0.1", 9901)
    admin_token: str | None = None  # path of a file
    grace_s: float = 5.0  # at the end: how long open connections may take to finish
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)
