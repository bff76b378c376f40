"""Real clients through a gateway that inspects them. They know of no proxy; rules lead them to it, as documented."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from proxy.layout import read_layout
from proxy.ruleset import render
from tests.end_to_end.client_net import CLIENT, Net
from tests.end_to_end.clients import CURL
from tests.end_to_end.service import children, eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "curl", "node")
    ),
]

POLICY = f"""
version: 1
workloads:
  app:
    match: {{address: [{CLIENT}/32]}}
    rules:
      - {{host: api.example, tls: inspect, http2: true, allow: ["GET,POST /**"], deny: ["* /secret/**"]}}
      - {{host: grpc.example, tls: inspect, allow: ["POST /weather.Forecast/**"], deny: ["* /weather.Forecast/Secret"]}}
      - {{host: sockets.example, tls: inspect, upgrade: [websocket]}}
"""
MIB = 1 << 20


class Gateway(Net):
    """With the rules of `outgate firewall`, and one worker."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack)
        self.net.rules("gateway", render(read_layout("gateway", {}, {})))
        command = ["serve", "--mode", "gateway", "-p", "policy.yaml", "--pki", "pki"]
        self.gate = stack.enter_context(self.serve(POLICY, command))
        self.run([*CURL, "-o", "/dev/null", "https://api.example/"])  # from now on all of the inspector is there

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


@pytest.fixture(scope="module")
def net() -> Iterator[Gateway]:
    with ExitStack() as stack:
        yield Gateway(stack)


# --- curl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_curl_speaks_its_version_to_the_origin_and_keeps_its_connection(net: Gateway, version: str) -> None:
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
def test_early_hints_reach_curl(net: Gateway, version: str) -> None:
    done = net.start([*CURL, "-v", f"--http{version}", "https://api.example/early"])
    body, said = done.communicate(timeout=60)
    assert body == b"late"
    assert re.search(rb"< HTTP/\S+ 103", said), said
    assert b"< link: </style.css>; rel=preload; as=style" in said.lower()


def test_an_upload_waits_for_100_continue(net: Gateway) -> None:
    body = os.urandom(2 * MIB)
    (net.directory / "two-mib").write_bytes(body)
    post = [*CURL, "-v", "--http1.1", "-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary"]
    answer, said = net.start([*post, "@two-mib", "https://api.example/sum"]).communicate(timeout=60)
    assert json.loads(answer) == {"length": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    assert b"< HTTP/1.1 100 Continue" in said
    assert b"Done waiting for 100-continue" not in said


def test_an_upload_that_is_denied_is_never_sent(net: Gateway) -> None:
    post = [*CURL, "-v", "--http1.1", "-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary"]
    (net.directory / "secret").write_bytes(bytes(MIB))
    out = ["-o", "/dev/null", "-w", "%{http_code} %{size_upload}"]
    assert net.run([*post, "@secret", *out, "https://api.example/secret/x"]) == "403 0"


# --- many requests ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
@pytest.mark.parametrize("version", ["h2", "http/1.1"])
def test_every_one_of_many_requests_is_answered(net: Gateway, version: str) -> None:
    streams, url = ("32", "https://api.example/bytes/100") if version == "h2" else ("1", "https://api.example/bytes/99")
    load = ["h2load", "-n", "1500", "-c", "4", "-m", streams, f"--npn-list={version}", url]
    said = net.run(load)
    assert f"Application protocol: {version}" in said
    assert "status codes: 1500 2xx, 0 3xx, 0 4xx, 0 5xx" in said, said
    eventually(lambda: len(net.gate.records(**{"url.full": url, "verdict": "allow"})) == 1500, "one record for each")


# --- gRPC -------------------------------------------------------------------------------------------------------------

GRPC = """
import os
os.environ["GRPC_DNS_RESOLVER"] = "native"  # its own waits for a name server, and there is none
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


def test_grpc_calls_and_streams_are_carried_and_denied_by_method(net: Gateway) -> None:
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


def test_websocket_messages_do_not_pile_up_in_the_gate(net: Gateway) -> None:
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


def node(net: Gateway, program: str) -> str:
    return net.run(["node", "--input-type=module", "-e", program])


def test_node_fetches_over_a_kept_connection(net: Gateway) -> None:
    assert node(net, FETCH) == "200 200 403 200\n"


def test_node_has_a_hundred_streams_at_once(net: Gateway) -> None:
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
def test_java_speaks_http2_by_itself(net: Gateway) -> None:
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


def test_requests_sends_a_body_of_unknown_length(net: Gateway) -> None:
    assert net.python(REQUESTS).splitlines() == ["[200, 403, 200]", "1000000"]


# --- large bodies -----------------------------------------------------------------------------------------------------

LARGE = {"1.1": 200 * MIB, "2": 100 * MIB}
MAY_GROW_MIB = 16  # queues on both sides, and what Python keeps for the next; 2 were seen


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_a_large_download_arrives_whole_and_is_never_held(net: Gateway, version: str) -> None:
    length = LARGE[version]
    net.forget_peak()
    before = net.rss_mib()
    with net.start([*CURL, "--max-time", "80", f"--http{version}", f"https://api.example/bytes/{length}"]) as curl:
        digest = hashlib.sha256()
        assert curl.stdout
        while data := curl.stdout.read(1 << 18):
            digest.update(data)
    assert curl.returncode == 0
    assert digest.digest() == hashlib.sha256(b"outgate " * (length // 8)).digest()
    assert net.peak_mib() < before + MAY_GROW_MIB


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_a_large_upload_arrives_whole_and_is_never_held(net: Gateway, version: str) -> None:
    length = LARGE[version]
    path = net.directory / "large"
    path.write_bytes(b"outgate " * (length // 8))
    net.forget_peak()
    before = net.rss_mib()
    said = net.run(
        [*CURL, "--max-time", "80", f"--http{version}", "-X", "POST", "-T", str(path), "https://api.example/sum"]
    )
    assert json.loads(said) == {"length": length, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert net.peak_mib() < before + MAY_GROW_MIB


SLOW = """
import socket, ssl, time
sock = socket.create_connection(("api.example", 443))
tls = ssl.create_default_context().wrap_socket(sock, server_hostname="api.example")
tls.sendall(b"GET /bytes/100000000 HTTP/1.1\\r\\nHost: api.example\\r\\n\\r\\n")
got = len(tls.recv(1000))
print("begun", flush=True)
input()
while got < 100000000:
    got += len(tls.recv(1 << 20)) or exit("cut")
print("all")
"""


def test_a_reader_that_stops_holds_no_memory_of_the_gate_and_nobody_else_up(net: Gateway) -> None:
    before = net.rss_mib()
    net.forget_peak()
    with net.start([sys.executable, "-c", SLOW]) as slow:
        assert slow.stdout
        assert slow.stdout.readline() == b"begun\n"
        for _ in range(5):
            net.run([*CURL, "-o", "/dev/null", "https://api.example/bytes/1000000"])
        assert net.peak_mib() < before + MAY_GROW_MIB
        assert slow.communicate(b"\n", timeout=60)[0] == b"all\n"
