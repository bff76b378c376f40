"""Real HTTP/1.1 clients through a gateway that inspects them: whichever host speaks to them, they get what they ask."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from subprocess import PIPE

import pytest

from proxy.layout import read_layout
from proxy.ruleset import render
from tests.end_to_end import inside_repository
from tests.end_to_end.client_net import CLIENT, LEADS, ORIGIN, Net
from tests.end_to_end.clients import CURL
from tests.end_to_end.inside_repository import SIZE
from tests.end_to_end.placed import Placed
from tests.end_to_end.world import CHECKOUT, OUTGATE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "curl", "node", "git")
    ),
]

NAME, PORT = "index.example", 8446  # a name that the origins' certificate has
URL = f"https://{NAME}"
POLICY = f"""
version: 1
workloads:
  app:
    match: {{address: [{CLIENT}/32]}}
    rules:
      - host: {NAME}
        tls: inspect
        http2: false
        allow: ["GET,HEAD,PUT,POST /object/**", "GET /repo.git/**", "POST /repo.git/git-upload-pack"]
        deny: ["* /object/secret/**"]
      - {{host: sockets.example, tls: inspect, http2: false, upgrade: [websocket]}}
"""


class Gateway(Net):
    """With the rules of `outgate firewall`, and an origin that speaks Python's HTTP/1.1."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack)
        self.net.rules("gateway", render(read_layout("gateway", {}, {})))
        program = [sys.executable, "-m", inside_repository.__name__, str(self.directory), str(PORT)]
        origin = stack.enter_context(
            subprocess.Popen(self.net.inside("origin", program), stdin=PIPE, stdout=PIPE, text=True, cwd=CHECKOUT)
        )
        assert origin.stdout
        assert origin.stdout.readline() == "ready\n"
        (self.directory / "policy.yaml").write_text(POLICY)
        leads = [
            word for name, port in (LEADS | {NAME: PORT}).items() for word in ("--host", f"{name}={ORIGIN}:{port}")
        ]
        command = [
            str(OUTGATE), "serve", "--mode", "gateway", "-p", "policy.yaml", "--pki", "pki",
            "--upstream-ca", "origin.pem",
            "--log", "decisions.jsonl", *leads,
        ]  # fmt: skip
        self.gate = stack.enter_context(Placed(self.directory, self.net.inside("gateway", command)))

    def body(self, size: int = 2_000_000) -> tuple[str, str]:
        """A file, and what its upload comes back as."""
        content = os.urandom(size)
        (self.directory / "upload").write_bytes(content)
        return "upload", hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def net() -> Iterator[Gateway]:
    with ExitStack() as stack:
        yield Gateway(stack)


# --- curl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_curl_downloads_by_either_version(net: Gateway, version: str) -> None:
    said = net.run(
        [*CURL, f"--http{version}", "-o", "/dev/null", "-w", "%{http_code} %{size_download}", f"{URL}/object"]
    )
    assert said == f"200 {SIZE}"


def test_curl_asks_for_a_head_and_for_a_part(net: Gateway) -> None:
    assert f"content-length: {SIZE}" in net.run([*CURL, "-I", f"{URL}/object"]).lower()
    assert net.run([*CURL, "-r", "8-15", f"{URL}/object"]) == "outgate!"


def test_curl_keeps_its_connection_over_a_denial(net: Gateway) -> None:
    urls = [f"{URL}/object/{name}" for name in ("one", "secret/x", "two")]
    out = [word for url in urls for word in ("-o", "/dev/null", url)]
    assert net.run([*CURL, "-w", "%{http_code} %{num_connects}\n", *out]).split("\n")[:3] == ["200 1", "403 0", "200 0"]


@pytest.mark.parametrize("expects", [True, False], ids=["expects-100", "at-once"])
def test_curl_uploads(net: Gateway, expects: bool) -> None:
    name, digest = net.body()
    header = "Expect: 100-continue" if expects else "Expect:"
    said = net.run([*CURL, "--expect100-timeout", "60", "-H", header, "-T", name, f"{URL}/object/x"])
    assert json.loads(said)["sha256"] == digest


