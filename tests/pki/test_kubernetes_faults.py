"""The distribution job while it stays: what changes in the cluster, and what an API server does on an ill day."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from pki.kubernetes.api import ApiFault, NoCluster, Pace, connect
from pki.kubernetes.objects import MAX_CONFIG_MAP
from pki.kubernetes.placing import Outcome
from tests.pki.api_server import ApiServer, Asked, Object, api_server
from tests.pki.kubernetes_jobs import NAME, Kept, files, keeping, once

STOPPING = b""  # the server ends a watch as it does every few minutes
CUT: bytes | None = None


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as it:
        it.add_namespace("a", "b")
        yield it


def settled(kept: Kept) -> None:
    """All is written, and both watches are open."""
    kept.wait_until_ready()
    kept.server.wait_for_watches("namespaces", "configmaps")


def carries(server: ApiServer, namespace: str, *roots: int) -> bool:
    return namespace in server.served() and server.config_map(namespace)["data"] == {
        name: content.decode() for name, content in files(*roots).items() if name != "truststore.jks"
    }


def serves_new(server: ApiServer, name: str = "new") -> None:
    """The job is alive: a namespace that is made now gets the bundle."""
    server.add_namespace(name)
    server.wait_for(lambda: carries(server, name), f"{name} is served")


# What changes in the cluster


def test_a_new_namespace_gets_the_bundle_at_once(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        serves_new(server)
        server.wait_for(lambda: kept.outcomes("new") == [Outcome.WRITTEN], "it is told")
        assert lists(server) == 1


def test_a_namespace_that_is_made_again_gets_it_again(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        server.delete_namespace("a")
        serves_new(server, "a")
        kept.wait_until_ready()


def test_labels_decide_as_they_change(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path, selector="inspected=true", prune=True) as kept:
        settled(kept)
        assert server.served() == set()
        server.label("a", inspected="true")
        server.label("b", inspected="true")
        server.wait_for(lambda: server.served() == {"a", "b"}, "both are served")
        server.label("a", inspected="false")
        server.wait_for(lambda: server.served() == {"b"}, "a has it no more")
        server.wait_for(lambda: kept.outcomes("a") == [Outcome.WRITTEN, Outcome.REMOVED], "it is told")


def test_without_prune_the_bundle_stays_where_it_is(server: ApiServer, tmp_path: Path) -> None:
    server.label("a", inspected="true")
    with keeping(server, tmp_path, selector="inspected") as kept:
        settled(kept)
        server.label("a", inspected=None)
        server.label("b", inspected="true")
        server.wait_for(lambda: "b" in server.served(), "b is served")
        assert "a" in server.served()
    assert server.served() == {"a", "b"}


def test_an_edited_and_a_deleted_one_are_restored(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        server.edit("a", NAME, {"data": {"ca.crt": "evil"}})
        server.wait_for(lambda: carries(server, "a"), "what was edited")
        server.delete("configmaps", "b", NAME)
        server.wait_for(lambda: carries(server, "b"), "what was deleted")
        server.wait_for(lambda: [told.outcome for told in kept.told].count(Outcome.RESTORED) == 2, "both are told")
    because = {told.place: told.because for told in kept.told if told.outcome is Outcome.RESTORED}
    assert because == {"a": "it was changed", "b": "it was deleted"}


def test_a_foreign_one_is_refused_once_and_replaced_when_it_goes(server: ApiServer, tmp_path: Path) -> None:
    server.write("configmaps", "a", NAME, {"data": {"ca.crt": "theirs"}})
    with keeping(server, tmp_path) as kept:
        settled(kept)
        assert kept.outcomes("a") == [Outcome.REFUSED]
        server.delete("configmaps", "a", NAME)
        server.wait_for(lambda: carries(server, "a"), "a is free")
        server.wait_for(lambda: kept.outcomes("a") == [Outcome.REFUSED, Outcome.WRITTEN], "it is told")


def test_a_new_namespace_of_an_old_name_is_told_anew(server: ApiServer, tmp_path: Path) -> None:
    """Nothing is remembered of namespaces that are gone: they come and go by the thousand."""
    server.write("configmaps", "a", NAME, {"data": {"ca.crt": "theirs"}})
    with keeping(server, tmp_path) as kept:
        settled(kept)
        server.delete_namespace("a")
        serves_new(server)
        server.write("configmaps", "a", NAME, {"data": {"ca.crt": "theirs"}})
        server.add_namespace("a")
        server.wait_for(lambda: kept.outcomes("a") == [Outcome.REFUSED, Outcome.REFUSED], "it is told again")


def test_a_new_root_reaches_every_namespace_beside_the_old_one(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path, cluster_trust_bundle=True) as kept:
        settled(kept)
        kept.carry(files(1, 2))
        server.wait_for(lambda: carries(server, "a", 1, 2) and carries(server, "b", 1, 2), "both roots, everywhere")
        wanted = files(1, 2)["ca.crt"].decode()
        server.wait_for(lambda: bool(server.find("clustertrustbundles", NAME)["spec"]["trustBundle"] == wanted), "too")
        server.add_namespace("later")
        server.wait_for(lambda: carries(server, "later", 1, 2), "the new bundle in a new namespace")
        kept.wait_until_ready()
    assert server.requests("DELETE") == []


def test_a_cluster_trust_bundle_is_restored_too(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path, cluster_trust_bundle=True) as kept:
        settled(kept)
        server.wait_for_watches("clustertrustbundles")
        server.delete("clustertrustbundles", "", NAME)
        server.wait_for(lambda: kept.outcomes("") == [Outcome.WRITTEN, Outcome.RESTORED], "it is back")


def test_a_cluster_without_that_api_is_kept_all_the_same(server: ApiServer, tmp_path: Path) -> None:
    server.trust_bundle_versions = []
    with keeping(server, tmp_path, cluster_trust_bundle=True) as kept:
        settled(kept)
        assert any("has no ClusterTrustBundle" in line for line in kept.said)
        serves_new(server)


def test_named_namespaces_are_kept_with_a_role_in_each(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path, namespaces=("a", "b")) as kept:
        kept.wait_until_ready()
        server.wait_for(lambda: len([one for one in server.watches if not one.is_ended]) == 2, "a watch for each")
        server.delete("configmaps", "b", NAME)
        server.wait_for(lambda: carries(server, "b"), "it is restored")
    assert [asked for asked in server.asked if asked.path in ("/api/v1/namespaces", "/api/v1/configmaps")] == []


def test_a_bundle_too_large_leaves_the_former_one(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        kept.carry({**files(2), "more": b"x" * MAX_CONFIG_MAP})
        server.wait_for(lambda: any("the former bundle stays" in line for line in kept.said), "it is said")
        serves_new(server)


def test_nothing_is_written_while_nothing_changes(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        for resource in ("namespaces", "configmaps"):
            watch_again(server, resource)
        server.annotate("a", "note", "changed")
        server.label("b", other="label")
        kept.carry(dict(files()))
        serves_new(server)
    assert len(server.requests("PATCH")) == 3


def watch_again(server: ApiServer, resource: str) -> None:
    """The watch goes on after a bookmark and an end."""
    watches = len(server.requests("GET", resource, watch=True))
    server.bookmark(resource)
    server.send(resource, STOPPING)
    server.wait_for(lambda: len(server.requests("GET", resource, watch=True)) > watches, "it is watched again")


def test_it_is_ready_when_all_is_written_and_not_while_something_is_owed(server: ApiServer, tmp_path: Path) -> None:
    server.fail("PATCH", "/namespaces/b/", times=1000, status=500)
    with keeping(server, tmp_path) as kept:
        server.wait_for(lambda: carries(server, "a"), "a is served")
        server.wait_for(lambda: len(server.requests("PATCH", "/namespaces/b/")) > 2, "b is tried again and again")
        assert kept.was_ready == 0
        server.heal()
        kept.wait_until_ready()
        server.fail("PATCH", times=1, status=500)
        kept.carry(files(2))
        server.wait_for(lambda: kept.was_ready == 2 and kept.is_ready, "ready, not ready, ready")
        assert carries(server, "a", 2)


def test_what_changes_before_our_own_write_is_answered_is_not_overlooked(server: ApiServer, tmp_path: Path) -> None:
    """The watch tells of the write and of an edit after it, and only then the answer to the write arrives."""
    answer = server.answer

    def answer_late(asked: Asked) -> tuple[int, Object]:
        answered = answer(asked)
        if asked.method == "PATCH":
            server.answer = answer  # type: ignore[method-assign]  # a test's own hook
            server.edit("a", NAME, {"data": {"ca.crt": "evil"}})
            server.bookmark("configmaps")
            server.changed.wait_for(lambda: server.closing, 1.0)  # it lets go of the lock
        return answered

    with keeping(server, tmp_path) as kept:
        settled(kept)
        server.answer = answer_late  # type: ignore[method-assign]  # a test's own hook
        server.delete("configmaps", "a", NAME)
        server.wait_for(lambda: len(server.requests("PATCH", "/namespaces/a/")) > 1, "it is written")
        server.wait_for(lambda: carries(server, "a"), "the edit is taken back")


# Ill days of a server


@pytest.mark.parametrize("as_event", [True, False], ids=["as an event", "as a status"])
def test_a_watch_that_is_too_old_begins_with_a_new_list(server: ApiServer, tmp_path: Path, as_event: bool) -> None:
    server.expired_as_event = as_event
    with keeping(server, tmp_path) as kept:
        settled(kept)
        assert lists(server) == 1
        away(server, "namespaces")
        server.add_namespace("meanwhile")
        server.forget_history()
        server.heal()
        server.wait_for(lambda: carries(server, "meanwhile"), "what came meanwhile is found in the list")
        assert lists(server) == 2
        serves_new(server)


def lists(server: ApiServer) -> int:
    return len([one for one in server.requests("GET", watch=False) if one.path == "/api/v1/namespaces"])


def away(server: ApiServer, *resources: str) -> None:
    """Nobody watches, until the server heals."""
    for resource in resources:
        server.fail("GET", resource, watch=True, times=10_000, status=503)
    for resource in resources:
        server.send(resource, STOPPING)
    server.wait_for(lambda: all(one.is_ended for one in server.watches if one.resource in resources), "nobody watches")


def test_what_changed_while_the_history_was_lost_is_found(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        away(server, "configmaps", "namespaces")
        server.edit("a", NAME, {"data": {"ca.crt": "evil"}})
        server.delete("configmaps", "b", NAME)
        server.forget_history()
        server.heal()
        server.wait_for(lambda: carries(server, "a") and carries(server, "b"), "both are restored")


@pytest.mark.parametrize("end", [CUT, STOPPING], ids=["lost", "ended"])
def test_a_lost_connection_goes_on_where_it_was(server: ApiServer, tmp_path: Path, end: bytes | None) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        serves_new(server)
        last = str(server._version)
        server.bookmark("namespaces")
        server.send("namespaces", b'{"type":"ADDED","object":{"metadata":{"na', end)
        server.wait_for(
            lambda: server.requests("GET", "/api/v1/namespaces", watch=True)[-1].query["resourceVersion"] == last,
            "the watch goes on after the bookmark",
        )
        serves_new(server, "newer")
        assert lists(server) == 1


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{\n",
        b"[]\n",
        b'{"type":"ADDED"}\n',
        b'{"type":"ADDED","object":{"metadata":{"name":"x"}}}\n',
        b'{"type":"WHAT","object":{"metadata":{"name":"x","resourceVersion":"1"}}}\n',
        b'{"type":"ADDED","object":{"metadata":{"name":7,"resourceVersion":"1"}}}\n',
        b'{"type":"ERROR","object":{"code":500,"message":"etcdserver: leader changed"}}\n',
        b'{"type":"ERROR","object":null}\n',
        b"\xff\xfe\n",
        b'{"type":"BOOKMARK","object":{"metadata":{}}}\n',
    ],
)
def test_a_malformed_event_ends_the_watch_and_not_the_job(server: ApiServer, tmp_path: Path, line: bytes) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        server.send("namespaces", line)
        server.wait_for(lambda: lists(server) == 2, "it lists again")
        serves_new(server)
        assert kept.said


def test_line_separators_in_an_annotation_break_no_watch(server: ApiServer, tmp_path: Path) -> None:
    """Any tenant may annotate its namespace, and JSON allows these characters as they are."""
    with keeping(server, tmp_path) as kept:
        settled(kept)
        server.add_namespace("evil", annotations={"note": "one\x85two\u2028three\u2029four\x0b\x0c\x1c"})
        server.wait_for(lambda: carries(server, "evil"), "evil is served")
        serves_new(server)
        assert kept.said == []


@pytest.mark.parametrize("method", ["GET", "PATCH"])
@pytest.mark.parametrize(
    "how",
    [
        {"status": 409, "message": "the object has been modified"},
        {"status": 500, "message": "etcdserver: request timed out"},
        {"status": 503, "raw": b"<html>balancer</html>"},
        {"status": 504, "message": "timeout"},
        {"status": 200, "raw": b"<html>login</html>"},
        {"status": 200, "raw": b'"text"'},
        {"status": 200, "raw": b'{"kind": "Thing"}'},
        {"drop": True},
    ],
    ids=[
        "409",
        "500",
        "503 of a balancer",
        "504",
        "200 that is no JSON",
        "200 that is no object",
        "200 that is no ConfigMap",
        "dropped",
    ],
)
def test_a_fault_that_passes_is_waited_for(server: ApiServer, tmp_path: Path, method: str, how: dict[str, Any]) -> None:
    server.fail(method, "configmaps", times=3, **how)
    ran = once(server, tmp_path)
    assert {place: outcome in ("written", "unchanged") for place, outcome in ran.outcomes().items()} == {
        "a": True,
        "b": True,
    }
    assert carries(server, "a")
    assert carries(server, "b")


@pytest.mark.parametrize("status", [500, 429, 503])
def test_a_list_that_fails_is_asked_again(server: ApiServer, tmp_path: Path, status: int) -> None:
    server.fail("GET", "/api/v1/namespaces", times=2, status=status, message="not now")
    ran = once(server, tmp_path)
    assert ran.outcomes() == {"a": "written", "b": "written"}
    assert ran.said == [f"/api/v1/namespaces: {status} not now"] * 2


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed_by_all_that_is_asked(server: ApiServer, tmp_path: Path, status: int) -> None:
    server.add_namespace(*(f"n{number}" for number in range(40)))
    server.fail("PATCH", status=status, headers={"Retry-After": "1"})
    assert set(once(server, tmp_path).outcomes().values()) == {"written"}
    asked_at = server.requests("PATCH")[0].at
    # What was under way already arrives: of eight places the look, and the write. The rest waits.
    meanwhile = [asked for asked in server.asked if 0 < asked.at - asked_at < 0.99]
    assert len(meanwhile) <= 2 * 8
    assert len([asked for asked in server.asked if asked.at - asked_at >= 0.99]) > 2 * 8


def test_a_watch_rests_too_when_the_server_asks_for_it(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path) as kept:
        settled(kept)
        server.fail("PATCH", status=429, headers={"Retry-After": "2"})
        server.add_namespace("new")
        server.wait_for(lambda: bool(server.requests("PATCH", "/new/")), "it is refused")
        server.wait_for(lambda: bool(kept.outcomes("new")), "it is told")
        server.send("configmaps", STOPPING)
        server.wait_for(lambda: carries(server, "new"), "new is served")
        server.wait_for(lambda: len(server.requests("GET", "configmaps", watch=True)) == 2, "it is watched again")
        refused_at = server.requests("PATCH", "/new/")[0].at
        assert server.requests("GET", "configmaps", watch=True)[1].at - refused_at >= 1.99


def test_a_retry_after_that_means_nothing_is_no_wish(server: ApiServer, tmp_path: Path) -> None:
    for value in ("soon", "-1", "1e9", "²", ""):
        server.fail("PATCH", status=429, headers={"Retry-After": value.encode().decode("latin-1")})
    assert set(once(server, tmp_path).outcomes().values()) == {"written"}


def test_a_server_that_does_not_answer_is_given_up_and_asked_again(server: ApiServer, tmp_path: Path) -> None:
    server.fail("PATCH", "/namespaces/a/", wait_s=30, drop=True)
    server.fail("GET", "/api/v1/namespaces", wait_s=30, drop=True)
    ran = once(server, tmp_path, patience_s=0.5)
    assert set(ran.outcomes().values()) == {"written"}
    assert ran.said == ["/api/v1/namespaces: no answer in time"]


def test_a_watch_that_falls_silent_is_given_up(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pki.kubernetes.api.WATCH_S", 1)
    server.fail("GET", "/api/v1/namespaces", watch=True, wait_s=30, drop=True)
    with keeping(server, tmp_path, patience_s=0.5) as kept:
        server.wait_for(lambda: "/api/v1/namespaces: no answer in time" in kept.said, "it is given up")
        serves_new(server)


def test_the_time_being_up_says_what_was_not_done(server: ApiServer, tmp_path: Path) -> None:
    server.fail("PATCH", "/namespaces/b/", times=1000, status=500, message="no quorum")
    ran = once(server, tmp_path, deadline_s=5)
    assert ran.outcomes() == {"a": "written", "b": "failed"}
    assert ran.because("b").endswith("500 no quorum")


def test_a_server_that_is_not_there_is_one_clear_fault(tmp_path: Path) -> None:
    with api_server() as server:
        pass
    with pytest.raises(ApiFault, match="the namespaces could not be listed within 1 s"):
        once(server, tmp_path, deadline_s=1)


def test_a_namespace_without_rights_holds_up_no_other_and_is_tried_again(server: ApiServer, tmp_path: Path) -> None:
    server.fail("PATCH", "/namespaces/a/", times=1000, status=403, message="forbidden", reason="Forbidden")
    with keeping(server, tmp_path) as kept:
        server.wait_for(lambda: carries(server, "b"), "b is served")
        serves_new(server)
        server.wait_for(lambda: len(server.requests("PATCH", "/namespaces/a/")) > 3, "a is tried again")
        assert kept.outcomes("a") == [Outcome.FAILED]  # and told once
        server.heal()
        server.wait_for(lambda: carries(server, "a"), "the right was granted")
        kept.wait_until_ready()


def test_a_refused_right_ends_one_run_at_once(server: ApiServer, tmp_path: Path) -> None:
    server.fail("PATCH", "/namespaces/a/", times=1000, status=403, message="forbidden", reason="Forbidden")
    assert once(server, tmp_path).outcomes() == {"a": "failed", "b": "written"}
    assert len(server.requests("PATCH", "/namespaces/a/")) == 1


def test_a_token_that_is_replaced_is_read_again(server: ApiServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    server.tokens = {"first"}
    with keeping(server, tmp_path, user={"tokenFile": str(token)}) as kept:
        settled(kept)
        token.write_text("second\n")
        server.tokens = {"second"}
        serves_new(server)
        token.unlink()
        server.tokens = {"third"}
        server.add_namespace("late")
        server.wait_for(lambda: kept.outcomes("late") == [Outcome.FAILED], "there is no token")
        token.write_text("third")
        server.wait_for(lambda: carries(server, "late"), "there is one again")
        assert "first" not in "".join(kept.said)


def test_a_wrong_token_is_said_and_never_shown(server: ApiServer, tmp_path: Path) -> None:
    server.tokens = set()
    with pytest.raises(ApiFault, match="401 Unauthorized") as caught:
        once(server, tmp_path)
    assert "token" not in str(caught.value)


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_a_plugin_gives_the_token_and_a_new_one(server: ApiServer, tmp_path: Path, version: str) -> None:
    (tmp_path / "token").write_text('{"status": {"token": "first"}}')
    server.tokens = {"first"}
    plugin = {
        "apiVersion": f"client.authentication.k8s.io/{version}",
        "command": "cat",
        "args": [str(tmp_path / "token")],
    }
    with keeping(server, tmp_path, user={"exec": plugin}) as kept:
        settled(kept)
        (tmp_path / "token").write_text('{"status": {"token": "second"}}')
        server.tokens = {"second"}
        serves_new(server)
        (tmp_path / "token").write_text("no token")
        server.tokens = {"third"}
        server.add_namespace("late")
        server.wait_for(lambda: kept.outcomes("late") == [Outcome.FAILED], "the plugin gives nothing")
        assert "cannot be read" in kept.told[-1].because


def test_two_jobs_that_disagree_do_not_burden_the_server(server: ApiServer, tmp_path: Path) -> None:
    pace = Pace(first_s=0.2, most_s=60)
    with keeping(server, tmp_path, pace=pace) as one, keeping(server, tmp_path, files(2), pace=pace) as other:
        began = time.monotonic()
        server.wait_for(lambda: (one.outcomes("a") + other.outcomes("a")).count(Outcome.RESTORED) >= 9, "they quarrel")
        assert time.monotonic() - began >= 1.5  # one of them has done it five times: 0.1 + 0.2 + 0.4 + 0.8 at least


def test_two_jobs_that_agree_write_once(server: ApiServer, tmp_path: Path) -> None:
    with keeping(server, tmp_path) as one, keeping(server, tmp_path) as other:
        one.wait_until_ready()
        other.wait_until_ready()
        serves_new(server)
        version = server.config_map("a")["metadata"]["resourceVersion"]
        one.carry(files())
        serves_new(server, "newer")
        assert server.config_map("a")["metadata"]["resourceVersion"] == version


def test_a_cluster_behind_tls_is_verified_by_its_own_root(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    with api_server(tls) as server:
        server.add_namespace("a")
        authority.cert_pem.write_to_path(tmp_path / "api-ca.pem")
        assert once(server, tmp_path).outcomes() == {"a": "written"}
        stranger.cert_pem.write_to_path(tmp_path / "api-ca.pem")
        with pytest.raises(ApiFault):
            once(server, tmp_path, deadline_s=1)
    assert len(server.requests("PATCH")) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "not found; name a kubeconfig with --kubeconfig, or run in a pod"),
        ("", "name another one"),
        ("[]", "name another one"),
        ("{", "name another one"),
        ('{"clusters": [], "contexts": []}', "No current context"),
        ('{"clusters": [], "contexts": [], "current-context": "x"}', "Context 'x' not found"),
        ('{"contexts": []}', "lacks 'clusters'"),
        ('{"clusters": [{"name": "c", "cluster": {"server": 7}}], "contexts": []}', "name another one"),
    ],
)
def test_a_kubeconfig_that_leads_nowhere_is_one_clear_line(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)

    async def enter() -> None:
        async with connect(str(path), None, connections=4):
            raise AssertionError("there is no cluster")

    with pytest.raises(NoCluster) as caught:
        asyncio.run(enter())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
