"""One step of a rotation as the command line asks for it: with keys that are lent, named or made, and constraints.

What a step does to an authority is `pki/rotation.py`'s; nothing is written here but a new root's key file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.commands import USAGE
from proxy.commands.pki.constraints import permitted_by
from proxy.commands.pki.keys import is_remote, lend, read_keys, remove_unused_keys, write_keys
from proxy.commands.pki.showing import ISSUING, ROOT

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from cryptography.x509 import Certificate

    from pki.authority import Authority, CaKey, Issuing, Line, Root

STAGE, UNSTAGE, ACTIVATE, RETIRE = "stage", "unstage", "activate", "retire"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What was said on the command line besides what is rotated and by which step."""

    directory: Path
    policies: tuple[str, ...]
    tags: tuple[str, ...]
    no_constraints: bool
    issuing_days: int | None
    root_years: int | None
    root_keys: tuple[str, ...]
    new_root_key: str | None
    issuing_key: str | None
    password_file: Path | None
    no_cross: bool
    force: bool


def take_step(
    authority: Authority, what: str, step: str | None, said: Said, now: datetime, undo: ExitStack
) -> Authority:
    """The authority after the step; `undo` removes what was made for it. Raises NotNow, AuthorityError, SignerError."""
    from pki.rotation import SOAK, activate_issuing, activate_root, retire_issuing, retire_root, unstage

    for source in said.root_keys:
        authority = lend(authority, source, said.password_file)
    soak = timedelta(0) if said.force else SOAK
    match what, step:
        case _, "unstage":
            _require_staged(authority, what)
            return unstage(authority)
        case "issuing", None:
            return activate_issuing(_stage_issuing(authority, said, now), now)
        case "issuing", "stage":
            return _stage_issuing(authority, said, now)
        case "issuing", "activate":
            return activate_issuing(authority, now)
        case "issuing", "retire":
            return retire_issuing(authority)
        case "root", "stage":
            return _stage_root(authority, said, now, undo)
        case "root", "activate":
            return activate_root(_stage_below(authority, said, now), now, soak=soak)
    return retire_root(authority, now, soak=soak)


def _require_staged(authority: Authority, what: str) -> None:
    """Both go together; who names one of them is not to lose the other unasked."""
    from pki.authority import State
    from pki.rotation import NotNow

    has_root = any(root.state is State.STAGED for root in authority.roots)
    if what == ROOT and not has_root:
        raise NotNow("no root is staged")
    if what == ISSUING and has_root:
        raise NotNow("a root is staged too, and goes with the issuing CA; run: outgate pki rotate root --unstage")


def _stage_issuing(authority: Authority, said: Said, now: datetime) -> Authority:
    from pki.authority import AuthorityError

    if not authority.issuers:
        raise AuthorityError("no issuing CA is in use; import one, or activate the root that is staged")
    return _staged(authority, said, now, [one.line for one in authority.issuers])


def _stage_below(authority: Authority, said: Said, now: datetime) -> Authority:
    """With an issuing CA below each staged root, where none is yet."""
    from pki.authority import State
    from pki.rotation import NotNow

    served = {one.line for one in authority.issuing if one.state is State.STAGED}
    lines = [root.line for root in authority.roots if root.state is State.STAGED and root.line not in served]
    if served and (said.policies or said.no_constraints or said.issuing_days or said.issuing_key):
        raise NotNow("an issuing CA is staged already, as it was asked for then; activate it as it is, or unstage it")
    return _staged(authority, said, now, lines)


def _staged(authority: Authority, said: Said, now: datetime, lines: Sequence[Line]) -> Authority:
    """With the next issuing CA of each line: as long-lived and as limited as the present one, unless otherwise said."""
    from pki.authority import Line
    from pki.rotation import stage_issuing

    permitted = () if said.no_constraints else permitted_by(said.policies, said.tags) if said.policies else None
    key = read_keys(said.issuing_key, said.password_file)[0] if said.issuing_key else None
    for present in authority.issuers:
        if present.line in lines:
            _require_named(present, key if present.line is Line.MAIN else None, "--issuing-key")
            life = timedelta(days=said.issuing_days) if said.issuing_days else _life(present.certificate)
            authority = stage_issuing(authority, now, permitted=permitted, life=life, key=key, line=present.line)
    return authority


def _stage_root(authority: Authority, said: Said, now: datetime, undo: ExitStack) -> Authority:
    """A new root for each line. Where its key is to stand in a file of its own, the directory does not get it."""
    from pki.authority import YEAR, AuthorityError, State
    from pki.rotation import stage_root

    old = [root for root in authority.roots if root.state is State.ACTIVE]
    years = said.root_years or max([1, *(round(_life(root.certificate) / YEAR) for root in old)])
    place = said.new_root_key
    path = Path(place) if place and not is_remote(place) else None
    makes_file = path is not None and not os.path.lexists(path)
    key = _next_root_key(authority, said, makes=makes_file)
    if key and any(one.certificate.public_key() == key.public_key() for one in authority.issuing):
        raise AuthorityError("the new root would have the key of an issuing CA, which gates hold; use another key")
    staged = stage_root(authority, now, years=years, key=key, cross=not said.no_cross)
    if path is None:
        return staged
    new = [root for root in staged.roots if root.state is State.STAGED]
    if makes_file:
        write_keys(path, [root.key for root in new if root.key], said.password_file)
        undo.callback(remove_unused_keys, path, said.directory, new)
    return replace(staged, roots=tuple(replace(root, key=None) if root in new else root for root in staged.roots))


def _next_root_key(authority: Authority, said: Said, *, makes: bool) -> CaKey | None:
    """The main line's. None: it is made, and stands in the directory."""
    from pki.authority import Line, State, create_key
    from pki.rotation import kind_of
    from proxy.console import stop

    place = said.new_root_key
    present = next((root for root in authority.roots if (root.state, root.line) == (State.ACTIVE, Line.MAIN)), None)
    if place and not makes:
        if not is_remote(place) and len(authority.issuers) > 1:
            stop(
                f"{place}: is there already; name a file that is not, and the keys of both roots are made there", USAGE
            )
        return read_keys(place, said.password_file)[0]
    if present and makes:
        return create_key(kind_of(present.certificate))
    if present:
        _require_named(present, None, "--new-root-key")
    return None


def _require_named(present: Root | Issuing, key: CaKey | None, option: str) -> None:
    """A key that nobody can copy is not followed by one in a file unasked."""
    from pki.authority import AuthorityError, certificate_id
    from pki.profile import stays_in_token

    if key is None and stays_in_token(present.key):
        named = f"the key of CA {certificate_id(present.certificate)} is in a token"
        raise AuthorityError(f"{named}; name the next one's with {option}: pkcs11:URI, or FILE to leave the token")


def _life(certificate: Certificate) -> timedelta:
    """How long it is valid; both ends count (RFC 5280 4.1.2.5)."""
    return certificate.not_valid_after_utc - certificate.not_valid_before_utc + timedelta(seconds=1)
