"""Run inside the sandbox: starts several commands side by side and tells how each ended, as JSON on standard output."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

AT_ONCE = 6
TIMEOUT_S = 60


def run_one(order: dict[str, object]) -> dict[str, object]:
    argv, stdin, env = order["argv"], order["stdin"], order["env"]
    assert isinstance(argv, list)
    assert isinstance(stdin, str)
    assert isinstance(env, dict)
    done = subprocess.run(
        argv, input=base64.b64decode(stdin), capture_output=True, timeout=TIMEOUT_S, env=dict(os.environ) | env
    )
    out, err = (base64.b64encode(each).decode() for each in (done.stdout, done.stderr))
    return {"status": done.returncode, "stdout": out, "stderr": err}


def main() -> None:
    orders = json.load(sys.stdin)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        json.dump(dict(zip(orders, pool.map(run_one, orders.values()), strict=True)), sys.stdout)


if __name__ == "__main__":
    main()
