"""Reads the operator's own mitmproxy addons from their files, and tries that in a process of its own before a start.

When they are called, and what they may change, is `proxy.inspector.user_addons`'s.
"""

from __future__ import annotations

import inspect
import json
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from proxy import child

SERVED = ("requestheaders", "request", "responseheaders", "response")  # the hooks that a gate calls
TRY_S = 30.0  # mitmproxy and whatever the files import, on a slow machine
MAX_ANSWER = 4096

type Hook = Callable[[Any], object]  # Any: mitmproxy's HTTPFlow, which is not loaded where only files are tried


class AddonUnusable(Exception):
    """An addon file that no gate can start with. `str()` is what to print: place, what, repair."""


@dataclass(frozen=True, slots=True)
class UserAddon:
    """One object of a file's `addons`. `shown`: the file and its class, for people; `hooks` by name."""

    file: str
    shown: str
    hooks: Mapping[str, Hook]


def load_addons(paths: Sequence[str]) -> tuple[UserAddon, ...]:
    """The addons of all files, in order. Raises AddonUnusable."""
    return tuple(addon for number, path in enumerate(paths) for addon in _load(path, f"outgate_addon_{number}"))


def try_addons(paths: Sequence[str]) -> None:
    """Load the files where they cannot do anything to this process. Raises AddonUnusable."""
    if not paths:
        return
    try:
        process = child.start("proxy.addon_files")
    except OSError as error:
        raise AddonUnusable(f"--addon: no process to try it in: {error.strerror or error}") from error
    try:
        with process.sock as sock:
            sock.settimeout(TRY_S)
            sock.send(json.dumps(paths).encode())
            answer = sock.recv(MAX_ANSWER)
    except OSError as error:  # a timeout too
        raise AddonUnusable(f"--addon {', '.join(paths)}: not loaded within {TRY_S:g} s: {error}") from error
    finally:
        process.kill()
    if not answer:
        raise AddonUnusable(f"--addon {', '.join(paths)}: the process that loaded it ended")
    if problem := json.loads(answer):
        raise AddonUnusable(problem)


def main() -> None:
    """`python -m proxy.addon_files FD PARENT`: answers the paths that come over FD with what is wrong with them."""
    descriptor, parent = map(int, sys.argv[1:])
    child.die_with(parent)
    problem = ""
    with socket.socket(fileno=descriptor) as sock:
        paths = json.loads(sock.recv(1 << 16))
        try:
            load_addons(paths)
        except AddonUnusable as error:
            problem = str(error)[: MAX_ANSWER // 8]  # JSON may write six bytes for one
        sock.send(json.dumps(problem).encode())


def _load(path: str, name: str) -> tuple[UserAddon, ...]:
    module = ModuleType(name)
    module.__file__ = path
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise AddonUnusable(f"--addon {path}: {error.strerror or error}") from error
    sys.modules[name] = module  # dataclasses and pickles look there
    try:
        # From the text alone: a __pycache__ beside it might be somebody else's to write.
        exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - the operator's own code
    except SyntaxError as error:
        raise AddonUnusable(f"{path}:{error.lineno or 1}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise AddonUnusable(f"{path}:{line_in(path, error) or 1}: does not load: {what}") from error
    addons = getattr(module, "addons", None)
    if not isinstance(addons, list | tuple) or not addons:
        raise AddonUnusable(f"{path}: has no addons; end it with addons = [YourAddon()]")
    return tuple(_checked(path, addon) for addon in addons)


def _checked(path: str, addon: object) -> UserAddon:
    if isinstance(addon, type):
        raise AddonUnusable(f"{path}: {addon.__name__} in addons is a class; say {addon.__name__}()")
    shown = f"{Path(path).name} ({type(addon).__name__})"
    hooks = {name: getattr(addon, name) for name in SERVED if callable(getattr(addon, name, None))}
    served = ", ".join(SERVED)
    for name in sorted(_known_hooks() - set(SERVED)):
        if hasattr(addon, name):  # it would wait for ever, and its author think that it works
            raise AddonUnusable(f"{path}: {shown}: a gate does not call {name}, only {served}")
    for name, hook in hooks.items():
        if inspect.iscoroutinefunction(hook):
            raise AddonUnusable(f"{path}: {shown}: {name} is async; a gate calls plain functions alone")
    if not hooks:
        raise AddonUnusable(f"{path}: {shown} has no hook; a gate calls {served}")
    return UserAddon(path, shown, hooks)


def _known_hooks() -> set[str]:
    import mitmproxy.eventsequence  # noqa: F401 - with it come all hooks; here: it takes half a second
    from mitmproxy.hooks import all_hooks

    return {*all_hooks, "load"}


def line_in(path: str, error: BaseException) -> int | None:
    """Where in the file it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


if __name__ == "__main__":
    main()
