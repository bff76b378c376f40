"""`outgate trust run`: a command with the variables, and no gate."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import click

from proxy.commands.pki import pki_option
from proxy.commands.run import NOT_STARTED, RunCommand

NOT_EXECUTABLE, NOT_FOUND = 126, 127

EPILOG = """\b
The command takes our place: signals, terminal and exit status are its own. A trust directory that was made for it is
removed when it has ended; with --trust it stays.

\b
Exit codes: the command's own; 125 it was not started; 126 it cannot be executed, 127 it was not found.

\b
Example:
  outgate trust run --pki pki -- python app.py
"""


@click.command(cls=RunCommand, epilog=EPILOG, context_settings={"allow_interspersed_args": False})
@pki_option
@click.option("--trust", metavar="DIR", type=click.Path(path_type=Path), help="Keep the trust directory there.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND [ARG]...")
def run(directory: Path, trust: Path | None, command: tuple[str, ...]) -> None:
    """Run a command with the variables that make every runtime trust the authority."""
    from pki.trust import TrustError, roots_of
    from proxy.console import stop
    from proxy.options import say
    from proxy.trusting import trusting

    try:
        roots = roots_of(directory)
        place = trust.absolute() if trust else _directory_of_ours()
        environment = trusting(place, roots, os.environ, say).over(os.environ)
    except (TrustError, OSError) as error:
        stop(str(error), NOT_STARTED)
    _become(command, environment)


def _directory_of_ours() -> Path:
    """A new directory that is removed when this process has ended, whatever it has become. Raises OSError."""
    try:
        us = os.pidfd_open(os.getpid())
    except (AttributeError, OSError) as error:
        raise OSError("nobody can see here when the command has ended; name a directory that stays: --trust") from error
    directory = Path(tempfile.mkdtemp(prefix="outgate-"))
    try:
        _remove_after(us, directory)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    os.close(us)
    return directory


def _remove_after(us: int, directory: Path) -> None:
    """Leaves behind a process that waits for our end and removes `directory`. Raises OSError.

    Nobody has to wait for it: it is no child of the command, in no session of its, and holds nothing open.
    """
    if first := os.fork():
        os.waitpid(first, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            _hold_only(us)
            select.select([3], [], [])  # a pidfd is readable once its process has ended
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os._exit(0)  # whatever happened: nothing of ours may run twice


def _hold_only(descriptor: int) -> None:
    """This one, as 3, is all that this process has open: a pipe of the command's would never end."""
    os.chdir("/")
    os.dup2(descriptor, 3)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))


def _become(command: tuple[str, ...], environment: Mapping[str, str]) -> NoReturn:
    from proxy.console import stop

    sys.stdout.flush()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a program would inherit that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606  a list of words, never a shell
    except FileNotFoundError:
        stop(f"{command[0]}: command not found", NOT_FOUND)
    except (OSError, ValueError) as error:
        stop(f"{command[0]}: {getattr(error, 'strerror', None) or error}", NOT_EXECUTABLE)
