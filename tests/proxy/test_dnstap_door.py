"""The unix socket of `dnstapListen`: who may write to it, and what it takes the place of."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from proxy.config import Config, DoorKind, SocketAddress
from proxy.service.doors import DoorTaken, open_doors, open_tap

NOWHERE: tuple[SocketAddress, ...] = ()


@contextmanager
def tap(path: Path, count: int = 1) -> Iterator[tuple[socket.socket, ...]]:
    with ExitStack() as stack:
        sockets = open_tap(str(path), count)
        for sock in sockets:
            stack.enter_context(sock)
        yield sockets


@pytest.fixture
def any_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("any_umask")
def test_only_its_user_and_group_may_write(tmp_path: Path) -> None:
    with tap(tmp_path / "tap.sock"):
        assert stat.S_IMODE((tmp_path / "tap.sock").stat().st_mode) == 0o660


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "tap.sock"
    with tap(path):
        pass
    assert path.exists()
    with tap(path) as (listener,), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.accept()[0].close()


def test_a_socket_that_is_listened_on_stays(tmp_path: Path) -> None:
    path = tmp_path / "tap.sock"
    with tap(path) as (listener,):
        with pytest.raises(OSError, match="in use"), tap(path):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            for _ in range(2):  # the look at it counts as one
                listener.accept()[0].close()


def test_a_file_is_not_taken_for_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "tap.sock"
    path.write_text("somebody's")
    with pytest.raises(OSError, match="in use"), tap(path):
        pass
    assert path.read_text() == "somebody's"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    with tap(tmp_path / "other.sock"):
        pass
    (tmp_path / "tap.sock").symlink_to(tmp_path / "other.sock")
    with pytest.raises(OSError, match="in use"), tap(tmp_path / "tap.sock"):
        pass
    assert (tmp_path / "other.sock").exists()


def test_all_workers_accept_on_the_same_socket(tmp_path: Path) -> None:
    with tap(tmp_path / "tap.sock", 3) as sockets, ExitStack() as clients:
        for sock in sockets:
            clients.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "tap.sock"))
            sock.accept()[0].close()


def test_the_gate_has_the_door_and_says_where(tmp_path: Path) -> None:
    path = str(tmp_path / "tap.sock")
    [door] = open_doors(Config(policy=(), listen=NOWHERE, dnstap_listen=path, workers=2))
    try:
        assert (door.kind, door.shown, len(door.sockets)) == (DoorKind.DNSTAP, path, 2)
    finally:
        door.close()


def test_a_door_that_cannot_be_opened_is_named_and_none_stays_open(tmp_path: Path) -> None:
    path = str(tmp_path / "missing" / "tap.sock")
    with pytest.raises(
        DoorTaken, match=r"^--dnstap-listen .*/missing/tap.sock: No such file or directory; make its directory first$"
    ):
        open_doors(Config(policy=(), listen=(("127.0.0.1", 0),), dnstap_listen=path))
    long = str(tmp_path / ("x" * 120))
    with pytest.raises(DoorTaken, match=r"--dnstap-listen .*too long"):
        open_doors(Config(policy=(), listen=NOWHERE, dnstap_listen=long))
