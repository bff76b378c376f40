"""`outgate trust doctor`: tries every client program of this machine, and says what repairs those that do not trust."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from proxy.commands import NO, NOT_STARTED, YES, Json, json_option
from proxy.commands.pki import optional_pki_option

if TYPE_CHECKING:  # `--help` needs no cryptography
    from cryptography.x509 import Certificate

    from pki.clients import Client, Fix
    from pki.doctor import Finding, Found
    from proxy.console import Console, Span

EPILOG = """\b
CLIENT is a name from the first column; without one, every client on PATH is tried.
Each is started as it would be from here: with these variables, this HOME, this directory.
A client that accepts a server which nobody is to trust is told apart: it trusts us because it does not verify.

\b
Exit codes: 0 all trust us; 1 some do not, or do not verify; 2 usage; 3 could not tell.
JSON keys: url trust clients[client program version reads kind trusts said fix[run set unset change]] missing
  trusts is yes, no, does not verify or unclear; a fix is to be done in the order run, set and unset

\b
Examples:
  outgate trust doctor --pki pki
  outgate trust doctor --pki pki --trust /etc/outgate/trust curl java
  outgate trust doctor --url https://api.example/    # in a pod: through the gate, which alone has the key
"""


MAX_PADDED = 80  # columns; the names beside a longer line follow it at once


@dataclass(frozen=True, slots=True)
class Place:
    """Where the roots stand that a fix names, and the commands that put them there and into the system's store."""

    directory: str
    bundle: tuple[str, ...]
    install: tuple[str, ...]


@click.command(epilog=EPILOG)
@optional_pki_option("Where the authority stands; needed unless there is --url.")
@click.option(
    "--trust",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="The trust directory that fixes name; if not given, the one that variables name already, else ./trust.",
)
@click.option("--url", metavar="URL", help="Fetch this instead of our own server; any answer will do.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="How long each client may take; if not given, 10, and 30 where that is known to be short.",
)
@json_option
@click.argument("names", nargs=-1, metavar="[CLIENT]...")
@click.pass_context
def doctor(
    ctx: click.Context,
    directory: Path | None,
    trust: Path | None,
    url: str | None,
    timeout_s: float | None,
    as_json: bool,
    names: tuple[str, ...],
) -> None:
    """Try every client program of this machine, and say what repairs those that do not trust the authority.

    Each fetches from a server on the loopback that shows a fresh leaf.
    """
    if url is not None and (urlsplit(url).scheme != "https" or not urlsplit(url).hostname):
        raise click.BadParameter(f"{url!r} is no https URL", param_hint="--url")
    if directory is None and url is None:
        raise click.UsageError("whose authority? name --pki DIR, or an inspected --url where its key is not kept")
    clients = _chosen(names)

    from pki.doctor import find
    from pki.store import StoreError, load_trusted
    from proxy.console import Console, stop

    try:
        roots = load_trusted(directory) if directory else ()
    except StoreError as error:
        stop(str(error), NOT_STARTED)
    place = _place(directory, trust, roots)
    found = find(clients, os.environ)
    present = {one.client.name for one in found}
    missing = [client.name for client in clients if client.name not in present]
    if not found:
        stop(f"nothing to try on PATH: {', '.join(missing)}; install one of them", NOT_STARTED)
    tried, findings = _findings(directory, url, found, timeout_s)
    fixes = [_fix(finding, place) for finding in findings]
    if as_json:
        Console().json(_json(tried, place, findings, fixes, missing))
    else:
        _show(Console(), tried, place, findings, fixes, missing)
    ctx.exit(_exit_code(findings, missing if names else ()))


def _chosen(names: Sequence[str]) -> list[Client]:
    from pki.clients import CLIENTS
    from policies.spelling import did_you_mean

    known = [client.name for client in CLIENTS]
    if wrong := [name for name in names if name not in known]:
        raise click.BadParameter(f"unknown client {wrong[0]!r}; {did_you_mean(wrong[0], known)}", param_hint="CLIENT")
    return [client for client in CLIENTS if not names or client.name in names]


def _findings(
    directory: Path | None, url: str | None, found: Sequence[Found], timeout_s: float | None
) -> tuple[str, list[Finding]]:
    """The URL that was tried, and what became of each."""
    from datetime import UTC, datetime

    from pki.authority import AuthorityError, create_authority
    from pki.clients import Target
    from pki.doctor import examine, offering
    from pki.store import StoreError, load_issuers
    from proxy.child import leave_no_core
    from proxy.console import stop

    leave_no_core(for_good=False)  # the key that signs the leaf stands in memory
    elsewhere = "where its key is not kept, name an inspected URL with --url"
    with ExitStack() as stack:
        try:
            if url is not None:
                target = Target(url)
            else:
                assert directory is not None
                target = stack.enter_context(offering(load_issuers(directory)))
            impostor = stack.enter_context(offering(create_authority(datetime.now(UTC)).issuers))
        except StoreError as error:
            stop(f"{error}; {elsewhere}", NOT_STARTED)
        except AuthorityError as error:
            stop(str(error), NOT_STARTED)
        except OSError as error:
            stop(f"no server on the loopback: {error.strerror}", NOT_STARTED)
        return target.url, examine(found, target, impostor, os.environ, timeout_s)


