"""A gate swaps its policy while it serves: nothing is cut, nothing is judged by a policy that is no more."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from policies.hostnames import Hostname
from policies.model import Reason
from proxy import child
from proxy.compiled import NotCompiled, write_policy
from proxy.inspecting import HttpHost
from proxy.inspector import Configuration, Handover, Inspector, host
from proxy.record import Record, new_id
from tests.proxy.gates import DESTINATION, PATIENCE_S, eventually, read_all
from tests.proxy.inspecting import HOST, Rig, get, read_reply
from tests.proxy.swapping import CARRIED, INSPECTED, Serving, of_app, policy_of

OPEN = of_app(f"{{host: {INSPECTED}, tls: inspect}}", f"host: {CARRIED}")
NARROW = of_app(f"{{host: {INSPECTED}, tls: inspect, allow: [GET /elsewhere]}}")
MOVED = f"""
version: 1
workloads:
  app:
    match: {{address: [127.0.0.2/32]}}
    rules: [{{host: {INSPECTED}, tls: inspect}}, {{host: {CARRIED}}}]
  stranger:
    match: {{address: [127.0.0.0/8]}}
    rules: [{{host: stranger.test, tls: inspect}}]
"""


@pytest.fixture(params=HttpHost)
def serving(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(tmp_path, OPEN, http_host=request.param) as it:
        yield it


ONLY_MITMPROXY = pytest.mark.parametrize("serving", [HttpHost.MITMPROXY], indirect=True, ids=["mitmproxy"])


# --- what is open, and what comes -----------------------------------------------------------------------------------


def test_a_connection_that_is_carried_survives_and_is_recorded_with_the_policy_that_judged_it(serving: Serving) -> None:
    with serving.connect(CARRIED) as carried:
        assert serving.ask(carried, host=CARRIED).status == 200
        former = serving.gate.generation
        later = serving.swap(NARROW)
        assert serving.ask(carried, host=CARRIED).status == 200
        with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
            serving.connect(CARRIED)
    denied, ended = serving.record(0), serving.record(1)
    assert (denied["reason"], denied["policy.generation"]) == ("no_rule", later)
    assert (ended["verdict"], ended["policy.generation"]) == ("allow", former)
    assert former != later


def test_requests_on_an_open_connection_are_judged_by_the_new_policy(serving: Serving) -> None:
    with serving.connect(INSPECTED) as kept:
        assert serving.ask(kept, "/search").status == 200
        serving.swap(NARROW)
        refused = serving.ask(kept, "/search")
        assert (refused.status, refused.reason) == (403, "no_allow_entry")
        assert serving.ask(kept, "/elsewhere").status == 200
    assert [record["reason"] for record in map(serving.record, range(3))] == ["rule", "no_allow_entry", "rule"]
    assert [record["policy.generation"] for record in serving.records] == [
        policy_of(text).generation for text in (OPEN, NARROW, NARROW)
    ]


def test_a_request_under_way_keeps_the_verdict_it_has(serving: Serving) -> None:
    answered = threading.Event()

    def respond(_request: bytes, _sock: socket.socket) -> bytes:
        answered.wait(PATIENCE_S)
        return b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsunny"

    serving.origin.respond = respond
    with serving.connect(INSPECTED) as sock:
        sock.sendall(get("/search", host=INSPECTED))
        eventually(lambda: serving.origin.requests, "the request at the origin")
        former = serving.gate.generation
        serving.swap(NARROW)
        answered.set()
        assert read_reply(sock)[0].body == b"sunny"
    assert serving.record(0)["policy.generation"] == former


def test_a_hello_that_comes_after_a_swap_is_judged_by_the_new_policy(serving: Serving) -> None:
    with serving.dial() as early:
        eventually(lambda: serving.gate._listener.open_connections, "its acceptance")
        later = serving.swap(NARROW)
        with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
            serving.shake_hands(early, CARRIED)
    assert serving.record(0)["policy.generation"] == later


def test_a_host_may_become_inspected(serving: Serving) -> None:
    """The gate starts its inspector when it first needs it, with the policy in force by then."""
    serving.swap(of_app(f"{{host: {INSPECTED}, tls: inspect, allow: [GET /first]}}"))
    serving.swap(NARROW)
    with serving.connect(INSPECTED) as sock:
        assert serving.ask(sock, "/first").reason == "no_allow_entry"
        assert serving.ask(sock, "/elsewhere").status == 200


def test_a_gate_that_loaded_its_policy_itself_swaps_as_well(tmp_path: Path) -> None:
    with Serving(tmp_path, OPEN, is_compiled=False) as it, it.connect(INSPECTED) as kept:
        assert it.ask(kept).status == 200
        it.swap(NARROW)
        assert it.ask(kept).reason == "no_allow_entry"


def test_an_explicit_proxy_follows(serving: Serving) -> None:
    door = socket.create_server(("127.0.0.1", 0))
    address = door.getsockname()
    serving.loop.call(lambda: serving.gate.proxy(door))
    connect = f"CONNECT {CARRIED}:443 HTTP/1.1\r\nHost: {CARRIED}:443\r\n\r\n".encode()

    def status() -> bytes:
        with socket.create_connection(address, timeout=PATIENCE_S) as sock:
            sock.sendall(connect)
            return sock.recv(65536)[9:12]

    assert status() == b"200"
    serving.swap(NARROW)
    assert status() == b"403"


def test_what_is_no_policy_changes_nothing(serving: Serving) -> None:
    former = serving.gate.generation
    for content in (b"", b"version: 1\nworkloads: {}\n"):
        with pytest.raises(NotCompiled):
            serving.run(serving.gate.swap(child.memory(content, "policy")))  # type: ignore[arg-type]  # IO[bytes] it is
    assert serving.gate.generation == former
    with serving.connect(CARRIED) as carried:
        assert serving.ask(carried, host=CARRIED).status == 200


# --- who it is ------------------------------------------------------------------------------------------------------


def test_a_source_that_was_moved_takes_no_rights_along_on_a_connection_it_kept_open(serving: Serving) -> None:
    """An attack: keep connections open, and what the old workload was allowed is allowed for ever."""
    with serving.connect(INSPECTED) as kept, serving.connect(INSPECTED, "127.0.0.2") as stays, serving.dial() as silent:
        assert serving.ask(kept).status == serving.ask(stays).status == 200
        eventually(lambda: serving.gate._listener.open_connections, "the silent one's acceptance")
        serving.swap(MOVED)
        assert serving.ask(kept).reason == "no_rule"
        assert serving.ask(stays).status == 200
        with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
            serving.shake_hands(silent, CARRIED)
    serving.record(4)
    assert sorted((str(record["workload"]), str(record["reason"])) for record in serving.records) == [
        *[("app", "rule")] * 3,
        *[("stranger", "no_rule")] * 2,
    ]


def test_a_source_whose_workload_is_gone_is_unknown(serving: Serving) -> None:
    with serving.connect(INSPECTED) as kept:
        assert serving.ask(kept).status == 200
        serving.swap(OPEN.replace("127.0.0.0/8", "192.0.2.0/24"))
        assert serving.ask(kept).reason == "unknown_workload"
        with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
            serving.connect(CARRIED)
    assert [serving.record(number)["workload"] for number in (1, 2)] == ["unknown", "unknown"]


def test_a_workload_that_was_named_and_is_gone_may_nothing(tmp_path: Path) -> None:
    with Serving(tmp_path, OPEN, workload="app") as it, it.connect(INSPECTED) as kept:
        assert it.ask(kept).status == 200
        it.swap(OPEN.replace("app:", "other:"))
        assert it.ask(kept).reason == "unknown_workload"
        assert it.record(1)["workload"] == "app"


def test_a_user_who_became_another_workloads_takes_no_rights_along(tmp_path: Path) -> None:
    """The credential was verified when the connection began; whose it is, the policy in force says."""
    user, admits = "match: {user: ci}", f"rules: [{{host: {HOST}, ports: [80]}}]"
    before = f"version: 1\nworkloads: {{builder: {{{user}, {admits}}}, other: {{rules: []}}}}\n"
    after = f"version: 1\nworkloads: {{builder: {{{admits}}}, other: {{{user}, rules: []}}}}\n"
    records: list[Record] = []

    def ask(sock: socket.socket) -> str | None:
        sock.sendall(get())
        return read_reply(sock)[0].reason

    async def talk(configuration: Configuration) -> list[str | None]:
        in_force = policy_of(before)
        inspector = Inspector(lambda: configuration, lambda: write_policy(in_force), records.append)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname(), timeout=PATIENCE_S)
            accepted, source = listener.accept()
        inspector.inspect(accepted, Handover(new_id(), "builder", None, 80, True, source, None, 0.0, user="ci"))
        with client:
            reasons = [await asyncio.to_thread(ask, client)]
            in_force = policy_of(after)
            await inspector.swap()
            reasons.append(await asyncio.to_thread(ask, client))
        await inspector.drain()
        return reasons

    with Rig(tmp_path, plain=True, workload=None) as rig:
        assert asyncio.run(talk(rig.configuration())) == [None, "no_rule"]
    assert [record["workload"] for record in records] == ["builder", "other"]


def test_a_name_that_a_lookup_gave_counts_no_more_once_it_is_closed(tmp_path: Path) -> None:
    def policy(*rules: str) -> str:
        return of_app(*rules, "{dns: db.test}")

    both = policy(f"{{host: {INSPECTED}, tls: inspect, ports: [5432]}}", "tcp: db.test:5432")
    with Serving(tmp_path, both, destination=(DESTINATION, 5432)) as it:
        told = [ip_address("198.51.100.7")]
        it.loop.call(lambda: it.gate._lookups.note("app", Hostname("db.test"), told, 1e12))
        for reason in ("name_not_found", "wrong_protocol"):
            with it.dial() as sock:
                sock.sendall(b"\0\0\0\x08\x04\xd2\x16\x2f")  # PostgreSQL: SSLRequest
                try:
                    read_all(sock)
                except OSError:
                    pass
            if reason == "name_not_found":
                eventually(lambda: it.records, "the first record")
                it.swap(policy("{host: db.test, deny: all}"))
        assert it.record(0)["server.names"] == ["db.test"]
        assert (it.record(1)["verdict"], it.record(1)["reason"]) == ("deny", "deny_rule")
        it.swap(OPEN.replace("app:", "other:"))
        assert it.loop.call(lambda: it.gate._lookups._told) == {}


# --- the inspector --------------------------------------------------------------------------------------------------


def start(serving: Serving) -> int:
    with serving.connect(INSPECTED) as sock:
        assert serving.ask(sock).status == 200
    return serving.inspector


def swap_beside(serving: Serving, text: str) -> threading.Thread:
    """Begin a swap, which waits for something."""
    thread = threading.Thread(target=serving.swap, args=(text,))
    thread.start()
    eventually(lambda: serving.gate.generation == policy_of(text).generation, "the gate's own swap")
    return thread


@ONLY_MITMPROXY
def test_an_inspector_that_is_killed_during_a_swap_comes_back_with_the_newest_policy(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "FIRST_PAUSE_S", 0.0)
    first = start(serving)
    os.kill(first, signal.SIGSTOP)
    swapping = swap_beside(serving, NARROW)
    assert swapping.is_alive()
    os.kill(first, signal.SIGKILL)
    swapping.join(PATIENCE_S)
    assert not swapping.is_alive()
    eventually(lambda: serving.gate._inspector._back_off.is_over, "the pause")
    with serving.connect(INSPECTED) as sock:
        assert serving.ask(sock).reason == "no_allow_entry"
    assert serving.inspector != first


@ONLY_MITMPROXY
def test_a_swap_while_the_inspector_starts_ends_with_the_newest_policy(serving: Serving) -> None:
    serving.loop.call(serving.gate.start_inspector)
    serving.swap(of_app())
    serving.swap(NARROW)
    with serving.connect(INSPECTED) as sock:
        assert serving.ask(sock).reason == "no_allow_entry"


def test_swaps_at_once_end_with_the_newest_policy(serving: Serving) -> None:
    with serving.connect(INSPECTED) as sock:
        assert serving.ask(sock).status == 200

    async def both() -> None:
        policies = [write_policy(policy_of(text)) for text in (of_app(), MOVED, OPEN, NARROW)]
        await asyncio.gather(*map(serving.gate.swap, policies))

    serving.run(both())
    with serving.connect(INSPECTED) as sock:
        assert serving.ask(sock).reason == "no_allow_entry"


@ONLY_MITMPROXY
def test_an_inspector_that_does_not_take_a_policy_is_not_left_to_judge_by_the_former(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = start(serving)
    with serving.connect(INSPECTED) as kept:
        assert serving.ask(kept).status == 200
        monkeypatch.setattr(host, "START_S", 0.2)
        os.kill(stuck, signal.SIGSTOP)
        serving.swap(NARROW)
        with pytest.raises(ProcessLookupError):
            os.kill(stuck, 0)
        assert serving.ask(kept).status == 0


@ONLY_MITMPROXY
def test_a_policy_that_finds_no_free_descriptor_arrives_later(serving: Serving) -> None:
    """Connections may have taken them all; the old policy must not stay for that."""
    pid = start(serving)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with serving.connect(INSPECTED) as kept:
        assert serving.ask(kept).status == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        swapping = swap_beside(serving, NARROW)
        eventually(lambda: serving.gate._inspector._sent > 4, "some attempts")
        assert swapping.is_alive()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        swapping.join(PATIENCE_S)
        assert serving.ask(kept).reason == "no_allow_entry"


# --- records that cannot be written ---------------------------------------------------------------------------------


def test_while_records_cannot_be_written_everything_is_denied_with_that_reason(serving: Serving) -> None:
    with serving.connect(INSPECTED) as kept, serving.connect(CARRIED) as carried:
        assert serving.ask(kept).status == 200
        serving.loop.call(lambda: serving.gate.close_for(Reason.LOG_FAILED))
        refused = serving.ask(kept)
        assert (refused.status, refused.reason) == (503, "log_failed")
        with pytest.raises(ssl.SSLError, match="INTERNAL_ERROR"):
            serving.connect(CARRIED)
        assert serving.ask(carried, host=CARRIED).status == 200
        serving.loop.call(lambda: serving.gate.close_for(None))
        assert serving.ask(kept).status == 200
        serving.connect(CARRIED).close()
    serving.record(5)
    assert sorted(str(record["reason"]) for record in serving.records) == ["log_failed"] * 2 + ["rule"] * 4


@ONLY_MITMPROXY
def test_an_inspector_that_starts_while_records_cannot_be_written_lets_nothing_through(serving: Serving) -> None:
    serving.loop.call(lambda: serving.gate.close_for(Reason.LOG_FAILED))
    serving.loop.call(serving.gate.start_inspector)
    serving.swap(NARROW)  # returns when the process judges
    door = socket.create_server(("127.0.0.1", 0))
    address = door.getsockname()
    serving.destination = (DESTINATION, 80)  # plain requests go to the inspector without a verdict of the listener
    serving.loop.call(lambda: serving.gate.listen(door))
    with socket.create_connection(address, timeout=PATIENCE_S) as sock:
        sock.sendall(get(host=INSPECTED))
        assert read_reply(sock)[0].reason == "log_failed"


# --- numbers --------------------------------------------------------------------------------------------------------


@ONLY_MITMPROXY
def test_it_tells_how_much_is_open(serving: Serving) -> None:
    with serving.connect(INSPECTED) as kept, serving.connect(CARRIED) as carried:
        assert serving.ask(kept).status == serving.ask(carried, host=CARRIED).status == 200
        assert serving.loop.call(serving.gate.stats)["outgate_connections_open"] == 1

        def inner() -> dict[str, object]:
            serving.loop.call(serving.gate.stats)
            return dict(serving.inner.sum())

        eventually(lambda: inner().get("outgate_connections_inspected") == 1, "the inspector's answer")
        assert inner()["outgate_leaves_remembered"] == 1
    os.kill(serving.inspector, signal.SIGKILL)
    eventually(lambda: not serving.inner.sum().get("outgate_leaves_remembered"), "the gauges of what is gone to go")
