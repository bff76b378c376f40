"""Run inside the sandbox: NTP clients, honest and covert. Plans come in as JSON, what was heard goes out."""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

PATIENCE_S = 8.0  # the first answer may be held; what gets none waits for `patience_s`


def ask(plan: dict[str, Any]) -> list[str | None]:
    """What came back for each message, which all are sent before the first answer is waited for."""
    family = socket.AF_INET6 if ":" in plan["to"] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(plan.get("patience_s", PATIENCE_S))
        sock.connect((plan["to"], 123))
        heard: list[str | None] = []
        try:
            for message in plan["say"]:
                sock.send(bytes.fromhex(message))
                time.sleep(plan.get("pause_s", 0.0))
            heard += [sock.recv(4096).hex() for _ in plan["say"]]
        except OSError as error:
            heard.append(type(error).__name__)
        return heard


def main() -> None:
    plans = json.load(sys.stdin)
    time.sleep(plans.pop("idle_s", 0.0))
    json.dump({name: ask(plan) for name, plan in plans.items()}, sys.stdout)


if __name__ == "__main__":
    main()
