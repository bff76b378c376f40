"""What a result means: the outcome, whether the policy expects it, and whether it is a leak. It sends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from policies.engine import decide
from policies.hostnames import Hostname
from policies.index import Policy
from policies.model import Attempt, HostRule, Stage, Tls
from policies.words import MalformedWords, answer, ladder, parse_words
from proxy.verify.model import Heard, Kind, Manner, Outcome, Probe, Proof, Row, Status
from proxy.verify.packets import read_denial
from proxy.verify.probes import ANY_NTP, Names

MAX_CLOCK_OFFSET_S = 60.0  # tokens of most issuers bear no more
_SHOWN = 60  # characters of an answer
_UNPROVEN = "reads like a gate's refusal, and nothing shows that the gate wrote it"
_BEYOND = "refused by somebody beyond the first router, who got the packet"
_PLAIN: dict[Manner, Outcome] = {
    Manner.REFUSED: Outcome.FAST,
    Manner.NOTHING: Outcome.SLOW,
    Manner.ABSENT: Outcome.ABSENT,
    Manner.FAILED: Outcome.FAILED,
    Manner.POSSIBLE: Outcome.CAPABILITY,
}


def needs_proof(probe: Probe, heard: Heard) -> bool:
    """Whether the outcome depends on who it was that answered."""
    if heard.manner is Manner.ANSWERED:
        return probe.kind not in (Kind.UNIX, Kind.CERTIFICATE) and read_denial(heard.data) is not None
    return heard.manner in (Manner.CLOSED, Manner.SILENT, Manner.REJECTED)


def judge(
    probe: Probe, heard: Heard, proof: Proof | None, *, expected: bool, harmless: bool, near: bool, elapsed_ms: int = 0
) -> Row:
    """The row of a probe.

    proof     what shows that the gate said what was heard
    expected  the policy allows it
    harmless  no capability of this workload leads round the gate
    near      nobody but the address itself could have refused
    """
    outcome, detail, decision = _outcome(probe, heard, proof, near=near)
    row = Row(probe, outcome, Status.OK, expected, detail, proof, decision, elapsed_ms)
    return replace(row, status=_status(row, heard, harmless=harmless))


def _outcome(probe: Probe, heard: Heard, proof: Proof | None, *, near: bool) -> tuple[Outcome, str, str | None]:
    if heard.manner in _PLAIN:
        return _PLAIN[heard.manner], heard.note, None
    if heard.manner is Manner.REJECTED:
        return (Outcome.FAST, heard.note, None) if proof or near else (Outcome.REACHED, _BEYOND, None)
    if heard.manner in (Manner.CLOSED, Manner.SILENT):
        if probe.kind is Kind.CERTIFICATE:
            return Outcome.REACHED, heard.note, None
        if proof:
            return Outcome.PROXIED, f"accepted, then {heard.manner}", None
        return Outcome.REACHED, f"accepted, then {heard.manner}, by somebody unknown", None
    if probe.kind is Kind.CERTIFICATE:
        return Outcome.PROXIED, heard.note, None
    denial = read_denial(heard.data)
    if denial is None:
        return Outcome.REACHED, heard.note or _show(heard.data), None
    reason, decision = denial
    if proof is None:
        return Outcome.REACHED, _UNPROVEN, decision
    return Outcome.PROXIED, reason, decision


def _show(data: bytes) -> str:
    """The first line of an answer, in ASCII."""
    line = data.split(b"\r\n", 1)[0][:_SHOWN]
    text = ascii(line.decode("latin-1"))[1:-1]
    return f"answered {len(data)} bytes" if "\\x" in text else text[:_SHOWN]


def _status(row: Row, heard: Heard, *, harmless: bool) -> Status:
    match row.outcome:
        case Outcome.FAILED:
            return Status.FAILED
        case Outcome.CAPABILITY:
            return Status.OK if harmless else Status.LEAK
        case Outcome.REACHED if not row.expected:
            return Status.LEAK
        case Outcome.REACHED if row.probe.kind is Kind.CLOCK:
            return Status.ODD if _is_wrong(heard.note) else Status.OK
        case Outcome.PROXIED | Outcome.FAST | Outcome.SLOW if row.expected and row.probe.kind is not Kind.CLOCK:
            return Status.ODD
    return Status.OK


def _is_wrong(offset: str) -> bool:
    try:
        return abs(float(offset.partition(" ")[0])) > MAX_CLOCK_OFFSET_S
    except ValueError:
        return True


# --- what the policy says


def is_expected(policy: Policy | None, workload: str, probe: Probe, time: float) -> bool:
    """Whether the policy allows one of the attempts that the probe is, so that it should be reached."""
    return policy is not None and any(_is_allowed(policy, workload, words, time) for words in probe.words)


def _is_allowed(policy: Policy, workload: str, words: str, time: float) -> bool:
    if words == ANY_NTP:
        return decide(policy, Attempt(Stage.NTP, workload, port=123, time=time)).is_allow
    try:
        return answer(ladder(policy, parse_words(workload, words, time))).is_allow
    except MalformedWords:  # no gate could receive it
        return False


def fill_in(names: Names, policy: Policy | None, workload: str, time: float) -> Names:
    """The names that stand for the policy's own in the list."""
    if policy is None:
        return names
    seen = list(_allowed_tls(policy, workload, time))
    inspected = next((host for host, tls in seen if tls is Tls.INSPECT), None)
    other = next((host for host, _ in seen if host != inspected), None)

    def is_veil_denied(host: str) -> bool:
        return not decide(policy, Attempt(Stage.TLS, workload, Hostname(host), time=time, ech=True)).is_allow

    veiled = next((host for host, tls in seen if tls is Tls.PASSTHROUGH and is_veil_denied(host)), None)
    return replace(names, inspected=inspected, other=other, veiled=veiled)


def _allowed_tls(policy: Policy, workload: str, time: float) -> Iterator[tuple[str, Tls]]:
    """Names that the workload may open TLS to on 443, and what the gate does with it."""
    for rule in _host_rules(policy, workload):
        host = Hostname(f"outgate-verify.{rule.pattern.host}" if rule.pattern.wildcard else rule.pattern.host)
        verdict = decide(policy, Attempt(Stage.TLS, workload, host, time=time))
        if verdict.is_allow and verdict.tls and verdict.would_be is None:
            yield host, verdict.tls


def allowed_hosts(policy: Policy, workload: str, time: float) -> list[tuple[str, int]]:
    """The exact names that the workload may open TLS to, and the first port of each."""
    found: dict[str, int] = {}
    for rule in _host_rules(policy, workload):
        for port in (ports.first for ports in rule.ports if not rule.pattern.wildcard):
            attempt = Attempt(Stage.TLS, workload, rule.pattern.host, port, time=time)
            if decide(policy, attempt).is_allow:
                found.setdefault(rule.pattern.host, port)
    return list(found.items())


def allowed_wildcards(policy: Policy, workload: str, time: float) -> list[str]:
    """The domains below which the workload may look every name up."""

    def admits(host: str) -> bool:
        return decide(policy, Attempt(Stage.DNS, workload, Hostname(f"x.{host}"), 53, time=time)).is_allow

    return [
        host
        for host in dict.fromkeys(rule.pattern.host for rule in _host_rules(policy, workload) if rule.pattern.wildcard)
        if admits(host)
    ]


def _host_rules(policy: Policy, workload: str) -> Iterator[HostRule]:
    rules = policy.workloads[workload].rules if workload in policy.workloads else ()
    return (rule for rule in rules if isinstance(rule, HostRule))
