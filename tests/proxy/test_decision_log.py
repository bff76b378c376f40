"""Records reach the stream whole and in order, and a stream that stalls is said in the log, not felt by the gate."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest

from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy import decision_log
from proxy.decision_log import DecisionLog, open_log
from proxy.record import Record, describe, hide_query_values, new_id, record_of

DENIAL = Verdict(Action.DENY, Reason.NO_RULE, Stage.TCP)


def record(number: int = 0) -> Record:
    return record_of(Attempt(Stage.TCP, "app", port=22), DENIAL, id=str(number), destination=("203.0.113.7", 22))


def test_records_are_json_lines_in_order(tmp_path: Path) -> None:
    log = open_log(str(tmp_path / "log"), generation="g1")
    for number in range(2000):
        log(record(number))
    log.close()

    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    assert [line["id"] for line in lines] == [str(number) for number in range(2000)]
    assert lines[0]["policy.generation"] == "g1"


class Stalled(io.StringIO):
    """A pipe whose reader has stopped, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.is_entered = threading.Event()

    def write(self, text: str) -> int:
        self.is_entered.set()
        assert self.go.wait(10)
        return super().write(text)


def test_stalled_stream_never_holds_a_caller_and_the_gap_is_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "QUEUE_LIMIT", 10)
    stream = Stalled()
    log = DecisionLog(stream)
    log(record())
    assert stream.is_entered.wait(10)
    for number in range(25):
        log(record(number))
    assert log.lost == 15
    stream.go.set()
    log.close()

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]

    assert {"event": "records_lost", "count": 15} in lines
    assert len(lines) == 12


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_full_disk_is_counted_and_ends_nothing() -> None:
    log = DecisionLog(Full())
    log(record())
    deadline = time.monotonic() + 10
    while log.lost == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert log.lost == 1
    log.close()


def test_terminal_shows_what_was_attempted_in_the_words_of_why() -> None:
    stream = io.StringIO()
    log = DecisionLog(stream, pretty=True)
    log(record())
    log.close()

    assert "deny   app  tcp://203.0.113.7:22  no_rule" in stream.getvalue()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stage": "tls", "server.name": "a.example", "destination.port": 443}, "tls://a.example"),
        ({"stage": "tls", "server.name": "a.example", "destination.port": 8443}, "tls://a.example:8443"),
        ({"stage": "dns", "server.name": "a.example", "destination.port": 53}, "dns://a.example"),
        ({"stage": "tcp", "destination.address": "2001:db8::1", "destination.port": 22}, "tcp://[2001:db8::1]:22"),
        ({"stage": "tcp", "server.names": ["g.example"], "destination.port": 22}, "tcp://g.example:22"),
        ({"stage": "http", "http.request.method": "GET", "url.full": "https://a.example/x"}, "GET https://a.example/x"),
    ],
)
def test_words_of_a_record(fields: Record, words: str) -> None:
    assert describe(fields) == words


class TestQueries:
    def test_values_are_hidden_and_names_are_not(self) -> None:
        hidden = hide_query_values("https://a.example/search?q=Oslo&apikey=s3cret&flag")
        assert hidden.startswith("https://a.example/search?q=~")
        assert not any(secret in hidden for secret in ("Oslo", "s3cret", "flag"))
        assert "&apikey=~" in hidden

    def test_same_value_is_the_same_hash(self) -> None:
        assert hide_query_values("/?a=x").partition("=")[2] == hide_query_values("/?b=x").partition("=")[2]

    def test_path_alone_stays(self) -> None:
        assert hide_query_values("https://a.example/x") == "https://a.example/x"


def test_ids_do_not_repeat() -> None:
    assert len({new_id() for _ in range(10_000)}) == 10_000
