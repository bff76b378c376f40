"""What may arrive on a port of a workload, asked before anything has arrived that could be judged."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from policies.index import Policy
from policies.model import Mode, PortRange


class Expect(Enum):
    """How the listener opens a port of a workload."""

    PEEK = auto()  # TLS or HTTP: the first bytes name the host
    OPAQUE = auto()  # only `tcp:` rules cover it: relay at once, the server may speak first
    EITHER = auto()  # both: peek, and take silence for opaque


def expect(policy: Policy, workload: str, port: int) -> Expect:
    """What may arrive on `port` of `workload`."""
    index = policy.index.get(workload)
    if index is None:
        return Expect.PEEK
    if not any_holds(index.tcp.ports, port):  # audit lets opaque bytes pass too, so it must not wait for a hello
        return Expect.EITHER if index.workload.mode is Mode.AUDIT else Expect.PEEK
    if any_holds(index.host_ports, port):
        return Expect.EITHER
    # An address rule carries any name; a closed one has to be seen to be denied. A rule by name dials that name alone.
    closes = policy.guard_table.closes or index.hosts.closes
    return Expect.EITHER if closes and any_holds(index.tcp.prefix_ports, port) else Expect.OPAQUE


def carries_plain(policy: Policy, workload: str, port: int) -> bool:
    """Whether a host rule of `workload` carries plain HTTP on `port`; port 80 always counts as plain."""
    index = policy.index.get(workload)
    return port == 80 or (index is not None and any_holds(index.plain_ports, port))


def expects_quic(policy: Policy, workload: str, port: int) -> bool:
    """Whether a rule of `workload` judges QUIC on UDP `port` by the name in a connection's first packets."""
    index = policy.index.get(workload)
    return index is not None and any_holds(index.udp.quic_ports, port)


def any_holds(ranges: Iterable[PortRange], port: int) -> bool:
    """Whether one of these ranges has the port."""
    return any(port in ports for ports in ranges)
