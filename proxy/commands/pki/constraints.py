"""`--constrain-to POLICY`: the domains that an issuing CA is limited to, from what a policy has inspected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from proxy.commands import NOT_STARTED, USAGE, load_policy, tags_option


def constrain_options[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """`--constrain-to POLICY` and `--tags FILE`, both repeatable, as `policies` and `tags`."""
    to = click.option(
        "--constrain-to",
        "policies",
        multiple=True,
        type=click.Path(),
        metavar="POLICY",
        help="Limit the issuing CA to the names that this policy has inspected; repeat to merge several files.",
    )
    return to(tags_option(command))


def permitted_by(policies: Sequence[str], tags: Sequence[str]) -> tuple[str, ...]:
    """The domains that the policies' inspected rules need. Warns of those that anyone can own a name below.

    A policy that does not load or inspects nothing ends the command.
    """
    from proxy.console import stop
    from proxy.inspected_names import inspected_domains

    domains = inspected_domains(load_policy(policies, tags, exit_code=NOT_STARTED))
    if not domains:
        nothing = "no rule is inspected, so no name is left to limit an issuing CA to"
        stop(f"{', '.join(policies)}: {nothing}; write tls: inspect in a rule, or leave --constrain-to out", USAGE)
    _warn_of_suffixes(domains)
    return domains


def _warn_of_suffixes(domains: Sequence[str]) -> None:
    from policies.hostnames import Hostname
    from proxy.policy_files import is_public_suffix, shared_suffix

    for domain in map(Hostname, domains):
        suffix = domain if is_public_suffix(domain) else shared_suffix(domain)
        if suffix:
            _warn(
                f'the issuing CA is limited to "{domain}", and anyone can own a name below {suffix}',
                "inspect the names you use",
            )


def _warn(message: str, repair: str) -> None:
    import sys

    from proxy.console import Console, Style

    Console(sys.stderr).line("outgate: ", ("warning", Style.WARN), f": {message}; {repair}")
