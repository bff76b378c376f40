"""`outgate serve` beside a cluster: who a source is follows the pods, while connections are open, and fails closed.

The cluster is a stand-in over real HTTP; its pods have loopback addresses, from which the clients connect.
"""

from __future__ import annotations

import os
import signal
from base64 import b64encode
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Self

import pytest

from tests.end_to_end.service import WAIT_S, Service, children, eventually
from tests.pki.api_server import ApiServer, api_server
from tests.proxy import inspecting

A, B, NODE = "127.0.1.1", "127.0.1.2", "127.0.1.99"
POLICY = """
version: 1
workloads:
  weather:
    match: {kubernetes: {namespace: weather, serviceAccount: weather-app}}
    rules: [{host: weather.test, ports: [80]}]
  orders:
    match: {kubernetes: {namespace: orders, labels: {app: orders}}}
    rules: [{host: orders.test, ports: [80]}]
  every-order:
    match: {kubernetes: {labels: {tier: "1"}}}
    rules: []
  nodes:
    match: {address: [127.0.1.99/32]}
    rules: [{host: nodes.test, ports: [80]}]
"""


class Client:
    """A keep-alive connection to the proxy from one address."""

    def __init__(self, service: Service, source: str) -> None:
        self._http = HTTPConnection(*service.address, timeout=WAIT_S, source_address=(source, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, name: str, **headers: str) -> int:
        self._http.request("GET", f"http://{name}.test/", headers={"Host": f"{name}.test", **headers})
        with self._http.getresponse() as reply:
            reply.read()
            return reply.status


def asks(service: Service, source: str, name: str, **headers: str) -> int:
    with Client(service, source) as client:
        return client.get(name, **headers)


def allowed(service: Service, source: str) -> list[str]:
    return [name for name in ("weather", "orders", "nodes") if asks(service, source, name) == 200]


def comes_to(service: Service, source: str, names: list[str]) -> None:
    eventually(lambda: allowed(service, source) == names, f"{source} reaches {names}")


@pytest.fixture
def cluster() -> Iterator[ApiServer]:
    with api_server() as server:
        server.rules = [(None, {"resources": ["pods"], "verbs": ["list", "watch"]})]
        server.add_pod("weather", "weather-1", A, account="weather-app")
        server.add_pod("orders", "orders-1", B, labels={"app": "orders"})
        server.add_pod("kube-system", "proxy", NODE, on_host=True)
        yield server


@pytest.fixture
def upstream() -> Iterator[inspecting.Origin]:
    origin = inspecting.Origin(None, lambda _head, _sock: inspecting.response())
    yield origin
    origin.close()


def serving(directory: Path, cluster: ApiServer, upstream: inspecting.Origin, *options: str) -> Service:
    hosts = [word for name in ("weather", "orders", "nodes")
             for word in ("--host", f"{name}.test=127.0.0.1:{upstream.port}")]  # fmt: skip
    kubeconfig = cluster.kubeconfig(directory)
    return Service(directory, POLICY, "--kubernetes", kubeconfig, *hosts, *options, workload=None)


@pytest.fixture
def service(tmp_path: Path, cluster: ApiServer, upstream: inspecting.Origin) -> Iterator[Service]:
    with serving(tmp_path, cluster, upstream) as found:
        eventually(lambda: found.ready()[0] == 200, "ready")
        yield found


def reasons(service: Service, source: str) -> set[str]:
    return {record["reason"] for record in service.records(**{"source.address": source, "verdict": "deny"})}


def test_each_pod_reaches_what_its_own_workload_names(service: Service) -> None:
    assert allowed(service, A) == ["weather"]
    assert allowed(service, B) == ["orders"]
    assert allowed(service, NODE) == ["nodes"]
    assert allowed(service, "127.0.1.50") == []
    found = eventually(lambda: service.records(**{"source.address": A, "verdict": "allow"}), "a record")
    assert {record["workload"] for record in found} == {"weather"}
    assert service.metric('outgate_identity_pods{kind="pod"}') == 2
    assert service.metric('outgate_identity_pods{kind="host"}') == 1
    assert service.metric("outgate_identity_lag_seconds") < WAIT_S


def test_an_address_that_another_pod_gets_is_judged_anew_on_open_connections(
    service: Service, cluster: ApiServer
) -> None:
    with Client(service, A) as kept:
        assert kept.get("weather") == 200
        cluster.add_pod("orders", "orders-2", A, labels={"app": "orders"})  # the former one is there yet
        eventually(lambda: kept.get("weather") == 403, "the address is in doubt")
        assert asks(service, A, "weather") == asks(service, A, "orders") == 403
        assert "ambiguous_workload" in eventually(lambda: reasons(service, A), "a record")
        assert service.metric("outgate_identity_addresses_in_doubt") == 1
        cluster.delete("pods", "weather", "weather-1")
        eventually(lambda: kept.get("orders") == 200, "the address is the other's")
        assert kept.get("weather") == 403
    assert allowed(service, A) == ["orders"]


def test_a_pod_that_has_ended_or_should_have_has_no_rights(service: Service, cluster: ApiServer) -> None:
    cluster.add_pod("weather", "weather-1", A, account="weather-app", phase="Succeeded")
    comes_to(service, A, [])
    assert "ambiguous_workload" not in reasons(service, A)
    over = "2026-01-01T00:00:00Z"
    cluster.add_pod("orders", "orders-1", B, labels={"app": "orders"}, deletionTimestamp=over)
    comes_to(service, B, [])
    assert "ambiguous_workload" in eventually(lambda: reasons(service, B), "a record")


def test_a_pod_that_two_workloads_match_is_denied(service: Service, cluster: ApiServer) -> None:
    cluster.add_pod("orders", "orders-1", B, labels={"app": "orders", "tier": "1"})
    comes_to(service, B, [])
    assert eventually(lambda: "ambiguous_workload" in reasons(service, B), "a record")
    cluster.add_pod("orders", "orders-1", B, labels={"app": "orders"})
    comes_to(service, B, ["orders"])


def test_pods_are_followed_through_lost_watches_and_a_new_list(service: Service, cluster: ApiServer) -> None:
    cluster.wait_for_watches("pods")
    cluster.bookmark("pods")
    cluster.send("pods", None)  # the connection is cut
    cluster.add_pod("weather", "weather-2", "127.0.1.3", account="weather-app")
    comes_to(service, "127.0.1.3", ["weather"])
    cluster.fail("GET", "/pods", times=1, status=500, message="ill")
    cluster.send("pods", b"no JSON\n")
    cluster.delete("pods", "weather", "weather-1")
    cluster.forget_history()
    cluster.add_pod("orders", "orders-3", A, labels={"app": "orders"})
    comes_to(service, A, ["orders"])
    assert allowed(service, "127.0.1.3") == ["weather"]


def test_a_lost_worker_and_a_lost_watch_know_the_pods_again(service: Service, cluster: ApiServer) -> None:
    [worker] = service.workers()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: [pid for pid in service.workers() if pid != worker], "another worker")
    eventually(lambda: service.ready()[0] == 200, "ready")
    assert allowed(service, A) == ["weather"]
    [watch] = children(service.process.pid, "proxy.kubernetes.main")
    os.kill(watch, signal.SIGKILL)
    cluster.delete("pods", "weather", "weather-1")
    comes_to(service, A, [])
    assert allowed(service, B) == ["orders"]


