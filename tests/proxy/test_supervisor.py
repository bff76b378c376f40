"""A supervisor on the loop of the test, with real workers: what it does about those that fail, and what it says."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pki.authority import YEAR
from proxy.config import Config, DoorKind, GateMode, HttpHost, OnLogFailure
from proxy.options import Unready
from proxy.service import reloading
from proxy.service import supervisor as supervising
from proxy.service.compiler import compile_policy
from proxy.service.doors import OpenDoor, open_doors
from proxy.service.status import ReloadOutcome, ReloadResult
from proxy.service.supervisor import Supervisor
from proxy.service.watch import Watch
from proxy.worker import host
from proxy.worker.messages import (
    Answer,
    Configuration,
    Door,
    Failed,
    Finish,
    Judge,
    Judging,
    LogTurns,
    LookupRings,
    Question,
    Refused,
    Reopen,
    Said,
    Sign,
    Signing,
    Told,
    ToOpener,
    from_bytes,
    to_bytes,
)
from tests.end_to_end.service import ask_for, children
from tests.proxy.commands_of import invoke
from tests.proxy.rotating import new_store, renew_issuing

WAIT_S = 20.0  # generous: others load the machine
POLICY = "version: 1\nworkloads:\n  app:\n    rules:\n      - host: api.example\n"
OTHER = POLICY.replace("api", "other")
THIRD = POLICY.replace("api", "third")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return Config(
        mode=GateMode.PROXY,
        policy=(str(path),),
        workload="app",
        proxy_listen=(("127.0.0.1", 0),),
        log=str(tmp_path / "decisions.jsonl"),
        admin=None,
        grace_s=0.5,
    )


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are asked how they are more often than once a second."""
    monkeypatch.setattr(supervising, "ASK_S", 0.05)


@asynccontextmanager
async def supervised(config: Config) -> AsyncIterator[tuple[Supervisor, OpenDoor]]:
    """A service that serves, and its door. All of its processes are gone afterwards, however it went."""
    (door,) = open_doors(config)
    it = Supervisor(config, (door,))
    stop = asyncio.Event()
    try:
        await it.start()
        running = asyncio.create_task(it.run(stop, asyncio.Event()))
        yield it, door
        stop.set()
        await running
    finally:
        await it.finish(asyncio.Event())
        assert workers() == []


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * WAIT_S):
            await test()

    asyncio.run(bounded())


def workers() -> list[int]:
    return sorted(children(os.getpid(), "proxy.worker.main"))


async def until(true: Callable[[], object], what: str) -> None:
    async def look() -> None:
        while not true():  # noqa: ASYNC110 - what is looked at happens in other processes
            await asyncio.sleep(0.01)

    try:
        await asyncio.wait_for(look(), WAIT_S)
    except TimeoutError:
        pytest.fail(f"did not happen: {what}")


def write(config: Config, text: str) -> None:
    Path(config.policy[0]).write_text(text)


# --- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_says_nothing_is_replaced(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "SILENCE_S", 1.0)

    async def test() -> None:
        async with supervised(config) as (it, _):
            [worker] = workers()
            os.kill(worker, signal.SIGSTOP)
            await until(lambda: it.ready() == ["worker 1 is not running"], "it is given up")
            await until(lambda: it.ready() == [], "another serves")
            assert workers() != [worker]

    run(test)
    assert "worker 1 was silent for 1 s; it is started again in 0.1 s\n" in capsys.readouterr().err


def test_a_worker_that_hangs_turns_readiness_red_until_it_answers(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "HUSH_S", 0.5)

    async def test() -> None:
        async with supervised(config) as (it, _):
            [worker] = workers()
            os.kill(worker, signal.SIGSTOP)
            await until(lambda: it.ready() == ["worker 1 does not answer"], "it is missed")
            os.kill(worker, signal.SIGCONT)
            await until(lambda: it.ready() == [], "it answers again")
            assert workers() == [worker]

    run(test)


def test_a_worker_that_was_told_to_end_is_replaced(config: Config) -> None:
    async def test() -> None:
        async with supervised(config) as (it, _):
            [worker] = workers()
            os.kill(worker, signal.SIGTERM)
            await until(lambda: worker not in workers() and it.ready() == [] and workers(), "another serves")

    run(test)


