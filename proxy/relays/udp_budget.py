"""What rules with `budget` have let pass, and what they let pass yet. It knows no sockets and judges no rules.

A budget is of a workload and of what its rule names, not of a session: another source port, another connection or a
reload of the same rule begins no new one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

from policies.model import TransportRule

HEADERS = 28  # of IPv4 and UDP: an empty datagram says something too, and must not be free
_MINUTE_S = 60.0
_WINDOW = 60  # whole minutes that count beside the one that runs: so no hour, wherever it begins, has more


class Account:
    """The bytes of the last hour, both ways, against the most there may be."""

    __slots__ = ("_clock", "_minutes", "_spent", "most")

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self.most = most
        self._clock = clock
        self._spent = 0
        self._minutes: deque[tuple[int, int]] = deque()  # which minute, bytes in it

    @property
    def spent(self) -> int:
        self._forget(int(self._clock() // _MINUTE_S))
        return self._spent

    def take(self, size: int) -> bool:
        """Whether a datagram of `size` bytes may pass now; if so it counts."""
        minute = int(self._clock() // _MINUTE_S)
        self._forget(minute)
        size += HEADERS
        if self._spent + size > self.most:
            return False
        self._spent += size
        before = self._minutes.pop()[1] if self._minutes and self._minutes[-1][0] == minute else 0
        self._minutes.append((minute, before + size))
        return True

    def _forget(self, minute: int) -> None:
        while self._minutes and self._minutes[0][0] < minute - _WINDOW:
            self._spent -= self._minutes.popleft()[1]


class Budgets:
    """Accounts by workload and rule, wherever the rule stands in the policy."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[Hashable, Account] = {}

    def account(self, workload: str, rule: object) -> Account | None:
        """What `rule` counts against for `workload`, with the budget that it has now; None: it has none."""
        if not isinstance(rule, TransportRule) or rule.budget is None:
            return None
        to = rule.host or rule.tag or frozenset(rule.networks)
        key = workload, to, frozenset(rule.ports)
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(rule.budget, self._clock)
        account.most = rule.budget
        return account

    def sweep(self) -> None:
        """Forget accounts against which nothing counts any more: so a rule that went and comes again goes on."""
        for key in [key for key, account in self._accounts.items() if not account.spent]:
            del self._accounts[key]
