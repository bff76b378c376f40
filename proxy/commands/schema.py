"""`outgate schema`: the JSON Schemas of policy files and of gate.yaml, from the tables that read them."""

from __future__ import annotations

import click

EPILOG = """\b
Example:
  outgate schema > policy.schema.json
  then, as first line of a policy:  # yaml-language-server: $schema=policy.schema.json
"""


@click.command(epilog=EPILOG)
@click.option("--gate", "of_gate", is_flag=True, help="That of gate.yaml, the configuration of outgate serve.")
def schema(of_gate: bool) -> None:
    """Print the JSON Schema of policy files, or of gate.yaml, for editors that complete and check by it."""
    from policies.schema import schema as policy_schema
    from proxy.config.file import gate_schema
    from proxy.console import Console

    Console().json(gate_schema() if of_gate else policy_schema())
