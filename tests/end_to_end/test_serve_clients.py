"""Real clients through a gateway that inspects them. They know of no proxy; rules lead them to it, as documented."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from pki import distribution
from tests.end_to_end.clients import CURL
from tests.end_to_end.documented import fenced
from tests.end_to_end.inside_origins import PORTS
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import CLEAN, Placed, make_authority
from tests.end_to_end.service import children, eventually
from tests.end_to_end.test_serve_modes import GATEWAY, PAGE
from tests.end_to_end.world import CHECKOUT, OUTGATE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "curl", "node")
    ),
]

CLIENT, BRIDGE, OUTSIDE, ORIGIN, ASKED = "10.77.1.2", "10.77.1.1", "10.77.2.1", "10.77.2.2", "203.0.113.7"
POLICY = f"""
version: 1
workloads:
  app:
    match: {{address: [{CLIENT}/32]}}
    rules:
      - {{host: api.example, tls: inspect, allow: ["GET,POST /**"], deny: ["* /secret/**"]}}
      - {{host: grpc.example, tls: inspect, allow: ["POST /weather.Forecast/**"], deny: ["* /weather.Forecast/Secret"]}}
      - {{host: sockets.example, tls: inspect, upgrade: [websocket]}}
"""
MIB = 1 << 20


class Net:
    """A client, a gateway with one worker, the origins; the client trusts the gate as docs/pki.md has it."""

    def __init__(self, stack: ExitStack) -> None:
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-clients-")))
        self.net = stack.enter_context(machines("client", "gateway", "origin"))
        self._build(self.net)
        origins = stack.enter_context(
            subprocess.Popen(
                self.net.inside("origin", [sys.executable, "-m", "tests.end_to_end.inside_origins", str(self.directory)]),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
            )
        )  # fmt: skip
        stack.callback(origins.kill)
        assert origins.stdout
        assert origins.stdout.readline() == "ready\n"
        make_authority(self.directory)
        self._trust()
        self._hosts = self.directory / "hosts"
        self._hosts.write_text("".join(f"{ASKED} {name}\n" for name in PORTS))
        (self.directory / "policy.yaml").write_text(POLICY)
        leads = [word for name, port in PORTS.items() for word in ("--host", f"{name}={ORIGIN}:{port}")]
        options = ["--upstream-ca", "origin.pem", "--log", "decisions.jsonl", *leads]
        command = [str(OUTGATE), "serve", "--mode", "gateway", "-p", "policy.yaml", "--pki", "pki", *options]
        self.gate = stack.enter_context(Placed(self.directory, self.net.inside("gateway", command)))

    def _build(self, net: Namespaces) -> None:
        net.link("gateway", "br0", "client", "eth0")
        net.link("gateway", "out", "origin", "wire")
        net.address("client", "eth0", f"{CLIENT}/24")
        net.address("gateway", "br0", f"{BRIDGE}/24")
        net.address("gateway", "out", f"{OUTSIDE}/24")
        net.address("origin", "wire", f"{ORIGIN}/24")
        net.default("client", BRIDGE)
        net.rules("gateway", fenced(PAGE, GATEWAY, "nft"))

    def _trust(self) -> None:
        [root] = (self.directory / "pki" / "roots").glob("*/ca.crt")
        trust = self.directory / "trust"
        trust.mkdir()
        public = (self.directory / "origin.pem").read_bytes()
        for name, content in distribution.trust_files(str(trust), root.read_bytes(), public).items():
            (trust / name).write_bytes(content)
        made = distribution.environment(str(trust), CLEAN)
        self._env = {name: value for name, value in CLEAN.items() if name not in made.removed} | dict(made.variables)

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        line = self.net.inside("client", command, hosts=self._hosts)
        return subprocess.Popen(line, cwd=self.directory, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, command: Sequence[str]) -> str:
        """What a client prints, which must end well."""
        line = self.net.inside("client", command, hosts=self._hosts)
        done = subprocess.run(line, cwd=self.directory, env=self._env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, program: str, *arguments: str) -> str:
        return self.run([sys.executable, "-c", program, *arguments])

    def inspector(self) -> int:
        [worker] = self.gate.workers()
        [inspector] = children(worker, "proxy.inspector.main")
        return inspector

    def rss_mib(self) -> float:
        """Of the inspector."""
        status = Path(f"/proc/{self.inspector()}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def peak_mib(self) -> float:
        status = Path(f"/proc/{self.inspector()}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.inspector()}/clear_refs").write_text("5")

    def cpu_s(self) -> float:
        """Of every process of the gate."""
        pids = [self.gate.process.pid, *self.gate.processes()]
        ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
        return sum(int(tick) for both in ticks for tick in both) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with ExitStack() as stack:
        yield Net(stack)


# --- curl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_curl_speaks_its_version_to_the_origin_and_keeps_its_connection(net: Net, version: str) -> None:
    urls = [f"https://api.example/{name}" for name in ("one", "two", "secret/x", "three")]
    out = [word for url in urls for word in ("-o", "/dev/null", url)]
    said = net.run(
        [*CURL, f"--http{version}", "-w", "%{http_version} %{http_code} %{num_connects} %header{x-spoken}\n", *out]
    )
    spoken = "2.0" if version == "2" else "1.1"
    assert said.splitlines() == [
        f"{version} 200 1 {spoken}", f"{version} 200 0 {spoken}", f"{version} 403 0 ", f"{version} 200 0 {spoken}",
    ]  # fmt: skip


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_early_hints_reach_curl(net: Net, version: str) -> None:
    done = net.start([*CURL, "-v", f"--http{version}", "https://api.example/early"])
    body, said = done.communicate(timeout=60)
    assert body == b"late"
    assert re.search(rb"< HTTP/\S+ 103", said), said
    assert b"< link: </style.css>; rel=preload; as=style" in said.lower()


def test_an_upload_waits_for_100_continue(net: Net) -> None:
    body = os.urandom(2 * MIB)
    (net.directory / "two-mib").write_bytes(body)
    post = [*CURL, "-v", "--http1.1", "-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary"]
    answer, said = net.start([*post, "@two-mib", "https://api.example/sum"]).communicate(timeout=60)
    assert json.loads(answer) == {"length": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    assert b"< HTTP/1.1 100 Continue" in said
    assert b"Done waiting for 100-continue" not in said


def test_an_upload_that_is_denied_is_never_sent(net: Net) -> None:
    post = [*CURL, "-v", "--http1.1", "-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary"]
    (net.directory / "secret").write_bytes(bytes(MIB))
    out = ["-o", "/dev/null", "-w", "%{http_code} %{size_upload}"]
    assert net.run([*post, "@secret", *out, "https://api.example/secret/x"]) == "403 0"


# --- many requests ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
@pytest.mark.parametrize("version", ["h2", "http/1.1"])
def test_every_one_of_many_requests_is_answered(net: Net, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    streams = "32" if version == "h2" else "1"
    load = ["h2load", "-n", "1500", "-c", "4", "-m", streams, f"--alpn-list={version}", "https://api.example/bytes/100"]
    before, recorded = net.cpu_s(), len(net.gate.records())
    said = net.run(load)
    spent = net.cpu_s() - before
    assert f"Application protocol: {version}" in said
    assert "status codes: 1500 2xx, 0 3xx, 0 4xx, 0 5xx" in said, said
    rate = re.findall(r"finished in .*?, ([\d.]+) req/s", said)[0]
    with capsys.disabled():
        print(f"\n{version}: {rate} req/s, {1e6 * spent / 1500:.0f} µs of the gate's CPU a request")
    eventually(lambda: len(net.gate.records()) == recorded + 1500, "one record for each")


# --- gRPC -------------------------------------------------------------------------------------------------------------

GRPC = """
import grpc
credentials = grpc.ssl_channel_credentials()
with grpc.secure_channel("grpc.example:443", credentials) as channel:
    print(channel.unary_unary("/weather.Forecast/Echo")(b"Oslo", timeout=20).decode())
    talk = channel.stream_stream("/weather.Forecast/Talk")((b"word %d" % n for n in range(500)), timeout=20)
    answers = list(talk)
    print(len(answers), answers[-1].decode(), dict(talk.trailing_metadata())["x-said"])
    try:
        channel.unary_unary("/weather.Forecast/Secret")(b"", timeout=20)
    except grpc.RpcError as error:
        print(error.code().name, error.details().split(":")[0])