def test_without_the_permission_nobody_is_served_and_it_says_which(
    tmp_path: Path, cluster: ApiServer, upstream: inspecting.Origin
) -> None:
    cluster.rules = []
    with serving(tmp_path, cluster, upstream) as service:
        service.hears('cannot list resource "pods"')
        status, because, notes = service.ready()
        assert (status, because) == (503, ["the pods of the cluster are not listed yet"])
        assert "none of its pods is known" in notes[0]
        assert allowed(service, A) == allowed(service, NODE) == []
        assert eventually(lambda: reasons(service, NODE), "a record") == {"stale_workload"}
        cluster.rules = [(None, {"resources": ["pods"], "verbs": ["list", "watch"]})]
        eventually(lambda: service.ready()[0] == 200, "ready")
        assert allowed(service, A) == ["weather"]


def test_a_cluster_that_is_away_at_start_is_waited_for(
    tmp_path: Path, cluster: ApiServer, upstream: inspecting.Origin
) -> None:
    cluster.fail("GET", "/pods", times=3, drop=True)
    with serving(tmp_path, cluster, upstream) as service:
        eventually(lambda: service.ready()[0] == 200, "ready")
        assert allowed(service, A) == ["weather"]


def test_a_kubeconfig_that_names_no_cluster_leaves_the_gate_unready(
    tmp_path: Path, cluster: ApiServer, upstream: inspecting.Origin
) -> None:
    with serving(tmp_path, cluster, upstream, "--kubernetes", str(tmp_path / "none")) as service:
        service.hears("the cluster's pods: .*none.*")
        assert service.ready()[0] == 503
        assert allowed(service, A) == []


