"""`outgate verify`: tries from inside a workload what must not be reached, and tells what was."""

from __future__ import annotations

import os
import time as clock
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from proxy.commands import NO, NOT_STARTED, USAGE, YES, load_policy, tags_option, workload_named

if TYPE_CHECKING:
    from policies.index import Policy
    from proxy.verify.model import Probe, Row
    from proxy.verify.place import Place
    from proxy.verify.probes import Names

type Peer = tuple[str, int]

EPILOG = """\b
Run it where the workload runs:
  outgate run -p weather.yaml -w weather -- outgate verify
  kubectl exec deploy/weather -- outgate verify -p /etc/outgate/policy.yaml -w weather

\b
What is sent, without sending it:
  outgate verify --dry-run

\b
Exit codes: 0 no leak; 1 a leak; 2 usage; 3 the policy does not load, or a row could not be tried.
JSON keys: ok workload gate seconds counts{leak odd ok failed}
  rows[id group what to sends outcome status allowed detail proof decision milliseconds means repair]
"""


@click.command(epilog=EPILOG)
@click.option("-p", "--policy", "paths", multiple=True, envvar="OUTGATE_POLICY", show_envvar=True, type=click.Path(),
              metavar="FILE", help="Policy file; without one nothing is expected to be reached.")  # fmt: skip
@tags_option
@click.option("-w", "--workload", metavar="NAME", envvar="OUTGATE_WORKLOAD", show_envvar=True, help="Who tries it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--junit", metavar="FILE", type=click.Path(), help="Write JUnit's XML there too.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent, row by row, and send nothing.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this row or group; may repeat.")
@click.option("--allowed", is_flag=True, help="Try what the policy allows, too: its hosts are contacted.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1, 5), default=2.0, show_default=True, metavar="S",
              help="Seconds that a probe waits to be answered.")  # fmt: skip
@click.option("--gate", metavar="ADDR:PORT", help="Where the gate listens, if it is not the first router.")
@click.option("--admin", metavar="ADDR:PORT", help="Its admin port.")
@click.option("--root", metavar="FILE", type=click.Path(), help="Its root: then it must show a certificate of it.")
@click.option("--sink", "sinks", multiple=True, metavar="ADDR", help="A machine of yours that answers on every port.")
@click.pass_context
def verify(
    ctx: click.Context,
    paths: tuple[str, ...],
    tags: tuple[str, ...],
    workload: str | None,
    as_json: bool,
    junit: str | None,
    dry_run: bool,
    only: tuple[str, ...],
    allowed: bool,
    timeout_s: float,
    gate: str | None,
    admin: str | None,
    root: str | None,
    sinks: tuple[str, ...],
) -> None:
    """Try what this workload must not reach, and tell what it did.

    Cloud metadata, kubelets, sockets, foreign resolvers, datagrams, raw packets: one row each, and whether the policy
    expects it. Without --allowed no host of the policy's is contacted.
    """
    policy = load_policy(paths, tags, exit_code=NOT_STARTED) if paths else None
    name = workload_named(policy, workload) if policy else ""

    from proxy.console import Console
    from proxy.verify import report
    from proxy.verify.place import look_around
    from proxy.verify.running import Order, run

    now = clock.time()
    place = look_around(os.environ)
    names = _names(policy, name, now, _peer("--gate", gate), _peer("--admin", admin), sinks)
    probes = _chosen(_listed(policy, name, now, place, names, allowed=allowed, root=root), only)
    console = Console()
    if dry_run:
        if as_json:
            console.json(report.plan_json(probes))
        else:
            report.show_plan(console, probes)
        ctx.exit(YES)
    began = clock.monotonic()
    rows = run(Order(probes, place, policy, name, timeout_s, names.gate, root))
    elapsed_s = clock.monotonic() - began
    if junit is not None:
        _write(junit, report.to_junit(rows, elapsed_s))
    if as_json:
        console.json(report.to_json(rows, name or None, elapsed_s))
    else:
        report.show(console, rows, name or None, elapsed_s)
    ctx.exit(_exit_code(rows))


def _exit_code(rows: Sequence[Row]) -> int:
    from proxy.verify.model import Status

    statuses = {row.status for row in rows}
    if Status.LEAK in statuses:
        return NO
    return NOT_STARTED if Status.FAILED in statuses else YES


def _peer(option: str, text: str | None) -> Peer | None:
    from proxy.console import stop
    from proxy.verify.place import gate_address

    try:
        return None if text is None else gate_address(text)
    except ValueError as error:
        stop(f"{option} {error}", USAGE)


def _names(
    policy: Policy | None, workload: str, now: float, gate: Peer | None, admin: Peer | None, sinks: Sequence[str]
) -> Names:
    from proxy.verify.judging import fill_in
    from proxy.verify.probes import DENIED, SINK4, SINK6, Names

    random = os.urandom(64)
    addresses = [_address(text) for text in sinks]
    pair = (
        next((text for text in addresses if ":" not in text), SINK4),
        next((text for text in addresses if ":" in text), SINK6),
    )
    names = Names(random, f"v{random[:6].hex()}.{DENIED}", sinks=pair, gate=gate, admin=admin)
    return fill_in(names, policy, workload, now)


def _address(text: str) -> str:
    from ipaddress import ip_address

    from proxy.console import stop

    try:
        return str(ip_address(text))
    except ValueError:
        stop(f'--sink "{text}" is not an address; write 192.0.2.1 or 2001:db8::1', USAGE)


def _listed(
    policy: Policy | None, workload: str, now: float, place: Place, names: Names, *, allowed: bool, root: str | None
) -> list[Probe]:
    from proxy.verify.probes import certificate, probes

    listed = list(probes(place, names))
    if root is not None:
        _check_root(root, names)
        listed.append(certificate(names))
    if allowed and policy is not None:
        listed += _allowed(policy, workload, now, place, names)
    return listed


def _check_root(root: str, names: Names) -> None:
    from proxy.console import stop
    from proxy.options import Unready, checked_upstream_ca

    if names.inspected is None:
        stop("--root: the policy inspects no host, so the gate shows this workload no certificate; leave it out", USAGE)
    try:
        checked_upstream_ca(root)
    except Unready as error:
        stop(str(error).replace("--upstream-ca", "--root", 1), NOT_STARTED)


def _allowed(policy: Policy, workload: str, now: float, place: Place, names: Names) -> list[Probe]:
    """The hosts that the policy names, and the wildcards below which every name may be looked up."""
    from proxy.verify.judging import allowed_hosts, allowed_wildcards
    from proxy.verify.probes import allowed_host, burst

    here = place.nameserver
    return [
        *(allowed_host(host, port, names) for host, port in allowed_hosts(policy, workload, now)),
        *(burst(f"tunnel-{below}", below, here, names) for below in allowed_wildcards(policy, workload, now)),
    ]


def _chosen(probes: Sequence[Probe], only: Sequence[str]) -> list[Probe]:
    from policies.spelling import did_you_mean
    from proxy.console import stop

    known = {name for probe in probes for name in (probe.id, probe.group)}
    for name in only:
        if name not in known:
            stop(f'--only "{name}" is no row and no group; {did_you_mean(name, sorted(known))}', USAGE)
    return [probe for probe in probes if not only or probe.id in only or probe.group in only]


def _write(path: str, text: str) -> None:
    from proxy.console import stop

    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        stop(f"--junit {path}: {error.strerror}", NOT_STARTED)
