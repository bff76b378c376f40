"""The parts of a worker put together from its configuration: a gate, its log, and what counts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import BinaryIO

from policies.model import Reason
from proxy.compiled import NotCompiled, read_policy
from proxy.config import Config, DoorKind, HttpHost, OnLogFailure, SocketAddress, carrier
from proxy.explicit.verifier import Unverified, Verifier
from proxy.identity import Change, Pods
from proxy.issuing import describe
from proxy.log.decision_log import open_log
from proxy.lookups_shared import SharedLookups
from proxy.metrics.meter import Meter, Totals
from proxy.opener.link import Link
from proxy.options import new_authority, say
from proxy.original_dst import redirected_dst
from proxy.relays.dns import DnsLimits
from proxy.relays.dns_budget import NewNames
from proxy.relays.udp_sockets import parse_target
from proxy.rings import Rings
from proxy.runtime import Gate, Settings
from proxy.worker.messages import Answer, Judge, Review, Reviewed, Said

SETTLE_S = 0.25


class Serving:
    """What a worker serves with. Its doors open with the first policy, and not before.

    turns  shared by all who write to the log
    tell   says something to the supervisor
    rings  shared by all who answer DNS
    Raises OSError, CredentialsError.
    """

    def __init__(
        self, config: Config, turns: int | None, tell: Callable[[Said], None], rings: Rings | None = None
    ) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._log = open_log(config.log, turns=turns, changed=self._log_changed)
        self._inner = Totals()
        self._meter = Meter(self._log, self._stats, inner=self._inner)
        self._tell = tell
        self._verifier = self._make_verifier()
        self._reviews: dict[int, asyncio.Future[str | None]] = {}  # of tokens, by number
        self._review_numbers = count(1)
        self._settling: asyncio.Task[None] | None = None
        self._has_news = False
        self._lookups = SharedLookups(rings) if rings else None
        self._doors: list[tuple[socket.socket, DoorKind, str]] = []
        self._gate: Gate | None = None
        self._pods = Pods() if config.kubernetes else None
        self._link = Link() if config.openings else None
        self._issuing = ""
        self._carrier = carrier(config.http_host, config.addons)
        self._needs_inspector = self._is_leaving = False

    @property
    def is_open(self) -> bool:
        return self._gate is not None

    def add_door(self, sock: socket.socket, kind: DoorKind, target: str = "") -> None:
        """One more listening socket, or one for datagrams, for when there is a policy."""
        self._doors.append((sock, kind, target))

    def link(self, opener: socket.socket) -> None:
        """Ask the process at the other end of `opener` for openings, and no other."""
        if self._link:
            self._link.attach(opener)

    async def judge_by(self, judge: Judge, compiled: BinaryIO) -> None:
        """Judge by the policy in `compiled`, which is ours from now on. Raises NotCompiled; then all is as it was."""
        if self._gate:
            await self._gate.swap(compiled)
        else:
            self._gate = self._open(compiled)
        if self._gate.openings:
            await self._gate.openings.review()
        self._needs_inspector = judge.http2 or (judge.inspects and self._carrier is HttpHost.MITMPROXY)
        if self._needs_inspector:
            self._gate.start_inspector()

    def sign_by(self, issuing: str) -> None:
        """Show leaves of these issuing CAs on connections that come from now on."""
        self._issuing = issuing
        if self._gate:
            self._gate.sign_by(issuing)

    def know(self, change: Change) -> None:
        """Go by what is new of the cluster's pods. Raises ValueError, TypeError, KeyError for what says nothing."""
        if self._pods is not None:
            self._pods.take(change)
        if self._gate:
            self._gate.know(change)
        self._has_news = True
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle())

    async def _settle(self) -> None:
        """At most a few times a second: many pods may change at once."""
        while self._has_news and self._gate:
            self._has_news = False
            await self._gate.review_sources()
            await asyncio.sleep(SETTLE_S)

    def heed_review(self, reviewed: Reviewed) -> None:
        """Whose token it is that was asked about."""
        waiting = self._reviews.get(reviewed.number)
        if waiting is None or waiting.done():
            return
        if reviewed.failure:
            waiting.set_exception(Unverified(reviewed.failure))
        else:
            waiting.set_result(reviewed.user)

    def _make_verifier(self) -> Verifier | None:
        config = self._config
        has_tokens = config.kubernetes is not None and config.kubernetes.token_audience is not None
        if config.credentials is None and not has_tokens:
            return None
        path = Path(config.credentials) if config.credentials else None
        return Verifier(path, say, review=self._review if has_tokens else None)

    async def _review(self, token: str) -> str | None:
        """Raises Unverified."""
        number = next(self._review_numbers)
        waiting = self._reviews[number] = self._loop.create_future()
        self._tell(Review(number, token))
        try:
            user: str | None = await waiting  # the supervisor answers each, in its own time
            return user
        finally:
            del self._reviews[number]

    def answer(self) -> Answer:
        """How it is. An inspector that ended is tried again, so that a gate recovers which nobody uses meanwhile."""
        if self._gate and self._needs_inspector:
            self._gate.start_inspector()
        if self._lookups:
            self._lookups.catch_up()
        return Answer(
            log_failing=self._log.is_failing,
            inspector_failing=self._needs_inspector and self._gate is not None and self._gate.inspector_failing,
            counted=self._meter.snapshot(),
            inspector_silent=self._gate is not None and self._gate.inspector_silent,
            opener_missing=self._link is not None and not self._link.is_up,
            openings_stale=bool(self._gate and self._gate.openings and self._gate.openings.is_stale),
            udp_failing=self._gate is not None and self._gate.udp_failing,
            unanswered=self._gate.unanswered if self._gate else "",
        )

    def reopen_log(self) -> None:
        self._log.reopen()

    def leave(self) -> None:
        """Ask clients to go elsewhere with what they ask next; the doors stay open."""
        self._is_leaving = True
        if self._gate:
            self._gate.leave()

    async def finish(self, grace_s: float | None, hurry: asyncio.Event) -> None:
        """Accept nothing more; let connections end within `grace_s` (None: as configured), or at `hurry`; write all."""
        for sock, *_ in self._doors:
            sock.close()
        if self._gate:
            closing = asyncio.create_task(self._gate.close(self._config.grace_s if grace_s is None else grace_s))
            hurried = asyncio.create_task(hurry.wait())
            await asyncio.wait((closing, hurried), return_when=asyncio.FIRST_COMPLETED)
            hurried.cancel()
            if not closing.done():
                closing.cancel()
                await self._gate.close(0.0)
        self._log.close()

    def _open(self, compiled: BinaryIO) -> Gate:
        try:
            policy = read_policy(compiled)
        except NotCompiled:
            compiled.close()
            raise
        if self._lookups:  # the rings may hold names of workloads that are gone
            self._lookups.keep(policy.index)
        config = self._config
        settings = Settings(
            issuing=lambda: self._issuing or describe(new_authority().issuers).text,  # plain HTTP: it shows no leaf
            compiled=compiled,
            workload=config.workload,
            hosts=config.hosts,
            upstream_ca=config.upstream_ca,
            nameservers=config.nameservers,
            forward=config.dns_forward,
            search=config.dns_search,
            new_names=NewNames(
                per_hour=config.dns_new_names, burst=config.dns_new_names_burst, max_labels=config.dns_labels
            ),
            dns_limits=DnsLimits(questions_per_source_s=config.dns_per_source),
            lookups=self._lookups,
            upstream_proxy=config.upstream_proxy,
            pods=self._pods,
            opener=self._link,
            own_doors=self._own_doors(),
            limits=config.limits,
            bounds=config.bounds,
            http_host=self._carrier,
            addons=config.addons,
        )
        gate = Gate(
            policy, settings, original_dst=redirected_dst, record=self._meter, counts=self._meter, inner=self._inner
        )
        self._guard(gate, self._log.is_failing)
        for sock, kind, target in self._doors:
            match kind:
                case DoorKind.DNS:
                    gate.answer_dns(sock)
                case DoorKind.DNSTAP:
                    gate.observe_dns(sock)
                case DoorKind.PROXY:
                    gate.proxy(sock, verifier=self._verifier, balancers=config.proxy_protocol_from)
                case DoorKind.REDIRECTED:
                    gate.listen(sock)
                case DoorKind.UDP:
                    gate.udp.carry_redirected(sock)
                case DoorKind.UDP_FORWARD:
                    gate.udp.carry(sock, parse_target(target))
        self._doors.clear()  # they are the gate's
        if self._is_leaving:
            gate.leave()
        return gate

    def _own_doors(self) -> list[SocketAddress]:
        """Where this service listens. A wide rule, or a name of the operator's, must not lead to its admin port."""
        doors: list[SocketAddress] = [
            sock.getsockname()[:2] for sock, *_ in self._doors if sock.family != socket.AF_UNIX
        ]
        return [*doors, self._config.admin] if self._config.admin else doors

    def _log_changed(self, is_failing: bool) -> None:
        """Called by whichever thread saw it."""
        self._loop.call_soon_threadsafe(self._heed_log, is_failing)

    def _heed_log(self, is_failing: bool) -> None:
        failure = self._log.failure
        say(f"the decision log cannot be written: {failure.text}" if failure else "the decision log is written again")
        if self._gate:
            self._guard(self._gate, is_failing)

    def _guard(self, gate: Gate, is_failing: bool) -> None:
        if self._config.on_log_failure is OnLogFailure.DENY:
            gate.close_for(Reason.LOG_FAILED if is_failing else None)

    def _stats(self) -> dict[str, float]:
        log = self._log
        return {
            "outgate_log_records_written_total": log.written,
            "outgate_log_records_lost_total": log.lost_total,
            "outgate_log_write_failures_total": log.failures,
            "outgate_log_failing": float(log.is_failing),
            **(self._gate.stats() if self._gate else {}),
        }
