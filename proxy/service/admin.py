"""The admin port: is it alive, is it ready, what was counted; and a reload, for whoever has the token.

It knows HTTP and `Status`, nothing of policies or workers. One request for each connection, and every connection is
over soon, so that nobody holds the port against others.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import re
import socket
import traceback
from collections.abc import Callable
from ipaddress import ip_address

import orjson
from aiohttp import web

from pki.files import UnusableSecret, read_secret
from policies.addresses import is_address
from proxy.record import Peer, show_peer
from proxy.service.status import ReloadOutcome, ReloadResult, Status

LIFETIME_S = 30.0  # of one connection, whatever it does: slow heads, slow bodies, slow readers, silence
REPLY_S = 20.0  # a reload that takes longer is answered with 202 and goes on
METRICS_S = 10.0  # a worker that does not answer must not hold up for ever whoever asks
LINGER_S = 1.0  # for what is still sent after an answer: a reset could overtake it
MAX_CONNECTIONS = 64  # when one more comes, the oldest goes: a probe always gets its turn
MAX_LINE = 2048  # bytes of the request line, and of one header
MAX_BODY = 1024
MIN_TOKEN, MAX_TOKEN = 16, 1024  # characters
BACKLOG = 128

TEXT = "text/plain; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
JSON = "application/json"

_LISTING = """outgate

GET  /healthz  200 while this process works
GET  /readyz   200, or 503 and why not
GET  /metrics  for Prometheus; OpenMetrics where Accept asks for it
POST /reload   read the policy files and the issuing CAs again; needs the token
"""
_READ, _CHANGE = ("GET", "HEAD"), ("POST",)
_METHODS = {"/": _READ, "/healthz": _READ, "/readyz": _READ, "/metrics": _READ, "/reload": _CHANGE}
_HEADERS = {"Server": "outgate", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_RELOAD_STATUS = {
    ReloadOutcome.LOADED: 200,
    ReloadOutcome.UNCHANGED: 200,
    ReloadOutcome.REFUSED: 422,
    ReloadOutcome.FAILED: 500,
}
_UNCONFIGURED = "no token is configured: give a file that holds one with --admin-token FILE, or send SIGHUP to the gate"
_OUR_FAULT = "a part of the gate failed; its log says which"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")
_TOKEN = re.compile(r"[\x21-\x7e]+")


class AdminFailed(Exception):
    """The admin port cannot be served. `str()` is one line: what, where, repair."""


async def open_admin(
    address: Peer, status: Status, *, token_file: str | None = None, log: Callable[[str], None]
) -> Admin:
    """The admin port at `address`, served on the current loop. Raises AdminFailed.

    token_file  read for each change, so a new token counts at once; None: nothing can be changed
    log         told in one line of what failed
    """
    if token_file is not None:
        read_token(token_file)
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    is_dual = address[0] == "::" and socket.has_dualstack_ipv6()  # as every other server that is told [::]
    try:
        sock = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        raise AdminFailed(
            f"--admin {show_peer(address)}: {os.strerror(error.errno or 0).lower()}; name another address, or none"
        ) from error
    admin = Admin(status, sock, token_file, log)
    await admin.start()
    return admin


def read_token(path: str) -> str:
    """The token in the file at `path`. Raises AdminFailed."""
    try:
        text = read_secret(path, MAX_TOKEN + 2, shows="the token", holds="the token")
    except UnusableSecret as error:
        raise AdminFailed(str(error)) from error
    token = text.decode("latin-1").rstrip("\r\n")
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN or not _TOKEN.fullmatch(token):
        raise AdminFailed(
            f"{path}: not one line of {MIN_TOKEN} to {MAX_TOKEN} visible ASCII characters; "
            "make a token with: openssl rand -hex 32"
        )
    return token


class Admin:
    """Serves a listening socket, which is its own from now on, until `close`."""

    def __init__(self, status: Status, sock: socket.socket, token_file: str | None, log: Callable[[str], None]) -> None:
        self._status = status
        self._sock = sock
        host, port = sock.getsockname()[:2]
        self.address: Peer = host, port
        self._token_file = token_file
        self._token_fault = ""
        self._log = log
        self._is_loopback = ip_address(host).is_loopback
        self._protocols = web.Server(self._answer)
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.WriteTransport, None] = {}  # the oldest first
        self._pages: dict[bool, asyncio.Task[bytes]] = {}
        self._reload: asyncio.Task[ReloadResult] | None = None

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self._protocols, self._open, self._log), sock=self._sock
        )

    async def close(self) -> None:
        """Accept nothing more and cut what is open."""
        if self._server is not None:
            self._server.close()
        for transport in tuple(self._open):
            transport.abort()
        tasks = [task for task in (self._reload, *self._pages.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._protocols.shutdown(timeout=1.0)
        if self._server is not None:
            await self._server.wait_closed()

    # --- answers ---

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        try:
            self._check(request)
            match request.path:
                case "/":
                    return _response(200, _LISTING)
                case "/healthz":
                    return _response(200, "alive\n")
                case "/readyz":
                    return self._show_readiness()
                case "/metrics":
                    return await self._show_metrics(request)
                case _:
                    return await self._serve_reload(request)
        except _Refusal as refusal:
            return refusal.response

    def _check(self, request: web.BaseRequest) -> None:
        """Raises _Refusal where the path, the method or the sender's idea of whom it talks to is wrong."""
        methods = _METHODS.get(request.path)
        if methods is None:
            raise _Refusal(404, "no such page; GET / lists them\n")
        if request.method not in methods:
            raise _Refusal(405, f"{request.path} takes {' and '.join(methods)}\n", Allow=", ".join(methods))
        # A page in a browser on this machine can send here: under a name of its own that leads here (DNS rebinding),
        # which then stands in Host, or from its own origin, which then stands in Origin.
        if (request.method in _CHANGE or self._is_loopback) and not _names_no_stranger(request):
            raise _Refusal(403, "the Host of this request is a name; ask by address, or as localhost\n")
        if request.method in _CHANGE and "Origin" in request.headers:
            raise _Refusal(403, "not from a browser\n")

    def _show_readiness(self) -> web.Response:
        because = list(self._status.ready())
        page = {"ready": not because, "because": because, "notes": list(self._status.notes())}
        return _json(503 if because else 200, page)

    async def _show_metrics(self, request: web.BaseRequest) -> web.Response:
        openmetrics = _wants_openmetrics(request)
        task = self._pages.get(openmetrics)
        if task is None or task.done():  # else one is being made: many who ask cost what one does
            task = self._pages[openmetrics] = asyncio.create_task(self._make_page(openmetrics))
        try:
            page = await asyncio.shield(task)
        except TimeoutError:
            raise _Refusal(503, f"no metrics within {METRICS_S:g} s\n") from None
        return _response(200, page, OPENMETRICS if openmetrics else PROMETHEUS)

    async def _make_page(self, openmetrics: bool) -> bytes:
        async with asyncio.timeout(METRICS_S):
            return await self._status.metrics(openmetrics)

    async def _serve_reload(self, request: web.BaseRequest) -> web.Response:
        self._authorize(request)
        await _take_body(request)
        if self._reload is not None and not self._reload.done():
            raise _Refusal(409, "another reload is under way\n")
        task = self._reload = asyncio.create_task(self._run_reload())
        done, _ = await asyncio.wait((task,), timeout=REPLY_S)
        if not done:
            return _response(202, "still under way; outgate_reloads_total in /metrics says what comes of it\n")
        result = task.result()
        page = {"result": result.outcome, "generation": result.generation, "problems": list(result.problems)}
        return _json(_RELOAD_STATUS[result.outcome], page)

    async def _run_reload(self) -> ReloadResult:
        try:
            return await self._status.reload()
        except Exception as error:
            self._log(f"admin: the reload failed: {_name(error)}")
            return ReloadResult(ReloadOutcome.FAILED, problems=(_OUR_FAULT,))

    def _authorize(self, request: web.BaseRequest) -> None:
        """Raises _Refusal unless the request carries the token."""
        if self._token_file is None:
            raise _Refusal(403, _UNCONFIGURED + "\n")
        try:
            token = read_token(self._token_file)
        except AdminFailed as error:
            if str(error) != self._token_fault:  # once: whoever asks must not fill the log
                self._token_fault = str(error)
                self._log(f"admin: {error}")
            raise _Refusal(403, "the token file cannot be used; the gate's log says why\n") from error
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise _Refusal(401, "send the token: Authorization: Bearer TOKEN\n", **{"WWW-Authenticate": "Bearer"})


