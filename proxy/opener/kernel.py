"""The kernel's part in openings: the sets of our table, and the connections that were let past the gate by them.

It does what it is told, at once; for whom and for how long is not its business.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Iterable, Mapping

from proxy.conntrack import cut, marked
from proxy.elements import Element, Transport, close_text, empty_text, open_text
from proxy.firewall import FirewallRefused, explained, require_capability, require_openings
from proxy.layout import Layout
from proxy.netlink import Netfilter
from proxy.nft import NftMissing, NftRefused, open_nft
from proxy.ruleset import TABLE
from proxy.wire.conntrack import Connection
from proxy.wire.netlink import MalformedNetlink
from proxy.wire.nft_table import Table, ask_table, read_table

_PROTOCOLS: Mapping[int, Transport] = {6: "tcp", 17: "udp"}
_DNS_PORT = 53
_FULL = ("Too many open files in system", "No space left")  # ENFILE, ENOSPC: of a set


class CannotOpen(Exception):
    """The kernel did not do it. `str()` is one line: what, why, repair. `is_full`: the sets hold no more."""

    def __init__(self, why: str, *, is_full: bool = False) -> None:
        super().__init__(why)
        self.is_full = is_full


class Kernel:
    """Raises CannotOpen, as every method does: without the capability, nft or connection tracking."""

    def __init__(self) -> None:
        try:
            require_capability()
            self._nft = open_nft()
            self._netfilter = Netfilter()
        except FirewallRefused as error:
            raise CannotOpen(str(error)) from error
        except NftMissing as error:
            raise CannotOpen(f"neither libnftables nor the program nft is there ({error}): install nftables") from error
        except OSError as error:
            raise CannotOpen(f"netfilter cannot be asked: {error.strerror or error}") from error
        self._layout: Layout | None = None
        self._table: Table | None = None

    def has_changed(self) -> bool:
        """Whether our table is another than the one that was settled, or none."""
        return self._table is None or self._find_table() != self._table

    def settle(self, times_s: Mapping[Element, float]) -> None:
        """Look whose rules are in force, and have exactly these elements open."""
        self._table = None
        try:
            table, self._layout = self._find_table(), require_openings(self._nft)
        except FirewallRefused as error:
            raise CannotOpen(str(error)) from error
        if table is None or table.is_dormant:
            raise CannotOpen(f"table inet {TABLE} is dormant, its rules bear on nothing: outgate firewall apply")
        self._run(empty_text() + (open_text(times_s) if times_s else ""))
        self._table = table

    def open(self, times_s: Mapping[Element, float]) -> None:
        self._run(open_text(times_s))

    def close(self, elements: Iterable[Element]) -> None:
        self._run(close_text(elements))

    def empty(self) -> None:
        """Nothing is open any more."""
        self._run(empty_text())

    def connections(self) -> Mapping[Element, list[Connection]]:
        """What was let past the gate and is not over, but for questions to the resolvers of `--resolver`."""
        found: defaultdict[Element, list[Connection]] = defaultdict(list)
        try:
            for one in marked(self._netfilter):
                if one.protocol in _PROTOCOLS and not self._is_asked(one) and self._is_workload(one):
                    found[Element(one.source, one.destination, _PROTOCOLS[one.protocol], one.port)].append(one)
        except OSError as error:
            raise CannotOpen(f"connections cannot be listed (nf_conntrack_netlink): {error.strerror}") from error
        return found

    def cut(self, connections: Iterable[Connection]) -> int:
        """End them, and say how many there were."""
        try:
            return cut(self._netfilter, connections)
        except OSError as error:
            raise CannotOpen(f"connections cannot be cut: {error.strerror}") from error

    def _is_asked(self, connection: Connection) -> bool:
        return (
            self._layout is not None
            and connection.port == _DNS_PORT
            and connection.destination in self._layout.resolvers
        )

    def _is_workload(self, connection: Connection) -> bool:
        """Others may use the same bit of a mark."""
        subnets = self._layout.subnets if self._layout else ()
        return not subnets or any(connection.source in subnet for subnet in subnets)

    def _run(self, text: str) -> None:
        try:
            self._nft.run(text)
        except NftRefused as error:
            raise CannotOpen(explained(error), is_full=any(one in str(error) for one in _FULL)) from error
        except NftMissing as error:
            raise CannotOpen(str(error)) from error

    def _find_table(self) -> Table | None:
        [sequence] = self._netfilter.numbers()
        try:
            [message] = self._netfilter.ask(ask_table(TABLE, sequence), sequence)
            return read_table(message.body)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise CannotOpen(f"nf_tables cannot be asked: {error.strerror}") from error
        except MalformedNetlink as error:
            raise CannotOpen(f"nf_tables cannot be asked: {error}") from error
