"""The decision record: one flat mapping per attempt, the same names everywhere. Writing it is `log`'s work.

Names follow OpenTelemetry's semantic conventions where they exist. Never a header value, a body or a secret; the values
of a query are replaced by a keyed hash unless the workload's policy says `logQuery: true`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from policies.model import Attempt, Verdict

type Record = dict[str, object]
type Sink = Callable[[Record], None]
type Peer = tuple[str, int]

# Same value, same hash, within one run of the gate: shows that a query repeats, and is useless to a reader of the log.
_QUERY_KEY = os.urandom(32)


def new_id() -> str:
    """Sixteen hex digits: what the client sees in `Outgate-Decision`, problem+json and EDE, and the log in `id`."""
    return os.urandom(8).hex()


def stamp(seconds: float) -> str:
    """`time` in a record: `2026-01-31T23:59:59.999Z`."""
    second = int(seconds)
    return f"{_to_the_second(second)}.{int((seconds - second) * 1000):03}Z"


@lru_cache(maxsize=16)
def _to_the_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat()


def record_of(
    attempt: Attempt,
    verdict: Verdict,
    *,
    id: str,  # the field's own name in the record
    source: Peer | None = None,
    destination: Peer | None = None,
    started: float | None = None,
    bytes_sent: int | None = None,
    bytes_received: int | None = None,
    status: int | None = None,
    url: str | None = None,
    extra: Record | None = None,
) -> Record:
    """The record of `verdict` on `attempt`. `started` is POSIX seconds; bytes are counted as the workload sees them."""
    now = time.time()
    record: Record = {
        "time": stamp(now),
        "id": id,
        "workload": attempt.workload,
        "stage": attempt.stage.value,
        "verdict": verdict.action.value,
        "reason": verdict.reason.value,
    }
    if verdict.would_be is not None:
        record["would_be"] = verdict.would_be.action.value
    if verdict.rule is not None:
        record["rule"] = str(verdict.rule)
    if source is not None:
        record["source.address"], record["source.port"] = source
    if destination is not None:
        record["destination.address"], record["destination.port"] = destination
    elif attempt.address is not None:
        record["destination.address"], record["destination.port"] = str(attempt.address), attempt.port
    else:
        record["destination.port"] = attempt.port
    if attempt.host is not None:
        record["server.name"] = attempt.host
    if attempt.names:
        record["server.names"] = list(attempt.names)
    if verdict.tls is not None:
        record["tls.mode"] = verdict.tls.value
    if attempt.ech:
        record["tls.ech"] = True
    if attempt.method:
        record["http.request.method"] = attempt.method
    if url is not None:
        record["url.full"] = url
    if status is not None:
        record["http.response.status_code"] = status
    if bytes_sent is not None:
        record["bytes.sent"] = bytes_sent
    if bytes_received is not None:
        record["bytes.received"] = bytes_received
    if started is not None:
        record["duration_ms"] = _since(started, now)
    if extra:
        record.update(extra)
    return record


def repeat_record(
    record: Mapping[str, object], *, id: str, source: Peer, started: float, bytes_sent: int, bytes_received: int
) -> Record:
    """Another record like that of `record_of`, of the same verdict on the same attempt, which ended the same way."""
    now = time.time()
    again = dict(record)
    again["time"] = stamp(now)
    again["id"] = id
    again["source.address"], again["source.port"] = source
    again["bytes.sent"] = bytes_sent
    again["bytes.received"] = bytes_received
    again["duration_ms"] = _since(started, now)
    return again


def _since(started: float, now: float) -> float:
    return max(0.0, round((now - started) * 1000, 1))  # the clock may have been set back


def show_peer(peer: Peer) -> str:
    """`203.0.113.7:443`, or `[2001:db8::1]:443`."""
    host, port = peer
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def describe(record: Mapping[str, Any]) -> str:  # Any: fields of several types, written as text
    """What was attempted, in the words that `outgate why` reads: `GET https://h/p`, `tls://h`, `tcp://10.0.0.1:22`."""
    if "url.full" in record:
        return f"{record.get('http.request.method', '')} {record['url.full']}".strip()
    stage, port = record["stage"], record.get("destination.port")
    host = record.get("server.name") or next(iter(record.get("server.names", ())), None)
    where = host or record.get("destination.address", "?")
    where = f"[{where}]" if ":" in str(where) else where
    usual = {"tls": 443, "dns": None, "ntp": None}.get(str(stage), 0)
    return f"{stage}://{where}" + ("" if usual is None or port == usual else f":{port}")


def hide_query_values(url: str) -> str:
    """`url` with every query value (and a bare query word) replaced by eight hex digits of its keyed hash."""
    head, mark, query = url.partition("?")
    if not mark:
        return url
    return head + mark + "&".join(_hide(part) for part in query.split("&"))


def _hide(part: str) -> str:
    name, equals, value = part.partition("=")
    if not equals:
        return f"~{_hash(name)}" if name else ""
    return f"{name}=~{_hash(value)}" if value else part


def _hash(value: str) -> str:
    return blake2b(value.encode("utf-8", "surrogateescape"), digest_size=4, key=_QUERY_KEY).hexdigest()