def _names_no_stranger(request: web.BaseRequest) -> bool:
    """Whether Host is an address or localhost; nobody's DNS can make those lead elsewhere first. None is no browser."""
    hosts = request.headers.getall("Host", [])
    if not hosts:
        return True
    found = _HOST.fullmatch(hosts[0])
    if found is None or len(hosts) > 1:
        return False
    return found[1].lower() == "localhost" or is_address(found[1].strip("[]"))


def _wants_openmetrics(request: web.BaseRequest) -> bool:
    accepted = ",".join(request.headers.getall("Accept", []))
    return any(part.partition(";")[0].strip().lower() == "application/openmetrics-text" for part in accepted.split(","))


async def _take_body(request: web.BaseRequest) -> None:
    """Read a body that means nothing. Raises _Refusal where it is long."""
    size = 0
    while size <= MAX_BODY and (part := await request.content.readany()):
        size += len(part)
    if size > MAX_BODY:
        raise _Refusal(413, f"a body has at most {MAX_BODY} bytes\n")


def _name(error: BaseException | None) -> str:
    """What failed and where, without its text, which may say more than the log should."""
    last = traceback.extract_tb(error.__traceback__)[-1:] if error else []
    return type(error).__name__ + (f" at {os.path.basename(last[0].filename)}:{last[0].lineno}" if last else "")


def _response(status: int, body: str | bytes, kind: str = TEXT, **headers: str) -> web.Response:
    content = body.encode() if isinstance(body, str) else body
    response = web.Response(status=status, body=content, headers={**_HEADERS, "Content-Type": kind, **headers})
    response.force_close()
    return response


def _json(status: int, page: object) -> web.Response:
    return _response(status, orjson.dumps(page) + b"\n", JSON)


class _Refusal(Exception):
    """The answer to a request that is not served."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.response = _response(status, text, **headers)


class _Connection(web.RequestHandler):
    """One connection, over within LIFETIME_S. `opened` are all there are, the oldest first."""

    def __init__(
        self, server: web.Server, opened: dict[asyncio.WriteTransport, None], log: Callable[[str], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # typed as a logger, documented as optional
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            lingering_time=LINGER_S,
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
        self._opened[transport] = None
        self._ours = transport
        self._over = asyncio.get_running_loop().call_later(LIFETIME_S, transport.abort)
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
        """What is no HTTP, or a fault of ours, which is told in one line. aiohttp's own answer shows versions."""
        if status < 500:
            return _response(status, "not a request that is served here\n")
        self._tell(f"admin: a request failed: {_name(exc)}")
        return _response(status, _OUR_FAULT + "\n")
