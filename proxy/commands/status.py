"""`outgate status`: asks a running gate whether it is ready; the health check of an image without curl or a shell."""

from __future__ import annotations

from typing import Any

import click

from proxy.commands import NO, NOT_STARTED, USAGE, YES

DEFAULT_ADMIN = "127.0.0.1:9901"
TIMEOUT_S = 4.0
MAX_ANSWER = 1 << 20  # bytes

EPILOG = """\b
A gate that listens on every address is asked on the loopback one. outgate relay status asks a relay.
Exit codes: 0 ready; 1 not, and why; 2 usage; 3 no gate answers there.
JSON keys: ready because[] notes[]

\b
Example:
  outgate status
  outgate status --admin 127.0.0.1:9901 --json
"""


@click.command(epilog=EPILOG)
@click.option(
    "--admin",
    default=DEFAULT_ADMIN,
    show_default=True,
    envvar="OUTGATE_ADMIN",
    show_envvar=True,
    metavar="ADDR:PORT",
    help="The gate's --admin.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(admin: str, as_json: bool) -> None:
    """Say whether a running gate is ready, and why not."""
    import json

    from proxy.console import Console, Style, stop
    from proxy.options import Misused
    from proxy.relay import read_address

    try:
        host, port = read_address("--admin", admin)
    except Misused as error:
        stop(str(error), USAGE)
    try:
        told = _ask({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)  # noqa: S104  # asked, not bound
        ready, because, notes = told["ready"] is True, list(map(str, told["because"])), list(map(str, told["notes"]))
    except OSError as error:
        what = (error.strerror or str(error) or "no answer").lower()
        stop(f"{admin}: {what}; name the gate's --admin", NOT_STARTED)
    except (ValueError, KeyError, TypeError):
        stop(f"{admin}: what answers there is no gate; name the gate's --admin", NOT_STARTED)
    if as_json:
        click.echo(json.dumps({"ready": ready, "because": because, "notes": notes}))
    else:
        console = Console()
        console.line(("ready", Style.GOOD) if ready else ("not ready: " + "; ".join(because), Style.BAD))
        for note in notes:
            console.line((note, Style.DIM), indent=2)
    raise SystemExit(YES if ready else NO)


def _ask(host: str, port: int) -> Any:  # Any: JSON
    """What /readyz says. Raises OSError; ValueError where it is no JSON."""
    import http.client
    import json

    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return json.loads(connection.getresponse().read(MAX_ANSWER))
    except http.client.HTTPException as error:
        raise ValueError("no HTTP") from error
    finally:
        connection.close()