"""


def test_grpc_calls_and_streams_are_carried_and_denied_by_method(net: Net) -> None:
    echo, talk, denied = net.python(GRPC).splitlines()
    assert echo == "Oslo"
    assert talk == "500 WORD 499 all"
    assert denied.startswith("PERMISSION_DENIED")


# --- WebSocket --------------------------------------------------------------------------------------------------------

TALK = """
import ssl, sys
from websockets.sync.client import connect
count, size = map(int, sys.argv[1:])
message = bytes(size)
with connect("wss://sockets.example/", max_size=None) as socket:
    for _ in range(count):
        socket.send(message)
        assert socket.recv() == message
print("all came back")
"""


def test_websocket_messages_do_not_pile_up_in_the_gate(net: Net) -> None:
    assert net.python(TALK, "200", "10000") == "all came back\n"
    before = net.rss_mib()
    assert net.python(TALK, "2000", "20000") == "all came back\n"  # 80 MB in all
    assert net.rss_mib() < before + 20


# --- runtimes ---------------------------------------------------------------------------------------------------------

FETCH = """
const said = [];
for (const name of ["one", "two", "secret/x", "three"]) {
  const answer = await fetch("https://api.example/" + name);
  await answer.text();
  said.push(answer.status);
}
console.log(said.join(" "));
"""
HTTP2 = """
import { connect } from "node:http2";
const session = connect("https://api.example");
const ask = (path) => new Promise((resolve, reject) => {
  const stream = session.request({ ":path": path });
  let status, length = 0;
  stream.on("response", (headers) => (status = headers[":status"]));
  stream.on("data", (data) => (length += data.length));
  stream.on("end", () => resolve([status, length].join(":")));
  stream.on("error", reject);
  stream.end();
});
const paths = [...Array(100).keys()].map((n) => (n % 10 ? "/bytes/" + n * 1000 : "/secret/" + n));
const said = await Promise.all(paths.map(ask));
const right = said.filter((one, n) => (n % 10 ? one === "200:" + n * 1000 : one.startsWith("403:")));
console.log(session.alpnProtocol, right.length);
session.close();
"""


def node(net: Net, program: str) -> str:
    return net.run(["node", "--input-type=module", "-e", program])


def test_node_fetches_over_a_kept_connection(net: Net) -> None:
    assert node(net, FETCH) == "200 200 403 200\n"


def test_node_has_a_hundred_streams_at_once(net: Net) -> None:
    assert node(net, HTTP2) == "h2 100\n"


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.util.*;
import java.util.stream.*;

public class Ask {
    public static void main(String[] arguments) throws Exception {
        var client = HttpClient.newHttpClient();
        var pending = Stream.of("one", "secret/x", "two", "three").map(name -> client.sendAsync(
            HttpRequest.newBuilder(URI.create("https://api.example/" + name)).build(),
            HttpResponse.BodyHandlers.ofString())).toList();
        for (var one : pending) {
            var answer = one.get();
            System.out.println(answer.version() + " " + answer.statusCode());
        }
        var body = new byte[3_000_000];
        var answer = client.send(HttpRequest.newBuilder(URI.create("https://api.example/sum"))
            .POST(HttpRequest.BodyPublishers.ofByteArray(body)).build(), HttpResponse.BodyHandlers.ofString());
        System.out.println(answer.version() + " " + answer.body().startsWith("{\\"length\\":3000000,"));
    }
}
"""


