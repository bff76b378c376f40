"""What the listener and the sockets it accepted have of each other. It knows no socket's state and judges nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from policies.engine import Expect
from policies.hostnames import Hostname
from policies.model import Address, Attempt, Reason, Verdict
from proxy.epoll import Epoll
from proxy.flow import Exit
from proxy.inspector.handover import Handover
from proxy.limits import Limits
from proxy.original_dst import OriginalDst
from proxy.record import Peer, Sink


class Identify(Protocol):
    def __call__(self, address: Address, user: str | None, /) -> str: ...


class Guest(Protocol):
    """What a listener has of each socket it accepted, counted from `open` or `refuse` until `Gate.over`."""

    peer: Peer

    def open(self) -> None: ...

    def refuse(self, reason: Reason) -> None: ...

    def abort(self) -> None: ...

    def failed(self, error: Exception) -> None: ...


type Meet = Callable[[Gate, socket.socket, Peer], Guest]


@dataclass(frozen=True, slots=True)
class Gate:
    """What a guest may ask. `Listener` says what each is.

    welcome  begins anew with the socket of a guest that is over: as another guest, or as another peer's
    over     is called once for each guest
    """

    epoll: Epoll
    exit: Exit
    limits: Limits
    original_dst: OriginalDst
    identify: Identify
    expect: Callable[[str, int], Expect]
    carries_plain: Callable[[str, int], bool]
    decide: Callable[[Attempt], Verdict]
    names_of: Callable[[str, Address], tuple[Hostname, ...]]
    exceeded: Callable[[str, Verdict, Hostname], str | None]
    inspect: Callable[[socket.socket, Handover], None] | None
    record: Sink
    clock: Callable[[], float]
    generation: Callable[[], str]
    welcome: Callable[[socket.socket, Peer, Meet], None]
    over: Callable[[Guest], None]
