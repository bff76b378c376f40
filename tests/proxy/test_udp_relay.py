"""The UDP relay between real sockets on loopback: what is carried, what is not, and what is recorded of both."""

from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import ip_address
from math import inf

import pytest

from policies.hostnames import Hostname
from proxy.limits import Limits
from proxy.metrics.table import METRICS
from proxy.relays.stream import End
from proxy.relays.udp_sessions import MAX_WAITING, Lost
from proxy.relays.udp_sockets import parse_target
from proxy.resolver import Resolution
from tests.proxy.udp_gate import ECHO, Client, happens, lab, policy_of, run

ANY = '[{udp: {host: echo.example, ports: "1-65535"}}]'
NOTHING = "[]"


def test_datagrams_go_to_the_name_and_back() -> None:
    async def test() -> None:
        async with lab(ANY, limits=Limits(udp_idle_s=0.2)) as it:
            door = it.door()
            with Client(door) as client:
                assert await client.ask(b"one") == b"one"
                assert await client.ask(b"two and") == b"two and"
                assert [message for message, _ in it.server.received] == [b"one", b"two and"]
                ended = await it.record(verdict="allow")
            assert ended["flow.end"] == "idle"
            assert (ended["bytes.sent"], ended["bytes.received"]) == (10, 10)
            assert (ended["udp.datagrams.sent"], ended["udp.datagrams.received"]) == (2, 2)
            assert (ended["stage"], ended["reason"], ended["rule"]) == ("udp", "rule", "test.yaml:7 (app/rules[0])")
            assert (ended["upstream.address"], ended["upstream.port"]) == ("127.0.0.1", it.server.port)
            assert (ended["destination.address"], ended["destination.port"]) == door
            assert ended["policy.generation"] == "g1"

    run(test)


@pytest.mark.parametrize("size", [0, 1, 1200, 9000, 65_507])
def test_a_datagram_keeps_its_size(size: int) -> None:
    async def test() -> None:
        async with lab(ANY) as it:
            with Client(it.door()) as client:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    client.sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
                assert await client.ask(bytes(size)) == bytes(size)

    run(test)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_answer_comes_from_the_address_that_was_asked(host: str) -> None:
    async def test() -> None:
        async with lab(ANY) as it:
            wildcard = "::" if ":" in host else "0.0.0.0"
            with Client((host, it.door(host=wildcard)[1])) as client:  # connected: another source is not heard
                assert await client.ask(b"x") == b"x"

    run(test)


def test_each_client_gets_the_answers_to_its_own() -> None:
    async def test() -> None:
        async with lab(ANY) as it:
            door = it.door()
            clients = [Client(door) for _ in range(20)]
            for number, client in enumerate(clients):
                client.send(b"%d" % number)
            assert [await client.receive() for client in clients] == [b"%d" % number for number in range(20)]
            assert len({peer for _, peer in it.server.received}) == 20
            for client in clients:
                client.sock.close()

    run(test)


# --- denied


def test_what_is_denied_makes_no_state_no_lookup_and_one_record() -> None:
    async def test() -> None:
        async with lab(NOTHING) as it:
            with Client(it.door()) as client:
                for _ in range(50):
                    client.send(b"x")
                denied = await it.record(verdict="deny")
                assert (denied["reason"], denied["udp.datagrams"], denied["server.names"]) == ("no_rule", 1, [ECHO])
                await happens(lambda: it.relay._records._kinds and it.records, "all were read")
                it.relay.close()
            assert [record["udp.datagrams"] for record in it.records] == [1, 49]
            assert (len(it.relay._sessions), it.names.asked, it.server.received) == (0, [], [])

    run(test)


def test_a_flood_of_destinations_does_not_fill_the_log() -> None:
    from proxy.relays.udp_records import MAX_KINDS, DatagramRecords

    policy = policy_of(NOTHING)
    from policies.engine import decide
    from policies.model import Attempt, Stage

    records: list[dict[str, object]] = []
    told = DatagramRecords(records.append)
    for number in range(3 * MAX_KINDS):
        address = ip_address(0x0B000000 + number)
        attempt = Attempt(Stage.UDP, "app", port=9, address=address)
        told.denied(attempt, decide(policy, attempt), ("10.0.0.1", 1), (str(address), 9), "")
    told.flush()
    assert len(records) == MAX_KINDS + 2
    assert sum(int(str(record["udp.datagrams"])) for record in records) == 3 * MAX_KINDS


def addressed(*texts: str, from_hosts: bool = False) -> Resolution:
    return Resolution(tuple(map(ip_address, texts)), inf, from_hosts=from_hosts)


