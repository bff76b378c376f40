"""The Kubernetes API over HTTP: look, list, watch, create, apply, delete, and one word for each way it fails.

lightkube finds the cluster and proves who we are: service account, kubeconfig, token files that rotate, exec plugins.
Requests are made here and not by its client, which takes whole objects where metadata is enough (a thousand bundles
are half a gigabyte), splits a watch at U+0085, which any tenant may write into an annotation, and drops Retry-After.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass

import httpx2
import yaml
from lightkube.config.client_adapter import ConnectionParams
from lightkube.config.kubeconfig import KubeConfig
from lightkube.config.models import User
from lightkube.core.exceptions import ConfigError
from msgspec import MsgspecError

from pki.kubernetes.objects import Json, items_of, mapping, text_of

FIELD_MANAGER = "outgate"
PATIENCE_S = 15.0  # for a connection, for an answer, and for each read of one
WATCH_S = 290  # then the server ends a watch and we begin another: a dead connection is noticed no later
PAGE = 500  # objects of a list at once
MAX_EVENT = 8 << 20  # bytes; etcd holds no object of 2 MiB
MAX_REST_S = 600.0  # whatever Retry-After says

_METADATA = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1,application/json"
_random = secrets.SystemRandom()


type TakePage = Callable[[Sequence[Json]], None]


class NoCluster(Exception):
    """It is not said which cluster is meant, or not how to enter it. `str()` has the place and the repair."""


class ApiFault(Exception):
    """The API server did not do it, or did not answer. `str()` says why.

    status         of the answer; 0: there was none
    retry_after_s  how long it asks us to wait, else 0
    is_ending      it refused because the namespace is being deleted
    """

    def __init__(self, text: str, *, status: int = 0, retry_after_s: float = 0.0, is_ending: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after_s = retry_after_s
        self.is_ending = is_ending

    @property
    def is_final(self) -> bool:
        """Whether the same again would fail again, unless a person does something."""
        return 400 <= self.status < 500 and self.status not in (408, 409, 410, 425, 429)


class ListAgain(ApiFault):
    """What was known is too old (410 Gone), or cannot be told: a watch goes on only after a new list."""


@dataclass(frozen=True, slots=True)
class Event:
    """One change that a watch tells. `kind` is ADDED, MODIFIED, DELETED, or BOOKMARK: only the version moved on.

    whole  the object, as far as the watch was to tell it
    """

    kind: str
    metadata: Json
    whole: Json


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to wait after so many failures: ever longer, and not all of us at the same moment."""

    first_s: float = 0.5
    most_s: float = 60.0

    def wait_s(self, failures: int) -> float:
        most_s = min(self.most_s, self.first_s * (1 << min(failures, 16)))
        return most_s * _random.uniform(0.5, 1.0)


@asynccontextmanager
async def connect(
    kubeconfig: str | None,
    context: str | None,
    *,
    connections: int,
    patience_s: float = PATIENCE_S,
    flag: str = "--kubeconfig",
) -> AsyncIterator[Api]:
    """The cluster of `kubeconfig`, else the one that this pod is in, else that of KUBECONFIG or ~/.kube/config.

    `flag` is how the operator names another one. Raises NoCluster. Nothing is sent yet.
    """
    try:
        found = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env()
        config = found.get(context)
        if config is None:  # lightkube allows for it in its types
            raise NoCluster("the kubeconfig names no context; name one with --context")
        config = config._replace(user=_user(config.user))
        params = ConnectionParams(timeout=httpx2.Timeout(patience_s)).httpx_params(config)
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        client = httpx2.AsyncClient(**params, limits=limits)
    except ConfigError as error:
        raise NoCluster(f"{error}; name a kubeconfig with {flag}, or run in a pod") from error
    except KeyError as error:
        raise NoCluster(f"the kubeconfig, or this pod's environment, lacks {error}; name another one") from error
    except (OSError, AttributeError, TypeError, ValueError, MsgspecError, yaml.YAMLError) as error:
        raise NoCluster(f"{kubeconfig or 'the kubeconfig'}: {_one_line(error)}; name another one") from error
    async with client:
        yield Api(client, patience_s)


