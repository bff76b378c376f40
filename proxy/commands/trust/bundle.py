"""`outgate trust bundle`: the trust directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from proxy.commands import NOT_STARTED
from proxy.commands.pki import pki_option

EPILOG = """\b
Only what differs is written, each file in one step; the same roots give the same bytes.
Exit codes: 0 the directory is as it should be; 2 usage; 3 could not read or write.

\b
Example:
  outgate trust bundle --pki pki --to trust
  outgate trust bundle --pki pki --to image/trust --at /etc/outgate/trust --public system
"""


def directory_options[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """`--to DIR`, `--public …` and `--at PATH` as `to`, `public` and `at`."""
    for option in (
        click.option("--at", metavar="PATH", help="Where programs will see the directory, if not at --to."),
        click.option(
            "--public",
            default="system",
            show_default=True,
            metavar="system|none|FILE",
            help="Which public roots stand beside ours: this machine's (SSL_CERT_FILE first), none, or a PEM file.",
        ),
        click.option(
            "--to",
            required=True,
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="The trust directory; it is made.",
        ),
    ):
        command = option(command)
    return command


def made(pki: Path, to: Path, public: str, at: str | None) -> tuple[str, tuple[str, ...]]:
    """Makes the trust directory. Returns the path at which programs see it, and what differed; or ends the command."""
    from pki.trust import TrustError
    from proxy.console import stop
    from proxy.trusting import roots_of, write_directory

    place = at or os.path.abspath(to)  # not resolved: a link may be how a directory is switched
    try:
        return place, write_directory(to, roots_of(pki), _public(public, to), seen_at=place)
    except TrustError as error:
        stop(str(error), NOT_STARTED)


@click.command(epilog=EPILOG)
@pki_option
@directory_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object: where, and which files were written.")
def bundle(directory: Path, to: Path, public: str, at: str | None, as_json: bool) -> None:
    """Write the files that every runtime reads: the roots as PEM and for Java, and settings that name them."""
    place, changed = made(directory, to, public, at)
    if as_json:
        click.echo(json.dumps({"directory": str(to), "at": place, "written": changed}))
    else:
        click.echo(f"{to}: wrote {' '.join(changed)}" if changed else f"{to}: nothing to write")


def _public(public: str, to: Path) -> bytes:
    from pki.trust import public_roots, read_roots

    if public == "none":
        return b""
    return public_roots(os.environ, to) if public == "system" else read_roots(Path(public), "--public")
