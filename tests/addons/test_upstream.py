"""What `Upstream` tells of its dials, and what it never dials."""

from __future__ import annotations

import asyncio
import errno
import os
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


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE], ids=["process", "machine"])
def test_want_of_descriptors_is_the_gates_fault_and_not_the_far_ends(
    door: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def without_descriptors(_address: Address, _port: int) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("addons.upstream._dial", without_descriptors)
    assert open_plain(loopback(door)) == (Reason.GATE_FAILED, [Reason.GATE_FAILED])


def test_what_was_not_dialled_is_not_told() -> None:
    gone = Unreachable(Reason.NAME_NOT_FOUND, "")
    assert open_plain(gone) == (Reason.NAME_NOT_FOUND, [])
    assert open_plain(Found((ip_address("169.254.169.254"),), 80)) == (Reason.NEVER_REACHED, [])


def test_the_gates_own_door_is_never_dialled(door: int) -> None:
    assert open_plain(loopback(door), own=door) == (Reason.NEVER_REACHED, [])


def test_small_writes_are_not_held_back(door: int) -> None:
    """Nagle's algorithm, with the other side's delayed acknowledgements, costs a request 40 ms."""

    async def has_no_delay() -> bool:
        async def resolve(_name: Hostname) -> Found:
            return loopback(door)

        conversation = Conversation("app", 80, True, ("10.0.0.1", 5000), HOST, allowed=ALLOW)
        upstream = Upstream(resolve, trust_origins(), lambda _client: conversation)
        transport = await upstream.open(conversation, asyncio.Protocol)
        try:
            return bool(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        finally:
            transport.close()

    assert asyncio.run(has_no_delay())
