"""Opens one upstream connection out of several addresses, staggered as RFC 8305 says; also through the site's proxy.

It judges and resolves nothing.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Sequence

from addons.judge import Unreachable
from policies.model import Address, Reason
from proxy.epoll import ERR, HUP, IN, OUT, Epoll
from proxy.limits import Limits
from proxy.wire.connect import MAX_HEAD, MalformedAnswer, parse_answer

type Connected = Callable[[socket.socket, Address], None]

_REASONS = {
    errno.ECONNREFUSED: Reason.UPSTREAM_REFUSED,
    errno.ETIMEDOUT: Reason.UPSTREAM_TIMEOUT,
    errno.EMFILE: Reason.GATE_FAILED,
    errno.ENFILE: Reason.GATE_FAILED,
}


def interleave(addresses: Iterable[Address]) -> list[Address]:
    """The same addresses with the families taking turns, beginning with that of the first (RFC 8305 4)."""
    families: dict[int, list[Address]] = {}
    for address in dict.fromkeys(addresses):
        families.setdefault(address.version, []).append(address)
    first, *others = families.values() or [[]]
    for second in others:
        paired = [address for pair in zip(first, second, strict=False) for address in pair]
        shorter = len(paired) // 2
        return paired + first[shorter:] + second[shorter:]
    return first


class Dial:
    """One dial, begun when made. Ends in exactly one of its callbacks unless cancelled.

    connected    the socket that connected first and its address; epoll still watches it and the caller puts its own
                 callback there; every other socket is closed
    unreachable  none connected: the reason of the most telling failure
    crashed      an exception in one of the two
    """

    __slots__ = ("_addresses", "_connected", "_crashed", "_epoll", "_give_up", "_limits", "_port", "_reason", "_tries",
                 "_unreachable", "deadline")  # fmt: skip

    def __init__(
        self,
        epoll: Epoll,
        addresses: Sequence[Address],
        port: int,
        limits: Limits,
        *,
        connected: Connected,
        unreachable: Callable[[Reason], None],
        crashed: Callable[[Exception], None],
    ) -> None:
        self._epoll = epoll
        self._addresses = list(addresses)
        self._port = port
        self._limits = limits
        self._connected = connected
        self._unreachable = unreachable
        self._crashed = crashed
        self._tries: list[_Try] = []
        self._reason: Reason | None = None
        self._give_up = self.deadline = epoll.now + limits.dial_s
        epoll.watch(self)
        self._try_next()

    def cancel(self) -> None:
        """Close what is being tried; no callback follows."""
        self._epoll.unwatch(self)
        self._addresses.clear()
        while self._tries:
            self._tries.pop().close()

    def expired(self) -> None:
        if self._epoll.now < self._give_up:
            self._try_next()
            return
        self.cancel()
        self._unreachable(Reason.UPSTREAM_TIMEOUT)

    def failed(self, error: Exception) -> None:
        self.cancel()
        self._crashed(error)

    def _try_next(self) -> None:
        """Begin with the next address; at once with the one after it where that fails at once."""
        while self._addresses:
            address = self._addresses.pop(0)
            try:
                self._tries.append(_Try(self, self._epoll, address, self._port))
            except OSError as error:
                self._note(error.errno)
                continue
            if self._addresses:
                self.deadline = min(self._epoll.now + self._limits.stagger_s, self._give_up)
                self._epoll.watch(self)
            elif self.deadline != self._give_up:
                self.deadline = self._give_up
                self._epoll.watch(self)
            return
        if not self._tries:
            self._epoll.unwatch(self)
            self._unreachable(self._reason or Reason.UPSTREAM_FAILED)

    def _note(self, number: int | None) -> None:
        """Remember why: that it refused says more than that one family has no route."""
        reason = _REASONS.get(number or 0, Reason.UPSTREAM_FAILED)
        if self._reason is None or reason is not Reason.UPSTREAM_FAILED:
            self._reason = reason

    def succeeded(self, won: _Try) -> None:
        self._tries.remove(won)
        self.cancel()
        try:
            self._connected(won.sock, won.address)
        except Exception:
            won.close()
            raise

    def lost(self, tried: _Try, number: int) -> None:
        self._tries.remove(tried)
        tried.close()
        self._note(number)
        self._try_next()


class _Try:
    """One connect in flight."""

    __slots__ = ("_dial", "_epoll", "address", "sock")

    def __init__(self, dial: Dial, epoll: Epoll, address: Address, port: int) -> None:
        """Raises OSError when it fails at once."""
        self._dial = dial
        self._epoll = epoll
        self.address = address
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        self.sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = self.sock.connect_ex((str(address), port))
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, "connect")
            epoll.put(self.sock.fileno(), OUT, self._ready, dial.failed)
        except OSError:
            self.sock.close()
            raise

    def _ready(self, events: int) -> None:
        if events & (ERR | HUP):
            self._dial.lost(self, self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        else:
            self._dial.succeeded(self)

    def close(self) -> None:
        self._epoll.forget(self.sock.fileno())
        self.sock.close()


class TunnelDial:
    """A dial to the site's proxy, and its answer to `request`, together within one deadline.

    It ends as a `Dial` does; `unreachable` is also told what happened. No byte after the answer's head has been read:
    the origin may speak first.
    """

    __slots__ = ("_address", "_connected", "_crashed", "_dial", "_epoll", "_reader", "_request", "_sock",
                 "_unreachable", "deadline")  # fmt: skip

    def __init__(
        self,
        epoll: Epoll,
        addresses: Sequence[Address],
        port: int,
        limits: Limits,
        request: bytes,
        *,
        connected: Connected,
        unreachable: Callable[[Reason, str], None],
        crashed: Callable[[Exception], None],
    ) -> None:
        self._epoll = epoll
        self._request = request
        self._connected = connected
        self._unreachable = unreachable
        self._crashed = crashed
        self._sock: socket.socket | None = None
        self._address = addresses[0]
        self.deadline = epoll.now + limits.dial_s
        self._dial = Dial(
            epoll,
            addresses,
            port,
            limits,
            connected=self._ask,
            unreachable=lambda reason: unreachable(reason, "the site's proxy cannot be reached"),
            crashed=crashed,
        )

    def cancel(self) -> None:
        """Close what there is; no callback follows."""
        self._dial.cancel()
        self._epoll.unwatch(self)
        if self._sock is not None:
            self._epoll.forget(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def expired(self) -> None:
        self._fail(Unreachable(Reason.UPSTREAM_TIMEOUT, "the site's proxy did not answer in time"))

    def failed(self, error: Exception) -> None:
        self.cancel()
        self._crashed(error)

    def _ask(self, sock: socket.socket, address: Address) -> None:
        self._sock = sock
        self._address = address
        self._reader = AnswerReader(sock)
        self._epoll.watch(self)
        self._epoll.put(sock.fileno(), IN, self._read, self.failed)
        try:
            sent = sock.send(self._request)
        except OSError:
            sent = 0
        if sent < len(self._request):  # a fresh connection takes it whole, if it takes anything
            self._fail(Unreachable(Reason.UPSTREAM_FAILED, "the site's proxy closed before it was asked"))

    def _read(self, _events: int) -> None:
        sock = self._sock
        assert sock is not None
        try:
            if not self._reader.read():
                return
        except Unreachable as failure:
            self._fail(failure)
            return
        self._epoll.unwatch(self)
        self._sock = None
        try:
            self._connected(sock, self._address)
        except Exception:
            self._epoll.forget(sock.fileno())
            sock.close()
            raise

    def _fail(self, failure: Unreachable) -> None:
        self.cancel()
        self._unreachable(failure.reason, failure.note)


class AnswerReader:
    """Reads what the site's proxy answers to a CONNECT, and not one byte that follows it."""

    __slots__ = ("_head", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._head = b""

    def read(self) -> bool:
        """Take what has come. True: the tunnel is there; False: more is to come. Raises Unreachable."""
        try:
            data = self._sock.recv(MAX_HEAD - len(self._head), socket.MSG_PEEK)
            answer = parse_answer(self._head + data)
            taken = answer.size - len(self._head) if answer else len(data)
            self._head += self._sock.recv(taken)
        except BlockingIOError:
            return False
        except MalformedAnswer as error:
            raise Unreachable(Reason.UPSTREAM_FAILED, f"the site's proxy {error}") from error
        except OSError as error:
            raise Unreachable(Reason.UPSTREAM_FAILED, "the site's proxy reset the connection") from error
        if not data:
            raise Unreachable(Reason.UPSTREAM_FAILED, "the site's proxy closed before it answered")
        if answer and not answer.is_established:
            hint = ": it wants credentials, or other ones" if answer.status == 407 else ""
            raise Unreachable(Reason.UPSTREAM_REFUSED, f"the site's proxy answered {answer.status}{hint}")
        return answer is not None
