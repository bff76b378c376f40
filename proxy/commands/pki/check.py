"""`outgate pki check`: what is wrong with a CA, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.commands import NO, NOT_STARTED, YES, Json, json_option
from proxy.commands.pki.keys import password_option

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from collections.abc import Iterable

    from pki.lint import Fault
    from pki.pkcs12 import Loaded
    from proxy.console import Console

PROFILES = ("strict", "azure-firewall", "aws-nfw")

EPILOG = """\b
FILE is PKCS#12 (a PFX), PEM or DER. Each line is a fault and what repairs it; advice alone is no fault.
  strict          what the strictest clients ask for, of an issuing CA or a root
  azure-firewall  what Azure Firewall Premium publishes
  aws-nfw         what AWS Network Firewall and ACM publish, for outbound inspection

\b
Exit codes: 0 no fault; 1 faults; 2 usage; 3 FILE cannot be read.
JSON keys: file profile ok certificate[id subject sha256 expires] faults[what repair breaks]
  breaks is false for advice

\b
Examples:
  outgate pki check issuing.pfx --password-file password
  outgate pki check azure.pfx --profile azure-firewall
"""


@click.command(epilog=EPILOG)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--profile", type=click.Choice(PROFILES), default=PROFILES[0], show_default=True, help="Who is to accept the CA."
)
@click.option("--key", type=click.Path(path_type=Path), metavar="FILE", help="The key, if FILE has none.")
@click.option("--chain", type=click.Path(path_type=Path), metavar="FILE", help="Who signed it, up to the root.")
@password_option
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    file: Path,
    profile: str,
    key: Path | None,
    chain: Path | None,
    password_file: Path | None,
    as_json: bool,
) -> None:
    """Say what is wrong with a CA, and what to change."""
    from datetime import UTC, datetime

    from pki.lint import Profile, faults
    from pki.pkcs12 import Unreadable, assemble, read_file, read_password
    from proxy.console import Console, stop

    try:
        password = read_password(password_file) if password_file else None
        found = [read_file(path, password) for path in (file, key) if path]
        above = read_file(chain).certificates if chain else ()
    except Unreadable as error:
        stop(str(error), NOT_STARTED)
    try:
        loaded = assemble(*found, above=above)
    except Unreadable as error:
        stop(f"{file}: {error}", NOT_STARTED)
    found_faults = faults(loaded, Profile(profile), datetime.now(UTC))
    is_fine = not any(fault.breaks for fault in found_faults)
    if as_json:
        Console().json(_json(file, profile, loaded, found_faults))
    else:
        show_faults(Console(), file, found_faults)
        if is_fine:
            _show_fine(Console(), file, profile, loaded)
    ctx.exit(YES if is_fine else NO)


def show_faults(console: Console, place: Path, faults: Iterable[Fault]) -> None:
    """One line for each."""
    from proxy.console import Style

    for fault in faults:
        kind = ("fault", Style.BAD) if fault.breaks else ("advice", Style.WARN)
        console.line((f"{place}: ", Style.STRONG), kind, f": {fault.what}; {fault.repair}")


def _show_fine(console: Console, file: Path, profile: str, loaded: Loaded) -> None:
    from proxy.commands.pki.showing import expiry
    from proxy.console import Style

    ca = loaded.certificate
    console.line(f"{file}: ", ("fine", Style.GOOD), f" for {profile}: {ca.subject.rfc4514_string()}, {expiry(ca)}")


def _json(file: Path, profile: str, loaded: Loaded, faults: Iterable[Fault]) -> Json:
    from dataclasses import asdict

    from proxy.commands.pki.showing import certificate_json

    return {
        "file": str(file),
        "profile": profile,
        "ok": not any(fault.breaks for fault in faults),
        "certificate": certificate_json(loaded.certificate),
        "faults": [asdict(fault) for fault in faults],
    }
