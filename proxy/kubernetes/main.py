"""The entry of the process that speaks to a cluster's API: it follows the pods, reviews tokens, and holds what opens
the API to it. It judges nothing.

The supervisor starts it with one socket; the first message says which cluster.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import orjson

from pki.kubernetes.api import Api, ApiFault, NoCluster, connect
from proxy.channel import Channel
from proxy.child import die_with, leave_no_core
from proxy.identity import Pod, batches, write_row
from proxy.kubernetes.pods import PATIENCE_S, Follower
from proxy.kubernetes.reviews import review

CONNECTIONS = 4  # a watch, a list, and reviews


def main() -> None:
    """`python -m proxy.kubernetes.main FD PARENT`: until nothing more can be said on the socket FD."""
    descriptor, parent = map(int, sys.argv[1:])
    die_with(parent)
    leave_no_core()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the supervisor, which ends us
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as sock:
        asyncio.run(_serve(sock))


async def _serve(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()  # Any: JSON of ours
    over = asyncio.Event()
    channel = Channel(sock, received=lambda text, _: asked.put_nowait(orjson.loads(text)), closed=over.set)
    speaker = _Speaker(loop, channel.send)
    serving = asyncio.create_task(_follow(speaker, asked))
    ending = asyncio.create_task(over.wait())
    await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    serving.cancel()
    await asyncio.gather(serving, ending, return_exceptions=True)
    channel.close()


async def _follow(speaker: _Speaker, asked: asyncio.Queue[dict[str, Any]]) -> None:
    cluster = await asked.get()
    try:
        async with (
            connect(
                cluster["kubeconfig"], None, connections=CONNECTIONS, patience_s=PATIENCE_S, flag="--kubernetes"
            ) as api,
            asyncio.TaskGroup() as group,
        ):
            follower = Follower(
                api,
                begin=lambda: speaker.say({"begin": True}),
                see=speaker.see,
                gone=speaker.gone,
                listed=lambda: speaker.say({"listed": True}),
                agreed=speaker.agree,
                failed=lambda why: speaker.say({"failed": why}),
            )
            group.create_task(follower.run())
            while True:
                question = await asked.get()
                group.create_task(_review(api, speaker, question["number"], question["token"], cluster["audience"]))
    except NoCluster as error:
        speaker.say({"failed": str(error)})


async def _review(api: Api, speaker: _Speaker, number: int, token: str, audience: str) -> None:
    try:
        user = await review(api, token, audience)
    except ApiFault as fault:
        speaker.say({"reviewed": number, "failed": str(fault)})
    else:
        speaker.say({"reviewed": number, "user": user})


class _Speaker:
    """What is said, in order; changes of one turn of the loop go together."""

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Callable[[bytes], None]) -> None:
        self._loop = loop
        self._send = send
        self._rows: dict[str, str | None] = {}  # by uid; None: gone
        self._agrees = False
        self._flushing: asyncio.Handle | None = None

    def see(self, pod: Pod) -> None:
        self._change(pod.uid, write_row(pod))

    def gone(self, uid: str) -> None:
        self._change(uid, None)

    def agree(self) -> None:
        """What was told is what the server knows."""
        self._agrees = True
        self._flush_soon()

    def say(self, message: dict[str, object]) -> None:
        self._flush()
        self._send(orjson.dumps(message))

    def _change(self, uid: str, row: str | None) -> None:
        self._rows.pop(uid, None)
        self._rows[uid] = row
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        rows, self._rows = self._rows, {}
        for uids in batches((uid for uid, row in rows.items() if row is None)):
            self._send(orjson.dumps({"gone": uids}))
        for batch in batches(row for row in rows.values() if row is not None):
            self._send(orjson.dumps({"pods": batch}))
        if self._agrees:
            self._agrees = False
            self._send(orjson.dumps({"agreed": True}))


if __name__ == "__main__":
    main()