def test_curl_uploads_chunks(net: Gateway) -> None:
    name, digest = net.body()
    said = net.run([*CURL, "-H", "Transfer-Encoding: chunked", "-H", "Expect:", "-T", name, f"{URL}/object/x"])
    assert json.loads(said)["sha256"] == digest


def test_a_denied_upload_is_told_to_curl_whether_it_asks_before_or_not(net: Gateway) -> None:
    name, _ = net.body(8_000_000)
    for header in ("Expect: 100-continue", "Expect:"):
        out = ["-o", "/dev/null", "-w", "%{http_code}", "-H", header]
        done = net.start([*CURL, *out, "-T", name, f"{URL}/object/secret/x"])
        said, complaint = done.communicate(timeout=60)
        assert said == b"403", complaint


# --- Python -----------------------------------------------------------------------------------------------------------

REQUESTS = f"""
import requests
with requests.Session() as session:
    print([session.get("{URL}/object/" + name, timeout=20).status_code for name in ("one", "secret/x", "two")])
    print(session.post("{URL}/object", data=(bytes(1000) for _ in range(500)), timeout=20).json()["length"])
"""
HTTPX = (
    REQUESTS.replace("requests.Session", "httpx.Client")
    .replace("import requests", "import httpx")
    .replace("data=", "content=")
)
AIOHTTP = f"""
import aiohttp, asyncio, os, ssl
async def main():
    trust = ssl.create_default_context()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session:
        said = []
        for name in ("one", "secret/x", "two"):
            async with session.get("{URL}/object/" + name) as answer:
                await answer.read()
                said.append(answer.status)
        print(said)
        async def parts():
            for _ in range(500):
                yield bytes(1000)
        async with session.post("{URL}/object", data=parts()) as answer:
            print((await answer.json(content_type=None))["length"])
asyncio.run(main())
"""


@pytest.mark.parametrize("program", [REQUESTS, HTTPX, AIOHTTP], ids=["requests", "httpx", "aiohttp"])
def test_python_clients_keep_a_connection_and_send_chunks(net: Gateway, program: str) -> None:
    assert net.python(program).splitlines() == ["[200, 403, 200]", "500000"]


S3 = f"""
import hashlib, http.client, ssl, sys
connection = http.client.HTTPSConnection("{NAME}", timeout=30, context=ssl.create_default_context())
data = bytes(range(256)) * 2000
def signed():
    for begin in range(0, len(data), 65536):
        part = data[begin:begin + 65536]
        yield b"%x;chunk-signature=%s\\r\\n%s\\r\\n" % (len(part), hashlib.sha256(part).hexdigest().encode(), part)
    yield b"0;chunk-signature=" + b"0" * 64 + b"\\r\\n\\r\\n"
body = b"".join(signed())
connection.putrequest("PUT", "/object/bucket/key%20with%20spaces")
for name, value in {{
    "Expect": "100-continue", "Content-Encoding": "aws-chunked",
    "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
    "x-amz-decoded-content-length": str(len(data)), "Content-Length": str(len(body)),
    "Authorization": "AWS4-HMAC-SHA256 Credential=x, SignedHeaders=host;x-amz-date, Signature=y",
}}.items():
    connection.putheader(name, value)
connection.endheaders()
begin = connection.sock.recv(65536)
assert begin.startswith(b"HTTP/1.1 100"), begin
connection.sock.sendall(body)
answer = connection.sock.recv(65536)
while b"}}" not in answer:
    answer += connection.sock.recv(65536)
print(answer.startswith(b"HTTP/1.1 200"), hashlib.sha256(body).hexdigest().encode() in answer)
"""


