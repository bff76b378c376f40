"""What is to be done about an authority, and when. It reads no clock, needs no key, and does none of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from cryptography import x509

from pki.authority import Line, State
from pki.chains import Ca, is_crossed, is_signed_by, own_chain, root_above
from pki.rotation import SOAK


class Cas(Protocol):
    """An `Authority`, or what can be seen of one without its keys."""

    @property
    def roots(self) -> Sequence[Ca]: ...
    @property
    def issuing(self) -> Sequence[Ca]: ...
    @property
    def given(self) -> Sequence[x509.Certificate]: ...


class Step(StrEnum):
    """What to do: the arguments of `outgate pki`."""

    STAGE_ISSUING = "rotate issuing --stage"
    ACTIVATE_ISSUING = "rotate issuing --activate"
    RETIRE_ISSUING = "rotate issuing --retire"
    STAGE_ROOT = "rotate root --stage"
    ACTIVATE_ROOT = "rotate root --activate"
    RETIRE_ROOT = "rotate root --retire"
    IMPORT = "import"
    EXPORT = "export"


@dataclass(frozen=True, slots=True)
class Due:
    """A step, and the CA that it is about.

    due   from when on it is to be done, or can be done
    late  from when on clients refuse what stands below the CA; None: they never do for want of this step
    """

    step: Step
    ca: x509.Certificate
    line: Line
    due: datetime
    late: datetime | None = None


def plan(cas: Cas, now: datetime) -> tuple[Due, ...]:
    """What comes next for each CA, the earliest first. A step that must follow another one is not in it yet.

    A CA is replaced after two thirds of its life. An issuing CA that had to be made shorter to fit its root would be
    followed by one that ends as soon: there the root is due. Of a gate's authority, which has no roots, only what its
    issuing CAs need is told.
    """
    steps = sorted([*_issuing_steps(cas), *_root_steps(cas, now), *_given_steps(cas)], key=lambda step: step.due)
    first = {(step.step, step.ca): step for step in reversed(steps)}  # a root is due once, for whichever reason first
    return tuple(step for step in steps if first[step.step, step.ca] is step)


def _issuing_steps(cas: Cas) -> Iterator[Due]:
    for one in cas.issuing:
        if one.state is State.RETIRING:
            yield Due(Step.RETIRE_ISSUING, one.certificate, one.line, _since(one))
        elif one.state is State.STAGED:
            root = root_above(cas.roots, one)
            if (root is None or root.state is not State.STAGED) and not _is_retiring(cas.issuing, one.line):
                late = _end_of_line(cas, one.line)
                yield Due(Step.ACTIVATE_ISSUING, one.certificate, one.line, _since(one), late)
        elif not _is_staged(cas, one.line):
            yield _replacement(cas, one)


def _replacement(cas: Cas, issuing: Ca) -> Due:
    """How an active issuing CA is to be replaced."""
    certificate, root, end = issuing.certificate, root_above(cas.roots, issuing), _end(cas, issuing)
    due = two_thirds(certificate, end)
    if root is not None and end == root.certificate.not_valid_after_utc:
        return Due(Step.STAGE_ROOT, root.certificate, issuing.line, due, end)
    # What stands between it and its root was made by somebody else, as was the root where it is not here.
    is_foreign = len(own_chain(cas.roots, issuing)) > 1 or (root is None and len(cas.roots) > 0)
    return Due(Step.IMPORT if is_foreign else Step.STAGE_ISSUING, certificate, issuing.line, due, end)


def _root_steps(cas: Cas, now: datetime) -> Iterator[Due]:
    for root in cas.roots:
        certificate, end = root.certificate, root.certificate.not_valid_after_utc
        if root.state is State.RETIRING:
            yield Due(Step.RETIRE_ROOT, certificate, root.line, min(_since(root) + SOAK, end))
        elif root.state is State.STAGED:
            if not _is_retiring(cas.issuing, root.line):
                possible = _since(root) if is_crossed(cas.roots, root, now) else _since(root) + SOAK
                yield Due(Step.ACTIVATE_ROOT, certificate, root.line, possible, _end_of_line(cas, root.line))
        elif not _is_staged(cas, root.line) and not _is_retiring(cas.roots, root.line):
            yield Due(Step.STAGE_ROOT, certificate, root.line, two_thirds(certificate, end), end)


def _given_steps(cas: Cas) -> Iterator[Due]:
    for certificate in cas.given:
        root = next((one for one in cas.roots if is_signed_by(certificate, one.certificate)), None)
        end = certificate.not_valid_after_utc
        due = two_thirds(certificate, end)
        if root is not None and root.state is State.RETIRING:
            due = min(due, _since(root))
        yield Due(Step.EXPORT, certificate, root.line if root else Line.MAIN, due, end)


def _end(cas: Cas, issuing: Ca) -> datetime:
    """When the first CA above a leaf ends."""
    root = root_above(cas.roots, issuing)
    path = [*own_chain(cas.roots, issuing), *([root.certificate] if root else [])]
    return min(certificate.not_valid_after_utc for certificate in path)


def _end_of_line(cas: Cas, line: Line) -> datetime | None:
    ends = [_end(cas, one) for one in cas.issuing if one.line is line and one.state is State.ACTIVE]
    return max(ends, default=None)


def _is_staged(cas: Cas, line: Line) -> bool:
    return any(ca.line is line and ca.state is State.STAGED for ca in (*cas.roots, *cas.issuing))


def _is_retiring(cas: Sequence[Ca], line: Line) -> bool:
    return any(ca.line is line and ca.state is State.RETIRING for ca in cas)


def _since(ca: Ca) -> datetime:
    return ca.since or ca.certificate.not_valid_before_utc


def two_thirds(certificate: x509.Certificate, end: datetime) -> datetime:
    """When it is to be replaced. What is left of a year is four months, in which somebody will have time."""
    start = certificate.not_valid_before_utc
    return start + (end - start) * 2 / 3
