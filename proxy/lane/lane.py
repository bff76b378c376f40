"""The lane's parts together, for one gate: takes over connections, and lets go of them. HTTP is not its matter."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from addons.judge import Conversation, Judge
from addons.outcome import Outcome
from addons.trust import trust_origins
from policies.model import Reason
from proxy.inspector.handover import Bounds, Handover
from proxy.inspector.outcome import record_of_lost, record_of_outcome
from proxy.lane.bounds import Budget, Share
from proxy.lane.client import Client
from proxy.lane.commons import Commons
from proxy.lane.pool import Pool
from proxy.lane.side import Side
from proxy.lane.tls import Sessions
from proxy.original_dst import parse_address
from proxy.policy_in_force import PolicyInForce
from proxy.record import Sink, new_id
from proxy.way_out import Exit
from proxy.wire.client_hello import MAX_HELLO, Alert, render_alert

if TYPE_CHECKING:
    from proxy.inspector.minting import Minting

HTTP_1 = b"http/1.1"
AGAIN_S = 60.0  # before a person is told again that there are no leaves
STOPPED = "the gate stopped"
LOOK_S = 0.02  # at the end, between two looks at whether clients have gone

_parse_address = lru_cache(4096)(parse_address)


class Lane:
    """HTTP/1.1 under inspection, in the gate's own process. Made on a running loop; nothing is loaded before its use.

    in_force     what judges
    exit         the way out, as flows take it
    issuing      gives what signs leaves, as `pki.issuers` writes it; asked when the first leaf is needed
    upstream_ca  path of the roots that origins are verified against; None: the system's
    record       told of every request, and of every connection that came to nothing
    failed       told of an exception of ours, so that a person hears of it
    """

    def __init__(
        self,
        in_force: PolicyInForce,
        exit: Exit,
        *,
        issuing: Callable[[], str],
        upstream_ca: str | None,
        bounds: Bounds,
        record: Sink,
        failed: Callable[[Exception], None],
    ) -> None:
        self._in_force = in_force
        self._exit = exit
        self._issuing = issuing
        self._upstream_ca = upstream_ca
        self._bounds = bounds
        self._record = record
        self._failed = failed
        self._judge = Judge(
            in_force.decide,
            now=time.time,
            new_id=new_id,
            identify=self._identify,
            standing=lambda: in_force.standing,
        )
        self._judge.generation = in_force.policy.generation
        self._budget = Budget(bounds.connections, bounds.per_source, bounds.waiting)
        self._clients: set[Client] = set()
        self._beginning: dict[asyncio.Task[None], Callable[[], None]] = {}  # they wait for leaves; how to give each up
        self._commons: Commons | None = None
        self._minting: Minting | None = None
        self._is_leaving = False
        self._is_closed = False
        self._is_told_until = 0.0

    def _identify(self, conversation: Conversation) -> str:
        return self._in_force.identify(_parse_address(conversation.source[0]), conversation.user)

    # --- what the gate says ---

    def inspect(self, sock: socket.socket, handover: Handover) -> None:
        """Take over `sock`, of which nothing was read. Never blocks and never raises."""
        if self._is_closed:  # accepted before, and peeked at meanwhile: nobody would end it
            sock.close()
            self._lost(handover, Reason.CLIENT_GONE, STOPPED)
            return
        share = self._budget.enter(handover.source[0])
        if share is None:
            sock.close()
            self._lost(handover, Reason.TOO_MANY_CONNECTIONS, "")
            return
        try:
            self._take_over(sock, handover, share)
        except Exception as error:
            self._lose(sock, handover, share, Reason.GATE_FAILED, type(error).__name__)
            self._failed(error)

    def swap(self) -> None:
        """The policy in force is another one: the next request is judged by it, also on connections that are open."""
        self._judge.generation = self._in_force.policy.generation
        if self._commons is not None:
            self._commons.pool.clear()

    def sign_by(self, issuing: str) -> None:
        """Show leaves of these issuing CAs on connections that come from now on."""
        if self._minting is not None:
            from pki.issuers import read_issuers

            self._minting.replace(read_issuers(issuing))

    @property
    def open_connections(self) -> int:
        return self._budget.places

    def stats(self) -> dict[str, float]:
        """Gauges by series, for a meter."""
        return {
            "outgate_connections_inspected": self.open_connections,
            "outgate_leaves_remembered": self._minting.remembered if self._minting else 0,
            "outgate_lane_waiting_bytes": self.held_bytes,
            "outgate_upstreams_pooled": self.pooled,
        }

    @property
    def pooled(self) -> int:
        """Connections to origins that wait for another client."""
        return self._commons.pool.size if self._commons else 0

    @property
    def held_bytes(self) -> int:
        """How much waits in memory for slow readers, or for the end of a head."""
        return self._budget.held

    def leave(self) -> None:
        """Say with each answer that no other follows on its connection; who connects nevertheless is served."""
        self._is_leaving = True

    async def drain(self, grace_s: float = 0.0) -> None:
        """Let clients finish within `grace_s`, and leave those that ask nothing; then end the rest, recorded."""
        self._is_leaving = True
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        while (self._clients or self._beginning) and loop.time() < end:
            for client in tuple(self._clients):
                client.leave()
            await asyncio.sleep(LOOK_S)
        self.close()

    def close(self) -> None:
        """End every connection now; each request under way is recorded."""
        self._is_leaving = self._is_closed = True
        if self._commons is not None:
            self._commons.pool.close()
        for task in tuple(self._beginning):
            if task.cancel():
                self._give_up(task)
        for client in tuple(self._clients):
            client.abort()

    # --- taking over ---

    def _take_over(self, sock: socket.socket, handover: Handover, share: Share) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if handover.plain:
            self._begin(sock, handover, share, None)
            return
        minting = self._minting or self._start_minting()
        context = minting.cached(handover.host or "", HTTP_1)
        if context is not None:
            self._begin(sock, handover, share, context)
            return
        task = asyncio.get_running_loop().create_task(self._await_leaf(minting, sock, handover, share))
        self._beginning[task] = partial(self._lose, sock, handover, share, Reason.CLIENT_GONE, STOPPED)
        task.add_done_callback(self._begun)

    def _begun(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._give_up(task)
        self._beginning.pop(task, None)

    def _give_up(self, task: asyncio.Task[None]) -> None:
        """Not left to the task: one that is cancelled before its first step never runs."""
        give_up = self._beginning.pop(task, None)
        if give_up is not None:
            give_up()

    async def _await_leaf(self, minting: Minting, sock: socket.socket, handover: Handover, share: Share) -> None:
        from proxy.inspector.minting import NoLeaf

        try:
            context = await minting.context(handover.host or "", HTTP_1)
            self._begin(sock, handover, share, context)
        except NoLeaf as error:
            _turn_down(sock)
            self._lose(sock, handover, share, Reason.GATE_FAILED, str(error))
            self._tell_of(error)
        except Exception as error:
            self._lose(sock, handover, share, Reason.GATE_FAILED, type(error).__name__)
            self._failed(error)

    def _begin(self, sock: socket.socket, handover: Handover, share: Share, context: ssl.SSLContext | None) -> None:
        commons = self._commons or self._start()
        client = Client(
            commons, lambda owner: Side(commons.epoll, sock, owner, share), handover, share, partial(self._over, share)
        )
        self._clients.add(client)
        try:
            client.begin(context)
        except Exception as error:
            commons.epoll.contain(client.failed, error)

    def _start(self) -> Commons:
        loop = asyncio.get_running_loop()
        self._commons = Commons(
            epoll=self._exit.epoll,
            exit=self._exit,
            judge=self._judge,
            bounds=self._bounds,
            trust=trust_origins(self._upstream_ca),
            sessions=Sessions(),
            pool=Pool(self._exit.epoll, lambda: self._judge.generation),
            report=self._report,
            lost=self._lost,
            later=loop.call_soon,
            is_leaving=lambda: self._is_leaving,
        )
        return self._commons

    def _start_minting(self) -> Minting:
        """Here, and not before: cryptography takes memory, and a gate that shows no leaf holds no key."""
        from datetime import UTC, datetime

        from pki.issuers import read_issuers
        from pki.leaves import Leaves
        from proxy.inspector.minting import Minting

        leaves = Leaves(read_issuers(self._issuing()), partial(datetime.now, UTC))
        self._minting = Minting(leaves, patience_s=self._bounds.handshake_s)
        return self._minting

    # --- what becomes of them ---

    def _over(self, share: Share, client: Client) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._budget.leave(share)

    def _lose(self, sock: socket.socket, handover: Handover, share: Share, reason: Reason, what: str) -> None:
        sock.close()
        self._budget.leave(share)
        self._lost(handover, reason, what)

    def _report(self, outcome: Outcome) -> None:
        self._record(record_of_outcome(self._in_force.policy, outcome))

    def _lost(self, handover: Handover, reason: Reason, what: str) -> None:
        self._record(record_of_lost(handover, reason, what))

    def _tell_of(self, error: Exception) -> None:
        """Now and then: while there are no leaves, every connection would say so."""
        now = asyncio.get_running_loop().time()
        if now >= self._is_told_until:
            self._is_told_until = now + AGAIN_S
            self._failed(error)


def _turn_down(sock: socket.socket) -> None:
    """Say that it is our fault."""
    with suppress(OSError):  # the client is gone: that it came to nothing is recorded
        sock.recv(MAX_HELLO)  # bytes left in the queue would turn the close into a reset
        sock.send(render_alert(Alert.INTERNAL_ERROR))
