"""A decision record as one line: JSON, or words on a terminal. Where lines go is `target`'s work.

The only newline of a line is its last byte, and every record has a line: nothing that a workload sends begins another
record, moves a terminal's cursor, or is beyond writing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import orjson

from proxy.record import Record, describe


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """An import of it fails meanwhile, as where it is not installed."""
    found = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # the import system's own word for this
    try:
        yield
    finally:
        del sys.modules[name]
        if found is not None:
            sys.modules[name] = found


with _absent("rich"):  # structlog would load it for tracebacks in colour: 5 MiB and 50 ms in every worker
    from structlog.processors import JSONRenderer

_GREEN, _RED, _YELLOW, _DIM, _PLAIN = "\033[32m", "\033[31m", "\033[33m", "\033[2m", "\033[0m"

type Render = Callable[[Record], bytes]


def renderer(*, pretty: bool, colour: bool) -> Render:
    """What makes a record its line: a processor of structlog's kind, without a logger around each record."""
    processor = _Words(colour) if pretty else JSONRenderer(serializer=_dump, default=str)
    return partial(processor, None, "info")  # type: ignore[return-value]  # ours gives bytes, and so does theirs then


def _dump(record: Record, **options: Any) -> bytes:  # Any: what structlog hands on
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE, **options)
    except orjson.JSONEncodeError:  # a lone surrogate, an integer beyond 64 bits: json has a spelling for both
        return json.dumps(record, **options).encode() + b"\n"


class _Words:
    """`12:30:01 deny  weather  GET https://host/path  no_allow_entry  weather.yaml:9 (…)`"""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, _logger: object, _method: str, event: Mapping[str, Any]) -> bytes:  # structlog's signature
        if "verdict" not in event:
            said = " ".join(f"{key}={value}" for key, value in event.items() if value is not None)
            return _plain(said).encode() + b"\n"
        verdict = str(event["verdict"])
        shown = "would deny" if event.get("would_be") == "deny" else verdict
        colour = _YELLOW if shown == "would deny" else _GREEN if verdict == "allow" else _RED
        parts = [
            self._paint(str(event["time"])[11:19], _DIM),
            self._paint(f"{shown:<5}", colour),
            str(event["workload"]),
            _plain(describe(event)),
            "" if verdict == "allow" and shown == verdict else str(event["reason"]),
            self._paint(_plain(str(event.get("rule", ""))), _DIM),
            self._paint(str(event["id"]), _DIM),
        ]
        return "  ".join(part for part in parts if part).encode() + b"\n"

    def _paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colour and text else text


def _plain(text: str) -> str:
    """Escaped where it holds what is not shown as it is: an escape sequence would rewrite the lines above."""
    return text if text.isprintable() else ascii(text)[1:-1]
