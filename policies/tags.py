"""Service tags in the forms in which clouds publish them, and in ours: names, each with its prefixes. It opens no file.

Ours is Azure's with nothing but names and prefixes, in one order, so that two imports of the same are the same text.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import collapse_addresses, ip_network
from typing import Any

from policies.model import Network

WIDEST_V4, WIDEST_V6 = 8, 16  # no cloud has more in one piece: a wider prefix is a mistake, or meant to open the world

type Tags = Mapping[str, tuple[Network, ...]]


class Cloud(StrEnum):
    AZURE = "azure"
    AWS = "aws"
    GCP = "gcp"


class MalformedTags(ValueError):
    """Not what that cloud publishes. `str()` says what is wrong."""


@dataclass(frozen=True, slots=True)
class TagChange:
    """How a tag differs from the one of that name before."""

    name: str
    added: tuple[Network, ...]
    removed: tuple[Network, ...]


def read_tags(cloud: Cloud, content: bytes) -> Tags:
    """The tags of a file as `cloud` publishes it; adjacent prefixes are one. Raises MalformedTags.

    azure  names as published (`Storage.EastUS2`)
    aws    `AWS.SERVICE` and `AWS.SERVICE.REGION`; AWS.AMAZON is every service
    gcp    cloud.json: `GoogleCloud` and `GoogleCloud.REGION`; goog.json: `Google`
    """
    found: dict[str, list[Network]] = defaultdict(list)
    try:
        for name, text in _PREFIXES[cloud](json.loads(content)):
            found[name].append(_network(name, text))
    except MalformedTags:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MalformedTags(f"not {_PUBLISHED[cloud]}") from error
    if not found:
        raise MalformedTags(f"no prefix in it: not {_PUBLISHED[cloud]}")
    return {name: _in_order(networks) for name, networks in sorted(found.items())}


def write_tags(tags: Tags) -> bytes:
    """`tags` as `--tags` reads them."""
    values = [
        {"name": name, "properties": {"addressPrefixes": [str(one) for one in networks]}}
        for name, networks in sorted(tags.items())
    ]
    lines = ",\n".join(json.dumps(value) for value in values)  # a tag a line: that is what a diff shows
    return f'{{"values": [\n{lines}\n]}}\n'.encode()


def compare_tags(before: Tags, after: Tags) -> Iterator[TagChange]:
    """Each tag that has other prefixes now, that is new, or that is gone."""
    for name in sorted({*before, *after}):
        old, new = set(before.get(name, ())), set(after.get(name, ()))
        if old != new:
            yield TagChange(name, _in_order(new - old, joins=False), _in_order(old - new, joins=False))


def _azure(found: Any) -> Iterator[tuple[str, str]]:  # Any: JSON, here and below
    for value in found["values"]:
        for text in value["properties"]["addressPrefixes"]:
            yield value["name"], text


def _aws(found: Any) -> Iterator[tuple[str, str]]:
    for entries, key in (("prefixes", "ip_prefix"), ("ipv6_prefixes", "ipv6_prefix")):
        for entry in found[entries]:
            name = f"AWS.{entry['service']}"
            yield name, entry[key]
            yield f"{name}.{entry['region']}", entry[key]


def _gcp(found: Any) -> Iterator[tuple[str, str]]:
    for entry in found["prefixes"]:
        text = entry.get("ipv4Prefix") or entry["ipv6Prefix"]
        if "service" not in entry:  # goog.json: all that is Google's, its own services too
            yield "Google", text
            continue
        name = entry["service"].replace(" ", "")
        yield name, text
        yield f"{name}.{entry['scope']}", text


_PREFIXES: Mapping[Cloud, Callable[[Any], Iterator[tuple[str, str]]]] = {
    Cloud.AZURE: _azure,
    Cloud.AWS: _aws,
    Cloud.GCP: _gcp,
}
_PUBLISHED = {
    Cloud.AZURE: "the JSON file that Microsoft publishes as Azure IP Ranges and Service Tags",
    Cloud.AWS: "the ip-ranges.json that AWS publishes",
    Cloud.GCP: "the cloud.json or goog.json that Google publishes",
}


def _network(name: object, text: object) -> Network:
    if not (isinstance(name, str) and name and name.isprintable() and isinstance(text, str)):
        raise TypeError
    try:
        network = ip_network(text)
    except ValueError as error:
        raise MalformedTags(f"{name}: {error}; download the file again") from error
    if network.prefixlen < (WIDEST_V4 if network.version == 4 else WIDEST_V6):
        raise MalformedTags(f"{name}: {network} is more than any cloud has; where does the file come from?")
    return network


def _in_order(networks: Iterable[Network], *, joins: bool = True) -> tuple[Network, ...]:
    found: list[Network] = []
    for version in (4, 6):
        of_version = [one for one in networks if one.version == version]
        found += collapse_addresses(of_version) if joins else sorted(of_version)  # type: ignore[type-var]  # one version
    return tuple(found)
