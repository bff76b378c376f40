"""One gate, wired: the only file that knows every part. The parts know each other by what they are handed here."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Self

from policies.engine import admit, carries_plain, decide, expect, identify
from policies.hostnames import Hostname
from policies.index import Policy
from policies.load import Source
from policies.model import Address, Attempt, Stage, Verdict
from proxy.epoll import Epoll
from proxy.hosts import HostsEntry, Nameserver, read_hosts_file, system_nameservers, system_search
from proxy.inspector import Inspector
from proxy.limits import Limits
from proxy.listener import Listener, OriginalDst
from proxy.lookups import Lookups
from proxy.record import Record, Sink, new_id, record_of
from proxy.relays.dns import DnsRelay
from proxy.resolver import Resolver

if TYPE_CHECKING:
    from pki.authority import Issuing


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator says besides the policy.

    workload     every connection is this workload's; None: as its source address says
    issuing      what signs leaves; None: a policy that inspects nothing
    upstream_ca  path of the roots that upstreams are verified against; None: the system's
    """

    workload: str | None = None
    issuing: Issuing | None = None
    hosts: Mapping[Hostname, HostsEntry] = field(default_factory=dict)
    nameservers: Sequence[Nameserver] | None = None
    upstream_ca: str | None = None
    limits: Limits = field(default_factory=Limits)
