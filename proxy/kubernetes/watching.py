"""The supervisor's side of the process that speaks to a cluster's API: starts it again when it is lost, knows what it
told, and tells it to workers. It speaks to no API itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import count
from time import monotonic

import orjson

from proxy import child
from proxy.channel import Channel
from proxy.child import BackOff, Child
from proxy.config import Kubernetes, OnStale
from proxy.identity import Change, Kind, Pods, batches, read_row
from proxy.metrics.meter import Number
from proxy.metrics.table import METRICS

FIRST_PAUSE_S, LONGEST_PAUSE_S, SETTLED_S = 0.2, 30.0, 60.0
TICK_S = 1.0
SILENCE_S = 900.0  # of the process: it speaks each minute, but where an API has it wait for ten (MAX_REST_S)
REVIEW_S = 10.0
MAX_REVIEWS = 256  # under way; one more fails at once


class ReviewFailed(Exception):
    """Nobody has said whether a token is good. `str()` says why."""


class Cluster:
    """The pods of one cluster. Lives on one asyncio loop.

    tell  is given each change, for all who judge
    say   is given a line about what went wrong
    """

    def __init__(self, config: Kubernetes, tell: Callable[[Change], None], say: Callable[[str], None]) -> None:
        self._config = config
        self._tell = tell
        self._say = say
        self._pods = Pods()
        self._listing: set[str] | None = None  # uids of the list under way
        self._agreed = self._heard = monotonic()
        self._fault = ""
        self._said = ""
        self._child: Child | None = None
        self._channel: Channel | None = None
        self._back_off = BackOff(FIRST_PAUSE_S, LONGEST_PAUSE_S, SETTLED_S)
        self._timer: asyncio.TimerHandle | None = None
        self._numbers = count(1)
        self._reviews: dict[int, asyncio.Future[str | None]] = {}

    # --- its life ---

    def start(self) -> None:
        self._back_off.started()
        self._heard = monotonic()
        try:
            self._child = child.start("proxy.kubernetes.main", speaks=True)
        except OSError as error:
            self._lose(f"the watch of the cluster did not start: {error.strerror or error}")
            return
        self._channel = Channel(self._child.sock, received=self._receive, closed=self._ended)
        cluster = {"kubeconfig": self._config.kubeconfig, "audience": self._config.token_audience}
        self._channel.send(orjson.dumps(cluster))

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._stop()

    async def run(self) -> None:
        """Look after how old the index is, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._settle()
            if self._channel is not None and monotonic() - self._heard > SILENCE_S:
                self._lose(f"the watch of the cluster was silent for {SILENCE_S:g} s")

    def _ended(self) -> None:
        self._lose("the watch of the cluster ended")

    def _lose(self, why: str) -> None:
        self._stop()
        pause_s = self._back_off.failed()
        self._note(self._fault or why)
        self._timer = asyncio.get_running_loop().call_later(pause_s, self.start)

    def _stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._child is not None:
            self._child.kill()
        self._channel = self._child = None
        self._listing = None
        reviews, self._reviews = self._reviews, {}
        for waiting in reviews.values():
            if not waiting.done():
                waiting.set_exception(ReviewFailed("the watch of the cluster ended"))

    # --- what it tells ---

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child else None

    def told(self) -> Iterator[Change]:
        """All that is known, for a worker that knows nothing yet."""
        return self._pods.told()

    def _receive(self, text: bytes, _descriptor: int | None) -> None:
        self._heard = monotonic()
        try:
            self._heed(orjson.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            self._lose(f"the watch of the cluster speaks nonsense: {type(error).__name__}")

    def _heed(self, message: dict[str, object]) -> None:
        match message:
            case {"pods": [*rows]}:
                self._see([row for row in rows if isinstance(row, str)])
            case {"gone": [*uids]}:
                self._forget([uid for uid in uids if isinstance(uid, str)])
            case {"begin": True}:
                self._listing = set()
            case {"listed": True}:
                self._end_list()
            case {"agreed": True}:
                self._agree()
            case {"reviewed": int(number), **rest}:
                self._end_review(number, rest)
            case {"failed": str(why)}:
                self._fault = why
                self._note(why)
            case _:
                raise ValueError("no message of ours")

    def _see(self, rows: list[str]) -> None:
        news = []
        for row in rows:
            pod = read_row(row)
            if self._listing is not None:
                self._listing.add(pod.uid)
            if self._pods.pod(pod.uid) != pod:
                news.append(row)
        if news:
            self._change(Change(tuple(news)))

    def _forget(self, uids: list[str]) -> None:
        known = tuple(uid for uid in uids if self._pods.pod(uid) is not None)
        if known:
            self._change(Change(gone=known))

    def _end_list(self) -> None:
        listed, self._listing = self._listing or set(), None
        for uids in batches([uid for uid in self._pods.uids if uid not in listed]):
            self._change(Change(gone=uids))
        self._agreed = monotonic()
        self._change(Change(), is_listed=True)

    def _agree(self) -> None:
        self._agreed = monotonic()
        if self._fault:
            self._fault = ""
            self._note("")
        self._settle()

    def _settle(self) -> None:
        """Say so if the index has become too old to go by, or ceased to be."""
        if self._pods.is_listed and self._is_stale != self._pods.is_stale:
            self._change(Change())

    def _change(self, change: Change, *, is_listed: bool = False) -> None:
        is_listed = is_listed or self._pods.is_listed
        change = Change(change.pods, change.gone, is_listed, self._is_stale)
        self._pods.take(change)
        self._tell(change)

    @property
    def lag_s(self) -> float:
        """How long ago the API last said what it knows."""
        return monotonic() - self._agreed

    @property
    def _is_stale(self) -> bool:
        return self._config.on_stale is OnStale.DENY and self.lag_s > self._config.stale_s

    # --- tokens ---

    async def review(self, token: str) -> str | None:
        """Who `token` proves its bearer to be; None: nobody. Raises ReviewFailed."""
        if self._channel is None or len(self._reviews) >= MAX_REVIEWS:
            raise ReviewFailed("no review can be asked for now")
        number = next(self._numbers)
        waiting = self._reviews[number] = asyncio.get_running_loop().create_future()
        self._channel.send(orjson.dumps({"number": number, "token": token}))
        try:
            async with asyncio.timeout(REVIEW_S):
                user: str | None = await waiting
                return user
        except TimeoutError as error:
            raise ReviewFailed("no answer in time") from error
        finally:
            self._reviews.pop(number, None)

    def _end_review(self, number: int, answer: dict[str, object]) -> None:
        waiting = self._reviews.get(number)
        if waiting is None or waiting.done():
            return
        match answer:
            case {"user": str(user)}:
                waiting.set_result(user)
            case {"user": None}:
                waiting.set_result(None)
            case {"failed": str(why)}:
                self._note(why)
                waiting.set_exception(ReviewFailed(why))

    # --- how it is ---

    @property
    def unready(self) -> str | None:
        """Why nobody is known by his pod; None: all is well enough."""
        if not self._pods.is_listed:
            return "the pods of the cluster are not listed yet"
        if self._pods.is_stale:
            return "what is known of the cluster's pods is too old"
        return None

    @property
    def notes(self) -> Iterator[str]:
        if self._fault or self.lag_s > self._config.stale_s:
            known = "its pods are known as they last were" if self._pods.is_listed else "none of its pods is known"
            yield f"the cluster's API does not answer as it should: {known}, and the log says why"

    def gauges(self) -> dict[str, Number]:
        numbers: dict[str, Number] = {
            METRICS["outgate_identity_pods"].series(kind): self._pods.count(kind) for kind in Kind
        }
        numbers["outgate_identity_addresses_in_doubt"] = self._pods.in_doubt
        numbers["outgate_identity_lag_seconds"] = self.lag_s
        return numbers

    def _note(self, why: str) -> None:
        """Say it once, and once that it is over."""
        if why and why != self._said:
            self._say(f"the cluster's pods: {why}")
        if self._said and not why:
            self._say("the cluster's pods: followed again")
        self._said = why
