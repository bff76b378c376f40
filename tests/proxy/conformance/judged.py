"""Rows that the judge decides: Host, method, target, upgrade, overrides, policy. Both hosts agree in every one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.proxy.conformance.framing import LINE, POST
from tests.proxy.conformance.rows import (
    HOST,
    LISTED,
    SLASHES,
    SOCKETS,
    Answered,
    Forwarded,
    Kind,
    Outcome,
    Row,
    octets,
    passes,
    refused,
)

VECTORS: list[dict[str, Any]] = yaml.safe_load(  # Any: rows of the vector file
    (Path(__file__).parents[2] / "vectors" / "paths.yaml").read_text("utf-8")
)
JUDGE = Kind.JUDGE


def judge_rows() -> Iterator[Row]:
    yield from _methods()
    yield from _hosts()
    yield from _targets()
    yield from _upgrades()
    yield from _overrides()
    yield from _policy()
    yield from _sequences()
    yield from _vectors()


def _get(target: str = "/x", host: str = HOST, method: str = "GET", fields: str = "") -> str:
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"


def _methods() -> Iterator[Row]:
    for method in ("get", "Get", "gET", "post"):
        yield refused(f"method-{method}", _get(method=method), kind=JUDGE)
    yield refused("trace", _get(method="TRACE"), 405, kind=JUDGE)
    yield refused("trace-with-a-body", _get(method="TRACE", fields="Content-Length: 2\r\n") + "ab", 405, kind=JUDGE)
    yield refused("connect", _get(f"{HOST}:443", f"{HOST}:443", "CONNECT"), 405, kind=JUDGE)
    yield refused("connect-elsewhere", _get("evil.test:22", method="CONNECT"), 405, kind=JUDGE)
    yield refused("connect-to-a-path", _get(method="CONNECT"), 405, kind=JUDGE)
    for method in ("HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "M-SEARCH", "BREW"):
        yield passes(f"method-{method.lower()}-is-carried", _get(method=method), kind=JUDGE)
    for method in ("TRACK", "DEBUG"):
        yield passes(f"method-{method.lower()}-is-the-policy's-matter", _get(method=method), kind=JUDGE)


def _hosts() -> Iterator[Row]:
    bare = "GET /x HTTP/1.1\r\n"
    yield refused("no-host", bare + "\r\n", kind=JUDGE)
    yield refused("two-hosts", LINE + "Host: evil.test\r\n\r\n", kind=JUDGE)
    yield refused("two-hosts-the-other-way", bare + f"Host: evil.test\r\nHost: {HOST}\r\n\r\n", kind=JUDGE)
    yield refused("two-equal-hosts", LINE + f"Host: {HOST}\r\n\r\n", kind=JUDGE)
    yield refused("two-hosts-in-two-cases", LINE + "hOST: evil.test\r\n\r\n", kind=JUDGE)
    malformed = {
        "empty": "", "with-a-user": f"a@{HOST}", "with-another-host-as-user": f"{HOST}@evil.test",
        "with-a-path": f"{HOST}/x", "with-a-fragment": f"{HOST}#.evil.test", "with-a-query": f"{HOST}?.evil.test",
        "with-a-space": f"{HOST} evil.test", "with-a-tab": f"{HOST}\tevil.test",
        "with-a-backslash": f"{HOST}\\.evil.test", "with-a-scheme": f"https://{HOST}", "with-an-empty-port": f"{HOST}:",
        "with-two-ports": f"{HOST}:443:80", "with-a-signed-port": f"{HOST}:+443",
        "with-a-zero-before-its-port": f"{HOST}:0443",
        "with-port-zero": f"{HOST}:0", "with-a-port-of-letters": f"{HOST}:https",
        "with-a-port-of-six-digits": f"{HOST}:000443",
    }  # fmt: skip
    for id, host in malformed.items():
        yield refused(f"host-{id}", _get(host=host), kind=JUDGE)
    not_names = {
        "that-ends-in-two-dots": f"{HOST}..", "that-begins-with-a-dot": f".{HOST}",
        "with-an-empty-label": "weather..test",
        "that-is-an-address": "127.0.0.1", "that-is-an-address-and-port": "127.0.0.1:443",
        "that-is-a-number": "2130706433",
        "that-is-an-ipv6-address": "[::1]", "that-is-an-ipv6-address-and-port": "[::1]:443",
        "with-a-long-label": "a" * 64 + ".test",
        "with-a-percent": f"%77{HOST[1:]}", "with-a-star": "*.test", "beyond-ascii": "w\xe9ather.test",
        "in-utf8": "w\xc3\xa9ather.test",
        "with-a-comma": f"{HOST},evil.test", "with-a-semicolon": f"{HOST};evil.test", "in-quotes": f'"{HOST}"',
        "in-hexadecimal": "0x7f.1",
    }  # fmt: skip
    for id, host in not_names.items():
        yield refused(f"host-{id}", _get(host=host), reason="malformed_name", kind=JUDGE)
    elsewhere = {
        "another": "evil.test", "another-that-is-allowed": LISTED, "below": f"a.{HOST}", "above": "test",
        "that-begins-the-same": f"{HOST}.evil.test", "that-ends-the-same": f"not{HOST}",
        "with-an-underscore": "weather_.test",
        "in-punycode": "xn--wather-bva.test", "with-another-port": f"{HOST}:444", "with-the-plain-port": f"{HOST}:80",
    }  # fmt: skip
    for id, host in elsewhere.items():
        yield refused(f"host-{id}", _get(host=host), 421, "host_mismatch", kind=JUDGE)
    same = {
        "in-capitals": ("WEATHER.TEST", HOST), "with-a-dot": (f"{HOST}.", HOST), "with-the-port": (f"{HOST}:443",
        f"{HOST}:443"),
        "with-all-of-it": ("Weather.Test.:443", f"{HOST}:443"),
    }  # fmt: skip
    for id, (sent, judged) in same.items():
        yield passes(f"host-{id}", _get(host=sent), _get(host=judged), kind=JUDGE)


def _targets() -> Iterator[Row]:
    """RFC 9112 3.2."""
    elsewhere = {
        "elsewhere": "https://evil.test/x", "without-tls": f"http://{HOST}/x", "of-another-scheme": f"ftp://{HOST}/x",
        "with-a-user": f"https://evil.test@{HOST}/x", "with-a-user-that-is-us": f"https://{HOST}@evil.test/x",
        "with-a-backslash": f"https://{HOST}\\@evil.test/x", "without-a-host": "https:///x", "to-an-address": "https://127.0.0.1/x",
    }  # fmt: skip
    for id, target in elsewhere.items():
        reason = "malformed_name" if id == "to-an-address" else "malformed_request"
        yield refused(f"absolute-form-{id}", _get(target), reason=reason, kind=JUDGE)
    other_port = _get(f"https://{HOST}:444/x")
    yield refused("absolute-form-with-another-port", other_port, kind=JUDGE)
    both = _get(f"https://{HOST}/x", host="evil.test")
    yield refused("absolute-form-and-another-host", both, kind=JUDGE)
    yield refused("absolute-form-and-no-host", f"GET https://{HOST}/x HTTP/1.1\r\n\r\n", kind=JUDGE)
    yield refused("absolute-form-with-dots", _get(f"https://{HOST}/a/../denied"), reason="malformed_path", kind=JUDGE)
    yield refused("absolute-form-denied", _get(f"https://{HOST}/denied/x"), 403, "deny_rule", kind=JUDGE)
    yield passes("absolute-form", _get(f"https://{HOST}/x?q=1"), _get("/x?q=1"), kind=JUDGE)
    yield passes("absolute-form-with-the-port", _get(f"https://{HOST}:443/x"), _get("/x"), kind=JUDGE)
    yield passes("absolute-form-in-capitals", _get("HTTPS://WEATHER.test/x"), _get("/x"), kind=JUDGE)
    yield passes("absolute-form-without-a-path", _get(f"https://{HOST}"), _get("/"), kind=JUDGE)
    yield refused("target-is-asterisk", _get("*"), reason="malformed_path", kind=JUDGE)
    for id, target in {
        "authority-form": f"{HOST}:443", "a-name-alone": HOST, "a-word": "x", "a-query-alone": "?x",
        "a-fragment-alone": "#x", "a-scheme-alone": "https:", "javascript": "javascript:alert(1)",
    }.items():  # fmt: skip
        yield refused(f"target-is-{id}", _get(target), reason="malformed_path", kind=JUDGE)
    yield refused("options-asterisk", _get("*", method="OPTIONS"), reason="malformed_path", kind=JUDGE)


def _upgrades() -> Iterator[Row]:
    socket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"
    h2c = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    denied = [
        ("h2c", HOST, h2c),
        ("h2c-where-websockets-are-admitted", SOCKETS, h2c),
        ("websocket-without-a-rule", HOST, socket),
        ("h2c-beside-websocket", SOCKETS, socket.replace("Upgrade: websocket", "Upgrade: websocket, h2c")),
        ("h2c-in-a-second-field", SOCKETS, socket + "Upgrade: h2c\r\n"),
        ("tls", HOST, "Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n"),
        ("an-unknown-protocol", SOCKETS, "Connection: Upgrade\r\nUpgrade: x\r\n"),
        ("h2c-in-capitals", HOST, h2c.replace("h2c", "H2C")),
    ]
    for id, host, fields in denied:
        yield refused(f"upgrade-to-{id}", _get(host=host, fields=fields), 403, "upgrade", kind=JUDGE, sni=host)
    yield passes("upgrade-to-websocket", _get(host=SOCKETS, fields=socket), kind=JUDGE, sni=SOCKETS, status=101)


def _overrides() -> Iterator[Row]:
    """Some origins serve what such a header says instead of the request line, so both are judged."""
    secret = f"GET /search/x HTTP/1.1\r\nHost: {LISTED}\r\n"
    for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "x_http_method_override"):
        yield refused(
            f"override-{name.lower()}",
            secret + f"{name}: DELETE\r\n\r\n",
            403,
            "no_allow_entry",
            kind=JUDGE,
            sni=LISTED,
        )
    for name in ("X-Original-URL", "X-Rewrite-URL", "X_Original_Url"):
        yield refused(f"override-{name.lower()}", LINE + f"{name}: /denied/x\r\n\r\n", 403, "deny_rule", kind=JUDGE)
    yield refused("override-twice", LINE + "X-Original-URL: /a\r\nX-Original-URL: /b\r\n\r\n", kind=JUDGE)
    yield refused("override-by-two-names", LINE + "X-Original-URL: /a\r\nX-Rewrite-URL: /b\r\n\r\n", kind=JUDGE)
    yield refused("override-to-a-trick", LINE + "X-Original-URL: /a/../b\r\n\r\n", reason="malformed_path", kind=JUDGE)
    yield passes("override-to-what-is-allowed", LINE + "X-Original-URL: /y\r\n\r\n", kind=JUDGE)


def _policy() -> Iterator[Row]:
    def ask(id: str, target: str, status: int, reason: str, method: str = "GET") -> Row:
        sent = _get(target, LISTED, method)
        if reason == "rule":
            return passes(f"policy-{id}", sent, kind=JUDGE, sni=LISTED)
        return refused(f"policy-{id}", sent, status, reason, kind=JUDGE, sni=LISTED)

    yield ask("listed", "/search", 200, "rule")
    yield ask("listed-below", "/search/a/b?c=d", 200, "rule")
    yield ask("listed-method", "/search", 200, "rule", "POST")
    yield ask("one-segment", "/one/a", 200, "rule")
    yield ask("another-method", "/search", 403, "no_allow_entry", "DELETE")
    yield ask("get-does-not-imply-head", "/search", 403, "no_allow_entry", "HEAD")
    yield ask("another-path", "/forecasts", 403, "no_allow_entry")
    yield ask("two-segments", "/one/a/b", 403, "no_allow_entry")
    yield ask("another-case", "/Search", 403, "no_allow_entry")
    yield ask("denied", "/search/secret/x", 403, "deny_rule")
    yield ask("denied-in-another-case", "/search/SECRET/x", 403, "deny_rule")
    yield ask("denied-with-parameters", "/search/secret;a=b/x", 403, "deny_rule")
    yield ask("denied-encoded", "/search/%73ecret/x", 403, "deny_rule")
    yield ask("denied-by-a-longer-way", "/search/a/../secret", 400, "malformed_path")
    body = f"PUT /forecasts HTTP/1.1\r\nHost: {LISTED}\r\nContent-Length: 40\r\n\r\n"
    yield refused(
        "policy-denied-with-a-body", body + _get(), 403, "no_allow_entry", kind=JUDGE, sni=LISTED, closes=True
    )
    chunks = f"PUT /forecasts HTTP/1.1\r\nHost: {LISTED}\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield refused(
        "policy-denied-with-chunks", chunks + "0\r\n\r\n", 403, "no_allow_entry", kind=JUDGE, sni=LISTED, closes=True
    )


def _sequences() -> Iterator[Row]:
    """Several requests at once: each is judged, in order, and what a refusal leaves unread is never a request."""

    def row(id: str, parts: list[tuple[str, int, str]], *, closes: bool | None = None, behind: str = "") -> Row:
        answers = tuple(Answered(status, reason) for _, status, reason in parts)
        reached = []
        for sent, _, reason in parts:
            if reason == "rule":
                head, empty, body = sent.partition("\r\n\r\n")
                reached.append(Forwarded(octets(head + empty), octets(body)))
        everything = octets("".join(sent for sent, _, _ in parts) + behind)
        return Row(id, JUDGE, everything, Outcome(answers, tuple(reached)), closes=closes)

    allowed, denied = (_get(), 200, "rule"), (_get("/denied"), 403, "deny_rule")
    misdirected = (_get(host="evil.test"), 421, "host_mismatch")
    malformed = (LINE + "X\r\n\r\n", 400, "malformed_request")
    upload = (POST + "Content-Length: 2\r\n\r\nab", 200, "rule")
    yield row("denied-behind-an-allowed-one", [allowed, denied])
    yield row("allowed-behind-a-denied-one", [denied, allowed])
    yield row("elsewhere-behind-an-allowed-one", [allowed, misdirected])
    yield row("allowed-behind-one-for-elsewhere", [misdirected, allowed])
    yield row("denied-behind-a-body", [upload, denied])
    yield row("malformed-behind-an-allowed-one", [allowed, malformed], closes=True)
    yield row("anything-behind-a-malformed-one", [malformed], closes=True, behind=_get())
    yield row("ten-at-once", [allowed, upload] * 5)
    denied_upload = (POST.replace("/x", "/denied") + "Content-Length: 99\r\n\r\n", 403, "deny_rule")
    yield row("a-denied-body-is-no-request", [denied_upload], closes=True, behind=_get())


def _vectors() -> Iterator[Row]:
    """Every target of tests/vectors/paths.yaml."""
    for vector in VECTORS:
        host = SLASHES if vector.get("encoded_slash") else HOST
        target = octets(vector["target"]).decode("latin-1")
        sent = _get(target, host)
        if vector["verdict"] == "ok":
            yield passes(f"path-{vector['id']}", sent, kind=JUDGE, sni=host)
            continue
        no_line = not target or any(octet in target for octet in " \t\r\n\0\x7f")  # not even a request line
        if no_line:
            yield refused(f"path-{vector['id']}", sent, sni=host)
        elif vector["id"] == "absolute-form":
            yield refused("path-absolute-form", sent, kind=JUDGE)
        else:
            yield refused(f"path-{vector['id']}", sent, reason="malformed_path", kind=JUDGE, sni=host)
