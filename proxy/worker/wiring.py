"""The parts of a worker put together from its configuration: a gate, its log, and what counts."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import BinaryIO

from policies.model import Reason
from proxy.compiled import NotCompiled, read_policy
from proxy.config import Config, DoorKind, OnLogFailure, SocketAddress
from proxy.explicit.verifier import Verifier
from proxy.issuing import describe
from proxy.log.decision_log import open_log
from proxy.metrics.meter import Meter, Totals
from proxy.options import new_authority, say
from proxy.original_dst import redirected_dst
from proxy.relays.dns_budget import NewNames
from proxy.runtime import Gate, Settings
from proxy.worker.messages import Answer, Judge


class Serving:
    """What a worker serves with. Its doors open with the first policy, and not before.

    turns  shared by all who write to the log
    Raises OSError, CredentialsError.
    """

    def __init__(self, config: Config, turns: int | None) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._log = open_log(config.log, turns=turns, changed=self._log_changed)
        self._inner = Totals()
        self._meter = Meter(self._log, self._stats, inner=self._inner)
        self._verifier = Verifier(Path(config.credentials), say) if config.credentials else None
        self._doors: list[tuple[socket.socket, DoorKind]] = []
        self._gate: Gate | None = None
        self._issuing = ""
        self._inspects = False

    @property
    def is_open(self) -> bool:
        return self._gate is not None

    def add_door(self, sock: socket.socket, kind: DoorKind) -> None:
        """One more listening socket, or one for DNS, for when there is a policy."""
        self._doors.append((sock, kind))

    async def judge_by(self, judge: Judge, compiled: BinaryIO) -> None:
        """Judge by the policy in `compiled`, which is ours from now on. Raises NotCompiled; then all is as it was."""
        if self._gate:
            await self._gate.swap(compiled)
        else:
            self._gate = self._open(compiled)
        self._inspects = judge.inspects
        if self._inspects:
            self._gate.start_inspector()

    def sign_by(self, issuing: str) -> None:
        """Show leaves of these issuing CAs on connections that come from now on."""
        self._issuing = issuing
        if self._gate:
            self._gate.sign_by(issuing)

    def answer(self) -> Answer:
        """How it is. An inspector that ended is tried again, so that a gate recovers which nobody uses meanwhile."""
        if self._gate and self._inspects:
            self._gate.start_inspector()
        return Answer(
            log_failing=self._log.is_failing,
            inspector_failing=self._inspects and self._gate is not None and self._gate.inspector_failing,
            counted=self._meter.snapshot(),
            inspector_silent=self._gate is not None and self._gate.inspector_silent,
        )

    def reopen_log(self) -> None:
        self._log.reopen()

    async def finish(self, grace_s: float | None, hurry: asyncio.Event) -> None:
        """Accept nothing more; let connections end within `grace_s` (None: as configured), or at `hurry`; write all."""
        for sock, _ in self._doors:
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
            upstream_proxy=config.upstream_proxy,
            own_doors=self._own_doors(),
            limits=config.limits,
            bounds=config.bounds,
        )
        gate = Gate(
            policy, settings, original_dst=redirected_dst, record=self._meter, counts=self._meter, inner=self._inner
        )
        self._guard(gate, self._log.is_failing)
        for sock, kind in self._doors:
            match kind:
                case DoorKind.DNS:
                    gate.answer_dns(sock)
                case DoorKind.PROXY:
                    gate.proxy(sock, verifier=self._verifier, balancers=config.proxy_protocol_from)
                case DoorKind.REDIRECTED:
                    gate.listen(sock)
        self._doors.clear()  # they are the gate's
        return gate

    def _own_doors(self) -> list[SocketAddress]:
        """Where this service listens. A wide rule, or a name of the operator's, must not lead to its admin port."""
        doors: list[SocketAddress] = [sock.getsockname()[:2] for sock, _ in self._doors]
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
