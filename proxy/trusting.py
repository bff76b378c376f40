"""A command's environment in which every runtime trusts our roots: what `outgate run` and `outgate trust` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pki.distribution import Environment, MalformedBundle, UnusableDirectory, environment, trust_files
from pki.trust import TrustError, public_roots, write_trust


def roots_of(directory: Path) -> bytes:
    """The roots of the authority at `directory`, as PEM. Opens no key. Raises TrustError."""
    from pki.authority import certificates_pem
    from pki.store import StoreError, load_trusted

    try:
        roots = load_trusted(directory)
    except StoreError as error:
        raise TrustError(str(error)) from error
    if not roots:
        raise TrustError(f"{directory}: no root there to be trusted; copy roots/ from where the authority was made")
    return certificates_pem(*roots)


def write_directory(directory: Path, roots: bytes, public: bytes, *, seen_at: str | None = None) -> tuple[str, ...]:
    """Makes `directory` a trust directory. Returns the names of the files that differed. Raises TrustError.

    seen_at  the path at which programs will see it, if that is another
    """
    try:
        files = trust_files(seen_at or str(directory), roots, public)
    except MalformedBundle as error:
        raise TrustError(f"the trust bundle: {error}") from error
    except UnusableDirectory as error:
        raise TrustError(str(error)) from error
    return write_trust(directory, files)


def trusting(directory: Path, roots: bytes, existing: Mapping[str, str], tell: Callable[[str], None]) -> Environment:
    """The variables over `existing` under which every runtime trusts `roots` and what it trusted before.

    Their files are written to `directory`. Without public roots on this machine ours stand alone, and
    `tell` says so to the user. Raises TrustError.
    """
    try:
        public = public_roots(existing, directory)
    except TrustError as error:
        tell(f"{error}; inside, only inspected hosts will be trusted")
        public = b""
    write_directory(directory, roots, public)
    return environment(str(directory), existing)
