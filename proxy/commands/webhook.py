"""`outgate webhook`: the command line of it; the work is `proxy/webhook.py`."""

from __future__ import annotations

from typing import Any

import click

from proxy.commands import USAGE
from proxy.commands.injecting import read_settings, settings_options

EPILOG = """\b
POST /inject takes AdmissionReview v1; GET /healthz, /readyz and /metrics are answered on the same port, by TLS too.
A certificate that comes into DIR is shown from the next handshake on.
Exit codes: 0 stopped; 2 usage; 3 could not start.

\b
Example:
  outgate webhook --image outgate:0.1.0 --listen 0.0.0.0:8443 --tls-dir /etc/outgate/webhook
"""


@click.command(epilog=EPILOG)
@click.option(
    "--listen", default="0.0.0.0:8443", show_default=True, metavar="ADDR:PORT", help="Where an API server asks."
)
@click.option("--tls-dir", required=True, metavar="DIR", help="With tls.crt and tls.key for the name of the Service.")
@settings_options
def webhook(listen: str, tls_dir: str, **said: Any) -> None:  # Any: as click has read them
    """Put a gate beside the workload in every pod that an API server asks about."""
    from proxy.console import stop
    from proxy.options import Misused
    from proxy.relay import read_address
    from proxy.webhook import WebhookOptions
    from proxy.webhook import webhook as answer_reviews

    try:
        # As Go writes it: `:8443` is every address.
        address = read_address("--listen", f"[::]{listen}" if listen.startswith(":") else listen)
    except Misused as error:
        stop(str(error), USAGE)
    raise SystemExit(answer_reviews(WebhookOptions(listen=address, tls_dir=tls_dir, settings=read_settings(said))))
