"""Through a real squid: connections are carried, and its refusals are told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.index import Policy
from proxy.config import UpstreamProxy
from proxy.wire.client_hello import Alert, render_alert
from tests.builders import rules
from tests.proxy.gates import Origin, gate, origin, read_all, read_exactly
from tests.proxy.hellos import hello
from tests.proxy.squid import SECRET, credentials_file, needs_squid, squid

pytestmark = [pytest.mark.client, needs_squid]


@pytest.fixture(scope="module")
def upstream() -> Iterator[Origin]:
    with origin() as running:
        yield running


@pytest.fixture(scope="module")
def site(upstream: Origin) -> Iterator[tuple[str, int]]:
    with squid(upstream.address[1], {"a.example": "127.0.0.1", "down.example": "127.0.0.9"}) as address:
        yield address


def test_connection_is_carried_through_squid(site: tuple[str, int], upstream: Origin, tmp_path: Path) -> None:
    port = upstream.address[1]
    through = UpstreamProxy(*site, credentials_file(tmp_path, SECRET))
    with gate(policy_for(port), through=through, port=port) as it, it.connect() as client:
        client.sendall(hello())
        assert read_exactly(client, len(hello())) == hello()
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        assert it.record()["verdict"] == "allow"


@pytest.mark.parametrize(
    ("name", "secret", "beside", "answered"),
    [
        ("a.example", "gate:wrong", 0, "407: it wants credentials, or other ones"),
        ("down.example", SECRET, 0, "503"),
        ("a.example", SECRET, 1, "403"),
    ],
    ids=["wrong credentials", "origin down", "a port the site closes"],
)
def test_refusal_of_squid_is_told(
    site: tuple[str, int], upstream: Origin, tmp_path: Path, name: str, secret: str, beside: int, answered: str
) -> None:
    port = upstream.address[1] + beside
    through = UpstreamProxy(*site, credentials_file(tmp_path, secret))
    with gate(policy_for(port), through=through, port=port) as it, it.connect() as client:
        client.sendall(hello(name))
        assert read_all(client) == render_alert(Alert.INTERNAL_ERROR)
        record = it.record()
        assert (record["reason"], record["error.message"]) == (
            "upstream_refused",
            f"the site's proxy answered {answered}",
        )


def policy_for(port: int) -> Policy:
    return rules(f"- {{host: '*.example', ports: [{port}]}}")
