"""How many new names a workload may have looked up below each wildcard of its policy. It knows no sockets and judges no
rules.

A name below `*.example.com` reaches whoever serves example.com, so its labels can carry anything out: that is how
tunnels over DNS (iodine, dnscat2) work. A program needs few names and asks for them again; a tunnel needs a new one for
each packet. A connection that names a host (SNI, CONNECT) has it looked up just as a question does. Names that the
policy writes out carry nothing, and are not counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from policies.hostnames import Hostname, Pattern
from policies.model import HostRule, NameRule, Verdict

MAX_KNOWN = 1000  # names of one workload below one wildcard; which of them it asks for again says something, too
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewNames:
    """What is granted of one wildcard to one workload.

    per_hour    names asked for the first time; up to `burst` of them at once
    max_labels  before the wildcard's own (`bucket.s3.dualstack.region` has four); `max_length` characters with their
                dots: the length bounds what one name can carry, however it is divided
    """

    per_hour: int = 60
    burst: int = 30
    max_labels: int = 4
    max_length: int = 64


@dataclass(slots=True)
class _Account:
    left: float
    since: float
    known: OrderedDict[Hostname, None] = field(default_factory=OrderedDict)


class Budget:
    """Accounts by workload and wildcard, with the terms of all.

    is_ours  whether the operator says where a name is, or whom to ask for it: that tells no stranger
    """

    def __init__(
        self, terms: NewNames, clock: Callable[[], float], *, is_ours: Callable[[Hostname], bool] = lambda name: False
    ) -> None:
        self._terms = terms
        self._clock = clock
        self._is_ours = is_ours
        self._accounts: dict[str, dict[Hostname, _Account]] = {}

    def counts(self, verdict: Verdict, name: Hostname) -> Pattern | None:
        """The wildcard to whose account `name` goes, which `verdict` allows. None: to none; in audit mode there may be
        no rule that admits it."""
        rule = verdict.rule
        if not isinstance(rule, HostRule | NameRule) or not rule.pattern.wildcard or verdict.would_be:
            return None
        return None if self._is_ours(name) else rule.pattern

    def exceeded(self, workload: str, verdict: Verdict, name: Hostname) -> str | None:
        """Why `name`, which `verdict` allows, may not be looked up now all the same."""
        pattern = self.counts(verdict, name)
        return self.refuses(workload, pattern, name) if pattern else None

    def refuses(self, workload: str, pattern: Pattern, name: Hostname) -> str | None:
        """Why `name`, which `pattern` matches, may not be looked up now; None: it may, and it counts if it is new."""
        if not pattern.wildcard:
            return None
        terms = self._terms
        below = name.removesuffix("." + pattern.host)
        if (labels := below.count(".") + 1) > terms.max_labels:
            return f"{labels} labels below {pattern}, where {terms.max_labels} may be"
        if len(below) > terms.max_length:
            return f"{len(below)} characters below {pattern}, where {terms.max_length} may be"
        account = self._account(workload, pattern.host)
        if name in account.known:
            account.known.move_to_end(name)
            return None
        self._fill(account)
        if account.left < 1:
            return f"too many new names below {pattern}: {terms.burst} at once, {terms.per_hour} an hour"
        account.left -= 1
        account.known[name] = None
        if len(account.known) > MAX_KNOWN:
            account.known.popitem(last=False)
        return None

    def keep(self, workloads: Container[str]) -> None:
        """Forget other workloads: there are none of theirs any more."""
        for workload in [one for one in self._accounts if one not in workloads]:
            del self._accounts[workload]

    def _account(self, workload: str, below: Hostname) -> _Account:
        accounts = self._accounts.setdefault(workload, {})
        found = accounts.get(below)
        if found is None:
            found = accounts[below] = _Account(self._terms.burst, self._clock())
        return found

    def _fill(self, account: _Account) -> None:
        now = self._clock()
        earned = max(0.0, now - account.since) * self._terms.per_hour / _HOUR_S
        account.left = min(account.left + earned, self._terms.burst)
        account.since = now
