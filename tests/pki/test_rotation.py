"""Each step of a rotation, what it refuses, and what it leaves. `test_rotation_in_any_order` is what its name says."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from pki.authority import (
    YEAR,
    Authority,
    AuthorityError,
    CaKey,
    Issuing,
    KeyKind,
    Line,
    Root,
    State,
    certificate_id,
    create_authority,
    create_issuing,
    create_key,
    create_root,
    issue_leaf,
)
from pki.chains import is_signed_by, path_from
from pki.constraints import constraints_of, permitted_domains
from pki.profile import digest_for, unsigned_ca
from pki.rotation import (
    SOAK,
    NotNow,
    activate_issuing,
    activate_root,
    kind_of,
    retire_issuing,
    retire_root,
    root_of,
    stage_foreign,
    stage_issuing,
    stage_root,
    unstage,
    with_root_key,
)
from tests.pki.oracle import is_trusted
from tests.pki.test_authority import Token

NOW = datetime(2026, 11, 22, 12, 30, tzinfo=UTC)
LATER = NOW + timedelta(days=30)
AUTHORITY = create_authority(NOW, name="Example Corp")
STAGED_ROOT = stage_root(AUTHORITY, LATER)
ACTIVATED_ROOT = activate_root(STAGED_ROOT, LATER)


def two_lines() -> Authority:
    """An authority with two lines. Both have EC keys, since making RSA ones takes long."""
    main = create_authority(NOW, name="Example Corp")
    root = create_root(NOW, name="Example Corp", line=Line.RSA)
    return Authority((*main.roots, root), (*main.issuing, create_issuing(root, NOW, name="Example Corp")))


def offline(authority: Authority) -> Authority:
    return replace(authority, roots=tuple(replace(root, key=None) for root in authority.roots))


def states(authority: Authority) -> tuple[list[str], list[str]]:
    return [root.state for root in authority.roots], [one.state for one in authority.issuing]


# Issuing CAs


def test_a_staged_issuing_ca_signs_nothing_and_an_active_one_does() -> None:
    staged = stage_issuing(AUTHORITY, LATER)
    assert states(staged) == (["active"], ["active", "staged"])
    assert staged.issuers == AUTHORITY.issuers
    active = activate_issuing(staged, LATER)
    assert states(active) == (["active"], ["retiring", "active"])
    assert [one.since for one in active.issuing] == [LATER, LATER]
    assert active.issuer.certificate == staged.issuing[1].certificate
    assert is_trusted(active.issuer, *active.trusted, at=LATER)
    assert retire_issuing(active).issuing == active.issuing[1:]


def test_an_issuing_ca_is_followed_by_one_of_its_kind() -> None:
    authority = create_authority(NOW, name="Example Corp", permitted=["a.example", "b.example"])
    (_, following) = stage_issuing(authority, LATER).issuing
    assert constraints_of(following.certificate) == constraints_of(authority.issuer.certificate)
    assert following.certificate.subject != authority.issuer.certificate.subject
    assert "O=Example Corp" in following.certificate.subject.rfc4514_string()
    assert following.line is Line.MAIN


@pytest.mark.parametrize(("permitted", "found"), [([], None), (["c.example"], ("c.example",))])
def test_constraints_are_replaced_or_lifted_if_it_is_said(permitted: list[str], found: tuple[str] | None) -> None:
    authority = create_authority(NOW, permitted=["a.example"])
    (_, following) = stage_issuing(authority, LATER, permitted=permitted).issuing
    assert permitted_domains(following.certificate) == found


def test_foreign_constraints_are_carried_over_whole() -> None:
    limits = x509.NameConstraints(None, [x509.DNSName("internal.example"), x509.RFC822Name("example.com")])
    root = AUTHORITY.roots[0]
    authority = Authority((root,), (create_issuing(root, NOW, name="Corporate", permitted=limits),))
    assert constraints_of(stage_issuing(authority, LATER).issuing[1].certificate) == limits
    assert constraints_of(activate_root(stage_root(authority, LATER), LATER).issuer.certificate) == limits


def test_an_issuing_ca_takes_the_key_and_the_life_it_is_given() -> None:
    key = create_key(KeyKind.EC_P256)
    (_, following) = stage_issuing(AUTHORITY, LATER, key=key, life=timedelta(days=90)).issuing
    assert following.key is key
    assert following.certificate.not_valid_after_utc < LATER + timedelta(days=90)


def test_each_line_gets_an_issuing_ca_and_a_key_is_for_the_main_one() -> None:
    key = create_key(KeyKind.EC_P256)
    authority = activate_issuing(stage_issuing(two_lines(), LATER, key=key), LATER)
    assert [one.line for one in authority.issuers] == [Line.MAIN, Line.RSA]
    assert [one.key is key for one in authority.issuers] == [True, False]
    assert [root_of(authority, one) for one in authority.issuers] == list(authority.roots)


def test_one_line_can_go_alone() -> None:
    authority = two_lines()
    alone = stage_issuing(authority, LATER, line=Line.RSA)
    assert [(one.line, one.state) for one in alone.issuing[2:]] == [(Line.RSA, State.STAGED)]
    both = stage_issuing(alone, LATER, line=Line.MAIN)
    active = activate_issuing(both, LATER)
    assert states(active)[1] == ["retiring", "retiring", "active", "active"]
    with pytest.raises(AuthorityError, match="no issuing CA is in use in the rsa line"):
        stage_issuing(AUTHORITY, LATER, line=Line.RSA)


def test_an_rsa_authority_is_followed_by_rsa() -> None:
    root = create_root(NOW, name="Example Corp", key=CORPORATE_KEY)
    below = create_issuing(root, NOW, name="Example Corp", key=rsa.generate_private_key(65537, 2048))
    authority = Authority((root,), (below,))
    following = activate_root(stage_root(authority, LATER), LATER)
    assert [kind_of(c) for c in (following.trusted[1], following.issuer.certificate)] == [KeyKind.RSA_3072] * 2


# Roots


def test_a_staged_root_is_trusted_and_changes_nothing_else() -> None:
    assert states(STAGED_ROOT) == (["active", "staged"], ["active"])
    assert STAGED_ROOT.trusted[0] == AUTHORITY.trusted[0]
    assert [one.certificate for one in STAGED_ROOT.issuing] == [AUTHORITY.issuer.certificate]


def test_a_following_root_of_the_same_name_has_another_subject() -> None:
    old, new = STAGED_ROOT.trusted
    assert old.subject != new.subject
    assert "O=Example Corp" in new.subject.rfc4514_string()


def test_an_activated_root_signs_and_the_one_before_is_retiring() -> None:
    assert states(ACTIVATED_ROOT) == (["retiring", "active"], ["retiring", "active"])
    assert root_of(ACTIVATED_ROOT, ACTIVATED_ROOT.issuer) == ACTIVATED_ROOT.roots[1]
    assert {root.since for root in ACTIVATED_ROOT.roots} == {LATER}


@pytest.mark.parametrize("authority", [STAGED_ROOT, ACTIVATED_ROOT], ids=["staged", "activated"])
@pytest.mark.parametrize("trusted", [[0], [1], [0, 1]], ids=["old root alone", "new root alone", "both roots"])
def test_clients_with_any_of_the_roots_find_a_path(authority: Authority, trusted: list[int]) -> None:
    assert is_trusted(authority.issuer, *(authority.trusted[index] for index in trusted), at=LATER)


@pytest.mark.parametrize("authority", [STAGED_ROOT, ACTIVATED_ROOT], ids=["staged", "activated"])
def test_each_certificate_of_a_chain_is_signed_by_the_next(authority: Authority) -> None:
    for issuing in authority.issuing:
        leaf = issue_leaf(issuing, "a.example", LATER)
        sent = [leaf.certificate, *leaf.chain]
        assert len(sent) == 3
        assert all(is_signed_by(one, above) for one, above in pairwise(sent))


def test_what_the_old_root_signs_is_soon_nothing_to_who_trusts_the_new_one_alone() -> None:
    (back,) = STAGED_ROOT.roots[0].crosses
    (ahead,) = STAGED_ROOT.roots[1].crosses
    assert back.not_valid_after_utc == AUTHORITY.issuer.certificate.not_valid_after_utc
    assert ahead.not_valid_after_utc == AUTHORITY.trusted[0].not_valid_after_utc


def test_a_retired_root_leaves_no_trace() -> None:
    left = retire_root(ACTIVATED_ROOT, LATER + SOAK)
    assert (left.roots, left.issuing) == (
        (replace(ACTIVATED_ROOT.roots[1], crosses=()),),
        (replace(ACTIVATED_ROOT.issuing[1], chain=(ACTIVATED_ROOT.issuer.certificate,)),),
    )
    assert not is_trusted(left.issuer, AUTHORITY.trusted[0], at=LATER)


def test_a_root_is_retired_when_workloads_had_time_for_the_next_one() -> None:
    almost = LATER + SOAK - timedelta(seconds=1)
    with pytest.raises(NotNow, match="since 2026-12-22 12:30 UTC, and they are given 7 days"):
        retire_root(ACTIVATED_ROOT, almost)
    assert retire_root(ACTIVATED_ROOT, almost, soak=timedelta(0)) == retire_root(ACTIVATED_ROOT, LATER + SOAK)
    unknown = replace(ACTIVATED_ROOT, roots=tuple(replace(root, since=None) for root in ACTIVATED_ROOT.roots))
    with pytest.raises(NotNow, match="nobody knows when"):
        retire_root(unknown, LATER + SOAK)


def test_a_root_that_has_expired_waits_for_nothing() -> None:
    end = AUTHORITY.trusted[0].not_valid_after_utc
    near = end - timedelta(days=2)
    authority = replace(AUTHORITY, issuing=(create_issuing(AUTHORITY.roots[0], near, name="Example Corp"),))
    activated = activate_root(stage_root(authority, near), near)
    with pytest.raises(NotNow):
        retire_root(activated, end - timedelta(seconds=1))
    assert is_trusted(retire_root(activated, end).issuer, *activated.trusted, at=end)


def test_an_expired_root_is_replaced_without_its_signature() -> None:
    at = AUTHORITY.trusted[0].not_valid_after_utc + timedelta(days=1)
    staged = stage_root(AUTHORITY, at)
    assert [root.crosses for root in staged.roots] == [(), ()]
    activated = activate_root(staged, at)
    assert is_trusted(activated.issuer, *activated.trusted, at=at)
    assert len(retire_root(activated, at).roots) == 1


def test_a_root_over_an_expired_issuing_ca_is_replaced() -> None:
    at = NOW + YEAR * 2
    activated = activate_root(stage_root(AUTHORITY, at), at)
    assert all(is_trusted(activated.issuer, root, at=at) for root in activated.trusted)


def test_roots_of_both_lines_are_replaced_and_sign_within_their_line() -> None:
    staged = stage_root(two_lines(), LATER)
    assert [root.line for root in staged.roots] == [Line.MAIN, Line.RSA, Line.MAIN, Line.RSA]
    assert [len(root.crosses) for root in staged.roots] == [1, 1, 1, 1]
    activated = activate_root(staged, LATER)
    for issuing in activated.issuers:
        roots = [root.certificate for root in activated.roots if root.line is issuing.line]
        assert [is_trusted(issuing, root, at=LATER) for root in roots] == [True, True]
    assert states(retire_root(activated, LATER + SOAK)) == (["active", "active"], ["active", "active"])


def test_the_next_issuing_ca_can_be_staged_below_the_next_root() -> None:
    staged = stage_issuing(STAGED_ROOT, LATER, permitted=["a.example"])
    assert root_of(staged, staged.issuing[1]) == staged.roots[1]
    activated = activate_root(offline(staged), LATER)  # no root's key is needed any more
    assert activated.issuer.certificate == staged.issuing[1].certificate
    assert states(activated) == (["retiring", "active"], ["retiring", "active"])


def test_a_ca_given_to_another_system_holds_its_root() -> None:
    given = create_issuing(AUTHORITY.roots[0], NOW, name="Firewall", path_length=1).certificate
    activated = activate_root(stage_root(replace(AUTHORITY, given=(given,)), LATER), LATER)
    with pytest.raises(NotNow, match=f"CA {certificate_id(given)}, given to another system, stands below"):
        retire_root(activated, LATER + SOAK)
    assert retire_root(activated, LATER + SOAK, soak=timedelta(0)).given == ()
    assert retire_root(activated, given.not_valid_after_utc).given == ()


# What does not fit the state


STAGED = stage_issuing(AUTHORITY, LATER)
ACTIVATED = activate_issuing(STAGED, LATER)
RESTAGED = stage_issuing(ACTIVATED, LATER)


@pytest.mark.parametrize(
    ("authority", "step", "message"),
    [
        pytest.param(STAGED, stage_issuing, "issuing CA [0-9a-f]{16} is staged already", id="stage issuing twice"),
        pytest.param(AUTHORITY, activate_issuing, "no issuing CA is staged; stage one first", id="none staged"),
        pytest.param(ACTIVATED, activate_issuing, "no issuing CA is staged; stage one", id="activate issuing twice"),
        pytest.param(RESTAGED, activate_issuing, "is retiring already; retire it first", id="one retiring still"),
        pytest.param(
            stage_issuing(STAGED_ROOT, LATER), activate_issuing, "the root of .* is staged; activate", id="root staged"
        ),
        pytest.param(STAGED_ROOT, stage_root, "root [0-9a-f]{16} is staged already", id="stage root twice"),
        pytest.param(STAGED, stage_root, "issuing CA .* is staged already", id="issuing CA staged below the old root"),
        pytest.param(ACTIVATED_ROOT, stage_root, "is retiring already; retire it first", id="root retiring still"),
        pytest.param(AUTHORITY, activate_root, "no root is staged; stage one first", id="no root staged"),
        pytest.param(ACTIVATED_ROOT, activate_root, "no root is staged; stage one", id="activate root twice"),
        pytest.param(
            stage_root(ACTIVATED, LATER), activate_root, "issuing CA .* is retiring already", id="issuing CA retiring"
        ),
        pytest.param(STAGED_ROOT, retire_root, "no root is retiring", id="no root retiring"),
        pytest.param(AUTHORITY, lambda authority, _: retire_issuing(authority), "no issuing CA is", id="none retiring"),
        pytest.param(AUTHORITY, lambda authority, _: unstage(authority), "nothing is staged", id="nothing staged"),
    ],
)  # fmt: skip
def test_a_step_out_of_turn_says_what_to_do_first(
    authority: Authority, step: Callable[[Authority, datetime], Authority], message: str
) -> None:
    with pytest.raises(NotNow, match=message):
        step(authority, LATER)


def test_an_issuing_ca_below_another_root_is_not_activated_with_a_root() -> None:
    mixed = replace(STAGED_ROOT, issuing=STAGED.issuing)
    with pytest.raises(NotNow, match="is staged below another root; unstage it"):
        activate_root(mixed, LATER)


def test_what_was_staged_can_be_taken_back() -> None:
    assert unstage(STAGED) == AUTHORITY
    assert unstage(STAGED_ROOT) == AUTHORITY
    assert unstage(stage_issuing(STAGED_ROOT, LATER)) == AUTHORITY
    assert states(unstage(RESTAGED)) == states(ACTIVATED)


# Keys that are elsewhere


@pytest.mark.parametrize("step", [stage_issuing, stage_root])
def test_a_root_whose_key_is_offline_signs_nothing_until_it_is_lent(
    step: Callable[[Authority, datetime], Authority],
) -> None:
    authority = offline(AUTHORITY)
    with pytest.raises(AuthorityError, match="has no key here; sign where its key is kept") as refused:
        step(authority, LATER)
    assert not isinstance(refused.value, NotNow)
    key = AUTHORITY.roots[0].key
    assert key is not None
    assert states(step(with_root_key(authority, key), LATER)) == states(step(AUTHORITY, LATER))


def test_a_key_is_lent_to_its_root_alone() -> None:
    authority = two_lines()
    key = authority.roots[1].key
    assert key is not None
    assert [root.key for root in with_root_key(offline(authority), key).roots] == [None, key]
    with pytest.raises(AuthorityError, match="the key is of no root here"):
        with_root_key(authority, create_key(KeyKind.EC_P256))


class Uri(Token):
    uri = "pkcs11:token=one;object=ca"


def test_who_keeps_a_key_in_a_token_gets_none_in_a_file_unasked() -> None:
    root = create_root(NOW, name="Example Corp", key=Uri())
    authority = Authority((root,), (create_issuing(root, NOW, name="Example Corp", key=Uri()),))
    for step in (stage_issuing, stage_root):
        with pytest.raises(AuthorityError, match="is in a token; name the next one's"):
            step(authority, LATER)
    staged = stage_root(authority, LATER, key=Uri())
    with pytest.raises(AuthorityError, match="is in a token; name the next one's"):
        activate_root(staged, LATER)
    activated = activate_root(stage_issuing(staged, LATER, key=Uri()), LATER)
    assert all(is_trusted(activated.issuer, root, at=LATER) for root in activated.trusted)


def test_a_root_does_not_follow_itself() -> None:
    with pytest.raises(AuthorityError, match="would have the key of a present one; use another"):
        stage_root(AUTHORITY, LATER, key=AUTHORITY.roots[0].key)


def test_a_root_without_the_present_ones_signature_waits_for_the_bundle() -> None:
    staged = stage_root(offline(AUTHORITY), LATER, cross=False)
    assert [root.crosses for root in staged.roots] == [(), ()]
    with pytest.raises(NotNow, match="clients know the new root from the trust bundle alone, staged since 2026-12-22"):
        activate_root(staged, LATER + SOAK - timedelta(seconds=1))
    assert is_trusted(activate_root(staged, LATER + SOAK).issuer, staged.trusted[1], at=LATER + SOAK)
    assert states(activate_root(staged, LATER, soak=timedelta(0)))[0] == ["retiring", "active"]


# CAs of others


def corporate(*, line: Line = Line.MAIN, between: int = 1) -> tuple[Issuing, x509.Certificate, list[x509.Certificate]]:
    """An issuing CA below `between` others and a corporate root; without its chain, the root, and the CAs between."""
    above = create_root(NOW, name="Corporate", key=CORPORATE_KEY)
    root, chain = above.certificate, list[x509.Certificate]()
    for depth in range(between, 0, -1):
        one = create_issuing(above, NOW, name=f"Corporate {depth}", path_length=depth)
        chain.insert(0, one.certificate)
        above = Root(one.certificate, one.key)
    issuing = create_issuing(above, NOW, name="Corporate gate")
    return replace(issuing, line=line), root, chain


CORPORATE_KEY = rsa.generate_private_key(65537, 2048)


def test_a_corporate_ca_takes_over_from_our_own() -> None:
    issuing, root, between = corporate()
    staged = stage_foreign(AUTHORITY, replace(issuing, chain=(issuing.certificate, *between)), [root], LATER)
    assert states(staged) == (["active", "staged"], ["active", "staged"])
    activated = activate_root(staged, LATER)  # at once: our root signed theirs
    assert activated.issuer.certificate == issuing.certificate
    assert all(is_trusted(activated.issuer, one, at=LATER) for one in activated.trusted)
    left = retire_root(activated, LATER + SOAK)
    assert left.trusted == (root,)
    assert left.issuer.chain == (issuing.certificate, *between)


def test_a_chain_in_any_order_is_put_in_order() -> None:
    issuing, root, between = corporate(between=3)
    stranger = create_root(NOW, name="Stranger").certificate
    pile = (root, between[2], issuing.certificate, stranger, between[0], between[1], between[0])
    staged = stage_foreign(AUTHORITY, replace(issuing, chain=pile), [], LATER)
    assert staged.issuing[1].chain[:4] == (issuing.certificate, *between)
    assert staged.trusted == (AUTHORITY.trusted[0], root)
    assert len(staged.issuing[1].chain) == 5  # and our signature of their root


def test_a_path_has_no_root_and_nothing_twice() -> None:
    issuing, root, between = corporate(between=2)
    pile = [root, *between, issuing.certificate, *between]
    assert path_from(issuing.certificate, pile) == (issuing.certificate, *between)
    assert path_from(issuing.certificate, between[1:]) == (issuing.certificate,)


def test_a_foreign_root_waits_where_ours_cannot_sign_it() -> None:
    issuing, root, between = corporate()
    pile = replace(issuing, chain=(issuing.certificate, *between))
    for staged in (
        stage_foreign(offline(AUTHORITY), pile, [root], LATER),
        stage_foreign(AUTHORITY, pile, [root], LATER, cross=False),
        stage_foreign(Authority((), AUTHORITY.issuing), pile, [root], LATER),
    ):
        with pytest.raises(NotNow, match="clients know the new root from the trust bundle alone"):
            activate_root(staged, LATER)
        activated = activate_root(staged, LATER + SOAK)
        assert is_trusted(activated.issuer, root, at=LATER)


def test_below_a_root_that_is_known_only_the_issuing_ca_is_staged() -> None:
    issuing = create_issuing(AUTHORITY.roots[0], LATER, name="By hand")
    staged = stage_foreign(AUTHORITY, issuing, AUTHORITY.trusted, LATER)
    assert states(staged) == (["active"], ["active", "staged"])
    assert activate_issuing(staged, LATER).issuer.certificate == issuing.certificate


def test_a_root_with_the_name_of_a_known_one_and_another_key_is_another() -> None:
    issuing, root, between = corporate()
    authority = retire_root(
        activate_root(stage_foreign(AUTHORITY, replace(issuing, chain=(*between,)), [root], LATER), LATER), LATER + SOAK
    )
    key = create_key(KeyKind.EC_P256)
    rekeyed = _signed_again(root, key, LATER + YEAR)
    following = create_issuing(Root(rekeyed, key), LATER, name="Corporate gate")
    staged = stage_foreign(authority, following, [rekeyed], LATER)
    assert staged.trusted == (root, rekeyed)
    activated = activate_root(staged, LATER + SOAK)
    assert is_trusted(activated.issuer, rekeyed, at=LATER)
    assert retire_root(activated, LATER + SOAK * 2).trusted == (rekeyed,)


def test_a_renewed_certificate_of_a_known_root_takes_its_place() -> None:
    issuing, root, between = corporate()
    authority = activate_root(stage_foreign(AUTHORITY, replace(issuing, chain=(*between,)), [root], LATER), LATER)
    authority = retire_root(authority, LATER + SOAK)
    renewed = _signed_again(root, CORPORATE_KEY, root.not_valid_after_utc + YEAR)
    following = create_issuing(Root(renewed, CORPORATE_KEY), LATER, name="Corporate gate")
    staged = stage_foreign(authority, following, [root, renewed], LATER)
    assert staged.trusted == (renewed,)
    activated = activate_issuing(staged, LATER)
    assert all(is_trusted(activated.issuer, one, at=LATER) for one in (root, renewed))


def test_an_authority_without_roots_may_stay_without() -> None:
    issuing, _, between = corporate()
    gate = Authority((), AUTHORITY.issuing)
    staged = stage_foreign(gate, replace(issuing, chain=(*between,)), [], LATER)
    assert (staged.roots, staged.issuing[1].chain) == ((), (issuing.certificate, *between))
    assert activate_issuing(staged, LATER).issuer.certificate == issuing.certificate


def test_an_authority_without_roots_gets_one_of_its_own() -> None:
    issuing, root, between = corporate()
    foreign = Authority((), (replace(issuing, chain=(issuing.certificate, *between)),))
    with pytest.raises(AuthorityError, match=r"no root here signed issuing CA .*; import the next one"):
        stage_issuing(foreign, LATER)
    staged = stage_root(foreign, LATER)
    with pytest.raises(NotNow, match="clients know the new root from the trust bundle alone"):
        activate_root(staged, LATER)
    activated = activate_root(staged, LATER + SOAK)
    assert is_trusted(activated.issuer, *activated.trusted, at=LATER + SOAK)
    assert is_trusted(activated.issuing[0], root, at=LATER + SOAK)
    assert states(retire_issuing(activated)) == (["active"], ["active"])


def test_a_foreign_line_is_added_beside_the_main_one() -> None:
    issuing, root, between = corporate(line=Line.RSA)
    staged = stage_foreign(AUTHORITY, replace(issuing, chain=(*between,)), [root], LATER)
    activated = activate_root(staged, LATER + SOAK)
    assert states(activated) == (["active", "active"], ["active", "active"])
    assert [one.line for one in activated.issuers] == [Line.MAIN, Line.RSA]
    assert not is_trusted(activated.issuers[1], AUTHORITY.trusted[0], at=LATER)


def test_what_is_no_issuing_ca_for_a_gate_is_refused() -> None:
    issuing, root, between = corporate()
    own = create_root(NOW, name="Corporate")
    assert own.key is not None
    as_issuing = Issuing(own.certificate, own.key, (own.certificate,))
    with pytest.raises(AuthorityError, match="is a root, and no gate signs with one"):
        stage_foreign(AUTHORITY, as_issuing, [], LATER)
    with pytest.raises(AuthorityError, match="is here already"):
        stage_foreign(AUTHORITY, AUTHORITY.issuer, [], LATER)
    with pytest.raises(AuthorityError, match=r"no root signed CA .*; give it too, for workloads must trust it"):
        stage_foreign(AUTHORITY, replace(issuing, chain=(*between,)), [], LATER)
    with pytest.raises(AuthorityError, match=r"no root signed CA .*; give it too"):
        stage_foreign(AUTHORITY, issuing, [root], LATER)  # what stands between is missing


def test_nothing_is_imported_below_a_root_that_goes_or_of_another_line() -> None:
    issuing = create_issuing(AUTHORITY.roots[0], LATER, name="By hand")
    with pytest.raises(NotNow, match="is retiring; retire it, and stage it anew"):
        stage_foreign(ACTIVATED_ROOT, issuing, [], LATER)
    with pytest.raises(AuthorityError, match="is of the main line; import into that"):
        stage_foreign(AUTHORITY, replace(issuing, line=Line.RSA), [], LATER)
    for authority in (STAGED, STAGED_ROOT):
        with pytest.raises(NotNow, match="is staged already"):
            stage_foreign(authority, issuing, [], LATER)


def test_our_own_root_follows_a_corporate_one() -> None:
    issuing, root, between = corporate()
    foreign = Authority((Root(root),), (replace(issuing, chain=(issuing.certificate, *between)),))
    with pytest.raises(AuthorityError, match="has no key here"):
        stage_root(foreign, LATER)
    activated = activate_root(stage_root(foreign, LATER, cross=False), LATER + SOAK)
    assert is_trusted(activated.issuer, activated.trusted[1], at=LATER + SOAK)
    assert retire_root(activated, LATER + SOAK * 2).trusted == activated.trusted[1:]


def test_an_organisation_that_no_certificate_of_ours_can_carry_is_not_taken_over() -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Corporate root without an organisation")])
    root = Root(_named(AUTHORITY.trusted[0], name, CORPORATE_KEY), CORPORATE_KEY)
    authority = Authority((root,), (create_issuing(root, NOW, name="Corporate gate"),))
    new = stage_root(authority, LATER).trusted[1]
    assert [a.value for a in new.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)] == ["Outgate"]


def _signed_again(root: x509.Certificate, key: CaKey, until: datetime) -> x509.Certificate:
    """A root's certificate anew: with the same name, for `key`."""
    return _named(root, root.subject, key, until)


def _named(
    like: x509.Certificate,
    name: x509.Name,
    key: CaKey,
    until: datetime | None = None,
) -> x509.Certificate:
    life = like.not_valid_before_utc, until or like.not_valid_after_utc
    return unsigned_ca(name, key.public_key(), life, path_length=None).sign(key, digest_for(key))