def test_a_policy_with_pods_needs_a_gate_that_watches_a_cluster(tmp_path: Path) -> None:
    service = Service(tmp_path, POLICY, workload=None)
    try:
        assert service.ends() == 3
        assert any("match: kubernetes needs a gate that watches a cluster" in line for line in service.said)
    finally:
        service.__exit__()


# --- tokens ---

TOKEN, OTHERS, UNBOUND = "aaaa.weather.token", "aaaa.orders.token", "aaaa.unbound.token"


@pytest.fixture
def reviewing(tmp_path: Path, cluster: ApiServer, upstream: inspecting.Origin) -> Iterator[Service]:
    assert cluster.rules is not None
    cluster.rules.append((None, {"resources": ["tokenreviews"], "verbs": ["create"]}))
    for token, namespace, account, uid in (
        (TOKEN, "weather", "weather-app", [cluster.uid("weather", "weather-1")]),
        (OTHERS, "orders", "default", [cluster.uid("orders", "orders-1")]),
        (UNBOUND, "weather", "weather-app", []),
    ):
        user = {
            "username": f"system:serviceaccount:{namespace}:{account}",
            "extra": {"authentication.kubernetes.io/pod-uid": uid},
        }
        cluster.reviewed[token] = {"authenticated": True, "audiences": ["outgate"], "user": user}
    with serving(tmp_path, cluster, upstream, "--token-audience", "outgate") as service:
        eventually(lambda: service.ready()[0] == 200, "ready")
        yield service


def shows(token: str, *, basic: bool = False) -> dict[str, str]:
    value = f"Basic {b64encode(f'pod:{token}'.encode()).decode()}" if basic else f"Bearer {token}"
    return {"Proxy-Authorization": value}


@pytest.mark.parametrize("basic", [False, True], ids=["bearer", "as a password"])
def test_a_token_tells_pods_apart_that_share_their_nodes_address(reviewing: Service, basic: bool) -> None:
    unseen = "127.0.1.60"  # no pod's
    assert asks(reviewing, unseen, "weather") == 407
    assert asks(reviewing, unseen, "weather", **shows(TOKEN, basic=basic)) == 200
    assert asks(reviewing, unseen, "orders", **shows(TOKEN, basic=basic)) == 403
    assert asks(reviewing, unseen, "orders", **shows(OTHERS, basic=basic)) == 200
    [record, *_] = eventually(
        lambda: reviewing.records(**{"source.address": unseen, "workload": "weather", "verdict": "allow"}), "a record"
    )
    assert record["user.name"].startswith("system:serviceaccount:weather:weather-app/")
    assert not any(token in reviewing.log.read_text() for token in (TOKEN, OTHERS))


def test_a_token_of_another_pod_or_of_none_is_refused(reviewing: Service, cluster: ApiServer) -> None:
    assert asks(reviewing, A, "weather", **shows(TOKEN)) == 200
    assert asks(reviewing, B, "weather", **shows(TOKEN)) == 403  # stolen
    assert eventually(lambda: "credentials" in reasons(reviewing, B), "a record")
    assert asks(reviewing, A, "weather", **shows(UNBOUND)) == 407
    assert asks(reviewing, A, "weather", **shows("aaaa.forged.token")) == 407
    with Client(reviewing, A) as kept:
        assert kept.get("weather", **shows(TOKEN)) == 200
        cluster.delete("pods", "weather", "weather-1")
        eventually(lambda: kept.get("weather", **shows(TOKEN)) != 200, "the pod is gone, its token remembered")


def test_a_token_that_the_cluster_does_not_review_is_no_proof(reviewing: Service, cluster: ApiServer) -> None:
    cluster.fail("POST", "tokenreviews", times=1000, status=500, message="ill")
    assert asks(reviewing, A, "weather", **shows(TOKEN)) == 503
    assert asks(reviewing, A, "weather") == 200  # its address tells
