"""`outgate pki serving`: the certificate of `outgate webhook` in a Secret; what a CronJob asks for."""

from __future__ import annotations

import click

from proxy.commands import NO, NOT_STARTED, json_option
from proxy.commands.pki.distribute import DNS_LABEL, DNS_SUBDOMAIN, dns_name

EPILOG = """\b
The Secret gets tls.crt and tls.key for SERVICE.NS.svc, valid for 90 days, and ca.crt. Run it once a day: before two
thirds of that time are over it changes nothing. A CA signs one certificate, and its key is forgotten.

\b
Exit codes: 0 it stands there; 1 a Secret of that name holds something else; 2 usage; 3 could not.
JSON keys: namespace name made

\b
Example:
  outgate pki serving outgate-webhook-tls --namespace outgate --service outgate-webhook --configuration outgate
"""


@click.command(epilog=EPILOG)
@click.argument("name", callback=dns_name(DNS_SUBDOMAIN))
@click.option("--namespace", required=True, metavar="NS", callback=dns_name(DNS_LABEL), help="Where the Secret is.")
@click.option("--service", required=True, metavar="SERVICE", callback=dns_name(DNS_LABEL), help="The webhook's, there.")
@click.option(
    "--configuration",
    metavar="NAME",
    callback=lambda ctx, param, value: value and dns_name(DNS_SUBDOMAIN)(ctx, param, value),
    help="The MutatingWebhookConfiguration whose caBundle is kept.  [default: none]",
)
@click.option("--kubeconfig", metavar="FILE", help="Default: the pod's own, KUBECONFIG, ~/.kube/config.")
@click.option("--context", "context_name", metavar="NAME", help="Of the kubeconfig.")
@json_option
def serving(
    name: str,
    namespace: str,
    service: str,
    configuration: str | None,
    kubeconfig: str | None,
    context_name: str | None,
    as_json: bool,
) -> None:
    """Keep the certificate of a webhook in a Secret of Kubernetes."""
    import asyncio
    from datetime import UTC, datetime

    from pki.authority import AuthorityError
    from pki.kubernetes.api import ApiFault, NoCluster, connect
    from pki.kubernetes.authority import NotOurs
    from pki.kubernetes.serving import keep_serving
    from proxy.console import Console, stop

    async def keep() -> bool:
        async with connect(kubeconfig, context_name, connections=1) as api:
            return await keep_serving(
                api, namespace, name, f"{service}.{namespace}.svc", configuration, datetime.now(UTC)
            )

    try:
        is_made = asyncio.run(keep())
    except NotOurs as error:
        stop(str(error), NO)
    except (AuthorityError, ApiFault, NoCluster) as error:
        stop(str(error), NOT_STARTED)
    if as_json:
        Console().json({"namespace": namespace, "name": name, "made": is_made})
    else:
        Console().line(f"secret {name}: {'made a certificate' if is_made else 'its certificate is good'}")
