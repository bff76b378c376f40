"""docs/http.md, out of the table: `python -m tests.proxy.conformance.page > docs/http.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tests.proxy.conformance.framing import framing_rows
from tests.proxy.conformance.hostile import OriginRow, Told, origin_rows
from tests.proxy.conformance.judged import judge_rows
from tests.proxy.conformance.rows import Kind, Outcome, Row

_STATUSES = {
    400: "grammar, framing, a path or a name that two servers may read differently",
    403: "denied by the policy; an Upgrade that no rule admits, h2c always",
    405: "TRACE and CONNECT",
    414: "a target over 16 KiB",
    417: "an Expect other than 100-continue",
    421: "Host, or its port, is not what the connection was opened for",
    431: "a head over 64 KiB, or over 100 fields",
    501: "a transfer coding other than chunked",
    505: "a version other than HTTP/1.0 and HTTP/1.1",
}

_HEAD = """# HTTP under inspection

<!-- Written by `python -m tests.proxy.conformance.page`, and held to the tests by one. -->

Two hosts ask one judge. The **lane** (`proxy/lane`) speaks HTTP/1.1 and nothing else, in the gate's own process.
**mitmproxy's host** (`proxy/inspector`) speaks HTTP/2 and gRPC as well, and hosts addons. A table of {requests} request
tricks ({judged} of them the judge's own: path, Host, method, policy) and {origins} tricks of origins runs against both
in `make test`: each request whole and cut in two, at a border of TLS records or inside one. A row says what the client
is answered, what is recorded, and the bytes that reach the origin.

- What goes to an origin is written anew from what was judged. Of a row that is refused nothing goes on that an origin
  could take for a whole request.
- Rows that the judge decides are the same on both hosts. In the others mitmproxy's host may refuse what the lane
  carries, never the reverse.
- A refusal that leaves open where its request ends says `Connection: close`. Both hosts then say goodbye (close_notify,
  FIN) at once, and read on for up to two seconds and 1 MiB: a reset could overtake the answer.
- An origin's body without a length ends with close_notify: one that is cut short reaches the client cut short.

## Statuses

| status | for | rows |
|---|---|---|
"""


def render() -> str:
    requests = [*framing_rows(), *judge_rows()]
    origins = list(origin_rows())
    judged = sum(row.kind is Kind.JUDGE for row in requests)
    text = _HEAD.format(requests=len(requests), judged=judged, origins=len(origins))
    return text + "\n".join((*_statuses(requests), *_differing(requests), *_origins(origins), ""))


def _statuses(rows: Sequence[Row]) -> Iterator[str]:
    counts = Counter(row.outcome.answers[-1].status for row in rows)
    for status, what in _STATUSES.items():
        yield f"| {status} | {what} | {counts[status]} |"


def _differing(rows: Sequence[Row]) -> Iterator[str]:
    yield from (
        "",
        "## Requests on which the hosts differ",
        "",
        "| row | lane | mitmproxy's host | why |",
        "|---|---|---|---|",
    )
    for row in rows:
        if row.mitmproxy:
            other = row.mitmproxy
            yield f"| {row.id} | {_outcome(row.outcome)} | {_outcome(other.outcome)} | {other.why} |"


def _origins(rows: Sequence[OriginRow]) -> Iterator[str]:
    yield from (
        "",
        "## Origins on which the hosts differ",
        "",
        "| row | lane | mitmproxy's host | why |",
        "|---|---|---|---|",
    )
    for row in rows:
        if row.mitmproxy:
            told, why = row.mitmproxy
            yield f"| {row.id} | {_told(row.told)} | {_told(told)} | {why} |"


def _outcome(outcome: Outcome) -> str:
    if outcome.is_refusal:
        return " ".join(str(answer.status) for answer in outcome.answers)
    reached = ", ".join(f"`{_shown(one.head)}`" for one in outcome.forwarded)
    trailers = " and its trailers" if any(one.trailers for one in outcome.forwarded) else ""
    return f"sends on {reached}{trailers}"


def _told(told: Told) -> str:
    if told.breaks:
        return "breaks off"
    return ", ".join(str(read.status or "closes") for read in told.reads)


def _shown(head: bytes) -> str:
    """Without what every row has."""
    line, _, *fields = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    return " | ".join((line, *fields)).replace("|", "·")


if __name__ == "__main__":
    print(render(), end="")
