"""A verification as rows for people, as JSON and as JUnit's XML. `docs/verify.md` describes the last two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from proxy.verify.model import Outcome, Probe, Proof, Row, Status
from proxy.verify.probes import GROUPS

if TYPE_CHECKING:
    from proxy.console import Cell, Console

type Json = dict[str, object]

_FIRST = (Status.LEAK, Status.FAILED, Status.ODD, Status.OK)
_XML_GAPS = {code: None for code in range(32) if code not in (9, 10)}  # XML 1.0 has no such characters


def where_is_gate(rows: Iterable[Row]) -> str:
    """In one word, by the strongest proof: `namespace`, `machine`, `hops`, `control`, or `unseen`."""
    proofs = {row.proof for row in rows}
    return next((proof.value for proof in Proof if proof in proofs), "unseen")


# --- for people


def show(console: Console, rows: Sequence[Row], workload: str | None, elapsed_s: float) -> None:
    """Leaks first, each with what it means and what closes it; then all rows; then the sum."""
    leaks = [row for row in rows if row.status is Status.LEAK]
    for group in dict.fromkeys(row.probe.group for row in leaks):
        _show_leaks(console, group, [row for row in leaks if row.probe.group == group])
    ordered = sorted(rows, key=lambda row: _FIRST.index(row.status))
    console.rows([_row(row) for row in ordered])
    console.blank()
    _show_sum(console, rows, workload, elapsed_s)


def _show_leaks(console: Console, group: str, leaks: Sequence[Row]) -> None:
    from proxy.console import Style

    console.line(("LEAK", Style.BAD), "  ", (", ".join(row.probe.id for row in leaks), Style.STRONG))
    console.rows(
        [[("means", Style.DIM), GROUPS[group].means], [("repair", Style.DIM), GROUPS[group].closes]], indent=2
    )  # fmt: skip
    console.blank()


def _row(row: Row) -> list[Cell]:
    from proxy.console import Style

    styles = {Status.LEAK: Style.BAD, Status.FAILED: Style.BAD, Status.ODD: Style.WARN, Status.OK: Style.GOOD}
    proof = f"by {row.proof}" if row.proof and row.outcome is Outcome.PROXIED else ""
    expected = "allowed" if row.expected else ""
    detail = ", ".join(filter(None, (expected, proof, row.detail)))
    shown = row.outcome.value
    return [(row.status.value, styles[row.status]), row.probe.id, shown, row.probe.target, (detail, Style.DIM)]


def _show_sum(console: Console, rows: Sequence[Row], workload: str | None, elapsed_s: float) -> None:
    from proxy.console import Style

    counts = Counter(row.status for row in rows)
    leaks = counts[Status.LEAK]
    verdict = (f"{leaks} leak" + "s" * (leaks != 1), Style.BAD) if leaks else ("no leaks", Style.GOOD)
    more = [f"{counts[status]} {what}" for status, what in ((Status.FAILED, "not tried"), (Status.ODD, "odd"))
            if counts[status]]  # fmt: skip
    whose = f"as {workload}" if workload else "without a policy: nothing is expected to be reached"
    console.line(verdict, f" in {len(rows)} rows, {whose}; {', '.join([*more, f'{elapsed_s:.1f} s'])}")


def show_plan(console: Console, probes: Iterable[Probe]) -> None:
    """What would be sent, row by row."""
    from proxy.console import Style

    rows: list[list[Cell]] = [
        [(probe.id, Style.STRONG), probe.target, (probe.absent or probe.sends, Style.DIM)] for probe in probes
    ]
    console.rows(rows)
    console.blank()
    console.line("nothing was sent", (f"; {AGAIN}", Style.DIM))


AGAIN = "a refusal that is not this machine's is asked for once more, with packets that live no longer than to the gate"


# --- for machines


def plan_json(probes: Iterable[Probe]) -> list[Json]:
    return [
        {
            "id": probe.id,
            "group": probe.group,
            "what": probe.what,
            "to": probe.target,
            "sends": probe.sends,
            "bytes": [message.hex() for message in probe.say],
            "absent": probe.absent,
        }
        for probe in probes
    ]


def to_json(rows: Sequence[Row], workload: str | None, elapsed_s: float) -> Json:
    counts = Counter(row.status for row in rows)
    return {
        "ok": not counts[Status.LEAK] and not counts[Status.FAILED],
        "workload": workload,
        "gate": where_is_gate(rows),
        "seconds": round(elapsed_s, 2),
        "counts": {status.value: counts[status] for status in Status},
        "rows": [_row_json(row) for row in rows],
    }


def _row_json(row: Row) -> Json:
    probe, group = row.probe, GROUPS[row.probe.group]
    is_leak = row.status is Status.LEAK
    return {
        "id": probe.id,
        "group": probe.group,
        "what": probe.what,
        "to": probe.target,
        "sends": probe.sends,
        "outcome": row.outcome.value,
        "status": row.status.value,
        "allowed": row.expected,
        "detail": row.detail,
        "proof": row.proof.value if row.proof else None,
        "decision": row.decision,
        "milliseconds": row.elapsed_ms,
        "means": group.means if is_leak else None,
        "repair": group.closes if is_leak else None,
    }


def to_junit(rows: Sequence[Row], elapsed_s: float) -> str:
    """One test case a row: a leak is a failure, what could not be tried an error, what is absent skipped."""
    counts = Counter(row.status for row in rows)
    absent = sum(row.outcome is Outcome.ABSENT for row in rows)
    cases = "".join(map(_case, rows))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuite name="outgate verify" tests="{len(rows)}" failures="{counts[Status.LEAK]}" '
        f'errors="{counts[Status.FAILED]}" skipped="{absent}" time="{elapsed_s:.3f}">\n{cases}</testsuite>\n'
    )


def _case(row: Row) -> str:
    probe, said = row.probe, _text(f"{row.outcome}: {row.probe.target}, {row.detail}")
    head = f'  <testcase classname="verify.{probe.group}" name={quoteattr(probe.id)} time="{row.elapsed_ms / 1000:.3f}"'
    if row.status is Status.LEAK:
        group = GROUPS[probe.group]
        inner = f"<failure message={quoteattr(said)}>{escape(f'{group.means}; {group.closes}')}</failure>"
    elif row.status is Status.FAILED:
        inner = f"<error message={quoteattr(said)}/>"
    elif row.outcome is Outcome.ABSENT:
        inner = f"<skipped message={quoteattr(said)}/>"
    else:
        inner = f"<system-out>{escape(said)}</system-out>"
    return f"{head}>{inner}</testcase>\n"


def _text(said: str) -> str:
    return said.translate(_XML_GAPS)
