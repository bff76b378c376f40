"""A process that writes to a store: `python -m tests.pki.store_writer DIR TURNS`; it says a line after each turn.

A turn replaces the issuing CA and deletes the key of the former one, and each tenth replaces the root as well.
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pki.authority import Authority
from pki.rotation import activate_issuing, activate_root, retire_issuing, retire_root, stage_issuing, stage_root
from pki.store import changing

NOW = datetime(2026, 12, 1, tzinfo=UTC)


def rotated(authority: Authority, turn: int) -> Authority:
    if turn % 10:
        return retire_issuing(activate_issuing(stage_issuing(authority, NOW), NOW))
    return retire_root(activate_root(stage_root(authority, NOW), NOW), NOW, soak=timedelta(0))


def main() -> None:
    directory, turns = Path(sys.argv[1]), int(sys.argv[2])
    for turn in range(1, turns + 1):
        with changing(directory) as store:
            store.authority = rotated(store.authority, turn)
        print(turn, flush=True)


if __name__ == "__main__":
    main()
