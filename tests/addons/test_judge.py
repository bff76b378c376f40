"""The HTTP verdict: what a head must be to be judged, and what each denial is answered with."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count

import pytest

from addons.judge import Conversation, Judge, Judgement
from policies.engine import decide
from policies.hostnames import Hostname
from policies.index import Policy, build
from policies.model import Action, Mode, Reason
from tests.builders import WORKLOAD, rules

POLICY = rules("""
    - host: api.example.com
      ports: [80, 443, 8443]
      tls: inspect
      allow: ["GET,HEAD,POST /search/**", "GET /chat"]
      deny: ["* /search/secret"]
      upgrade: [websocket]
    - host: other.example.com
      ports: [80, 443]
      tls: inspect
      encodedSlash: literal
""")

HOST = (b"Host", b"api.example.com")
type Fields = list[tuple[bytes, bytes]]


def judge(policy: Policy = POLICY) -> Judge:
    ids = count(1)
    return Judge(partial(decide, policy), now=lambda: 1_700_000_000.0, new_id=lambda: f"id{next(ids)}")


def conversation(*, port: int = 443, plain: bool = False, opened_for: str | None = "api.example.com") -> Conversation:
    name = Hostname(opened_for) if opened_for and not plain else None
    return Conversation(WORKLOAD, port, plain, ("10.0.0.1", 5000), name)


def ask(
    method: str = "GET",
    target: str = "/search",
    version: str = "HTTP/1.1",
    fields: Fields | None = None,
    more: Fields | None = None,
    to: Conversation | None = None,
    authority: str | None = None,
) -> Judgement:
    given = ([HOST] if fields is None else fields) + (more or [])
    return judge().request(to or conversation(), method, target, version, given, authority=authority)


def ask2(
    method: str = "GET", target: str = "/search", authority: str | None = "api.example.com", more: Fields | None = None
) -> Judgement:
    """The same over HTTP/2."""
    return ask(method, target, "HTTP/2.0", [], more, authority=authority)


def ask_proxy(target: str, host: bytes = b"api.example.com", more: Fields | None = None) -> Judgement:
    """The same as to an explicit proxy."""
    to = conversation(port=80, plain=True)
    to.proxied = True
    return ask("GET", target, fields=[(b"Host", host)], more=more, to=to)


def test_an_allowed_request_is_forwarded() -> None:
    judgement = ask()
    assert (judgement.verdict.action, judgement.is_forward, judgement.status) == (Action.ALLOW, True, None)


def test_overrides_that_are_allowed_themselves_are_forwarded() -> None:
    """Long queries are sent as POST with an override; what counts is that either reading is admitted."""
    judgement = ask("POST", more=[(b"X-HTTP-Method-Override", b"GET"), (b"X-Original-URL", b"/search/a")])
    assert (judgement.is_forward, judgement.attempt.method, judgement.attempt.target) == (True, "POST", "/search")


def test_audit_lets_an_override_pass_and_says_so() -> None:
    policy = build(
        {name: replace(one, mode=Mode.AUDIT) for name, one in POLICY.workloads.items()}, POLICY.guard, POLICY.tests
    )
    fields = [HOST, (b"X-HTTP-Method", b"DELETE"), (b"X-Original-URL", b"/search/a")]
    judgement = judge(policy).request(conversation(), "POST", "/search", "HTTP/1.1", fields)
    assert (judgement.is_forward, judgement.attempt.target) == (True, "/search")
    assert judgement.verdict.would_be
    assert judgement.verdict.would_be.reason is Reason.NO_ALLOW_ENTRY


def test_a_denied_override_is_told_as_what_it_says() -> None:
    attempt = ask("POST", more=[(b"X-HTTP-Method-Override", b"DELETE")]).attempt
    assert (attempt.method, attempt.target) == ("DELETE", "/search")


def test_the_attempt_says_what_was_asked() -> None:
    attempt = ask("POST", "/search?q=a", to=conversation(port=8443)).attempt
    assert (attempt.method, attempt.target, attempt.host, attempt.port) == (
        "POST",
        "/search?q=a",
        HOST[1].decode(),
        8443,
    )
    assert (attempt.workload, attempt.plain, attempt.time) == (WORKLOAD, False, 1_700_000_000.0)


DENIED = [
    ("no-allow-entry", ask("GET", "/forecasts"), Reason.NO_ALLOW_ENTRY, 403),
    ("deny-entry", ask("GET", "/search/secret"), Reason.DENY_RULE, 403),
    ("method", ask("DELETE"), Reason.NO_ALLOW_ENTRY, 403),
    ("malformed-path", ask("GET", "/search/../x"), Reason.MALFORMED_PATH, 400),
    ("lower-case-method", ask("get"), Reason.MALFORMED_REQUEST, 400),
    ("method-not-a-token", ask("GE T"), Reason.MALFORMED_REQUEST, 400),
    ("connect", ask("CONNECT", "api.example.com:443"), Reason.MALFORMED_REQUEST, 405),
    ("trace", ask("TRACE"), Reason.MALFORMED_REQUEST, 405),
    ("asterisk-form", ask("OPTIONS", "*"), Reason.MALFORMED_PATH, 400),
    ("http-3-in-text", ask(version="HTTP/3.0"), Reason.MALFORMED_REQUEST, 505),
    ("http-0.9", ask(version="HTTP/0.9"), Reason.MALFORMED_REQUEST, 505),
    ("target-too-long", ask(target="/search/" + "a" * 16_384), Reason.MALFORMED_REQUEST, 414),
    ("query-too-long", ask(target="/search?" + "a" * 16_384), Reason.MALFORMED_REQUEST, 414),
    ("too-many-fields", ask(more=[(b"X", b"a")] * 100), Reason.MALFORMED_REQUEST, 431),
    ("too-many-fields-beside-crumbs", ask2(more=[(b"cookie", b"a=b"), *[(b"x", b"a")] * 101]),
     Reason.MALFORMED_REQUEST, 431),
    ("unknown-expectation", ask("POST", more=[(b"Expect", b"200-ok")]), Reason.MALFORMED_REQUEST, 417),
    ("two-expectations", ask("POST", more=[(b"Expect", b"100-continue"), (b"expect", b"x")]),
     Reason.MALFORMED_REQUEST, 417),
    ("empty-expectation", ask("POST", more=[(b"Expect", b"")]), Reason.MALFORMED_REQUEST, 417),
    ("http2-unknown-expectation", ask2("POST", more=[(b"expect", b"x")]), Reason.MALFORMED_REQUEST, 417),
    ("length-as-cgi-reads-it", ask("POST", more=[(b"Content_Length", b"5")]), Reason.MALFORMED_REQUEST, 400),
    ("coding-as-cgi-reads-it", ask("POST", more=[(b"Transfer_Encoding", b"chunked")]), Reason.MALFORMED_REQUEST, 400),
    ("http2-length-as-cgi-reads-it", ask2("POST", more=[(b"content_length", b"5")]), Reason.MALFORMED_REQUEST, 400),
    ("no-host", ask(fields=[(b"Accept", b"*/*")]), Reason.MALFORMED_REQUEST, 400),
    ("no-host-in-1.0", ask(version="HTTP/1.0", fields=[(b"Accept", b"*/*")]), Reason.MALFORMED_REQUEST, 400),
    ("two-hosts", ask(more=[HOST]), Reason.MALFORMED_REQUEST, 400),
    ("two-hosts-in-two-cases", ask(more=[(b"hOST", b"other.example.com")]), Reason.MALFORMED_REQUEST, 400),
    ("empty-host", ask(fields=[(b"Host", b"")]), Reason.MALFORMED_REQUEST, 400),
    ("user-in-host", ask(fields=[(b"Host", b"x@api.example.com")]), Reason.MALFORMED_REQUEST, 400),
    ("path-in-host", ask(fields=[(b"Host", b"api.example.com/x")]), Reason.MALFORMED_REQUEST, 400),
    ("space-in-host", ask(fields=[(b"Host", b"api.example.com x")]), Reason.MALFORMED_REQUEST, 400),
    ("list-in-host", ask(fields=[(b"Host", b"api.example.com,x.test")]), Reason.MALFORMED_NAME, 400),
    ("other-port-in-host", ask(fields=[(b"Host", b"api.example.com:80")]), Reason.HOST_MISMATCH, 421),
    ("octal-port-in-host", ask(fields=[(b"Host", b"api.example.com:0443")]), Reason.MALFORMED_REQUEST, 400),
    ("empty-port-in-host", ask(fields=[(b"Host", b"api.example.com:")]), Reason.MALFORMED_REQUEST, 400),
    ("address-as-host", ask(fields=[(b"Host", b"10.0.0.1")]), Reason.MALFORMED_NAME, 400),
    ("v6-as-host", ask(fields=[(b"Host", b"[::1]")]), Reason.MALFORMED_NAME, 400),
    ("number-as-host", ask(fields=[(b"Host", b"2130706433")]), Reason.MALFORMED_NAME, 400),
    ("utf8-host", ask(fields=[(b"Host", "api.exämple.com".encode())]), Reason.MALFORMED_NAME, 400),
    ("another-host", ask(fields=[(b"Host", b"other.example.com")]), Reason.HOST_MISMATCH, 421),
    ("below-the-host", ask(fields=[(b"Host", b"x.api.example.com")]), Reason.HOST_MISMATCH, 421),
    ("both-lengths", ask("POST", more=[(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")]),
     Reason.MALFORMED_REQUEST, 400),
    ("two-lengths", ask("POST", more=[(b"Content-Length", b"5"), (b"content-length", b"5")]),
     Reason.MALFORMED_REQUEST, 400),
    ("list-of-lengths", ask("POST", more=[(b"Content-Length", b"5, 5")]), Reason.MALFORMED_REQUEST, 400),
    ("signed-length", ask("POST", more=[(b"Content-Length", b"+5")]), Reason.MALFORMED_REQUEST, 400),
    ("hex-length", ask("POST", more=[(b"Content-Length", b"0x5")]), Reason.MALFORMED_REQUEST, 400),
    ("endless-length", ask("POST", more=[(b"Content-Length", b"9" * 30)]), Reason.MALFORMED_REQUEST, 400),
    ("two-codings", ask("POST", more=[(b"Transfer-Encoding", b"chunked")] * 2), Reason.MALFORMED_REQUEST, 400),
    ("unknown-coding", ask("POST", more=[(b"Transfer-Encoding", b"xchunked")]), Reason.MALFORMED_REQUEST, 501),
    ("gzip-and-chunked", ask("POST", more=[(b"Transfer-Encoding", b"gzip, chunked")]), Reason.MALFORMED_REQUEST, 501),
    ("identity", ask("POST", more=[(b"Transfer-Encoding", b"identity")]), Reason.MALFORMED_REQUEST, 501),
    ("chunked-in-1.0", ask("POST", version="HTTP/1.0", more=[(b"Transfer-Encoding", b"chunked")]),
     Reason.MALFORMED_REQUEST, 400),
    ("folded-value", ask(more=[(b"X", b"a\r\n b")]), Reason.MALFORMED_REQUEST, 400),
    ("nul-in-value", ask(more=[(b"X", b"a\0b")]), Reason.MALFORMED_REQUEST, 400),
    ("space-before-colon", ask(more=[(b"Transfer-Encoding ", b"chunked")]), Reason.MALFORMED_REQUEST, 400),
    ("upgrade-not-listed", ask("GET", "/chat", more=[(b"Upgrade", b"foo")]), Reason.UPGRADE, 403),
    ("h2c", ask("GET", "/chat", more=[(b"Upgrade", b"h2c")]), Reason.UPGRADE, 403),
    ("h2c-beside-websocket", ask("GET", "/chat", more=[(b"Upgrade", b"websocket, h2c")]), Reason.UPGRADE, 403),
    ("two-upgrades", ask("GET", "/chat", more=[(b"Upgrade", b"websocket")] * 2), Reason.UPGRADE, 403),
    ("absolute-form-for-another-host", ask("GET", "https://other.example.com/search"), Reason.MALFORMED_REQUEST, 400),
    ("absolute-form-with-another-scheme", ask("GET", "http://api.example.com/search"), Reason.MALFORMED_REQUEST, 400),
    ("absolute-form-with-another-port", ask("GET", "https://api.example.com:80/search"), Reason.MALFORMED_REQUEST, 400),
    ("absolute-form-with-a-user", ask("GET", "https://x@api.example.com/search"), Reason.MALFORMED_REQUEST, 400),
    ("absolute-form-of-a-file", ask("GET", "file:///search"), Reason.MALFORMED_REQUEST, 400),
    ("absolute-form-without-the-usual-port", ask("GET", "https://api.example.com/search", to=conversation(port=8443)),
     Reason.MALFORMED_REQUEST, 400),
    ("absolute-form-judged-by-path", ask("GET", "https://api.example.com/forecasts"), Reason.NO_ALLOW_ENTRY, 403),
    ("method-override", ask("POST", more=[(b"X-HTTP-Method-Override", b"DELETE")]), Reason.NO_ALLOW_ENTRY, 403),
    ("method-override-in-lower-case", ask("POST", more=[(b"x-http-method", b"delete")]), Reason.NO_ALLOW_ENTRY, 403),
    ("method-override-as-cgi-reads-it", ask("POST", more=[(b"X_Method-Override", b"PUT")]), Reason.NO_ALLOW_ENTRY, 403),
    ("method-override-that-is-none", ask("POST", more=[(b"X-Method-Override", b"")]), Reason.MALFORMED_REQUEST, 400),
    ("two-method-overrides", ask("POST", more=[(b"X-HTTP-Method", b"GET"), (b"X-Method-Override", b"HEAD")]),
     Reason.MALFORMED_REQUEST, 400),
    ("path-override", ask(more=[(b"X-Original-URL", b"/search/secret")]), Reason.DENY_RULE, 403),
    ("path-override-not-allowed", ask(more=[(b"X-Rewrite-URL", b"/forecasts?a")]), Reason.NO_ALLOW_ENTRY, 403),
    ("path-override-elsewhere", ask(more=[(b"X-Original-URL", b"https://x.test/")]), Reason.MALFORMED_PATH, 400),
    ("both-overrides", ask("GET", "/search", more=[(b"X-HTTP-Method", b"POST"), (b"X-Original-URL", b"/chat")]),
     Reason.NO_ALLOW_ENTRY, 403),
    ("slash-without-literal", ask("GET", "/search/a%2Fb"), Reason.MALFORMED_PATH, 400),
    ("http2-without-authority", ask2(authority=None), Reason.MALFORMED_REQUEST, 400),
    ("http2-with-an-empty-authority", ask2(authority=""), Reason.MALFORMED_REQUEST, 400),
    ("http2-for-another-host", ask2(authority="other.example.com"), Reason.HOST_MISMATCH, 421),
    ("http2-for-another-port", ask2(authority="api.example.com:8443"), Reason.HOST_MISMATCH, 421),
    ("http2-with-another-host-beside", ask2(more=[(b"host", b"other.example.com")]), Reason.MALFORMED_REQUEST, 400),
    ("http2-with-another-port-beside", ask2(more=[(b"host", b"api.example.com:80")]), Reason.MALFORMED_REQUEST, 400),
    ("http2-with-connection", ask2(more=[(b"connection", b"close")]), Reason.MALFORMED_REQUEST, 400),
    ("http2-with-upgrade", ask2(target="/chat", more=[(b"upgrade", b"websocket")]), Reason.MALFORMED_REQUEST, 400),
    ("http2-with-a-coding", ask2("POST", more=[(b"Transfer-Encoding", b"chunked")]), Reason.MALFORMED_REQUEST, 400),
    ("http2-connect", ask2("CONNECT"), Reason.MALFORMED_REQUEST, 405),
    ("http2-no-allow-entry", ask2(target="/forecasts"), Reason.NO_ALLOW_ENTRY, 403),
    ("proxied-in-origin-form", ask_proxy("/search"), Reason.MALFORMED_REQUEST, 400),
    ("proxied-for-https", ask_proxy("https://api.example.com/search"), Reason.MALFORMED_REQUEST, 400),
    ("proxied-with-another-host", ask_proxy("http://api.example.com/search", b"x.test"), Reason.MALFORMED_REQUEST, 400),
    ("proxied-to-a-port-without-rule", ask_proxy("http://api.example.com:81/search", b"api.example.com:81"),
     Reason.PORT, 403),
    ("proxied-to-an-address", ask_proxy("http://10.0.0.1/search", b"10.0.0.1"), Reason.MALFORMED_NAME, 400),
]  # fmt: skip


@pytest.mark.parametrize(("judgement", "reason", "status"), [row[1:] for row in DENIED], ids=[row[0] for row in DENIED])
def test_a_request_is_denied_with(judgement: Judgement, reason: Reason, status: int) -> None:
    assert (judgement.verdict.reason, judgement.status, judgement.verdict.is_allow) == (reason, status, False)


ALLOWED = [
    ("port-in-host", ask(fields=[(b"Host", b"api.example.com:443")])),
    ("case-and-dot-in-host", ask(fields=[(b"Host", b"API.Example.com.")])),
    ("absolute-form", ask("GET", "https://api.example.com/search?q=1")),
    ("absolute-form-with-port", ask("GET", "https://API.example.com:443/search")),
    ("length", ask("POST", more=[(b"Content-Length", b"5")])),
    ("chunked", ask("POST", more=[(b"Transfer-Encoding", b"Chunked")])),
    ("websocket", ask("GET", "/chat", more=[(b"Upgrade", b"WebSocket")])),
    ("http-1.0", ask(version="HTTP/1.0")),
    ("a-long-target", ask(target="/search/" + "a" * 16_000)),
    ("a-hundred-fields", ask(more=[(b"X", b"a")] * 99)),
    ("an-expectation", ask("POST", more=[(b"Expect", b"100-Continue")])),
    ("http2-with-many-crumbs", ask2(more=[(b"cookie", b"a=b")] * 200)),
    ("any-bytes-in-a-value", ask(more=[(b"X", b"\xff\x80\ttext")])),
    ("http2", ask2()),
    ("http2-with-port", ask2(authority="API.example.com.:443")),
    ("http2-with-host-beside", ask2(more=[(b"host", b"API.example.com")])),
    ("http2-with-host-instead", ask2(authority=None, more=[HOST])),
    ("proxied", ask_proxy("http://api.example.com/search?q=1")),
    ("proxied-with-port", ask_proxy("http://API.example.com:80/search")),
]


@pytest.mark.parametrize("judgement", [row[1] for row in ALLOWED], ids=[row[0] for row in ALLOWED])
def test_a_request_is_allowed_with(judgement: Judgement) -> None:
    assert judgement.verdict.reason is Reason.RULE


def test_absolute_form_becomes_the_target_that_was_judged() -> None:
    assert ask("GET", "https://api.example.com/search?q=1").attempt.target == "/search?q=1"


def test_absolute_form_without_a_path_is_the_root() -> None:
    assert ask("GET", "https://api.example.com").attempt.target == "/"


def test_a_proxied_conversation_is_for_the_latest_host_that_was_allowed() -> None:
    one, to = judge(), conversation(port=3128, plain=True)
    to.proxied = True
    allowed = one.request(to, "GET", "http://api.example.com/search", "HTTP/1.1", [HOST])
    assert (allowed.attempt.host, allowed.attempt.port, allowed.attempt.target) == ("api.example.com", 80, "/search")
    one.request(to, "GET", "http://x.test:8080/", "HTTP/1.1", [(b"Host", b"x.test:8080")])
    assert (to.opened_for, to.port) == ("api.example.com", 80)
    one.request(to, "GET", "http://other.example.com/", "HTTP/1.1", [(b"Host", b"other.example.com")])
    assert (to.opened_for, to.port) == ("other.example.com", 80)


@pytest.mark.parametrize(
    ("version", "kind", "grpc"),
    [
        ("HTTP/2.0", b"application/grpc", True),
        ("HTTP/2.0", b"application/grpc+proto", True),
        ("HTTP/2.0", b"application/grpc;x=y", True),
        ("HTTP/2.0", b"application/grpc-web", False),
        ("HTTP/2.0", b"application/json", False),
        ("HTTP/1.1", b"application/grpc", False),
    ],
)
def test_grpc_is_told_by_its_type(version: str, kind: bytes, grpc: bool) -> None:
    assert ask("POST", "/forecasts", version, more=[(b"Content-Type", kind)]).grpc is grpc


def test_the_tls_of_a_conversation_is_judged_before_its_first_request() -> None:
    one = judge()
    assert one.opening(conversation()).is_allow
    assert one.opening(conversation(opened_for="nowhere.example.com")).reason is Reason.NO_RULE


def test_the_first_host_on_a_plain_connection_binds_the_later_ones() -> None:
    one, plain = judge(), conversation(port=80, plain=True)
    first = one.request(plain, "GET", "/search", "HTTP/1.1", [HOST])
    other = one.request(plain, "GET", "/", "HTTP/1.1", [(b"Host", b"other.example.com")])
    again = one.request(plain, "GET", "/search", "HTTP/1.1", [HOST])
    assert [j.verdict.reason for j in (first, other, again)] == [Reason.RULE, Reason.HOST_MISMATCH, Reason.RULE]
    assert (first.attempt.plain, other.status) == (True, 421)


def test_a_malformed_request_binds_no_host() -> None:
    one, plain = judge(), conversation(port=80, plain=True)
    one.request(plain, "GET", "/search", "HTTP/1.1", [HOST, HOST])
    assert one.request(plain, "GET", "/", "HTTP/1.1", [(b"Host", b"other.example.com")]).is_forward


def test_only_an_allow_opens_the_way_upstream() -> None:
    to = conversation()
    one = judge()
    one.request(to, "GET", "/forecasts", "HTTP/1.1", [HOST])
    assert to.allowed is None
    allowed = one.request(to, "GET", "/search", "HTTP/1.1", [HOST])
    assert to.allowed == allowed.verdict


@pytest.mark.parametrize(
    ("more", "closes"),
    [([], False), ([(b"Content-Length", b"0")], False), ([(b"Content-Length", b"5")], True),
     ([(b"Transfer-Encoding", b"chunked")], True)],
    ids=["no-body", "empty-body", "sized", "chunked"],
)  # fmt: skip
def test_a_denial_closes_when_a_body_would_follow(more: Fields, closes: bool) -> None:
    assert ask("DELETE", more=more).closes is closes


def test_a_request_that_cannot_be_framed_closes() -> None:
    assert ask(more=[HOST]).closes


@pytest.mark.parametrize(
    ("accept", "page"),
    [(b"text/html,application/xhtml+xml,*/*;q=0.8", True), (b"*/*", False), (b"application/json, text/html", False)],
    ids=["browser", "curl", "client-of-an-api"],
)
def test_a_browser_prefers_a_page(accept: bytes, page: bool) -> None:
    assert ask("GET", "/forecasts", more=[(b"Accept", accept)]).page is page


def test_a_note_says_what_is_wrong_with_a_path() -> None:
    assert "dot segment" in ask("GET", "/search/../x").note


def test_a_rule_with_literal_slashes_is_judged_by_them() -> None:
    to = conversation(opened_for="other.example.com")
    assert ask("GET", "/a%2Fb", fields=[(b"Host", b"other.example.com")], to=to).is_forward


def test_audit_mode_forwards_and_remembers_the_denial() -> None:
    policy = rules("""
        - host: api.example.com
          tls: inspect
          allow: ["GET /search"]
    """)
    audited = policy.workloads[WORKLOAD]
    one = judge(build({WORKLOAD: replace(audited, mode=Mode.AUDIT)}))
    judgement = one.request(conversation(), "GET", "/forecasts", "HTTP/1.1", [HOST])
    assert judgement.is_forward
    assert judgement.verdict.would_be is not None
    assert judgement.verdict.would_be.reason is Reason.NO_ALLOW_ENTRY
    assert one.request(conversation(), "GET", "/a/../b", "HTTP/1.1", [HOST]).status == 400


def test_bytes_that_are_no_request_are_always_denied() -> None:
    judgement = judge().unreadable(conversation(), "the head is too large", status=431)
    assert (judgement.status, judgement.verdict.reason, judgement.note) == (
        431, Reason.MALFORMED_REQUEST, "the head is too large",
    )  # fmt: skip
    assert judgement.closes


def test_an_upstream_failure_turns_the_allow_into_a_denial_with_its_reason() -> None:
    failed = judge().fail(ask(), Reason.UPSTREAM_CERTIFICATE, "it has expired")
    assert (failed.status, failed.verdict.reason, failed.verdict.is_allow) == (502, Reason.UPSTREAM_CERTIFICATE, False)


def test_an_address_that_may_not_be_reached_is_a_denial_by_policy() -> None:
    assert judge().fail(ask(), Reason.NEVER_REACHED, "169.254.169.254").status == 403


def test_a_request_broken_off_stays_an_allow() -> None:
    broken = judge().break_off(ask(), Reason.CLIENT_GONE)
    assert (broken.verdict.action, broken.verdict.reason, broken.status) == (Action.ALLOW, Reason.CLIENT_GONE, None)
