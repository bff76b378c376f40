"""What a client reads when its request is not forwarded: problem+json (RFC 9457), or a small page for a browser.

It knows sentences and bytes; what was decided, and why, comes with the judgement.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from urllib.parse import quote

from addons.judge import BAD_GATEWAY, Judgement
from policies.model import Reason

SERVED = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"  # RFC 9110 15.5.6: a 405 names what is served
CHALLENGE = b'Basic realm="outgate", charset="UTF-8"'  # RFC 7617 2.1
# As gRPC maps HTTP's statuses where there is none of its own (grpc/doc/http-grpc-status-mapping.md).
_GRPC_STATUS = {401: 16, 403: 7, 407: 16, 421: 7, 429: 14, 502: 14, 503: 14, 504: 14}
_GRPC_INTERNAL = 13
_GRPC_SAFE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # grpc/doc/PROTOCOL-HTTP2.md: the rest in percents
SHOWN = 200  # characters of a path or name that an answer repeats

_SENTENCES = {
    Reason.GUARD: "{what} is denied for every workload by the guard, {rule}",
    Reason.DENY_RULE: "{what} is denied by {rule}",
    Reason.NO_RULE: "no rule of workload {workload} names {host}",
    Reason.PORT: "{rule} names {host}, but not its port {port}",
    Reason.NO_ALLOW_ENTRY: "{rule} lists what is allowed on {host}, and {method} {path} is not listed",
    Reason.EXPIRED: "{rule} is past its until date, so it allows nothing any more",
    Reason.UPGRADE: "{rule} does not admit Upgrade: {upgrade}",
    Reason.UNKNOWN_WORKLOAD: "the policy has no workload {workload}",
    Reason.AMBIGUOUS_WORKLOAD: "who you are is in doubt: two pods claim your address, or two workloads match your pod",
    Reason.STALE_WORKLOAD: "who you are is not known: the cluster has not told which pod has your address; try again",
    Reason.CREDENTIALS: "this proxy asks who you are: a name and password, or the token of the pod at your address",
    Reason.WRONG_PROTOCOL: "{rule} expects the other protocol on port {port}: TLS or plain HTTP",
    Reason.HOST_MISMATCH: "this connection was opened for {opened_for}; a request for {host} needs one of its own",
    Reason.MALFORMED_NAME: "the host asked for is no hostname: {note}",
    Reason.MALFORMED_PATH: "two servers may read this path differently, so it is refused: {note}",
    Reason.MALFORMED_REQUEST: "the request is malformed, so it is not judged: {note}",
    Reason.HELLO_TIMEOUT: "the request did not arrive in time: {note}",
    Reason.NEVER_REACHED: "{host} is {note}, which no rule can admit",
    Reason.PRIVATE_ADDRESS: "{host} is {note}, a private address; `private: true` in {rule} would admit it",
    Reason.NAME_NOT_FOUND: "{host} cannot be reached: {note}",
    Reason.RESOLVER_FAILED: "{host} could not be looked up: {note}",
    Reason.UPSTREAM_REFUSED: "{host} refused the connection: {note}",
    Reason.UPSTREAM_TIMEOUT: "{host} did not answer in time: {note}",
    Reason.UPSTREAM_CERTIFICATE: "the certificate of {host} does not verify: {note}",
    Reason.UPSTREAM_FAILED: "{host} answered in a way that cannot be passed on: {note}",
    Reason.TOO_MANY_CONNECTIONS: "too much is under way: {note}",
    Reason.OVERLOADED: "more waits in the gate than it may hold, and more than a fair part of it is yours: try again",
    Reason.TOO_SLOW: "the request took longer than it may: {note}",
    Reason.HTTP2_FLOOD: "this connection sent more HTTP/2 resets, settings or pings than any client needs",
    Reason.LOG_FAILED: "decision records cannot be written, and this gate lets nothing through unrecorded",
    Reason.ADDON_FAILED: "an addon of this gate's operator failed, so nothing was let through: {note}",
    Reason.GATE_FAILED: "a part of the gate failed, so nothing was let through: {note}",
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:42rem;margin:12vh auto;padding:0 1rem}}
body{{color:#222;background:#fff}}
h1{{font-size:1.4rem}}dt{{color:#666}}dd{{margin:0 0 .6rem}}code{{word-break:break-all}}
@media(prefers-color-scheme:dark){{body{{color:#ddd;background:#181818}}dt{{color:#999}}}}</style></head>
<body><h1>{title}</h1><p>{detail}.</p>
<dl><dt>Workload</dt><dd>{workload}</dd><dt>Rule</dt><dd>{rule}</dd><dt>Reason</dt><dd>{reason}</dd>
<dt>Decision</dt><dd><code>{id}</code></dd></dl>
</body></html>
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response. A HEAD request gets the head alone, with the length its GET would have."""

    status: int
    phrase: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def to_bytes(self) -> bytes:
        head = b"".join(b"%s: %s\r\n" % header for header in self.headers)
        return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (self.status, self.phrase.encode("ascii"), head, self.body)