NOWHERE: dict[str, tuple[str, Resolution | None, str]] = {
    "a name that turns private": (ANY, addressed("10.0.0.1", "fd00::1"), "private_address"),
    "a name that turns to metadata": (ANY, addressed("169.254.169.254"), "never_reached"),
    "a name that turns to loopback": (ANY, addressed("127.0.0.1"), "never_reached"),
    "a name without addresses": (ANY, None, "name_not_found"),
}


@pytest.mark.parametrize("case", NOWHERE)
@pytest.mark.parametrize("is_cached", [True, False], ids=["known", "looked up"])
def test_a_name_that_leads_nowhere_is_denied_with_its_reason(case: str, is_cached: bool) -> None:
    rules, resolution, reason = NOWHERE[case]

    async def test() -> None:
        async with lab(rules, resolved={ECHO: resolution} if resolution else {}, is_cached=is_cached) as it:
            if resolution is None:
                del it.names.entries[ECHO]
            with Client(it.door()) as client:
                client.send(b"x")
                denied = await it.record(verdict="deny")
                assert denied["reason"] == reason
                assert denied["rule"] == "test.yaml:7 (app/rules[0])"
                assert len(it.relay._sessions) == 0
                assert it.server.received == []

    run(test)


def test_a_door_of_the_gates_own_is_no_destination() -> None:
    async def test() -> None:
        async with lab(ANY, is_own=lambda address, port: True) as it:
            with Client(it.door()) as client:
                client.send(b"x")
                assert (await it.record(verdict="deny"))["reason"] == "never_reached"
                assert it.names.asked == []

    run(test)


def test_a_name_that_leads_to_a_door_of_the_gates_own_is_not_dialled() -> None:
    async def test() -> None:
        own: set[int] = set()
        async with lab(ANY, is_own=lambda address, port: port in own) as it:
            own.add(it.server.port)
            with Client(it.door()) as client:
                client.send(b"x")
                assert (await it.record(verdict="deny"))["reason"] == "never_reached"
                assert it.server.received == []

    run(test)


def test_the_clients_address_is_not_dialled_for_a_rule_by_name() -> None:
    """Whoever asks 127.0.0.2 for that name is answered by what the gate resolved, in that address' name."""

    async def test() -> None:
        async with lab(ANY) as it:
            it.address_names["127.0.0.2"] = (ECHO,)
            with Client(("127.0.0.2", it.door(host="0.0.0.0")[1])) as client:
                assert await client.ask(b"x") == b"x"
                assert it.names.asked == [ECHO]

    run(test)


# --- forwarded


def test_a_port_that_forwards_is_an_attempt_on_its_target() -> None:
    async def test() -> None:
        async with lab("[{udp: 'echo.example:7'}]") as it:
            for text in ("echo.example:7", "echo.example:8", "other.example:7", "203.0.113.7:7", "[2001:db8::7]:7"):
                it.door(parse_target(text))
            named, port, other, v4, v6 = (door.sock.getsockname() for door in it.relay._doors)
            with Client(named) as client:
                assert await client.ask(b"x") == b"x"
            for door, reason in ((port, "port"), (other, "no_rule"), (v4, "no_rule"), (v6, "no_rule")):
                it.records.clear()
                with Client(door) as client:
                    client.send(b"x")
                    assert (await it.record(verdict="deny"))["reason"] == reason

    run(test)


# --- what others send


def test_a_third_party_is_not_heard_by_the_client() -> None:
    async def test() -> None:
        async with lab(ANY, answer=lambda message: None) as it:
            with Client(it.door()) as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as third:
                client.send(b"x")
                [(_, upstream)] = await happens(lambda: it.server.received, "the server heard")
                third.bind(("127.0.0.1", 0))
                third.sendto(b"forged", upstream)
                it.server.sock.sendto(b"true", upstream)
                assert await client.receive() == b"true"
                assert client.has_nothing()

    run(test)


def test_what_came_before_a_socket_had_its_peer_is_thrown_away() -> None:
    from proxy.relays import udp_sockets

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as o,
    ):
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        for _ in range(3):
            o.sendto(b"early", sock.getsockname())
        udp_sockets._empty(sock)
        with pytest.raises(BlockingIOError):
            sock.recv(1)


def test_a_server_that_is_not_there_is_said_and_the_session_goes_on() -> None:
    async def test() -> None:
        async with lab(ANY, limits=Limits(udp_idle_s=0.3)) as it:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            it.names.entries[ECHO] = replace(it.names.entries[ECHO], port=port)
            with Client(it.door()) as client:
                client.send(b"x")
                ended = await it.record(verdict="allow")
            assert ended["error.message"] == "connection refused"

    run(test)


