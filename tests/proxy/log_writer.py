"""A process that writes records to a decision log: `NAME COUNT SIZE TARGET TURNS`. SIGHUP reopens it.

It waits for a line on standard input before the first record, and for one before it closes. On standard error it says
how far it is, and at last how many records were written and lost and how often the log failed.
"""

from __future__ import annotations

import signal
import sys
import threading
import time

from proxy.log.decision_log import DecisionLog, open_log

AHEAD = 64  # records; a queue that overflows is another test's


def main(name: str, count: str, size: str, target: str, turns: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # in every thread: one of them waits for it
    log = open_log(None if target == "stdout" else target, turns=int(turns))
    threading.Thread(target=reopen_on_hangup, args=(log,), daemon=True).start()
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.readline()
    for number in range(int(count)):
        while number - log.written > AHEAD and not log.is_failing:
            time.sleep(0.001)
        log({"writer": name, "number": number, "text": name * int(size)})
    print("queued", file=sys.stderr, flush=True)
    sys.stdin.readline()
    log.close()
    print(log.written, log.lost_total, log.failures, file=sys.stderr, flush=True)


def reopen_on_hangup(log: DecisionLog) -> None:
    while True:
        signal.sigwait({signal.SIGHUP})
        log.reopen()


if __name__ == "__main__":
    main(*sys.argv[1:])
