"""The oracles of every certificate issued: `cryptography`'s verifier and the openssl program, at a time of choice."""

from __future__ import annotations

import subprocess
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from pki.authority import AuthorityError, Issuing, KeyKind, Leaf, certificates_pem, create_key, issue_leaf
from pki.profile import digest_for, leaf_name, life_from, unsigned_leaf
from tests.pki.clients import program

KEY = create_key(KeyKind.EC_P256)  # for leaves that only a verifier sees: a key of the RSA line's kind takes long


def verify(leaf: Leaf, *roots: x509.Certificate, at: datetime, host: str | None = None) -> list[x509.Certificate]:
    """The path by which a client that trusts `roots` accepts `leaf`. Raises VerificationError."""
    name = host or leaf.host
    try:
        subject: x509.DNSName | x509.IPAddress = x509.IPAddress(ip_address(name))
    except ValueError:
        subject = x509.DNSName(name)
    verifier = PolicyBuilder().store(Store(list(roots))).time(at).build_server_verifier(subject)
    return verifier.verify(leaf.certificate, list(leaf.chain))


def accepts(leaf: Leaf, *roots: x509.Certificate, at: datetime) -> bool:
    """Whether a client that trusts `roots` accepts `leaf`."""
    try:
        verify(leaf, *roots, at=at)
    except VerificationError:
        return False
    return True


def is_trusted(issuing: Issuing, *roots: x509.Certificate, at: datetime, host: str = "a.example") -> bool:
    """Whether a fresh leaf of `issuing` is accepted by a client that trusts `roots`."""
    try:
        return accepts(issue_leaf(issuing, host, at, KEY), *roots, at=at)
    except AuthorityError:
        return False


def openssl_refusal(leaf: Leaf, *roots: x509.Certificate, at: datetime, folder: Path) -> str:
    """Why `openssl verify -x509_strict` refuses `leaf`; empty: it does not."""
    files = {"roots": roots, "chain": leaf.chain, "leaf": (leaf.certificate,)}
    for name, certificates in files.items():
        (folder / name).write_bytes(certificates_pem(*certificates))
    try:
        for_name = ["-verify_ip", str(ip_address(leaf.host))]
    except ValueError:
        for_name = ["-verify_hostname", leaf.host]
    trusted = ["-CAfile", "roots", "-no-CApath", "-no-CAstore", "-untrusted", "chain"]
    strictly = ["-x509_strict", "-purpose", "sslserver", "-attime", str(int(at.timestamp())), *for_name]
    command = [program("openssl"), "verify", *trusted, *strictly, "leaf"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 and done.stdout.strip() == "leaf: OK" else done.stdout + done.stderr


def forge_leaf(issuing: Issuing, host: str, now: datetime, *, with_subject: bool = True) -> Leaf:
    """A leaf as `issue_leaf` makes it, also for a host that the CA is not for."""
    key = create_key(KeyKind.EC_P256)
    unsigned = unsigned_leaf(
        leaf_name(host),
        key.public_key(),
        life_from(now, issuing.certificate.not_valid_after_utc - now, issuing.certificate),
        issuing.certificate,
        with_subject=with_subject,
    )
    return Leaf(host, unsigned.sign(issuing.key, digest_for(issuing.key)), key, issuing.chain, now)
