"""What the supervisor and a worker say to each other, as bytes. It sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import orjson

from proxy.identity import Change
from proxy.metrics.meter import Snapshot

# --- from the supervisor ---


@dataclass(frozen=True, slots=True)
class Configuration:
    """The first message. With it comes a file that holds `config.document.to_document` as JSON."""


@dataclass(frozen=True, slots=True)
class LogTurns:
    """With it comes what the workers agree with whose turn it is to write to the log (`log.target.share_turns`)."""


@dataclass(frozen=True, slots=True)
class LookupRings:
    """With it comes the memory in which every worker leaves what it told workloads (`rings.share_rings`)."""

    own: int  # the ring of this worker
    count: int


@dataclass(frozen=True, slots=True)
class Door:
    """With it comes a listening socket, or one that takes datagrams; `target` as `config.Door` has it."""

    kind: str  # a `config.DoorKind`
    target: str = ""


@dataclass(frozen=True, slots=True)
class ToOpener:
    """With it comes a socket to the opener, in place of any before it."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Judge by another policy from now on; the first lets connections in. With it comes what the compiler wrote.

    inspects  a rule ends TLS
    http2     one gives clients HTTP/2
    """

    generation: str
    inspects: bool
    http2: bool = False


@dataclass(frozen=True, slots=True)
class Sign:
    """Sign leaves by these issuing CAs from now on. The text goes in the message itself: it must not be missed for want
    of a descriptor."""

    digest: str
    issuing: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Question:
    """How are you? Asked once a second; who does not answer for long is replaced."""


@dataclass(frozen=True, slots=True)
class Reopen:
    """The log file was moved away: write to a new one."""


@dataclass(frozen=True, slots=True)
class Reviewed:
    """Whose token it is; None: nobody's.

    failure  why nobody has said
    """

    number: int
    user: str | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Leave:
    """The gate ends soon: ask clients to go elsewhere with what they ask next. The doors stay open until `Finish`."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Accept nothing more, let what is open end within `grace_s`, write every record, end."""

    grace_s: float


# --- from a worker ---


@dataclass(frozen=True, slots=True)
class Judging:
    """This generation judges every attempt from now on, and all doors are open."""

    generation: str


@dataclass(frozen=True, slots=True)
class Signing:
    """Connections that come from now on are shown leaves of the issuing CAs with this digest."""

    digest: str


@dataclass(frozen=True, slots=True)
class Refused:
    """That generation could not be taken over; the one before it judges."""

    generation: str
    why: str


@dataclass(frozen=True, slots=True)
class Review:
    """Whose token is it? The answer has the same number."""

    number: int
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Failed:
    """It cannot start, and ends."""

    why: str


@dataclass(frozen=True, slots=True)
class Answer:
    """How it is.

    log_failing        decision records cannot be written
    inspector_failing  what inspects ended several times in a row
    counted            since it was started
    inspector_silent   what inspects does not answer
    udp_failing        a socket where datagrams arrive cannot be read
    unanswered         what workloads ask and cannot be told, with why: `DNS (OSError)`
    opener_missing     no socket to the opener came
    openings_stale     what another policy does not admit may still be open
    """

    log_failing: bool
    inspector_failing: bool
    counted: Snapshot
    inspector_silent: bool = False
    udp_failing: bool = False
    unanswered: str = ""
    opener_missing: bool = False
    openings_stale: bool = False


type Told = (
    Change
    | LogTurns
    | LookupRings
    | Configuration
    | Door
    | ToOpener
    | Sign
    | Judge
    | Question
    | Reopen
    | Reviewed
    | Leave
    | Finish
)
type Said = Review | Signing | Judging | Refused | Failed | Answer

_KINDS = (
    Change, Review, Reviewed, LogTurns, LookupRings, Configuration, Door, ToOpener, Sign, Judge, Question, Reopen,
    Leave, Finish, Signing, Judging, Refused, Failed, Answer,
)  # fmt: skip
_BY_NAME: dict[str, Callable[..., Told | Said]] = {kind.__name__: kind for kind in _KINDS}


def to_bytes(message: Told | Said) -> bytes:
    return orjson.dumps({type(message).__name__: asdict(message)})


def from_bytes(text: bytes) -> Told | Said:
    """Raises ValueError, TypeError, KeyError for what no side of ours says."""
    ((kind, fields),) = orjson.loads(text).items()
    return _BY_NAME[kind](**fields)
