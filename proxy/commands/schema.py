"""`outgate schema`: the JSON Schema of policy files, from the tables that read them."""

from __future__ import annotations

import click

EPILOG = """\b
Example:
  outgate schema > policy.schema.json
  then, as first line of a policy:  # yaml-language-server: $schema=policy.schema.json
"""


@click.command(epilog=EPILOG)
def schema() -> None:
    """Print the JSON Schema of policy files, for editors that complete and check by it."""
    from policies.schema import schema as policy_schema
    from proxy.console import Console

    Console().json(policy_schema())
