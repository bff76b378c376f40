"""The mitmproxy addon that asks the judge about every request at its headers, and answers what is not forwarded.

A denied request is answered where it stands: its body is not read and nothing upstream is looked up or dialled. What is
forwarded is what was judged, in origin form and for the host that was judged. All state is in the constructor's
arguments, so the addon also loads in stock mitmproxy.
"""

from __future__ import annotations

from collections.abc import Callable

from mitmproxy import connection, http

from addons.answers import answer
from addons.judge import PROXY_AUTHENTICATION, Conversation, Judge, Judgement, Unreachable
from addons.upstream import SiteProxy
from policies.model import Reason

JUDGEMENT = "outgate.judgement"  # flow.metadata: the judgement of this request
ANSWER = "outgate.answer"  # flow.metadata: the response is ours, and no byte of another one has gone out
MALFORMED_BODY = "malformed request body"  # how the error of a request begins whose body cannot be read
STALE = "the origin closed a kept connection"  # the error of a request that was sent on it and got no answer
CANCELLED = "the client cancelled the request"
FAILURE = "outgate.failure"  # flow.metadata: the Unreachable that kept this request from its origin
_FOR_PROXIES = ("proxy-authorization", "proxy-connection")


class Gate:
    """Judges flows. `conversation_of` gives the state of the client connection that a flow arrived on.

    site  the site's own proxy, to which `Upstream` connects for the plain requests that it carries
    """

    def __init__(
        self,
        judge: Judge,
        conversation_of: Callable[[connection.Client], Conversation],
        *,
        site: SiteProxy | None = None,
    ) -> None:
        self._judge = judge
        self._conversation_of = conversation_of
        self._site = site

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        data, is_http2 = flow.request.data, flow.request.is_http2
        judgement = self._judge.request(
            self._conversation_of(flow.client_conn),
            data.method.decode("latin-1"),
            data.path.decode("latin-1") if is_http2 else _target(data),
            data.http_version.decode("latin-1"),
            data.headers.fields,
            authority=data.authority.decode("latin-1") if is_http2 else None,
        )
        flow.metadata[JUDGEMENT] = judgement
        if not judgement.is_forward:
            self._answer(flow, judgement)
            return
        attempt = judgement.attempt
        data.host, data.port = attempt.host or "", attempt.port
        data.path = attempt.target.encode("latin-1")
        for name in _FOR_PROXIES:
            data.headers.pop(name, None)
        if is_http2:
            given = data.authority or data.headers.pop("host", "").encode("latin-1")
            data.authority = _judged(given.decode("latin-1"), data.host).encode("ascii")
            data.headers.pop("host", None)
        else:
            data.authority = b""  # an origin gets the origin form
            _forward_judged_host(data.headers, data.host)
        flow.request.stream = True
        if site := self._site_for(judgement):
            self._address_to(site, flow, judgement)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is None or flow.metadata.get(ANSWER):
            return
        flow.response.stream = True
        judgement: Judgement | None = flow.metadata.get(JUDGEMENT)
        if flow.response.status_code == PROXY_AUTHENTICATION and judgement and self._site_for(judgement):
            # Not the workload's to answer: it would give its own credentials away.
            note = "the site's proxy answered 407: it wants credentials, or other ones"
            flow.metadata[FAILURE] = Unreachable(Reason.UPSTREAM_REFUSED, note)
            flow.response = None
            flow.kill()  # type: ignore[no-untyped-call]  # theirs

    def error(self, flow: http.HTTPFlow) -> None:
        judgement: Judgement | None = flow.metadata.get(JUDGEMENT)
        if judgement is None or not judgement.is_forward:
            return
        conversation = self._conversation_of(flow.client_conn)
        failure = flow.metadata.pop(FAILURE, None) or conversation.failure
        conversation.failure = None
        message = flow.error.msg if flow.error else ""
        if failure is not None:
            reason, note = failure.reason, failure.note
        elif message.startswith(MALFORMED_BODY):
            reason, note = Reason.MALFORMED_REQUEST, message
        elif message == CANCELLED or not flow.client_conn.connected:
            reason, note = Reason.CLIENT_GONE, ""
        else:
            reason, note = Reason.UPSTREAM_FAILED, "its answer broke off or is malformed"
        # On a stale connection the client is told nothing: without us it would see the same close, and try again.
        if flow.response is not None or reason is Reason.CLIENT_GONE or message == STALE:
            flow.metadata[JUDGEMENT] = self._judge.break_off(judgement, reason)
            return
        flow.metadata[JUDGEMENT] = failed = self._judge.fail(judgement, reason, note)
        self._answer(flow, failed, closes=True)

    def _site_for(self, judgement: Judgement) -> SiteProxy | None:
        """The site's proxy, where it is sent this request as it is: TLS goes through a tunnel instead."""
        attempt, site = judgement.attempt, self._site
        return site if site and attempt.plain and attempt.host and site.carries(attempt.host) else None

    def _address_to(self, site: SiteProxy, flow: http.HTTPFlow, judgement: Judgement) -> None:
        """A proxy is told the whole URL (RFC 9112 3.2.2) and who we are, never who the workload says it is."""
        attempt, data = judgement.attempt, flow.request.data
        data.scheme = b"http"
        data.authority = f"{attempt.host}{'' if attempt.port == 80 else f':{attempt.port}'}".encode()
        try:
            authorization = site.authorization()
        except Unreachable as failure:
            flow.metadata[JUDGEMENT] = failed = self._judge.fail(judgement, failure.reason, failure.note)
            self._answer(flow, failed)
            return
        if authorization:
            data.headers["Proxy-Authorization"] = authorization

    def _answer(self, flow: http.HTTPFlow, judgement: Judgement, *, closes: bool = False) -> None:
        made = answer(judgement, closes=closes)
        flow.response = http.Response(
            http_version=b"HTTP/1.1",
            status_code=made.status,
            reason=made.phrase.encode("ascii"),
            headers=http.Headers(made.headers),
            content=made.body,
            trailers=None,
            timestamp_start=flow.request.timestamp_start,
            timestamp_end=flow.request.timestamp_start,
        )
        flow.metadata[ANSWER] = True


def _target(data: http.RequestData) -> str:
    """The request target as received, whichever form it had."""
    path = data.path.decode("latin-1")
    if not data.authority:
        return path
    authority = data.authority.decode("latin-1")
    return f"{data.scheme.decode('latin-1')}://{authority}{path}" if data.scheme else authority


def _forward_judged_host(headers: http.Headers, host: str) -> None:
    """`Host: A.Example.` was judged as a.example, so the origin is asked for a.example."""
    given = headers["host"]
    if (judged := _judged(given, host)) != given:
        headers["host"] = judged


def _judged(authority: str, host: str) -> str:
    _, colon, port = authority.partition(":")
    return host + colon + port
