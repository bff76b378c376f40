"""The addons at their hooks, with mitmproxy's own flows."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

import pytest
import trustme
from mitmproxy import flow as mitmproxy_flow
from mitmproxy import http
from mitmproxy.connection import Client, Server
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.test import tflow

from addons.gate import ANSWER, CANCELLED, FAILURE, JUDGEMENT, MALFORMED_BODY, STALE, Gate
from addons.judge import Conversation, Judge, Unreachable
from addons.outcome import Outcome
from addons.record import Recorder
from addons.upstream import Resolution, Upstream, trust_origins
from policies.engine import decide
from policies.hostnames import Hostname, parse_hostname
from policies.model import Address, Reason
from tests.builders import WORKLOAD, rules

HOST = parse_hostname("api.example.com")
POLICY = rules("""
    - {host: api.example.com, ports: [80, 443], tls: inspect, allow: ["GET,POST /search"]}
    - {host: private.example.com, tls: inspect, private: true}
""")


def flow_of(path: str, *, method: str = "GET", host: str = HOST) -> http.HTTPFlow:
    flow = tflow.tflow()
    flow.request = http.Request.make(method, f"https://{HOST}{path}")
    flow.request.headers = http.Headers([(b"Host", host.encode())])
    return flow


@dataclass
class Scene:
    """One connection, the addons on it, and what they reported."""

    gate: Gate
    recorder: Recorder
    conversation: Conversation
    outcomes: list[Outcome]

    def request(self, path: str = "/search", *, method: str = "GET", host: str = HOST) -> http.HTTPFlow:
        flow = flow_of(path, method=method, host=host)
        for addon in (self.gate, self.recorder):
            addon.requestheaders(flow)
        return flow

    def fail(self, flow: http.HTTPFlow, message: str = "server closed connection") -> None:
        flow.error = mitmproxy_flow.Error(message)
        self.gate.error(flow)
        self.recorder.error(flow)


@pytest.fixture
def scene() -> Scene:
    conversation = Conversation(WORKLOAD, 443, False, ("10.0.0.1", 5000), HOST)
    outcomes: list[Outcome] = []
    judge = Judge(partial(decide, POLICY), now=lambda: 0.0, new_id=lambda: "id")
    return Scene(
        Gate(judge, lambda _client: conversation),
        Recorder(outcomes.append, lambda _client: conversation),
        conversation,
        outcomes,
    )


def test_a_denied_request_is_answered_at_its_headers(scene: Scene) -> None:
    flow = scene.request("/forecasts")
    assert flow.response is not None
    assert (flow.response.status_code, json.loads(flow.response.content or b"")["reason"]) == (403, "no_allow_entry")
    assert flow.request.stream is False


def test_an_allowed_request_streams_both_ways(scene: Scene) -> None:
    flow = scene.request()
    assert flow.response is None
    assert flow.request.stream
    flow.response = http.Response.make(200)
    scene.gate.responseheaders(flow)
    assert flow.response.stream


def test_what_is_forwarded_is_in_origin_form_for_the_judged_host(scene: Scene) -> None:
    flow = flow_of("/search?q=1", host="API.Example.com.:443")
    flow.request.data.authority = b"api.example.com:443"
    scene.gate.requestheaders(flow)
    data = flow.request.data
    assert (data.authority, data.path, data.host) == (b"", b"/search?q=1", HOST)
    assert flow.request.headers["Host"] == "api.example.com:443"


def test_what_is_forwarded_over_http2_is_for_the_judged_authority(scene: Scene) -> None:
    flow = flow_of("/search?q=1")
    flow.request.data.http_version = b"HTTP/2.0"
    flow.request.data.authority = b"API.Example.com.:443"
    flow.request.headers = http.Headers([(b"host", b"api.example.com:443"), (b"proxy-authorization", b"Basic eA==")])
    scene.gate.requestheaders(flow)
    data = flow.request.data
    assert (data.authority, data.path, data.host, data.port) == (b"api.example.com:443", b"/search?q=1", HOST, 443)
    assert data.headers.fields == ()


def test_each_of_several_requests_has_a_failure_of_its_own(scene: Scene) -> None:
    flows = [scene.request(), scene.request()]
    flows[0].metadata[FAILURE] = Unreachable(Reason.UPSTREAM_REFUSED, "connection refused")
    for flow in flows:
        scene.fail(flow)
    assert [flow.metadata[JUDGEMENT].verdict.reason for flow in flows] == [
        Reason.UPSTREAM_REFUSED,
        Reason.UPSTREAM_FAILED,
    ]


def test_a_request_that_its_client_cancelled_is_recorded_as_gone(scene: Scene) -> None:
    flow = scene.request()
    scene.fail(flow, CANCELLED)
    assert flow.response is None
    assert [outcome.judgement.verdict.reason for outcome in scene.outcomes] == [Reason.CLIENT_GONE]


def test_a_path_of_raw_bytes_is_judged_as_received(scene: Scene) -> None:
    flow = flow_of("/")
    flow.request.data.path = b"/search\xc3\xa9"
    scene.gate.requestheaders(flow)
    assert flow.response is not None
    assert flow.metadata[JUDGEMENT].verdict.reason is Reason.MALFORMED_PATH


@pytest.mark.parametrize(
    ("failure", "status", "reason"),
    [
        (Unreachable(Reason.UPSTREAM_CERTIFICATE, "it has expired"), 502, "upstream_certificate"),
        (Unreachable(Reason.UPSTREAM_REFUSED, "connection refused"), 502, "upstream_refused"),
        (Unreachable(Reason.NEVER_REACHED, "169.254.169.254"), 403, "never_reached"),
        (Unreachable(Reason.PRIVATE_ADDRESS, "10.0.0.1"), 403, "private_address"),
        (None, 502, "upstream_failed"),
    ],
    ids=["certificate", "refused", "never-reached", "private", "anything-else"],
)
def test_a_failed_upstream_is_answered_with(
    scene: Scene, failure: Unreachable | None, status: int, reason: str
) -> None:
    flow = scene.request()
    scene.conversation.failure = failure
    scene.fail(flow)
    assert flow.response is not None
    assert (flow.response.status_code, json.loads(flow.response.content or b"")["reason"]) == (status, reason)
    assert flow.metadata[ANSWER]
    assert flow.response.headers["Connection"] == "close"
    assert scene.conversation.failure is None


def test_a_malformed_body_is_a_bad_request(scene: Scene) -> None:
    flow = scene.request(method="POST")
    scene.fail(flow, f"{MALFORMED_BODY}: illegal chunk header")
    assert flow.response is not None
    assert flow.response.status_code == 400


def test_a_response_that_has_begun_is_not_replaced(scene: Scene) -> None:
    flow = scene.request()
    flow.response = http.Response.make(200, b"begun")
    scene.fail(flow)
    assert flow.response.content == b"begun"
    assert flow.metadata[JUDGEMENT].verdict.reason is Reason.UPSTREAM_FAILED


def test_a_request_on_a_stale_connection_is_left_unanswered(scene: Scene) -> None:
    flow = scene.request()
    scene.fail(flow, STALE)
    assert flow.response is None
    assert [outcome.judgement.verdict.reason for outcome in scene.outcomes] == [Reason.UPSTREAM_FAILED]


def test_a_client_that_left_is_recorded_as_gone(scene: Scene) -> None:
    flow = scene.request()
    flow.client_conn.state = type(flow.client_conn.state)(0)
    scene.fail(flow, "Client disconnected.")
    assert flow.response is None
    assert [outcome.judgement.verdict.reason for outcome in scene.outcomes] == [Reason.CLIENT_GONE]


def test_a_denial_keeps_its_reason_when_the_flow_fails_afterwards(scene: Scene) -> None:
    flow = scene.request("/forecasts")
    scene.fail(flow)
    assert flow.metadata[JUDGEMENT].verdict.reason is Reason.NO_ALLOW_ENTRY


def test_the_outcome_counts_the_bytes_of_both_bodies(scene: Scene) -> None:
    flow = scene.request(method="POST")
    flow.response = http.Response.make(201)
    scene.gate.responseheaders(flow)
    scene.recorder.responseheaders(flow)
    assert callable(flow.request.stream)
    assert callable(flow.response.stream)
    assert flow.request.stream(b"12345") == b"12345"
    assert flow.response.stream(b"123") == b"123"
    scene.recorder.response(flow)
    (outcome,) = scene.outcomes
    assert (outcome.bytes_sent, outcome.bytes_received, outcome.status) == (5, 3, 201)


def test_a_flow_that_nobody_judged_is_not_recorded(scene: Scene) -> None:
    scene.recorder.response(tflow.tflow(resp=True))
    assert scene.outcomes == []


# --- upstream


@dataclass(frozen=True)
class Found:
    addresses: tuple[Address, ...]
    port: int | None = None
    from_hosts: bool = False


def resolver(found: Found | Unreachable) -> Callable[[Hostname], Awaitable[Resolution]]:
    async def resolve(_name: Hostname) -> Resolution:
        if isinstance(found, Unreachable):
            raise found
        return found

    return resolve


def upstream(found: Found | Unreachable, conversation: Conversation, trust: ssl.SSLContext | None = None) -> Upstream:
    return Upstream(resolver(found), trust or trust_origins(), lambda _client: conversation, dial_s=5.0)


def connect_hook(of: Upstream) -> ServerConnectionHookData:
    client = Client(peername=("10.0.0.1", 5000), sockname=("10.0.0.2", 443))
    data = ServerConnectionHookData(Server(address=(HOST, 443)), client)
    asyncio.run(of.server_connect(data))
    return data


def test_stock_mitmproxy_is_given_a_checked_address(scene: Scene) -> None:
    scene.request()
    found = Found((ip_address("169.254.169.254"), ip_address("93.184.215.14")))
    data = connect_hook(upstream(found, scene.conversation))
    assert (data.server.address, data.server.error) == (("93.184.215.14", 443), None)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (Found((ip_address("169.254.169.254"),)), Reason.NEVER_REACHED),
        (Found((ip_address("127.0.0.1"),)), Reason.NEVER_REACHED),
        (Found((ip_address("10.0.0.1"),)), Reason.PRIVATE_ADDRESS),
        (Found((ip_address("::ffff:10.0.0.1"),)), Reason.PRIVATE_ADDRESS),
        (Found((ip_address("169.254.169.254"),), from_hosts=True), Reason.NEVER_REACHED),
        (Found(()), Reason.NAME_NOT_FOUND),
        (Unreachable(Reason.RESOLVER_FAILED, "no server answered"), Reason.RESOLVER_FAILED),
    ],
    ids=["metadata", "loopback", "private", "mapped", "metadata-from-hosts", "no-address", "resolver"],
)
def test_an_address_that_is_not_admitted_is_not_dialled(
    scene: Scene, found: Found | Unreachable, reason: Reason
) -> None:
    scene.request()
    data = connect_hook(upstream(found, scene.conversation))
    assert data.server.error is not None
    assert scene.conversation.failure is not None
    assert scene.conversation.failure.reason is reason


def test_nothing_is_looked_up_before_a_request_is_allowed(scene: Scene) -> None:
    async def resolve(_name: Hostname) -> Resolution:
        raise AssertionError("looked up")

    scene.request("/forecasts")
    of = Upstream(resolve, trust_origins(), lambda _client: scene.conversation)
    connect_hook(of)
    assert scene.conversation.failure is not None
    assert scene.conversation.failure.reason is Reason.GATE_FAILED


def open_upstream(of: Upstream, conversation: Conversation) -> tuple[str, int]:
    async def run() -> tuple[str, int]:
        transport = await of.open(conversation, asyncio.Protocol)
        peer: tuple[str, int] = transport.get_extra_info("peername")
        transport.abort()
        await asyncio.sleep(0.01)
        return peer

    return asyncio.run(run())


def test_an_address_that_refuses_is_followed_by_the_next(scene: Scene) -> None:
    scene.request()
    scene.conversation.plain = True
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = Found((ip_address("::1"), ip_address("127.0.0.1")), port, from_hosts=True)
        assert open_upstream(upstream(found, scene.conversation), scene.conversation) == ("127.0.0.1", port)


def test_the_first_of_several_that_answer_is_kept_and_no_socket_leaks(scene: Scene) -> None:
    scene.request()
    scene.conversation.plain = True
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        addresses = tuple(ip_address(f"127.0.0.{last}") for last in range(1, 5))
        peer = open_upstream(upstream(Found(addresses, port, True), scene.conversation), scene.conversation)
    assert peer == ("127.0.0.1", port)


@pytest.mark.parametrize(("port", "reason"), [("closed", Reason.UPSTREAM_REFUSED), ("silent", Reason.UPSTREAM_TIMEOUT)])
def test_a_dial_that_fails_has_its_reason(scene: Scene, port: str, reason: Reason) -> None:
    scene.request()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        if port == "closed":
            listener.close()
        found = Found((ip_address("127.0.0.1"),), number, from_hosts=True)
        of = Upstream(resolver(found), trust_origins(), lambda _client: scene.conversation, dial_s=0.3)
        with pytest.raises(Unreachable) as failure:
            open_upstream(of, scene.conversation)
    assert failure.value.reason is reason


def test_trust_is_in_subject_alternative_names_and_modern_tls() -> None:
    trust = trust_origins()
    assert (trust.verify_mode, trust.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert trust.hostname_checks_common_name is False
    assert trust.minimum_version is ssl.TLSVersion.TLSv1_2


def test_trust_in_a_file_is_trust_in_nothing_else(tmp_path: object) -> None:
    authority = trustme.CA()
    with authority.cert_pem.tempfile() as path:
        assert trust_origins(path).cert_store_stats()["x509_ca"] == 1


def test_a_missing_file_of_authorities_is_an_error() -> None:
    with pytest.raises(OSError, match="No such file"):
        trust_origins("missing.pem")
