"""What each result of `outgate verify` means: outcome and status of every case, and what the policy expects."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from policies.index import Policy
from proxy.verify.judging import allowed_hosts, allowed_wildcards, fill_in, is_expected, judge, needs_proof
from proxy.verify.model import Heard, Kind, Manner, Outcome, Probe, Proof, Status
from proxy.verify.probes import ANY_NTP, Names
from tests.policies.files import read

DENIAL = b"HTTP/1.1 403 Forbidden\r\nOutgate-Decision: deny; reason=never_reached; id=0123456789abcdef\r\n\r\n"
ALERT = b"\x15\x03\x03\x00\x02\x02\x31"
ANSWER = b"HTTP/1.1 200 OK\r\n\r\n"
WEB = Probe(id="tcp-80", group="raw-ip", what="", kind=Kind.HTTP, to="192.0.2.1", port=80)
CLOCK = Probe(id="clock", group="clock", what="", kind=Kind.CLOCK, to="192.0.2.1", port=123)
KEY = Probe(id="gate-certificate", group="gate", what="", kind=Kind.CERTIFICATE, to="192.0.2.1", port=443)
RAW = Probe(id="raw-packet", group="raw", what="", kind=Kind.PACKET)
UNIX = Probe(id="unix-docker", group="socket", what="", kind=Kind.UNIX, to="/run/docker.sock")


@dataclass(frozen=True)
class Case:
    heard: Heard
    outcome: Outcome
    status: Status
    probe: Probe = WEB
    proof: Proof | None = None
    expected: bool = False
    harmless: bool = False
    near: bool = False


def met(manner: Manner, data: bytes = b"", note: str = "") -> Heard:
    return Heard(manner, data, note)


CASES = {
    "an answer": Case(met(Manner.ANSWERED, ANSWER), Outcome.REACHED, Status.LEAK),
    "an answer, whoever is near": Case(
        met(Manner.ANSWERED, ANSWER), Outcome.REACHED, Status.LEAK, proof=Proof.NAMESPACE
    ),
    "an answer that the policy allows": Case(met(Manner.ANSWERED, ANSWER), Outcome.REACHED, Status.OK, expected=True),
    "a refusal by nobody knows whom": Case(met(Manner.ANSWERED, DENIAL), Outcome.REACHED, Status.LEAK),
    "an alert by nobody knows whom": Case(met(Manner.ANSWERED, ALERT), Outcome.REACHED, Status.LEAK),
    "a refusal by the gate": Case(met(Manner.ANSWERED, DENIAL), Outcome.PROXIED, Status.OK, proof=Proof.HOPS),
    "a refusal of what is allowed": Case(
        met(Manner.ANSWERED, DENIAL), Outcome.PROXIED, Status.ODD, proof=Proof.HOPS, expected=True
    ),
    "closed by nobody knows whom": Case(met(Manner.CLOSED), Outcome.REACHED, Status.LEAK),
    "silent, by nobody knows whom": Case(met(Manner.SILENT), Outcome.REACHED, Status.LEAK),
    "closed by the gate": Case(met(Manner.CLOSED), Outcome.PROXIED, Status.OK, proof=Proof.MACHINE),
    "silent, by the gate": Case(met(Manner.SILENT), Outcome.PROXIED, Status.OK, proof=Proof.NAMESPACE),
    "reset from beyond": Case(met(Manner.REJECTED), Outcome.REACHED, Status.LEAK),
    "reset by the gate": Case(met(Manner.REJECTED), Outcome.FAST, Status.OK, proof=Proof.HOPS),
    "reset by a neighbour": Case(met(Manner.REJECTED), Outcome.FAST, Status.OK, near=True),
    "refused": Case(met(Manner.REFUSED), Outcome.FAST, Status.OK),
    "refused, though allowed": Case(met(Manner.REFUSED), Outcome.FAST, Status.ODD, expected=True),
    "nothing": Case(met(Manner.NOTHING), Outcome.SLOW, Status.OK),
    "nothing, though allowed": Case(met(Manner.NOTHING), Outcome.SLOW, Status.ODD, expected=True),
    "absent": Case(met(Manner.ABSENT), Outcome.ABSENT, Status.OK),
    "failed": Case(met(Manner.FAILED), Outcome.FAILED, Status.FAILED),
    "failed, though allowed": Case(met(Manner.FAILED), Outcome.FAILED, Status.FAILED, expected=True),
    "a capability": Case(met(Manner.POSSIBLE), Outcome.CAPABILITY, Status.LEAK, RAW),
    "a capability elsewhere": Case(met(Manner.POSSIBLE), Outcome.CAPABILITY, Status.OK, RAW, harmless=True),
    "a socket": Case(met(Manner.ANSWERED), Outcome.REACHED, Status.LEAK, UNIX),
    "the gate's key": Case(met(Manner.ANSWERED), Outcome.PROXIED, Status.OK, KEY),
    "no key of the gate": Case(met(Manner.CLOSED), Outcome.REACHED, Status.LEAK, KEY, proof=Proof.HOPS),
    "the right time": Case(met(Manner.ANSWERED, note="+0.020 s"), Outcome.REACHED, Status.OK, CLOCK, expected=True),
    "another time": Case(met(Manner.ANSWERED, note="-61.000 s"), Outcome.REACHED, Status.ODD, CLOCK, expected=True),
    "time from somebody": Case(met(Manner.ANSWERED, note="+0.020 s"), Outcome.REACHED, Status.LEAK, CLOCK),
    "no time, though allowed": Case(met(Manner.NOTHING), Outcome.SLOW, Status.OK, CLOCK, expected=True),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_a_result_means(name: str) -> None:
    case = CASES[name]
    row = judge(
        case.probe, case.heard, case.proof, expected=case.expected, harmless=case.harmless, near=case.near
    )  # fmt: skip

    assert (row.outcome, row.status) == (case.outcome, case.status)


@pytest.mark.parametrize("name", list(CASES))
def test_proof_is_asked_for_wherever_it_changes_the_outcome(name: str) -> None:
    case = CASES[name]
    with_proof, without = (
        judge(case.probe, case.heard, proof, expected=False, harmless=False, near=False).outcome
        for proof in (Proof.HOPS, None)
    )

    assert with_proof is without or needs_proof(case.probe, case.heard)


POLICY = """\
version: 1
workloads:
  app:
    rules:
      - {host: api.example, tls: inspect, allow: ["GET /search/**"]}
      - host: "*.cdn.example"
      - {host: old.example, until: 2020-01-31}
      - {host: closed.example, deny: all}
      - tcp: 203.0.113.0/24:22
      - ntp: time.example
      - {host: odd.example, ports: [8443]}
  silent: {}
