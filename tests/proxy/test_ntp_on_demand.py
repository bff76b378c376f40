"""Time for one command: whom it has asked, how often, and how long its first query waits."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from policies.load import load
from policies.model import Attempt, Verdict
from policies.tree import Source as PolicySource
from proxy.hosts import parse_host_options
from proxy.policy_in_force import PolicyInForce
from proxy.record import Record, show_peer
from proxy.relays.ntp.on_demand import HOLD_S, TimeOnDemand
from proxy.relays.ntp.source import Pace
from proxy.resolver import Resolver
from tests.proxy.dns_gate import run
from tests.proxy.nameserver import unused_port
from tests.proxy.ntp_servers import RESTING, Told, ask, right, silent, time_server, told, until

POLICY = "version: 1\nworkloads: {app: {rules: [{ntp: one.example}]}}\n"
PROMPT = replace(RESTING, min_samples=1, gap_s=0.0)


class Inside(PolicyInForce):
    """As in a sandbox, where clients ask addresses of others: those of this test are all loopback."""

    def decide(self, attempt: Attempt) -> Verdict:
        return super().decide(replace(attempt, address=None))


@asynccontextmanager
async def giving(
    server: str, records: list[Record], *, pace: Pace = PROMPT, hold_s: float = HOLD_S
) -> AsyncIterator[int]:
    """The port where a command asks; its server is at that address and port."""
    policy = load([PolicySource("test.yaml", POLICY)], catalogue={}, tags={}, is_public_suffix=lambda name: False)
    resolver = Resolver(parse_host_options([f"one.example={server}"]), [])
    inside = Inside(policy, "app")
    it = TimeOnDemand(
        inside, "app", resolver, records.append, is_own=lambda *_: False, pace=pace, hold_s=hold_s
    )  # fmt: skip
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        task = asyncio.create_task(it.serve(sock))
        try:
            yield sock.getsockname()[1]
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await it.close()


def test_queries_cause_no_polls_but_the_first_ones() -> None:
    async def test() -> None:
        async with time_server() as server, giving(show_peer(server.address), []) as port:
            answers = [told(await ask(port, source=f"127.0.0.{last}")) for last in range(1, 100)]
            assert {(answer.leap, answer.stratum) for answer in answers} == {(0, 3)}
            await server.wait_for(PROMPT.burst)
            answers += await asyncio.gather(*(_told(port, f"127.0.1.{last}") for last in range(1, 100)))
            assert len(server.received) == PROMPT.burst

    run(test)


async def _told(port: int, source: str) -> Told:
    return told(await ask(port, source=source))


def test_queries_wait_for_the_first_answer_and_all_get_it() -> None:
    async def test() -> None:
        quick = replace(PROMPT, timeout_s=0.2)
        async with time_server(silent) as server, giving(show_peer(server.address), [], pace=quick, hold_s=30) as port:
            waiting = [asyncio.create_task(ask(port, source=f"127.0.0.{last}")) for last in range(1, 20)]
            await server.wait_for(1)
            assert not any(task.done() for task in waiting)
            server.script = right
            answers = [told(message) for message in await asyncio.gather(*waiting)]
            assert {answer.leap for answer in answers} == {0}

    run(test)


def test_a_time_that_nobody_knows_is_told_when_the_wait_is_over() -> None:
    async def test() -> None:
        async with giving(f"127.0.0.1:{unused_port()}", [], hold_s=0.05) as port:
            for source in ("127.0.0.1", "127.0.0.2"):
                got = told(await ask(port, source=source))
                assert (got.leap, got.stratum) == (3, 16)

    run(test)


def test_what_was_counted_is_recorded_at_the_end() -> None:
    async def test() -> None:
        records: list[Record] = []
        async with time_server() as server, giving(show_peer(server.address), records) as port:
            for _ in range(5):
                await ask(port)
            await until(lambda: len(records) == 1)
        assert [record["ntp.packets"] for record in records] == [1, 4]

    run(test)
