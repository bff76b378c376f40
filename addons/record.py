"""The mitmproxy addon that tells how each request ended: the judgement, the status, and the bytes of both bodies."""

from __future__ import annotations

from collections.abc import Callable

from mitmproxy import connection, http

from addons.gate import JUDGEMENT
from addons.judge import Conversation, Judgement
from addons.outcome import Outcome

_METER = "outgate.meter"


class Recorder:
    """Reports every flow that the gate judged, once. `conversation_of` is the gate's."""

    def __init__(
        self, report: Callable[[Outcome], None], conversation_of: Callable[[connection.Client], Conversation]
    ) -> None:
        self._report = report
        self._conversation_of = conversation_of

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        if flow.request.stream:
            meter = flow.metadata[_METER] = _Meter()
            flow.request.stream = meter.send

    def request(self, flow: http.HTTPFlow) -> None:
        """A body that was held for other addons: as the workload sent it."""
        if not flow.request.stream and (meter := flow.metadata.get(_METER)):
            meter.sent += len(flow.request.raw_content or b"")

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response and flow.response.stream and (meter := flow.metadata.get(_METER)):
            flow.response.stream = meter.receive

    def response(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    def _finish(self, flow: http.HTTPFlow) -> None:
        judgement: Judgement | None = flow.metadata.get(JUDGEMENT)
        if judgement is None:
            return
        meter: _Meter = flow.metadata.get(_METER) or _Meter()
        response = flow.response
        self._report(
            Outcome(
                judgement,
                self._conversation_of(flow.client_conn),
                started=flow.request.timestamp_start,
                upstream=flow.server_conn.peername,
                status=response.status_code if response else None,
                bytes_sent=meter.sent,
                bytes_received=meter.received + len(response.raw_content or b"" if response else b""),
            )
        )


class _Meter:
    """Counts what streams through it, and changes nothing."""

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0

    def send(self, data: bytes) -> bytes:
        self.sent += len(data)
        return data

    def receive(self, data: bytes) -> bytes:
        self.received += len(data)
        return data
