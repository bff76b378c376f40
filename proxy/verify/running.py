"""All probes at once, within one deadline, and the rows that come of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from policies.index import Policy
from proxy.verify.attempts import attempt, become, show_certificate
from proxy.verify.judging import is_expected, judge, needs_proof
from proxy.verify.model import Heard, Kind, Manner, Patience, Probe, Proof, Row
from proxy.verify.place import Place
from proxy.verify.proof import Witness, measure

AT_ONCE = 96  # every row: the slowest alone says how long it takes
WHOLE_S = 18.0  # for everything, so that the command ends within 20 s
ANSWERS = 4  # what was accepted is waited on so many times longer: a gate may be starting its inspector
GATE_UID = 1337  # as docs/service.md has it; where the kernel shows the gate's socket, its owner


@dataclass(frozen=True, slots=True)
class Order:
    """What to verify: the probes, the policy they are held against, and how the gate is known.

    gate  where it listens, by which its distance is measured; None: it is the first router, or on this machine
    root  a file with its root; None: no certificate is asked for
    """

    probes: Sequence[Probe]
    place: Place
    policy: Policy | None
    workload: str
    timeout_s: float
    gate: tuple[str, int] | None = None
    root: str | None = None


@dataclass(frozen=True, slots=True)
class _Met:
    probe: Probe
    heard: Heard
    proof: Proof | None
    near: bool
    elapsed_ms: int


def run(order: Order) -> list[Row]:
    """A row for each probe, in their order. No thread may be running; those it starts have ended."""
    now = time.time()
    patience = Patience(order.timeout_s, ANSWERS * order.timeout_s, time.monotonic() + WHOLE_S)
    witness = _find_witness(order, patience)
    early = [probe for probe in order.probes if probe.kind is Kind.CERTIFICATE]
    late = [probe for probe in order.probes if probe.kind is Kind.SETUID]  # it forks, which no thread may see
    met: list[_Met] = []
    for probe in early:
        assert order.root is not None
        heard = show_certificate(probe, order.root, patience, witness.hops if _may_limit(order, witness) else None)
        witness = Witness(order.place, witness.hops, has_no_key=heard.manner is not Manner.ANSWERED)
        met.append(_Met(probe, heard, None, near=False, elapsed_ms=0))

    def meet(probe: Probe) -> _Met:
        began = time.monotonic()
        heard = attempt(probe, patience)
        asked = needs_proof(probe, heard)
        proof = witness.prove(probe, heard, patience) if asked else None
        near = asked and proof is None and witness.is_neighbour(probe)
        return _Met(probe, heard, proof, near, round(1000 * (time.monotonic() - began)))

    rest = [probe for probe in order.probes if probe not in early and probe not in late]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        met += pool.map(meet, rest)
    harmless = order.place.is_closed or _is_elsewhere(met)
    met += [_Met(probe, _try_uid(order, met, harmless=harmless), None, near=False, elapsed_ms=0) for probe in late]

    rows = {
        one.probe.id: judge(
            one.probe, one.heard, one.proof, near=one.near, harmless=harmless, elapsed_ms=one.elapsed_ms,
            expected=is_expected(order.policy, order.workload, one.probe, now),
        )
        for one in met
    }  # fmt: skip
    return [rows[probe.id] for probe in order.probes]


def _find_witness(order: Order, patience: Patience) -> Witness:
    if order.gate is None or order.place.is_closed:
        return Witness(order.place)
    return Witness(order.place, measure(order.gate, patience))


def _may_limit(order: Order, witness: Witness) -> bool:
    return not order.place.is_closed and witness.hops is not None


def _is_elsewhere(met: Collection[_Met]) -> bool:
    """Whether the gate is another machine, so that nothing this workload may do here leads round it. Only its words
    show that: this machine's own rules send resets too, and any router may close a connection."""
    is_there = any(one.proof is Proof.HOPS and one.heard.manner is Manner.ANSWERED for one in met)
    return is_there and all(one.proof is not Proof.MACHINE for one in met)


def _try_uid(order: Order, met: Iterable[_Met], *, harmless: bool) -> Heard:
    if order.place.is_closed:
        return Heard(Manner.REFUSED, note="no device leads outside, for any user")
    if harmless:
        return Heard(Manner.ABSENT, note="the gate is another machine's")
    owner = next((one.heard.uid for one in met if one.proof is Proof.MACHINE and one.heard.uid is not None), GATE_UID)
    return become(owner)
