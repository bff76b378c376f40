"""The process that watches a cluster and the supervisor's side of it: ill APIs, stale indexes, tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from pki.kubernetes.api import Pace, connect
from proxy.config import Kubernetes, OnStale
from proxy.identity import Change, Doubt, Kind, Pods, spell_user
from proxy.kubernetes.pods import Follower
from proxy.kubernetes.watching import Cluster, ReviewFailed
from tests.pki.api_server import ApiServer, api_server

WAIT_S = 20.0
A, B = "10.244.0.1", "10.244.0.2"
QUICK = Pace(first_s=0.02, most_s=0.1)


@dataclass
class Watched:
    """A cluster, and what a worker that hears of it knows."""

    cluster: Cluster
    pods: Pods = field(default_factory=Pods)
    changes: list[Change] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def who(self, address: str) -> str | Doubt | None:
        found = self.pods.who(ip_address(address))
        return found if found is None or isinstance(found, Doubt) else found.namespace

    def is_ready(self) -> bool:
        return self.cluster.unready is None

    async def until(self, look: Callable[[], object], what: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while not look():  # noqa: ASYNC110 - several things may make it true
                await asyncio.sleep(0.01)
        assert look(), what


@asynccontextmanager
async def watching(server: ApiServer, directory: Path, **options: Any) -> AsyncIterator[Watched]:
    def tell(change: Change) -> None:
        found.changes.append(change)
        found.pods.take(Change.from_bytes(change.to_bytes()))

    config = Kubernetes(server.kubeconfig(directory), **options)
    found = Watched(Cluster(config, tell, lambda line: found.said.append(line)))
    found.cluster.start()
    running = asyncio.create_task(found.cluster.run())
    try:
        yield found
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        found.cluster.close()


def test_pods_come_and_go_and_a_later_worker_knows_the_same(tmp_path: Path) -> None:
    async def go(server: ApiServer) -> None:
        async with watching(server, tmp_path) as it:
            assert not it.is_ready()
            await it.until(lambda: it.who(A) == "one", "listed")
            assert it.is_ready()
            server.add_pod("two", "pod", B, labels={"app": "two"})
            await it.until(lambda: it.who(B) == "two", "added")
            server.delete("pods", "one", "pod")
            await it.until(lambda: it.who(A) is None, "deleted")
            later = Pods()
            for change in it.cluster.told():
                later.take(change)
            assert later.who(ip_address(B)) == it.pods.who(ip_address(B))
            assert len(later) == 1
            assert it.said == []

    with api_server() as server:
        server.add_pod("one", "pod", A)
        asyncio.run(go(server))


def test_a_new_list_takes_away_what_is_gone_and_tells_only_what_is_new(tmp_path: Path) -> None:
    async def go(server: ApiServer) -> None:
        async with watching(server, tmp_path) as it:
            await it.until(lambda: it.who(A) == "one", "listed")
            server.wait_for_watches("pods")
            server.fail("GET", "/pods", times=1, watch=True, status=410, message="too old", reason="Expired")
            server.send("pods", b"")  # the watch ends as it should
            await asyncio.sleep(0)
            server.delete("pods", "one", "pod")
            server.add_pod("two", "other", A)
            await it.until(lambda: it.who(A) == "two", "listed again")
            assert it.who(B) == "kept"
            assert sum("kept" in row for change in it.changes for row in change.pods) == 1

    with api_server() as server:
        server.add_pod("one", "pod", A)
        server.add_pod("kept", "pod", B)
        asyncio.run(go(server))


def test_a_list_of_many_pages_is_told_in_messages_that_fit(tmp_path: Path) -> None:
    async def go(server: ApiServer) -> None:
        async with watching(server, tmp_path) as it:
            await it.until(lambda: it.pods.is_listed, "listed")
            assert len(it.pods) == 1200
            assert all(len(change.to_bytes()) < 100_000 for change in it.changes)

    with api_server() as server:
        for number in range(1200):
            labels = {"key": "v" * 60, "number": str(number)}
            server.add_pod(f"ns-{number % 7}", f"pod-{number}", str(ip_address(0x0A000000 + number)), labels=labels)
        asyncio.run(go(server))


@pytest.mark.parametrize(
    "how",
    [
        {"status": 500, "message": "ill"},
        {"status": 403, "message": 'cannot watch resource "pods"'},
        {"status": 429, "headers": {"Retry-After": "1"}},
        {"status": 503, "raw": b"<html>"},
        {"drop": True},
        {"status": 200, "raw": b"{}"},
    ],
    ids=["500", "403", "429", "a balancer's page", "dropped", "an answer of nothing"],
)
def test_an_ill_api_leaves_what_is_known_and_is_asked_again(tmp_path: Path, how: dict[str, Any]) -> None:
    async def go(server: ApiServer) -> None:
        async with watching(server, tmp_path) as it:
            await it.until(lambda: it.who(A) == "one", "listed")
            server.wait_for_watches("pods")
            server.fail("GET", "/pods", times=2, **how)
            server.send("pods", None)
            server.add_pod("two", "pod", B)
            await it.until(lambda: it.who(B) == "two", "followed again")
            assert it.who(A) == "one"

    with api_server() as server:
        server.add_pod("one", "pod", A)
        asyncio.run(go(server))


@pytest.mark.parametrize("on_stale", list(OnStale))
def test_a_silent_api_makes_the_index_stale_if_the_operator_says_so(tmp_path: Path, on_stale: OnStale) -> None:
    async def go(server: ApiServer) -> None:
        async with watching(server, tmp_path, on_stale=on_stale, stale_s=1.0) as it:
            await it.until(lambda: it.pods.is_listed, "listed")
            server.wait_for_watches("pods")
            server.fail("GET", "/pods", times=1000, drop=True)
            server.send("pods", None)
            await it.until(lambda: it.cluster.lag_s > 2.5 and it.said, "silent")
            await it.until(lambda: on_stale is OnStale.KEEP or it.who(A) is Doubt.STALE, "stale")
            assert it.who(A) == (Doubt.STALE if on_stale is OnStale.DENY else "one")
            assert it.is_ready() is (on_stale is OnStale.KEEP)
            assert list(it.cluster.notes)
            server.heal()
            await it.until(lambda: it.who(A) == "one" and it.cluster.lag_s < 1, "well again")
            assert it.is_ready()
            assert it.said[-1] == "the cluster's pods: followed again"

    with api_server() as server:
        server.add_pod("one", "pod", A)
        asyncio.run(go(server))


def test_a_watch_that_is_lost_starts_again_and_what_went_meanwhile_is_gone(tmp_path: Path) -> None:
    async def go(server: ApiServer) -> None:
        async with watching(server, tmp_path) as it:
            await it.until(lambda: it.who(A) == "one", "listed")
            assert it.cluster.pid
            os.kill(it.cluster.pid, signal.SIGKILL)
            server.delete("pods", "one", "pod")
            await it.until(lambda: it.who(A) is None, "listed by another process")

    with api_server() as server:
        server.add_pod("one", "pod", A)
        asyncio.run(go(server))


def test_a_pod_keeps_its_address_through_its_grace_and_no_longer(tmp_path: Path) -> None:
    """It is being deleted: until its grace is over it may need the world, then its address may be another's."""
    seen: list[Kind] = []

    async def go(server: ApiServer) -> None:
        async with connect(server.kubeconfig(tmp_path), None, connections=2) as api:
            follower = Follower(
                api, begin=seen.clear, see=lambda pod: seen.append(pod.kind), gone=lambda _: None, listed=lambda: None,
                agreed=lambda: None, failed=lambda _: None, pace=QUICK,
            )  # fmt: skip
            running = asyncio.create_task(follower.run())
            async with asyncio.timeout(WAIT_S):
                while len(seen) < 2:  # noqa: ASYNC110 - two things make it true
                    await asyncio.sleep(0.02)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    with api_server() as server:
        end = datetime.now(UTC) + timedelta(seconds=2)
        server.add_pod("one", "pod", A, deletionTimestamp=end.isoformat(timespec="seconds").replace("+00:00", "Z"))
        asyncio.run(go(server))
    assert seen == [Kind.POD, Kind.UNCLEAR]


