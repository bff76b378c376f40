"""`outgate pki rotate`: a CA gives way to the next, one step at a time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from proxy.commands import NO, NOT_STARTED, Json, json_option
from proxy.commands.pki import pki_option
from proxy.commands.pki.constraints import constrain_options
from proxy.commands.pki.keys import KEY, password_option
from proxy.commands.pki.showing import ISSUING, ROOT, moment, show_root_keys
from proxy.commands.pki.steps import ACTIVATE, RETIRE, STAGE, UNSTAGE, Said, take_step
from proxy.commands.pki.tasks import Task, show_tasks, tasks

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from pki.store import Survey
    from proxy.commands.pki.changes import Changed

EPILOG = """\b
rotate issuing          a new issuing CA signs at once; workloads trust its root already
rotate root --stage     a new root is trusted beside the old one: publish the trust bundle
rotate root --activate  what is below the new root signs; clients with either root, or both, go on
rotate root --retire    the old root goes: a week later, when every workload has the bundle

\b
--root-key lends the key of an offline root for this command. --new-root-key FILE has the new root's key and is made
(mode 0600) where there is none; without it the key stands in the directory until you move it.

\b
Exit codes: 0 done; 1 not now; 2 usage; 3 could not read or write, or a key is not there.
JSON keys: pki rotated steps changed[role line was state id subject sha256 expires key ...] keys_deleted clients next
  was is null for a new CA, state gone for one that is no more; next[command start late why overdue] is all to be done

\b
Examples:
  outgate pki rotate issuing --pki pki --constrain-to policy.yaml
  outgate pki rotate root --stage --pki pki
