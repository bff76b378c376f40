"""`outgate credentials`: the users of an explicit proxy, in the file that `credentials:` names."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import click

from proxy.commands import NO, NOT_STARTED, USAGE

GENERATED = 24  # bytes: 192 bits, which no guessing finds
MAX_LINE = 4096

EPILOG = """\b
Example:
  outgate credentials add --generate proxy.credentials build
  outgate serve --mode proxy --proxy-listen 127.0.0.1:3128 -p policy.yaml --credentials proxy.credentials
  curl --proxy http://build:PASSWORD@127.0.0.1:3128 https://example.com/
"""
CODES = "\b\nExit codes: 0 yes; 1 no ({no}); 2 usage; 3 the file cannot be read or written."

FILE = click.argument("path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
NAME = click.argument("name", metavar="NAME")


@click.group(epilog=EPILOG)
def credentials() -> None:
    """Keep the users of an explicit proxy: names, and hashes of their passwords.

    A policy says what a user may reach with `match: {user: NAME}`. A running gate reads the file anew when it changes.
    """


@credentials.command(epilog=CODES.format(no="never"))
@FILE
@NAME
@click.option("--generate", is_flag=True, help="Make a new random password and print it, this once.")
def add(path: Path, name: str, *, generate: bool) -> None:
    """Add NAME, or give it another password: asked for twice, or the first line of standard input."""
    from proxy.console import stop
    from proxy.explicit.credentials import (
        CredentialsError,
        MalformedCredential,
        hash_password,
        parse_name,
        store_credential,
    )

    try:
        known_as = parse_name(name)
        password = secrets.token_urlsafe(GENERATED) if generate else _read_password(confirms=True)
        hashed = hash_password(password)
    except MalformedCredential as error:
        stop(str(error), USAGE)
    try:
        is_new = not store_credential(path, known_as, hashed)
    except CredentialsError as error:
        stop(str(error), NOT_STARTED)
    click.echo(f'{path}: {"added" if is_new else "gave another password to"} "{known_as}"', err=True)
    if generate:
        click.echo(password)


@credentials.command(epilog=CODES.format(no="there is no such name"))
@FILE
@NAME
def remove(path: Path, name: str) -> None:
    """Remove NAME. Connections that it has open go on until they end."""
    from unicodedata import normalize

    from proxy.console import stop
    from proxy.explicit.credentials import CredentialsError, remove_credential

    try:
        was_there = remove_credential(path, normalize("NFC", name))
    except CredentialsError as error:
        stop(str(error), NOT_STARTED)
    if not was_there:
        stop(f'{path}: holds no "{name}"; outgate credentials list shows who is there', NO)
    click.echo(f'{path}: removed "{name}"', err=True)


@credentials.command("list", epilog=CODES.format(no="never"))
@FILE
@click.option("--json", "as_json", is_flag=True, help="A JSON array of names.")
def list_names(path: Path, *, as_json: bool) -> None:
    """Print the names, one a line."""
    from proxy.console import stop
    from proxy.explicit.credentials import CredentialsError, read_credentials

    try:
        names = sorted(read_credentials(path))
    except CredentialsError as error:
        stop(str(error), NOT_STARTED)
    if as_json:
        click.echo(json.dumps(names))
    else:
        click.echo("".join(f"{name}\n" for name in names), nl=False)


@credentials.command(
    epilog="\b\nExit codes: 0 yes; 1 no (no gate can use the file, or it is not the password); 2 usage."
)
@FILE
@click.argument("name", metavar="[NAME]", required=False)
def check(path: Path, name: str | None) -> None:
    """Say whether a gate can use FILE; with NAME, whether a password is right."""
    from unicodedata import normalize

    from proxy.console import stop
    from proxy.explicit.credentials import NOBODY, CredentialsError, read_credentials

    try:
        hashes = read_credentials(path)
    except CredentialsError as error:
        stop(str(error), NO)
    if name is None:
        click.echo(f"{path}: {len(hashes)} {'name' if len(hashes) == 1 else 'names'}")
        return
    password = normalize("NFC", _read_password(confirms=False))
    known = hashes.get(normalize("NFC", name))
    if not (known or NOBODY).is_of(password) or known is None:
        stop(f'{path}: not the password of "{name}", or there is no such name', NO)
    click.echo(f'{path}: that is the password of "{name}"')


def _read_password(*, confirms: bool) -> str:
    """Never an argument: arguments are seen by every user of the machine, and kept in the shell's history."""
    if sys.stdin.isatty():
        given: str = click.prompt("Password", hide_input=True, confirmation_prompt=confirms, err=True)
        return given
    try:
        return sys.stdin.readline(MAX_LINE).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise click.UsageError("the password on standard input is not UTF-8") from error
