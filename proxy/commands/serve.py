"""`outgate serve`: the command line of it, made from the table of keys; the work is `proxy/serve.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from proxy.commands import USAGE
from proxy.config.key import PREFIX
from proxy.config.keys import KEYS

EPILOG = """\b
Each of them but --check is also a variable (--proxy-listen is OUTGATE_PROXY_LISTEN), and a key of gate.yaml:
a flag wins over a variable, a variable over the file. docs/configuration.md has every key with its default.
Redirected connections come by nft REDIRECT (or iptables -j REDIRECT); one made to the gate's own port is refused.
Decision records go to standard output: readable lines on a terminal, JSON lines elsewhere.
SIGHUP, or a change of its files or of the --pki directory, reloads policy and issuing CA.
Exit codes: 0 stopped, or checked; 2 usage; 3 could not start.

\b
Example:
  outgate serve -p policy.yaml --pki pki --listen 0.0.0.0:15001
  outgate serve --mode proxy -p policy.yaml --proxy-listen 127.0.0.1:3128
  outgate serve --config gate.yaml --check
"""

_HEADINGS = {key.argument: key.group.value for key in KEYS}


class GroupedCommand(click.Command):
    """A command whose `--help` has the options under the headings of the table, its own first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if row := param.get_help_record(ctx):
                sections.setdefault(_HEADINGS.get(param.name or "", "Options"), []).append(row)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def config_options[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """An option for each key, as text: what it means is read by the same words as in gate.yaml."""
    for key in reversed(KEYS):
        option = click.option(
            *(key.flags or (key.flag,)),
            key.argument,
            multiple=key.many is not None,
            metavar=key.metavar,
            help=key.says + (" Repeatable." if key.many else ""),
        )
        command = option(command)
    return command


@click.command(cls=GroupedCommand, epilog=EPILOG)
@click.option(
    "--config", "file", envvar=f"{PREFIX}CONFIG", type=click.Path(), metavar="FILE", help="All of this in a gate.yaml."
)
@click.option("--check", is_flag=True, help="Read and check configuration and policy, and end.")
@config_options
def serve(file: str | None, check: bool, **flags: Any) -> None:  # Any: text by key, or several, as click has read it
    """Serve in the foreground, until SIGINT or SIGTERM.

    As gateway or sidecar for connections that the kernel redirects, or as a proxy for clients that know of it.
    """
    from proxy.config.reading import near_misses, read_config
    from proxy.options import Misused, say

    for line in near_misses(os.environ):
        say(line)
    try:
        config = read_config(file, os.environ, flags)
    except Misused as error:
        say(str(error))
        raise SystemExit(USAGE) from error

    from proxy import serve as service

    raise SystemExit(service.check(config) if check else service.serve(config))
