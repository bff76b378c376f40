"""What the operator says of every injected pod, and what comes of one. It knows no specification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from policies.addresses import Address
from proxy.layout import GATE_PORT as GATE_PORT
from proxy.layout import GATE_UID

type Json = dict[str, Any]  # Any: JSON of somebody else

LABEL = "outgate/inject"
ON, OFF = "true", "false"

PREFIX = "outgate/"
WORKLOAD = "outgate/workload"
EXCLUDE_CIDRS, EXCLUDE_PORTS = "outgate/exclude-cidrs", "outgate/exclude-ports"
DEVICES, INBOUND = "outgate/devices", "outgate/inbound"
TRUST = "outgate/trust"
INJECTED = "outgate/injected"
TRUST_DIGEST = "outgate/trust-sha256"  # of the trust directory: a template repeats it to roll on a change
ANNOTATIONS = (WORKLOAD, EXCLUDE_CIDRS, EXCLUDE_PORTS, DEVICES, INBOUND, TRUST, INJECTED, TRUST_DIGEST)

DNS_PORT, UDP_PORT, ADMIN_PORT = 15053, 15006, 9901


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The same for every pod.

    image            of ours, best by digest
    policy, policy_keys  a ConfigMap of the pod's own namespace, and the policy files in it
    trust            the ConfigMap with the trust directory; None: nothing is inspected, nobody has to trust us
    trust_path       where the containers see it
    authority        the Secret of the pod's namespace with the issuing CA; None: the gate inspects nothing
    bind             what the gate's ports are bound to; [::] in a cluster that has IPv6
    cluster_dns      the cluster's name servers, for `cluster_domain`; none: its names have no private addresses
    udp              whether the gate carries datagrams, for which it needs CAP_NET_RAW
    is_user_needed   whether a container must say whom it runs as: an image may name the gate's uid
    may_exclude      whether a pod may name what is reached past the gate
    host_paths       directories of the node that a pod may mount
    label            what switches a pod off
    """

    image: str
    pull_policy: str = "IfNotPresent"
    policy: str = "outgate-policy"
    policy_keys: tuple[str, ...] = ("policy.yaml",)
    trust: str | None = "outgate-trust"
    trust_path: str = "/etc/outgate/trust"
    authority: str | None = None
    bind: str = "0.0.0.0"  # noqa: S104 - the kubelet asks from the node
    gate_uid: int = GATE_UID
    cluster_dns: tuple[Address, ...] = ()
    cluster_domain: str = "cluster.local"
    udp: bool = False
    is_user_needed: bool = False
    may_exclude: bool = True
    host_paths: tuple[str, ...] = ()
    label: str = LABEL


@dataclass(frozen=True, slots=True)
class Injected:
    """The object with a gate in it, what became different (RFC 6902), and what its author should know."""

    changed: Json
    patch: tuple[Json, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """No guard would hold there, or nobody can say. `reason` is one line: where, what, repair."""

    reason: str


type Outcome = Injected | Refused
