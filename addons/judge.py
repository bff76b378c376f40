"""The HTTP verdict: reads a request head into an attempt, has it decided, gives a denial its status. No sockets here.

It imports no mitmproxy, so that every HTTP host (the mitmproxy addons beside it, or another) asks this one judge about
Host, framing and path, and none of them can read a request in a way of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from addons.heads import CONNECTION_SPECIFIC as CONNECTION_SPECIFIC  # of those who forward heads: re-exported
from addons.heads import Fault, Fields, Head, Heard, place, read_head
from addons.precedents import Precedent, Precedents, Standing
from policies.hostnames import Hostname
from policies.model import Action, Attempt, HostRule, Reason, Stage, Verdict
from policies.paths import MalformedPath, parse_path

BAD_REQUEST, FORBIDDEN, METHOD_NOT_ALLOWED, TIMEOUT, MISDIRECTED, TOO_LARGE = 400, 403, 405, 408, 421, 431
PROXY_AUTHENTICATION, TOO_MANY_REQUESTS, BAD_GATEWAY, UNAVAILABLE = 407, 429, 502, 503
TARGET_TOO_LONG, EXPECTATION_FAILED, VERSION_NOT_SUPPORTED = 414, 417, 505

_STATUS = {
    Reason.MALFORMED_NAME: BAD_REQUEST,
    Reason.MALFORMED_PATH: BAD_REQUEST,
    Reason.MALFORMED_REQUEST: BAD_REQUEST,
    Reason.CREDENTIALS: PROXY_AUTHENTICATION,
    Reason.HELLO_TIMEOUT: TIMEOUT,
    Reason.HOST_MISMATCH: MISDIRECTED,
    Reason.NAME_NOT_FOUND: BAD_GATEWAY,
    Reason.RESOLVER_FAILED: BAD_GATEWAY,
    Reason.UPSTREAM_REFUSED: BAD_GATEWAY,
    Reason.UPSTREAM_TIMEOUT: BAD_GATEWAY,
    Reason.UPSTREAM_CERTIFICATE: BAD_GATEWAY,
    Reason.UPSTREAM_FAILED: BAD_GATEWAY,
    Reason.OVERLOADED: UNAVAILABLE,
    Reason.TOO_SLOW: TIMEOUT,
    Reason.HTTP2_FLOOD: TOO_MANY_REQUESTS,
    Reason.LOG_FAILED: UNAVAILABLE,
    Reason.ADDON_FAILED: BAD_GATEWAY,
    Reason.GATE_FAILED: BAD_GATEWAY,
}


@dataclass(slots=True)
class Conversation:
    """One client connection: who opened it, and for which name.

    opened_for   the SNI; on a plain port the first Host that was asked for
    destination  address and port that the client asked for, where that is known
    allowed      the latest allow: the verdict under which an upstream connection is opened
    from_hosts   the addresses that were dialled last are the operator's own
    user         the name of the proxy credential that was verified, if one was
    failure      why the upstream connection of the request under way failed; whoever answers the client takes it away
    proxied      requests are in absolute form, and each is for the host and port it names: `opened_for` and `port` are
                 those of the latest allowed one
    credential   what each request on a proxied connection must prove to know (`addons.credential`); None: nothing
    """

    workload: str
    port: int
    plain: bool
    source: tuple[str, int]
    opened_for: Hostname | None = None
    destination: tuple[str, int] | None = None
    allowed: Verdict | None = None
    from_hosts: bool = False
    failure: Unreachable | None = None
    user: str | None = None
    proxied: bool = False
    credential: str | None = None


class Unreachable(Exception):
    """An allowed request whose upstream cannot be had. `note` says what happened, in words for the client."""

    def __init__(self, reason: Reason, note: str) -> None:
        self.reason = reason
        self.note = note
        super().__init__(f"{reason}: {note}")


@dataclass(slots=True)  # frozen, it would take four times as long to make one for each request
class Judgement:
    """The verdict on one request, and what is done with it.

    status    what the client is answered with; None: forward
    note      what exactly is wrong, where the reason alone does not say it
    has_body  a body follows the head; a denial does not read it and closes the connection instead
    page      the client prefers a page to read over problem+json
    grpc      the client speaks gRPC, which has a status of its own
    generation of the policy that judged; empty where nobody asked for it
    precedent that it follows, or that others may follow; None: the verdict is this request's alone
    """

    id: str
    attempt: Attempt
    verdict: Verdict
    status: int | None = None
    note: str = ""
    has_body: bool = False
    page: bool = False
    grpc: bool = False
    generation: str = ""
    precedent: Precedent | None = None

    @property
    def is_forward(self) -> bool:
        return self.status is None

    @property
    def closes(self) -> bool:
        """The connection ends with this answer: bytes still under way could be taken for another request."""
        return self.status is not None and (self.has_body or self.attempt.fault is not None)


class Judge:
    """Judges request heads. `decide` and `generation` may be replaced at any time, for the next request.

    now       POSIX seconds
    new_id    makes the id that the client and the decision record share
    identify  finds the workload of a connection anew, before each request; None: it never changes
    standing  as `Precedents` has it, of `decide`; None: every request is judged by itself
    """

    def __init__(
        self,
        decide: Callable[[Attempt], Verdict],
        *,
        now: Callable[[], float],
        new_id: Callable[[], str],
        identify: Callable[[Conversation], str] | None = None,
        standing: Callable[[], Standing] | None = None,
    ) -> None:
        self.decide = decide
        self.generation = ""
        self._identify = identify
        self._now = now
        self._new_id = new_id
        self._precedents = Precedents(standing) if standing else None

    def opening(self, conversation: Conversation) -> Verdict:
        """The verdict on the TLS of a conversation: whether its origin may be dialled before the first request."""
        self._find_workload(conversation)
        host, port = conversation.opened_for, conversation.port
        return self.decide(Attempt(Stage.TLS, conversation.workload, host, port, time=self._now()))

    def request(
        self,
        conversation: Conversation,
        method: str,
        target: str,
        version: str,
        fields: Fields,
        *,
        authority: str | None = None,
    ) -> Judgement:
        """The judgement of one request; `target` (in origin or absolute form) and `fields` are as received.

        `authority` is HTTP/2's `:authority`; None where there was none.
        """
        self._find_workload(conversation)
        head = Head(None if conversation.proxied else conversation.opened_for, conversation.port, target)
        fault: Fault | None = None
        try:
            read_head(head, conversation, method, version, fields, authority)
        except Fault as found:
            fault = found
        return self._conclude(conversation, method, head, fault)

    def heard(self, conversation: Conversation, method: str, target: str, fields: Heard) -> Judgement:
        """The judgement of one HTTP/1 request that a strict grammar has read: its framing is no doubt any more."""
        self._find_workload(conversation)
        opened_for, host = conversation.opened_for, fields.host
        if self._precedents is None or opened_for is None or host is None or conversation.proxied:
            return self._hear(conversation, method, target, fields)
        if fields.methods or fields.targets:
            return self._hear(conversation, method, target, fields)
        known = self._precedents.of_now(self._now())
        asked = (conversation.workload, opened_for, conversation.port, conversation.plain, method, target, host,
                 fields.upgrade)  # fmt: skip
        precedent = known.get(asked)
        if precedent is None:
            judgement = self._hear(conversation, method, target, fields)
            if judgement.attempt.fault is None:
                precedent = Precedent(judgement.attempt, judgement.verdict, judgement.status, judgement.note)
                self._precedents.keep(known, asked, precedent)
                judgement.precedent = precedent
            return judgement
        if precedent.status is None:
            conversation.allowed = precedent.verdict
        return Judgement(
            self._new_id(),
            precedent.attempt,
            precedent.verdict,
            precedent.status,
            precedent.note,
            fields.has_body,
            fields.page and precedent.status is not None,
            generation=self.generation,
            precedent=precedent,
        )

    def _hear(self, conversation: Conversation, method: str, target: str, fields: Heard) -> Judgement:
        head = Head(None if conversation.proxied else conversation.opened_for, conversation.port, target)
        head.has_body, head.upgrade, head.page = fields.has_body, fields.upgrade, fields.page
        head.methods.extend(fields.methods)
        head.targets.extend(fields.targets)
        fault: Fault | None = None
        try:
            place(head, conversation, fields.host or "", fields.credentials)
        except Fault as found:
            fault = found
        return self._conclude(conversation, method, head, fault)

    def _conclude(self, conversation: Conversation, method: str, head: Head, fault: Fault | None) -> Judgement:
        attempt = Attempt(
            stage=Stage.HTTP,
            workload=conversation.workload,
            host=head.host,
            port=head.port,
            time=self._now(),
            method=method,
            target=head.target,
            plain=conversation.plain,
            upgrade=head.upgrade,
            opened_for=head.host if conversation.proxied else conversation.opened_for,
            fault=fault.reason if fault else None,
        )
        verdict = self.decide(attempt)
        for other in _other_readings(attempt, head):
            if not verdict.is_allow:
                break
            if not (second := self.decide(other)).is_allow:
                attempt, verdict = other, second  # the record and the answer say what was refused
            elif second.would_be:
                verdict = second
        if conversation.opened_for is None and fault is None and not conversation.proxied:
            conversation.opened_for = head.host
        if verdict.is_allow:
            conversation.allowed = verdict
            if conversation.proxied:
                conversation.opened_for, conversation.port = head.host, head.port
            return self._judgement(attempt, verdict, has_body=head.has_body, grpc=head.grpc)
        status = (fault and fault.status) or _STATUS.get(verdict.reason, FORBIDDEN)
        note = fault.note if fault else _explain(attempt, verdict)
        return self._judgement(attempt, verdict, status, note, has_body=head.has_body, page=head.page, grpc=head.grpc)

    def unreadable(
        self, conversation: Conversation, note: str, *, status: int = BAD_REQUEST, fault: Reason | None = None
    ) -> Judgement:
        """The judgement of bytes that are no request head (too long, too slow, not HTTP). Always a denial."""
        self._find_workload(conversation)
        attempt = Attempt(
            stage=Stage.HTTP,
            workload=conversation.workload,
            host=conversation.opened_for,
            port=conversation.port,
            time=self._now(),
            plain=conversation.plain,
            opened_for=conversation.opened_for,
            fault=fault or Reason.MALFORMED_REQUEST,
        )
        return self._judgement(attempt, self.decide(attempt), status, note)

    def _find_workload(self, conversation: Conversation) -> None:
        """Rights that its source had under a former policy do not stay with a connection that is kept alive."""
        if self._identify is not None:
            conversation.workload = self._identify(conversation)

    def _judgement(
        self,
        attempt: Attempt,
        verdict: Verdict,
        status: int | None = None,
        note: str = "",
        *,
        has_body: bool = False,
        page: bool = False,
        grpc: bool = False,
    ) -> Judgement:
        return Judgement(self._new_id(), attempt, verdict, status, note, has_body, page, grpc, self.generation)

    def fail(self, judgement: Judgement, reason: Reason, note: str, status: int | None = None) -> Judgement:
        """The judgement of an allowed request that is answered with a failure: upstream, its own body, or the gate.

        Without a `status` it is the one that goes with the reason.
        """
        verdict = replace(judgement.verdict, action=Action.DENY, reason=reason, would_be=None)
        return replace(judgement, verdict=verdict, status=status or _STATUS.get(reason, FORBIDDEN), note=note)

    def break_off(self, judgement: Judgement, reason: Reason) -> Judgement:
        """The judgement of an allowed request that ended early without an answer of ours."""
        return replace(judgement, verdict=replace(judgement.verdict, reason=reason))


def _other_readings(attempt: Attempt, head: Head) -> list[Attempt]:
    """The same request as an origin reads it that heeds overriding headers."""
    if not (head.methods or head.targets):
        return []
    return [
        replace(attempt, method=method, target=target)
        for method in (attempt.method, *head.methods)
        for target in (attempt.target, *head.targets)
    ][1:]


def _explain(attempt: Attempt, verdict: Verdict) -> str:
    """What exactly the engine refused in method or path."""
    if verdict.reason is Reason.MALFORMED_PATH:
        literal = isinstance(verdict.rule, HostRule) and verdict.rule.encoded_slash
        try:
            parse_path(attempt.target, encoded_slash=literal)
        except MalformedPath as error:
            return str(error)
    if verdict.reason is Reason.MALFORMED_REQUEST:
        return "the method is not a known token in upper case"
    return ""
