"""`--http-host` of `outgate run`: whatever carries inspected HTTP/1.1, what is let through is the same."""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest

from policies.load import Source
from proxy.config import HttpHost
from proxy.options import GateOptions, settings_of
from proxy.policy_files import load_sources
from proxy.run import needs_inspector
from tests.end_to_end.world import World

POLICY = """
version: 1
workloads:
  app:
    rules:
      - host: unreached.test
        tls: inspect
        allow: ["GET /allowed"]
"""
ASK = """
import socket, ssl
plain = socket.create_connection(("198.51.100.7", 443), 20)
with ssl.create_default_context().wrap_socket(plain, server_hostname="unreached.test") as sock:
    sock.sendall(b"GET /denied HTTP/1.1\\r\\nHost: unreached.test\\r\\nConnection: close\\r\\n\\r\\n")
    print(sock.recv(12).decode().split()[1])
"""


def options(**said: object) -> GateOptions:
    needed: dict[str, object] = {"paths": (), "tags": (), "workload": "app", "hosts": ()}
    unsaid: dict[str, object] = dict.fromkeys(("upstream_ca", "pki", "log"))
    assert {*needed, *unsaid, *said} <= {field.name for field in fields(GateOptions)}
    return GateOptions(**{**needed, **unsaid, **said})  # type: ignore[arg-type]  # fields of several types


@pytest.mark.parametrize(
    ("policy", "host", "needed"),
    [
        (POLICY, "auto", False),
        (POLICY, "mitmproxy", True),
        (POLICY + "        http2: true\n", "auto", True),
        (POLICY + "        http2: false\n", "auto", False),
        (POLICY.partition("        tls")[0], "mitmproxy", False),
    ],
    ids=["HTTP/1.1 is the lane's", "mitmproxy for everything", "HTTP/2", "no HTTP/2", "nothing is inspected"],
)
def test_mitmproxys_process_is_started_beside_a_command_that_may_need_it(policy: str, host: str, needed: bool) -> None:
    settings = settings_of(options(http_host=host), lambda: "")

    assert settings.http_host is HttpHost(host)
    assert needs_inspector(load_sources([Source("p.yaml", policy)]), settings) is needed


@pytest.mark.kernel
@pytest.mark.parametrize("host", HttpHost)
def test_a_command_is_denied_the_same_by_both(world: World, host: HttpHost) -> None:
    ran = world.run([sys.executable, "-c", ASK], policy=POLICY, options=("--http-host", host))

    assert ran.stdout.decode().split() == ["403"], ran.stderr
    assert [record["reason"] for record in ran.records] == ["no_allow_entry"]


@pytest.mark.kernel
def test_another_host_is_a_usage_error(world: World) -> None:
    ran = world.run(["true"], policy=POLICY, options=("--http-host", "nginx"))

    assert ran.status == 125
    assert "'nginx' is not one of 'auto', 'mitmproxy'" in ran.stderr
