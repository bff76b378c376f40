"""gate.yaml by the table of keys: reading one, with the place of each value, and its JSON Schema."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from policies.keys import Json, Key, Scope, Shape, Table, snake
from policies.model import Place
from policies.tree import Node
from proxy.config.key import ConfigKey
from proxy.config.keys import BY_PATH, KEYS, PARTS


@dataclass(frozen=True, slots=True)
class Placed:
    """A value in gate.yaml, and where it stands."""

    value: Any  # of whatever type the key has
    place: Place


def _placed(shape: Shape[Any]) -> Shape[Placed]:
    return Shape(lambda node, scope: Placed(shape.read(node, scope), scope.place(node)), shape.schema)


def _table(what: str, prefix: str) -> Table:
    inner = {key.name: Key(_placed(key.shape), key.says, key.path) for key in KEYS if _above(key) == prefix}
    return Table(what, inner, {key.name: _belongs(key) for key in KEYS if _above(key) != prefix})


def _above(key: ConfigKey) -> str:
    return key.path.rpartition(".")[0]


def _belongs(key: ConfigKey) -> str:
    above = _above(key)
    return f"{key.name} stands under {above}:" if above else f"{key.name} stands at the top of the file"


def _gate() -> Table:
    top = _table("the gate's configuration", "")
    parts = {name: Key(_table(name, name).shape, says) for name, says in PARTS.items()}
    known = {**top.keys, **parts}
    return Table(top.what, known, {key.name: _belongs(key) for key in KEYS if key.name not in known})


_GATE = _gate()


def read_gate(node: Node, scope: Scope) -> Iterator[tuple[ConfigKey, Placed]]:
    """Every key of a gate.yaml with its value. Raises Wrong with every problem."""
    fields = _GATE.read(node, scope)
    for found in (fields, *(fields.pop(snake(name), {}) for name in PARTS)):
        for path, placed in found.items():
            yield BY_PATH[path], placed


def gate_schema() -> Json:
    """The JSON Schema of gate.yaml, draft 2020-12. What needs more than one key to judge is left to `serve --check`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Outgate, the configuration of a gate",
        "description": "What an operator says besides the policy. Flags and OUTGATE_ variables say the same and win.",
        **_GATE.schema,
    }
