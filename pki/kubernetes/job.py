"""The distribution job: once through the cluster, or for as long as it lives. What is owed where `placing` knows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pki.kubernetes.api import Api, ApiFault, Event, ListAgain, Pace
from pki.kubernetes.objects import (
    CLUSTERS_OWN,
    TRUST_BUNDLE_VERSIONS,
    BundleTooLarge,
    Json,
    is_ending,
    items_of,
    mapping,
    text_of,
)
from pki.kubernetes.placing import CLUSTER, PARALLEL, Placing, Told

SHORT_S = 1.0  # a watch that ends sooner counts as a failure, or an ill server would be asked without end

_NAMESPACES = "/api/v1/namespaces"
_OBJECTS = "/api/v1/configmaps"
_CERTIFICATES = "/apis/certificates.k8s.io"

type Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """Where the bundle is to stand, under which name.

    selector              of namespaces; None: all but the cluster's own
    namespaces            instead: these, and the cluster is not asked which there are
    prune                 take it away from namespaces that are not meant
    cluster_trust_bundle  and as a ClusterTrustBundle, where the cluster knows them
    """

    name: str
    selector: str | None = None
    namespaces: tuple[str, ...] = ()
    prune: bool = False
    cluster_trust_bundle: bool = False

    @property
    def selected(self) -> dict[str, str]:
        return {"labelSelector": self.selector} if self.selector else {}

    @property
    def named(self) -> dict[str, str]:
        """By name: a role can be held to that one name, also for lists and watches (RBAC, resourceNames)."""
        return {"fieldSelector": f"metadata.name={self.name}"}

    @property
    def where(self) -> str:
        return "the namespaces" if self.selector is None else f"the namespaces with {self.selector}"

    @property
    def connections(self) -> int:
        """How many it takes: a watch for each list, and what is asked beside them."""
        return len(self.namespaces) + 3 + PARALLEL

    def means(self, namespace: Json) -> bool:
        """Whether a namespace that the selector lets through gets the bundle."""
        is_clusters_own = self.selector is None and text_of(namespace, "name") in CLUSTERS_OWN
        return not is_ending(namespace) and not is_clusters_own


@dataclass(frozen=True, slots=True)
class Job:
    """What both ways have in common.

    tell  is given what became of each place
    say   is given a line about what concerns no single place
    """

    api: Api
    aim: Aim
    tell: Callable[[Told], None]
    say: Callable[[str], None]
    pace: Pace = field(default_factory=Pace)

    async def once(self, files: Files, deadline_s: float) -> list[Told]:
        """Puts `files` everywhere, trying again until it is done, cannot be done, or the time is up.

        Raises BundleTooLarge, and ApiFault where it could not be found out where to put them.
        """
        placing = self._placing()
        placing.carry(files)
        surveyed = False
        try:
            async with asyncio.timeout(deadline_s):
                await self._survey(placing)
                surveyed = True
                async with placing.at_work(gives_up=True):
                    pass  # it ends when nothing is owed
        except TimeoutError:
            if not surveyed:
                raise ApiFault(f"{self.aim.where} could not be listed within {deadline_s:g} s") from None
        return [placing.told(place) for place in placing.places]

    async def keep(
        self, files: Files, changes: Callable[[], Awaitable[Files]], ready: Callable[[bool], None] = lambda _: None
    ) -> None:
        """Puts `files` everywhere and keeps them there, then what `changes` returns, until it is cancelled.

        ready  is told when everything stands, and when that ends

        Raises BundleTooLarge, for the first bundle alone.
        """
        placing = self._placing(ready)
        placing.carry(files)
        placing.await_lists(*(self.aim.namespaces or (_NAMESPACES, "")))
        async with placing.at_work() as group:
            if self.aim.cluster_trust_bundle:
                placing.await_lists(_CERTIFICATES)
                group.create_task(self._follow_trust_bundle(placing))
            if not self.aim.namespaces:
                group.create_task(self._follow_namespaces(placing))
            for namespace in self.aim.namespaces or ("",):
                group.create_task(self._follow_objects(placing, namespace))
            while True:
                try:
                    placing.carry(await changes())
                except BundleTooLarge as error:
                    self.say(f"{error}; the former bundle stays")

    def _placing(self, ready: Callable[[bool], None] = lambda _: None) -> Placing:
        placing = Placing(
            self.api,
            self.aim.name,
            tell=self.tell,
            ready=ready,
            pace=self.pace,
            is_fixed=bool(self.aim.namespaces),
            prune=self.aim.prune,
        )
        placing.mean(self.aim.namespaces)
        return placing

    async def _survey(self, placing: Placing) -> None:
        """Asks once what the other way follows."""
        if self.aim.cluster_trust_bundle:
            placing.carry_trust_bundle(await self._persist(self._trust_bundle_version, gives_up=True))
        if self.aim.namespaces:
            return
        _, namespaces = await self._persist(lambda: self.api.list(_NAMESPACES, self.aim.selected), gives_up=True)
        placing.mean(self._meant(namespaces))
        if self.aim.prune:
            _, objects = await self._persist(lambda: self.api.list(_OBJECTS, self.aim.named), gives_up=True)
            placing.see_all(_versions(objects))

    async def _follow_namespaces(self, placing: Placing) -> None:
        def listed(namespaces: list[Json]) -> None:
            placing.mean(self._meant(namespaces))
            placing.listed(_NAMESPACES)

        def take(event: Event) -> None:
            if event.kind != "DELETED" and self.aim.means(event.metadata):
                placing.mean_also(text_of(event.metadata, "name"))
            else:  # a namespace that the selector no longer lets through is told as DELETED, too
                placing.mean_no_more(text_of(event.metadata, "name"))

        await self._follow(_NAMESPACES, self.aim.selected, listed, take)

    async def _follow_objects(self, placing: Placing, namespace: str) -> None:
        """What becomes of our ConfigMaps: in one namespace, or in all (``)."""

        def listed(objects: list[Json]) -> None:
            placing.see_all(_versions(objects), [namespace] if namespace else None)
            placing.listed(namespace)

        def take(event: Event) -> None:
            version = None if event.kind == "DELETED" else text_of(event.metadata, "resourceVersion")
            placing.see(text_of(event.metadata, "namespace"), version)

        path = f"{_NAMESPACES}/{namespace}/configmaps" if namespace else _OBJECTS
        await self._follow(path, self.aim.named, listed, take)

    async def _follow_trust_bundle(self, placing: Placing) -> None:
        def listed(objects: list[Json]) -> None:
            placing.see(CLUSTER, next((text_of(one, "resourceVersion") for one in objects), None))
            placing.listed(_CERTIFICATES)

        def take(event: Event) -> None:
            placing.see(CLUSTER, None if event.kind == "DELETED" else text_of(event.metadata, "resourceVersion"))

        version = await self._persist(self._trust_bundle_version)
        if not version:
            placing.listed(_CERTIFICATES)
            return
        placing.carry_trust_bundle(version)
        await self._follow(f"{_CERTIFICATES}/{version}/clustertrustbundles", self.aim.named, listed, take)

    async def _follow(
        self, path: str, query: Mapping[str, str], listed: Callable[[list[Json]], None], take: Callable[[Event], None]
    ) -> None:
        """Lists, then watches from there on: after a lost connection from where it was, after a 410 anew."""
        loop = asyncio.get_running_loop()
        version, failures, said = "", 0, ""

        def taken(event: Event) -> None:
            nonlocal version, failures, said
            if event.kind != "BOOKMARK":
                take(event)
            version, failures, said = text_of(event.metadata, "resourceVersion"), 0, ""

        while True:
            began, retry_after_s = loop.time(), 0.0
            try:
                if not version:
                    version, found = await self.api.list(path, query)
                    listed(found)
                await self.api.watch(path, query, version, taken)
            except ApiFault as fault:
                if isinstance(fault, ListAgain):
                    version = ""
                retry_after_s = fault.retry_after_s
                if str(fault) != said and fault.status != 410:
                    said = str(fault)
                    self.say(said)
            failures = failures + 1 if loop.time() - began < SHORT_S else 0
            await asyncio.sleep(max(self.pace.wait_s(failures), retry_after_s))

    async def _persist[T](self, ask: Callable[[], Awaitable[T]], *, gives_up: bool = False) -> T:
        """Asks until there is an answer; with `gives_up` raises ApiFault where the same again would not help."""
        failures = 0
        while True:
            try:
                return await ask()
            except ApiFault as fault:
                if gives_up and fault.is_final:
                    raise
                self.say(str(fault))
                failures += 1
                await asyncio.sleep(max(self.pace.wait_s(failures), fault.retry_after_s))

    async def _trust_bundle_version(self) -> str:
        """The newest API version in which this cluster has ClusterTrustBundles; `` and a line where it has none."""
        group = await self.api.discover(_CERTIFICATES) or {}
        served = {text_of(mapping(version), "version") for version in items_of(group, "versions")}
        for version in TRUST_BUNDLE_VERSIONS:
            if version in served:
                kinds = await self.api.discover(f"{_CERTIFICATES}/{version}") or {}
                if any(
                    text_of(mapping(kind), "name") == "clustertrustbundles" for kind in items_of(kinds, "resources")
                ):
                    return version
        self.say(
            "this cluster has no ClusterTrustBundle (a feature gate up to 1.36); ConfigMaps are written all the same"
        )
        return ""

    def _meant(self, namespaces: Iterable[Json]) -> list[str]:
        return [text_of(namespace, "name") for namespace in namespaces if self.aim.means(namespace)]


def _versions(objects: Iterable[Json]) -> dict[str, str]:
    return {text_of(one, "namespace"): text_of(one, "resourceVersion") for one in objects}
