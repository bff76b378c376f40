"""The command-line options of a gate that is there for one command (`run`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from proxy.commands import policy_options
from proxy.config import HttpHost


def gate_options[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """`-p -w --tags --host --dns-new-names --upstream-ca --pki --http-host --addon --log`, named as in GateOptions."""
    for option in (
        click.option("--log", metavar="FILE", help="Append decision records there; - is standard error."),
        click.option(
            "--pki", metavar="DIR", type=click.Path(), help="The authority that signs leaves (outgate pki init)."
        ),
        click.option(
            "--upstream-ca", metavar="FILE", type=click.Path(), help="Verify upstreams against these roots (PEM)."
        ),
        click.option(
            "--host",
            "hosts",
            multiple=True,
            metavar="NAME=ADDR[:PORT]",
            help="Dial this address for the name; private and loopback are allowed.",
        ),
        click.option(
            "--dns-new-names",
            type=click.IntRange(0, 1_000_000),
            metavar="N",
            help="Names an hour that it may have looked up for the first time below one wildcard; by default 60.",
        ),
        click.option(
            "--http-host",
            type=click.Choice([host.value for host in HttpHost]),
            default=HttpHost.AUTO.value,
            help="What carries HTTP under inspection: auto, or mitmproxy for HTTP/1.1 as well.",
        ),
        click.option(
            "--addon",
            "addons",
            multiple=True,
            metavar="FILE",
            type=click.Path(),
            help="Your own mitmproxy addons, for what is inspected. Repeatable.",
        ),
        click.option("-w", "--workload", metavar="NAME", help="Whose rules count; its match is not asked."),
    ):
        command = option(command)
    return policy_options(command)
