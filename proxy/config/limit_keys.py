"""The rows of the table of keys under `limits`: what one worker bears, in words. The defaults are in `Limits`."""

from __future__ import annotations

from proxy.config.key import ConfigKey, Group
from proxy.config.values import seconds, whole

MAX_CONNECTIONS = 1_000_000  # descriptors of a process end there by default (fs.nr_open)
WEEK_S = 7 * 86400.0

LIMITS = (
    ConfigKey(
        path="limits.maxConnections",
        group=Group.LIMITS,
        fields=("limits.max_connections", "bounds.connections"),
        shape=whole(1, MAX_CONNECTIONS),
        metavar="N",
        says="Open connections; one more is reset.",
        example="20000",
    ),
    ConfigKey(
        path="limits.maxPerSource",
        group=Group.LIMITS,
        fields=("limits.max_per_source", "bounds.per_source"),
        shape=whole(1, MAX_CONNECTIONS),
        metavar="N",
        says="Open connections of one source address, so that it does not shut out the others.",
        example="5000",
        unsaid="half of maxConnections",
    ),
    ConfigKey(
        path="limits.helloS",
        group=Group.LIMITS,
        fields=("limits.hello_s", "bounds.handshake_s"),
        shape=seconds(600, least=0.1),
        metavar="SECONDS",
        says="Seconds that a client may take to say whom it wants: its ClientHello, CONNECT or first head.",
        example="5",
    ),
    ConfigKey(
        path="limits.headS",
        group=Group.LIMITS,
        fields=("bounds.head_s",),
        shape=seconds(600, least=0.1),
        metavar="SECONDS",
        says="Seconds that the head of an inspected request may take.",
        example="10",
    ),
    ConfigKey(
        path="limits.silenceS",
        group=Group.LIMITS,
        fields=("limits.silence_s",),
        shape=seconds(60, least=0.01),
        metavar="SECONDS",
        says="Seconds of silence after which a client counts as waiting for the server to speak (tcp rules).",
        example="1",
    ),
    ConfigKey(
        path="limits.resolveS",
        group=Group.LIMITS,
        fields=("limits.resolve_s",),
        shape=seconds(600, least=0.1),
        metavar="SECONDS",
        says="Seconds that a name may take to resolve.",
        example="5",
    ),
    ConfigKey(
        path="limits.dialS",
        group=Group.LIMITS,
        fields=("limits.dial_s", "bounds.dial_s"),
        shape=seconds(600, least=0.1),
        metavar="SECONDS",
        says="Seconds that an upstream may take to accept a connection.",
        example="5",
    ),
    ConfigKey(
        path="limits.idleS",
        group=Group.LIMITS,
        fields=("limits.idle_s", "bounds.idle_s"),
        shape=seconds(WEEK_S, least=1),
        metavar="SECONDS",
        says="Seconds without a byte in either direction, after which a connection is closed.",
        example="900",
    ),
    ConfigKey(
        path="limits.maxHello",
        group=Group.LIMITS,
        fields=("limits.max_hello",),
        shape=whole(1024, 65536),
        metavar="BYTES",
        says="Bytes of the largest ClientHello that is read.",
        example="32768",
    ),
    ConfigKey(
        path="limits.maxAddresses",
        group=Group.LIMITS,
        fields=("limits.max_addresses",),
        shape=whole(1, 64),
        metavar="N",
        says="Addresses of one name that are tried for one connection.",
        example="3",
    ),
)
