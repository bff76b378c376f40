"""Calls the operator's own addons after ours, and holds them to what was judged. No sockets.

They see what the policy allows, and may rewrite fields and bodies. Whatever of a request bears on its verdict or on
where it ends must be as before; else, or when one raises, the request fails closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mitmproxy import http
from mitmproxy.flow import Error

from addons.gate import ANSWER, FAILURE, Gate
from addons.heads import bears_on_verdict, is_well_formed
from addons.judge import Unreachable
from policies.model import Reason
from proxy.addon_files import UserAddon, line_in

HELD = "outgate.held"  # flow.metadata: the Held of a body that addons want whole
MAX_HELD = 8 << 20  # bytes of one body


class AddonFailed(Exception):
    """An addon of the operator's raised, or changed what it may not. `str()` says which, and nothing of the flow."""


class UserAddons:
    """The addons of all files, called in order.

    gate    makes the answer where a response is not to be sent
    most    bytes of bodies that wait for addons, of all requests together
    failed  told of an AddonFailed, so that a person hears of it
    """

    def __init__(self, addons: Sequence[UserAddon], gate: Gate, most: int, failed: Callable[[Exception], None]) -> None:
        self._addons = addons
        self._gate = gate
        self._failed = failed
        self._budget = Budget(most)
        self._holds_requests = any("request" in addon.hooks for addon in addons)
        self._holds_responses = any("response" in addon.hooks for addon in addons)

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        if flow.metadata.get(ANSWER):
            return
        if self._holds_requests or self._holds_responses:
            flow.metadata[HELD] = Held(self._budget)
        if self._holds_requests:
            flow.request.stream = False
        self._call("requestheaders", flow)

    def request(self, flow: http.HTTPFlow) -> None:
        if self._holds_requests:
            self._call("request", flow)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is None or flow.metadata.get(ANSWER):
            return
        if self._holds_responses:
            flow.response.stream = False
        self._call("responseheaders", flow)

    def response(self, flow: http.HTTPFlow) -> None:
        if self._holds_responses and not flow.metadata.get(ANSWER):
            self._call("response", flow)

    def _call(self, name: str, flow: http.HTTPFlow) -> None:
        for addon in self._addons:
            hook = addon.hooks.get(name)
            if hook is None:
                continue
            before, ours = _standing(flow), dict(flow.metadata)
            try:
                hook(flow)
                wrong = _changed(before, flow, is_whole=name in ("request", "response"))
            except (Exception, SystemExit) as error:
                line = line_in(addon.file, error)
                what = f"{type(error).__name__} in {name}" + (f", line {line}" if line else "")
                wrong = f"raised {what}"
            flow.metadata.update(ours)  # one that clears it would leave the request without a record
            if wrong:
                self._stop(name, flow, f"addon {addon.shown} {wrong}")
                return

    def _stop(self, name: str, flow: http.HTTPFlow, note: str) -> None:
        self._failed(AddonFailed(note))
        stop(flow, note)
        if name == "response":  # mitmproxy sends what it finds now, and asks nobody again
            flow.error = None
            self._gate.error(flow)


def stop(flow: http.HTTPFlow, note: str) -> None:
    """Have the client answered that an addon is why, and nothing more of this request carried."""
    if held := flow.metadata.get(HELD):
        held.release()
    flow.metadata[FAILURE] = Unreachable(Reason.ADDON_FAILED, note)
    flow.response = None
    flow.error = Error(Error.KILLED_MESSAGE)


class Budget:
    """Bytes that may wait for addons, of all requests together."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0


class Held:
    """What of it one request has."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._size = 0

    def grow(self, size: int) -> str:
        """So much is held now. What is wrong with that; empty: nothing."""
        if size > MAX_HELD:
            return f"a body over {MAX_HELD >> 20} MiB cannot be held for addons"
        self._budget.held += max(0, size - self._size)
        self._size = max(self._size, size)
        return "too many bodies wait for addons" if self._budget.held > self._budget.most else ""

    def release(self) -> None:
        self._budget.held -= self._size
        self._size = 0


type _Standing = dict[str, object]


def _standing(flow: http.HTTPFlow) -> _Standing:
    """What an addon must leave as it is, by the word for it; and both bodies, whose length must be said."""
    data = flow.request.data
    standing: _Standing = {
        "the method": data.method,
        "the scheme": data.scheme,
        "the host": (data.host, data.port, data.authority),
        "the target": data.path,
        "the version": data.http_version,
        "the request's framing": (flow.request.stream, *_framing(flow.request)),
        "whether there is a response": flow.response is None,
        "request": (_lengths(flow.request), data.content),
        "error": flow.error,
    }
    if response := flow.response:
        standing |= {
            "the response's framing": (response.stream, _bodiless(response.status_code), *_framing(response)),
            "response": (_lengths(response), response.data.content),
        }
    return standing


def _changed(before: _Standing, flow: http.HTTPFlow, *, is_whole: bool) -> str:
    """What an addon did that it may not; empty: nothing. `is_whole`: the body is here, and another may be given."""
    if flow.error is not before["error"]:
        return "killed it"
    after = _standing(flow)
    for what in before:
        if what not in ("request", "response", "error") and before[what] != after.get(what):
            return f"changed {what}, by which it was judged"
    messages: list[tuple[str, http.Message]] = [("request", flow.request)]
    if flow.response:
        messages.append(("response", flow.response))
        if not is_well_formed(b"reason", flow.response.data.reason):
            return "wrote a status line that is none"
    for what, message in messages:
        if not all(is_well_formed(name, value) for name, value in message.headers.fields):
            return f"wrote a field into the {what} that is none"
        if before[what] == after[what]:
            continue
        is_latest = what == ("response" if flow.response else "request")
        if not (is_whole and is_latest and _may_say(flow, message, before[what])):
            return f"changed where the {what} ends"
    return ""


def _may_say(flow: http.HTTPFlow, message: http.Message, before: object) -> bool:
    """Whether another body may stand in place of the former, and its length is said as it is."""
    assert isinstance(before, tuple)
    content = message.data.content
    if not isinstance(content, bytes):
        return False
    if isinstance(message, http.Response):
        if flow.request.method == "HEAD" or _bodiless(message.status_code):
            return False
    elif content and not before[1]:
        return False  # a GET with a body is another request
    if "transfer-encoding" in message.headers:
        return not _lengths(message)
    return _lengths(message) == (b"%d" % len(content),)


def _framing(message: http.Message) -> tuple[object, ...]:
    fields = tuple((name.lower(), value) for name, value in message.headers.fields if bears_on_verdict(name.lower()))
    return fields, message.trailers and message.trailers.fields


def _lengths(message: http.Message) -> tuple[bytes, ...]:
    return tuple(value for name, value in message.headers.fields if name.lower() == b"content-length")


def _bodiless(status: int) -> int | None:
    """RFC 9110 6.4.1: such a response has no body, and 101 begins a tunnel. None: it may have one."""
    return status if status < 200 or status in (204, 304) else None
