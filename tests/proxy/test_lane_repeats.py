"""What the lane remembers of the last head, record or session: it says the same as if it remembered nothing."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addons.judge import Conversation, Judgement
from addons.outcome import Outcome
from addons.precedents import Precedent
from policies.hostnames import Hostname
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.inspector.outcome import record_of_outcome
from proxy.lane.http1 import MAX_REPEATED, Refused, RequestReader, ResponseReader, parse_request, parse_response
from proxy.lane.tls import CONNECTIONS, Sessions
from tests.builders import WORKLOAD, rules

LINES = [b"GET / HTTP/1.1", b"POST /a HTTP/1.1", b"GET / HTTP/1.0", b"TRACE / HTTP/1.1", b"GET  / HTTP/1.1", b"get"]
BLOCKS = [
    b"Host: a\r\n",
    b"Host: a\r\nExpect: 100-continue\r\n",
    b"Host: a\r\nTransfer-Encoding: chunked\r\n",
    b"Host: a\r\nContent-Length: 3\r\n",
    b"Host: b\r\nUpgrade: websocket\r\nConnection: upgrade\r\n",
    b"Host: a\r\nHost: a\r\n",
    b"Host : a\r\n",
    b"",
    b"Host: a\r\nX: " + b"a" * MAX_REPEATED + b"\r\n",
]
STATUS = [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 304 \r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 100 \r\n"]


def outcome_of[T](read: Callable[[], T]) -> T | tuple[int, str]:
    try:
        return read()
    except Refused as refused:
        return refused.status, refused.why


@given(st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(BLOCKS)), max_size=8))
def test_requests_of_one_client_read_as_each_by_itself(heads: Sequence[tuple[bytes, bytes]]) -> None:
    reader = RequestReader()
    for line, block in heads:
        head = line + b"\r\n" + block + b"\r\n"
        assert outcome_of(partial(reader.read, head)) == outcome_of(partial(parse_request, head))


@given(st.lists(st.tuples(st.sampled_from(STATUS), st.sampled_from(BLOCKS), st.sampled_from(["GET", "HEAD"]))))
def test_responses_of_one_origin_read_as_each_by_itself(heads: Sequence[tuple[bytes, bytes, str]]) -> None:
    reader = ResponseReader()
    for line, block, method in heads:
        head = line + block + b"\r\n"
        expected = outcome_of(partial(parse_response, head, method))
        assert outcome_of(partial(reader.read, head, method)) == expected


# --- records ---

POLICY = rules("- host: api.example.com\n  tls: inspect")
VERDICT = Verdict(Action.ALLOW, Reason.RULE, Stage.HTTP)
ATTEMPT = Attempt(Stage.HTTP, WORKLOAD, Hostname("api.example.com"), 443, method="GET", target="/a?b=c")
UNLIKE = {"time", "duration_ms"}


def ended(
    id: str,
    precedent: Precedent | None,
    source: tuple[str, int] = ("10.0.0.1", 1),
    destination: tuple[str, int] | None = ("192.0.2.1", 443),
    user: str | None = None,
    upstream: tuple[str, int] | None = ("192.0.2.1", 443),
    status: int | None = 200,
    received: int = 7,
    verdict: Verdict = VERDICT,
    generation: str = "g1",
) -> Outcome:
    conversation = Conversation(WORKLOAD, 443, False, source, ATTEMPT.host, destination, user=user)
    judgement = Judgement(id, ATTEMPT, verdict, generation=generation, precedent=precedent)
    return Outcome(judgement, conversation, 1_700_000_000.0, upstream, status, 3, received)


@pytest.mark.parametrize(
    "unlike",
    [
        {},
        {"source": ("10.0.0.2", 2), "received": 9},
        {"destination": None},
        {"destination": ("192.0.2.2", 443)},
        {"user": "alice"},
        {"upstream": None},
        {"upstream": ("192.0.2.9", 443)},
        {"status": 404},
        {"status": None},
        {"generation": "g2"},
        {"verdict": Verdict(Action.ALLOW, Reason.CLIENT_GONE, Stage.HTTP)},
    ],
    ids=lambda unlike: ",".join(unlike) or "nothing",
)
def test_a_record_that_follows_another_is_the_one_it_would_be_alone(unlike: dict[str, object]) -> None:
    precedent = Precedent(ATTEMPT, VERDICT, None, "")
    first = record_of_outcome(POLICY, ended("id1", precedent))
    before = dict(first)
    again = record_of_outcome(POLICY, ended("id2", precedent, **unlike))  # type: ignore[arg-type]  # its own parameters
    alone = record_of_outcome(POLICY, ended("id2", None, **unlike))  # type: ignore[arg-type]
    assert {key: again[key] for key in again if key not in UNLIKE} == {
        key: alone[key] for key in alone if key not in UNLIKE
    }
    assert list(again) == list(alone)
    again["policy.generation"] = "changed by a sink"
    assert first == before
    assert record_of_outcome(POLICY, ended("id3", precedent, **unlike))["policy.generation"] != "changed by a sink"  # type: ignore[arg-type]


# --- sessions ---

ORIGIN = (WORKLOAD, Hostname("api.example.com"), 443)


class Connection:
    """A TLS connection to an origin that gives tickets, or does not. Counts how often it was asked for one."""

    asked = 0

    def __init__(self, has_ticket: bool, session_reused: bool = False) -> None:
        self.has_ticket = has_ticket
        self.session_reused = session_reused

    @property
    def session(self) -> Connection:
        Connection.asked += 1
        return self


def keep(sessions: Sessions, connection: Connection, *, was_offered: bool = False) -> bool:
    """After a connection like this: is there a session for the next one?"""
    sessions.keep(ORIGIN, cast(ssl.SSLSocket, connection), was_offered=was_offered)
    return sessions.take(ORIGIN) is not None


def test_an_origin_that_gives_no_tickets_is_asked_now_and_then() -> None:
    sessions, before = Sessions(), Connection.asked
    for _ in range(CONNECTIONS + 1):
        assert not keep(sessions, Connection(has_ticket=False))
    assert Connection.asked == before + 1
    assert keep(sessions, Connection(has_ticket=True))
    assert sessions.take(ORIGIN) is None


def test_an_origin_that_takes_none_of_its_tickets_back_is_offered_one_now_and_then() -> None:
    sessions = Sessions()
    assert keep(sessions, Connection(has_ticket=True))
    assert keep(sessions, Connection(has_ticket=True, session_reused=True), was_offered=True)
    assert not keep(sessions, Connection(has_ticket=True), was_offered=True)
    for _ in range(CONNECTIONS):
        assert not keep(sessions, Connection(has_ticket=True))
    assert keep(sessions, Connection(has_ticket=True))
