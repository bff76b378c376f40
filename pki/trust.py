"""The trust directory on disk, and the public roots of this machine. What its files hold is `distribution`'s to say."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from pki.distribution import BUNDLE, MalformedBundle, UnusableDirectory, certificates, trust_files
from pki.files import PUBLIC, make_directory, read_file, repair, write_file

MAX_BUNDLE = 16 << 20  # bytes; Mozilla's roots are 0.2 MiB

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


def public_roots(environment: Mapping[str, str], directory: Path | None = None) -> bytes:
    """The roots that a program started with `environment` trusts today, as PEM.

    SSL_CERT_FILE first: who set it has chosen. But the bundle in `directory`, where the roots are to be written, is no
    choice: roots of ours that have retired would never leave it.
    Raises TrustError when there is no bundle, or none can be read from it.
    """
    chosen = environment.get("SSL_CERT_FILE")
    if chosen and not (directory and _is_same(Path(chosen), directory / BUNDLE)):
        return read_roots(Path(chosen), "SSL_CERT_FILE")
    path = system_bundle_path()
    if path is None:
        raise TrustError("no bundle of public roots on this machine; install ca-certificates, or set SSL_CERT_FILE")
    return read_roots(path, "SSL_CERT_FILE")


def read_roots(path: Path, option: str) -> bytes:
    """The PEM text at `path`, which has certificates. Raises TrustError, which says what to name in `option`."""
    advice = f"name a readable PEM bundle in {option}"
    try:
        text = read_file(path, MAX_BUNDLE)
        if not certificates(text, str(path)):
            raise TrustError(f"{path}: no CERTIFICATE in it; {advice}")
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror}; {advice}") from error
    except MalformedBundle as error:
        raise TrustError(f"{error}; {advice}") from error
    return text


def roots_of(store: Path) -> bytes:
    """The roots of the authority at `store`, as PEM. Opens no key. Raises TrustError."""
    from pki.authority import certificates_pem  # 20 MiB that a pod with a file of roots does not need
    from pki.store import StoreError, load_trusted

    try:
        roots = load_trusted(store)
    except StoreError as error:
        raise TrustError(str(error)) from error
    if not roots:
        raise TrustError(
            f"{store}: no root there to be trusted; copy roots/ from where the authority was made, or import it with "
            "--root FILE into another directory"
        )
    return certificates_pem(*roots)


def make_files(directory: str, roots: bytes, public: bytes) -> dict[str, bytes]:
    """`trust_files`, for whoever writes them. Raises TrustError."""
    try:
        return trust_files(directory, roots, public)
    except MalformedBundle as error:
        raise TrustError(f"the trust bundle: {error}") from error
    except UnusableDirectory as error:
        raise TrustError(str(error)) from error


def write_trust(directory: Path, files: Mapping[str, bytes]) -> tuple[str, ...]:
    """Writes what differs, each file in one step, in the order given. Returns the names written. Raises TrustError."""
    try:
        if not directory.is_dir():
            make_directory(directory, 0o755)
            directory.chmod(0o755)  # whatever the umask: workloads have uids of their own
        _require_ours(directory)
        changed = [name for name, content in files.items() if not _holds(directory / name, content)]
        for name in changed:
            write_file(directory / name, files[name], PUBLIC)
    except OSError as error:
        raise TrustError(f"{error.filename or directory}: {error.strerror}; {repair(error)}") from error
    return tuple(changed)


def _require_ours(directory: Path) -> None:
    """Raises TrustError where others may write: a shell sources what stands there, and PHP reads every .ini file."""
    found = directory.stat()
    advice = "they could have shells and PHP run what they like; name a new directory, as one inside it"
    if found.st_uid not in (0, os.geteuid()):
        raise TrustError(f"{directory}: belongs to uid {found.st_uid}, not to us: {advice}")
    if found.st_mode & 0o022:
        raise TrustError(f"{directory}: mode {stat.S_IMODE(found.st_mode):04o} lets others write there: {advice}")


def _holds(path: Path, content: bytes) -> bool:
    """`path` is a file for all to read, with this content. A link is none: who made it may point it elsewhere; nor is
    a file of another user, who may write something else to it."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or stat.S_IMODE(found.st_mode) != PUBLIC or found.st_size != len(content):
            return False
        return found.st_uid in (0, os.geteuid()) and path.read_bytes() == content
    except FileNotFoundError:
        return False


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
