"""Which host an inspected connection goes to: the lane for HTTP/1.1, mitmproxy's process for HTTP/2 or where forced.

Both ask one judge and write the same records; whoever hands a connection over does not know which it is.
"""

from __future__ import annotations

import asyncio
import socket

from policies.model import Reason
from proxy.config import HttpHost as HttpHost
from proxy.identity import Change
from proxy.inspector import Handover, Inspector
from proxy.lane import Lane


class Inspecting:
    """Both hosts, seen by the gate. The process of the one is started when something needs it, not before."""

    def __init__(self, host: HttpHost, lane: Lane, inspector: Inspector) -> None:
        self._host = host
        self._lane = lane
        self._inspector = inspector

    def inspect(self, sock: socket.socket, handover: Handover) -> None:
        """Take over `sock`, of which nothing was read. Never blocks and never raises."""
        if self._host is HttpHost.MITMPROXY or handover.http2:
            self._inspector.inspect(sock, handover)
        else:
            self._lane.inspect(sock, handover)

    def start(self) -> None:
        """Start the process before anything needs it."""
        self._inspector.start()

    async def swap(self) -> None:
        """Have both judge by the policy in force. Returns when they do."""
        self._lane.swap()
        await self._inspector.swap()

    def sign_by(self, issuing: str) -> None:
        self._lane.sign_by(issuing)
        self._inspector.sign_by(issuing)

    def know(self, change: Change) -> None:
        """The lane asks for the pods of its own process; the other one is told."""
        self._inspector.know(change)

    def close_for(self, reason: Reason | None) -> None:
        """Have every request denied for `reason`, until it is None; in the lane the policy in force does."""
        self._inspector.close_for(reason)

    def stats(self) -> dict[str, float]:
        """Gauges of the lane, by series. The process is asked for its own."""
        self._inspector.ask()
        return self._lane.stats()

    @property
    def is_failing(self) -> bool:
        return self._inspector.is_failing

    @property
    def is_silent(self) -> bool:
        return self._inspector.is_silent

    def leave(self) -> None:
        """Have clients asked to go elsewhere with their next request; all that comes until then is served."""
        self._lane.leave()
        self._inspector.leave()

    async def drain(self, grace_s: float = 0.0) -> None:
        """Let both finish within `grace_s`; then end them."""
        await asyncio.gather(self._lane.drain(grace_s), self._inspector.drain(grace_s))
