"""Attempts in words (`GET https://host/path`, `tls://host`, `tcp://host:22`) and the steps a gate would judge for one.

`why` and `tests:` speak these words. Every verdict comes from `engine`; nothing is resolved or dialled here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from policies.engine import decide
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.index import Policy
from policies.model import ELSEWHERE, Address, Attempt, Dial, Reason, Stage, Tls, TransportRule, Verdict
from policies.paths import MalformedPath, parse_path

SCHEMES = ("https", "http", "tls", "tcp", "udp", "quic", "ntp", "dns")
DEFAULT_PORTS = {"https": 443, "http": 80, "tls": 443, "quic": 443, "ntp": 123, "dns": 53}
EXAMPLES = "such as 'GET https://host/path', tls://host, tcp://host:22, ntp://host or dns://host"

# What people write for bytes that are TCP to us: the scheme's registered port makes the repair complete.
TCP_SERVICES = {"ssh": 22, "git": 9418, "ftp": 21, "smtp": 25, "redis": 6379, "mysql": 3306, "postgresql": 5432}


class MalformedWords(ValueError):
    """This text is no attempt at all. `str()` says what is wrong and how to write it; the command line exits 2."""


@dataclass(frozen=True, slots=True)
class Step:
    """One attempt that the gate judges, its verdict, and what the words alone cannot tell."""

    attempt: Attempt
    verdict: Verdict
    note: str = ""

    @property
    def stage(self) -> Stage:
        return self.attempt.stage


@dataclass(frozen=True, slots=True)
class _Url:
    """The parts of `scheme://authority target`, still as written."""

    scheme: str
    host: str
    port: int | None
    userinfo: bool
    target: str


def parse_words(workload: str, words: str, time: float = 0.0) -> Attempt:
    """The attempt these words mean.

    What a gate could receive is an attempt: a malformed name or path gives one with its `fault` set, which is a denial.
    Raises MalformedWords where no gate could: an unknown scheme, no method for HTTP, no port for tcp and udp.
    """
    method, url_text = _split_method(words)
    url = _split_url(url_text, method)
    if url.scheme in ("http", "https"):
        return _http_attempt(workload, method, url, time)
    _refuse_extras(method, url)
    host = _read_host(url.host)
    stage = Stage.UDP if url.scheme == "quic" else Stage(url.scheme)
    attempt = Attempt(stage=stage, workload=workload, port=_port(url), time=time)
    if url.scheme in ("tcp", "udp"):
        return _transport_attempt(attempt, host)
    attempt = _named(attempt, host)
    return replace(attempt, names=(attempt.host,)) if url.scheme == "quic" and attempt.host else attempt


def ladder(policy: Policy, attempt: Attempt) -> tuple[Step, ...]:
    """The steps a gate would judge for `attempt`, in order. A denied lookup does not end them: a client may know the
    address already. A denied TLS stage does, and so does TLS that is carried undecrypted."""
    if attempt.fault and attempt.fault is not Reason.MALFORMED_PATH:
        return (Step(attempt, decide(policy, attempt)),)
    steps = []
    name = attempt.opened_for or attempt.host or next(iter(attempt.names), None)
    if name is not None and attempt.stage is not Stage.DNS:
        lookup = Attempt(stage=Stage.DNS, workload=attempt.workload, host=name, port=53, time=attempt.time)
        steps.append(Step(lookup, decide(policy, lookup)))
    if attempt.stage is Stage.HTTP and not attempt.plain:
        opening = replace(attempt, stage=Stage.TLS, host=name, method="", target="", opened_for=None, fault=None)
        verdict = decide(policy, opening)
        if verdict.tls is not Tls.INSPECT:
            steps.append(Step(opening, verdict, _passthrough_note(verdict)))
            return tuple(steps)
        steps.append(Step(opening, verdict, "inspected: method and path are judged"))
    verdict = decide(policy, attempt)
    steps.append(Step(attempt, verdict, _address_note(policy, attempt, verdict)))
    return tuple(steps)


def answer(steps: Sequence[Step]) -> Verdict:
    """The verdict of a whole ladder: the first denial beyond the lookup, else a denied lookup, else the last allow."""
    lookups = [step.verdict for step in steps if step.stage is Stage.DNS]
    beyond = [step.verdict for step in steps if step.stage is not Stage.DNS]
    denied = next((verdict for verdict in (*beyond, *lookups) if not verdict.is_allow), None)
    return denied or (beyond or lookups)[-1]


def enforced(steps: Sequence[Step]) -> Verdict:
    """The answer of a ladder as enforcement would give it, also where audit mode lets the attempt pass."""
    return answer([replace(step, verdict=step.verdict.would_be or step.verdict) for step in steps])


# --- text ----------------------------------------------------------------------------------------------------------


def _split_method(words: str) -> tuple[str, str]:
    """`GET https://h/a b` is a method and all the rest: a space in the target is the target's fault."""
    text = words.strip()
    if not text:
        raise MalformedWords(f"an empty attempt; write one {EXAMPLES}")
    first, _, rest = text.partition(" ")
    return ("", text) if "://" in first or not rest else (first, rest.strip())