def _user(user: User | None) -> User:
    """Nobody is a user without credentials. Plugins of v1 answer as those of v1beta1 do, which lightkube knows."""
    user = user or User()
    if user.exec and user.exec.apiVersion == "client.authentication.k8s.io/v1":
        user.exec.apiVersion = "client.authentication.k8s.io/v1beta1"
    return user


class Api:
    """What this job asks of the server. Every method raises ApiFault."""

    def __init__(self, client: httpx2.AsyncClient, patience_s: float) -> None:
        self._client = client
        self._patience_s = patience_s
        self._rest_until = 0.0

    async def look(self, path: str) -> Json | None:
        """The object at `path`, or None."""
        found = await self.discover(path)
        if found is not None:
            _version(path, found)
        return found

    async def discover(self, path: str) -> Json | None:
        """What the API says of itself at `path`, or None."""
        try:
            return await self._ask("GET", path, {})
        except ApiFault as fault:
            if fault.status == 404:
                return None
            raise

    async def list(self, path: str, query: Mapping[str, str]) -> tuple[str, list[Json]]:
        """The version of the list, and the metadata of every object in it."""
        found: list[Json] = []
        version = await self.list_pages(path, query, lambda page: found.extend(_metadata_of(page)))
        return version, found

    async def list_pages(self, path: str, query: Mapping[str, str], take: TakePage, *, whole: bool = False) -> str:
        """Gives `take` the objects, a page at a time, and returns the version of the list.

        whole  not their metadata alone: thousands of objects are many megabytes
        """
        more = ""
        while True:
            page = {"limit": str(PAGE)} | ({"continue": more} if more else {})
            answer = await self._ask("GET", path, {**query, **page}, accept=_accepted(whole, "List"))
            version = _version(path, answer)
            take([mapping(item) for item in items_of(answer, "items")])
            more = text_of(mapping(answer.get("metadata")), "continue")
            if not more:
                return version

    async def watch(
        self,
        path: str,
        query: Mapping[str, str],
        version: str,
        take: Callable[[Event], None],
        *,
        whole: bool = False,
        watch_s: int | None = None,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        """Gives `take` every change since `version`. Returns when the server has had enough. Raises ListAgain, too.

        whole    objects, not their metadata alone
        watch_s  after which the server is to end it, else WATCH_S
        begun    is told when the server has begun to tell
        """
        await self._rest()
        async with aclosing(self._events(path, query, version, whole, watch_s or WATCH_S, begun)) as events:
            async for event in events:
                take(event)

    async def create(self, path: str, body: bytes) -> Json:
        """What the server makes of `body`: also a question in the form of an object, such as a TokenReview."""
        return await self._ask("POST", path, {}, body)

    async def apply(self, path: str, body: bytes, *, force: bool, manager: str = FIELD_MANAGER) -> str:
        """Server-side apply. Returns the new resourceVersion. Without `force` a field of somebody else's is a 409."""
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        answer = await self._ask("PATCH", path, query, body, content_type="application/apply-patch+yaml")
        return _version(path, answer)

    async def delete(self, path: str, metadata: Json) -> None:
        """Deletes the very object that has this metadata; nothing where it is gone already."""
        only = {"uid": metadata.get("uid"), "resourceVersion": metadata.get("resourceVersion")}
        body = json.dumps({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": only}).encode()
        try:
            await self._ask("DELETE", path, {}, body)
        except ApiFault as fault:
            if fault.status != 404:
                raise

    async def _events(
        self,
        path: str,
        query: Mapping[str, str],
        version: str,
        whole: bool,
        watch_s: int,
        begun: Callable[[], None],
    ) -> AsyncGenerator[Event, None]:
        query = {
            **query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(watch_s),
        }
        timeout = httpx2.Timeout(self._patience_s, read=watch_s + self._patience_s)
        headers = {"Accept": _accepted(whole)}
        with _faults(path):
            async with self._client.stream("GET", path, params=query, headers=headers, timeout=timeout) as answer:
                if answer.status_code != 200:
                    async with asyncio.timeout(self._patience_s):
                        await answer.aread()
                    raise self._fault(path, answer)
                begun()
                async for line in _lines(answer):
                    yield _event(path, line)

    async def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes | None = None,
        *,
        accept: str = "",
        content_type: str = "application/json",
    ) -> Json:
        """The answer as JSON, in time as a whole: each read of one may be slow, and there may be many."""
        accept = accept or (_METADATA.format("") if method == "PATCH" else "application/json")
        headers = {"Accept": accept} | ({"Content-Type": content_type} if body is not None else {})
        await self._rest()
        with _faults(path):
            async with asyncio.timeout(2 * self._patience_s):
                answer = await self._client.request(method, path, params=dict(query), headers=headers, content=body)
            if answer.status_code not in (200, 201, 202):
                raise self._fault(path, answer)
            if not isinstance(told := answer.json(), Mapping):
                raise ApiFault(f"{path}: an answer that is no object")
            return told

    async def _rest(self) -> None:
        """Waits as long as the server has asked for (429, 503): it meant all of us, not one namespace."""
        await asyncio.sleep(max(0.0, self._rest_until - asyncio.get_running_loop().time()))

    def _fault(self, path: str, answer: httpx2.Response) -> ApiFault:
        try:
            status = mapping(answer.json())
        except (ValueError, RecursionError):  # a balancer's page
            status = {}
        after = answer.headers.get("Retry-After", "")
        retry_after_s = min(float(after), MAX_REST_S) if after.isascii() and after.isdigit() else 0.0
        if retry_after_s:
            self._rest_until = max(self._rest_until, asyncio.get_running_loop().time() + retry_after_s)
        return _status_fault(path, status, answer.status_code, retry_after_s)


def _accepted(whole: bool, of: str = "") -> str:
    return "application/json" if whole else _METADATA.format(of)


def _metadata_of(page: Sequence[Json]) -> Iterator[Json]:
    return (mapping(item.get("metadata")) for item in page)


@contextmanager
def _faults(path: str) -> Iterator[None]:
    """Foreign exceptions become ApiFault here, and nowhere else."""
    try:
        yield
    except (TimeoutError, httpx2.TimeoutException) as error:
        raise ApiFault(f"{path}: no answer in time") from error
    except (ConfigError, httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise ApiFault(f"{path}: {_one_line(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # no JSON, from the server or an exec plugin
        raise ApiFault(f"{path}: an answer that cannot be read: {_one_line(error)}") from error


async def _lines(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """The lines of a watch, cut at \\n alone. One that has no end is dropped: the next watch tells it again."""
    waiting = b""
    async for chunk in answer.aiter_bytes():
        *whole, waiting = (waiting + chunk).split(b"\n")
        for line in whole:
            yield line
        if len(waiting) > MAX_EVENT:
            raise ListAgain(f"{answer.url.path}: an event of more than {MAX_EVENT} bytes")


def _version(path: str, found: Json) -> str:
    """The resourceVersion that every object and list has: without it the answer is another server's."""
    version = text_of(mapping(found.get("metadata")), "resourceVersion")
    if not version:
        raise ApiFault(f"{path}: an answer without a resourceVersion")
    return version


def _event(path: str, line: bytes) -> Event:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ListAgain(f"{path}: a malformed event") from error
    about = mapping(mapping(told).get("object"))
    match mapping(told).get("type"):
        case "ERROR":
            code = about.get("code")
            fault = _status_fault(path, about, code if isinstance(code, int) else 0, 0.0)
            raise ListAgain(str(fault), status=fault.status)
        case "ADDED" | "MODIFIED" | "DELETED" | "BOOKMARK" as kind:
            metadata = mapping(about.get("metadata"))
            if text_of(metadata, "resourceVersion") and (kind == "BOOKMARK" or text_of(metadata, "name")):
                return Event(kind, metadata, about)
    raise ListAgain(f"{path}: a malformed event")


def _status_fault(path: str, status: Json, code: int, retry_after_s: float) -> ApiFault:
    details = mapping(status.get("details"))
    reasons = {mapping(cause).get("reason") for cause in items_of(details, "causes")}
    said = status.get("message") or status.get("reason") or httpx2.codes.get_reason_phrase(code) or "no reason given"
    kind = ListAgain if code == 410 else ApiFault
    return kind(
        f"{path}: {code} {_one_line(said)}",
        status=code,
        retry_after_s=retry_after_s,
        is_ending="NamespaceTerminating" in reasons,
    )


def _one_line(what: object) -> str:
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"
