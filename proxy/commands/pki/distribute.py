"""`outgate pki distribute`: the trust bundle where workloads read it, and kept there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from proxy.commands import json_option
from proxy.commands.pki import optional_pki_option

NAME, MOUNT_PATH, DEADLINE_S = "outgate-trust", "/etc/outgate/trust", 300.0

EPILOG = """\b
From one of --pki, --bundle and --root; no key is opened. docs/distribution.md says how pods mount it and which rights
the job needs.

\b
Exit codes: 0 it stands everywhere; 1 somewhere stands one that is not ours, which is left alone; 2 usage; 3 could not
do it. With --watch: 0 when it is ended, 3 when it cannot start.
JSON keys: directory written[], or name outcomes places[namespace outcome because]; with --watch one line for each
change: time name namespace outcome because
  outcome is written, restored, unchanged, removed, refused, failed or gone; namespace is null for a ClusterTrustBundle

\b
Examples:
  outgate pki distribute --pki pki --to dir /srv/trust
  outgate pki distribute --pki pki --to kubernetes --selector outgate.example/inspected=true
  outgate pki distribute --root /outgate/roots/ca.crt --to kubernetes --watch --ready-file /tmp/ready
"""

_CLUSTERS = frozenset(
    {"selector", "namespaces", "name", "prune", "cluster_trust_bundle", "deadline_s", "kubeconfig", "context_name"}
)
_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"  # RFC 1123, as Kubernetes has it
DNS_LABEL = re.compile(_LABEL)
DNS_SUBDOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


def dns_name(pattern: re.Pattern[str]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """It becomes part of a path of the API."""

    def checked(context: click.Context, option: click.Parameter, value: Any) -> Any:  # Any: one text, or several
        for text in (value,) if isinstance(value, str) else value:
            if len(text) > 253 or not pattern.fullmatch(text):
                raise click.BadParameter(f"{text!r} is no name that Kubernetes gives", context, option)
        return value

    return checked


@click.command(epilog=EPILOG)
@optional_pki_option("Roots of this authority.")
@click.option(
    "--bundle",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Roots of this trust directory (outgate trust bundle), public ones too.",
)
@click.option("--root", "roots", metavar="FILE", type=click.Path(path_type=Path), help="Roots of this file, in PEM.")
@click.option(
    "--public",
    metavar="system|none|FILE",
    help="Public roots beside ours. Default: those of --bundle, else this machine's.",
)
@click.option(
    "--to",
    type=click.Choice(["dir", "kubernetes"]),
    required=True,
    help="A directory, PATH; or a ConfigMap in each namespace.",
)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Stay, and keep it there.")
@click.option(
    "--mount-path", metavar="PATH", help=f"Where programs see the files.  [default: PATH of dir, else {MOUNT_PATH}]"
)
@json_option
@click.option(
    "--selector",
    metavar="LABELS",
    help="Namespaces with these labels. Default: all but kube-system, kube-public and kube-node-lease.",
)
@click.option(
    "--namespace",
    "namespaces",
    multiple=True,
    metavar="NS",
    callback=dns_name(DNS_LABEL),
    help="These namespaces alone, without listing any. Repeatable.",
)
@click.option(
    "--name",
    default=NAME,
    show_default=True,
    metavar="NAME",
    callback=dns_name(DNS_SUBDOMAIN),
    help="Of the ConfigMaps.",
)
@click.option("--prune", is_flag=True, help="Remove ours from namespaces that do not match.")
@click.option(
    "--cluster-trust-bundle",
    is_flag=True,
    help="Our roots also as a ClusterTrustBundle, where the cluster has the API.",
)
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(1, 86400),
    default=DEADLINE_S,
    show_default=True,
    metavar="SECONDS",
    help="Without --watch: how long to try.",
)
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --watch: there while the bundle stands everywhere.",
)
@click.option(
    "--kubeconfig", type=click.Path(), metavar="FILE", help="Default: the pod's own, KUBECONFIG, ~/.kube/config."
)
@click.option("--context", "context_name", metavar="NAME", help="Of the kubeconfig.")
@click.pass_context
def distribute(
    context: click.Context, /, to: str, path: Path | None, watch: bool, **said: Any
) -> None:  # Any: by click
    """Write the trust bundle where workloads read it; nothing is written that stands there already."""
    pki = _chosen_store(context)
    mount_path = said["mount_path"]
    if to == "dir":
        _refuse(context, _CLUSTERS, "goes with --to kubernetes")
        if path is None:
            raise click.UsageError("--to dir needs a PATH")
        path = path.absolute()
        mount_path = mount_path or str(path)
    elif path is not None:
        raise click.UsageError(f"--to kubernetes takes no PATH ({path})")
    _require_consistent(watch, said)

    from pki.bundle_source import Source
    from proxy.commands.pki.distributing import Orders, to_directory, to_kubernetes

    source = Source(pki=pki, bundle=said["bundle"], roots=said["roots"], public=said["public"])
    orders = Orders(
        source=source,
        path=path,
        mount_path=mount_path or MOUNT_PATH,
        watch=watch,
        as_json=said["as_json"],
        ready_file=said["ready_file"],
    )
    if path is not None:
        raise SystemExit(to_directory(orders, path))

    from pki.kubernetes.job import Aim

    aim = Aim(
        name=said["name"],
        selector=said["selector"],
        namespaces=said["namespaces"],
        prune=said["prune"],
        cluster_trust_bundle=said["cluster_trust_bundle"],
    )
    raise SystemExit(to_kubernetes(orders, aim, said["kubeconfig"], said["context_name"], said["deadline_s"]))


def _chosen_store(context: click.Context) -> Path | None:
    """The store, unless the bundle comes from elsewhere. OUTGATE_PKI, which many commands read, gives way."""
    elsewhere = [name for name in ("bundle", "roots") if context.params[name] is not None]
    if elsewhere and context.get_parameter_source("directory") is not ParameterSource.COMMANDLINE:
        context.params["directory"] = None
    pki: Path | None = context.params["directory"]
    if (pki is not None) + len(elsewhere) != 1:
        raise click.UsageError("name where the bundle comes from: one of --pki, --bundle and --root")
    return pki


def _require_consistent(watch: bool, said: dict[str, Any]) -> None:  # Any: by click
    if said["namespaces"] and (said["selector"] is not None or said["prune"]):
        raise click.UsageError("--namespace looks at no other namespace: leave out --selector and --prune")
    if said["ready_file"] and not watch:
        raise click.UsageError("--ready-file goes with --watch")


def _refuse(context: click.Context, names: frozenset[str], why: str) -> None:
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} {why}")
