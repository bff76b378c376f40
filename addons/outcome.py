"""How one judged request ended, whichever host carried it: a value. Records are made of it elsewhere."""

from __future__ import annotations

from typing import NamedTuple

from addons.judge import Conversation, Judgement


class Outcome(NamedTuple):
    """How one request ended. Bytes are those of the bodies, as the workload sees them.

    started   POSIX seconds
    upstream  the address and port that were dialled; None where none was
    status    what the client was answered with, by the origin or by us; None where nothing was answered
    """

    judgement: Judgement
    conversation: Conversation
    started: float
    upstream: tuple[str, int] | None = None
    status: int | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
