"""`outgate pki serving` against an API server over HTTP: it is made, kept, renewed, and its CA told first."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from pki.kubernetes.api import ApiFault, connect
from pki.kubernetes.serving import LIFE, keep_serving, make_serving
from proxy.cli import outgate

HOST = "outgate-webhook.outgate.svc"
SECRET = "/api/v1/namespaces/outgate/secrets/tls"
CONFIGURATION = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/outgate"
NOW = datetime.now(UTC)


class Cluster:
    """Two objects by path, server-side apply of what this job sends, and the order in which it came."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.objects: dict[str, dict[str, Any]] = {
            CONFIGURATION: {
                "metadata": {"name": "outgate", "resourceVersion": "1"},
                "webhooks": [{"name": "inject.outgate", "clientConfig": {"service": {"name": "outgate-webhook"}}}],
            }
        }
        self.written: list[str] = []
        self.refused: set[str] = set()

    def kubeconfig(self, directory: Path) -> str:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "t",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "token"}}],
            "contexts": [{"name": "t", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        path = directory / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    def apply(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        before = self.objects.get(path)
        wanted = body["metadata"].pop("resourceVersion", None)
        if path in self.refused or (wanted is not None and (before or {})["metadata"]["resourceVersion"] != wanted):
            return 409, {"kind": "Status", "message": "the object has been modified", "code": 409}
        version = str(len(self.written) + 2)
        if path == CONFIGURATION:
            assert before is not None
            told = {one["name"]: one["clientConfig"] for one in body["webhooks"]}
            hooks = [
                {**one, "clientConfig": one["clientConfig"] | told.get(one["name"], {})} for one in before["webhooks"]
            ]
            body = {**before, "webhooks": hooks}
        self.objects[path] = {**body, "metadata": {**body["metadata"], "resourceVersion": version}}
        self.written.append(path)
        return 200, self.objects[path]

    def held(self, key: str) -> bytes:
        return b64decode(self.objects[SECRET]["data"][key])

    def bundle(self) -> bytes:
        return b64decode(self.objects[CONFIGURATION]["webhooks"][0]["clientConfig"].get("caBundle", ""))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    class Connection(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = made.objects.get(self.path)
            self._answer(*((200, found) if found else (404, {"kind": "Status", "message": "not found", "code": 404})))

        def do_PATCH(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(*made.apply(self.path.partition("?")[0], body))

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Connection) as server:
        made = Cluster(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def keep(cluster: Cluster, directory: Path, now: datetime = NOW, configuration: str | None = "outgate") -> bool:
    async def ask() -> bool:
        async with connect(cluster.kubeconfig(directory), None, connections=1) as api:
            return await keep_serving(api, "outgate", "tls", HOST, configuration, now)

    return asyncio.run(ask())


def handshake(certificate: bytes, key: bytes, roots: bytes, directory: Path) -> None:
    """As an API server makes it. Raises SSLError where it does not trust what is shown."""
    (directory / "shown.pem").write_bytes(certificate + key)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "shown.pem")
    client = ssl.create_default_context(cadata=roots.decode())
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=HOST),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass


def test_a_certificate_is_made_where_there_is_none_and_its_ca_told_first(cluster: Cluster, tmp_path: Path) -> None:
    assert keep(cluster, tmp_path)
    assert cluster.written == [CONFIGURATION, SECRET]
    assert cluster.bundle() == cluster.held("ca.crt")
    handshake(cluster.held("tls.crt"), cluster.held("tls.key"), cluster.bundle(), tmp_path)
    [webhook] = cluster.objects[CONFIGURATION]["webhooks"]
    assert webhook["clientConfig"]["service"] == {"name": "outgate-webhook"}  # the rest stays


def test_one_that_is_good_stays_and_nothing_is_written(cluster: Cluster, tmp_path: Path) -> None:
    keep(cluster, tmp_path)
    before = list(cluster.written)
    assert not keep(cluster, tmp_path, NOW + LIFE / 2)
    assert cluster.written == before


def test_a_ca_that_somebody_removed_from_the_configuration_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    keep(cluster, tmp_path)
    del cluster.objects[CONFIGURATION]["webhooks"][0]["clientConfig"]["caBundle"]
    assert not keep(cluster, tmp_path)
    assert cluster.bundle() == cluster.held("ca.crt")


def test_after_two_thirds_another_is_made_and_both_are_trusted_meanwhile(cluster: Cluster, tmp_path: Path) -> None:
    keep(cluster, tmp_path)
    first = cluster.held("tls.crt"), cluster.held("tls.key")
    assert keep(cluster, tmp_path, NOW + LIFE * 2 / 3)
    second = cluster.held("tls.crt"), cluster.held("tls.key")
    assert second != first
    assert cluster.bundle().count(b"BEGIN") == 2
    handshake(*first, cluster.bundle(), tmp_path)  # a webhook whose files have not changed yet
    assert keep(cluster, tmp_path, NOW + LIFE * 5 / 3)
    assert cluster.bundle().count(b"BEGIN") == 2  # the first CA has gone


def test_a_certificate_for_another_name_is_replaced(cluster: Cluster, tmp_path: Path) -> None:
    keep(cluster, tmp_path)
    other = make_serving("other.outgate.svc", NOW)
    cluster.objects[SECRET]["data"]["tls.crt"] = b64encode(other.certificate).decode()
    assert keep(cluster, tmp_path)


@pytest.mark.parametrize("broken", ["", "!", b64encode(b"x").decode()], ids=["empty", "no base64", "no PEM"])
def test_what_cannot_be_read_is_replaced(cluster: Cluster, tmp_path: Path, broken: str) -> None:
    keep(cluster, tmp_path)
    cluster.objects[SECRET]["data"]["tls.crt"] = broken
    assert keep(cluster, tmp_path)
    handshake(cluster.held("tls.crt"), cluster.held("tls.key"), cluster.bundle(), tmp_path)


def test_of_two_at_once_the_later_one_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    cluster.refused.add(SECRET)
    with pytest.raises(ApiFault) as fault:
        keep(cluster, tmp_path)
    assert fault.value.status == 409


def test_the_certificate_satisfies_a_strict_verifier() -> None:
    made = make_serving(HOST, NOW)
    root, leaf = x509.load_pem_x509_certificate(made.root), x509.load_pem_x509_certificate(made.certificate)
    policy = PolicyBuilder().store(Store([root])).time(NOW + timedelta(days=80))
    assert policy.build_server_verifier(x509.DNSName(HOST)).verify(leaf, []) == [leaf, root]


def typed(cluster: Cluster, directory: Path, *words: str) -> tuple[int, str]:
    line = ["pki", "serving", "tls", "--namespace", "outgate", "--service", "outgate-webhook", *words]
    done = CliRunner().invoke(outgate, [*line, "--kubeconfig", cluster.kubeconfig(directory)])
    return done.exit_code, done.output


def test_the_command_says_what_it_did(cluster: Cluster, tmp_path: Path) -> None:
    assert typed(cluster, tmp_path, "--configuration", "outgate") == (0, "secret tls: made a certificate\n")
    assert typed(cluster, tmp_path) == (0, "secret tls: its certificate is good\n")
    assert json.loads(typed(cluster, tmp_path, "--json")[1])["made"] is False


def test_a_secret_of_somebody_else_is_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    cluster.objects[SECRET] = {"metadata": {"name": "tls", "resourceVersion": "1"}, "data": {}}
    code, said = typed(cluster, tmp_path)
    assert code == 1
    assert "secret tls is not ours" in said
    assert cluster.written == []


def test_a_configuration_that_is_not_there_is_said_and_nothing_written(cluster: Cluster, tmp_path: Path) -> None:
    code, said = typed(cluster, tmp_path, "--configuration", "other")
    assert code == 3
    assert "mutatingwebhookconfiguration other: there is none of that name" in said
    assert cluster.written == []
