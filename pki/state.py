"""state.json: which CAs a store holds, and where each stands in its rotation. It reads and writes no file.

Version 1 named one issuing CA and its roots, all in use; version 2 says of each CA what `authority` knows of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pki.authority import Authority, Issuing, Line, Root, State, certificate_id
from pki.layout import GIVEN, ISSUING, ROOTS

VERSION = 2

_ID = re.compile(r"[0-9a-f]{16}")  # becomes a path: nothing else may stand in state.json


class MalformedState(Exception):
    """Not a state that this version knows. `str()` says what stands there and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A CA of the store.

    sent  what goes with it, by id: a root's cross certificates, an issuing CA's chain; None: all that its file holds
    """

    id: str
    state: State = State.ACTIVE
    line: Line = Line.MAIN
    since: datetime | None = None
    sent: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Register:
    """What state.json says."""

    roots: tuple[Entry, ...]
    issuing: tuple[Entry, ...]
    given: tuple[str, ...] = ()

    @property
    def folders(self) -> frozenset[str]:
        """Where its CAs stand in the store."""
        return frozenset(
            [
                *(f"{ROOTS}/{entry.id}" for entry in self.roots),
                *(f"{ISSUING}/{entry.id}" for entry in self.issuing),
                *(f"{GIVEN}/{one}" for one in self.given),
            ]
        )


def state_text(authority: Authority) -> bytes:
    """What state.json says of `authority`."""
    state = {
        "version": VERSION,
        ROOTS: [
            _record(root) | {"crosses": [certificate_id(cross) for cross in root.crosses]} for root in authority.roots
        ],
        ISSUING: [_record(one) | {"chain": [certificate_id(link) for link in one.chain]} for one in authority.issuing],
        GIVEN: [certificate_id(certificate) for certificate in authority.given],
    }
    return (json.dumps(state, indent=2) + "\n").encode()


def parse_state(text: bytes) -> Register:
    """Raises MalformedState for everything that `state_text` never wrote, in this version or an older one."""
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedState(f"{error}; restore it from a copy") from error
    match state:
        case {"version": 1, "issuing": issuing, "roots": list(roots)}:
            register = Register(tuple(Entry(_id(one), sent=()) for one in roots), (Entry(_id(issuing)),))
        case {"version": 2, "roots": list(roots), "issuing": list(issuing), "given": list(given)}:
            register = Register(
                tuple(_entry(record, "crosses") for record in roots),
                tuple(_entry(record, "chain") for record in issuing),
                tuple(_id(one) for one in given),
            )
        case {"version": int(version)} if version > VERSION:
            raise MalformedState(f"version {version} is not known here; use a newer outgate")
        case _:
            raise MalformedState("not a state that this version knows; restore it from a copy")
    for ids in ([entry.id for entry in register.roots], [entry.id for entry in register.issuing], register.given):
        if len(set(ids)) < len(ids):
            raise MalformedState("names a CA twice; restore it from a copy")
    return register


def _record(ca: Root | Issuing) -> dict[str, Any]:  # Any: what JSON holds
    since = f"{ca.since.astimezone(UTC).isoformat()}" if ca.since else None
    return {"id": certificate_id(ca.certificate), "state": ca.state, "line": ca.line, "since": since}


def _entry(record: object, sent: str) -> Entry:
    if not isinstance(record, dict) or not isinstance(record.get(sent), list):
        raise MalformedState(f"{_shown(record)} describes no CA; restore it from a copy")
    try:
        state, line = State(str(record.get("state"))), Line(str(record.get("line")))
    except ValueError as error:
        raise MalformedState(f"{error}; use a newer outgate, or restore it from a copy") from error
    ids = tuple(_id(one) for one in record[sent])
    return Entry(_id(record.get("id")), state, line, _since(record.get("since")), ids)


def _id(found: object) -> str:
    if isinstance(found, str) and _ID.fullmatch(found):
        return found
    raise MalformedState(f"{_shown(found)} is not the id of a CA, 16 hex digits; restore it from a copy")


def _since(found: object) -> datetime | None:
    if found is None:
        return None
    try:
        since = datetime.fromisoformat(found) if isinstance(found, str) else None
    except ValueError:
        since = None
    # Beyond these years it could be neither shown in UTC nor counted with.
    if since is None or since.tzinfo is None or not 1970 < since.year < 9000:
        raise MalformedState(f"{_shown(found)} is no time with its zone; restore it from a copy")
    return since


def _shown(found: object) -> str:
    return repr(found)[:80]
