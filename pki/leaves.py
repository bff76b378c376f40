"""TLS contexts by host: a leaf is minted on first use and kept while it is fresh, a context while it is in use.

It knows the clock it is given. What is not cached takes up to two milliseconds (to read a leaf, OpenSSL 3.0 takes six
times as long as to sign it), and a remote signer its own time: a loop asks `cached`, and leaves `context` to a thread.
"""

from __future__ import annotations

import os
import ssl
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from threading import Lock

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pki.authority import CaKey, Issuing, KeyKind, Leaf, Line, certificates_pem, create_key, issue_leaf

HTTP_1 = ("http/1.1",)
HTTP_2 = ("h2",)
MAX_LEAVES = 16_384  # 1.5 kB each: a wildcard rule admits more names than memory has room for
MAX_CONTEXTS = 1024  # 26 kB each
# TLS 1.2 without tickets: OpenSSL keeps a session for each connection that ends cleanly, up to 20,480 of about 1 kB in
# every context, and Python cannot turn that off. A worn context is built again instead.
MAX_SESSIONS = 64

_OPTIONS = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).options | ssl.OP_NO_RENEGOTIATION

type _Pem = tuple[bytes, bytes]  # a leaf and its key


@dataclass(frozen=True, slots=True)
class _Issuers:
    """What signs leaves, until it is replaced by another of these: equal or not, leaves of the former go with it."""

    each: tuple[Issuing, ...]
    chains: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Kept:
    """The leaves of one host, of each line one, in as few bytes as will do: their chains are the issuers'."""

    pems: tuple[_Pem, ...]
    by: _Issuers
    not_before: datetime
    renew_at: datetime


class Leaves:
    """The leaves of the hosts used last, and the contexts of those used last of all. Any thread may ask.

    issuers   of each line one; a context shows a leaf of each, and the client's hello says which it can read
    clock     the time, with its zone
    leaves    how many hosts' are kept at most
    contexts  likewise, one for each host and protocol
    """

    def __init__(
        self,
        issuers: Sequence[Issuing],
        clock: Callable[[], datetime],
        *,
        leaves: int = MAX_LEAVES,
        contexts: int = MAX_CONTEXTS,
    ) -> None:
        self._issuers = _issuers(issuers)
        self._clock = clock
        self._max_leaves = leaves
        self._max_contexts = contexts
        # Both least recently used first.
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._contexts: OrderedDict[tuple[str, tuple[str, ...]], tuple[ssl.SSLContext, _Kept]] = OrderedDict()
        self._lock = Lock()
        self._rsa_key: CaKey | None = None
        self._rsa_lock = Lock()

    def __len__(self) -> int:
        """How many hosts have a leaf here."""
        return len(self._kept)

    def replace(self, issuers: Sequence[Issuing]) -> None:
        """Show leaves of these from now on; contexts that are in use stay as they are.

        Former leaves are passed over, and leave as others need their room: to drop thousands at once would take long.
        """
        self._issuers = _issuers(issuers)

    def cached(self, host: str, alpn: tuple[str, ...] = HTTP_1) -> ssl.SSLContext | None:
        """The context of `host` that speaks `alpn`, if it is here and its leaf is fresh. Never takes long."""
        with self._lock:
            context, kept = self._contexts.get((host, alpn), (None, None))
            if context is None or kept is None or not self._is_fresh(kept) or _is_worn(context):
                return None
            self._contexts.move_to_end((host, alpn))
            if host in self._kept:
                self._kept.move_to_end(host)
            return context

    def context(self, host: str, alpn: tuple[str, ...] = HTTP_1) -> ssl.SSLContext:
        """The context of `host` that speaks `alpn`, made if need be. Raises AuthorityError; SignerError of a token."""
        while True:
            if (found := self.cached(host, alpn)) is not None:
                return found
            kept = self._leaf(host)
            context = _context(kept.pems, kept.by.chains, alpn)
            with self._lock:  # two threads may have made the same one: both serve, the later one stays
                _put(self._contexts, (host, alpn), (context, kept), self._max_contexts)
            if kept.by is self._issuers:
                return context

    def _leaf(self, host: str) -> _Kept:
        with self._lock:
            kept = self._kept.get(host)
            if kept is not None and self._is_fresh(kept):
                return kept
        kept = self._mint(host, self._issuers)
        with self._lock:
            _put(self._kept, host, kept, self._max_leaves)
        return kept

    def _is_fresh(self, kept: _Kept) -> bool:
        """Also where the clock was set back: a leaf of the future is refused by every client."""
        return kept.by is self._issuers and kept.not_before <= self._clock() < kept.renew_at

    def _mint(self, host: str, by: _Issuers) -> _Kept:
        now = self._clock()
        leaves = [issue_leaf(issuer, host, now, self._key(issuer.line)) for issuer in by.each]
        return _Kept(
            pems=tuple((certificates_pem(leaf.certificate), _key_pem(leaf.key)) for leaf in leaves),
            by=by,
            not_before=max(leaf.certificate.not_valid_before_utc for leaf in leaves),
            renew_at=min(leaf.renew_at for leaf in leaves),
        )

    def _key(self, line: Line) -> CaKey | None:
        """None: a new one, which costs next to nothing. An RSA key takes 50 ms and more, so one serves all leaves."""
        if line is not Line.RSA:
            return None
        with self._rsa_lock:
            self._rsa_key = self._rsa_key or create_key(KeyKind.RSA_2048)
            return self._rsa_key


def server_context(leaf: Leaf, alpn: Iterable[str] = HTTP_1) -> ssl.SSLContext:
    """A TLS 1.2 and 1.3 server that shows `leaf`. Its sessions cannot be resumed under another name.

    Resumption stays inside one context, for every context has ticket keys of its own; TLS 1.3 sends no tickets at all,
    since with P-256 leaves resuming saves no time that can be measured.
    """
    return _context([(certificates_pem(leaf.certificate), _key_pem(leaf.key))], [certificates_pem(*leaf.chain)], alpn)


def _context(pems: Iterable[_Pem], chains: Iterable[bytes], alpn: Iterable[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options = _OPTIONS
    context.num_tickets = 0
    context.set_alpn_protocols(list(alpn))
    for (leaf, key), chain in zip(pems, chains, strict=True):
        # The standard library loads keys from paths only; memory with a path keeps the key off every disk. Two of them,
        # for OpenSSL would try what stands before a key in vain first.
        with _memory(leaf + chain) as shown, _memory(key) as secret:
            context.load_cert_chain(shown, secret)
    return context


@contextmanager
def _memory(content: bytes) -> Iterator[str]:
    """A path to it, for as long as the context is open."""
    descriptor = os.memfd_create("leaf")
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _key_pem(key: CaKey) -> bytes:
    """The older of its two formats: OpenSSL reads it sooner, and it is shorter."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())


def _issuers(issuers: Sequence[Issuing]) -> _Issuers:
    return _Issuers(tuple(issuers), tuple(certificates_pem(*issuer.chain) for issuer in issuers))


def _put[K, V](held: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    held[key] = value
    held.move_to_end(key)
    while len(held) > most:
        held.popitem(last=False)


def _is_worn(context: ssl.SSLContext) -> bool:
    return context.session_stats()["number"] >= MAX_SESSIONS
