"""`outgate version`: what to put into a bug report."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version as version_of

import click

PARTS = ("outgate", "mitmproxy", "cryptography")


@click.command(epilog="\b\nExample:\n  outgate version --json")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object: outgate, mitmproxy, cryptography, python, openssl, kernel.",
)
def version(as_json: bool) -> None:
    """Print the versions that matter."""
    import ssl

    found = {part: version_of(part) for part in PARTS}
    found |= {"python": platform.python_version(), "openssl": ssl.OPENSSL_VERSION, "kernel": platform.release()}
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, text in found.items():
        click.echo(f"{name:<13}{text}")
