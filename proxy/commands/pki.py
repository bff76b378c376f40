"""`outgate pki`: the authority that inspection needs, on disk."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.commands import NO, NOT_STARTED

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from cryptography.x509 import Certificate

EPILOG = "\b\nExample:\n  outgate pki init --pki pki\n  outgate run -p policy.yaml -w build --pki pki -- make"
INIT_EPILOG = """\b
Exit codes: 0 made; 1 there is an authority already; 2 usage; 3 could not write.

\b
Example:
  outgate pki init --pki pki --name "Example Corp"
"""


@click.group(epilog=EPILOG)
def pki() -> None:
    """Make the authority that inspection needs."""


@pki.command(epilog=INIT_EPILOG)
@click.option(
    "--pki",
    "directory",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where the authority is to stand.",
)
@click.option("--name", default="Outgate", show_default=True, help="The organisation shown in its certificates.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: where, fingerprints, expiry.")
def init(directory: Path, name: str, as_json: bool) -> None:
    """Make an authority: a root that workloads trust, and the issuing CA that the gate signs with."""
    from datetime import UTC, datetime

    from pki.authority import AuthorityError, create_authority
    from pki.store import StoreError, StoreExists, save
    from proxy.console import stop

    try:
        authority = create_authority(datetime.now(UTC), name=name)
    except AuthorityError as error:
        raise click.BadParameter(str(error), param_hint="--name") from error
    try:
        save(authority, directory)
    except StoreError as error:
        stop(str(error), NO if isinstance(error, StoreExists) else NOT_STARTED)

    root = _facts(authority.roots[0].certificate, directory / "roots")
    issuing = _facts(authority.issuing.certificate, directory / "issuing")
    made = {"pki": str(directory), "root": root, "issuing": issuing}
    click.echo(json.dumps(made) if as_json else _shown(directory, root, issuing))


def _facts(certificate: Certificate, parent: Path) -> dict[str, str]:
    from pki.authority import certificate_id, fingerprint

    folder = parent / certificate_id(certificate)
    return {
        "id": certificate_id(certificate),
        "subject": certificate.subject.rfc4514_string(),
        "sha256": fingerprint(certificate),
        "expires": f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        "certificate": str(folder / "ca.crt"),
        "key": str(folder / "ca.key"),
    }


def _shown(directory: Path, root: dict[str, str], issuing: dict[str, str]) -> str:
    """What was made and what to do next, for a person."""
    return "\n".join(
        [
            f"made an authority in {directory}",
            "",
            *_lines("root", root, "what workloads trust"),
            *_lines("issuing", issuing, "what the gate signs with"),
            "",
            "next:",
            "  # inspect with it",
            f"  outgate run -p POLICY -w WORKLOAD --pki {shlex.quote(str(directory))} -- COMMAND",
            "  # keep the root's key where no gate runs; no gate needs it",
            f"  mv {shlex.quote(root['key'])} OFFLINE",
        ]
    )


def _lines(role: str, facts: dict[str, str], purpose: str) -> list[str]:
    return [
        f"  {role:<9}{facts['subject']}  ({purpose})",
        f"  {'':<9}expires {facts['expires']}",
        f"  {'':<9}SHA-256 {facts['sha256']}",
    ]
