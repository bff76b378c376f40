"""Verdicts on requests that were judged a moment ago, for those that come again word for word. It judges nothing.

Programs ask for the same few paths again and again. Within one day, under one policy, the verdict on a request depends
on what an `Asked` holds and on nothing else, where no header overrides its method or path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from policies.hostnames import Hostname
from policies.model import Attempt, Verdict

MAX_KNOWN = 2048
MAX_TEXT = 512  # characters of one: with MAX_KNOWN, some 2 MiB
DAY_S = 86400

type Standing = tuple[object, object]
# The workload, what its connection was opened for, its port, whether it is plain; method, target, Host, Upgrade.
type Asked = tuple[str, Hostname, int, bool, str, str, str, str | None]


@dataclass(slots=True)
class Precedent:
    """The verdict on an attempt.

    recorded  for whoever records: the latest record of it, and under which `circumstances` another is like it
    """

    attempt: Attempt
    verdict: Verdict
    status: int | None
    note: str
    circumstances: tuple[object, ...] = ()
    recorded: Mapping[str, object] = field(default_factory=dict)


class Precedents:
    """Those of one day and one policy.

    standing  two things that are the very same while, within one day, the same attempt gets the same verdict
    """

    def __init__(self, standing: Callable[[], Standing]) -> None:
        self._standing = standing
        self._stood: Standing = (None, None)
        self._day = 0.0
        self._known: dict[Asked, Precedent] = {}

    def of_now(self, seconds: float) -> dict[Asked, Precedent]:
        """Those that hold at `seconds`; to be asked at once, and not to be kept."""
        standing, stood = self._standing(), self._stood
        day = seconds // DAY_S
        if day != self._day or standing[0] is not stood[0] or standing[1] is not stood[1]:
            self._known = {}
            self._stood, self._day = standing, day
        return self._known

    @staticmethod
    def keep(known: dict[Asked, Precedent], asked: Asked, precedent: Precedent) -> None:
        """Into what `of_now` gave before the verdict was asked for: of another policy since, it is lost with that."""
        _, _, _, _, method, target, host, upgrade = asked
        if len(method) + len(target) + len(host) + len(upgrade or "") > MAX_TEXT:
            return
        if len(known) >= MAX_KNOWN:
            known.clear()
        known[asked] = precedent
