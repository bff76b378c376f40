"""`outgate verify` inside `outgate run`: no row is a leak, each is as the page has it, and nothing leaves."""

from __future__ import annotations

import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.end_to_end.service import Service
from tests.end_to_end.verifying import Verified, documented
from tests.end_to_end.world import OUTGATE, Ran, World

pytestmark = pytest.mark.kernel

POLICY = """
version: 1
workloads:
  app:
    rules:
      - {host: api.example, ports: [80, 443], tls: inspect, allow: ["GET /search/**"]}
      - host: "*.cdn.example"
"""
AUDITED = """
version: 1
workloads:
  app: {mode: audit, rules: [{host: api.example}]}
"""
CARRIED = "version: 1\nworkloads: {app: {rules: [{host: one.example}]}}\n"
COMMAND = (str(OUTGATE), "verify", "--json", "--timeout", "4")


def read(ran: Ran) -> Verified:
    assert ran.stdout, ran.stderr
    return Verified(ran.status, json.loads(ran.stdout), ran.stderr)


@pytest.fixture(scope="module")
def ran(world: World) -> Ran:
    return world.run(COMMAND, policy=POLICY)


def test_nothing_leaks_and_every_row_is_as_the_page_has_it(ran: Ran) -> None:
    found = read(ran)

    assert found.leaks == set(), found.page
    assert ran.status == 0
    assert found.page["ok"] is True
    assert (found.page["workload"], found.page["gate"]) == ("app", "namespace")
    rows = {id: row.inside_run for id, row in documented().items() if id != "gate-certificate"}
    assert found.on_the_page == rows
    assert found.page["seconds"] < 20


def test_nothing_of_it_left(ran: Ran) -> None:
    assert ran.seen.packets == []
    assert ran.seen.asked == []


def test_each_decision_it_tells_is_one_of_the_log(ran: Ran) -> None:
    told = {row["decision"] for row in read(ran).rows.values() if row["decision"]}

    assert len(told) > 20
    assert told <= {record["id"] for record in ran.records}


def test_the_policys_hosts_are_contacted_where_that_is_asked_for(world: World) -> None:
    found = read(done := world.run([*COMMAND, "--allowed", "--only", "allowed", "--only", "dns-tunnel",
                                    "--only", "tunnel-cdn.example"], policy=POLICY))  # fmt: skip

    assert found.outcomes == {
        "dns-tunnel": "proxied", "allowed-api.example-443": "reached", "tunnel-cdn.example": "reached",
    }  # fmt: skip
    assert {id: row["allowed"] for id, row in found.rows.items()}["allowed-api.example-443"] is True
    assert found.leaks == set()
    assert len({asked.split()[0] for asked in done.seen.asked if ".cdn.example" in asked}) == 16


def test_what_audit_lets_pass_is_expected_and_no_leak(world: World) -> None:
    found = read(world.run([*COMMAND, "--only", "tls-denied", "--only", "metadata-ipv4"], policy=AUDITED))

    assert found.outcomes == {"metadata-ipv4": "proxied", "tls-denied": "reached"}
    assert found.rows["tls-denied"]["allowed"] is True
    assert found.leaks == set()


def test_a_person_reads_a_table_and_ci_a_file(world: World) -> None:
    junit = world.directory / "verify.xml"
    done = world.run([str(OUTGATE), "verify", "--only", "doh", "--only", "socket", "--junit", str(junit)],
                     policy=POLICY)  # fmt: skip
    suite = ElementTree.fromstring(junit.read_text())

    assert done.status == 0
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 13
    assert "ok  doh-name         proxied  tcp 1.1.1.1:443" in lines[8]
    assert lines[-1].startswith("no leaks in 11 rows, as app; ")
    assert suite.attrib["tests"] == "11"
    assert (suite.attrib["failures"], suite.attrib["errors"], suite.attrib["skipped"]) == ("0", "0", "8")
    assert {case.attrib["classname"] for case in suite} == {"verify.doh", "verify.socket"}


def test_the_gate_as_a_proxy_tunnels_to_no_private_address(tmp_path: Path) -> None:
    with Service(tmp_path, CARRIED) as gate:
        env = {**os.environ, "https_proxy": f"http://127.0.0.1:{gate.address[1]}"}
        done = subprocess.run(
            [*COMMAND, "--only", "proxy"], capture_output=True, text=True, env=env, timeout=60
        )  # fmt: skip
    rows = json.loads(done.stdout)["rows"]

    assert done.returncode == 0, rows
    assert {row["id"]: (row["outcome"], row["proof"]) for row in rows} == dict.fromkeys(
        ("proxy-metadata", "proxy-private", "proxy-loopback"), ("proxied", "control")
    )
