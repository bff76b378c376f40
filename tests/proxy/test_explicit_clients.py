"""Real clients through the whole proxy, inspector included: who they are, where they get, what origins see."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
import trustme

from pki.authority import certificates_pem, create_authority
from pki.issuers import issuers_text
from policies.hostnames import Hostname
from policies.tree import Source
from proxy.explicit.credentials import hash_password, store_credential
from proxy.explicit.verifier import Verifier
from proxy.hosts import HostsEntry
from proxy.original_dst import redirected_dst
from proxy.policy_files import load_sources
from proxy.record import Record
from proxy.runtime import Gate, Settings
from tests.proxy.gates import Loop, eventually
from tests.proxy.inspecting import Origin, response
from tests.proxy.proxying import Client, authorization, get
from tests.proxy.test_listener_limits import needs

POLICY = """
version: 1
workloads:
  build:
    match: {user: build}
    rules:
      - {host: one.test, ports: [80]}
      - {host: two.test, ports: [80]}
      - {host: carried.test}
      - {host: inspected.test, tls: inspect, allow: ["GET,HEAD /info/**", "GET /fine"]}
"""
PASSWORD = "correct horse: battery"
BUILD = authorization("build", PASSWORD)


class World:
    """The proxy, and origins that keep what they are asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: list[Record] = []
        origins, ours = trustme.CA(), create_authority(datetime.now(UTC))
        origins.cert_pem.write_to_path(str(directory / "origins.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        origins.issue_cert("carried.test", "inspected.test").configure_cert(context)
        self.plain = Origin(None, lambda head, _: _serve(head))
        self.tls = Origin(context, lambda head, _: _serve(head))
        self.roots = directory / "roots.pem"
        roots = certificates_pem(*(root.certificate for root in ours.roots))
        self.roots.write_bytes(roots + (directory / "origins.pem").read_bytes())
        store_credential(directory / "users", "build", hash_password(PASSWORD))
        issuing = issuers_text(ours.issuers)
        entries = {"one": self.plain, "two": self.plain, "carried": self.tls, "inspected": self.tls}
        settings = Settings(
            issuing=lambda: issuing,
            hosts={
                Hostname(f"{name}.test"): HostsEntry((ip_address("127.0.0.1"),), origin.port)
                for name, origin in entries.items()
            },
            upstream_ca=str(directory / "origins.pem"),
            nameservers=(),
        )
        policy = load_sources([Source("p.yaml", POLICY)])
        self.loop = Loop()
        door = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = door.getsockname()[1]

        def make() -> Gate:
            gate = Gate(policy, settings, original_dst=redirected_dst, record=self.records.append)
            gate.proxy(door, verifier=Verifier(directory / "users", print))
            gate.start_inspector()
            return gate

        self.gate = self.loop.call(make)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.gate.close(), self.loop._loop).result(20)
        self.loop.close()
        self.plain.close()
        self.tls.close()

    def forget(self) -> None:
        for seen in (self.records, self.plain.requests, self.tls.requests):
            seen.clear()

    def records_of(self, *ports: int) -> list[Record]:
        """Those of the clients at these ports; what an earlier test did may be recorded late."""
        return [record for record in self.records if record["source.port"] in ports]

    @property
    def url(self) -> str:
        """As a person writes it: the password with what a URL wants escaped."""
        return f"http://build:correct%20horse%3A%20battery@127.0.0.1:{self.port}"

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.directory), "LANG": "C.UTF-8"}
        return subprocess.run(
            command, env=kept | environment, cwd=self.directory, capture_output=True, text=True, timeout=60
        )

    def client(self) -> Client:
        return Client(socket.create_connection(("127.0.0.1", self.port), 20))


def _serve(head: bytes) -> bytes:
    target = head.split(b" ")[1]
    if target.startswith(b"/info/refs"):  # git over plain HTTP: one branch
        return response(b"%s\trefs/heads/main\n" % (b"5" * 40), fields="Content-Type: text/plain\r\n")
    return response(b"seen: " + target)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


@pytest.fixture
def world(shared: World) -> World:
    shared.forget()
    return shared


def test_requests_of_one_connection_go_to_the_hosts_they_name(world: World) -> None:
    client = world.client()
    for host in ("one.test", "two.test", "one.test"):
        answered = client.ask(get(f"http://{host}/{host}", BUILD))
        assert (answered.status, answered.body) == (200, f"seen: /{host}".encode())
    port = client.sock.getsockname()[1]
    client.sock.close()
    eventually(lambda: len(world.records_of(port)) == 3)
    assert [record["server.name"] for record in world.records_of(port)] == ["one.test", "two.test", "one.test"]
    assert {record["user.name"] for record in world.records_of(port)} == {"build"}