def answer(judgement: Judgement, *, closes: bool = False) -> Answer:
    """The answer to a request that is not forwarded. `closes`: the connection ends with it in any case."""
    if judgement.grpc:
        return _answer_grpc(judgement)
    status = judgement.status or BAD_GATEWAY
    reason = judgement.verdict.reason
    problem: dict[str, object] = {
        "type": f"urn:outgate:{reason}",
        "title": "Not reached" if status == BAD_GATEWAY else "Denied by policy",
        "status": status,
        "detail": describe(judgement),
        "workload": judgement.attempt.workload,
        "rule": str(judgement.verdict.rule) if judgement.verdict.rule else None,
        "reason": reason.value,
        "id": judgement.id,
    }
    body = _render_page(problem) if judgement.page else json.dumps(problem, indent=2).encode() + b"\n"
    headers = [
        (b"Content-Type", b"text/html; charset=utf-8" if judgement.page else b"application/problem+json"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Cache-Control", b"no-store"),
        _decision(judgement),
    ]
    if judgement.page:  # the page repeats what was asked for: escaped, and nothing on it may run or load
        headers.append((b"Content-Security-Policy", b"default-src 'none'; style-src 'unsafe-inline'"))
        headers.append((b"X-Content-Type-Options", b"nosniff"))
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append((b"Allow", SERVED.encode()))
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:  # RFC 9110 11.7.1
        headers.append((b"Proxy-Authenticate", CHALLENGE))
    if closes or judgement.closes:
        headers.append((b"Connection", b"close"))
    is_head = judgement.attempt.method == "HEAD"
    return Answer(status, HTTPStatus(status).phrase, tuple(headers), b"" if is_head else body)


def _answer_grpc(judgement: Judgement) -> Answer:
    """Headers alone that are trailers too: a gRPC client shows their status, and of any other only its number."""
    headers = (
        (b"Content-Type", b"application/grpc"),
        (b"Grpc-Status", b"%d" % _GRPC_STATUS.get(judgement.status or BAD_GATEWAY, _GRPC_INTERNAL)),
        (b"Grpc-Message", quote(describe(judgement), safe=_GRPC_SAFE).encode("ascii")),
        _decision(judgement),
    )
    return Answer(200, "OK", headers, b"")


def _decision(judgement: Judgement) -> tuple[bytes, bytes]:
    return b"Outgate-Decision", f"deny; reason={judgement.verdict.reason}; id={judgement.id}".encode("ascii")


def describe(judgement: Judgement) -> str:
    """Why, in one sentence that names the rule's file and line, without a full stop."""
    attempt, verdict = judgement.attempt, judgement.verdict
    sentence = _SENTENCES.get(verdict.reason, "the gate denied it ({reason})")
    path = _shown(attempt.target.partition("?")[0])  # a query may hold a secret
    return sentence.format(
        what=f"{attempt.method} {path} on {attempt.host}",
        method=_shown(attempt.method),
        path=path,
        host=attempt.host or "the destination",
        port=attempt.port,
        opened_for=attempt.opened_for,
        workload=attempt.workload,
        rule=verdict.rule or "the policy",
        upgrade=_shown(attempt.upgrade or ""),
        note=judgement.note or "no more is known",
        reason=verdict.reason,
    )


def _render_page(problem: dict[str, object]) -> bytes:
    fields = {name: escape(str(value if value is not None else "none")) for name, value in problem.items()}
    return _PAGE.format(**fields).encode()


def _shown(text: str) -> str:
    """In ASCII and short: what a client sends must not grow our answer or draw on a terminal."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= SHOWN else plain[: SHOWN - 3] + "..."
