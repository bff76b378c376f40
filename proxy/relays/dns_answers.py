"""Answers a workload's DNS questions: the policy says which names exist for it, the gate's resolver where they are.

It knows messages, and no sockets. A denied name reaches no server; of an allowed one only the judged name does, in a
query of our own. Every answer is written here from values.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from policies.addresses import Address
from policies.engine import admit
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.lookups import Lookups
from proxy.original_dst import parse_address
from proxy.record import Peer, Record, Sink, new_id, record_of, stamp
from proxy.relays.buckets import release
from proxy.relays.dns_budget import Budget
from proxy.relays.dns_repeats import Repeat, Repeats
from proxy.relays.dns_services import Found, Services
from proxy.resolver import NameNotFound, Resolution, Resolver, ResolverFailed
from proxy.wire.dns import (
    AAAA,
    IN,
    A,
    ExtendedError,
    MalformedQuery,
    Note,
    Query,
    build_addresses,
    build_failure,
    build_name_error,
    build_nodata,
    build_records,
    parse_query,
)
from proxy.wire.svcb import TYPES as SERVICE_TYPES
from proxy.wire.svcb import write_service
from proxy.wire.targets import TYPES as TARGET_TYPES
from proxy.wire.targets import Target, write_target

if TYPE_CHECKING:
    from proxy.openings import Openings  # here: most gates open nothing

MAX_TTL_S = 300  # a client must come back before a policy that changed is old news
DENIED_TTL_S = 5  # and soon after a name was added to it
MIN_LOOKUP_S = 60  # programs dial later than the TTL of their lookup allows
STEP_S = 8  # up to which that is rounded: what is the same as before need not be told to other processes

_VERSIONS = {A: 4, AAAA: 6}
_ANSWERED_TYPES = frozenset({*_VERSIONS, *SERVICE_TYPES})
_REMEMBERED_TYPES = SERVICE_TYPES | TARGET_TYPES

# NXDOMAIN is for names that do not exist for this workload. These do, and musl gives up a name whose AAAA is NXDOMAIN.
_EXISTS = frozenset({Reason.ANCESTOR, Reason.QUERY_TYPE, Reason.PRIVATE_ADDRESS, Reason.NEVER_REACHED})
# Asked again later, the answer may be another.
_FAILED = frozenset({Reason.RESOLVER_FAILED, Reason.TOO_MANY_CONNECTIONS, Reason.LOG_FAILED, Reason.GATE_FAILED})
# A rule for `*.svc.cluster.local` also covers what ndots makes of every name.
_MAY_BE_NOISE = frozenset({Reason.NO_RULE, Reason.LOOKUP_BUDGET})
_CODES = {
    Reason.UNKNOWN_WORKLOAD: ExtendedError.PROHIBITED,
    Reason.AMBIGUOUS_WORKLOAD: ExtendedError.PROHIBITED,
    Reason.RESOLVER_FAILED: ExtendedError.NO_REACHABLE_AUTHORITY,
    Reason.TOO_MANY_CONNECTIONS: ExtendedError.OTHER,
    Reason.LOG_FAILED: ExtendedError.OTHER,
    Reason.GATE_FAILED: ExtendedError.OTHER,
}


class Question(NamedTuple):
    """One question, judged and not answered yet."""

    message: bytes
    query: Query
    attempt: Attempt
    verdict: Verdict
    id: str
    source: Peer
    destination: Peer
    generation: str  # of the policy that judged
    standing: tuple[object, object]  # when it judged
    error: str | None = None  # what went wrong on our side


class Answers:
    """Judges and answers one message at a time. `malformed` and `search_noise` count what is not recorded.

    workload    names the workload of a source address
    generation  names the policy that `decide` judges by
    standing    while both of it are the very same, so is the verdict on an attempt
    search      domains that programs append to names (resolv.conf): `api.example.corp.internal` for an allowed
                `api.example` is answered here, and is nobody's attempt to reach anything
    budget      of names below wildcards that were not asked for before
    openings    what a lookup lets past the gate; None: nothing
    most        lookups under way at once for one workload, and for one source: one pod must not take them all
    clock       the resolver's
    """

    def __init__(
        self,
        decide: Callable[[Attempt], Verdict],
        resolver: Resolver,
        lookups: Lookups,
        record: Sink,
        *,
        workload: Callable[[Address], str],
        generation: Callable[[], str],
        standing: Callable[[], tuple[object, object]],
        search: Sequence[Hostname],
        budget: Budget,
        most: tuple[int, int],
        clock: Callable[[], float],
        openings: Openings | None = None,
    ) -> None:
        self._decide = decide
        self._resolver = resolver
        self._lookups = lookups
        self._record = record
        self._workload = workload
        self._generation = generation
        self._suffixes = tuple("." + domain for domain in search)
        self._most_of_workload, self._most_of_source = most
        self._clock = clock
        self._openings = openings
        self._standing = standing
        self._repeats = Repeats(standing)
        self._services = Services(resolver, clock=clock)
        self._budget = budget
        self._under_way: Counter[str] = Counter()  # by workload
        self._under_way_from: Counter[str] = Counter()  # by source address
        self.malformed = 0
        self.search_noise = 0

    async def close(self) -> None:
        """End the questions under way."""
        await self._services.close()

    # --- what was asked a moment ago

    def again(self, message: bytes, source: Peer, destination: Peer) -> bytes | None:
        """The answer, recorded, to what this source has asked within this second; None: it is to be judged."""
        known = self._repeats.find(message, source, destination, int(time.time()))
        if known is None or known.workload != self._workload(parse_address(source[0])):
            return None
        if known.expires <= self._clock() or known.ttl_s != self._remaining_s(known.expires):
            return None
        if known.is_lookup:
            self._resolver.count_known()
        self._record(
            known.record | {"time": stamp(time.time()), "id": new_id(), "source.port": source[1], "duration_ms": 0.0}
        )
        return message[:2] + known.answer

    def _keep(self, question: Question, answer: bytes, record: Record, expires: float, *, is_lookup: bool) -> bytes:
        """The answer, remembered for those who ask again. Nothing is to be done for it any more but to send it."""
        repeat = Repeat(question.attempt.workload, answer[2:], record, self._remaining_s(expires), expires, is_lookup)
        second = int(question.attempt.time)
        self._repeats.keep(question.message, question.source, question.destination, second, question.standing, repeat)
        return answer

    # --- the verdict

    def judge(self, message: bytes, source: Peer, destination: Peer) -> Question | None:
        """The question with its verdict; None for what is no question, which gets no answer."""
        try:
            query = parse_query(message)
        except MalformedQuery:
            self.malformed += 1
            return None
        host, fault = _parse_host(query.name)
        attempt = Attempt(
            Stage.DNS,
            self._workload(parse_address(source[0])),
            host,
            port=destination[1],
            time=time.time(),
            query_type="A" if host and self._is_of_zone(query, host) else query.type_text,
            fault=fault,
        )
        error = None
        try:
            verdict = self._decide(attempt)
        except Exception as fault_of_ours:  # in one question; it must not end the answers to all others
            verdict, error = Verdict(Action.DENY, Reason.GATE_FAILED, Stage.DNS), repr(fault_of_ours)
        by, standing = self._generation(), self._standing()
        return Question(message, query, attempt, verdict, new_id(), source, destination, by, standing, error)

    def answer_now(self, question: Question) -> bytes | None:
        """The answer, recorded; or None when the resolver has to be asked."""
        host, query = question.attempt.host, question.query
        if not question.verdict.is_allow:
            return self._refuse(question, question.verdict)
        if host is None or query.qclass != IN or not (query.type in _ANSWERED_TYPES or self._is_of_zone(query, host)):
            self._note(question, question.verdict)
            return build_nodata(query, DENIED_TTL_S)
        if why := self._over_budget(question, host):
            return self._fail(question, Reason.LOOKUP_BUDGET, why)
        if query.type in _REMEMBERED_TYPES:
            found = self._services.cached(host, query.type)
            return self._give_services(question, found) if found else None
        resolution = self._resolver.cached(host)
        if resolution is None or self._is_to_open(question, host, resolution):
            return None
        return self._give(question, host, resolution)

    def _is_of_zone(self, query: Query, host: Hostname) -> bool:
        """Whether it asks for SRV or PTR in a zone of the operator's: who may look the name up may see them there.
        Elsewhere these types exist for nobody, as the policy has it."""
        return query.type in TARGET_TYPES and query.qclass == IN and self._resolver.is_forwarded(host)

    def _over_budget(self, question: Question, host: Hostname) -> str | None:
        """Why this workload may not ask for a name below a wildcard."""
        pattern = self._budget.counts(question.verdict, host)
        if pattern is None:
            return None
        if self._is_search_noise(question.attempt):  # it would cost a name for nothing
            return f"an allowed name with a search domain after it, below {pattern}"
        return self._budget.refuses(question.attempt.workload, pattern, host)

    async def answer_later(self, question: Question) -> bytes:
        """The answer once the resolver has one, recorded."""
        workload, host, source = question.attempt.workload, question.attempt.host, question.source[0]
        assert host is not None  # `answer_now` answers all others
        for counts, whose, most in (
            (self._under_way, workload, self._most_of_workload),
            (self._under_way_from, source, self._most_of_source),
        ):
            if counts[whose] >= most:
                return self._fail(question, Reason.TOO_MANY_CONNECTIONS, f"{most} lookups of {whose} under way")
        self._under_way[workload] += 1
        self._under_way_from[source] += 1
        try:
            if question.query.type in _REMEMBERED_TYPES:
                return self._give_services(question, await self._services.look_up(host, question.query.type))
            resolution = await self._resolver.resolve(host)
            if self._openings and self._is_to_open(question, host, resolution):
                await self._openings.open(*self._to_open(question, host, resolution))
        except NameNotFound as absent:
            self._note(question, _turn(question.verdict, Reason.NAME_NOT_FOUND))
            build = build_nodata if absent.exists else build_name_error
            return build(question.query, self._remaining_s(absent.expires))
        except ResolverFailed as error:
            return self._fail(question, Reason.RESOLVER_FAILED, str(error))
        except asyncio.CancelledError:  # the gate ends, or the client closed; what was asked is told all the same
            self._note(question, _turn(question.verdict, Reason.CLIENT_GONE))
            raise
        except Exception as error:
            return self._fail(question, Reason.GATE_FAILED, repr(error))
        finally:
            release(self._under_way, workload)
            release(self._under_way_from, source)
        return self._give(question, host, resolution)

    # --- the answer

    def _give(self, question: Question, host: Hostname, resolution: Resolution) -> bytes:
        query, verdict = question.query, question.verdict
        admitted: list[Address] = []
        refused: list[Address] = []
        denial = verdict
        for address in resolution.addresses:
            if address.version != _VERSIONS[query.type]:
                continue
            outcome = admit(verdict, address, from_hosts=resolution.from_hosts)
            if outcome.is_allow:
                admitted.append(address)
            else:
                refused.append(address)
                denial = outcome
        # A public name with a private address is how a stranger's server reaches inside (DNS rebinding).
        extra: Record = {"dns.answers.refused": [str(address) for address in refused]} if refused else {}
        if refused and not admitted:
            return self._refuse(question, denial, extra)
        record = self._note(question, verdict, extra)
        ttl_s = self._remaining_s(resolution.expires)
        if admitted:
            until = self._clock() + max(2 * ttl_s, MIN_LOOKUP_S)
            self._lookups.note(question.attempt.workload, host, admitted, ceil(until / STEP_S) * STEP_S)
            answer = build_addresses(query, admitted, ttl_s)
        else:
            answer = build_nodata(query, ttl_s)
        return self._keep(question, answer, record, resolution.expires, is_lookup=True)

    def _is_to_open(self, question: Question, host: Hostname, resolution: Resolution) -> bool:
        """Whether the firewall is to let it past before the answer leaves; to another port only the gate leads."""
        if self._openings is None or resolution.port is not None:
            return False
        return self._openings.needs(*self._to_open(question, host, resolution))

    def _to_open(
        self, question: Question, host: Hostname, resolution: Resolution
    ) -> tuple[str, Address, Hostname, list[Address], int]:
        version = _VERSIONS[question.query.type]
        addresses = [address for address in resolution.addresses if address.version == version]
        source = parse_address(question.source[0])
        return question.attempt.workload, source, host, addresses, self._remaining_s(resolution.expires)

    def _give_services(self, question: Question, found: Found) -> bytes:
        query, ttl_s = question.query, self._remaining_s(found.expires)
        shown, refused = self._sort(question.attempt, found.targets)
        extra: Record = {"dns.answers.refused": refused} if refused else {}
        record = self._note(question, question.verdict, extra)
        if shown:
            answer = build_records(query, [write_target(target, query.type) for target in shown], ttl_s)
        elif found.services:
            answer = build_records(query, map(write_service, found.services), ttl_s)
        else:  # also where the server says NXDOMAIN: that is for A and AAAA to tell
            answer = build_nodata(query, ttl_s)
        return self._keep(question, answer, record, found.expires, is_lookup=False)

    def _sort(self, attempt: Attempt, targets: Sequence[Target]) -> tuple[list[Target], list[str]]:
        """Those whose names this workload may look up, and the names of the others."""
        shown, refused = list[Target](), list[str]()
        for target in targets:
            host, fault = _parse_host(target.name)
            if self._decide(replace(attempt, host=host, fault=fault)).is_allow:
                shown.append(target)
            else:
                refused.append(target.name)
        return shown, refused

    def _refuse(self, question: Question, denial: Verdict, extra: Record | None = None) -> bytes:
        query, reason = question.query, denial.reason
        if reason in _MAY_BE_NOISE and self._is_search_noise(question.attempt):
            self.search_noise += 1
            return build_name_error(query, DENIED_TTL_S)
        self._note(question, denial, extra)
        note = Note(_CODES.get(reason, ExtendedError.BLOCKED), f"{reason}, decision {question.id}")
        if reason in _FAILED:
            return build_failure(query, note)
        if reason in _EXISTS or not query.name:  # the root is above every name
            return build_nodata(query, DENIED_TTL_S, note)
        return build_name_error(query, DENIED_TTL_S, note)

    def _fail(self, question: Question, reason: Reason, what: str) -> bytes:
        return self._refuse(question._replace(error=what), _turn(question.verdict, reason))

    def _is_search_noise(self, attempt: Attempt) -> bool:
        for suffix in self._suffixes:
            if attempt.host is None or not attempt.host.endswith(suffix):
                continue
            host, fault = _parse_host(attempt.host.removesuffix(suffix))
            if fault is None and self._decide(replace(attempt, host=host, query_type="A")).is_allow:
                return True
        return False

    def _note(self, question: Question, verdict: Verdict, extra: Record | None = None) -> Record:
        """The record, handed on."""
        attempt = question.attempt
        asked: Record = {"dns.question.type": question.query.type_text}
        if attempt.host is None:
            asked["dns.question.name"] = question.query.name
        if question.generation:
            asked["policy.generation"] = question.generation
        if question.error is not None:
            asked["error.message"] = question.error
        record = record_of(
            attempt,
            verdict,
            id=question.id,
            source=question.source,
            destination=question.destination,
            started=attempt.time,
            extra=asked | (extra or {}),
        )
        self._record(record)
        return record

    def _remaining_s(self, expires: float) -> int:
        return int(min(max(expires - self._clock(), 1), MAX_TTL_S))


def _turn(verdict: Verdict, reason: Reason) -> Verdict:
    """An allow that came to nothing."""
    return replace(verdict, action=Action.DENY, reason=reason, would_be=None)


def _parse_host(text: str) -> tuple[Hostname | None, Reason | None]:
    try:
        return parse_hostname(text), None
    except MalformedName:
        return None, Reason.MALFORMED_NAME