def test_origin_sees_nothing_of_the_proxy(world: World) -> None:
    client = world.client()
    asked = get("http://one.test/x", BUILD, "Proxy-Connection: keep-alive", "Connection: keep-alive")
    assert client.ask(asked).status == 200
    client.sock.close()
    (request,) = world.plain.requests
    assert request.startswith(b"GET /x HTTP/1.1\r\nHost: one.test\r\n")
    assert b"proxy" not in request.lower()
    assert b"basic" not in request.lower()


@pytest.mark.parametrize(
    "fields", [[], [authorization("build", "wrong")], [BUILD, BUILD]], ids=["none", "others", "twice"]
)
def test_later_request_of_a_connection_must_prove_itself_again(fields: list[str], world: World) -> None:
    """A proxy in front of us may put requests of several users on one connection."""
    client = world.client()
    assert client.ask(get("http://one.test/", BUILD)).status == 200
    answered = client.ask(get("http://one.test/", *fields))
    assert (answered.status, answered.problem["reason"]) == (407, "credentials")
    assert "proxy-authenticate" in answered.fields
    client.sock.close()
    assert len(world.plain.requests) == 1


def test_tunnel_is_inspected_like_every_connection(world: World) -> None:
    context = ssl.create_default_context(cafile=str(world.roots))
    ports = []
    for path, status in (("/fine", b"200"), ("/other", b"403")):
        client = world.client()
        ports.append(client.sock.getsockname()[1])
        assert client.ask(f"CONNECT inspected.test:443 HTTP/1.1\r\n{BUILD}\r\n\r\n".encode()).status == 200
        with context.wrap_socket(client.sock, server_hostname="inspected.test") as tls:
            tls.sendall(f"GET {path} HTTP/1.1\r\nHost: inspected.test\r\n\r\n".encode())
            assert tls.recv(65536).split(b" ")[1] == status
    eventually(lambda: [one["reason"] for one in world.records_of(*ports)] == ["rule", "no_allow_entry"])
    assert {record["user.name"] for record in world.records_of(*ports)} == {"build"}


# --- clients ---


@pytest.mark.client
def test_curl(world: World) -> None:
    curl = needs("curl")
    common = (curl, "-sS", "--cacert", world.roots, "--max-time", "30", "--proxy")
    for url in ("http://one.test/fine", "https://carried.test/fine", "https://inspected.test/fine"):
        assert world.run(*common, world.url, url).stdout == "seen: /fine"
    by_flag = (*common, f"http://127.0.0.1:{world.port}", "--proxy-user", f"build:{PASSWORD}")
    assert world.run(*by_flag, "http://one.test/a", "http://two.test/b").stdout == "seen: /aseen: /b"
    after_a_challenge = (
        *common,
        f"http://127.0.0.1:{world.port}",
        "--proxy-anyauth",
        "--proxy-user",
        f"build:{PASSWORD}",
    )
    assert world.run(*after_a_challenge, "https://carried.test/fine").stdout == "seen: /fine"
    old = (*common, world.url, "--proxy1.0", f"127.0.0.1:{world.port}", "--proxy-user", f"build:{PASSWORD}")
    assert world.run(*old, "https://carried.test/fine").stdout == "seen: /fine"
    refused = world.run(*common, world.url, "https://paste.test/")
    assert (refused.returncode, "403" in refused.stderr) == (56, True)
    unknown = world.run(*common, f"http://127.0.0.1:{world.port}", "https://carried.test/")
    assert (unknown.returncode, "407" in unknown.stderr) == (56, True)


@pytest.mark.client
def test_python_requests(world: World) -> None:
    program = "import requests, sys\nfor url in sys.argv[1:]: print(requests.get(url, timeout=30).text)"
    urls = ("http://one.test/a", "http://two.test/b", "https://carried.test/c", "https://inspected.test/fine")
    variables = {"http_proxy": world.url, "https_proxy": world.url, "REQUESTS_CA_BUNDLE": str(world.roots)}
    done = world.run(sys.executable, "-c", program, *urls, **variables)
    assert (done.stdout.split("\n")[:4], done.stderr) == (["seen: /a", "seen: /b", "seen: /c", "seen: /fine"], "")


@pytest.mark.client
def test_git(world: World) -> None:
    git = needs("git")
    for url in ("http://one.test", "https://carried.test", "https://inspected.test"):
        done = world.run(git, "-c", f"http.proxy={world.url}", "ls-remote", url, GIT_SSL_CAINFO=str(world.roots))
        assert (done.stdout, done.returncode) == (f"{'5' * 40}\trefs/heads/main\n", 0), done.stderr


