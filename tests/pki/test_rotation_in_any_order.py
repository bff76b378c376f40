"""The steps of a rotation in any order, with the clock moving: what must hold whatever an operator does.

A walk has two lines. Time passes by hours or by years, so that CAs also end in the middle of a step.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from cryptography import x509
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pki.authority import (
    Authority,
    AuthorityError,
    Issuing,
    Line,
    Root,
    State,
    create_authority,
    create_issuing,
    create_root,
    is_ending,
)
from pki.chains import is_self_signed, is_signed_by, own_chain
from pki.plan import Step, plan
from pki.rotation import (
    SOAK,
    NotNow,
    activate_issuing,
    activate_root,
    retire_issuing,
    retire_root,
    root_of,
    stage_foreign,
    stage_issuing,
    stage_root,
    unstage,
)
from tests.pki.oracle import is_trusted

NOW = datetime(2026, 11, 22, 12, 30, tzinfo=UTC)
LINES = st.sampled_from(Line) | st.none()


def corporate(now: datetime, line: Line, between: int) -> tuple[Issuing, list[x509.Certificate]]:
    """An issuing CA below `between` others and a corporate root, and what goes with it in no order."""
    above = create_root(now, name="Corporate", years=4)
    pile = [above.certificate]
    for depth in range(between, 0, -1):
        one = create_issuing(above, now, name="Corporate", path_length=depth)
        pile.append(one.certificate)
        above = Root(one.certificate, one.key)
    return replace(create_issuing(above, now, name="Corporate"), line=line), pile


class Walk(RuleBasedStateMachine):
    """What an operator may do, and what every client must see meanwhile.

    published  the roots of each trust bundle, and since when; a workload may have the one of a SOAK ago
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        main = create_authority(NOW, root_years=4)
        root = create_root(NOW, name="Outgate", years=4, line=Line.RSA)
        self.authority = Authority((*main.roots, root), (*main.issuing, create_issuing(root, NOW, name="Outgate")))
        self.published = [(NOW, self.authority.roots)]

    def _try(self, step: Callable[[], Authority], *, may_lose: State | None = None) -> None:
        """Does it, unless it is refused. Only what was in the state `may_lose` may be gone afterwards."""
        before = self.authority
        try:
            after = step()
        except AuthorityError:
            assert self.authority == before
            return
        left = {*after.trusted, *(one.certificate for one in after.issuing)}
        cas: tuple[Root | Issuing, ...] = (*before.roots, *before.issuing)
        lost = [ca for ca in cas if ca.certificate not in left]
        assert all(ca.state is may_lose for ca in lost)
        self.authority = after
        self.published.append((self.now, after.roots))

    # What an operator does

    @rule(line=LINES)
    def stage_issuing(self, line: Line | None) -> None:
        self._try(lambda: stage_issuing(self.authority, self.now, line=line))

    @rule()
    def activate_issuing(self) -> None:
        self._try(lambda: activate_issuing(self.authority, self.now))

    @rule()
    def retire_issuing(self) -> None:
        self._try(lambda: retire_issuing(self.authority), may_lose=State.RETIRING)

    @rule(line=LINES, cross=st.booleans())
    def stage_root(self, line: Line | None, cross: bool) -> None:
        self._try(lambda: stage_root(self.authority, self.now, line=line, years=4, cross=cross))

    @rule(line=st.sampled_from(Line), between=st.integers(0, 1), cross=st.booleans())
    def stage_foreign(self, line: Line, between: int, cross: bool) -> None:
        issuing, pile = corporate(self.now, line, between)
        self._try(lambda: stage_foreign(self.authority, issuing, pile, self.now, cross=cross))

    @rule(index=st.integers(0, 3))
    def stage_foreign_below_a_known_root(self, index: int) -> None:
        root = self.authority.roots[index % len(self.authority.roots)]
        self._try(lambda: stage_foreign(self.authority, create_issuing(root, self.now, name="By hand"), [], self.now))

    @rule()
    def activate_root(self) -> None:
        self._try(lambda: activate_root(self.authority, self.now))

    @rule()
    def retire_root(self) -> None:
        self._try(lambda: retire_root(self.authority, self.now), may_lose=State.RETIRING)

    @rule()
    def unstage(self) -> None:
        self._try(lambda: unstage(self.authority), may_lose=State.STAGED)

    @rule(index=st.integers(0, 3))
    def put_a_root_key_away(self, index: int) -> None:
        roots = list(self.authority.roots)
        roots[index % len(roots)] = replace(roots[index % len(roots)], key=None)
        self.authority = replace(self.authority, roots=tuple(roots))

    @rule(hours=st.sampled_from([1, 24, 3 * 24, 7 * 24, 30 * 24, 365 * 24, 4 * 365 * 24]))
    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)
        ended = [since for since, _ in self.published[1:]]
        late = [bundle for bundle, end in zip(self.published, ended, strict=False) if end > self.now - SOAK]
        self.published = [*late, self.published[-1]]

    # What must hold

    @invariant()
    def each_line_has_one_ca_of_a_kind_in_each_state(self) -> None:
        for cas in (self.authority.roots, self.authority.issuing):
            places = [(ca.line, ca.state) for ca in cas]
            assert len(places) == len(set(places))
        assert [one.line for one in self.authority.issuers] == [Line.MAIN, Line.RSA]

    @invariant()
    def an_issuing_ca_stands_below_a_root_of_its_line_that_is_as_far(self) -> None:
        for one in self.authority.issuing:
            root = root_of(self.authority, one)
            assert root is not None
            assert root.line is one.line
            assert (one.state is not State.ACTIVE) or root.state is State.ACTIVE

    @invariant()
    def a_chain_is_in_order_and_has_no_root_and_nothing_twice(self) -> None:
        for one in self.authority.issuing:
            assert one.chain[0] == one.certificate
            assert not any(is_self_signed(certificate) for certificate in one.chain)
            assert len(set(one.chain)) == len(one.chain)
            assert all(is_signed_by(below, above) for below, above in pairwise(one.chain))

    @invariant()
    def a_root_alone_suffices_if_it_is_the_issuers_or_has_signed_that(self) -> None:
        for one, own in self._working():
            for root in self.authority.roots:
                if root.line is not one.line:
                    continue
                suffices = root == own or any(is_signed_by(cross, root.certificate) for cross in own.crosses)
                assert is_trusted(one, root.certificate, at=self.now) == (suffices and self._is_current(root))

    @invariant()
    def no_workload_with_a_late_bundle_loses_us(self) -> None:
        """Unless all that was in use when it got the bundle has expired: no step can help it then."""
        for one, _ in self._working():
            for _, bundle in self.published:
                in_use = [root for root in bundle if root.line is one.line and root.state is not State.STAGED]
                if any(self._is_current(root) for root in in_use):
                    assert is_trusted(one, *(root.certificate for root in bundle), at=self.now)

    @invariant()
    def what_the_plan_says_can_be_done_can_be_done(self) -> None:
        steps: dict[Step, Callable[[], Authority]] = {
            Step.ACTIVATE_ISSUING: lambda: activate_issuing(self.authority, self.now),
            Step.RETIRE_ISSUING: lambda: retire_issuing(self.authority),
            Step.ACTIVATE_ROOT: lambda: activate_root(self.authority, self.now),
            Step.RETIRE_ROOT: lambda: retire_root(self.authority, self.now),
        }
        due = {one.step for one in plan(self.authority, self.now) if one.due <= self.now}
        for step, do in steps.items():
            assert _is_in_turn(do) == (step in due), step

    def _working(self) -> list[tuple[Issuing, Root]]:
        """The issuing CAs that can sign, each with its root."""
        found = [(one, root) for one in self.authority.issuers if (root := root_of(self.authority, one))]
        above = {one.certificate: (*own_chain(self.authority.roots, one), root.certificate) for one, root in found}
        return [pair for pair in found if not any(is_ending(ca, self.now) for ca in above[pair[0].certificate])]

    def _is_current(self, root: Root) -> bool:
        return root.certificate.not_valid_before_utc <= self.now <= root.certificate.not_valid_after_utc


def _is_in_turn(step: Callable[[], Authority]) -> bool:
    """Whether a step fits the state, be it that a key is wanted for it."""
    try:
        step()
    except NotNow:
        return False
    except AuthorityError:
        pass
    return True


TestWalk = Walk.TestCase
TestWalk.settings = settings(deadline=None, max_examples=20, stateful_step_count=25)
