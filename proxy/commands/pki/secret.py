"""`outgate pki secret`: an authority in a Secret of Kubernetes; what a Job asks for at the first installation."""

from __future__ import annotations

import click

from proxy.commands import NO, NOT_STARTED, json_option
from proxy.commands.pki.distribute import DNS_LABEL, DNS_SUBDOMAIN, dns_name

EPILOG = """\b
The Secret gets tls.crt (what is sent after a leaf), tls.key, ca.crt (the root that workloads trust) and root.key, which
no pod mounts: move it to where no gate runs. One that has the first three is left as it is.

\b
Exit codes: 0 it stands there; 1 a Secret of that name holds something else; 2 usage; 3 could not.
JSON keys: namespace name made

\b
Example:
  outgate pki secret outgate-pki --namespace outgate
"""


@click.command(epilog=EPILOG)
@click.argument("name", callback=dns_name(DNS_SUBDOMAIN))
@click.option("--namespace", required=True, metavar="NS", callback=dns_name(DNS_LABEL), help="Where the Secret is.")
@click.option("--organisation", default="Outgate", show_default=True, help="Shown in its certificates.")
@click.option(
    "--root-years", type=click.IntRange(1, 50), default=10, show_default=True, help="How long the root is trusted."
)
@click.option(
    "--issuing-days",
    type=click.IntRange(1, 3650),
    default=365,
    show_default=True,
    help="How long the issuing CA signs, within its root's life.",
)
@click.option("--kubeconfig", metavar="FILE", help="Default: the pod's own, KUBECONFIG, ~/.kube/config.")
@click.option("--context", "context_name", metavar="NAME", help="Of the kubeconfig.")
@json_option
def secret(
    name: str,
    namespace: str,
    organisation: str,
    root_years: int,
    issuing_days: int,
    kubeconfig: str | None,
    context_name: str | None,
    as_json: bool,
) -> None:
    """Make an authority in a Secret of Kubernetes, where there is none."""
    import asyncio
    from datetime import UTC, datetime, timedelta

    from pki.authority import AuthorityError, create_authority
    from pki.kubernetes.api import ApiFault, NoCluster, connect
    from pki.kubernetes.authority import NotOurs, keep_authority
    from proxy.console import Console, stop

    async def keep() -> bool:
        life = timedelta(days=issuing_days)
        made = create_authority(datetime.now(UTC), name=organisation, root_years=root_years, issuing_life=life)
        async with connect(kubeconfig, context_name, connections=1) as api:
            return await keep_authority(api, namespace, name, made)

    try:
        is_made = asyncio.run(keep())
    except NotOurs as error:
        stop(str(error), NO)
    except (AuthorityError, ApiFault, NoCluster) as error:
        stop(str(error), NOT_STARTED)
    if as_json:
        Console().json({"namespace": namespace, "name": name, "made": is_made})
    else:
        Console().line(f"secret {name}: {'made an authority' if is_made else 'stands already, and is left as it is'}")
