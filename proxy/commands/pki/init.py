"""`outgate pki init`: a new authority."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.commands import NO, NOT_STARTED, USAGE, Json, json_option
from proxy.commands.pki import pki_option
from proxy.commands.pki.constraints import constrain_options, permitted_by
from proxy.commands.pki.keys import KEY, is_remote, password_option, read_keys, remove_unused_keys, write_keys
from proxy.commands.pki.showing import ISSUING, ROOT, ca_json, show_ca, show_root_keys

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from pki.authority import Authority, CaKey, Line

EPILOG = """\b
--root-key FILE keeps the root offline: FILE has its key, and is made (mode 0600) where there is none; the directory
gets the certificate alone. With --rsa FILE has the keys of both roots. --issuing-key FILE is copied into the directory:
gates sign with it. pkcs11:URI (RFC 7512, with module-path, and pin-source for the PIN's file) names a key in a token;
the directory gets the URI.

\b
Exit codes: 0 made; 1 there is an authority already; 2 usage; 3 could not write, or not read a key or the policy.
JSON keys: pki root[id subject sha256 expires certificate key ...] issuing[as root; permitted] rsa[root issuing]
  key is a path or a URI; permitted is null without constraints; rsa is null without --rsa

\b
Examples:
  outgate pki init --pki pki --name "Example Corp"
  outgate pki init --pki limited --constrain-to policy.yaml --issuing-days 90
  outgate pki init --pki guarded --root-key offline.key --rsa
"""


@click.command(epilog=EPILOG)
@pki_option
@click.option("--name", default="Outgate", show_default=True, help="The organisation shown in its certificates.")
@click.option(
    "--root-years", type=click.IntRange(1, 50), default=10, show_default=True, help="How long the root is trusted."
)
@click.option(
    "--issuing-days",
    type=click.IntRange(1, 3650),
    default=365,
    show_default=True,
    help="How long the issuing CA signs, within its root's life.",
)
@click.option("--rsa", "with_rsa", is_flag=True, help="The same again beside, with RSA-3072 keys for old clients.")
@constrain_options
@click.option("--root-key", metavar=KEY, help="Where the root's key is, or is to be made.")
@click.option("--issuing-key", metavar=KEY, help="The issuing CA's key, instead of a new one.")
@password_option
@json_option
def init(
    directory: Path,
    name: str,
    root_years: int,
    issuing_days: int,
    with_rsa: bool,
    policies: tuple[str, ...],
    tags: tuple[str, ...],
    root_key: str | None,
    issuing_key: str | None,
    password_file: Path | None,
    as_json: bool,
) -> None:
    """Make an authority: a root that workloads trust, and the issuing CA that the gate signs with."""
    from datetime import UTC, datetime, timedelta

    from pki.authority import AuthorityError, create_authority
    from pki.signer import SignerError
    from proxy.console import Console, stop

    permitted = permitted_by(policies, tags) if policies else ()
    offline = Path(root_key) if root_key and not is_remote(root_key) else None
    makes_file = offline is not None and not os.path.lexists(offline)
    try:
        authority = create_authority(
            datetime.now(UTC),
            name=name,
            root_years=root_years,
            issuing_life=timedelta(days=issuing_days),
            permitted=permitted,
            with_rsa=with_rsa,
            root_keys=_root_keys(root_key, password_file, with_rsa) if root_key and not makes_file else {},
            issuing_key=read_keys(issuing_key, password_file)[0] if issuing_key else None,
        )
    except AuthorityError as error:
        stop(str(error), USAGE)
    except SignerError as error:
        stop(str(error), NOT_STARTED)
    if makes_file and offline:
        write_keys(offline, [root.key for root in authority.roots if root.key], password_file)
    _save(authority, directory, offline, is_new=makes_file)

    if as_json:
        Console().json(_made(directory, offline))
    else:
        _show(directory, offline, is_new=makes_file)


def _root_keys(source: str, password_file: Path | None, with_rsa: bool) -> Mapping[Line, CaKey]:
    """The key of each root. A token has the main line's; a file has both."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    from pki.authority import Line
    from proxy.console import stop

    main, *others = read_keys(source, password_file)
    if is_remote(source) or not with_rsa:
        return {Line.MAIN: main}
    beside = next((key for key in others if isinstance(key, rsa.RSAPrivateKey)), None)
    if beside is None:
        stop(f"{source}: no RSA key after the first; name a file that is not there, and both are made", NOT_STARTED)
    return {Line.MAIN: main, Line.RSA: beside}


def _save(authority: Authority, directory: Path, offline: Path | None, *, is_new: bool) -> None:
    """Writes it, without root keys that are `offline`. Where that fails, a file made for these goes too."""
    from pki.store import StoreError, StoreExists, save
    from proxy.console import stop

    roots = tuple(replace(root, key=None) if offline else root for root in authority.roots)
    try:
        save(replace(authority, roots=roots), directory)
    except StoreError as error:
        if offline and is_new:
            remove_unused_keys(offline, directory, authority.roots)
        stop(str(error), NO if isinstance(error, StoreExists) else NOT_STARTED)


def _made(directory: Path, offline: Path | None) -> Json:
    """Each CA as JSON: `root` and `issuing` of the main line, and the same below `rsa`."""
    from pki.authority import Line
    from pki.store import survey

    found = survey(directory)
    lines: dict[Line, Json] = {}
    for root, issuing in zip(found.roots, found.issuing, strict=True):
        lines[root.line] = {"root": ca_json(ROOT, root), "issuing": ca_json(ISSUING, issuing)}
        if offline:
            lines[root.line]["root"] = ca_json(ROOT, root) | {"key": str(offline)}
    return {"pki": str(directory), **lines[Line.MAIN], "rsa": lines.get(Line.RSA)}


def _show(directory: Path, offline: Path | None, *, is_new: bool) -> None:
    """What was made and what to do next, for a person."""
    from pki.authority import Line
    from pki.store import survey
    from proxy.console import Console

    found = survey(directory)
    console = Console()
    console.line(f"made an authority in {directory}")
    console.blank()
    for root, issuing in zip(found.roots, found.issuing, strict=True):
        for_whom = ", old clients too" if root.line is Line.RSA else ""
        show_ca(console, ROOT, root.certificate, f"what workloads trust{for_whom}")
        show_ca(console, ISSUING, issuing.certificate, f"what the gate signs with{for_whom}")
    console.blank()
    console.line("next:")
    where = shlex.quote(str(directory))
    console.line("# inspect what a command says", indent=2)
    console.code([f"outgate run -p POLICY -w WORKLOAD --pki {where} -- COMMAND"], indent=2)
    console.line("# have workloads trust the root before a gate that serves inspects them", indent=2)
    console.code([f"outgate trust bundle --pki {where} --to trust"], indent=2)
    if offline:
        made = "was made and " if is_new else ""
        console.line(f"# {offline} {made}has the root's key, and {directory} has not: keep it safe", indent=2)
    else:
        show_root_keys(console, found.roots)