# --- bounds


def test_one_source_does_not_shut_out_the_others() -> None:
    async def test() -> None:
        async with lab(ANY, limits=Limits(udp_sessions=100, udp_per_source=5)) as it:
            door = it.door()
            greedy = [Client(door) for _ in range(20)]
            for client in greedy:
                client.send(b"x")
            denied = await it.record(verdict="deny")
            assert denied["reason"] == "too_many_connections"
            with Client(door, "127.0.0.9") as other:
                assert await other.ask(b"still") == b"still"
            assert len(it.relay._sessions) == 6
            for client in greedy:
                client.sock.close()

    run(test)


def test_all_together_have_so_many_sessions() -> None:
    async def test() -> None:
        async with lab(ANY, limits=Limits(udp_sessions=3, udp_per_source=100)) as it:
            door = it.door()
            clients = [Client(door) for _ in range(5)]
            for client in clients:
                client.send(b"x")
            await it.record(verdict="deny", reason="too_many_connections")
            assert len(it.relay._sessions) == 3
            for client in clients:
                client.sock.close()

    run(test)


def test_few_datagrams_wait_for_a_name_and_the_rest_is_lost() -> None:
    async def test() -> None:
        async with lab(ANY, is_cached=False, limits=Limits(resolve_s=0.5)) as it:
            it.names.is_silent = True
            with Client(it.door()) as client:
                for number in range(10):
                    client.send(b"%d" % number)
                await happens(lambda: it.relay.counts.lost[Lost.WAITING] == 10 - MAX_WAITING, "the rest is lost")
                assert it.relay.is_waiting
                denied = await it.record(verdict="deny")
                assert denied["reason"] == "resolver_failed"
                assert (len(it.relay._sessions), it.relay.waiting._total) == (0, 0)
                assert it.names.asked == [ECHO, ECHO]  # what is known, then once for all who wait

    run(test)


def test_what_waited_is_sent_in_order_when_the_name_is_known() -> None:
    async def test() -> None:
        async with lab(ANY, is_cached=False) as it:
            with Client(it.door()) as client:
                for number in range(MAX_WAITING):
                    client.send(b"%d" % number)
                got = [await client.receive() for _ in range(MAX_WAITING)]
            assert got == [b"%d" % number for number in range(MAX_WAITING)]
            assert it.relay.waiting._total == 0

    run(test)


# --- budgets


def budget(amount: str, more: str = "") -> str:
    return f'[{{udp: {{host: echo.example, ports: "1-65535", budget: {amount}{more}}}}}]'


def test_a_budget_counts_both_ways_and_is_recorded_when_it_is_used_up() -> None:
    async def test() -> None:
        async with lab(budget("2000B/h")) as it:
            with Client(it.door()) as client:
                assert await client.ask(bytes(900)) == bytes(900)  # 928 bytes out, 928 back
                client.send(bytes(900))
                denied = await it.record(reason="budget")
            assert (denied["verdict"], denied["udp.datagrams"], denied["stage"]) == ("deny", 1, "udp")
            assert len(it.server.received) == 1
            assert it.relay.counts.lost[Lost.BUDGET] == 1

    run(test)


def test_an_answer_that_the_budget_does_not_pay_for_is_lost() -> None:
    async def test() -> None:
        async with lab(budget("1000B/h"), answer=lambda message: bytes(1200)) as it:
            with Client(it.door()) as client:
                client.send(b"x")
                await it.record(reason="budget")
                assert client.has_nothing()

    run(test)


def test_no_new_budget_comes_of_reconnecting_another_port_or_a_reload() -> None:
    async def test() -> None:
        async with lab(budget("2000B/h"), limits=Limits(udp_idle_s=0.1)) as it:
            door = it.door()
            with Client(door) as client:
                await client.ask(bytes(900))
            await it.record(verdict="allow", reason="rule")  # the session is over
            for change in ("another port", "a reload", "a larger one for another"):
                it.records.clear()
                if change == "a reload":
                    it.use("[{dns: moved.example}, " + budget("2000B/h")[1:])
                    it.relay._tidy()
                if change == "a larger one for another":
                    it.use(budget("2000B/h")[:-1] + ", {udp: {host: other.example, ports: 1, budget: 1GiB/h}}]")
                with Client(door, "127.0.0.1") as client:
                    client.send(bytes(900))
                    await it.record(reason="budget")
            assert len(it.server.received) == 1

    run(test)


def test_empty_datagrams_are_not_free() -> None:
    async def test() -> None:
        async with lab(budget("100B/h")) as it:
            with Client(it.door()) as client:
                assert await client.ask(b"") == b""
                client.send(b"")
                client.send(b"")
                await it.record(reason="budget")

    run(test)


