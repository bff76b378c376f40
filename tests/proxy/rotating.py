"""Stores of authorities whose issuing CA is renewed while a gate reads them: what tests of that share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pki.authority import certificate_id, create_authority
from pki.rotation import NotNow, activate_issuing, retire_issuing, stage_issuing
from pki.store import changing, load, save


def new_store(directory: Path, *permitted: str, now: datetime | None = None) -> str:
    """A store at `directory/pki`, made at `now`. Returns its path, as an option has it."""
    save(create_authority(now or datetime.now(UTC), permitted=permitted), directory / "pki")
    return str(directory / "pki")


def renew_issuing(store: Path, *, permitted: Sequence[str] | None = None) -> str:
    """Another issuing CA signs from now on, and the one before the last is forgotten. Its id."""
    now = datetime.now(UTC)
    with changing(store) as change:
        authority = change.authority
        try:
            authority = retire_issuing(authority)
        except NotNow:
            pass  # the first renewal
        change.authority = activate_issuing(stage_issuing(authority, now, permitted=permitted), now)
    return certificate_id(load(store).issuer.certificate)


def key_of(store: Path) -> Path:
    """The file of the issuing CA that signs."""
    return store / "issuing" / certificate_id(load(store).issuer.certificate) / "ca.key"
