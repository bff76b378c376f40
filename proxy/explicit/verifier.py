"""Whose credentials a proxy client shows: a name and its password, or the token of a service account, which somebody
else reviews. Which workload that is, the policy says.

A password costs some 50 ms to verify, so it happens beside the loop, for a bounded number at once, and what was
verified is remembered. Guessing costs the one who guesses: a source has one guess at a time, and a wrong one takes a
second.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv6Address
from math import inf
from pathlib import Path

from policies.model import Address
from proxy.explicit.credentials import NOBODY, CredentialsError, PasswordHash, read_credentials
from proxy.wire.proxy_head import parse_credentials, parse_token

AT_ONCE = 2  # verifications: each takes a core and 16 MiB
FAILURE_S = 1.0  # how long a wrong answer takes, whatever the name: neither guesses nor timing give much
MAX_GUESSES = 8  # different credentials of one source that wait for their turn
MAX_KNOWN = 4096  # verified credentials that are remembered
REVIEWS_AT_ONCE = 16
REVIEWED_S = 60.0  # a token that was reviewed counts so long: one that is withdrawn meanwhile does, too
LOOK_S = 2.0  # between two looks at the file
_NICENESS = 10  # who verifies gives way to who carries


class TooManyGuesses(Exception):
    """This source has so many credentials under way that no more are looked at now."""


class Unverified(Exception):
    """Nobody has said whether a token is good. `str()` says why."""


type Review = Callable[[str], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class _Shown:
    """A credential as its client shows it; of a token the name is empty, which no name is."""

    name: str
    secret: str


class Verifier:
    """The credentials of one file, read anew when it changes, and tokens. Used on one asyncio loop.

    path    None: there is no file
    review  gives whose a token is, None if nobody's; raises Unverified. None: tokens have no bearing

    A file that cannot be read later leaves the last good one in force, and `say` is told in one line.
    Raises CredentialsError when it cannot be read at first.
    """

    def __init__(
        self,
        path: Path | None,
        say: Callable[[str], None],
        *,
        review: Review | None = None,
        failure_s: float = FAILURE_S,
    ) -> None:
        self._path = path
        self._say = say
        self._review = review
        self._failure_s = failure_s
        self._stamp = _stamp(path) if path else ()
        self._hashes: Mapping[str, PasswordHash] = read_credentials(path) if path else {}
        self._looked = time.monotonic()
        self._digest_key = os.urandom(32)
        # Digest of a verified credential: its name, and until when it counts.
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Task[str | None]] = {}
        self._turns: dict[Address, _Turn] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._reviews = asyncio.Semaphore(REVIEWS_AT_ONCE)
        self._threads = ThreadPoolExecutor(AT_ONCE, "verify", _give_way)

    def recall(self, value: bytes) -> str | None:
        """The name of a `Proxy-Authorization` value that was verified before, if it was; at once."""
        self._look()
        shown = self._parse(value)
        if shown is None:
            return None
        digest = self._digest(shown)
        name, until = self._known.get(digest, (None, 0.0))
        if name is None or until < time.monotonic():
            return None
        self._known.move_to_end(digest)
        return name

    async def verify(self, value: bytes, source: Address) -> str | None:
        """The name that `value` proves, or None. Raises TooManyGuesses, Unverified.

        The same credential is verified once, however many connections show it at the same time.
        """
        shown = self._parse(value)
        if shown is None:
            return None
        digest = self._digest(shown)
        task = self._under_way.get(digest)
        if task is None:
            source = _site(source)
            turn = self._turns.setdefault(source, _Turn())
            if turn.guesses >= MAX_GUESSES:
                raise TooManyGuesses
            turn.guesses += 1
            task = self._under_way[digest] = asyncio.create_task(self._check(digest, shown, source))
        return await asyncio.shield(task)  # one that goes away does not take the answer from the others

    def _parse(self, value: bytes) -> _Shown | None:
        if self._review is not None and (token := parse_token(value)):
            return _Shown("", token)
        given = parse_credentials(value)
        return _Shown(*given) if given else None

    async def _check(self, digest: bytes, shown: _Shown, source: Address) -> str | None:
        turn = self._turns[source]
        try:
            async with turn.lock:
                began = asyncio.get_running_loop().time()
                name = await (self._check_password(digest, shown) if shown.name else self._check_token(digest, shown))
                if name is None:
                    await asyncio.sleep(began + self._failure_s - asyncio.get_running_loop().time())
                return name
        finally:
            del self._under_way[digest]
            turn.guesses -= 1
            if not turn.guesses:
                del self._turns[source]

    async def _check_password(self, digest: bytes, shown: _Shown) -> str | None:
        async with self._slots:
            hashes = self._hashes
            hash = hashes.get(shown.name)
            loop = asyncio.get_running_loop()
            is_right = await loop.run_in_executor(self._threads, (hash or NOBODY).is_of, shown.secret)
        if hash is None or not is_right:
            return None
        if self._hashes is hashes:  # else it may be somebody's who was removed meanwhile
            self._remember(digest, shown.name, inf)
        return shown.name

    async def _check_token(self, digest: bytes, shown: _Shown) -> str | None:
        assert self._review is not None
        async with self._reviews:
            asked = time.monotonic()
            user = await self._review(shown.secret)
        if user is not None:
            self._remember(digest, user, asked + REVIEWED_S)
        return user

    def _remember(self, digest: bytes, name: str, until: float) -> None:
        self._known[digest] = name, until
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _digest(self, shown: _Shown) -> bytes:
        """Of the credential, not of the value: that has many spellings."""
        return blake2b(f"{shown.name}:{shown.secret}".encode(), key=self._digest_key).digest()

    def _look(self) -> None:
        """Read the file again where it is another one."""
        now = time.monotonic()
        if self._path is None or now - self._looked < LOOK_S:
            return
        self._looked = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            hashes = read_credentials(self._path)
        except CredentialsError as error:
            self._say(f"{error}; the credentials read before stay in force")
            return
        self._hashes = hashes
        self._known.clear()


class _Turn:
    """Of one source: one guess at a time, in the order they came."""

    __slots__ = ("guesses", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.guesses = 0


def _site(source: Address) -> Address:
    """Who counts as one source: an IPv6 host has a whole /64 to guess from."""
    return IPv6Address(int(source) >> 64 << 64) if isinstance(source, IPv6Address) else source


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells one state of a file from another; of a file that cannot be seen, nothing does."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _give_way() -> None:
    with suppress(OSError):  # where that is forbidden, verifying only is less polite
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
