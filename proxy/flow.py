"""An allowed connection on its way out: a socket to the upstream, then the relay. It judges and looks up nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from math import inf

from policies.hostnames import Hostname
from policies.model import Action, Address, Reason, Verdict
from proxy.epoll import IN, RDHUP
from proxy.original_dst import Destination
from proxy.relays.stream import End, StreamRelay
from proxy.way_out import Admit as Admit  # of those who start flows: re-exported
from proxy.way_out import Exit as Exit
from proxy.way_out import Resolver as Resolver
from proxy.way_out import WayOut


class Flow:
    """One client connection that a rule admits. It ends in one of these, unless cancelled before it relays.

    denied  nothing may be dialled, or nothing answers (`note` may say more); the client's socket is as it was
    ended   it was relayed to `upstream` and is over; both sockets are closed
    failed  a callback crashed
    spoke   only where it is given: the client spoke before the upstream did, which is closed; the client's socket is as
            it was
    """

    __slots__ = ("_client", "_denied", "_ended", "_exit", "_failed", "_relay", "_spoke", "_verdict", "_waiting",
                 "_way", "deadline", "note")  # fmt: skip

    def __init__(
        self,
        exit: Exit,
        client: socket.socket,
        destination: Destination,
        verdict: Verdict,
        *,
        denied: Callable[[Verdict], None],
        ended: Callable[[End], None],
        failed: Callable[[Exception], None],
        spoke: Callable[[], None] | None = None,
    ) -> None:
        self._exit = exit
        self._client = client
        self._verdict = verdict
        self._denied = denied
        self._ended = ended
        self._failed = failed
        self._spoke = spoke
        self._waiting: socket.socket | None = None  # connected, and nobody has spoken yet
        self.deadline = inf
        self._way = WayOut(exit, destination, verdict, connected=self._connected, denied=self._refused, failed=failed)
        self._relay: StreamRelay | None = None
        self.note = ""

    @property
    def upstream(self) -> Destination:
        """The address and port that were dialled; before that, those asked for."""
        return self._way.upstream

    @property
    def sent(self) -> int:
        """Bytes of the client that reached the upstream."""
        return self._relay.sent if self._relay else 0

    @property
    def received(self) -> int:
        """Bytes of the upstream that reached the client."""
        return self._relay.received if self._relay else 0

    def start(self, name: Hostname | None) -> None:
        """Dial the original address where the rule is about addresses, else one of `name`'s, or have the site's proxy
        dial either."""
        self._way.start(name)

    def cancel(self) -> None:
        """End it now: what is relayed is reset (`ended` follows), what is not there yet is given up without a word."""
        if self._relay is not None:
            self._relay.end(End.RESET)
        self._way.cancel()
        self._drop_waiting()

    # --- the outcome ---

    def _refused(self, verdict: Verdict, note: str) -> None:
        self.note = note
        self._denied(verdict)

    def _connected(self, upstream: socket.socket, _address: Address) -> None:
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._spoke is None:
            self._carry(upstream)
            return
        epoll = self._exit.epoll
        self._waiting = upstream
        self.deadline = epoll.now + self._exit.limits.idle_s
        epoll.watch(self)
        epoll.put(upstream.fileno(), IN, self._upstream_spoke, self.failed)
        epoll.put(self._client.fileno(), IN | RDHUP, self._client_spoke, self.failed)

    def _upstream_spoke(self, _events: int) -> None:
        upstream, self._waiting = self._waiting, None
        if upstream is not None:
            self._exit.epoll.unwatch(self)
            self._carry(upstream)

    def _client_spoke(self, _events: int) -> None:
        self._drop_waiting()
        if self._spoke is not None:
            self._spoke()

    def expired(self) -> None:
        self._drop_waiting()
        verdict = self._verdict
        self._denied(Verdict(Action.DENY, Reason.HELLO_TIMEOUT, verdict.stage, verdict.rule, host=verdict.host))

    def failed(self, error: Exception) -> None:
        """A callback crashed."""
        self._drop_waiting()
        self._failed(error)

    def _drop_waiting(self) -> None:
        if self._waiting is None:
            return
        epoll = self._exit.epoll
        epoll.unwatch(self)
        epoll.remove(self._client.fileno())
        epoll.forget(self._waiting.fileno())
        self._waiting.close()
        self._waiting = None

    def _carry(self, upstream: socket.socket) -> None:
        exit = self._exit
        self._relay = StreamRelay(
            exit.epoll, exit.pipes, self._client, upstream, idle_s=exit.limits.idle_s, ended=self._ended
        )
        self._relay.start()
