"""`outgate serve` on a gateway: a client's connections are led to it by nft REDIRECT, over IPv4 and IPv6."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.clients import CURL
from tests.end_to_end.origin import BANNER
from tests.end_to_end.world import CHECKOUT, OUTGATE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "curl")
    ),
]

PORT = 15001
ORIGIN4, ORIGIN6 = "93.184.216.34", "2606:2800:220:1::34"
ASKED4, ASKED6 = "203.0.113.7", "2001:db8:77::7"  # where the client believes the names to be: nobody has these
CLIENT4, CLIENT6, STRANGER = "10.77.1.2", "fd77:1::2", "10.77.1.3"
GATEWAY4, GATEWAY6 = "10.77.1.1", "fd77:1::1"
POLICY = f"""
version: 1
workloads:
  app:
    match: {{address: [{CLIENT4}/32, "{CLIENT6}/128"]}}
    rules:
      - {{host: api.example, ports: [80, 443], tls: inspect, allow: ["GET,POST /search/**"]}}
      - host: "*.cdn.example"
      - tcp: {ORIGIN4}/32:22
"""
REDIRECT = f"""
table inet outgate {{
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    iifname "client" fib daddr type != local meta l4proto tcp redirect to :{PORT}
  }}
}}
"""
SECRETS = ("s3cr3t-token", "s3cr3t-cookie", "s3cr3t-query", "s3cr3t-word", "s3cr3t-body", "s3cr3t-key")
SECRET_REQUEST = [
    "-H", "Authorization: Bearer s3cr3t-token", "-H", "Cookie: session=s3cr3t-cookie", "-H", "X-Api-Key: s3cr3t-key",
    "--data-binary", "s3cr3t-body", "https://api.example/search?key=s3cr3t-query&s3cr3t-word",
]  # fmt: skip


def resolved(address: str, name: str = "api.example", port: int = 443) -> list[str]:
    host = f"[{address}]" if ":" in address else address
    return ["--resolve", f"{name}:{port}:{host}"]


SUCCESS, ALERT, RESET = frozenset({0}), frozenset({35}), frozenset({7, 56})  # curl's exit statuses; 7: before it sent

# Each curl, how it ends (its exit status and the HTTP status), and what the one record says.
TRIES: dict[str, tuple[list[str], frozenset[int], str, dict[str, object]]] = {
    "inspected": (
        [*resolved(ASKED4), "https://api.example/search"], SUCCESS, "200",
        {"verdict": "allow", "stage": "http", "url.full": "https://api.example/search", "source.address": CLIENT4},
    ),
    "inspected over IPv6": (
        [*resolved(ASKED6), "https://api.example/search/6"], SUCCESS, "200",
        {"verdict": "allow", "url.full": "https://api.example/search/6", "source.address": CLIENT6},
    ),
    "denied by path": (
        [*resolved(ASKED4), "https://api.example/other"], SUCCESS, "403",
        {"verdict": "deny", "reason": "no_allow_entry", "url.full": "https://api.example/other"},
    ),
    "plain": (
        [*resolved(ASKED4, port=80), "http://api.example/search/plain"], SUCCESS, "200",
        {"verdict": "allow", "url.full": "http://api.example/search/plain"},
    ),
    "carried": (
        [*resolved(ASKED4, "four.cdn.example"), "https://four.cdn.example/x"], SUCCESS, "200",
        {"verdict": "allow", "server.name": "four.cdn.example", "destination.address": ASKED4,
         "upstream.address": ORIGIN4, "tls.mode": "passthrough"},
    ),
    "carried over IPv6": (
        [*resolved(ASKED6, "six.cdn.example"), "https://six.cdn.example/x"], SUCCESS, "200",
        {"verdict": "allow", "server.name": "six.cdn.example", "destination.address": ASKED6,
         "upstream.address": ORIGIN6, "source.address": CLIENT6},
    ),
    "unknown host": (
        [*resolved(ASKED4, "unknown.example"), "https://unknown.example/"], ALERT, "000",
        {"verdict": "deny", "reason": "no_rule", "server.name": "unknown.example", "destination.address": ASKED4},
    ),
    "unknown host over IPv6": (
        [*resolved(ASKED6, "six.unknown.example"), "https://six.unknown.example/"], ALERT, "000",
        {"verdict": "deny", "reason": "no_rule", "server.name": "six.unknown.example", "destination.address": ASKED6},
    ),
    "unknown source": (
        ["--interface", STRANGER, *resolved(ASKED4, "any.cdn.example"), "https://any.cdn.example/"], ALERT, "000",
        {"verdict": "deny", "reason": "unknown_workload", "source.address": STRANGER, "workload": "unknown"},
    ),
    "another port": (
        [f"http://{ORIGIN4}:5432/"], SUCCESS, "403",
        {"verdict": "deny", "reason": "wrong_protocol", "destination.address": ORIGIN4, "destination.port": 5432},
    ),
    "the gate's own port": (
        [f"http://{GATEWAY4}:{PORT}/"], RESET, "000",
        {"verdict": "deny", "reason": "never_reached", "destination.address": GATEWAY4, "destination.port": PORT},
    ),
    "the gate's own port over IPv6": (
        [f"http://[{GATEWAY6}]:{PORT}/"], RESET, "000",
        {"verdict": "deny", "reason": "never_reached", "destination.address": GATEWAY6, "destination.port": PORT},
    ),
    "with secrets": (
        [*resolved(ASKED4), *SECRET_REQUEST], SUCCESS, "200",
        {"verdict": "allow", "http.request.method": "POST"},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Net:
    """What was tried in the client's namespace, and what gate and origin say about it."""

    ended: Mapping[str, tuple[int, str]]
    banner: bytes
    accepted: Sequence[tuple[str, int]]
    requests: Sequence[Mapping[str, Any]]
    log: str
    gate_status: int
    gate_said: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines()]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Namespaces:
    """client, gateway, origin: two links between three namespaces of unique names."""

    def __init__(self) -> None:
        self._names = {part: f"outgate-{os.getpid()}-{part}" for part in ("client", "gateway", "origin")}
        try:
            for name in self._names.values():
                ip("netns", "add", name)
            self._link("client", CLIENT4, CLIENT6, GATEWAY4, GATEWAY6)
            self._link("origin", "10.77.2.2", "fd77:2::2", "10.77.2.1", "fd77:2::1")
            self.ip("client", "address", "add", f"{STRANGER}/24", "dev", "eth0")
            for address in (f"{ORIGIN4}/32", f"{ORIGIN6}/128"):
                self.ip("origin", "address", "add", address, "dev", "lo")
            self.ip("gateway", "route", "add", ORIGIN4, "via", "10.77.2.2")
            self.ip("gateway", "route", "add", ORIGIN6, "via", "fd77:2::2")
            subprocess.run(self.inside("gateway", ["nft", "-f", "-"]), input=REDIRECT, text=True, check=True)
            for family in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
                subprocess.run(self.inside("gateway", ["sysctl", "-qw", f"net.{family}=1"]), check=True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)

    def inside(self, part: str, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self._names[part], *command]

    def ip(self, part: str, *arguments: str) -> None:
        ip("-netns", self._names[part], *arguments)

    def _link(self, part: str, theirs4: str, theirs6: str, ours4: str, ours6: str) -> None:
        """`part` with its eth0 to the gateway, whose end is called after it."""
        gateway = self._names["gateway"]
        ip("-netns", gateway, "link", "add", part, "type", "veth", "peer", "name", "eth0", "netns", self._names[part])
        for where, device, four, six in ((part, "eth0", theirs4, theirs6), ("gateway", part, ours4, ours6)):
            self.ip(where, "link", "set", "lo", "up")
            self.ip(where, "link", "set", device, "up")
            self.ip(where, "address", "add", f"{four}/24", "dev", device)
            self.ip(where, "address", "add", f"{six}/64", "dev", device, "nodad")
        self.ip(part, "route", "add", "default", "via", ours4)
        self.ip(part, "-6", "route", "add", "default", "via", ours6)


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-redirect-")))
        (directory / "policy.yaml").write_text(POLICY)
        subprocess.run([str(OUTGATE), "pki", "init", "--pki", str(directory / "pki")], check=True, capture_output=True)
        namespaces = Namespaces()
        stack.callback(namespaces.close)
        origin = stack.enter_context(
            subprocess.Popen(
                namespaces.inside("origin", [sys.executable, "-m", "tests.end_to_end.origin", str(directory)]),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
            )
        )  # fmt: skip
        stack.callback(origin.kill)
        assert origin.stdin
        assert origin.stdout
        assert origin.stdout.readline() == "ready\n"
        hosts = [
            argument
            for name, address in (
                ("api.example", ORIGIN4), ("four.cdn.example", ORIGIN4), ("six.cdn.example", f"[{ORIGIN6}]"),
            )
            for argument in ("--host", f"{name}={address}")
        ]  # fmt: skip
        log = stack.enter_context((directory / "log").open("wb"))
        gate = stack.enter_context(
            subprocess.Popen(
                namespaces.inside("gateway", [
                    str(OUTGATE), "serve", "-p", str(directory / "policy.yaml"), "--pki", str(directory / "pki"),
                    "--listen", f"[::]:{PORT}", "--upstream-ca", str(directory / "origin.pem"), "--admin", "none",
                    *hosts,
                ]),
                stdout=log, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        stack.callback(gate.kill)
        assert gate.stderr
        said = gate.stderr.readline()
        assert "serving" in said, said
        trust = directory / "trust.pem"
        trust.write_bytes(b"".join(path.read_bytes() for path in (directory / "pki").rglob("*.crt")))
        with trust.open("ab") as file:
            file.write((directory / "origin.pem").read_bytes())
        ended = {
            name: curl(namespaces, ["--cacert", str(trust), *arguments]) for name, (arguments, _, _, _) in TRIES.items()
        }
        banner = subprocess.run(
            namespaces.inside("client", [sys.executable, "-c", SAY.format(address=ORIGIN4)]), capture_output=True
        ).stdout
        time.sleep(0.2)  # a connection that is carried is recorded when both its ends are closed
        gate.send_signal(signal.SIGTERM)
        said += gate.stderr.read()
        gate.wait(20)
        origin.stdin.write("look\n")
        origin.stdin.flush()
        seen = json.loads(origin.stdout.readline())
        accepted = [(address, port) for address, port in seen["accepted"]]
        text = (directory / "log").read_text()
        yield Net(ended, banner, accepted, seen["requests"], text, gate.returncode, said)


SAY = """
import socket, sys
with socket.create_connection(("{address}", 22), 10) as sock:
    sys.stdout.buffer.write(sock.recv(100))
"""


def curl(namespaces: Namespaces, arguments: Sequence[str]) -> tuple[int, str]:
    command = [*CURL, "-o", "/dev/null", "-w", "%{http_code}", *arguments]
    done = subprocess.run(namespaces.inside("client", command), capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", list(TRIES))
def test_a_redirected_connection_is_judged_by_its_source_and_original_destination(net: Net, name: str) -> None:
    _, exit_status, http_status, expected = TRIES[name]
    found = [record for record in net.records if expected.items() <= record.items()]

    assert net.ended[name][0] in exit_status
    assert net.ended[name][1] == http_status
    assert len(found) == 1, net.log


def test_a_tcp_rule_by_address_dials_the_original_destination(net: Net) -> None:
    [record] = [record for record in net.records if record["destination.port"] == 22]

    assert net.banner == BANNER
    assert (record["verdict"], record["destination.address"], record["stage"]) == ("allow", ORIGIN4, "tcp")


def test_the_origin_saw_what_was_allowed_and_nothing_else(net: Net) -> None:
    allowed = [record for record in net.records if record["verdict"] == "allow"]

    assert len(net.accepted) == len(allowed)
    assert {port for _, port in net.accepted} == {22, 80, 443}
    assert {request["target"].partition("?")[0] for request in net.requests} == {
        "/search", "/search/6", "/search/plain", "/x",
    }  # fmt: skip


def test_every_attempt_has_one_record(net: Net) -> None:
    assert len(net.records) == len(TRIES) + 1
    assert len({record["id"] for record in net.records}) == len(net.records)


def test_no_secret_is_in_the_log_or_on_the_terminal(net: Net) -> None:
    [request] = [request for request in net.requests if request["method"] == "POST"]

    assert (request["headers"]["Authorization"], request["headers"]["X-Api-Key"]) == (
        "Bearer s3cr3t-token",
        "s3cr3t-key",
    )
    assert request["target"] == "/search?key=s3cr3t-query&s3cr3t-word"
    for secret in SECRETS:
        assert secret not in net.log
        assert secret not in net.gate_said
    assert re.search(r'"url.full":"https://api\.example/search\?key=~[0-9a-f]{8}&~[0-9a-f]{8}"', net.log)


def test_a_signal_ends_the_gate_with_status_0_and_without_a_word(net: Net) -> None:
    assert net.gate_status == 0
    assert net.gate_said.splitlines() == [f"outgate: serving redirected connections on [::]:{PORT}"]