def test_a_worker_that_speaks_nonsense_is_replaced(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    is_mad = False

    def read(text: bytes) -> Told | Said:
        return from_bytes(b'{"Nonsense": {}}' if is_mad else text)

    monkeypatch.setattr(host, "from_bytes", read)

    async def test() -> None:
        nonlocal is_mad
        async with supervised(config) as (it, _):
            [worker] = workers()
            is_mad = True
            await until(lambda: it.ready() == ["worker 1 is not running"], "it is given up")
            is_mad = False
            await until(lambda: it.ready() == [], "another serves")
            assert workers() != [worker]

    run(test)


def test_one_that_ends_again_and_again_is_started_ever_later(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with supervised(config) as (it, _):
            for _ in range(3):
                await until(lambda: it.ready() == [] and workers(), "one serves")
                os.kill(workers()[0], signal.SIGKILL)
                await until(lambda: it.ready() != [], "it is missed")

    run(test)
    said = capsys.readouterr().err
    assert [f"started again in {pause} s\n" in said for pause in ("0.1", "0.2", "0.4")] == [True] * 3


# What is wrong with a service that cannot start, and what is said.
UNREADY: dict[str, tuple[dict[str, Any], str]] = {  # Any: fields of several types
    "a log that cannot be opened": ({"log": "/nowhere/log"}, r"worker 1 failed: .*No such file.*/nowhere/log"),
    "credentials that cannot be read": ({"credentials": "/nowhere/users"}, r"worker 1 failed: .*/nowhere/users"),
    "no policy": ({"policy": ("/nowhere/policy.yaml",)}, r"/nowhere/policy\.yaml:1:1: cannot be read"),
}


@pytest.mark.parametrize("case", UNREADY)
def test_a_service_that_cannot_start_says_why_and_leaves_nothing(
    config: Config, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    fields, said = UNREADY[case]

    async def test() -> None:
        with pytest.raises(Unready, match=said):
            async with supervised(replace(config, **fields)):
                pytest.fail("it serves")

    run(test)
    assert capsys.readouterr().err == ""  # who started it says it, once


def test_a_worker_that_takes_too_long_at_the_start_is_not_waited_for(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "START_S", 0.05)

    async def test() -> None:
        with pytest.raises(Unready, match=r"worker 1 did not serve within 0\.05 s"):
            async with supervised(config):
                pytest.fail("it serves")

    run(test)


def test_a_service_that_is_stopped_while_it_starts_leaves_nothing(config: Config) -> None:
    async def test() -> None:
        it = Supervisor(config, open_doors(config))
        starting = asyncio.create_task(it.start())
        await until(workers, "a worker is started")
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await it.finish(asyncio.Event())
        assert children(os.getpid(), "proxy.") == []

    run(test)


# --- reloads ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_does_not_take_the_new_policy_over_turns_readiness_red_when_it_had_its_time(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "SWAP_S", 0.5)

    async def test() -> None:
        async with supervised(replace(config, workers=2)) as (it, _):
            worker = workers()[0]
            os.kill(worker, signal.SIGSTOP)
            write(config, OTHER)
            reload = asyncio.create_task(it.reload())
            while not reload.done():
                was_ready = it.ready()
                await asyncio.sleep(0.01)
                assert reload.done() or was_ready == []
            result = reload.result()
            assert result.outcome is ReloadOutcome.FAILED
            await until(lambda: len(it.ready()) == 1, "the other took it over, late or not")
            [because] = it.ready()
            assert because.endswith("judges by an older policy")
            assert because.replace("judges by an older policy", "does not go by it yet") in result.problems
            os.kill(worker, signal.SIGCONT)
            await until(lambda: it.ready() == [], "it took it over")

    run(test)


def test_a_worker_that_hung_through_two_reloads_judges_by_the_last(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to what it answered last: it has the policy between in its queue, and must not stay with that."""
    monkeypatch.setattr(reloading, "SWAP_S", 0.2)
    monkeypatch.setattr(host, "SILENCE_S", 60.0)
    first = Path(config.policy[0]).read_text()
    answered: list[str | None] = []
    heed = host.Worker._heed

    def note(worker: host.Worker, said: Told | Said) -> None:
        heed(worker, said)
        if isinstance(said, Judging):
            answered.append(said.generation)

    monkeypatch.setattr(host.Worker, "_heed", note)

    async def test() -> None:
        async with supervised(config) as (it, _):
            answered.clear()
            generation = it._workers[0].generation
            (worker,) = workers()
            os.kill(worker, signal.SIGSTOP)
            write(config, OTHER)
            assert (await it.reload()).outcome is ReloadOutcome.FAILED
            write(config, first)
            await it.reload()
            os.kill(worker, signal.SIGCONT)
            await until(lambda: len(answered) > 1, "it took both over")
            assert answered[-1] == generation
            await until(lambda: it.ready() == [], "it is ready")

    run(test)


def test_reloads_that_are_asked_for_during_one_are_one_more(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = 0
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def compile_slowly(*arguments: Any) -> Any:  # Any: what compile_policy takes and gives
        nonlocal compiled
        compiled += 1
        begun.set()
        await may_end.wait()
        return await compile_policy(*arguments)

    async def test() -> None:
        async with supervised(config) as (it, _):
            monkeypatch.setattr(reloading, "compile_policy", compile_slowly)
            write(config, OTHER)
            first = asyncio.create_task(it.reload())
            await begun.wait()
            write(config, THIRD)
            others = [asyncio.create_task(it.reload()) for _ in range(3)]
            await asyncio.sleep(0)
            may_end.set()
            results = [await one for one in (first, *others)]
            assert compiled == 2
            assert len(set(results[1:])) == 1
            assert results[1].outcome in (ReloadOutcome.LOADED, ReloadOutcome.UNCHANGED)  # the first may have seen both
            assert results[1].generation == (await it.reload()).generation

    run(test)


def test_a_touched_file_is_no_new_policy(config: Config) -> None:
    async def test() -> None:
        async with supervised(config) as (it, _):
            before = await it.reload()
            os.utime(config.policy[0], ns=(1, 1))
            assert await it.reload() == before == ReloadResult(ReloadOutcome.UNCHANGED, before.generation)

    run(test)


def test_who_asked_and_went_away_stops_no_reload(config: Config) -> None:
    async def test() -> None:
        async with supervised(config) as (it, _):
            before = (await it.reload()).generation
            write(config, OTHER)
            asked = asyncio.create_task(it.reload())
            await asyncio.sleep(0)
            asked.cancel()
            result = await it.reload()
            assert result.generation != before

    run(test)


# --- issuing CAs ------------------------------------------------------------------------------------------------------


def test_an_issuing_ca_at_its_end_is_told_of_every_day(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervising, "REMIND_S", 0.02)
    monkeypatch.setattr(supervising, "DAY_S", 0.1)
    config = replace(config, pki=new_store(tmp_path, now=datetime.now(UTC) - 0.9 * YEAR))
    said = ""

    def reminded() -> int:
        nonlocal said
        said += capsys.readouterr().err
        return said.count("the issuing CA expires on")

    async def test() -> None:
        async with supervised(config) as (it, _):
            await until(lambda: reminded() > 2, "the third day")
            renew_issuing(tmp_path / "pki")
            await it.reload()
            reminded()
            before = said
            await asyncio.sleep(0.3)
            assert reminded() == before.count("the issuing CA expires on")

    run(test)


def test_a_store_that_can_be_read_again_is_read_although_no_file_has_changed(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a token was away."""

    async def never(_watch: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Watch, "changed", never)
    monkeypatch.setattr(supervising, "REMIND_S", 0.1)
    config = replace(config, pki=new_store(tmp_path))

    async def test() -> None:
        async with supervised(config) as (it, _):
            state = tmp_path / "pki" / "state.json"
            text = state.read_text()
            state.write_text("{}")
            assert (await it.reload()).outcome is ReloadOutcome.REFUSED
            assert it.notes() == ["the issuing CAs cannot be replaced by those of the store; the former stay in force"]
            state.write_text(text)
            await until(lambda: it.notes() == [], "it is read again")

    run(test)


def test_a_worker_that_does_not_take_the_new_issuing_ca_over_turns_readiness_red(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "SWAP_S", 0.5)
    config = replace(config, pki=new_store(tmp_path))

    async def test() -> None:
        async with supervised(config) as (it, _):
            (worker,) = workers()
            os.kill(worker, signal.SIGSTOP)
            renew_issuing(tmp_path / "pki")
            result = await it.reload()
            assert (result.outcome, result.problems) == (
                ReloadOutcome.FAILED, ("worker 1 does not go by it yet",)
            )  # fmt: skip
            assert it.ready() == ["worker 1 signs by issuing CAs that were replaced"]
            os.kill(worker, signal.SIGCONT)
            await until(lambda: it.ready() == [], "it took it over")

    run(test)


# --- readiness --------------------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_turns_readiness_red_where_nothing_may_pass_unrecorded(config: Config) -> None:
    config = replace(config, log="/dev/full", on_log_failure=OnLogFailure.DENY)

    async def test() -> None:
        async with supervised(config) as (it, door):
            assert it.ready() == []
            assert await asyncio.to_thread(ask, door, "denied.example:443") == 403
            await until(lambda: it.ready(), "the log fails")
            assert it.ready() == ["worker 1 cannot write the decision log, and denies everything"]
            assert await asyncio.to_thread(ask, door, "api.example:443") == 503

    run(test)


def test_an_inspector_that_keeps_ending_turns_readiness_red_until_one_stays(config: Config, tmp_path: Path) -> None:
    invoke("pki", "init", "--pki", str(tmp_path / "pki"))
    roots = tmp_path / "roots.pem"
    roots.write_text("no certificate")
    write(config, POLICY + "        tls: inspect\n        http2: true\n")
    config = replace(config, pki=str(tmp_path / "pki"), upstream_ca=str(roots))

    async def test() -> None:
        async with supervised(config) as (it, _):
            await until(lambda: it.ready() == ["worker 1 has an inspector that keeps ending"], "it ended twice")
            roots.write_bytes(b"".join(path.read_bytes() for path in (tmp_path / "pki").rglob("*.crt")))
            await until(lambda: it.ready() == [], "nobody had to ask for it")

    run(test)


@pytest.mark.parametrize(
    ("rule", "host", "count"),
    [
        ("        tls: inspect\n", HttpHost.AUTO, 0),
        ("        tls: inspect\n        http2: true\n", HttpHost.AUTO, 1),
        ("        tls: inspect\n", HttpHost.MITMPROXY, 1),
        ("", HttpHost.MITMPROXY, 0),
    ],
    ids=["HTTP/1.1 is the lane's", "HTTP/2", "mitmproxy for everything", "nothing is inspected"],
)
def test_the_inspector_is_started_beside_the_first_policy_where_something_needs_it(
    config: Config, tmp_path: Path, rule: str, host: HttpHost, count: int
) -> None:
    invoke("pki", "init", "--pki", str(tmp_path / "pki"))
    write(config, POLICY + rule)
    config = replace(config, pki=str(tmp_path / "pki"), http_host=host)

    async def test() -> None:
        async with supervised(config) as (it, _):
            (worker,) = workers()
            await until(lambda: it.ready() == [], "it is ready")
            await until(lambda: len(children(worker, "proxy.inspector.main")) == count, "as many as are needed")

    run(test)


def test_a_dns_socket_that_cannot_be_served_turns_readiness_red(config: Config) -> None:
    async def test() -> None:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))  # and does not listen
            doors = (*open_doors(config), OpenDoor(DoorKind.DNS, (deaf,)))
            it = Supervisor(config, doors)
            await it.start()
            asking = asyncio.create_task(it.run(stop := asyncio.Event(), asyncio.Event()))
            try:
                await until(lambda: it.ready() == ["worker 1 cannot answer DNS (Invalid argument)"], "it was tried")
            finally:
                stop.set()
                await asking
                await it.finish(asyncio.Event())

    run(test)


def test_a_service_that_starts_or_ends_is_not_ready(config: Config) -> None:
    async def test() -> None:
        (door,) = open_doors(config)
        it = Supervisor(config, (door,))
        assert it.ready() == ["worker 1 is not running"]
        starting = asyncio.create_task(it.start())
        await until(lambda: it.ready() == ["worker 1 is starting"], "it starts")
        await starting
        assert it.ready() == []
        ending = asyncio.create_task(it.finish(asyncio.Event()))
        await asyncio.sleep(0)
        assert it.ready() == ["the gate is ending"]
        await ending

    run(test)


def test_a_log_that_cannot_be_written_is_a_note_where_work_goes_on_without_it(config: Config) -> None:
    async def test() -> None:
        async with supervised(replace(config, log="/dev/full")) as (it, door):
            assert await asyncio.to_thread(ask, door, "denied.example:443") == 403
            await until(it.notes, "the log fails")
            assert (it.ready(), it.notes()) == ([], ["worker 1 cannot write the decision log"])

    run(test)


def ask(door: OpenDoor, target: str) -> int:
    with socket.create_connection(door.address, WAIT_S) as sock:
        return ask_for(sock, target)


# --- messages ---------------------------------------------------------------------------------------------------------

MESSAGES: list[Told | Said] = [
    LogTurns(), LookupRings(1, 3), Configuration(), Door("proxyListen"), Judge("0123456789ab", True),
    Sign("abc", "PEM"), ToOpener(),
    Question(), Reopen(), Finish(1.5), Judging("0123456789ab"), Signing("abc"),
    Refused("0123456789ab", "why"), Failed("why"),
    Answer(log_failing=True, inspector_failing=False, counted={"a": 1, "b": [1, 2]}),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_it_was_said(message: Told | Said) -> None:
    assert from_bytes(to_bytes(message)) == message


def test_the_key_of_the_authority_is_in_no_text() -> None:
    assert "PEM" not in repr(Sign("abc", "PEM"))


@given(st.binary() | st.sampled_from([b"{}", b'{"Door": {}}', b'{"Door": 1}', b'[["Door", {}]]', b'{"Exit": {}}']))
def test_nonsense_is_told_as_such(text: bytes) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        from_bytes(text)
