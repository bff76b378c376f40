"""One accepted connection from its first byte to its end: peek, ask for the verdict, then deny, pass through or hand over.

It reads nothing of what it lets pass: the hello is peeked and stays in the kernel's queue for the upstream or inspector.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from addons.answers import answer
from addons.judge import BAD_GATEWAY, FORBIDDEN, Judgement
from policies.engine import Expect
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Action, Address, Attempt, Dial, Reason, Stage, Tls, Verdict
from proxy import dialer
from proxy.epoll import IN, ONESHOT, RDHUP, Epoll
from proxy.limits import Limits
from proxy.original_dst import Destination, OriginalDst
from proxy.record import Peer, Record, Sink, new_id, record_of
from proxy.relays.stream import End, Pipes, StreamRelay, reset
from proxy.resolver import NameNotFound, Resolution, ResolverFailed
from proxy.wire.client_hello import (
    Alert,
    ClientHello,
    First,
    HelloTooLarge,
    MalformedHello,
    classify_first,
    needs,
    parse_hello,
    render_alert,
)

_FIRST_BYTES = IN | RDHUP | ONESHOT  # one event, then silence while the verdict is carried out
_REST_S = 0.25  # woken with less than asked for (the kernel is short of memory for this queue): look again after it

_ALERTS = {
    Reason.MALFORMED_HELLO: Alert.DECODE_ERROR,
    Reason.HELLO_TOO_LARGE: Alert.DECODE_ERROR,
    Reason.NAME_NOT_FOUND: Alert.UNRECOGNIZED_NAME,
    Reason.RESOLVER_FAILED: Alert.INTERNAL_ERROR,
    Reason.UPSTREAM_REFUSED: Alert.INTERNAL_ERROR,
    Reason.UPSTREAM_TIMEOUT: Alert.INTERNAL_ERROR,
    Reason.UPSTREAM_FAILED: Alert.INTERNAL_ERROR,
    Reason.GATE_FAILED: Alert.INTERNAL_ERROR,
}
_UNANSWERED = frozenset({Reason.CLIENT_GONE, Reason.HELLO_TIMEOUT})
