"""The command `outgate`: finds the subcommand and imports it alone, so that `why` never pays for the gate."""

from __future__ import annotations

import sys

import click

from proxy.commands.lazy import lazy_group
from proxy.own_code import settle_imports

COMMANDS = {  # name: (where it lives, its line in --help)
    "run": ("proxy.commands.run:run", "Run a command that reaches what its policy names and nothing else."),
    "serve": ("proxy.commands.serve:serve", "Serve a gate in the foreground: gateway, sidecar or proxy."),
    "status": ("proxy.commands.status:status", "Ask a running gate whether it is ready."),
    "firewall": ("proxy.commands.firewall:firewall", "Load the kernel's rules that lead a workload to the gate."),
    "relay": ("proxy.commands.relay:relay", "Give workloads the time, from the servers that their rules name."),
    "check": ("proxy.commands.check:check", "Load policy files, run their tests, warn of what is risky."),
    "test": ("proxy.commands.test:test", "Run the tests written in policy files."),
    "why": ("proxy.commands.why:why", "Say whether an attempt passes, by which rule, and what would change it."),
    "verify": ("proxy.commands.verify:verify", "Try from inside a workload what it must not reach."),
    "inject": ("proxy.commands.inject:inject", "Put a gate beside the workload in every pod of a file."),
    "webhook": ("proxy.commands.webhook:webhook", "Do so for an API server, as pods are made."),
    "tags": ("proxy.commands.tags:tags", "Import a cloud's service tags, for rules by tag."),
    "schema": ("proxy.commands.schema:schema", "Print the JSON Schema of policy files, or of gate.yaml."),
    "pki": ("proxy.commands.pki:pki", "Keep the authority that inspection needs."),
    "trust": ("proxy.commands.trust:trust", "Have programs trust it, and find those that do not."),
    "credentials": ("proxy.commands.credentials:credentials", "Keep the users of an explicit proxy."),
    "version": ("proxy.commands.version:version", "Print the versions that matter."),
}

EPILOG = """\b
Exit codes: 0 yes; 1 no (denied, a test failed, check found errors); 2 usage; 3 could not start.
`outgate run` passes on the command's own status; 125 when the gate could not start, 126 and 127 as a shell.

\b
Example:
  outgate run -p weather.yaml -w weather -- python weather.py
  outgate why -p weather.yaml -w weather 'GET https://dataservice.accuweather.com/forecasts'
"""


@click.group(cls=lazy_group(COMMANDS), epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def outgate() -> None:
    """A workload talks to what its policy names, and to nothing else."""


def main() -> None:
    """The entry point. A closed pipe (`outgate why … | head`) is no error worth a traceback."""
    settle_imports()
    try:
        outgate(prog_name="outgate")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
