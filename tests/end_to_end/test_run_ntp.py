"""NTP inside `outgate run`: a command is told the time, and its packets say nothing to anybody outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy.wire.ntp import build_query
from tests.end_to_end.chrony import needs_chronyd
from tests.end_to_end.service import WAIT_S
from tests.end_to_end.verifying import Verified
from tests.end_to_end.world import OUTGATE, Ran, World
from tests.proxy.ntp_servers import query, told

pytestmark = pytest.mark.kernel

NAMES = ("one.example", "two.example", "three.example")
POLICY = f"""
version: 1
workloads:
  app:
    rules: [{", ".join(f"{{ntp: {name}}}" for name in NAMES)}]
"""
NO_TIME = "version: 1\nworkloads: {app: {rules: [{host: one.example}]}}\n"
NOBODY = "version: 1\nworkloads: {app: {rules: [{ntp: absent.example}]}}\n"
LATE = "version: 1\nworkloads: {app: {rules: [{ntp: one.example, until: 2020-01-01}]}}\n"
SCRIPT = str(Path(__file__).with_name("inside_ntp.py"))
SOMEWHERE4, SOMEWHERE6, METADATA = "203.0.113.7", "2001:db8:77::7", "169.254.169.254"
MOST_POLLS = 4 * len(NAMES)  # its burst; the next ones come after a minute


@dataclass(frozen=True)
class Heard:
    """What clients inside were told, what the time servers outside were sent, and the run itself."""

    answers: Mapping[str, list[str]]
    polls: list[bytes]
    ran: Ran


class TimeServer:
    """In the world, for every address; `take` gives what it was sent since the last time."""

    def __init__(self, world: World) -> None:
        self._process = subprocess.Popen(
            world.enter([sys.executable, "-m", "tests.end_to_end.inside_time"]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"
        self._packets: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout
        self._packets.extend(bytes.fromhex(line) for line in self._process.stdout)

    def take(self) -> list[bytes]:
        taken, self._packets[:] = list(self._packets), []
        return taken

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(WAIT_S)
        self._thread.join(WAIT_S)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def servers(world: World) -> Iterator[TimeServer]:
    made = TimeServer(world)
    try:
        yield made
    finally:
        made.close()


def plan(to: str, *say: bytes, **more: Any) -> dict[str, Any]:  # Any: as JSON
    return {"to": to, "say": [message.hex() for message in say], **more}


def hear(world: World, servers: TimeServer, policy: str = POLICY, **plans: Any) -> Heard:  # Any: as JSON
    servers.take()
    ran = world.run([sys.executable, SCRIPT], policy=policy, stdin=json.dumps(plans).encode())
    assert ran.status == 0, ran.stderr
    return Heard(json.loads(ran.stdout), servers.take(), ran)


@pytest.fixture(scope="module")
def one(world: World, servers: TimeServer) -> Heard:
    """One query."""
    return hear(world, servers, only=plan(SOMEWHERE4, query()))


@pytest.fixture(scope="module")
def covert(world: World, servers: TimeServer) -> Heard:
    """What ntpescape does: packets as a client sends them, with other bytes where nobody can check; and more of it."""
    secrets = [query(cookie=b"LEAKED" + number.to_bytes(2)) for number in range(30)]
    low_bits = [build_query(int.from_bytes(os.urandom(6) + b"\xca\xfe")) for _ in range(30)]
    return hear(
        world,
        servers,
        low_bits=plan(SOMEWHERE4, *low_bits),
        secrets=plan(SOMEWHERE6, *secrets),
        rhythm=plan("198.51.100.9", *secrets[:8], pause_s=0.05),
        server=plan("93.184.216.34", *secrets[:8]),
    )


# --- the time


def test_whatever_address_is_asked_answers(world: World, servers: TimeServer) -> None:
    heard = hear(world, servers, v4=plan(SOMEWHERE4, query()), v6=plan(SOMEWHERE6, query()))
    for [answered] in heard.answers.values():
        got = told(bytes.fromhex(answered))
        assert (got.leap, got.stratum, got.reference_id) == (0, 3, b"GATE")


def test_the_answer_is_recorded(one: Heard) -> None:
    record = one.ran.record(stage="ntp", workload="app", verdict="allow")
    assert record["destination.address"] == SOMEWHERE4
    assert "ntp.packets" in record


@needs_chronyd
def test_a_real_client_gets_the_time(world: World, servers: TimeServer) -> None:
    asking = ["chronyd", "-Q", "-t", "15", "-U", "-u", _user(), f"server {SOMEWHERE4} iburst maxsamples 4"]
    ran = world.run(asking, policy=POLICY)
    found = re.search(r"System clock wrong by (-?[0-9.]+) seconds", ran.stdout.decode() + ran.stderr)
    assert found, ran.stderr
    assert abs(float(found[1])) < 0.05  # as the scripted servers, on a loaded machine


def test_a_server_that_is_not_there_is_told_and_not_waited_for(world: World, servers: TimeServer) -> None:
    heard = hear(world, servers, NOBODY, first=plan(SOMEWHERE4, query()), second=plan(SOMEWHERE4, query()))
    for [answered] in heard.answers.values():
        got = told(bytes.fromhex(answered))
        assert (got.leap, got.stratum) == (3, 16)
    assert heard.polls == []


# --- what outside sees of it


def test_outside_nobody_sees_a_bit_of_a_covert_client(covert: Heard) -> None:
    assert covert.polls
    assert {packet[:40] for packet in covert.polls} == {build_query(0)[:40]}
    seen = b"".join(covert.polls)
    for secret in (b"LEAKED", b"SECRET"):
        assert secret not in seen
    cookies = [packet[40:] for packet in covert.polls]
    assert len(set(cookies)) == len(cookies)
    assert {cookie[-2:] for cookie in cookies} != {b"\xca\xfe"}


def test_outside_the_number_of_queries_does_not_show(one: Heard, covert: Heard) -> None:
    asked = sum(map(len, covert.answers.values()))
    assert asked > 70
    for heard in (one, covert):
        assert len(NAMES) <= len(heard.polls) <= MOST_POLLS


def test_a_covert_client_gets_the_time_as_everybody_does(covert: Heard) -> None:
    for answers in covert.answers.values():
        for answered in answers:
            assert told(bytes.fromhex(answered)).reference_id == b"GATE"


def test_who_does_not_ask_for_the_time_has_nobody_asked(world: World, servers: TimeServer) -> None:
    heard = hear(world, servers, idle_s=0.5)
    assert heard.polls == []
    assert heard.ran.seen.packets == []
    assert heard.ran.seen.asked == []


def test_only_servers_of_the_policy_are_looked_up(covert: Heard) -> None:
    assert {asked.split()[0] for asked in covert.ran.seen.asked} == set(NAMES)


# --- what is refused

NOT_ANSWERED: dict[str, tuple[bytes, str]] = {
    "an extension field": (query() + b"\x01\x04\x00\x14" + b"SECRETSECRETSECR", "length"),
    "a control message": (b"\x26" + query()[1:], "mode 6"),
    "monlist": (b"\x17\x00\x03\x2a" + bytes(44), "mode 7"),
    "symmetric": (b"\x21" + query()[1:], "mode 1"),
    "an old version": (b"\x0b" + query()[1:], "version 1"),
    "a byte": (b"x", "length"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(world: World, servers: TimeServer) -> Heard:
    plans: dict[str, Any] = {name: plan(f"203.0.113.{number}", message, patience_s=0.2)
             for number, (name, (message, _)) in enumerate(NOT_ANSWERED.items(), 10)}  # fmt: skip
    return hear(world, servers, **plans, metadata=plan(METADATA, query(), patience_s=0.2))


@pytest.mark.parametrize("name", NOT_ANSWERED)
def test_what_is_no_query_gets_no_answer(refused: Heard, name: str) -> None:
    assert refused.answers[name] == ["TimeoutError"]
    where = f"203.0.113.{10 + list(NOT_ANSWERED).index(name)}"
    record = refused.ran.record(destination__address=where)
    assert (record["reason"], record["ntp.fault"]) == ("malformed_query", NOT_ANSWERED[name][1])


def test_cloud_metadata_gives_no_time(refused: Heard) -> None:
    assert refused.answers["metadata"] == ["TimeoutError"]
    assert refused.ran.record(destination__address=METADATA)["reason"] == "never_reached"


def test_what_is_refused_has_nobody_asked(refused: Heard) -> None:
    assert refused.polls == []
    assert refused.ran.seen.packets == []


def test_without_a_rule_the_port_stays_closed(world: World, servers: TimeServer) -> None:
    heard = hear(world, servers, NO_TIME, v4=plan(SOMEWHERE4, query()), v6=plan(SOMEWHERE6, query()))
    assert heard.answers == {"v4": ["ConnectionRefusedError"], "v6": ["ConnectionRefusedError"]}
    assert heard.ran.record(destination__address=SOMEWHERE4)["reason"] == "no_rule"
    assert heard.polls == []


def test_a_rule_that_has_expired_admits_nothing(world: World, servers: TimeServer) -> None:
    heard = hear(world, servers, LATE, only=plan(SOMEWHERE4, query(), patience_s=0.3))
    assert heard.answers == {"only": ["TimeoutError"]}
    assert heard.ran.record(destination__address=SOMEWHERE4)["verdict"] == "deny"
    assert heard.polls == []
    assert heard.ran.seen.asked == []


# --- and `outgate verify` inside


def test_verify_finds_no_leak_where_time_is_given(world: World, servers: TimeServer) -> None:
    command = [str(OUTGATE), "verify", "--json", "--timeout", "5", "--only", "ntp", "--only", "clock"]
    ran = world.run(command, policy=POLICY)
    found = Verified(ran.status, json.loads(ran.stdout), ran.stderr)
    assert (found.leaks, ran.status) == (set(), 0)
    assert {id: outcome.partition(" ")[0] for id, outcome in found.outcomes.items()} == {
        "ntp-random": "reached", "ntp-extension": "blocked", "ntp-mode6": "blocked", "ntp-mode7": "blocked",
        "clock": "reached",
    }  # fmt: skip


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
