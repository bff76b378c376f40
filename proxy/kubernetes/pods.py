"""Follows the pods of a cluster: one list, then a watch from there on, and tells every change. Who is who it leaves to
`proxy.identity`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import datetime

from pki.kubernetes.api import Api, ApiFault, Event, ListAgain, Pace
from pki.kubernetes.objects import Json, mapping, text_of
from proxy.identity import Kind, Pod, read_pod, unclear

PATH = "/api/v1/pods"
# Pods that have ended have no address that is theirs: the server leaves them out, and tells one that ends as DELETED.
QUERY = {"fieldSelector": "status.phase!=Succeeded,status.phase!=Failed"}
WATCH_S = (
    30  # a connection that died without a word is noticed so soon: the index is not older than that and PATIENCE_S
)
PATIENCE_S = 10.0
SHORT_S = 1.0  # a watch that ends sooner counts as a failure, or an ill server would be asked without end


class Follower:
    """Tells what it sees, in this order: `begin`, each pod, `listed`, then changes as they come; `begin` again after a
    new list.

    see     a pod that is new or changed; with is_clear False one whose addresses may be another's by now
    gone    the uid of a pod that has none any more
    agreed  the server has answered: what was told is what it knows
    failed  it has not; why, once for each reason
    """

    def __init__(
        self,
        api: Api,
        *,
        begin: Callable[[], None],
        see: Callable[[Pod], None],
        gone: Callable[[str], None],
        listed: Callable[[], None],
        agreed: Callable[[], None],
        failed: Callable[[str], None],
        pace: Pace | None = None,
        watch_s: int = WATCH_S,
    ) -> None:
        self._api = api
        self._begin = begin
        self._see = see
        self._gone = gone
        self._listed = listed
        self._agreed = agreed
        self._failed = failed
        self._pace = pace or Pace(first_s=0.2, most_s=10.0)
        self._watch_s = watch_s
        self._version = ""
        self._failures = 0
        self._ends: dict[str, asyncio.TimerHandle] = {}  # of pods that are being deleted

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began, retry_after_s = loop.time(), 0.0
            try:
                await self._follow()
            except ApiFault as fault:
                if isinstance(fault, ListAgain):
                    self._version = ""
                if fault.status != 410:
                    self._failed(str(fault))
                retry_after_s = fault.retry_after_s
            self._failures = self._failures + 1 if loop.time() - began < SHORT_S else 0
            await asyncio.sleep(max(self._pace.wait_s(self._failures), retry_after_s) if self._failures else 0)

    async def _follow(self) -> None:
        """One list, if need be, and one watch. Raises ApiFault."""
        if not self._version:
            self._begin()
            version = await self._api.list_pages(PATH, QUERY, self._take_page, whole=True)
            self._version = version
            self._listed()
            self._agreed()
        await self._api.watch(
            PATH, QUERY, self._version, self._take, whole=True, watch_s=self._watch_s, begun=self._agreed
        )
        self._agreed()

    def _take_page(self, page: Sequence[Json]) -> None:
        for found in page:
            self._look(found)

    def _take(self, event: Event) -> None:
        if event.kind == "DELETED":
            self._forget(text_of(event.metadata, "uid"))
        elif event.kind != "BOOKMARK":
            self._look(event.whole)
        self._version = text_of(event.metadata, "resourceVersion")
        self._failures = 0
        self._agreed()

    def _look(self, found: Json) -> None:
        metadata = mapping(found.get("metadata"))
        uid = text_of(metadata, "uid")
        try:
            pod = read_pod(found)
        except (ValueError, TypeError):  # an address that is none, text that is none: of such a pod nothing is known
            pod = None
        if pod is None:
            self._forget(uid)
            return
        self._cancel(uid)
        self._see(pod)
        if pod.kind is Kind.POD and (left_s := _left_s(metadata)) is not None:
            # Its node has killed it by then, whether or not it has said so, and may give its address away.
            loop = asyncio.get_running_loop()
            self._ends[uid] = loop.call_later(max(0.0, left_s), self._doubt, pod)

    def _doubt(self, pod: Pod) -> None:
        self._ends.pop(pod.uid, None)
        self._see(unclear(pod))

    def _forget(self, uid: str) -> None:
        self._cancel(uid)
        if uid:
            self._gone(uid)

    def _cancel(self, uid: str) -> None:
        if timer := self._ends.pop(uid, None):
            timer.cancel()


def _left_s(metadata: Json) -> float | None:
    """How long a pod that is being deleted may take yet; None: it is not being deleted.

    The server sets deletionTimestamp to when the grace is over.
    """
    text = text_of(metadata, "deletionTimestamp")
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).timestamp() - time.time()
    except ValueError:
        return 0.0
