"""The steps by which CAs replace each other, as values: each takes an authority and gives the next. It writes nothing.

No step asks a client for anything. A staged root is cross-signed both ways: whatever signs leaves, a client with the
old root, the new one or both finds a path, and the chain sent after the leaf has what it needs (docs/pki.md, "Rotate").
Where the old root's key is not to be had, the new root must reach the workloads before it is activated.

In each line there is at most one CA of a kind in each state. `chains` finds what stands above an issuing CA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

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
    create_issuing,
    create_root,
    cross_sign,
    is_ending,
)
from pki.chains import (
    alive,
    chained,
    is_crossed,
    is_same_ca,
    is_self_signed,
    is_signed_by,
    own_chain,
    path_from,
    root_above,
)
from pki.constraints import constraints_of
from pki.profile import organisation_of, stays_in_token

SOAK = timedelta(days=7)  # for a trust bundle to reach every workload


class NotNow(AuthorityError):
    """The step is possible and does not fit the state. `str()` says what to do first."""


def stage_issuing(
    authority: Authority,
    now: datetime,
    *,
    permitted: Sequence[str] | None = None,
    life: timedelta = YEAR,
    key: CaKey | None = None,
    line: Line | None = None,
) -> Authority:
    """A new issuing CA in each line, of the same kind as the one it is to replace; it signs nothing yet.

    It stands below the line's staged root if there is one, else below the present one.

    permitted  domains (see `create_issuing`); empty: no limit; None: as the present one is limited
    key        of the main line's, to use instead of a new one
    line       this one alone

    Raises AuthorityError, as where a root's key is not here; NotNow where an issuing CA is staged already.
    """
    staged = []
    for present in _issuers(authority, line):
        _require_none(authority.issuing, present.line, State.STAGED, "activate it first, or unstage it")
        root = _one(authority.roots, present.line, State.STAGED) or root_of(authority, present)
        if root is None:
            raise AuthorityError(
                f"no root here signed issuing CA {certificate_id(present.certificate)}; import the next one"
            )
        own_key = key if present.line is Line.MAIN else None
        staged.append(_successor(present, root, now, life=life, permitted=permitted, key=own_key))
    return chained(replace(authority, issuing=(*authority.issuing, *staged)))


def activate_issuing(authority: Authority, now: datetime) -> Authority:
    """The staged issuing CAs sign from now on; those they replace are retiring. A line that is not ready stays.

    Raises NotNow where none is staged, or each is below a root that is only staged, or after one that is retiring.
    """

    def require(one: Issuing) -> None:
        root = root_of(authority, one)
        if root is not None and root.state is State.STAGED:
            raise NotNow(f"the root of issuing CA {certificate_id(one.certificate)} is staged; activate the root")
        _require_none(authority.issuing, one.line, State.RETIRING, "retire it first")

    staged = [one for one in authority.issuing if one.state is State.STAGED]
    ready = _ready(staged, require, none="no issuing CA is staged; stage one first")
    return replace(authority, issuing=_moved(authority.issuing, {one.line for one in ready}, now))


def retire_issuing(authority: Authority) -> Authority:
    """Forget the issuing CAs that are retiring. Raises NotNow where there is none.

    No time need pass: a leaf is shown with its whole chain, and nobody but a gate ever held an issuing CA. What goes is
    a key that signs nothing.
    """
    left = tuple(one for one in authority.issuing if one.state is not State.RETIRING)
    if len(left) == len(authority.issuing):
        raise NotNow("no issuing CA is retiring")
    return replace(authority, issuing=left)


def stage_root(
    authority: Authority,
    now: datetime,
    *,
    years: int = 10,
    key: CaKey | None = None,
    cross: bool = True,
    line: Line | None = None,
) -> Authority:
    """A new root for each line: to be trusted from now on, and cross-signed both ways with the present one.

    key    of the main line's, to use instead of a new one
    cross  False: without cross certificates, where the present root's key is not to be had, or not to be trusted
    line   this one alone

    Raises AuthorityError without the key of a present root; NotNow where a rotation is under way.
    """
    for present in _issuers(authority, line):
        _require_none(authority.roots, present.line, State.STAGED, "activate it first, or unstage it")
        _require_none(authority.issuing, present.line, State.STAGED, "activate it first, or unstage it")
        model = root_of(authority, present) or present
        own_key = _next_key(model, key if present.line is Line.MAIN else None)
        new = create_root(
            now,
            name=organisation_of(model.certificate),
            years=years,
            kind=kind_of(model.certificate),
            key=own_key,
            state=State.STAGED,
            line=present.line,
        )
        authority = _with_root(authority, new, alive(authority.roots, present.line, now) if cross else (), now)
    return chained(authority)


def stage_foreign(
    authority: Authority,
    issuing: Issuing,
    roots: Sequence[x509.Certificate],
    now: datetime,
    *,
    cross: bool = True,
) -> Authority:
    """Stage an issuing CA that somebody else signed, and its root where that is not trusted here yet.

    issuing  its chain and `roots` may hold what goes with it in any order; what does not is left out
    cross    the present root signs the new one, if its key is here: clients that have only the present one find a path

    An authority without roots needs none now: what its workloads trust is then seen to elsewhere.

    Raises AuthorityError where `issuing` is no CA for a gate, or its root is not to be found; NotNow where something
    is staged in its line already, or its root is retiring.
    """
    identifier = certificate_id(issuing.certificate)
    if is_self_signed(issuing.certificate):
        raise AuthorityError(f"CA {identifier} is a root, and no gate signs with one; make an issuing CA below it")
    if any(one.certificate == issuing.certificate for one in authority.issuing):
        raise AuthorityError(f"issuing CA {identifier} is here already")
    for cas in (authority.roots, authority.issuing):
        _require_none(cas, issuing.line, State.STAGED, "activate it first, or unstage it")
    given = (*issuing.chain, *roots)
    waiting = replace(issuing, chain=path_from(issuing.certificate, given), state=State.STAGED, since=now)
    top = own_chain(authority.roots, waiting)[-1]
    above = [certificate for certificate in given if is_self_signed(certificate) and is_signed_by(top, certificate)]
    authority = _renewed(authority, above)
    known = root_of(authority, waiting)
    if known is None and above:
        latest = max(above, key=lambda certificate: certificate.not_valid_after_utc)
        root = Root(latest, state=State.STAGED, line=issuing.line, since=now)
        signers = [old for old in alive(authority.roots, issuing.line, now) if cross and old.key is not None]
        authority = _with_root(authority, root, signers, now)
    elif known is None and authority.roots:
        raise AuthorityError(f"no root signed CA {certificate_id(top)}; give it too, for workloads must trust it")
    elif known is not None:
        _require_usable(known, issuing.line)
    return chained(replace(authority, issuing=(*authority.issuing, waiting)))


def activate_root(authority: Authority, now: datetime, *, soak: timedelta = SOAK) -> Authority:
    """The staged roots sign from now on, each with an issuing CA below: the staged one, or one like the present.

    It may follow the staging at once: cross certificates carry the clients that do not know the new root yet. A root
    that the present one did not sign waits for `soak`. A line that is not ready stays.

    Raises NotNow where no root is staged and ready; AuthorityError where an issuing CA is to be made and the root's
    key is not here.
    """

    def require(root: Root) -> None:
        _require_none(authority.issuing, root.line, State.RETIRING, "retire it first")
        waiting = _one(authority.issuing, root.line, State.STAGED)
        if waiting is not None and root_of(authority, waiting) != root:
            raise NotNow(f"issuing CA {certificate_id(waiting.certificate)} is staged below another root; unstage it")
        if not is_crossed(authority.roots, root, now):
            _require_soaked(root, now, soak, "clients know the new root from the trust bundle alone, staged")

    staged = [root for root in authority.roots if root.state is State.STAGED]
    ready = _ready(staged, require, none="no root is staged; stage one first")
    made = [
        _successor(_issuers(authority, root.line)[0], root, now)
        for root in ready
        if _one(authority.issuing, root.line, State.STAGED) is None
    ]
    lines = {root.line for root in ready}
    issuing = _moved((*authority.issuing, *made), lines, now)
    return chained(replace(authority, roots=_moved(authority.roots, lines, now), issuing=issuing))


def retire_root(authority: Authority, now: datetime, *, soak: timedelta = SOAK) -> Authority:
    """Forget the roots that are retiring, and what stands below them: clients that know no other stop trusting us.

    Unless `soak` is zero, a root stays within `soak` of its successor's activation, and while a CA below it is in use
    elsewhere. One that has expired is gone already, and waits for nothing. Raises NotNow where none may go.
    """

    def require(root: Root) -> None:
        if now >= root.certificate.not_valid_after_utc:
            return
        _require_soaked(root, now, soak, "workloads may not have the new root yet; it is in use")
        below = [one for one in authority.given if is_signed_by(one, root.certificate)]
        in_use = next((one for one in below if now < one.not_valid_after_utc), None)
        if in_use is not None and soak:
            raise NotNow(
                f"CA {certificate_id(in_use)}, given to another system, stands below a root that is retiring; "
                "give it a new one, then retire the root without waiting"
            )

    retiring = [root for root in authority.roots if root.state is State.RETIRING]
    gone = _ready(retiring, require, none="no root is retiring")
    issuing = tuple(one for one in authority.issuing if root_of(authority, one) not in gone)
    given = tuple(one for one in authority.given if not any(is_signed_by(one, root.certificate) for root in gone))
    return _without_roots(replace(authority, issuing=issuing, given=given), gone)


def unstage(authority: Authority) -> Authority:
    """Forget what is staged: it has signed nothing. Raises NotNow where nothing is."""
    gone = [root for root in authority.roots if root.state is State.STAGED]
    issuing = tuple(one for one in authority.issuing if one.state is not State.STAGED)
    if not gone and len(issuing) == len(authority.issuing):
        raise NotNow("nothing is staged")
    return _without_roots(replace(authority, issuing=issuing), gone)


def with_root_key(authority: Authority, key: CaKey) -> Authority:
    """Lend the key of an offline root for the steps that follow; a store writes the keys of new CAs alone.

    Raises AuthorityError where it is no root's.
    """
    public = key.public_key()
    if not any(root.certificate.public_key() == public for root in authority.roots):
        known = ", ".join(certificate_id(root.certificate) for root in authority.roots) or "none"
        raise AuthorityError(f"the key is of no root here (these are: {known}); name the file that has one's")
    lent = (replace(root, key=key) if root.certificate.public_key() == public else root for root in authority.roots)
    return replace(authority, roots=tuple(lent))


def root_of(authority: Authority, issuing: Issuing) -> Root | None:
    """The root that an issuing CA stands below, if it is here."""
    return root_above(authority.roots, issuing)


def kind_of(certificate: x509.Certificate) -> KeyKind:
    """What kind of key to give a successor of this certificate."""
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        return KeyKind.EC_P256
    return KeyKind.RSA_4096 if key.key_size > 3072 else KeyKind.RSA_3072


def _successor(
    present: Issuing,
    root: Root,
    now: datetime,
    *,
    life: timedelta = YEAR,
    permitted: Sequence[str] | None = None,
    key: CaKey | None = None,
) -> Issuing:
    return create_issuing(
        root,
        now,
        name=organisation_of(present.certificate),
        life=life,
        kind=kind_of(present.certificate),
        key=_next_key(present, key),
        permitted=(constraints_of(present.certificate) or ()) if permitted is None else permitted,
        state=State.STAGED,
    )


def _next_key(present: Root | Issuing, key: CaKey | None) -> CaKey | None:
    """The key that the next CA is to have. Who keeps one in a token does not get the next one in a file unasked."""
    if key is None and stays_in_token(present.key):
        raise AuthorityError(f"the key of CA {certificate_id(present.certificate)} is in a token; name the next one's")
    return key


def _with_root(authority: Authority, new: Root, present: Sequence[Root], now: datetime) -> Authority:
    """`new` among the roots, signed by `present` ones; and these by it, if its key is here."""
    # Who trusts the retiring root alone finds a path through the present one to nothing further.
    _require_none(authority.roots, new.line, State.RETIRING, "retire it first")
    if any(is_same_ca(new.certificate, root.certificate) for root in authority.roots):
        raise AuthorityError(f"root {certificate_id(new.certificate)} would have the key of a present one; use another")
    roots = []
    for old in authority.roots:
        if old in present:
            new = replace(new, crosses=(*new.crosses, cross_sign(new, old, now)))
            below = [one.certificate for one in authority.issuing if root_of(authority, one) == old]
            until = max((one.not_valid_after_utc for one in below if not is_ending(one, now)), default=None)
            if new.key is not None and until is not None:
                # Only while it is needed: who trusts the new root alone must not take for years after what the old
                # one signs, which may be retired for good reason.
                old = replace(old, crosses=(*old.crosses, cross_sign(old, new, now, until=until)))
        roots.append(old)
    return replace(authority, roots=(*roots, new))


def _without_roots(authority: Authority, gone: Sequence[Root]) -> Authority:
    """No root that is gone, and no cross certificate that it signed."""
    left = [
        replace(
            root,
            crosses=tuple(
                cross for cross in root.crosses if not any(is_signed_by(cross, one.certificate) for one in gone)
            ),
        )
        for root in authority.roots
        if root not in gone
    ]
    return chained(replace(authority, roots=tuple(left)))


def _renewed(authority: Authority, certificates: Sequence[x509.Certificate]) -> Authority:
    """Roots with a newer certificate for the same name and key, where one is given: it is the same CA to clients."""
    roots = []
    for root in authority.roots:
        same = [one for one in certificates if is_same_ca(one, root.certificate)]
        latest = max([root.certificate, *same], key=lambda one: one.not_valid_after_utc)
        roots.append(replace(root, certificate=latest))
    return replace(authority, roots=tuple(roots))


def _moved[C: (Root, Issuing)](cas: Sequence[C], lines: set[Line], now: datetime) -> tuple[C, ...]:
    """What CAs become when the staged ones of these lines are activated."""
    following = {State.STAGED: State.ACTIVE, State.ACTIVE: State.RETIRING}
    return tuple(
        replace(ca, state=following[ca.state], since=now) if ca.line in lines and ca.state in following else ca
        for ca in cas
    )


def _issuers(authority: Authority, line: Line | None) -> Sequence[Issuing]:
    found = [one for one in authority.issuers if line is None or one.line is line]
    if not found:
        raise AuthorityError(f"no issuing CA is in use in the {line or Line.MAIN} line; import or make one")
    return found


def _one[C: (Root, Issuing)](cas: Sequence[C], line: Line, state: State) -> C | None:
    return next((ca for ca in cas if ca.line is line and ca.state is state), None)


def _ready[C: (Root, Issuing)](cas: Sequence[C], require: Callable[[C], None], *, none: str) -> list[C]:
    """Those that nothing stands in the way of. Raises NotNow, with the first obstacle, where there is not one."""
    ready, obstacles = list[C](), [NotNow(none)] if not cas else []
    for ca in cas:
        try:
            require(ca)
        except NotNow as obstacle:
            obstacles.append(obstacle)
        else:
            ready.append(ca)
    if not ready:
        raise obstacles[0]
    return ready


def _require_none(cas: Sequence[Root] | Sequence[Issuing], line: Line, state: State, repair: str) -> None:
    for ca in cas:
        if ca.line is line and ca.state is state:
            kind = "root" if isinstance(ca, Root) else "issuing CA"
            raise NotNow(f"{kind} {certificate_id(ca.certificate)} is {state} already; {repair}")


def _require_usable(root: Root, line: Line) -> None:
    """That an issuing CA of `line` may be staged below a root that is here already."""
    if root.state is State.RETIRING:
        raise NotNow(f"root {certificate_id(root.certificate)} is retiring; retire it, and stage it anew")
    if root.line is not line:
        raise AuthorityError(f"root {certificate_id(root.certificate)} is of the {root.line} line; import into that")


def _require_soaked(root: Root, now: datetime, soak: timedelta, why: str) -> None:
    if soak and (root.since is None or now < root.since + soak):
        since = f"{root.since:%Y-%m-%d %H:%M} UTC" if root.since else "nobody knows when"
        raise NotNow(f"{why} since {since}, and they are given {soak.days} days")
