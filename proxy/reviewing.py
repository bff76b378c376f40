"""The server that an API server asks before it makes a pod: HTTPS, bounds, and what was counted. What is answered is
decided in `proxy/injection`; it keeps nothing, writes nothing and asks nobody."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable

import orjson
from aiohttp import web

from proxy.config import SocketAddress
from proxy.injection.model import Settings
from proxy.injection.review import MalformedReview, Result, answer
from proxy.record import show_peer
from proxy.serving_certificate import Certificate

MAX_BODY = 8 << 20  # an object has 1.5 MiB at most; a review holds two
BODY_S = 10.0  # an API server sends at once, and waits 30 s at most
HANDSHAKE_S = 10.0
LIFETIME_S = 60.0  # of one connection; after half of it an answer says that it is the last
MAX_CONNECTIONS = 256  # when one more comes, the oldest goes
MAX_LINE = 8192
BACKLOG = 512

_TEXT, _JSON, _PROMETHEUS = "text/plain; charset=utf-8", "application/json", "text/plain; version=0.0.4; charset=utf-8"
_HEADERS = {"Server": "outgate", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
PATH = "/inject"
_MALFORMED = "malformed"


class CannotListen(Exception):
    """The port cannot be had. `str()` is one line: where, why."""


async def open_webhook(
    address: SocketAddress, certificate: Certificate, settings: Settings, log: Callable[[str], None]
) -> Webhook:
    """The webhook at `address`, served on the current loop. Raises CannotListen."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    is_dual = address[0] == "::" and socket.has_dualstack_ipv6()
    try:
        sock = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        raise CannotListen(f"--listen {show_peer(address)}: {os.strerror(error.errno or 0).lower()}") from error
    made = Webhook(sock, certificate, settings, log)
    await made.start()
    return made


class Webhook:
    """Serves a listening socket, which is its own from now on, until `close`."""

    def __init__(
        self, sock: socket.socket, certificate: Certificate, settings: Settings, log: Callable[[str], None]
    ) -> None:
        self._sock = sock
        self.address: SocketAddress = sock.getsockname()[:2]
        self._certificate = certificate
        self._settings = settings
        self._log = log
        self._counted: Counter[str] = Counter(dict.fromkeys((*Result, _MALFORMED), 0))
        self._protocols = web.Server(self._answer)
        self._open: dict[asyncio.WriteTransport, float] = {}  # since when; the oldest first
        self._server: asyncio.Server | None = None
        self._is_ending = False

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self._protocols, self._open, self._log),
            sock=self._sock,
            ssl=self._certificate.context,
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=1.0,
        )

    async def close(self, grace_s: float) -> None:
        """Accept nothing more; answers that are under way get `grace_s`."""
        self._is_ending = True
        if self._server is not None:
            self._server.close()
        await self._protocols.shutdown(timeout=grace_s)
        for transport in tuple(self._open):
            transport.abort()
        if self._server is not None:
            await self._server.wait_closed()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        response = await self._answer_to(request)
        transport = request.transport
        since = self._open.get(transport) if isinstance(transport, asyncio.WriteTransport) else None
        if self._is_ending or since is None or asyncio.get_running_loop().time() - since > LIFETIME_S / 2:
            response.force_close()
        return response

    async def _answer_to(self, request: web.BaseRequest) -> web.Response:
        match request.method, request.path:
            case (("GET" | "HEAD"), "/healthz"):
                return _response(200, "alive\n")
            case (("GET" | "HEAD"), "/readyz"):
                why_not = self._certificate.why_not()
                return _response(503 if why_not else 200, f"{why_not or 'ready'}\n")
            case (("GET" | "HEAD"), "/metrics"):
                return _response(200, self._metrics(), _PROMETHEUS)
            case "POST", path if path == PATH:
                return await self._review(request)
            case _, path if path == PATH:
                return _response(405, f"{PATH} takes POST\n", Allow="POST")
            case _:
                return _response(404, f"no such page; POST {PATH}, GET /healthz, /readyz, /metrics\n")

    async def _review(self, request: web.BaseRequest) -> web.Response:
        try:
            body = await _body(request)
        except _Refusal as refusal:
            return self._malformed(refusal.status, str(refusal))
        try:
            told = answer(orjson.loads(body), self._settings)
            content = orjson.dumps(told.review)
        except (MalformedReview, orjson.JSONDecodeError) as error:
            what = str(error) if isinstance(error, MalformedReview) else "not JSON"
            return self._malformed(400, what)
        self._counted[told.result] += 1
        if told.result is Result.REFUSED:
            self._log(f"{told.of} is refused: {told.reason}")
        return _response(200, content, _JSON)

    def _malformed(self, status: int, why: str) -> web.Response:
        self._counted[_MALFORMED] += 1
        response = _response(status, f"{why}\n")
        response.force_close()
        return response

    def _metrics(self) -> str:
        lines = [
            "# HELP outgate_webhook_reviews_total Admission reviews, by what came of them.",
            "# TYPE outgate_webhook_reviews_total counter",
            *(f'outgate_webhook_reviews_total{{result="{name}"}} {n}' for name, n in self._counted.items()),
            "# HELP outgate_webhook_certificate_expires_seconds When the certificate shown expires, POSIX time.",
            "# TYPE outgate_webhook_certificate_expires_seconds gauge",
            f"outgate_webhook_certificate_expires_seconds {self._certificate.expires:.0f}",
        ]
        return "\n".join(lines) + "\n"


