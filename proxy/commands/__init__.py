"""The subcommands of `outgate`, one a module, and what they share: options, loading, a rule as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # a command that prints its help loads no policy
    from policies.errors import Problem
    from policies.index import Policy
    from policies.model import AnyRule

YES, NO, USAGE, NOT_STARTED = 0, 1, 2, 3

type Json = dict[str, object]


tags_option = click.option(
    "--tags",
    multiple=True,
    envvar="OUTGATE_TAGS",
    show_envvar=True,
    type=click.Path(),
    metavar="FILE",
    help="Service tags as the cloud publishes them (Azure: ServiceTags_Public_DATE.json).",
)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def policy_options[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """`-p FILE` and `--tags FILE`, both repeatable, as `paths` and `tags`."""
    paths = click.option(
        "-p",
        "--policy",
        "paths",
        multiple=True,
        required=True,
        envvar="OUTGATE_POLICY",
        show_envvar=True,
        type=click.Path(),
        metavar="FILE",
        help="Policy file; repeat to merge several.",
    )
    return paths(tags_option(command))


def load_policy(paths: Sequence[str], tags: Sequence[str], *, exit_code: int) -> Policy:
    """The merged policy. Its problems go to stderr, one a line, and the command ends with `exit_code`."""
    from policies.errors import PolicyError
    from proxy.console import Console, Style
    from proxy.policy_files import read_policy

    try:
        return read_policy(paths, tags=tags)
    except PolicyError as error:
        stderr = Console(sys.stderr)
        for problem in error.problems:
            stderr.problem(problem, "error", Style.BAD)
        raise SystemExit(exit_code) from error


def workload_named(policy: Policy, name: str | None) -> str:
    """The workload of `-w`; where the policy has only one, that one is meant. Ends the command with a usage error."""
    from policies.spelling import did_you_mean
    from proxy.console import stop

    if name is None and len(policy.workloads) == 1:
        return next(iter(policy.workloads))
    if name is None:
        stop(f"which workload? add -w NAME; {did_you_mean('', policy.workloads)}", USAGE)
    if name not in policy.workloads:
        stop(f'unknown workload "{name}"; {did_you_mean(name, policy.workloads)}', USAGE)
    return name


def problem_json(problem: Problem) -> Json:
    place = problem.place
    where = {"file": place.file, "line": place.line, "column": place.column}
    return {**where, "message": problem.message, "repair": problem.hint}


def rule_json(rule: AnyRule | None) -> Json | None:
    if rule is None:
        return None
    return {"file": rule.place.file, "line": rule.place.line, "name": rule.name, "label": rule.label}
