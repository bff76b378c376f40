"""What workers and the supervisor say to the opener and it to them, as bytes. It sends nothing.

Elements arrive from another process and become nft's text: they are read as addresses, protocols and numbers, or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any

import orjson

from policies.addresses import Address, Reach, classify
from policies.hostnames import Hostname
from proxy.elements import Element, Transport
from proxy.opener.claims import Claim

MAX_ELEMENTS = 1_024  # of one request; a message is 128 KiB at most
MAX_CLAIMS = 200  # of one message: names and workloads are long
MAX_TIME_S = 7_200.0  # twice the longest TTL that counts, which is that of dnstap's observer

_PROTOCOLS: dict[object, Transport] = {"tcp": "tcp", "udp": "udp"}

# --- from a worker ---


@dataclass(frozen=True, slots=True)
class Open:
    """Let the source reach these for so long. It is answered by Done."""

    number: int
    workload: str
    name: str
    source: str
    time_s: float
    targets: Sequence[Sequence[Any]]  # [address, protocol, port]

    def claims(self) -> list[Claim]:
        """Raises NONSENSE."""
        if not isinstance(self.workload, str) or not isinstance(self.name, str):
            raise TypeError("workload or name")
        if not 0 < self.time_s <= MAX_TIME_S or not 0 < len(self.targets) <= MAX_ELEMENTS:
            raise ValueError("time or number")
        source, name = ip_address(self.source), Hostname(self.name)
        return [
            Claim(self.workload, name, _element(source, address, protocol, port))
            for address, protocol, port in self.targets
        ]


@dataclass(frozen=True, slots=True)
class Review:
    """Say who claims what: the policy is another one. It is answered by Claimed messages."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """The policy does not admit these claims any more. `is_last`: of the review; it is answered by Done, after all that
    nobody claims any more is closed and its connections are cut."""

    number: int
    claims: Sequence[Sequence[Any]]  # as `write_claims` has them
    is_last: bool


# --- to a worker ---


@dataclass(frozen=True, slots=True)
class Done:
    """`why` it was not done; empty: it was."""

    number: int
    why: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """Some of the claims that a review asked for."""

    number: int
    claims: Sequence[Sequence[Any]]
    is_last: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """What was open may be closed: ask anew."""


# --- the supervisor ---


@dataclass(frozen=True, slots=True)
class Join:
    """To the opener: with it comes the socket to a worker."""


@dataclass(frozen=True, slots=True)
class State:
    """From the opener, once a second: why it cannot open anything (empty: it can), what is open, connections cut."""

    why: str
    open: int
    cut: int


type Message = Open | Review | Close | Done | Claimed | Forget | Join | State

_KINDS = (Open, Review, Close, Done, Claimed, Forget, Join, State)
_BY_NAME: dict[str, Callable[..., Message]] = {kind.__name__: kind for kind in _KINDS}
NONSENSE = (ValueError, TypeError, KeyError, AttributeError)  # raised for what no side of ours says


def to_bytes(message: Message) -> bytes:
    return orjson.dumps({type(message).__name__: asdict(message)})


def from_bytes(text: bytes) -> Message:
    """Raises NONSENSE."""
    ((kind, fields),) = orjson.loads(text).items()
    return _BY_NAME[kind](**fields)


def write_claims(claims: Sequence[Claim]) -> list[list[str | int]]:
    return [
        [one.workload, one.name, str(one.element.source), str(one.element.address), one.element.protocol,
         one.element.port]
        for one in claims
    ]  # fmt: skip


def read_claims(rows: Sequence[Sequence[Any]]) -> list[Claim]:
    """Raises ValueError, TypeError."""
    return [
        Claim(workload, Hostname(name), _element(ip_address(source), address, protocol, port))
        for workload, name, source, address, protocol, port in rows
    ]


def _element(source: Address, address: str, protocol: object, port: object) -> Element:
    to = ip_address(address)
    if type(port) is not int or not 0 < port < 65536 or protocol not in _PROTOCOLS or source.version != to.version:
        raise ValueError("no element")
    if getattr(to, "scope_id", None) or getattr(source, "scope_id", None) or classify(to) is Reach.NEVER:
        raise ValueError("an address that nobody reaches")
    return Element(source, to, _PROTOCOLS[protocol], port)
