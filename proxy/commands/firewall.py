"""`outgate firewall`: the kernel's rules around a gate, from flags; the work is `proxy/firewall.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from proxy.commands import NO, NOT_STARTED, USAGE
from proxy.layout import FLAGS, SWITCHES, Layout, MalformedLayout, Mode, read_layout

if TYPE_CHECKING:
    from proxy.firewall import InForce
    from proxy.nft import Nft

EPILOG = """\b
gateway  workloads come in by a device of this machine, which routes for them
bridge   the same for a docker network; docker's own rules stay as they are
sidecar  gate and workload share a network namespace; the gate is known by its uid

\b
Example:
  outgate firewall render --mode gateway --workload-device br0 --upstream-device eth0
  sudo outgate firewall apply --mode gateway --workload-device br0 --upstream-device eth0
  sudo outgate firewall status
  sudo outgate firewall remove
"""
RENDER_EPILOG = """\b
Needs no privilege, and none of the devices. `nft -f` loads it: /etc/nftables.conf may include it.
Exit codes: 0 printed; 2 usage.

\b
Example:
  outgate firewall render --mode sidecar > sidecar.nft
"""
APPLY_EPILOG = """\b
In one transaction: rules of ours that are there are replaced, those of others are not touched.
Exit codes: 0 in force (with --check: could be); 2 usage; 3 could not, and nothing was changed.

\b
Example:
  sudo outgate firewall apply --mode bridge --workload-device br-outgate
"""
REMOVE_EPILOG = """\b
Then nothing is guarded any more. Rules of others stay.
Exit codes: 0 they are gone; 1 there were none; 3 could not.

\b
Example:
  sudo outgate firewall remove
"""
STATUS_EPILOG = """\b
Exit codes: 0 in force, and as rendered; 1 not in force, or changed by somebody; 3 could not look.

\b
Example:
  sudo outgate firewall status --json
"""


@click.group(epilog=EPILOG)
def firewall() -> None:
    """Load the kernel's rules that lead a workload to the gate and leave it no other way."""


def layout_options[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """An option for each flag of a layout, as text."""
    for field, (says, modes) in reversed(SWITCHES.items()):
        command = click.option(f"--{field}/--no-{field}", field, default=None, help=says + _only(modes))(command)
    for flag in reversed(FLAGS):
        says = flag.says + _only(flag.modes) + (" Repeatable." if flag.many else "")
        command = click.option(flag.name, flag.field, multiple=True, metavar=flag.metavar, help=says)(command)
    return click.option(
        "--mode", required=True, type=click.Choice([mode.value for mode in Mode]), help="Where the gate stands."
    )(command)


def _only(modes: frozenset[Mode]) -> str:
    return "" if modes == frozenset(Mode) else f" Only {' and '.join(sorted(modes))}."


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object.")


@firewall.command(epilog=RENDER_EPILOG)
@layout_options
def render(mode: str, **flags: Any) -> None:  # Any: texts or a switch by field, as click has read them
    """Print the rules."""
    from proxy.ruleset import render as render_rules

    click.echo(render_rules(_layout(mode, flags)), nl=False)


@firewall.command(epilog=APPLY_EPILOG)
@click.option("--check", "is_check", is_flag=True, help="Ask the kernel whether it would take them; change nothing.")
@json_option
@layout_options
def apply(mode: str, is_check: bool, as_json: bool, **flags: Any) -> None:  # Any: as above
    """Put the rules in force."""
    from datetime import UTC, datetime

    from proxy.console import stop
    from proxy.firewall import FirewallRefused, what_hinders
    from proxy.firewall import apply as apply_rules

    layout = _layout(mode, flags)
    since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        kept = apply_rules(_nft(), layout, since=since, is_check=is_check)
    except FirewallRefused as error:
        stop(str(error), NOT_STARTED)
    if as_json:
        click.echo(json.dumps({"mode": layout.mode, "applied": not is_check, "openingsKept": kept}))
    elif is_check:
        click.echo(f"the kernel would take the rules of a {layout.mode}; nothing was changed", err=True)
    else:
        openings = f"; {kept} openings kept" if kept else ""
        click.echo(f"the rules of a {layout.mode} are in force{openings}", err=True)
    if why := what_hinders(layout):
        click.echo(f"outgate: {why}", err=True)


@firewall.command(epilog=REMOVE_EPILOG)
@json_option
def remove(as_json: bool) -> None:
    """Take the rules away."""
    from proxy.console import stop
    from proxy.firewall import FirewallRefused
    from proxy.firewall import remove as remove_rules

    try:
        was_there = remove_rules(_nft())
    except FirewallRefused as error:
        stop(str(error), NOT_STARTED)
    if as_json:
        click.echo(json.dumps({"removed": was_there}))
    else:
        click.echo("the rules are gone" if was_there else "there were no rules of ours", err=True)
    raise SystemExit(0 if was_there else NO)


@firewall.command(epilog=STATUS_EPILOG)
@json_option
def status(as_json: bool) -> None:
    """Say which rules are in force, what they stopped, and whether somebody changed them."""
    from proxy.console import stop
    from proxy.firewall import FirewallRefused, look

    try:
        found = look(_nft())
    except FirewallRefused as error:
        stop(str(error), NOT_STARTED)
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=2))
    else:
        _show(found)
    raise SystemExit(NO if found is None or found.differences else 0)


def _layout(mode: str, flags: dict[str, Any]) -> Layout:  # Any: as above
    from proxy.console import stop

    switches = {field: flags.pop(field) for field in SWITCHES}
    try:
        return read_layout(mode, flags, {field: value for field, value in switches.items() if value is not None})
    except MalformedLayout as error:
        stop(str(error), USAGE)


def _nft() -> Nft:
    from proxy.console import stop
    from proxy.firewall import FirewallRefused, require_capability
    from proxy.nft import NftMissing, open_nft

    try:
        require_capability()
        return open_nft()
    except FirewallRefused as error:
        stop(str(error), NOT_STARTED)
    except NftMissing:
        stop("neither libnftables.so.1 nor the program nft is here; install the package nftables", NOT_STARTED)


def _as_json(found: InForce | None) -> dict[str, object]:
    if found is None:
        return {"inForce": False}
    return {
        "inForce": True,
        "mode": found.layout and found.layout.mode,
        "since": found.since or None,
        "flags": found.words,
        "counters": {name: {"packets": packets, "bytes": size} for name, (packets, size) in found.counted.items()},
        "openings": found.open,
        "differences": found.differences,
    }


def _show(found: InForce | None) -> None:
    from proxy.console import Console, Style

    console = Console()
    if found is None:
        console.line(("not in force", Style.BAD), ": none of our rules is here; outgate firewall apply loads them")
        return
    since = f"since {found.since}" if found.since else "loaded by nft -f"
    console.rows(
        [
            ("mode", f"{found.layout.mode if found.layout else 'unknown'}, {since}"),
            ("flags", " ".join(found.words)),
            *((name, f"{packets} packets") for name, (packets, _) in found.counted.items()),
            ("openings", str(found.open)),
        ]
    )
    for difference in found.differences:
        console.line(("changed: ", Style.BAD), difference)
    if found.differences:
        console.line("outgate firewall apply, with these flags, puts it right")
