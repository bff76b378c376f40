"""What `outgate run` says when the command has ended: counts, and the lines that would admit what was refused."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from policies.explain import explain
from policies.index import Policy
from policies.model import Reason
from policies.words import MalformedWords, parse_words
from proxy.record import Record, describe

MAX_SHOWN = 12  # a port scan must not bury the end of the program's own output
MAX_REMEMBERED = 1000
FAILURES = frozenset(  # the policy admits these; no edit of it would help
    {
        Reason.NAME_NOT_FOUND,
        Reason.RESOLVER_FAILED,
        Reason.UPSTREAM_REFUSED,
        Reason.UPSTREAM_TIMEOUT,
        Reason.UPSTREAM_CERTIFICATE,
        Reason.UPSTREAM_FAILED,
        Reason.CLIENT_CERTIFICATE_REFUSED,
        Reason.CLIENT_GONE,
        Reason.NOT_SERVED,
        Reason.ADDON_FAILED,
        Reason.GATE_FAILED,
    }
)
_SPENT: dict[str, str] = {  # what the policy admits, and only so much of it
    Reason.BUDGET: "its bytes of this hour are used up: raise budget: of {rule}, or wait",
    Reason.LOOKUP_BUDGET: "more new names than a program needs: name the hosts beside {rule}, or raise --dns-new-names",
}


class Summary:
    """A sink that counts. Remembers at most MAX_REMEMBERED different denials."""

    def __init__(self, policy: Policy, workload: str) -> None:
        self._policy = policy
        self._workload = workload
        self.allowed = 0
        self.denied = 0
        self.failed = 0
        self.audited = 0
        self._denials: Counter[tuple[str, str]] = Counter()
        self._query_types: dict[tuple[str, str], set[object]] = {}

    def __call__(self, record: Record) -> None:
        would_deny = record.get("would_be") == "deny"
        if record["verdict"] == "allow" and not would_deny:
            self.allowed += record["stage"] != "dns"  # a lookup that is let through is no use of anything yet
            return
        key = (describe(record), str(record["reason"]))
        if (query_type := record.get("dns.question.type")) and self._is_other_family(key, query_type):
            return
        is_failure = record["reason"] in FAILURES
        self.failed += is_failure
        self.denied += not (would_deny or is_failure)
        self.audited += would_deny
        if key in self._denials or len(self._denials) < MAX_REMEMBERED:
            self._denials[key] += 1

    def _is_other_family(self, key: tuple[str, str], query_type: object) -> bool:
        """A and AAAA are one lookup to the program; they come together, in any order."""
        seen = self._query_types.get(key, set())
        if not seen or query_type in seen:
            if len(self._query_types) < MAX_REMEMBERED or key in self._query_types:
                self._query_types[key] = {query_type}
            return False
        seen.add(query_type)
        return True

    def lines(self) -> Iterator[str]:
        """The closing lines, none where there was nothing to say."""
        if not (self.allowed or self._denials):
            return
        failed = f", {self.failed} failed" if self.failed else ""
        audited = f", {self.audited} that enforcement would deny" if self.audited else ""
        yield f"outgate: {self._workload}: {self.allowed} allowed, {self.denied} denied{failed}{audited}"
        said: list[list[str]] = []  # an edit that is proposed twice would be pasted twice
        for (words, reason), count in list(self._denials.items())[:MAX_SHOWN]:
            yield f"  {words}  {reason}" + (f"  ×{count}" if count > 1 else "")
            advice = self._advice(words, reason)
            if advice not in said:
                said.append(advice)
                yield from (f"      {line}" for line in advice)
        if len(self._denials) > MAX_SHOWN:
            yield f"  … and {len(self._denials) - MAX_SHOWN} more; --log FILE keeps all of them"

    def _advice(self, words: str, reason: str) -> list[str]:
        """The smallest edit that admits it. A refused lookup is a host that was wanted: the edit names the host.

        Words do not carry all that was attempted (fronting, ECH): where they get another reason, no edit is shown.
        """
        words = words.replace("dns://", "tls://")
        try:
            explanation = explain(self._policy, parse_words(self._workload, words, time.time()))
        except MalformedWords:
            return []
        if (spent := _SPENT.get(reason)) and explanation.verdict.rule:
            return [spent.format(rule=explanation.verdict.rule)]
        if not explanation.edits or explanation.verdict.reason != reason:
            return [explanation.advice] if explanation.advice else []
        return [
            line
            for edit in explanation.edits
            for line in (f"to allow it, {edit.where}", *(f"    {text}" for text in edit.lines))
        ]
