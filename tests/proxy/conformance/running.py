"""Runs rows against one host, and says in words where it does otherwise than the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from zlib import crc32

from tests.proxy.conformance.client import Client, Cut, Malformed, Response
from tests.proxy.conformance.hostile import OriginRow, Read
from tests.proxy.conformance.hosts import TableRig
from tests.proxy.conformance.rows import Answered, Forwarded, Row


class Runner:
    """One host for many rows. What came late, of a row that had passed already, fails the next."""

    def __init__(self, host: str, rig: TableRig) -> None:
        self.host = host
        self._rig = rig
        self._records = 0
        self._forwarded = 0

    def run(self, row: Row, cut: Cut = Cut.WHOLE) -> list[str]:
        """What is wrong; nothing where the host does as the row says."""
        expected = row.outcome_on(self.host)
        wrong = list(self._leftovers("before this row"))
        at = crc32(row.id.encode()) % max(1, len(row.sent) - 1) + 1
        with self._rig.client(row.sni) as client:
            client.send(row.sent, cut, at)
            try:
                wrong += self._answers(row, client, expected.answers)
            except (Malformed, TimeoutError) as error:
                wrong.append(f"the client reads {error!r}")
        wrong += self._recorded(expected.answers)
        wrong += self._reached(expected.forwarded)
        wrong += self._leftovers("beside this row")
        return wrong

    def run_origin(self, row: OriginRow) -> list[str]:
        """What is wrong where an origin says what the row has it say."""
        expected = row.told_on(self.host)
        wrong = list(self._leftovers("before this row"))
        self._rig.strict.script = row.script
        reads, interim = [], []
        with self._rig.client(row.sni) as client:
            try:
                for request in row.asks:
                    client.send(request)
                    reads.append(_read(client.response(is_head=request.startswith(b"HEAD "))))
            except (Malformed, TimeoutError) as error:
                wrong.append(f"the client reads {error!r}")
            interim = client.interim
        if reads != list(expected.reads) and not (expected.breaks and _breaks(reads, expected.reads[0])):
            wrong.append(f"the client reads {reads}, not {list(expected.reads)}")
        if tuple(interim) != expected.interim:
            wrong.append(f"before them {interim}, not {list(expected.interim)}")
        records = self._rig.wait_for_records(self._records + len(expected.reasons))[self._records :]
        self._records += len(records)
        if (got := [record["reason"] for record in records]) != list(expected.reasons):
            wrong.append(f"records {got}, not {list(expected.reasons)}")
        wrong += self._leftovers("beside this row")
        return wrong

    def _answers(self, row: Row, client: Client, expected: Sequence[Answered]) -> Iterator[str]:
        is_head = row.sent.startswith(b"HEAD ")
        got = []
        closes = False
        for _ in expected:
            response = client.response(is_head=is_head)
            if response is None:
                break
            got.append(response.answered)
            closes = response.closes
            if not response.is_whole:
                yield f"the answer {response.status} breaks off"
        if got != list(expected):
            yield f"answers {_show(got)}, not {_show(expected)}"
        elif row.closes and not closes and expected[-1].is_refusal:
            yield "the last answer does not say that the connection ends"
        elif row.closes or closes:
            if more := client.rest():
                yield f"behind the last answer came {more[:200]!r}"
            if not client.ended_cleanly:
                yield "the connection was cut, so the client may not have seen its answer"

    def _recorded(self, expected: Sequence[Answered]) -> Iterator[str]:
        records = self._rig.wait_for_records(self._records + len(expected))[self._records :]
        self._records += len(records)
        got = [Answered(_status(one["http.response.status_code"]), str(one["reason"])) for one in records]
        if got != list(expected):
            yield f"records {_show(got)}, not {_show(expected)}"

    def _reached(self, expected: Sequence[Forwarded]) -> Iterator[str]:
        origin = self._rig.strict
        self._rig.wait_for(lambda: len(origin.forwarded) >= self._forwarded + len(expected))
        got = origin.forwarded[self._forwarded :]
        self._forwarded += len(got)
        if [one.canonical() for one in got] != [one.canonical() for one in expected]:
            yield f"the origin got {got}, not {list(expected)}"

    def _leftovers(self, when: str) -> Iterator[str]:
        rig, origin = self._rig, self._rig.strict
        if origin.violations:
            yield f"{when} the origin was sent {origin.violations}"
            origin.violations.clear()
        if len(origin.forwarded) != self._forwarded:
            yield f"{when} the origin got {origin.forwarded[self._forwarded :]}"
            self._forwarded = len(origin.forwarded)
        if len(rig.records) != self._records:
            yield f"{when} there are records {rig.records[self._records :]}"
            self._records = len(rig.records)
        if rig.failures:
            yield f"{when} the gate failed: {rig.failures!r}"
            rig.failures.clear()


def _breaks(reads: Sequence[Read], expected: Read) -> bool:
    """Whether it is a beginning of what is expected, and the client can tell that it is no more."""
    (read,) = reads
    return not read.is_whole and read.status in (None, expected.status) and expected.body.startswith(read.body)


def _read(response: Response | None) -> Read:
    if response is None:
        return Read(None, is_whole=False)
    is_ours = "outgate-decision" in response.fields
    return Read(response.status, b"" if is_ours else response.body, response.is_whole)


def _status(value: object) -> int:
    return value if isinstance(value, int) else 0


def _show(answers: Sequence[Answered]) -> str:
    return ", ".join(f"{one.status} {one.reason}" for one in answers) or "nothing"
