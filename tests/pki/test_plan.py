"""What an authority asks for, and when. That a step can be done when it is named: `test_rotation_in_any_order`."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from pki.authority import YEAR, Authority, Issuing, Line, Root, create_authority, create_issuing, create_root
from pki.plan import Due, Step, plan
from pki.rotation import SOAK, activate_issuing, activate_root, stage_issuing, stage_root

NOW = datetime(2026, 11, 22, 12, 30, tzinfo=UTC)
LATER = NOW + timedelta(days=30)
AUTHORITY = create_authority(NOW)
(ROOT,), (ISSUING,) = AUTHORITY.roots, AUTHORITY.issuing
STAGED_ROOT = stage_root(AUTHORITY, LATER)
ACTIVATED_ROOT = activate_root(STAGED_ROOT, LATER)
SECOND = timedelta(seconds=1)


def two_thirds(certificate: x509.Certificate) -> datetime:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return start + (end - start) * 2 / 3


def names(authority: Authority, now: datetime = LATER) -> list[str]:
    return [due.step.name for due in plan(authority, now)]


def test_a_ca_is_replaced_after_two_thirds_of_its_life() -> None:
    issuing, root = ISSUING.certificate, ROOT.certificate
    assert plan(AUTHORITY, NOW) == (
        Due(Step.STAGE_ISSUING, issuing, Line.MAIN, two_thirds(issuing), issuing.not_valid_after_utc),
        Due(Step.STAGE_ROOT, root, Line.MAIN, two_thirds(root), root.not_valid_after_utc),
    )


def test_what_is_staged_can_be_activated_and_what_is_retiring_be_retired() -> None:
    assert names(stage_issuing(AUTHORITY, LATER)) == ["ACTIVATE_ISSUING"]
    activated = activate_issuing(stage_issuing(AUTHORITY, LATER), LATER)
    assert names(activated) == ["RETIRE_ISSUING", "STAGE_ISSUING", "STAGE_ROOT"]
    assert names(stage_issuing(activated, LATER)) == ["RETIRE_ISSUING"]  # then the staged one can be activated
    assert names(STAGED_ROOT) == ["ACTIVATE_ROOT"]
    assert names(stage_issuing(STAGED_ROOT, LATER)) == ["ACTIVATE_ROOT"]
    assert names(ACTIVATED_ROOT) == ["RETIRE_ISSUING", "RETIRE_ROOT", "STAGE_ISSUING"]


def test_a_staged_ca_is_late_when_the_present_one_ends() -> None:
    end = ISSUING.certificate.not_valid_after_utc
    for authority in (stage_issuing(AUTHORITY, LATER), STAGED_ROOT):
        (due,) = plan(authority, LATER)
        assert (due.due, due.late) == (LATER, end)


def test_a_root_may_be_retired_after_the_soak_or_when_it_has_expired() -> None:
    (due,) = (due for due in plan(ACTIVATED_ROOT, LATER) if due.step is Step.RETIRE_ROOT)
    assert (due.due, due.late) == (LATER + SOAK, None)
    end = ROOT.certificate.not_valid_after_utc
    near = end - timedelta(days=1)
    late = activate_root(stage_root(AUTHORITY, near), near)
    (due,) = (due for due in plan(late, near) if due.step is Step.RETIRE_ROOT)
    assert due.due == end


def test_a_root_that_the_present_one_did_not_sign_is_activated_after_the_soak() -> None:
    (due,) = plan(stage_root(AUTHORITY, LATER, cross=False), LATER)
    assert (due.step, due.due) == (Step.ACTIVATE_ROOT, LATER + SOAK)


def test_a_root_is_due_where_the_next_issuing_ca_would_end_as_soon() -> None:
    short = create_authority(NOW, root_years=1, issuing_life=YEAR * 2)
    root, issuing = short.trusted[0], short.issuer.certificate
    assert issuing.not_valid_after_utc == root.not_valid_after_utc
    assert plan(short, NOW) == (
        Due(Step.STAGE_ROOT, root, Line.MAIN, two_thirds(issuing), issuing.not_valid_after_utc),
    )
    near = root.not_valid_after_utc - timedelta(days=90)
    clipped = Authority(short.roots, (create_issuing(short.roots[0], near, name="Outgate"),))
    assert names(clipped, near) == ["STAGE_ROOT"]
    assert plan(clipped, near)[0].due < near


def test_each_line_is_planned_for_itself() -> None:
    root = create_root(NOW, name="Outgate", line=Line.RSA)
    both = Authority((ROOT, root), (ISSUING, create_issuing(root, NOW, name="Outgate", life=timedelta(days=30))))
    assert [(due.step, due.line) for due in plan(both, NOW)] == [
        (Step.STAGE_ISSUING, Line.RSA),
        (Step.STAGE_ISSUING, Line.MAIN),
        (Step.STAGE_ROOT, Line.MAIN),
        (Step.STAGE_ROOT, Line.RSA),
    ]
    staged = stage_issuing(both, NOW, line=Line.RSA)
    assert [(due.step, due.line) for due in plan(staged, NOW)] == [
        (Step.ACTIVATE_ISSUING, Line.RSA),
        (Step.STAGE_ISSUING, Line.MAIN),
        (Step.STAGE_ROOT, Line.MAIN),
    ]


def test_a_gate_that_knows_no_roots_is_told_of_its_issuing_ca() -> None:
    assert names(Authority((), AUTHORITY.issuing)) == ["STAGE_ISSUING"]


def test_a_ca_of_somebody_else_is_replaced_by_importing_the_next() -> None:
    corporate = create_root(NOW, name="Corporate")
    between = create_issuing(corporate, NOW, name="Corporate", path_length=1, life=timedelta(days=60))
    below = create_issuing(Root(between.certificate, between.key), NOW, name="Corporate", life=timedelta(days=60))
    issuing = Issuing(below.certificate, below.key, (below.certificate, between.certificate))
    assert names(Authority((replace(corporate, key=None),), (issuing,))) == ["IMPORT", "STAGE_ROOT"]
    assert names(Authority((ROOT,), (issuing,))) == ["IMPORT", "STAGE_ROOT"]


def test_an_issuing_ca_ends_with_what_stands_above_it() -> None:
    corporate = create_root(NOW, name="Corporate")
    between = create_issuing(corporate, NOW, name="Corporate", path_length=1, life=timedelta(days=60))
    longer = create_issuing(replace(corporate, certificate=between.certificate, key=between.key), NOW, name="Corporate")
    renewed = create_issuing(corporate, NOW, name="Corporate", path_length=1, key=between.key, life=timedelta(days=20))
    issuing = Issuing(longer.certificate, longer.key, (longer.certificate, renewed.certificate))
    (due,) = (due for due in plan(Authority((corporate,), (issuing,)), NOW) if due.step is Step.IMPORT)
    assert due.late == renewed.certificate.not_valid_after_utc < longer.certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("authority", "due"),
    [
        pytest.param(AUTHORITY, None, id="by its age"),
        pytest.param(ACTIVATED_ROOT, LATER, id="its root goes"),
    ],
)
def test_a_ca_given_to_another_system_is_made_again(authority: Authority, due: datetime | None) -> None:
    given = create_issuing(ROOT, NOW, name="Firewall", path_length=1).certificate
    (found,) = (due for due in plan(replace(authority, given=(given,)), LATER) if due.step is Step.EXPORT)
    assert found == Due(Step.EXPORT, given, Line.MAIN, due or two_thirds(given), given.not_valid_after_utc)


def test_the_earliest_step_comes_first() -> None:
    for authority in (AUTHORITY, ACTIVATED_ROOT, STAGED_ROOT):
        found = [due.due for due in plan(authority, NOW)]
        assert found == sorted(found)
