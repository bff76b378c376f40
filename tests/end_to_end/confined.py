"""Runs a program under what a unit file takes away: system calls, address families, memory that is both written and
executed, new privileges, and what /proc shows of others. The rest of the unit is systemd's own business.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it is run by its path

from proxy.sandbox import libc
from proxy.sandbox.bpf import ANSWER, EQUAL, LOAD_WORD, Step, assemble
from tests.sandbox_user import as_user

NUMBERS = Path("/usr/include") / f"{platform.machine()}-linux-gnu" / "asm" / "unistd_64.h"
_ALLOW, _REFUSE = 0x7FFF_0000, 0x0005_0000  # linux/seccomp.h
_NUMBER, _LOW_OF_ARG_0 = 0, 16
_NO_NEW_PRIVS, _SET_MDWE, _REFUSE_EXEC_GAIN = 38, 65, 1  # linux/prctl.h
_NAMESPACES = {"unshare", "setns"}  # RestrictNamespaces


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def calls(name: str) -> set[str]:
    """The system calls of a name or of an @set, as systemd has them."""
    if not name.startswith("@"):
        return {name}
    said = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in said.stdout.splitlines()[1:]]
    return set().union(*(calls(line) for line in lines if line and not line.startswith("#")))


def admitted(unit: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    for line in unit["SystemCallFilter"]:
        named = set().union(*(calls(word) for word in line.removeprefix("~").split()))
        found = found - named if line.startswith("~") else found | named
    return found - _NAMESPACES


def program(unit: dict[str, list[str]]) -> bytes:
    """Every call that is not admitted fails with EPERM, a socket of another family with EAFNOSUPPORT."""
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", NUMBERS.read_text()))
    names = sorted(admitted(unit) & numbers.keys())
    families = [getattr(socket, family) for family in unit["RestrictAddressFamilies"][0].split()]
    steps = [Step(LOAD_WORD, _NUMBER), Step(EQUAL, int(numbers["socket"]), no="other"), Step(LOAD_WORD, _LOW_OF_ARG_0)]
    steps += [Step(EQUAL, family, yes="family") for family in families]
    steps += [Step(ANSWER, _REFUSE | errno.EAFNOSUPPORT), Step(ANSWER, _ALLOW, label="family")]
    label = "other"
    for name in names:
        steps += [Step(EQUAL, int(numbers[name]), no=f"not {name}", label=label), Step(ANSWER, _ALLOW)]
        label = f"not {name}"
    return assemble([*steps, Step(ANSWER, _REFUSE | errno.EPERM, label=label)])


def confined(unit: Path, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` so, as an ordinary user. Only root may use it."""
    see_little = 'mount -t proc -o hidepid=invisible,subset=pid proc /proc && exec "$@"'  # ProtectProc, ProcSubset
    second = as_user([sys.executable, str(Path(__file__).resolve()), str(unit), *command])
    return ["unshare", "--mount", "sh", "-c", see_little, "sh", *second]


def main(unit_file: str, *command: str) -> None:
    unit = settings(Path(unit_file))
    confining = program(unit)
    os.umask(int(unit["UMask"][0], 8))
    libc.prctl(_NO_NEW_PRIVS, 1)
    libc.prctl(_SET_MDWE, _REFUSE_EXEC_GAIN)
    libc.set_seccomp(confining)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
