"""The values of a verification: a probe, what came of it, and what that means. Nothing is sent here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How a probe is tried."""

    HTTP = "http"
    TLS = "tls"
    SPEAK = "tcp"  # bytes of any other protocol
    DNS_TCP = "dns over tcp"
    DNS = "dns"
    UDP = "udp"
    MULTICAST = "multicast"
    ICMP = "icmp"
    RAW = "raw"  # a packet that no socket of TCP or UDP makes
    UNIX = "unix"
    CONNECT = "connect"  # through the proxy that the environment names
    FRONTING = "fronting"  # a request for another host, inside TLS that is ended at the gate
    CERTIFICATE = "certificate"
    NET_ADMIN = "net_admin"
    PACKET = "packet"
    SETUID = "setuid"
    CLOCK = "clock"


LOCAL = frozenset({Kind.UNIX, Kind.NET_ADMIN, Kind.PACKET, Kind.SETUID})  # these send nothing


class Outcome(StrEnum):
    REACHED = "reached"  # somebody else than the gate answered
    PROXIED = "proxied"  # the gate answered, and that it was the gate is shown
    FAST = "blocked fast"  # refused, by a reset, an ICMP error or the kernel
    SLOW = "blocked slow"  # nothing came back in time
    CAPABILITY = "capability"  # the workload may do what could lead round the gate
    ABSENT = "absent"  # there is nothing here to be tried
    FAILED = "failed"  # it could not be tried, so nothing is known


class Status(StrEnum):
    LEAK = "leak"
    ODD = "odd"  # no leak, and not as it should be: what the policy allows is closed, or the clock is wrong
    OK = "ok"
    FAILED = "failed"


class Proof(StrEnum):
    """What shows that an answer is the gate's, the strongest first. `docs/verify.md` says what each is worth."""

    NAMESPACE = "namespace"  # no device but a loopback is up: nobody outside can answer anything
    MACHINE = "machine"  # the kernel's table of sockets has the other end of this very connection
    HOPS = "hops"  # it answers packets that live no longer than the way to the gate
    CONTROL = "control"  # the proxy answers the same where nobody can be


@dataclass(frozen=True, slots=True)
class Group:
    """What probes of one kind of way out have in common: what a leak there means, and what closes it."""

    means: str
    closes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One row.

    to     address or path; empty: there is no such thing here, and `absent` says why
    say    the bytes that are sent, in the order of messages
    sends  the same for a person
    words  attempts as `outgate why` takes them; where the policy allows one, it is expected to be reached
    name   the SNI or the proxy's target, where the kind needs one
    """

    id: str
    group: str
    what: str
    kind: Kind
    to: str = ""
    port: int = 0
    say: tuple[bytes, ...] = ()
    sends: str = ""
    words: tuple[str, ...] = ()
    name: str = ""
    absent: str = ""

    @property
    def target(self) -> str:
        """As one line of a list: `tcp 192.0.2.1:80`, `udp [2001:db8::1]:53`, `unix /run/x`."""
        if self.kind is Kind.UNIX:
            return f"unix {self.to}"
        if self.kind in LOCAL:
            return "nothing is sent"
        if not self.to:
            return "nowhere"
        host = f"[{self.to}]" if ":" in self.to else self.to
        if self.kind in (Kind.ICMP, Kind.RAW):
            return f"{self.kind.value if self.kind is Kind.ICMP else f'protocol {self.port}'} {host}"
        return f"{'udp' if self.is_datagram else 'tcp'} {host}:{self.port}"

    @property
    def is_datagram(self) -> bool:
        return self.kind in (Kind.DNS, Kind.UDP, Kind.MULTICAST, Kind.CLOCK)


class Manner(StrEnum):
    """What happened on the wire, before anybody asks who answered."""

    ANSWERED = "answered"
    CLOSED = "closed"  # accepted, and closed or reset without a byte
    SILENT = "silent"  # accepted, and then nothing
    REJECTED = (
        "rejected"  # a reset, or ICMP's "port unreachable": whoever has the address may have sent it, or the gate
    )
    REFUSED = "refused"  # by this kernel, by a router's ICMP error, by a proxy
    NOTHING = "nothing"
    POSSIBLE = "possible"  # a capability
    ABSENT = "absent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Heard:
    """What a probe met.

    data   what was answered
    uid    the owner of the other end, where the kernel has it on this machine
    proof  what shows that this machine or the gate answered; None: nothing does
    note   for a person
    """

    manner: Manner
    data: bytes = b""
    note: str = ""
    uid: int | None = None
    proof: Proof | None = None

    @property
    def is_accepted(self) -> bool:
        return self.manner in (Manner.ANSWERED, Manner.CLOSED, Manner.SILENT)


@dataclass(frozen=True, slots=True)
class Row:
    """One probe with its result. `decision` is the gate's id of its verdict, as its log has it."""

    probe: Probe
    outcome: Outcome
    status: Status
    expected: bool  # the policy allows it
    detail: str = ""
    proof: Proof | None = None
    decision: str | None = None
    elapsed_ms: int = 0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited: for a connection or a datagram, for an answer once connected, and for everything."""

    reach_s: float
    answer_s: float
    end: float  # of time.monotonic()
