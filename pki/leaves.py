"""One TLS context per host, minted on first use and kept while its leaf is fresh. It knows the clock it is given."""

from __future__ import annotations

import os
import ssl
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from threading import Lock

from pki.authority import Issuing, Leaf, issue_leaf

HTTP_1 = ("http/1.1",)
HTTP_2 = ("h2",)
# TLS 1.2 without tickets: OpenSSL keeps a session for each connection that ends cleanly, up to 20,480 of about 1 kB in
# every context, and Python cannot turn that off. A worn context is minted again instead.
MAX_SESSIONS = 64


@dataclass(frozen=True, slots=True)
class _Held[C]:
    context: C
    not_before: datetime
    renew_at: datetime

    def is_fresh(self, now: datetime) -> bool:
        """Also where the clock was set back: a leaf of the future is refused by every client."""
        return self.not_before <= now < self.renew_at


class Leaves[C]:
    """The contexts of the most recently used `size` hosts. Any thread may ask.

    clock    the time, with its zone
    build    makes of a leaf what the TLS library at hand wants (`server_context` for `ssl`)
    is_worn  tells that a context must not serve another connection
    """

    def __init__(
        self,
        issuing: Issuing,
        clock: Callable[[], datetime],
        build: Callable[[Leaf], C],
        *,
        size: int = 4096,
        is_worn: Callable[[C], bool] = lambda _: False,
    ) -> None:
        self._issuing = issuing
        self._clock = clock
        self._build = build
        self._size = size
        self._is_worn = is_worn
        self._held: OrderedDict[str, _Held[C]] = OrderedDict()  # least recently used first
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def cached(self, host: str) -> C | None:
        """The context of `host` if it is here and fresh. A loop asks this first and leaves `context` to a thread."""
        with self._lock:
            held = self._held.get(host)
            if held is None or not held.is_fresh(self._clock()) or self._is_worn(held.context):
                return None
            self._held.move_to_end(host)
            return held.context

    def context(self, host: str) -> C:
        """The context of `host`, minted if need be: about a millisecond. Raises AuthorityError."""
        context = self.cached(host)
        return self._mint(host) if context is None else context

    def _mint(self, host: str) -> C:
        leaf = issue_leaf(self._issuing, host, self._clock())
        held = _Held(self._build(leaf), leaf.certificate.not_valid_before_utc, leaf.renew_at)
        with self._lock:  # two threads may have minted the same host: both contexts serve, the later one stays
            self._held[host] = held
            self._held.move_to_end(host)
            while len(self._held) > self._size:
                self._held.popitem(last=False)
        return held.context


def tls_leaves(
    issuing: Issuing, clock: Callable[[], datetime], *, alpn: Sequence[str] = HTTP_1, size: int = 4096
) -> Leaves[ssl.SSLContext]:
    """Leaves for the standard library's TLS."""
    return Leaves(issuing, clock, lambda leaf: server_context(leaf, alpn), size=size, is_worn=_is_worn)


def server_context(leaf: Leaf, alpn: Sequence[str] = HTTP_1) -> ssl.SSLContext:
    """A TLS 1.2 and 1.3 server that shows `leaf`. Its sessions cannot be resumed under another name.

    Resumption stays inside one context, for every context has ticket keys of its own; TLS 1.3 sends no tickets at all,
    since with P-256 leaves resuming saves no time that can be measured.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    context.set_alpn_protocols(list(alpn))
    # The standard library loads keys from paths only; memory with a path keeps the key off every disk.
    memory = os.memfd_create("leaf")
    with open(memory, "wb") as file:
        file.write(leaf.pem())
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    return context


def _is_worn(context: ssl.SSLContext) -> bool:
    return context.session_stats()["number"] >= MAX_SESSIONS
