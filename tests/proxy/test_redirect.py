"""Connections that nft REDIRECT leads to the gate, in namespaces of the test's own: the kernel says where they went."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proxy.hellos import hello

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
type Met = dict[str, tuple[str, dict[str, object]]]


@pytest.fixture(scope="module")
def met() -> Met:
    """What the client met at each destination, and the decision record of it."""
    for program in ("unshare", "ip", "nft"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    namespace = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not give us a network namespace")
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "tests.proxy.redirect_lab"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: Met = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("visit", "asked"),
    [
        ("name over IPv4", ("203.0.113.5", 443)),
        ("name over IPv6", ("2001:db8::5", 443)),
        ("name over IPv4, dual-stack listener", ("203.0.113.5", 8000)),
    ],
)
def test_redirected_hello_goes_where_its_name_resolves(met: Met, visit: str, asked: tuple[str, int]) -> None:
    said, record = met[visit]
    assert said == f"10.88.0.1 heard {len(hello())}"  # not the address the client asked for
    assert (record["destination.address"], record["destination.port"]) == asked
    assert (record["upstream.address"], record["upstream.port"]) == ("10.88.0.1", 5432)
    assert record["source.address"] in ("10.77.0.2", "fd77::2")


@pytest.mark.parametrize(("visit", "address"), [("address over IPv4", "10.88.0.1"), ("address over IPv6", "fd88::1")])
def test_address_rule_dials_the_original_destination(met: Met, visit: str, address: str) -> None:
    said, record = met[visit]
    assert said == f"{address} heard 6"
    assert (record["stage"], record["reason"], record["upstream.address"]) == ("tcp", "rule", address)


def test_denied_name_gets_an_alert(met: Met) -> None:
    said, record = met["denied name"]
    assert (said, record["reason"]) == ("15030300020231", "no_rule")


def test_address_without_rule_is_reset(met: Met) -> None:
    said, record = met["address without rule"]
    assert (said, record["reason"], record["destination.address"]) == ("reset", "no_rule", "10.99.0.1")


@pytest.mark.parametrize(
    ("visit", "address"),
    [
        ("straight to the gate over IPv4", "10.77.0.1"),
        ("straight to the gate over IPv6", "fd77::1"),
        ("straight to the dual-stack gate over IPv4", "10.77.0.1"),
    ],
)
def test_connection_to_the_gate_itself_is_no_open_proxy(met: Met, visit: str, address: str) -> None:
    said, record = met[visit]
    assert (said, record["reason"], record["destination.address"]) == ("reset", "never_reached", address)
