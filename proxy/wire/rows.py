"""Values of a policy as rows of JSON, and back. A row makes nothing but the classes named here, whatever it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import date
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, overload

import orjson

from policies.hostnames import Pattern
from policies.model import (
    Action,
    Entry,
    HostRule,
    KubernetesMatch,
    Match,
    Mode,
    NameRule,
    Network,
    Place,
    PortRange,
    Stage,
    Test,
    Tls,
    TransportRule,
    Workload,
)
from policies.paths import PathPattern

type Json = Any  # what a JSON reader gives

_ENUMS = (Action, Stage, Tls, Mode)
_VALUES = (Place, Pattern, PortRange, Entry, PathPattern, KubernetesMatch, Match, Test, Workload)  # by position
_RULES = (HostRule, TransportRule, NameRule)  # by keyword, without what has its default
_FIELDS = {made: [one for one in fields(made) if one.init] for made in (*_VALUES, *_RULES)}

# Differs when a field or a class is added: rows that another version wrote are not read.
SHAPE = sha256(
    repr([(made.__name__, [one.name for one in found]) for made, found in _FIELDS.items()]).encode()
).digest()


class MalformedRow(ValueError):
    """Bytes that no `write_row` made."""


class Later[T](Sequence[T]):
    """A tuple whose items are made when somebody asks for them."""

    __slots__ = ("_count", "_make")

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        numbers = range(self._count)[index]
        return self._make(numbers) if isinstance(numbers, int) else tuple(map(self._make, numbers))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


def write_row(value: object) -> bytes:
    """`value` as JSON. Raises TypeError for what is no part of a policy."""
    return orjson.dumps(_pack(value))


def read_row(row: bytes) -> Any:  # Any: the caller knows what it wrote there
    """The value that `write_row` was given. Raises MalformedRow."""
    try:
        return _unpack(orjson.loads(row))
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedRow(f"{type(error).__name__} in a row of {len(row)} bytes") from error


def _pack(value: object) -> Json:
    made = type(value)
    if value is None or made in (str, int, bool):
        return value
    if isinstance(value, _ENUMS):
        return {made.__name__: [value.value]}
    if isinstance(value, frozenset):
        return {"frozenset": [_pack(item) for item in value]}
    if isinstance(value, tuple | Later):
        if value and isinstance(value[0], IPv4Network | IPv6Network):
            return {"networks": list(map(str, value))}
        return [_pack(item) for item in value]
    if isinstance(value, date):
        return {"date": [value.year, value.month, value.day]}
    if isinstance(value, dict):
        return {"dict": [[_pack(key), _pack(item)] for key, item in value.items()]}
    if made in _RULES:
        found = ((one, getattr(value, one.name)) for one in _FIELDS[made])
        return {made.__name__: {one.name: _pack(item) for one, item in found if item != one.default}}
    if made in _VALUES:
        return {made.__name__: [_pack(getattr(value, one.name)) for one in _FIELDS[made]]}
    raise TypeError(f"{made.__name__} is no part of a policy")


def _unpack(value: Json) -> Any:  # as `read_row`
    if type(value) is list:
        return tuple(map(_unpack, value))
    if type(value) is not dict:
        return value
    ((name, content),) = value.items()
    make = _MAKE[name]
    if type(content) is dict:
        return make(**{key: _unpack(item) for key, item in content.items()})
    return make(*map(_unpack, content))


def _networks(*texts: str) -> Later[Network]:
    """A service tag has thousands of prefixes; its verdicts cite the rule and read none of them."""
    return Later(len(texts), lambda index: ip_network(texts[index]))


_MAKE: dict[str, Callable[..., object]] = {made.__name__: made for made in (*_RULES, *_VALUES, *_ENUMS)}
_MAKE |= {
    "date": date,
    "dict": lambda *pairs: dict(pairs),
    "frozenset": lambda *items: frozenset(items),
    "networks": _networks,
}
