"""`outgate trust`: programs trust the authority, by files, by variables, by the system's own store."""

from __future__ import annotations

import click

from proxy.commands.lazy import lazy_group

COMMANDS = {
    "bundle": ("proxy.commands.trust.bundle:bundle", "Write the files that every runtime reads."),
    "env": ("proxy.commands.trust.env:env", "Print the variables that make every runtime read them."),
    "run": ("proxy.commands.trust.run:run", "Run a command with these variables."),
    "install": ("proxy.commands.trust.install:install", "Have the whole machine trust the root."),
    "uninstall": ("proxy.commands.trust.install:uninstall", "Undo that."),
    "doctor": ("proxy.commands.trust.doctor:doctor", "Try every program of this machine, and say what repairs it."),
}

EPILOG = "\b\nExample:\n  outgate trust bundle --pki pki --to trust\n  outgate trust run --pki pki -- python app.py"


@click.group(cls=lazy_group(COMMANDS), epilog=EPILOG)
def trust() -> None:
    """Have programs trust the authority, and find those that do not."""
