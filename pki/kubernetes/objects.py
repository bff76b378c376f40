"""The objects that carry the trust bundle, and which ones are ours. It speaks to no server."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pki.distribution import CA

OWNER, OURS = "app.kubernetes.io/managed-by", "outgate"
CONTENT = "outgate/trust-sha256"  # of what the object carries: a pod template may repeat it to roll on a change
MAX_CONFIG_MAP = 1 << 20  # bytes of all values, as the API server counts: base64 of binaryData decoded
TRUST_BUNDLE_VERSIONS = ("v1", "v1beta1", "v1alpha1")  # served from 1.37, 1.33 and 1.27 on; the first one is taken

# Namespaces of the cluster itself. Nobody who installs a gate speaks for what runs there, and istio leaves them alone
# for the same reason. A selector or --namespace that names them is obeyed.
CLUSTERS_OWN = frozenset({"kube-system", "kube-public", "kube-node-lease"})

type Json = Mapping[str, object]


class BundleTooLarge(ValueError):
    """The trust bundle does not fit in a ConfigMap. `str()` says what to leave out."""


@dataclass(frozen=True, slots=True)
class Document:
    """An object as it should be.

    path     of its resource below the API: where the namespace goes there is `{}`
    content  what stands beside `metadata`: `data` and `binaryData`, or `spec`
    """

    path: str
    api_version: str
    kind: str
    name: str
    content: Mapping[str, Mapping[str, str]]
    digest: str = field(init=False)
    _tail: bytes = field(init=False, repr=False)  # half a megabyte that is the same for every namespace

    def __post_init__(self) -> None:
        tail = json.dumps(self.content, separators=(",", ":")).encode()[1:]
        object.__setattr__(self, "_tail", tail)
        object.__setattr__(self, "digest", hashlib.sha256(tail).hexdigest())

    def place(self, namespace: str) -> str:
        """Where the object of that namespace is found (of a cluster's own kind: ``)."""
        return f"{self.path.format(namespace)}/{self.name}"

    def body(self, version: str | None = None) -> bytes:
        """What is applied. With `version` only onto the object as it was when it had that resourceVersion."""
        metadata: dict[str, object] = {
            "name": self.name,
            "labels": {OWNER: OURS},
            "annotations": {CONTENT: self.digest},
        }
        if version is not None:
            metadata["resourceVersion"] = version
        head = {"apiVersion": self.api_version, "kind": self.kind, "metadata": metadata}
        return json.dumps(head).encode()[:-1] + b"," + self._tail

    def is_in(self, found: Json) -> bool:
        """Whether `found` carries all of it. Keys that others have added are theirs.

        The annotation alone would not do: who edits a value does not edit that.
        """
        if mapping(mapping(found.get("metadata")).get("annotations")).get(CONTENT) != self.digest:
            return False
        return all(
            mapping(found.get(part)).get(key) == value
            for part, keys in self.content.items()
            for key, value in keys.items()
        )


def config_map(name: str, files: Mapping[str, bytes]) -> Document:
    """The trust directory as a ConfigMap: text as `data`, what is no text as `binaryData`. Raises BundleTooLarge."""
    size = sum(map(len, files.values()))
    if size > MAX_CONFIG_MAP:
        raise BundleTooLarge(_too_large(files, size))
    text = {key: content.decode() for key, content in files.items() if _is_text(content)}
    binary = {key: b64encode(content).decode() for key, content in files.items() if key not in text}
    return Document("/api/v1/namespaces/{}/configmaps", "v1", "ConfigMap", name, {"data": text, "binaryData": binary})


def cluster_trust_bundle(version: str, name: str, files: Mapping[str, bytes]) -> Document:
    """Our roots alone as a ClusterTrustBundle of no signer: with one its name would have to start with the signer's."""
    group = f"certificates.k8s.io/{version}"
    content = {"spec": {"trustBundle": files[CA].decode()}}
    return Document(f"/apis/{group}/clustertrustbundles", group, "ClusterTrustBundle", name, content)


def is_ours(metadata: Json) -> bool:
    """Whether the object says that Outgate keeps it. Nothing else is ever written to or deleted."""
    return mapping(metadata.get("labels")).get(OWNER) == OURS


def is_ending(metadata: Json) -> bool:
    """Whether it is being deleted: a namespace that ends takes nothing new."""
    return metadata.get("deletionTimestamp") is not None


def text_of(metadata: Json, key: str) -> str:
    """A field that every object has, or ``."""
    value = metadata.get(key)
    return value if isinstance(value, str) else ""


def mapping(value: object) -> Json:
    """`value` where it is an object, else an empty one: what a server leaves out is null or absent."""
    return value if isinstance(value, Mapping) else {}


def items_of(found: Json, key: str) -> list[object]:
    """The list at `key`, or an empty one."""
    value = found.get(key)
    return value if isinstance(value, list) else []


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _too_large(files: Mapping[str, bytes], size: int) -> str:
    largest = ", ".join(_sizes(files))
    return (
        f"the trust bundle has {size} bytes and a ConfigMap holds {MAX_CONFIG_MAP} ({largest}); "
        "leave the public roots out with --public none, or name a smaller file of them"
    )


def _sizes(files: Mapping[str, bytes]) -> Iterable[str]:
    by_size = sorted(files.items(), key=lambda named: -len(named[1]))
    return (f"{name} {len(content)}" for name, content in by_size[:3])
