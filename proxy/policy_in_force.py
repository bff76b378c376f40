"""The policy that a process judges by, in one place, since it may be another one at any moment. The engine judges."""

from __future__ import annotations

from dataclasses import replace

from policies.engine import decide, identify
from policies.index import Policy, match_pod
from policies.model import AMBIGUOUS, CONTRADICTED, STALE, Address, Attempt, Reason, Verdict
from proxy.identity import Doubt, Pod, Pods, is_pod_user


class PolicyInForce:
    """Whoever judges asks here each time, and keeps nothing of it.

    policy    set anew by a reload
    workload  every attempt is this workload's; None: as its source address or its user says
    pods      of the cluster that the gate watches
    """

    def __init__(self, policy: Policy, workload: str | None, pods: Pods | None = None) -> None:
        self.policy = policy
        self._workload = workload
        self._pods = pods
        self._matched: dict[str, str | None] = {}  # workload by uid, of one policy and one version of the pods
        self._matched_by: tuple[Policy, int] | None = None
        self._closed_for: Reason | None = None

    def close_for(self, reason: Reason | None) -> None:
        """Deny every attempt for `reason`, until it is None."""
        self._closed_for = reason

    @property
    def standing(self) -> tuple[object, object]:
        """While both are the very same, what `decide` says of an attempt changes with its time alone."""
        return self.policy, self._closed_for

    def decide(self, attempt: Attempt) -> Verdict:
        if self._closed_for and not attempt.fault:
            attempt = replace(attempt, fault=self._closed_for)
        return decide(self.policy, attempt)

    def identify(self, address: Address, user: str | None = None) -> str:
        """The workload of a source, by what holds now: its credential, its pod, or the prefixes around its address."""
        if self._workload:
            return self._workload
        if self._pods is None or (user is not None and user in self.policy.users):
            return identify(self.policy, address, user)
        if user is not None and is_pod_user(user):
            vouched = self._pods.vouched(user, address)
            return CONTRADICTED if vouched is None else self._match(vouched) or identify(self.policy, address)
        found = self._pods.who(address)
        if isinstance(found, Pod):
            return self._match(found) or identify(self.policy, address)
        if found is not None:
            return STALE if found is Doubt.STALE else AMBIGUOUS
        return identify(self.policy, address)

    def _match(self, pod: Pod) -> str | None:
        assert self._pods is not None
        if (
            self._matched_by is None
            or self._matched_by[0] is not self.policy
            or self._matched_by[1] != self._pods.version
        ):
            self._matched = {}
            self._matched_by = self.policy, self._pods.version
        if pod.uid not in self._matched:
            self._matched[pod.uid] = match_pod(self.policy.pods, pod.namespace, pod.service_account, dict(pod.labels))
        return self._matched[pod.uid]
