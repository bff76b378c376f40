"""The policy that a process judges by, in one place, since it may be another one at any moment. The engine judges."""

from __future__ import annotations

from dataclasses import replace

from policies.engine import decide, identify
from policies.index import Policy
from policies.model import Address, Attempt, Reason, Verdict


class PolicyInForce:
    """Whoever judges asks here each time, and keeps nothing of it.

    policy    set anew by a reload
    workload  every attempt is this workload's; None: as its source address or its user says
    """

    def __init__(self, policy: Policy, workload: str | None) -> None:
        self.policy = policy
        self._workload = workload
        self._closed_for: Reason | None = None

    def close_for(self, reason: Reason | None) -> None:
        """Deny every attempt for `reason`, until it is None."""
        self._closed_for = reason

    def decide(self, attempt: Attempt) -> Verdict:
        if self._closed_for and not attempt.fault:
            attempt = replace(attempt, fault=self._closed_for)
        return decide(self.policy, attempt)

    def identify(self, address: Address, user: str | None = None) -> str:
        return self._workload or identify(self.policy, address, user)
