"""Parts of a specification as what they must be. What is another shape is refused, never guessed at."""

from __future__ import annotations

import re

from proxy.injection.model import Json

MAX_ITEMS = 2048  # containers, variables, volumes: each costs time


class Unfit(Exception):
    """No pod that can be guarded. `str()` is one line: where, what, repair."""


_VISIBLE = re.compile(r"[^\x21-\x7e]")


def shown(value: object) -> str:
    """A value of somebody else, in a message."""
    return _VISIBLE.sub("?", str(value))[:80]


def mapping(of: Json, key: str, where: str) -> Json:
    """What stands at `key`, or an empty one. Raises Unfit."""
    found = of.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise Unfit(f"{where}{key}: not an object")
    return found


def items(of: Json, key: str, where: str, *, most: int | None = MAX_ITEMS) -> list[Json]:
    """The objects that stand at `key`. Raises Unfit."""
    found = of.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or (most is not None and len(found) > most):
        raise Unfit(f"{where}{key}: not a list, or one of more than {most}")
    for number, one in enumerate(found):
        if not isinstance(one, dict) or not all(isinstance(name, str) for name in one):
            raise Unfit(f"{where}{key}[{number}]: not an object")
    return found


def words(of: Json, key: str, where: str) -> list[str]:
    """The strings that stand at `key`. Raises Unfit."""
    found = of.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise Unfit(f"{where}{key}: not a list of strings")
    return found


def texts(of: Json, key: str, where: str) -> dict[str, str]:
    """Labels or annotations. Raises Unfit."""
    found = mapping(of, key, where)
    if not all(isinstance(value, str) for value in found.values()):
        raise Unfit(f"{where}{key}: a value that is no string; quote it")
    return found


def text(of: Json, key: str, where: str) -> str:
    """A string, or an empty one. Raises Unfit."""
    found = of.get(key)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise Unfit(f"{where}{key}: not a string")
    return found


def flag(of: Json, key: str, where: str) -> bool | None:
    """Raises Unfit."""
    found = of.get(key)
    if found is not None and not isinstance(found, bool):
        raise Unfit(f"{where}{key}: not true or false")
    return found


def whole(of: Json, key: str, where: str) -> int | None:
    """Raises Unfit."""
    found = of.get(key)
    if found is None:
        return None
    # YAML and JSON have 1337.0, which an API server takes as 1337.
    if isinstance(found, float) and found.is_integer():
        return int(found)
    if not isinstance(found, int) or isinstance(found, bool):
        raise Unfit(f"{where}{key}: not a number")
    return found
