"""`--addon` as typed: the gate calls the file, the command cannot write it, and a bad one keeps it from starting."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.end_to_end.service import Service, answered, eventually
from tests.end_to_end.test_run_http_host import ASK, POLICY
from tests.end_to_end.world import World

ADDON = "class Mine:\n    def requestheaders(self, flow): ...\n\naddons = [Mine()]\n"
WRITE = """
import os, sys
path = sys.argv[1]
def tried(attempt):
    try:
        attempt()
    except OSError as error:
        print(error.strerror)
    else:
        print("done")
tried(lambda: open(path, "w"))
tried(lambda: os.unlink(path))
tried(lambda: os.rename(path, path + ".gone"))
"""

pytestmark = pytest.mark.kernel


def test_the_command_cannot_write_the_addon(world: World) -> None:
    path = world.file("mine.py", ADDON)
    ran = world.run([sys.executable, "-c", WRITE, str(path)], policy=POLICY, options=("--addon", str(path)))

    refused = {"Read-only file system", "Device or resource busy"}
    assert set(ran.stdout.decode().splitlines()) <= refused, ran
    assert len(ran.stdout.splitlines()) == 3, ran
    assert path.read_text() == ADDON


def test_a_command_beside_an_addon_is_denied_as_ever(world: World) -> None:
    path = world.file("mine.py", ADDON)
    ran = world.run([sys.executable, "-c", ASK], policy=POLICY, options=("--addon", str(path)))

    assert ran.stdout.decode().split() == ["403"], ran.stderr
    assert [record["reason"] for record in ran.records] == ["no_allow_entry"]


@pytest.mark.parametrize(("text", "says"), [("x = (", "mine.py:1: "), ("", "mine.py: has no addons")])
def test_a_bad_addon_keeps_it_from_starting(world: World, tmp_path: Path, text: str, says: str) -> None:
    path = world.file("mine.py", text)
    ran = world.run(["touch", str(tmp_path / "started")], policy=POLICY, options=("--addon", str(path)))

    assert ran.status == 125
    assert says in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "started").exists()


RAISES = "class Mine:\n    def requestheaders(self, flow): 1 / 0\n\naddons = [Mine()]\n"


def test_what_the_policy_allows_comes_to_the_addon(world: World) -> None:
    path = world.file("mine.py", RAISES)
    ask = ASK.replace("/denied", "/allowed")
    ran = world.run([sys.executable, "-c", ask], policy=POLICY, options=("--addon", str(path)))

    assert ran.stdout.decode().split() == ["502"], ran.stderr
    assert [record["reason"] for record in ran.records] == ["addon_failed"]
    assert "addon mine.py (Mine) raised ZeroDivisionError in requestheaders, line 2" in ran.stderr


def test_a_service_calls_it_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RAISES)
    policy = "version: 1\nworkloads: {app: {rules: [{host: a.test, ports: [80], allow: [GET /allowed]}]}}\n"
    with Service(tmp_path, policy, "--addon", str(path)) as it:
        with it.connect() as client:
            client.sendall(b"GET http://a.test/allowed HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert answered(client) == 502
        [record] = eventually(lambda: it.records(reason="addon_failed"), "a record")
        assert record["error.message"] == "addon mine.py (Mine) raised ZeroDivisionError in requestheaders, line 2"
