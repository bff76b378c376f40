"""Who a proxy client is: by its credentials, else by its address, else nobody; and nobody gets nothing."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from addons.credential import is_sealed
from proxy.explicit.credentials import hash_password, remove_credential, store_credential
from proxy.explicit.verifier import MAX_GUESSES
from proxy.limits import Limits
from tests.builders import policy
from tests.proxy.gates import at, eventually, origin, read_exactly
from tests.proxy.hellos import hello
from tests.proxy.proxying import BOB, UNMATCHED, authorization, connect, get, proxy

USERS = {"ann": "correct horse", "eve": "unmatched"}
ANN = authorization("ann", USERS["ann"])


def test_verified_user_has_the_rules_of_its_workload(tmp_path: Path) -> None:
    with (
        origin() as upstream,
        proxy(tmp_path, users=USERS, names={"a.example": at(upstream.address)}) as it,
        it.client() as client,
    ):
        assert client.ask(connect("a.example:443", ANN)).status == 200
        client.send(hello("a.example"))
        assert read_exactly(client.sock, len(hello("a.example"))) == hello("a.example")
        client.sock.close()
        record = it.record()
        assert (record["workload"], record["user.name"], record["verdict"]) == ("ann", "ann", "allow")
        assert "correct horse" not in str(record)


def test_credential_counts_more_than_the_address(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it:
        assert it.ask(connect("c.example:443", ANN), BOB).problem["workload"] == "ann"


def test_known_address_needs_no_credentials(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it:
        assert it.ask(connect("a.example:443"), BOB).problem["workload"] == "bob"
        assert "user.name" not in it.record()


def test_user_of_no_workload_is_who_its_address_says(tmp_path: Path) -> None:
    eve = authorization("eve", USERS["eve"])
    with proxy(tmp_path, users=USERS) as it:
        assert it.ask(connect("a.example:443", eve), BOB).problem["workload"] == "bob"
        answered = it.ask(connect("b.example:443", eve))
        assert (answered.status, answered.problem["reason"]) == (403, "unknown_workload")
        assert [record["user.name"] for record in it.gate.records] == ["eve", "eve"]


WRONG = {
    "wrong password": authorization("ann", "incorrect horse"),
    "wrong name": authorization("nobody", USERS["ann"]),
    "somebody else's password": authorization("ann", USERS["eve"]),
    "empty password": authorization("ann", ""),
    "other scheme": "Proxy-Authorization: Bearer abc",
    "no base64": "Proxy-Authorization: Basic !",
    "not UTF-8": "Proxy-Authorization: Basic /zph",
    "two of them": f"{ANN}\r\n{ANN}",
    "nothing": "Proxy-Authorization:",
}


@pytest.mark.parametrize("field", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("source", [UNMATCHED, BOB], ids=["unknown address", "known address"])
@pytest.mark.parametrize("request_of", [connect, get], ids=["CONNECT", "absolute form"])
def test_wrong_credentials_are_407_wherever_they_come_from(
    request_of: object, source: str, field: str, tmp_path: Path
) -> None:
    asked = connect("b.example:443", field) if request_of is connect else get("http://b.example/", field)
    with proxy(tmp_path, users={"ann": USERS["ann"]}) as it:
        answered = it.ask(asked, source)
        assert (answered.status, answered.problem["reason"]) == (407, "credentials")
        assert answered.fields["proxy-authenticate"] == 'basic realm="outgate", charset="utf-8"'
        record = it.record()
        assert (record["reason"], record["http.response.status_code"]) == ("credentials", 407)
        assert "user.name" not in record
        assert it.gate.handed == []


def test_challenge_keeps_the_connection_for_the_right_credentials(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it, it.client() as client:
        assert client.ask(connect("a.example:443")).status == 407
        assert client.ask(connect("a.example:443", authorization("ann", "wrong"))).status == 407
        assert client.ask(connect("a.example:443", ANN)).status == 200
        client.sock.close()
        eventually(lambda: it.reasons() == ["credentials", "credentials", "client_gone"])


def test_head_that_came_together_with_its_retry_is_read_after_it(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it, it.client() as client:
        client.send(connect("b.example:443") + connect("x.example:443", ANN))
        assert [client.answered().status for _ in range(2)] == [407, 403]


@pytest.mark.parametrize(
    "asked",
    [
        get("http://a.example/", "Content-Length: 5", method="POST") + b"hello",
        get("http://a.example/", "Transfer-Encoding: chunked", method="POST") + b"0\r\n\r\n",
        connect("a.example:443", "Connection: close"),
        connect("a.example:443", version="1.0"),
    ],
    ids=["a body", "a chunked body", "the client closes", "HTTP/1.0"],
)
def test_challenge_closes_where_more_could_be_misread(asked: bytes, tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it, it.client() as client:
        answered = client.ask(asked)
        assert (answered.status, answered.fields["connection"]) == (407, "close")
        assert client.is_closed()
        assert it.reasons() == ["credentials"]


def test_answer_to_head_has_no_body(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it, it.client() as client:
        client.send(get("http://a.example/", "Connection: close", method="HEAD"))
        head = client.read_to_end()
        assert head.startswith(b"HTTP/1.1 407 ")
        assert head.endswith(b"\r\n\r\n")


def test_challenges_of_one_connection_come_to_an_end(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it, it.client() as client:
        answers = [client.ask(connect("a.example:443")) for _ in range(8)]
        assert ["connection" in answered.fields for answered in answers] == [False] * 7 + [True]
        assert client.is_closed()


def test_kept_connection_that_asks_nothing_more_leaves_no_record(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS, limits=Limits(hello_s=0.3)) as it:
        with it.client() as client:
            assert client.ask(connect("a.example:443")).status == 407
        with it.client() as client:
            assert client.ask(connect("a.example:443")).status == 407
            assert client.is_closed()
        eventually(it.is_idle)
        assert it.reasons() == ["credentials"] * 2


def test_nobody_without_a_file_is_an_unknown_workload(tmp_path: Path) -> None:
    with proxy(tmp_path) as it:
        for asked in (connect("a.example:443"), connect("203.0.113.9:443"), get("http://b.example/")):
            answered = it.ask(asked)
            assert (answered.status, answered.problem["reason"]) == (403, "unknown_workload")
            assert "proxy-authenticate" not in answered.fields


def test_credentials_have_no_bearing_where_none_are_asked_for(tmp_path: Path) -> None:
    with proxy(tmp_path) as it:
        assert it.ask(connect("a.example:443", ANN), BOB).problem["workload"] == "bob"
        assert it.ask(connect("a.example:443", ANN)).problem["reason"] == "unknown_workload"


def test_unknown_has_its_rules_only_where_no_credentials_are_asked_for(tmp_path: Path) -> None:
    of = policy("version: 1\nworkloads: {unknown: {rules: [{host: b.example}]}}")
    with proxy(tmp_path, of=of) as it:
        assert it.ask(connect("b.example:443")).status == 200
    with proxy(tmp_path, of=of, users=USERS) as it:
        assert it.ask(connect("b.example:443")).status == 407
        assert it.ask(connect("b.example:443", authorization("eve", USERS["eve"]))).status == 200


# --- what the inspector is told ---


def test_plain_request_reaches_the_inspector_whole_and_with_who_it_is(tmp_path: Path) -> None:
    asked = get("http://a.example/x", ANN) + b"next"
    with proxy(tmp_path, users=USERS) as it, it.client() as client:
        client.send(asked)
        eventually(lambda: it.gate.handed, "the connection is handed over")
        ((sock, handover),) = it.gate.handed
        sock.settimeout(20)
        assert read_exactly(sock, len(asked)) == asked
        assert (handover.workload, handover.user, handover.port) == ("ann", "ann", 80)
        assert (handover.proxied, handover.plain, handover.host) == (True, True, None)
        assert handover.source == client.sock.getsockname()
        assert handover.credential is not None
        assert is_sealed(ANN.partition(": ")[2].encode(), handover.credential)
        assert not is_sealed(authorization("ann", "other").partition(": ")[2].encode(), handover.credential)
        assert USERS["ann"] not in repr(handover)
        assert it.is_idle()


def test_plain_request_by_address_carries_no_credential(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it, it.client(BOB) as client:
        client.send(get("http://b.example:8080/"))
        eventually(lambda: it.gate.handed, "the connection is handed over")
        ((_, handover),) = it.gate.handed
        assert (handover.workload, handover.user, handover.credential, handover.port) == ("bob", None, None, 8080)


def test_plain_request_in_a_tunnel_is_held_to_the_name_of_the_tunnel(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it, it.client() as client:
        assert client.ask(connect("a.example:80", ANN)).status == 200
        client.send(b"GET / HTTP/1.1\r\nHost: b.example\r\n\r\n")
        eventually(lambda: it.gate.handed, "the connection is handed over")
        ((_, handover),) = it.gate.handed
        assert (handover.host, handover.port, handover.user) == ("a.example", 80, "ann")
        assert (handover.proxied, handover.plain, handover.destination) == (False, True, None)


def test_gate_without_an_inspector_says_so(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS, has_inspector=False) as it:
        answered = it.ask(get("http://a.example/", ANN))
        assert (answered.status, answered.problem["reason"]) == (502, "gate_failed")


# --- guessing, and changes of the file ---


def test_guesses_of_one_source_wait_for_each_other_and_nobody_else_does(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS, failure_s=60, limits=Limits(hello_s=3)) as it, ExitStack() as stack:
        assert it.ask(connect("x.example:443", ANN), "127.0.0.9").status == 403  # remembered from now on
        guessing = [stack.enter_context(it.client()) for _ in range(4)]
        for number, client in enumerate(guessing):
            client.send(connect("a.example:443", authorization("ann", f"guess {number}")))
        assert it.ask(connect("x.example:443", ANN)).status == 403  # of the same source, but known
        assert it.ask(connect("x.example:443", authorization("eve", USERS["eve"])), "127.0.0.10").status == 403
        for client in guessing:
            answered = client.answered()
            assert (answered.status, answered.problem["reason"]) == (429, "too_many_connections")


def test_guesses_beyond_a_few_are_not_even_queued(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS, failure_s=60, limits=Limits(hello_s=3)) as it, ExitStack() as stack:
        for number in range(MAX_GUESSES):
            client = stack.enter_context(it.client())
            client.send(connect("a.example:443", authorization("ann", f"guess {number}")))
        eventually(lambda: it.gate.listener.open_connections == MAX_GUESSES)
        assert it.ask(connect("a.example:443", authorization("ann", "one more"))).status == 429
        assert it.ask(connect("x.example:443", ANN), "127.0.0.9").status == 403


def test_removed_user_is_refused_and_a_new_one_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.explicit.verifier.LOOK_S", 0.0)
    with proxy(tmp_path, users=USERS) as it:
        assert it.ask(connect("x.example:443", ANN)).status == 403
        remove_credential(it.users, "ann")
        assert it.ask(connect("x.example:443", ANN)).status == 407
        store_credential(it.users, "ann", hash_password(USERS["ann"]))
        assert it.ask(connect("x.example:443", ANN)).status == 403
        assert it.said == []


def test_client_that_leaves_while_it_is_verified_is_recorded_and_costs_no_other(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it:
        with it.client() as client:
            client.send(connect("a.example:443", ANN))
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        eventually(lambda: it.is_idle() and it.reasons() == ["client_gone"])
        assert it.ask(connect("x.example:443", ANN)).status == 403


def test_crowd_with_one_new_password_is_verified_once(tmp_path: Path) -> None:
    with proxy(tmp_path, users=USERS) as it:
        started = time.process_time()
        threads = [threading.Thread(target=it.ask, args=(connect("x.example:443", ANN),)) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert it.reasons() == ["no_rule"] * 40
        assert time.process_time() - started < 1.5  # 40 verifications take more than two seconds
