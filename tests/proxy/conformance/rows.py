"""What a row of the table is: bytes that one end sends, and what every other end must see of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

HOST = "weather.test"
LISTED = "listed.test"  # its rule lists what is allowed
SLASHES = "slashes.test"  # its rule takes encoded slashes literally
SOCKETS = "sockets.test"  # its rule admits websockets
WORKLOAD = "app"

POLICY = f"""
version: 1
guard:
  - {{host: "*.guarded.test", deny: all}}
workloads:
  {WORKLOAD}:
    rules:
      - {{host: {HOST}, tls: inspect, deny: ["* /denied/**"]}}
      - {{host: {LISTED}, tls: inspect, allow: ["GET,POST /search/**", "GET /one/*"], deny: ["* /search/secret/**"]}}
      - {{host: {SLASHES}, tls: inspect, encodedSlash: literal, deny: ["* /denied/**"]}}
      - {{host: {SOCKETS}, tls: inspect, upgrade: [websocket]}}
"""


class Kind(StrEnum):
    """What decides a row. In JUDGE rows both hosts are the same to the byte; elsewhere mitmproxy's may refuse more."""

    JUDGE = "judge"
    FRAMING = "framing"
    ORIGIN = "origin"


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A whole request as the origin reads it: the head with its empty line, the body without its chunks."""

    head: bytes
    body: bytes = b""
    trailers: bytes = b""

    def canonical(self) -> Forwarded:
        """With Host first, framing and what is the connection's own last: order means nothing (RFC 9110 5.3)."""
        line, *fields = self.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        fields.sort(key=_place)
        return Forwarded(b"\r\n".join((line, *fields, b"", b"")), self.body, self.trailers)


_PLACES = {b"host": 0, b"content-length": 2, b"transfer-encoding": 2, b"expect": 3, b"connection": 4, b"upgrade": 5}


def _place(field: bytes) -> int:
    name = field.partition(b":")[0].lower()
    return _PLACES.get(name, 1)


@dataclass(frozen=True, slots=True)
class Answered:
    """A final response, and the reason of its decision record."""

    status: int
    reason: str

    @property
    def is_refusal(self) -> bool:
        return self.status >= 400


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client's bytes lead to: the answers in order, and the whole requests that reach the origin."""

    answers: tuple[Answered, ...]
    forwarded: tuple[Forwarded, ...] = ()

    @property
    def is_refusal(self) -> bool:
        return self.answers[-1].is_refusal


@dataclass(frozen=True, slots=True)
class Difference:
    """What the mitmproxy host does instead, and why that is all right."""

    outcome: Outcome
    why: str


@dataclass(frozen=True, slots=True)
class Row:
    """A request trick. `closes`: the connection must end with the last answer, must not, or (None) may."""

    id: str
    kind: Kind
    sent: bytes
    outcome: Outcome
    sni: str = HOST
    closes: bool | None = None
    mitmproxy: Difference | None = None

    def outcome_on(self, host: str) -> Outcome:
        return self.mitmproxy.outcome if self.mitmproxy and host == "mitmproxy" else self.outcome


def octets(text: str) -> bytes:
    """One per character; a target of the path vectors may hold others, which are sent as UTF-8."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8")


def refused(
    id: str,
    sent: str,
    status: int = 400,
    reason: str = "malformed_request",
    *,
    kind: Kind = Kind.FRAMING,
    sni: str = HOST,
    closes: bool | None = None,
    mitmproxy: Difference | None = None,
) -> Row:
    """Nothing reaches the origin."""
    if closes is None and kind is Kind.FRAMING:
        closes = True  # where a request ends is unknown, so what follows could be taken for another
    return Row(id, kind, octets(sent), Outcome((Answered(status, reason),)), sni, closes, mitmproxy)


def passes(
    id: str,
    sent: str,
    head: str | None = None,
    body: str = "",
    *,
    kind: Kind = Kind.FRAMING,
    sni: str = HOST,
    status: int = 200,
    trailers: str = "",
    closes: bool = False,
    mitmproxy: Difference | None = None,
) -> Row:
    """One request is answered and reaches the origin: with `head`, or with the head that was sent."""
    sent_head, empty, _ = sent.partition("\r\n\r\n")
    reaches = Forwarded(octets(head if head is not None else sent_head + empty), octets(body), octets(trailers))
    return Row(id, kind, octets(sent), Outcome((Answered(status, "rule"),), (reaches,)), sni, closes, mitmproxy)


def instead(head: str, body: str = "", why: str = "", status: int = 200) -> Difference:
    """The mitmproxy host forwards another head."""
    return Difference(Outcome((Answered(status, "rule"),), (Forwarded(octets(head), octets(body)),)), why)


def refuses(status: int, why: str, reason: str = "malformed_request") -> Difference:
    """The mitmproxy host does not serve it."""
    return Difference(Outcome((Answered(status, reason),)), why)


def check_table(rows: Iterable[Row]) -> list[str]:
    """What is wrong with the table itself: ids that are taken, differences that may not be."""
    wrong: list[str] = []
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            wrong.append(f"{row.id}: the id is taken")
        seen.add(row.id)
        if row.mitmproxy is None:
            continue
        other = row.mitmproxy.outcome
        if row.kind is Kind.JUDGE:
            wrong.append(f"{row.id}: the judge decides it, so the hosts may not differ")
        if other == row.outcome:
            wrong.append(f"{row.id}: the difference is none")
        if row.outcome.is_refusal and not other.is_refusal:
            wrong.append(f"{row.id}: the mitmproxy host lets pass what the lane refuses")
        if not row.mitmproxy.why:
            wrong.append(f"{row.id}: the difference has no reason")
    return wrong
