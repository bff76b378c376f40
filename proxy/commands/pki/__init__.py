"""`outgate pki`: the authority on disk, from the day it is made through its rotations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from proxy.commands.lazy import lazy_group

COMMANDS = {
    "init": ("proxy.commands.pki.init:init", "Make an authority: a root, and the issuing CA that the gate signs with."),
    "import": ("proxy.commands.pki.take:take", "Sign with a CA that somebody else issued: PKCS#12 or PEM."),
    "export": ("proxy.commands.pki.export:export", "Issue a CA for another firewall, in the form that it asks for."),
    "check": ("proxy.commands.pki.check:check", "Say what is wrong with a CA, and what to change."),
    "rotate": ("proxy.commands.pki.rotate:rotate", "Replace the issuing CA or the root; no client is restarted."),
    "status": ("proxy.commands.pki.status:status", "Show every CA: its state, its expiry, what is to be done when."),
    "distribute": (
        "proxy.commands.pki.distribute:distribute",
        "Keep the trust bundle in a directory, or in Kubernetes.",
    ),
    "secret": ("proxy.commands.pki.secret:secret", "Make an authority in a Secret of Kubernetes, where there is none."),
    "adopt": ("proxy.commands.pki.adopt:adopt", "Sign with the CA of a mounted Secret, and follow it."),
    "serving": ("proxy.commands.pki.serving:serving", "Keep the certificate of a webhook in a Secret of Kubernetes."),
}

EPILOG = "\b\nExample:\n  outgate pki init --pki pki\n  outgate run -p policy.yaml -w build --pki pki -- make"


def pki_option[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """`--pki DIR` as `directory`."""
    return _pki_option("Where the authority stands.", required=True)(command)


def optional_pki_option[F: Callable[..., Any]](purpose: str) -> Callable[[F], F]:  # Any: as above
    """`--pki DIR` as `directory`, or None."""
    return _pki_option(purpose, required=False)


def _pki_option[F: Callable[..., Any]](purpose: str, *, required: bool) -> Callable[[F], F]:  # Any: as above
    return click.option(
        "--pki",
        "directory",
        required=required,
        envvar="OUTGATE_PKI",
        show_envvar=True,
        metavar="DIR",
        type=click.Path(path_type=Path),
        help=purpose,
    )


@click.group(cls=lazy_group(COMMANDS), epilog=EPILOG)
def pki() -> None:
    """Keep the authority that inspection needs."""
    from proxy.child import leave_no_core

    leave_no_core(for_good=False)  # of a command that holds the key of a root