def test_an_hour_later_there_is_a_budget_again() -> None:
    async def test() -> None:
        async with lab(budget("2000B/h")) as it:
            with Client(it.door()) as client:
                await client.ask(bytes(900))
                it.clock.now += 3500
                client.send(bytes(900))
                await it.record(reason="budget")
                it.clock.now += 200
                assert await client.ask(bytes(900)) == bytes(900)

    run(test)


# --- another policy


def test_a_session_ends_with_the_rule_that_admitted_it() -> None:
    async def test() -> None:
        async with lab(ANY) as it:
            with Client(it.door()) as client:
                await client.ask(b"before")
                it.use(NOTHING)
                client.send(b"after")
                assert (await it.record(verdict="deny"))["reason"] == "no_rule"
                ended = await it.record(verdict="allow")
                assert (ended["flow.end"], ended["policy.generation"]) == ("reset", "g1")
                assert len(it.server.received) == 1

    run(test)


def test_an_answer_does_not_pass_either_once_the_rule_is_gone() -> None:
    async def test() -> None:
        async with lab(ANY) as it:
            with Client(it.door()) as client:
                await client.ask(b"before")
                it.use(NOTHING)
                it.server.sock.sendto(b"late", it.server.received[0][1])
                await it.record(verdict="allow")
                assert client.has_nothing()

    run(test)


def test_a_session_that_another_policy_admits_too_goes_on() -> None:
    async def test() -> None:
        async with lab(ANY) as it:
            with Client(it.door()) as client:
                await client.ask(b"before")
                it.use("[{dns: more.example}, " + ANY[1:])
                assert await client.ask(b"after") == b"after"
                assert len({peer for _, peer in it.server.received}) == 1
                it.relay.close()
            [ended] = it.records
            assert (ended["policy.generation"], ended["udp.datagrams.sent"]) == ("g2", 2)

    run(test)


def test_audit_lets_pass_and_says_what_it_would_have_said() -> None:
    async def test() -> None:
        async with lab(NOTHING, mode="audit") as it:
            with Client(it.door()) as client:
                assert await client.ask(b"x") == b"x"
                it.relay.close()
            [ended] = it.records
            assert (ended["verdict"], ended["would_be"], ended["reason"]) == ("allow", "deny", "no_rule")

    run(test)


# --- faults


def test_a_datagram_that_crashes_us_does_not_end_the_door() -> None:
    async def test() -> None:
        async with lab(ANY) as it:
            whole = it.names.cached

            def crash_once(name: Hostname) -> Resolution | None:
                it.names.cached = whole  # type: ignore[method-assign]  # a fault for one call
                raise RuntimeError("a fault")

            it.names.cached = crash_once  # type: ignore[method-assign]  # as above
            door = it.door()
            with Client(door) as client:
                client.send(b"lost")
                assert await client.ask(b"x") == b"x"
                assert [str(error) for error in it.crashes] == ["a fault"]
                assert len(it.relay._sessions) == 1
            it.crashes.clear()

    run(test)


class Broken(socket.socket):
    """A socket that cannot be read for a while."""

    faults = 2

    def recvmsg_into(self, *arguments: object) -> object:  # type: ignore[override]  # what it takes is not looked at
        if self.faults:
            self.faults -= 1
            raise OSError(100, "network is down")
        return super().recvmsg_into(*arguments)  # type: ignore[arg-type]  # as above


def test_a_socket_that_breaks_is_tried_again_and_readiness_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.relays.udp.PAUSE_S", 0.05)

    async def test() -> None:
        async with lab(ANY) as it:
            from proxy.relays.udp_sockets import BoundDoor

            sock = Broken(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
            it.relay.serve(BoundDoor(sock))
            failing = [it.relay.is_failing]
            with Client(sock.getsockname()) as client:
                assert await client.ask(b"x") == b"x"
            failing.append(it.relay.is_failing)
            assert failing == [True, False]
            assert len(it.crashes) == 2
            it.crashes.clear()

    run(test)


def test_the_metrics_have_every_way_to_lose_a_datagram() -> None:
    async def test() -> None:
        async with lab(ANY) as it:
            with Client(it.door()) as client:
                await client.ask(b"x")
            stats = it.relay.stats()
            assert stats["outgate_udp_sessions"] == 1
            assert stats["outgate_udp_datagrams_total|sent"] == stats["outgate_udp_datagrams_total|received"] == 1
            assert METRICS["outgate_udp_lost_total"].labels["why"] == tuple(Lost)
            assert End.IDLE in METRICS["outgate_flows_total"].labels["end"]

    run(test)
