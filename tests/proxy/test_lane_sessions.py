"""TLS sessions with origins are resumed: by the workload whose session it is, for the same name, each once."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy.inspecting import HOST, WAIT_S, WORKLOAD, Rig, get, read_reply, response

POLICY = f"""
version: 1
workloads:
  {WORKLOAD}:
    match: {{address: [127.0.0.1/32]}}
    rules: [{{host: {HOST}, tls: inspect}}, {{host: other.test, tls: inspect}}]
  other:
    match: {{address: [127.0.0.2/32]}}
    rules: [{{host: {HOST}, tls: inspect}}]
"""


class Noting:
    """Whether each request came over a session that was resumed."""

    def __init__(self) -> None:
        self.reused: list[bool | None] = []

    def __call__(self, _request: bytes, sock: socket.socket) -> bytes:
        assert isinstance(sock, ssl.SSLSocket)
        self.reused.append(sock.session_reused)
        return response()


@pytest.fixture
def noting() -> Noting:
    return Noting()


@pytest.fixture
def rig(tmp_path: Path, noting: Noting) -> Iterator[Rig]:
    names = (HOST, "other.test")
    with Rig(tmp_path, policy=POLICY, workload=None, respond=noting, origin_names=names, in_lane=True) as it:
        yield it
    assert it.failures == []


def ask(rig: Rig, source: str = "127.0.0.1", host: str = HOST) -> None:
    plain = socket.create_connection(("127.0.0.1", rig.port), WAIT_S, source_address=(source, 0))
    with rig.context().wrap_socket(plain, server_hostname=host) as sock:
        sock.sendall(get("/search", host=host))
        assert read_reply(sock)[0].status == 200


def test_a_later_connection_resumes(rig: Rig, noting: Noting) -> None:
    for _ in range(4):
        ask(rig)
    assert noting.reused == [False, True, True, True]
    assert rig.origin.connections == 4


def test_another_workload_does_not(rig: Rig, noting: Noting) -> None:
    """The origin would see that both are one gate's, and the other could tell who was here before."""
    ask(rig)
    ask(rig, "127.0.0.2")
    assert noting.reused == [False, False]


def test_another_name_at_the_same_address_does_not(rig: Rig, noting: Noting) -> None:
    """Its certificate has not been verified for that name."""
    ask(rig)
    ask(rig, host="other.test")
    assert noting.reused == [False, False]
