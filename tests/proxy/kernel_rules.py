"""A network namespace for tests that load rules: this thread is in it while the context is open."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NEEDS_ROOT = [
    pytest.mark.kernel,
    pytest.mark.skipif("os.geteuid() != 0", reason="a network namespace needs root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft")
    ),
]


@contextmanager
def in_namespace(*devices: str) -> Iterator[None]:
    """A new one, with these devices up; the bridges among them connect nothing."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.unshare(os.CLONE_NEWNET)
        for device in devices:
            subprocess.run(["ip", "link", "add", device, "type", "bridge"], check=True)
        for device in ("lo", *devices):
            subprocess.run(["ip", "link", "set", device, "up"], check=True)
        yield
    finally:
        os.setns(before, os.CLONE_NEWNET)
        os.close(before)


def everything() -> str:
    """Rules and routes of this namespace, as its programs list them."""
    lists = (
        ["nft", "list", "ruleset"],
        *(["ip", family, *words] for family in ("-4", "-6") for words in (["rule"], ["route", "show", "table", "all"])),
    )
    return "\n".join(subprocess.run(one, capture_output=True, text=True, check=True).stdout for one in lists)