class _Refusal(Exception):
    """A body that is not read to its end."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def _body(request: web.BaseRequest) -> bytes:
    """Raises _Refusal."""
    if request.content_type != "application/json":
        raise _Refusal(415, "send application/json")
    if (request.content_length or 0) > MAX_BODY:
        raise _Refusal(413, f"a review has at most {MAX_BODY} bytes")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            while part := await request.content.readany():
                parts.append(part)
                size += len(part)
                if size > MAX_BODY:
                    raise _Refusal(413, f"a review has at most {MAX_BODY} bytes")
    except TimeoutError:
        raise _Refusal(408, f"a review has to be here within {BODY_S:g} s") from None
    except (web.RequestPayloadError, ConnectionError) as error:
        raise _Refusal(400, "the body ended early") from error
    return b"".join(parts)


def _response(status: int, body: str | bytes, kind: str = _TEXT, **headers: str) -> web.Response:
    content = body.encode("utf-8", "replace") if isinstance(body, str) else body
    return web.Response(status=status, body=content, headers={**_HEADERS, "Content-Type": kind, **headers})


class _Connection(web.RequestHandler):
    """One connection, over within LIFETIME_S. `opened` are all there are, the oldest first."""

    def __init__(
        self, server: web.Server, opened: dict[asyncio.WriteTransport, float], log: Callable[[str], None]
    ) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # typed as a logger, documented as optional
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            lingering_time=1.0,
            auto_decompress=False,  # a kilobyte can hold a megabyte
        )
        self._opened = opened
        self._tell = log
        self._ours: asyncio.WriteTransport | None = None
        self._over: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        if len(self._opened) >= MAX_CONNECTIONS:
            oldest = next(iter(self._opened))
            del self._opened[oldest]
            oldest.abort()
        loop = asyncio.get_running_loop()
        self._opened[transport] = loop.time()
        self._ours = transport
        self._over = loop.call_later(LIFETIME_S, transport.abort)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._over is not None:
            self._over.cancel()
        if self._ours is not None:
            self._opened.pop(self._ours, None)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP, or a fault of ours, which failurePolicy is about. aiohttp's own answer shows versions."""
        if status >= 500:
            self._tell(f"a review failed: {type(exc).__name__}")
        response = _response(status, "not a request that is served here\n" if status < 500 else "failed\n")
        response.force_close()
        return response
