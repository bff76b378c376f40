"""The gate around the DNS relay: a fault in it costs a moment of answers, and lets nothing through."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

import pytest

from policies.hostnames import Hostname
from policies.load import load
from policies.tree import Source
from proxy import kept_open
from proxy.hosts import HostsEntry
from proxy.original_dst import redirected_dst
from proxy.record import Record
from proxy.relays.dns_budget import NewNames
from proxy.runtime import Gate, Settings
from tests.proxy.dns_gate import NXDOMAIN, PUBLIC, SERVFAIL, addresses, bind, question, run, told

POLICY = "version: 1\nworkloads:\n  app:\n    rules: [{host: '*.cdn.example'}]"


def new_gate(records: list[Record]) -> Gate:
    policy = load([Source("test.yaml", POLICY)], catalogue={}, tags={}, is_public_suffix=lambda _: False)
    names = [Hostname(f"{name}.cdn.example") for name in "ab"]
    settings = Settings(
        issuing=str,
        workload="app",
        nameservers=[],
        hosts={name: HostsEntry((ip_address(PUBLIC),)) for name in names},
        new_names=NewNames(burst=1),
        search=[],
    )
    return Gate(policy, settings, original_dst=redirected_dst, record=records.append)


async def ask(port: int, name: str) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(("127.0.0.1", port))
        sock.send(question(name))
        return await asyncio.get_running_loop().sock_recv(sock, 4096)


def test_a_gate_answers_by_its_settings() -> None:
    async def test() -> None:
        records: list[Record] = []
        gate = new_gate(records)
        udp, tcp = bind("127.0.0.1")
        port = udp.getsockname()[1]
        for sock in (udp, tcp):
            gate.answer_dns(sock)
        assert told(await ask(port, "a.cdn.example")).addresses == addresses(PUBLIC)
        assert told(await ask(port, "b.cdn.example")).addresses == addresses(PUBLIC)  # of `hosts`: free
        assert told(await ask(port, "c.cdn.example")).rcode == SERVFAIL  # there is no name server
        assert told(await ask(port, "d.cdn.example")).rcode == NXDOMAIN
        assert [record["reason"] for record in records] == ["rule", "rule", "resolver_failed", "lookup_budget"]
        assert gate.stats()["outgate_dns_malformed_total"] == 0
        await gate.close()
        assert udp.fileno() == tcp.fileno() == -1

    run(test)


def test_a_fault_is_said_and_the_next_question_is_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kept_open, "PAUSE_S", 0.0)

    async def test() -> None:
        gate = new_gate([])
        faults = [RuntimeError("nobody foresaw it"), OSError("the socket is tired")]
        serve = gate._dns.serve_udp

        async def failing(sock: socket.socket) -> None:
            if faults:
                raise faults.pop()
            await serve(sock)

        monkeypatch.setattr(gate._dns, "serve_udp", failing)
        udp, tcp = bind("127.0.0.1")
        tcp.close()
        gate.answer_dns(udp)
        assert told(await ask(udp.getsockname()[1], "a.cdn.example")).addresses == addresses(PUBLIC)
        assert gate.unanswered == "DNS (RuntimeError)"  # for a while still: it may be the next fault's pause
        monkeypatch.setattr(kept_open, "SETTLED_S", 0.0)
        assert gate.unanswered == ""
        await gate.close()

    run(test)
    said = capsys.readouterr().err
    assert said.count("outgate: DNS failed inside the gate: ") == 2
    assert "nobody foresaw" not in said  # it may hold what a workload sent
