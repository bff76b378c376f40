"""Which pod has an address, as far as a cluster's API has told. It asks nobody, reads no clock and matches no policy.

Whoever watches the cluster gives changes to a `Pods`; whoever judges asks it with the source address of a packet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from ipaddress import IPv6Address, ip_address
from sys import intern

import orjson

from policies.model import Address

MAX_ROW = 32 * 1024  # bytes; of a pod with more labels than that nobody says who it is
MAX_CHANGE = 2 * MAX_ROW + 4096  # bytes of rows or uids in one change: the longest row goes in
_ACCOUNT = "system:serviceaccount:"  # as Kubernetes names one: no name in a file of credentials has a colon
_IPV6 = 1 << 128
_OVER = frozenset({"Succeeded", "Failed"})  # its containers have ended for good, and its address may be another's


class Doubt(Enum):
    """Why nobody says which pod has an address."""

    SHARED = auto()  # two pods claim it, or one that should be gone by now
    STALE = auto()  # the cluster has not told all, or not for too long


class Kind(StrEnum):
    POD = "pod"
    HOST = "host"  # of the host's network: it has the node's addresses, as has every other one there
    UNCLEAR = "unclear"  # it should be gone, or says too much: its addresses are nobody's until the cluster tells more


@dataclass(frozen=True, slots=True)
class Pod:
    """What is kept of one pod. `addresses` are all it has, of both versions."""

    uid: str
    namespace: str
    service_account: str
    labels: tuple[tuple[str, str], ...]
    addresses: tuple[Address, ...]
    kind: Kind = Kind.POD


@dataclass(frozen=True, slots=True)
class Change:
    """What is new, as one process tells another. `pods` are rows; `gone` are uids.

    is_listed  all of the cluster's pods are known once this is taken
    is_stale   and what is known is too old to go by
    """

    pods: Sequence[str] = ()
    gone: Sequence[str] = ()
    is_listed: bool = True
    is_stale: bool = False

    def to_bytes(self) -> bytes:
        return orjson.dumps([self.pods, self.gone, self.is_listed, self.is_stale])

    @classmethod
    def from_bytes(cls, text: bytes) -> Change:
        return cls(*orjson.loads(text))


class Pods:
    """The pods of one cluster by their addresses. Until all were listed every address is in doubt.

    version   another one after every change
    in_doubt  addresses of which nobody says whose they are
    """

    def __init__(self) -> None:
        self.version = 0
        self.is_listed = False
        self.is_stale = False
        self._by_uid: dict[str, Pod] = {}
        self._by_address: dict[int, Pod | tuple[Pod, ...]] = {}
        self._kinds = dict.fromkeys(Kind, 0)
        self.in_doubt = 0

    def who(self, address: Address) -> Pod | Doubt | None:
        """The pod that has `address`; None: no pod does, though its node may."""
        if self.is_stale or not self.is_listed:
            return Doubt.STALE
        found = self._by_address.get(_key(address))
        if found is None:
            return None
        if type(found) is Pod and found.kind is Kind.POD:
            return found
        return Doubt.SHARED if _is_doubtful(_claims(found)) else None

    def pod(self, uid: str) -> Pod | None:
        return self._by_uid.get(uid)

    def vouched(self, user: str, address: Address) -> Pod | None:
        """The pod that `user` has proved to be, if that agrees with what is known of it and of `address`."""
        pod = self._by_uid.get(user.rpartition("/")[2])
        if pod is None or user != spell_user(pod.namespace, pod.service_account, pod.uid):
            return None
        claims = _claims(self._by_address.get(_key(address)))
        if pod.kind is Kind.HOST:
            return pod if all(one.kind is Kind.HOST for one in claims) else None
        if pod.kind is Kind.UNCLEAR and len(claims) > 1:  # it may have ended, and another have its address by now
            return None
        return pod if pod in claims or not claims else None

    def take(self, change: Change) -> None:
        """Go by `change` from now on. Raises ValueError, TypeError, KeyError for rows that nobody of ours wrote."""
        for uid in change.gone:
            self.forget(uid)
        for row in change.pods:
            self.see(read_row(row))
        self.is_listed, self.is_stale = change.is_listed, change.is_stale
        self.version += 1

    def see(self, pod: Pod) -> None:
        """A pod that is new, or is another than before."""
        self.forget(pod.uid)
        self._by_uid[pod.uid] = pod
        self._kinds[pod.kind] += 1
        for address in pod.addresses:
            claims = _claims(self._by_address.get(_key(address)))
            self._settle(_key(address), claims, (*claims, pod))

    def forget(self, uid: str) -> None:
        """A pod that is gone, if it was there."""
        pod = self._by_uid.pop(uid, None)
        self.version += 1
        if pod is None:
            return
        self._kinds[pod.kind] -= 1
        for address in pod.addresses:
            claims = _claims(self._by_address.get(_key(address)))
            self._settle(_key(address), claims, tuple(one for one in claims if one is not pod))

    def _settle(self, key: int, before: tuple[Pod, ...], after: tuple[Pod, ...]) -> None:
        self.in_doubt += _is_doubtful(after) - _is_doubtful(before)
        if after:
            self._by_address[key] = after[0] if len(after) == 1 else after
        else:
            del self._by_address[key]

    @property
    def uids(self) -> Iterable[str]:
        return self._by_uid.keys()

    def count(self, kind: Kind) -> int:
        return self._kinds[kind]

    def told(self) -> Iterator[Change]:
        """All of it, for somebody who knows nothing yet."""
        for rows in batches(map(write_row, self._by_uid.values())):
            yield Change(pods=rows, is_listed=False)
        yield Change(is_listed=self.is_listed, is_stale=self.is_stale)

    def __len__(self) -> int:
        return len(self._by_uid)


def batches(rows: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The rows in order, as many at once as one change may hold."""
    batch: list[str] = []
    size = 0
    for row in rows:
        length = 2 * len(row.encode()) + 4  # within other JSON its quotes and backslashes are escaped
        if batch and size + length > MAX_CHANGE:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(row)
        size += length
    if batch:
        yield tuple(batch)


