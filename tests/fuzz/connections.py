"""Streams of nearly right requests through a lane to a strict origin: what was not judged never arrives."""

from __future__ import annotations

from random import Random
from urllib.parse import urlsplit

from tests.fuzz.claims import Disagreement
from tests.fuzz.making import a_body, a_request
from tests.proxy.conformance.hosts import TableRig
from tests.proxy.conformance.rows import HOST
from tests.proxy.inspecting import get

LAST = get("/denied/last")
QUIET_S = 0.3  # a stream may end within a body that its client never sends: nobody answers then
_NO_ANSWER = {"client_gone", "upstream_failed"}  # of requests that ended with their connection


def a_stream(random: Random) -> bytes:
    parts = []
    for _ in range(random.randrange(1, 5)):
        head = a_request(random).replace(b"HEAD ", b"GET ")  # whether an answer has a body is the client's to know
        parts.append(head)
        if b"chunked" in head.lower():
            parts.append(a_body(random))
        elif b"ontent-" in head:
            parts.append(b"x" * 5)
    return b"".join(parts) + LAST


def run(rig: TableRig, random: Random) -> int:
    """One connection. How many requests reached the origin; raises Disagreement where something is wrong."""
    origin = rig.strict
    stream = a_stream(random)
    forwarded, recorded = len(origin.forwarded), len(rig.records)
    answers, is_over = _converse(rig, random, stream)
    rig.wait_for(lambda: rig.lane.open_connections == 0)
    records = rig.records[recorded:]
    reached = origin.forwarded[forwarded:]
    if rig.failures:
        raise Disagreement("the gate failed", stream, rig.failures)
    if origin.violations:
        raise Disagreement("the origin was sent what is no request", stream, origin.violations)
    allowed = [(record["http.request.method"], _target(record)) for record in records if record["verdict"] == "allow"]
    for request in reached:
        method, target, _ = request.head.decode("latin-1").split(" ", 2)
        if (method, target.partition("?")[0]) not in allowed or target.startswith("/denied"):
            raise Disagreement("the origin was sent what was not allowed", stream, request, records)
        if f"\r\nHost: {HOST}" not in request.head.decode("latin-1"):
            raise Disagreement("the origin was asked for another host", stream, request)
    if len(reached) > len(allowed):
        raise Disagreement("the origin got more requests than were allowed", stream, reached, records)
    statuses = [record["http.response.status_code"] for record in records if record["reason"] not in _NO_ANSWER]
    if is_over and statuses != answers:
        raise Disagreement("there is not one record for each answer", stream, statuses, answers)
    return len(reached)


def _converse(rig: TableRig, random: Random, stream: bytes) -> tuple[list[int], bool]:
    """The statuses that came back, and whether the conversation came to its end."""
    cuts = sorted(random.randrange(len(stream) + 1) for _ in range(random.randrange(4)))
    answers: list[int] = []
    with rig.client() as client:
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            client.send(stream[begin:end])
        client.be_patient(QUIET_S)
        try:
            while response := client.response():
                answers.append(response.status)
                if b"/denied/last" in response.body:
                    return answers, True
        except TimeoutError:
            return answers, False
    return answers, True


def _target(record: dict[str, object]) -> str:
    return urlsplit(str(record["url.full"])).path