def test_an_s3_client_sends_its_signed_chunks_once_it_may(net: Gateway) -> None:
    """Those chunks are the body's own: to HTTP they are bytes of a known length."""
    assert net.python(S3) == "True True\n"


TALK = """
import ssl
from websockets.sync.client import connect
with connect("wss://sockets.example/", max_size=None) as socket:
    for size in (1, 100, 200_000):
        socket.send(bytes(size))
        assert socket.recv() == bytes(size)
print("all came back")
"""


def test_a_websocket_client_talks(net: Gateway) -> None:
    assert net.python(TALK) == "all came back\n"


# --- other runtimes ---------------------------------------------------------------------------------------------------

FETCH = f"""
const status = async (name) => (await fetch("{URL}/object/" + name)).status;
console.log(await status("one"), await status("secret/x"), await status("two"));
const stream = new ReadableStream({{ start(it) {{ it.enqueue(new Uint8Array(100000)); it.close(); }} }});
const answer = await fetch("{URL}/object", {{ method: "POST", body: stream, duplex: "half" }});
console.log((await answer.json()).length);
"""
AGENT = f"""
import https from "node:https";
const agent = new https.Agent({{ keepAlive: true, maxSockets: 1 }});
const ask = (path) => new Promise((resolve, reject) => {{
  const request = https.request("{URL}/object/" + path, {{ agent }}, (answer) => {{
    answer.resume();
    answer.on("end", () => resolve([answer.statusCode, request.reusedSocket].join(" ")));
  }});
  request.on("error", reject);
  request.end();
}});
console.log([await ask("one"), await ask("secret/x"), await ask("two")].join(", "));
agent.destroy();
"""


def node(net: Gateway, program: str) -> str:
    return net.run(["node", "--input-type=module", "-e", program])


def test_node_fetches_and_streams_up(net: Gateway) -> None:
    assert node(net, FETCH).splitlines() == ["200 403 200", "100000"]


def test_an_agent_of_node_keeps_its_socket_over_a_denial(net: Gateway) -> None:
    assert node(net, AGENT) == "200 false, 403 true, 200 true\n"


JAVA = f"""
import java.net.URI;
import java.net.http.*;

public class AskOne {{
    public static void main(String[] arguments) throws Exception {{
        var client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        for (var name : new String[] {{"one", "secret/x", "two"}}) {{
            var answer = client.send(HttpRequest.newBuilder(URI.create("{URL}/object/" + name)).build(),
                HttpResponse.BodyHandlers.ofByteArray());
            System.out.println(answer.version() + " " + answer.statusCode());
        }}
        for (var expects : new boolean[] {{false, true}}) {{
            var answer = client.send(HttpRequest.newBuilder(URI.create("{URL}/object/x")).expectContinue(expects)
                .PUT(HttpRequest.BodyPublishers.ofByteArray(new byte[500_000])).build(),
                HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.body().startsWith("{{\\"length\\": 500000,"));
        }}
    }}
}}
"""


@pytest.mark.skipif(shutil.which("java") is None, reason="java is not installed")
def test_java_asks_and_uploads(net: Gateway) -> None:
    (net.directory / "AskOne.java").write_text(JAVA)
    said = net.run(["java", "-XX:TieredStopAtLevel=1", "AskOne.java"])
    assert said.splitlines() == ["HTTP_1_1 200", "HTTP_1_1 403", "HTTP_1_1 200", "true", "true"]


# --- git --------------------------------------------------------------------------------------------------------------


def test_git_clones_and_may_not_push(net: Gateway) -> None:
    net.run(["git", "clone", "--quiet", f"{URL}/repo.git", "cloned"])
    assert (net.directory / "cloned" / "file").read_bytes() == (
        net.directory / "repository" / "tree" / "file"
    ).read_bytes()
    done = net.start(["git", "-C", "cloned", "push", "--quiet", f"{URL}/repo.git", "HEAD:refs/heads/other"])
    _, said = done.communicate(timeout=60)
    assert done.returncode != 0
    assert b"403" in said