def read_pod(found: Mapping[str, object]) -> Pod | None:
    """A pod as the API shows it; None: it has no address, or none any more. Raises ValueError for no pod at all."""
    metadata, spec, status = (_mapping(found.get(part)) for part in ("metadata", "spec", "status"))
    uid, namespace = metadata.get("uid"), metadata.get("namespace")
    if not (isinstance(uid, str) and uid and isinstance(namespace, str)):
        raise ValueError("a pod without uid or namespace")
    addresses = tuple(dict.fromkeys(_addresses(status)))
    if not addresses or status.get("phase") in _OVER:
        return None
    account = spec.get("serviceAccountName")
    labels = _mapping(metadata.get("labels"))
    pod = Pod(
        uid,
        intern(namespace),
        intern(account) if isinstance(account, str) else "",
        tuple((intern(key), intern(value)) for key, value in sorted(labels.items()) if isinstance(value, str)),
        addresses,
        Kind.HOST if spec.get("hostNetwork") is True else Kind.UNCLEAR if _has_ended(metadata, status) else Kind.POD,
    )
    return pod if len(write_row(pod)) <= MAX_ROW else unclear(pod)


def unclear(pod: Pod) -> Pod:
    """The same, of which nobody says any more that it has its addresses."""
    return Pod(pod.uid, pod.namespace, pod.service_account, (), pod.addresses, Kind.UNCLEAR)


def spell_user(namespace: str, service_account: str, uid: str) -> str:
    """How the gate calls a client that has proved by a token which pod it is."""
    return f"{_ACCOUNT}{namespace}:{service_account}/{uid}"


def is_pod_user(user: str) -> bool:
    return user.startswith(_ACCOUNT)


def write_row(pod: Pod) -> str:
    fields = [pod.uid, pod.namespace, pod.service_account, dict(pod.labels), list(map(str, pod.addresses)), pod.kind]
    return orjson.dumps(fields).decode()


def read_row(row: str) -> Pod:
    """What `write_row` was given. Raises ValueError, TypeError, KeyError."""
    uid, namespace, account, labels, addresses, kind = orjson.loads(row)
    return Pod(
        uid,
        intern(namespace),
        intern(account),
        tuple((intern(key), intern(value)) for key, value in labels.items()),
        tuple(map(ip_address, addresses)),
        Kind(kind),
    )


def _key(address: Address) -> int:
    """::10.0.0.7 is not 10.0.0.7."""
    return int(address) if address.version == 4 else int(address) | _IPV6


def _claims(found: Pod | tuple[Pod, ...] | None) -> tuple[Pod, ...]:
    return (found,) if isinstance(found, Pod) else found or ()


def _is_doubtful(claims: tuple[Pod, ...]) -> bool:
    """Pods of a node's network share its addresses, and that is no doubt: none of them is known by them."""
    if all(pod.kind is Kind.HOST for pod in claims):
        return False
    return len(claims) > 1 or claims[0].kind is not Kind.POD


def _addresses(status: Mapping[str, object]) -> Iterator[Address]:
    listed = status.get("podIPs")
    texts = [_mapping(one).get("ip") for one in listed] if isinstance(listed, list) else []
    for text in (*texts, status.get("podIP")):
        if isinstance(text, str) and text:
            address = ip_address(text)
            yield (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def _has_ended(metadata: Mapping[str, object], status: Mapping[str, object]) -> bool:
    """It is being deleted and no container of it runs: from then on its node may give its address to another."""
    if metadata.get("deletionTimestamp") is None:
        return False
    lists = (status.get(key) for key in ("containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"))
    states = [_mapping(_mapping(one).get("state")) for found in lists if isinstance(found, list) for one in found]
    return not any("running" in state for state in states)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
