"""Accepts connections on any number of listening sockets and bounds how many there are; `connection` does the rest."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from policies.engine import Expect
from policies.hostnames import Hostname
from policies.model import Address, Attempt, Reason, Verdict
from proxy.connection import Connection
from proxy.epoll import IN, Epoll
from proxy.flow import Admit, Exit, Resolver
from proxy.guest import Gate, Guest, Identify, Meet
from proxy.inspector.handover import Handover
from proxy.limits import Limits
from proxy.original_dst import OriginalDst
from proxy.record import Sink
from proxy.relays.stream import Pipes
from proxy.upstream_proxy import SiteProxy

_ACCEPTS = 64  # in one go, before others have their turn
_REST_S = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listener:
    """The front door: every connection is peeked, decided, and then denied, carried, or given to the inspector.

    original_dst   where a connection was going: `redirected_dst` behind nft REDIRECT, `local_dst` in the sandbox
    identify       the workload of a source address, or of the user whose proxy credential was verified
    expect         what may arrive on a port of a workload
    carries_plain  whether a port of a workload carries plain HTTP
    decide         the verdict; asked before anything is looked up
    admit          the verdict on an address that is about to be dialled
    names_of       the names whose current lookup by this workload gave this address (opaque bytes name nobody)
    exceeded       why a workload may not have an allowed name looked up, where it has asked for too many new ones
    resolver       names to addresses
    inspect        takes over the socket of a connection that is to be inspected; None: such a connection is denied
    record         takes the decision records: a denial at once, an allowed flow when it is over
    clock          POSIX seconds
    generation     names the policy that judges now: who a connection is, is found anew when it is another
    site           the site's proxy, where that is the way out; None: everything is dialled directly
    is_own         whether an address and port are the gate's own, which it never dials
    dialled        told of each connection that was tried: how long that took in seconds, and why it failed
    """

    def __init__(
        self,
        epoll: Epoll,
        *,
        original_dst: OriginalDst,
        identify: Identify,
        expect: Callable[[str, int], Expect],
        carries_plain: Callable[[str, int], bool],
        decide: Callable[[Attempt], Verdict],
        admit: Admit,
        names_of: Callable[[str, Address], tuple[Hostname, ...]],
        resolver: Resolver,
        inspect: Callable[[socket.socket, Handover], None] | None,
        record: Sink,
        clock: Callable[[], float],
        exceeded: Callable[[str, Verdict, Hostname], str | None] = lambda workload, verdict, name: None,
        generation: Callable[[], str] = lambda: "",
        limits: Limits | None = None,
        site: SiteProxy | None = None,
        is_own: Callable[[Address, int], bool] | None = None,
        dialled: Callable[[float, Reason | None], None] | None = None,
    ) -> None:
        self._epoll = epoll
        self._limits = limits or Limits()
        self._pipes = Pipes()
        self._gate = Gate(
            epoll=epoll,
            exit=Exit(epoll, self._pipes, self._limits, admit, resolver, site, is_own, dialled),
            limits=self._limits,
            original_dst=original_dst,
            identify=identify,
            expect=expect,
            carries_plain=carries_plain,
            decide=decide,
            names_of=names_of,
            exceeded=exceeded,
            inspect=inspect,
            record=record,
            clock=clock,
            generation=generation,
            welcome=self.welcome,
            over=self._over,
        )
        self._doors: list[_Door] = []
        self._open: set[Guest] = set()
        self._by_source: dict[str, int] = {}
        self._reserve = _open_reserve()
        self.accepted = 0

    def serve(self, sock: socket.socket, meet: Meet = Connection) -> None:
        """Accept on a listening socket too. It belongs to the listener from now on. `meet` makes what is accepted."""
        sock.setblocking(False)
        self._doors.append(_Door(self, self._epoll, sock, meet))

    def stop(self) -> None:
        """Accept nothing more."""
        while self._doors:
            self._doors.pop().close()

    def close(self) -> None:
        """Accept nothing more and close every connection."""
        self.stop()
        for guest in tuple(self._open):
            guest.abort()
        self._pipes.close()
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None

    @property
    def exit(self) -> Exit:
        """The way out of everything that is carried here."""
        return self._gate.exit

    @property
    def open_connections(self) -> int:
        """How many are being peeked, carried, or told that they are denied."""
        return len(self._open)

    def welcome(
        self, sock: socket.socket, peer: tuple[str, int], meet: Meet = Connection, *, exhausted: bool = False
    ) -> None:
        """Begin with an accepted connection, or refuse it where there are too many."""
        guest = meet(self._gate, sock, peer)
        of_source = self._by_source.get(peer[0], 0)
        is_full = len(self._open) >= self._limits.max_connections or of_source >= self._limits.max_per_source
        self._open.add(guest)
        self._by_source[peer[0]] = of_source + 1
        try:
            if is_full or exhausted:
                guest.refuse(Reason.TOO_MANY_CONNECTIONS)
            else:
                guest.open()
        except Exception as error:
            self._epoll.contain(guest.failed, error)

    def refuse_one(self, sock: socket.socket, meet: Meet) -> bool:
        """Out of descriptors: accept with the one kept in reserve, only to reset. False: that was not possible either.

        Left in the backlog, connections would keep the level-triggered epoll awake and their clients waiting.
        """
        if self._reserve is None:
            self._reserve = _open_reserve()
        if self._reserve is None:
            return False
        os.close(self._reserve)
        try:
            accepted, peer = sock.accept()
            self.accepted += 1
            self.welcome(accepted, peer[:2], meet, exhausted=True)
        except OSError:  # nobody waits: accept4 wants a descriptor before it looks
            return False
        finally:
            self._reserve = _open_reserve()
        return True

    def _over(self, guest: Guest) -> None:
        self._open.discard(guest)
        source = guest.peer[0]
        left = self._by_source[source] - 1
        if left:
            self._by_source[source] = left
        else:
            del self._by_source[source]


class _Door:
    """One listening socket."""

    def __init__(self, listener: Listener, epoll: Epoll, sock: socket.socket, meet: Meet) -> None:
        self._listener = listener
        self._epoll = epoll
        self._sock = sock
        self._meet = meet
        self.deadline = 0.0
        epoll.put(sock.fileno(), IN, self._accept, self.failed)

    def _accept(self, _events: int) -> None:
        accept, welcome = self._sock.accept, self._listener.welcome
        for _ in range(_ACCEPTS):
            try:
                sock, peer = accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED and not self._listener.refuse_one(self._sock, self._meet):
                    self._rest()
                    return
                continue  # accept(2): its own network error comes out here, and the next one may be well
            self._listener.accepted += 1
            welcome(sock, peer[:2], self._meet)

    def _rest(self) -> None:
        """Look away from the backlog for a moment."""
        self._epoll.remove(self._sock.fileno())
        self.deadline = self._epoll.now + _REST_S
        self._epoll.watch(self)

    def expired(self) -> None:
        self._epoll.put(self._sock.fileno(), IN, self._accept, self.failed)

    def failed(self, _error: Exception) -> None:
        """Accepting itself crashed: the door stays, it opens again after a moment."""
        self._rest()

    def close(self) -> None:
        self._epoll.unwatch(self)
        self._epoll.forget(self._sock.fileno())
        self._sock.close()


def _open_reserve() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
