"""`outgate trust env`: the variables, as text for whoever sets them."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.commands import NOT_STARTED
from proxy.commands.pki import pki_option
from proxy.commands.trust.bundle import directory_options, made

if TYPE_CHECKING:
    from pki.distribution import Environment

EPILOG = """\b
The files are written to --to first, as by `outgate trust bundle`.
sh, fish, powershell, github and json are for this environment: JAVA_TOOL_OPTIONS is added to, other values are
replaced, and standard error names them. dotenv (docker run --env-file) and yaml (`env:` of a Kubernetes container) are
for another environment: nothing of this one enters.

\b
Exit codes: 0 printed; 2 usage; 3 could not read or write.
JSON keys (--format json): variables removed[] replaced[]

\b
Examples:
  eval "$(outgate trust env --pki pki --to trust)"
  outgate trust env --pki pki --to trust --format github >> "$GITHUB_ENV"
  outgate trust env --pki pki --to trust --mount-path /trust --format dotenv > trust.env
  docker run --env-file trust.env -v ./trust:/trust:ro …
"""

ELSEWHERE = ("dotenv", "yaml")  # formats that are read on another machine
UNSETTING = ("sh", "fish", "powershell", "json")  # formats that can take a variable away


def sh(found: Environment) -> list[str]:
    """For POSIX shells, bash and zsh."""
    return [f"export {name}={shlex.quote(value)}" for name, value in found.variables.items()] + [
        f"unset {name}" for name in found.removed
    ]


def fish(found: Environment) -> list[str]:
    return [f"set -gx {name} '{_escaped(value)}'" for name, value in found.variables.items()] + [
        f"set -e {name}" for name in found.removed
    ]


def powershell(found: Environment) -> list[str]:
    return [f"$env:{name} = '{_doubled(value)}'" for name, value in found.variables.items()] + [
        f"Remove-Item -LiteralPath Env:{name}" for name in found.removed
    ]


def lines(found: Environment) -> list[str]:
    """`NAME=value` with nothing quoted: docker's --env-file, and GitHub's $GITHUB_ENV."""
    return [f"{name}={value}" for name, value in found.variables.items()]


def yaml(found: Environment) -> list[str]:
    # Kubernetes expands $(NAME) in a value; $$ is one dollar. A JSON string is a YAML one.
    doubled = {name: value.replace("$", "$$") for name, value in found.variables.items()}
    return [f"- name: {name}\n  value: {json.dumps(value)}" for name, value in doubled.items()]


def as_json(found: Environment) -> list[str]:
    names = {"removed": found.removed, "replaced": found.replaced}
    return [json.dumps({"variables": dict(found.variables), **names}, indent=2)]


FORMATS: Mapping[str, Callable[[Environment], list[str]]] = {
    "sh": sh,
    "fish": fish,
    "powershell": powershell,
    "dotenv": lines,
    "github": lines,
    "yaml": yaml,
    "json": as_json,
}


@click.command(epilog=EPILOG)
@pki_option
@directory_options
@click.option("--format", "spelling", type=click.Choice(list(FORMATS)), default="sh", show_default=True)
def env(directory: Path, to: Path, public: str, mount_path: str | None, spelling: str) -> None:
    """Print the variables that make every runtime trust the authority."""
    place, _ = made(directory, to, public, mount_path)
    from pki.distribution import environment
    from proxy.console import stop

    found = environment(place, {} if spelling in ELSEWHERE else os.environ)
    if spelling == "github" and (broken := [name for name, value in found.variables.items() if "\n" in value]):
        stop(f"{broken[0]} has a line break, and would be two variables to GitHub; unset it first", NOT_STARTED)
    for line in FORMATS[spelling](found):
        click.echo(os.fsencode(line))  # what was in the environment need not be text
    _tell(found, spelling)


def _tell(found: Environment, spelling: str) -> None:
    from proxy.options import say

    kept = () if spelling in UNSETTING else found.removed
    if replaced := [name for name in found.replaced if name not in kept]:
        say(f"replaced: {' '.join(replaced)}")
    if kept:
        say(f"still set, and may keep programs from trusting us: {' '.join(kept)}; unset them")


def _escaped(value: str) -> str:
    """For fish: between single quotes a backslash escapes itself and the quote, and nothing else is special."""
    return re.sub(r"[\\']", r"\\\g<0>", value)


def _doubled(value: str) -> str:
    """For PowerShell, to which four further characters are single quotes too."""
    return re.sub("['\u2018\u2019\u201a\u201b]", r"\g<0>\g<0>", value)
