"""Which CA signed which, and what is sent after a leaf. It looks at certificates and changes no CA's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import SignatureAlgorithmOID

from pki.authority import Authority, Line, State, is_ending


class Ca(Protocol):
    """A `Root` or an `Issuing`, or what can be seen of one without its key."""

    @property
    def certificate(self) -> x509.Certificate: ...
    @property
    def sent(self) -> Sequence[x509.Certificate]: ...
    @property
    def state(self) -> State: ...
    @property
    def line(self) -> Line: ...
    @property
    def since(self) -> datetime | None: ...


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def is_self_signed(certificate: x509.Certificate) -> bool:
    return is_signed_by(certificate, certificate) or _is_old_root(certificate)


def _is_old_root(certificate: x509.Certificate) -> bool:
    """Self-signed with SHA-1, as roots of long ago are: nobody relies on that signature, and cryptography reads it no
    longer."""
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.RSA_WITH_SHA1:
        return False
    try:
        key = certificate.public_key()
        if certificate.subject != certificate.issuer or not isinstance(key, rsa.RSAPublicKey):
            return False
        signed = certificate.tbs_certificate_bytes
        key.verify(certificate.signature, signed, padding.PKCS1v15(), hashes.SHA1())  # noqa: S303 - see above
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def is_same_ca(one: x509.Certificate, other: x509.Certificate) -> bool:
    """Whether two certificates are of one CA: name and key. The name alone is kept when a CA gets a new key."""
    return one.subject == other.subject and one.public_key() == other.public_key()


def path_from(certificate: x509.Certificate, others: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """`certificate`, the one of `others` that signed it, and so on: no root, and nothing twice (RFC 5246 7.4.2)."""
    path = [certificate]
    left = [other for other in others if not is_same_ca(other, certificate) and not is_self_signed(other)]
    while above := next((other for other in left if is_signed_by(path[-1], other)), None):
        path.append(above)
        left = [other for other in left if not is_same_ca(other, above)]
    return tuple(path)


def own_chain(roots: Sequence[Ca], issuing: Ca) -> tuple[x509.Certificate, ...]:
    """The issuing CA and what stands between it and its root: its chain without a root's cross certificates."""
    between = [one for one in issuing.sent if not any(is_same_ca(one, root.certificate) for root in roots)]
    return path_from(issuing.certificate, between)


def root_above[R: Ca](roots: Sequence[R], issuing: Ca) -> R | None:
    """The one of `roots` that an issuing CA stands below."""
    top = own_chain(roots, issuing)[-1]
    return next((root for root in roots if is_signed_by(top, root.certificate)), None)


def chained(authority: Authority) -> Authority:
    """Every issuing CA with the chain that suits the roots: itself, what stands between, and its root's crosses.

    Where the root is not here, the chain stays: it may hold cross certificates of that root.
    """
    issuing = []
    for one in authority.issuing:
        root = root_above(authority.roots, one)
        issuing.append(replace(one, chain=(*own_chain(authority.roots, one), *root.crosses)) if root else one)
    return replace(authority, issuing=tuple(issuing))


def alive[R: Ca](roots: Sequence[R], line: Line, now: datetime) -> list[R]:
    """The active roots of a line, but for one that has expired: it signs nothing, and no client looks for it."""
    active = [root for root in roots if root.line is line and root.state is State.ACTIVE]
    return [root for root in active if not is_ending(root.certificate, now)]


def is_crossed(roots: Sequence[Ca], staged: Ca, now: datetime) -> bool:
    """Whether clients that trust the active root of the line accept what stands below `staged` too."""
    if not any(root.line is staged.line and root.state is State.ACTIVE for root in roots):
        return False  # what clients trust is not known here
    return all(
        any(is_signed_by(cross, root.certificate) for cross in staged.sent) for root in alive(roots, staged.line, now)
    )
