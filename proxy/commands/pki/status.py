"""`outgate pki status`: every CA of a store, and what is to be done when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pki.layout import KEY
from proxy.commands import NO, NOT_STARTED, YES, Json, json_option
from proxy.commands.pki import pki_option
from proxy.commands.pki.showing import (
    GIVEN,
    ISSUING,
    ROOT,
    UNREADABLE,
    ca_json,
    certificate_json,
    days_left,
    key_is,
    key_text,
    moment,
    show_ca,
    stamp,
)
from proxy.commands.pki.tasks import Task, show_tasks, tasks

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from pki.store import Survey, Surveyed
    from proxy.console import Console

EPILOG = """\b
It opens no key. What is due for a week is overdue: let a daily job tell you.

\b
Exit codes: 0 in order; 1 a CA has expired, a step is overdue, or a key is shown to others; 2 usage; 3 could not read.
JSON keys: pki ok cas[role line state since id subject sha256 expires days_left permitted certificate key key_is
  crosses] todo[command start late why overdue] faults
  role is root, issuing or given; key_is is file, token, offline or unreadable; a given CA has no line, state and key

\b
Example:
  outgate pki status --pki pki
"""


@dataclass(frozen=True, slots=True)
class Cross:
    """A root's name and key as another root signed them: who trusts only that accepts what this one signs."""

    id: str
    signer: str | None
    expires: datetime

    def json(self) -> Json:
        return {"id": self.id, "signed_by": self.signer, "expires": stamp(self.expires)}


@click.command(epilog=EPILOG)
@pki_option
@json_option
@click.pass_context
def status(ctx: click.Context, /, directory: Path, as_json: bool) -> None:
    """Show every CA: its state, its expiry, where its key is; and what is to be done when."""
    from pki.store import StoreError, survey
    from proxy.console import Console, stop

    now = datetime.now(UTC)
    try:
        found = survey(directory)
    except StoreError as error:
        stop(str(error), NOT_STARTED)
    coming, faults = tasks(directory, found, now), list(_faults(found, now))
    ok = not faults and not any(task.is_overdue for task in coming)
    if as_json:
        cas = _cas_json(found, now)
        todo = [task.json() for task in coming]
        Console().json({"pki": str(directory), "ok": ok, "cas": cas, "todo": todo, "faults": faults})
    else:
        _show(Console(), found, coming, faults, now)
    ctx.exit(YES if ok else NO)


def _faults(found: Survey, now: datetime) -> Iterator[str]:
    """What is wrong today, one line each."""
    from pki.authority import State, certificate_id
    from pki.files import UnusableSecret, read_secret
    from pki.store import KeyPlace

    certificates = [ca.certificate for ca in (*found.roots, *found.issuing)]
    for certificate in (*certificates, *found.given):
        if now >= certificate.not_valid_after_utc:
            yield f"CA {certificate_id(certificate)} expired at {moment(certificate.not_valid_after_utc)}"
    for ca in (*found.roots, *found.issuing):
        path = ca.folder / KEY
        if ca.key is KeyPlace.OFFLINE:
            if ca in found.issuing and ca.state is State.ACTIVE:
                yield f"{path}: not there, and the gate signs with it; restore it from a copy"
        elif key_is(ca) != UNREADABLE:
            try:
                read_secret(path, 0, shows="the key")
            except UnusableSecret as error:
                yield str(error)


def _cas_json(found: Survey, now: datetime) -> list[Json]:
    cas = [ca_json(ROOT, root) | {"crosses": [cross.json() for cross in _crosses(found, root)]} for root in found.roots]
    cas += [ca_json(ISSUING, one) for one in found.issuing]
    cas += [{"role": GIVEN, **certificate_json(certificate)} for certificate in found.given]
    certificates = (*(ca.certificate for ca in (*found.roots, *found.issuing)), *found.given)
    return [ca | {"days_left": days_left(one, now)} for ca, one in zip(cas, certificates, strict=True)]


def _crosses(found: Survey, root: Surveyed) -> list[Cross]:
    from pki.authority import certificate_id
    from pki.chains import is_signed_by

    signed_by = [
        [one.certificate for one in found.roots if is_signed_by(cross, one.certificate)] for cross in root.sent
    ]
    return [
        Cross(certificate_id(cross), certificate_id(signers[0]) if signers else None, cross.not_valid_after_utc)
        for cross, signers in zip(root.sent, signed_by, strict=True)
    ]


def _show(console: Console, found: Survey, coming: list[Task], faults: list[str], now: datetime) -> None:
    from pki.authority import Line
    from proxy.console import Style

    for role, cas in ((ROOT, found.roots), (ISSUING, found.issuing)):
        for ca in cas:
            crosses = _crosses(found, ca) if role == ROOT else []
            more = [
                f"cross-signed by root {cross.signer or 'elsewhere'} until {moment(cross.expires)}" for cross in crosses
            ]
            since = f" since {moment(ca.since)}" if ca.since else ""
            line = "" if ca.line is Line.MAIN else f", {ca.line} line"
            show_ca(console, role, ca.certificate, f"{ca.state}{since}{line}", now, [key_text(ca), *more])
    for certificate in found.given:
        show_ca(console, GIVEN, certificate, "another system has its key", now)
    if coming:
        console.blank()
        console.line("to do:")
        show_tasks(console, coming, now)
    if faults:
        console.blank()
        for fault in faults:
            console.line(("wrong: ", Style.BAD), fault)
