"""Certificates in memory: roots, issuing CAs below them, and a leaf for each host. It reads no clock and no file.

`profile` says what stands in a certificate, `constraints` to which names a CA is limited; `rotation` moves CAs from
one state to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pki.constraints import constraints_of, covers, limits_subject, name_constraints
from pki.profile import (
    BACKDATING,
    MAX_NAME,
    AuthorityError,
    CaKey,
    CaPublicKey,
    KeyOffline,
    ca_name,
    digest_for,
    identifier_of,
    leaf_name,
    life_from,
    path_length_of,
    unsigned_ca,
    unsigned_leaf,
)

__all__ = [
    "BACKDATING", "LEAF_LIFE", "LEAST_LIFE", "MAX_NAME", "YEAR", "Authority", "AuthorityError", "CaKey", "CaPublicKey",
    "Issuing", "KeyKind", "KeyOffline", "Leaf", "Line", "Root", "State", "certificate_id", "certificates_pem",
    "create_authority", "create_issuing", "create_key", "create_root", "cross_sign", "fingerprint", "is_ending",
    "issue_leaf", "key_pem",
]  # fmt: skip

LEAF_LIFE = timedelta(days=7)  # clients refuse long-lived leaves: 398 days once, 200 now, 47 from 2029 (CA/B SC-081v3)
LEAST_LIFE = timedelta(minutes=5)  # a clock that is a little fast refuses what ends sooner
YEAR = timedelta(days=365.25)


class KeyKind(StrEnum):
    """What kind of key is made."""

    EC_P256 = "ec-p256"
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"
    RSA_4096 = "rsa-4096"


class Line(StrEnum):
    """A root and what stands below it. A server may show leaves of both lines, each to the clients that can read it."""

    MAIN = "main"
    RSA = "rsa"  # beside the main one, for clients that know no elliptic curves


class State(StrEnum):
    """Where a CA stands in a rotation. Workloads are to trust a root in each of them."""

    STAGED = "staged"  # signs nothing yet
    ACTIVE = "active"
    RETIRING = "retiring"  # signs nothing any more


@dataclass(frozen=True, slots=True)
class Root:
    """What workloads trust.

    key      None where it is kept offline
    crosses  the same name and key signed by other roots, for clients that trust only one of those
    since    when it came into its state; None: nobody wrote it down
    """

    certificate: x509.Certificate
    key: CaKey | None = None
    crosses: tuple[x509.Certificate, ...] = ()
    state: State = State.ACTIVE
    line: Line = Line.MAIN
    since: datetime | None = None

    @property
    def sent(self) -> tuple[x509.Certificate, ...]:
        """What goes with the leaves below it."""
        return self.crosses


@dataclass(frozen=True, slots=True)
class Issuing:
    """What signs leaves. `chain` is sent after every leaf: this CA's certificate first, never a self-signed one."""

    certificate: x509.Certificate
    key: CaKey
    chain: tuple[x509.Certificate, ...]
    state: State = State.ACTIVE
    line: Line = Line.MAIN
    since: datetime | None = None

    @property
    def sent(self) -> tuple[x509.Certificate, ...]:
        """What goes with the leaves below it."""
        return self.chain


@dataclass(frozen=True, slots=True)
class Authority:
    """Roots and the issuing CAs below them. A gate works without any root; a trust bundle needs one.

    given  CAs that were signed for other systems, which keep the keys
    """

    roots: tuple[Root, ...]
    issuing: tuple[Issuing, ...]
    given: tuple[x509.Certificate, ...] = ()

    @property
    def issuers(self) -> tuple[Issuing, ...]:
        """What signs leaves now, the main line first."""
        active = (one for one in self.issuing if one.state is State.ACTIVE)
        return tuple(sorted(active, key=lambda one: one.line is not Line.MAIN))

    @property
    def issuer(self) -> Issuing:
        """What signs the leaves of the main line."""
        return self.issuers[0]

    @property
    def trusted(self) -> tuple[x509.Certificate, ...]:
        """What workloads must trust: every root, also while it waits or goes."""
        return tuple(root.certificate for root in self.roots)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate for one host and its key. From `renew_at` on, mint another."""

    host: str
    certificate: x509.Certificate
    key: CaKey
    chain: tuple[x509.Certificate, ...]
    renew_at: datetime

    def pem(self) -> bytes:
        """What a TLS server loads: the leaf, what is sent after it, and the leaf's key."""
        return certificates_pem(self.certificate, *self.chain) + key_pem(self.key)


