"""A stand-in for the Kubernetes API server, over real HTTP: what we ask of one, and its ill days.

Namespaces, ConfigMaps, ClusterTrustBundles and pods with resourceVersions; lists with selectors and pages; watches with
selectors, bookmarks and expiry; server-side apply with field managers and conflicts; TokenReview; tokens; RBAC; faults
on order.
"""

from __future__ import annotations

import copy
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

type Object = dict[str, Any]  # Any: JSON, as a server finds it
type Leaves = dict[tuple[str, ...], str]

KINDS = {
    "namespaces": "Namespace", "configmaps": "ConfigMap", "clustertrustbundles": "ClusterTrustBundle", "pods": "Pod",
    "secrets": "Secret", "mutatingwebhookconfigurations": "MutatingWebhookConfiguration",
}  # fmt: skip
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"
MAX_WAIT_S = 60.0

_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[a-z0-9.]+)/(?P<version>v[a-z0-9]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def is_watch(self) -> bool:
        return self.query.get("watch") == "true"


@dataclass(slots=True)
class Fault:
    """What happens to the next `times` requests that it is about, instead of an answer."""

    about: Callable[[Asked], bool]
    times: int
    status: int = 0
    message: str = ""
    reason: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    causes: Sequence[str] = ()
    raw: bytes | None = None  # a body that is no Status
    wait_s: float = 0.0
    drop: bool = False  # the connection, without an answer
    then_answer: bool = False  # after `wait_s` as ever


@dataclass(slots=True)
class OpenWatch:
    """One watch under way. `orders` are lines to be sent as they are; None: the connection is cut."""

    resource: str
    orders: list[bytes | None] = field(default_factory=list)
    is_ended: bool = False


class Status(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, message: str, reason: str = "", causes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.causes = causes

    def body(self) -> Object:
        causes = [{"reason": reason} for reason in self.causes]
        details = {"details": {"causes": causes}} if causes else {}
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": self.code}
        return {**status, "message": str(self), "reason": self.reason, **details}


class ApiServer:
    """The cluster, and what was asked of it. Methods may be called from the test's thread at any time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.changed = threading.Condition()
        self.asked: list[Asked] = []
        self.watches: list[OpenWatch] = []
        self.tokens: set[str] = {"token"}
        self.rules: list[tuple[str | None, Object]] | None = None  # namespace (None: all) and RBAC rule
        self.trust_bundle_versions: Sequence[str] = ("v1",)
        self.reviewed: dict[str, Object] = {}  # what a TokenReview of each token says: its status
        self.expired_as_event = True
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._owners: dict[tuple[str, str, str], dict[str, set[tuple[str, ...]]]] = {}
        self._log: list[tuple[int, str, str, Object, Object | None]] = []  # version, resource, type, now, before
        self._version = 100
        self._oldest = 0
        self._faults: list[Fault] = []
        self.most_at_once = 0
        self.at_once = 0
        self.closing = False

    # For tests

    def kubeconfig(self, directory: Path, **user: object) -> str:
        """The path of a kubeconfig that leads here."""
        cluster: Object = {"server": self.url}
        if (ca := directory / "api-ca.pem").exists():
            cluster["certificate-authority"] = str(ca)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user or {"token": "token"}}],
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
        }
        path = directory / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    def add_namespace(self, *names: str, labels: Mapping[str, str] | None = None, **metadata: object) -> None:
        with self.changed:
            for name in names:
                about = {"name": name, "labels": {"kubernetes.io/metadata.name": name, **(labels or {})}, **metadata}
                self._store("namespaces", "", name, {"metadata": about})

    def label(self, name: str, **labels: str | None) -> None:
        with self.changed:
            namespace = copy.deepcopy(self._objects["namespaces", "", name])
            for key, value in labels.items():
                namespace["metadata"]["labels"].pop(key, None)
                if value is not None:
                    namespace["metadata"]["labels"][key] = value
            self._store("namespaces", "", name, namespace)

    def annotate(self, name: str, key: str, value: str) -> None:
        with self.changed:
            namespace = copy.deepcopy(self._objects["namespaces", "", name])
            namespace["metadata"].setdefault("annotations", {})[key] = value
            self._store("namespaces", "", name, namespace)

    def end_namespace(self, name: str) -> None:
        """It is being deleted: it takes nothing new."""
        with self.changed:
            namespace = copy.deepcopy(self._objects["namespaces", "", name])
            namespace["metadata"]["deletionTimestamp"] = "2026-11-22T00:00:00Z"
            self._store("namespaces", "", name, namespace)

    def delete_namespace(self, name: str) -> None:
        with self.changed:
            for resource, namespace, inner in [key for key in self._objects if key[1] == name]:
                self._remove(resource, namespace, inner)
            self._remove("namespaces", "", name)

    def edit(self, namespace: str, name: str, changed: Object) -> None:
        """As an editor does: it becomes the owner of what it changed."""
        self.write("configmaps", namespace, name, {**self.config_map(namespace, name), **changed}, "kubectl-edit")

    def write(self, resource: str, namespace: str, name: str, content: Object, manager: str = "someone") -> None:
        with self.changed:
            key = (resource, namespace, name)
            after = copy.deepcopy(content)
            after.setdefault("metadata", {})["name"] = name
            before, leaves = _leaves(self._objects.get(key, {})), _leaves(after)
            mine = {path for path, value in leaves.items() if before.get(path) != value}
            owners = self._owners.setdefault(key, {})
            for other in owners.values():
                other -= mine
            owners.setdefault(manager, set()).update(mine)
            self._store(resource, namespace, name, after)

    def delete(self, resource: str, namespace: str, name: str) -> None:
        with self.changed:
            self._remove(resource, namespace, name)

    def add_pod(
        self,
        namespace: str,
        name: str,
        *addresses: str,
        account: str = "default",
        labels: Mapping[str, str] | None = None,
        phase: str = "Running",
        on_host: bool = False,
        **metadata: object,
    ) -> None:
        """A pod, new or in place of the one of that name. `metadata`: more of it."""
        running = [{"name": "app", "state": {"running": {}}}]
        content = {
            "metadata": {"name": name, "labels": dict(labels or {}), **metadata},
            "spec": {"serviceAccountName": account, "containers": [{"name": "app"}], "hostNetwork": on_host},
            "status": {"phase": phase, "podIPs": [{"ip": one} for one in addresses], "containerStatuses": running},
        }
        with self.changed:
            self._store("pods", namespace, name, content)

    def uid(self, namespace: str, name: str) -> str:
        with self.changed:
            return str(self._objects["pods", namespace, name]["metadata"]["uid"])

    def config_map(self, namespace: str, name: str = "outgate-trust") -> Object:
        """Raises KeyError where there is none."""
        with self.changed:
            return copy.deepcopy(self._objects["configmaps", namespace, name])

    def find(self, resource: str, name: str) -> Object:
        with self.changed:
            return copy.deepcopy(self._objects[resource, "", name])

    def served(self, name: str = "outgate-trust") -> set[str]:
        """The namespaces that have it."""
        with self.changed:
            return {key[1] for key in self._objects if key[0] == "configmaps" and key[2] == name}

    def requests(self, method: str, part: str = "", *, watch: bool | None = None) -> list[Asked]:
        with self.changed:
            return [
                asked
                for asked in self.asked
                if asked.method == method and part in asked.path and watch in (None, asked.is_watch)
            ]

    def fail(self, method: str, part: str = "", *, times: int = 1, watch: bool | None = None, **how: Any) -> None:
        """The next requests of that kind fail. Any: the fields of Fault."""

        def about(asked: Asked) -> bool:
            return asked.method == method and part in asked.path and watch in (None, asked.is_watch)

        with self.changed:
            self._faults.append(Fault(about, times, **how))

    def heal(self) -> None:
        with self.changed:
            self._faults.clear()

    def wait_for(self, what: Callable[[], bool], why: str) -> None:
        """Until `what` holds. It is looked at after every request and change."""
        until = time.monotonic() + MAX_WAIT_S
        with self.changed:
            while not what():
                left = until - time.monotonic()
                assert left > 0, f"not within {MAX_WAIT_S} s: {why}"
                self.changed.wait(min(left, 0.2))

    def wait_for_watches(self, *resources: str) -> None:
        self.wait_for(
            lambda: set(resources) <= {watch.resource for watch in self.watches if not watch.is_ended}, "watches"
        )

    def send(self, resource: str, *lines: bytes | None) -> None:
        """Into every watch of `resource`, as it is; None cuts the connection."""
        with self.changed:
            for watch in self.watches:
                if watch.resource == resource and not watch.is_ended:
                    watch.orders += lines
            self.changed.notify_all()

    def bookmark(self, resource: str) -> None:
        with self.changed:
            kind = {"kind": KINDS[resource], "apiVersion": "v1", "metadata": {"resourceVersion": str(self._version)}}
        self.send(resource, json.dumps({"type": "BOOKMARK", "object": kind}).encode() + b"\n")

    def forget_history(self) -> None:
        """As etcd after compaction: no watch can start before now."""
        with self.changed:
            self._oldest = self._version

    # For requests, with the lock held

    def take(self, asked: Asked) -> Fault | None:
        self.asked.append(asked)
        self.changed.notify_all()
        for fault in self._faults:
            if fault.times > 0 and fault.about(asked):
                fault.times -= 1
                return fault
        return None

    def answer(self, asked: Asked) -> tuple[int, Object]:
        """Raises Status."""
        if asked.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            raise Status(401, "Unauthorized", "Unauthorized")
        if asked.path.rstrip("/") == "/apis/certificates.k8s.io":
            return 200, {"kind": "APIGroup", "versions": [{"version": one} for one in ("v1", "v1beta1", "v1alpha1")]}
        if found := re.fullmatch(r"/apis/certificates\.k8s\.io/(v\w+)", asked.path):
            bundles = [{"name": "clustertrustbundles"}] if found[1] in self.trust_bundle_versions else []
            return 200, {"kind": "APIResourceList", "resources": [{"name": "certificatesigningrequests"}, *bundles]}
        if (asked.method, asked.path) == ("POST", REVIEWS):
            self._authorize("create", "tokenreviews", "", "")
            return 201, self._review(json.loads(asked.body))
        resource, namespace, name = self._locate(asked)
        self._authorize(_verb(asked, name), resource, namespace, name or _name_selected(asked))
        match asked.method:
            case "GET" if name:
                return 200, _shown(asked, self._get(resource, namespace, name))
            case "GET":
                return 200, self._list(asked, resource, namespace)
            case "PATCH":
                return self._apply(asked, resource, namespace, name)
            case "DELETE":
                return self._delete(asked, resource, namespace, name)
        raise Status(405, "method not allowed")

    def begin_watch(self, asked: Asked) -> tuple[OpenWatch, str, int]:
        """The watch, its namespace, and from where in the log on. Raises Status."""
        if asked.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            raise Status(401, "Unauthorized", "Unauthorized")
        resource, namespace, _ = self._locate(asked)
        self._authorize("watch", resource, namespace, _name_selected(asked))
        since = int(asked.query["resourceVersion"])
        if since < self._oldest:
            raise Status(410, f"too old resource version: {since} ({self._oldest})", "Expired")
        watch = OpenWatch(resource)
        self.watches.append(watch)
        self.changed.notify_all()
        return watch, namespace, next((at for at, one in enumerate(self._log) if one[0] > since), len(self._log))

    def events(self, asked: Asked, resource: str, namespace: str, at: int) -> tuple[list[bytes], int]:
        lines = []
        for version, changed, kind, now, before in self._log[at:]:
            if changed != resource or (namespace and now["metadata"].get("namespace") != namespace):
                continue
            matches, matched = _matches(asked, now), before is not None and _matches(asked, before)
            if kind == "DELETED" and not matched:
                continue
            if kind != "DELETED":
                if not matches and not matched:
                    continue
                kind = "DELETED" if not matches else "MODIFIED" if matched else "ADDED"
            told = copy.deepcopy(now)
            told["metadata"]["resourceVersion"] = str(version)
            # not escaped: as Go's encoder writes U+0085
            line = json.dumps({"type": kind, "object": _shown(asked, told)}, ensure_ascii=False)
            lines.append(line.encode() + b"\n")
        return lines, len(self._log)

    def _review(self, asked: Object) -> Object:
        status = self.reviewed.get(asked["spec"]["token"], {"authenticated": False})
        if status.get("audiences") and not set(status["audiences"]) & set(asked["spec"]["audiences"]):
            status = {"authenticated": False, "error": "token audiences are invalid for the target audiences"}
        return {**asked, "status": status}

    def _locate(self, asked: Asked) -> tuple[str, str, str]:
        found = _PATH.fullmatch(asked.path)
        if not found or found["resource"] not in KINDS:
            raise Status(404, "the server could not find the requested resource", "NotFound")
        if found["resource"] == "clustertrustbundles" and found["version"] not in self.trust_bundle_versions:
            raise Status(404, "the server could not find the requested resource", "NotFound")
        return found["resource"], found["namespace"] or "", found["name"] or ""

    def _authorize(self, verb: str, resource: str, namespace: str, name: str) -> None:
        """RBAC: a rule of the whole cluster, or one of this namespace. Names bind lists too, by field selector."""
        if self.rules is None:
            return
        for scope, rule in self.rules:
            names = rule.get("resourceNames")
            if (
                (scope is None or (scope == namespace and namespace))
                and verb in rule["verbs"]
                and resource in rule["resources"]
                and (not names or name in names)
            ):
                return
        where = f' in the namespace "{namespace}"' if namespace else " at the cluster scope"
        raise Status(403, f'{resource} is forbidden: User "u" cannot {verb} resource "{resource}"{where}', "Forbidden")

    def _get(self, resource: str, namespace: str, name: str) -> Object:
        try:
            return self._objects[resource, namespace, name]
        except KeyError:
            raise Status(404, f'{resource} "{name}" not found', "NotFound") from None

    def _list(self, asked: Asked, resource: str, namespace: str) -> Object:
        every = [
            found
            for key, found in sorted(self._objects.items())
            if key[0] == resource and namespace in ("", key[1]) and _matches(asked, found)
        ]
        start = int(asked.query.get("continue", "0"))
        stop = start + int(asked.query.get("limit", len(every) or 1))
        more = {"continue": str(stop)} if stop < len(every) else {}
        items = [_shown(asked, found) for found in every[start:stop]]
        kind = "PartialObjectMetadataList" if "as=PartialObjectMetadataList" in asked.headers.get("accept", "") else ""
        head = {"resourceVersion": str(self._version), **more}
        return {"kind": kind or f"{KINDS[resource]}List", "metadata": head, "items": items}

    def _apply(self, asked: Asked, resource: str, namespace: str, name: str) -> tuple[int, Object]:
        assert asked.headers["content-type"] == "application/apply-patch+yaml"
        patch, manager = json.loads(asked.body), asked.query["fieldManager"]
        if namespace and ("namespaces", "", namespace) not in self._objects:
            raise Status(404, f'namespaces "{namespace}" not found', "NotFound")
        size = sum(len(value) for value in patch.get("data", {}).values())
        assert size <= 1 << 20, "ConfigMaps have 1 MiB"
        key = (resource, namespace, name)
        old, owners = self._objects.get(key), self._owners.setdefault(key, {})
        wanted = patch["metadata"].pop("resourceVersion", None)
        if wanted is not None and (old is None or old["metadata"]["resourceVersion"] != wanted):
            raise Status(
                409, "the object has been modified; please apply your changes to the latest version", "Conflict"
            )
        if old is None:
            self._authorize("create", resource, namespace, name)
            if namespace and "deletionTimestamp" in self._objects["namespaces", "", namespace]["metadata"]:
                why = f"unable to create new content in namespace {namespace} because it is being terminated"
                raise Status(403, why, "Forbidden", ["NamespaceTerminating"])
        leaves, had = _leaves(patch), _leaves(old or {})
        for other, theirs in owners.items():
            taken = {path for path in leaves.keys() & theirs if other != manager and had.get(path) != leaves[path]}
            if taken and asked.query.get("force") != "true":
                raise Status(409, f'Apply failed with {len(taken)} conflicts: conflicts with "{other}"', "Conflict")
            theirs -= taken
        after = copy.deepcopy(old) if old else {"metadata": {"name": name}}
        for path in owners.get(manager, set()) - leaves.keys():
            if not any(path in theirs for other, theirs in owners.items() if other != manager):
                _unset(after, path)
        for path, value in leaves.items():
            _set(after, path, value)
        owners[manager] = set(leaves)
        if old is not None and _leaves(after) == had:
            return 200, _shown(asked, old)
        if old is not None and old.get("immutable"):
            raise Status(422, f'ConfigMap "{name}" is invalid: data: Forbidden: field is immutable', "Invalid")
        after |= {"apiVersion": patch["apiVersion"], "kind": patch["kind"]}
        self._store(resource, namespace, name, after)
        return 200 if old else 201, _shown(asked, self._objects[key])

    def _delete(self, asked: Asked, resource: str, namespace: str, name: str) -> tuple[int, Object]:
        found = self._get(resource, namespace, name)["metadata"]
        only = json.loads(asked.body or b"{}").get("preconditions", {})
        if any(found.get(key) != value for key, value in only.items()):
            raise Status(409, "Precondition failed", "Conflict")
        self._remove(resource, namespace, name)
        return 200, {"kind": "Status", "status": "Success"}

    def _store(self, resource: str, namespace: str, name: str, content: Object) -> None:
        self._version += 1
        before = self._objects.get((resource, namespace, name))
        now = copy.deepcopy(content)
        uid = before["metadata"]["uid"] if before else f"uid-{self._version}"
        now["metadata"] |= {"uid": uid, "resourceVersion": str(self._version)}
        now = {"apiVersion": "v1", "kind": KINDS[resource], **now}
        if namespace:
            now["metadata"]["namespace"] = namespace
        self._objects[resource, namespace, name] = now
        self._log.append((self._version, resource, "ADDED", now, before))
        self.changed.notify_all()

    def _remove(self, resource: str, namespace: str, name: str) -> None:
        self._version += 1
        self._owners.pop((resource, namespace, name), None)
        gone = self._objects.pop((resource, namespace, name))
        self._log.append((self._version, resource, "DELETED", gone, gone))
        self.changed.notify_all()


@contextmanager
def api_server(tls: ssl.SSLContext | None = None) -> Iterator[ApiServer]:
    """A server on 127.0.0.1, for as long as the context lasts."""
    listener = _Listener(("127.0.0.1", 0), _Connection)
    if tls is not None:
        listener.socket = tls.wrap_socket(listener.socket, server_side=True)
    scheme = "https" if tls else "http"
    listener.cluster = ApiServer(f"{scheme}://127.0.0.1:{listener.server_address[1]}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield listener.cluster
    finally:
        with listener.cluster.changed:
            listener.cluster.closing = True
            listener.cluster.changed.notify_all()
        listener.shutdown()
        thread.join()
        listener.server_close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    cluster: ApiServer

    def handle_error(self, *_: object) -> None:
        """Clients may go whenever they like."""


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one segment
    server: _Listener

    def do_GET(self) -> None:
        self._serve()

    do_PATCH = do_DELETE = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Not on the terminal of a test."""

    def _serve(self) -> None:
        cluster = self.server.cluster
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, url.path, dict(parse_qsl(url.query)), headers, body)
        with cluster.changed:
            cluster.at_once += not asked.is_watch
            cluster.most_at_once = max(cluster.most_at_once, cluster.at_once)
            fault = cluster.take(asked)
        try:
            if fault is None or self._fails(fault):
                self._do(asked)
        finally:
            with cluster.changed:
                cluster.at_once -= not asked.is_watch

    def _do(self, asked: Asked) -> None:
        try:
            if asked.is_watch:
                self._watch(asked)
                return
            with self.server.cluster.changed:
                code, answer = self.server.cluster.answer(asked)
                body = json.dumps(answer, ensure_ascii=False).encode()
        except Status as status:
            code, body = status.code, json.dumps(status.body()).encode()
        self._answer(code, body)

    def _fails(self, fault: Fault) -> bool:
        """Returns whether it is answered all the same."""
        if fault.wait_s:
            with self.server.cluster.changed:
                self.server.cluster.changed.wait_for(lambda: self.server.cluster.closing, fault.wait_s)
        if fault.then_answer:
            return True
        if fault.drop:
            self.close_connection = True
            return False
        status = Status(fault.status, fault.message, fault.reason, fault.causes)
        body = json.dumps(status.body()).encode() if fault.raw is None else fault.raw
        self._answer(fault.status, body, fault.headers)
        return False

    def _answer(self, code: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _watch(self, asked: Asked) -> None:
        cluster = self.server.cluster
        try:
            with cluster.changed:
                watch, namespace, at = cluster.begin_watch(asked)
        except Status as status:
            if status.code != 410 or not cluster.expired_as_event:
                raise
            self._begin()
            self._chunk(json.dumps({"type": "ERROR", "object": status.body()}).encode() + b"\n")
            self._chunk(b"")
            return
        until = time.monotonic() + float(asked.query["timeoutSeconds"])
        self._begin()
        try:
            while True:
                with cluster.changed:
                    lines, at = cluster.events(asked, watch.resource, namespace, at)
                    orders, watch.orders = watch.orders, []
                    if not lines and not orders:
                        if cluster.closing or time.monotonic() >= until:
                            break
                        cluster.changed.wait(min(0.5, max(0.0, until - time.monotonic())))
                        continue
                for line in (*lines, *orders):
                    if line is None:
                        self.close_connection = True
                        return
                    if line == b"":
                        self._chunk(b"")
                        return
                    self._chunk(line)
            self._chunk(b"")
        except OSError:
            self.close_connection = True
        finally:
            with cluster.changed:
                watch.is_ended = True
                cluster.changed.notify_all()

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _verb(asked: Asked, name: str) -> str:
    return {"PATCH": "patch", "DELETE": "delete"}.get(asked.method) or ("get" if name else "list")


def _name_selected(asked: Asked) -> str:
    selector = asked.query.get("fieldSelector", "")
    return selector.removeprefix("metadata.name=") if "!=" not in selector else ""


def _matches(asked: Asked, found: Object) -> bool:
    name, labels = _name_selected(asked), found["metadata"].get("labels", {})
    if name and found["metadata"]["name"] != name:
        return False
    over = re.findall(r"status\.phase!=(\w+)", asked.query.get("fieldSelector", ""))
    if found.get("status", {}).get("phase") in over:
        return False
    return all(_has(labels, term) for term in asked.query.get("labelSelector", "").split(",") if term)


def _has(labels: Mapping[str, str], term: str) -> bool:
    if not re.fullmatch(r"!?[\w./-]+(?:!?==?[\w.-]*)?", term):
        raise Status(400, f"unable to parse requirement: {term}", "BadRequest")
    key, is_not, value = term.partition("!=")
    if is_not:
        return labels.get(key) != value
    key, equals, value = term.replace("==", "=").partition("=")
    if equals:
        return labels.get(key) == value
    return key[1:] not in labels if key.startswith("!") else key in labels


def _shown(asked: Asked, found: Object) -> Object:
    """All of it, or as PartialObjectMetadata."""
    if "as=PartialObjectMetadata" not in asked.headers.get("accept", ""):
        return found
    kind = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
    return {**kind, "metadata": {**found["metadata"], "managedFields": [{"manager": "someone"}]}}


def _leaves(found: Object) -> Leaves:
    metadata = found.get("metadata", {})
    parts: dict[tuple[str, ...], Object | None] = {
        ("metadata", "labels"): metadata.get("labels"),
        ("metadata", "annotations"): metadata.get("annotations"),
        ("data",): found.get("data"),
        ("binaryData",): found.get("binaryData"),
        ("spec",): found.get("spec"),
    }
    return {(*path, key): value for path, keys in parts.items() for key, value in (keys or {}).items()}


def _set(found: Object, path: tuple[str, ...], value: str) -> None:
    for part in path[:-1]:
        found = found.setdefault(part, {})
    found[path[-1]] = value


def _unset(found: Object, path: tuple[str, ...]) -> None:
    for part in path[:-1]:
        found = found.get(part, {})
    found.pop(path[-1], None)
