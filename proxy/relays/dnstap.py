"""Hears by dnstap what the site's own name servers answer to workloads, and opens what the policy admits of it.

It answers nobody and asks nobody. Who may write to the socket is trusted as a name server is: to say which addresses a
name has, and no more. What a workload may look up, and which addresses a name may have, is judged as ever.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from policies.addresses import Address
from policies.engine import admit
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.hosts import DNS_PORT
from proxy.lookups import Lookups
from proxy.metrics.meter import Counts
from proxy.policy_in_force import PolicyInForce
from proxy.record import Peer, Record, Sink, new_id, record_of
from proxy.relays.dns_sockets import accept
from proxy.wire.dns import Answer, MalformedResponse, Query, parse_answered
from proxy.wire.dnstap import CLIENT_RESPONSE, FrameStream, MalformedFrame, Tap, parse_tap

if TYPE_CHECKING:
    from proxy.openings import Openings

READ = 16 * 1024  # then other work has its turn
MAX_TTL_S = 3600  # the client was told the whole TTL; a forged one must not keep an address open for years
MIN_LOOKUP_S = 60  # programs dial later than the TTL of their lookup allows
MAX_ADDRESSES = 256  # of one answer


class Observed(StrEnum):
    """What came of an answer that a name server gave to one of its clients."""

    ADMITTED = "admitted"  # and remembered, and opened where a rule says so
    DENIED = "denied"  # and recorded
    EMPTY = "empty"  # it told no address, or was noise
    UNKNOWN_WORKLOAD = "unknown_workload"  # the client is none of ours


class TapEnd(StrEnum):
    """How a stream of a sender ended."""

    FINISHED = "finished"
    CLOSED = "closed"
    MALFORMED = "malformed"
    SLOW = "slow"
    REFUSED = "refused"  # there were too many


@dataclass(frozen=True, slots=True, kw_only=True)
class TapLimits:
    senders: int = 16  # at once; a name server keeps one connection, or one for each thread
    frame_timeout_s: float = 10.0  # for a frame that was begun, and for the handshake


@dataclass(frozen=True, slots=True)
class _Lookup:
    """One that a client made of a server. `name` is as it was asked."""

    client: tuple[Address, int]
    server: tuple[Address, int] | None
    name: str
    attempt: Attempt


class Observer:
    """Serves any number of senders.

    openings  lets workloads past the gate; None: what was looked up is only remembered
    search    domains that programs append to names: an allowed name with one behind it is nobody's attempt
    clock     of `lookups`
    """

    def __init__(
        self,
        in_force: PolicyInForce,
        lookups: Lookups,
        record: Sink,
        counts: Counts,
        *,
        openings: Openings | None = None,
        search: Sequence[Hostname] = (),
        limits: TapLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._in_force = in_force
        self._lookups = lookups
        self._record = record
        self._counts = counts
        self._openings = openings
        self._suffixes = tuple("." + domain for domain in search)
        self._limits = limits or TapLimits()
        self._clock = clock
        self.senders = 0

    async def serve(self, listener: socket.socket) -> None:
        """Hear who connects to a listening socket until cancelled. Raises OSError if the socket breaks."""
        listener.setblocking(False)
        async with asyncio.TaskGroup() as group:
            while True:
                sock = await accept(listener)
                if self.senders >= self._limits.senders:
                    self._counts.count("outgate_dnstap_streams_total", TapEnd.REFUSED)
                    sock.close()
                    continue
                self.senders += 1
                group.create_task(self._hear(sock)).add_done_callback(partial(self._leave, sock))

    def _leave(self, sock: socket.socket, _: asyncio.Task[None]) -> None:
        sock.close()
        self.senders -= 1

    async def _hear(self, sock: socket.socket) -> None:
        end = TapEnd.CLOSED
        try:
            end = await self._follow(sock)
        except MalformedFrame:
            end = TapEnd.MALFORMED
        except TimeoutError:
            end = TapEnd.SLOW
        except OSError:  # a sender that does not wait for FINISH resets
            pass
        self._counts.count("outgate_dnstap_streams_total", end)

    async def _follow(self, sock: socket.socket) -> TapEnd:
        """Raises MalformedFrame, OSError; TimeoutError for a frame that does not end in time."""
        loop = asyncio.get_running_loop()
        stream = FrameStream()
        deadline: float | None = loop.time() + self._limits.frame_timeout_s
        while not stream.is_over:
            async with asyncio.timeout_at(deadline):
                received = await loop.sock_recv(sock, READ)
            if not received:
                return TapEnd.CLOSED
            has_moved = False
            for frame in stream.feed(received):
                has_moved = True
                await self.take(parse_tap(frame))
            if has_moved or deadline is None:
                deadline = loop.time() + self._limits.frame_timeout_s
            if reply := stream.reply():
                async with asyncio.timeout(self._limits.frame_timeout_s):
                    await loop.sock_sendall(sock, reply)
            if stream.is_started and not stream.is_amid_frame:
                deadline = None  # a server may be silent for as long as it likes
            await asyncio.sleep(0)  # none of these awaits pauses for a sender that is quick enough
        return TapEnd.FINISHED

    async def take(self, tap: Tap) -> None:
        """Judge one message. Returns when what it admits is open, or after the deadline of openings."""
        if tap.type != CLIENT_RESPONSE or tap.client is None:
            return
        try:
            query, answer = parse_answered(tap.response)
        except MalformedResponse:  # a server may well answer FORMERR, without a question
            return self._count(Observed.EMPTY)
        lookup = self._lookup(tap.client, tap.server, query)
        try:
            verdict = self._in_force.decide(lookup.attempt)
        except Exception as error:  # a fault of ours in one answer must not end the hearing of all others
            denial = Verdict(Action.DENY, Reason.GATE_FAILED, Stage.DNS)
            return self._deny(lookup, denial, {"error.message": repr(error)})
        if verdict.is_allow:
            if verdict.would_be:
                self._note(lookup, verdict)
            await self._admit(lookup, verdict, answer)
        elif verdict.reason is Reason.UNKNOWN_WORKLOAD:  # a site's server answers many that are none of ours
            self._count(Observed.UNKNOWN_WORKLOAD)
        elif verdict.reason is Reason.NO_RULE and self._is_search_noise(lookup.attempt):
            self._count(Observed.EMPTY)
        else:
            self._deny(lookup, verdict)

    def _lookup(self, client: tuple[Address, int], server: tuple[Address, int] | None, query: Query) -> _Lookup:
        host, fault = _parse_host(query.name)
        attempt = Attempt(
            Stage.DNS,
            self._in_force.identify(client[0]),
            host,
            port=server[1] if server else DNS_PORT,
            time=time.time(),
            query_type=query.type_text,
            fault=fault,
        )
        return _Lookup(client, server, query.name, attempt)

    async def _admit(self, lookup: _Lookup, verdict: Verdict, answer: Answer) -> None:
        outcomes = [(address, admit(verdict, address)) for address in answer.addresses[:MAX_ADDRESSES]]
        admitted = [address for address, outcome in outcomes if outcome.is_allow]
        if outcomes and not admitted:
            refused = [str(address) for address, _ in outcomes]
            return self._deny(lookup, outcomes[-1][1], {"dns.answers.refused": refused})
        host, workload, source = lookup.attempt.host, lookup.attempt.workload, lookup.client[0]
        if not admitted or host is None:
            return self._count(Observed.EMPTY)
        self._count(Observed.ADMITTED)
        ttl_s = min(answer.ttl_s, MAX_TTL_S)
        self._lookups.note(workload, host, admitted, self._clock() + max(2 * ttl_s, MIN_LOOKUP_S))
        if self._openings and self._openings.needs(workload, source, host, admitted, ttl_s):
            await self._openings.open(workload, source, host, admitted, ttl_s)

    def _is_search_noise(self, attempt: Attempt) -> bool:
        for suffix in self._suffixes:
            if attempt.host is None or not attempt.host.endswith(suffix):
                continue
            host, fault = _parse_host(attempt.host.removesuffix(suffix))
            if fault is None and self._in_force.decide(replace(attempt, host=host, query_type="A")).is_allow:
                return True
        return False

    def _deny(self, lookup: _Lookup, denial: Verdict, extra: Record | None = None) -> None:
        self._count(Observed.DENIED)
        self._note(lookup, denial, extra)

    def _note(self, lookup: _Lookup, verdict: Verdict, extra: Record | None = None) -> None:
        attempt = lookup.attempt
        seen: Record = {"dns.question.type": attempt.query_type, "dns.observed": True}
        if attempt.host is None:
            seen["dns.question.name"] = lookup.name
        self._record(
            record_of(
                attempt,
                verdict,
                id=new_id(),
                source=_peer(lookup.client),
                destination=lookup.server and _peer(lookup.server),
                extra=seen | (extra or {}),
            )
        )

    def _count(self, outcome: Observed) -> None:
        self._counts.count("outgate_dnstap_answers_total", outcome)


def _peer(found: tuple[Address, int]) -> Peer:
    return str(found[0]), found[1]


def _parse_host(text: str) -> tuple[Hostname | None, Reason | None]:
    try:
        return parse_hostname(text), None
    except MalformedName:
        return None, Reason.MALFORMED_NAME
