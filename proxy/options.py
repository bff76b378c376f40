"""What was said on the command line of a gate, made into what the gate is built from, or into one clear line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from policies.model import HostRule, Stage, Tls
from proxy.config import HttpHost, carrier

if TYPE_CHECKING:  # `run` forks before anything that is not needed until then is loaded
    from pki.authority import Authority
    from policies.errors import Problem
    from policies.index import Policy
    from proxy.issuing import Issuers
    from proxy.log.decision_log import DecisionLog
    from proxy.relays.dns_budget import NewNames
    from proxy.runtime import Settings


class Unready(Exception):
    """The gate does not start. `str()` is what to print: what, where, repair."""


class Misused(Unready):
    """The command line itself cannot be meant; a usage error, where the command has a code for those."""


def say(text: str) -> None:
    """What a person who started the gate is told, on standard error; each line names who says it."""
    from proxy.console import printable

    for line in text.splitlines():  # of which a path, a program or a server may have worded some
        print(f"outgate: {printable(line)}", file=sys.stderr)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions:
    """What was said on the command line, as text."""

    paths: tuple[str, ...]
    tags: tuple[str, ...]
    workload: str | None
    hosts: tuple[str, ...]
    upstream_ca: str | None
    pki: str | None
    log: str | None
    dns_new_names: int | None = None
    http_host: str = HttpHost.AUTO.value
    addons: tuple[str, ...] = ()


def read_gate_policy(options: GateOptions) -> Policy:
    """The policy. Raises Unready with every problem, one a line."""
    from policies.errors import PolicyError
    from proxy.policy_files import read_policy

    try:
        policy = read_policy(options.paths, tags=options.tags)
    except PolicyError as error:
        raise Unready(_lines(error.problems)) from error
    require_workload(policy, options.workload)
    return policy


def require_workload(policy: Policy, workload: str | None) -> None:
    """Raises Misused where a workload is named that the policy does not have."""
    if workload is not None and workload not in policy.workloads:
        from policies.spelling import did_you_mean

        hint = did_you_mean(workload, policy.workloads)
        raise Misused(f'unknown workload "{workload}"; {hint}')


def decision_log(target: str | None) -> DecisionLog:
    """The log at `--log`. Raises Unready."""
    from proxy.log.decision_log import open_log

    try:
        return open_log(target)
    except OSError as error:
        raise Unready(f"--log {target}: {error.strerror or error}") from error


def require_served(policy: Policy, workload: str | None, *, carried: Collection[Stage] = ()) -> None:
    """Says which rules of the workload (of all: None) stay closed. Raises Unready for keys that are not served."""
    from proxy.served import closed_rules, refused_keys

    if refused := refused_keys(policy, workload):
        raise Unready(_lines(refused))
    for problem in closed_rules(policy, workload, carried=carried):
        say(str(problem))


def inspected_rule(policy: Policy, workload: str | None) -> HostRule | None:
    """A rule of the workload (of any, where None) whose TLS is ended here, if there is one."""
    return next(_inspected_rules(policy, workload), None)


def gives_http2(policy: Policy, workload: str | None) -> bool:
    """Whether one of them gives HTTP/2 to whoever offers it."""
    return any(rule.http2 for rule in _inspected_rules(policy, workload))


def _inspected_rules(policy: Policy, workload: str | None) -> Iterator[HostRule]:
    asked = policy.workloads.values() if workload is None else [policy.workloads[workload]]
    rules = (rule for one in asked for rule in one.rules)
    return (rule for rule in rules if isinstance(rule, HostRule) and rule.tls is Tls.INSPECT)


def settings_of(options: GateOptions, issuing: Callable[[], str]) -> Settings:
    """What the gate is told besides its policy. Raises Unready."""
    from proxy.hosts import MalformedHostOption, parse_host_options
    from proxy.runtime import Settings

    try:
        hosts = parse_host_options(options.hosts)
    except MalformedHostOption as error:
        raise Misused(str(error)) from error
    return Settings(
        workload=options.workload,
        issuing=issuing,
        hosts=hosts,
        upstream_ca=checked_upstream_ca(options.upstream_ca),
        new_names=new_names(options.dns_new_names),
        http_host=carrier(HttpHost(options.http_host), options.addons),
        addons=checked_addons(options.addons),
    )


def new_names(per_hour: int | None) -> NewNames:
    """The budget of names below wildcards where only its hourly part was said: half of it may be asked for at once."""
    from proxy.relays.dns_budget import NewNames

    return NewNames() if per_hour is None else NewNames(per_hour=per_hour, burst=max(1, per_hour // 2))


def checked_upstream_ca(path: str | None) -> str | None:
    """The absolute path of a readable file of roots. Raises Unready."""
    if path is None:
        return None
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise Unready(f"--upstream-ca {path}: holds no certificate in PEM") from error
    except OSError as error:
        raise Unready(f"--upstream-ca {path}: {error.strerror or error}") from error
    return str(Path(path).resolve())


def checked_addons(paths: Sequence[str]) -> tuple[str, ...]:
    """The absolute paths of addon files that load. Raises Unready."""
    from proxy.addon_files import AddonUnusable, try_addons

    try:
        try_addons(paths)
    except AddonUnusable as error:
        raise Unready(str(error)) from error
    return tuple(str(Path(path).resolve()) for path in paths)


def new_authority() -> Authority:
    """One that lives as long as this process: its key is nowhere but in memory."""
    from datetime import UTC, datetime

    from pki.authority import create_authority

    return create_authority(datetime.now(UTC))


def load_authority(directory: str) -> Authority:
    """The authority of `--pki`. Raises Unready."""
    from pki.store import StoreError, load

    try:
        return load(Path(directory))
    except StoreError as error:
        raise Unready(str(error)) from error


def load_issuers(directory: str) -> Issuers:
    """The issuing CAs of `--pki`, as they are now. Raises Unready."""
    from pki.store import StoreError
    from pki.store import load_issuers as load
    from proxy.issuing import describe

    try:
        return describe(load(Path(directory)))
    except StoreError as error:
        raise Unready(str(error)) from error


def _lines(problems: Sequence[Problem]) -> str:
    return "\n".join(map(str, problems))
