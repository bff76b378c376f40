"""`outgate run`: the command line of it; the work is `proxy/run.py`."""

from __future__ import annotations

from typing import Any

import click

from proxy.commands.gate import gate_options
from proxy.options import GateOptions

NOT_STARTED = 125

EPILOG = """\b
Standard output is the command's alone. What was refused is said on standard error when it ends.
Exit codes: the command's own; 125 it was not started; 126 it cannot be executed, 127 it was not found; 128+N signal N.

\b
Example:
  outgate run -p weather.yaml -w weather -- python weather.py
  outgate run -p policy.yaml --host api.example=127.0.0.1:8443 --upstream-ca test-ca.pem -- pytest
"""


class RunCommand(click.Command):
    """A command whose usage errors are 125: every other code may be that of the program it runs."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:  # Any: handed through to click unread
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            error.show()
            raise SystemExit(NOT_STARTED) from error


@click.command(cls=RunCommand, epilog=EPILOG, context_settings={"allow_interspersed_args": False})
@gate_options
@click.option(
    "--proxy-env",
    is_flag=True,
    help="No sandbox, only proxy variables: advisory, a program that ignores them is not confined.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND [ARG]...")
def run(command: tuple[str, ...], proxy_env: bool, **said: Any) -> None:  # Any: the fields of GateOptions, by click
    """Run a command that reaches what its policy names and nothing else.

    On Linux it runs in namespaces of its own, without root: no interface but a loopback that leads to the gate.
    """
    from proxy.run import run as run_command

    raise SystemExit(run_command(GateOptions(**said), command, proxy_env=proxy_env))