@pytest.mark.skipif(shutil.which("java") is None, reason="java is not installed")
def test_java_speaks_http2_by_itself(net: Net) -> None:
    (net.directory / "Ask.java").write_text(JAVA)
    said = net.run(["java", "-XX:TieredStopAtLevel=1", "Ask.java"])
    assert said.splitlines() == ["HTTP_2 200", "HTTP_2 403", "HTTP_2 200", "HTTP_2 200", "HTTP_2 true"]


REQUESTS = """
import requests
with requests.Session() as session:
    print([session.get("https://api.example/" + name, timeout=20).status_code for name in ("one", "secret/x", "two")])
    answer = session.post("https://api.example/sum", data=(bytes(1000) for _ in range(1000)), timeout=20)
    print(answer.json()["length"])
"""


def test_requests_sends_a_body_of_unknown_length(net: Net) -> None:
    assert net.python(REQUESTS).splitlines() == ["[200, 403, 200]", "1000000"]


# --- large bodies -----------------------------------------------------------------------------------------------------

LARGE = 200 * MIB
MAY_GROW_MIB = 48  # queues of a connection or two on both sides, and what Python keeps for the next


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_a_large_download_arrives_whole_and_is_never_held(net: Net, version: str) -> None:
    net.forget_peak()
    before = net.rss_mib()
    with net.start([*CURL, "--max-time", "80", f"--http{version}", f"https://api.example/bytes/{LARGE}"]) as curl:
        digest = hashlib.sha256()
        assert curl.stdout
        while data := curl.stdout.read(1 << 18):
            digest.update(data)
    assert curl.returncode == 0
    assert digest.digest() == hashlib.sha256(b"outgate " * (LARGE // 8)).digest()
    assert net.peak_mib() < before + MAY_GROW_MIB


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_a_large_upload_arrives_whole_and_is_never_held(net: Net, version: str) -> None:
    path = net.directory / "large"
    if not path.exists():
        path.write_bytes(b"outgate " * (LARGE // 8))
    net.forget_peak()
    before = net.rss_mib()
    said = net.run(
        [*CURL, "--max-time", "80", f"--http{version}", "-X", "POST", "-T", str(path), "https://api.example/sum"]
    )
    assert json.loads(said) == {"length": LARGE, "sha256": hashlib.sha256(b"outgate " * (LARGE // 8)).hexdigest()}
    assert net.peak_mib() < before + MAY_GROW_MIB


SLOW = """
import socket, ssl, time
tls = ssl.create_default_context().wrap_socket(socket.create_connection(("api.example", 443)), server_hostname="api.example")
tls.sendall(b"GET /bytes/100000000 HTTP/1.1\\r\\nHost: api.example\\r\\n\\r\\n")
got = len(tls.recv(1000))
print("begun", flush=True)
input()
while got < 100000000:
    got += len(tls.recv(1 << 20)) or exit("cut")
print("all")
"""


def test_a_reader_that_stops_holds_no_memory_of_the_gate_and_nobody_else_up(net: Net) -> None:
    before = net.rss_mib()
    net.forget_peak()
    line = net.net.inside("client", [sys.executable, "-c", SLOW], hosts=net._hosts)
    slow = subprocess.Popen(line, env=net._env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert slow.stdout
    assert slow.stdout.readline() == "begun\n"
    for _ in range(5):
        net.run([*CURL, "-o", "/dev/null", "https://api.example/bytes/1000000"])
    assert net.peak_mib() < before + MAY_GROW_MIB
    assert slow.communicate("\n", timeout=60)[0] == "all\n"
