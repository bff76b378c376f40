"""What a service manager hears, on a socket as systemd makes it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.service.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


def test_it_is_told_when_the_service_is_ready_and_when_it_stops(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})

    notifier.ready("two workers\nserve")
    notifier.stopping()

    assert manager.recv(4096).decode().split("\n") == ["READY=1", "STATUS=two workers serve"]
    assert manager.recv(4096).decode().split("\n")[0] == "STOPPING=1"


def test_an_abstract_socket_is_reached_too() -> None:
    name = f"outgate-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.settimeout(10)
        Notifier({"NOTIFY_SOCKET": "@" + name}).alive()
        assert sock.recv(4096) == b"WATCHDOG=1"


def test_nobody_is_told_where_nobody_asked_or_the_socket_is_gone(tmp_path: Path) -> None:
    Notifier({}).ready("alone")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("alone")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
    ids=["for us", "for us by id", "for another process", "no number", "none"],
)
def test_the_watchdog_counts_where_it_waits_for_us(environ: dict[str, str], expected: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/run/x"} | environ).watchdog_s == expected


def test_a_watchdog_without_a_socket_is_none() -> None:
    assert Notifier({"WATCHDOG_USEC": "1000000"}).watchdog_s is None