def create_authority(
    now: datetime,
    *,
    name: str = "Outgate",
    root_years: int = 10,
    issuing_life: timedelta = YEAR,
    permitted: Sequence[str] = (),
    with_rsa: bool = False,
    root_keys: Mapping[Line, CaKey] | None = None,
    issuing_key: CaKey | None = None,
) -> Authority:
    """A new root, and an issuing CA that it signed.

    permitted    domains outside which no client accepts a leaf (see `create_issuing`); empty: no such limit
    with_rsa     the same again with RSA-3072 keys, for clients that know no elliptic curves
    root_keys    to use instead of new ones
    issuing_key  of the main line, to use instead of a new one

    Raises AuthorityError when `name` or a domain cannot stand in a certificate.
    """
    kinds = {Line.MAIN: KeyKind.EC_P256} | ({Line.RSA: KeyKind.RSA_3072} if with_rsa else {})
    given = root_keys or {}
    roots = [
        create_root(now, name=name, years=root_years, kind=kind, key=given.get(line), line=line)
        for line, kind in kinds.items()
    ]
    issuing = [
        create_issuing(
            root,
            now,
            name=name,
            life=issuing_life,
            kind=kinds[root.line],
            key=issuing_key if root.line is Line.MAIN else None,
            permitted=permitted,
        )
        for root in roots
    ]
    return Authority(tuple(roots), tuple(issuing))


def create_root(
    now: datetime,
    *,
    name: str,
    years: int = 10,
    kind: KeyKind = KeyKind.EC_P256,
    key: CaKey | None = None,
    state: State = State.ACTIVE,
    line: Line = Line.MAIN,
) -> Root:
    """A new self-signed root, without a path length: Go and OpenSSL would hold cross certificates against it.

    key  to use instead of a new one of `kind`
    """
    key = key or create_key(kind)
    subject = ca_name(name, "root", key)
    unsigned = unsigned_ca(subject, key.public_key(), life_from(now, years * YEAR), path_length=None)
    return Root(unsigned.sign(key, digest_for(key)), key, state=state, line=line, since=now)


def create_issuing(
    root: Root,
    now: datetime,
    *,
    name: str,
    life: timedelta = YEAR,
    kind: KeyKind = KeyKind.EC_P256,
    key: CaKey | None = None,
    permitted: Sequence[str] | x509.NameConstraints = (),
    path_length: int = 0,
    state: State = State.ACTIVE,
) -> Issuing:
    """A new issuing CA below `root`, which it does not outlive.

    key          to use instead of a new one of `kind`
    permitted    domains: clients then accept leaves for these and what is below them, and for no address; or the
                 constraints of another CA; empty: for every name
    path_length  how many CAs may stand below it

    Raises AuthorityError without the root's key or with the same, or for a domain that is no host name in normal form.
    """
    root_key = _signer(root, now)
    allowed = path_length_of(root.certificate)
    if allowed is not None and path_length >= allowed:
        raise AuthorityError(f"root {certificate_id(root.certificate)} allows {allowed} CAs in a row below it")
    key = key or create_key(kind)
    if key.public_key() == root.certificate.public_key():  # a gate would hold the root's
        raise AuthorityError(f"an issuing CA with the key of root {certificate_id(root.certificate)}; use another key")
    unsigned = unsigned_ca(
        ca_name(name, "issuing CA", key),
        key.public_key(),
        life_from(now, life, root.certificate),
        root.certificate,
        path_length=path_length,
    )
    if permitted:
        limits = permitted if isinstance(permitted, x509.NameConstraints) else name_constraints(permitted)
        unsigned = unsigned.add_extension(limits, critical=True)
    certificate = unsigned.sign(root_key, digest_for(root_key))
    return Issuing(certificate, key, (certificate,), state=state, line=root.line, since=now)


