"""The gate's side of the inspector: starts the process on first need, hands it sockets, takes its records.

Nothing here blocks the gate. Connections wait, up to a bound, while the process starts. When it dies, its connections
are lost; it is started again for the next one, after a pause, and every connection that was not served is recorded.
"""

from __future__ import annotations

import asyncio
import select
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import BinaryIO

import orjson

from addons.answers import answer
from addons.judge import BAD_GATEWAY, Judgement
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy import child
from proxy.channel import Channel
from proxy.child import BackOff, Child
from proxy.identity import Change, Pods
from proxy.inspector.handover import Configuration, Handover
from proxy.metrics.meter import Totals
from proxy.record import Sink, record_of
from proxy.wire.client_hello import Alert, render_alert

MAX_WAITING = 1024  # connections that wait for the process; each holds a descriptor
START_S = 20.0  # a process that is not ready by then never will be
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
SETTLED_S = 60.0  # it ran so long: the next failure is a new one
HUSH_S, SILENCE_S = 5.0, 15.0  # it does not answer: said after so long, and ended, for it serves nobody either
DRAIN_S = 1.0  # what clients that are gone have left behind is judged and recorded within it
RESEND_S = 0.1  # a policy that found no free descriptor on its way is sent again
MAX_UNREAD = 64 * 1024