def _split_url(text: str, method: str) -> _Url:
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise MalformedWords(f'"{text}" names no scheme; write {_with_scheme(text, method)}')
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        raise MalformedWords(f'unknown scheme "{scheme}"; {_nearest_scheme(scheme, rest, method)}')
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    userinfo, at, host_port = authority.rpartition("@")
    if at and scheme not in ("http", "https"):
        raise MalformedWords(f'a {scheme} attempt carries no user name; leave out "{userinfo}@"')
    host, port = _split_port(scheme, host_port)
    return _Url(scheme, host, port, bool(at), rest[len(authority) :])


def _split_port(scheme: str, text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise MalformedWords(f'"{text}" is not [address]:port; write IPv6 as {scheme}://[2001:db8::1]:443')
        port = port[1:]
    elif text.count(":") > 1:
        raise MalformedWords(f'"{text}": an IPv6 address stands in brackets; write {scheme}://[2001:db8::1]:443')
    else:
        host, _, port = text.partition(":")
    if not host:
        raise MalformedWords(f"no host after {scheme}://; write an attempt {EXAMPLES}")
    if not port:
        return host, None
    if not (port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535):
        raise MalformedWords(f'"{port}" is no port; write a number from 1 to 65535')
    return host, int(port)


def _port(url: _Url) -> int:
    if url.port is None and url.scheme not in DEFAULT_PORTS:
        host = f"[{url.host}]" if ":" in url.host else url.host
        raise MalformedWords(f"a {url.scheme} attempt needs a port; write {url.scheme}://{host}:PORT")
    return url.port or DEFAULT_PORTS[url.scheme]


def _refuse_extras(method: str, url: _Url) -> None:
    shown = f"{url.scheme}://{url.host}"
    if method:
        raise MalformedWords(
            f"a {url.scheme} attempt has no method; write {shown}, or {method} https://{url.host}/path"
        )
    if url.target not in ("", "/"):
        repair = f"{shown}, or GET https://{url.host}{url.target}" if url.scheme == "tls" else shown
        raise MalformedWords(f'a {url.scheme} attempt has no path "{url.target}"; write {repair}')
    if url.scheme in ("ntp", "dns") and url.port not in (None, DEFAULT_PORTS[url.scheme]):
        raise MalformedWords(f"{url.scheme} is judged by name, whatever the port; write {shown}")


def _with_scheme(text: str, method: str) -> str:
    """The likeliest repair of words without a scheme."""
    if method:
        return f"{method} https://{text}"
    host, _, port = text.partition(":")
    if port.isdecimal() and port not in ("80", "443"):
        return f"tcp://{text}"
    return f"tls://{host}" if "/" not in host else f"'GET https://{text}'"


def _nearest_scheme(scheme: str, rest: str, method: str) -> str:
    authority = rest.partition("/")[0].rpartition("@")[2]
    if scheme in ("ws", "wss"):
        return f"a WebSocket opens with a request; write GET {'https' if scheme == 'wss' else 'http'}://{rest}"
    if scheme in TCP_SERVICES:
        port = "" if ":" in authority else f":{TCP_SERVICES[scheme]}"
        return f"write tcp://{authority}{port}"
    if scheme in ("h3", "http3"):
        return f"HTTP/3 opens with QUIC; write quic://{authority}"

    from difflib import get_close_matches

    near = get_close_matches(scheme, SCHEMES, n=1)
    return f"did you mean {near[0]}://?" if near else f"use one of {', '.join(SCHEMES)}"


# --- attempts ------------------------------------------------------------------------------------------------------


def _read_host(text: str) -> Hostname | Address | None:
    """A name, an address, or None: not a name at all. A zone (`%eth0`) is the machine's own and no destination."""
    try:
        return ip_address(text) if "%" not in text else None
    except ValueError:
        pass
    try:
        return parse_hostname(text)
    except MalformedName:
        return None


def _http_attempt(workload: str, method: str, url: _Url, time: float) -> Attempt:
    shown = f"{url.scheme}://{url.host}{url.target or '/'}"
    if not method:
        raise MalformedWords(f"an HTTP attempt needs a method; write 'GET {shown}'")
    plain = url.scheme == "http"
    target = url.target if url.target.startswith("/") else f"/{url.target}"
    attempt = Attempt(
        stage=Stage.HTTP, workload=workload, port=_port(url), time=time, method=method, target=target, plain=plain
    )
    attempt = _named(attempt, _read_host(url.host))
    if attempt.fault:  # refused where the gate first meets the name: in the ClientHello, or in the request
        return replace(attempt, stage=Stage.HTTP if plain else Stage.TLS)
    attempt = replace(attempt, opened_for=attempt.host)
    if url.userinfo:
        return replace(attempt, fault=Reason.MALFORMED_REQUEST)
    try:
        parse_path(target, encoded_slash=True)  # what no rule can admit; %2F is for the rule to say
    except MalformedPath:
        return replace(attempt, fault=Reason.MALFORMED_PATH)
    return attempt


def _named(attempt: Attempt, host: Hostname | Address | None) -> Attempt:
    """With `host` as its name; an address literal is malformed where a name must stand."""
    if isinstance(host, str):
        return replace(attempt, host=host)
    return replace(attempt, address=host, fault=Reason.MALFORMED_NAME)


def _transport_attempt(attempt: Attempt, host: Hostname | Address | None) -> Attempt:
    if host is None:
        return replace(attempt, fault=Reason.MALFORMED_NAME)
    return replace(attempt, names=(host,)) if isinstance(host, str) else replace(attempt, address=host)


# --- notes ---------------------------------------------------------------------------------------------------------


def _passthrough_note(verdict: Verdict) -> str:
    if not verdict.is_allow:
        return ""
    return "carried undecrypted: method and path are not seen; address judged at dial time"


def _address_note(policy: Policy, attempt: Attempt, verdict: Verdict) -> str:
    if verdict.is_allow:
        if attempt.stage is Stage.UDP and attempt.port in ELSEWHERE:
            return f"stays closed all the same: {ELSEWHERE[attempt.port]}"
        by_name = verdict.dial is Dial.NAME and attempt.stage in (Stage.HTTP, Stage.TLS, Stage.TCP, Stage.UDP)
        return "address judged at dial time" if by_name else ""
    if attempt.names and attempt.address is None and _has_address_rule(policy, attempt):
        return "judged by name; an address rule may admit what it resolves to: address judged at dial time"
    return ""


def _has_address_rule(policy: Policy, attempt: Attempt) -> bool:
    workload = policy.workloads.get(attempt.workload)
    return workload is not None and any(
        isinstance(rule, TransportRule)
        and rule.stage is attempt.stage
        and rule.networks
        and any(attempt.port in ports for ports in rule.ports)
        for rule in workload.rules
    )
