"""A command's environment in which every runtime trusts our roots: what `outgate run` and `outgate trust` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pki.distribution import Environment, environment
from pki.trust import TrustError, make_files, public_roots, write_trust


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
    write_trust(directory, make_files(str(directory), roots, public))
    return environment(str(directory), existing)
