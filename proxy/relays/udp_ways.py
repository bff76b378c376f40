"""Where the datagrams of a session go: a name resolved, its addresses admitted, one connected. It judges nothing.

The order, and the reason for each step, are those of `way_out`; a datagram needs no answer to be connected.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from math import inf
from typing import Protocol

from policies.engine import admit
from policies.hostnames import Hostname
from policies.model import Action, Address, Dial, Reason, Stage, Verdict
from proxy.dialer import interleave
from proxy.limits import Limits
from proxy.relays.udp_sessions import Session
from proxy.relays.udp_sockets import connect
from proxy.resolver import NameNotFound, Resolution, ResolverFailed
from proxy.upstream_proxy import SiteProxy
from proxy.way_out import Resolver

_NOT_PROXIED = "the site's proxy carries no datagrams; name it under upstreamProxy.direct"


class Told(Protocol):
    """Who is told where a session goes, and that it goes nowhere."""

    def found(self, session: Session, upstream: socket.socket, address: Address, *, from_hosts: bool) -> None: ...

    def refuse(self, session: Session, verdict: Verdict, note: str) -> None: ...


class Ways:
    """Finds the way of one session after another. Made on a running loop; `Listener` says what the arguments are."""

    def __init__(
        self,
        told: Told,
        resolver: Resolver,
        limits: Limits,
        *,
        is_own: Callable[[Address, int], bool],
        crashed: Callable[[Exception], None],
        site: SiteProxy | None = None,
    ) -> None:
        self._told = told
        self._resolver = resolver
        self._limits = limits
        self._is_own = is_own
        self._crashed = crashed
        self._site = site
        self._loop = asyncio.get_running_loop()

    def find(self, session: Session) -> None:
        """One of the two is told, now or when a lookup has ended; neither, if the session is closed before."""
        verdict, attempt = session.verdict, session.attempt
        name = verdict.host or attempt.host
        if verdict.dial is Dial.ORIGINAL and attempt.address is not None:
            self._connect(session, Resolution((attempt.address,), inf))
        elif name is None:  # no verdict says so; if one ever does, stay closed
            self._refuse(session, Reason.GATE_FAILED)
        elif self._site is not None and self._site.carries(name):
            self._refuse(session, Reason.NOT_SERVED, _NOT_PROXIED)
        elif resolution := self._resolver.cached(name):
            self._connect(session, resolution)
        else:
            session.wait(self._limits.resolve_s)
            session.lookup = self._loop.create_task(self._look_up(session, name))

    async def _look_up(self, session: Session, name: Hostname) -> None:
        try:
            try:
                resolution = await self._resolver.resolve(name)
            finally:
                session.lookup = None  # whoever closes the session from here on cancels no task that is at its end
            self._connect(session, resolution)
        except NameNotFound:
            self._refuse(session, Reason.NAME_NOT_FOUND)
        except ResolverFailed as error:
            self._refuse(session, Reason.RESOLVER_FAILED, str(error))
        except Exception as error:
            self._crashed(error)
            self._refuse(session, Reason.GATE_FAILED)

    def _connect(self, session: Session, resolution: Resolution) -> None:
        """To the first address that is admitted and that there is a way to."""
        verdict, port = session.verdict, resolution.port or session.attempt.port
        denied: tuple[Verdict, str] | None = None
        tried = 0
        for address in interleave(resolution.addresses):
            judged = self._judge(session, address, port, from_hosts=resolution.from_hosts)
            if not judged[0].is_allow:
                denied = denied or judged
                continue
            if tried == self._limits.max_addresses:
                break
            tried += 1
            try:
                session.reply.prepare()
            except OSError as error:
                note = f"no answer can be sent from the address that was asked: {(error.strerror or '').lower()}"
                self._refuse(session, Reason.GATE_FAILED, note)
                return
            try:
                upstream = connect(address, port, keeps_whole=session.hello is not None)
            except OSError as error:
                denied = denial(verdict, Reason.UPSTREAM_FAILED), (error.strerror or "").lower()
                continue
            session.carried.upstream = str(address), port
            self._told.found(session, upstream, address, from_hosts=resolution.from_hosts)
            return
        self._told.refuse(session, *(denied or (denial(verdict, Reason.NAME_NOT_FOUND), "")))

    def _judge(self, session: Session, address: Address, port: int, *, from_hosts: bool) -> tuple[Verdict, str]:
        """Whether this very address may be dialled, and in words why not."""
        verdict = session.verdict
        judged = admit(verdict, address, from_hosts=from_hosts)
        if judged.is_allow and self._is_own(address, port):
            return denial(verdict, Reason.NEVER_REACHED), ""
        if judged.is_allow and self._site is not None and verdict.dial is Dial.ORIGINAL and self._site.carries(address):
            return denial(verdict, Reason.NOT_SERVED), _NOT_PROXIED
        return judged, ""

    def _refuse(self, session: Session, reason: Reason, note: str = "") -> None:
        self._told.refuse(session, denial(session.verdict, reason), note)


def denial(verdict: Verdict, reason: Reason) -> Verdict:
    """A rule admits it, and it cannot be carried."""
    return Verdict(Action.DENY, reason, Stage.UDP, verdict.rule, host=verdict.host)