def _place(pki: Path | None, trust: Path | None, roots: Sequence[Certificate]) -> Place:
    from pki.distribution import environment

    directory = os.path.abspath(trust or _named(os.environ) or "trust")
    try:
        environment(directory, {})
    except ValueError as error:  # UnusableDirectory
        raise click.BadParameter(str(error), param_hint="--trust") from error
    store = str(pki) if pki else "DIR"
    bundle = () if _holds(directory, roots) else ("outgate", "trust", "bundle", "--pki", store, "--to", directory)
    return Place(directory, bundle, ("outgate", "trust", "install", "--pki", store))


def _named(variables: Mapping[str, str]) -> Path | None:
    """The trust directory that variables name already."""
    from pki.distribution import ADDING, MANIFEST, REPLACING

    named = (Path(value).parent for name in (*REPLACING, *ADDING) if (value := variables.get(name)))
    return next((directory for directory in named if (directory / MANIFEST).is_file()), None)


def _holds(directory: str, roots: Sequence[Certificate]) -> bool:
    """Whether our roots stand there already; any will do where we do not know them."""
    from pki.authority import certificates_pem
    from pki.distribution import CA

    try:
        content = Path(directory, CA).read_bytes()
    except OSError:
        return False
    return all(certificates_pem(root) in content for root in roots)


def _fix(finding: Finding, place: Place) -> Fix | None:
    from pki.clients import fix_refusal, fix_switched_off
    from pki.doctor import Trust

    client = finding.found.client
    if finding.trust is Trust.NO:
        return fix_refusal(client, os.environ, place.directory, bundle=place.bundle, install=place.install)
    return fix_switched_off(client, os.environ) if finding.trust is Trust.UNVERIFIED else None


def _exit_code(findings: Sequence[Finding], wanted: Sequence[str]) -> int:
    from pki.doctor import Trust

    found = {finding.trust for finding in findings}
    if found & {Trust.NO, Trust.UNVERIFIED}:
        return NO
    return NOT_STARTED if wanted or Trust.UNCLEAR in found else YES


def _json(
    url: str, place: Place, findings: Sequence[Finding], fixes: Sequence[Fix | None], missing: Sequence[str]
) -> Json:
    return {
        "url": url,
        "trust": place.directory,
        "clients": [_client_json(finding, fix) for finding, fix in zip(findings, fixes, strict=True)],
        "missing": list(missing),
    }


def _client_json(finding: Finding, fix: Fix | None) -> Json:
    client = finding.found.client
    return {
        "client": client.name,
        "program": finding.found.program,
        "version": finding.found.version,
        "reads": client.roots(os.environ),
        "kind": client.kind.value,
        "trusts": finding.trust.value,
        "said": finding.said,
        "fix": None if fix is None else _fix_json(fix),
    }


def _fix_json(fix: Fix) -> Json:
    return {
        "run": list(fix.command),
        "set": dict(fix.variables),
        "unset": list(fix.removed),
        "change": fix.change,
    }


def _show(
    console: Console,
    url: str,
    place: Place,
    findings: Sequence[Finding],
    fixes: Sequence[Fix | None],
    missing: Sequence[str],
) -> None:
    from proxy.console import Style

    console.line("tried with ", (url, Style.STRONG))
    console.blank()
    heads: list[Span] = [
        (head, Style.DIM) for head in ("client", "version", "trusts us", "reads its roots from", "says")
    ]
    console.rows([heads, *(list(_row(finding, findings)) for finding in findings)], indent=2)
    if missing:
        console.blank()
        console.line(("not found: ", Style.DIM), ", ".join(missing))
    lines = list(_repairs(findings, fixes))
    if lines:
        console.blank()
        console.line(("to repair it", Style.STRONG))
        console.code(lines, indent=2)
    if any(fix and fix.variables for fix in fixes):
        console.blank()
        console.line(f"for all variables at once: . {shlex.quote(place.directory)}/env.sh")


def _row(finding: Finding, findings: Sequence[Finding]) -> Iterator[Span]:
    from pki.doctor import Trust
    from proxy.console import Style

    client, program = finding.found.client, finding.found.program
    is_one = sum(other.found.client is client for other in findings) == 1
    yield client.name if is_one else f"{client.name} ({program})"
    yield finding.found.version
    yield finding.trust.value, {Trust.YES: Style.GOOD, Trust.UNCLEAR: Style.WARN}.get(finding.trust, Style.BAD)
    yield client.roots(os.environ)
    yield finding.said


def _repairs(findings: Sequence[Finding], fixes: Sequence[Fix | None]) -> Iterator[str]:
    """What to type, each line once with the clients that it repairs; the trust directory comes first."""
    names: dict[str, dict[str, None]] = {}
    for finding, fix in zip(findings, fixes, strict=True):
        for line in _lines(fix) if fix else ():
            names.setdefault(line, {})[finding.found.client.name] = None
    first = [line for line in names if line.startswith("outgate trust bundle ")]
    width = max((len(line) for line in names if len(line) <= MAX_PADDED), default=0)
    for line in first:
        yield f"{line:<{width}}  # first"
    for line in names:
        if line not in first:
            yield f"{line:<{width}}  # {', '.join(names[line])}"


def _lines(fix: Fix) -> Iterator[str]:
    if fix.command:
        yield shlex.join(fix.command)
    for name in fix.removed:
        yield f"unset {name}"
    for name, value in fix.variables.items():
        yield f"export {name}={shlex.quote(value)}"
    if fix.change:
        yield f"# {fix.change}"
