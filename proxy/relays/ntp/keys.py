"""The keys and cookies by which one source proves its answers (NTS): when they are got, used up, and got again.

A source that has such keys is never asked without them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from secrets import token_bytes

from policies.hostnames import Hostname
from proxy.record import Peer
from proxy.relays.ntp.clock import own_ns
from proxy.relays.ntp.exchange import NoKeys, ask
from proxy.relays.ntp.key_exchange import Granted, exchange_keys
from proxy.relays.ntp.sample import NS, Sample
from proxy.wire import nts

# RFC 8915 4.2. It lets the longest wait be five days; a server that is repaired should not stay away for so long.
FIRST_WAIT_S, BASE, LONGEST_WAIT_S = 10.0, 1.5, 3600.0
RENEW_S = 7 * 86_400.0  # by then a certificate must be shown again: who gave up a name must not keep its trust
PATIENCE = 2  # cookies that are not recognised in a row (RFC 8915 5.7): the first may be somebody's on the way

type Locate = Callable[[Hostname, Peer, str | None, int | None], Awaitable[Peer | None]]


@dataclass(slots=True)
class Session:
    """What one key exchange gave, and what is left of it."""

    server: Peer  # which is asked for the time
    granted: Granted = field(repr=False)
    cookies: list[bytes] = field(repr=False)
    made_ns: int
    _query: nts.Query | None = field(default=None, repr=False)

    def seal(self, plain: bytes) -> bytes:
        """The query with its proof. Takes a cookie, of which there must be one."""
        cookie = self.cookies.pop()
        self._query = nts.build_query(
            plain,
            cookie,
            unique=token_bytes(nts.UNIQUE_SIZE),
            nonce=token_bytes(nts.NONCE_SIZE),
            key=self.granted.to_server,
            held=len(self.cookies),
        )
        return self._query.message

    def open(self, message: bytes) -> bytes:
        """The 48 bytes of the answer to the last query. Raises MalformedPacket, KissOfDeath."""
        assert self._query is not None
        opened = nts.open_answer(message, self._query, self.granted.to_client)
        self.cookies += opened.cookies[: nts.COOKIES - len(self.cookies)]
        return opened.packet


class Keys:
    """Of one source.

    locate  where a key exchange sends queries, as far as the policy names it; None: nowhere
    roots   as `exchange_keys` takes them
    """

    def __init__(self, name: Hostname, locate: Locate, *, roots: str | None) -> None:
        self._name = name
        self._locate = locate
        self._roots = roots
        self._session: Session | None = None
        self._unused = 0  # exchanges since an answer was proved
        self._unrecognised = 0
        self._not_before_ns = 0

    @property
    def server(self) -> Peer | None:
        """Which is asked for the time; None: there are no keys yet."""
        return self._session.server if self._session else None

    @property
    def cookies(self) -> int:
        return len(self._session.cookies) if self._session else 0

    def wait_s(self) -> float:
        """How long nothing can be asked: there are no keys, and it is too early to ask for some. 0.0: now."""
        return 0.0 if self.cookies else max(self._not_before_ns - own_ns(), 0) / NS

    async def ask(self, at: Peer, timeout_s: float) -> Sample:
        """As `exchange.ask`, of the server whose key exchange is at `at`. Raises NoKeys too."""
        session = await self._ready(at)
        sample = await ask(session.server, timeout_s, session)
        self._unused = self._unrecognised = self._not_before_ns = 0
        return sample

    def doubt(self) -> None:
        """A cookie was not recognised."""
        self._unrecognised += 1
        if self._unrecognised >= PATIENCE:
            self.forget()

    def forget(self) -> None:
        self._session = None
        self._unrecognised = 0

    async def _ready(self, at: Peer) -> Session:
        now_ns = own_ns()
        session = self._session if self.cookies else None
        is_old = session is not None and now_ns - session.made_ns >= RENEW_S * NS
        if session and (not is_old or now_ns < self._not_before_ns):
            return session
        wait_s = min(FIRST_WAIT_S * BASE**self._unused, LONGEST_WAIT_S)
        self._not_before_ns = now_ns + round(wait_s * NS)
        self._unused = min(self._unused + 1, 32)
        try:
            self._session = await self._exchange(at)
        except NoKeys:
            if session is None:
                raise
            return session  # it is still good
        return self._session

    async def _exchange(self, at: Peer) -> Session:
        """Raises NoKeys."""
        granted = await exchange_keys(at, self._name, roots=self._roots)
        server = await self._locate(self._name, at, granted.agreed.server, granted.agreed.port)
        if server is None:
            raise NoKeys("its key exchange names a server that may not be asked: no rule names it, or its address")
        return Session(server, granted, list(granted.agreed.cookies), own_ns())