# --- tokens ---


def status(uid: str | None = "uid-1", audience: str | None = "outgate", user: str = "weather:app") -> dict[str, Any]:
    """What a TokenReview says of a good token."""
    extra = {"authentication.kubernetes.io/pod-uid": [uid]} if uid else {}
    about = {"username": f"system:serviceaccount:{user}", "extra": extra}
    return {"authenticated": True, "user": about, **({"audiences": [audience]} if audience else {})}


@pytest.mark.parametrize(
    ("reviewed", "user"),
    [
        (status(), spell_user("weather", "app", "uid-1")),
        ({"authenticated": False}, None),
        (status(audience="other"), None),
        (status(audience=None), None),
        (status(uid=None), None),
        ({**status(), "user": {"username": "admin", "extra": status()["user"]["extra"]}}, None),
        ({**status(), "authenticated": "true"}, None),
        ({}, None),
    ],
    ids=[
        "good", "bad", "for somebody else", "from a server without audiences", "bound to no pod", "of a person",
        "a word for true", "nothing",
    ],
)  # fmt: skip
def test_a_token_counts_if_the_cluster_says_which_pod_it_is(tmp_path: Path, reviewed: Any, user: str | None) -> None:
    async def go(server: ApiServer) -> None:
        async with watching(server, tmp_path, token_audience="outgate") as it:
            assert await it.cluster.review("a.token.here") == user
            [asked] = server.requests("POST", "tokenreviews")
            assert b'"audiences": ["outgate"]' in asked.body

    with api_server() as server:
        server.reviewed["a.token.here"] = reviewed
        asyncio.run(go(server))


def test_a_review_that_is_not_answered_is_no_proof(tmp_path: Path) -> None:
    async def go(server: ApiServer) -> None:
        async with watching(server, tmp_path, token_audience="outgate") as it:
            server.fail("POST", "tokenreviews", status=403, message='cannot create resource "tokenreviews"')
            with pytest.raises(ReviewFailed, match="tokenreviews"):
                await it.cluster.review("a.token.here")
            assert any('cannot create resource "tokenreviews"' in line for line in it.said)
            server.fail("POST", "tokenreviews", wait_s=60, then_answer=True)
            waiting = asyncio.create_task(it.cluster.review("a.token.here"))
            await it.until(lambda: len(server.requests("POST")) == 2, "asked")
            assert it.cluster.pid
            os.kill(it.cluster.pid, signal.SIGKILL)
            with pytest.raises(ReviewFailed, match="ended"):
                await waiting

    with api_server() as server:
        asyncio.run(go(server))
