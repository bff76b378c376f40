"""What the gate bears from one client and from all: times, sizes and counts, each with the attack it answers."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.wire.client_hello import MAX_HELLO


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the listener and what it starts. The defaults suit a gate with a few thousand connections."""

    hello_s: float = 10.0  # slowloris: a hello dribbled byte by byte holds a descriptor until here
    silence_s: float = 0.5  # on a port that may carry either, a client silent for so long waits for the server to speak
    resolve_s: float = 10.0  # a name server that never answers holds the client until here
    dial_s: float = 10.0  # an upstream that drops packets holds two descriptors until here
    stagger_s: float = 0.25  # RFC 8305 5: the next address is tried beside one that has not answered yet
    idle_s: float = 3600.0  # a pair of connections on which nothing moves; peers behind a lost route never say goodbye
    linger_s: float = 2.0  # how long a denied client may take to read its alert and close
    max_hello: int = MAX_HELLO  # bytes peeked, and so queued in the kernel, for one connection
    max_linger: int = 64 * 1024  # bytes of a denied client thrown away, so that no reset overtakes its alert
    max_connections: int = 8192  # descriptors: a flow takes two, up to six while its bytes wait in pipes
    max_per_source: int = 4096  # one workload must not shut out the others
    udp_idle_s: float = 30.0  # a session of datagrams never says goodbye
    udp_sessions: int = 4096  # a descriptor each, and one more for each destination that answers
    udp_per_source: int = 1024  # one client's source ports must not shut out the others
    max_addresses: int = 6  # connections tried for one flow; an answer with 200 addresses must not open 200