_NODE = """
const http = require('http'), tls = require('tls');
const proxy = new URL(process.argv[1]);
const credentials = decodeURIComponent(proxy.username) + ':' + decodeURIComponent(proxy.password);
const headers = {'Proxy-Authorization': 'Basic ' + Buffer.from(credentials).toString('base64')};
http.get({host: proxy.hostname, port: proxy.port, path: 'http://one.test/a', headers: {...headers, Host: 'one.test'}},
  (answer) => answer.on('data', (data) => console.log(String(data))));
http.request({host: proxy.hostname, port: proxy.port, method: 'CONNECT', path: 'carried.test:443', headers})
  .on('connect', (_, socket) => {
    const inside = tls.connect({socket, servername: 'carried.test'}, () =>
      inside.write('GET /b HTTP/1.1\\r\\nHost: carried.test\\r\\nConnection: close\\r\\n\\r\\n'));
    inside.on('data', (data) => { console.log(String(data).split('\\r\\n').pop()); inside.destroy(); });
  }).end();
"""


_NODE_FETCH = """
(async () => { for (const url of process.argv.slice(1)) console.log(await (await fetch(url)).text()) })()
"""


@pytest.mark.client
def test_node(world: World) -> None:
    """By hand, and from 24 on by the variables that it reads then."""
    node = needs("node")
    done = world.run(node, "-e", _NODE, world.url, NODE_EXTRA_CA_CERTS=str(world.roots))
    assert (sorted(done.stdout.split("\n")), done.stderr) == (["", "seen: /a", "seen: /b"], "")
    if int(world.run(node, "-p", "process.versions.node").stdout.split(".")[0]) >= 24:
        variables = {"NODE_USE_ENV_PROXY": "1", "http_proxy": world.url, "https_proxy": world.url}
        urls = ("http://one.test/a", "https://carried.test/b", "https://inspected.test/fine")
        done = world.run(node, "-e", _NODE_FETCH, *urls, NODE_EXTRA_CA_CERTS=str(world.roots), **variables)
        assert done.stdout.split("\n")[:3] == ["seen: /a", "seen: /b", "seen: /fine"], done.stderr


_JAVA = """
import java.net.*;
import java.net.http.*;

public class ProxyClient {
    public static void main(String[] arguments) throws Exception {
        var password = System.getProperty("proxyPassword").toCharArray();
        var client = HttpClient.newBuilder()
            .proxy(ProxySelector.of(new InetSocketAddress("127.0.0.1", Integer.parseInt(arguments[0]))))
            .authenticator(new Authenticator() {
                @Override protected PasswordAuthentication getPasswordAuthentication() {
                    return getRequestorType() != RequestorType.PROXY ? null
                        : new PasswordAuthentication("build", password);
                }
            }).build();
        for (int i = 1; i < arguments.length; i++)
            System.out.println(client.send(HttpRequest.newBuilder(URI.create(arguments[i])).build(),
                HttpResponse.BodyHandlers.ofString()).body());
        System.exit(0);
    }
}
"""


@pytest.mark.client
def test_java(world: World) -> None:
    """It waits for the challenge; and for CONNECT it sends Basic only where a property says that it may."""
    java, javac, keytool = needs("java"), needs("javac"), needs("keytool")
    source = world.directory / "ProxyClient.java"
    source.write_text(_JAVA)
    assert world.run(javac, "-d", world.directory, source).returncode == 0
    store = world.directory / "roots.p12"
    pems = world.roots.read_text().split("-----END CERTIFICATE-----\n")[:-1]
    for number, pem in enumerate(pems):
        one = world.directory / f"root-{number}.pem"
        one.write_text(f"{pem}-----END CERTIFICATE-----\n")
        imported = ("-importcert", "-noprompt", "-alias", str(number), "-file", one, "-keystore", store)
        assert world.run(keytool, *imported, "-storepass", "changeit").returncode == 0
    done = world.run(
        java, "-Djdk.http.auth.tunneling.disabledSchemes=", f"-DproxyPassword={PASSWORD}",
        f"-Djavax.net.ssl.trustStore={store}", "-Djavax.net.ssl.trustStorePassword=changeit",
        "-cp", world.directory, "ProxyClient", str(world.port),
        "http://one.test/a", "http://two.test/b", "https://carried.test/c", "https://inspected.test/fine",
    )  # fmt: skip
    assert done.stdout.split("\n")[:4] == ["seen: /a", "seen: /b", "seen: /c", "seen: /fine"], done.stderr


@pytest.mark.client
def test_apt(world: World) -> None:
    """Its own method for http, which takes what to fetch on standard input and goes on while that is open."""
    method = Path("/usr/lib/apt/methods/http")
    if not method.exists():
        pytest.skip("apt is not installed")
    asked = (
        "601 Configuration\n"
        f"Config-Item: Acquire::http::Proxy={world.url}\n\n"
        "600 URI Acquire\n"
        "URI: http://one.test/dists/stable/InRelease\n"
        f"Filename: {world.directory / 'InRelease'}\n\n"
    )
    with subprocess.Popen([method], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(asked)
        process.stdin.flush()
        ended = next(line for line in process.stdout if line.startswith(("201 ", "400 ")))
        process.stdin.close()
        process.stdout.read()
    assert ended == "201 URI Done\n"
    assert (world.directory / "InRelease").read_text() == "seen: /dists/stable/InRelease"
