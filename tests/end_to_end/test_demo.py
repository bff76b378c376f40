"""`make demo`: a newcomer's first minute."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.end_to_end.world import CHECKOUT
from tests.sandbox_user import as_user, why_no_sandbox

pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]
WITHIN_S = 60


def demo(*, as_ordinary_user: bool = False) -> tuple[subprocess.CompletedProcess[str], float]:
    command = [sys.executable, str(CHECKOUT / "scripts" / "demo.py")]
    began = time.monotonic()
    done = subprocess.run(
        as_user(command) if as_ordinary_user else command, capture_output=True, text=True, timeout=2 * WITHIN_S
    )
    return done, time.monotonic() - began


def test_the_demo_shows_what_is_let_through_and_what_is_refused() -> None:
    done, took_s = demo()
    outcomes = re.findall(r"  (200|400|403|421|no such name|refused)  ", done.stdout)

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert outcomes == ["200", "403", "400", "403", "no such name", "200", "421", "refused"]
    assert "The Origin's Own Authority" in done.stdout
    assert took_s < WITHIN_S


@pytest.mark.kernel
@pytest.mark.skipif("os.geteuid() != 0", reason="only root can become an ordinary user")
def test_the_demo_needs_no_root() -> None:
    if reason := why_no_sandbox():
        pytest.skip(reason)
    done, _ = demo(as_ordinary_user=True)

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