"""
NOW = 1_790_000_000.0
EXPECTED = {
    "an address rule": (("tcp://203.0.113.10:22",), True),
    "its other port": (("tcp://203.0.113.10:25",), False),
    "either of two": (("udp://8.8.8.8:53", "dns://x.cdn.example"), True),
    "metadata": (("tcp://169.254.169.254:80",), False),
    "any ntp rule": ((ANY_NTP,), True),
    "a name": (("tls://x.cdn.example:443",), True),
    "a name that nothing names": (("tls://dns.google:443", "tcp://8.8.8.8:443"), False),
    "what cannot be said": (("tcp://[fe80::1%eth0]:53", "nonsense"), False),
    "nothing at all": ((), False),
}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return read(POLICY)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_what_the_policy_allows_is_expected(policy: Policy, name: str) -> None:
    words, expected = EXPECTED[name]
    probe = Probe(id="x", group="dns", what="", kind=Kind.SPEAK, words=words)

    assert is_expected(policy, "app", probe, NOW) is expected
    assert not is_expected(None, "", probe, NOW)
    assert not is_expected(policy, "silent", probe, NOW)


def test_the_policys_own_hosts_stand_in_the_list(policy: Policy) -> None:
    names = fill_in(Names(bytes(64), "x.example"), policy, "app", NOW)

    assert (names.inspected, names.other) == ("api.example", "outgate-verify.cdn.example")
    assert names.veiled == "outgate-verify.cdn.example"
    assert fill_in(Names(bytes(64), "x.example"), policy, "silent", NOW).inspected is None


def test_only_what_is_allowed_now_is_contacted(policy: Policy) -> None:
    assert allowed_hosts(policy, "app", NOW) == [("api.example", 443), ("odd.example", 8443)]
    assert allowed_wildcards(policy, "app", NOW) == ["cdn.example"]
