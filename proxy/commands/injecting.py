"""What `outgate inject` and `outgate webhook` are told alike: the settings of every injected pod, as options."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import click

from proxy.layout import GATE_UID

if TYPE_CHECKING:
    from proxy.injection.model import Settings

_DNS = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")
_PATH = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+")
_LABEL = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}")

type Read = Callable[[click.Context, click.Parameter, Any], Any]  # Any: click's own


def _matching(pattern: re.Pattern[str], wanted: str) -> Read:
    def read(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not pattern.fullmatch(one):
                raise click.BadParameter(f"{one!r} is not {wanted}", ctx, param)
        return value

    return read


def _addresses(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    try:
        return tuple(ip_address(one) for one in value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


_name = _matching(_DNS, "a name of Kubernetes")

_OPTIONS = (
    click.option(
        "--image",
        envvar="OUTGATE_IMAGE",
        show_envvar=True,
        required=True,
        metavar="IMAGE",
        callback=_matching(_IMAGE, "an image"),
        help="Of outgate, best by digest.",
    ),
    click.option(
        "--pull-policy",
        type=click.Choice(["Always", "IfNotPresent", "Never"]),
        default="IfNotPresent",
        show_default=True,
        help="Of that image.",
    ),
    click.option(
        "--policy-config-map",
        default="outgate-policy",
        show_default=True,
        metavar="NAME",
        callback=_name,
        help="With the policy, in the pod's namespace.",
    ),
    click.option(
        "--policy-key",
        "policy_keys",
        multiple=True,
        default=("policy.yaml",),
        show_default=True,
        metavar="KEY",
        callback=_matching(_KEY, "a key of a ConfigMap"),
        help="A policy file in it. Repeatable.",
    ),
    click.option(
        "--trust-config-map",
        default="outgate-trust",
        show_default=True,
        metavar="NAME",
        callback=_name,
        help="With the trust directory.",
    ),
    click.option("--no-trust", is_flag=True, help="No container gets it; for policies that inspect nothing."),
    click.option(
        "--trust-path",
        default="/etc/outgate/trust",
        show_default=True,
        metavar="PATH",
        callback=_matching(_PATH, "a plain path from /"),
        help="Where containers see it.",
    ),
    click.option(
        "--authority-secret",
        metavar="NAME",
        callback=_name,
        help="With tls.crt, tls.key, ca.crt of the issuing CA, in the pod's namespace. Default: nothing is inspected.",
    ),
    click.option(
        "--bind",
        default="0.0.0.0",  # noqa: S104 - the kubelet asks from the node
        show_default=True,
        type=click.Choice(["0.0.0.0", "[::]"]),  # noqa: S104
        help="Where the gate's ports are; [::] in a cluster that has IPv6.",
    ),
    click.option(
        "--gate-uid",
        type=click.IntRange(1, (1 << 31) - 1),
        default=GATE_UID,
        show_default=True,
        help="Whom it runs as.",
    ),
    click.option(
        "--cluster-dns", multiple=True, metavar="ADDR", callback=_addresses, help="The cluster's resolver. Repeatable."
    ),
    click.option(
        "--cluster-domain",
        default="cluster.local",
        show_default=True,
        metavar="NAME",
        callback=_name,
        help="What it alone is asked for, and may answer with private addresses.",
    ),
    click.option("--udp/--no-udp", default=False, help="The gate carries datagrams, with NET_RAW. Default: no."),
    click.option(
        "--require-user/--no-require-user",
        "is_user_needed",
        default=False,
        help="Refuse containers whose image says whom they run as. Default: no.",
    ),
    click.option(
        "--exclusions/--no-exclusions",
        "may_exclude",
        default=True,
        help="Pods may name by annotation what is reached past the gate. Default: yes.",
    ),
    click.option(
        "--host-path",
        "host_paths",
        multiple=True,
        metavar="DIR",
        callback=_matching(_PATH, "a plain path from /"),
        help="Of the node; pods may mount it. Default: none. Repeatable.",
    ),
    click.option(
        "--label",
        default="outgate/inject",
        show_default=True,
        metavar="LABEL",
        callback=_matching(_LABEL, "a label"),
        help="A pod that has it as false is left alone.",
    ),
)


def settings_options[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """An option for each setting; `read_settings` takes them all."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_settings(said: dict[str, Any]) -> Settings:  # Any: as click has read them
    """The settings that these options say."""
    from proxy.injection.model import Settings

    trust = None if said.pop("no_trust") else said["trust_config_map"]
    del said["trust_config_map"]
    return Settings(trust=trust, policy=said.pop("policy_config_map"), authority=said.pop("authority_secret"), **said)
