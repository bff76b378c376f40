"""Where the gate's own code lies, and how another process of ours is started from it and from nowhere else.

The command runs as the same user, who often owns these files; and while it runs the gate still imports parts of itself
and starts its inspector. What is imported outside the sandbox must not be written inside.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])  # a site-packages directory, or a checkout
_SHARED = ("/", "/usr", "/usr/local")  # prefixes that hold more than a Python
_START = """\
import json, runpy, sys
_, module, sys.path[:], *sys.argv[1:] = sys.argv[0], sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:]
runpy.run_module(module, run_name="__main__", alter_sys=True)"""


def settle_imports() -> None:
    """From now on import from Python's own directories and ours alone: from none that PYTHONPATH names (an empty entry
    is the directory we were started in), and from none that is yet to be made."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in sys.path if os.path.isabs(path) and os.path.isdir(path) and path not in named]
    sys.path[:] = dict.fromkeys([*paths, ROOT])


def places() -> list[str]:
    """The files and directories that the gate's code comes from."""
    prefixes = (prefix for prefix in (sys.prefix, sys.base_prefix) if prefix not in _SHARED)
    return [*_imported_from(), *prefixes, os.path.realpath(sys.executable)]


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module`: whatever the environment says (-I) and .pth files say by now (-S)."""
    program = os.path.realpath(sys.executable)
    return [program, "-I", "-S", "-c", _START, module, json.dumps(_imported_from()), *arguments]


def _imported_from() -> list[str]:
    return [path for path in sys.path if os.path.isabs(path) and os.path.isdir(path)]
