"""Records are written in order; a log that stalls or fails says so, in the log and to the gate, which never waits."""

from __future__ import annotations

import json
import os
import pty
import re
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.log import decision_log
from proxy.log.decision_log import DecisionLog, open_log
from proxy.log.target import Target, Turns
from proxy.record import Record, describe, hide_query_values, new_id, record_of
from tests.proxy.gates import PATIENCE_S, eventually

DENIAL = Verdict(Action.DENY, Reason.NO_RULE, Stage.TCP)


def record(number: int = 0) -> Record:
    return record_of(Attempt(Stage.TCP, "app", port=22), DENIAL, id=str(number), destination=("203.0.113.7", 22))


def read(text: str | bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def ids(lines: list[dict[str, object]]) -> list[int]:
    return [int(str(line["id"])) for line in lines if "id" in line]


def gaps(lines: list[dict[str, object]]) -> list[object]:
    return [line["count"] for line in lines if line.get("event") == "records_lost"]


def count_calls(monkeypatch: pytest.MonkeyPatch, of: Target, name: str) -> list[object]:
    """A list that grows by one for each call from now on."""
    calls: list[object] = []
    method = getattr(of, name)

    def call(argument: object) -> object:
        calls.append(argument)
        return method(argument)

    monkeypatch.setattr(of, name, call)
    return calls


class Pipe:
    """A FIFO that is full, and whose reader has stopped until `read`."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "pipe")
        os.mkfifo(self.path)
        self._reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        self._filled = 0
        try:
            while True:
                self._filled += os.write(writer, b"\n" * 4096)
        except BlockingIOError:
            os.close(writer)

    def read(self) -> threading.Thread:
        """Read on a thread until no writer is left, which `text` then holds."""
        os.set_blocking(self._reader, True)
        thread = threading.Thread(target=self._read)
        thread.start()
        return thread

    def _read(self) -> None:
        with open(self._reader, "rb") as file:
            file.read(self._filled)
            self.text = file.read()

    def close(self) -> None:
        os.close(self._reader)


class TestWriting:
    def test_records_are_json_lines_in_order(self, tmp_path: Path) -> None:
        log = open_log(str(tmp_path / "log"))
        for number in range(2000):
            log(record(number))
        log.close()
        assert ids(read((tmp_path / "log").read_text())) == list(range(2000))
        assert (log.written, log.lost_total, log.failures) == (2000, 0, 0)

    def test_generation_is_said_of_records_that_do_not_say_it(self, tmp_path: Path) -> None:
        log = open_log(str(tmp_path / "log"), generation="g1")
        log(record())
        log.generation = "g2"  # a reload
        log(record())
        log(record() | {"policy.generation": "g1"})  # judged before it
        log.close()
        lines = read((tmp_path / "log").read_text())
        assert [line["policy.generation"] for line in lines] == ["g1", "g2", "g1"]

    def test_file_is_appended_to_and_not_for_everyone_to_read(self, tmp_path: Path) -> None:
        for number in range(2):
            log = open_log(str(tmp_path / "log"))
            log(record(number))
            log.close()
        assert ids(read((tmp_path / "log").read_text())) == [0, 1]
        assert (tmp_path / "log").stat().st_mode & 0o007 == 0

    @pytest.mark.parametrize("target", [None, "-"])
    def test_standard_streams(self, target: str | None, capfd: pytest.CaptureFixture[str]) -> None:
        log = open_log(target)
        log(record(7))
        log.close()
        captured = capfd.readouterr()
        assert ids(read(captured.out if target is None else captured.err)) == [7]

    def test_terminal_shows_what_was_attempted_in_the_words_of_why(self) -> None:
        ours, theirs = pty.openpty()
        log = open_log(os.ttyname(theirs))
        log(record())
        log.close()
        shown = re.sub(rb"\x1b\[[0-9]*m", b"", os.read(ours, 4096)).decode()
        os.close(ours)
        os.close(theirs)
        assert "deny   app  tcp://203.0.113.7:22  no_rule" in shown


class TestStall:
    @pytest.fixture(autouse=True)
    def short_queue(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decision_log, "QUEUE_LIMIT", 10)

    @pytest.fixture
    def pipe(self, tmp_path: Path) -> Pipe:
        return Pipe(tmp_path)

    def test_never_holds_a_caller_and_the_gap_is_in_the_log(self, pipe: Pipe) -> None:
        log = open_log(pipe.path)
        log(record())
        eventually(lambda: not log._queue, "the writer has taken it and is stuck")
        before = time.time()
        for number in range(1, 26):
            log(record(number))
        assert log.lost_total == 15
        reading = pipe.read()
        eventually(lambda: log.written == 11, "everything queued is written")
        log.close()
        reading.join()
        lines = read(pipe.text)
        assert ids(lines) == list(range(11))
        assert gaps(lines) == [15]
        gap = lines[1]
        assert gap["event"] == "records_lost"
        assert before - 1 < datetime.fromisoformat(str(gap["since"])).timestamp() <= time.time()

    def test_that_lasts_is_a_failure_until_there_is_room(self, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
        changes: list[bool] = []
        log = open_log(pipe.path, changed=changes.append)
        monkeypatch.setattr(decision_log, "STALL_S", 1000.0)
        for number in range(30):
            log(record(number))
        assert log.lost_total > 0
        assert not log.is_failing  # it may be a moment's
        monkeypatch.setattr(decision_log, "STALL_S", 0.0)
        eventually(lambda: log(record()) or log.is_failing, "a loss later than that")  # type: ignore[func-returns-value]
        assert log.failure is not None
        assert log.failure.text == f"{pipe.path}: nothing is taken: whatever reads or keeps it has stalled"
        reading = pipe.read()
        eventually(lambda: not log.is_failing, "it has drained")
        log.close()
        reading.join()
        lines = read(pipe.text)
        assert changes == [True, False]
        assert log.failures == 1
        assert sum(map(int, map(str, gaps(lines)))) == log.lost_total
        assert len(ids(lines)) == log.written

    def test_long_urls_fill_the_queue_sooner(self, pipe: Pipe) -> None:
        """A client chooses how long they are: a stalled log must not hold tens of thousands of the longest."""
        log = open_log(pipe.path)
        log(record())
        eventually(lambda: not log._queue, "the writer has taken it and is stuck")
        for _ in range(10):
            log(record() | {"url.full": "https://a.example/" + "x" * 1500})
        assert log.lost_total == 7
        reading = pipe.read()
        log.close()
        reading.join()

    def test_close_gives_up_in_time_and_counts_what_is_left(self, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decision_log, "CLOSE_S", 0.1)
        log = open_log(pipe.path)
        log(record())
        eventually(lambda: not log._queue, "the writer has taken it and is stuck")
        log(record())
        log.close()
        assert log.lost_total == 2
        pipe.close()  # the thread's write ends in EPIPE
        log._thread.join(PATIENCE_S)


class TestFailure:
    def test_full_disk_is_a_failure_that_drops_nothing_before_the_queue_is_full(self) -> None:
        changes: list[bool] = []
        log = open_log("/dev/full", changed=changes.append)
        before = time.time()
        log(record(1))
        eventually(lambda: log.is_failing, "the disk is full")
        log(record(2))
        assert log.failure is not None
        assert log.failure.text == "/dev/full: No space left on device"
        assert before <= log.failure.since <= time.time()
        assert (log.written, log.lost_total, log.failures) == (0, 0, 1)
        log.close()
        assert (log.written, log.lost_total, log.failures) == (0, 2, 1)
        assert changes == [True]

    def test_reader_that_went_and_came_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was lost is said first, then what was kept follows; nothing is written twice."""
        path = tmp_path / "pipe"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        changes: list[bool] = []
        log = open_log(str(path), changed=changes.append)
        os.close(reader)
        log(record(0))
        eventually(lambda: log.is_failing, "nobody reads")
        assert log.failure is not None
        assert log.failure.text.endswith("pipe: Broken pipe")
        monkeypatch.setattr(decision_log, "QUEUE_LIMIT", 3)
        for number in range(1, 6):
            log(record(number))
        monkeypatch.setattr(decision_log, "RETRY_S", 0.01)
        tries = count_calls(monkeypatch, log._target, "append")
        eventually(lambda: len(tries) > 2, "the gap is tried, in vain")
        reader = os.open(path, os.O_RDONLY)
        eventually(lambda: changes == [True, False], "it is tried again")
        eventually(lambda: log.written == 4, "what was kept is written")
        log.close()
        with open(reader, "rb") as file:
            lines = read(file.read())
        assert gaps(lines[:1]) == [2]
        assert ids(lines) == [0, 1, 2, 3]
        assert log.lost_total == 2

    def test_change_is_told_to_a_loop_that_has_closed_without_harm(self, tmp_path: Path) -> None:
        def closed(_: bool) -> None:
            raise RuntimeError("Event loop is closed")

        log = open_log("/dev/full", changed=closed)
        log(record())
        eventually(lambda: log.is_failing, "the disk is full")
        log.close()
        assert not log._thread.is_alive()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_fault_of_the_log_itself_is_a_failure_for_good(self, tmp_path: Path) -> None:
        def fail(_: Record) -> bytes:
            raise ValueError("a fault")

        log = DecisionLog(Target(str(tmp_path / "log"), Turns()), fail)
        log(record())
        eventually(lambda: log.is_failing, "its thread has ended")
        log.close()
        assert log.is_failing

    def test_callback_may_record(self) -> None:
        """The gate may deny, and record it, on the thread that finds out."""
        log = open_log("/dev/full", changed=lambda _: log(record()))
        log(record())
        eventually(lambda: log.is_failing, "the disk is full")
        log.close()
        assert log.lost_total == 2


class TestReopen:
    def test_under_load_loses_and_doubles_nothing(self, tmp_path: Path) -> None:
        path, rotations = tmp_path / "log", 20
        log, number = open_log(str(path)), 0
        for rotation in range(rotations):
            wanted = log.written + 100
            while log.written < wanted:
                for _ in range(50):
                    log(record(number))
                    number += 1
                time.sleep(0)  # the writer is a thread of this process
            path.rename(tmp_path / f"log.{rotation}")
            log.reopen()
            eventually(path.exists, "the path is opened anew")
        log.close()
        files = [*(tmp_path / f"log.{rotation}" for rotation in range(rotations)), path]
        assert ids([line for file in files for line in read(file.read_text())]) == list(range(number))
        assert log.lost_total == 0

    def test_path_that_cannot_be_opened_is_a_failure_and_the_old_file_is_written_to(self, tmp_path: Path) -> None:
        path, old = tmp_path / "logs" / "log", tmp_path / "old" / "log"
        path.parent.mkdir()
        log = open_log(str(path))
        path.parent.rename(old.parent)
        log.reopen()
        eventually(lambda: log.is_failing, "nothing can be opened there")
        assert log.failure is not None
        assert log.failure.text == f"{path}: No such file or directory"
        log(record(1))
        eventually(lambda: log.written == 1, "the old file still takes records")
        path.parent.mkdir()
        eventually(lambda: not log.is_failing, "it is tried again")
        log(record(2))
        log.close()
        assert ids(read(old.read_text())) == [1]
        assert ids(read(path.read_text())) == [2]


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
