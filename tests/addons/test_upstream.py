"""What `Upstream` tells of its dials, and what it never dials."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import pytest

from addons.judge import Conversation, Unreachable
from addons.upstream import Upstream, trust_origins
from policies.hostnames import Hostname, parse_hostname
from policies.model import Action, Address, Reason, Stage, Verdict

HOST = parse_hostname("api.example.com")
ALLOW = Verdict(Action.ALLOW, Reason.RULE, Stage.HTTP)


@dataclass(frozen=True)
class Found:
    addresses: tuple[Address, ...]
    port: int | None
    from_hosts: bool = True


@pytest.fixture
def door() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        yield port


def open_plain(found: Found | Unreachable, *, own: int = 0) -> tuple[Reason | None, list[Reason | None]]:
    """How opening ended, and what was told of dials."""
    told: list[Reason | None] = []

    async def resolve(_name: Hostname) -> Found:
        if isinstance(found, Unreachable):
            raise found
        return found

    def dialled(seconds: float, reason: Reason | None) -> None:
        assert 0 <= seconds < 20
        told.append(reason)

    async def run() -> Reason | None:
        conversation = Conversation("app", 80, True, ("10.0.0.1", 5000), HOST, allowed=ALLOW)
        upstream = Upstream(
            resolve,
            trust_origins(),
            lambda _client: conversation,
            is_own=lambda _address, port: port == own,
            dialled=dialled,
        )
        try:
            transport = await upstream.open(conversation, asyncio.Protocol)
        except Unreachable as failure:
            return failure.reason
        transport.close()
        return None

    return asyncio.run(run()), told


def loopback(port: int) -> Found:
    return Found((ip_address("127.0.0.1"),), port)


def test_connection_is_told(door: int) -> None:
    assert open_plain(loopback(door)) == (None, [None])


def test_refusal_is_told() -> None:
    assert open_plain(loopback(1)) == (Reason.UPSTREAM_REFUSED, [Reason.UPSTREAM_REFUSED])


def test_what_was_not_dialled_is_not_told() -> None:
    gone = Unreachable(Reason.NAME_NOT_FOUND, "")
    assert open_plain(gone) == (Reason.NAME_NOT_FOUND, [])
    assert open_plain(Found((ip_address("169.254.169.254"),), 80)) == (Reason.NEVER_REACHED, [])


def test_the_gates_own_door_is_never_dialled(door: int) -> None:
    assert open_plain(loopback(door), own=door) == (Reason.NEVER_REACHED, [])
