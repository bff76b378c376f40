"""A node: two pods, a gateway with its rules of the kernel, a relay for time, and a cluster that says who is who.

The cluster is a stand-in over real HTTP that only the gateway reaches. What the pods trust is what `outgate pki
distribute` put into their namespaces; they ask the gateway for names and for the time.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import Placed, make_authority
from tests.end_to_end.recorded import Internet, internet
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.world import OUTGATE
from tests.pki.api_server import ApiServer, api_server
from tests.proxy.dns_gate import NXDOMAIN, question, told
from tests.proxy.ntp_servers import query
from tests.proxy.ntp_servers import told as told_time

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "conntrack", "curl")
    ),
]

PODS = {"weather": ("10.78.1.2", "10.78.1.1"), "orders": ("10.78.3.2", "10.78.3.1")}  # its address, the gateway's there
OUT, FAR, NAMESERVER = "10.78.2.1", "10.78.2.2", "203.0.113.53"
ZONE = {"data.example": ["93.184.216.1"], "shop.example": ["93.184.216.2"], "time.example": ["93.184.216.7"]}
POLICY = """
version: 1
workloads:
  weather:
    match: {kubernetes: {namespace: weather, serviceAccount: weather-app}}
    rules:
      - {host: data.example, tls: inspect, allow: ["GET /search/**"], deny: ["* /forecasts/**"]}
  orders:
    match: {kubernetes: {namespace: orders, labels: {app: orders}}}
    rules: [{host: shop.example}]
"""
TIME = f"""
version: 1
workloads:
  weather: {{match: {{address: [{PODS["weather"][0]}/32]}}, rules: [{{ntp: time.example}}]}}
  orders: {{match: {{address: [{PODS["orders"][0]}/32]}}, rules: []}}
