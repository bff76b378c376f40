"""The webhook over real HTTPS: what an API server is told, and what becomes of who is none."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from proxy import reviewing
from proxy.injection.gate import GATE
from proxy.injection.model import Injected, Settings
from proxy.injection.pod import inject
from proxy.injection.review import MalformedReview, Result, answer
from proxy.reviewing import MAX_BODY, open_webhook
from proxy.serving_certificate import Certificate, CertificateUnusable
from tests.proxy.injected import apply_patch

WAIT_S = 20.0
NAME = "outgate-webhook.outgate.svc"
SETTINGS = Settings(image="outgate:1")
POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"generateName": "weather-"},
    "spec": {"containers": [{"name": "weather", "image": "weather:1"}]},
}


def asked(found: object, **fields: Any) -> dict[str, Any]:
    request = {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "operation": "CREATE",
        "namespace": "weather",
        "object": found,
        **fields,
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


class Place:
    """A directory with a certificate of an authority that `client` trusts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = trustme.CA()
        self.client = ssl.create_default_context()
        self.authority.configure_trust(self.client)
        self.renew()

    def renew(self) -> bytes:
        """Another certificate, as a mounted Secret changes: both files at once. Gives it in DER."""
        leaf = self.authority.issue_cert(NAME)
        held = self.directory / f"..{len(list(self.directory.iterdir()))}"
        held.mkdir()
        (held / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        (held / "tls.key").write_bytes(leaf.private_key_pem.bytes())
        (self.directory / "..new").symlink_to(held.name)
        (self.directory / "..new").rename(self.directory / "..data")
        for name in ("tls.crt", "tls.key"):
            if not (self.directory / name).is_symlink():
                (self.directory / name).symlink_to(f"..data/{name}")
        return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


class Asking:
    """A webhook that is up, and a client of it. `said` is what it tells whoever runs it."""

    def __init__(self, place: Place, port: int, said: list[str]) -> None:
        self.place, self.port, self.said = place, port, said

    def connect(self, name: str | None = NAME) -> ssl.SSLSocket:
        context = self.place.client
        if name is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # as the kubelet's probes
        sock = socket.create_connection(("127.0.0.1", self.port), WAIT_S)
        return context.wrap_socket(sock, server_hostname=name)

    def send(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        with self.connect() as sock:
            sock.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
            return answered(sock)

    def review(self, found: object, **fields: Any) -> dict[str, Any]:
        status, body = self.send("POST", "/inject", json.dumps(asked(found, **fields)).encode())
        assert status == 200, body
        told = json.loads(body)
        assert (told["apiVersion"], told["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
        response = told["response"]
        assert isinstance(response, dict)
        return response

    def counted(self, result: str) -> int:
        page = self.send("GET", "/metrics")[1].decode()
        return int(page.partition(f'outgate_webhook_reviews_total{{result="{result}"}} ')[2].split()[0])


def answered(sock: ssl.SSLSocket) -> tuple[int, bytes]:
    said = b""
    while part := sock.recv(65536):
        said += part
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@contextmanager
def serving(directory: Path) -> Iterator[Asking]:
    place, said = Place(directory), list[str]()
    ready: Future[int] = Future()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        certificate = Certificate(str(directory), said.append)
        server = await open_webhook(("127.0.0.1", 0), certificate, SETTINGS, said.append)
        following = asyncio.create_task(certificate.follow())
        ready.set_result(server.address[1])
        await over.wait()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await server.close(1.0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield Asking(place, ready.result(WAIT_S), said)
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(WAIT_S)
        loop.close()


@pytest.fixture(scope="module")
def webhook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    with serving(tmp_path_factory.mktemp("tls")) as it:
        yield it


# --- what an API server is told ---------------------------------------------------------------------------------------


def test_a_pod_gets_its_gate_by_a_patch(webhook: Asking) -> None:
    told = webhook.review(POD)
    assert (told["uid"], told["allowed"], told["patchType"]) == (asked(POD)["request"]["uid"], True, "JSONPatch")
    outcome = inject(POD, SETTINGS)
    assert isinstance(outcome, Injected)
    assert apply_patch(POD, json.loads(base64.b64decode(told["patch"]))) == outcome.changed


def test_a_dry_run_is_answered_as_any_other(webhook: Asking) -> None:
    assert webhook.review(POD, dryRun=True) == webhook.review(POD, dryRun=False)


def test_a_pod_that_cannot_be_guarded_is_refused_with_the_reason_and_told(webhook: Asking) -> None:
    before = webhook.counted("refused")
    told = webhook.review({**POD, "spec": {**POD["spec"], "hostNetwork": True}})
    assert told["allowed"] is False
    assert told["status"]["code"] == 403
    assert told["status"]["message"].startswith("outgate: spec.hostNetwork: its packets leave by the node's network")
    assert webhook.counted("refused") == before + 1
    assert any(line.startswith("weather/weather- is refused: spec.hostNetwork") for line in webhook.said)


def test_a_pod_that_is_injected_already_is_not_patched(webhook: Asking) -> None:
    outcome = inject(POD, SETTINGS)
    assert isinstance(outcome, Injected)
    assert "patch" not in webhook.review(outcome.changed)


UNTOUCHED: dict[str, dict[str, Any]] = {
    "another kind": {"kind": {"group": "apps", "version": "v1", "kind": "Deployment"}},
    "a kind of somebody else": {"kind": {"group": "example.com", "version": "v1", "kind": "Pod"}},
    "an update": {"operation": "UPDATE"},
    "a deletion": {"operation": "DELETE", "object": None},
    "a part of a pod": {"subResource": "status", "operation": "UPDATE"},
    "a pod that is switched off": {"object": {**POD, "metadata": {"labels": {"outgate/inject": "false"}}}},
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_makes_no_pod_is_allowed_and_untouched(webhook: Asking, name: str) -> None:
    told = webhook.review(**{"found": POD, **UNTOUCHED[name]})
    assert told == {"uid": asked(POD)["request"]["uid"], "allowed": True}


def with_ephemeral(*containers: dict[str, Any]) -> dict[str, Any]:
    outcome = inject(POD, SETTINGS)
    assert isinstance(outcome, Injected)
    return {**outcome.changed, "spec": {**outcome.changed["spec"], "ephemeralContainers": list(containers)}}


def debugged(webhook: Asking, pod: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    return webhook.review(pod, operation="UPDATE", subResource="ephemeralcontainers", oldObject=former)


@pytest.mark.parametrize(
    "context", [{"privileged": True}, {"runAsUser": 1337}, {"capabilities": {"add": ["NET_ADMIN"]}}], ids=str
)
def test_a_debugging_container_that_leads_round_the_gate_is_refused(webhook: Asking, context: dict[str, Any]) -> None:
    added = {"name": "debug", "image": "busybox", "securityContext": context}
    assert debugged(webhook, with_ephemeral(added), with_ephemeral())["allowed"] is False


def test_a_debugging_container_is_confined_and_former_ones_stay_as_they_are(webhook: Asking) -> None:
    former, added = {"name": "first", "image": "busybox"}, {"name": "second", "image": "busybox"}
    told = debugged(webhook, with_ephemeral(former, added), with_ephemeral(former))
    changed = apply_patch(with_ephemeral(former, added), json.loads(base64.b64decode(told["patch"])))
    first, second = changed["spec"]["ephemeralContainers"]
    assert first == former
    assert "NET_RAW" in second["securityContext"]["capabilities"]["drop"]
    assert second["securityContext"]["allowPrivilegeEscalation"] is False


def test_a_debugging_container_of_a_pod_without_a_gate_is_left_alone(webhook: Asking) -> None:
    added = {**POD, "spec": {**POD["spec"], "ephemeralContainers": [{"name": "d", "image": "b"}]}}
    assert "patch" not in debugged(webhook, added, POD)


def test_what_the_author_should_know_comes_as_warnings(webhook: Asking) -> None:
    one = {"name": "a", "image": "a", "env": [{"name": "SSL_CERT_FILE", "value": "/" + "x" * 400}]}
    [warning] = webhook.review({**POD, "spec": {"containers": [one]}})["warnings"]
    assert warning.startswith("outgate: spec.containers[0].env: SSL_CERT_FILE is kept")
    assert len(warning) <= 256


# --- who is no API server ---------------------------------------------------------------------------------------------

MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"kind": "\xff"}',
    "nested without end": b"[" * 200_000,
    "another document": b'{"kind": "Pod", "apiVersion": "v1"}',
    "another version": json.dumps({**asked(POD), "apiVersion": "admission.k8s.io/v1beta1"}).encode(),
    "no request": b'{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}',
    "no uid": json.dumps(asked(POD, uid="")).encode(),
    "a uid that is none": json.dumps(asked(POD, uid=["x"])).encode(),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_review_is_refused_and_counted(webhook: Asking, name: str) -> None:
    before = webhook.counted("malformed")
    status, body = webhook.send("POST", "/inject", MALFORMED[name])
    assert status == 400, body
    assert body.decode().isascii()
    assert webhook.counted("malformed") == before + 1


@pytest.mark.parametrize("found", [None, [], "pod", 5, {}, {"spec": []}, {"spec": {"containers": None}}], ids=str)
def test_a_review_of_garbage_is_denied_with_the_reason(webhook: Asking, found: object) -> None:
    told = webhook.review(found)
    assert told["allowed"] is False
    assert told["status"]["message"].startswith("outgate: ")


def test_a_body_of_another_kind_is_refused(webhook: Asking) -> None:
    assert webhook.send("POST", "/inject", b"{}", kind="text/plain")[0] == 415


def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(webhook: Asking) -> None:
    with webhook.connect() as sock:
        head = f"POST /inject HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {MAX_BODY + 1}"
        sock.sendall(f"{head}\r\n\r\n".encode())
        assert answered(sock)[0] == 413


def test_a_body_in_chunks_that_has_no_end_is_refused(webhook: Asking) -> None:
    with webhook.connect() as sock:
        head = (
            b"POST /inject HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sock.sendall(head)
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(12):
                sock.sendall(chunk)
            assert answered(sock)[0] == 413
        except (ConnectionError, ssl.SSLError):
            pass  # it closed while we were still sending: not read to its end either way
    assert webhook.send("GET", "/healthz")[0] == 200


def test_a_body_that_does_not_come_is_given_up(webhook: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviewing, "BODY_S", 0.2)
    with webhook.connect() as sock:
        head = b"POST /inject HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n"
        sock.sendall(head + b"{")
        assert answered(sock)[0] == 408


def test_a_connection_does_not_outlive_its_time_whatever_it_does(
    webhook: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reviewing, "LIFETIME_S", 0.2)
    with webhook.connect() as sock:
        sock.sendall(b"POST /inject HTTP/1.1\r\n")
        try:
            assert sock.recv(100) == b""
        except (ConnectionError, ssl.SSLError):
            pass  # aborted


def test_one_more_connection_ends_the_oldest(webhook: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviewing, "MAX_CONNECTIONS", 2)
    with webhook.connect() as first, webhook.connect(), webhook.connect():
        try:
            assert first.recv(100) == b""
        except (ConnectionError, ssl.SSLError):
            pass  # aborted
    assert webhook.review(POD)["allowed"] is True


def test_plain_http_gets_nothing(webhook: Asking) -> None:
    with socket.create_connection(("127.0.0.1", webhook.port), WAIT_S) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            assert b"200" not in sock.recv(1000)
        except ConnectionError:
            pass  # reset


PAGES = {
    ("GET", "/healthz"): 200,
    ("GET", "/readyz"): 200,
    ("GET", "/metrics"): 200,
    ("GET", "/inject"): 405,
    ("GET", "/"): 404,
    ("POST", "/healthz"): 404,
    ("POST", "/../inject"): 404,
}


@pytest.mark.parametrize(("asked_for", "status"), PAGES.items(), ids=str)
def test_pages(webhook: Asking, asked_for: tuple[str, str], status: int) -> None:
    assert webhook.send(*asked_for)[0] == status


# --- its certificate --------------------------------------------------------------------------------------------------


def eventually(look: Any, what: str) -> None:
    deadline = threading.Event()
    for _ in range(400):
        if look():
            return
        deadline.wait(0.05)
    raise AssertionError(what)


def test_a_certificate_that_is_replaced_is_shown_without_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path) as webhook, webhook.connect() as before, webhook.connect(None) as probe:
        first = before.getpeercert(binary_form=True)
        assert probe.getpeercert(binary_form=True) == first  # without a name, too
        second = webhook.place.renew()

        def is_shown() -> bool:
            with webhook.connect() as sock, webhook.connect(None) as other:
                shown = {sock.getpeercert(binary_form=True), other.getpeercert(binary_form=True)}
            return shown == {second}

        eventually(is_shown, "the new certificate is shown")
        before.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answered(before)[0] == 200  # what was open goes on


def test_a_certificate_that_cannot_be_used_leaves_the_former_one(tmp_path: Path) -> None:
    with serving(tmp_path) as webhook:
        other = webhook.place.authority.issue_cert(NAME)
        (tmp_path / "tls.key").unlink()
        (tmp_path / "tls.key").write_bytes(other.private_key_pem.bytes())
        eventually(lambda: any("no pair with tls.key" in line for line in webhook.said), "it is said")
        assert webhook.send("GET", "/readyz")[0] == 200


def test_one_that_has_expired_turns_readiness_red(tmp_path: Path) -> None:
    Place(tmp_path)
    certificate = Certificate(str(tmp_path), print, clock=lambda: 1e11)
    assert certificate.why_not().endswith("tls.crt: expired; put another one there")


WRONG = {
    "missing": (None, None, "tls.crt: No such file"),
    "no PEM": (b"x", b"x", "no pair with tls.key, or not PEM"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_directory_that_cannot_be_used_says_why(tmp_path: Path, name: str) -> None:
    chain, key, says = WRONG[name]
    for file, content in (("tls.crt", chain), ("tls.key", key)):
        if content is not None:
            (tmp_path / file).write_bytes(content)
    with pytest.raises(CertificateUnusable, match=says):
        Certificate(str(tmp_path), print)


# --- whatever is asked ------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["uid", "kind", "object", "spec", "containers", "name"]), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(anything, anything, st.sampled_from(["CREATE", "UPDATE", "CONNECT", None]), anything)
def test_every_review_is_answered_or_malformed(found: object, kind: object, operation: object, former: object) -> None:
    fields = {"operation": operation, "oldObject": former, **({} if kind is None else {"kind": kind})}
    try:
        told = answer(asked(found, **fields), SETTINGS)
    except MalformedReview:
        return
    assert told.review["response"]["allowed"] is (told.result is not Result.REFUSED)
    json.dumps(told.review)


def test_the_gates_name_in_the_reason_of_a_clash() -> None:
    told = answer(asked({**POD, "spec": {"containers": [{"name": GATE, "image": "x"}]}}), SETTINGS)
    assert told.reason == "spec.containers[0].name: outgate-gate is the name of one of ours; use another"
