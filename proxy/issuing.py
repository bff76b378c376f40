"""What a gate knows of the issuing CAs that it signs leaves by, and how long they will do. It reads no file.

Their keys are in a text that is passed on unread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # the supervisor holds no cryptography, and `run` forks before it is loaded
    from pki.authority import Issuing
    from policies.errors import Problem
    from policies.index import Policy

DAY_S = 86_400.0
REPAIR = "replace it: outgate pki rotate issuing --pki DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuers:
    """The issuing CAs in force, of each line one.

    text         as `pki.issuers` writes them, with their keys; empty where it has no business
    digest       of the text: tells them from others
    ids          of their certificates
    due          POSIX seconds: from when on the first of them should be replaced
    expires      POSIX seconds: when the first of them expires
    constraints  the domains that one of them permits, for each that is limited by name constraints
    """

    text: str = field(default="", repr=False)
    digest: str
    ids: tuple[str, ...]
    due: float
    expires: float
    constraints: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:  # Any: what JSON holds
        """What `dataclasses.asdict` made of one and JSON carried."""
        constraints = tuple(map(tuple, fields["constraints"]))
        return cls(**{**fields, "ids": tuple(fields["ids"]), "constraints": constraints})

    @property
    def public(self) -> Self:
        """The same without the keys."""
        return replace(self, text="")

    def __str__(self) -> str:
        return f"issuing CA {' and '.join(self.ids)}"


def describe(issuers: Sequence[Issuing]) -> Issuers:
    """What there is to know of `Authority.issuers`."""
    from pki.authority import certificate_id
    from pki.constraints import permitted_domains
    from pki.issuers import issuers_text
    from pki.plan import two_thirds

    text = issuers_text(issuers)
    certificates = [issuer.certificate for issuer in issuers]
    return Issuers(
        text=text,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        ids=tuple(map(certificate_id, certificates)),
        due=min(two_thirds(one, one.not_valid_after_utc).timestamp() for one in certificates),
        expires=min(one.not_valid_after_utc.timestamp() for one in certificates),
        constraints=tuple(dict.fromkeys(filter(None, map(permitted_domains, certificates)))),
    )


def left_out(policy: Policy, workload: str | None, issuers: Issuers) -> list[Problem]:
    """The inspected rules of `workload` (of all: None) for whose names no client would accept a leaf of these."""
    from proxy.inspected_names import outside

    return [problem for domains in issuers.constraints for problem in outside(policy, workload, domains)]


def reminder(issuers: Issuers, now: float) -> str:
    """What an operator should do about their end, in a line; empty: nothing yet."""
    if now < issuers.due:
        return ""
    day = datetime.fromtimestamp(issuers.expires, UTC).date()
    if now >= issuers.expires:
        return f"the issuing CA expired on {day}, and inspected connections are refused; {REPAIR}"
    return f"the issuing CA expires on {day}, in {int((issuers.expires - now) // DAY_S)} days; {REPAIR}"