"""

STEPS = (STAGE, UNSTAGE, ACTIVATE, RETIRE)
_TO_SIGN = ("root_keys", "password_file")
_TO_ISSUE = (*_TO_SIGN, "policies", "tags", "no_constraints", "issuing_days", "issuing_key")
MEANT_FOR: Mapping[tuple[str, str | None], tuple[str, ...]] = {  # options that say something to a step
    (ISSUING, None): _TO_ISSUE,
    (ISSUING, STAGE): _TO_ISSUE,
    (ROOT, STAGE): (*_TO_SIGN, "new_root_key", "root_years", "no_cross"),
    (ROOT, ACTIVATE): (*_TO_ISSUE, "force"),
    (ROOT, RETIRE): ("force",),
}


@click.command(epilog=EPILOG)
@click.argument("what", type=click.Choice([ISSUING, ROOT]))
@pki_option
@click.option("--stage", is_flag=True, help="Make the next one; it signs nothing yet.")
@click.option("--unstage", is_flag=True, help="Forget what is staged.")
@click.option("--activate", is_flag=True, help="The staged one signs from now on.")
@click.option("--retire", is_flag=True, help="Forget the former one, and delete its key.")
@constrain_options
@click.option(
    "--no-constraints", is_flag=True, help="Limit the new issuing CA to nothing, whatever the present one is."
)
@click.option("--issuing-days", type=click.IntRange(1, 3650), help="How long the new issuing CA signs, if not as long.")
@click.option("--root-years", type=click.IntRange(1, 50), help="How long the new root is trusted, if not as long.")
@click.option("--root-key", "root_keys", multiple=True, metavar=KEY, help="The key of an offline root, lent.")
@click.option("--new-root-key", metavar=KEY, help="Where the new root's key is, or is to be made.")
@click.option("--issuing-key", metavar=KEY, help="The new issuing CA's key, instead of a new one.")
@password_option
@click.option("--no-cross", is_flag=True, help="Do without the present root's key: it is lost, or not to be trusted.")
@click.option("--force", is_flag=True, help="Do not wait a week for workloads to learn the new root.")
@json_option
@click.pass_context
def rotate(
    ctx: click.Context,
    /,
    what: str,
    stage: bool,
    unstage: bool,
    activate: bool,
    retire: bool,
    as_json: bool,
    **options: Any,  # the fields of Said, by click
) -> None:
    """Replace the issuing CA or the root; no client is restarted."""
    from pki.authority import AuthorityError, KeyOffline
    from pki.rotation import NotNow
    from pki.signer import SignerError
    from pki.store import StoreError, changing, survey
    from proxy.commands.pki.changes import changes
    from proxy.console import Console, stop

    said = Said(**options)
    step = _chosen(what, dict(zip(STEPS, (stage, unstage, activate, retire), strict=True)))
    _require_meaning(ctx, what, step)
    directory, now = said.directory, datetime.now(UTC)
    with ExitStack() as undo:
        try:
            with changing(directory) as change:
                before = survey(directory)
                change.authority = take_step(change.authority, what, step, said, now, undo)
            undo.pop_all()
            after = survey(directory)
        except NotNow as error:
            stop(f"{directory}: {error}{_when(what, step, tasks(directory, before, now), now)}", NO)
        except AuthorityError as error:
            lending = ", or lend it with --root-key" if isinstance(error, KeyOffline) else ""
            stop(f"{directory}: {error}{lending}", NOT_STARTED)
        except (StoreError, SignerError) as error:
            stop(str(error), NOT_STARTED)
    found, clients = changes(before, after), _clients(what, step, after)
    coming = tasks(directory, after, now)
    if as_json:
        Console().json(_report(said, what, step, found, clients, coming))
    else:
        _show(said, found, clients, coming, now)


def _chosen(what: str, steps: Mapping[str, bool]) -> str | None:
    chosen = [step for step, is_chosen in steps.items() if is_chosen]
    if len(chosen) > 1:
        raise click.UsageError(f"one step at a time: --{' or --'.join(chosen)}")
    if what == ROOT and not chosen:
        raise click.UsageError(
            "a root is replaced in three steps: --stage and publish the trust bundle; --activate; a week later --retire"
        )
    return chosen[0] if chosen else None


def _require_meaning(ctx: click.Context, what: str, step: str | None) -> None:
    """An option that would go unheeded is a usage error: who wrote it believes that it did something."""
    heeded = {"what", *STEPS, "directory", "as_json", *MEANT_FOR.get((what, step), ())}
    for option in ctx.command.params:
        if option.name not in heeded and ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{option.opts[0]} has no meaning for rotate {what}" + (f" --{step}" if step else "")
            )
    if ctx.params["policies"] and ctx.params["no_constraints"]:
        raise click.UsageError("--constrain-to and --no-constraints say the opposite; give one of them")


def _when(what: str, step: str | None, coming: Sequence[Task], now: datetime) -> str:
    """From when on the step is possible, where that is a matter of time."""
    words = f"outgate pki rotate {what} --{step} "
    waiting = next((task for task in coming if task.command.startswith(words) and task.start > now), None)
    return f"; possible from {moment(waiting.start)}, or at once with --force" if waiting else ""


def _report(
    said: Said, what: str, step: str | None, found: Sequence[Changed], clients: str, coming: list[Task]
) -> Json:
    return {
        "pki": str(said.directory),
        "rotated": what,
        "steps": [step] if step else [STAGE, ACTIVATE],
        "changed": [change.json() for change in found],
        "keys_deleted": [change.deleted_key for change in found if change.deleted_key],
        "clients": clients,
        "next": [task.json() for task in coming],
    }


def _clients(what: str, step: str | None, after: Survey) -> str:
    """What they see from now on."""
    from pki.authority import State

    if step == UNSTAGE or (what == ISSUING and step in (STAGE, RETIRE)):
        return "nothing new"
    if what == ISSUING:
        return "leaves of the new issuing CA, whose root they trust already"
    if step == RETIRE:
        return "nothing new; but with the old root alone they refuse every leaf"
    leaves, state, known = "the same leaves", State.STAGED, "old"
    if step == ACTIVATE:
        leaves, state, known = "leaves below the new root", State.ACTIVE, "new"
    if all(root.sent for root in after.roots if root.state is state):  # its cross certificates
        return f"{leaves}, and accept them with the old root, the new one or both"
    return f"{leaves}, and accept them with the {known} root or both"


def _show(said: Said, found: list[Changed], clients: str, coming: list[Task], now: datetime) -> None:
    from proxy.commands.pki.changes import show_changes
    from proxy.console import Console

    console = Console()
    directory = shlex.quote(str(said.directory))
    show_changes(console, found)
    console.blank()
    console.line(f"clients see {clients}")
    if any(change.role == ROOT and (change.was is None or change.is_gone) for change in found):
        console.line("the trust bundle has other roots now, publish it:")
        console.code([f"outgate trust bundle --pki {directory} --to TRUST"], indent=2)
    if coming:
        console.line("next:")
        show_tasks(console, coming, now)
        show_root_keys(console, [change.ca for change in found if change.role == ROOT and change.ca.state == "active"])
