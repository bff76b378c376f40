"""`outgate trust bundle`: the trust directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from proxy.commands import NOT_STARTED, json_option
from proxy.commands.pki import pki_option

EPILOG = """\b
Only what differs is written, each file in one step; the same roots give the same bytes.

\b
Exit codes: 0 the directory is as it should be; 2 usage; 3 could not read or write.
JSON keys: directory mount_path written[]

\b
Examples:
  outgate trust bundle --pki pki --to trust
  outgate trust bundle --pki pki --to image/trust --mount-path /etc/outgate/trust --public system
"""


def directory_options[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """`--to DIR`, `--public …` and `--mount-path PATH` as `to`, `public` and `mount_path`."""
    for option in (
        click.option("--mount-path", metavar="PATH", help="Where programs see the files, if not at --to."),
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


def made(pki: Path, to: Path, public: str, mount_path: str | None) -> tuple[str, tuple[str, ...]]:
    """Makes the trust directory. Returns the path at which programs see it, and what differed; or ends the command."""
    from pki.bundle_source import Source
    from pki.trust import TrustError, write_trust
    from proxy.console import stop

    place = mount_path or os.path.abspath(to)  # not resolved: a link may be how a directory is switched
    try:
        return place, write_trust(to, Source(pki=pki, public=public).read(place, os.environ, to))
    except TrustError as error:
        stop(str(error), NOT_STARTED)


@click.command(epilog=EPILOG)
@pki_option
@directory_options
@json_option
def bundle(directory: Path, to: Path, public: str, mount_path: str | None, as_json: bool) -> None:
    """Write the files that every runtime reads: the roots as PEM and for Java, and settings that name them."""
    place, changed = made(directory, to, public, mount_path)
    from proxy.console import Console

    if as_json:
        click.echo(json.dumps({"directory": str(to), "mount_path": place, "written": changed}))
    else:
        Console().line(written(to, changed))


def written(directory: Path, names: Sequence[str]) -> str:
    """What became of a trust directory, in a line."""
    return f"{directory}: wrote {', '.join(names)}" if names else f"{directory}: as it should be"
