"""Whose credentials a proxy client shows. It knows names and passwords; which workload a name is, the policy says.

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from ipaddress import IPv6Address
from pathlib import Path

from policies.model import Address
from proxy.explicit.credentials import NOBODY, CredentialsError, read_credentials
from proxy.wire.proxy_head import parse_credentials

AT_ONCE = 2  # verifications: each takes a core and 16 MiB
FAILURE_S = 1.0  # how long a wrong answer takes, whatever the name: neither guesses nor timing give much
MAX_GUESSES = 8  # different credentials of one source that wait for their turn
MAX_KNOWN = 4096  # verified credentials that are remembered
LOOK_S = 2.0  # between two looks at the file
_NICENESS = 10  # who verifies gives way to who carries


class TooManyGuesses(Exception):
    """This source has so many credentials under way that no more are looked at now."""


class Verifier:
    """The credentials of one file, read anew when it changes. Used on one asyncio loop.

    A file that cannot be read later leaves the last good one in force, and `say` is told in one line.
    Raises CredentialsError when it cannot be read at first.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, failure_s: float = FAILURE_S) -> None:
        self._path = path
        self._say = say
        self._failure_s = failure_s
        self._stamp = _stamp(path)
        self._hashes = read_credentials(path)
        self._looked = time.monotonic()
        self._digest_key = os.urandom(32)
        self._known: OrderedDict[bytes, str] = OrderedDict()  # digest of a verified credential to its name
        self._under_way: dict[bytes, asyncio.Task[str | None]] = {}
        self._turns: dict[Address, _Turn] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._threads = ThreadPoolExecutor(AT_ONCE, "verify", _give_way)

    def recall(self, value: bytes) -> str | None:
        """The name of a `Proxy-Authorization` value that was verified before, if it was; at once."""
        self._look()
        given = parse_credentials(value)
        if given is None:
            return None
        digest = self._digest(*given)
        name = self._known.get(digest)
        if name is not None:
            self._known.move_to_end(digest)
        return name

    async def verify(self, value: bytes, source: Address) -> str | None:
        """The name that `value` proves, or None. Raises TooManyGuesses.

        The same credential is verified once, however many connections show it at the same time.
        """
        given = parse_credentials(value)
        if given is None:
            return None
        digest = self._digest(*given)
        task = self._under_way.get(digest)
        if task is None:
            source = _site(source)
            turn = self._turns.setdefault(source, _Turn())
            if turn.guesses >= MAX_GUESSES:
                raise TooManyGuesses
            turn.guesses += 1
            task = self._under_way[digest] = asyncio.create_task(self._check(digest, *given, source))
        return await asyncio.shield(task)  # one that goes away does not take the answer from the others

    async def _check(self, digest: bytes, name: str, password: str, source: Address) -> str | None:
        turn = self._turns[source]
        loop = asyncio.get_running_loop()
        try:
            async with turn.lock:
                async with self._slots:
                    began = loop.time()
                    hashes = self._hashes
                    hash = hashes.get(name)
                    is_right = await loop.run_in_executor(self._threads, (hash or NOBODY).is_of, password)
                if hash is not None and is_right:
                    if self._hashes is hashes:  # else it may be somebody's who was removed meanwhile
                        self._remember(digest, name)
                    return name
                await asyncio.sleep(began + self._failure_s - loop.time())
                return None
        finally:
            del self._under_way[digest]
            turn.guesses -= 1
            if not turn.guesses:
                del self._turns[source]

    def _remember(self, digest: bytes, name: str) -> None:
        self._known[digest] = name
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _digest(self, name: str, password: str) -> bytes:
        """Of the credential, not of the value: that has many spellings."""
        return blake2b(f"{name}:{password}".encode(), key=self._digest_key).digest()

    def _look(self) -> None:
        """Read the file again where it is another one."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
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
