"""`outgate trust install` and `uninstall`: the machine's own trust store."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy.commands import NOT_STARTED, json_option
from proxy.commands.pki import optional_pki_option

if TYPE_CHECKING:
    from pki.install import Changed

INSTALL_EPILOG = """\b
Former roots of ours that the authority no longer has are taken out. Needs root.

\b
Exit codes: 0 the machine trusts these roots; 2 usage; 3 could not.
JSON keys: anchors bundle added[] kept[] removed[]
  what was put into the directory anchors, was there already, or is gone; programs read bundle

\b
Examples:
  sudo outgate trust install --pki pki
  outgate trust install --root ca.crt --prefix image   # in a build, as root, for the image that stands there
"""

UNINSTALL_EPILOG = """\b
Needs root. What others put into the store stays.

\b
Exit codes: 0 none of our roots is installed; 2 usage; 3 could not.
JSON keys: as those of install

\b
Example:
  sudo outgate trust uninstall
"""

NOT_REACHED = """\
Not reached, for they have roots of their own: Node, Python's certifi (requests, pip), Java unless its package takes the
system's, browsers, snaps, containers."""


def prefix_option[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    return click.option(
        "--prefix",
        default="/",
        metavar="DIR",
        type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
        help="Another system's root directory; its own programs are run in it (chroot).",
    )(command)


@click.command(epilog=INSTALL_EPILOG)
@optional_pki_option("Where the authority stands.")
@click.option("--root", metavar="FILE", type=click.Path(path_type=Path), help="Instead of --pki: its roots, as PEM.")
@prefix_option
@json_option
def install(directory: Path | None, root: Path | None, prefix: Path, as_json: bool) -> None:
    """Have the whole machine trust the root, by the distribution's own mechanism."""
    if directory is None and root is None:
        raise click.UsageError("which roots? name --pki DIR or --root FILE")
    from pki.install import InstallError
    from pki.install import install as install_roots
    from pki.trust import TrustError, roots_of
    from proxy.console import printable, stop

    try:
        roots = _ca_certificates(root) if root else roots_of(directory)  # type: ignore[arg-type]  # one of the two is
        changed = install_roots(roots, prefix)
    except (InstallError, TrustError) as error:
        stop(str(error), NOT_STARTED)
    _show(changed, as_json)
    if not as_json:
        pki = printable(f" --pki {shlex.quote(str(directory))}") if directory else " --pki DIR"
        click.echo(
            f"\n{NOT_REACHED}\nFor these: outgate trust env{pki} --to DIR; to see which: outgate trust doctor{pki}"
        )


@click.command(epilog=UNINSTALL_EPILOG)
@prefix_option
@json_option
def uninstall(prefix: Path, as_json: bool) -> None:
    """Take our roots out of the machine's trust store."""
    from pki.install import InstallError
    from pki.install import uninstall as uninstall_roots
    from proxy.console import stop

    try:
        changed = uninstall_roots(prefix)
    except InstallError as error:
        stop(str(error), NOT_STARTED)
    _show(changed, as_json)


def _ca_certificates(path: Path) -> bytes:
    """The CA certificates in a PEM file, whatever else is in it. Raises TrustError."""
    from cryptography import x509

    from pki.authority import certificates_pem
    from pki.profile import require_readable
    from pki.trust import TrustError, read_roots

    try:
        found = x509.load_pem_x509_certificates(read_roots(path, "--root"))
        for one in found:
            require_readable(one)
        basics = [one.extensions.get_extension_for_class(x509.BasicConstraints).value for one in found]
        if not all(basic.ca for basic in basics):
            raise ValueError("a leaf")
    except (ValueError, x509.ExtensionNotFound, x509.InvalidVersion) as error:
        raise TrustError(f"{path}: no CA's certificate; name the root, roots/ID/ca.crt of the authority") from error
    return certificates_pem(*found)


def _show(changed: Changed, as_json: bool) -> None:
    from proxy.console import Console

    words = {"installed": changed.added, "installed already": changed.kept, "removed": changed.removed}
    if as_json:
        places = {"anchors": str(changed.anchors), "bundle": str(changed.bundle)}
        click.echo(json.dumps(places | {"added": changed.added, "kept": changed.kept, "removed": changed.removed}))
        return
    for word, names in words.items():
        for name in names:
            Console().line(f"{word}: {changed.anchors / name}")
    if not any(words.values()):
        Console().line(f"nothing of ours in {changed.anchors}")
    elif changed.added or changed.kept:
        Console().line(f"trusted by every program that reads {changed.bundle}")
