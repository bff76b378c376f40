"""Run the grammar's fuzzers: `python -m tests.fuzz [CASES] [--seed N]`. The first fault ends it with 1."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from random import Random

from tests.fuzz import claims, making, oracles


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("cases", nargs="?", type=int, default=1_000_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same cases")
    given = parser.parse_args(arguments)
    random = Random(given.seed)
    kinds: dict[str, Callable[[], bool]] = {
        "request heads": lambda: claims.request_reads_alike(making.a_request(random)),
        "response heads": lambda: claims.response_reads_alike(making.a_response(random)),
        "chunked bodies": lambda: claims.chunks_read_alike(random, making.a_body(random)),
        "chunked answers": lambda: claims.chunks_read_alike(random, making.a_body(random), in_request=False),
    }
    begun = time.monotonic()
    try:
        for name, run in kinds.items():
            count = given.cases // 2 if name == "request heads" else given.cases // 6
            accepted = sum(run() for _ in range(count))
            print(f"{name}: {count} cases, {accepted} accepted, no two readers differ", flush=True)
    except claims.Disagreement as fault:
        print(fault, file=sys.stderr)
        return 1
    finally:
        oracles.close()
    print(f"{time.monotonic() - begun:.0f} s, seed {given.seed}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