def cross_sign(subject: Root, signer: Root, now: datetime, *, until: datetime | None = None) -> x509.Certificate:
    """The name and key of `subject`, signed by `signer`: who trusts `signer` alone then trusts what `subject` signed.

    It lives as long as both, at most `until`, and limits what the certificate of `subject` limits itself. Raises
    AuthorityError without the signer's key, or when either is not valid at `now`.
    """
    own = subject.certificate
    signer_key = _signer(signer, now)
    _require_valid(own, now)
    before, after = life_from(now, None, own, signer.certificate)
    unsigned = unsigned_ca(
        own.subject,
        own.public_key(),
        (before, min(after, until or after)),
        signer.certificate,
        path_length=path_length_of(own),
        identifier=identifier_of(own),
    )
    if limits := constraints_of(own):
        unsigned = unsigned.add_extension(limits, critical=True)
    return unsigned.sign(signer_key, digest_for(signer_key))


def create_key(kind: KeyKind) -> CaKey:
    """A new key. RSA takes up to seconds."""
    if kind is KeyKind.EC_P256:
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, int(kind.removeprefix("rsa-")))


def issue_leaf(issuing: Issuing, host: str, now: datetime, key: CaKey | None = None) -> Leaf:
    """A leaf for `host`: a name in normal form, or an address.

    key  to use instead of a new one, which is of the kind that the line is for; making an RSA one takes long

    Raises AuthorityError when `host` is neither, or outside the name constraints of a CA of the chain, or when the
    issuing CA is not valid at `now`, or ends within minutes.
    """
    issuer = issuing.certificate
    name = leaf_name(host)
    _require_valid(issuer, now)
    # A cross certificate that has expired misleads old clients, which take it before the root they trust (as in 2020
    # with AddTrust, in 2021 with DST Root X3).
    chain = tuple(ca for ca in issuing.chain if ca == issuer or ca.not_valid_after_utc > now)
    if outside := next((ca for ca in chain if not covers(ca, host)), None):
        raise AuthorityError(
            f"CA {certificate_id(outside)} is not for {host}, and every client would refuse the leaf; "
            "replace it with one that is"
        )
    key = key or create_key(KeyKind.EC_P256 if issuing.line is Line.MAIN else KeyKind.RSA_2048)
    life = life_from(now, LEAF_LIFE, issuer)
    with_subject = not any(limits_subject(ca, host) for ca in chain)
    unsigned = unsigned_leaf(name, key.public_key(), life, issuer, with_subject=with_subject)
    # Counted from now, not from the backdated start: near its issuer's end a leaf would be stale as it is minted.
    half = now + (life[1] - now) / 2
    renew_at = min([half, *(ca.not_valid_after_utc for ca in chain)])
    return Leaf(host, unsigned.sign(issuing.key, digest_for(issuing.key)), key, chain, renew_at)


def is_ending(ca: x509.Certificate, now: datetime) -> bool:
    """Whether a CA has expired, or will so soon that it signs nothing any more."""
    return now + LEAST_LIFE > ca.not_valid_after_utc


def certificate_id(certificate: x509.Certificate) -> str:
    """The short name of a CA in paths, aliases and messages: the first 16 hex digits of its SHA-256."""
    return certificate.fingerprint(hashes.SHA256()).hex()[:16]


def fingerprint(certificate: x509.Certificate) -> str:
    """The SHA-256 as `openssl x509 -fingerprint -sha256` prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def certificates_pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def key_pem(key: CaKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _signer(root: Root, now: datetime) -> CaKey:
    if root.key is None:
        raise KeyOffline(f"root {certificate_id(root.certificate)} has no key here; sign where its key is kept")
    _require_valid(root.certificate, now)
    return root.key


def _require_valid(ca: x509.Certificate, now: datetime) -> None:
    end = ca.not_valid_after_utc
    if now < ca.not_valid_before_utc:
        raise AuthorityError(
            f"CA {certificate_id(ca)} is not valid before {ca.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; set the clock"
        )
    if now >= end:
        raise AuthorityError(f"CA {certificate_id(ca)} expired at {end:%Y-%m-%d %H:%M} UTC; replace it")
    if is_ending(ca, now):
        raise AuthorityError(
            f"CA {certificate_id(ca)} expires at {end:%Y-%m-%d %H:%M} UTC, too soon to sign anything; replace it"
        )
