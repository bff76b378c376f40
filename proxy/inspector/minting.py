"""Gets each connection the TLS context that shows its host's leaf, while the loop goes on. What a leaf is, `pki` knows.

What is not cached is made in a thread: signing may be left to a token in another room, and for OpenSSL to read a leaf
takes longer than the rest of a handshake. Connections to one new name wait for one leaf.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from pki.authority import AuthorityError, Issuing
from pki.leaves import HTTP_1, HTTP_2
from pki.signer import SignerError

MAX_WAITING = 4096  # names: more than one source has connections, so that none shuts the others out


class NoLeaf(Exception):
    """There is no leaf to show. `str()` says why, and holds nothing that a workload has chosen but the name."""


class LeafSource(Protocol):
    """What `pki.leaves.Leaves` is to a loop."""

    def cached(self, host: str, alpn: tuple[str, ...]) -> ssl.SSLContext | None: ...
    def context(self, host: str, alpn: tuple[str, ...]) -> ssl.SSLContext: ...
    def replace(self, issuers: Sequence[Issuing]) -> None: ...
    def __len__(self) -> int: ...


class Minting:
    """The leaves of one process. Runs on the current loop.

    patience_s   how long a connection waits for its leaf
    max_waiting  how many names may wait
    """

    def __init__(self, leaves: LeafSource, *, patience_s: float, max_waiting: int = MAX_WAITING) -> None:
        self._leaves = leaves
        self._patience_s = patience_s
        self._max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, "leaves")
        self._making: dict[tuple[str, tuple[str, ...]], asyncio.Future[ssl.SSLContext]] = {}

    def cached(self, host: str, protocol: bytes) -> ssl.SSLContext | None:
        """What `context` would give at once; None: it would take a while."""
        return self._leaves.cached(host, HTTP_2 if protocol == b"h2" else HTTP_1)

    @property
    def remembered(self) -> int:
        return len(self._leaves)

    def replace(self, issuers: Sequence[Issuing]) -> None:
        """Show leaves of these from now on."""
        self._leaves.replace(issuers)

    async def context(self, host: str, protocol: bytes) -> ssl.SSLContext:
        """The context that shows a leaf for `host` and speaks one protocol (ALPN). Raises NoLeaf."""
        alpn = HTTP_2 if protocol == b"h2" else HTTP_1
        if (found := self._leaves.cached(host, alpn)) is not None:
            return found
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(self._make(host, alpn))  # others may wait for the same one
        except (AuthorityError, SignerError) as error:
            raise NoLeaf(str(error)) from error
        except TimeoutError as error:
            raise NoLeaf(f"no leaf was signed within {self._patience_s:g} s") from error
        except OSError as error:  # ours, and not the client's: descriptors have run out, or OpenSSL reads no leaf
            raise NoLeaf(f"no leaf can be loaded: {error.strerror or error}") from error

    def _make(self, host: str, alpn: tuple[str, ...]) -> asyncio.Future[ssl.SSLContext]:
        making = self._making.get((host, alpn))
        if making is None:
            if len(self._making) >= self._max_waiting:
                raise NoLeaf(f"{self._max_waiting} names wait for their leaves already")
            loop = asyncio.get_running_loop()
            making = loop.run_in_executor(self._thread, self._leaves.context, host, alpn)
            self._making[host, alpn] = making
            making.add_done_callback(lambda made: self._made(host, alpn, made))
        return making

    def _made(self, host: str, alpn: tuple[str, ...], made: asyncio.Future[ssl.SSLContext]) -> None:
        del self._making[host, alpn]
        if not made.cancelled():
            made.exception()  # heard by whoever waits; asyncio would report one that nobody waits for any more