"""
DNS_PORT, NTP_PORT = 15053, 10123
IN_POD = 'mount --bind "$0" /etc/resolv.conf && mount --bind "$1" "$2" && . "$2/env.sh" && shift 2 && exec "$@"'
RESOLVED = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'


@dataclass(frozen=True, slots=True)
class Node:
    directory: Path
    net: Namespaces
    cluster: ApiServer
    gate: Placed
    internet: Internet

    def mount(self, pod: str) -> None:
        """The ConfigMap of its namespace where its containers see it."""
        found = self.cluster.config_map(pod)
        for name, text in found["data"].items():
            (self.directory / f"{pod}.trust" / name).write_text(text)

    def curl(self, pod: str, url: str, *options: str) -> tuple[int, str]:
        """Exit code and status of a request by a program that has the pod's resolver and its trust."""
        files = [self.directory / f"{pod}.resolv", self.directory / f"{pod}.trust", self.directory / "trust"]
        program = ["curl", "-sS", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", *options, url]
        line = ["sh", "-c", IN_POD, *map(str, files), *program]
        done = subprocess.run(self.net.inside(pod, line), capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    def ask(self, pod: str, port: int, message: bytes, *, within_s: float = WAIT_S) -> bytes:
        """What the gateway answers. Raises TimeoutError."""
        with self.net.open_socket(pod, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(within_s)
            sock.connect((PODS[pod][1], port))
            sock.send(message)
            return sock.recv(4096)

    def record(self, log: str = "decisions.jsonl", **fields: object) -> dict[str, Any]:
        """The one with these fields, once it is written."""
        return eventually(lambda: next(iter(records(self.directory / log, fields)), None), f"a record of {fields}")


def records(log: Path, fields: Mapping[str, object]) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [record for record in map(json.loads, lines) if fields.items() <= record.items()]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-node-")))
        directory.chmod(0o755)
        net = stack.enter_context(machines(*PODS, "gateway", "internet"))
        connect(net)
        outside = stack.enter_context(internet(net, directory, ZONE))
        make_authority(directory)
        (directory / "policy.yaml").write_text(POLICY)
        (directory / "time.yaml").write_text(TIME)
        (directory / "resolv.conf").write_text(f"nameserver {NAMESERVER}\n")
        (directory / "trust").mkdir()
        for pod, (_, near) in PODS.items():
            (directory / f"{pod}.trust").mkdir()
            (directory / f"{pod}.resolv").write_text(f"nameserver {near}\n")
        cluster = net.made_there("gateway", lambda: stack.enter_context(api_server()))
        cluster.add_namespace(*PODS)
        cluster.add_pod("weather", "weather-1", PODS["weather"][0], account="weather-app")
        cluster.add_pod("orders", "orders-1", PODS["orders"][0], labels={"app": "orders"})
        kubeconfig = cluster.kubeconfig(directory)
        firewall(net)
        gate = stack.enter_context(Placed(directory, net.inside("gateway", gate_command(kubeconfig))))
        relaying(stack, net, directory)
        it = Node(directory, net, cluster, gate, outside)
        distribute(it, kubeconfig)
        yield it


def connect(net: Namespaces) -> None:
    net.link("gateway", "out", "internet", "wire")
    net.address("gateway", "out", f"{OUT}/24")
    net.address("internet", "wire", f"{FAR}/24")
    net.default("gateway", FAR)
    for pod, (address, near) in PODS.items():
        net.link("gateway", f"to-{pod}", pod, "eth0")
        net.address("gateway", f"to-{pod}", f"{near}/24")
        net.address(pod, "eth0", f"{address}/24")
        net.default(pod, near)
    net.forward("gateway")


def firewall(net: Namespaces) -> None:
    inward = [word for pod in PODS for word in ("--workload-device", f"to-{pod}")]
    ports = ["--dns-port", str(DNS_PORT), "--ntp-port", str(NTP_PORT), "--ipv6", "closed"]
    command = ["firewall", "apply", "--mode", "gateway", *inward, "--upstream-device", "out", *ports]
    net.run("gateway", [str(OUTGATE), *command])


def gate_command(kubeconfig: str) -> list[str]:
    return [
        str(OUTGATE), "serve", "--mode", "gateway", "-p", "policy.yaml", "--pki", "pki", "--upstream-ca", "origin.pem",
        "--kubernetes", kubeconfig, "--nameserver", NAMESERVER, "--dns-listen", f"[::]:{DNS_PORT}", "--workers", "2",
        "--log", "decisions.jsonl",
    ]  # fmt: skip


def relaying(stack: ExitStack, net: Namespaces, directory: Path) -> None:
    """The relay, once it knows the time."""
    relay = [
        str(OUTGATE),
        "relay",
        "-p",
        "time.yaml",
        "--admin",
        "none",
        "--listen",
        f"[::]:{NTP_PORT}",
        "--log",
        "time.jsonl",
    ]
    line = net.inside("gateway", ["sh", "-c", RESOLVED, str(directory / "resolv.conf"), *relay])
    process = stack.enter_context(subprocess.Popen(line, cwd=directory, stderr=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    assert process.stderr
    while "synchronised, policy" not in (line_said := process.stderr.readline()):
        assert line_said, "the relay ended"


def distribute(node: Node, kubeconfig: str) -> None:
    """Into both namespaces, by the command; then as the kubelet shows it to containers."""
    command = [str(OUTGATE), "pki", "distribute", "--pki", "pki", "--public", "origin.pem", "--to", "kubernetes",
               "--kubeconfig", kubeconfig, "--mount-path", str(node.directory / "trust")]  # fmt: skip
    done = subprocess.run(
        node.net.inside("gateway", command), cwd=node.directory, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for pod in PODS:
        node.mount(pod)


def test_the_bundle_stands_in_both_namespaces_and_holds_the_root_that_signs(node: Node) -> None:
    [root] = (node.directory / "pki" / "roots").glob("*/ca.crt")
    for pod in PODS:
        assert root.read_text() in (node.directory / f"{pod}.trust" / "bundle.pem").read_text()


def test_a_pod_does_what_its_rules_allow_and_the_log_says_who(node: Node) -> None:
    """By a name that it looks up itself, under a certificate that it verifies by the bundle alone."""
    assert node.curl("weather", "https://data.example/search?q=Oslo") == (0, "200")
    assert node.curl("orders", "https://shop.example/cart") == (0, "200")
    inspected = node.record(**{"stage": "http", "verdict": "allow", "server.name": "data.example"})
    passed = node.record(**{"stage": "tls", "verdict": "allow", "server.name": "shop.example"})
    assert (inspected["workload"], inspected["source.address"]) == ("weather", PODS["weather"][0])
    assert inspected["url.full"].startswith("https://data.example/search?")
    assert (passed["workload"], passed["source.address"]) == ("orders", PODS["orders"][0])
    assert passed["tls.mode"] == "passthrough"
    for pod, name in (("weather", "data.example"), ("orders", "shop.example")):
        looked_up = node.record(**{"stage": "dns", "verdict": "allow", "server.name": name})
        assert (looked_up["workload"], looked_up["source.address"]) == (pod, PODS[pod][0])
    assert {request["target"] for request in node.internet.requests()} == {"/search?q=Oslo", "/cart"}


@pytest.mark.parametrize(
    ("pod", "url", "gets", "stage", "reason"),
    [
        ("weather", "https://data.example/forecasts/v1/daily", (0, "403"), "http", "deny_rule"),
        ("weather", "https://data.example/", (0, "403"), "http", "no_allow_entry"),
        ("weather", "https://shop.example/", (35, "000"), "tls", "no_rule"),
        ("orders", "https://data.example/search?q=Oslo", (35, "000"), "tls", "no_rule"),
        ("orders", "http://shop.example/", (0, "403"), "http", "port"),
    ],
    ids=["a path that is denied", "a path that is not allowed", "a name of the other", "an inspected one", "plain"],
)
def test_what_a_pods_rules_do_not_allow_is_denied_and_nothing_of_it_is_outside(
    node: Node, pod: str, url: str, gets: tuple[int, str], stage: str, reason: str
) -> None:
    """At an address that it knows: it asks nobody for the name."""
    before = len(node.internet.requests())
    name = url.split("/")[2]
    addresses = [word for port in (80, 443) for word in ("--resolve", f"{name}:{port}:{ZONE[name][0]}")]
    assert node.curl(pod, url, *addresses) == gets
    denied = node.record(**{"stage": stage, "verdict": "deny", "reason": reason, "workload": pod, "server.name": name})
    assert denied["source.address"] == PODS[pod][0]
    assert len(node.internet.requests()) == before


@pytest.mark.parametrize(("pod", "name"), [("weather", "shop.example"), ("orders", "data.example")])
def test_a_name_of_the_other_pod_is_not_there(node: Node, pod: str, name: str) -> None:
    assert told(node.ask(pod, 53, question(name))).rcode == NXDOMAIN
    denied = node.record(**{"stage": "dns", "verdict": "deny", "server.name": name, "workload": pod})
    assert (denied["reason"], denied["source.address"]) == ("no_rule", PODS[pod][0])


def test_the_relay_gives_time_to_the_pod_that_has_a_rule(node: Node) -> None:
    assert told_time(node.ask("weather", 123, query())).stratum == 3
    allowed = node.record("time.jsonl", stage="ntp", verdict="allow")
    assert (allowed["workload"], allowed["source.address"]) == ("weather", PODS["weather"][0])
    with pytest.raises(TimeoutError):
        node.ask("orders", 123, query(), within_s=0.5)
    denied = node.record("time.jsonl", stage="ntp", verdict="deny")
    assert (denied["workload"], denied["source.address"]) == ("orders", PODS["orders"][0])


def test_a_pod_that_is_gone_has_no_rights_left(node: Node) -> None:
    """The last one: its address is nobody's afterwards."""
    node.cluster.delete("pods", "orders", "orders-1")
    at = ("--resolve", f"shop.example:443:{ZONE['shop.example'][0]}")
    eventually(lambda: node.curl("orders", "https://shop.example/", *at)[0] == 35, "it is refused")
    denied = node.record(**{"stage": "tls", "verdict": "deny", "workload": "unknown"})
    assert (denied["reason"], denied["source.address"]) == ("unknown_workload", PODS["orders"][0])
