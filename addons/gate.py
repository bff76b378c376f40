"""The mitmproxy addon that asks the judge about every request at its headers, and answers what is not forwarded.

A denied request is answered where it stands: its body is not read and nothing upstream is looked up or dialled. What is
forwarded is what was judged, in origin form and for the host that was judged. All state is in the constructor's
arguments, so the addon also loads in stock mitmproxy.
"""

from __future__ import annotations

from collections.abc import Callable

from mitmproxy import connection, http

from addons.answers import answer
from addons.judge import Conversation, Judge, Judgement
from policies.model import Reason

JUDGEMENT = "outgate.judgement"  # flow.metadata: the judgement of this request
ANSWER = "outgate.answer"  # flow.metadata: the response is ours, and no byte of another one has gone out
MALFORMED_BODY = "malformed request body"  # how the error of a request begins whose body cannot be read
STALE = "the origin closed a kept connection"  # the error of a request that was sent on it and got no answer


class Gate:
    """Judges flows. `conversation_of` gives the state of the client connection that a flow arrived on."""

    def __init__(self, judge: Judge, conversation_of: Callable[[connection.Client], Conversation]) -> None:
        self._judge = judge
        self._conversation_of = conversation_of

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        data = flow.request.data
        judgement = self._judge.request(
            self._conversation_of(flow.client_conn),
            data.method.decode("latin-1"),
            _target(data),
            data.http_version.decode("latin-1"),
            data.headers.fields,
        )
        flow.metadata[JUDGEMENT] = judgement
        if not judgement.is_forward:
            self._answer(flow, judgement)
            return
        attempt = judgement.attempt
        data.host = attempt.host or ""
        data.path = attempt.target.encode("latin-1")
        data.authority = b""  # an origin gets the origin form
        _forward_judged_host(data.headers, data.host)
        flow.request.stream = True

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response and not flow.metadata.get(ANSWER):
            flow.response.stream = True

    def error(self, flow: http.HTTPFlow) -> None:
        judgement: Judgement | None = flow.metadata.get(JUDGEMENT)
        if judgement is None or not judgement.is_forward:
            return
        conversation = self._conversation_of(flow.client_conn)
        failure, conversation.failure = conversation.failure, None
        message = flow.error.msg if flow.error else ""
        if failure is not None:
            reason, note = failure.reason, failure.note
        elif message.startswith(MALFORMED_BODY):
            reason, note = Reason.MALFORMED_REQUEST, message
        elif not flow.client_conn.connected:
            reason, note = Reason.CLIENT_GONE, ""
        else:
            reason, note = Reason.UPSTREAM_FAILED, "its answer broke off or is malformed"
        # On a stale connection the client is told nothing: without us it would see the same close, and try again.
        if flow.response is not None or reason is Reason.CLIENT_GONE or message == STALE:
            flow.metadata[JUDGEMENT] = self._judge.break_off(judgement, reason)
            return
        flow.metadata[JUDGEMENT] = failed = self._judge.fail(judgement, reason, note)
        self._answer(flow, failed, closes=True)

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
    name, colon, port = headers["host"].partition(":")
    if name != host:
        headers["host"] = host + colon + port
