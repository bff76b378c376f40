"""The trust directory on disk, and the public roots of this machine. What its files hold is `distribution`'s to say."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path

from pki.files import PUBLIC, repair, write_file

SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch, distroless
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL, Amazon Linux
    "/etc/pki/tls/certs/ca-bundle.crt",  # older RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine without ca-certificates, BSD, macOS
)


class TrustError(Exception):
    """The trust directory cannot be made. `str()` has the path and the repair."""


def system_bundle_path(candidates: Iterable[str] = SYSTEM_BUNDLES) -> Path | None:
    """The distribution's bundle of public roots, else the one OpenSSL was built to read, else None."""
    for candidate in (*candidates, ssl.get_default_verify_paths().openssl_cafile):
        path = Path(candidate)
        if path.is_file():
            return path
    return None


def public_roots(environment: Mapping[str, str]) -> bytes:
    """The roots that a program started with `environment` trusts today, as PEM.

    SSL_CERT_FILE first: who set it has chosen. Raises TrustError when there is no bundle, or it cannot be read.
    """
    chosen = environment.get("SSL_CERT_FILE")
    path = Path(chosen) if chosen else system_bundle_path()
    if path is None:
        raise TrustError("no bundle of public roots on this machine; install ca-certificates, or set SSL_CERT_FILE")
    try:
        return path.read_bytes()
    except OSError as error:
        where = " (from SSL_CERT_FILE)" if chosen else ""
        raise TrustError(f"{path}{where}: {error.strerror}; name a readable bundle in SSL_CERT_FILE") from error


def write_trust(directory: Path, files: Mapping[str, bytes]) -> tuple[str, ...]:
    """Writes what differs, each file in one step, in the order given. Returns the names written. Raises TrustError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        changed = [name for name, content in files.items() if _content(directory / name) != content]
        for name in changed:
            write_file(directory / name, files[name], PUBLIC)
    except OSError as error:
        raise TrustError(f"{error.filename or directory}: {error.strerror}; {repair(error)}") from error
    return tuple(changed)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
