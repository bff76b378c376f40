"""What a step changed in a store: what it showed before, and shows after. It opens no key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pki.store import KeyPlace
from proxy.commands import Json
from proxy.commands.pki.showing import ISSUING, ROOT, ca_json, key_at, show_ca, show_more, show_name

if TYPE_CHECKING:
    from pki.authority import State
    from pki.store import Survey, Surveyed
    from proxy.console import Console

GONE = "gone"


@dataclass(frozen=True, slots=True)
class Changed:
    """A CA that is new, in another state, or gone. `was` is its former state; None: it is new."""

    role: str
    ca: Surveyed
    was: State | None
    is_gone: bool = False

    @property
    def deleted_key(self) -> str | None:
        """The file that is no more."""
        return key_at(self.ca) if self.is_gone and self.ca.key is KeyPlace.FILE else None

    def json(self) -> Json:
        told = ca_json(self.role, self.ca) | {"was": self.was}
        if self.is_gone:
            told["state"] = GONE
        if self.deleted_key:
            told |= {"key": None, "key_is": "deleted"}
        return told


def changes(before: Survey, after: Survey) -> list[Changed]:
    """Every CA that is not as it was, roots first."""
    found = []
    for role, were, are in ((ROOT, before.roots, after.roots), (ISSUING, before.issuing, after.issuing)):
        states = {ca.certificate: ca.state for ca in were}
        left = {ca.certificate for ca in are}
        found += [Changed(role, ca, ca.state, is_gone=True) for ca in were if ca.certificate not in left]
        news = (Changed(role, ca, states.get(ca.certificate)) for ca in are)
        found += [change for change in news if change.was is not change.ca.state]
    return found


def show_changes(console: Console, found: list[Changed]) -> None:
    """A line for what moved, some more for what is new; and for what is gone, where its key is."""
    for change in found:
        if change.was is None:
            show_ca(console, change.role, change.ca.certificate, f"new, {change.ca.state}")
            continue
        state = GONE if change.is_gone else f"{change.ca.state} now"
        show_name(console, change.role, change.ca.certificate, f"was {change.was}, {state}")
        if change.deleted_key:
            show_more(console, f"deleted {change.deleted_key}")
        elif change.is_gone:
            show_more(console, f"its key was not here and is not deleted: {key_at(change.ca) or 'offline'}")
