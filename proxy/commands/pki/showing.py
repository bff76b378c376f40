"""CAs of a store as a person reads them and as JSON. It opens no key."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pki.layout import CERTIFICATE, KEY
from proxy.commands import Json

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from cryptography.x509 import Certificate

    from pki.store import Surveyed
    from proxy.console import Console

ROOT, ISSUING, GIVEN = "root", "issuing", "given"
UNREADABLE = "unreadable"
MOST_DOMAINS = 6  # for a person; JSON has them all


def stamp(time: datetime) -> str:
    """As JSON has it."""
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def moment(time: datetime) -> str:
    """As a person reads it."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def certificate_json(certificate: Certificate) -> Json:
    from pki.authority import certificate_id, fingerprint

    return {
        "id": certificate_id(certificate),
        "subject": certificate.subject.rfc4514_string(),
        "sha256": fingerprint(certificate),
        "expires": stamp(certificate.not_valid_after_utc),
    }


def ca_json(role: str, ca: Surveyed) -> Json:
    """What every pki command says of a CA."""
    from pki.constraints import permitted_domains

    permitted = permitted_domains(ca.certificate)
    return {
        "role": role,
        "line": ca.line.value,
        "state": ca.state.value,
        "since": stamp(ca.since) if ca.since else None,
        **certificate_json(ca.certificate),
        "permitted": None if permitted is None else list(permitted),
        "certificate": str(ca.folder / CERTIFICATE),
        "key": key_at(ca),
        "key_is": key_is(ca),
    }


def key_is(ca: Surveyed) -> str:
    """`file`, `token`, `offline`; `unreadable`: a file, for others than who asks."""
    from pki.store import KeyPlace

    is_unreadable = ca.key is KeyPlace.FILE and not os.access(ca.folder / KEY, os.R_OK)
    return UNREADABLE if is_unreadable else ca.key.value


def key_at(ca: Surveyed) -> str | None:
    """A path, a token's URI without its PIN, or None where nobody here knows."""
    from pki.store import KeyPlace

    return str(ca.folder / KEY) if ca.key is KeyPlace.FILE else ca.uri


def key_text(ca: Surveyed) -> str:
    where = {"offline": "offline: not in this directory", UNREADABLE: f"{key_at(ca)}, which you may not read"}
    return f"key {where.get(key_is(ca)) or key_at(ca) or 'in a token'}"


def show_ca(
    console: Console, role: str, ca: Certificate, purpose: str, now: datetime | None = None, more: Sequence[str] = ()
) -> None:
    """Some lines about it: what it is called, how long, how to tell it from another, and `more`.

    now  to say how many days are left
    """
    from pki.authority import fingerprint
    from pki.constraints import permitted_domains

    show_name(console, role, ca, purpose)
    show_more(console, expiry(ca, now), f"SHA-256 {fingerprint(ca)}")
    if permitted := permitted_domains(ca):
        show_more(console, f"only for {domains_text(permitted)} and what is below")
    show_more(console, *more)


def show_name(console: Console, role: str, ca: Certificate, purpose: str) -> None:
    """The line that begins what is said of a CA."""
    from pki.authority import certificate_id

    subject = ca.subject.rfc4514_string()
    console.line(f"{role:<9}{certificate_id(ca)}  {subject}  ({purpose})", indent=2)


def show_more(console: Console, *lines: str) -> None:
    """What follows below that line."""
    for line in lines:
        console.line(line, indent=11)


def show_root_keys(console: Console, roots: Iterable[Surveyed]) -> None:
    """How to take the keys of roots away that are in the directory."""
    from pki.authority import Line
    from pki.store import KeyPlace

    if here := [root for root in roots if root.key is KeyPlace.FILE]:
        console.line("# keep the root's key where no gate runs; no gate needs it", indent=2)
        for root in here:
            name = "OFFLINE" if root.line is Line.MAIN else f"OFFLINE-{root.line.upper()}"
            console.code([f"mv {shlex.quote(str(root.folder / KEY))} {name}"], indent=2)


def expiry(certificate: Certificate, now: datetime | None = None) -> str:
    end = f"expires {moment(certificate.not_valid_after_utc)}"
    if now is None:
        return end
    left = days_left(certificate, now)
    return f"{end}, in {left} days" if left >= 0 else end.replace("expires", "expired")


def days_left(certificate: Certificate, now: datetime) -> int:
    """Whole days; negative once it has expired."""
    return (certificate.not_valid_after_utc - now).days


def domains_text(permitted: Sequence[str]) -> str:
    more = len(permitted) - MOST_DOMAINS
    return ", ".join(permitted[:MOST_DOMAINS]) + (f" and {more} more" if more > 0 else "")
