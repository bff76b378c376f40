"""`outgate serve`: the command line of it; the work is `proxy/serve.py`."""

from __future__ import annotations

from typing import Any

import click

from proxy.commands.gate import gate_options
from proxy.options import GateOptions

EPILOG = """\b
Connections reach it by nft REDIRECT (or iptables -j REDIRECT); a connection made to its own port is refused.
A workload is found by its source address (match: address) unless -w names one for all.
Decision records go to standard output: readable lines on a terminal, JSON lines elsewhere.
Exit codes: 0 stopped; 2 usage; 3 could not start.

\b
Example:
  outgate serve -p policy.yaml --pki pki --listen 0.0.0.0:15001
"""


@click.command(epilog=EPILOG)
@gate_options
@click.option("--listen", required=True, metavar="ADDR:PORT", help="Where redirected connections arrive.")
def serve(listen: str, **said: Any) -> None:  # Any: the fields of GateOptions, by click
    """Serve redirected connections in the foreground, until SIGINT or SIGTERM."""
    from proxy.serve import serve as serve_gate

    raise SystemExit(serve_gate(GateOptions(**said), listen))
