"""What makes one JSON document of another (RFC 6902)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from proxy.injection.model import Json


def difference(before: Any, after: Any, path: str = "") -> Iterator[Json]:  # Any: JSON of somebody else
    """Operations that, in this order, make `after` of `before`. Lists of things with names are told apart by them."""
    if before is after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        yield from _of_objects(before, after, path)
    elif isinstance(before, list) and isinstance(after, list):
        yield from _of_lists(before, after, path)
    elif before != after:
        yield {"op": "replace", "path": path, "value": after}


def apply_in(path: tuple[str, ...], operations: tuple[Json, ...]) -> tuple[Json, ...]:
    """The operations for the document in which theirs is at `path`."""
    prefix = "".join(f"/{_escaped(part)}" for part in path)
    return tuple({**one, "path": prefix + one["path"]} for one in operations)


def _of_objects(before: Json, after: Json, path: str) -> Iterator[Json]:
    for key in before:
        if key not in after:
            yield {"op": "remove", "path": f"{path}/{_escaped(key)}"}
    for key, value in after.items():
        here = f"{path}/{_escaped(key)}"
        if key in before:
            yield from difference(before[key], value, here)
        else:
            yield {"op": "add", "path": here, "value": value}


def _of_lists(before: list[Any], after: list[Any], path: str) -> Iterator[Json]:
    more = len(after) - len(before)
    former, latter = _names(before), _names(after)
    if former is None or latter is None or more < 0:
        if before != after:
            yield {"op": "replace", "path": path, "value": after}
    elif latter[more:] == former:
        for number, one in enumerate(before):
            yield from difference(one, after[number + more], f"{path}/{number}")
        for number in range(more):
            yield {"op": "add", "path": f"{path}/{number}", "value": after[number]}
    elif latter[: len(before)] == former:
        for number, one in enumerate(before):
            yield from difference(one, after[number], f"{path}/{number}")
        yield from ({"op": "add", "path": f"{path}/-", "value": one} for one in after[len(before) :])
    else:
        yield {"op": "replace", "path": path, "value": after}


def _names(values: list[Any]) -> list[str] | None:
    found: list[str] = []
    for one in values:
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str):
            return None
        found.append(name)
    return found


def _escaped(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")