class Inspector:
    """Takes over connections. Runs on the loop that is current when the first one comes.

    configuration  asked when the process starts, so that a gate which inspects nothing holds no key
    compiled       gives a descriptor of the policy in force, asked at the start and at each swap
    record         told of every request, and of every connection that could not be served
    log            told, in one line, of what went wrong with the process
    inner          told what the processes count, each time one was asked
    pods           of the cluster that is watched, which a process is told when it starts
    """

    def __init__(
        self,
        configuration: Callable[[], Configuration],
        compiled: Callable[[], BinaryIO],
        record: Sink,
        log: Callable[[str], None] | None = None,
        *,
        inner: Totals | None = None,
        pods: Pods | None = None,
    ) -> None:
        self._configuration = configuration
        self._compiled = compiled
        self._inner = inner or Totals()
        self._pods = pods
        self._closed_for: Reason | None = None
        self._sent = 0  # the number of the newest policy that this process was sent
        self._swaps: list[asyncio.Future[None]] = []  # that wait until it judges by that one
        self._asked: float | None = None  # since when an answer is awaited
        self._record = record
        self._log = log or _print
        self._child: Child | None = None
        self._channel: Channel | None = None
        self._waiting: list[tuple[socket.socket, Handover]] = []
        self._is_ready = False
        self._deadline: asyncio.TimerHandle | None = None
        self._back_off = BackOff(FIRST_PAUSE_S, LONGEST_PAUSE_S, SETTLED_S)
        self._drained: asyncio.Event | None = None
        self._grace_s = 0.0
        self._is_over = self._is_leaving = False
        self._is_used = False  # this process was given a connection

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._child.process.pid if self._child else None

    @property
    def is_failing(self) -> bool:
        """It ended more than once in a row, and does not serve now."""
        return self._back_off.failures > 1 and not self._is_ready

    @property
    def is_silent(self) -> bool:
        """It has not answered for a while: what it was given waits."""
        return self._asked is not None and monotonic() - self._asked > HUSH_S

    def inspect(self, sock: socket.socket, handover: Handover) -> None:
        """Take over `sock`, of which nothing was read. Never blocks and never raises."""
        self.start()
        self._is_used = True
        if self._channel is None or self._channel.unsent + len(self._waiting) >= MAX_WAITING:
            self._refuse(sock, handover)
        elif self._is_ready:
            self._channel.send(handover.to_bytes(), sock)
        else:
            self._waiting.append((sock, handover))

    async def swap(self) -> None:
        """Have the process judge by the policy in force. Returns when it does, or when there is no process: the next
        one starts with the policy in force. One that does not answer within START_S is ended: it would go on judging
        by a former policy."""
        if self._channel is None:
            return
        swapped = asyncio.get_running_loop().create_future()
        self._swaps.append(swapped)
        self._send_policy()
        await swapped

    def sign_by(self, issuing: str) -> None:
        """Have leaves of these issuing CAs shown on connections that are handed over from now on.

        One channel carries both, in order; `configuration` must give the same from now on.
        """
        if self._channel is not None:
            self._channel.send(b"issuers " + issuing.encode())

    def know(self, change: Change) -> None:
        """Have the process go by what is new of the pods."""
        if self._channel is not None:
            self._channel.send(b"pods " + change.to_bytes())

    def close_for(self, reason: Reason | None) -> None:
        """Have every request denied for `reason`, until it is None."""
        self._closed_for = reason
        if self._channel is not None:
            self._channel.send(b"closed " + (reason.value.encode() if reason else b""))

    def leave(self) -> None:
        """Have clients asked to go elsewhere with their next request; all that comes until then is served."""
        self._is_leaving = True
        if self._channel is not None:
            self._channel.send(b"leave")

    def ask(self) -> None:
        """Ask the process what it counts; `inner` is told the answer. One that hangs is ended."""
        if self._channel is None or not self._is_ready:
            return
        if self._asked is None:
            self._asked = monotonic()
            self._channel.send(b"stats")
        elif monotonic() - self._asked > SILENCE_S:  # unless we slept ourselves, and the answer is there to be read
            asyncio.get_running_loop().call_soon(self._lose_silent, self._asked)

    def _lose_silent(self, asked: float) -> None:
        if self._asked == asked:
            self._log(f"the inspector was silent for {SILENCE_S:g} s")
            self._lose()

    async def drain(self, grace_s: float = 0.0) -> None:
        """Let the process finish within `grace_s` what it was given; it has DRAIN_S more to tell of it. Then end it.

        It may be called again while it waits, with less grace. No other process is started afterwards.
        """
        if self._channel is not None and self._is_used:  # else it may be starting still, for nothing
            self._drained = self._drained or asyncio.Event()
            self._grace_s = grace_s
            if self._is_ready or not self._waiting:
                self._finish()
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s + DRAIN_S):
                    await self._drained.wait()
        self._is_over = True
        self.close()

    def close(self) -> None:
        """End the process, and with it every connection it has. Records still under way are lost; `drain` waits."""
        if self._channel is not None:
            self._stop()

    def start(self) -> None:
        """Start the process, unless it runs or failed a moment ago. Only saves the first connection the wait."""
        if self._channel is None and not self._is_over and self._back_off.is_over:
            self._start()

    def _start(self) -> None:
        self._back_off.started()
        try:
            configuration = self._configuration().to_bytes()
        except Exception as error:  # a process that waits for it in vain would keep its connections waiting too
            self._log(f"the inspector has no configuration: {type(error).__name__}")
            self._back_off.failed()
            return
        try:
            told = child.memory(configuration, "configuration")
            self._child = child.start("proxy.inspector.main")
        except OSError as error:
            self._log(f"the inspector did not start: {error}")
            self._back_off.failed()
            return
        self._is_used = False
        self._channel = Channel(self._child.sock, received=self._receive, closed=self._lose)
        self._channel.send(b"configuration", told)
        self.close_for(self._closed_for)
        if self._is_leaving:
            self.leave()
        for change in self._pods.told() if self._pods is not None else ():
            self.know(change)
        self._send_policy()

    def _send_policy(self) -> None:
        if self._channel is None:
            return
        self._sent += 1
        self._await_answer()
        try:
            self._channel.send(b"policy %d" % self._sent, self._compiled())
        except OSError:  # no descriptor is free here
            self._send_again(self._sent)

    def _send_again(self, number: int) -> None:
        asyncio.get_running_loop().call_later(RESEND_S, self._resend, number)

    def _resend(self, number: int) -> None:
        if number == self._sent:  # else a newer one is on its way
            self._send_policy()

    def _await_answer(self) -> None:
        """Counts from the first policy that is not answered: sending more of them buys no time."""
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(START_S, self._lose)

    def _applied(self, number: int) -> None:
        if number != self._sent:
            return
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if not self._is_ready:
            self._serve_waiting()
        self._end_swaps()

    def _end_swaps(self) -> None:
        swaps, self._swaps = self._swaps, []
        for swapped in swaps:
            if not swapped.done():
                swapped.set_result(None)

    def _receive(self, message: bytes, _descriptor: int | None) -> None:
        match orjson.loads(message):
            case {"records": [*records]}:
                for record in records:
                    self._record(record)
            case {"applied": int(number)}:
                self._applied(number)
            case {"missed": int(number)}:
                self._send_again(number)
            case {"stats": dict(counted)}:
                self._asked = None
                self._inner.see(self.pid, counted)
            case {"failed": str(text)}:
                self._log(f"the inspector cannot judge: {text}")
            case {"log": str(text)}:
                self._log(f"the inspector failed on one connection: {text}")

    def _serve_waiting(self) -> None:
        self._is_ready = True
        waiting, self._waiting = self._waiting, []
        for sock, handover in waiting:
            self.inspect(sock, handover)
        if self._drained:
            self._finish()

    def _finish(self) -> None:
        if self._channel is not None:
            self._channel.send(b"finish %g" % self._grace_s)

    def _lose(self) -> None:
        """The process is gone, or has not answered in time."""
        if self._drained:
            self._drained.set()
            return
        pause_s = self._back_off.failed()
        self._log(f"the inspector ended; it is started again, not before {pause_s:g} s from now")
        self._stop()

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._channel is not None:
            for message, carried in self._channel.close():
                if isinstance(carried, socket.socket):
                    self._refuse(carried, Handover.from_bytes(message))
                elif carried is not None:
                    carried.close()
        if self._child:
            self._child.kill()
            self._inner.retire(self.pid)
        waiting, self._waiting = self._waiting, []
        self._channel = self._child = None
        self._is_ready, self._asked = False, None
        self._end_swaps()
        for sock, handover in waiting:
            self._refuse(sock, handover)

    def _refuse(self, sock: socket.socket, handover: Handover) -> None:
        """Say so in the client's own protocol, record it, close."""
        stage = Stage.HTTP if handover.plain else Stage.TLS
        reason = Reason.CLIENT_GONE if _has_gone(sock) else Reason.GATE_FAILED
        attempt = Attempt(
            stage,
            handover.workload,
            handover.host,
            handover.port,
            time=handover.opened,
            plain=handover.plain,
            fault=reason,
        )
        verdict = Verdict(Action.DENY, reason, stage)
        reply = render_alert(Alert.INTERNAL_ERROR)
        if handover.plain:
            judgement = Judgement(handover.id, attempt, verdict, BAD_GATEWAY, "the inspector is not running")
            reply = answer(judgement, closes=True).to_bytes()
        with sock:
            try:
                sock.setblocking(False)
                sock.recv(MAX_UNREAD)  # bytes left in the queue would turn the close into a reset
                sock.send(reply)
            except OSError:
                pass  # the client is gone, and recorded below
        self._record(
            record_of(
                attempt,
                verdict,
                id=handover.id,
                source=handover.source,
                destination=handover.destination,
                started=handover.opened,
                extra={"user.name": handover.user} if handover.user is not None else None,
            )
        )


def _has_gone(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _print(line: str) -> None:
    print(f"outgate: {line}", file=sys.stderr)
