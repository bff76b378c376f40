"""`outgate relay` and `outgate relay status`: the command lines of them; the work is `proxy/relay.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from proxy.commands import NO, NOT_STARTED, USAGE, YES, tags_option

if TYPE_CHECKING:
    from proxy.relays.ntp.told import Told

DEFAULT_ADMIN = "127.0.0.1:9902"

EPILOG = """\b
In mode serve the servers are asked on a schedule of the relay's own, and no client changes what they see. In mode relay
clients have them asked, at most every 2 s.
Decision records go to standard output: one for each source, verdict and minute. SIGHUP, or a change of its files,
reloads the policy.
Exit codes: 0 stopped; 2 usage; 3 could not start.

\b
Example:
  outgate relay -p policy.yaml --listen 0.0.0.0:123
  outgate relay -p policy.yaml -w weather --listen 127.0.0.1:10123 --host ntp.ubuntu.com=10.0.0.7
  outgate relay -p policy.yaml --nts time1.example --nts time2.example
  outgate relay status
"""

STATUS_EPILOG = """\b
Exit codes: 0 synchronised; 1 not; 2 usage; 3 no relay answers there.
JSON keys: ready because notes estimate[offset_s root_delay_s root_dispersion_s stratum rate] clients answers drops
  sources[server seat address state offset_s delay_s stratum reach poll_s age_s nts
  nts_cookies polls failures]

\b
Example:
  outgate relay status
  outgate relay status --admin 127.0.0.1:9902 --json
"""


@click.group(epilog=EPILOG, invoke_without_command=True)
@click.option(
    "-p",
    "--policy",
    "paths",
    multiple=True,
    envvar="OUTGATE_POLICY",
    show_envvar=True,
    type=click.Path(),
    metavar="FILE",
    help="Policy file; repeat to merge several.  [required]",
)
@tags_option
@click.option(
    "-w",
    "--workload",
    metavar="NAME",
    envvar="OUTGATE_WORKLOAD",
    show_envvar=True,
    help="Whose rules count for every packet; without it the source address says.",
)
@click.option(
    "--listen",
    multiple=True,
    metavar="ADDR:PORT",
    help="Where clients ask; repeatable.  [default: every address, port 123]",
)
@click.option(
    "--mode", type=click.Choice(["serve", "relay"]), default="serve", show_default=True, help="Who has servers asked."
)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME=ADDR[:PORT]",
    help="Ask this address for the name; private, loopback and a cloud's link-local time server are allowed.",
)
@click.option(
    "--nts",
    multiple=True,
    metavar="NAME[:PORT]|all",
    envvar="OUTGATE_NTS",
    show_envvar=True,
    help="This server has to prove what it says (NTS, RFC 8915), with its key exchange at PORT (4460); repeatable.",
)
@click.option(
    "--upstream-ca", metavar="FILE", help="PEM roots that key exchanges are verified by.  [default: the system's]"
)
@click.option("--log", metavar="FILE", help="Append decision records there; - is standard error.")
@click.option(
    "--admin",
    default=DEFAULT_ADMIN,
    show_default=True,
    metavar="ADDR:PORT|none",
    help="Where /healthz, /readyz and /metrics are answered.",
)
@click.option(
    "--drain-s",
    default="0",
    show_default=True,
    metavar="SECONDS",
    envvar="OUTGATE_DRAIN_S",
    show_envvar=True,
    help="Seconds that it answers on, not ready, when it is told to end.",
)
@click.pass_context
def relay(
    ctx: click.Context,
    paths: tuple[str, ...],
    tags: tuple[str, ...],
    workload: str | None,
    listen: tuple[str, ...],
    mode: str,
    hosts: tuple[str, ...],
    nts: tuple[str, ...],
    upstream_ca: str | None,
    log: str | None,
    admin: str,
    drain_s: str,
) -> None:
    """Give workloads the time, from servers that their rules name (ntp:)."""
    if ctx.invoked_subcommand is not None:
        return
    if not paths:
        raise click.UsageError("Missing option '-p' / '--policy'.", ctx)

    from proxy.console import stop
    from proxy.options import Misused
    from proxy.relay import RelayMode, RelayOptions, read_address, read_admin, read_seconds
    from proxy.relay import relay as give_time

    try:
        options = RelayOptions(
            paths=paths,
            tags=tags,
            workload=workload,
            listen=tuple(read_address("--listen", text) for text in listen),
            mode=RelayMode(mode),
            hosts=hosts,
            nts=nts,
            upstream_ca=upstream_ca,
            log=log,
            admin=read_admin("--admin", admin),
            drain_s=read_seconds("--drain-s", drain_s),
        )
    except Misused as error:
        stop(str(error), USAGE)
    ctx.exit(give_time(options))


@relay.command(epilog=STATUS_EPILOG)
@click.option("--admin", default=DEFAULT_ADMIN, show_default=True, metavar="ADDR:PORT", help="The relay's --admin.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def status(ctx: click.Context, admin: str, as_json: bool) -> None:
    """Say what time a running relay gives, and how its servers stand."""
    from proxy.console import Console, stop
    from proxy.options import Misused
    from proxy.relay import read_address
    from proxy.relays.ntp.told import NoRelay, ask_relay

    try:
        told = ask_relay(read_address("--admin", admin))
    except Misused as error:
        stop(str(error), USAGE)
    except NoRelay as error:
        stop(str(error), NOT_STARTED)
    if as_json:
        Console().json(told.as_json())
    else:
        _show(told)
    ctx.exit(YES if told.ready else NO)


def _show(told: Told) -> None:
    from proxy.console import Cell, Console, Style

    console = Console()
    console.line(("synchronised", Style.GOOD) if told.ready else ("; ".join(told.because), Style.BAD))
    console.blank()
    facts: list[list[Cell]] = (
        [
            [("stratum", Style.DIM), f"{told.estimate['stratum']:g}"],
            [("this machine", Style.DIM), _lag(told.estimate["offset_s"])],
            [("error at most", Style.DIM), _ms(told.error_s)],
        ]
        if told.estimate
        else []
    )
    facts.append([("clients", Style.DIM), f"{told.clients} ({told.answers} answers)"])
    drops = ", ".join(f"{count} {reason}" for reason, count in told.drops.items() if count)
    facts.append([("dropped", Style.DIM), drops or "nothing"])
    console.rows(facts, indent=2)
    console.blank()
    head = ("server", "address", "state", "stratum", "offset", "delay", "reach", "poll", "age", "nts")
    rows: list[list[Cell]] = [[(word, Style.DIM) for word in head]]
    for one in told.sources:
        if one["state"] == "spare":
            continue
        good = one["state"] == "selected"
        rows.append(
            [
                str(one["server"]),
                str(one["address"]) or "-",
                (str(one["state"]), Style.GOOD if good else Style.WARN),
                _or_dash(one["stratum"], "{:g}"),
                _or_dash(one["offset_s"], "{:+.6f} s"),
                _or_dash(one["delay_s"], "{:.6f} s"),
                _or_dash(one["reach"], "{:g}/8"),
                _or_dash(one["poll_s"], "{:g} s"),
                _or_dash(one["age_s"], "{:.0f} s"),
                _or_dash(one["nts_cookies"], "{:g} cookies") if one["nts"] else "-",
            ]
        )
    console.rows(rows, indent=2)
    for note in told.notes:
        console.line((note, Style.DIM), indent=2)


def _or_dash(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, float | int) else "-"


def _lag(offset_s: float) -> str:
    return f"{_ms(abs(offset_s))} {'behind' if offset_s >= 0 else 'ahead'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3f} ms"
